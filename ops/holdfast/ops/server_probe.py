"""Asks a nats-server how it is: by its own protocol, and by its monitoring address."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Final

import msgspec

from holdfast.schemas.errors import ConfigurationError, DurabilityError, UnavailableError
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.connection_target import Durability, mask_url
from holdfast.streams.monitoring import NO_ANSWER, address_of, get, get_health, no_answer
from holdfast.streams.storing import storage_failed
from holdfast.streams.write_probe import write_errors_in

PROBE_TIMEOUT_S: Final = 2.0
"""For one question to a server: it answers in a millisecond, or it is not ready."""
MIN_SERVER_VERSION: Final = (2, 15)
"""Holdfast relies on atomic batches as they are from here on."""

_CONNECT: Final = (
    b'CONNECT {"verbose":false,"pedantic":false,"tls_required":false,"lang":"python","version":"0",'
    b'"name":"holdfast-probe","protocol":1}\r\nPING\r\n'
)
_MOST_LINES: Final = 8


class ServerInfo(msgspec.Struct):
    """What is used of the server's INFO line."""

    version: str
    jetstream: bool = False
    max_payload: int = 0


class _JetStreamConfig(msgspec.Struct):
    sync_always: bool = False  # the server leaves it out when it is false
    store_dir: str = ""


class _Cluster(msgspec.Struct):
    cluster_size: int = 1


class _JetStreamReply(msgspec.Struct):
    server_id: str = ""
    meta_cluster: _Cluster | None = None
    config: _JetStreamConfig | None = None
    disabled: bool = False


async def check_protocol(nats_url: str, timeout_s: float = PROBE_TIMEOUT_S) -> ServerInfo:
    """Returns the INFO of a server without users and TLS that has answered a PING.

    Raises UnavailableError when it does not answer, ConfigurationError when it is too old or has no JetStream.
    """
    host, port = address_of(nats_url, "nats")
    try:
        async with asyncio.timeout(timeout_s):
            info = await _ping(host, port)
    except NO_ANSWER as error:
        raise no_answer("nats server", nats_url, error) from error
    if _version(info.version) < MIN_SERVER_VERSION:
        raise ConfigurationError(
            f"nats-server {info.version} is older than {'.'.join(map(str, MIN_SERVER_VERSION))}",
            field="nats_url",
            hint="run: pip install -U 'holdfast[server]'",
        )
    if not info.jetstream:
        raise ConfigurationError(
            f"nats server {mask_url(nats_url)} runs without JetStream",
            field="nats_url",
            hint="add a jetstream block to its configuration",
        )
    return info


async def check_health(monitor_url: str, timeout_s: float = PROBE_TIMEOUT_S) -> None:
    """Returns when the server says that it and its JetStream are well; raises UnavailableError otherwise.

    Raises StorageFailedError when it has failed to write to its disk: it will not be well before its next start.
    """
    health = await get_health(monitor_url, timeout_s)
    if health is None:
        return
    errors = write_errors_in(health)
    if errors:
        raise storage_failed(errors[0])
    reason = "; ".join(item.error for item in health.errors) or health.error
    raise UnavailableError(f"nats server at {mask_url(monitor_url)} is not healthy: {reason}", hint="read its log")


async def verify_durability_of_all(
    monitor_urls: Sequence[str], mode: Durability, timeout_s: float = PROBE_TIMEOUT_S
) -> int:
    """As :func:`verify_durability`, of each node of a cluster; returns how many of its nodes were not asked.

    A node that does not answer is one that was not asked, unless none does: a cluster works with one node down.
    """
    asked: set[str] = set()
    size = 1
    failure: UnavailableError | None = None
    for url in monitor_urls:
        try:
            reply = await verify_durability(url, mode, timeout_s)
        except UnavailableError as error:
            failure = error
            continue
        asked.add(reply.server_id)
        size = max(size, reply.nodes)
    if not asked and failure is not None:
        raise failure
    return size - len(asked)


class Verified(msgspec.Struct, frozen=True):
    """A server that syncs as it must, and of how many nodes its cluster is."""

    server_id: str
    nodes: int


async def verify_durability(monitor_url: str, mode: Durability, timeout_s: float = PROBE_TIMEOUT_S) -> Verified:
    """Returns when the server syncs as ``mode`` promises; a server that does more than ``fast`` needs is well.

    Raises DurabilityError when it does not, UnavailableError when its monitoring address does not answer.
    """
    status, body = await get(monitor_url, "/jsz?config=true", timeout_s)
    try:
        reply = msgspec.json.decode(body, type=_JetStreamReply)
    except UNDECODABLE as error:
        raise no_answer("monitoring address", monitor_url, error) from error
    if status != 200 or reply.disabled or reply.config is None or not reply.config.store_dir:
        raise DurabilityError(
            f"nats server at {mask_url(monitor_url)} does not run JetStream, so it stores nothing",
            field="durability",
            hint="add a jetstream block to its configuration",
        )
    if mode == "durable" and not reply.config.sync_always:
        raise DurabilityError(
            f"nats server at {mask_url(monitor_url)} acknowledges before it syncs to disk, "
            "so a power cut loses acknowledged data",
            field="durability",
            hint="set sync_interval: always in its jetstream block and restart it, or accept the loss with "
            "--durability fast",
        )
    return Verified(reply.server_id, 1 if reply.meta_cluster is None else reply.meta_cluster.cluster_size)


async def _ping(host: str, port: int) -> ServerInfo:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        verb, _, payload = (await reader.readuntil(b"\r\n")).partition(b" ")
        if verb != b"INFO":
            raise ValueError(f"expected INFO, got {verb[:20]!r}")
        info = msgspec.json.decode(payload, type=ServerInfo)
        writer.write(_CONNECT)
        await writer.drain()
        for _ in range(_MOST_LINES):  # a server may send INFO again before it answers
            line = await reader.readuntil(b"\r\n")
            if line.startswith(b"PONG"):
                return info
            if line.startswith(b"-ERR"):
                raise ValueError(line[5:85].decode(errors="replace").strip())
        raise ValueError("no PONG")
    finally:
        # Not waited for: nothing was written that still has to arrive.
        writer.close()


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])
