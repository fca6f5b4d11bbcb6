"""Handlers on a real server: handed each event, run under its lineage, settled by what came of it."""

from __future__ import annotations

import asyncio
import gc
import json
import runpy
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from holdfast.client import Event, Holdfast, connect, handler_intake, handler_runner, lineage
from holdfast.client.handler_control import receipt_mark
from holdfast.client.handler_policy import HandlerOptions, consumer_name, consumer_options
from holdfast.client.receipt_records import Record
from holdfast.schemas.errors import (
    HandlerError,
    HoldfastError,
    InvalidFieldError,
    InvalidNameError,
    UnavailableError,
)
from holdfast.schemas.ids import new_event_id
from holdfast.schemas.limits import LINEAGE_DEPTH
from holdfast.schemas.lineage import RECEIPT
from holdfast.streams.connection import ApiError, ApiFailure
from holdfast.streams.consumer import ConsumerOptions, Delivery, DurableConsumer, delete_consumer
from holdfast.streams.dead import DeadLetter, read_dead_letters
from holdfast.streams.decode import decode_event
from holdfast.streams.wire import EVENTS_STREAM, event_filter, reply_subject
from tests.integration.test_events import rows_of
from tests.running import eventually
from tests.support import LIMIT_S, plain_client

if TYPE_CHECKING:
    from holdfast.client.handlers import Handlers
    from holdfast.schemas.rows import EventRow
    from holdfast.streams.connection import Connection

QUICK: dict[str, Any] = {"backoff_s": (0.01,), "ack_wait_s": 1.0}


@pytest_asyncio.fixture
async def handlers(hf: Holdfast) -> AsyncIterator[Handlers]:
    yield hf.handlers
    await hf.handlers.close(0.0)


class Seen:
    """What handlers were handed, waited for by its number."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._more = asyncio.Event()

    def add(self, event: Event) -> int:
        self.events.append(event)
        self._more.set()
        return len(self.events)

    async def wait(self, count: int = 1) -> list[Event]:
        async with asyncio.timeout(LIMIT_S):
            while len(self.events) < count:
                self._more.clear()
                await self._more.wait()
        return self.events


@asynccontextmanager
async def other(url: str, namespace: str, agent: str = "other") -> AsyncGenerator[tuple[Holdfast, Handlers]]:
    """Another client, as in another process, with its handlers."""
    async with connect(url, namespace, agent) as hf:
        try:
            yield hf, hf.handlers
        finally:
            await hf.handlers.close(0.0)


async def letters_of(hf: Holdfast) -> list[DeadLetter]:
    prefix = f"ctx.{hf.namespace}."
    return [letter async for _, letter in read_dead_letters(hf.connection) if letter.subject.startswith(prefix)]


async def named(connection: Connection, namespace: str, name: str) -> list[EventRow]:
    return [row for row in await rows_of(connection, namespace) if row.name == name]


def settled(handlers: Handlers, name: str, count: int) -> bool:
    counters = handlers.counters[name]
    return counters.done + counters.dead >= count


# What a handler is handed


async def test_B03_B75_a_handler_has_its_context_by_both_paths_and_they_agree(hf: Holdfast, handlers: Handlers) -> None:
    seen: list[tuple[Event, dict[str, Any], dict[str, Any] | None]] = []
    children: dict[str, Event] = {}
    done = asyncio.Event()

    @handlers.on("plan:*", agent="worker")
    async def work(event: Event, context: dict[str, Any]) -> None:
        seen.append((event, dict(context), lineage.current()))
        children["implicit"] = await hf.emit("child")
        children["explicit"] = await hf.emit("child", lineage=context)
        # Each path goes on when the other one is gone.
        with lineage.within(None):
            children["explicit alone"] = await hf.emit("child", lineage=context)
        context.clear()
        children["implicit alone"] = await hf.emit("child")
        done.set()

    await handlers.ready()
    root = await hf.emit("plan", session="s1", correlation="c1", client="web", originator="chief")
    made = await hf.emit("plan:made", {"n": 1}, lineage={**root.lineage, "mood": "calm"})
    await asyncio.wait_for(done.wait(), LIMIT_S)

    [(event, context, current)] = seen
    assert (event.event_id, event.data, event.attributes) == (made.event_id, {"n": 1}, {"mood": "calm"})
    assert context == current == {**event.lineage, "agent_id": "worker"}
    assert (context["event_id"], context["session_id"], context["mood"]) == (made.event_id, "s1", "calm")
    assert len(children) == 4
    for path, child in children.items():
        assert child.parent_event_id == made.event_id, path
        assert (child.root_event_id, child.event_depth) == (root.event_id, 2), path
        assert (child.session_id, child.correlation_id) == ("s1", "c1"), path
        assert (child.agent_id, child.client_id, child.originator) == ("worker", "web", "chief"), path
        assert child.attributes == {"mood": "calm"}, path


async def test_B71_the_log_keeps_the_context_for_a_handler_that_comes_later(
    hf: Holdfast, nats_server: str, namespace: str
) -> None:
    context = {"correlation_id": "c1", "session_id": "s1", "originator": "chief", "priority": 3}
    async with connect(nats_server, namespace, "sender") as sender:
        sent = await sender.emit("job:new", {"n": 1}, lineage=context)
    # The sender is gone, and nothing but its message is left of it.
    handed: asyncio.Future[tuple[Event, dict[str, Any]]] = asyncio.get_running_loop().create_future()
    async with other(nats_server, namespace, "late") as (_, handlers):

        @handlers.on("job:*", start="all")
        async def work(event: Event, context: dict[str, Any]) -> None:
            handed.set_result((event, context))

        event, received = await asyncio.wait_for(handed, LIMIT_S)
    assert event.event_id == sent.event_id
    assert received == {**sent.lineage, "agent_id": "late"}
    assert received.items() >= context.items()


async def test_B65_B66_a_coordinator_changes_the_context_of_the_agents_it_spawns(
    hf: Holdfast, handlers: Handlers, nats_server: str, namespace: str
) -> None:
    results = Seen()

    @handlers.on("task:split", agent="coordinator")
    async def coordinate(event: Event, context: dict[str, Any]) -> None:
        for number, agent in enumerate(("left", "right")):
            with lineage.spawn(agent):
                await hf.emit("part:do", {"part": number})
        await hf.emit("part:do", {"part": 2}, lineage={**context, "budget": 5, "originator": "coordinator"})

    @handlers.on("part:do")
    async def part(event: Event) -> int:
        return int(event.data["part"])

    @handlers.on("part:do:result", name="collect", agent="coordinator", for_me=True)
    async def collect(event: Event) -> None:
        results.add(event)

    await handlers.ready()
    task = await hf.emit("task:split")
    await results.wait(3)
    parts = await named(hf.connection, namespace, "part:do")
    by_agent = {row.agent_id: row for row in parts}
    assert set(by_agent) == {"left", "right", "coordinator"}
    for row in parts:
        assert (row.parent_event_id, row.root_event_id, row.event_depth) == (task.event_id, task.event_id, 1)
        assert row.originator == "coordinator"
    # What each of them came to is told to the one who spawned them, under the part it belongs to.
    assert {result.data: result.parent_event_id for result in results.events} == {
        number: by_agent[agent].id for number, agent in enumerate(("left", "right", "coordinator"))
    }
    assert [result.attributes for result in results.events if result.data == 2] == [{"budget": 5}]


async def test_a_client_does_not_miss_what_it_emits_right_after_registering(hf: Holdfast) -> None:
    seen = Seen()

    @hf.on("a:*")
    async def work(event: Event) -> int:
        return seen.add(event)

    event = await hf.emit("a:b")
    assert (await seen.wait())[0].event_id == event.event_id
    assert (await hf.request("a:c", timeout_s=LIMIT_S)).data == 2
    # What was decorated is what it was.
    assert await work(event) == 3


async def test_a_synchronous_handler_runs_in_a_thread_under_its_lineage(hf: Holdfast, handlers: Handlers) -> None:
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    emitted: list[Event] = []

    @handlers.on("a")
    def work(event: Event) -> None:
        assert threading.current_thread() is not threading.main_thread()
        emitted.append(asyncio.run_coroutine_threadsafe(hf.emit("b"), loop).result(LIMIT_S))
        loop.call_soon_threadsafe(done.set)

    await handlers.ready()
    event = await hf.emit("a")
    await asyncio.wait_for(done.wait(), LIMIT_S)
    assert emitted[0].parent_event_id == event.event_id


async def test_an_inline_context_of_a_plain_client_resolves_in_the_handler(
    hf: Holdfast, handlers: Handlers, nats_server: str, namespace: str
) -> None:
    bodies: list[Any] = []
    seen = Seen()

    @handlers.on("raw:*")
    async def work(event: Event) -> None:
        assert event.context_ref is not None
        bodies.append((await hf.resolve(event.context_ref)).body)
        seen.add(event)

    await handlers.ready()
    async with plain_client(nats_server) as client:
        stream = client.jetstream()
        # What is no event holds up nothing.
        await stream.publish(f"ctx.{namespace}.event.agent.raw.x", b"{no event")
        await stream.publish(f"ctx.{namespace}.event.agent.raw.x", b'{"context": {"a": 1}, "data": 5}')
    [event] = await seen.wait()
    assert (bodies, event.data, event.agent_id) == ([{"a": 1}], 5, "agent")


async def test_patterns_choose_and_results_come_only_to_who_asks_for_them(hf: Holdfast, handlers: Handlers) -> None:
    seen = {pattern: Seen() for pattern in ("*", "a:*", "*:b", "a:b", "a:b:result", "a:*:result")}

    def keep(pattern: str) -> None:
        @handlers.on(pattern, name=f"on {pattern}")
        async def work(event: Event) -> str | None:
            seen[pattern].add(event)
            return "done" if pattern == "a:b" else None

    for pattern in seen:
        keep(pattern)
    await handlers.ready()
    for name in ("a:b", "a:c", "x:b", "a", "b"):
        await hf.emit(name)
    await seen["a:*:result"].wait()
    last = await hf.emit("z")
    await eventually(lambda: any(event.event_id == last.event_id for event in seen["*"].events))
    names = {pattern: sorted(event.name for event in found.events) for pattern, found in seen.items()}
    assert names == {
        "*": ["a", "a:b", "a:c", "b", "x:b", "z"],
        "a:*": ["a:b", "a:c"],
        "*:b": ["a:b", "x:b"],
        "a:b": ["a:b"],
        "a:b:result": ["a:b:result"],
        "a:*:result": ["a:b:result"],
    }


async def test_what_a_handler_read_and_made_is_on_its_receipt(hf: Holdfast, handlers: Handlers, namespace: str) -> None:
    given = await hf.put({"question": 1})
    made: list[str] = []

    @handlers.on("ask", name="answering", agent="oracle")
    async def work(event: Event) -> None:
        assert event.context_ref is not None
        await hf.resolve(event.context_ref)
        made.append(await hf.put({"answer": 42}))

    @handlers.on("ask", name="untracked", track=False)
    async def look(event: Event) -> None:
        await hf.resolve(given)

    await handlers.ready()
    event = await hf.emit("ask", context=given, session="s1")
    await eventually(lambda: settled(handlers, "answering", 1) and settled(handlers, "untracked", 1))
    [receipt] = await named(hf.connection, namespace, RECEIPT)
    assert (receipt.parent_event_id, receipt.root_event_id, receipt.event_depth) == (event.event_id, event.event_id, 1)
    assert (receipt.agent_id, receipt.session_id) == ("oracle", "s1")
    told = receipt.data or b""
    assert b'"handler":"answering"' in told
    assert given.encode() in told
    assert made[0].encode() in told


async def test_what_is_read_by_the_explicit_path_is_on_the_receipt_too(
    hf: Holdfast, handlers: Handlers, namespace: str
) -> None:
    refs = [await hf.put({"n": n}) for n in range(4)]

    @handlers.on("ask", name="reader")
    async def work(event: Event, context: dict[str, Any]) -> None:
        await hf.resolve(refs[0], lineage={**context, "budget": 3})
        await hf.resolve_many(refs[1:3], lineage=context, track=True)
        with lineage.within({**context, "agent_id": "reviewer"}):  # the same event, by hand
            await hf.resolve(refs[3])

    await handlers.ready()
    event = await hf.emit("ask")
    await eventually(lambda: settled(handlers, "reader", 1))
    [receipt] = await named(hf.connection, namespace, RECEIPT)
    assert receipt.parent_event_id == event.event_id
    assert [item["ref"] for item in json.loads(receipt.data or b"")["read"]] == refs


async def test_an_idempotent_handler_of_receipts_is_not_handed_its_own_without_end(
    hf: Holdfast, handlers: Handlers, namespace: str
) -> None:
    seen = Seen()

    @handlers.on(RECEIPT, name="audit", idempotent=True)
    async def audit(event: Event) -> None:
        seen.add(event)

    await handlers.ready()
    ref = await hf.put({"n": 1})
    async with hf.working_on(await hf.emit("a")):
        await hf.resolve(ref)
    await seen.wait()
    # Its own receipts, if it wrote any, come before what is emitted now.
    async with hf.working_on(await hf.emit("b")):
        await hf.resolve(ref)
    await seen.wait(2)
    await eventually(lambda: settled(handlers, "audit", 2))
    assert len(await named(hf.connection, namespace, RECEIPT)) == 2


async def test_what_is_known_to_be_done_is_passed_over_even_if_the_server_says_it_is_new(
    hf: Holdfast, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is killed forgets the last acknowledgements, and that it had delivered the event at all."""
    monkeypatch.setattr(handler_intake, "_REOPEN_S", 0.01)
    monkeypatch.setattr(handler_runner, "is_surely_new", lambda *_, **__: True)
    seen = Seen()

    @handlers.on("a", name="h", idempotent=True, start="all")
    async def work(event: Event) -> None:
        seen.add(event)

    await handlers.ready()
    await hf.emit("a")
    await eventually(lambda: settled(handlers, "h", 1))
    assert await delete_consumer(hf.connection, EVENTS_STREAM, consumer_name(hf.namespace, "h"))
    await eventually(lambda: handlers.counters["h"].skipped == 1 or len(seen.events) > 1)
    assert len(seen.events) == 1


async def test_receipts_that_are_stored_together_are_each_stored_once_whatever_is_there_already(
    hf: Holdfast, handlers: Handlers, namespace: str
) -> None:
    seen, go_on = Seen(), asyncio.Event()

    @handlers.on("a", name="h", idempotent=True, concurrency=64)
    async def work(event: Event) -> None:
        seen.add(event)
        await go_on.wait()

    await handlers.ready()
    events = await asyncio.gather(*(hf.emit("a", number) for number in range(60)))
    await seen.wait(60)
    # Two of them were done elsewhere meanwhile: no group that has one of these can be stored as it is.
    for event in (events[5], events[40]):
        mark = receipt_mark(namespace, "h", event.event_id)
        await hf.receipts.write(event.lineage, Record(), handler="h", receipt_id=mark)
    go_on.set()
    await eventually(lambda: settled(handlers, "h", 60))
    receipts = await named(hf.connection, namespace, RECEIPT)
    assert sorted(row.parent_event_id or "" for row in receipts) == sorted(event.event_id for event in events)
    assert (handlers.counters["h"].done, handlers.counters["h"].again) == (60, 0)


async def test_synchronous_handlers_run_as_many_at_once_as_is_said(hf: Holdfast, handlers: Handlers) -> None:
    together = threading.Barrier(12)

    @handlers.on("a", name="h", concurrency=12)
    def work(event: Event) -> None:
        together.wait(LIMIT_S)

    await handlers.ready()
    await asyncio.gather(*(hf.emit("a") for _ in range(12)))
    await eventually(lambda: settled(handlers, "h", 12))
    assert handlers.counters["h"].done == 12


async def test_a_handler_answers_an_event_of_a_long_chain(hf: Holdfast, handlers: Handlers) -> None:
    @handlers.on("turn", **QUICK)
    async def work(event: Event) -> str:
        return "heard"

    await handlers.ready()
    last = await hf.emit("begin")
    for _ in range(LINEAGE_DEPTH):
        last = await hf.emit("said", parent=last)
    answer = await hf.request("turn", parent=last, timeout_s=LIMIT_S)
    assert (answer.data, answer.event_depth, answer.root_event_id) == ("heard", LINEAGE_DEPTH + 2, last.root_event_id)


# Failures


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


# Sharing the work


async def test_processes_of_one_name_share_the_events_and_each_name_has_them_all(
    nats_server: str, namespace: str, hf: Holdfast
) -> None:
    shares: list[list[str]] = [[], [], []]
    alone: list[str] = []
    total = Seen()

    def keep(handlers: Handlers, name: str, share: list[str]) -> None:
        @handlers.on("a:*", name=name, concurrency=2)
        async def work(event: Event) -> None:
            share.append(event.event_id)
            total.add(event)
            await asyncio.sleep(0)

    async with AsyncExitStack() as stack:
        for share in shares:
            _, handlers = await stack.enter_async_context(other(nats_server, namespace))
            keep(handlers, "shared", share)
            await handlers.ready()
        keep(hf.handlers, "alone", alone)
        sent = [(await hf.emit(f"a:{number}")).event_id for number in range(60)]
        await total.wait(120)
    assert sorted(shares[0] + shares[1] + shares[2]) == sorted(sent) == sorted(alone)
    assert sum(map(bool, shares)) >= 2


async def test_a_handler_that_comes_back_goes_on_where_it_was(nats_server: str, namespace: str, hf: Holdfast) -> None:
    seen = Seen()

    async def work(event: Event) -> None:
        seen.add(event)

    before = await hf.emit("a", 0)
    async with other(nats_server, namespace) as (_, handlers):
        handlers.on("a", name="h")(work)
        await handlers.ready()
        await hf.emit("a", 1)
        await seen.wait(1)
        await eventually(lambda: handlers.counters["h"].done == 1)
    await hf.emit("a", 2)
    async with other(nats_server, namespace) as (_, handlers):
        # Where it begins counts only the first time.
        handlers.on("a", name="h", start="all")(work)
        await handlers.ready()
        await hf.emit("a", 3)
        await seen.wait(3)
    assert [event.data for event in seen.events] == [1, 2, 3]
    assert before.event_id not in [event.event_id for event in seen.events]


async def test_what_a_closing_client_has_in_hand_goes_to_another_at_once(
    nats_server: str, namespace: str, hf: Holdfast
) -> None:
    begun, seen = Seen(), Seen()
    options: dict[str, Any] = {"name": "h", "concurrency": 2, "ack_wait_s": 3_600.0}
    async with other(nats_server, namespace) as (_, first):

        @first.on("a", **options)
        async def stuck(event: Event) -> None:
            begun.add(event)
            await asyncio.Event().wait()

        await first.ready()
        for number in range(5):
            await hf.emit("a", number)
        await begun.wait(2)
        async with other(nats_server, namespace) as (_, second):

            @second.on("a", **options)
            async def work(event: Event) -> None:
                seen.add(event)

            await second.ready()
            await first.close(0.0)
            await seen.wait(5)
    assert sorted(event.data for event in seen.events) == [0, 1, 2, 3, 4]
    assert len(begun.events) == 2


async def test_what_waits_when_a_client_closes_is_handed_back_once(
    nats_server: str, namespace: str, hf: Holdfast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time uses up an attempt: the process that closes is not to be handed it once more."""
    begun, name = Seen(), consumer_name(namespace, "h")
    hand_back = DurableConsumer.nak

    async def hand_back_and_look(consumer: DurableConsumer, delivery: Delivery, delay_s: float) -> None:
        await hand_back(consumer, delivery, delay_s)
        await consumer.floor()  # whatever the server does about it at once has arrived

    monkeypatch.setattr(DurableConsumer, "nak", hand_back_and_look)
    declared = consumer_options(namespace, HandlerOptions(pattern="a", name="h", agent="test"))
    async with other(nats_server, namespace) as (_, handlers):

        @handlers.on("a", name="h", concurrency=1)
        async def hang(event: Event) -> None:
            if begun.add(event) > 1:
                await asyncio.Event().wait()

        await handlers.ready()
        await hf.emit("a", 0)
        await eventually(lambda: handlers.counters["h"].done == 1)
        for number in range(1, 4):
            await hf.emit("a", number)
        await begun.wait(2)
        await handlers.close(0.0)
    consumer = DurableConsumer(hf.connection, EVENTS_STREAM, name, declared)
    await consumer.open()
    left: dict[int, int] = {}
    async with asyncio.timeout(LIMIT_S):
        while len(left) < 3:
            left |= {delivery.message.seq: delivery.attempt for delivery in await consumer.fetch()}
    await consumer.close()
    assert set(left.values()) == {2}


async def test_what_was_asked_for_and_not_taken_goes_back_at_once(hf: Holdfast, nats_server: str) -> None:
    subject = event_filter(hf.namespace, "*")
    options = ConsumerOptions(filter_subjects=(subject,), ack_wait_s=3_600.0, batch=5)
    name = f"test-{hf.namespace}"
    first = DurableConsumer(hf.connection, EVENTS_STREAM, name, options)
    await first.open()
    sent = [(await hf.emit("a", 0)).event_id]
    taken = [decode_event(delivery.message).row.id for delivery in await first.fetch()]
    # Four more were asked for with it; they arrive here, and one of them is taken.
    sent += [(await hf.emit("a", number)).event_id for number in range(1, 5)]
    taken += [decode_event(delivery.message).row.id for delivery in await first.fetch(1)]
    await first.close()
    async with connect(nats_server, hf.namespace) as client:
        second = DurableConsumer(client.connection, EVENTS_STREAM, name, options)
        await second.open()
        async with asyncio.timeout(LIMIT_S):
            left: list[str] = []
            while len(left) < 3:
                left += [decode_event(delivery.message).row.id for delivery in await second.fetch()]
        await second.close()
        assert await delete_consumer(client.connection, EVENTS_STREAM, name)
    # What goes back may be delivered again in any order.
    assert (len(taken), sorted(taken + left)) == (2, sorted(sent))


async def test_closing_waits_for_what_is_running(nats_server: str, namespace: str, hf: Holdfast) -> None:
    begun, go_on = Seen(), asyncio.Event()
    async with other(nats_server, namespace) as (_, handlers):

        @handlers.on("a", name="h")
        async def work(event: Event) -> None:
            begun.add(event)
            await go_on.wait()

        await handlers.ready()
        await hf.emit("a")
        await begun.wait()
        closing = asyncio.create_task(handlers.close(LIMIT_S))
        await hf.emit("a")
        go_on.set()
        await asyncio.wait_for(closing, LIMIT_S)
        assert (handlers.counters["h"].done, len(begun.events)) == (1, 1)


async def test_a_long_handler_keeps_its_event_and_those_that_wait_behind_it(
    hf: Holdfast, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, go_on = Seen(), asyncio.Event()
    renew, failures = DurableConsumer.in_progress, [RuntimeError("as nobody expects")]

    async def fail_once(consumer: DurableConsumer, delivery: Delivery) -> None:
        if failures:
            raise failures.pop()
        await renew(consumer, delivery)

    monkeypatch.setattr(DurableConsumer, "in_progress", fail_once)

    @handlers.on("slow", name="slow", ack_wait_s=0.3, concurrency=1)
    async def work(event: Event) -> None:
        # The first is done at once, so that others are taken ahead.
        if runs.add(event) > 1:
            await go_on.wait()

    @handlers.on("tick", name="tick", ack_wait_s=0.3, backoff_s=(0.3,), max_deliver=5)
    async def tick(event: Event) -> None:
        # Four of the other's ack waits go by.
        raise UnavailableError("again")

    await handlers.ready()
    await hf.emit("slow", 0)
    await eventually(lambda: handlers.counters["slow"].done == 1)
    for number in range(1, 4):
        await hf.emit("slow", number)
    await hf.emit("tick")
    await runs.wait(2)
    await eventually(lambda: handlers.counters["tick"].dead == 1)
    assert len(runs.events) == 2
    go_on.set()
    await eventually(lambda: handlers.counters["slow"].done == 4)
    assert sorted(event.data for event in runs.events) == [0, 1, 2, 3]


async def test_what_waits_behind_a_handler_that_hangs_goes_to_another_process(
    hf: Holdfast, handlers: Handlers, nats_server: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler_intake, "LONGEST_WAIT_S", 0.05)
    monkeypatch.setattr(handler_intake, "HANDED_BACK_S", 0.0)
    here, there = Seen(), Seen()

    @handlers.on("a", name="h", concurrency=1)
    async def hang(event: Event) -> None:
        if here.add(event) > 1:
            await asyncio.Event().wait()

    await handlers.ready()
    await hf.emit("a", 0)
    await eventually(lambda: handlers.counters["h"].done == 1)
    for number in range(1, 4):
        await hf.emit("a", number)
    await here.wait(2)
    async with other(nats_server, namespace) as (_, others):
        others.on("a", name="h")(there.add)
        await there.wait(2)
    assert len({event.data for event in here.events + there.events}) == 4


async def test_events_that_are_passed_over_do_not_make_a_slow_handler_take_others_ahead(
    hf: Holdfast, handlers: Handlers, nats_server: str, namespace: str
) -> None:
    options: dict[str, Any] = {"name": "h", "concurrency": 1, "agent": "mine", "for_me": True}
    here, there = Seen(), Seen()

    @handlers.on("a", **options)
    async def hang(event: Event) -> None:
        here.add(event)
        await asyncio.Event().wait()

    await handlers.ready()
    for number in range(5):
        await hf.emit("a", number, originator="somebody else")
    await eventually(lambda: handlers.counters["h"].skipped == 5)
    for number in range(3):
        await hf.emit("a", number, originator="mine")
    await here.wait()
    async with other(nats_server, namespace) as (_, others):
        others.on("a", **options)(there.add)
        await there.wait(2)
    assert sorted(event.data for event in here.events + there.events) == [0, 1, 2]


async def test_beside_what_was_handed_out_often_nothing_is_taken_ahead(
    hf: Holdfast, handlers: Handlers, nats_server: str, namespace: str
) -> None:
    """It may be what its process dies of, and would take attempts from events that were never begun."""
    here, there = Seen(), Seen()
    declared = consumer_options(namespace, HandlerOptions(pattern="a", name="h", agent="test"))
    consumer = DurableConsumer(hf.connection, EVENTS_STREAM, consumer_name(namespace, "h"), declared)
    await consumer.open()
    for number in range(4):
        await hf.emit("a", number)
    for _ in range(2):  # as if two processes had died with all of them in hand
        taken: list[Delivery] = []
        while len(taken) < 4:
            taken += await consumer.fetch(4 - len(taken))
        for delivery in taken:
            await consumer.nak(delivery, 0.0)
    await consumer.close()

    @handlers.on("a", name="h", concurrency=1)
    async def hang(event: Event) -> None:
        if here.add(event) > 1:
            await asyncio.Event().wait()

    await here.wait(2)
    async with other(nats_server, namespace) as (_, others):
        others.on("a", name="h")(there.add)
        await there.wait(2)
    assert sorted(event.data for event in here.events + there.events) == [0, 1, 2, 3]


async def test_what_a_consumer_without_memory_delivers_once_more_is_let_go_of_as_often(
    hf: Holdfast, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler_intake, "_REOPEN_S", 0.01)
    seen, go_on = Seen(), asyncio.Event()

    @handlers.on("a", name="h", concurrency=2, start="all")
    async def work(event: Event) -> None:
        seen.add(event)
        await go_on.wait()

    await handlers.ready()
    await hf.emit("a", 1)
    await seen.wait()
    # The one that is made anew begins as this one did, down to the subject on which the event is acknowledged.
    assert await delete_consumer(hf.connection, EVENTS_STREAM, consumer_name(hf.namespace, "h"))
    await seen.wait(2)
    monkeypatch.setattr(handler_intake, "HELD_BYTES", 1)  # with nothing in hand there is room
    go_on.set()
    await hf.emit("a", 2)
    assert [event.data for event in await seen.wait(3)] == [1, 1, 2]


async def test_one_event_at_a_time_is_handled_wholly_before_the_next(hf: Holdfast, handlers: Handlers) -> None:
    for number in range(6):
        await hf.emit("a", number)
    done: list[int] = []

    @handlers.on("a", name="h", concurrency=1, start="all")
    async def work(event: Event) -> Any:
        done.append(handlers.counters["h"].done)
        return event.data

    await eventually(lambda: settled(handlers, "h", 6))
    assert done == [0, 1, 2, 3, 4, 5]


async def test_an_event_begins_without_what_the_one_before_left_behind(hf: Holdfast, handlers: Handlers) -> None:
    tenant: ContextVar[int | None] = ContextVar("tenant", default=None)
    for number in range(30):
        await hf.emit("a", number)
    found: list[int | None] = []

    @handlers.on("a", name="h", concurrency=2, start="all")
    async def work(event: Event) -> None:
        found.append(tenant.get())
        tenant.set(event.data)

    await eventually(lambda: settled(handlers, "h", 30))
    assert found == [None] * 30


async def test_no_more_events_are_at_work_than_are_allowed(hf: Holdfast, handlers: Handlers) -> None:
    at_work, most, seen = 0, 0, Seen()

    @handlers.on("a", concurrency=3)
    async def work(event: Event) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(0.001)
        at_work -= 1
        seen.add(event)

    await handlers.ready()
    await asyncio.gather(*(hf.emit("a", number) for number in range(40)))
    await seen.wait(40)
    assert most == 3
    assert sorted(event.data for event in seen.events) == list(range(40))


async def test_a_name_stands_for_one_handler(hf: Holdfast, handlers: Handlers) -> None:
    @handlers.on("a", name="h")
    async def work(event: Event) -> None: ...

    with pytest.raises(InvalidNameError, match="registered already"):
        handlers.on("b", name="h")(work)
    with pytest.raises(InvalidFieldError):
        handlers.on("a", max_deliver=0)(work)
    with pytest.raises(InvalidNameError):
        handlers.on("a*")(work)
    assert handlers.pending
    await handlers.ready()
    assert not handlers.pending
    with pytest.raises(InvalidNameError, match="runs in this client"):
        await handlers.forget("h")


async def test_a_forgotten_handler_begins_anew(nats_server: str, namespace: str, hf: Holdfast) -> None:
    seen = Seen()

    async def work(event: Event) -> None:
        seen.add(event)

    async with other(nats_server, namespace) as (_, handlers):
        handlers.on("a", name="h")(work)
        await handlers.ready()
    await hf.emit("a", 1)
    async with other(nats_server, namespace) as (_, handlers):
        assert await handlers.forget("h")
        assert not await handlers.forget("h")
        handlers.on("a", name="h")(work)
        await handlers.ready()
        await hf.emit("a", 2)
        await seen.wait()
    assert [event.data for event in seen.events] == [2]


async def test_a_handler_can_change_its_pattern(nats_server: str, namespace: str, hf: Holdfast) -> None:
    seen = Seen()

    async def work(event: Event) -> None:
        seen.add(event)

    for pattern in ("a", "b:*", "*"):
        async with other(nats_server, namespace) as (_, handlers):
            handlers.on(pattern, name="h")(work)
            await handlers.ready()
            await hf.emit(pattern.replace("*", "x"), pattern)
            await eventually(lambda: handlers.counters["h"].done == 1)
    assert [event.data for event in seen.events] == ["a", "b:*", "*"]


# Requests


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
