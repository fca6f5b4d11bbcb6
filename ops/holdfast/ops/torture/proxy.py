"""A TCP proxy that does to a connection what networks do: delay, dribble, cut, and silence.

The bytes stay as they are and in order, as TCP promises; everything else is the seed's choice.
"""

from __future__ import annotations

import asyncio
import random
import socket
from types import TracebackType
from typing import Final, Literal, Self

Mode = Literal["through", "delay", "split", "half-open", "refuse"]

_CHUNK: Final = 65_536
_LINGER_RESET: Final = b"\x01\x00\x00\x00\x00\x00\x00\x00"
"""SO_LINGER on, zero seconds: closing sends a reset."""


class Proxy:
    """Passes connections on to a port of this machine.

    ``through``    as if it were not there
    ``delay``      each piece waits up to ``delay_s``
    ``split``      pieces of some bytes, with turns of other tasks in between
    ``half-open``  what comes is swallowed, nothing is closed: the peer is gone and nobody says so
    ``refuse``     new connections are reset at once

    A connection that was half open stays silent for ever, as one whose peer lost power: :meth:`reset` ends it.
    """

    def __init__(self, target_port: int, seed: int) -> None:
        self.target_port = target_port
        self.mode: Mode = "through"
        self.delay_s = 0.05
        self.port = 0
        self.connections = 0
        self._choice = random.Random(f"proxy {seed}")
        self._server: asyncio.Server | None = None
        self._open: set[_Link] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        self.reset()
        for link in list(self._open):
            link.cancel()

    @property
    def url(self) -> str:
        """The address to give to clients."""
        return f"nats://127.0.0.1:{self.port}"

    def set(self, mode: Mode, *, delay_s: float = 0.05) -> None:
        """Changes what happens to bytes from now on; ``through`` also ends what was silenced."""
        was, self.mode, self.delay_s = self.mode, mode, delay_s
        if was == "half-open" and mode != "half-open":
            self.reset()

    def reset(self) -> int:
        """Resets every connection, both ways; returns how many there were."""
        for link in list(self._open):
            link.reset()
        return len(self._open)

    async def pause(self) -> None:
        """Waits as the mode says before a piece is passed on."""
        if self.mode == "delay":
            await asyncio.sleep(self._choice.random() * self.delay_s)

    def pieces(self, data: bytes) -> list[bytes]:
        """Returns what a piece is passed on as."""
        if self.mode != "split":
            return [data]
        pieces: list[bytes] = []
        while data:
            size = self._choice.choice((1, 2, 7, 100, 1_460, 16_000))
            pieces.append(data[:size])
            data = data[size:]
        return pieces

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.mode == "refuse":
            _reset(writer)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            _reset(writer)
            return
        link = _Link(self, (reader, writer), (far_reader, far_writer))
        self._open.add(link)
        try:
            await link.run()
        finally:
            self._open.discard(link)


class _Link:
    """One connection: two directions that end together."""

    def __init__(
        self,
        proxy: Proxy,
        near: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        far: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._proxy = proxy
        self._near, self._far = near, far
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        self._tasks = [
            asyncio.create_task(self._pump(self._near[0], self._far[1])),
            asyncio.create_task(self._pump(self._far[0], self._near[1])),
        ]
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        self.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for _, writer in (self._near, self._far):
            writer.close()

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    def reset(self) -> None:
        for _, writer in (self._near, self._far):
            _reset(writer)
        self.cancel()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(_CHUNK):
                await self._proxy.pause()
                for piece in self._proxy.pieces(data):
                    if self._proxy.mode == "half-open":
                        break
                    writer.write(piece)
                    await writer.drain()
                    if self._proxy.mode == "split":
                        await asyncio.sleep(0)
        except OSError:
            pass


def _reset(writer: asyncio.StreamWriter) -> None:
    connected = writer.get_extra_info("socket")
    if connected is not None:
        try:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        except OSError:
            pass  # it is closed already
    writer.transport.abort()
