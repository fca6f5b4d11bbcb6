"""The proxy that does to a connection what networks do: the bytes stay as they are, or do not come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from holdfast.ops.torture.proxy import Proxy

if TYPE_CHECKING:
    from holdfast.ops.torture.proxy import Mode

SENT = bytes(range(256)) * 300


@asynccontextmanager
async def echo() -> AsyncGenerator[int]:
    """A server that sends back what it gets."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4_096):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize("mode", ["through", "delay", "split"])
async def test_bytes_arrive_as_they_were_sent(mode: Mode) -> None:
    async with echo() as port, Proxy(port, seed=7) as proxy, asyncio.timeout(20):
        proxy.set(mode, delay_s=0.002)
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(SENT)
        assert await reader.readexactly(len(SENT)) == SENT
        writer.close()


async def test_a_reset_is_seen_by_the_client_and_the_next_connection_serves() -> None:
    async with echo() as port, Proxy(port, seed=7) as proxy, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        assert proxy.reset() == 1
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"again")
        assert await reader.readexactly(5) == b"again"
        writer.close()


async def test_a_half_open_connection_is_silent_until_it_is_over() -> None:
    async with echo() as port, Proxy(port, seed=7) as proxy, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        proxy.set("half-open")
        writer.write(b"anybody there?")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        proxy.set("through")
        # What was swallowed stays swallowed: the connection ends instead of going on without it.
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)


async def test_nobody_gets_in_while_it_refuses() -> None:
    async with echo() as port, Proxy(port, seed=7) as proxy, asyncio.timeout(20):
        proxy.set("refuse")
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            await _greeted(proxy.port)


async def _greeted(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello")
    return await reader.readexactly(5)
