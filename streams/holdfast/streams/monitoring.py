"""One GET of a server's monitoring address, and what ``/healthz`` says."""

from __future__ import annotations

import asyncio
from typing import Final
from urllib.parse import urlsplit

import msgspec

from holdfast.schemas.errors import ConfigurationError, UnavailableError
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.connection_target import mask_url

# What a peer that is not up, or not a NATS server, makes of an exchange; msgspec's errors are ValueErrors.
NO_ANSWER: Final = (OSError, EOFError, ValueError, IndexError, TimeoutError, asyncio.LimitOverrunError)
_REPLY_BYTES: Final = 1_048_576


class StreamHealth(msgspec.Struct, frozen=True):
    """What ``/healthz?details=true`` says of one thing that is not well; ``stream`` is empty when it is another."""

    type: str = ""
    error: str = ""
    stream: str = ""


class Health(msgspec.Struct, frozen=True):
    """The answer of ``/healthz``: ``error`` without details, ``errors`` with them."""

    status: str = ""
    error: str = ""
    errors: tuple[StreamHealth, ...] = ()


async def get(monitor_url: str, path: str, timeout_s: float) -> tuple[int, bytes]:
    """Returns the status and the body of a GET; raises UnavailableError when no whole answer comes in time."""
    # Sixteen lines instead of a client library, for one GET: asyncio has none, and urllib would honour proxies.
    host, port = address_of(monitor_url, "monitoring")
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
    except NO_ANSWER as error:
        raise no_answer("monitoring address", monitor_url, error) from error


async def get_health(monitor_url: str, timeout_s: float) -> Health | None:
    """Returns what is wrong with a server by its own word, or None when it says that all is well.

    Raises UnavailableError when it does not answer.
    """
    status, body = await get(monitor_url, "/healthz?details=true", timeout_s)
    if status == 200:
        return None
    try:
        health = msgspec.json.decode(body, type=Health)
    except UNDECODABLE:
        health = Health()
    return health if health.error or health.errors else Health(error=f"status {status}")


def address_of(url: str, what: str) -> tuple[str, int]:
    """Returns host and port of a URL; raises ConfigurationError when it does not name both."""
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


def no_answer(what: str, url: str, error: Exception) -> UnavailableError:
    """Returns the error for a peer that did not answer, or not as it should."""
    reason = "it took too long" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
    return UnavailableError(
        f"{what} {mask_url(url)} does not answer: {reason}", hint="is it running, and is this its address?"
    )


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    parts: list[bytes] = []
    left = _REPLY_BYTES
    while part := await reader.read(left):
        parts.append(part)
        left -= len(part)
        if left == 0:
            raise ValueError(f"the answer is over {_REPLY_BYTES} bytes")
    return b"".join(parts)
