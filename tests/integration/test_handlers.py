"""Handlers on a real server: what a handler is handed, and what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING, Any

from holdfast.client import Event, Holdfast, connect, handler_intake, handler_runner, lineage
from holdfast.client.handler_control import receipt_mark
from holdfast.client.handler_policy import consumer_name
from holdfast.client.receipt_records import Record
from holdfast.schemas.limits import LINEAGE_DEPTH
from holdfast.schemas.lineage import RECEIPT
from holdfast.streams.consumer import delete_consumer
from holdfast.streams.wire import EVENTS_STREAM
from tests.handler_support import QUICK, Seen, named, other, settled
from tests.running import eventually
from tests.support import LIMIT_S, plain_client

if TYPE_CHECKING:
    import pytest

    from holdfast.client.handlers import Handlers


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
