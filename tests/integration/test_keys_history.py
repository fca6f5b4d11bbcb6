"""Versions of named contexts that have left the hot tier: read as if they had not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from holdfast.client import Holdfast, connect
from holdfast.schemas.errors import NotFoundError, UnavailableError
from holdfast.streams.topology import purge_subject, stream_info
from holdfast.streams.wire import HOT_STREAM, KEYS_STREAM, key_subject
from holdfast.workers.control import evict, flush
from tests.key_support import reader_of, versions_of
from tests.running import eventually, own_server, running, settings_in

if TYPE_CHECKING:
    from holdfast.client.key_model import KeyVersion

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[str]:
    """A system that archives when it is told to."""
    data: Path = tmp_path_factory.mktemp("keys")
    async with own_server(data) as server, running(server.url, settings_in(data), ["archiver", "resolver"]):
        yield server.url


@pytest_asyncio.fixture(loop_scope="module")
async def hf(url: str, namespace: str) -> AsyncGenerator[Holdfast]:
    async with connect(url, namespace, "tester", cache_bytes=0) as client:
        yield client


async def make_cold(hf: Holdfast, *keys: str) -> None:
    """Everything is archived; all bodies leave the hot tier, and of these keys all versions but the newest."""
    await flush(hf.connection)
    await evict(hf.connection, 0.0)
    assert (await stream_info(hf.connection, HOT_STREAM)).messages == 0
    for key in keys:
        head = await hf.keys.head(key)
        assert head is not None
        assert await purge_subject(hf.connection, KEYS_STREAM, key_subject(hf.namespace, key), head.row.seq) > 0


async def written(hf: Holdfast, key: str) -> list[KeyVersion]:
    """Some versions of every sort: bodies small and large, growing, binary, a tombstone, a rollback."""
    versions: list[KeyVersion] = [
        await hf.keys.put(key, {"n": 1}, tags=["first"], session="s1", changed_by="ann", change_type="begin"),
        await hf.keys.patch(key, {"n": 2}),
        await hf.keys.put(key, b"\x00\xff" * 400_000),
        await hf.keys.delete(key),
        await hf.keys.put(key, [f"turn {n} " * 40 for n in range(30)]),
    ]
    versions += [await hf.keys.append(key, f"turn {n} " * 40) for n in range(30, 50)]
    return [*versions, await hf.keys.rollback(key, 1)]


def row_of(version: KeyVersion) -> tuple[Any, ...]:
    """What a version says of itself, wherever it is read."""
    return (
        version.key, version.version, version.op, version.ref, version.tags, version.session, version.agent,
        version.changed_by, version.change_type, version.event_id, version.timestamp, version.expires_at,
        version.position,
    )  # fmt: skip


async def test_A01_A03_E03_every_version_is_read_cold_as_it_was_hot(hf: Holdfast) -> None:
    versions = await written(hf, "k")
    bodies = {version.version: version.raw for version in versions if not version.deleted}  # type: ignore[attr-defined]
    stored = {version.version: version.stored_at async for version in hf.keys.history("k")}
    await make_cold(hf, "k")
    async with reader_of(hf) as other:
        history = [version async for version in other.keys.history("k")]
        assert [row_of(version) for version in history] == [row_of(version) for version in reversed(versions)]
        assert {version.version: version.stored_at for version in history} == stored
        for version in history:
            if version.deleted:
                with pytest.raises(NotFoundError):
                    await version.load()
                continue
            raw = bodies[version.version]
            assert (await version.load()).raw == raw
            assert (await other.keys.get("k", version.version)).raw == raw
            assert (await other.resolve(str(version.ref))).raw == raw
        assert (await other.keys.get("k")).body == {"n": 1}
        with pytest.raises(NotFoundError):
            await other.keys.get("k", 99)


async def test_E03_as_of_any_time_is_the_version_that_was_newest_then(hf: Holdfast) -> None:
    """Hot, half cold and cold; a time is of the server's, to the millisecond."""
    before = datetime.now(UTC) - timedelta(seconds=30)
    moments: list[tuple[datetime, int | None]] = []

    async def write(body: int | None) -> None:
        version = await (hf.keys.delete("k") if body is None else hf.keys.put("k", body))
        async with hf.keys.watch("k", from_version=version.version) as changes:
            stored_at = (await anext(changes)).stored_at
        assert stored_at is not None
        moments.append((stored_at, body))
        # No two versions in one millisecond.
        await eventually(lambda: datetime.now(UTC) > stored_at + timedelta(milliseconds=3), pause_s=0.001)

    for body in (1, 2, None, 4, 5):
        await write(body)

    async def check() -> None:
        with pytest.raises(NotFoundError):
            await hf.keys.get("k", as_of=before)
        just_before: int | None = None
        for stored_at, body in moments:
            for moment, expected in ((stored_at - timedelta(milliseconds=1), just_before), (stored_at, body)):
                if expected is None:
                    with pytest.raises(NotFoundError):
                        await hf.keys.get("k", as_of=moment)
                else:
                    assert (await hf.keys.get("k", as_of=moment)).body == expected
            just_before = body
        assert (await hf.keys.get("k", as_of=datetime(9999, 12, 31, tzinfo=UTC))).body == moments[-1][1]

    await check()
    await make_cold(hf, "k")
    await check()
    for body in (6, 7):
        await write(body)
    await check()


async def test_A01_a_chain_goes_on_behind_what_has_left(hf: Holdfast) -> None:
    for n in range(1, 6):
        await hf.keys.append("k", n)
    await make_cold(hf, "k")
    async with reader_of(hf) as other:
        assert (await other.keys.append("k", 6)).version == 6
        assert (await other.keys.patch("new", {"a": 1})).version == 1
        assert (await other.keys.get("k")).body == [1, 2, 3, 4, 5, 6]
        assert (await other.keys.rollback("k", 2)).body == [1, 2]
    assert await versions_of(hf, "k") == [(7, "rollback"), *[(n, "patch") for n in range(6, 0, -1)]]
    assert await hf.keys.diff("k", 1, 6) == [{"op": "add", "path": f"/{n}", "value": n + 1} for n in range(1, 6)]
    assert (await hf.keys.get_many(["k", "new"]))["k"].body == [1, 2]


async def test_A03_a_long_history_is_whole_and_lazy(hf: Holdfast) -> None:
    for start in range(0, 700, 50):
        await asyncio.gather(*(hf.keys.put("k", n) for n in range(start, start + 50)))
    await make_cold(hf, "k")
    await asyncio.gather(*(hf.keys.put("k", n) for n in range(40)))

    async def numbers(**options: Any) -> list[int]:
        return [version.version async for version in hf.keys.history("k", **options)]

    assert await numbers() == list(range(740, 0, -1))
    assert await numbers(before=703, limit=6) == [702, 701, 700, 699, 698, 697]
    assert await numbers(before=2) == [1]
    assert await numbers(limit=3) == [740, 739, 738]


async def test_a_growing_body_whose_parts_are_cold_goes_on_sharing(hf: Holdfast) -> None:
    items = [f"{n} " * 300 for n in range(60)]
    for item in items:
        await hf.keys.append("talk", item)
    await make_cold(hf, "talk")
    async with reader_of(hf) as other:
        before = (await stream_info(hf.connection, HOT_STREAM)).bytes
        await other.keys.append("talk", "one more")
        assert (await stream_info(hf.connection, HOT_STREAM)).bytes - before < 3_000
        assert (await other.keys.get("talk")).body == [*items, "one more"]
    # Half of it hot and half of it cold.
    assert (await hf.keys.get("talk")).body == [*items, "one more"]
    assert (await hf.keys.get("talk", 60)).body == items
    # An equal body that was put together of other parts, which are all cold.
    async with reader_of(hf) as other:
        same = await other.keys.put("copy", items)
        assert same.ref == (await hf.keys.get("talk", 60)).ref
        assert (await other.keys.get("copy")).body == items


async def test_a_watch_from_a_version_begins_in_the_lake(hf: Holdfast) -> None:
    for n in range(1, 31):
        await hf.keys.put("k", n)
    await make_cold(hf, "k")
    await hf.keys.put("k", 31)
    async with hf.keys.watch("k", from_version=5) as changes:
        async with asyncio.timeout(30):
            seen = [(await anext(changes)).version for _ in range(27)]
            await hf.keys.put("k", 32)
            while (version := (await anext(changes)).version) < 32:
                seen.append(version)
    assert seen[:27] == list(range(5, 32))


async def test_a_watch_is_told_what_was_trimmed_by_nobody_and_goes_on(hf: Holdfast) -> None:
    first = await hf.keys.put("k", 1)
    for n in range(2, 11):
        await hf.keys.put("k", n)
    await make_cold(hf, "k")
    async with hf.keys.watch("k", after=first.position) as changes, asyncio.timeout(30):
        assert (await anext(changes)).version == 10
        await hf.keys.put("k", 11)
        assert (await anext(changes)).version == 11


async def test_without_a_resolver_what_is_hot_is_still_read_and_the_rest_is_told(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    async with own_server(tmp_path) as server, connect(server.url, cache_bytes=0) as hf:
        async with running(server.url, settings, ["archiver"]):
            values = [await hf.keys.put("k", {"n": n}) for n in range(1, 6)]
            await make_cold(hf, "k")
        newest = await hf.keys.put("k", {"n": 6})
        async with reader_of(hf) as other:
            assert (await other.keys.get("k")).ref == newest.ref
            assert await other.keys.head("k") is not None
            assert [version.version async for version in other.keys.history("k", limit=2)] == [6, 5]
            assert [version.version async for version in other.keys.list()] == [6]
            reads: list[Any] = [
                other.keys.get("k", 1),
                other.keys.get("k", as_of=values[0].timestamp),
                values[0].load(),
            ]
            await reads.pop()
            for read in reads:
                with pytest.raises(UnavailableError, match="no resolver"):
                    await read
            with pytest.raises(UnavailableError, match="no resolver"):
                _ = [version async for version in other.keys.history("k")]
            with pytest.raises(NotFoundError):
                await other.keys.get("never written", 3)


async def test_a_body_whose_equal_is_stored_in_parts_that_have_left_is_stored_and_found(hf: Holdfast, url: str) -> None:
    turns = [{"turn": turn, "said": f"{turn} {'words of no great weight ' * 20}"} for turn in range(30)]
    for number in range(20, 30):
        await hf.keys.put("talk", turns[:number])
    await make_cold(hf)
    # Of the parts of this one only the last is in the hot tier.
    value = await hf.keys.put("talk", turns)
    async with connect(url, hf.namespace, "other", cache_bytes=0) as other:
        ref = await other.put(turns)
        assert ref == value.ref
        assert (await other.resolve(ref)).body == turns
