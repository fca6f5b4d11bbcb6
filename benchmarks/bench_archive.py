"""The archiver's way: from the stream to a fsynced commit of the lake, the look-up index included.

Measures rows a second of one stream of contexts (1,400 bytes of JSON each, compressed in the stream as ``put`` leaves
them) into a new lake, one commit for all of them, by the archiver's own cycle in this process: pull, decompress, check
each digest, look for repetitions and write Parquet, a piece ahead of the other; then fsync, commit, fsync, index.  Each
run reads the same messages.  Two raw limits: pyarrow writing the same rows, already in Arrow, with the same encodings
and row groups, and fsync; and plain nats-py pulling the same messages without looking at them.  Neither alone is
reachable: the archiver does both.

Does not measure: several streams at once, events, purging, compaction, a lake that holds something already.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow.parquet as pq

from benchmarks.archived import BODY_BYTES, archive_connection, archive_stream, store
from benchmarks.bench import Bench, Figure
from benchmarks.measure import Run, Side, timed
from benchmarks.raw_nats import pull_all
from holdfast.lake.columns import ROWS_PER_GROUP, arrow_schema, parquet_options
from holdfast.streams.wire import HOT_STREAM

if TYPE_CHECKING:
    from nats.aio.client import Client

    from holdfast.streams.connection import Connection

ROWS: Final = 50_000
FIGURES: Final = ("archive",)


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    if not bench.wants(*FIGURES):
        return
    rows = bench.scale(ROWS, 1_000)
    async with bench.server() as server, archive_connection(server) as connection:
        async with server.connect(cache_bytes=0) as hf:
            await store(hf, rows, seed=7)
        directory = bench.directory("archive")
        await archive_stream(connection, directory, rows_per_commit=rows)
        groups = _row_groups(directory / "lake" / "contexts")
        await bench.figure(
            Figure(
                name="archive",
                what="stream to fsynced and indexed commit",
                kind="rate",
                unit="rows/s",
                durability=server.durability,
                parameters={"payload_bytes": BODY_BYTES, "concurrency": 1, "rows_in_a_commit": rows},
                count=rows,
            ),
            Side("", partial(_archive, bench, connection)),
            Side("pyarrow write of the same Arrow rows and fsync", partial(_write, groups, bench.directory("write"))),
            Side("plain nats-py pull of the same messages", partial(_pull, server.client), "pull"),
        )


async def _archive(bench: Bench, connection: Connection, count: int) -> Run:
    directory = bench.directory("archive")
    run = await timed(count, partial(archive_stream, connection, directory, rows_per_commit=count))
    shutil.rmtree(directory)
    return run


async def _write(groups: list[Any], directory: Path, count: int) -> Run:
    async def write() -> None:
        path = directory / "rows.parquet"
        with path.open("wb") as sink:
            with pq.ParquetWriter(sink, arrow_schema("contexts"), **parquet_options("contexts")) as writer:
                for group in groups:
                    writer.write_table(group, row_group_size=ROWS_PER_GROUP)
            sink.flush()
            os.fsync(sink.fileno())

    return await timed(count, write)


async def _pull(client: Client, count: int) -> Run:
    async def pull() -> None:
        messages = await pull_all(client, HOT_STREAM, count)
        if len(messages) != count:
            raise RuntimeError(f"{len(messages)} of {count} messages came")

    return await timed(count, pull)


def _row_groups(directory: Path) -> list[Any]:
    """The row groups of the files of a table, as Arrow tables with the schema that they were written with."""
    groups: list[Any] = []
    for path in sorted(directory.glob("day=*/*.parquet")):
        file = pq.ParquetFile(path)
        groups += [
            file.read_row_group(group).cast(arrow_schema("contexts")) for group in range(file.metadata.num_row_groups)
        ]
    return groups
