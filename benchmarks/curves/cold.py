"""Curves of the lake: a cold context by rows and by files, questions in SQL by rows.

The lakes are synthetic (:mod:`benchmarks.synthetic_lake`), of the product's own writer.  Contexts of 980 bytes are
resolved by the SDK, near cache off, through an empty server and a resolver in a process of its own, which finds
them in its index; no reference of a lake is asked for twice.  Raw limit: pyarrow reading the row group, in this
process, from a file whose footer it has.

Contexts lie as the archiver leaves them, 10,000 in a file: ten million in 1,000 files.  Events and versions of keys
are asked about once the product's compaction has been over them, some 40 files for ten million; the figures whose
names end in ``_1000_files`` are of the same rows before it.

Does not measure: files that are not in the page cache; each lake is read right after it was written.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pyarrow.parquet as pq

from benchmarks.bench import Bench, Figure
from benchmarks.children import child
from benchmarks.curves.curve import (
    PAGES,
    Curve,
    OnPoint,
    Point,
    Points,
    Processes,
    cost_at,
    curve,
    ignore_point,
    measure_sides,
    point_of,
    up_to,
)
from benchmarks.curves.questions import QUESTIONS, RAW, ask
from benchmarks.measure import Runner, Side, load
from benchmarks.synthetic_lake import BODY_BYTES, ContextRows, append_rows, event_rows, version_rows
from holdfast.lake.columns import ROWS_PER_GROUP
from holdfast.lake.compaction import compact
from holdfast.lake.index import LakeIndex
from holdfast.lake.lake import Lake

if TYPE_CHECKING:
    from benchmarks.synthetic_lake import Group
    from holdfast.client import Holdfast
    from holdfast.schemas.refs import Ref
    from holdfast.schemas.rows import Table

ROWS: Final = (10_000, 100_000, 1_000_000, 10_000_000)
FILES: Final = (10, 100, 1_000)
ROWS_A_FILE: Final = 10_000
ROWS_BY_FILES: Final = 1_000_000
RESOLVES: Final = 500
"""Of a run."""
MANY: Final = 1_000
CALLS_OF_MANY: Final = 10
"""Of a run."""
_RAW: Final = "pyarrow read of the row group"
_KEPT_WHOLE: Final = 10
"""One row group of so many is left to calls for neighbours."""
_SHARE_BEFORE_COMPACTION: Final = 0.25
"""Of the calls: over a thousand files questions take long, and no target is judged by them."""


class Unread:
    """Hands out references of a growing lake, each once: chosen at random, or a thousand neighbours.

    Neighbours are of row groups of which no single reference is handed out.
    """

    def __init__(self, ref_of: Callable[[int], Ref], seed: int, group_rows: int) -> None:
        self._ref_of = ref_of
        self._random = random.Random(seed)
        self._group_rows = group_rows
        self._taken: set[int] = set()
        self.rows = 0
        """How many contexts the lake has by now."""

    def calls(self, wanted: int, runs: int) -> int:
        """Returns how many calls a run may have: less than wanted where the lake is small."""
        # Warming up takes one share, the figures of the last point as many as its own runs; half is left.
        return max(1, min(wanted, self.rows // (4 * (runs + 1))))

    def singles(self, number: int) -> list[Ref]:
        """Returns references from all over the lake."""
        found: list[Ref] = []
        while len(found) < number:
            chosen = self._random.randrange(self.rows)
            is_kept = chosen // self._group_rows % _KEPT_WHOLE == _KEPT_WHOLE - 1
            if chosen not in self._taken and not is_kept:
                self._taken.add(chosen)
                found.append(self._ref_of(chosen))
        return found

    def groups_of_neighbours(self) -> list[int]:
        """Returns the first numbers of the row groups kept for neighbours, in random order."""
        step = self._group_rows * _KEPT_WHOLE
        starts = list(range(step - self._group_rows, self.rows - self._group_rows + 1, step))
        self._random.shuffle(starts)
        return starts

    def neighbours(self, start: int) -> list[Ref]:
        """Returns ``MANY`` references from a row group's first on."""
        return [self._ref_of(number) for number in range(start, start + min(MANY, self._group_rows))]


async def rows(bench: Bench, largest: float, on_point: OnPoint = ignore_point) -> list[Curve]:
    """A cold resolve by how many contexts the lake has, 10,000 in a file; the figures of the last point too."""
    points = Points("cold_resolve_rows", on_point)
    chosen = up_to(_scaled(bench, ROWS), largest)
    made = await asyncio.to_thread(ContextRows, 81)
    unread = Unread(made.ref, 83, bench.scale(ROWS_PER_GROUP, 20))
    rate = 0.0
    async with _lake(bench, "rows") as lake:
        for number in chosen:
            began = time.perf_counter()
            new = number - unread.rows
            await _append(lake, "contexts", made, unread.rows, new, max(1, new // ROWS_A_FILE), chosen[-1])
            rate = new / (time.perf_counter() - began)
            unread.rows = number
            async with _resolver(bench, lake) as (hf, processes):
                points.add(await _resolve_point(bench, number, hf, unread, lake, processes))
                if number == chosen[-1]:
                    await _last_figures(bench, hf, unread, lake)
    return [
        curve(
            points.name,
            "hf.resolve of an archived context",
            x_name="contexts in the lake",
            points=points.measured,
            raw_what=_RAW,
            payload_bytes=BODY_BYTES,
            concurrency=1,
            rows_a_file=ROWS_A_FILE,
            pages=PAGES,
            made_rows_per_s=round(rate),
        )
    ]


async def files(bench: Bench, largest: float, on_point: OnPoint = ignore_point) -> list[Curve]:
    """The same by how many files as many contexts are in."""
    points = Points("cold_resolve_files", on_point)
    total = max(bench.scale(10_000, 1_000), int(ROWS_BY_FILES * largest))
    made = await asyncio.to_thread(ContextRows, 82)
    for number in FILES[: bench.scale(len(FILES), 2)]:
        async with _lake(bench, "files") as lake:
            await _append(lake, "contexts", made, 0, total, number, total)
            unread = Unread(made.ref, number, bench.scale(ROWS_PER_GROUP, 20))
            unread.rows = total
            async with _resolver(bench, lake) as (hf, processes):
                points.add(await _resolve_point(bench, number, hf, unread, lake, processes))
    return [
        curve(
            points.name,
            "hf.resolve of an archived context",
            x_name="files of the lake",
            points=points.measured,
            raw_what=_RAW,
            payload_bytes=BODY_BYTES,
            concurrency=1,
            rows=total,
            pages=PAGES,
        )
    ]


async def sql(bench: Bench, largest: float, on_point: OnPoint = ignore_point) -> list[Curve]:
    """Questions by how many events, and versions of keys, there are, after compaction; the figures of the last point
    too, and before compaction."""
    chosen = up_to(_scaled(bench, ROWS[1:]), largest)
    points = {question.name: Points(question.name, on_point) for question in QUESTIONS}
    tables: tuple[tuple[Table, Group], ...] = (("events", event_rows), ("key_versions", version_rows))
    client = Processes({"client": os.getpid()})
    present = 0
    async with _lake(bench, "sql") as lake:
        for number in chosen:
            for table, make in tables:
                # What compaction left of the rows before is counted in: so many files in all.
                new_files = max(1, number // bench.scale(ROWS_A_FILE, 1_000) - len(lake.files(table)))
                await _append(lake, table, make, present, number - present, new_files, chosen[-1])
            present = number
            if number == chosen[-1]:
                for answer in await ask(bench, lake, number, share_of_calls=_SHARE_BEFORE_COMPACTION):
                    name = f"{answer.question.name}_10m_1000_files"
                    bench.add(answer.figure(name, number, is_compacted=False), answer.ours.result, answer.raw.result)
            await asyncio.to_thread(compact, lake, tables=[table for table, _ in tables])
            for answer in await ask(bench, lake, number):
                measured = [answer.ours, answer.raw]
                points[answer.question.name].add(point_of(number, measured, client, files=answer.files))
                if number == chosen[-1]:
                    name = f"{answer.question.name}_10m"
                    bench.add(answer.figure(name, number, is_compacted=True), answer.ours.result, answer.raw.result)
    return [
        curve(
            question.name,
            f"{question.what}, from the statement to its rows",
            x_name="rows",
            points=points[question.name].measured,
            raw_what=RAW,
            concurrency=1,
            compacted=True,
            pages=PAGES,
        )
        for question in QUESTIONS
    ]


def _scaled(bench: Bench, xs: Sequence[int]) -> list[int]:
    return [bench.scale(x, x // 100) for x in xs]


@asynccontextmanager
async def _lake(bench: Bench, name: str) -> AsyncGenerator[Lake]:
    """Makes an empty lake; removes it and what is beside it, so that one run needs the disk of its largest."""
    directory = bench.directory(name)
    try:
        with Lake.open(directory / "lake", create=True) as lake:
            yield lake
    finally:
        await asyncio.to_thread(shutil.rmtree, directory)


async def _append(lake: Lake, table: Table, make: Group, first: int, rows: int, files: int, total: int) -> None:
    await asyncio.to_thread(append_rows, lake, table, make, first=first, rows=rows, files=files, total=total)


@asynccontextmanager
async def _resolver(bench: Bench, lake: Lake) -> AsyncGenerator[tuple[Holdfast, Processes]]:
    """An empty server, a resolver over the lake, and a client; the index is brought up to the lake before."""
    index_path = lake.path.parent / "index"

    def refresh() -> None:
        with LakeIndex.open(index_path) as index:
            index.refresh(lake)

    await asyncio.to_thread(refresh)
    arguments = ("--lake", str(lake.path), "--index", str(index_path))
    async with (
        bench.server() as server,
        child("benchmarks.responder", "--url", server.url, *arguments) as responder,
        server.connect(cache_bytes=0) as hf,
    ):
        await responder.ask()
        yield hf, Processes({"server": server.pid, "resolver": responder.pid, "client": os.getpid()})


async def _resolve_point(bench: Bench, x: int, hf: Holdfast, unread: Unread, lake: Lake, processes: Processes) -> Point:
    calls = unread.calls(bench.scale(RESOLVES, 20), bench.budget.runs)
    # The first ones open files and fill caches of footers.
    for ref in unread.singles(calls):
        await hf.resolve(ref)
    return await cost_at(
        bench,
        x,
        load(unread.singles, hf.resolve),
        _reads_of_row_groups(lake, x),
        processes,
        count=calls,
        files=len(lake.files("contexts")),
    )


def _reads_of_row_groups(lake: Lake, seed: int) -> Runner:
    """The raw limit: row groups at random, out of up to a hundred open files."""
    paths = sorted(lake.path / "contexts" / entry.path for entry in lake.files("contexts"))
    opened = [pq.ParquetFile(path, pre_buffer=False) for path in paths[:: max(1, len(paths) // 100)]]
    groups = [(file, group) for file in opened for group in range(file.metadata.num_row_groups)]
    source = random.Random(seed)

    async def read(group: tuple[Any, int]) -> None:
        group[0].read_row_group(group[1], use_threads=False)

    return load(lambda number: source.choices(groups, k=number), read)


async def _last_figures(bench: Bench, hf: Holdfast, unread: Unread, lake: Lake) -> None:
    """The targets of the largest lake: one at random, and a thousand neighbours in one call."""
    runs = bench.budget.runs
    starts = iter(unread.groups_of_neighbours())

    async def many(refs: Sequence[Ref]) -> None:
        if len((await hf.resolve_many(refs)).found) != len(refs):
            raise RuntimeError("not everything was found")

    def take_many(number: int) -> list[list[Ref]]:
        return [unread.neighbours(next(starts)) for _ in range(number)]

    calls = unread.calls(bench.scale(RESOLVES, 20), runs)
    calls_of_many = max(1, min(CALLS_OF_MANY, len(unread.groups_of_neighbours()) // runs))
    for name, what, ours, count in (
        ("cold_resolve_10m", "hf.resolve of an archived context, at random", load(unread.singles, hf.resolve), calls),
        ("cold_many_1000_10m", "hf.resolve_many of 1,000 neighbours", load(take_many, many), calls_of_many),
    ):
        sides = [Side("", ours), Side(_RAW, _reads_of_row_groups(lake, 84))]
        measured = await measure_sides(bench, sides, kind="latency", count=count)
        parameters = {
            "payload_bytes": BODY_BYTES,
            "concurrency": 1,
            "rows": unread.rows,
            "files": len(lake.files("contexts")),
            "compacted": False,
            "pages": PAGES,
            "calls": measured[0].calls,
        }
        figure = Figure(name=name, what=what, kind="latency", durability="durable", parameters=parameters)
        bench.add(figure, measured[0].result, measured[1].result)
