"""A cancel ends a wait for messages, also one that arrives in the same moment."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from nats.aio.msg import Msg

from holdfast.streams.gather import ask_each
from holdfast.streams.stream_images import _receive_chunks
from tests.support import LIMIT_S, plain_client

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection

TURNS = range(5)
"""Turns of the loop between the arrival and the cancel."""


async def cancel_after_arrival(waiting: asyncio.Task[object], queue: asyncio.Queue[Msg], msg: Msg, turns: int) -> None:
    queue.put_nowait(msg)
    for _ in range(turns):
        await asyncio.sleep(0)
    waiting.cancel()
    done, _ = await asyncio.wait((waiting,), timeout=1)
    if not done:  # swallowed: it waits on, and is not to be left behind
        waiting.cancel()
        await asyncio.wait((waiting,), timeout=LIMIT_S)
        pytest.fail("the cancel was swallowed")
    assert waiting.cancelled()


@pytest.mark.parametrize("turns", TURNS)
async def test_a_question_to_each(connection: Connection, nats_server: str, turns: int) -> None:
    async with plain_client(nats_server) as client:
        await client.subscribe("silent")
        await client.request("$JS.API.INFO", b"")  # a round trip: the subscription is known
        asking = asyncio.create_task(
            ask_each(connection, "silent", lambda _: False, timeout_s=LIMIT_S, quiet_s=LIMIT_S)
        )
        while not connection.lean._streams:  # noqa: ASYNC110  there is no event
            await asyncio.sleep(0)
        await connection.lean.request("$JS.API.INFO")  # by then it waits
        (queue,) = connection.lean._streams.values()
        assert isinstance(queue, asyncio.Queue)
        await cancel_after_arrival(asking, queue, Msg(connection.client, "s", "", b"an answer", None), turns)


@pytest.mark.parametrize("turns", TURNS)
async def test_an_image_of_a_stream(connection: Connection, turns: int) -> None:
    async def write(_: bytes) -> None:
        """Somewhere."""

    queue: asyncio.Queue[Msg] = asyncio.Queue()
    receiving = asyncio.create_task(_receive_chunks(connection, "S", queue, write))
    for _ in range(5):
        await asyncio.sleep(0)
    await cancel_after_arrival(receiving, queue, Msg(connection.client, "s", "", b"a piece", None), turns)
