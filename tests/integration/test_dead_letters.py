"""Dead letters: buried once, whole, with the reason and the origin."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.schemas.errors import HoldfastError, InvalidFieldError
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.dead import DeadLetter, bury, read_dead_letters
from holdfast.streams.messages import StoredMessage
from holdfast.streams.wire import DEAD_STREAM, EVENTS_STREAM
from tests.support import OwnServer, plain_client


def message(seq: int, **changes: object) -> StoredMessage:
    fields: dict[str, object] = {
        "subject": "ctx.default.event.a.b",
        "headers": {"Nats-Msg-Id": "x", "A": "ü"},
        "payload": b"payload",
        "seq": seq,
        "stored_at_ms": 1_700_000_000_123,
        "epoch": "e1",
    }
    return StoredMessage(**(fields | changes))  # type: ignore[arg-type]


REASON = InvalidFieldError("event is not JSON", field="event", hint="send JSON")


async def letters_of(connection: Connection, after_seq: int = 0) -> list[DeadLetter]:
    return [letter async for _, letter in read_dead_letters(connection, after_seq=after_seq)]


async def test_a_letter_says_what_died_where_and_why(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection:
        assert await letters_of(connection) == []
        assert await bury(connection, EVENTS_STREAM, message(7), REASON) is True
        (letter,) = await letters_of(connection)
        assert (letter.stream, letter.epoch, letter.seq) == (EVENTS_STREAM, "e1", 7)
        assert (letter.subject, letter.payload) == ("ctx.default.event.a.b", b"payload")
        assert (letter.code, letter.reason) == ("invalid_field", str(REASON))
        assert (letter.stored_at_ms, letter.headers) == (1_700_000_000_123, {"Nats-Msg-Id": "x", "A": "ü"})
        assert letter.died_at_ms > letter.stored_at_ms


async def test_one_origin_has_one_letter(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection:
        outcomes = await asyncio.gather(*(bury(connection, EVENTS_STREAM, message(7), REASON) for _ in range(20)))
        assert outcomes.count(True) == 1
        other = InvalidFieldError("another reason", field="x")
        assert await bury(connection, EVENTS_STREAM, message(7), other) is False
        assert await bury(connection, EVENTS_STREAM, message(8), REASON) is True
        assert await bury(connection, EVENTS_STREAM, message(7, epoch="e2"), REASON) is True
        assert await bury(connection, "KV_ctx-hot", message(7), REASON) is True
        assert len(await letters_of(connection)) == 4
        assert len(await letters_of(connection, after_seq=2)) == 2


@pytest.mark.parametrize("less", [0, 1, 200, 5_000, 20_000])
async def test_a_payload_at_the_servers_limit_is_kept_whole(own_server: OwnServer, less: int) -> None:
    async with open_connection(own_server.url) as connection:
        payload = bytes(range(256)) * (connection.client.max_payload // 256)
        payload = payload[: len(payload) - less]
        for _ in range(2):
            await bury(connection, EVENTS_STREAM, message(7, payload=payload), REASON)
        (letter,) = await letters_of(connection)
        assert letter.payload == payload
        assert connection.reconnects == 0


@pytest.mark.parametrize(
    "reason",
    ["ünïcode → ✓ 𝄞", "line\nbreak\r\nand\ttab", "\x00\x01\x7f", "back\\slash \\x41", "x" * 100_000, "𝄞" * 5_000, ""],
    ids=lambda text: repr(text)[:20],
)
async def test_any_reason_is_kept_as_far_as_there_is_room(own_server: OwnServer, reason: str) -> None:
    async with open_connection(own_server.url) as connection:
        await bury(connection, EVENTS_STREAM, message(7), HoldfastError(reason))
        (letter,) = await letters_of(connection)
        assert letter.reason == reason[:1_000]
        assert connection.reconnects == 0


@pytest.mark.parametrize(
    "subject",
    [
        "ctx.x--zz.event.a.b",
        "ctx.\ufffd.event.a.b",
        "ctx.a\x00b.event.x",
        "ctx..event",
        "$KV.ctx-hot.ns.d",
        "x",
        "ü" * 1_000,
    ],
    ids=lambda text: repr(text)[:20],
)
async def test_any_subject_can_be_buried(own_server: OwnServer, subject: str) -> None:
    async with open_connection(own_server.url) as connection:
        assert await bury(connection, EVENTS_STREAM, message(7, subject=subject), REASON)
        (letter,) = await letters_of(connection)
        assert letter.subject == subject


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {f"H{i}": "x" * 100 for i in range(1_000)},
        {"Large": "x" * 500_000},
        {"Wide": "𝄞" * 100_000},
        {"Hf-Reason": "forged", "Status": "404", "Nats-Expected-Last-Subject-Sequence": "9"},
        {"Odd": "\ufffd\x00\x7f"},
    ],
    ids=lambda headers: repr(headers)[:20],
)
async def test_the_origins_headers_are_kept_as_far_as_there_is_room(
    own_server: OwnServer, headers: dict[str, str]
) -> None:
    async with open_connection(own_server.url) as connection:
        payload = b"x" * (connection.client.max_payload - 100)
        assert await bury(connection, EVENTS_STREAM, message(7, headers=headers, payload=payload), REASON)
        (letter,) = await letters_of(connection)
        assert letter.payload == payload
        assert letter.headers.items() <= headers.items()
        if sum(map(len, headers.values())) < 1_000:
            assert letter.headers == headers
        assert connection.reconnects == 0


async def test_what_is_no_letter_of_ours_is_passed_over(own_server: OwnServer) -> None:
    foreign: list[tuple[str, bytes, dict[str, str]]] = [
        ("ctx.n.dead.x", b"", {}),
        ("ctx.n.dead.x.y.notanumber", b"", {}),
        ("ctx.n.dead.x.y.²", b"", {}),
        ("ctx.n.dead.x.y." + "9" * 1_000, b"", {}),
        ("ctx.n.dead.x.y.1.2.3.4", b"", {}),
        ("ctx.n.dead.x.y.5.rest", b"lonely", {}),
    ]
    async with open_connection(own_server.url) as connection, plain_client(own_server.url) as client:
        for subject, payload, headers in foreign:
            await client.jetstream().publish(subject, payload, headers=headers)
        assert await letters_of(connection) == []
        # Of our form, but with headers that are not.
        await client.jetstream().publish("ctx.n.dead.x.y.5", b"p", headers={})
        odd = {"Hf-Origin-Headers": "[" * 5_000, "Hf-Origin-Time": "²", "Hf-Reason": "\\x", "Status": "404"}
        await client.jetstream().publish("ctx.n.dead.x.y.6", b"p", headers=odd)
        first, second = await letters_of(connection)
        assert (first.seq, first.payload, first.headers) == (5, b"p" + b"lonely", {})
        assert (second.seq, second.stored_at_ms, second.headers, second.reason) == (6, 0, {}, "\\x")


async def test_a_letter_can_be_neither_overwritten_nor_deleted(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection:
        await bury(connection, EVENTS_STREAM, message(7), REASON)
        async with plain_client(own_server.url) as client:
            reply = await client.request(f"ctx.default.dead.{EVENTS_STREAM}.e1.7", b"other")
            assert b"error" in reply.data
            deletion = await client.request(f"$JS.API.STREAM.MSG.DELETE.{DEAD_STREAM}", b'{"seq": 1}')
            assert b"error" in deletion.data
        (letter,) = await letters_of(connection)
        assert letter.payload == b"payload"


async def test_many_letters_are_read_in_order(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection:
        await asyncio.gather(*(bury(connection, EVENTS_STREAM, message(i), REASON) for i in range(1_500)))
        found = [(seq, letter.seq) async for seq, letter in read_dead_letters(connection)]
        assert [seq for seq, _ in found] == list(range(1, 1_501))
        assert {origin for _, origin in found} == set(range(1_500))
