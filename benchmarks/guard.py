"""``python -m benchmarks guard``: a few seconds that tell whether a hot path has collapsed.

Ours and the raw limit in turn, in one process, and the ratio of the two compared with a bound that is a fifth of what
is usual: not a timed test, since the machine's speed falls out of the ratio, and not a benchmark, since a factor of two
passes.  Guarded: ``put`` from 64 tasks, hot ``resolve`` from 64 tasks, ``resolve_batch`` of the resolver, one cycle of
the archiver.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from benchmarks import bench_archive, bench_resolve, bench_resolver, bench_write
from benchmarks.bench import Bench
from benchmarks.measure import Budget
from benchmarks.records import Record, conditions

USUAL: Final[Mapping[str, float]] = {
    "put_64_producers": 0.8,
    "resolve_hot_64": 0.95,
    "resolver_batch_100_16": 0.6,
    "archive": 0.175,
}
"""Ratios to the raw limit as docs/performance.md has them: more is better in all of them.  They change with it."""

LEAST: Final[Mapping[str, float]] = {name: round(usual / 5, 3) for name, usual in USUAL.items()}
"""The least ratio that passes."""

SECONDS_PER_FIGURE: Final = 0.3
RUNS: Final = 3
SMALLER: Final = 20
"""By what what is stored beforehand is divided: a guard need not fill a lake."""


class Collapse(msgspec.Struct, frozen=True):
    """A figure that is below its bound."""

    name: str
    ratio: float
    least: float

    def __str__(self) -> str:
        return f"{self.name} reaches {self.ratio:.3f} of its raw limit, and at least {self.least} is expected"


class GuardBench(Bench):
    """A run that measures properly and prepares little."""

    def scale(self, full: int, quick: int) -> int:
        return max(quick, full // SMALLER)


def collapses(records: Sequence[Record], least: Mapping[str, float] = LEAST) -> list[Collapse]:
    """Returns what has collapsed: the best of neighbouring runs counts, since noise only slows down."""
    found = {record.name: record.ratio_high for record in records}
    return [
        Collapse(name, found[name], bound) for name, bound in least.items() if name in found and found[name] < bound
    ]


async def measure_guarded(scratch: Path, names: Sequence[str] = tuple(LEAST)) -> list[Record]:
    """Measures the guarded figures below ``scratch``."""
    bench = GuardBench(Budget(SECONDS_PER_FIGURE, RUNS), conditions(scratch), scratch, list(names))
    for run in (bench_write.run, bench_resolve.run, bench_resolver.run, bench_archive.run):
        await run(bench)
    return [record for record in bench.records if record.name in LEAST]


def main(arguments: Sequence[str]) -> int:
    """Runs the guard; returns 1 when something has collapsed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks guard", description="Has a hot path collapsed?")
    parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="holdfast-guard-") as scratch:
        records = asyncio.run(measure_guarded(Path(scratch)))
    for record in records:
        print(f"{record.name}: {record.ratio_high:.3f} of its raw limit, at least {LEAST[record.name]} expected")
    failed = collapses(records)
    for collapse in failed:
        print(f"collapsed: {collapse}", file=sys.stderr)
    return 1 if failed else 0
