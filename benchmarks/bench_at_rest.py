"""Bytes at rest: what the lake takes for the recorded traces once they are imported and archived.

Ours: the Parquet of contexts and events, lineage included, as archived by one flush; after compaction, and the look-up
index, in the parameters.  Raw limit: the same steps as one zstd-3 stream, in which nothing can be looked up; beside it
zstd-3 of each record.  Peer: a PostgreSQL table of the same steps as ``jsonb``, its index not counted either.  Without
recorded traces the figure is left out: synthetic text says nothing about bytes.

Does not measure: the streams (which let go of what is archived), the log of the lake.
"""

from __future__ import annotations

import asyncio
import gzip
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.bench import Bench, Figure, recorded_traces
from benchmarks.children import child
from benchmarks.measure import Result
from holdfast.lake.compaction import compact
from holdfast.lake.lake import Lake
from holdfast.schemas.ids import now_ms

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from benchmarks.peers.postgres_redis import PostgresRedis

LEVEL: Final = 3
FIGURES: Final = ("bytes_at_rest",)


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    traces = None if bench.budget.quick else recorded_traces()
    if traces is None or not bench.wants(*FIGURES):
        return
    data = bench.directory("at-rest") / "data"
    async with child("benchmarks.import_process", "--data", str(data)) as process:
        await process.ask()
        counts = (await process.ask({"namespace": "atrest", "path": str(traces)}))["counts"]
    archived, compacted = await asyncio.to_thread(_lake_bytes, data / "lake")
    lines = list(_lines(traces))
    stream = len(zstd.compress(b"\n".join(lines), LEVEL))
    each = sum(len(zstd.compress(line, LEVEL)) for line in lines)
    peer = bench.peers.postgres if bench.peers else None
    peers = [_megabytes("PostgreSQL 15, jsonb", await _jsonb_bytes(peer, lines), peer.name)] if peer else []
    figure = Figure(
        name="bytes_at_rest",
        what="Parquet of contexts and events, lineage included",
        kind="latency",
        unit="MB",
        durability="durable",
        parameters={
            "traces": "recorded",
            "concurrency": 1,
            "steps": counts["steps"],
            "distinct_contexts": counts["distinct_contexts"],
            "json_mb": sum(map(len, lines)) / 1e6,
            "compacted_mb": compacted / 1e6,
            "index_mb": _size_of(data / "index") / 1e6,
        },
    )
    ours = _megabytes("", archived)
    bench.add(figure, ours, _megabytes("one zstd-3 stream of the same steps", stream), peers)
    bench.add(figure, ours, _megabytes("zstd-3 of each step by itself", each, "each"))


def _lake_bytes(path: Path) -> tuple[int, int]:
    with Lake.open(path) as lake:
        archived = sum(lake.statistics(table).bytes for table in ("contexts", "events"))
        # As of the day after tomorrow: then what is today's is compacted too.
        compact(lake, at_ms=now_ms() + 2 * 86_400_000)
        lake.refresh()
        return archived, sum(lake.statistics(table).bytes for table in ("contexts", "events"))


def _lines(traces: Path) -> Iterator[bytes]:
    for path in sorted(traces.rglob("*.steps.jsonl*")):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        yield from (line.strip() for line in raw.splitlines() if line.strip())


async def _jsonb_bytes(peer: PostgresRedis, lines: list[bytes]) -> int:
    await peer.pool.execute("CREATE TABLE steps (id bigint, step jsonb)")
    # A NUL is text to JSON and none to PostgreSQL.
    rows = [(number, line.decode().replace("\\u0000", "")) for number, line in enumerate(lines)]
    await peer.pool.executemany("INSERT INTO steps VALUES ($1, $2::jsonb)", rows)
    size: int = await peer.pool.fetchval("SELECT pg_table_size('steps')")
    await peer.pool.execute("DROP TABLE steps")
    return size


def _size_of(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def _megabytes(what: str, size: int, label: str = "") -> Result:
    return Result(what=what, value=size / 1e6, values=[size / 1e6], count=1, label=label)
