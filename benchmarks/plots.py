"""Curves as SVG, both axes logarithmic: a line for ours, a dashed one for its raw limit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from benchmarks.curves.curve import Curve

_WIDTH: Final = 720
_HEIGHT: Final = 380
_LEFT: Final = 80
_RIGHT: Final = 200
_TOP: Final = 28
_BOTTOM: Final = 44
_COLOURS: Final = ("#2166ac", "#b2182b", "#1b7837", "#762a83")
_LABEL_HEIGHT: Final = 13


class Axis(NamedTuple):
    """A logarithmic axis: from ``low`` to ``high``, powers of ten, over a span of the picture."""

    low: int
    high: int
    start: float
    end: float

    def at(self, value: float) -> float:
        """Returns where a value is."""
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * share

    def decades(self) -> Iterator[int]:
        """Returns the exponents of its marks."""
        return iter(range(self.low, self.high + 1))


def plot(title: str, curves: Sequence[Curve]) -> str:
    """Returns curves over the same x as one picture."""
    xs = [point.x for curve in curves for point in curve.points]
    costs = [cost for curve in curves for point in curve.points for cost in (point.cost, point.raw) if cost]
    x_axis = _axis(xs, _LEFT, _WIDTH - _RIGHT)
    y_axis = _axis(costs, _HEIGHT - _BOTTOM, _TOP)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
            'font-size="12">'
        ),
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="16">{escape(title)}</text>',
    ]
    for decade in y_axis.decades():
        y = y_axis.at(10.0**decade)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        label = f"{_short(10.0**decade)} {curves[0].cost_unit}"
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for decade in x_axis.decades():
        x = x_axis.at(10.0**decade)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{_short(10.0**decade)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(curves[0].x_name)}</text>')
    taken: list[float] = []
    for curve, colour in zip(curves, _COLOURS * len(curves), strict=False):
        own = [(point.x, point.cost) for point in curve.points]
        raw = [(point.x, point.raw) for point in curve.points if point.raw]
        parts.append(_line(own, x_axis, y_axis, colour, ""))
        parts += [
            f'<circle cx="{x_axis.at(x):.1f}" cy="{y_axis.at(cost):.1f}" r="3" fill="{colour}"/>' for x, cost in own
        ]
        parts.append(_label(own[-1][1], y_axis, colour, f"{curve.name} (x^{curve.fit.exponent:.2f})", taken))
        if raw:
            parts.append(_line(raw, x_axis, y_axis, colour, ' stroke-dasharray="4 3"'))
            parts.append(_label(raw[-1][1], y_axis, colour, "its raw limit", taken))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axis(values: Sequence[float], start: float, end: float) -> Axis:
    low = math.floor(math.log10(min(values)) + 1e-9)
    high = math.ceil(math.log10(max(values)) - 1e-9)
    return Axis(low, max(high, low + 1), start, end)


def _line(points: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis, colour: str, style: str) -> str:
    places = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(cost):.1f}" for x, cost in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"{style}/>'


def _label(cost: float, y_axis: Axis, colour: str, text: str, taken: list[float]) -> str:
    y = y_axis.at(cost) + 4
    while any(abs(y - other) < _LABEL_HEIGHT for other in taken):
        y += 1
    taken.append(y)
    return f'<text x="{_WIDTH - _RIGHT + 6}" y="{y:.1f}" fill="{colour}">{escape(text)}</text>'


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"
