"""Requests and results: who is answered, by whom, and when nobody does."""

from __future__ import annotations

import asyncio
import gc
import json
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.client import Event, Holdfast
from holdfast.client.handler_policy import consumer_name
from holdfast.schemas.errors import (
    ClosedError,
    HandlerError,
    HoldfastError,
    InvalidFieldError,
    UnavailableError,
)
from holdfast.schemas.ids import new_event_id
from holdfast.schemas.lineage import RECEIPT
from holdfast.streams.connection import ApiError, ApiFailure
from holdfast.streams.consumer import DurableConsumer, delete_consumer
from holdfast.streams.wire import EVENTS_STREAM, reply_subject
from tests.handler_support import QUICK, Seen, named, other, settled
from tests.integration.test_events import rows_of
from tests.running import eventually
from tests.support import LIMIT_S, plain_client

if TYPE_CHECKING:
    from holdfast.client.handlers import Handlers
    from holdfast.schemas.rows import EventRow


async def test_B82_B83_B84_a_result_goes_to_the_client_that_asked_and_to_the_originator(
    nats_server: str, namespace: str, hf: Holdfast, handlers: Handlers
) -> None:
    told = Seen()

    @handlers.on("ask", agent="oracle")
    async def answer(event: Event) -> dict[str, Any]:
        await hf.emit("thinking")
        return {"answer": event.data * 2}

    async with (
        other(nats_server, namespace, "asker") as (asker, asking),
        other(nats_server, namespace, "listener") as (_, listening),
    ):

        @asking.on("ask:result", name="mine", for_me=True)
        async def mine(event: Event) -> None:
            told.add(event)

        @listening.on("ask:result", name="not mine", for_me=True)
        async def not_mine(event: Event) -> None:
            told.add(event)

        await handlers.ready()
        await asking.ready()
        await listening.ready()
        results = await asyncio.gather(*(asking.request("ask", number, timeout_s=LIMIT_S) for number in range(10)))
        await told.wait(10)
        await eventually(lambda: listening.counters["not mine"].skipped == 10)
    questions = {row.id: row for row in await named(hf.connection, namespace, "ask")}
    for number, result in enumerate(results):
        assert result.data == {"answer": number * 2}
        assert result.parent_event_id is not None
        question = questions[result.parent_event_id]
        assert question.data == str(number).encode()
        # The agent that answers signs; the client and the originator are those of the question.
        assert (question.agent_id, result.agent_id) == ("asker", "oracle")
        assert (result.originator, result.client_id) == ("asker", question.client_id)
        assert (result.root_event_id, result.event_depth) == (question.root_event_id, 1)
    assert {event.event_id for event in told.events} == {result.event_id for result in results}
    assert len({row.client_id for row in questions.values()}) == 1
    assert asker.agent == "asker"


async def test_a_request_within_a_handler_goes_on_in_its_lineage(hf: Holdfast, handlers: Handlers) -> None:
    @handlers.on("outer")
    async def outer(event: Event) -> Any:
        inner_result = await handlers.request("inner", event.data, timeout_s=LIMIT_S)
        return {"inner": inner_result.data, "depth": inner_result.event_depth}

    @handlers.on("inner")
    async def inner(event: Event) -> Any:
        return event.data + 1

    await handlers.ready()
    result = await handlers.request("outer", 1, timeout_s=LIMIT_S)
    assert result.data == {"inner": 2, "depth": 2}
    assert result.event_depth == 1


async def test_a_request_that_fails_says_in_which_handler_and_why(hf: Holdfast, handlers: Handlers) -> None:
    @handlers.on("ask", name="broken", max_deliver=1)
    async def work(event: Event) -> None:
        raise ValueError("no idea")

    await handlers.ready()
    with pytest.raises(HandlerError, match="no idea") as caught:
        await handlers.request("ask", timeout_s=LIMIT_S)
    assert (caught.value.handler, caught.value.cause, caught.value.code) == ("broken", "ValueError", "handler_failed")


async def test_a_request_without_an_answer_says_what_to_do(hf: Holdfast, handlers: Handlers) -> None:
    with pytest.raises(UnavailableError) as caught:
        await handlers.request("nobody:listens", timeout_s=0.05)
    [row] = await named(hf.connection, hf.namespace, "nobody:listens")
    assert row.id in str(caught.value)
    with pytest.raises(InvalidFieldError):
        await handlers.request("ask", client="mine")


async def test_a_request_whose_client_closes_says_which_event_is_stored(
    hf: Holdfast, nats_server: str, namespace: str
) -> None:
    async with other(nats_server, namespace) as (_, asking):
        request = asyncio.create_task(asking.request("ask", timeout_s=LIMIT_S))
        rows: list[EventRow] = []
        while not rows:
            rows = await named(hf.connection, namespace, "ask")
        await asking.close(0.0)
        with pytest.raises(ClosedError) as caught:
            await request
    assert rows[0].id in caught.value.message


async def test_a_handler_that_waits_for_a_result_gets_it_while_its_client_closes(
    hf: Holdfast, handlers: Handlers, nats_server: str, namespace: str
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    @handlers.on("inner")
    async def inner(event: Event) -> str:
        begun.set()
        await go_on.wait()
        return "waited for"

    await handlers.ready()
    async with other(nats_server, namespace) as (there, theirs):

        @theirs.on("outer", max_deliver=1)
        async def outer(event: Event) -> Any:
            return (await there.request("inner", timeout_s=LIMIT_S)).data

        await theirs.ready()
        await hf.emit("outer")
        await asyncio.wait_for(begun.wait(), LIMIT_S)
        closing = asyncio.create_task(theirs.close(LIMIT_S))
        await asyncio.sleep(0)
        go_on.set()
        await closing
        with pytest.raises(ClosedError, match="nothing was emitted"):
            await theirs.request("inner", timeout_s=LIMIT_S)
    [result] = await named(hf.connection, namespace, "outer:result")
    assert result.data == b'"waited for"'


async def test_what_comes_on_the_reply_subject_is_an_answer_only_to_its_question(
    hf: Holdfast, handlers: Handlers, nats_server: str, namespace: str
) -> None:
    go_on = asyncio.Event()

    @handlers.on("ask")
    async def work(event: Event) -> str:
        assert event.client_id is not None
        subject = reply_subject(namespace, event.client_id)
        async with plain_client(nats_server) as client:
            for payload in (b"", b"{", b"[]", b'{"event_id": "x"}'):
                await client.publish(subject, payload)
            await client.flush()
        # A child's result comes to the same client, and answers another question.
        await hf.emit("other:result", parent=await hf.emit("other"))
        await hf.emit("ask:result", "forged", parent=new_event_id())
        go_on.set()
        return "right"

    await handlers.ready()
    assert (await handlers.request("ask", timeout_s=LIMIT_S)).data == "right"
    assert go_on.is_set()


async def test_a_handler_that_is_cancelled_from_within_has_failed(hf: Holdfast, handlers: Handlers) -> None:
    @handlers.on("a", name="h", max_deliver=2, timeout_s=LIMIT_S, **QUICK)
    async def work(event: Event) -> None:
        inner = asyncio.create_task(asyncio.sleep(60))
        inner.cancel()
        await inner

    await handlers.ready()
    with pytest.raises(HandlerError) as caught:
        await hf.request("a", timeout_s=LIMIT_S)
    assert "cancelled" in caught.value.message
    assert handlers.counters["h"].again == 1


async def test_who_stops_waiting_at_the_start_takes_nothing_from_the_others(hf: Holdfast) -> None:
    @hf.on("a")
    async def work(event: Event) -> str:
        return "done"

    emitting = asyncio.create_task(hf.emit("other"))
    await asyncio.sleep(0)  # it waits for the handler's consumer
    emitting.cancel()
    await asyncio.gather(emitting, return_exceptions=True)
    await asyncio.wait_for(hf.ready(), LIMIT_S)
    assert (await hf.request("a", timeout_s=LIMIT_S)).data == "done"


async def test_results_that_are_no_answers_are_not_kept(hf: Holdfast, handlers: Handlers) -> None:
    told = Seen()

    @handlers.on("part")
    async def part(event: Event) -> dict[str, str]:
        return {"text": "x" * 1_000}

    @handlers.on("part:result", name="seen")
    async def seen(event: Event) -> None:
        told.add(event)

    @handlers.on("whole")
    async def whole(event: Event) -> int:
        for _ in range(20):
            await hf.emit("part")  # the client that asked for the whole is told of each
        await told.wait(20)
        return 20

    await handlers.ready()
    assert (await hf.request("whole", timeout_s=LIMIT_S)).data == 20
    await hf.connection.client.flush()
    told.events.clear()
    gc.collect()
    kept = [found for found in gc.get_objects() if isinstance(found, Event) and found.namespace == hf.namespace]
    assert not [event for event in kept if event.name == "part:result"]


async def test_an_event_that_claims_the_greatest_depth_is_handled_like_others(
    hf: Holdfast, handlers: Handlers, namespace: str
) -> None:
    ref = await hf.put({"n": 1})

    @handlers.on("deep", name="h", **QUICK)
    async def work(event: Event) -> str:
        await hf.resolve(ref)
        return "done"

    await handlers.ready()
    message = json.dumps({"parent_event_id": new_event_id(), "event_depth": 2**31 - 1}).encode()
    await hf.connection.client.jetstream().publish(f"ctx.{namespace}.event.agent.deep", message)
    await eventually(lambda: settled(handlers, "h", 1))
    assert handlers.counters["h"].done == 1
    depths = {row.name: row.event_depth for row in await rows_of(hf.connection, namespace)}
    assert depths == {"deep": 2**31 - 1, "deep:result": 2**31 - 1, RECEIPT: 2**31 - 1}


@pytest.mark.parametrize(
    "failure", [UnavailableError("no answer"), ApiError(ApiFailure(503, 10023, "insufficient resources"), "CONSUMER")]
)
async def test_a_handler_goes_on_when_its_consumer_was_lost_and_did_not_come_back_at_once(
    hf: Holdfast, handlers: Handlers, monkeypatch: pytest.MonkeyPatch, failure: HoldfastError
) -> None:
    """A server that has just begun answers, and does not know its streams yet."""
    seen, failed = Seen(), asyncio.Event()
    opened = DurableConsumer.open

    async def fail_once(consumer: DurableConsumer) -> None:
        if not failed.is_set():
            failed.set()
            raise failure
        await opened(consumer)

    @handlers.on("a", name="h", start="all")
    async def work(event: Event) -> None:
        seen.add(event)

    await handlers.ready()
    monkeypatch.setattr(DurableConsumer, "open", fail_once)
    assert await delete_consumer(hf.connection, EVENTS_STREAM, consumer_name(hf.namespace, "h"))
    await asyncio.wait_for(failed.wait(), LIMIT_S)
    event = await hf.emit("a")
    async with asyncio.timeout(8):  # below the silence after which a pull counts as lost
        assert [found.event_id for found in await seen.wait()] == [event.event_id]


async def test_handlers_of_several_scripts_do_not_take_each_others_events(
    hf: Holdfast, handlers: Handlers, tmp_path: Path
) -> None:
    """A script's module is called __main__, whichever script it is."""
    seen = {"one": Seen(), "two": Seen()}
    for name, found in seen.items():
        script = tmp_path / f"{name}.py"
        script.write_text(f"@handlers.on('{name}')\nasync def work(event):\n    seen.add(event)\n")
        runpy.run_path(str(script), {"handlers": handlers, "seen": found}, "__main__")
    await handlers.ready()
    assert list(handlers.counters) == ["one.work", "two.work"]
    for name, found in seen.items():
        event = await hf.emit(name)
        assert [each.event_id for each in await found.wait()] == [event.event_id]
