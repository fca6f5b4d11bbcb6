"""Writing as fast as one process can: a thousand puts under way, events of 256 tasks, versions of keys of their own.

Measures ``hf.put`` in mode fast from 1,000 tasks (raw limit: plain publishes over one own inbox, as many in flight);
``hf.emit`` in mode durable from 256 tasks (raw limit: atomic batches of 64, four in flight); and the next version of
64 keys by ``hf.keys.put(…, expected_version=…)`` from as many tasks, each with a key of its own (raw limit: bodies and
versions of 64 keys in one atomic batch).  Bodies have 600 bytes, events 100 bytes of data.

Does not measure: a cluster, several client processes.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.bench import NAMESPACE, RAW_EVENTS_PREFIX, RAW_HOT_PREFIX, Bench, BenchServer, Figure
from benchmarks.measure import Run, Side, concurrent, load
from benchmarks.payloads import Bodies, encoded
from benchmarks.raw_nats import AtomicBatches, Message, OwnInbox
from holdfast.schemas.ids import new_event_id
from holdfast.streams.codec import seal
from holdfast.streams.events import NewEvent, encode_event

if TYPE_CHECKING:
    from holdfast.client import Holdfast

BODY_BYTES: Final = 600
DATA_BYTES: Final = 100
IN_FLIGHT: Final = 1_000
BATCH: Final = 64
PRODUCERS: Final = 256

FIGURES: Final = ("put_fast_pipelined", "emit_256_producers", "key_update_expected_64")

_ONCE: Final = {"Nats-Expected-Last-Subject-Sequence": "0"}


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    if bench.wants("put_fast_pipelined"):
        async with bench.server("fast") as server, server.connect() as hf, OwnInbox(server.client) as inbox:
            await _pipelined(bench, hf, inbox)
    if bench.wants("emit_256_producers", "key_update_expected_64"):
        async with bench.server() as server, server.connect() as hf:
            await _events(bench, server, hf)
            await _updates(bench, server, hf)


async def _pipelined(bench: Bench, hf: Holdfast, inbox: OwnInbox) -> None:
    bodies = Bodies(31)

    def make(number: int) -> list[dict[str, Any]]:
        return bodies.take(number, BODY_BYTES)

    def raw(number: int) -> list[Message]:
        return [_context_message(body) for body in make(number)]

    async def publish(message: Message) -> None:
        ack = await inbox.request(message.subject, message.payload, message.headers)
        if b'"error"' in ack.data:
            raise RuntimeError(ack.data.decode())

    await bench.figure(
        Figure(
            name="put_fast_pipelined",
            what="hf.put from 1,000 tasks",
            kind="rate",
            durability="fast",
            parameters={"payload_bytes": BODY_BYTES, "concurrency": IN_FLIGHT},
            least=2 * IN_FLIGHT,
        ),
        Side("", load(make, hf.put, IN_FLIGHT)),
        Side("plain publishes over one own inbox, 1,000 in flight", load(raw, publish, IN_FLIGHT)),
    )


async def _events(bench: Bench, server: BenchServer, hf: Holdfast) -> None:
    bodies = Bodies(32)
    batches = AtomicBatches(server.client)

    def make(number: int) -> list[dict[str, Any]]:
        return bodies.take(number, DATA_BYTES)

    async def emit(data: dict[str, Any]) -> object:
        return await hf.emit("agent:status", data, session="bench-session", correlation="bench-correlation")

    def groups(number: int) -> list[list[Message]]:
        return [[_event_message(data) for data in make(BATCH)] for _ in range(number)]

    await bench.figure(
        Figure(
            name="emit_256_producers",
            what="hf.emit from 256 tasks",
            kind="rate",
            durability="durable",
            parameters={"payload_bytes": DATA_BYTES, "concurrency": PRODUCERS},
            least=4 * PRODUCERS,
        ),
        Side("", load(make, emit, PRODUCERS)),
        Side(
            f"atomic batches of {BATCH}, {PRODUCERS // BATCH} in flight",
            load(groups, batches.publish, PRODUCERS // BATCH, weight=BATCH),
        ),
    )


async def _updates(bench: Bench, server: BenchServer, hf: Holdfast) -> None:
    bodies = Bodies(33)
    numbers = count()
    batches = AtomicBatches(server.client)
    known = {f"bench.update.{number}": 0 for number in range(BATCH)}
    free = list(known)

    def make(number: int) -> list[dict[str, Any]]:
        return bodies.take(number, BODY_BYTES)

    async def update(body: dict[str, Any]) -> None:
        key = free.pop()
        known[key] = (await hf.keys.put(key, body, expected_version=known[key])).version
        free.append(key)

    def version(body: dict[str, Any]) -> list[Message]:
        message = _context_message(body)
        written = {"version": 2, "op": "put", "ref": "ctx_context_" + "a" * 32, "event_id": new_event_id()}
        subject = f"{RAW_HOT_PREFIX}keys.update{next(numbers)}"
        return [message, Message(subject, _ONCE, msgspec.json.encode(written | {"agent_id": "bench"}))]

    async def in_batches(number: int) -> Run:
        bodies_of_batches = [make(BATCH) for _ in range(-(-number // BATCH))]
        groups = [[message for body in batch for message in version(body)] for batch in bodies_of_batches]
        return await concurrent(groups, batches.publish, 1, weight=BATCH)

    await bench.figure(
        Figure(
            name="key_update_expected_64",
            what="hf.keys.put of the next version, expecting the one before, from 64 tasks on keys of their own",
            kind="rate",
            durability="durable",
            parameters={"payload_bytes": BODY_BYTES, "concurrency": BATCH},
            least=512,
        ),
        Side("", load(make, update, BATCH)),
        Side("bodies and versions of 64 keys in one atomic batch, 1 in flight", in_batches),
    )


def _context_message(body: dict[str, Any]) -> Message:
    form = seal(NAMESPACE, "context", encoded(body))[-1]
    return Message(f"{RAW_HOT_PREFIX}{NAMESPACE}.{form.digest}", {**form.headers, **_ONCE}, form.payload)


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
    return Message(f"{RAW_EVENTS_PREFIX}bench.agent.status", dict(outgoing.headers), outgoing.payload)
