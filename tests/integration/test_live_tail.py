"""The live tail from a thread: what the streams hold beyond a position, kept and kept up."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from holdfast.client import connect
from holdfast.schemas.errors import ConfigurationError, HoldfastError, UnavailableError
from holdfast.schemas.rows import ContextRow, EventRow, Position, TailSnapshot
from holdfast.streams import tail as tail_module
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.tail import ResidentTail, StreamTail, open_tail
from holdfast.streams.topology import StreamInfo, ensure_topology, purge_below, stream_info
from holdfast.streams.wire import EVENTS_STREAM
from tests.support import LIMIT_S, OwnServer, hpub, plain_client, raw_publish

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest_asyncio.fixture
async def link(own_server: OwnServer) -> AsyncIterator[Connection]:
    async with open_connection(own_server.url) as connection:
        yield connection


async def emit(url: str, start: int, count: int) -> None:
    async with connect(url, agent="a") as hf:
        for i in range(start, start + count):
            await hf.emit("e", i)


async def epoch_of(connection: Connection) -> str:
    return (await stream_info(connection, EVENTS_STREAM)).epoch


def data_of(snapshot: TailSnapshot) -> list[int]:
    return [int(row.data or b"-1") for row in snapshot.rows if isinstance(row, EventRow)]


class TestResidentTail:
    async def test_an_empty_stream_has_no_rows(self, link: Connection) -> None:
        snapshot = await ResidentTail(link, "events").read(None)
        assert (snapshot.rows, snapshot.last_seq) == ([], 0)
        assert snapshot.epoch == await epoch_of(link)

    async def test_without_a_position_everything_is_beyond(self, link: Connection, own_server: OwnServer) -> None:
        await emit(own_server.url, 0, 5)
        tail = ResidentTail(link, "events")
        assert data_of(await tail.read(None)) == [0, 1, 2, 3, 4]
        await tail.close()

    async def test_reading_again_brings_what_is_new_and_forgets_what_is_archived(
        self, link: Connection, own_server: OwnServer
    ) -> None:
        tail, epoch = ResidentTail(link, "events"), await epoch_of(link)
        await emit(own_server.url, 0, 5)
        assert data_of(await tail.read(Position(epoch, 0))) == [0, 1, 2, 3, 4]
        await emit(own_server.url, 5, 5)
        assert data_of(await tail.read(Position(epoch, 0))) == list(range(10))
        assert data_of(await tail.read(Position(epoch, 7))) == [7, 8, 9]
        assert len(tail._rows) == 3
        assert data_of(await tail.read(Position(epoch, 10))) == []
        assert (tail._rows, tail._bytes) == ([], 0)
        await tail.close()

    async def test_a_purge_between_the_look_and_the_reading_is_told(
        self, link: Connection, own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Otherwise rows that were archived and purged just then would be in neither half of the live view."""
        tail, epoch = ResidentTail(link, "events"), await epoch_of(link)
        await emit(own_server.url, 0, 4)
        assert data_of(await tail.read(Position(epoch, 0))) == [0, 1, 2, 3]
        await emit(own_server.url, 4, 4)

        async def look_then_lose(connection: Connection, name: str) -> StreamInfo:
            info = await stream_info(connection, name)
            await purge_below(connection, name, 7)
            return info

        monkeypatch.setattr(tail_module, "stream_info", look_then_lose)
        snapshot = await tail.read(Position(epoch, 4))
        assert data_of(snapshot) == [6, 7]
        assert snapshot.first_seq == 7  # beyond the position + 1: the caller begins anew, with what the lake has now
        assert data_of(await tail.read(Position(epoch, 6))) == [6, 7]
        await tail.close()

    async def test_a_position_further_back_is_read_again(self, link: Connection, own_server: OwnServer) -> None:
        tail, epoch = ResidentTail(link, "events"), await epoch_of(link)
        await emit(own_server.url, 0, 6)
        assert data_of(await tail.read(Position(epoch, 4))) == [4, 5]
        assert data_of(await tail.read(Position(epoch, 2))) == [2, 3, 4, 5]
        assert data_of(await tail.read(None)) == [0, 1, 2, 3, 4, 5]
        await tail.close()

    async def test_a_purge_up_to_the_position_changes_nothing(self, link: Connection, own_server: OwnServer) -> None:
        tail, epoch = ResidentTail(link, "events"), await epoch_of(link)
        await emit(own_server.url, 0, 6)
        await link.api(f"STREAM.PURGE.{EVENTS_STREAM}", {"seq": 4})
        assert data_of(await tail.read(Position(epoch, 3))) == [3, 4, 5]
        await link.api(f"STREAM.PURGE.{EVENTS_STREAM}")
        snapshot = await tail.read(Position(epoch, 6))
        assert (snapshot.rows, snapshot.first_seq, snapshot.last_seq) == ([], 7, 6)
        await tail.close()

    @pytest.mark.parametrize("purge", [{"seq": 5}, {}], ids=["in part", "whole"])
    async def test_a_purge_beyond_the_position_is_told_by_the_first_sequence(
        self, link: Connection, own_server: OwnServer, purge: dict[str, int]
    ) -> None:
        """The reader then knows that the lake has a newer watermark, and starts anew."""
        tail, epoch = ResidentTail(link, "events"), await epoch_of(link)
        await emit(own_server.url, 0, 6)
        await link.api(f"STREAM.PURGE.{EVENTS_STREAM}", purge)
        snapshot = await tail.read(Position(epoch, 2))
        assert snapshot.rows == []
        assert snapshot.first_seq > 2 + 1
        await tail.close()

    async def test_an_epoch_change_makes_everything_new(self, link: Connection, own_server: OwnServer) -> None:
        tail, epoch = ResidentTail(link, "events"), await epoch_of(link)
        await emit(own_server.url, 0, 6)
        assert data_of(await tail.read(Position(epoch, 3))) == [3, 4, 5]
        await link.api(f"STREAM.DELETE.{EVENTS_STREAM}")
        await ensure_topology(link)
        await emit(own_server.url, 10, 2)
        snapshot = await tail.read(Position(epoch, 3))
        assert data_of(snapshot) == [10, 11]
        assert snapshot.epoch == await epoch_of(link) != epoch
        assert data_of(await tail.read(Position(snapshot.epoch, 1))) == [11]
        await tail.close()

    async def test_what_is_no_row_is_left_out(self, link: Connection, own_server: OwnServer) -> None:
        await emit(own_server.url, 0, 1)
        async with plain_client(own_server.url) as client:
            for payload in (b"not json", b"[1]", b'{"event_depth":"x"}', b""):
                await client.jetstream().publish("ctx.default.event.a.e", payload)
        await raw_publish(own_server.url, hpub(b"ctx.\xff.event.a.e", b"NATS/1.0"))
        await emit(own_server.url, 1, 1)
        tail = ResidentTail(link, "events")
        snapshot = await tail.read(None)
        assert (data_of(snapshot), snapshot.last_seq) == ([0, 1], 7)
        await tail.close()

    async def test_too_much_that_is_not_archived_is_told_and_not_kept(
        self, link: Connection, own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tail_module, "MAX_ROWS", 3)
        await emit(own_server.url, 0, 5)
        tail, epoch = ResidentTail(link, "events"), await epoch_of(link)
        with pytest.raises(UnavailableError, match="not archived"):
            await tail.read(None)
        assert tail._rows == []
        assert data_of(await tail.read(Position(epoch, 2))) == [2, 3, 4]
        await tail.close()

    async def test_an_interrupted_read_loses_no_row(self, link: Connection, own_server: OwnServer) -> None:
        await emit(own_server.url, 0, 20)
        tail = ResidentTail(link, "events")
        for turns in (1, 3, 10, 30):
            reading = asyncio.ensure_future(tail.read(None))
            for _ in range(turns):
                await asyncio.sleep(0)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        assert data_of(await tail.read(None)) == list(range(20))
        await tail.close()

    async def test_readers_at_once_each_get_the_whole(self, link: Connection, own_server: OwnServer) -> None:
        await emit(own_server.url, 0, 20)
        tail, epoch = ResidentTail(link, "events"), await epoch_of(link)
        snapshots = await asyncio.gather(*(tail.read(Position(epoch, i)) for i in range(20)))
        assert [data_of(snapshot) for snapshot in snapshots] == [list(range(i, 20)) for i in range(20)]
        await tail.close()

    async def test_contexts_are_rows_too(self, link: Connection, own_server: OwnServer) -> None:
        async with connect(own_server.url) as hf:
            ref = await hf.put({"a": 1}, kind="note")
        tail = ResidentTail(link, "contexts")
        (row,) = (await tail.read(None)).rows
        assert isinstance(row, ContextRow)
        assert (row.ref, row.body, row.seq) == (ref, b'{"a":1}', 1)
        await tail.close()


class TestStreamTail:
    async def test_plain_calls_from_several_threads(self, own_server: OwnServer, link: Connection) -> None:
        await emit(own_server.url, 0, 10)
        epoch = await epoch_of(link)
        tail = await asyncio.to_thread(open_tail, own_server.url)
        try:
            reads = [asyncio.to_thread(tail.read, "events", Position(epoch, i)) for i in range(10)]
            snapshots = await asyncio.gather(*reads)
            assert [data_of(snapshot) for snapshot in snapshots] == [list(range(i, 10)) for i in range(10)]
            assert (await asyncio.to_thread(tail.read, "contexts", None)).rows == []
            assert (await asyncio.to_thread(tail.read, "key_versions", None)).rows == []
        finally:
            await asyncio.to_thread(tail.close)

    async def test_a_restart_of_the_server_goes_unnoticed(self, own_server: OwnServer) -> None:
        await emit(own_server.url, 0, 5)
        tail = await asyncio.to_thread(open_tail, own_server.url)
        try:
            assert data_of(await asyncio.to_thread(tail.read, "events", None)) == [0, 1, 2, 3, 4]
            await own_server.restart()
            await emit(own_server.url, 5, 5)
            async with asyncio.timeout(LIMIT_S):
                assert data_of(await asyncio.to_thread(tail.read, "events", None)) == list(range(10))
        finally:
            await asyncio.to_thread(tail.close)

    async def test_closing_ends_the_thread_and_further_reads(self, own_server: OwnServer) -> None:
        tail = await asyncio.to_thread(open_tail, own_server.url)
        for _ in range(2):
            await asyncio.to_thread(tail.close)
        assert [thread for thread in threading.enumerate() if thread.name == "holdfast-tail"] == []
        with pytest.raises(UnavailableError, match="closed"):
            await asyncio.to_thread(tail.read, "events", None)

    async def test_no_server_is_told_and_leaves_no_thread(self) -> None:
        with pytest.raises(UnavailableError):
            await asyncio.to_thread(open_tail, "nats://127.0.0.1:1")
        with pytest.raises(ConfigurationError):
            await asyncio.to_thread(open_tail, "http://127.0.0.1:1")
        assert [thread for thread in threading.enumerate() if thread.name == "holdfast-tail"] == []

    async def test_a_server_without_streams_is_told(self, own_server: OwnServer, link: Connection) -> None:
        await link.api(f"STREAM.DELETE.{EVENTS_STREAM}")
        tail = await asyncio.to_thread(StreamTail, own_server.url)
        try:
            with pytest.raises(HoldfastError, match="does not exist"):
                await asyncio.to_thread(tail.read, "events", None)
        finally:
            await asyncio.to_thread(tail.close)
