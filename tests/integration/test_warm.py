"""Tiering both ways: what has aged out of the hot tier is read from the lake, and brought back when it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from holdfast.client import Holdfast, connect
from holdfast.client.cold import ResolverClient
from holdfast.client.warming import Warming, WarmReport
from holdfast.ops.verify import verify
from holdfast.schemas.errors import InvalidFieldError, UnavailableError
from holdfast.schemas.ids import now_ms
from holdfast.schemas.refs import Ref, parse_ref
from holdfast.streams.codec import StoredForm, reseal
from holdfast.streams.hot import HotTier
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import HOT_STREAM
from holdfast.workers.control import evict, flush
from tests.running import running, settings_in

if TYPE_CHECKING:
    from tests.support import OwnServer

pytestmark = pytest.mark.asyncio

HOUR_MS = 3_600_000


@pytest_asyncio.fixture
async def hf(own_server: OwnServer, tmp_path: Path) -> AsyncIterator[Holdfast]:
    """A client of a system of the test's own, with all workers; nothing happens by the clock."""
    async with running(own_server.url, settings_in(tmp_path)), connect(own_server.url, cache_bytes=0) as client:
        yield client


async def cool(hf: Holdfast) -> None:
    """Everything so far is in the lake alone."""
    await flush(hf.connection)
    await evict(hf.connection, 0.0)
    assert (await stream_info(hf.connection, HOT_STREAM)).messages == 0


async def warm(hf: Holdfast, **options: Any) -> WarmReport:
    return await Warming(hf, **options).run(now_ms() - HOUR_MS)


async def tiers(hf: Holdfast, refs: list[Ref]) -> list[str]:
    found = (await hf.resolve_many(refs)).found
    return [found[ref].tier for ref in refs]


async def test_B08_B09_B10_contexts_age_from_hot_to_cold_and_are_read_from_either(hf: Holdfast) -> None:
    refs = [await hf.put({"n": number}, kind="plan") for number in range(3)]
    assert await tiers(hf, refs) == ["hot"] * 3
    await cool(hf)
    assert await tiers(hf, refs) == ["lake"] * 3
    report = await warm(hf)
    assert (report.stored, report.hot, report.parts, report.failed, report.is_whole) == (3, 0, 0, 0, True)
    assert await tiers(hf, refs) == ["hot"] * 3
    again = await warm(hf)
    assert (again.stored, again.hot, again.bytes) == (0, 3, 0)


async def test_large_and_growing_bodies_come_back_in_their_parts(hf: Holdfast, tmp_path: Path) -> None:
    large = await hf.put({"text": [f"line {number}" for number in range(150_000)]})
    turns: list[str] = []
    for number in range(60):
        turns.append(f"what was said in turn {number} " * 30)
        await hf.keys.put("conversation", turns[:])
    before = (await stream_info(hf.connection, HOT_STREAM)).messages
    await cool(hf)
    report = await warm(hf)
    assert report.stored == 61
    assert report.parts > 3
    assert (await stream_info(hf.connection, HOT_STREAM)).messages == before
    assert await tiers(hf, [large]) == ["hot"]
    newest = await hf.keys.get("conversation")
    assert (newest.version, newest.body) == (60, turns)
    # What was brought back is archived as stored again, and nothing of it twice.
    await flush(hf.connection)
    assert (await verify(tmp_path / "lake", hf.connection)).violations == []


async def test_parts_come_back_to_a_body_that_is_hot_without_them(hf: Holdfast) -> None:
    ref = await hf.put("x" * 1_300_000)
    await cool(hf)
    digest = parse_ref(ref).digest
    manifest = (await ResolverClient(hf.connection, "default").fetch([digest], cold=True))[0][digest]
    hot = HotTier(hf.connection)
    await hot.store_forms("default", [StoredForm(digest, *reseal(manifest))])
    assert await hot.get("default", digest) is None
    report = await warm(hf)
    assert (report.stored, report.hot) == (1, 0)
    assert report.parts == 2, "two of the three chunks are equal"
    assert await hot.get("default", digest) is not None
    again = await warm(hf)
    assert (again.stored, again.parts, again.hot) == (0, 0, 1)


async def test_the_limit_of_bytes_keeps_the_newest(hf: Holdfast) -> None:
    # One after another: those of one millisecond would be told apart by their sequence.
    refs = [await hf.put({"n": number, "text": f"{number} " * 100}) for number in range(10)]
    await cool(hf)
    report = await warm(hf, limit_bytes=900)
    assert not report.is_whole
    assert 1 <= report.stored < 10
    assert report.bytes <= 900
    assert await tiers(hf, refs) == ["lake"] * (10 - report.stored) + ["hot"] * report.stored


async def test_only_one_kind_and_only_since_then(hf: Holdfast) -> None:
    plan = await hf.put("a plan", kind="plan")
    note = await hf.put("a note", kind="note")
    await cool(hf)
    assert (await Warming(hf).run(now_ms() + HOUR_MS)).stored == 0
    assert (await warm(hf, kind="plan")).stored == 1
    assert await tiers(hf, [plan, note]) == ["hot", "lake"]


async def test_what_has_expired_and_what_is_another_namespaces_stays_where_it_is(
    hf: Holdfast, own_server: OwnServer
) -> None:
    soon = datetime.now(UTC) + timedelta(milliseconds=300)
    await hf.put("for a moment", expires_at=soon)
    async with connect(own_server.url, "other", cache_bytes=0) as other:
        theirs = await other.put("theirs")
        await cool(hf)
        await asyncio.sleep(max(0.0, (soon - datetime.now(UTC)).total_seconds()))
        report = await warm(hf)
        assert (report.stored, report.failed) == (0, 0)
        assert await tiers(other, [theirs]) == ["lake"]


async def test_contexts_are_listed_newest_first_in_pages_without_gaps(hf: Holdfast) -> None:
    refs = [await hf.put({"n": number}) for number in range(7)]
    await cool(hf)
    await warm(hf)
    await flush(hf.connection)  # stored again: each comes twice
    resolver = ResolverClient(hf.connection, "default")
    request: dict[str, Any] = {"since": now_ms() - HOUR_MS, "limit": 3}
    listed: list[str] = []
    times: list[int] = []
    while True:
        page = await resolver.call("recent", request)
        listed += [item["ref"] for item in page["contexts"]]
        times += [item["stored_at_ms"] for item in page["contexts"]]
        if page["cursor"] is None:
            break
        request["cursor"] = page["cursor"]
    assert sorted(listed) == sorted(refs * 2)
    assert listed[7:] == refs[::-1]
    assert times == sorted(times, reverse=True)


async def test_the_lake_says_which_events_and_versions_it_holds(hf: Holdfast) -> None:
    event = await hf.emit("step:done")
    await hf.keys.put("plan", 1)
    resolver = ResolverClient(hf.connection, "default")
    absent = "0190c7a4-9b7e-7abc-8def-0123456789ab"
    request = {"events": [str(event.event_id), absent], "versions": [["plan", 1], ["plan", 2], ["plan", -1]]}
    assert await resolver.call("held", request) == {"events": [], "versions": []}
    await flush(hf.connection)
    assert await resolver.call("held", request) == {"events": [str(event.event_id)], "versions": [["plan", 1]]}


async def test_what_cannot_be_asked_is_refused_by_name(hf: Holdfast) -> None:
    resolver = ResolverClient(hf.connection, "default")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("recent", {}, "since"),
        ("recent", {"since": "yesterday"}, "since"),
        ("recent", {"since": -1}, "since"),
        ("recent", {"since": 2**62}, "since"),
        ("recent", {"since": 0, "kind": "a b"}, "kind"),
        ("recent", {"since": 0, "limit": 1_001}, "limit"),
        ("recent", {"since": 0, "cursor": "!"}, "cursor"),
        ("recent", {"since": 0, "cursor": "WzEsMl0"}, "cursor"),
        ("recent", {"since": 0, "other": 1}, "other"),
        ("held", {"events": ["no uuid"]}, "events"),
        ("held", {"events": [1]}, "events[0]"),
        ("held", {"versions": [["k"]]}, "versions[0]"),
        ("held", {"events": ["x"] * 1_001}, "events"),
    ]
    for endpoint, request, field in cases:
        with pytest.raises(InvalidFieldError) as caught:
            await resolver.call(endpoint, request)
        assert caught.value.field == field, (endpoint, request)


async def test_without_a_resolver_it_says_so(own_server: OwnServer) -> None:
    async with connect(own_server.url) as client:
        ref = await client.put(1)
        assert parse_ref(ref).kind == "context"
        with pytest.raises(UnavailableError, match="no resolver"):
            await warm(client)
