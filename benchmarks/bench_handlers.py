"""Handlers: how many events a process handles in a second, and how soon after its emission one is handled.

``handler_delivery``: events that are in the log already (100 bytes of data) handed to one handler that does nothing, in
this process, from opening the client to the last one handled; each is acknowledged.  Raw limit: plain nats-py pulling
the same messages and acknowledging each, decoding nothing.  ``handler_delivery_child``: the handler emits a child of
each; ``_receipt``: it also resolves a context, which is near, and its receipt is written; ``_idempotent``: it does
nothing, and a receipt marks each event as done.  Raw limit of these: the same pull, and so many messages of the size
stored in atomic batches before the acknowledgements.

``handler_latency``: 1,000 events a second emitted evenly by one client, handled by another of this process; from the
call of ``hf.emit`` to the first line of the handler, so the durable write is in it.  Raw limit: the same messages by
``js.publish``, handed out by a push consumer without acknowledgements.  ``_100``: 100 a second.  ``_idempotent``: with
a receipt that marks each event.  ``handler_request``: ``hf.request`` to a handler that returns at once, one after the
other: the question and its result are stored durably.  Raw limit: two ``js.publish`` one after the other.

Does not measure: handlers that take time, several processes on one handler, redelivery.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from itertools import count
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from benchmarks.bench import NAMESPACE, RAW_EVENTS, RAW_EVENTS_PREFIX, Bench, BenchServer, Figure
from benchmarks.measure import Run, Side, load, timed
from benchmarks.payloads import Bodies
from benchmarks.raw_nats import AtomicBatches, Message, api
from holdfast.streams.events import NewEvent, encode_event
from holdfast.streams.wire import EVENTS_STREAM

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from holdfast.client import Holdfast

DATA_BYTES: Final = 100
EVENTS: Final = 10_000
RATE_PER_S: Final = 1_000
SECONDS: Final = 2
PULL: Final = 500
CONCURRENCY: Final = 256
_TIMEOUT_S: Final = 60.0

_DELIVERIES: Final = tuple(f"handler_delivery{suffix}" for suffix in ("", "_child", "_receipt", "_idempotent"))
_LATENCIES: Final = ("handler_latency", "handler_latency_100", "handler_latency_idempotent")
FIGURES: Final = (*_DELIVERIES, *_LATENCIES, "handler_request")


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    if not bench.wants(*FIGURES):
        return
    async with bench.server() as server:
        for work in _WORKS:
            if bench.wants(work.figure):
                await _delivery(bench, server, work)
        for figure, rate, is_idempotent in zip(
            _LATENCIES, (RATE_PER_S, 100, RATE_PER_S), (False, False, True), strict=True
        ):
            if bench.wants(figure):
                await _latency(bench, server, figure, rate, is_idempotent=is_idempotent)
        if bench.wants("handler_request"):
            await _request(bench, server)


class _Work(NamedTuple):
    """What the handler of a figure does with each event; ``stored``: how many messages that stores."""

    figure: str
    what: str
    stored: int = 0
    emits: bool = False
    tracks: bool = False
    is_idempotent: bool = False


_WORKS: Final = (
    _Work("handler_delivery", "does nothing"),
    _Work("handler_delivery_child", "emits a child", 1, emits=True),
    _Work(
        "handler_delivery_receipt", "resolves a context and emits a child, with a receipt", 2, emits=True, tracks=True
    ),
    _Work("handler_delivery_idempotent", "does nothing, idempotent", 1, is_idempotent=True),
)


async def _delivery(bench: Bench, server: BenchServer, work: _Work) -> None:
    bodies = Bodies(41)
    runs = count()
    stored: list[str] = []

    def register(hf: Holdfast, name: str, handle: Callable[[Any], Awaitable[None]]) -> None:
        options: dict[str, Any] = {"track": work.tracks, "idempotent": work.is_idempotent}
        hf.on(name, name=f"{work.figure} {name[:-5]}", concurrency=CONCURRENCY, **options)(handle)

    async def store(number: int) -> str:
        """Events of a name of their own, in the log before the clock starts; both sides handle the same ones."""
        name = f"{work.figure.replace('_', '-')}{next(runs)}:tick"

        async def nothing(_: Any) -> None: ...

        async with server.connect() as hf:
            # The handler stands before they come: an idempotent one else asks of each whether it was done.
            register(hf, name, nothing)
            await hf.ready()
        async with server.connect() as hf:
            events = [_event(name, data) for data in bodies.take(number, DATA_BYTES)]
            for start in range(0, number, 1_000):
                await hf.publish_many(events[start : start + 1_000])
        return name

    async def ours(number: int) -> Run:
        name = await store(number)
        stored.append(name)
        done = asyncio.Event()
        handled = 0

        async def handle_all() -> None:
            async with server.connect() as hf, asyncio.timeout(_TIMEOUT_S):
                ref = await hf.put({"text": "x" * DATA_BYTES})

                async def handle(event: Any) -> None:
                    nonlocal handled
                    if work.tracks:
                        await hf.resolve(ref)
                    if work.emits:
                        await hf.emit("made", event.data)
                    handled += 1
                    if handled == number:
                        done.set()

                register(hf, name, handle)
                await done.wait()

        return await timed(number, handle_all)

    async def raw(number: int) -> Run:
        name = stored[-1]
        subject = f"ctx.{NAMESPACE}.event.bench.{name.replace(':', '.')}"
        return await timed(number, lambda: _pull_and_acknowledge(server, subject, number, work.stored))

    await bench.figure(
        Figure(
            name=work.figure,
            what=f"events in the log handed to a handler that {work.what}, each acknowledged",
            kind="rate",
            unit="events/s",
            durability="durable",
            parameters={"payload_bytes": DATA_BYTES, "concurrency": CONCURRENCY},
            count=bench.scale(EVENTS, 200),
        ),
        Side("", ours),
        Side(
            "plain nats-py pull, each message acknowledged"
            + (f", {work.stored} stored for each in atomic batches of up to {PULL}" if work.stored else ""),
            raw,
        ),
    )


async def _latency(bench: Bench, server: BenchServer, figure: str, rate_per_s: int, *, is_idempotent: bool) -> None:
    bodies = Bodies(42)
    number = bench.scale(rate_per_s * SECONDS, 20)
    began: dict[int, float] = {}
    latencies: list[float] = []
    all_there = asyncio.Event()
    name = f"paced-{figure.replace('_', '-')}:tick"

    def arrived(step: int) -> None:
        latencies.append(time.perf_counter() - began[step])
        if len(latencies) == len(began) == number:
            all_there.set()

    def reset() -> None:
        began.clear()
        latencies.clear()
        all_there.clear()

    async with server.connect() as emitter, server.connect() as listener:

        @listener.on(name, name=figure, concurrency=CONCURRENCY, idempotent=is_idempotent)
        async def tick(event: Any) -> None:
            arrived(event.data["step"])

        await listener.ready()

        async def emit(data: dict[str, Any]) -> None:
            await emitter.emit(name, data)

        async def ours(_: int) -> Run:
            reset()
            return await _paced(bodies.take(number, DATA_BYTES), emit, rate_per_s, began, latencies, all_there)

        jetstream = server.client.jetstream()

        async def publish(data: dict[str, Any]) -> None:
            outgoing = encode_event(_event(name, data))
            headers = {**outgoing.headers, "Step": str(data["step"])}
            await jetstream.publish(f"{RAW_EVENTS_PREFIX}{figure}", outgoing.payload, headers=headers)

        async def receive(message: Msg) -> None:
            arrived(int((message.headers or {})["Step"]))

        async def raw(_: int) -> Run:
            reset()
            inbox = server.client.new_inbox()
            subscription = await server.client.subscribe(inbox, cb=receive)
            config = {"name": figure, "deliver_subject": inbox, "ack_policy": "none", "deliver_policy": "new"}
            create = {"stream_name": RAW_EVENTS, "config": {**config, "mem_storage": True, "num_replicas": 1}}
            await api(server.client, f"CONSUMER.CREATE.{RAW_EVENTS}.{figure}", create)
            try:
                return await _paced(bodies.take(number, DATA_BYTES), publish, rate_per_s, began, latencies, all_there)
            finally:
                await subscription.unsubscribe()
                await api(server.client, f"CONSUMER.DELETE.{RAW_EVENTS}.{figure}")

        await bench.figure(
            Figure(
                name=figure,
                what=f"from hf.emit to the handler, {rate_per_s:,} events a second, evenly",
                kind="latency",
                durability="durable",
                parameters={"payload_bytes": DATA_BYTES, "concurrency": 1, "events_per_s": rate_per_s},
                count=number,
            ),
            Side("with idempotent=True" if is_idempotent else "", ours),
            Side("js.publish to a push consumer without acknowledgements", raw),
        )


async def _request(bench: Bench, server: BenchServer) -> None:
    bodies = Bodies(43)
    jetstream = server.client.jetstream()

    def make(number: int) -> list[dict[str, Any]]:
        return bodies.take(number, DATA_BYTES)

    async with server.connect() as asking, server.connect() as answering:

        @answering.on("ask", name="answering")
        async def answer(event: Any) -> Any:
            return event.data

        await answering.ready()

        async def ask(data: dict[str, Any]) -> None:
            await asking.request("ask", data)

        async def publish_twice(data: dict[str, Any]) -> None:
            for name in ("ask", "ask:result"):
                outgoing = encode_event(_event(name, data))
                await jetstream.publish(f"{RAW_EVENTS_PREFIX}ask", outgoing.payload, headers=outgoing.headers)

        await bench.figure(
            Figure(
                name="handler_request",
                what="hf.request, one after the other",
                kind="latency",
                durability="durable",
                parameters={"payload_bytes": DATA_BYTES, "concurrency": 1},
                least=100,
                most=3_000,
            ),
            Side("", load(make, ask)),
            Side("two js.publish, one after the other", load(make, publish_twice)),
        )


async def _paced(
    items: list[dict[str, Any]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
    rate_per_s: int,
    began: dict[int, float],
    latencies: list[float],
    all_there: asyncio.Event,
) -> Run:
    """Sends at a fixed rate whether or not earlier ones are through: a stall shows in everything it held up."""
    start = time.perf_counter()
    async with asyncio.timeout(_TIMEOUT_S), asyncio.TaskGroup() as group:
        for number, item in enumerate(items):
            wait_s = start + number / rate_per_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            began[item["step"]] = time.perf_counter()
            group.create_task(_sent(send, item))
        await all_there.wait()
    return Run(len(items), time.perf_counter() - start, list(latencies))


async def _sent(send: Callable[[dict[str, Any]], Awaitable[None]], item: dict[str, Any]) -> None:
    await send(item)


async def _pull_and_acknowledge(server: BenchServer, subject: str, number: int, stored: int) -> None:
    """Pulls and acknowledges; ``stored`` messages of the size are stored for each before that, a pull's together."""
    client = server.client
    name = f"bench{client.new_inbox().rpartition('.')[2]}"
    config = {
        "name": name,
        "ack_policy": "explicit",
        "deliver_policy": "all",
        "filter_subject": subject,
        "max_ack_pending": 4 * PULL,
        "mem_storage": True,
        "num_replicas": 1,
    }
    create = {"stream_name": EVENTS_STREAM, "config": config}
    await api(client, f"CONSUMER.CREATE.{EVENTS_STREAM}.{name}.{subject}", create)
    inbox = client.new_inbox()
    done = asyncio.Event()
    batches = AtomicBatches(client)
    waiting: list[Msg] = []
    got = 0

    async def receive(message: Msg) -> None:
        nonlocal got
        if not message.reply:
            return  # what says that the pull is at its end
        got += 1
        if stored:
            waiting.append(message)
            if got % PULL and got != number:
                return
            children = [
                Message(f"{RAW_EVENTS_PREFIX}child", {"Nats-Msg-Id": f"{name}.{got}.{place}"}, message.data)
                for place, message in enumerate(waiting * stored)
            ]
            for start in range(0, len(children), PULL):
                await batches.publish(children[start : start + PULL])
            for message in waiting:
                await client.publish(message.reply, b"+ACK")
            waiting.clear()
        else:
            await client.publish(message.reply, b"+ACK")
        if got == number:
            done.set()
        elif got % PULL == 0:
            await ask()

    async def ask() -> None:
        request = b'{"batch":%d,"expires":30000000000}' % PULL
        await client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{EVENTS_STREAM}.{name}", request, reply=inbox)

    subscription = await client.subscribe(inbox, cb=receive)
    try:
        await ask()
        await ask()  # one ahead, so that the server never waits
        async with asyncio.timeout(_TIMEOUT_S):
            await done.wait()
    finally:
        await subscription.unsubscribe()
        await api(client, f"CONSUMER.DELETE.{EVENTS_STREAM}.{name}")


def _event(name: str, data: dict[str, Any]) -> NewEvent:
    return NewEvent(namespace=NAMESPACE, agent_id="bench", name=name, data=data)
