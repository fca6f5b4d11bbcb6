"""``python -m benchmarks full [CURVE…]``: measures the growth curves, prints their exponents, writes one JSON file."""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.bench import Bench
from benchmarks.curves import cold, hot
from benchmarks.curves.curve import Curve, CurvesFile
from benchmarks.event_loop import default_loop, run_on_loop
from benchmarks.measure import Budget
from benchmarks.records import RESULTS, Record, conditions
from benchmarks.table import number, print_table
from benchmarks.targets import overall

SECONDS_PER_POINT: Final = 4.0
RUNS: Final = 3
TABLE_WIDTH: Final = 200
BYTES_A_ROW: Final = 700
"""Of the largest lake, its index and the one beside it: what must be free before it is begun."""

CURVES: Final[dict[str, Callable[[Bench, float], Awaitable[list[Curve]]]]] = {
    "bodies": hot.body_size,
    "concurrency": hot.concurrency,
    "versions": hot.versions,
    "subjects": hot.subjects,
    "files": cold.files,
    "sql": cold.sql,
    "rows": cold.rows,
}


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
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the curves go")
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
        shared = conditions(Path(scratch), loop)
        budget = Budget(options.seconds_per_point, options.runs, quick=options.share < 0.001)
        bench = Bench(budget, shared, Path(scratch), [])
        curves: list[Curve] = []
        seconds: dict[str, float] = {}

        async def run() -> None:
            for name in names:
                began = time.monotonic()
                curves.extend(await CURVES[name](bench, options.share))
                seconds[name] = round(time.monotonic() - began, 1)
                progress.print(f"{name}: {seconds[name]:.0f} s")

        run_on_loop(loop, run())
    records = bench.records if options.share == 1.0 else [_scaled(record) for record in bench.records]
    path: Path = options.json or RESULTS / f"curves-{shared.started_at[:10]}-{shared.git_commit}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    outcome = CurvesFile(conditions=shared, curves=curves, records=records, seconds=seconds)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(outcome), indent=1) + b"\n")
    print_curves(curves, console)
    if records:
        print_table(records, shared, console)
    console.print(f"curves: {path}")
    return 0


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


def _scaled(record: Record) -> Record:
    """A part of the way says nothing about the targets of its end."""
    return msgspec.structs.replace(record, verdicts=[])
