"""``python -m benchmarks``: measures, prints a table, writes one JSON file.

* ``python -m benchmarks [NAME…]``: the figures, each beside its raw limit and its peers;
* ``python -m benchmarks full [CURVE…]``: the growth curves;
* ``python -m benchmarks guard``: has anything collapsed;
* ``python -m benchmarks render RECORDS…``: the tables and plots of ``docs/performance.md`` from records.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from benchmarks import (
    bench_analytics,
    bench_archive,
    bench_at_rest,
    bench_handlers,
    bench_keys,
    bench_lake,
    bench_lineage,
    bench_memory,
    bench_pipelined,
    bench_resolve,
    bench_resolver,
    bench_traces,
    bench_trees,
    bench_write,
)
from benchmarks.bench import Bench
from benchmarks.curves.run import main as run_curves
from benchmarks.event_loop import default_loop, run_on_loop
from benchmarks.guard import main as run_guard
from benchmarks.measure import Budget
from benchmarks.peers.figures import IN_PROCESS, PEERS, open_peers
from benchmarks.records import Conditions, Record, conditions, default_path, write_records
from benchmarks.render import main as run_render
from benchmarks.table import number, print_table
from benchmarks.targets import unmeasured

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
    (bench_at_rest.FIGURES, bench_at_rest.run),
    (bench_pipelined.FIGURES, bench_pipelined.run),
    (bench_handlers.FIGURES, bench_handlers.run),
    (bench_analytics.FIGURES, bench_analytics.run),
    (bench_memory.FIGURES, bench_memory.run),
)


COMMANDS: Final[dict[str, Callable[[Sequence[str]], int]]] = {
    "full": run_curves,
    "guard": run_guard,
    "render": run_render,
}


def main() -> int:
    """Runs what the command line asks for; returns the exit code."""
    # As Ctrl-C does: servers are stopped and scratch data is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    try:
        return command(sys.argv[2:]) if command else _figures()
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130


def _figures() -> int:
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
    parser.add_argument("--no-peers", action="store_true", help="without the stores to compare with")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default=default_loop(), help="what every side runs on")
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
        shared = conditions(Path(scratch), arguments.loop)
        if shared.machine["file_system"] in ("tmpfs", "ramfs"):
            progress.print("this disk is memory: durable figures mean nothing here; give another one with --data")
        bench = Bench(budget, shared, Path(scratch), arguments.names, lambda record: _tell(progress, record))
        # A smoke run starts no server of others; it has the peer that needs none.
        names = [] if arguments.no_peers else [name for name in PEERS if not arguments.quick or name in IN_PROCESS]
        run_on_loop(arguments.loop, _run(bench, names, progress))
    _report(bench, shared, arguments.json or default_path(shared), console)
    console.print(f"{len(bench.records)} records in {time.monotonic() - began:.0f} s")
    return 0


async def _run(bench: Bench, peers: Sequence[str], progress: Console) -> None:
    async with open_peers(bench.peer_parent, peers, progress.print) as bench.peers:
        for _, run in FILES:
            await run(bench)


def _report(bench: Bench, shared: Conditions, path: Path, console: Console) -> None:
    print_table(bench.records, shared, console)
    write_records(path, bench.records)
    missing = unmeasured(record.name for record in bench.records)
    if missing and not bench.is_partial:
        console.print(f"targets of figures that were not measured here: {', '.join(missing)}", soft_wrap=True)
    console.print(f"records: {path}")


def _tell(progress: Console, record: Record) -> None:
    line = f"{record.name}: {number(record.value)} {record.unit}, raw {number(record.raw_limit.value)}"
    line += f", ratio {record.ratio:.2f} ({record.raw_limit.what})"
    for peer in record.peers:
        line += f"; {peer.name} {number(peer.value)}, ratio {peer.ratio:.2f}"
    progress.print(line, highlight=False, soft_wrap=True)


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
