"""The figures of ``benchmarks.growth`` for people: a table in Markdown, and a plot as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from benchmarks.growth import GrowthFigures, SessionFigures, Turn

_WIDTH: Final = 720
_HEIGHT: Final = 400
_LEFT: Final = 70
_BOTTOM: Final = 40
_TOP: Final = 20
_RIGHT: Final = 190

Curve = tuple[str, str, Callable[["Turn"], int]]

CURVES: Final[tuple[Curve, ...]] = (
    ("B: whole conversation each turn", "#b2182b", lambda turn: turn.b),
    ("B, each zstd 3", "#ef8a62", lambda turn: turn.b_zstd),
    ("Holdfast, hot tier", "#2166ac", lambda turn: turn.hot_bodies + turn.hot_versions),
    ("A: each step once", "#4d4d4d", lambda turn: turn.a),
    ("A, each zstd 3", "#999999", lambda turn: turn.a_zstd),
)


def markdown_table(figures: GrowthFigures) -> str:
    """Returns a row for each session and one for all, in KB, with the ratio of what is hot to A."""
    lines = [
        (
            "| session | turns | A | A zstd each | A zstd stream | B | B zstd each | B zstd stream | hot: bodies | "
            "hot: versions | hot / A |"
        ),
        "| --- |" + " ---: |" * 10,
    ]
    rows = [*figures.sessions]
    lines += [_row(f"`{row.name}`", [row]) for row in rows]
    if rows:
        lines.append(_row("**all**", rows))
        total = sum(row.last.a for row in rows)
        hot = sum(row.last.hot_bodies + row.last.hot_versions for row in rows)
        lines += [
            "",
            (
                f"Hot in all: {hot:,} B, {hot / total:.2f} x A.  Lake in all: {figures.lake_archived:,} B as archived "
                f"({figures.lake_archived / total:.3f} x A), {figures.lake_compacted:,} B compacted "
                f"({figures.lake_compacted / total:.3f} x A)."
            ),
        ]
    else:
        lines = [f"Interleaved. Lake: {figures.lake_archived:,} B as archived, {figures.lake_compacted:,} B compacted."]
    return "\n".join(lines)


def _row(name: str, rows: Sequence[SessionFigures]) -> str:
    def total(of: Callable[[SessionFigures], int]) -> int:
        return sum(map(of, rows))

    a = total(lambda row: row.last.a)
    hot = total(lambda row: row.last.hot_bodies + row.last.hot_versions)
    cells = (
        total(lambda row: row.turns),
        *(
            f"{value / 1000:,.0f}"
            for value in (
                a,
                total(lambda row: row.last.a_zstd),
                total(lambda row: row.a_zstd_stream),
                total(lambda row: row.last.b),
                total(lambda row: row.last.b_zstd),
                total(lambda row: row.b_zstd_stream),
                total(lambda row: row.last.hot_bodies),
                total(lambda row: row.last.hot_versions),
            )
        ),
        f"{hot / a:.2f}",
    )
    return f"| {name} | " + " | ".join(map(str, cells)) + " |"


def plot(figures: GrowthFigures) -> str:
    """Returns the bytes stored after each turn of the longest session, on a logarithmic scale, as an SVG."""
    turns = figures.first_session_turns
    session = figures.sessions[0]
    low, high = 1_000, max(curve(turns[-1]) for _, _, curve in CURVES)
    top = 10 ** len(str(high))
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
            'font-size="12">'
        ),
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="14">bytes stored after each of {session.turns} turns of {session.name}</text>',
    ]
    decade = low
    while decade <= top:
        y = _y(decade, low, top)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_bytes(decade)}</text>')
        decade *= 10
    for turn in range(0, len(turns) + 1, 50):
        x = _x(turn, len(turns))
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{turn}</text>')
    taken: list[float] = []
    for name, colour, curve in CURVES:
        points = " ".join(
            f"{_x(number, len(turns)):.1f},{_y(max(low, curve(turn)), low, top):.1f}"
            for number, turn in enumerate(turns, start=1)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        label_y = _y(max(low, curve(turns[-1])), low, top) + 4
        while any(abs(label_y - other) < 13 for other in taken):
            label_y += 1
        taken.append(label_y)
        parts.append(f'<text x="{_WIDTH - _RIGHT + 6}" y="{label_y:.1f}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _x(turn: int, turns: int) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * turn / turns


def _y(value: float, low: float, high: float) -> float:
    share = math.log10(value / low) / math.log10(high / low)
    return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * share


def _bytes(value: int) -> str:
    return f"{value // 1_000_000} MB" if value >= 1_000_000 else f"{value // 1_000} KB"
