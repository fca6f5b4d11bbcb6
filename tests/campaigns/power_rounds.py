"""One machine whose power is cut again and again: a server, agents and workers, on one file system."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.client import connect
from holdfast.lake import Lake
from holdfast.ops.server import EmbeddedServer
from holdfast.ops.server_config import ServerSettings
from holdfast.ops.stream_files import CHECKSUM, DESCRIPTION, checksum_of
from holdfast.ops.torture.check import check
from holdfast.ops.torture.history import History, read_history
from holdfast.ops.torture.observe import observe
from holdfast.schemas.errors import HoldfastError, UnavailableError
from holdfast.streams.connection import open_connection
from holdfast.streams.connection_target import ConnectionTarget
from holdfast.streams.retry import call_with_retry
from holdfast.streams.topology import ensure_topology
from holdfast.workers.control import flush
from holdfast.workers.settings import WORKERS, WorkerSettings
from holdfast.workers.system import run_workers
from tests.campaigns.power_check import Batches, check_graves, check_lake, lost_in, work_done
from tests.campaigns.power_images import Disk
from tests.campaigns.power_load import NAMESPACE, LoadTask
from tests.campaigns.power_plan import IDLE_S, RoundPlan
from tests.campaigns.power_torn import tear
from tests.campaigns.power_worker import DUPLICATE_WINDOW_S, UpkeepTask
from tests.support import LIMIT_S

if TYPE_CHECKING:
    from holdfast.ops.torture.seen import Reader
    from holdfast.schemas.rows import Position, Table
    from holdfast.streams.connection_target import Durability
    from tests.campaigns.power_processes import Nursery

_NEVER_S: Final = 3_600.0
_UPKEEP_RATE: Final = 150.0
"""Writes a second beside workers: more than they can archive, and nothing would be purged before the cut."""


class Outcome(msgspec.Struct):
    """What one cut left, and how the machine came back."""

    plan: RoundPlan
    acknowledged: int
    unknown: int
    violations: list[str]
    ready_s: float
    """From the start of the server to the first acknowledged write."""
    whole_s: float
    """From the start of the server until the workers serve, too, and everything is archived."""
    lost: int
    """How much of what was ever acknowledged on this disk is nowhere."""
    done: dict[str, int]
    """What was stored in batches, archived, merged, purged and so on since the cut before."""
    torn: list[str]


class Machine:
    """A disk and what runs on it.  One round at a time."""

    def __init__(
        self, folder: Path, durability: Durability, load: Nursery, upkeep: Nursery, *, syncs: bool = True
    ) -> None:
        self.disk = Disk(folder / "device")
        self.folder = folder
        self._durability: Durability = durability
        self._syncs = syncs
        self._load = load
        self._upkeep = upkeep
        self._server: EmbeddedServer | None = None
        self._reset()

    def _reset(self) -> None:
        self._marks: dict[Table, Position | None] = {}
        self._batches = Batches()
        self._torn: list[str] = []
        self._done: Counter[str] = Counter()
        self._gone = 0
        self._cut_off = 0
        for path in (self.history, self.graves):
            path.unlink(missing_ok=True)

    @property
    def history(self) -> Path:
        """The record of what was tried, which is on another disk."""
        return self.folder / "history.ndjson"

    @property
    def graves(self) -> Path:
        """The record of keys that were deleted."""
        return self.folder / "graves.ndjson"

    @property
    def lake(self) -> Path:
        """The lake's directory."""
        return self.disk.mounted_at / "lake"

    @property
    def url(self) -> str:
        """The server's address while it runs."""
        assert self._server is not None, "the machine is off"
        return self._server.info.nats_url

    async def renew(self) -> None:
        """Begins with an empty disk, and a system on it that has come to rest."""
        await self.close()
        self._reset()
        self.disk.make()
        await self._start()
        async with open_connection(self._target()) as connection:
            await ensure_topology(connection, duplicate_window_s=DUPLICATE_WINDOW_S)
        # Also in the mode that syncs by itself every two minutes only, the streams themselves have long been there.
        await asyncio.to_thread(self.disk.sync)

    async def close(self) -> None:
        """Switches off, cleanly, and removes the disk."""
        await self._stop()
        self.disk.close()

    async def round(self, plan: RoundPlan) -> Outcome:
        """Writes, cuts the power, starts again from what is left, and checks all that was ever acknowledged there."""
        before = self._history().counts()
        await self._work(plan)
        await self._cut(plan)
        history = self._history()
        started = time.monotonic()
        violations: list[str] = []
        done: dict[str, int] = {}
        self._lost = 0
        ready_s = whole_s = 0.0
        try:
            await self._start()
            await self._first_write()
            ready_s = time.monotonic() - started
            violations += await self._check_batches()
            async with self._workers():
                whole_s = time.monotonic() - started
                violations += await self._check_all(history, plan)
            violations += await check_lake(self.lake, self._marks)
            done = await self._count_work()
        except (HoldfastError, TimeoutError, AssertionError, OSError) as error:
            hint = getattr(error, "hint", None)
            violations.append(f"I8 it does not come back: {type(error).__name__}: {error} ({hint})")
        now = history.counts()
        return Outcome(
            plan=plan,
            acknowledged=now["acknowledged"] - before["acknowledged"],
            unknown=now["unknown"] - before["unknown"],
            violations=violations,
            ready_s=ready_s,
            whole_s=whole_s,
            lost=self._lost,
            done=done,
            torn=self._torn,
        )

    def keep(self, target: Path) -> Path:
        """Keeps the disk as it is and the records beside it."""
        target.mkdir(parents=True, exist_ok=True)
        for path in (self.history, self.graves, self.folder / "stderr.log"):
            if path.exists():
                shutil.copy(path, target)
        return self.disk.keep(target)

    # What is under way when the power goes

    async def _work(self, plan: RoundPlan) -> None:
        is_idle = plan.hits == "idle"
        load = LoadTask(
            url=self.url,
            history=str(self.history),
            graves=str(self.graves),
            seed=plan.seed,
            round=plan.number,
            seconds=plan.seconds if is_idle else None,
            batches=plan.hits == "batches",
            buries=plan.hits == "trimming",
            changes=plan.hits == "changing",
            lanes=1 if plan.has_upkeep else 3,
            rate=_UPKEEP_RATE if plan.has_upkeep else None,
        )
        if plan.has_upkeep:
            # Before the load, which they could not catch up with.
            await self._upkeep.start(self._upkeep_task(plan))
        await self._load.start(load)
        if is_idle:
            await asyncio.wait_for(self._load.until("idle"), LIMIT_S)
            await asyncio.sleep(IDLE_S)
        elif not plan.has_upkeep:
            await asyncio.sleep(plan.seconds)
        else:
            # A worker that comes to its failpoint pulls the plug itself.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._upkeep.until("end"), plan.seconds)

    def _upkeep_task(self, plan: RoundPlan) -> UpkeepTask:
        return UpkeepTask(
            url=self.url,
            lake=str(self.lake),
            index=str(self.disk.mounted_at / "index" / "upkeep"),
            purges=plan.hits in ("purge", "trimming"),
            merges=plan.hits in ("archiving", "purge"),
            trims=plan.hits == "trimming",
            armed=plan.armed,
            syncs=self._syncs,
        )

    async def _cut(self, plan: RoundPlan) -> None:
        assert self._server is not None, "the machine is off"
        server, self._server = self._server, None
        os.kill(server.info.pid, signal.SIGKILL)
        self._load.kill()
        self._upkeep.kill()
        with contextlib.suppress(UnavailableError):  # that it has ended
            await asyncio.wait_for(server.wait_failed(), LIMIT_S)
        await self._load.ended()
        await self._upkeep.ended()
        await server.close()
        self._torn = []
        choice = random.Random(plan.seed)

        def tear_some(written: Path, survived: Path) -> None:
            self._torn = tear(written, survived, choice)

        # On the loop, though it blocks for a moment: a cancel must not leave half of it under way in a thread.
        self.disk.cut(tear_some if plan.is_torn else None)

    # How it comes back, and with what

    async def _first_write(self) -> None:
        async with connect(self.url, "first", "checker") as hf:
            await hf.put({"written": time.time_ns()})

    async def _check_batches(self) -> list[str]:
        lake = await asyncio.to_thread(Lake.open, self.lake) if self.lake.exists() else None
        async with open_connection(self._target()) as connection:
            return await self._batches.check(connection, lake)

    async def _count_work(self) -> dict[str, int]:
        async with open_connection(self._target()) as connection:
            done = await work_done(connection, self.lake)
        done["batches"] = self._batches.seen
        done["deleted keys gone from the hot tier, of those looked at"] = self._gone
        done["descriptions of streams cut off"] = self._cut_off
        # What was set aside or made again after a cut may make a number smaller.
        new = {name: max(0, count - self._done[name]) for name, count in done.items()}
        self._done = done
        return new

    async def _check_all(self, history: History, plan: RoundPlan) -> list[str]:
        violations: list[str] = []
        async with connect(self.url, NAMESPACE, "checker", cache_bytes=0) as hf:
            await call_with_retry(partial(flush, hf.connection), deadline_s=LIMIT_S)
            wrong, gone = await check_graves(hf, self.graves, plan.number)
            violations += wrong
            self._gone += gone
            await flush(hf.connection)
            health = await hf.health()
            violations += [
                f"{problem['invariant']} health: {problem['object']}: {problem['what']}"
                for problem in health["problems"]
            ]
        acknowledged = {attempt.id for attempt in history.acknowledged("context")}
        # Each cut is read by two ways of the three, each disk by all.
        readers: tuple[Reader, ...] = ("raw", "sdk") if plan.number % 2 else ("raw", "live")
        observation = await observe(self.url, self.lake, namespaces=[NAMESPACE], readers=readers, refs=acknowledged)
        self._lost = lost_in(history, observation.views["raw"])
        for violation in check(history, observation):
            lines = "".join(f"\n    {line}" for line in violation.history)
            violations.append(f"{violation.invariant} {violation.object}: {violation.what}{lines}")
        return violations

    @asynccontextmanager
    async def _workers(self) -> AsyncGenerator[None]:
        """The workers of a machine that has just been switched on, in this process; they do nothing by the clock."""
        settings = WorkerSettings(
            lake=self.lake,
            index=self.disk.mounted_at / "index" / "checker",
            archive_interval_s=_NEVER_S,
            purge_interval_s=_NEVER_S,
            compact_interval_s=_NEVER_S,
            duplicate_window_s=DUPLICATE_WINDOW_S,
        )
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(run_workers(self._target(), WORKERS, settings))
            yield

    async def _start(self) -> None:
        self._cut_off += _cut_off_descriptions(self.disk.mounted_at / "nats")
        server = EmbeddedServer(
            ServerSettings(data=self.disk.mounted_at / "nats", durability=self._durability, announce=False)
        )
        await server.__aenter__()
        self._server = server

    async def _stop(self) -> None:
        self._load.kill()
        self._upkeep.kill()
        server, self._server = self._server, None
        await self._load.ended()
        await self._upkeep.ended()
        if server is not None:
            await server.close()

    def _history(self) -> History:
        return read_history([self.history]) if self.history.exists() else History()

    def _target(self) -> ConnectionTarget:
        return ConnectionTarget(url=self.url, origin="campaign")


def _cut_off_descriptions(data: Path) -> int:
    """How many streams have a description that is not the one of their checksum: the server alone would lose them."""
    found = data.glob(f"jetstream/*/streams/*/{DESCRIPTION}")
    return sum(checksum_of(path.parent.name, path.read_bytes()) != _checksum_beside(path) for path in found)


def _checksum_beside(description: Path) -> bytes:
    path = description.with_name(CHECKSUM)
    return path.read_bytes() if path.exists() else b""
