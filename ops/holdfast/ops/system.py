"""The system that a command works on: the one that is named, the one that runs, or one of its own while it lasts.

The one composition root of the command line: nothing else in ``ops`` starts a server or a worker.  In this order:

1. the server that the settings or the environment name (``--nats-url``, ``HOLDFAST_NATS_URL``, ``NATS_URL`` …),
2. the embedded server that already runs on the data directory (``holdfast up`` in another terminal),
3. an embedded server on the data directory and the workers that the command needs, in this process, for as long as
   the command runs.

With 1 and 2 the workers are somebody else's: a command that needs one says which is missing.  Several commands of the
third kind at once take turns.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, cast

import msgspec

from holdfast.client import Holdfast, connect
from holdfast.ops.discovery import resolve_connection
from holdfast.ops.settings import LoadedSettings, Settings
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.connection_target import ConnectionTarget
from holdfast.streams.local_server import LocalServer
from holdfast.workers.settings import WorkerName, WorkerSettings

LAKE_DIRECTORY: Final = "lake"
INDEX_DIRECTORY: Final = "index"

EMBEDDED_ROLE: Final = "up"
"""Whose look-up index a process with an embedded server uses.  The lock of the data directory admits one of them at a
time, so that short commands profit from what ``holdfast up`` has indexed."""

_TURN_S: Final = 0.1
_TELL_AFTER_S: Final = 2.0

logger = logging.getLogger(__name__)

Watcher = Callable[[], Awaitable[None]]
"""Waits for a failure: raises it, or never returns."""


class System(msgspec.Struct, frozen=True, kw_only=True):
    """A running system.  ``embedded``: its server lives in this process and ends with the command."""

    target: ConnectionTarget
    data: Path
    lake: Path
    embedded: bool

    def connect(self, namespace: str, agent: str = "cli") -> AbstractAsyncContextManager[Holdfast]:
        """Opens a client of the SDK on this system."""
        return connect(self.target, namespace, agent)

    def open_connection(self) -> AbstractAsyncContextManager[Connection]:
        """Opens a bare connection, for calls to workers and reads of streams."""
        return open_connection(self.target, name="holdfast-cli")


def worker_settings(settings: Settings, role: str, *, accept_lost_streams: bool = False) -> WorkerSettings:
    """Returns what workers are told; ``role`` names the look-up index, which two processes must not share."""
    data = settings.data_path
    return WorkerSettings(
        lake=data / LAKE_DIRECTORY,
        index=data / INDEX_DIRECTORY / role,
        hot_window_s=settings.hot_window_s,
        hot_messages=settings.hot_messages,
        archive_interval_s=settings.archive_interval_s,
        archive_rows=settings.archive_rows,
        handler_bytes=settings.handler_bytes,
        compact_interval_s=settings.compact_interval_s,
        copy_directory=_path(settings.copy_directory),
        scrub_interval_s=settings.scrub_interval_s,
        scrub_bytes_per_s=settings.scrub_bytes_per_s,
        backup_directory=_path(settings.backup_directory),
        backup_interval_s=settings.backup_interval_s,
        backup_retention_s=settings.backup_retention_s,
        drain_timeout_s=settings.drain_timeout_s,
        replicas=settings.replicas,
        accept_lost_streams=accept_lost_streams,
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def embedded_target(info: LocalServer) -> ConnectionTarget:
    """Returns how to reach an embedded server of this process."""
    return ConnectionTarget(
        url=info.nats_url,
        origin=f"embedded server of {info.data}",
        monitor_url=info.monitor_url,
        durability=info.durability,
    )


@asynccontextmanager
async def open_system(loaded: LoadedSettings, workers: Sequence[WorkerName] | None = ()) -> AsyncGenerator[System]:
    """Yields the system that the settings lead to, and takes down at the end what was started for it.

    ``workers`` are those that must run when the system is this process's own; an empty list still makes the streams
    and the lake, None starts the server alone and creates nothing.  A server or worker that fails meanwhile cancels
    the block and is what is raised.  Raises ConfigurationError, DataDirectoryError, UnavailableError.
    """
    async with AsyncExitStack() as stack:
        yield await _enter_system(stack, loaded, workers)


async def _enter_system(stack: AsyncExitStack, loaded: LoadedSettings, workers: Sequence[WorkerName] | None) -> System:
    from holdfast.ops.data_directory import DirectoryInUseError

    data = loaded.settings.data_path
    started = time.monotonic()
    told = False
    while True:
        target = resolve_connection(loaded, local=True)
        if target is not None:
            return System(target=target, data=data, lake=data / LAKE_DIRECTORY, embedded=False)
        try:
            return await stack.enter_async_context(open_own_system(loaded.settings, workers))
        except DirectoryInUseError as error:
            # Another command has a server of its own for a moment, or 'holdfast up' is starting: it is one's turn soon.
            waited_s = time.monotonic() - started
            if waited_s > loaded.settings.start_timeout_s:
                raise
            if waited_s > _TELL_AFTER_S and not told:
                told = True
                logger.warning("waiting for the data directory", extra={"action": "waiting", "reason": error.message})
        await asyncio.sleep(_TURN_S * (0.5 + random.random()))  # noqa: S311  spreads attempts, guards nothing


@asynccontextmanager
async def open_own_system(settings: Settings, workers: Sequence[WorkerName] | None) -> AsyncGenerator[System]:
    """Yields a system of this process on the data directory of the settings, whatever else is named or runs."""
    # Loaded only here: a command against a running system should not pay for pyarrow and deltalake.
    from holdfast.ops.server import EmbeddedServer
    from holdfast.ops.server_watch import watch_server

    data = settings.data_path
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(EmbeddedServer.from_settings(settings, announce=False))
        await stack.enter_async_context(watched(partial(watch_server, server)))
        target = embedded_target(server.info)
        watchers: list[Watcher] = [server.wait_failed]
        if workers is not None:
            from holdfast.workers.system import run_workers

            running = await stack.enter_async_context(
                run_workers(target, workers, worker_settings(settings, EMBEDDED_ROLE))
            )
            watchers.append(running.wait_failed)
        async with watched(*watchers):
            yield System(target=target, data=data, lake=data / LAKE_DIRECTORY, embedded=True)


@asynccontextmanager
async def watched(*watchers: Watcher) -> AsyncGenerator[None]:
    """Runs the block beside watchers: the first that raises cancels the block, and is what is raised.

    Errors of the block itself pass through as they are.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_run(watcher)) for watcher in watchers]
            yield
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as failures:
        # The group lists its tasks' failures before the block's: the death of a server before the silence it caused.
        cause = first_cause(failures)
        raise cause from cause.__cause__


def first_cause(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Returns the first error that is not a group itself."""
    first = failures.exceptions[0]
    return first_cause(cast("BaseExceptionGroup[BaseException]", first)) if is_group(first) else first


def is_group(error: BaseException) -> bool:
    """Whether an error is several."""
    return isinstance(error, BaseExceptionGroup)


async def _run(watcher: Watcher) -> None:
    await watcher()
