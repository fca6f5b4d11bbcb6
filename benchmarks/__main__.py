"""``python -m benchmarks``: measures, prints a table, writes one JSON file as it goes on.

* ``python -m benchmarks [NAME…]``: the figures, each beside its raw limit and its peers;
* ``python -m benchmarks full [CURVE…]``: the growth curves;
* ``python -m benchmarks guard``: has anything collapsed;
* ``python -m benchmarks render RECORDS…``: the tables and plots of ``docs/performance.md`` from records.

A figure that fails does not stop the others: it is told at the end, and in the exit code.
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
from benchmarks.bench import Bench, Figure
from benchmarks.curves.run import main as run_curves
from benchmarks.event_loop import default_loop
from benchmarks.guard import main as run_guard
from benchmarks.measure import Budget, Side
from benchmarks.outcome import STOPPED, Outcome
from benchmarks.peers.figures import IN_PROCESS, PEERS, open_peers
from benchmarks.records import RUNS, Conditions, Record, ResultsFile, conditions, default_path
from benchmarks.render import main as run_render
from benchmarks.table import number, print_table
from benchmarks.targets import unmeasured

SECONDS_PER_FIGURE: Final = 3.0
QUICK_SECONDS_PER_FIGURE: Final = 0.06
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


class KeepingBench(Bench):
    """A run in which a figure that fails leaves the others alone."""

    def __init__(
        self, budget: Budget, shared: Conditions, scratch: Path, names: list[str], on_record: Callable[[Record], None]
    ) -> None:
        super().__init__(budget, shared, scratch, names, on_record)
        self.outcome = Outcome()

    async def figure(self, figure: Figure, ours: Side, *raws: Side) -> None:
        try:
            await super().figure(figure, ours, *raws)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next figure can still be measured
            self.outcome.fail(figure.name, error)

    async def figure_beside(self, figure: Figure, sides: Sequence[Side], peers: Sequence[Side]) -> None:
        try:
            await super().figure_beside(figure, sides, peers)
        except Exception as error:  # noqa: BLE001 - as above
            self.outcome.fail(figure.name, error)

    async def run_file(self, figures: Sequence[str], run: Callable[[Bench], Awaitable[None]]) -> None:
        """Measures the figures of one file; what fails outside a figure fails those that have not been measured."""
        try:
            await run(self)
        except Exception as error:  # noqa: BLE001 - as above
            known = {record.name.partition(":")[0] for record in self.records} | set(self.outcome.failures)
            left = [name for name in figures if self.wants(name) and name not in known]
            self.outcome.fail(", ".join(left) or f"the end of the file with {figures[0]}", error)


def main() -> int:
    """Runs what the command line asks for; returns the exit code."""
    # As Ctrl-C does: servers are stopped and scratch data is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    try:
        return command(sys.argv[2:]) if command else run_figures(sys.argv[1:])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED


def run_figures(arguments: Sequence[str]) -> int:
    """Measures the figures that the command line asks for; returns the exit code."""
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
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="where the records go (a file that is there is kept: -2, -3 …)"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run, whose figures mean nothing")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="the disk to measure on (default: where temporary files go)"
    )
    parser.add_argument("--no-peers", action="store_true", help="without the stores to compare with")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default=default_loop(), help="what every side runs on")
    options = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    progress = Console(stderr=True)
    if options.names and not _known(options.names, names):
        progress.print(f"no figure is named {' or '.join(options.names)}; there are: {', '.join(names)}")
        return 2
    logging.basicConfig(level=logging.ERROR)
    default_s = QUICK_SECONDS_PER_FIGURE if options.quick else SECONDS_PER_FIGURE
    runs = QUICK_RUNS if options.quick else RUNS
    budget = Budget(options.seconds_per_figure or default_s, runs=runs, quick=options.quick)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=options.data) as scratch:
        shared = conditions(Path(scratch), options.loop)
        if shared.machine["file_system"] in ("tmpfs", "ramfs"):
            progress.print("this disk is memory: durable figures mean nothing here; give another one with --data")
        results = ResultsFile(options.json or default_path(shared))

        def keep(record: Record) -> None:
            _tell(progress, record)
            results.keep(bench.records, progress.print)

        bench = KeepingBench(budget, shared, Path(scratch), options.names, keep)
        # A smoke run starts no server of others; it has the peer that needs none.
        names = [] if options.no_peers else [name for name in PEERS if not options.quick or name in IN_PROCESS]
        bench.outcome.run(options.loop, _run(bench, names, progress))
    _report(bench, shared, console)
    console.print(f"{len(bench.records)} records in {time.monotonic() - began:.0f} s")
    # Once more, for what a full disk may have kept out of it.
    is_written = bool(bench.records) and results.keep(bench.records, progress.print)
    return bench.outcome.tell("records", results.path if is_written else None, console, progress)


async def _run(bench: KeepingBench, peers: Sequence[str], progress: Console) -> None:
    async with open_peers(bench.peer_parent, peers, progress.print) as bench.peers:
        for figures, run in FILES:
            await bench.run_file(figures, run)


def _report(bench: Bench, shared: Conditions, console: Console) -> None:
    if bench.records:
        print_table(bench.records, shared, console)
    missing = unmeasured(record.name for record in bench.records)
    if missing and not bench.is_partial:
        console.print(f"targets of figures that were not measured here: {', '.join(missing)}", soft_wrap=True)


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
