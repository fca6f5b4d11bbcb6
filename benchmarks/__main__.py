"""``python -m benchmarks [NAME…]``: measures, prints a table, writes one JSON file."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from rich.console import Console

from benchmarks import (
    bench_archive,
    bench_keys,
    bench_lake,
    bench_lineage,
    bench_resolve,
    bench_resolver,
    bench_traces,
    bench_trees,
    bench_write,
)
from benchmarks.bench import Bench
from benchmarks.measure import Budget
from benchmarks.records import Conditions, Record, conditions, default_path, write_records
from benchmarks.table import number, print_table

SECONDS_PER_FIGURE: Final = 3.0
QUICK_SECONDS_PER_FIGURE: Final = 0.06
RUNS: Final = 3
"""Every figure is the median of so many; in a smoke run there is one."""
QUICK_RUNS: Final = 1
TABLE_WIDTH: Final = 200
"""Where the table goes into a file: nothing is cut."""

FILES: Final[tuple[tuple[tuple[str, ...], Callable[[Bench], Awaitable[None]]], ...]] = (
    (bench_write.FIGURES, bench_write.run),
    (bench_resolve.FIGURES, bench_resolve.run),
    (bench_resolver.FIGURES, bench_resolver.run),
    (bench_keys.FIGURES, bench_keys.run),
    (bench_lineage.FIGURES, bench_lineage.run),
    (bench_lake.FIGURES, bench_lake.run),
    (bench_trees.FIGURES, bench_trees.run),
    (bench_archive.FIGURES, bench_archive.run),
    (bench_traces.FIGURES, bench_traces.run),
)


def main() -> int:
    """Runs the figures that the command line asks for; returns the exit code."""
    names = [name for figures, _ in FILES for name in figures]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures Holdfast beside its raw limits and writes benchmarks/results/<date>-<commit>.json.",
        epilog=f"figures: {', '.join(names)}",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="figures: a name, its beginning or a pattern")
    parser.add_argument(
        "--seconds-per-figure",
        type=_seconds,
        metavar="N",
        help=f"how long each figure is measured, ours and raw together (default {SECONDS_PER_FIGURE:g})",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the records go")
    parser.add_argument("--quick", action="store_true", help="a smoke run, whose figures mean nothing")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="the disk to measure on (default: where temporary files go)"
    )
    arguments = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    progress = Console(stderr=True)
    if arguments.names and not _known(arguments.names, names):
        progress.print(f"no figure is named {' or '.join(arguments.names)}; there are: {', '.join(names)}")
        return 2
    logging.basicConfig(level=logging.ERROR)
    default_s = QUICK_SECONDS_PER_FIGURE if arguments.quick else SECONDS_PER_FIGURE
    runs = QUICK_RUNS if arguments.quick else RUNS
    budget = Budget(arguments.seconds_per_figure or default_s, runs=runs, quick=arguments.quick)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=arguments.data) as scratch:
        shared = conditions(Path(scratch))
        if shared.machine["file_system"] in ("tmpfs", "ramfs"):
            progress.print("this disk is memory: durable figures mean nothing here; give another one with --data")
        bench = Bench(budget, shared, Path(scratch), arguments.names, lambda record: _tell(progress, record))
        asyncio.run(_run(bench))
    _report(bench, shared, arguments.json or default_path(shared), console)
    console.print(f"{len(bench.records)} records in {time.monotonic() - began:.0f} s")
    return 0


async def _run(bench: Bench) -> None:
    for _, run in FILES:
        await run(bench)


def _report(bench: Bench, shared: Conditions, path: Path, console: Console) -> None:
    print_table(bench.records, shared, console)
    write_records(path, bench.records)
    console.print(f"records: {path}")


def _tell(progress: Console, record: Record) -> None:
    line = f"{record.name}: {number(record.value)} {record.unit}, raw {number(record.raw_limit.value)}"
    progress.print(f"{line}, ratio {record.ratio:.2f} ({record.raw_limit.what})", highlight=False, soft_wrap=True)


def _known(asked: list[str], names: list[str]) -> bool:
    probe = Bench(Budget(1, 1), Conditions(versions={}, machine={}, git_commit="", started_at=""), Path(), asked)
    return probe.wants(*names)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 60:
        raise argparse.ArgumentTypeError("more than 0 and up to 60 seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
