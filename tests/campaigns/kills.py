"""``kill -9`` of the server under load, again and again, and in the end everything read in three ways::

    python -m tests.campaigns.kills --cycles 1000 --seed 7

Producers write contexts, events and versions of keys through the SDK and by plain nats-py; archiver, compactor,
janitor, ingester and resolver run, each a process; what is archived is evicted.  In each cycle the server is killed at
a time that the seed decides and started at once.  Every some cycles the streams' ends are held against what is known to
be acknowledged; in the end everything is read by the SDK, by plain nats-py and by DuckDB.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from holdfast.ops.torture.check import Violation
from holdfast.ops.torture.ground import Ground
from holdfast.ops.torture.plain import STREAMS
from holdfast.ops.torture.proxy import Proxy
from holdfast.ops.torture.readers import Tail
from holdfast.ops.torture.rig import TortureRig
from holdfast.ops.torture.run import WORKERS, Verdict, count_doubled, count_lost, judge, versions
from holdfast.ops.torture.samples import Sampler
from holdfast.ops.torture.usage import UsageSummary
from holdfast.schemas.errors import HoldfastError
from holdfast.streams.connection import open_connection
from holdfast.streams.topology import stream_info
from holdfast.workers.control import evict
from tests.campaigns.rig import tell
from tests.running import eventually

LOAD_S: Final = (0.02, 0.3)
"""How long the server lives in a cycle once it takes connections."""

CHECK_EVERY: Final = 50
EVICT_S: Final = 2.0
RATE: Final = 600.0
"""Most writes a second of each producer: enough that every kill hits some, few enough to read them all in the end."""

_KINDS: Final = {"context": STREAMS["contexts"], "event": STREAMS["events"], "key": STREAMS["key_versions"]}


class Outcome(msgspec.Struct, kw_only=True):
    """What a campaign came to."""

    campaign: str = "kills"
    seed: int
    cycles: int = 0
    attempted: int = 0
    acknowledged: int = 0
    unknown: int = 0
    refused: int = 0
    by_kind: dict[str, int] = {}
    read_during: dict[str, int] = {}
    cheap_checks: int = 0
    evictions: int = 0
    lost: int = 0
    doubled: int = 0
    violations: list[Violation] = []
    unexpected_ends: list[str] = []
    restart_s_median: float = 0.0
    restart_s_most: float = 0.0
    seconds: float = 0.0
    cycles_per_s: float = 0.0
    processes: dict[str, UsageSummary] = {}
    durability: str = "durable"
    versions: dict[str, str] = {}
    kept: str = ""


class Campaign:
    """One run on a directory of its own."""

    def __init__(
        self, directory: Path, seed: int, *, producers: int = 3, rate: float = RATE, is_told: bool = False
    ) -> None:
        self.rig = TortureRig(directory, seed=seed)
        self.outcome = Outcome(seed=seed, versions=versions())
        sdk = ["--lanes", "3", "--batch", "96", "--rate", str(rate)]
        arguments = {f"sdk{number}": sdk for number in range(1, producers)}
        self.ground = Ground(
            self.rig, Proxy(self.rig.port, seed), WORKERS, arguments | {"raw1": ["--raw", "--rate", str(rate / 4)]}
        )
        self._is_told = is_told
        self._choice = random.Random(f"kills {seed}")
        self._tail = Tail(self.rig.directory / "history")
        self._ends = dict.fromkeys(STREAMS.values(), 0)
        self._restarts: list[float] = []

    async def run(self, cycles: int) -> Outcome:
        """Kills the server that often, checks, and returns what was found."""
        began = time.monotonic()
        async with self.rig:
            await self.rig.start_server()
            for child in [self.rig.spawn_worker(*names, name=name) for name, names in WORKERS.items()]:
                await self.rig.wait_ready(child)
            for name in self.ground.producer_names:
                self.ground.start_producer(name)
            self.rig.start_reader("reader1")
            await self._until_written()
            sampler = Sampler(self.rig, every_s=2.0)
            loaded = time.monotonic()
            async with asyncio.TaskGroup() as group:
                side = [group.create_task(sampler.run(loaded)), group.create_task(self._evict_for_ever())]
                for number in range(1, cycles + 1):
                    await self._cycle()
                    if number % CHECK_EVERY == 0:
                        await self._check_ends(number, cycles, began)
                self.outcome.cycles_per_s = round(cycles / (time.monotonic() - loaded), 2)
                for task in side:
                    task.cancel()
            await self.rig.stop(*self.ground.producer_names)
            await self.rig.stop("reader1")
            if self._is_told:
                tell(f"{cycles} cycles in {time.monotonic() - loaded:.0f} s; now everything is read")
            verdict = await judge(self.ground, sampler.samples)
            self._conclude(verdict, sampler)
        self.outcome.seconds = round(time.monotonic() - began, 1)
        return self.outcome

    async def _until_written(self) -> None:
        wanted = len(self.ground.producer_names)
        await eventually(lambda: len([path for path in self.rig.histories if path.stat().st_size]) == wanted)

    async def _cycle(self) -> None:
        await asyncio.sleep(self._choice.uniform(*LOAD_S))
        killed = time.monotonic()
        await self.rig.kill_server()
        self.rig.spawn_server()
        await self.rig.wait_server()
        self._restarts.append(time.monotonic() - killed)
        self.outcome.cycles += 1
        for name in self.rig.find_unexpected_ends():
            if name in WORKERS:
                self.rig.spawn_worker(*WORKERS[name], name=name)
            elif name in self.ground.producers:
                self.ground.start_producer(name)

    async def _evict_for_ever(self) -> None:
        while True:
            await asyncio.sleep(EVICT_S)
            with contextlib.suppress(HoldfastError, TimeoutError):
                async with asyncio.timeout(EVICT_S), open_connection(self.rig.url) as connection:
                    self.outcome.evictions += (await evict(connection, 0.0)).purged > 0

    async def _check_ends(self, number: int, cycles: int, began: float) -> None:
        """The cheap check: no stream ends before what it ended at, nor below the number of what it has acknowledged."""
        await asyncio.to_thread(self._tail.read)
        known = dict(self._tail.known)
        async with open_connection(self.rig.url, connect_s=10.0) as connection:
            for kind, stream in _KINDS.items():
                last = (await stream_info(connection, stream)).last_seq
                if last < max(self._ends[stream], known.get(kind, 0)):
                    before = f"ended at {self._ends[stream]} before, {known.get(kind, 0)} acknowledged"
                    what = f"lost: ends at {last} after {number} kills, {before}"
                    self.outcome.violations.append(Violation("I1", stream, what))
                self._ends[stream] = last
        self.outcome.cheap_checks += 1
        if self._is_told:
            tell(
                f"{number} of {cycles} kills, {sum(known.values()):,} acknowledged, {self.outcome.evictions} evictions,"
                f" {time.monotonic() - began:.0f} s"
            )

    def _conclude(self, verdict: Verdict, sampler: Sampler) -> None:
        outcome, counts = self.outcome, verdict.history.counts()
        outcome.attempted = len(verdict.history.events)
        outcome.acknowledged, outcome.unknown = counts["acknowledged"], counts["unknown"]
        outcome.refused = counts["refused"]
        outcome.by_kind = {what: count for what, count in sorted(counts.items()) if " " in what}
        outcome.read_during = dict(verdict.read)
        outcome.violations += verdict.violations
        outcome.lost, outcome.doubled = count_lost(outcome.violations), count_doubled(outcome.violations)
        outcome.unexpected_ends = self.rig.unexpected_ends
        outcome.processes = sampler.summary()
        restarts = sorted(self._restarts)
        outcome.restart_s_median = round(restarts[len(restarts) // 2], 3)
        outcome.restart_s_most = round(restarts[-1], 3)


def conclude(outcome: Any, directory: Path, *, is_temporary: bool) -> int:
    """Prints the outcome's line and what it found; removes the data unless they are needed; returns the exit status."""
    for violation in outcome.violations:
        tell(f"seed {outcome.seed}: {violation.invariant} {violation.object}: {violation.what}")
        for line in violation.history:
            tell(f"    {line}")
    if outcome.violations or not is_temporary:
        outcome.kept = str(directory)
    elif is_temporary:
        shutil.rmtree(directory, ignore_errors=True)
    tell(msgspec.json.encode(outcome).decode())
    return 1 if outcome.violations else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--producers", type=int, default=3, help="one of them by plain nats-py")
    parser.add_argument("--rate", type=float, default=RATE, help="most writes a second of each")
    parser.add_argument("--data", type=Path, help="where everything is kept; a folder in /tmp unless given")
    parser.add_argument("--json", action="store_true", help="no progress, the line of the outcome alone")
    chosen = parser.parse_args()
    logging.getLogger("holdfast").setLevel(logging.CRITICAL)
    directory = chosen.data or Path(tempfile.mkdtemp(prefix="holdfast-kills-"))
    campaign = Campaign(directory, chosen.seed, producers=chosen.producers, rate=chosen.rate, is_told=not chosen.json)
    outcome = asyncio.run(campaign.run(chosen.cycles))
    sys.exit(conclude(outcome, directory, is_temporary=chosen.data is None))


if __name__ == "__main__":
    main()
