"""Shared by the tests: a nats-server of one's own that can be killed, and a publisher that follows no rules."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec
from hypothesis import settings
from nats.aio.client import Client

from holdfast.ops.server import EmbeddedServer
from holdfast.ops.server_config import ServerSettings
from holdfast.schemas.errors import UnavailableError
from holdfast.streams.connection import ApiError, open_connection
from holdfast.streams.topology import StreamInfo, ensure_topology

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from nats.aio.msg import Msg

    from holdfast.streams.connection import Connection

LIMIT_S: Final = 30.0
"""Bounds every wait of these tests; none of them is expected to take that long."""

STORE_FAILED: Final = 10049


def examples(count: int) -> settings:
    """As many examples of a property; twenty times as many in the profile ``thorough``."""
    return settings(max_examples=count * (20 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 1))


def stable_id(value: object) -> str:
    """Names a case by its value: the same in every process, so that several can share the tests out."""
    # Sets have no order of their own, and the order of text in them is another in each process.
    text = re.sub(r"\{'[^:}]*\}", "{set}", repr(value))
    return re.sub(r" at 0x[0-9a-f]+", "", text)[:40]


class OwnServer:
    """A server on a data directory of its own, with Holdfast's streams; stays at one port through restarts."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._port = 0
        self._server: EmbeddedServer | None = None

    @property
    def url(self) -> str:
        assert self._server is not None, "the server is down"
        return self._server.info.nats_url

    @property
    def monitor_url(self) -> str:
        assert self._server is not None, "the server is down"
        return self._server.info.monitor_url

    async def start(self, *, with_streams: bool = True) -> dict[str, StreamInfo]:
        """Starts the server, again on the same port and data when it ran before; returns its streams."""
        server = EmbeddedServer(ServerSettings(data=self._data, port=self._port))
        await server.__aenter__()
        self._server = server
        self._port = urlsplit(server.info.nats_url).port or 0
        if not with_streams:
            return {}
        async with open_connection(self.url) as connection:
            return await ensure_topology(connection)

    async def stop(self) -> None:
        """Stops the server cleanly; harmless when it is down."""
        server, self._server = self._server, None
        if server is not None:
            await server.close()

    async def kill(self) -> None:
        """Kills the server as a crash would."""
        assert self._server is not None, "the server is down"
        os.kill(self._server.info.pid, signal.SIGKILL)
        with contextlib.suppress(UnavailableError):  # that it has ended
            await asyncio.wait_for(self._server.wait_failed(), LIMIT_S)
        await self.stop()

    def signal(self, number: signal.Signals) -> None:
        """Sends the server's process a signal, such as SIGSTOP and SIGCONT."""
        assert self._server is not None, "the server is down"
        if number == signal.SIGSTOP:
            stop_process(self._server.info.pid)
        else:
            os.kill(self._server.info.pid, number)

    async def restart(self) -> None:
        """Kills the server and starts it on the same data."""
        await self.kill()
        await self.start(with_streams=False)


def stop_process(pid: int) -> None:
    """Stops a process, and waits: a thread on another processor may answer one more message before."""
    os.kill(pid, signal.SIGSTOP)
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)


@contextlib.asynccontextmanager
async def plain_client(url: str) -> AsyncGenerator[Client]:
    """A nats-py client as anybody would open one."""
    client = Client()
    await client.connect(url, allow_reconnect=False)
    try:
        yield client
    finally:
        await client.close()


async def api(client: Client, subject: str, request: object = None) -> dict[str, object]:
    """Calls the JetStream API with a plain client and returns the answer, whatever it says."""
    payload = b"" if request is None else msgspec.json.encode(request)
    reply: Msg = await client.request(f"$JS.API.{subject}", payload, timeout=LIMIT_S)
    return msgspec.json.decode(reply.data, type=dict[str, object])


async def raw_publish(url: str, frame: bytes) -> None:
    """Sends bytes of the client protocol as they are, and waits until the server has taken them.

    A client library refuses to send what the tests of bad input need.
    """
    parts = urlsplit(url)
    async with asyncio.timeout(LIMIT_S):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n' + frame + b"PING\r\n")
            answer = b""
            while b"PONG\r\n" not in answer:
                chunk = await reader.read(4096)
                assert chunk, f"the server closed the connection: {answer!r}"
                assert b"-ERR" not in answer, answer
                answer += chunk
        finally:
            writer.close()
            await writer.wait_closed()


def hpub(subject: bytes, header_block: bytes, payload: bytes = b"{}") -> bytes:
    """A protocol frame that publishes with a header block as it is given."""
    return b"HPUB %b %d %d\r\n%b%b\r\n" % (
        subject,
        len(header_block),
        len(header_block) + len(payload),
        header_block,
        payload,
    )


async def create_stream(connection: Connection, config: dict[str, Any]) -> None:
    """Creates a stream as a foreign client would; a namesake's directory may still be being removed."""
    while True:
        try:
            await connection.api(f"STREAM.CREATE.{config['name']}", config)
            return
        except ApiError as error:
            if error.err_code != STORE_FAILED:
                raise
            await asyncio.sleep(0.01)
