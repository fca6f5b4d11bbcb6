"""The archiver on a real server and a real lake: what moves, what is recognised, what stays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import pytest_asyncio

from holdfast.client import Holdfast, connect
from holdfast.lake import Lake, compact
from holdfast.lake import connect as connect_lake
from holdfast.lake.compaction import MergePolicy
from holdfast.schemas import limits
from holdfast.schemas.errors import NotFoundError
from holdfast.schemas.ids import new_event_id
from holdfast.schemas.refs import compute_digest, format_ref
from holdfast.schemas.rows import TABLES, ContextRow
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.events import NewEvent
from holdfast.streams.pull import StreamReader
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import EVENTS_STREAM, HOT_STREAM, KEYS_STREAM
from holdfast.workers.archive_plan import decode_run
from holdfast.workers.control import archiver_status, evict, flush
from tests.running import (
    Acknowledged,
    check_watermarks,
    dead_letters,
    eventually,
    own_server,
    put_version,
    running,
    settings_in,
    target_of,
)
from tests.support import OwnServer, plain_client

if TYPE_CHECKING:
    from holdfast.workers.settings import WorkerSettings

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncGenerator[OwnServer]:
    async with own_server(tmp_path) as started:
        yield started


@pytest.fixture
def settings(tmp_path: Path) -> WorkerSettings:
    return settings_in(tmp_path)


@pytest_asyncio.fixture
async def hf(server: OwnServer) -> AsyncGenerator[Holdfast]:
    async with connect(server.url, agent="tester", cache_bytes=0) as client:
        yield client


def rows_of(settings: WorkerSettings, query: str, url: str | None = None) -> list[tuple[Any, ...]]:
    with connect_lake(settings.lake, url) as sql:
        rows: list[tuple[Any, ...]] = sql.execute(query).fetchall()
        return rows


async def publish_raw(url: str, subject: str, message: object, headers: dict[str, str] | None = None) -> int:
    async with plain_client(url) as client:
        ack = await client.jetstream().publish(subject, json.dumps(message).encode(), headers=headers)
        return ack.seq


async def test_a_cycle_moves_all_three_tables_and_evict_leaves_nothing_hot(
    server: OwnServer, settings: WorkerSettings
) -> None:
    stored = Acknowledged()
    async with running(server.url, settings, ["archiver", "resolver"]):
        async with open_connection(target_of(server.url)) as connection:
            await flush(connection)  # past the round at the start
            await stored.add(server.url, 100)
            report = await flush(connection)
            assert report.rows == {"contexts": 102, "events": 100, "key_versions": 100}  # one body in two chunks
            assert report.watermarks == {"contexts": 102, "events": 100, "key_versions": 100}
            again = await flush(connection)
            assert again.rows == dict.fromkeys(TABLES, 0)
            evicted = await evict(connection, 0.0)
            assert (evicted.purged, evicted.left) == (102, 0)
            # Evicting is of bodies: the log of events and the keys stay.
            assert (await stream_info(connection, EVENTS_STREAM)).messages == 100
            assert (await stream_info(connection, KEYS_STREAM)).messages == 100
        await stored.check(server.url, settings.lake)
    await asyncio.to_thread(stored.check_by_sql, settings.lake, None)


async def test_flush_covers_everything_acknowledged_before_it(server: OwnServer, settings: WorkerSettings) -> None:
    async with running(server.url, settings, ["archiver"]), connect(server.url) as hf:
        stopping = asyncio.Event()
        done = 0

        async def publish() -> None:
            nonlocal done
            while not stopping.is_set():
                await hf.emit("a:x", {"n": done})
                done += 1

        publisher = asyncio.create_task(publish())
        for _ in range(10):
            before = done
            report = await flush(hf.connection)
            assert report.watermarks["events"] >= before
            [(count,)] = await asyncio.to_thread(rows_of, settings, "SELECT count(*) FROM events")
            assert count >= before
        stopping.set()
        await publisher


async def test_an_event_repeated_after_the_duplicate_window_is_one_row(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, duplicate_window_s=0.1)
    async with (
        own_server(tmp_path, duplicate_window_s=0.1) as server,
        running(server.url, settings, ["archiver", "resolver"]),
        connect(server.url) as hf,
    ):
        event = NewEvent(namespace="default", agent_id="a", name="x", data={"n": 1})
        assert await hf.publish_many([event]) == [True]
        await flush(hf.connection)
        # The server has forgotten the id when it takes it again.
        await eventually(lambda: _is_new(hf, event), pause_s=0.05)
        report = await flush(hf.connection)
        assert report.rows["events"] == 0
        # And twice in one run, the second of them also beyond the first's row.
        await eventually(lambda: _is_new(hf, event), pause_s=0.05)
        await eventually(lambda: _is_new(hf, event), pause_s=0.05)
        await flush(hf.connection)
        counters = (await archiver_status(hf.connection)).counters
        assert counters["events_repeated"] >= 3
        assert await dead_letters(hf) == []
        assert len([found async for found in hf.query()]) == 1
        assert await asyncio.to_thread(rows_of, settings, "SELECT count(*) FROM events") == [(1,)]


async def _is_new(hf: Holdfast, event: NewEvent) -> bool:
    return (await hf.publish_many([event]))[0]


@pytest.mark.parametrize("in_one_run", [True, False])
async def test_B17_one_id_with_another_content_is_a_dead_letter_and_the_first_stays(
    server: OwnServer, settings: WorkerSettings, in_one_run: bool
) -> None:
    identity = new_event_id()
    async with running(server.url, settings, ["archiver", "resolver"]), connect(server.url) as hf:
        first = {"id": identity, "data": 1, "timestamp": 1_769_850_000}
        await publish_raw(server.url, "ctx.default.event.a.x", first)
        if not in_one_run:
            await flush(hf.connection)
        other = await publish_raw(server.url, "ctx.default.event.a.x", first | {"data": 2})
        await publish_raw(server.url, "ctx.default.event.a.x", first)
        await flush(hf.connection)
        [letter] = await dead_letters(hf)
        assert (letter.stream, letter.seq, letter.code) == (EVENTS_STREAM, other, "conflict")
        assert identity in letter.reason
        assert json.loads(letter.payload)["data"] == 2
        [found] = [event async for event in hf.query(event_id=identity)]
        assert found.data == 1


async def test_one_key_version_with_another_content_is_a_dead_letter(
    server: OwnServer, settings: WorkerSettings
) -> None:
    async with running(server.url, settings, ["archiver"]), open_connection(target_of(server.url)) as connection:
        same = {"event_id": new_event_id(), "timestamp_ms": 1}
        await put_version(connection, "default", "k", 1, **same)
        await flush(connection)
        await put_version(connection, "default", "k", 1, **same)
        other = await put_version(connection, "default", "k", 1, event_id=new_event_id(), timestamp_ms=2)
        await flush(connection)
        assert [(letter.stream, letter.seq, letter.code) for letter in await dead_letters(connection)] == [
            (KEYS_STREAM, other, "conflict")
        ]
        assert await asyncio.to_thread(rows_of, settings, "SELECT key, version FROM key_versions") == [("k", 1)]


async def test_a_context_stored_again_after_it_left_the_hot_tier_is_shown_once(
    server: OwnServer, settings: WorkerSettings, hf: Holdfast
) -> None:
    async with running(server.url, settings, ["archiver", "resolver"]):
        await flush(hf.connection)
        for round_ in range(3):
            ref = await hf.put({"again": True})
            for url in (server.url, None):
                shown = await asyncio.to_thread(rows_of, settings, "SELECT ref FROM contexts", url)
                assert shown == ([(ref,)] if url or round_ else [])
            await flush(hf.connection)
            assert (await hf.resolve(ref)).tier == "hot"
            await evict(hf.connection, 0.0)
            assert (await hf.resolve(ref)).tier == "lake"
        forms = await asyncio.to_thread(rows_of, settings, "SELECT form FROM contexts_stored ORDER BY stream_seq")
        assert forms == [("plain",), ("touch",), ("touch",)]
        assert (await hf.stats())["lake"]["contexts"] == 1


# Contexts that come inline


def inline(n: int) -> tuple[dict[str, Any], str]:
    """A raw event with a context, and the reference that the context has."""
    body = b'{"inline":%d}' % n
    return {"context": msgspec.Raw(body)}, format_ref("event", compute_digest("default", "event", body))


async def publish_inline(url: str, n: int) -> str:
    message, ref = inline(n)
    async with plain_client(url) as client:
        await client.jetstream().publish("ctx.default.event.a.x", msgspec.json.encode(message))
    return ref


async def test_the_ingester_stores_inline_contexts_at_once(server: OwnServer, settings: WorkerSettings) -> None:
    async with running(server.url, settings, ["ingester"]) as workers, connect(server.url) as hf:
        refs = [await publish_inline(server.url, n) for n in range(20)]
        await eventually(lambda: workers.counters()["ingester"]["stored"] == 20)
        assert [(await hf.resolve(ref)).body for ref in refs] == [{"inline": n} for n in range(20)]


async def test_the_archiver_stores_inline_contexts_without_an_ingester(
    server: OwnServer, settings: WorkerSettings, hf: Holdfast
) -> None:
    async with running(server.url, settings, ["archiver"]) as workers:
        await flush(hf.connection)
        refs = [await publish_inline(server.url, n) for n in range(20)]
        report = await flush(hf.connection)
        # One flush archives the events and what they brought.
        assert report.rows == {"events": 20, "contexts": 20, "key_versions": 0}
        assert workers.counters()["archiver"]["events_interned"] == 20
        await evict(hf.connection, 0.0)
    stored = await asyncio.to_thread(rows_of, settings, "SELECT ref FROM contexts ORDER BY stream_seq")
    assert stored == [(ref,) for ref in refs]


async def test_a_query_answers_with_references_that_resolve_though_no_ingester_runs(
    server: OwnServer, settings: WorkerSettings, hf: Holdfast
) -> None:
    async with running(server.url, settings, ["resolver"]):
        refs = [await publish_inline(server.url, n) for n in range(20)]
        with pytest.raises(NotFoundError):
            await hf.resolve(refs[0])
        found = [event.context_ref async for event in hf.query()]
        assert found == refs
        assert [(await hf.resolve(ref)).body for ref in refs] == [{"inline": n} for n in range(20)]


async def test_rows_are_the_same_whoever_reads_them(server: OwnServer, settings: WorkerSettings) -> None:
    await publish_raw(server.url, "ctx.default.event.a.x", {"data": 1})
    await publish_raw(server.url, "ctx.default.event.a.x", {"data": 2}, {"Nats-Msg-Id": "mine"})
    await publish_raw(server.url, "ctx.default.event.a.x", {"id": "also mine", "context": {"a": 1}, "extra": [1]})
    everything = "SELECT * EXCLUDE (day) FROM events ORDER BY stream_seq"
    async with running(server.url, settings, ["archiver"]), open_connection(target_of(server.url)) as connection:
        live = await asyncio.to_thread(rows_of, settings, everything, server.url)
        await flush(connection)
        archived = await asyncio.to_thread(rows_of, settings, everything)
    assert live == archived
    assert len(live) == 3


# Purging


async def test_B05_B08_purge_goes_by_age_and_never_beyond_the_watermark(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, duplicate_window_s=0.1)
    async with (
        own_server(tmp_path, duplicate_window_s=0.1) as server,
        running(server.url, settings, ["archiver"]),
        connect(server.url) as hf,
    ):
        await flush(hf.connection)  # past the round at the start
        await hf.put_many([{"n": n} for n in range(100)])
        assert (await evict(hf.connection, 0.0)).left == 100  # nothing is archived
        await flush(hf.connection)
        assert (await evict(hf.connection, 3600.0)).left == 100  # all of it is young
        await hf.put_many([{"n": n} for n in range(100, 150)])
        evicted = await evict(hf.connection, 0.0)
        assert (evicted.purged, evicted.left) == (100, 50)  # the rest is not archived
        await check_watermarks(server.url, settings.lake, {})


async def test_events_are_never_purged_younger_than_the_duplicate_window(tmp_path: Path) -> None:
    fast: dict[str, Any] = {"archive_interval_s": 0.02, "purge_interval_s": 0.02, "hot_window_s": 0.0}
    async with own_server(tmp_path) as server, connect(server.url) as hf:
        await hf.put({"n": 1})
        await hf.emit("a:x")
        async with running(server.url, settings_in(tmp_path, **fast), ["archiver"]):
            # The same round that empties the hot tier looks at the log too.
            await eventually(lambda: _messages(hf, HOT_STREAM, 0))
            await flush(hf.connection)
            assert await _messages(hf, EVENTS_STREAM, 1)
    async with own_server(tmp_path / "short", duplicate_window_s=0.1) as server, connect(server.url) as hf:
        await hf.emit("a:x")
        settings = settings_in(tmp_path / "short", duplicate_window_s=0.1, **fast)
        async with running(server.url, settings, ["archiver"]):
            await eventually(lambda: _messages(hf, EVENTS_STREAM, 0))
    assert await asyncio.to_thread(rows_of, settings, "SELECT count(*) FROM events") == [(1,)]


async def test_key_versions_are_not_purged(tmp_path: Path, server: OwnServer) -> None:
    settings = settings_in(tmp_path, archive_interval_s=0.02, purge_interval_s=0.02, hot_window_s=0.0)
    async with running(server.url, settings, ["archiver"]), connect(server.url) as hf:
        await put_version(hf.connection, "default", "k", 1)
        await hf.put(1)
        await eventually(lambda: _messages(hf, HOT_STREAM, 0))
        assert await _messages(hf, KEYS_STREAM, 1)


async def test_B08_the_hot_tier_is_bounded_by_count(tmp_path: Path, server: OwnServer) -> None:
    settings = settings_in(tmp_path, archive_interval_s=0.02, purge_interval_s=0.02, hot_messages=30)
    async with running(server.url, settings, ["archiver", "resolver"]), connect(server.url, cache_bytes=0) as hf:
        refs = await hf.put_many([{"n": n} for n in range(100)])
        await eventually(lambda: _messages(hf, HOT_STREAM, 30))
        assert [(await hf.resolve(ref)).tier for ref in (refs[0], refs[69], refs[70], refs[99])] == [
            "lake",
            "lake",
            "hot",
            "hot",
        ]


async def _messages(hf: Holdfast, stream: str, count: int) -> bool:
    return (await stream_info(hf.connection, stream)).messages == count


# Beside others


async def test_compaction_while_archiving_changes_no_row(tmp_path: Path) -> None:
    settings = settings_in(
        tmp_path, archive_interval_s=0.01, archive_rows=20, compact_interval_s=0.02, duplicate_window_s=0.1
    )
    stored = Acknowledged()
    async with own_server(tmp_path, duplicate_window_s=0.1) as server:
        async with running(server.url, settings, ["archiver", "compactor", "resolver"]) as workers:
            for _ in range(6):
                await stored.add(server.url, 50)
            await eventually(lambda: workers.counters()["compactor"]["merged"] >= 20)
            assert workers.counters()["compactor"]["failed"] == 0
            async with open_connection(target_of(server.url)) as connection:
                await flush(connection)
                await evict(connection, 0.0)
            await stored.check(server.url, settings.lake)
        lake = await asyncio.to_thread(Lake.open, settings.lake)
        await asyncio.to_thread(lambda: compact(lake, policy=MergePolicy(min_files=2)))
        await asyncio.to_thread(stored.check_by_sql, settings.lake, server.url)
        await check_watermarks(server.url, settings.lake, {})


async def test_a_backlog_of_a_full_commit_does_not_wait_for_its_time(tmp_path: Path, server: OwnServer) -> None:
    settings = settings_in(tmp_path, archive_rows=100)
    async with running(server.url, settings, ["archiver"]) as workers, connect(server.url) as hf:
        # The first round is at the start; after it only a backlog begins one.
        await flush(hf.connection)
        await hf.put_many([{"n": n} for n in range(100)])
        await eventually(lambda: workers.counters()["archiver"]["contexts_rows"] == 100)


async def test_a_run_that_inflates_is_archived_in_parts(server: OwnServer, settings: WorkerSettings) -> None:
    """300 MB of zeros are 20 kB in the stream; they must not be so many in memory."""
    async with connect(server.url) as hf:
        size = limits.CHUNK_BYTES
        await hf.put_many([b"%04d" % n + b"\0" * (size - 4) for n in range(600)])
        messages = await _read_all(hf.connection)
        run = await asyncio.to_thread(decode_run, "contexts", messages)
        assert 0 < run.taken < len(messages)
        assert sum(len(row.body) for row in run.rows if isinstance(row, ContextRow)) < 130 * limits.MIB
        async with running(server.url, settings, ["archiver"]) as workers:
            assert (await flush(hf.connection)).watermarks["contexts"] == 600
            assert workers.counters()["archiver"]["contexts_cycles"] >= 3


async def _read_all(connection: Connection) -> list[Any]:
    reader = StreamReader(connection, HOT_STREAM, 1)
    try:
        return (await reader.read(limit=10_000))[0]
    finally:
        await reader.close()


async def test_a_put_whose_copy_is_purged_right_after_is_in_the_lake(tmp_path: Path) -> None:
    """A context that is there already is not written again; its only copy may leave the hot tier at any moment."""
    settings = settings_in(
        tmp_path, archive_interval_s=0.0, purge_interval_s=0.0, hot_window_s=0.0, duplicate_window_s=0.1
    )
    async with (
        own_server(tmp_path, duplicate_window_s=0.1) as server,
        running(server.url, settings, ["archiver", "resolver"]) as workers,
        connect(server.url, cache_bytes=0) as hf,
    ):
        large = "chunked " * 100_000
        for n in range(60):
            # The same few contexts again and again, while they come and go; one in chunks, some of them shared.
            refs = await hf.put_many([{"n": n % 3}, {"m": n % 5}, large + str(n % 2)])
            found = await hf.resolve_many(refs)
            assert found.missing == []
            assert [found.found[ref].body for ref in refs] == [{"n": n % 3}, {"m": n % 5}, large + str(n % 2)]
        assert workers.counters()["archiver"]["contexts_purged"] >= 20
        assert await dead_letters(hf) == []
        await flush(hf.connection)
        assert len(await asyncio.to_thread(rows_of, settings, "SELECT ref FROM contexts")) == 3 + 5 + 2
        await check_watermarks(server.url, settings.lake, {})
