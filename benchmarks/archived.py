"""What is in a stream and its way into a lake, for the benchmarks of the archive and of the lake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.bench import BenchServer, target_of
from benchmarks.payloads import Bodies
from holdfast.lake.index import LakeIndex
from holdfast.lake.lake import Lake
from holdfast.streams.connection import open_connection
from holdfast.streams.hot import HotTier
from holdfast.workers.archive_table import TableArchiver

if TYPE_CHECKING:
    from holdfast.client import Holdfast
    from holdfast.schemas.refs import Ref
    from holdfast.schemas.rows import Table
    from holdfast.streams.connection import Connection

BODY_BYTES: Final = 1_400
_WINDOW: Final = 2_000


async def store(hf: Holdfast, number: int, *, seed: int) -> list[Ref]:
    """Stores different contexts of ``BODY_BYTES`` and returns their references in stream order."""
    bodies = Bodies(seed)
    refs: list[Ref] = []
    while len(refs) < number:
        refs += await hf.put_many(bodies.take(min(_WINDOW, number - len(refs)), BODY_BYTES))
    return refs


@asynccontextmanager
async def archive_connection(server: BenchServer) -> AsyncGenerator[Connection]:
    """A connection such as the archiver has."""
    async with open_connection(target_of(server.url), name="bench-archiver") as connection:
        yield connection


async def archive_stream(
    connection: Connection, directory: Path, *, rows_per_commit: int, table: Table = "contexts"
) -> None:
    """Archives the stream of a table into a new lake, as the archiver does, and brings the look-up index up to it.

    Returns when the last commit is fsynced and indexed.
    """
    lake = await asyncio.to_thread(lambda: Lake.open(directory / "lake", create=True))
    index = await asyncio.to_thread(lambda: LakeIndex.open(directory / "index"))
    hot = HotTier(connection)
    with ThreadPoolExecutor(1) as executor:
        archiver = TableArchiver(table, connection=connection, hot=hot, lake=lake, index=index, executor=executor)
        try:
            while await archiver.cycle(limit=rows_per_commit):
                pass
            await asyncio.to_thread(index.refresh, lake)
        finally:
            await archiver.close()
            await hot.close()
            index.close()
            lake.close()
