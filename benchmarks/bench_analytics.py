"""Questions in SQL over archived events: who did how much when, and what the live view costs on top.

``sql_agent_hour_2m``: events of each agent in each hour over 2,000,000 rows, by ``holdfast.lake.connect`` from a
statement to its rows in Python; raw limit: DuckDB alone over the same files; peer: PostgreSQL over as many rows of the
same distribution, as who runs it for such questions would have it: vacuumed and analysed, in its cache, two parallel
workers, and statistics of how many agents and hours there are together.  Without these it expects as many groups as
rows, and sorts all of them in one process; how it is set and what it plans is in the record's parameters.

``live_view_added``: the same question over a lake with 100,000 events in the stream that are not archived yet, less the
same over the lake alone; the view is attached, and each question was asked once before.  A value is the difference of
the medians of five of each, asked in turn; raw limit: DuckDB grouping as many rows in memory, five times too.  How long
it took to attach the view, up to the first answer, is its parameter ``first_attach_ms``.

Does not measure: files that are not in the page cache, the comparison of files with their checksums, which is left out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

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
_FILL_TIMEOUT_S: Final = 300
"""Ends what hangs; the peer's table takes half a minute."""
_ASKED: Final = 5
"""How often a question is asked in a run."""
_LEAST_MS: Final = 0.001
"""What noise has made less than nothing counts as so much, since a ratio of nothing is none."""

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
CREATE STATISTICS IF NOT EXISTS events_agent_hour (ndistinct) ON agent_id, date_trunc('hour', stored_at) FROM events;
"""
_POSTGRES_SETTINGS: Final = ("shared_buffers", "work_mem", "max_parallel_workers_per_gather", "jit")


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
        parameters: dict[str, Any] = {"payload_bytes": 30, "concurrency": 1, "rows": rows, "files": len(paths)}
        sides = [
            Side("", asked(lambda: lake.execute(ours).fetchall())),
            Side("DuckDB alone over the same files", asked(lambda: duck.execute(raw).fetchall())),
        ]
        peers: list[Side] = []
        if bench.peers and bench.peers.postgres:
            side, parameters["postgres"] = await postgres_side(bench.peers.postgres, rows)
            peers.append(side)
        figure = Figure(
            name="sql_agent_hour_2m",
            what="events of each agent in each hour",
            kind="latency",
            durability="durable",
            parameters=parameters,
            count=bench.scale(_ASKED, 1),
        )
        await bench.figure_beside(figure, sides, peers)


async def postgres_side(peer: PostgresRedis, rows: int) -> tuple[Side, dict[str, Any]]:
    """Fills the peer's table, once; returns what asks it the same question, and how it is set and what it plans."""
    query = AGENT_HOUR.format(source="events").replace("GROUP BY ALL ORDER BY ALL", "GROUP BY 1, 2 ORDER BY 1, 2")
    async with asyncio.timeout(_FILL_TIMEOUT_S):
        await peer.pool.execute(_POSTGRES_ROWS.format(rows=rows, agents=AGENTS, days=DAYS))
        await peer.pool.execute("VACUUM (ANALYZE) events")
        # Once before: what was written in bulk is not in its buffers.
        groups = len(await peer.pool.fetch(query))
    settings = {name: await peer.pool.fetchval("SELECT current_setting($1)", name) for name in _POSTGRES_SETTINGS}
    plan = [line.strip() for (line,) in await peer.pool.fetch(f"EXPLAIN {query}")]
    statistics = "ndistinct of agent_id, date_trunc('hour', stored_at)"

    async def ask(number: int) -> Run:
        latencies: list[float] = []
        for _ in range(number):
            began = time.perf_counter()
            await peer.pool.fetch(query)
            latencies.append(time.perf_counter() - began)
        return Run(number, sum(latencies), latencies)

    side = Side("PostgreSQL 15 over as many rows, in its cache, with statistics of the groups", ask, peer.name)
    return side, {**settings, "statistics": statistics, "groups": groups, "plan": plan}


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

        found = await asyncio.to_thread(_with_and_without, directory, server.url, rows, tail, bench.budget.runs)
    bench.add(
        Figure(
            name="live_view_added",
            what=(
                f"what {tail:,} unarchived events add to the question over {rows:,} archived ones, "
                "the view attached and asked before"
            ),
            kind="latency",
            durability="durable",
            parameters={
                "payload_bytes": 100,
                "concurrency": 1,
                "rows": rows,
                "unarchived": tail,
                "view": "attached and asked before",
                "value": f"difference of the medians of {_ASKED} of each",
                "whole_ms": median(found.whole_ms),
                "first_attach_ms": found.first_attach_ms,
                "checksums": "not compared",
            },
        ),
        _result("", found.added_ms),
        _result("DuckDB grouping as many rows in memory", found.raw_ms),
    )


class _LiveView(NamedTuple):
    """What the live view took; of each a value a run, but for the first attachment."""

    first_attach_ms: float
    whole_ms: list[float]
    added_ms: list[float]
    raw_ms: list[float]


def _with_and_without(directory: Path, url: str, rows: int, tail: int, runs: int) -> _LiveView:
    """Asks the lake with the live view, the lake alone and DuckDB in turn.

    The lake is of another life of the stream: all that this one holds is shown beside it.
    """
    began = time.perf_counter()
    with connect_lake(directory, url, live=["events"], compare=False) as live:
        shown = live.execute("SELECT count(*) FROM events").fetchall()
        found = _LiveView(1000 * (time.perf_counter() - began), [], [], [])
        if shown != [(rows + tail,)]:
            raise RuntimeError(f"the live view shows {shown} events")
        with connect_lake(directory, compare=False) as lake, duckdb.connect() as duck:
            duck.execute(f"CREATE TABLE tail AS SELECT * FROM range({tail})")
            query = AGENT_HOUR.format(source="events")
            questions: list[Callable[[], Any]] = [
                lambda: live.execute(query).fetchall(),
                lambda: lake.execute(query).fetchall(),
                lambda: duck.execute("SELECT range % 50, range % 168, count(*) FROM tail GROUP BY ALL").fetchall(),
            ]
            for question in questions:
                question()
            for _ in range(runs):
                asked_in_turn = [[_seconds(question) for question in questions] for _ in range(_ASKED)]
                with_tail, without, raw = (1000 * median(times) for times in zip(*asked_in_turn, strict=True))
                found.whole_ms.append(with_tail)
                found.added_ms.append(max(_LEAST_MS, with_tail - without))
                found.raw_ms.append(raw)
    return found


def _result(what: str, values: list[float]) -> Result:
    middle = median(values)
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
