"""Handlers of one name in several processes: who has which event, and what waits where."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.client import Event, Holdfast, connect, handler_intake
from holdfast.client.handler_policy import HandlerOptions, consumer_name, consumer_options
from holdfast.schemas.errors import (
    InvalidFieldError,
    InvalidNameError,
    UnavailableError,
)
from holdfast.streams.consumer import ConsumerOptions, Delivery, DurableConsumer, delete_consumer
from holdfast.streams.decode import decode_event
from holdfast.streams.wire import EVENTS_STREAM, event_filter
from tests.handler_support import Seen, other, settled
from tests.running import eventually
from tests.support import LIMIT_S

if TYPE_CHECKING:
    from holdfast.client.handlers import Handlers


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
        await hang_with_the_second_of_four(hf, handlers, begun)
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
    await hang_with_the_second_of_four(hf, handlers, here)
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


async def hang_with_the_second_of_four(hf: Holdfast, handlers: Handlers, begun: Seen) -> None:
    """Registers a handler ``h``, which does one event; returns when it hangs with the next, two others behind that."""

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
