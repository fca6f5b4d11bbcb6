"""Bodies of named contexts: large, growing, binary, damaged, and those that cannot be."""

from __future__ import annotations

import asyncio
import math
import os
import random
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from holdfast.client import connect
from holdfast.client.cold import ResolverClient
from holdfast.client.growing import GrowingBodies
from holdfast.client.near_cache import MAX_AGE_MS, NearCache
from holdfast.client.reading import BodyReader
from holdfast.schemas import limits
from holdfast.schemas.errors import (
    HoldfastError,
    InvalidFieldError,
    InvalidNameError,
    TooLargeError,
    UnavailableError,
)
from holdfast.schemas.ids import new_event_id, now_ms
from holdfast.schemas.refs import parse_ref
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.hot import HotTier, NewContext
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import HOT_STREAM, hot_subject, key_subject
from tests.key_support import keys_in, reader_of, shorten_writes, url_of, versions_of
from tests.support import plain_client

if TYPE_CHECKING:
    from holdfast.client import Holdfast
    from tests.support import OwnServer

pytestmark = pytest.mark.asyncio


async def hot_bytes(connection: Connection) -> int:
    return (await stream_info(connection, HOT_STREAM)).bytes


def turn(n: int, size: int = 1_000) -> dict[str, Any]:
    """A turn that hardly compresses, so that the bytes of a stream tell how often it was stored."""
    return {"turn": n, "says": random.Random(n).randbytes(size // 2).hex()}


# Growing.


async def test_a_conversation_stored_after_every_turn_takes_a_few_times_its_end(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection, connect(own_server.url) as hf:
        before = await hot_bytes(connection)
        versions = [await hf.keys.append("talk", turn(n)) for n in range(150)]
        grown = await hot_bytes(connection) - before
        end = len(versions[-1].raw)
        assert end > 150_000
        assert grown < 4 * end
        assert grown < sum(len(version.raw) for version in versions) / 10
        async with connect(own_server.url, cache_bytes=0) as other:
            for number in (1, 2, 3, 10, 77, 149, 150):
                value = await other.keys.get("talk", number)
                assert value.body == [turn(n) for n in range(number)]
                assert (value.raw, value.ref) == (versions[number - 1].raw, versions[number - 1].ref)
                # By its reference alone, as from anywhere else.
                assert (await other.resolve(str(value.ref))).raw == value.raw


async def test_a_body_is_kept_for_a_minute_whatever_the_wall_clock_says(
    connection: Connection, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks_s, hot = 50.0, HotTier(connection)
    reader = BodyReader(hot, ResolverClient(connection, namespace), namespace)
    bodies = GrowingBodies(namespace, hot, reader, NearCache(), ticks_s=lambda: ticks_s)
    (grown,) = await bodies.store_chain([NewContext(namespace=namespace, kind="k", body=b'"erased"')], None)
    monkeypatch.setattr("holdfast.client.growing.now_ms", lambda: now_ms() - 3_600_000)
    ticks_s += MAX_AGE_MS / 1000 - 1
    assert bodies.known(grown.row.ref) == grown
    ticks_s += 1
    assert bodies.known(grown.row.ref) is None
    await hot.close()


async def test_a_writer_that_has_forgotten_goes_on_sharing(own_server: OwnServer) -> None:
    """Each turn by another client, as when hours lie between them; and one that resolves references beside it."""
    async with open_connection(own_server.url) as connection:
        async with connect(own_server.url) as hf:
            for n in range(60):
                await hf.keys.append("talk", turn(n, 2_000))
        before = await hot_bytes(connection)
        for n in range(60, 70):
            async with connect(own_server.url) as hf:
                value = await hf.keys.get("talk")
                assert (await hf.resolve(str(value.ref))).body == value.body
                await hf.keys.append("talk", turn(n, 2_000))
        assert await hot_bytes(connection) - before < 120_000
        async with connect(own_server.url) as hf:
            for n in range(70, 75):
                # Its reference is resolved before the key is read: what the near cache holds has no parts.
                newest = await hf.keys.head("talk")
                assert newest is not None
                assert (await hf.resolve(str(newest.ref))).size > 100_000
                before = await hot_bytes(connection)
                await hf.keys.append("talk", turn(n, 2_000))
                assert await hot_bytes(connection) - before < 60_000


async def test_growth_by_put_shares_as_growth_by_append(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection, connect(own_server.url) as hf:
        state: dict[str, Any] = {"_timestamp": 0, "messages": [], "turns": 0}
        before = await hot_bytes(connection)
        for n in range(100):
            state["messages"].append(turn(n))
            state |= {"_timestamp": 1_767_225_600_000 + n * 977, "turns": n}
            await hf.keys.put("state", state)
        assert await hot_bytes(connection) - before < 5 * len(msgspec.json.encode(state))
    async with connect(own_server.url, cache_bytes=0) as other:
        assert (await other.keys.get("state")).body == state


async def test_E27_text_that_grows_is_stored_in_parts_that_stay_text(hf: Holdfast) -> None:
    text = ""
    for n in range(60):
        text += f"Zeile {n}: größer als 𝄞 …\n" * 8
        await hf.keys.put("notes", text)
    async with reader_of(hf) as other:
        assert (await other.keys.get("notes")).body == text


async def test_an_equal_body_by_another_way_of_growing_is_one_context(hf: Holdfast) -> None:
    """The reference does not say how the body is stored; whoever stores it second finds it there."""
    for n in range(60):
        await hf.keys.append("one", turn(n))
    whole = [turn(n) for n in range(60)]
    direct = await hf.keys.put("other", whole)
    async with reader_of(hf) as other:
        await other.keys.put("third", whole[:30])
        third = await other.keys.put("third", whole)
        assert third.ref == direct.ref == (await other.keys.get("one")).ref
        assert await other.put(whole) == direct.ref
        assert (await other.keys.get("third")).body == whole


# Large and binary.


@pytest.mark.parametrize("size", [limits.CHUNK_BYTES, limits.CHUNK_BYTES + 1, limits.MIB + 1, 3 * limits.MIB])
async def test_large_bodies_come_back_whole_and_can_be_changed(hf: Holdfast, size: int) -> None:
    raw = os.urandom(size)
    await hf.keys.put("bytes", raw)
    text = raw.hex()[:size]
    await hf.keys.put("object", {"a": text, "n": 1})
    await hf.keys.patch("object", {"n": 2})
    await hf.keys.patch("object", {"b": [1]})
    async with reader_of(hf) as other:
        assert (await other.keys.get("bytes")).raw == raw
        assert (await other.keys.get("object")).body == {"a": text, "n": 2, "b": [1]}
        assert (await other.keys.get("object", 1)).body == {"a": text, "n": 1}
        found = await other.keys.get_many(["bytes", "object"])
        assert found["bytes"].body == raw


async def test_a_list_over_a_megabyte_goes_on_growing(hf: Holdfast) -> None:
    items = [turn(n, 20_000) for n in range(80)]
    await hf.keys.put("long", items)
    values = await asyncio.gather(*(hf.keys.append("long", n) for n in range(20)))
    async with reader_of(hf) as other:
        body = (await other.keys.get("long")).body
        assert body[:80] == items
        assert sorted(body[80:]) == list(range(20))
        for value in values:
            assert (await other.keys.get("long", value.version)).body == body[: 79 + value.version]


async def test_a_content_type_is_kept(hf: Holdfast) -> None:
    await hf.keys.put("page", "<p>hi</p>", content_type="text/html", kind="page")
    async with reader_of(hf) as other:
        value = await other.keys.get("page")
        assert (value.context.content_type, value.context.kind, value.body) == ("text/html", "page", "<p>hi</p>")


# What cannot be.


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


async def test_nesting_has_a_limit_that_is_told(hf: Holdfast) -> None:
    await hf.keys.put("k", nested(limits.NESTING))
    assert (await hf.keys.get("k")).body == nested(limits.NESTING)
    await hf.keys.put("o", {})
    deep = nested(limits.NESTING + 1)
    for write in (
        hf.keys.put("k", deep),
        hf.keys.patch("o", {"a": nested(limits.NESTING)}),
        hf.keys.append("l", nested(limits.NESTING)),
        hf.keys.commit({"k": deep}),
    ):
        with pytest.raises(InvalidFieldError) as caught:
            await write
        assert caught.value.limit == limits.NESTING
    assert [(await hf.keys.get(key)).version for key in ("k", "o")] == [1, 1]


async def test_what_is_too_large_is_refused_with_the_limit(hf: Holdfast) -> None:
    await hf.keys.put("k", "x" * (limits.BODY_BYTES // 2))
    too_large = "x" * (limits.BODY_BYTES + 1)
    with pytest.raises(TooLargeError) as caught:
        await hf.keys.put("k", too_large)
    assert (caught.value.field, caught.value.limit) == ("body", limits.BODY_BYTES)
    with pytest.raises(TooLargeError) as caught:
        await hf.keys.patch("o", {"a": too_large})
    assert caught.value.limit == limits.BODY_BYTES
    assert await versions_of(hf, "k") == [(1, "put")]
    assert await versions_of(hf, "o") == []


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "an empty key": ({"key": ""}, "key"),
    "a long key": ({"key": "k" * 769}, "key"),
    "too many segments": ({"key": "." * 32}, "key"),
    "a key that is no text": ({"key": 5}, "key"),
    "a surrogate in the key": ({"key": "\ud800"}, "key"),
    "tags that are text": ({"tags": "important"}, "tags"),
    "an empty tag": ({"tags": [""]}, "tags"),
    "too many tags": ({"tags": [str(n) for n in range(limits.TAGS + 1)]}, "tags"),
    "an empty session": ({"session": ""}, "session"),
    "a long session": ({"session": "s" * 257}, "session"),
    "no time to live": ({"ttl": 0}, "ttl"),
    "a time to live that is no number": ({"ttl": "1h"}, "ttl"),
    "who changed it, empty": ({"changed_by": ""}, "changed_by"),
    "a change type that is no text": ({"change_type": 5}, "change_type"),
    "an agent that is too long": ({"agent": "a" * 257}, "agent_id"),
    "an expected version below none": ({"expected_version": -1}, "expected_version"),
    "an expected version of text": ({"expected_version": "1"}, "expected_version"),
    "a kind with spaces": ({"kind": "a b"}, "kind"),
    "the kind of chunks": ({"kind": "chunk"}, "kind"),
    "a content type of two lines": ({"content_type": "a\nb"}, "content_type"),
    "a body that JSON cannot hold": ({"body": object()}, "body"),
    "not a number": ({"body": [math.nan]}, "body"),
    "a lone surrogate": ({"body": "\ud800"}, "body"),
    "bytes that are not the JSON they are said to be": ({"body": b"{", "content_type": "application/json"}, "body"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
async def test_what_cannot_be_is_refused_by_name_and_nothing_is_written(hf: Holdfast, case: str) -> None:
    changes, field = BAD_ARGUMENTS[case]
    arguments: dict[str, Any] = {"key": "k", "body": {"a": 1}, **changes}
    key, body = arguments.pop("key"), arguments.pop("body")
    with pytest.raises((InvalidFieldError, TooLargeError)) as caught:
        await hf.keys.put(key, body, **arguments)
    assert caught.value.field == field
    assert len(str(caught.value)) < 400
    assert await keys_in(hf) == []


async def test_reading_refuses_what_cannot_be_too(hf: Holdfast) -> None:
    await hf.keys.put("k", 1)
    bad: Any = "1"
    reads: list[tuple[Any, str]] = [
        (hf.keys.get(""), "key"),
        (hf.keys.get("k", bad), "version"),
        (hf.keys.get("k", as_of=bad), "as_of"),
        (hf.keys.head("k" * 1_000), "key"),
        (hf.keys.get_many(["k", ""]), "key"),
        (anext(hf.keys.history("")), "key"),
        (anext(hf.keys.history("k", before=bad)), "before"),
        (anext(hf.keys.list("." * 5_000)), "key"),
        (anext(hf.keys.list("k", tags="t")), "tags"),
        (hf.keys.diff("k", bad, 1), "version"),
        (hf.keys.rollback("k", bad), "version"),
        (hf.keys.patch("k", bad), "merge"),
    ]
    for read, field in reads:
        with pytest.raises(InvalidFieldError) as caught:
            await read
        assert caught.value.field == field
    with pytest.raises(InvalidNameError):
        hf.keys.watch("k" * 769)
    assert (await hf.keys.get("k")).version == 1


# Damage and foreign messages.


async def publish_raw(hf: Holdfast, subject: str, payload: bytes, headers: dict[str, str] | None = None) -> None:
    async with plain_client(url_of(hf)) as client:
        await client.jetstream().publish(subject, payload, headers=headers)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"plain words",
        b"{}",
        b"[1]",
        b'{"version":0,"op":"put"}',
        b'{"version":3,"op":"paint"}',
        b"\xff" * 50,
        b"[" * 500,
    ],
)
async def test_what_is_no_version_is_passed_over_and_the_chain_goes_on(hf: Holdfast, garbage: bytes) -> None:
    subject = key_subject(hf.namespace, "k")
    await publish_raw(hf, subject, garbage)
    with pytest.raises(HoldfastError):
        await hf.keys.get("k")
    assert (await hf.keys.put("k", 1)).version == 1
    await publish_raw(hf, subject, garbage)
    async with reader_of(hf) as other:
        assert (await other.keys.get("k")).body == 1
        assert [version.version async for version in other.keys.list()] == [1]
        assert (await other.keys.put("k", 2, expected_version=1)).version == 2
    await publish_raw(hf, subject, garbage)
    assert (await hf.keys.append("k2", 1)).version == 1
    assert (await hf.keys.update("k", lambda body: body + 1)).version == 3
    assert await versions_of(hf, "k") == [(3, "patch"), (2, "put"), (1, "put")]


async def test_a_forged_hint_does_not_lead_astray(hf: Holdfast) -> None:
    """Where the parts stand is a hint: sequences of other messages, of none at all, or far too many."""
    values = [await hf.keys.append("talk", turn(n)) for n in range(20)]
    value = values[-1]
    subject = key_subject(hf.namespace, "talk")
    for at in ([1, 0], [5, 9, 4, 1], [2**62, 1, 2**62], [10, *range(5_000)], [-1, -1], [0, 0]):
        version = {"version": value.version, "op": "put", "ref": value.ref, "event_id": new_event_id(), "at": at}
        await publish_raw(hf, subject, msgspec.json.encode(version))
        async with reader_of(hf) as other:
            assert (await other.keys.get("talk")).body == value.body


async def test_a_damaged_manifest_is_told_and_not_served(hf: Holdfast, own_server: OwnServer) -> None:
    """A message that somebody else wrote under the body's name, before we could: nothing of it is believed."""
    body = [turn(n) for n in range(30)]
    ref = (await hf.keys.put("probe", body)).ref
    async with connect(own_server.url, hf.namespace) as own:
        shorten_writes(own)
        digest = parse_ref(str(ref)).digest
        async with plain_client(own_server.url) as client:
            manifest = {"v": 2, "size": 5, "chunks": ["a" * 32], "tail": ""}
            await client.jetstream().publish(
                hot_subject(hf.namespace, digest),
                msgspec.json.encode(manifest),
                headers={"Hf-Kind": "context", "Hf-Form": "manifest"},
            )
        # Its parts might be in the lake: that they are nowhere, only a resolver can tell.
        with pytest.raises(UnavailableError, match="no resolver"):
            await own.keys.put("k", body)
        assert await own.keys.head("k") is None


async def test_a_reader_that_follows_a_conversation_fetches_only_what_is_new(nats_server: str, namespace: str) -> None:
    turns = [{"turn": turn, "said": f"{turn} {'words of no great weight ' * 40}"} for turn in range(60)]
    async with connect(nats_server, namespace) as writer, connect(nats_server, namespace) as reader:
        fetched: list[int] = []
        for number, turn in enumerate(turns, start=1):
            await writer.keys.append("talk", turn)
            before = reader.connection.client.stats["in_bytes"]
            assert (await reader.keys.get("talk")).body == turns[:number]
            fetched.append(reader.connection.client.stats["in_bytes"] - before)
    assert max(fetched[1:]) < len(msgspec.json.encode(turns)) / 4
    assert sorted(fetched)[30] < 3_000
