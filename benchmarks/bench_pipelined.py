"""Writing as fast as one process can: a thousand puts under way, versions of keys of their own.

Measures ``hf.put`` in mode fast from 1,000 tasks (raw limit: plain publishes over one own inbox, as many in flight);
and the next version of 64 keys by ``hf.keys.put(…, expected_version=…)`` from as many tasks, each with a key of its own
(raw limit: bodies and versions of 64 keys in one atomic batch).  Bodies have 600 bytes.

Does not measure: a cluster, several client processes.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.bench import RAW_HOT_PREFIX, Bench, BenchServer, Figure
from benchmarks.measure import Run, Side, concurrent, load
from benchmarks.payloads import Bodies
from benchmarks.raw_messages import BATCH, ONCE, context_message, singly
from benchmarks.raw_nats import AtomicBatches, Message, OwnInbox
from holdfast.schemas.ids import new_event_id

if TYPE_CHECKING:
    from holdfast.client import Holdfast

BODY_BYTES: Final = 600
IN_FLIGHT: Final = 1_000

FIGURES: Final = ("put_fast_pipelined", "key_update_expected_64")


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    if bench.wants("put_fast_pipelined"):
        async with bench.server("fast") as server, server.connect() as hf, OwnInbox(server.client) as inbox:
            await _pipelined(bench, hf, inbox)
    if bench.wants("key_update_expected_64"):
        async with bench.server() as server, server.connect() as hf:
            await _updates(bench, server, hf)


async def _pipelined(bench: Bench, hf: Holdfast, inbox: OwnInbox) -> None:
    bodies = Bodies(31)

    def make(number: int) -> list[dict[str, Any]]:
        return bodies.take(number, BODY_BYTES)

    def raw(number: int) -> list[Message]:
        return [context_message(body) for body in make(number)]

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
        singly(inbox, raw, IN_FLIGHT),
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
        message = context_message(body)
        written = {"version": 2, "op": "put", "ref": "ctx_context_" + "a" * 32, "event_id": new_event_id()}
        subject = f"{RAW_HOT_PREFIX}keys.update{next(numbers)}"
        return [message, Message(subject, ONCE, msgspec.json.encode(written | {"agent_id": "bench"}))]

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
