"""The composition root of the workers: what each needs, the order they start in and the order they are drained in.

Start: topology, lake, then archiver, ingester, compactor, janitor, resolver.  Drain, in reverse: the resolver takes no
new request and answers those under way; janitor, compactor and ingester finish what is in hand; the archiver finishes
its round; lake and connection are closed.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client.cold import cold_chunks
from holdfast.lake.copies import Copies
from holdfast.lake.index import LakeIndex
from holdfast.lake.lake import Lake
from holdfast.schemas.errors import ClosedError, DataDirectoryError
from holdfast.schemas.rows import TABLES
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.hot import HotTier
from holdfast.streams.retry import call_with_retry
from holdfast.streams.topology import StreamInfo, ensure_topology, mark_heads_archived
from holdfast.streams.wire import HOT_STREAM, KEYS_STREAM, STREAM_OF_TABLE
from holdfast.workers.archiver import Archiver, run_archiver
from holdfast.workers.backup.schedule import BackupSchedule
from holdfast.workers.compactor import Compactor
from holdfast.workers.index_directory import claim_index_directory
from holdfast.workers.ingester import Ingester
from holdfast.workers.janitor import run_janitor
from holdfast.workers.opening import in_thread, open_in_thread
from holdfast.workers.reports import answer_reports
from holdfast.workers.resolver import run_resolver
from holdfast.workers.scrubber import Scrubber
from holdfast.workers.settings import START_S, WORKERS, WorkerName, WorkerSettings

if TYPE_CHECKING:
    from holdfast.streams.connection_target import ConnectionTarget

logger = logging.getLogger(__name__)

_NEEDS_LAKE: Final = frozenset({"archiver", "compactor", "resolver"})


class RunningWorkers:
    """The workers of this process.  Made by :func:`run_workers`."""

    def __init__(self, connection: Connection, drain_timeout_s: float) -> None:
        self.connection = connection
        self._drain_timeout_s = drain_timeout_s
        self._cut_off = asyncio.Event()
        connection.on_close.append(self._cut_off.set)
        self._tasks: dict[WorkerName, asyncio.Task[None]] = {}
        self._counters: dict[WorkerName, Callable[[], dict[str, Any]]] = {}

    async def wait_failed(self) -> None:
        """Waits for a worker to fail, and raises what it failed with.  Never returns otherwise.

        Raises ClosedError when the connection is closed for good: workers could only wait for ever then, and a standby
        would wait for them.
        """
        cut_off = asyncio.ensure_future(self._cut_off.wait())
        try:
            await asyncio.wait([cut_off, *self._tasks.values()], return_when=asyncio.FIRST_COMPLETED)
        finally:
            cut_off.cancel()
        done = [task for task in self._tasks.values() if task.done()]
        # The worker that was at work just then may say so first.
        if self._cut_off.is_set() or any(isinstance(task.exception(), ClosedError) for task in done):
            raise ClosedError(
                "the connection to the NATS server was closed for good, and is not made again",
                hint="see the log for why, and whether the credentials are still good; then start the workers again",
            )
        for task in done:
            task.result()
        raise RuntimeError(f"worker {done[0].get_name()} ended by itself")

    def counters(self) -> dict[WorkerName, dict[str, Any]]:
        """Returns what each worker has counted since its start."""
        return {name: read() for name, read in self._counters.items()}

    def start(self, name: WorkerName, run: Coroutine[Any, Any, None], counters: Callable[[], dict[str, Any]]) -> None:
        """Starts the loop of a worker; for :func:`run_workers`."""
        # A bare task: its failure is raised by wait_failed, its end awaited by drain, in an order that a task group
        # does not have.
        self._tasks[name] = asyncio.get_running_loop().create_task(run, name=name)
        self._counters[name] = counters

    def count(self, name: WorkerName, counters: Callable[[], dict[str, Any]]) -> None:
        """Registers the counters of a worker that has no loop of its own; for :func:`run_workers`."""
        self._counters[name] = counters

    async def drain(self, name: WorkerName, finish: Callable[[], bool] | None = None) -> None:
        """Ends the loop of a worker: asked to ``finish`` if it can, which that returns, then cancelled after
        ``drain_timeout_s``; one that has no end of its own is cancelled at once."""
        task = self._tasks.pop(name)
        try:
            if finish is not None and not task.done() and finish():
                await asyncio.wait([task], timeout=self._drain_timeout_s)
        finally:
            # Also when the wait is cancelled: what is closed next must not be in use any more.
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        logger.info("worker drained", extra={"action": "worker_drained", "worker": name})


@asynccontextmanager
async def run_workers(
    target: ConnectionTarget, names: Sequence[WorkerName], settings: WorkerSettings
) -> AsyncGenerator[RunningWorkers]:
    """Runs workers in this process; yields when they serve, drains them at the end of the block.

    An archiver that finds another one active waits for its turn without holding up the rest.  Raises DriftError,
    GapError or another typed error when the streams or the lake are not as they should be; nothing was changed then.
    """
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(
            open_connection(target, name=f"holdfast-{'-'.join(names)}"[:60], connect_s=START_S)
        )
        lake, index = await _open_lake(stack, settings) if _NEEDS_LAKE.intersection(names) else (None, None)
        archived = await in_thread(partial(_archived_streams, lake, settings))
        streams = await ensure_topology(
            connection,
            replicas=settings.replicas,
            duplicate_window_s=settings.duplicate_window_s,
            archived=archived,
        )
        if lake is not None:
            keys = streams[KEYS_STREAM]
            await call_with_retry(partial(_mark_new_keys, connection, lake, keys), deadline_s=START_S)
        hot = HotTier(connection, replicas=streams[HOT_STREAM].replicas, cold=cold_chunks(connection))
        stack.push_async_callback(hot.close)
        workers = RunningWorkers(connection, settings.drain_timeout_s)
        await stack.enter_async_context(answer_reports(connection, workers.counters))
        for name in WORKERS:
            if name not in names:
                continue
            if name == "ingester":
                await _start_ingester(stack, workers, hot)
            elif name == "janitor":
                await _start_janitor(stack, workers, settings)
            elif lake is not None and index is not None:
                # Each has a view of its own: a commit under way holds the archiver's for as long as it takes.
                if name == "archiver":
                    await _start_archiver(stack, workers, hot, lake, index, settings)
                elif name == "compactor":
                    await _start_compactor(stack, workers, await _own_view(settings), settings)
                else:
                    await _start_resolver(stack, workers, hot, await _own_view(settings), index, settings)
            logger.info("worker started", extra={"action": "worker_started", "worker": name})
        yield workers


async def _open_lake(stack: AsyncExitStack, settings: WorkerSettings) -> tuple[Lake, LakeIndex]:
    lake = await open_in_thread(stack, partial(_open_for_writing, settings), Lake.close)
    index, _ = await open_in_thread(stack, partial(_open_index, settings), _close_index)
    return lake, index


def _open_for_writing(settings: WorkerSettings) -> Lake:
    lake = Lake.open(settings.lake, create=True)
    if settings.copy_directory is not None:
        lake.copies = Copies(lake.path, settings.copy_directory)
    return lake


def _open_index(settings: WorkerSettings) -> tuple[LakeIndex, int]:
    directory, claim = claim_index_directory(settings.index)
    try:
        return LakeIndex.open(directory), claim
    except BaseException:
        os.close(claim)
        raise


def _close_index(opened: tuple[LakeIndex, int]) -> None:
    index, claim = opened
    try:
        index.close()
    finally:
        os.close(claim)


async def _own_view(settings: WorkerSettings) -> Lake:
    return await in_thread(partial(Lake.open, settings.lake))


def _archived_streams(lake: Lake | None, settings: WorkerSettings) -> list[str]:
    """Streams that must be there: the lake, also one that these workers do not need, holds a cursor for them."""
    if settings.accept_lost_streams:
        return []
    if lake is None:
        try:
            lake = Lake.open(settings.lake)
        except DataDirectoryError:
            return []  # no lake on this machine, or none yet
    return [STREAM_OF_TABLE[table] for table in TABLES if lake.watermark(table) is not None]


async def _mark_new_keys(connection: Connection, lake: Lake, info: StreamInfo) -> None:
    """Tells clients of a keys stream that began anew that the lake holds versions which it does not."""
    if not info.heads_archived:
        watermark = await in_thread(partial(lake.watermark, "key_versions"))
        if watermark is not None and watermark.epoch != info.epoch:
            await mark_heads_archived(connection)


async def _start_ingester(stack: AsyncExitStack, workers: RunningWorkers, hot: HotTier) -> None:
    ingester = Ingester(workers.connection, hot)
    await call_with_retry(ingester.open, deadline_s=START_S)
    stack.push_async_callback(ingester.close)
    workers.start("ingester", ingester.run(), lambda: msgspec.structs.asdict(ingester.counters))
    stack.push_async_callback(workers.drain, "ingester")


async def _start_janitor(stack: AsyncExitStack, workers: RunningWorkers, settings: WorkerSettings) -> None:
    janitor = await stack.enter_async_context(run_janitor(workers.connection, drain_timeout_s=settings.drain_timeout_s))
    schedule = BackupSchedule(workers.connection, settings) if settings.backup_directory is not None else None
    copies = None if settings.copy_directory is None else Copies(settings.lake, settings.copy_directory)
    scrubber = Scrubber(workers.connection, settings, copies)

    async def run() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(janitor.run())
            group.create_task(scrubber.run())
            if schedule is not None:
                group.create_task(schedule.run())

    def counters() -> dict[str, Any]:
        own = msgspec.structs.asdict(janitor.counters) | scrubber.counters()
        return own if schedule is None else own | schedule.counters()

    workers.start("janitor", run(), counters)
    stack.push_async_callback(workers.drain, "janitor")


async def _start_compactor(
    stack: AsyncExitStack, workers: RunningWorkers, lake: Lake, settings: WorkerSettings
) -> None:
    compactor = Compactor(lake, interval_s=settings.compact_interval_s)
    stack.push_async_callback(compactor.close)
    workers.start("compactor", compactor.run(), lambda: msgspec.structs.asdict(compactor.counters))
    stack.push_async_callback(workers.drain, "compactor")


async def _start_archiver(
    stack: AsyncExitStack,
    workers: RunningWorkers,
    hot: HotTier,
    lake: Lake,
    index: LakeIndex,
    settings: WorkerSettings,
) -> None:
    active: Archiver | None = None
    # Set when this archiver is active, or knows that it must wait for another one.
    settled = asyncio.Event()

    async def run() -> None:
        nonlocal active
        async with run_archiver(workers.connection, hot, lake, index, settings, on_standby=settled.set) as archiver:
            active = archiver
            settled.set()
            await archiver.run()

    def finish() -> bool:
        if active is None:
            return False  # it waits for its turn: nothing is in hand
        active.stop()
        return True

    def counters() -> dict[str, Any]:
        return {} if active is None else active.counters()

    workers.start("archiver", run(), counters)
    stack.push_async_callback(workers.drain, "archiver", finish)
    waiting = asyncio.ensure_future(settled.wait())
    failed = asyncio.ensure_future(workers.wait_failed())
    try:
        done, _ = await asyncio.wait({waiting, failed}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        # Also when the start is cancelled: nobody else knows of them.
        waiting.cancel()
        failed.cancel()
        await asyncio.gather(waiting, failed, return_exceptions=True)
    if failed in done:
        failed.result()


async def _start_resolver(
    stack: AsyncExitStack,
    workers: RunningWorkers,
    hot: HotTier,
    lake: Lake,
    index: LakeIndex,
    settings: WorkerSettings,
) -> None:
    stack.callback(logger.info, "worker drained", extra={"action": "worker_drained", "worker": "resolver"})
    counters = await stack.enter_async_context(
        run_resolver(workers.connection, hot, lake, index, drain_timeout_s=settings.drain_timeout_s)
    )
    workers.count("resolver", lambda: {name: msgspec.structs.asdict(count) for name, count in counters.items()})
