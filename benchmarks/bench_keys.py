"""Named contexts: writing versions, many writers of one key, reading the newest version of a small and a grown body.

Measures ``hf.keys.put`` one after the other, from 64 tasks on new keys, and from 64 tasks on 512 keys in turn, each a
further version of its key; ``hf.keys.patch`` by 32 tasks on
one key (each patch is a version of its own); ``hf.keys.get`` of a 600 byte body, and of a conversation of 300 turns
that was stored after every turn: by a reader without caches, and by one that has the turn before.  Raw limits, by plain
nats-py on streams of the same settings: the two messages of a version (body, then the version expecting what it
follows) by ``js.publish``; the same in atomic batches; compare-and-set of one small message by one writer, each after
the last acknowledgement (what writers of one key can reach that do not batch); and two direct gets one after the other,
the second of one message with the whole body compressed: two round trips, whatever is in between.

Does not measure: several processes on one key, cold versions, encryption, watching.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.bench import NAMESPACE, RAW_HOT, RAW_HOT_PREFIX, Bench, BenchServer, Figure
from benchmarks.measure import Run, Side, concurrent, load
from benchmarks.payloads import Bodies, encoded
from benchmarks.raw_nats import AtomicBatches, Message, OwnInbox
from holdfast.schemas.ids import new_event_id
from holdfast.streams.codec import seal

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from holdfast.client import Holdfast

BODY_BYTES: Final = 600
TURNS: Final = 300
TURN_BYTES: Final = 700
WRITERS: Final = 32
UPDATED_KEYS: Final = 512
"""More than are under way at once, so that no two changes meet on one key."""
PATCH_BYTES: Final = 12
"""A patch of one member, roughly."""

FIGURES: Final = (
    "key_put_sequential",
    "key_put_64",
    "key_update_64",
    "key_patch_one_32",
    "key_get_small",
    "key_get_grown",
    "key_get_next_turn",
)

_RAW_KEYS_PREFIX: Final = f"{RAW_HOT_PREFIX}keys."


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    if not bench.wants(*FIGURES):
        return
    async with bench.server() as server, server.connect() as hf:
        await _writing(bench, server, hf)
        await _updating(bench, server, hf)
        await _one_key(bench, server, hf)
        await _reading(bench, server, hf)


async def _writing(bench: Bench, server: BenchServer, hf: Holdfast) -> None:
    bodies = Bodies(11)
    numbers = count()
    batches = AtomicBatches(server.client)
    jetstream = server.client.jetstream()

    def make(number: int) -> list[dict[str, Any]]:
        return bodies.take(number, BODY_BYTES)

    async def put(body: dict[str, Any]) -> object:
        return await hf.keys.put(f"bench.{next(numbers)}", body)

    def raw(number: int) -> list[list[Message]]:
        return [_version_messages(body, f"raw{next(numbers)}") for body in make(number)]

    async def publish(messages: list[Message]) -> None:
        for message in messages:
            await jetstream.publish(message.subject, message.payload, headers=message.headers)

    def raw_batches(number: int) -> list[list[Message]]:
        versions = raw(number)
        return [
            [message for version in versions[start : start + 64] for message in version]
            for start in range(0, len(versions), 64)
        ]

    async def stored_in_batches(number: int) -> Run:
        # As many versions as are asked for, in batches of 64, and not as many batches.
        return await concurrent(raw_batches(number), batches.publish, 1, weight=64)

    parameters: dict[str, Any] = {"payload_bytes": BODY_BYTES}
    await bench.figure(
        Figure(
            name="key_put_sequential",
            what="hf.keys.put of a new key, one after the other",
            kind="latency",
            durability="durable",
            parameters={**parameters, "concurrency": 1},
            least=200,
        ),
        Side("", load(make, put)),
        Side("js.publish of the body, then of the version", load(raw, publish)),
    )
    await bench.figure(
        Figure(
            name="key_put_64",
            what="hf.keys.put of new keys from 64 tasks",
            kind="rate",
            durability="durable",
            parameters={**parameters, "concurrency": 64},
            least=512,
        ),
        Side("", load(make, put, 64)),
        Side(
            "bodies and versions of 64 keys in one atomic batch, 1 in flight",
            stored_in_batches,
        ),
    )


async def _updating(bench: Bench, server: BenchServer, hf: Holdfast) -> None:
    bodies = Bodies(13)
    numbers = count()
    batches = AtomicBatches(server.client)

    def make(number: int) -> list[dict[str, Any]]:
        return bodies.take(number, BODY_BYTES)

    async def update(body: dict[str, Any]) -> object:
        return await hf.keys.put(f"update.{next(numbers) % UPDATED_KEYS}", body)

    def raw(number: int) -> list[list[Message]]:
        # The raw stream keeps one message a subject: new subjects, expecting none there, cost the same.
        versions = [_version_messages(body, f"update{next(numbers)}") for body in make(number)]
        return [
            [message for version in versions[start : start + 64] for message in version]
            for start in range(0, len(versions), 64)
        ]

    async def publish_one_after_the_other(messages: list[Message]) -> None:
        await batches.publish(messages[::2])
        await batches.publish(messages[1::2])

    async def stored_in_batches(number: int) -> Run:
        return await concurrent(raw(number), batches.publish, 1, weight=64)

    async def stored_one_after_the_other(number: int) -> Run:
        return await concurrent(raw(number), publish_one_after_the_other, 1, weight=64)

    await bench.figure(
        Figure(
            name="key_update_64",
            what="hf.keys.put of further versions of 512 keys in turn, from 64 tasks",
            kind="rate",
            durability="durable",
            parameters={"payload_bytes": BODY_BYTES, "concurrency": 64, "keys": UPDATED_KEYS},
            least=1_024,
        ),
        Side("", load(make, update, 64)),
        Side("bodies and versions of 64 keys in one atomic batch, 1 in flight", stored_in_batches),
        Side("the bodies of 64 keys in one atomic batch, then their versions", stored_one_after_the_other, "two"),
    )


async def _one_key(bench: Bench, server: BenchServer, hf: Holdfast) -> None:
    key = "bench.one"
    numbers = count()
    jetstream = server.client.jetstream()
    subject = f"{RAW_HOT_PREFIX}swap"

    def make(number: int) -> list[int]:
        return [next(numbers) % 100 for _ in range(number)]

    async def patch(field: int) -> object:
        return await hf.keys.patch(key, {f"f{field}": next(numbers)})

    async def swap(_: int) -> None:
        # The raw stream keeps one message a subject: a new one each time, expecting none there, costs the same.
        once = {"Nats-Expected-Last-Subject-Sequence": "0"}
        await jetstream.publish(f"{subject}.{next(numbers)}", b"x" * 200, headers=once)

    await bench.figure(
        Figure(
            name="key_patch_one_32",
            what="hf.keys.patch of one key of 100 members, from 32 tasks of one process; every patch is a version",
            kind="rate",
            durability="durable",
            parameters={"payload_bytes": PATCH_BYTES, "concurrency": WRITERS, "members": 100},
            least=320,
        ),
        Side("", load(make, patch, WRITERS)),
        Side("js.publish of 200 bytes, each after the last acknowledgement", load(make, swap)),
    )


async def _reading(bench: Bench, server: BenchServer, hf: Holdfast) -> None:
    bodies = Bodies(12)
    stored = bench.scale(1_000, 50)
    for number, body in enumerate(bodies.take(stored, BODY_BYTES)):
        await hf.keys.put(f"small.{number}", body)
    turns = bodies.take(bench.scale(TURNS, 30), TURN_BYTES)
    for turn in turns:
        await hf.keys.append("grown", turn)
    whole = msgspec.json.encode(turns, order="sorted")
    jetstream = server.client.jetstream()
    head = Message(f"{RAW_HOT_PREFIX}head", {"Nats-Expected-Last-Subject-Sequence": "0"}, b"x" * 250)
    frame = Message(f"{RAW_HOT_PREFIX}grown", {"Nats-Expected-Last-Subject-Sequence": "0"}, zstd.compress(whole, 3))
    small = Message(f"{RAW_HOT_PREFIX}small", {"Nats-Expected-Last-Subject-Sequence": "0"}, b"x" * BODY_BYTES)
    for message in (head, frame, small):
        await jetstream.publish(message.subject, message.payload, headers=message.headers)
    get = f"$JS.API.DIRECT.GET.{RAW_HOT}"
    async with server.connect(cache_bytes=0) as reader, OwnInbox(server.client) as inbox:

        async def read_small(number: int) -> object:
            return await reader.keys.get(f"small.{number % stored}")

        async def read_grown(_: int) -> object:
            return (await reader.keys.get("grown")).raw

        async def two_gets(second: str, _: int) -> object:
            await inbox.request(f"{get}.{head.subject}")
            return await inbox.request(f"{get}.{second}")

        async def two_gets_inflated(_: int) -> object:
            await inbox.request(f"{get}.{head.subject}")
            return zstd.decompress((await inbox.request(f"{get}.{frame.subject}")).data)

        await bench.figure(
            Figure(
                name="key_get_small",
                what="hf.keys.get by a reader without caches, one after the other",
                kind="latency",
                durability="durable",
                parameters={"payload_bytes": BODY_BYTES, "concurrency": 1},
                least=200,
            ),
            Side("", load(_range, read_small)),
            Side("two direct gets one after the other", load(_range, partial(two_gets, small.subject))),
        )
        await bench.figure(
            Figure(
                name="key_get_grown",
                what="hf.keys.get of a conversation stored after every turn, by a reader without caches",
                kind="latency",
                durability="durable",
                parameters={"payload_bytes": len(whole), "turns": len(turns), "concurrency": 1},
                least=100,
            ),
            Side("", load(_range, read_grown)),
            Side(
                "two direct gets one after the other, the second of the whole body, inflated",
                load(_range, two_gets_inflated),
            ),
        )
    await _following(bench, server, hf, turns)


async def _following(bench: Bench, server: BenchServer, hf: Holdfast, turns: list[dict[str, Any]]) -> None:
    """A reader that has the conversation up to the turn before."""
    more = Bodies(13)
    async with server.connect() as reader, OwnInbox(server.client) as inbox:
        await reader.keys.get("grown")
        get = f"$JS.API.DIRECT.GET.{RAW_HOT}"

        async def ours(number: int) -> Run:
            latencies: list[float] = []
            for turn in more.take(number, TURN_BYTES):
                await hf.keys.append("grown", turn)
                began = time.perf_counter()
                _ = (await reader.keys.get("grown")).raw
                latencies.append(time.perf_counter() - began)
            return Run(number, sum(latencies), latencies)

        async def two_gets(_: int) -> object:
            await inbox.request(f"{get}.{RAW_HOT_PREFIX}head")
            return zstd.decompress((await inbox.request(f"{get}.{RAW_HOT_PREFIX}grown")).data)

        await bench.figure(
            Figure(
                name="key_get_next_turn",
                what="hf.keys.get of the next turn of that conversation, by a reader that has the one before",
                kind="latency",
                durability="durable",
                parameters={"turns": len(turns), "payload_bytes": TURN_BYTES, "concurrency": 1},
                count=bench.scale(60, 10),
            ),
            Side("", ours),
            Side("two direct gets one after the other, the second of the whole body, inflated", load(_range, two_gets)),
        )


def _range(number: int) -> list[int]:
    return list(range(number))


def _version_messages(body: dict[str, Any], key: str) -> list[Message]:
    form = seal(NAMESPACE, "context", encoded(body))[0]
    once = {"Nats-Expected-Last-Subject-Sequence": "0"}
    version = msgspec.json.encode(
        {
            "version": 1,
            "op": "put",
            "ref": f"ctx_context_{form.digest}",
            "event_id": new_event_id(),
            "agent_id": "bench",
        }
    )
    return [
        Message(f"{RAW_HOT_PREFIX}{NAMESPACE}.{form.digest}", {**form.headers, **once}, form.payload),
        Message(f"{_RAW_KEYS_PREFIX}{key}", once, version),
    ]
