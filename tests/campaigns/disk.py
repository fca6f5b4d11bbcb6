"""A disk that fills up or fails while everything writes: nothing acknowledged is lost, and service resumes by itself.

::

    python -m tests.campaigns.disk --runs 100 --seed 1 --json

Each run fills the disk, or has the system calls of the server or of the workers fail, at a random moment of a load of
contexts, events and named contexts, while archiving, compaction and purges go on, and ends that after a random time.
It measures when writers were told the cause, and when each kind of write was acknowledged again.  After every
``--rounds`` runs of one system the load stops, and all that was ever acknowledged is looked for, by the SDK, by raw
reads of the streams and by SQL.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, Literal

import msgspec

from holdfast.client import connect
from holdfast.ops.torture.check import Violation, check
from holdfast.ops.torture.history import HistoryWriter, read_history
from holdfast.ops.torture.load import KINDS
from holdfast.ops.torture.observe import observe
from holdfast.schemas.errors import HoldfastError
from holdfast.schemas.limits import KIB
from holdfast.workers.control import evict, flush
from tests.campaigns.disk_rig import DiskRig, Injection, Target, WatchedProducer, Watcher, disk_rig, what_is_missing
from tests.campaigns.disk_waits import StalledError, Waits, supervised
from tests.campaigns.rig import tell
from tests.support import LIMIT_S

Kind = Literal["enospc", "eio"]

RESUMES_WITHIN_S: Final = 10.0
_CALL_S: Final = 10.0
"""How long a worker may take to answer a call; a fault may take the answer away."""

_BLOCKED_S: Final = 180.0
_RATE: Final = 60.0
"""Most writes a second of each producer; some are batches."""

_SERVER_CALLS: Final = ("fsync", "pwrite64", "fsync,pwrite64", "ftruncate")
_UP_CALLS: Final = ("fsync,fdatasync", "pwrite64", "fdatasync,pwrite64", "fsync,fdatasync,pwrite64,ftruncate")


class Run(msgspec.Struct, frozen=True):
    """What one run does: after ``before_s`` of load, for ``lasts_s``, fill the disk or have calls fail."""

    number: int
    kind: Kind
    before_s: float
    lasts_s: float
    leave: int = 0
    injection: Injection | None = None
    is_idle: bool = False
    """Whether nobody writes when the fault begins: the archiver is first to meet it, or the load that comes back."""


class Outcome(msgspec.Struct, kw_only=True):
    """What a campaign did and saw; times are in seconds."""

    runs: int = 0
    seed: int = 0
    kinds: Counter[str] = msgspec.field(default_factory=Counter)
    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    lost: int = 0
    doubled: int = 0
    violations: list[str] = []
    sticky: int = 0
    restarts: int = 0
    archive_stopped: int = 0
    causes: Counter[str] = msgspec.field(default_factory=Counter)
    named_after_s: list[float] = []
    resumed_after_s: list[float] = []
    seconds: float = 0.0

    def summary(self) -> dict[str, object]:
        """The line of JSON that a campaign ends with."""
        told: dict[str, object] = msgspec.to_builtins(self)
        for name in ("named_after_s", "resumed_after_s"):
            told[name] = _spread(getattr(self, name))
        told["violations"] = len(self.violations)
        return told


def plan(seed: int, number: int, kinds: Sequence[Kind]) -> Run:
    """Returns what a run does: a function of the seed and of its number."""
    choice = random.Random(f"disk {seed} {number}")
    kind = choice.choice(kinds)
    before_s, lasts_s = choice.uniform(0.05, 1.5), choice.choice((0.3, 1.0, 2.5, 4.5, 6.0))
    is_idle = choice.random() < 0.15
    if kind == "enospc" and choice.random() < 0.7:
        leave = choice.choice((0, 0, 4 * KIB, choice.randrange(512 * KIB)))
        return Run(number, kind, before_s, lasts_s, leave, None, is_idle)
    target: Target = choice.choice(("server", "up"))
    calls = choice.choice(_SERVER_CALLS if target == "server" else _UP_CALLS)
    when = f"{choice.randrange(1, 30)}{choice.choice(('', '+', '+3'))}"
    return Run(
        number,
        kind,
        before_s,
        lasts_s,
        0,
        Injection(target, calls, "ENOSPC" if kind == "enospc" else "EIO", when),
        is_idle,
    )


async def campaign(
    folder: Path,
    runs: int,
    seed: int,
    *,
    kinds: Sequence[Kind] = ("enospc", "eio"),
    rounds: int = 5,
    told: bool = True,
    waits: Waits | None = None,
) -> Outcome:
    """Does the runs, ``rounds`` of them on each system; what breaks a promise is in the outcome.

    That something did not happen in time is such a thing too: nothing is waited for without a bound.
    """
    outcome = Outcome(seed=seed)
    waits = waits or Waits()
    began_s = time.monotonic()
    while outcome.runs < runs and not outcome.violations:
        last = min(runs, outcome.runs + rounds)
        own = folder / f"from-{outcome.runs}"
        planned = [plan(seed, number, kinds) for number in range(outcome.runs, last)]
        try:
            await supervised(_on_one_system(own, planned, seed, outcome, waits), waits)
        except StalledError as error:
            outcome.violations.append(f"runs {outcome.runs} to {last - 1}: {error}\nlogs and stacks are in {own}")
        outcome.runs = last
        if told:
            tell(
                f"{outcome.runs} runs, {outcome.acknowledged} acknowledged, {outcome.restarts} restarts, "
                f"named {_spread(outcome.named_after_s)}, resumed {_spread(outcome.resumed_after_s)}, "
                f"{len(outcome.violations)} violations"
            )
        if not outcome.violations:
            await asyncio.to_thread(shutil.rmtree, own, ignore_errors=True)
    outcome.seconds = round(time.monotonic() - began_s, 1)
    return outcome


async def _on_one_system(folder: Path, runs: Sequence[Run], seed: int, outcome: Outcome, waits: Waits) -> None:
    waits.begin("the start of the system", 3 * LIMIT_S)
    async with disk_rig(folder) as rig:
        await _rounds(rig, runs, seed, outcome, waits)
        if outcome.violations:
            await rig.keep()
        waits.begin("the stop of the system", 3 * LIMIT_S)
    if rig.complaint:
        outcome.violations.append(f"{rig.complaint}: {_end_of(rig.log)}")


async def _rounds(rig: DiskRig, runs: Sequence[Run], seed: int, outcome: Outcome, waits: Waits) -> None:
    watcher = Watcher()
    history_path = rig.folder / "history.ndjson"
    pause = rig.folder / "pause"
    async with AsyncExitStack() as stack:
        writer = stack.enter_context(HistoryWriter(history_path))
        stop = asyncio.Event()
        producers = []
        for kind in KINDS:
            hf = await stack.enter_async_context(connect(rig.url, "default", f"p-{kind}", cache_bytes=0))
            name = f"{kind}{runs[0].number}"
            producers.append(WatchedProducer(hf, writer, name, seed, watcher, kind))
        tasks = [asyncio.create_task(each.run(stop, rate=_RATE, pause=pause)) for each in producers]
        tasks.append(asyncio.create_task(_upkeep(rig, random.Random(f"upkeep {seed} {runs[0].number}"), stop)))
        try:
            for run in runs:
                await run_once(rig, run, watcher, outcome, pause, waits)
                if outcome.violations:
                    return  # what is there is kept; nothing more can be learned from a system that stands still
        finally:
            stop.set()
            waits.begin("the end of the load", 2 * LIMIT_S)
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            outcome.violations.extend(f"the load broke off: {end!r}" for end in ends if isinstance(end, Exception))
        for each in producers:
            waits.begin(f"an answer to what producer {each.producer} had none to", 2 * LIMIT_S)
            await each.settle()
        waits.begin("the end of the clients", LIMIT_S)
    outcome.causes += watcher.causes
    await _verify(rig, history_path, outcome, waits)
    actions = rig.told()
    outcome.sticky += actions["server_refuses"]
    outcome.restarts += actions["server_restarted"]
    outcome.archive_stopped += actions["archive_stopped"]


async def run_once(
    rig: DiskRig, run: Run, watcher: Watcher, outcome: Outcome, pause: Path, waits: Waits | None = None
) -> None:
    """Does one run under a load that tells the watcher; notes what it saw, and what broke a promise."""
    outcome.kinds[run.kind if run.injection is None else f"{run.kind} by calls of {run.injection.target}"] += 1
    waits = waits or Waits()
    if run.is_idle:
        pause.touch()
    waits.begin(f"the fault of run {run.number} ({run})", run.before_s + run.lasts_s + 2 * LIMIT_S)
    await asyncio.sleep(run.before_s)
    watcher.forget()
    began_s = time.monotonic()
    if run.injection is None:
        await asyncio.to_thread(rig.disk.fill, run.leave)
        pause.unlink(missing_ok=True)
        await asyncio.sleep(run.lasts_s)
        named = dict(watcher.named_at_s)
        watcher.forget()
        ended_s = time.monotonic()
        rig.disk.free()
    else:
        async with rig.failing(run.injection):
            pause.unlink(missing_ok=True)
            await asyncio.sleep(run.lasts_s)
        named = dict(watcher.named_at_s)
        watcher.forget()
        ended_s = time.monotonic()
    limit_s = ended_s + 3 * RESUMES_WITHIN_S
    waits.begin(f"a look at service after run {run.number} ({run})", 3 * RESUMES_WITHIN_S + LIMIT_S)
    while (  # noqa: ASYNC110  three conditions of three owners
        len(watcher.acknowledged_at_s) < len(KINDS) and time.monotonic() < limit_s and rig.ended() is None
    ):
        await asyncio.sleep(0.02)
    if named:
        outcome.named_after_s.append(min(named.values()) - began_s)
    what = f"run {run.number} ({run})"
    if rig.ended() is not None:
        outcome.violations.append(f"{what}: 'holdfast up' ended with {rig.ended()}: {_end_of(rig.log)}")
        return
    resumed_s = max(watcher.acknowledged_at_s.values(), default=limit_s) - ended_s
    if len(watcher.acknowledged_at_s) < len(KINDS) or resumed_s > RESUMES_WITHIN_S:
        missing = sorted(set(KINDS) - set(watcher.acknowledged_at_s))
        outcome.violations.append(f"{what}: service resumed after {resumed_s:.1f} s, without {missing}")
    outcome.resumed_after_s.append(resumed_s)


async def _upkeep(rig: DiskRig, choice: random.Random, stop: asyncio.Event) -> None:
    """Takes archived contexts out of the hot tier, now and then: a purge may be what meets the fault."""
    async with connect(rig.url, "default", "upkeep") as hf:
        # Not until it is cancelled: a cancel may be lost in a request that ends in the same moment.
        while not stop.is_set():
            await asyncio.sleep(choice.uniform(0.2, 1.5))
            try:
                await evict(hf.connection, choice.choice((0.0, 0.5, 2.0)), timeout_s=_CALL_S)
            except HoldfastError:
                continue  # the fault: health tells of it


async def _verify(rig: DiskRig, history_path: Path, outcome: Outcome, waits: Waits) -> None:
    waits.begin("the archiving of everything", 3 * LIMIT_S)
    async with _archived(rig, outcome) as is_archived:
        if not is_archived:
            return
        waits.begin("the reading of everything", 6 * LIMIT_S)
        history = await asyncio.to_thread(read_history, [history_path])
        counts = history.counts()
        outcome.acknowledged += counts["acknowledged"]
        outcome.refused += counts["refused"]
        outcome.unknown += counts["unknown"]
        observation = await observe(rig.url, rig.lake, namespaces=["default"])
        waits.begin("the check of everything", 6 * LIMIT_S)
        found = await asyncio.to_thread(check, history, observation)
    outcome.lost += sum(violation.invariant == "I1" for violation in found)
    outcome.doubled += sum(violation.invariant == "I2" for violation in found)
    outcome.violations.extend(_told(violation) for violation in found)
    leftovers = [str(path) for path in rig.lake.rglob("*.tmp*")]
    if leftovers:
        outcome.violations.append(f"half-written files were left behind: {leftovers[:5]}")


@asynccontextmanager
async def _archived(rig: DiskRig, outcome: Outcome) -> AsyncGenerator[bool]:
    """Whether everything could be archived: the workers are whole again."""
    try:
        async with connect(rig.url) as hf:
            await flush(hf.connection, timeout_s=2 * LIMIT_S)
    except HoldfastError as error:
        outcome.violations.append(f"archiving did not go on: {error}; {_end_of(rig.log)}")
        yield False
        return
    yield True


def _told(violation: Violation) -> str:
    return msgspec.json.encode(violation).decode()


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-3_000:]


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "p50": round(ordered[len(ordered) // 2], 2),
        "max": round(ordered[-1], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", default="enospc,eio")
    parser.add_argument("--rounds", type=int, default=5, help="runs on one system before everything is checked")
    parser.add_argument("--json", action="store_true", help="nothing but the last line")
    parser.add_argument("--data", type=Path, help="where histories and logs are kept; a folder in /tmp unless given")
    chosen = parser.parse_args()
    missing = what_is_missing()
    if missing:
        tell(missing)
        return 2
    logging.getLogger("holdfast").setLevel(logging.CRITICAL)
    folder = chosen.data or Path(tempfile.mkdtemp(prefix="holdfast-disk-campaign-"))
    kinds: list[Kind] = [kind for kind in ("enospc", "eio") if kind in chosen.kind.split(",")]
    # A blocked event loop could not even say so.
    waits = Waits(on_look=partial(faulthandler.dump_traceback_later, _BLOCKED_S, exit=True))
    try:
        outcome = asyncio.run(
            campaign(
                folder, chosen.runs, chosen.seed, kinds=kinds, rounds=chosen.rounds, told=not chosen.json, waits=waits
            )
        )
    finally:
        faulthandler.cancel_dump_traceback_later()
    for violation in outcome.violations:
        tell(f"seed {chosen.seed}: {violation}")
    if outcome.violations:
        tell(f"seed {chosen.seed}: history and logs are in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    tell(msgspec.json.encode(outcome.summary()).decode())
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
