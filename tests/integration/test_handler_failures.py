"""Handlers that fail: tried again, set aside, told."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from holdfast.client import connect
from holdfast.schemas.errors import (
    HandlerError,
    UnavailableError,
)
from holdfast.schemas.limits import LINEAGE_DEPTH
from holdfast.streams.wire import EVENTS_STREAM
from tests.handler_support import QUICK, letters_of, named, settled
from tests.running import eventually
from tests.support import LIMIT_S

if TYPE_CHECKING:
    from holdfast.client import Event, Holdfast
    from holdfast.client.handlers import Handlers


async def test_a_failure_is_tried_again_with_backoff_then_set_aside_and_told(
    hf: Holdfast, handlers: Handlers, namespace: str
) -> None:
    attempts: list[str] = []

    @handlers.on("a", name="failing", max_deliver=3, **QUICK)
    async def work(event: Event) -> None:
        attempts.append(event.event_id)
        raise ValueError("it is too red")

    await handlers.ready()
    event = await hf.emit("a", {"n": 1}, session="s1")
    await eventually(lambda: settled(handlers, "failing", 1))
    assert attempts == [event.event_id] * 3
    [letter] = await letters_of(hf)
    assert letter.handler is not None
    assert (letter.handler.name, letter.code, letter.stream) == ("failing", "handler_failed", EVENTS_STREAM)
    assert "it is too red" in letter.reason
    [failure] = await named(hf.connection, namespace, "a:error")
    assert (failure.parent_event_id, failure.event_depth, failure.session_id) == (event.event_id, 1, "s1")
    assert b"it is too red" in (failure.data or b"")


async def test_a_connection_that_is_closed_for_good_lets_its_handlers_end(nats_server: str, namespace: str) -> None:
    """What they hold cannot be handed back: it is delivered again to others when its time is up."""
    begun = asyncio.Event()
    async with connect(nats_server, namespace=namespace) as hf:

        @hf.handlers.on("a", name="h", concurrency=1)
        async def work(event: Event) -> None:
            if event.data == "stay":
                begun.set()
                await asyncio.Event().wait()

        await hf.handlers.ready()
        for _ in range(20):  # events that are so soon done with are taken ahead
            await hf.emit("a")
        await eventually(lambda: settled(hf.handlers, "h", 20))
        await hf.emit("a", "stay")
        await asyncio.wait_for(begun.wait(), LIMIT_S)
        await hf.emit("a")
        await eventually(lambda: len(hf.handlers._runners["h"]._intake._waiting) == 1)
        await hf.connection.client.close()
        await eventually(lambda: hf.connection.client.is_closed)
        await hf.handlers.close(0.1)
    left = [task for task in asyncio.all_tasks() if task.get_name().startswith("holdfast") and namespace in str(task)]
    assert left == []


async def test_a_handler_that_recovers_leaves_no_letter(hf: Holdfast, handlers: Handlers) -> None:
    attempts: list[int] = []

    @handlers.on("a", name="shaky", **QUICK)
    async def work(event: Event) -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise UnavailableError("not yet")

    await handlers.ready()
    await hf.emit("a")
    await eventually(lambda: handlers.counters["shaky"].done == 1)
    assert (len(attempts), handlers.counters["shaky"].again) == (3, 2)
    assert await letters_of(hf) == []


async def test_what_the_input_is_to_blame_for_is_not_tried_again(hf: Holdfast, handlers: Handlers) -> None:
    attempts: list[int] = []

    @handlers.on("a", name="strict")
    async def work(event: Event) -> None:
        attempts.append(1)
        await hf.resolve("no reference")

    await handlers.ready()
    await hf.emit("a")
    await eventually(lambda: settled(handlers, "strict", 1))
    [letter] = await letters_of(hf)
    assert (len(attempts), letter.code) == (1, "invalid_ref")


async def test_one_event_can_die_in_several_handlers_with_a_letter_for_each(hf: Holdfast, handlers: Handlers) -> None:
    def fail(name: str) -> None:
        @handlers.on("a", name=name, max_deliver=1)
        async def work(event: Event) -> None:
            raise ValueError(f"{name} is tired")

    fail("one")
    fail("ü two")
    await handlers.ready()
    await hf.emit("a", {"n": 1})
    await eventually(lambda: settled(handlers, "one", 1) and settled(handlers, "ü two", 1))
    letters = {letter.handler.name: letter for letter in await letters_of(hf) if letter.handler is not None}
    assert set(letters) == {"one", "ü two"}
    assert all(f"{name} is tired" in letter.reason for name, letter in letters.items())
    assert len({(letter.seq, letter.payload) for letter in letters.values()}) == 1


async def test_B81_a_loop_of_handlers_ends_at_the_limit_of_depth(
    hf: Holdfast, handlers: Handlers, namespace: str
) -> None:
    @handlers.on("loop", name="looping", concurrency=1)
    async def work(event: Event) -> None:
        await hf.emit("loop")

    await handlers.ready()
    root = await hf.emit("loop")
    await eventually(lambda: handlers.counters["looping"].dead == 1)
    rows = await named(hf.connection, namespace, "loop")
    assert [row.event_depth for row in rows] == list(range(LINEAGE_DEPTH + 1))
    assert {row.root_event_id for row in rows} == {root.event_id}
    [letter] = await letters_of(hf)
    assert letter.code == "depth_limit"
    [failure] = await named(hf.connection, namespace, "loop:error")
    assert (failure.parent_event_id, failure.event_depth) == (rows[-1].id, LINEAGE_DEPTH + 1)


async def test_an_attempt_is_bounded_in_time(hf: Holdfast, handlers: Handlers) -> None:
    @handlers.on("a", name="slow", timeout_s=0.05, max_deliver=2, **QUICK)
    async def work(event: Event) -> None:
        await asyncio.Event().wait()

    await handlers.ready()
    await hf.emit("a")
    await eventually(lambda: settled(handlers, "slow", 1))
    [letter] = await letters_of(hf)
    assert "did not end within 0.05 s" in letter.reason


async def test_a_result_that_is_no_json_is_a_dead_letter(hf: Holdfast, handlers: Handlers) -> None:
    @handlers.on("a", name="odd")
    async def work(event: Event) -> object:
        return float("nan")

    await handlers.ready()
    with pytest.raises(HandlerError) as caught:
        await handlers.request("a", timeout_s=LIMIT_S)
    assert (caught.value.handler, caught.value.cause) == ("odd", "invalid_body")
