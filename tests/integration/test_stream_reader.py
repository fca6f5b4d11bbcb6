"""Reading a stream by sequence: contiguous, gaps noticed, nothing skipped after an error."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from holdfast.schemas import limits
from holdfast.schemas.errors import GapError, RetryError
from holdfast.streams import pull as pull_module
from holdfast.streams.committer import Committer
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.leader import message_at_leader
from holdfast.streams.publish import Outgoing
from holdfast.streams.pull import StreamReader
from holdfast.streams.topology import ensure_topology, stream_info
from holdfast.streams.wire import EVENTS_STREAM, H_MSG_ID
from tests.running import eventually
from tests.support import LIMIT_S, OwnServer, hpub, plain_client, raw_publish

if TYPE_CHECKING:
    from holdfast.streams.messages import StoredMessage


async def publish(connection: Connection, count: int, *, start: int = 0, size: int = 2) -> None:
    committer = Committer(connection)
    await committer.store_many(
        [Outgoing("ctx.n.event.a.b", {H_MSG_ID: f"n.{i}"}, b"%0*d" % (size, i)) for i in range(start, start + count)]
    )
    await committer.close()


async def stored(connection: Connection, count: int) -> None:
    """Waits for what was published without an acknowledgement."""

    async def is_stored() -> bool:
        return (await stream_info(connection, EVENTS_STREAM)).messages >= count

    await eventually(is_stored)


def seqs(messages: list[StoredMessage]) -> list[int]:
    return [message.seq for message in messages]


async def test_an_empty_stream_reads_as_nothing(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection:
        reader = StreamReader(connection, EVENTS_STREAM, 1)
        messages, info = await reader.read(limit=10)
        assert (messages, info.last_seq, reader.next_seq) == ([], 0, 1)
        await reader.close()


async def test_reads_go_on_where_the_last_one_ended(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection:
        await publish(connection, 250)
        reader = StreamReader(connection, EVENTS_STREAM, 1)
        read: list[int] = []
        for _ in range(4):
            messages, info = await reader.read(limit=80)
            read += seqs(messages)
            assert (info.first_seq, info.last_seq) == (1, 250)
        assert read == list(range(1, 251))
        assert (await reader.read(limit=80))[0] == []
        await publish(connection, 5, start=250)
        messages, _ = await reader.read(limit=80)
        assert seqs(messages) == list(range(251, 256))
        assert [message.payload for message in messages] == [b"%d" % i for i in range(250, 255)]
        assert {message.subject for message in messages} == {"ctx.n.event.a.b"}
        assert messages[0].headers[H_MSG_ID] == "n.250"
        await reader.close()


async def test_up_to_is_the_last_sequence_read(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection:
        await publish(connection, 50)
        reader = StreamReader(connection, EVENTS_STREAM, 11)
        assert seqs((await reader.read(limit=100, up_to=20))[0]) == list(range(11, 21))
        assert (await reader.read(limit=100, up_to=20))[0] == []
        assert (await reader.read(limit=100, up_to=5))[0] == []
        assert seqs((await reader.read(limit=100, up_to=1_000))[0]) == list(range(21, 51))
        assert reader.next_seq == 51
        await reader.close()


async def test_a_read_ends_at_its_bytes(own_server: OwnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_module, "PULL_MESSAGES", 10)
    async with open_connection(own_server.url) as connection:
        await publish(connection, 100, size=1_000)
        reader = StreamReader(connection, EVENTS_STREAM, 1)
        messages, _ = await reader.read(limit=1_000, max_bytes=35_000)
        assert len(messages) == 40  # the bound, and what the last pull brought
        assert seqs((await reader.read(limit=1_000))[0]) == list(range(41, 101))
        # Headers count: who publishes little else must not fill the memory of who reads.
        committer = Committer(connection)
        large = {"A": "x" * 1_000}
        await committer.store_many([Outgoing("ctx.n.event.a.b", large | {H_MSG_ID: f"h.{i}"}, b"") for i in range(60)])
        await committer.close()
        messages, _ = await reader.read(limit=1_000, max_bytes=35_000)
        assert len(messages) == 40
        await reader.close()


async def test_more_than_one_pull_of_bytes_is_read_at_once(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection:
        await publish(connection, 40, size=500_000)
        reader = StreamReader(connection, EVENTS_STREAM, 1)
        messages, _ = await reader.read(limit=1_000)
        assert sum(len(message.payload) for message in messages) == 20_000_000 > 2 * pull_module.PULL_BYTES
        assert seqs(messages) == list(range(1, 41))
        await reader.close()


async def test_more_than_one_pull_of_messages_is_read_at_once(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection:
        await publish(connection, 2 * pull_module.PULL_MESSAGES + 1)
        reader = StreamReader(connection, EVENTS_STREAM, 1)
        messages, _ = await reader.read(limit=100_000)
        assert seqs(messages) == list(range(1, 2 * pull_module.PULL_MESSAGES + 2))
        await reader.close()


async def test_a_position_set_from_outside_is_where_the_next_read_begins(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection:
        await publish(connection, 100)
        reader = StreamReader(connection, EVENTS_STREAM, 1)
        for start in (1, 51, 11, 91):
            reader.next_seq = start
            assert seqs((await reader.read(limit=10))[0]) == list(range(start, start + 10))
        await reader.close()


class TestGaps:
    async def test_a_purge_ahead_of_the_reader_is_a_gap(self, own_server: OwnServer) -> None:
        async with open_connection(own_server.url) as connection:
            await publish(connection, 50)
            await connection.api(f"STREAM.PURGE.{EVENTS_STREAM}", {"seq": 21})
            reader = StreamReader(connection, EVENTS_STREAM, 1)
            for _ in range(2):
                with pytest.raises(GapError, match="from sequence 1 to 20"):
                    await reader.read(limit=100)
                assert reader.next_seq == 1
            await reader.close()

    async def test_a_purge_of_everything_is_a_gap(self, own_server: OwnServer) -> None:
        async with open_connection(own_server.url) as connection:
            await publish(connection, 50)
            await connection.api(f"STREAM.PURGE.{EVENTS_STREAM}")
            reader = StreamReader(connection, EVENTS_STREAM, 11)
            with pytest.raises(GapError, match="from sequence 11 to 50"):
                await reader.read(limit=100)
            at_the_end = StreamReader(connection, EVENTS_STREAM, 51)
            assert (await at_the_end.read(limit=100))[0] == []
            await reader.close()
            await at_the_end.close()

    async def test_what_stands_before_an_interior_gap_is_returned_first(self, own_server: OwnServer) -> None:
        async with open_connection(own_server.url) as connection:
            await publish(connection, 30)
            async with plain_client(own_server.url) as client:
                await client.jetstream().publish("ctx.n.event.a.gone", b"{}")
            await publish(connection, 30, start=30)
            await connection.api(f"STREAM.PURGE.{EVENTS_STREAM}", {"filter": "ctx.n.event.a.gone"})
            reader = StreamReader(connection, EVENTS_STREAM, 1)
            messages, _ = await reader.read(limit=100)
            assert seqs(messages) == list(range(1, 31))
            with pytest.raises(GapError, match="from sequence 31 to 31"):
                await reader.read(limit=100)
            assert reader.next_seq == 31
            await reader.close()

    async def test_a_purged_tail_is_a_gap(self, own_server: OwnServer) -> None:
        async with open_connection(own_server.url) as connection:
            await publish(connection, 30)
            async with plain_client(own_server.url) as client:
                for _ in range(5):
                    await client.jetstream().publish("ctx.n.event.a.gone", b"{}")
            await connection.api(f"STREAM.PURGE.{EVENTS_STREAM}", {"filter": "ctx.n.event.a.gone"})
            reader = StreamReader(connection, EVENTS_STREAM, 1)
            assert seqs((await reader.read(limit=100))[0]) == list(range(1, 31))
            with pytest.raises(GapError, match="from sequence 31 to 35"):
                await reader.read(limit=100)
            await reader.close()

    async def test_a_reader_that_allows_gaps_reads_past_them(self, own_server: OwnServer) -> None:
        async with open_connection(own_server.url) as connection:
            await publish(connection, 10)
            async with plain_client(own_server.url) as client:
                for i in range(10):
                    await client.jetstream().publish(f"ctx.n.event.a.{i % 2}", b"{}")
            await connection.api(f"STREAM.PURGE.{EVENTS_STREAM}", {"filter": "ctx.n.event.a.1"})
            await connection.api(f"STREAM.PURGE.{EVENTS_STREAM}", {"filter": "ctx.n.event.a.b", "seq": 4})
            reader = StreamReader(connection, EVENTS_STREAM, 1, allow_gaps=True)
            assert seqs((await reader.read(limit=100, up_to=14))[0]) == [4, 5, 6, 7, 8, 9, 10, 11, 13]
            assert reader.next_seq == 15
            assert seqs((await reader.read(limit=100))[0]) == [15, 17, 19]
            assert reader.next_seq == 21
            await reader.close()

    async def test_a_stream_created_anew_is_a_gap(self, own_server: OwnServer) -> None:
        async with open_connection(own_server.url) as connection:
            await publish(connection, 10)
            reader = StreamReader(connection, EVENTS_STREAM, 1)
            assert len((await reader.read(limit=5))[0]) == 5
            await connection.api(f"STREAM.DELETE.{EVENTS_STREAM}")
            await ensure_topology(connection)
            await publish(connection, 10)
            with pytest.raises(GapError, match="anew"):
                await reader.read(limit=5)
            await reader.close()


class TestFaults:
    @pytest.mark.faults
    async def test_a_restart_in_the_middle_loses_and_doubles_nothing(self, own_server: OwnServer) -> None:
        async with open_connection(own_server.url) as connection:
            await publish(connection, 3_000)
            reader = StreamReader(connection, EVENTS_STREAM, 1)
            read = seqs((await reader.read(limit=1_000))[0])
            await own_server.restart()
            read += seqs((await asyncio.wait_for(reader.read(limit=1_000), LIMIT_S))[0])
            await own_server.kill()
            under_way = asyncio.ensure_future(reader.read(limit=1_000))
            await own_server.start(with_streams=False)
            read += seqs((await asyncio.wait_for(under_way, LIMIT_S))[0])
            assert read == list(range(1, 3_001))
            await reader.close()

    async def test_a_deleted_consumer_is_made_anew(self, own_server: OwnServer) -> None:
        async with open_connection(own_server.url) as connection:
            await publish(connection, 100)
            reader = StreamReader(connection, EVENTS_STREAM, 1)
            read = seqs((await reader.read(limit=10))[0])
            await connection.api(f"CONSUMER.DELETE.{EVENTS_STREAM}.{reader._consumer}")
            read += seqs((await asyncio.wait_for(reader.read(limit=1_000), LIMIT_S))[0])
            assert read == list(range(1, 101))
            await reader.close()

    async def test_after_an_error_in_the_middle_the_next_read_begins_again(
        self, own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pull_module, "PULL_MESSAGES", 10)
        monkeypatch.setattr(pull_module, "READ_DEADLINE_S", 0.0)
        async with open_connection(own_server.url) as connection:
            await publish(connection, 50)
            reader = StreamReader(connection, EVENTS_STREAM, 1)
            pulls = 0
            pull = reader._pull

            async def failing(count: int) -> list[StoredMessage]:
                nonlocal pulls
                pulls += 1
                if pulls == 3:
                    raise RetryError("the link is down")
                return await pull(count)

            monkeypatch.setattr(reader, "_pull", failing)
            with pytest.raises(RetryError):
                await reader.read(limit=50)
            assert reader.next_seq == 1
            assert seqs((await reader.read(limit=50))[0]) == list(range(1, 51))
            await reader.close()

    async def test_after_a_cancel_in_the_middle_the_next_read_begins_again(self, own_server: OwnServer) -> None:
        async with open_connection(own_server.url) as connection:
            await publish(connection, 20_000)
            reader = StreamReader(connection, EVENTS_STREAM, 1)
            for turns in (1, 5, 20, 60, 200):
                reading = asyncio.ensure_future(reader.read(limit=20_000))
                for _ in range(turns):
                    await asyncio.sleep(0)
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
                if reading.cancelled():
                    assert reader.next_seq == 1
                else:
                    assert len(reading.result()[0]) == reader.next_seq - 1
                    reader.next_seq = 1
            assert seqs((await reader.read(limit=20_000))[0]) == list(range(1, 20_001))
            await reader.close()

    async def test_closing_leaves_no_consumer(self, own_server: OwnServer) -> None:
        async with open_connection(own_server.url) as connection:
            await publish(connection, 10)
            reader = StreamReader(connection, EVENTS_STREAM, 1)
            await reader.read(limit=5)
            await reader.close()
            assert (await connection.api(f"CONSUMER.NAMES.{EVENTS_STREAM}"))["total"] == 0


@pytest.mark.parametrize(
    "frame",
    [
        b"PUB ctx.n.event.\xff.x 2\r\n{}\r\n",
        b"PUB ctx.n.event.a\x00.x 2\r\n{}\r\n",
        hpub(b"ctx.n.event.a.x", b"NATS/1.0"),
        hpub(b"ctx.n.event.a.x", b"NATS/1.0\r\n\r\n"),
        hpub(b"ctx.n.event.a.x", b"NATS/1.0 404\r\n\r\n", b""),
        hpub(b"ctx.n.event.a.x", b"NATS/1.0 \xff\xff\xff\r\n\r\n"),
        hpub(b"ctx.n.event.a.x", b"NATS/1.0\r\nStatus: 404\r\n\r\n", b""),
        hpub(b"ctx.n.event.a.x", b"NATS/1.0\r\nStatus: 409\r\n\r\n", b""),
        hpub(b"ctx.n.event.a.x", b"NATS/1.0\r\nStatus: 100\r\n\r\n", b""),
        hpub(b"ctx.n.event.a.x", b"NATS/1.0\r\nA: \xff\xfe\r\n\r\n"),
        hpub(b"ctx.n.event.a.x", b"NATS/1.0\r\nno colon\r\n\r\n"),
        hpub(b"ctx.n.event.a.x", b"NATS/1.0\r\n: x\r\n\r\n"),
        hpub(b"ctx.n.event.a.x", b"NATS/1.0\r\nA: b"),
        hpub(b"ctx.n.event.a.x", b"garbage"),
        hpub(b"ctx.n.event.a.x", b"\x00"),
    ],
)
async def test_malformed_messages_are_delivered_like_any_other(own_server: OwnServer, frame: bytes) -> None:
    """nats-py alone stops reading from its connection over some of these."""
    async with open_connection(own_server.url) as connection:
        await publish(connection, 2)
        await raw_publish(own_server.url, frame)
        await publish(connection, 2, start=2)
        reader = StreamReader(connection, EVENTS_STREAM, 1)
        messages, _ = await asyncio.wait_for(reader.read(limit=100), LIMIT_S)
        assert seqs(messages) == [1, 2, 3, 4, 5]
        assert messages[2].payload in (b"{}", b"")
        assert connection.reconnects == 0
        await reader.close()


async def test_a_subject_like_a_reply_token_is_no_reply(own_server: OwnServer) -> None:
    """Deliveries arrive under subjects that anybody chose, and must not be taken for the answer to a request."""
    async with open_connection(own_server.url) as connection:
        prefix = "ctx.n.event.a."
        filler = "x" * (connection.lean._skip - len(prefix) - 1)
        async with plain_client(own_server.url) as client:
            for token in range(60):
                await client.jetstream().publish(f"{prefix}{filler}.{token}", b'{"seq": 77}')
        reader = StreamReader(connection, EVENTS_STREAM, 1)
        messages, _ = await reader.read(limit=100)
        assert len(messages) == 60
        await reader.close()


async def test_the_leader_tells_the_same_headers_as_a_delivery(own_server: OwnServer) -> None:
    """Whatever a publisher has put into the block: one message is judged alike wherever it is read."""
    block = b"NATS/1.0\r\nHf-Kind:  padded \r\ntwo words: 1\r\nno colon\r\nn\xc3\xa4me: 2\r\nHf-Kind: last\r\n\r\n"
    async with open_connection(own_server.url) as connection:
        await raw_publish(own_server.url, hpub(b"ctx.n.event.a.b", block))
        await stored(connection, 1)
        reader = StreamReader(connection, EVENTS_STREAM, 1)
        (delivered,), _ = await reader.read(limit=1)
        await reader.close()
        found = await message_at_leader(connection, EVENTS_STREAM, {"seq": 1})
        assert found is not None
        assert dict(found.headers) == dict(delivered.headers) == {"Hf-Kind": "last"}


@pytest.mark.parametrize(("first", "wanted"), [(1, [6]), (3, [6])])
async def test_an_empty_pull_passes_over_nothing_that_is_there(
    own_server: OwnServer, monkeypatch: pytest.MonkeyPatch, first: int, wanted: list[int]
) -> None:
    """As one is from a consumer on a replica that has not caught up: what is there comes later, behind a gap."""
    pull, is_behind = StreamReader._pull, [False, True]

    async def lagging(reader: StreamReader, count: int) -> list[StoredMessage]:
        return [] if is_behind and is_behind.pop() else await pull(reader, count)

    async with open_connection(own_server.url) as connection:
        await publish(connection, 5)
        committer = Committer(connection)
        await committer.store(Outgoing("ctx.n.event.a.c", {H_MSG_ID: "n.c"}, b"{}"))
        await committer.close()
        monkeypatch.setattr(StreamReader, "_pull", lagging)
        reader = StreamReader(connection, EVENTS_STREAM, first, allow_gaps=True, filter_subject="ctx.n.event.a.c")
        messages, _ = await reader.read(limit=10)
        assert seqs(messages) == wanted
        assert (await reader.read(limit=10))[0] == []
        await reader.close()


async def test_large_messages_do_not_stop_a_reader(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection:
        room = connection.client.max_payload - limits.KIB
        await publish(connection, 3, size=room)
        reader = StreamReader(connection, EVENTS_STREAM, 1)
        messages, _ = await reader.read(limit=100, max_bytes=1)
        assert len(messages) == 3
        await reader.close()
