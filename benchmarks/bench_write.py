"""Writing to the hot tier and the event log: ``put``, ``put_many`` and ``emit`` of the SDK.

Measures, in mode durable and in mode fast: the latency of one writer after the other, and the rate of many at once in
one process.  Bodies are JSON of 600 bytes, all different; events carry 100 bytes of data.  The raw limit stores the
same bytes under the same conditions (a context only where there is none, an event only once) in a stream of the same
configuration, prepared beforehand: by ``js.publish`` of nats-py one at a time, by atomic batches of plain nats-py where
many are written at once, as many in flight as there are writers.

Does not measure: a cluster (one server, one replica), bodies over 1 KiB (which are compressed), repeated bodies (which
are not stored again), several client processes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from benchmarks.bench import NAMESPACE, RAW_EVENTS_PREFIX, RAW_HOT_PREFIX, Bench, BenchServer, Figure
from benchmarks.measure import Kind, Side, load
from benchmarks.payloads import Bodies, encoded
from benchmarks.raw_nats import AtomicBatches, Message
from holdfast.streams.codec import seal
from holdfast.streams.events import NewEvent, encode_event

if TYPE_CHECKING:
    from holdfast.client import Holdfast
    from holdfast.streams.connection_target import Durability

BODY_BYTES: Final = 600
DATA_BYTES: Final = 100
BATCH: Final = 64
PRODUCERS: Final = (64, 256)
MANY: Final = (100, 500)

MODES: Final[tuple[Durability, ...]] = ("durable", "fast")

_NAMES: Final = (
    "put_sequential",
    *(f"put_{number}_producers" for number in PRODUCERS),
    *(f"put_many_{number}" for number in MANY),
    "emit_sequential",
    "emit_64_producers",
)
FIGURES: Final = tuple(f"{name}{suffix}" for suffix in ("", "_fast") for name in _NAMES)


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    for durability in MODES:
        suffix = "" if durability == "durable" else "_fast"
        if bench.wants(*(f"{name}{suffix}" for name in _NAMES)):
            async with bench.server(durability) as server, server.connect() as hf:
                await _contexts(bench, server, hf, suffix)
                await _events(bench, server, hf, suffix)


async def _contexts(bench: Bench, server: BenchServer, hf: Holdfast, suffix: str) -> None:
    bodies = Bodies()
    batches = AtomicBatches(server.client)

    def make(number: int) -> list[dict[str, Any]]:
        return bodies.take(number, BODY_BYTES)

    def raw(number: int) -> list[Message]:
        return [_context_message(body) for body in make(number)]

    def figure(name: str, what: str, kind: Kind, concurrency: int, least: int, **parameters: int) -> Figure:
        return Figure(
            name=f"{name}{suffix}",
            what=what,
            kind=kind,
            durability=server.durability,
            parameters={"payload_bytes": BODY_BYTES, "concurrency": concurrency, **parameters},
            least=least,
        )

    await bench.figure(
        figure("put_sequential", "hf.put, one after the other", "latency", 1, 200),
        Side("", load(make, hf.put)),
        Side("js.publish, expecting no message on the subject", load(raw, _publisher(server))),
    )
    for producers in PRODUCERS:
        await bench.figure(
            figure(f"put_{producers}_producers", "hf.put from many tasks", "rate", producers, 4 * producers),
            Side("", load(make, hf.put, producers)),
            _raw_batches(batches, raw, BATCH, producers // BATCH),
        )
    for size in MANY:

        def groups(number: int, size: int = size) -> list[list[dict[str, Any]]]:
            return [make(size) for _ in range(number)]

        await bench.figure(
            figure(f"put_many_{size}", "hf.put_many, one call after the other", "rate", 1, 3 * size, in_a_call=size),
            Side("", load(groups, hf.put_many, weight=size)),
            _raw_batches(batches, raw, size, 1),
        )


async def _events(bench: Bench, server: BenchServer, hf: Holdfast, suffix: str) -> None:
    bodies = Bodies(2)

    def make(number: int) -> list[dict[str, Any]]:
        return bodies.take(number, DATA_BYTES)

    def raw(number: int) -> list[Message]:
        return [_event_message(data) for data in make(number)]

    async def emit(data: dict[str, Any]) -> object:
        return await hf.emit("agent:status", data, session="bench-session", correlation="bench-correlation")

    await bench.figure(
        Figure(
            name=f"emit_sequential{suffix}",
            what="hf.emit, one after the other",
            kind="latency",
            durability=server.durability,
            parameters={"payload_bytes": DATA_BYTES, "concurrency": 1},
            least=200,
        ),
        Side("", load(make, emit)),
        Side("js.publish with a message id", load(raw, _publisher(server))),
    )
    await bench.figure(
        Figure(
            name=f"emit_64_producers{suffix}",
            what="hf.emit from many tasks",
            kind="rate",
            durability=server.durability,
            parameters={"payload_bytes": DATA_BYTES, "concurrency": 64},
            least=256,
        ),
        Side("", load(make, emit, 64)),
        _raw_batches(AtomicBatches(server.client), raw, BATCH, 1),
    )


def _publisher(server: BenchServer) -> Callable[[Message], Awaitable[object]]:
    publish = server.client.jetstream().publish

    async def call(message: Message) -> object:
        return await publish(message.subject, message.payload, headers=message.headers)

    return call


def _raw_batches(batches: AtomicBatches, make: Callable[[int], list[Message]], size: int, in_flight: int) -> Side:
    def groups(number: int) -> list[list[Message]]:
        return [make(size) for _ in range(number)]

    return Side(
        f"atomic batches of {size}, {in_flight} in flight", load(groups, batches.publish, in_flight, weight=size)
    )


def _context_message(body: dict[str, Any]) -> Message:
    form = seal(NAMESPACE, "context", encoded(body))[-1]
    headers = {**form.headers, "Nats-Expected-Last-Subject-Sequence": "0"}
    return Message(f"{RAW_HOT_PREFIX}{NAMESPACE}.{form.digest}", headers, form.payload)


def _event_message(data: dict[str, Any]) -> Message:
    event = NewEvent(
        namespace=NAMESPACE,
        agent_id="bench",
        name="agent:status",
        data=data,
        session_id="bench-session",
        correlation_id="bench-correlation",
    )
    outgoing = encode_event(event)
    return Message(f"{RAW_EVENTS_PREFIX}bench.agent.status", outgoing.headers, outgoing.payload)
