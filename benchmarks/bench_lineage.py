"""What the lineage costs: a child emitted within its parent, beside the same event with every member given by hand.

Measures ``hf.emit`` of a child that takes its whole place (parent, root, depth, correlation, session, agent) from the
context variable, one after the other and from 64 tasks, each task within an event of its own.  Beside it, in the same
run: the same event from a dict given with ``lineage=``; the same with every member named (``parent=``, ``session=`` …);
and the raw limit, the very message by ``js.publish`` of nats-py, or in atomic batches of 64.  All store the same bytes
but for the ids.

Does not measure: handlers, receipts, attributes, several processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from benchmarks.bench import NAMESPACE, RAW_EVENTS_PREFIX, Bench, BenchServer, Figure
from benchmarks.measure import Runner, Side, load
from benchmarks.payloads import Bodies
from benchmarks.raw_nats import AtomicBatches, Message
from holdfast.client import lineage
from holdfast.streams.events import NewEvent, encode_event

if TYPE_CHECKING:
    from holdfast.client import Event, Holdfast

DATA_BYTES: Final = 100
TASKS: Final = 64

FIGURES: Final = ("emit_child_sequential", "emit_child_64")


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    if not bench.wants(*FIGURES):
        return
    async with bench.server() as server, server.connect() as hf:
        parent = await hf.emit("plan:made", session="bench-session", correlation="bench-correlation", agent="planner")
        for name, concurrency, least in zip(FIGURES, (1, TASKS), (200, 512), strict=True):
            await _children(bench, server, hf, parent, name, concurrency, least)


async def _children(
    bench: Bench, server: BenchServer, hf: Holdfast, parent: Event, name: str, concurrency: int, least: int
) -> None:
    bodies = Bodies(17)
    explicit = lineage.of(parent)

    def make(number: int) -> list[dict[str, Any]]:
        return bodies.take(number, DATA_BYTES)

    async def implied(data: dict[str, Any]) -> object:
        return await hf.emit("plan:step", data)

    async def given(data: dict[str, Any]) -> object:
        return await hf.emit("plan:step", data, lineage=explicit)

    async def named(data: dict[str, Any]) -> object:
        return await hf.emit(
            "plan:step", data, parent=parent, session="bench-session", correlation="bench-correlation", agent="planner"
        )

    def within(runner: Runner) -> Runner:
        async def measured(count: int) -> Any:
            # Tasks made in the block take the lineage with them.
            with lineage.within(parent):
                return await runner(count)

        return measured

    await bench.figure(
        Figure(
            name=name,
            what="hf.emit of a child, its place taken from the context variable",
            kind="latency" if concurrency == 1 else "rate",
            durability=server.durability,
            parameters={"payload_bytes": DATA_BYTES, "concurrency": concurrency},
            least=least,
        ),
        Side("", within(load(make, implied, concurrency))),
        _raw(server, parent, make, concurrency),
        Side("hf.emit with a dict as lineage=", load(make, given, concurrency), "explicit"),
        Side("hf.emit with every member named", load(make, named, concurrency), "named"),
    )


def _raw(server: BenchServer, parent: Event, make: Any, concurrency: int) -> Side:
    def messages(number: int) -> list[Message]:
        return [_message(parent, data) for data in make(number)]

    if concurrency == 1:
        publish = server.client.jetstream().publish

        async def call(message: Message) -> object:
            return await publish(message.subject, message.payload, headers=message.headers)

        return Side("js.publish of the same message", load(messages, call))

    def batches(number: int) -> list[list[Message]]:
        return [messages(concurrency) for _ in range(number)]

    return Side(
        f"atomic batches of {concurrency}, 1 in flight",
        load(batches, AtomicBatches(server.client).publish, 1, weight=concurrency),
    )


def _message(parent: Event, data: dict[str, Any]) -> Message:
    event = NewEvent(
        namespace=NAMESPACE,
        agent_id="planner",
        name="plan:step",
        data=data,
        session_id=parent.session_id,
        correlation_id=parent.correlation_id,
        parent_event_id=parent.event_id,
        root_event_id=parent.root_event_id,
        event_depth=1,
    )
    outgoing = encode_event(event)
    return Message(f"{RAW_EVENTS_PREFIX}planner.plan.step", dict(outgoing.headers), outgoing.payload)
