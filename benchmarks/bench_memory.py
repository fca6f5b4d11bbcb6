"""What memory is taken: by a context that is hot, by an SDK and by workers that have nothing to do.

``server_bytes_per_context``: the growth of the server's resident memory over so many contexts of 600 bytes, each a
subject of its own, divided by their number; the bodies are on the disk, and what the server still keeps of them counts
too.  Raw limit: the same payloads under the same kind of subject without a header, in a bare stream of a server of its
own; names that count up would take the server a third less, since its tree of subjects shares their beginnings.
Peers: the growth of what Redis calls used memory; the body, which it keeps there, is not counted.

``archive_memory``: the highest resident memory of a process that archives 100,000 contexts of 1,400 bytes, 50,000 in a
commit, index included; beside what it has before.  ``idle_client`` and ``idle_worker``: resident memory of a process
that is connected (and has stored and read one context), and of one that runs all workers; beside one with nats-py
alone, and one with nats-py and the libraries of the lake.

Each run has a server or a process of its own; what the peers take for a run comes on top of what they have from others.

Does not measure: memory under load (see the archiver and the import), the server's own 20 MB.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from statistics import median
from typing import TYPE_CHECKING, Final

import psutil

from benchmarks.archived import BODY_BYTES as ARCHIVED_BYTES
from benchmarks.archived import store
from benchmarks.bench import RAW_HOT_PREFIX, Bench, BenchServer, Figure
from benchmarks.children import child
from benchmarks.measure import Result
from benchmarks.payloads import Bodies, encoded
from benchmarks.process_tree import watch_memory
from benchmarks.raw_nats import AtomicBatches, Message
from holdfast.schemas.refs import compute_digest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.peers.peer import Peer

BODY_BYTES: Final = 600
CONTEXTS: Final = 100_000
ARCHIVED: Final = 100_000
ROWS_PER_COMMIT: Final = 50_000
"""As many as the archiver itself takes at once."""
SETTLE_S: Final = 12
"""The server lets go of blocks that nobody reads after ten seconds."""
_IN_A_CALL: Final = 500

FIGURES: Final = ("server_bytes_per_context", "archive_memory", "idle_client", "idle_worker")


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    if bench.wants("server_bytes_per_context"):
        await _contexts(bench)
    if bench.wants("archive_memory"):
        await _archiving(bench)
    if bench.wants("idle_client", "idle_worker"):
        await _idle(bench)


async def _contexts(bench: Bench) -> None:
    number = bench.scale(CONTEXTS, 1_000)
    bodies = Bodies(51)

    async def ours(server: BenchServer) -> None:
        async with server.connect(cache_bytes=0) as hf:
            for _ in range(0, number, _IN_A_CALL):
                await hf.put_many(bodies.take(_IN_A_CALL, BODY_BYTES))

    async def raw(server: BenchServer) -> None:
        batches = AtomicBatches(server.client)
        for _ in range(0, number, _IN_A_CALL):
            taken = [encoded(body) for body in bodies.take(_IN_A_CALL, BODY_BYTES)]
            await batches.publish([Message(f"{RAW_HOT_PREFIX}bench.{_name(body)}", {}, body) for body in taken])

    runs = bench.budget.runs
    # Each is alone while it fills its server, and they let go of what they need not keep side by side.
    turn = asyncio.Lock()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_growth(bench, fill, turn)) for fill in (ours, raw) * runs]
    of_each = [task.result() / number for task in tasks]
    peers: list[Result] = []
    for name in ("postgres_redis", "redis_always"):
        peer = bench.peers.of(name) if bench.peers else None
        if peer is not None:
            beyond = [await _growth_of_peer(peer, bodies, run * number, number) for run in range(runs)]
            peers.append(_result(f"{peer.what}, beyond the body", beyond, number, name))
    bench.add(
        Figure(
            name="server_bytes_per_context",
            what="growth of the server's resident memory by a live context",
            kind="latency",
            unit="B",
            durability="durable",
            parameters={"payload_bytes": BODY_BYTES, "concurrency": 1, "contexts": number},
        ),
        _result("", of_each[::2], number),
        _result("the same messages without headers in a bare stream", of_each[1::2], number),
        peers,
    )


def _name(body: bytes) -> str:
    return compute_digest("bench", "context", body)


async def _growth(bench: Bench, fill: Callable[[BenchServer], Awaitable[None]], turn: asyncio.Lock) -> float:
    """Returns by how many bytes a new server has grown after what ``fill`` does, once it has let go of the rest."""
    async with AsyncExitStack() as stack:
        async with turn:
            server = await stack.enter_async_context(bench.server())
            process = psutil.Process(server.pid)
            before = process.memory_info().rss
            await fill(server)
        after = process.memory_info().rss
        for _ in range(bench.scale(SETTLE_S, 0)):
            await asyncio.sleep(1)
            after = min(after, process.memory_info().rss)
        return max(1.0, after - before)


async def _growth_of_peer(peer: Peer, bodies: Bodies, first: int, number: int) -> float:
    """Returns by how many bytes a context the memory of a peer grows, its body not counted."""
    before = await peer.bytes_in_memory()
    for start in range(first, first + number, _IN_A_CALL):
        taken = enumerate(bodies.take(_IN_A_CALL, BODY_BYTES), start=start)
        await peer.put_many([(f"memory{n:026d}", encoded(body)) for n, body in taken])
    return max(1.0, (await peer.bytes_in_memory() - before) / number - BODY_BYTES)


async def _archiving(bench: Bench) -> None:
    rows = bench.scale(ARCHIVED, 1_000)
    idle_mb: list[float] = []
    peak_mb: list[float] = []
    async with bench.server() as server:
        async with server.connect(cache_bytes=0) as hf:
            await store(hf, rows, seed=52)
        for _ in range(bench.budget.runs):
            data = bench.directory("archive-memory")
            async with child("benchmarks.archive_process", "--url", server.url, "--data", str(data)) as process:
                await process.ask()
                async with watch_memory(process.pid) as idle:
                    pass
                async with watch_memory(process.pid) as peak:
                    await process.ask({"rows_per_commit": ROWS_PER_COMMIT})
            idle_mb.append(idle.mb)
            peak_mb.append(peak.mb)
    bench.add(
        Figure(
            name="archive_memory",
            what="highest resident memory of a process that archives a stream",
            kind="latency",
            unit="MB",
            durability="durable",
            parameters={
                "payload_bytes": ARCHIVED_BYTES,
                "concurrency": 1,
                "rows": rows,
                "rows_in_a_commit": ROWS_PER_COMMIT,
            },
        ),
        _result("", peak_mb, rows),
        _result("the same process before", idle_mb, rows),
    )


async def _idle(bench: Bench) -> None:
    for figure, ours, raw, what, raw_what in (
        ("idle_client", "client", "plain", "a process with a connected SDK", "one connected by nats-py"),
        ("idle_worker", "worker", "libraries", "a process with all workers", "nats-py and the libraries of the lake"),
    ):
        if not bench.wants(figure):
            continue
        values: dict[str, list[float]] = {ours: [], raw: []}
        async with bench.server() as server:
            for _ in range(bench.budget.runs):
                for side in (ours, raw):
                    values[side].append(await _resident_mb(bench, server, side))
        bench.add(
            Figure(
                name=figure,
                what=f"resident memory of {what}",
                kind="latency",
                unit="MB",
                durability="durable",
                parameters={"payload_bytes": 0, "concurrency": 1},
            ),
            _result("", values[ours], 1),
            _result(raw_what, values[raw], 1),
        )


async def _resident_mb(bench: Bench, server: BenchServer, what: str) -> float:
    data = bench.directory(what)
    async with child("benchmarks.idle_process", "--what", what, "--url", server.url, "--data", str(data)) as process:
        await process.ask()
        return psutil.Process(process.pid).memory_info().rss / 1e6


def _result(what: str, values: list[float], number: int, label: str = "") -> Result:
    return Result(what=what, value=median(values), values=values, count=number, label=label)
