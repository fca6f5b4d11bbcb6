"""Reading from the SDK: contexts that are hot, and contexts that this process just had in hand.

Measures the near cache; and with the near cache off, one resolve after the other, 64 at once, and 100 references in one
call.  Every body (600 bytes) is hashed again on its way, which the raw limits do not do: they fetch the same messages
by a direct get of plain nats-py (``nc.request``; one own inbox where many are in flight; one batched get for many) and
look at nothing but their arrival.  The raw limit of the near cache is a look-up in a dict by the same text, whose hash
is not known yet.  Ours and the peer with a cache of its own are read by the same loop (``peers/in_hand.py``), which
takes no latencies of single reads; the dict's loop differs in that it awaits nothing.

Does not measure: misses, damaged copies, a cluster whose replicas lag, chunked bodies.
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from benchmarks.bench import NAMESPACE, Bench, BenchServer, Figure
from benchmarks.measure import Run, Side, load, timed
from benchmarks.payloads import Bodies
from benchmarks.peers.in_hand import in_hand, new_texts
from benchmarks.raw_nats import OwnInbox
from holdfast.schemas.refs import Ref, parse_ref
from holdfast.streams.wire import HOT_STREAM, hot_subject

if TYPE_CHECKING:
    from holdfast.client import Holdfast

BODY_BYTES: Final = 600
STORED: Final = 10_000
MANY: Final = 100

FIGURES: Final = ("near_cache", "resolve_hot_sequential", "resolve_hot_64", "resolve_many_100")

DIRECT_GET: Final = f"$JS.API.DIRECT.GET.{HOT_STREAM}"


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    if not bench.wants(*FIGURES):
        return
    async with bench.server() as server:
        async with server.connect() as hf:
            refs = await hf.put_many(Bodies(3).take(bench.scale(STORED, 500), BODY_BYTES))
            await _near_cache(bench, server, hf, refs)
        async with server.connect(cache_bytes=0) as hf, OwnInbox(server.client) as inbox:
            await _hot(bench, server, hf, inbox, refs)


async def _near_cache(bench: Bench, server: BenchServer, hf: Holdfast, refs: list[Ref]) -> None:
    known: dict[str, bytes] = dict.fromkeys(refs, b"")

    async def raw(count: int) -> Run:
        async def look_up(texts: list[str]) -> None:
            for text in texts:
                known[text]

        return await timed(count, partial(look_up, new_texts(refs, count)))

    await bench.figure(
        Figure(
            name="near_cache",
            what="hf.resolve of what this process has just stored",
            kind="rate",
            durability=server.durability,
            parameters={"payload_bytes": BODY_BYTES, "concurrency": 1},
            least=1_000,
            most=200_000,
        ),
        Side("", in_hand(refs, hf.resolve)),
        Side("a dict look-up by a text not hashed before", raw),
    )


async def _hot(bench: Bench, server: BenchServer, hf: Holdfast, inbox: OwnInbox, refs: list[Ref]) -> None:
    source = random.Random(4)
    subjects = {ref: f"{DIRECT_GET}.{hot_subject(NAMESPACE, parse_ref(ref).digest)}" for ref in refs}

    def chosen(count: int) -> list[Ref]:
        return source.choices(refs, k=count)

    def gets(count: int) -> list[str]:
        return [subjects[ref] for ref in chosen(count)]

    def figure(name: str, what: str, concurrency: int, **parameters: int) -> Figure:
        return Figure(
            name=name,
            what=what,
            kind="rate" if concurrency > 1 else "latency",
            durability=server.durability,
            parameters={"payload_bytes": BODY_BYTES, "concurrency": concurrency, **parameters},
            least=200,
        )

    def groups(number: int) -> list[list[Ref]]:
        return [source.sample(refs, MANY) for _ in range(number)]

    def requests(number: int) -> list[bytes]:
        return [
            msgspec.json.encode({"multi_last": [hot_subject(NAMESPACE, parse_ref(ref).digest) for ref in group]})
            for group in groups(number)
        ]

    async def get_many(request: bytes) -> None:
        found = await inbox.gather(DIRECT_GET, request)
        if len(found) != MANY:
            raise RuntimeError(f"{len(found)} of {MANY} messages came")

    await bench.figure(
        figure("resolve_hot_sequential", "hf.resolve, near cache off, one after the other", 1),
        Side("", load(chosen, hf.resolve)),
        Side("direct get by nc.request", load(gets, server.client.request)),
    )
    await bench.figure(
        figure("resolve_hot_64", "hf.resolve, near cache off, from many tasks", 64),
        Side("", load(chosen, hf.resolve, 64)),
        Side("direct gets over one own inbox of plain nats-py", load(gets, inbox.request, 64)),
    )
    await bench.figure(
        figure("resolve_many_100", "hf.resolve_many, near cache off, one call after the other", 1, in_a_call=MANY),
        Side("", load(groups, hf.resolve_many)),
        Side("one batched direct get (multi_last) over an own inbox", load(requests, get_many)),
    )
