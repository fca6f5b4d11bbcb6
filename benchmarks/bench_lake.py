"""Contexts that have left the hot tier, resolved by the SDK from the lake.

Measures one cold resolve after the other at random, 1,000 references that were stored one after the other in one call,
and 1,000 at random in one call; each from the SDK (near cache off) through the server to the resolver, a process of its
own, and back; every body (1,400 bytes) hashed again twice, by the resolver and by the SDK.  No reference is asked for
twice, since the resolver caches.  The raw limit is pyarrow in this process reading the very row groups that hold the
rows, all columns, from files that it has open; it finds no row, makes no Python object and sends nothing.

Does not measure: files that are not in the page cache, millions of rows, thousands of files (see the growth curves).
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import pyarrow.parquet as pq

from benchmarks.archived import BODY_BYTES, archive_connection, archive_stream, store
from benchmarks.bench import Bench, Figure
from benchmarks.children import child
from benchmarks.measure import Runner, Side, load
from holdfast.streams.topology import purge_below
from holdfast.streams.wire import HOT_STREAM

if TYPE_CHECKING:
    from holdfast.client import Holdfast
    from holdfast.schemas.refs import Ref

T = TypeVar("T")

ROWS: Final = 40_000
ROWS_PER_COMMIT: Final = 5_000
MANY: Final = 1_000
CALLS: Final = 3
"""Calls of 1,000 in a run: with 3 runs 9,000 references each, clustered and at random."""

FIGURES: Final = ("lake_resolve", "lake_many_1000_clustered", "lake_many_1000_random")


class Place(NamedTuple):
    """Where a row is."""

    path: Path
    group: int


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    if not bench.wants(*FIGURES):
        return
    rows = bench.scale(ROWS, 2_400)
    directory = bench.directory("lake")
    async with bench.server() as server:
        async with server.connect(cache_bytes=0) as hf:
            refs = await store(hf, rows, seed=8)
        async with archive_connection(server) as connection:
            await archive_stream(connection, directory, rows_per_commit=min(ROWS_PER_COMMIT, rows // 2))
            await purge_below(connection, HOT_STREAM, rows + 1)
        arguments = ("--url", server.url, "--lake", str(directory / "lake"))
        async with (
            child("benchmarks.responder", *arguments, "--index", str(directory / "index")) as responder,
            server.connect(cache_bytes=0) as hf,
        ):
            await responder.ask()
            await _figures(bench, hf, refs, directory / "lake" / "contexts")


async def _figures(bench: Bench, hf: Holdfast, refs: list[Ref], table: Path) -> None:
    files = {path: pq.ParquetFile(path, pre_buffer=False) for path in sorted(table.glob("day=*/*.parquet"))}
    places = _places(files)
    many = bench.scale(MANY, 100)
    calls = bench.scale(CALLS, 1)
    # One part for each figure, so that no reference is asked for twice.
    reserved = 4 * calls * many
    runs = [refs[start : start + many] for start in range(0, reserved, many)]
    rest = refs[reserved:]
    random.Random(9).shuffle(rest)
    groups_of_many = [rest[start : start + many] for start in range(0, reserved, many)]
    singles = rest[reserved:]

    async def read(asked: Sequence[Ref]) -> None:
        for path, group in sorted({places[ref] for ref in asked}):
            files[path].read_row_group(group, use_threads=False)

    async def read_one(ref: Ref) -> None:
        await read([ref])

    async def resolve_many(asked: Sequence[Ref]) -> None:
        found = (await hf.resolve_many(asked)).found
        if len(found) != len(asked) or any(context.tier != "lake" for context in found.values()):
            raise RuntimeError("not everything came from the lake")

    parameters: dict[str, Any] = {
        "payload_bytes": BODY_BYTES,
        "concurrency": 1,
        "rows": len(refs),
        "files": len(files),
        "row_groups": sum(file.metadata.num_row_groups for file in files.values()),
    }
    await bench.figure(
        Figure(
            name="lake_resolve",
            what="hf.resolve, one after the other, at random",
            kind="latency",
            durability="durable",
            parameters=parameters,
            count=min(bench.scale(400, 20), len(singles) // bench.budget.runs),
        ),
        Side("", _each(singles, hf.resolve)),
        Side("pyarrow read of the row group", _each(singles, read_one)),
    )
    for name, groups in (("clustered", runs), ("random", groups_of_many)):
        await bench.figure(
            Figure(
                name=f"lake_many_1000_{name}",
                what=f"hf.resolve_many of 1,000, {name}",
                kind="latency",
                durability="durable",
                parameters={**parameters, "in_a_call": many},
                count=calls,
            ),
            Side("", _each(groups, resolve_many)),
            Side("pyarrow read of the row groups", _each(groups, read)),
        )


def _each(items: Sequence[T], call: Callable[[T], Awaitable[object]]) -> Runner:
    """Each run takes the next items; none is taken twice."""
    source = iter(items)
    return load(lambda number: list(islice(source, number)), call)


def _places(files: dict[Path, Any]) -> dict[str, Place]:
    return {
        ref: Place(path, group)
        for path, file in files.items()
        for group in range(file.metadata.num_row_groups)
        for ref in file.read_row_group(group, columns=["ref"]).column("ref").to_pylist()
    }
