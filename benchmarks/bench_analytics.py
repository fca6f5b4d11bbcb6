"""Questions in SQL over archived events: who did how much when, and what the live view costs on top.

``sql_agent_hour_2m``: events of each agent in each hour over 2,000,000 rows, by ``holdfast.lake.connect`` from a
statement to its rows in Python; raw limit: DuckDB alone over the same files; peer: PostgreSQL over as many rows of the
same distribution, analysed, in its cache, with two parallel workers.  ``live_view_added``: the same question over a
lake with 100,000 events in the stream that are not archived yet, the view being attached before, less the same over the
lake alone; raw limit: DuckDB counting those rows in memory.

Does not measure: the first attachment of a live view, files that are not in the page cache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import duckdb

from benchmarks.bench import NAMESPACE, Bench, Figure
from benchmarks.measure import Result, Run, Runner, Side
from benchmarks.payloads import Bodies
from benchmarks.synthetic_lake import AGENTS, DAYS, append_rows, event_rows
from holdfast.lake import connect as connect_lake
from holdfast.lake.lake import Lake
from holdfast.streams.events import NewEvent

if TYPE_CHECKING:
    from benchmarks.peers.postgres_redis import PostgresRedis

ROWS: Final = 2_000_000
FILES: Final = 40
TAIL: Final = 100_000
_IN_A_CALL: Final = 2_000

FIGURES: Final = ("sql_agent_hour_2m", "live_view_added")

AGENT_HOUR: Final = (
    "SELECT agent_id, date_trunc('hour', stored_at) AS hour, count(*) FROM {source} GROUP BY ALL ORDER BY ALL"
)

_POSTGRES_ROWS: Final = """
CREATE TABLE IF NOT EXISTS events AS SELECT
    gen_random_uuid() AS event_id, 'agent-' || (n / 11000 * 200 + n % 200) % {agents} AS agent_id,
    'session-' || n / 11000 * 200 + n % 200 AS session_id, 'plan:step' AS name,
    timestamp '2025-10-09 08:00' + n * interval '1 day' * {days} / {rows} AS stored_at,
    jsonb_build_object('step', n % 55, 'tokens', n % 4001) AS data
FROM generate_series(0, {rows} - 1) AS n;
CREATE INDEX IF NOT EXISTS events_agent ON events (agent_id, stored_at);
"""


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    if not bench.wants(*FIGURES):
        return
    rows = bench.scale(ROWS, 20_000)
    directory = bench.directory("analytics") / "lake"
    await asyncio.to_thread(_make_lake, directory, rows, bench.scale(FILES, 4))
    if bench.wants("sql_agent_hour_2m"):
        await _agent_hour(bench, directory, rows)
    if bench.wants("live_view_added"):
        await _live_view(bench, directory, rows)


def _make_lake(directory: Path, rows: int, files: int) -> None:
    with Lake.open(directory, create=True) as lake:
        append_rows(lake, "events", event_rows, first=0, rows=rows, files=files, total=rows)


async def _agent_hour(bench: Bench, directory: Path, rows: int) -> None:
    with connect_lake(directory, compare=False) as lake, duckdb.connect() as duck:
        duck.execute("SET parquet_metadata_cache = true")
        paths = sorted(map(str, directory.glob("events/day=*/*.parquet")))
        files = f"read_parquet({paths}, hive_partitioning = false)"
        ours = AGENT_HOUR.format(source="events")
        raw = AGENT_HOUR.format(source=files)
        figure = Figure(
            name="sql_agent_hour_2m",
            what="events of each agent in each hour",
            kind="latency",
            durability="durable",
            parameters={"payload_bytes": 30, "concurrency": 1, "rows": rows, "files": len(paths)},
            count=bench.scale(5, 1),
        )
        sides = [
            Side("", asked(lambda: lake.execute(ours).fetchall())),
            Side("DuckDB alone over the same files", asked(lambda: duck.execute(raw).fetchall())),
        ]
        peer = bench.peers.postgres if bench.peers else None
        await bench.figure_beside(figure, sides, [await postgres_side(peer, rows)] if peer else [])


async def postgres_side(peer: PostgresRedis, rows: int) -> Side:
    """Fills the peer's table, once, and returns what asks it the same question."""
    await peer.pool.execute(_POSTGRES_ROWS.format(rows=rows, agents=AGENTS, days=DAYS), timeout=300)
    await peer.pool.execute("VACUUM (ANALYZE) events", timeout=300)
    query = AGENT_HOUR.format(source="events").replace("GROUP BY ALL ORDER BY ALL", "GROUP BY 1, 2 ORDER BY 1, 2")

    async def ask(number: int) -> Run:
        latencies: list[float] = []
        for _ in range(number):
            began = time.perf_counter()
            await peer.pool.fetch(query, timeout=60)
            latencies.append(time.perf_counter() - began)
        return Run(number, sum(latencies), latencies)

    return Side("PostgreSQL 15 over as many rows, in its cache", ask, peer.name)


async def _live_view(bench: Bench, directory: Path, rows: int) -> None:
    tail = bench.scale(TAIL, 1_000)
    async with bench.server() as server:
        bodies = Bodies(61)
        async with server.connect() as hf:
            for _ in range(0, tail, min(tail, _IN_A_CALL)):
                events = [
                    NewEvent(
                        namespace=NAMESPACE, agent_id=f"agent-{data['step'] % AGENTS}", name="plan:step", data=data
                    )
                    for data in bodies.take(min(tail, _IN_A_CALL), 100)
                ]
                await hf.publish_many(events)

        def compare() -> tuple[list[float], list[float], list[float]]:
            query = AGENT_HOUR.format(source="events")
            # The lake is of another life of the stream: all that this one holds is shown beside it.
            with (
                connect_lake(directory, compare=False) as lake,
                connect_lake(directory, server.url, live=["events"], compare=False) as live,
                duckdb.connect() as duck,
            ):
                count_of_live = "SELECT count(*) FROM events"
                found = live.execute(count_of_live).fetchall()
                if found != [(rows + tail,)]:
                    raise RuntimeError(f"the live view shows {found} events")
                duck.execute(f"CREATE TABLE tail AS SELECT * FROM range({tail})")
                counting = "SELECT range % 50, range % 168, count(*) FROM tail GROUP BY ALL"
                added: list[float] = []
                bare: list[float] = []
                total: list[float] = []
                for _ in range(bench.budget.runs):
                    with_tail = min(_seconds(lambda: live.execute(query).fetchall()) for _ in range(5))
                    without = min(_seconds(lambda: lake.execute(query).fetchall()) for _ in range(5))
                    added.append(max(0.001, 1000 * (with_tail - without)))
                    total.append(1000 * with_tail)
                    bare.append(1000 * min(_seconds(lambda: duck.execute(counting).fetchall()) for _ in range(5)))
                return added, bare, total

        added, bare, total = await asyncio.to_thread(compare)
    bench.add(
        Figure(
            name="live_view_added",
            what=f"what {tail:,} unarchived events add to the question over {rows:,} archived ones",
            kind="latency",
            durability="durable",
            parameters={
                "payload_bytes": 100,
                "concurrency": 1,
                "rows": rows,
                "unarchived": tail,
                "whole_ms": sorted(total)[len(total) // 2],
            },
        ),
        _result("", added),
        _result("DuckDB grouping as many rows in memory", bare),
    )


def _result(what: str, values: list[float]) -> Result:
    middle = sorted(values)[len(values) // 2]
    return Result(what=what, value=middle, values=values, count=1, p50_ms=middle, p99_ms=max(values))


def asked(question: Callable[[], Any]) -> Runner:
    """Returns the runner that asks one question after the other, away from the loop."""

    async def run_all(number: int) -> Run:
        latencies = [await asyncio.to_thread(_seconds, question) for _ in range(number)]
        return Run(number, sum(latencies), latencies)

    return run_all


def _seconds(question: Callable[[], Any]) -> float:
    began = time.perf_counter()
    question()
    return time.perf_counter() - began
