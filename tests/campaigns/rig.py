"""A whole system for campaigns against named contexts: server, archiver, resolver, and upkeep at any time of its life.

Holds no tests itself.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from holdfast.client import Holdfast, connect
from holdfast.lake import Lake
from holdfast.lake.index import LakeIndex
from holdfast.schemas.ids import now_ms
from holdfast.streams.hot import HotTier
from holdfast.streams.retry import call_with_retry
from holdfast.workers.control import archiver_status, evict, flush
from holdfast.workers.janitor import Janitor
from holdfast.workers.system import RunningWorkers, run_workers
from holdfast.workers.trim import Trimmer
from tests.running import settings_in, target_of
from tests.support import LIMIT_S, OwnServer

if TYPE_CHECKING:
    from holdfast.workers.settings import WorkerName

NAMES: Final[list[WorkerName]] = ["archiver", "resolver"]
"""The janitor and the trimming go by the campaign's clock, so the campaign calls them itself."""

MONTH_S: Final = 31 * 86_400.0


def tell(line: str) -> None:
    """Tells how a campaign goes."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Rig:
    """A server and workers on a folder of their own.  Every method may be called from a task of its own."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="holdfast-campaign-"))
        self.server = OwnServer(self._folder / "nats")
        self._settings = settings_in(self._folder)
        self._workers = AsyncExitStack()
        self._running: RunningWorkers | None = None
        self._clients = AsyncExitStack()
        self.clients: list[Holdfast] = []
        self.clock_ms = 0
        self._janitor: Janitor | None = None

    @property
    def janitor(self) -> Janitor:
        """A janitor that goes by ``clock_ms``."""
        if self._janitor is None:
            self._janitor = Janitor(self.clients[0].connection, clock_ms=lambda: self.clock_ms)
        return self._janitor

    async def start(self, *, clients: int = 2) -> None:
        """Starts everything; ``clients`` are connections of their own."""
        await self.server.start()
        await self.start_workers()
        for number in range(clients):
            client = connect(self.server.url, agent=f"agent{number}")
            self.clients.append(await self._clients.enter_async_context(client))

    async def stop(self) -> None:
        """Stops everything and removes the folder."""
        try:
            if self._janitor is not None:
                await self._janitor.close()
            await self._clients.aclose()
            await self._workers.aclose()
            await self.server.stop()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def start_workers(self) -> None:
        """Starts the workers, on the lake that they left."""
        self._running = await self._workers.enter_async_context(
            run_workers(target_of(self.server.url), NAMES, self._settings)
        )

    async def stop_workers(self) -> None:
        """Stops the workers; nobody archives, and nobody reads the lake."""
        await self._workers.aclose()
        self._workers = AsyncExitStack()

    async def restart_workers(self) -> None:
        """Stops the workers and starts them again."""
        await self.stop_workers()
        await self.start_workers()

    async def restart_server(self) -> None:
        """Kills the server and starts it on the same data; returns when everybody is connected again."""
        await self.server.restart()
        for client in self.clients:
            # Calls of the workers' controls are not tried again by themselves, as reads and writes are.
            await call_with_retry(partial(archiver_status, client.connection), deadline_s=LIMIT_S)

    async def archive(self) -> None:
        """Returns when everything acknowledged is in the lake."""
        await flush(self.clients[0].connection)

    async def evict(self) -> int:
        """Takes every archived body out of the hot tier; returns how many went."""
        return (await evict(self.clients[0].connection, 0.0)).purged

    async def trim(self, *, ahead_s: float, most_versions: int | None = None) -> int:
        """Takes superseded versions out of the hot tier as will be done in ``ahead_s`` seconds; returns how many went.

        ``most_versions`` is the limit of all keys; without one everything superseded goes that is older than a day.
        """
        connection = self.clients[0].connection
        lake, index = await asyncio.to_thread(self._open_lake)
        with ThreadPoolExecutor(1) as executor, index:
            hot = HotTier(connection)
            trimmer = Trimmer(
                connection,
                hot,
                lake,
                index,
                executor,
                hot_window_s=86_400.0,
                clock_ms=lambda: now_ms() + int(ahead_s * 1000),
            )
            try:
                if most_versions is not None:
                    return (await trimmer.trim_to(most_versions)).revisions
                return (await trimmer.round(budget_s=None)).revisions
            finally:
                await trimmer.close()
                await hot.close()
                await asyncio.to_thread(lake.close)

    async def trim_heads(self) -> int:
        """Takes archived tombstones out of the hot tier, as will be done in a month; returns what went.

        Whoever remembers of the stream what it said before must ask it again: ten minutes pass in this moment.
        """
        connection = self.clients[0].connection
        # No tombstone may be the stream's last message: once that is gone, trimming goes no further.
        await self.clients[0].keys.put("campaign", now_ms())
        lake, index = await asyncio.to_thread(self._open_lake)
        later_ms = now_ms() + int(MONTH_S * 1000)
        with ThreadPoolExecutor(1) as executor, index:
            hot = HotTier(connection)
            moments = iter((later_ms, later_ms + 601_000))
            trimmer = Trimmer(
                connection, hot, lake, index, executor, hot_window_s=86_400.0, clock_ms=lambda: next(moments)
            )
            try:
                first = await trimmer.round(budget_s=None)
                second = await trimmer.round(budget_s=None)
                return first.revisions + second.revisions
            finally:
                await trimmer.close()
                await hot.close()
                await asyncio.to_thread(lake.close)

    def _open_lake(self) -> tuple[Lake, LakeIndex]:
        return Lake.open(self._settings.lake), LakeIndex.open(self._folder / "index" / "trimmer")
