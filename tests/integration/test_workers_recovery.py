"""What the workers make of a stream that is not what was archived, of each other, and of a server that goes away."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from holdfast.client import Holdfast, connect
from holdfast.lake import Lake
from holdfast.lake import connect as connect_lake
from holdfast.lake.log import commit_path
from holdfast.lake.log_copies import drop_copies
from holdfast.schemas.errors import GapError, UnavailableError
from holdfast.schemas.rows import TABLES
from holdfast.streams.connection import open_connection
from holdfast.streams.events import NewEvent
from holdfast.streams.topology import begin_epoch, ensure_topology, purge_below, stream_info
from holdfast.streams.wire import EVENTS_STREAM, HOT_STREAM, KEYS_STREAM
from holdfast.workers import archiver as archiver_module
from holdfast.workers.control import accept_gap, archiver_status, evict, flush
from holdfast.workers.stream_marks import StreamMarks
from tests.running import (
    Acknowledged,
    check_watermarks,
    dead_letters,
    eventually,
    own_server,
    rolled_back,
    running,
    settings_in,
    target_of,
    until_ready,
    worker_process,
)
from tests.support import LIMIT_S, OwnServer, api, plain_client

if TYPE_CHECKING:
    from holdfast.workers.settings import WorkerName, WorkerSettings
    from holdfast.workers.system import RunningWorkers

pytestmark = pytest.mark.asyncio

BOTH: list[WorkerName] = ["archiver", "resolver"]


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncGenerator[OwnServer]:
    async with own_server(tmp_path) as started:
        yield started


@pytest.fixture
def settings(tmp_path: Path) -> WorkerSettings:
    return settings_in(tmp_path)


async def problems(hf: Holdfast) -> list[dict[str, Any]]:
    """What health tells, but for the workers that a test does not run."""
    health = await hf.health()
    assert health["ok"] == (not health["problems"])
    for problem in health["problems"]:
        assert problem["object"]
        assert problem["what"]
        assert len(problem["next_step"]) > 10
    left_out = {"ingester", "compactor", "janitor"}
    return [problem for problem in health["problems"] if problem["object"] not in left_out]


# Several archivers


async def test_a_standby_archiver_takes_over_when_the_active_one_is_killed(
    server: OwnServer, settings: WorkerSettings, tmp_path: Path
) -> None:
    stored = Acknowledged()
    async with worker_process(server.url, settings, ["archiver"], dict(os.environ)) as active:
        await until_ready(active)
        async with running(server.url, settings_in(tmp_path, "standby"), BOTH) as workers, connect(server.url) as hf:
            await stored.add(server.url, 50)
            await flush(hf.connection)
            assert workers.counters()["archiver"] == {}  # it waits
            await stored.add(server.url, 50)
            active.kill()
            await active.wait()
            assert "archiver" in {problem["object"] for problem in await problems(hf)} or workers.counters()["archiver"]
            await eventually(lambda: workers.counters()["archiver"])
            await eventually(lambda: _answers(hf))
            await flush(hf.connection)
            assert await problems(hf) == []
            await stored.check(server.url, settings.lake)


async def _answers(hf: Holdfast) -> bool:
    try:
        await archiver_status(hf.connection)
    except UnavailableError:
        return False
    return True


async def test_a_standby_archiver_drains_at_once(server: OwnServer, settings: WorkerSettings, tmp_path: Path) -> None:
    async with running(server.url, settings, ["archiver"]):
        async with asyncio.timeout(5):
            async with running(server.url, settings_in(tmp_path, "standby"), ["archiver"]):
                pass


async def test_two_archivers_at_once_commit_every_row_once(
    server: OwnServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the lock, which only saves work, the lake's commit is the fence."""

    async def no_lock(path: Path, on_standby: Callable[[], None] | None) -> int:
        return os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(archiver_module, "take_lock", no_lock)
    stored = Acknowledged()
    fast: dict[str, Any] = {"archive_interval_s": 0.0, "archive_rows": 15}
    async with (
        running(server.url, settings_in(tmp_path, "one", **fast), BOTH) as one,
        running(server.url, settings_in(tmp_path, "two", **fast), ["archiver"]) as two,
    ):
        for _ in range(5):
            await stored.add(server.url, 50)
        async with open_connection(target_of(server.url)) as connection:
            await flush(connection)
            await evict(connection, 0.0)
        await stored.check(server.url, tmp_path / "lake")
        counters = [workers.counters()["archiver"] for workers in (one, two)]
    assert all(any(counted[f"{table}_rows"] for table in TABLES) for counted in counters)
    assert sum(counted[f"{table}_fenced"] for counted in counters for table in TABLES) > 0
    assert sum(counted["events_rows"] for counted in counters) == 250
    await check_watermarks(server.url, tmp_path / "lake", {})


# A stream that is not what was archived


@pytest.mark.parametrize("published_since", [0, 3, 70])
async def test_a_lost_tail_is_told_and_what_took_its_place_is_archived(
    server: OwnServer, settings: WorkerSettings, tmp_path: Path, published_since: int
) -> None:
    """The next messages re-use the lost sequences: fewer than were lost, or more."""
    kept, lost, since = (Acknowledged() for _ in range(3))
    lost._next, since._next = 1_000, 2_000
    await kept.add(server.url, 50)
    async with rolled_back(server, tmp_path):
        await lost.add(server.url, 40)
        async with running(server.url, settings, BOTH), connect(server.url) as hf:
            await flush(hf.connection)
        marks = await check_watermarks(server.url, settings.lake, {})
    if published_since:
        await since.add(server.url, published_since)
    async with running(server.url, settings, BOTH), connect(server.url) as hf:
        await flush(hf.connection)
        told = await problems(hf)
        assert {problem["object"] for problem in told} == {"KV_ctx-hot", "KV_ctx-keys", EVENTS_STREAM}
        assert {problem["invariant"] for problem in told} == {"I1"}
        # What had been archived is kept though the server lost it; the rest is archived under a new epoch.
        everything = Acknowledged()
        for part in (kept, lost, since):
            everything.bodies |= part.bodies
            everything.events |= part.events
            everything.versions |= part.versions
        await everything.check(server.url, settings.lake)
        assert (await evict(hf.connection, 0.0)).left == 0
        await everything.check(server.url, settings.lake)
        for table in TABLES:
            await accept_gap(hf.connection, table)
        assert await problems(hf) == []
    async with running(server.url, settings, BOTH), connect(server.url) as hf:
        # It is over: a restart finds nothing new.
        assert await problems(hf) == []
        assert (await flush(hf.connection)).rows == dict.fromkeys(TABLES, 0)
        assert await dead_letters(hf) == []
        now = await check_watermarks(server.url, settings.lake, {})
        assert all(now[table] != marks[table] for table in TABLES)


async def test_who_stands_behind_a_tail_that_was_lost_before_it_was_archived_goes_on(
    server: OwnServer, settings: WorkerSettings, tmp_path: Path
) -> None:
    """The next messages take the lost sequences, which a watch has seen already: another life of the stream begins."""
    store, copy = tmp_path / "nats", tmp_path / "kept"
    marks = StreamMarks(settings.lake)

    def is_seen() -> bool:
        mark = marks.get(KEYS_STREAM)
        return mark is not None and mark.seq == 6

    async with running(server.url, settings, BOTH) as workers, connect(server.url, cache_bytes=0) as hf:
        await hf.keys.put("k", "archived")
        await flush(hf.connection)
        await server.stop()
        shutil.copytree(store, copy)
        await server.start(with_streams=False)
        await eventually(partial(_has_reconnected, workers, 0))
        await flush(hf.connection)  # compared: from now on it is noted how far the streams reach
        async with hf.keys.watch("k") as changes:
            for number in range(5):
                await hf.keys.put("k", number)
                assert (await anext(changes)).version == number + 2
            await eventually(is_seen)
            await server.kill()
            shutil.rmtree(store)
            shutil.move(copy, store)
            await server.start(with_streams=False)
            await eventually(partial(_has_reconnected, workers, 1))
            async with connect(server.url, cache_bytes=0) as other:
                await flush(other.connection)
                told = [problem["what"] for problem in await problems(other)]
                assert any("2 to 6, were stored and not archived, and are gone" in what for what in told), told
                assert (await other.keys.put("k", "since")).version == 2
                async with asyncio.timeout(LIMIT_S):
                    while (await (await anext(changes)).load()).body != "since":
                        pass
                await flush(other.connection)
                assert [version.version async for version in other.keys.history("k")] == [2, 1]
                assert [(await accept_gap(other.connection, table))["alarms"] for table in TABLES] == [1, 0, 1]
                assert await problems(other) == []


async def test_a_tail_lost_while_the_archiver_runs_is_noticed_at_the_reconnect(
    server: OwnServer, settings: WorkerSettings, tmp_path: Path
) -> None:
    kept, lost, since = (Acknowledged() for _ in range(3))
    lost._next, since._next = 1_000, 2_000
    await kept.add(server.url, 20)
    store, copy = tmp_path / "nats", tmp_path / "kept"
    async with running(server.url, settings, BOTH) as workers:
        await server.stop()
        shutil.copytree(store, copy)
        await server.start(with_streams=False)
        await eventually(partial(_has_reconnected, workers, 0))
        await lost.add(server.url, 30)
        async with connect(server.url) as hf:
            await flush(hf.connection)
        reconnects = workers.connection.reconnects
        await server.kill()
        shutil.rmtree(store)
        shutil.move(copy, store)
        await server.start(with_streams=False)
        await since.add(server.url, 60)
        await eventually(partial(_has_reconnected, workers, reconnects))
        async with connect(server.url) as hf:
            await flush(hf.connection)
            await evict(hf.connection, 0.0)
            everything = Acknowledged()
            for part in (kept, lost, since):
                everything.bodies |= part.bodies
                everything.events |= part.events
                everything.versions |= part.versions
            await everything.check(server.url, settings.lake)
            assert len(await problems(hf)) >= 3


async def test_nothing_is_purged_from_a_stream_that_holds_something_else(
    server: OwnServer, settings: WorkerSettings, tmp_path: Path
) -> None:
    """The last check before a purge: here the stream is exchanged behind the archiver's back."""
    async with running(server.url, settings, BOTH), connect(server.url) as hf:
        await hf.put_many([{"n": n} for n in range(10)])
        await flush(hf.connection)
        # A commit that claims other anchors than the stream holds is what a diverged stream looks like.
        lake = await asyncio.to_thread(Lake.open, settings.lake)
        [*_, anchor] = await asyncio.to_thread(lake.anchors, "contexts")
        assert anchor.seq == 10
        async with plain_client(server.url) as client:
            await api(client, f"STREAM.DELETE.{HOT_STREAM}")
        await ensure_topology(hf.connection)
        await _give_epoch(hf, settings)
        await hf.put_many([{"other": n} for n in range(20)])
        with pytest.raises(Exception, match="holds"):
            await evict(hf.connection, 0.0)
        assert (await stream_info(hf.connection, HOT_STREAM)).messages == 20
        assert "KV_ctx-hot" in {problem["object"] for problem in await problems(hf)}
        # The next cycle compares, begins a new epoch and archives it all; then it may leave.
        await flush(hf.connection)
        assert (await evict(hf.connection, 0.0)).left == 0
        assert len(await asyncio.to_thread(_refs, settings)) == 30


async def _give_epoch(hf: Holdfast, settings: WorkerSettings) -> None:
    """Makes the stream say that it is the one that was archived."""
    lake = await asyncio.to_thread(Lake.open, settings.lake)
    mark = await asyncio.to_thread(lake.watermark, "contexts")
    assert mark is not None
    config = (await hf.connection.api(f"STREAM.INFO.{HOT_STREAM}"))["config"]
    config["metadata"] |= {"holdfast.epoch": mark.epoch}
    await hf.connection.api(f"STREAM.UPDATE.{HOT_STREAM}", config)


def _refs(settings: WorkerSettings) -> list[tuple[Any, ...]]:
    with connect_lake(settings.lake) as sql:
        rows: list[tuple[Any, ...]] = sql.execute("SELECT DISTINCT ref FROM contexts").fetchall()
        return rows


async def test_a_stream_that_is_gone_is_refused_and_made_anew_only_when_told(
    server: OwnServer, settings: WorkerSettings, tmp_path: Path
) -> None:
    stored = Acknowledged()
    await stored.add(server.url, 30)
    async with running(server.url, settings, BOTH), connect(server.url) as hf:
        await flush(hf.connection)
    async with plain_client(server.url) as client:
        for stream in (EVENTS_STREAM, HOT_STREAM, "KV_ctx-keys"):
            await api(client, f"STREAM.DELETE.{stream}")
    alone: list[WorkerName] = ["ingester"]
    for names in (BOTH, alone):
        with pytest.raises(GapError, match="gone from the server"):
            async with running(server.url, settings, names):
                pytest.fail("workers started on a server without the archived streams")
    told = settings_in(tmp_path, accept_lost_streams=True)
    async with running(server.url, told, BOTH), connect(server.url) as hf:
        await stored.add(server.url, 30)  # sequences begin at one again
        await flush(hf.connection)
        await evict(hf.connection, 0.0)
        await stored.check(server.url, settings.lake)
        assert await problems(hf) == []


async def test_what_others_purge_is_a_gap_until_it_is_accepted(server: OwnServer, settings: WorkerSettings) -> None:
    async with running(server.url, settings, BOTH), connect(server.url) as hf:
        await hf.publish_many([_event(n) for n in range(10)])
        await flush(hf.connection)
        await hf.publish_many([_event(n) for n in range(10, 30)])
        await purge_below(hf.connection, EVENTS_STREAM, 21)  # ten that nobody archived
        ref = await hf.put({"still": "archived"})
        with pytest.raises(UnavailableError, match="11 to 20"):
            await flush(hf.connection)
        [problem] = await problems(hf)
        assert (problem["invariant"], problem["object"]) == ("I1", EVENTS_STREAM)
        assert "accept-gap" in problem["next_step"]
        assert (await stream_info(hf.connection, EVENTS_STREAM)).messages == 10
        # One stream's gap does not hold up the others.
        await eventually(lambda: _archived(settings, ref))
        assert await accept_gap(hf.connection, "events") == {"table": "events", "from": 11, "to": 20, "alarms": 0}
        assert await accept_gap(hf.connection, "events") == {"table": "events", "from": None, "to": None, "alarms": 0}
        await flush(hf.connection)
        assert await problems(hf) == []
        found = [event.data["n"] async for event in hf.query()]
        assert found == [*range(10), *range(20, 30)]


def _event(n: int) -> NewEvent:
    return NewEvent(namespace="default", agent_id="a", name="x", data={"n": n})


async def _archived(settings: WorkerSettings, ref: str) -> bool:
    return (ref,) in await asyncio.to_thread(_refs, settings)


async def test_a_purge_before_the_first_archiving_is_told(server: OwnServer, settings: WorkerSettings) -> None:
    async with connect(server.url) as hf:
        await hf.publish_many([_event(n) for n in range(10)])
        await purge_below(hf.connection, EVENTS_STREAM, 6)
        async with running(server.url, settings, BOTH):
            await flush(hf.connection)
            [problem] = await problems(hf)
            assert problem["object"] == EVENTS_STREAM
            assert "sequence 6" in problem["what"]
            assert [event.data["n"] async for event in hf.query()] == [5, 6, 7, 8, 9]


async def test_a_torn_commit_is_set_aside_and_its_rows_are_archived_again(
    server: OwnServer, settings: WorkerSettings, tmp_path: Path
) -> None:
    stored = Acknowledged()
    await stored.add(server.url, 20)
    async with running(server.url, settings, BOTH), connect(server.url) as hf:
        await flush(hf.connection)
        await stored.add(server.url, 20)
        await flush(hf.connection)
    lake = Lake.open(settings.lake)
    last = commit_path(settings.lake / "events", lake.version("events"))
    last.write_bytes(last.read_bytes()[:100])
    # Torn by a power cut, it was not copied yet.
    drop_copies(settings.lake / "events", [lake.version("events")])
    # Before an archiver mends it, it is told; readers see what is whole, and the rest live.
    async with running(server.url, settings_in(tmp_path, "reader"), ["resolver"]), connect(server.url) as hf:
        assert {problem["object"] for problem in await problems(hf)} == {"archiver", "lake/events"}
        await stored.check(server.url, settings.lake)
    async with running(server.url, settings, BOTH), connect(server.url) as hf:
        await flush(hf.connection)
        assert await problems(hf) == []
        await stored.check(server.url, settings.lake)
    await asyncio.to_thread(stored.check_by_sql, settings.lake, None)
    assert list((settings.lake / "events" / "_delta_log" / "torn").iterdir())


async def test_a_torn_commit_whose_messages_are_purged_stops_the_archiver(
    server: OwnServer, settings: WorkerSettings
) -> None:
    async with connect(server.url) as hf:
        async with running(server.url, settings, ["archiver"]):
            await hf.publish_many([_event(n) for n in range(10)])
            await flush(hf.connection)
        await purge_below(hf.connection, EVENTS_STREAM, 11)
        lake = Lake.open(settings.lake)
        last = commit_path(settings.lake / "events", lake.version("events"))
        last.write_bytes(b"")
        drop_copies(settings.lake / "events", [lake.version("events")])
        with pytest.raises(GapError, match="torn"):
            async with running(server.url, settings, ["archiver"]):
                pytest.fail("the archiver started over a torn commit that nothing can replace")
        assert last.exists()


# A server that goes away


async def test_archiving_goes_on_after_the_server_is_killed_and_restarted(server: OwnServer, tmp_path: Path) -> None:
    stored = Acknowledged()
    settings = settings_in(tmp_path, archive_interval_s=0.02, archive_rows=25)
    names: list[WorkerName] = ["archiver", "ingester", "janitor", "compactor", "resolver"]
    async with running(server.url, settings, names) as workers:
        for _ in range(3):
            await stored.add(server.url, 50)
            before = workers.connection.reconnects
            await server.restart()
            await eventually(partial(_has_reconnected, workers, before))
        await stored.add(server.url, 50)
        async with connect(server.url) as hf:
            await flush(hf.connection)
            await evict(hf.connection, 0.0)
            await stored.check(server.url, settings.lake)
            await eventually(lambda: _is_well(hf))
    await check_watermarks(server.url, settings.lake, {})


def _has_reconnected(workers: RunningWorkers, before: int) -> bool:
    return workers.connection.reconnects > before


async def _is_well(hf: Holdfast) -> bool:
    return await problems(hf) == []


async def test_B30_health_tells_that_no_archiver_runs(server: OwnServer, settings: WorkerSettings) -> None:
    async with running(server.url, settings, ["resolver"]), connect(server.url) as hf:
        [problem] = await problems(hf)
        assert problem["object"] == "archiver"
        assert "holdfast" in problem["next_step"]


async def test_health_answers_while_a_commit_is_under_way(server: OwnServer, settings: WorkerSettings) -> None:
    """A busy archiver is no missing one."""
    async with running(server.url, settings) as workers, connect(server.url) as hf:
        await flush(hf.connection)
        await hf.put_many([{"n": n, "pad": "x" * 200} for n in range(20_000)])
        flushing = asyncio.create_task(flush(hf.connection))
        answers = 0
        while not flushing.done():
            assert await problems(hf) == []
            answers += 1
        await flushing
        assert answers > 1
        assert workers.counters()["archiver"]["contexts_rows"] == 20_000


async def test_B05_B30_an_unwritable_lake_is_told_and_mended_by_itself(
    server: OwnServer, settings: WorkerSettings
) -> None:
    async with running(server.url, settings, BOTH), connect(server.url) as hf:
        await flush(hf.connection)
        folder = settings.lake / "events" / "_tmp"
        shutil.rmtree(folder, ignore_errors=True)
        folder.write_bytes(b"in the way")
        await hf.emit("a:x")
        with pytest.raises(UnavailableError):
            await flush(hf.connection)
        [problem] = await problems(hf)
        assert problem["object"] == EVENTS_STREAM
        assert len([event async for event in hf.query()]) == 1  # nothing is lost meanwhile
        folder.unlink()
        await flush(hf.connection)
        assert await problems(hf) == []


async def test_begin_epoch_keeps_every_message(server: OwnServer) -> None:
    async with connect(server.url) as hf:
        await hf.put_many([{"n": n} for n in range(5)])
        before = await stream_info(hf.connection, HOT_STREAM)
        after = await begin_epoch(hf.connection, HOT_STREAM, 3)
        assert after.epoch != before.epoch
        assert (after.epoch_start, after.messages, after.last_seq) == (3, 5, 5)
        assert (await ensure_topology(hf.connection))[HOT_STREAM] == after
