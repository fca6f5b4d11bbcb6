"""The resolver service, asked by a plain client: ``ctx.<ns>.resolve`` and ``resolve_batch`` of contexts that are hot.

Measures request to answer, the resolver being a process of its own, as in production; the bodies (600 bytes) lie in
the hot tier.  A warm resolver was asked for each of them within the last minute, and answers from what it keeps; the
other one has to fetch each from the server before it answers (asked by ``fields``, whose answers are not kept).  The
raw limit is a bare subscription in that same process that answers at once with as many bytes, asked by the same client
in the same way: what nats-py and the wire cost, with no work done.

Does not measure: cold contexts (see the lake), several resolvers, encoding by the asking side.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from benchmarks.bench import NAMESPACE, Bench, BenchServer, Figure
from benchmarks.children import child
from benchmarks.measure import Runner, Side, load
from benchmarks.payloads import Bodies
from benchmarks.raw_nats import OwnInbox
from benchmarks.responder import ECHO, H_BYTES

if TYPE_CHECKING:
    from holdfast.schemas.refs import Ref

BODY_BYTES: Final = 600
STORED: Final = 5_000
BATCH: Final = 100

FIELDS: Final = ("ref", "kind", "body", "size", "created_at", "tier", "content_type")

FIGURES: Final = (
    "resolver_1",
    "resolver_128",
    "resolver_batch_100_1",
    "resolver_batch_100_16",
    "resolver_read_128",
    "resolver_batch_read_100_16",
)


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    if not bench.wants(*FIGURES):
        return
    async with bench.server() as server, OwnInbox(server.client) as inbox:
        async with server.connect() as hf:
            refs = await hf.put_many(Bodies(5).take(bench.scale(STORED, 500), BODY_BYTES))
        data = bench.directory("resolver")
        arguments = ("--url", server.url, "--lake", str(data / "lake"), "--index", str(data / "index"))
        async with child("benchmarks.responder", *arguments) as responder:
            await responder.ask()
            await _figures(bench, server, inbox, refs)


async def _figures(bench: Bench, server: BenchServer, inbox: OwnInbox, refs: list[Ref]) -> None:
    source = random.Random(6)

    def single() -> bytes:
        return msgspec.json.encode({"ref": source.choice(refs)})

    def batch() -> bytes:
        return msgspec.json.encode({"refs": source.sample(refs, BATCH)})

    def single_read() -> bytes:
        return msgspec.json.encode({"ref": source.choice(refs), "fields": FIELDS})

    def batch_read() -> bytes:
        return msgspec.json.encode({"refs": source.sample(refs, BATCH), "fields": FIELDS})

    for name, endpoint, make, weight, concurrency in (
        ("resolver_1", "resolve", single, 1, 1),
        ("resolver_128", "resolve", single, 1, 128),
        ("resolver_batch_100_1", "resolve_batch", batch, BATCH, 1),
        ("resolver_batch_100_16", "resolve_batch", batch, BATCH, 16),
        ("resolver_read_128", "resolve", single_read, 1, 128),
        ("resolver_batch_read_100_16", "resolve_batch", batch_read, BATCH, 16),
    ):
        subject = f"ctx.{NAMESPACE}.{endpoint}"
        for start in range(0, len(refs), BATCH):
            warming = msgspec.json.encode({"refs": refs[start : start + BATCH]})
            _check((await inbox.request(f"ctx.{NAMESPACE}.resolve_batch", warming)).data, BATCH)
        answer = await inbox.request(subject, make())
        _check(answer.data, weight)
        await bench.figure(
            Figure(
                name=name,
                what=f"{subject} by request-reply, {'read' if '_read_' in name else 'warm'}",
                kind="latency" if name == "resolver_1" else "rate",
                unit="" if weight == 1 else "refs/s",
                durability=server.durability,
                parameters={"payload_bytes": BODY_BYTES, "concurrency": concurrency, "refs_in_a_request": weight},
                least=max(100, 2 * concurrency),
            ),
            Side("", _asks(inbox, subject, make, concurrency, weight)),
            Side(
                f"echo of {len(answer.data)} bytes by a bare subscription",
                _asks(inbox, ECHO, make, concurrency, weight, {H_BYTES: str(len(answer.data))}),
            ),
        )


def _asks(
    inbox: OwnInbox,
    subject: str,
    make: Callable[[], bytes],
    concurrency: int,
    weight: int,
    headers: dict[str, str] | None = None,
) -> Runner:
    async def ask(payload: bytes) -> None:
        reply = await inbox.request(subject, payload, headers)
        if reply.headers and "Nats-Service-Error-Code" in reply.headers:
            raise RuntimeError(f"{subject} answered {reply.data.decode()}")

    return load(lambda number: [make() for _ in range(number)], ask, concurrency, weight=weight)


def _check(answer: bytes, weight: int) -> None:
    decoded = msgspec.json.decode(answer)
    if weight > 1 and len(decoded["contexts"]) != weight:
        raise RuntimeError(f"{len(decoded['contexts'])} of {weight} contexts were answered")
