"""Curves of the hot tier: bodies, callers, versions of a key, subjects.

Durable throughout.  Raw limits are plain nats-py: ``js.publish`` of the same payload, direct gets over one own inbox.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from benchmarks.bench import NAMESPACE, RAW_HOT_PREFIX, Bench, BenchServer
from benchmarks.curves.curve import Curve, OnPoint, Point, Points, Processes, cost_at, curve, ignore_point, up_to
from benchmarks.measure import load
from benchmarks.payloads import Bodies, encoded, text_of
from benchmarks.raw_nats import AtomicBatches, Message, OwnInbox
from holdfast.schemas.refs import parse_ref
from holdfast.streams.codec import seal
from holdfast.streams.wire import HOT_STREAM, hot_subject

if TYPE_CHECKING:
    from holdfast.client import Holdfast
    from holdfast.schemas.refs import Ref

BODY_BYTES: Final = 600
BODIES: Final = (100, 1_000, 10_000, 100_000, 1 << 20, 8 << 20)
CALLERS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
VERSIONS: Final = (1, 10, 100, 1_000, 10_000)
SUBJECTS: Final = (1_000, 10_000, 100_000, 1_000_000)
_IN_A_CALL: Final = 500
_KNOWN: Final = 20_000
_PUTS: Final = 2_000
"""Of a run, at most, where what is put is what grows."""
_ONCE: Final = {"Nats-Expected-Last-Subject-Sequence": "0"}
_GET: Final = f"$JS.API.DIRECT.GET.{HOT_STREAM}"


async def body_size(bench: Bench, largest: float, on_point: OnPoint = ignore_point) -> list[Curve]:
    """Storing and reading one context after the other, by the size of its body."""
    sizes = up_to(BODIES, largest)
    text = text_of(random.Random(71), max(1 << 20, 4 * sizes[-1])).encode()
    numbers = count()
    puts = Points("put_body", on_point)
    gets = Points("resolve_body", on_point)
    async with _hot(bench) as (server, hf, _inbox, processes):
        jetstream = server.client.jetstream()
        for size in sizes:
            stored: list[Ref] = []

            def make(number: int, size: int = size) -> list[bytes]:
                return [_distinct(text, next(numbers), size) for _ in range(number)]

            async def put(body: bytes, stored: list[Ref] = stored) -> None:
                stored.append(await hf.put(body))

            def forms(number: int, size: int = size) -> list[list[Message]]:
                return [_messages(body) for body in make(number, size)]

            async def publish(messages: list[Message]) -> None:
                for message in messages:
                    await jetstream.publish(message.subject, message.payload, headers=message.headers)

            least = 4 if size >= 1 << 20 else 20
            puts.add(await cost_at(bench, size, load(make, put), load(forms, publish), processes, least=least))
            chosen = random.Random(72)
            gets.add(
                await cost_at(
                    bench, size, load(partial(_choose, chosen, stored), hf.resolve), None, processes, least=least
                )
            )
    parameters: dict[str, Any] = {"concurrency": 1, "content_type": "application/octet-stream"}
    return [
        curve(
            puts.name,
            "hf.put",
            x_name="bytes of the body",
            points=puts.measured,
            raw_what="js.publish of the same messages",
            **parameters,
        ),
        curve(
            gets.name,
            "hf.resolve of a hot context, near cache off",
            x_name="bytes of the body",
            points=gets.measured,
            **parameters,
        ),
    ]


async def concurrency(bench: Bench, largest: float, on_point: OnPoint = ignore_point) -> list[Curve]:
    """Storing and reading by so many tasks of one process: µs an operation, so a fall is a gain."""
    bodies = Bodies(73)
    source = random.Random(74)
    puts = Points("put_concurrency", on_point)
    gets = Points("resolve_concurrency", on_point)
    async with _hot(bench) as (server, hf, inbox, processes):
        batches = AtomicBatches(server.client)
        refs = await _fill(hf, bodies, bench.scale(10_000, 500))
        subjects = [_subject(ref) for ref in refs]
        for tasks in up_to(CALLERS, largest):
            group = min(tasks, 64)

            def groups(number: int, group: int = group) -> list[list[Message]]:
                return [_raw(bodies, group) for _ in range(number)]

            puts.add(
                await cost_at(
                    bench,
                    tasks,
                    load(lambda number: bodies.take(number, BODY_BYTES), hf.put, tasks),
                    load(groups, batches.publish, max(1, tasks // 64), weight=group),
                    processes,
                    rate=True,
                    least=4 * tasks,
                )
            )
            gets.add(
                await cost_at(
                    bench,
                    tasks,
                    load(partial(_choose, source, refs), hf.resolve, tasks),
                    load(partial(_choose, source, subjects), inbox.request, tasks),
                    processes,
                    rate=True,
                    least=4 * tasks,
                )
            )
    return [
        curve(
            puts.name,
            "hf.put",
            x_name="tasks",
            cost_unit="µs",
            points=puts.measured,
            payload_bytes=BODY_BYTES,
            raw_what="atomic batches of as many, 64 at most",
        ),
        curve(
            gets.name,
            "hf.resolve of a hot context, near cache off",
            x_name="tasks",
            cost_unit="µs",
            points=gets.measured,
            payload_bytes=BODY_BYTES,
            raw_what="direct gets over one own inbox",
        ),
    ]


async def versions(bench: Bench, largest: float, on_point: OnPoint = ignore_point) -> list[Curve]:
    """Reading the newest version of a key, and writing the next one, by how many there are."""
    bodies = Bodies(75)
    puts = Points("key_put_versions", on_point)
    gets = Points("key_get_versions", on_point)
    async with _hot(bench) as (_server, hf, _inbox, processes):
        for number in up_to(VERSIONS, largest):
            names = [f"grown{number}.{key}" for key in range(max(1, 100 // number))]
            for name in names:
                for body in bodies.take(number, BODY_BYTES):
                    await hf.keys.put(name, body)
            turns = count()

            def in_turn(calls: int, names: list[str] = names) -> list[str]:
                return [names[call % len(names)] for call in range(calls)]

            gets.add(await cost_at(bench, number, load(in_turn, hf.keys.get), None, processes))

            async def put(body: dict[str, Any], names: list[str] = names, turns: Any = turns) -> None:
                await hf.keys.put(names[next(turns) % len(names)], body)

            # Few, so that the versions stay about as many as they were.
            few = max(10, min(200, number * len(names) // 10))
            puts.add(
                await cost_at(
                    bench, number, load(lambda calls: bodies.take(calls, BODY_BYTES), put), None, processes, count=few
                )
            )
    return [
        curve(
            puts.name,
            "hf.keys.put of the next version",
            x_name="versions of the key",
            points=puts.measured,
            payload_bytes=BODY_BYTES,
            concurrency=1,
        ),
        curve(
            gets.name,
            "hf.keys.get of the newest version",
            x_name="versions of the key",
            points=gets.measured,
            payload_bytes=BODY_BYTES,
            concurrency=1,
        ),
    ]


async def subjects(bench: Bench, largest: float, on_point: OnPoint = ignore_point) -> list[Curve]:
    """Storing and reading by how many contexts are hot, each a subject of the server."""
    bodies = Bodies(76)
    source = random.Random(77)
    puts = Points("put_subjects", on_point)
    gets = Points("resolve_subjects", on_point)
    memory = Points("memory_subjects", on_point)
    refs: list[Ref] = []
    stored = 0
    async with _hot(bench) as (server, hf, inbox, processes):
        jetstream = server.client.jetstream()
        empty_mb = processes.memory_mb()["server"]

        async def put(body: dict[str, Any]) -> None:
            nonlocal stored
            await hf.put(body)
            stored += 1

        async def publish(message: Message) -> None:
            await jetstream.publish(message.subject, message.payload, headers=message.headers)

        for number in up_to([bench.scale(number, number // 10) for number in SUBJECTS], largest):
            while stored < number:
                found = await _fill(hf, bodies, min(_IN_A_CALL * 4, number - stored))
                stored += len(found)
                refs += found[: max(1, _KNOWN * len(found) // number)]
            asked = [_subject(ref) for ref in refs]
            # Before the puts of this point, which make more of what is counted; few of them for the same reason.
            server_mb = processes.memory_mb()
            grown = max(0.1, server_mb["server"] - empty_mb)
            memory.add(Point(x=number, cost=grown, values=[grown], memory_mb=server_mb))
            gets.add(
                await cost_at(
                    bench,
                    number,
                    load(partial(_choose, source, refs), hf.resolve),
                    load(partial(_choose, source, asked), inbox.request),
                    processes,
                )
            )
            puts.add(
                await cost_at(
                    bench,
                    number,
                    load(lambda calls: bodies.take(calls, BODY_BYTES), put),
                    load(lambda calls: _raw(bodies, calls), publish),
                    processes,
                    count=min(_PUTS, number // 10),
                )
            )
    parameters: dict[str, Any] = {"payload_bytes": BODY_BYTES, "concurrency": 1}
    return [
        curve(
            puts.name,
            "hf.put",
            x_name="hot contexts",
            points=puts.measured,
            raw_what="js.publish into a bare stream of few",
            **parameters,
        ),
        curve(
            gets.name,
            "hf.resolve, near cache off",
            x_name="hot contexts",
            points=gets.measured,
            raw_what="direct get over one own inbox",
            **parameters,
        ),
        curve(
            memory.name,
            "growth of the server's resident memory",
            x_name="hot contexts",
            cost_unit="MB",
            points=memory.measured,
            **parameters,
        ),
    ]


@asynccontextmanager
async def _hot(bench: Bench) -> AsyncGenerator[tuple[BenchServer, Holdfast, OwnInbox, Processes]]:
    async with (
        bench.server() as server,
        server.connect(cache_bytes=0) as hf,
        OwnInbox(server.client) as inbox,
    ):
        yield server, hf, inbox, Processes({"server": server.pid, "client": os.getpid()})


async def _fill(hf: Holdfast, bodies: Bodies, number: int) -> list[Ref]:
    refs: list[Ref] = []
    while len(refs) < number:
        refs += await hf.put_many(bodies.take(min(_IN_A_CALL, number - len(refs)), BODY_BYTES))
    return refs


def _choose(source: random.Random, items: Sequence[Any], number: int) -> list[Any]:
    return source.choices(items, k=number)


def _distinct(text: bytes, number: int, size: int) -> bytes:
    start = number * 9_973 % (len(text) - size)
    return b"%020d" % number + text[start : start + size - 20]


def _messages(body: bytes) -> list[Message]:
    return [
        Message(f"{RAW_HOT_PREFIX}{NAMESPACE}.{form.digest}", {**form.headers, **_ONCE}, form.payload)
        for form in seal(NAMESPACE, "context", body, content_type="application/octet-stream")
    ]


def _raw(bodies: Bodies, number: int) -> list[Message]:
    return [message for body in bodies.take(number, BODY_BYTES) for message in _messages(encoded(body))]


def _subject(ref: Ref) -> str:
    return f"{_GET}.{hot_subject(NAMESPACE, parse_ref(ref).digest)}"
