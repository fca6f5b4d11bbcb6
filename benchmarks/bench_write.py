"""Writing to the hot tier and the event log: ``put``, ``put_many`` and ``emit`` of the SDK.

Measures, in mode durable and in mode fast: the latency of one writer after the other, and the rate of many at once in
one process.  Bodies are JSON of 600 bytes, all different; events carry 100 bytes of data.  The raw limit stores the
same bytes under the same conditions (a context only where there is none, an event only once) in a stream of the same
configuration, prepared beforehand: by ``js.publish`` of nats-py one at a time; where many are written at once, by plain
nats-py in several shapes, as many messages under way as there are writers, of which the fastest counts: atomic batches
of 64, one batch of all, publishes one by one.

Does not measure: a cluster (one server, one replica), bodies over 1 KiB (which are compressed), repeated bodies (which
are not stored again), several client processes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from benchmarks.bench import Bench, BenchServer, Figure
from benchmarks.measure import Kind, Side, load
from benchmarks.payloads import Bodies
from benchmarks.raw_messages import at_once, context_message, event_message, in_batches
from benchmarks.raw_nats import Message, OwnInbox

if TYPE_CHECKING:
    from holdfast.client import Holdfast
    from holdfast.streams.connection_target import Durability

BODY_BYTES: Final = 600
DATA_BYTES: Final = 100
PRODUCERS: Final = (64, 256)
MANY: Final = (100, 500)

MODES: Final[tuple[Durability, ...]] = ("durable", "fast")

_NAMES: Final = (
    "put_sequential",
    *(f"put_{number}_producers" for number in PRODUCERS),
    *(f"put_many_{number}" for number in MANY),
    "emit_sequential",
    *(f"emit_{number}_producers" for number in PRODUCERS),
)
FIGURES: Final = tuple(f"{name}{suffix}" for suffix in ("", "_fast") for name in _NAMES)


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    for durability in MODES:
        suffix = "" if durability == "durable" else "_fast"
        if bench.wants(*(f"{name}{suffix}" for name in _NAMES)):
            async with (
                bench.server(durability) as server,
                server.connect() as hf,
                OwnInbox(server.client) as inbox,
            ):
                await _contexts(bench, server, hf, inbox, suffix)
                await _events(bench, server, hf, inbox, suffix)


async def _contexts(bench: Bench, server: BenchServer, hf: Holdfast, inbox: OwnInbox, suffix: str) -> None:
    bodies = Bodies()

    def make(number: int) -> list[dict[str, Any]]:
        return bodies.take(number, BODY_BYTES)

    def raw(number: int) -> list[Message]:
        return [context_message(body) for body in make(number)]

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
            *at_once(server.client, inbox, raw, producers),
        )
    for size in MANY:

        def groups(number: int, size: int = size) -> list[list[dict[str, Any]]]:
            return [make(size) for _ in range(number)]

        await bench.figure(
            figure(f"put_many_{size}", "hf.put_many, one call after the other", "rate", 1, 3 * size, in_a_call=size),
            Side("", load(groups, hf.put_many, weight=size)),
            in_batches(server.client, raw, size),
        )


async def _events(bench: Bench, server: BenchServer, hf: Holdfast, inbox: OwnInbox, suffix: str) -> None:
    bodies = Bodies(2)

    def make(number: int) -> list[dict[str, Any]]:
        return bodies.take(number, DATA_BYTES)

    def raw(number: int) -> list[Message]:
        return [event_message(data) for data in make(number)]

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
    for producers in PRODUCERS:
        await bench.figure(
            Figure(
                name=f"emit_{producers}_producers{suffix}",
                what="hf.emit from many tasks",
                kind="rate",
                durability=server.durability,
                parameters={"payload_bytes": DATA_BYTES, "concurrency": producers},
                least=4 * producers,
            ),
            Side("", load(make, emit, producers)),
            *at_once(server.client, inbox, raw, producers),
        )


def _publisher(server: BenchServer) -> Callable[[Message], Awaitable[object]]:
    publish = server.client.jetstream().publish

    async def call(message: Message) -> object:
        return await publish(message.subject, message.payload, headers=message.headers)

    return call
