"""Mixed chaos for a long time at a moderate load: no violation, and nothing that grows::

    python -m tests.campaigns.chaos --minutes 60 --load 0.3 --seed 7

First the same producers write as much as goes through for some seconds, undisturbed: that is the capacity.  Then they
write ``--load`` of it while every fault strikes on the plan of ``holdfast torture``.  Memory and open files of each
process are watched; from 20 minutes on, one that is not flat by the rule of :mod:`holdfast.ops.torture.usage` is a
violation.  ``--lake-rows`` gives the system a past: so many contexts, events and versions each, in a namespace of their
own.  What SQL and look-ups hold grows with the lake, which an hour that begins with nothing doubles between its second
quarter and its last: that would show size, not time.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from benchmarks.synthetic_lake import ContextRows, Group, append_rows, event_rows, version_rows

from holdfast.lake.lake import Lake
from holdfast.ops.torture.check import Violation
from holdfast.ops.torture.faults import chosen_faults
from holdfast.ops.torture.history import read_history
from holdfast.ops.torture.rig import TortureRig
from holdfast.ops.torture.run import WORKERS, TortureOptions, TortureReport, torture
from holdfast.ops.torture.usage import not_flat
from tests.campaigns.kills import conclude
from tests.campaigns.rig import tell

if TYPE_CHECKING:
    from holdfast.schemas.rows import Table

CAPACITY_S: Final = 10.0
WARM_S: Final = 3.0

PAST_FILES: Final = 40
"""Of each table, over a week that is long past."""

GAP_S: Final = 4.0
"""Mean time between two faults: the system is to run, not only to recover."""


class Outcome(msgspec.Struct, kw_only=True):
    """What a campaign came to."""

    campaign: str = "chaos"
    seed: int
    minutes: float
    load: float
    lake_rows: int = 0
    capacity_per_s: float
    rate_per_s: float
    report: TortureReport | None = None
    lost: int = 0
    doubled: int = 0
    violations: list[Violation] = []
    not_flat: list[str] = []
    seconds: float = 0.0
    kept: str = ""


async def measure_capacity(directory: Path, seed: int, seconds: float = CAPACITY_S) -> float:
    """Returns how many writes a second are acknowledged when nothing disturbs the same producers and workers."""
    async with TortureRig(directory, seed=seed) as rig:
        await rig.start_server()
        for child in [rig.spawn_worker(*names, name=name) for name, names in WORKERS.items()]:
            await rig.wait_ready(child)
        for name in ("sdk1", "sdk2"):
            rig.start_producer(name, "--lanes", "2", "--batch", "32")
        rig.start_producer("raw1", "--raw")
        rig.start_reader("reader1")
        await asyncio.sleep(WARM_S)
        before = read_history(rig.histories).counts()["acknowledged"]
        began = time.monotonic()
        await asyncio.sleep(seconds)
        written = read_history(rig.histories).counts()["acknowledged"] - before
        return written / (time.monotonic() - began)


def make_past(directory: Path, rows: int) -> None:
    """Writes a lake with so many rows in each table, of streams that are no more."""
    with Lake.open(directory, create=True) as lake:
        contexts = ContextRows(seed=1)
        tables: tuple[tuple[Table, Group], ...] = (
            ("contexts", contexts),
            ("events", event_rows),
            # What a stream loses of them is written back there, and must refer to something.
            ("key_versions", partial(version_rows, ref_of=contexts.ref)),
        )
        for table, group in tables:
            append_rows(lake, table, group, first=0, rows=rows, files=PAST_FILES, total=rows)


async def campaign(
    directory: Path,
    *,
    minutes: float,
    load: float,
    seed: int,
    faults: str | None = None,
    lake_rows: int = 0,
    is_told: bool = False,
) -> Outcome:
    """Measures, then runs the chaos; returns what was found."""
    began = time.monotonic()
    capacity = await measure_capacity(directory / "capacity", seed)
    rate = capacity * load
    outcome = Outcome(
        seed=seed,
        minutes=minutes,
        load=load,
        lake_rows=lake_rows,
        capacity_per_s=round(capacity, 1),
        rate_per_s=round(rate, 1),
    )
    if is_told:
        tell(f"capacity {capacity:,.0f} writes a second; the load is {rate:,.0f}")
    if lake_rows:
        await asyncio.to_thread(make_past, directory / "chaos" / "lake", lake_rows)
    options = TortureOptions(
        seed=seed,
        seconds=minutes * 60,
        faults=chosen_faults(faults),
        directory=directory / "chaos",
        rate=rate / 3,
        mean_gap_s=GAP_S,
    )
    report = await torture(options, tell if is_told else lambda _line: None)
    outcome.violations, outcome.lost, outcome.doubled = report.violations, report.lost, report.doubled
    report.violations = []
    outcome.report = report
    outcome.not_flat = not_flat(report.processes)
    outcome.violations += [Violation("I7", "memory and files", what) for what in outcome.not_flat]
    outcome.seconds = round(time.monotonic() - began, 1)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--load", type=float, default=0.3, help="share of the measured capacity")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", help="some of those of 'holdfast torture', with commas; all of them unless given")
    parser.add_argument("--lake-rows", type=int, default=0, help="rows that each table has before (none)")
    parser.add_argument("--data", type=Path, help="where everything is kept; a folder in /tmp unless given")
    parser.add_argument("--json", action="store_true", help="no progress, the line of the outcome alone")
    chosen = parser.parse_args()
    logging.getLogger("holdfast").setLevel(logging.CRITICAL)
    directory = chosen.data or Path(tempfile.mkdtemp(prefix="holdfast-chaos-"))
    outcome = asyncio.run(
        campaign(
            directory,
            minutes=chosen.minutes,
            load=chosen.load,
            seed=chosen.seed,
            faults=chosen.faults,
            lake_rows=chosen.lake_rows,
            is_told=not chosen.json,
        )
    )
    sys.exit(conclude(outcome, directory, is_temporary=chosen.data is None))


if __name__ == "__main__":
    main()
