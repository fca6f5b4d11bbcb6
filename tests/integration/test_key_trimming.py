"""Superseded revisions of named contexts leave the hot tier: which, when, and what must not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from holdfast.client import connect
from holdfast.lake import Lake, LakeIndex
from holdfast.lake import connect as connect_lake
from holdfast.schemas import failpoints
from holdfast.schemas.errors import IntegrityError, InvalidFieldError, VersionConflictError
from holdfast.schemas.failpoints import FailpointError
from holdfast.schemas.ids import normal_event_id, now_ms
from holdfast.schemas.policies import POLICIES_KEY
from holdfast.streams.connection import ApiError, Connection, open_connection
from holdfast.streams.hot import HotTier, NewContext
from holdfast.streams.key_log import KeyLog
from holdfast.streams.topology import ensure_topology, purge_subject, stream_info
from holdfast.streams.wire import KEYS_STREAM
from holdfast.workers import trim as trim_module
from holdfast.workers import trim_plan
from holdfast.workers.control import flush, trim
from holdfast.workers.key_reader import ColdKeys
from holdfast.workers.trim import Trimmer
from tests.running import dead_letters, eventually, own_server, put_version, running, settings_in, target_of
from tests.support import OwnServer, plain_client

if TYPE_CHECKING:
    from holdfast.schemas.rows import KeyVersionRow

pytestmark = pytest.mark.asyncio

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS
WINDOW_S = 3_600.0


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncGenerator[OwnServer]:
    async with own_server(tmp_path) as started:
        yield started


@pytest_asyncio.fixture
async def connection(server: OwnServer) -> AsyncGenerator[Connection]:
    async with open_connection(target_of(server.url)) as opened:
        yield opened


class Clock:
    """The server's time, and how much of it has gone by since in this test's world."""

    def __init__(self) -> None:
        self.passed_ms = 0

        self._at_ms: int | None = None

    def stand_at(self, at_ms: int) -> None:
        """Stops the clock at a time, to which ``passed_ms`` is still added."""
        self._at_ms, self.passed_ms = at_ms, 0

    def __call__(self) -> int:
        return (now_ms() if self._at_ms is None else self._at_ms) + self.passed_ms


class Trimming:
    """A trimmer on its own, over a lake that an archiver feeds when it is told to."""

    def __init__(self, connection: Connection, trimmer: Trimmer, cold: ColdKeys, clock: Clock) -> None:
        self.connection = connection
        self.trimmer = trimmer
        self.cold = cold
        self.clock = clock

    async def hot(self, key: str, namespace: str = "default") -> list[int]:
        """The versions of a key that the hot tier holds."""
        log = KeyLog(self.connection)
        try:
            return [head.row.version async for head in log.revisions(namespace, key) if head.row is not None]
        finally:
            await log.close()

    async def history(self, key: str, namespace: str = "default") -> list[int]:
        """The versions of a key as a reader sees them: hot, then what is older from the lake; oldest first."""
        hot = await self.hot(key, namespace)
        page: list[KeyVersionRow] = await self.cold.page(namespace, key, hot[0] if hot else None, 1_000)
        return [row.version for row in page][::-1] + hot


@asynccontextmanager
async def trimming(connection: Connection, tmp_path: Path, *, window_s: float = WINDOW_S) -> AsyncGenerator[Trimming]:
    """Needs an archiver to have made the lake."""
    lake = await asyncio.to_thread(Lake.open, tmp_path / "lake")
    clock = Clock()
    with LakeIndex.open(tmp_path / "index" / "trimming") as index, ThreadPoolExecutor(1) as executor:
        hot = HotTier(connection)
        trimmer = Trimmer(connection, hot, lake, index, executor, hot_window_s=window_s, clock_ms=clock)
        cold = ColdKeys(lake, index)
        try:
            yield Trimming(connection, trimmer, cold, clock)
        finally:
            await trimmer.close()
            await cold.close()
            await hot.close()


@pytest_asyncio.fixture
async def flushed(server: OwnServer, tmp_path: Path) -> AsyncGenerator[Connection]:
    """A connection to a system whose archiver archives when it is told to, and purges nothing by itself."""
    async with (
        running(server.url, settings_in(tmp_path), ["archiver"]),
        open_connection(target_of(server.url)) as opened,
    ):
        yield opened


async def put_chain(connection: Connection, key: str, count: int, *, first: int = 1, **changes: Any) -> None:
    for version in range(first, first + count):
        await put_version(connection, changes.pop("namespace", "default"), key, version, **changes)


async def test_superseded_revisions_go_once_they_are_old_and_history_stays_whole(
    flushed: Connection, tmp_path: Path
) -> None:
    await put_chain(flushed, "a", 5)
    await put_chain(flushed, "single", 1)
    await put_chain(flushed, "gone", 2)
    await put_version(flushed, "default", "gone", 3, op="delete")
    await flush(flushed)
    async with trimming(flushed, tmp_path) as world:
        # Young: nothing goes.
        assert (await world.trimmer.round()).revisions == 0
        world.clock.passed_ms = int(WINDOW_S * 1000) - MINUTE_MS
        assert (await world.trimmer.round()).revisions == 0
        world.clock.passed_ms = int(WINDOW_S * 1000) + MINUTE_MS
        done = await world.trimmer.round()
        assert (done.keys, done.revisions, done.is_done) == (2, 6, True)
        assert [await world.hot(key) for key in ("a", "single", "gone")] == [[5], [1], [3]]
        assert await world.history("a") == [1, 2, 3, 4, 5]
        assert await world.history("gone") == [1, 2, 3]
        assert (await world.trimmer.round()).revisions == 0


async def test_what_is_not_archived_stays_however_old(flushed: Connection, tmp_path: Path) -> None:
    await put_chain(flushed, "a", 3)
    await flush(flushed)
    await put_chain(flushed, "a", 3, first=4)
    await put_chain(flushed, "b", 3)
    async with trimming(flushed, tmp_path) as world:
        world.clock.passed_ms = 10 * DAY_MS
        assert (await world.trimmer.round()).revisions == 2
        assert [await world.hot(key) for key in ("a", "b")] == [[3, 4, 5, 6], [1, 2, 3]]
        await flush(flushed)
        assert (await world.trimmer.round()).revisions == 3 + 2
        assert [await world.hot(key) for key in ("a", "b")] == [[6], [3]]
        assert await world.history("a") == [1, 2, 3, 4, 5, 6]


async def later_than(world: Trimming, key: str) -> int:
    """A moment after everything that was archived of a key, and before what is written next."""
    last = await world.cold.last("default", key)
    assert last is not None
    await eventually(lambda: now_ms() > last.stored_at_ms + 1)
    return last.stored_at_ms + 1


async def test_only_what_is_old_goes_when_a_key_is_written_on(flushed: Connection, tmp_path: Path) -> None:
    await put_chain(flushed, "a", 3)
    await flush(flushed)
    async with trimming(flushed, tmp_path) as world:
        middle = await later_than(world, "a")
        await put_chain(flushed, "a", 3, first=4)
        await flush(flushed)
        world.clock.stand_at(middle + int(WINDOW_S * 1000))
        assert (await world.trimmer.round()).revisions == 2
        assert await world.hot("a") == [3, 4, 5, 6]
        world.clock.passed_ms += MINUTE_MS
        assert (await world.trimmer.round()).revisions == 3
        assert await world.hot("a") == [6]


async def write_policies(connection: Connection, namespace: str, body: bytes, version: int = 1) -> None:
    hot = HotTier(connection)
    try:
        [put] = await hot.put_many([NewContext(namespace=namespace, kind="policies", body=body)])
    finally:
        await hot.close()
    await put_version(connection, namespace, POLICIES_KEY, version, ref=put.ref)


async def test_E26_limited_keys_keep_their_newest_versions_after_ten_minutes(
    flushed: Connection, tmp_path: Path
) -> None:
    body = b'{"v":1,"prefixes":{"few.":{"max_versions":3},"store.all.":{"max_versions":0}}}'
    await write_policies(flushed, "default", body)
    for key in ("few.a", "few.b", "store.x", "store.all.x", "free"):
        await put_chain(flushed, key, 12)
    await put_version(flushed, "other", "store.x", 1)
    for version in range(2, 13):
        await put_version(flushed, "other", "store.x", version)
    await put_chain(flushed, "few.short", 2)
    await flush(flushed)
    async with trimming(flushed, tmp_path, window_s=24 * 3600.0) as world:
        world.clock.passed_ms = 9 * MINUTE_MS
        assert (await world.trimmer.round()).revisions == 0
        world.clock.passed_ms = 11 * MINUTE_MS
        assert (await world.trimmer.round()).revisions == 9 + 9 + 2 + 2
        assert await world.hot("few.a") == await world.hot("few.b") == [10, 11, 12]
        assert await world.hot("few.short") == [1, 2]
        assert await world.hot("store.x") == list(range(3, 13))
        assert await world.hot("store.x", "other") == list(range(3, 13))
        assert await world.hot("store.all.x") == await world.hot("free") == list(range(1, 13))
        for key in ("few.a", "few.short", "store.x", "store.all.x", "free"):
            assert await world.history(key) == list(range(1, 3 if key == "few.short" else 13))
        # They grow: as many go.
        await put_chain(flushed, "few.a", 4, first=13)
        await flush(flushed)
        assert (await world.trimmer.round()).revisions == 4
        assert await world.hot("few.a") == [14, 15, 16]
        # And all of them give way to the hot window.
        world.clock.passed_ms = 25 * HOUR_MS
        await world.trimmer.round()
        assert await world.hot("few.a") == [16]


async def test_policies_are_read_from_the_lake_when_they_have_left_the_hot_tier(
    flushed: Connection, tmp_path: Path
) -> None:
    await write_policies(flushed, "default", b'{"prefixes":{"few.":{"max_versions":2}}}')
    await put_chain(flushed, "few.a", 5)
    await flush(flushed)
    async with plain_client_of(flushed) as client:
        await client.request("$JS.API.STREAM.PURGE.KV_ctx-hot", b"{}", timeout=5)
    async with trimming(flushed, tmp_path, window_s=24 * 3600.0) as world:
        world.clock.passed_ms = 11 * MINUTE_MS
        assert (await world.trimmer.round()).revisions == 3


@asynccontextmanager
async def plain_client_of(connection: Connection) -> AsyncGenerator[Any]:
    async with plain_client(connection.target.url) as client:
        yield client


@pytest.mark.parametrize("body", [b"[]", b'{"prefixes":{"":{"max_versions":-1}}}', b'{"prefixes":{"":{"limit":1}}}'])
async def test_broken_policies_are_told_and_limit_nothing(
    flushed: Connection, tmp_path: Path, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await write_policies(flushed, "default", body)
    await put_chain(flushed, "store.a", 15)
    await flush(flushed)
    async with trimming(flushed, tmp_path, window_s=24 * 3600.0) as world:
        world.clock.passed_ms = 11 * MINUTE_MS
        assert (await world.trimmer.round()).revisions == 0
    assert "no limit holds" in caplog.text


async def test_a_policy_that_was_deleted_holds_no_more(flushed: Connection, tmp_path: Path) -> None:
    await write_policies(flushed, "default", b'{"prefixes":{"few.":{"max_versions":2}}}')
    await put_version(flushed, "default", POLICIES_KEY, 2, op="delete")
    await put_chain(flushed, "few.a", 5)
    await flush(flushed)
    async with trimming(flushed, tmp_path, window_s=24 * 3600.0) as world:
        world.clock.passed_ms = 11 * MINUTE_MS
        assert (await world.trimmer.round()).revisions == 0


async def test_compare_and_set_goes_on_over_trimming(flushed: Connection, tmp_path: Path) -> None:
    async with connect(flushed.target.url) as hf:
        for n in range(5):
            await hf.keys.put("plan", {"n": n})
        await flush(flushed)
        async with trimming(flushed, tmp_path) as world:
            world.clock.passed_ms = 2 * HOUR_MS
            assert (await world.trimmer.round()).revisions == 4
            written = await hf.keys.put("plan", {"n": 5}, expected_version=5)
            assert written.version == 6
            with pytest.raises(VersionConflictError) as conflict:
                await hf.keys.put("plan", {"n": 6}, expected_version=4)
            assert (conflict.value.expected, conflict.value.actual) == (4, 6)
            assert await world.hot("plan") == [5, 6]
            assert await world.history("plan") == [1, 2, 3, 4, 5, 6]


async def test_a_version_written_during_the_purge_stays(
    flushed: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put_chain(flushed, "a", 3)
    await put_version(flushed, "default", "gone", 1)
    await put_version(flushed, "default", "gone", 2, op="delete")
    await flush(flushed)
    real = purge_subject

    async def late(connection: Connection, name: str, subject: str, seq: int) -> int:
        await put_version(connection, "default", subject.rpartition(".")[2], 99)
        return await real(connection, name, subject, seq)

    monkeypatch.setattr(trim_module, "purge_subject", late)
    async with trimming(flushed, tmp_path) as world:
        world.clock.passed_ms = 31 * DAY_MS
        await world.trimmer.round()
        assert (await world.hot("a"))[0] == 3
        world.clock.passed_ms += 11 * MINUTE_MS
        await world.trimmer.round()
        assert 99 in await world.hot("a")
        assert set(await world.hot("gone")) == {99}


async def test_a_head_leaves_only_as_an_archived_tombstone_of_thirty_days_and_after_its_announcement(
    flushed: Connection, tmp_path: Path
) -> None:
    await put_chain(flushed, "lives", 2)
    for key, op in (("deleted", "delete"), ("expired", "expire")):
        await put_version(flushed, "default", key, 1)
        await put_version(flushed, "default", key, 2, op=op)
    await put_version(flushed, "default", "back", 1)
    await put_version(flushed, "default", "back", 2, op="delete")
    await put_version(flushed, "default", "back", 3)
    await flush(flushed)
    await put_version(flushed, "default", "late", 1, op="delete")
    async with trimming(flushed, tmp_path) as world:

        async def heads() -> list[list[int]]:
            return [await world.hot(key) for key in ("lives", "deleted", "expired", "back", "late")]

        world.clock.passed_ms = 29 * DAY_MS
        await world.trimmer.round()
        assert await heads() == [[2], [2], [2], [3], [1]]
        assert not (await stream_info(flushed, KEYS_STREAM)).heads_archived
        world.clock.passed_ms = 31 * DAY_MS
        await world.trimmer.round()
        assert (await stream_info(flushed, KEYS_STREAM)).heads_archived
        assert await heads() == [[2], [2], [2], [3], [1]]
        world.clock.passed_ms += 9 * MINUTE_MS
        await world.trimmer.round()
        assert await heads() == [[2], [2], [2], [3], [1]]
        world.clock.passed_ms += 2 * MINUTE_MS
        assert (await world.trimmer.round()).revisions == 2
        assert await heads() == [[2], [], [], [3], [1]]
        assert await world.history("deleted") == [1, 2]
        assert [(row.version, row.op) for row in await world.cold.page("default", "expired", None, 9)] == [
            (2, "expire"),
            (1, "put"),
        ]
        # What the streams say of themselves is still as declared.
        await ensure_topology(flushed)


async def test_a_key_whose_head_is_gone_goes_on_from_the_lake(server: OwnServer, tmp_path: Path) -> None:
    async with (
        running(server.url, settings_in(tmp_path), ["archiver", "resolver"]),
        connect(server.url) as hf,
        trimming(hf.connection, tmp_path) as world,
    ):
        await hf.keys.put("plan", {"n": 1})
        await hf.keys.delete("plan")
        await flush(hf.connection)
        world.clock.passed_ms = 31 * DAY_MS
        await world.trimmer.round()
        world.clock.passed_ms += 11 * MINUTE_MS
        assert (await world.trimmer.round()).revisions == 1
        assert await world.hot("plan") == []
        async with connect(server.url) as other:
            assert (await other.keys.put("plan", {"n": 3})).version == 3
        await flush(hf.connection)
        assert await world.history("plan") == [1, 2, 3]


async def test_keys_without_tombstones_are_never_announced(flushed: Connection, tmp_path: Path) -> None:
    await put_chain(flushed, "a", 3)
    await flush(flushed)
    async with trimming(flushed, tmp_path) as world:
        world.clock.passed_ms = 100 * DAY_MS
        await world.trimmer.round()
        assert not (await stream_info(flushed, KEYS_STREAM)).heads_archived


async def test_a_stream_that_begins_anew_says_that_the_lake_holds_heads(server: OwnServer, tmp_path: Path) -> None:
    async with (
        running(server.url, settings_in(tmp_path), ["archiver"]),
        open_connection(target_of(server.url)) as connection,
    ):
        await put_chain(connection, "a", 3)
        await flush(connection)
        assert not (await stream_info(connection, KEYS_STREAM)).heads_archived
    async with open_connection(target_of(server.url)) as connection:
        await connection.api(f"STREAM.DELETE.{KEYS_STREAM}")
    settings = settings_in(tmp_path, accept_lost_streams=True)
    async with (
        running(server.url, settings, ["archiver"]),
        open_connection(target_of(server.url)) as connection,
    ):
        assert (await stream_info(connection, KEYS_STREAM)).heads_archived


async def test_garbage_and_contradictions_neither_stop_trimming_nor_take_a_version_away(
    flushed: Connection, tmp_path: Path
) -> None:
    await put_chain(flushed, "a", 3)
    await flushed.lean.request("$KV.ctx-keys.default.a", b"garbage")
    await put_version(flushed, "default", "b", 1)
    # Version 1 again, as a deletion: a dead letter, since the number names another content.
    await put_version(flushed, "default", "b", 1, op="delete")
    await put_version(flushed, "default", "c", 2**62)
    await put_chain(flushed, "store.c", 2)
    await put_version(flushed, "default", "store.c", 2**62)
    await flush(flushed)
    async with trimming(flushed, tmp_path) as world:
        world.clock.passed_ms = 31 * DAY_MS
        await world.trimmer.round()
        world.clock.passed_ms += 11 * MINUTE_MS
        await world.trimmer.round()
        assert await world.hot("a") == [3]
        assert await world.hot("b") == [1, 1]
        assert (await world.cold.get("default", "b", 1)).op == "put"  # type: ignore[union-attr]


async def test_a_version_under_any_event_id_is_archived_and_holds_up_no_other(
    flushed: Connection, tmp_path: Path
) -> None:
    await put_chain(flushed, "a", 3)
    await put_version(flushed, "default", "b", 1, event_id="not a uuid")
    await put_chain(flushed, "a", 3, first=4)
    report = await flush(flushed)
    assert report.watermarks["key_versions"] == 7
    assert await dead_letters(flushed) == []
    async with trimming(flushed, tmp_path) as world:
        assert await world.history("a") == [1, 2, 3, 4, 5, 6]
        last = await world.cold.last("default", "b")
        assert last is not None
        assert last.event_id == normal_event_id("default", "not a uuid")[0]


async def test_nothing_is_trimmed_from_a_stream_that_is_not_what_was_archived(
    flushed: Connection, server: OwnServer, tmp_path: Path
) -> None:
    await put_chain(flushed, "a", 3)
    await flush(flushed)
    config = (await flushed.api(f"STREAM.INFO.{KEYS_STREAM}"))["config"]
    await flushed.api(f"STREAM.DELETE.{KEYS_STREAM}")
    await eventually(lambda: _created(flushed, config))
    await put_chain(flushed, "b", 3)
    async with trimming(flushed, tmp_path) as world:
        world.clock.passed_ms = DAY_MS
        with pytest.raises(IntegrityError):
            await world.trimmer.round()
        assert await world.hot("b") == [1, 2, 3]


async def _created(connection: Connection, config: dict[str, Any]) -> bool:
    try:
        await connection.api(f"STREAM.CREATE.{KEYS_STREAM}", config)
    except ApiError:
        return False
    return True


@pytest.mark.parametrize("point", ["archiver.before_trim", "archiver.after_trim"])
async def test_a_round_cut_short_is_finished_by_the_next(
    flushed: Connection, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trim_module, "IN_FLIGHT", 2)
    for n in range(7):
        await put_chain(flushed, f"k{n}", 3)
    await flush(flushed)
    async with trimming(flushed, tmp_path) as world:
        world.clock.passed_ms = 2 * HOUR_MS
        failpoints.arm(point, hit=3)
        with pytest.raises(FailpointError):
            await world.trimmer.round()
    async with trimming(flushed, tmp_path) as world:  # a new process: its cursors begin anew
        world.clock.passed_ms = 2 * HOUR_MS
        await world.trimmer.round()
        for n in range(7):
            assert await world.hot(f"k{n}") == [3]
            assert await world.history(f"k{n}") == [1, 2, 3]


async def test_trimmed_anchors_raise_no_alarm_and_archiving_goes_on(server: OwnServer, tmp_path: Path) -> None:
    """What a restarted archiver compares the stream with may have been trimmed."""
    async with (
        running(server.url, settings_in(tmp_path), ["archiver"]),
        open_connection(target_of(server.url)) as connection,
    ):
        for start in range(1, 30, 3):
            await put_chain(connection, "a", 3, first=start)
            await flush(connection)  # each commit leaves an anchor
        async with trimming(connection, tmp_path) as world:
            world.clock.passed_ms = DAY_MS
            assert (await world.trimmer.round()).revisions == 29
    await server.kill()
    await server.start(with_streams=False)
    async with (
        running(server.url, settings_in(tmp_path), ["archiver"]) as workers,
        open_connection(target_of(server.url)) as connection,
    ):
        await put_chain(connection, "a", 2, first=31)
        report = await flush(connection)
        assert report.watermarks["key_versions"] == 32
        counters = workers.counters()["archiver"]
        assert (counters["key_versions_rows"], counters["key_versions_failed"]) == (2, 0)
        async with trimming(connection, tmp_path) as world:
            world.clock.passed_ms = DAY_MS
            await world.trimmer.round()
            assert await world.hot("a") == [32]
            assert await world.history("a") == list(range(1, 33))
    with connect_lake(tmp_path / "lake", server.url) as sql:
        assert sql.execute("SELECT count(*), max(version) FROM key_versions").fetchall() == [(32, 32)]


async def test_a_round_ends_when_its_time_is_over_and_the_next_goes_on(
    flushed: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trim_module, "BATCH", 10)
    for n in range(20):
        await put_chain(flushed, f"k{n}", 2)
    await flush(flushed)
    async with trimming(flushed, tmp_path) as world:
        world.clock.passed_ms = DAY_MS
        assert not (await world.trimmer.round(budget_s=0.0)).is_done
        rounds = 0
        # More time each round: on a busy machine a millisecond may be over before anything was done.
        while not (await world.trimmer.round(budget_s=0.001 * (rounds + 1))).is_done:
            rounds += 1
            assert rounds < 1_000
        assert [await world.hot(f"k{n}") for n in range(20)] == [[2]] * 20


# The command


async def test_E76_archive_old_versions_trims_every_key_to_its_newest(
    flushed: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put_chain(flushed, "long", 25)
    await put_chain(flushed, "short", 3)
    await put_chain(flushed, "exact", 10)
    report = await trim(flushed, 10)
    # All of it is younger than 10 minutes; it is archived all the same.
    assert (report.keys, report.revisions, report.left) == (0, 0, 38)
    monkeypatch.setattr(trim_module, "YOUNG_S", -60.0)
    await put_chain(flushed, "long", 5, first=26)
    report = await trim(flushed, 10)
    assert (report.keys, report.revisions, report.left) == (1, 20, 23)
    async with trimming(flushed, tmp_path) as world:
        assert await world.hot("long") == list(range(21, 31))
        assert await world.history("long") == list(range(1, 31))
        assert await world.hot("short") == [1, 2, 3]
    for wrong in (0, -1, 10**10):
        with pytest.raises(InvalidFieldError):
            await trim(flushed, wrong)


async def test_E76_what_is_younger_than_ten_minutes_stays_whatever_the_limit(
    flushed: Connection, tmp_path: Path
) -> None:
    await put_chain(flushed, "a", 10)
    await flush(flushed)
    async with trimming(flushed, tmp_path) as world:
        middle = await later_than(world, "a")
        await put_chain(flushed, "a", 10, first=11)
        await flush(flushed)
        world.clock.stand_at(middle + int(trim_plan.YOUNG_S * 1000))
        assert (await world.trimmer.trim_to(3)).revisions == 10
        assert await world.hot("a") == list(range(11, 21))
        world.clock.passed_ms += MINUTE_MS
        assert (await world.trimmer.trim_to(3)).revisions == 7
        assert await world.hot("a") == [18, 19, 20]


async def test_trimming_without_a_number_does_what_the_policies_say(
    flushed: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put_chain(flushed, "store.a", 15)
    await put_chain(flushed, "a", 15)
    assert (await trim(flushed)).revisions == 0


async def test_the_archiver_trims_by_itself(server: OwnServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trim_module, "YOUNG_S", -60.0)
    settings = settings_in(tmp_path, archive_interval_s=0.05, purge_interval_s=0.05, hot_window_s=0.0)
    async with (
        running(server.url, settings, ["archiver"]) as workers,
        open_connection(target_of(server.url)) as connection,
    ):
        await put_chain(connection, "store.a", 15)
        await eventually(lambda: workers.counters()["archiver"]["key_versions_purged"] == 14)
        assert (await stream_info(connection, KEYS_STREAM)).messages == 1
