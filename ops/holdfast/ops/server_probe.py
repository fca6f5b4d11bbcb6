"""Asks a nats-server how it is: by its own protocol, and by its monitoring address."""

from __future__ import annotations

import asyncio
import re
from typing import Final
from urllib.parse import urlsplit

import msgspec

from holdfast.schemas.errors import ConfigurationError, DurabilityError, UnavailableError
from holdfast.streams.connection_target import Durability, mask_url

PROBE_TIMEOUT_S: Final = 2.0
"""For one question to a server: it answers in a millisecond, or it is not ready."""
MIN_SERVER_VERSION: Final = (2, 15)
"""Holdfast relies on atomic batches as they are from here on."""

_REPLY_BYTES: Final = 1_048_576
_CONNECT: Final = (
    b'CONNECT {"verbose":false,"pedantic":false,"tls_required":false,"lang":"python","version":"0",'
    b'"name":"holdfast-probe","protocol":1}\r\nPING\r\n'
)
_MOST_LINES: Final = 8
# What a peer that is not up, or not a NATS server, makes of an exchange; msgspec's errors are ValueErrors.
_NO_ANSWER: Final = (OSError, EOFError, ValueError, IndexError, TimeoutError, asyncio.LimitOverrunError)


class ServerInfo(msgspec.Struct):
    """What is used of the server's INFO line."""

    version: str
    jetstream: bool = False
    max_payload: int = 0


class _JetStreamConfig(msgspec.Struct):
    sync_always: bool = False  # the server leaves it out when it is false
    store_dir: str = ""


class _JetStreamReply(msgspec.Struct):
    config: _JetStreamConfig | None = None
    disabled: bool = False


class _HealthReply(msgspec.Struct):
    status: str = ""
    error: str = ""


async def check_protocol(nats_url: str, timeout_s: float = PROBE_TIMEOUT_S) -> ServerInfo:
    """Returns the INFO of a server without users and TLS that has answered a PING.

    Raises UnavailableError when it does not answer, ConfigurationError when it is too old or has no JetStream.
    """
    host, port = _address(nats_url, "nats")
    try:
        async with asyncio.timeout(timeout_s):
            info = await _ping(host, port)
    except _NO_ANSWER as error:
        raise _no_answer("nats server", nats_url, error) from error
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
    """Returns when the server says that it and its JetStream are well; raises UnavailableError otherwise."""
    status, body = await _get(monitor_url, "/healthz", timeout_s)
    if status == 200:
        return
    try:
        reason = msgspec.json.decode(body, type=_HealthReply).error
    except msgspec.DecodeError:
        reason = ""
    raise UnavailableError(
        f"nats server at {mask_url(monitor_url)} is not healthy: {reason or f'status {status}'}",
        hint="read its log",
    )


async def verify_durability(monitor_url: str, mode: Durability, timeout_s: float = PROBE_TIMEOUT_S) -> None:
    """Returns when the server syncs as ``mode`` promises; a server that does more than ``fast`` needs is well.

    Raises DurabilityError when it does not, UnavailableError when its monitoring address does not answer.
    """
    status, body = await _get(monitor_url, "/jsz?config=true", timeout_s)
    try:
        reply = msgspec.json.decode(body, type=_JetStreamReply)
    except msgspec.DecodeError as error:
        raise _no_answer("monitoring address", monitor_url, error) from error
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


async def _get(monitor_url: str, path: str, timeout_s: float) -> tuple[int, bytes]:
    # Sixteen lines instead of a client library, for one GET: asyncio has none, and urllib would honour proxies.
    host, port = _address(monitor_url, "monitoring")
    secure = urlsplit(monitor_url).scheme == "https" or None
    request = f"GET {path} HTTP/1.0\r\nHost: {host}\r\nAccept: application/json\r\n\r\n"
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port, ssl=secure, limit=_REPLY_BYTES)
            try:
                writer.write(request.encode())
                await writer.drain()
                head = await reader.readuntil(b"\r\n\r\n")
                status = int(head.split(maxsplit=2)[1])
                return status, await _read_all(reader)
            finally:
                writer.close()
    except _NO_ANSWER as error:
        raise _no_answer("monitoring address", monitor_url, error) from error


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    parts: list[bytes] = []
    left = _REPLY_BYTES
    while part := await reader.read(left):
        parts.append(part)
        left -= len(part)
        if left == 0:
            raise ValueError(f"the answer is over {_REPLY_BYTES} bytes")
    return b"".join(parts)


def _address(url: str, what: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise ConfigurationError(
            f"{what} address {mask_url(url)!r} does not name a host and a port",
            field="nats_url",
            hint="write it like http://host:8222" if what == "monitoring" else "write it like nats://host:4222",
        )
    return host, port


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _no_answer(what: str, url: str, error: Exception) -> UnavailableError:
    reason = "it took too long" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
    return UnavailableError(
        f"{what} {mask_url(url)} does not answer: {reason}", hint="is it running, and is this its address?"
    )
