"""A run is read, decoded and written in pieces, one ahead of the other: it is committed as one, or not at all."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from holdfast.client import connect
from holdfast.lake import Lake, LakeIndex
from holdfast.lake.lookup import Lookup
from holdfast.schemas.refs import parse_ref
from holdfast.streams.connection import open_connection
from holdfast.streams.hot import HotTier
from holdfast.workers import archive_intake
from holdfast.workers.archive_intake import Intake
from holdfast.workers.archive_run import Run
from holdfast.workers.archive_table import TableArchiver
from holdfast.workers.control import flush
from tests.running import dead_letters, eventually, own_server, running, settings_in, target_of
from tests.support import OwnServer, plain_client

pytestmark = pytest.mark.asyncio

PIECE = 10


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_intake, "PIECE_MESSAGES", PIECE)


@asynccontextmanager
async def archiver_of(server: OwnServer, folder: Path) -> AsyncGenerator[tuple[TableArchiver, Lake]]:
    lake = Lake.open(folder / "lake", create=True)
    with LakeIndex.open(folder / "index") as index, ThreadPoolExecutor(1) as executor:
        async with open_connection(target_of(server.url)) as connection:
            hot = HotTier(connection)
            archiver = TableArchiver(
                "contexts", connection=connection, hot=hot, lake=lake, index=index, executor=executor
            )
            yield archiver, lake
            await archiver.close()
            await hot.close()


async def test_repetitions_and_contradictions_are_found_across_the_pieces_of_a_run(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, archive_interval_s=3_600.0)
    async with own_server(tmp_path) as server, plain_client(server.url) as client:
        stream = client.jetstream()
        for number in range(5 * PIECE):
            await stream.publish("ctx.default.event.a.x", b'{"id": "e%d", "data": 1}' % number)
        await stream.publish("ctx.default.event.a.x", b'{"id": "e1", "data": 1}')
        await stream.publish("ctx.default.event.a.x", b'{"id": "e2", "data": 2}')
        async with running(server.url, settings, ["archiver"]) as workers, connect(server.url) as hf:
            await flush(hf.connection)
            counters = workers.counters()["archiver"]
            assert len(await dead_letters(hf)) == 1
    assert (counters["events_rows"], counters["events_repeated"], counters["events_dead"]) == (5 * PIECE, 1, 1)
    with Lake.open(settings.lake) as lake:
        assert lake.statistics("events").files == counters["events_cycles"]


async def test_a_cycle_takes_as_much_as_it_may_and_the_next_what_was_read_ahead(tmp_path: Path) -> None:
    async with own_server(tmp_path) as server, connect(server.url) as hf:
        await hf.put_many([{"n": n} for n in range(8 * PIECE)])
        async with archiver_of(server, tmp_path) as (archiver, lake):
            spans = [await archiver.cycle(limit=3 * PIECE + 5) for _ in range(4)]
            assert spans == [3 * PIECE + 5, 3 * PIECE + 5, PIECE, 0]
            await hf.put({"n": "later"})
            assert await archiver.cycle(limit=100, up_to=8 * PIECE + 1) == 1
            assert lake.statistics("contexts").rows == 8 * PIECE + 1


async def test_a_cancelled_cycle_leaves_nothing_behind_and_the_next_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with own_server(tmp_path) as server, connect(server.url) as hf:
        await hf.put_many([{"n": n} for n in range(5 * PIECE)])
        async with archiver_of(server, tmp_path) as (archiver, lake):
            loop = asyncio.get_running_loop()
            written = asyncio.Event()
            write = Run.write

            def tell(*arguments: Any) -> None:
                write(*arguments)
                loop.call_soon_threadsafe(written.set)

            monkeypatch.setattr(Run, "write", tell)
            cycle = asyncio.create_task(archiver.cycle(limit=100))
            await written.wait()
            cycle.cancel()
            await asyncio.gather(cycle, return_exceptions=True)
            assert cycle.cancelled()
            assert await archiver.watermark() is None
            assert list((tmp_path / "lake" / "contexts" / "_tmp").iterdir()) == []
            assert await archiver.cycle(limit=100) == 5 * PIECE
            assert lake.statistics("contexts").rows == 5 * PIECE


def lose_all_at_the_end_of_a_run(
    server: OwnServer, folder: Path, archiver: TableArchiver, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Has the server, whose empty store lies in ``copy``, lose everything when the archiver meets the stream's end, and
    producers go on: three pieces, of which the references come into the list, and a message that is no context."""
    store = folder / "nats"
    take = Intake.take
    stored: list[str] = []

    async def lose_the_tail_at_its_end(intake: Intake, **options: Any) -> Any:
        piece = await take(intake, **options)
        if piece is None and not stored:
            await server.kill()
            shutil.rmtree(store)
            shutil.move(folder / "copy", store)
            await server.start(with_streams=False)
            async with connect(server.url) as hf:
                stored.extend(await hf.put_many([{"n": n} for n in range(3 * PIECE)]))
            async with plain_client(server.url) as client:
                await client.jetstream().publish("$KV.ctx-hot.default.none", b"")
            await eventually(lambda: archiver._connection.reconnects == 1)
            piece = await take(intake, **options)
        return piece

    monkeypatch.setattr(Intake, "take", lose_the_tail_at_its_end)
    return stored


@pytest.mark.parametrize("archived", [0, 2 * PIECE])
async def test_a_run_is_never_made_of_what_a_stream_held_before_and_after_it_lost_its_tail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archived: int
) -> None:
    async with own_server(tmp_path) as server:
        await server.stop()
        shutil.copytree(tmp_path / "nats", tmp_path / "copy")
        await server.start(with_streams=False)
        async with archiver_of(server, tmp_path) as (archiver, lake):
            async with connect(server.url) as hf:
                await hf.put_many([{"archived": n} for n in range(archived)])
                assert await archiver.cycle(limit=100) == archived
                await hf.put_many([{"lost": n} for n in range(2 * PIECE - archived // 2)])
            stored = lose_all_at_the_end_of_a_run(server, tmp_path, archiver, monkeypatch)
            while await archiver.cycle(limit=100):
                pass
            digests = [parse_ref(ref).digest for ref in stored]
            archiver._index.refresh(lake)
            with Lookup(lake, archiver._index) as lookup:
                assert len(lookup.get_contexts(digests)) == 3 * PIECE
        async with connect(server.url) as hf:
            assert [letter.seq for letter in await dead_letters(hf)] == [3 * PIECE + 1]
