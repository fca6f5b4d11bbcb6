"""What ``holdfast up`` and ``holdfast worker`` run: a server where none is named, and workers, until they are left.

Order of entry is order of dependence: server, workers.  Leaving stops in reverse: the workers drain (resolver first,
so that nobody asks any more; archiver last, so that what came meanwhile is archived), then the server stops.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from holdfast.ops.discovery import resolve_connection
from holdfast.ops.server import EmbeddedServer
from holdfast.ops.server_probe import verify_durability_of_all
from holdfast.ops.server_watch import watch_server
from holdfast.ops.settings import LoadedSettings, describe_settings
from holdfast.ops.system import (
    EMBEDDED_ROLE,
    LAKE_DIRECTORY,
    System,
    Watcher,
    embedded_target,
    watched,
    worker_settings,
)
from holdfast.schemas.errors import ConfigurationError
from holdfast.streams.connection_target import ConnectionTarget, mask_url
from holdfast.workers.settings import WORKERS, WorkerName
from holdfast.workers.system import run_workers

logger = logging.getLogger(__name__)


@asynccontextmanager
async def serve_up(loaded: LoadedSettings, *, accept_lost_streams: bool = False) -> AsyncGenerator[System]:
    """Runs all workers, and an embedded server unless another is named; yields when all of them serve.

    A failure of any of them cancels the block and is what is raised.
    """
    _log_settings(loaded)
    data = loaded.settings.data_path
    async with AsyncExitStack() as stack:
        watchers: list[Watcher] = []
        target = resolve_connection(loaded, local=False)
        embedded = target is None
        if target is None:
            server = await stack.enter_async_context(EmbeddedServer.from_settings(loaded.settings))
            watchers.append(server.wait_failed)
            # Left last: a server that stops storing while the workers drain is still brought back.
            await stack.enter_async_context(watched(partial(watch_server, server)))
            target = embedded_target(server.info)
        else:
            await _check_durability(target, loaded)
        role = EMBEDDED_ROLE if embedded else f"{EMBEDDED_ROLE}-elsewhere"
        running = await stack.enter_async_context(
            run_workers(
                target, WORKERS, worker_settings(loaded.settings, role, accept_lost_streams=accept_lost_streams)
            )
        )
        watchers.append(running.wait_failed)
        async with watched(*watchers):
            yield System(target=target, data=data, lake=data / LAKE_DIRECTORY, embedded=embedded)


@asynccontextmanager
async def serve_worker(loaded: LoadedSettings, name: WorkerName) -> AsyncGenerator[System]:
    """Runs one worker on the server that is named or runs on the data directory; yields when it serves."""
    _log_settings(loaded)
    data = loaded.settings.data_path
    target = resolve_connection(loaded, local=True)
    if target is None:
        raise ConfigurationError(
            f"no NATS server is named, and no local server runs on {data}",
            field="nats_url",
            hint="start one with 'holdfast up', or give --nats-url nats://host:4222",
        )
    await _check_durability(target, loaded)
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(
            run_workers(target, [name], worker_settings(loaded.settings, f"worker-{name}"))
        )
        await stack.enter_async_context(watched(running.wait_failed))
        yield System(target=target, data=data, lake=data / LAKE_DIRECTORY, embedded=False)


async def _check_durability(target: ConnectionTarget, loaded: LoadedSettings) -> None:
    """Refuses a server that does not sync as the settings promise; one that cannot be asked is believed, loudly."""
    if target.durability is not None and target.durability != "durable" and loaded.settings.durability == "durable":
        logger.warning(
            "the local server runs in mode fast: a power cut may lose acknowledged data",
            extra={"action": "server_not_durable", "nats_url": mask_url(target.url)},
        )
        return
    if target.monitor_urls:
        left = await verify_durability_of_all(target.monitor_urls, loaded.settings.durability)
        if left > 0 and loaded.settings.durability == "durable":
            logger.warning(
                "the durability of some nodes is not verified: set nats_monitor_url to the addresses of all",
                extra={"action": "durability_unverified", "nats_url": mask_url(target.url), "nodes": left},
            )
    elif loaded.settings.durability == "durable":
        logger.warning(
            "the server's durability is not verified: set nats_monitor_url to its monitoring address",
            extra={"action": "durability_unverified", "nats_url": mask_url(target.url)},
        )


def _log_settings(loaded: LoadedSettings) -> None:
    shown = {line.name: line.value for line in describe_settings(loaded) if line.value}
    logger.info("effective settings", extra={"action": "settings", **shown})


__all__ = ["serve_up", "serve_worker"]
