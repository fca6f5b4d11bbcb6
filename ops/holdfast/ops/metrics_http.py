"""``GET /metrics`` on the loopback interface, for a Prometheus on this machine: what the resolver measures, as text."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.schemas.errors import ConfigurationError, HoldfastError, UnavailableError
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.wire import H_SERVICE_ERROR, service_subject
from holdfast.workers.exposition import CONTENT_TYPE

if TYPE_CHECKING:
    from holdfast.streams.connection_target import ConnectionTarget

logger = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"
_REQUEST_S: Final = 5.0
_ANSWER_S: Final = 10.0
_HEAD_BYTES: Final = 8_192
_MOST: Final = 16
"""Scrapes answered at once; each has the whole system looked at."""


@asynccontextmanager
async def serve_metrics(target: ConnectionTarget, port: int) -> AsyncGenerator[int]:
    """Answers ``GET /metrics`` on a loopback port while the block lasts; yields the port (of 0, the one chosen)."""
    room = asyncio.Semaphore(_MOST)
    async with open_connection(target, name="holdfast-metrics") as connection:

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                async with room:
                    status, kind, body = await _answer(connection, reader)
                    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
                    writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
                    await asyncio.wait_for(writer.drain(), _REQUEST_S)
            except (OSError, TimeoutError):
                logger.debug("a scrape was not answered", exc_info=True)
            finally:
                writer.close()

        try:
            server = await asyncio.start_server(answer, HOST, port, limit=_HEAD_BYTES)
        except OSError as error:
            raise ConfigurationError(
                f"metrics cannot be served on {HOST}:{port}: {(error.strerror or str(error)).lower()}",
                field="metrics_port",
                hint="choose another --metrics-port",
            ) from error
        async with server:
            yield server.sockets[0].getsockname()[1]


async def _answer(connection: Connection, reader: asyncio.StreamReader) -> tuple[str, str, bytes]:
    try:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _REQUEST_S)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
        return "400 Bad Request", "text/plain", b"send GET /metrics\n"
    method, _, rest = head.partition(b" ")
    path = rest.split(b" ", 1)[0].split(b"?", 1)[0]
    if path != b"/metrics":
        return "404 Not Found", "text/plain", b"see /metrics\n"
    if method != b"GET":
        return "405 Method Not Allowed", "text/plain", b"send GET /metrics\n"
    try:
        return "200 OK", CONTENT_TYPE, await read_metrics(connection)
    except HoldfastError as error:
        return "503 Service Unavailable", "text/plain; charset=utf-8", f"{error}\n".encode()


async def read_metrics(connection: Connection) -> bytes:
    """Returns the metrics as Prometheus reads them; raises UnavailableError when no resolver answers."""
    request = msgspec.json.encode({"format": "prometheus"})
    reply = await connection.lean.request(service_subject("default", "metrics"), request, timeout_s=_ANSWER_S)
    if reply.headers and H_SERVICE_ERROR in reply.headers:
        raise UnavailableError("the resolver did not measure", hint="see its log")
    return bytes(reply.data)
