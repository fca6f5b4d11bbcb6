"""``python -m benchmarks full [CURVE…]``: measures the growth curves, prints their exponents, writes one JSON file.

The file is written after every point, so that a run that is stopped keeps what it has measured.  Curves that are
measured together and fail do not stop the others: that is told at the end, and in the exit code.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.bench import Bench
from benchmarks.curves import cold, hot
from benchmarks.curves.curve import Curve, CurvesFile, OnPoint, Point
from benchmarks.event_loop import default_loop
from benchmarks.measure import Budget
from benchmarks.outcome import Outcome
from benchmarks.records import RUNS, Conditions, Record, ResultsFile, conditions, default_path
from benchmarks.table import number, print_table
from benchmarks.targets import judge, judge_exponent, overall

SECONDS_PER_POINT: Final = 4.0
TABLE_WIDTH: Final = 200
BYTES_A_ROW: Final = 700
"""Of the largest lake, its index and the one beside it: what must be free before it is begun."""


class Family(NamedTuple):
    """Curves that are measured together, and what they are measured at along the whole way."""

    measure: Callable[[Bench, float, OnPoint], Awaitable[list[Curve]]]
    xs: Sequence[int]


CURVES: Final[dict[str, Family]] = {
    "bodies": Family(hot.body_size, hot.BODIES),
    "concurrency": Family(hot.concurrency, hot.CALLERS),
    "versions": Family(hot.versions, hot.VERSIONS),
    "subjects": Family(hot.subjects, hot.SUBJECTS),
    "files": Family(cold.files, cold.FILES),
    "sql": Family(cold.sql, cold.ROWS[1:]),
    "rows": Family(cold.rows, cold.ROWS),
}


class CurvesRun(CurvesFile, frozen=True, kw_only=True):
    """What is there of a run so far: of curves that are not finished, or failed, the points by their name."""

    unfinished: dict[str, list[Point]] = msgspec.field(default_factory=dict[str, list[Point]])


class Measuring:
    """A run along the curves: keeps in a file, and tells, what has been measured as soon as it has."""

    def __init__(self, bench: Bench, shared: Conditions, results: ResultsFile, say: Callable[[str], object]) -> None:
        self.curves: list[Curve] = []
        self.outcome = Outcome()
        self._bench = bench
        self._shared = shared
        self._results = results
        self._say = say
        self._seconds: dict[str, float] = {}
        self._unfinished: dict[str, list[Point]] = {}
        self._began = time.monotonic()

    @property
    def records(self) -> list[Record]:
        """The figures of the last points; of a part of the way, they say so."""
        return [_judged(record, self._shared.share) for record in self._bench.records]

    async def run(self, names: Sequence[str]) -> None:
        """Measures families of curves, one after the other."""
        for name in names:
            began = time.monotonic()
            try:
                found = await CURVES[name].measure(self._bench, self._shared.share, self._on_point(name))
            except Exception as error:  # noqa: BLE001 - whatever it is, the next curves can still be measured
                self.outcome.fail(name, error)
                continue
            self.curves += [_judged_curve(curve, self._shared.share) for curve in found]
            for curve in found:
                self._unfinished.pop(curve.name, None)
            self._seconds[name] = round(time.monotonic() - began, 1)
            self.keep()
            self._say(f"{name}: {self._seconds[name]:.0f} s")

    def keep(self) -> bool:
        """Writes what there is; returns whether there is something, and it could be written."""
        if not (self.curves or self._unfinished or self._bench.records):
            return False
        found = CurvesRun(
            conditions=self._shared,
            curves=self.curves,
            records=self.records,
            seconds=self._seconds,
            unfinished=self._unfinished,
        )
        return self._results.keep(found, self._say)

    def _on_point(self, family: str) -> OnPoint:
        most = len(CURVES[family].xs)
        of = f"of {most}" if self._shared.share >= 1 else f"of {most} at most"

        def on_point(curve: str, point: Point) -> None:
            points = self._unfinished.setdefault(curve, [])
            points.append(point)
            self.keep()
            self._say(
                f"{curve}: point {len(points)} {of}, cost {number(point.cost)} at {number(point.x)}; "
                f"{time.monotonic() - self._began:.0f} s so far"
            )

        return on_point


def main(arguments: Sequence[str]) -> int:
    """Runs the curves that the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks full",
        description="Measures growth curves and writes benchmarks/results/curves-<date>-<commit>.json.",
    )
    parser.add_argument("names", metavar="CURVE", nargs="*", help=f"one of: {', '.join(CURVES)}")
    parser.add_argument("--share", type=float, default=1.0, help="how far along the curves, 1 being their end")
    parser.add_argument("--seconds-per-point", type=float, default=SECONDS_PER_POINT, metavar="N")
    parser.add_argument("--runs", type=int, default=RUNS, help="of which a point is the median")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="where the curves go (a file that is there is kept: -2, -3 …)"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="the disk to measure on")
    options = parser.parse_args(arguments)
    names: list[str] = options.names or list(CURVES)
    console = Console(width=None if Console().is_terminal else TABLE_WIDTH)
    progress = Console(stderr=True)
    if unknown := set(names) - set(CURVES):
        progress.print(f"no curve is named {', '.join(sorted(unknown))}; there are: {', '.join(CURVES)}")
        return 2
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="holdfast-curves-", dir=options.data) as scratch:
        needed = int(cold.ROWS[-1] * options.share * BYTES_A_ROW)
        if shutil.disk_usage(scratch).free < needed:
            progress.print(f"{needed / 1e9:.0f} GB are needed below {scratch}; give another disk with --data")
            return 2
        loop = default_loop()
        shared = msgspec.structs.replace(conditions(Path(scratch), loop), share=options.share)
        results = ResultsFile(options.json or default_path(shared, "curves-"))
        budget = Budget(options.seconds_per_point, options.runs, quick=options.share < 0.001)

        def keep(_: Record) -> None:
            measuring.keep()

        measuring = Measuring(
            Bench(budget, shared, Path(scratch), [], keep),
            shared,
            results,
            lambda line: progress.print(line, highlight=False, markup=False, soft_wrap=True),
        )
        measuring.outcome.run(loop, measuring.run(names))
    if measuring.curves:
        print_curves(measuring.curves, console)
    if measuring.records:
        print_table(measuring.records, shared, console)
    # Once more, for what a full disk may have kept out of it.
    path = results.path if measuring.keep() else None
    return measuring.outcome.tell("curves", path, console, progress)


def print_curves(curves: Sequence[Curve], console: Console) -> None:
    """Prints one line a curve: from where to where, the exponent, and how well it fits."""
    table = Table(title="growth: cost = factor · x^exponent", title_justify="left", pad_edge=False)
    for heading in ("curve", "what grows", "from", "to", "cost", "exponent", "r²", "raw", "target", ""):
        table.add_column(heading, no_wrap=heading != "what grows")
    for curve in curves:
        first, last = curve.points[0], curve.points[-1]
        table.add_row(
            curve.name,
            curve.x_name,
            number(first.x),
            number(last.x),
            f"{number(first.cost)} → {number(last.cost)} {curve.cost_unit}",
            f"{curve.fit.exponent:+.3f}",
            f"{curve.fit.r2:.2f}",
            f"{curve.raw_fit.exponent:+.3f}" if curve.raw_fit else "",
            "; ".join(str(verdict.target) for verdict in curve.verdicts),
            overall(list(curve.verdicts)),
        )
    console.print(table)


def _judged(record: Record, share: float) -> Record:
    """A part of the way says nothing about the targets of its end."""
    scaled = msgspec.structs.replace(record, share=min(1.0, share))
    return msgspec.structs.replace(scaled, verdicts=judge(scaled))


def _judged_curve(curve: Curve, share: float) -> Curve:
    return msgspec.structs.replace(curve, verdicts=judge_exponent(curve.name, curve.fit.exponent, share))
