"""Curves of the lake: a cold context by rows and by files, questions in SQL by rows.

The lakes are synthetic (:mod:`benchmarks.synthetic_lake`), of the product's own writer.  Contexts of 980 bytes are
resolved by the SDK, near cache off, through an empty server and a resolver in a process of its own, which finds
them in its index; no reference is asked for twice.  Raw limit: pyarrow reading the row group, in this process, from a
file whose footer it has.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import duckdb
import pyarrow.parquet as pq

from benchmarks.bench import Bench, BenchServer, Figure
from benchmarks.bench_analytics import AGENT_HOUR, asked
from benchmarks.children import child
from benchmarks.curves.curve import Curve, Point, Processes, cost_at, curve
from benchmarks.measure import Runner, Side, load, measure
from benchmarks.synthetic_lake import (
    BODY_BYTES,
    ContextRows,
    append_rows,
    event_rows,
    key_name,
    root_of,
    session_name,
    version_rows,
)
from holdfast.lake import connect as connect_lake
from holdfast.lake.index import LakeIndex
from holdfast.lake.lake import Lake

if TYPE_CHECKING:
    from benchmarks.synthetic_lake import Group
    from holdfast.client import Holdfast
    from holdfast.schemas.rows import Table

ROWS: Final = (10_000, 100_000, 1_000_000, 10_000_000)
FILES: Final = (10, 100, 1_000)
ROWS_A_FILE: Final = 10_000
ROWS_BY_FILES: Final = 1_000_000
RESOLVES: Final = 500
MANY: Final = 1_000
_KEPT: Final = 20_000
"""References kept of a lake, from all over it."""


async def rows(bench: Bench, largest: float) -> list[Curve]:
    """A cold resolve by how many contexts the lake has, 10,000 in a file; the figures of the last point too."""
    points: list[Point] = []
    most = int(ROWS[-1] * largest)
    chosen = [number for number in ROWS if number <= max(most, ROWS[1])]
    directory = bench.directory("rows")
    made = ContextRows(81, max(1, chosen[-1] // _KEPT // 4))
    present = 0
    rate = 0.0
    with Lake.open(directory / "lake", create=True) as lake:
        for number in chosen:
            began = time.perf_counter()
            await asyncio.to_thread(
                append_rows,
                lake,
                "contexts",
                made,
                first=present,
                rows=number - present,
                files=max(1, (number - present) // ROWS_A_FILE),
                total=chosen[-1],
            )
            rate = (number - present) / (time.perf_counter() - began)
            present = number
            async with _resolver(bench, directory, lake) as (_server, hf, processes):
                points.append(await _resolve_point(bench, number, hf, made, directory, processes))
                if number == chosen[-1]:
                    await _last_figures(bench, hf, made, directory, number, len(lake.files("contexts")))
    return [
        curve(
            "cold_resolve_rows",
            "hf.resolve of an archived context",
            x_name="contexts in the lake",
            points=points,
            raw_what="pyarrow read of the row group",
            payload_bytes=BODY_BYTES,
            concurrency=1,
            rows_a_file=ROWS_A_FILE,
            made_rows_per_s=round(rate),
        )
    ]


async def files(bench: Bench, largest: float) -> list[Curve]:
    """The same by how many files as many contexts are in."""
    points: list[Point] = []
    total = max(10_000, int(ROWS_BY_FILES * largest))
    for number in FILES:
        directory = bench.directory("files")
        made = ContextRows(82, max(1, total // _KEPT))
        with Lake.open(directory / "lake", create=True) as lake:
            await asyncio.to_thread(append_rows, lake, "contexts", made, first=0, rows=total, files=number, total=total)
            async with _resolver(bench, directory, lake) as (_, hf, processes):
                points.append(await _resolve_point(bench, number, hf, made, directory, processes))
    return [
        curve(
            "cold_resolve_files",
            "hf.resolve of an archived context",
            x_name="files of the lake",
            points=points,
            raw_what="pyarrow read of the row group",
            payload_bytes=BODY_BYTES,
            concurrency=1,
            rows=total,
        )
    ]


async def sql(bench: Bench, largest: float) -> list[Curve]:
    """Questions by how many events, and versions of keys, there are; 40 files at most."""
    most = int(ROWS[-1] * largest)
    chosen = [number for number in ROWS[1:] if number <= max(most, ROWS[2])]
    directory = bench.directory("sql") / "lake"
    found: dict[str, list[Point]] = {}
    present = 0
    with Lake.open(directory, create=True) as lake:
        for number in chosen:
            tables: tuple[tuple[Table, Group], ...] = (("events", event_rows), ("key_versions", version_rows))
            for table, make in tables:
                await asyncio.to_thread(
                    append_rows,
                    lake,
                    table,
                    make,
                    first=present,
                    rows=number - present,
                    files=max(4, 40 * (number - present) // chosen[-1]),
                    total=chosen[-1],
                )
            present = number
            for name, point in await _questions(bench, directory, number, is_last=number == chosen[-1]):
                found.setdefault(name, []).append(point)
    return [
        curve(
            name,
            f"{what}, from the statement to its rows",
            x_name="rows",
            points=found[name],
            raw_what="DuckDB alone over the same files",
            concurrency=1,
        )
        for name, what in QUESTIONS.items()
    ]


QUESTIONS: Final = {
    "sql_key_history": "the versions of a key",
    "sql_session": "the events of a session, in order",
    "sql_tree": "the tree below an event, by recursion",
    "sql_agent_hour": "events of each agent in each hour",
}
_HISTORY: Final = "SELECT version, ref, stored_at FROM {versions} WHERE key = ? ORDER BY version"
_SESSION: Final = "SELECT event_id, name, data FROM {events} WHERE session_id = ? ORDER BY stream_seq"
_TREE: Final = """
WITH RECURSIVE links AS MATERIALIZED (
    SELECT event_id, parent_event_id FROM {events} WHERE correlation_id = ?
), below AS (
    SELECT CAST(? AS UUID) AS event_id
    UNION ALL SELECT links.event_id FROM below JOIN links ON links.parent_event_id = below.event_id
) SELECT count(*) FROM below
"""


async def _questions(bench: Bench, directory: Path, rows: int, *, is_last: bool) -> list[tuple[str, Point]]:
    source = random.Random(rows)
    sources = {
        "events": _files(directory, "events"),
        "versions": _files(directory, "key_versions"),
    }
    views = {"events": "events", "versions": "key_versions"}
    points: list[tuple[str, Point]] = []
    with connect_lake(directory, compare=False) as lake, duckdb.connect() as duck:
        duck.execute("SET parquet_metadata_cache = true")

        def arguments(name: str) -> list[str]:
            session = source.randrange(rows // 11_000 * 200 or 200)
            if name == "sql_key_history":
                return [key_name(source.randrange(rows // 100_000 * 1_000 or 1_000))]
            if name == "sql_session":
                return [session_name(session)]
            return [session_name(session), root_of(session)] if name == "sql_tree" else []

        queries = {
            "sql_key_history": _HISTORY,
            "sql_session": _SESSION,
            "sql_tree": _TREE,
            "sql_agent_hour": AGENT_HOUR.format(source="{events}"),
        }
        for name, query in queries.items():
            ours, bare = query.format(**views), query.format(**sources)

            def ask_ours(ours: str = ours, name: str = name) -> Any:
                return lake.execute(ours, arguments(name)).fetchall()

            def ask_raw(bare: str = bare, name: str = name) -> Any:
                return duck.execute(bare, arguments(name)).fetchall()

            ask_ours()
            ask_raw()
            calls = bench.scale(5 if name == "sql_agent_hour" else 20, 2)
            sides = [Side("", asked(ask_ours)), Side("DuckDB alone over the same files", asked(ask_raw))]
            results = await measure(sides, bench.budget, kind="latency", count=calls, least=1, most=1)
            if is_last:
                figure = Figure(
                    name=f"{name}_10m",
                    what=QUESTIONS[name],
                    kind="latency",
                    durability="durable",
                    parameters={"payload_bytes": 30, "concurrency": 1, "rows": rows},
                )
                bench.add(figure, results[0], results[1])
            memory = Processes({"client": os.getpid()}).memory_mb()
            points.append(
                (
                    name,
                    Point(
                        x=rows,
                        cost=results[0].value,
                        values=results[0].values,
                        p50_ms=results[0].p50_ms,
                        p99_ms=results[0].p99_ms,
                        raw=results[1].value,
                        memory_mb=memory,
                    ),
                )
            )
    return points


def _files(directory: Path, table: str) -> str:
    paths = sorted(map(str, directory.glob(f"{table}/day=*/*.parquet")))
    return f"read_parquet({paths}, hive_partitioning = false)"


@asynccontextmanager
async def _resolver(
    bench: Bench, directory: Path, lake: Lake
) -> AsyncGenerator[tuple[BenchServer, Holdfast, Processes]]:
    """An empty server, a resolver over the lake, and a client; the index is brought up to the lake before."""

    def refresh() -> None:
        with LakeIndex.open(directory / "index") as index:
            index.refresh(lake)

    await asyncio.to_thread(refresh)
    arguments = ("--lake", str(directory / "lake"), "--index", str(directory / "index"))
    async with (
        bench.server() as server,
        child("benchmarks.responder", "--url", server.url, *arguments) as responder,
        server.connect(cache_bytes=0) as hf,
    ):
        await responder.ask()
        yield server, hf, Processes({"server": server.pid, "resolver": responder.pid, "client": os.getpid()})


async def _resolve_point(
    bench: Bench, x: int, hf: Holdfast, made: ContextRows, directory: Path, processes: Processes
) -> Point:
    refs = list(made.spread)
    random.Random(x).shuffle(refs)
    source = iter(refs)
    raw = _reads_of_row_groups(directory, x)
    calls = min(bench.scale(RESOLVES, 20), len(refs) // (bench.budget.runs + 1))
    # The first ones open files and fill caches of pages and footers.
    for ref in islice(source, calls):
        await hf.resolve(ref)
    return await cost_at(
        bench,
        x,
        load(lambda number: list(islice(source, number)), hf.resolve),
        raw,
        processes,
        count=calls,
    )


def _reads_of_row_groups(directory: Path, seed: int) -> Runner:
    """The raw limit: row groups at random, out of up to a hundred open files."""
    paths = sorted((directory / "lake" / "contexts").glob("day=*/*.parquet"))
    opened = [pq.ParquetFile(path, pre_buffer=False) for path in paths[:: max(1, len(paths) // 100)]]
    groups = [(file, group) for file in opened for group in range(file.metadata.num_row_groups)]
    source = random.Random(seed)

    async def read(group: tuple[Any, int]) -> None:
        group[0].read_row_group(group[1], use_threads=False)

    return load(lambda number: source.choices(groups, k=number), read)


async def _last_figures(bench: Bench, hf: Holdfast, made: ContextRows, directory: Path, rows: int, files: int) -> None:
    """The targets of the largest lake: one at random, and a thousand neighbours in one call."""
    refs = list(made.spread)
    random.Random(83).shuffle(refs)
    # From the other end than the points took them.
    singles = iter(refs[::-1])
    groups = iter(made.neighbours)
    runs = bench.budget.runs

    async def many(asked_for: Sequence[Any]) -> None:
        if len((await hf.resolve_many(asked_for)).found) != len(asked_for):
            raise RuntimeError("not everything was found")

    def take(number: int) -> list[Any]:
        return list(islice(singles, number))

    def take_many(number: int) -> list[Any]:
        return [group[:MANY] for group in islice(groups, number)]

    calls = min(bench.scale(RESOLVES, 20), len(refs) // (2 * runs))
    for name, what, ours, count in (
        ("cold_resolve_10m", "hf.resolve of an archived context, at random", load(take, hf.resolve), calls),
        ("cold_many_1000_10m", "hf.resolve_many of 1,000 neighbours", load(take_many, many), 3),
    ):
        count_there = min(count, max(1, len(made.neighbours) // runs)) if count == 3 else count
        sides = [Side("", ours), Side("pyarrow read of the row group", _reads_of_row_groups(directory, 84))]
        results = await measure(sides, bench.budget, kind="latency", count=count_there, least=1, most=1)
        parameters = {"payload_bytes": BODY_BYTES, "concurrency": 1, "rows": rows, "files": files}
        figure = Figure(name=name, what=what, kind="latency", durability="durable", parameters=parameters)
        bench.add(figure, results[0], results[1])
