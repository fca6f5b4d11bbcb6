"""``hf.keys.watch``: every change, in order, at least once, whatever happens to the connection, server or caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.client import connect
from holdfast.schemas.errors import InvalidFieldError, InvalidNameError
from holdfast.streams.connection import ApiError, ApiFailure, open_connection
from holdfast.streams.pull import StreamReader
from holdfast.streams.topology import ensure_topology
from holdfast.streams.wire import KEYS_STREAM, key_subject
from tests.key_support import reader_of, url_of
from tests.support import LIMIT_S, api, plain_client

if TYPE_CHECKING:
    from holdfast.client import Holdfast
    from holdfast.client.key_model import KeyVersion
    from tests.support import OwnServer

pytestmark = pytest.mark.asyncio


async def take(changes: AsyncIterator[KeyVersion], count: int) -> list[KeyVersion]:
    """The next so many changes."""
    async with asyncio.timeout(LIMIT_S):
        return [await anext(changes) for _ in range(count)]


async def take_until(changes: AsyncIterator[KeyVersion], key: str, version: int) -> list[tuple[str, int]]:
    """The changes up to a certain one."""
    seen: list[tuple[str, int]] = []
    async with asyncio.timeout(LIMIT_S):
        async for change in changes:
            seen.append((change.key, change.version))
            if seen[-1] == (key, version):
                return seen
    raise AssertionError("the watch ended")


def told(changes: list[KeyVersion]) -> list[tuple[str, int, str]]:
    return [(change.key, change.version, change.op) for change in changes]


# What is seen.


async def test_E48_E44_every_change_after_the_entry_is_seen_in_order(hf: Holdfast) -> None:
    await hf.keys.put("plan.a", "before")
    async with reader_of(hf) as other, other.keys.watch("plan.") as changes:
        await hf.keys.put("plan.a", {"n": 1}, tags=["t"], session="s1", changed_by="ann")
        await hf.keys.patch("plan.b", {"n": 1})
        await hf.keys.delete("plan.a")
        await hf.keys.rollback("plan.a", 1)
        await hf.keys.commit({"plan.c": 1, "plan.d": 2})
        seen = await take(changes, 6)
        assert told(seen) == [
            ("plan.a", 2, "put"),
            ("plan.b", 1, "patch"),
            ("plan.a", 3, "delete"),
            ("plan.a", 4, "rollback"),
            ("plan.c", 1, "put"),
            ("plan.d", 1, "put"),
        ]
        first = seen[0]
        assert (first.tags, first.session, first.changed_by, first.namespace) == (("t",), "s1", "ann", hf.namespace)
        assert (await first.load()).body == {"n": 1}
        assert first.stored_at is not None
        assert seen[2].deleted
        # And while it is waited for.
        waiting = asyncio.create_task(take(changes, 1))
        await asyncio.sleep(0)
        await hf.keys.put("plan.e", 1)
        assert told(await waiting) == [("plan.e", 1, "put")]


async def test_only_keys_that_begin_with_the_prefix_are_seen(hf: Holdfast) -> None:
    async with hf.keys.watch("a.b") as some, hf.keys.watch() as all_changes, hf.keys.watch("a.b.c") as one:
        for key in ("a.b", "a.bc", "a.b.c", "a.c", "a", "a.b.c.d", "b"):
            await hf.keys.put(key, 1)
        assert [change.key for change in await take(some, 4)] == ["a.b", "a.bc", "a.b.c", "a.b.c.d"]
        assert [change.key for change in await take(all_changes, 7)][-1] == "b"
        assert [change.key for change in await take(one, 2)] == ["a.b.c", "a.b.c.d"]
        await hf.keys.put("a.b.c", 2)
        for changes in (some, all_changes, one):
            assert told(await take(changes, 1)) == [("a.b.c", 2, "put")]


async def test_another_namespace_is_not_seen(hf: Holdfast) -> None:
    async with connect(url_of(hf), f"{hf.namespace}.x") as stranger, hf.keys.watch() as changes:
        await stranger.keys.put("k", 1)
        await hf.keys.put("own", 1)
        await stranger.keys.put("k", 2)
        await hf.keys.put("own", 2)
        assert told(await take(changes, 2)) == [("own", 1, "put"), ("own", 2, "put")]


async def test_what_is_no_version_is_passed_over(hf: Holdfast) -> None:
    async with hf.keys.watch("k") as changes:
        async with plain_client(url_of(hf)) as client:
            await client.jetstream().publish(key_subject(hf.namespace, "k"), b"garbage")
        await hf.keys.put("k", 1)
        assert told(await take(changes, 1)) == [("k", 1, "put")]


async def test_many_changes_at_once_are_all_seen_once(hf: Holdfast) -> None:
    async with reader_of(hf) as other, other.keys.watch("many.") as changes:
        await asyncio.gather(*(hf.keys.put(f"many.{n % 7}", n) for n in range(1_500)))
        seen = await take(changes, 1_500)
    for key in {change.key for change in seen}:
        numbers = [change.version for change in seen if change.key == key]
        assert numbers == list(range(1, len(numbers) + 1))


# Where it begins.


async def test_a_watch_goes_on_behind_a_position(hf: Holdfast) -> None:
    values = [await hf.keys.put("k", n) for n in range(5)]
    assert len({value.position for value in values}) == 5
    async with hf.keys.watch("k", after=values[1].position) as changes:
        assert [change.version for change in await take(changes, 3)] == [3, 4, 5]
    tombstone = await hf.keys.delete("k")
    read = await hf.keys.put("k", "again")
    for position in (tombstone.position, (await hf.keys.get("k", 5)).position, values[-1].position):
        async with reader_of(hf) as other, other.keys.watch("k", after=position) as changes:
            assert (await take_until(changes, "k", read.version))[-1] == ("k", 7)
    # The position of what a watch gave is as good.
    async with hf.keys.watch("k", after=values[0].position) as changes:
        second = (await take(changes, 1))[0]
    async with hf.keys.watch("k", after=second.position) as changes:
        assert [change.version for change in await take(changes, 5)] == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("first", [1, 3, 5])
async def test_a_watch_begins_with_a_version_of_one_key(hf: Holdfast, first: int) -> None:
    for n in range(1, 6):
        await hf.keys.put("k", n)
        await hf.keys.put("k.below", n)
    async with hf.keys.watch("k", from_version=first) as changes:
        await hf.keys.put("k", 6)
        seen = await take_until(changes, "k", 6)
        assert sorted(set(seen)) == [("k", n) for n in range(first, 7)]
        assert [version for _, version in seen][: 6 - first] == list(range(first, 6))


async def test_a_watch_from_a_version_to_come_waits_for_it(hf: Holdfast) -> None:
    """Also of a key that there never was; no resolver runs that could be asked for it."""
    async with hf.keys.watch("k", from_version=3) as changes:
        for n in range(4):
            await hf.keys.put("k", n)
        assert [change.version for change in await take(changes, 2)] == [3, 4]


async def test_a_watch_may_begin_with_what_is_there(hf: Holdfast) -> None:
    for n in range(3):
        await hf.keys.put(f"k{n}", n)
    await hf.keys.delete("k1")
    async with hf.keys.watch("k", initial=True) as changes:
        await hf.keys.put("k9", 9)
        assert set(await take_until(changes, "k9", 1)) >= {("k0", 1), ("k2", 1), ("k9", 1)}
        await hf.keys.put("k0", 1)
        assert (await take_until(changes, "k0", 2))[-1] == ("k0", 2)


async def test_where_to_begin_is_said_once_and_so_that_it_can_be_found(hf: Holdfast) -> None:
    position = (await hf.keys.put("k", 1)).position
    bad: list[dict[str, Any]] = [
        {"after": position, "initial": True},
        {"after": position, "from_version": 1},
        {"from_version": 1, "initial": True},
        {"after": ""},
        {"after": "abc"},
        {"after": "abc:"},
        {"after": "abc:-1"},
        {"after": "abc:²"},
        {"after": "abc:" + "9" * 30},
        {"after": 5},
    ]
    for options in bad:
        with pytest.raises(InvalidFieldError) as caught:
            hf.keys.watch("k", **options)
        assert caught.value.field == "after"
    with pytest.raises(InvalidNameError):
        hf.keys.watch("", from_version=1)
    for prefix in ("k" * 769, "." * 5_000, 5):
        with pytest.raises(InvalidNameError):
            hf.keys.watch(prefix)  # type: ignore[arg-type]


# Cancels and the end.


async def test_a_caller_that_gives_up_waiting_misses_nothing(hf: Holdfast) -> None:
    """Each ``anext`` is cancelled at some turn of the loop, however far it has come by then."""
    async with hf.keys.watch("k") as changes:
        seen: list[int] = []
        for n in range(1, 31):
            await hf.keys.put("k", n)
            for turns in range(n * 2):
                waiting = asyncio.ensure_future(anext(changes))
                for _ in range(turns):
                    await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.wait([waiting])
                if not waiting.cancelled():
                    seen.append(waiting.result().version)
        async with asyncio.timeout(LIMIT_S):
            while not seen or seen[-1] < 30:
                seen.append((await anext(changes)).version)
    assert seen == list(range(1, 31))


@pytest.mark.parametrize(("options", "source"), [({"initial": True}, "list"), ({"from_version": 1}, "_earlier")])
async def test_giving_up_at_the_beginning_misses_nothing_either(
    hf: Holdfast, options: dict[str, Any], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller gives up while what came before is being read, which the first time takes for ever."""
    for n in range(1, 21):
        await hf.keys.put("k" if "from_version" in options else f"k{n:02}", n)
    read: Callable[..., AsyncIterator[KeyVersion]] = getattr(hf.keys, source)
    is_stuck = asyncio.Event()

    async def slowly(*arguments: Any) -> AsyncIterator[KeyVersion]:
        count = 0
        async for version in read(*arguments):
            if count == 7 and not is_stuck.is_set():
                is_stuck.set()
                await asyncio.Event().wait()
            count += 1
            yield version

    monkeypatch.setattr(hf.keys, source, slowly)
    async with hf.keys.watch("k", **options) as changes:
        seen = await take(changes, 7)
        waiting = asyncio.ensure_future(anext(changes))
        await is_stuck.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        seen += await take(changes, 13)
        assert [(await version.load()).body for version in seen] == list(range(1, 21))
        await hf.keys.put("k20", 1)
        if "initial" in options:
            assert told(await take(changes, 1)) == [("k20", 2, "put")]


async def test_a_closed_watch_ends_also_for_who_waits_for_it(hf: Holdfast) -> None:
    seen: asyncio.Queue[int] = asyncio.Queue()
    async with hf.keys.watch("k") as changes:

        async def listen() -> None:
            async for change in changes:
                seen.put_nowait(change.version)

        listening = asyncio.create_task(listen())
        await hf.keys.put("k", 1)
        async with asyncio.timeout(LIMIT_S):
            assert await seen.get() == 1
            await changes.close()
            await listening
    await hf.keys.put("k", 2)
    with pytest.raises(StopAsyncIteration):
        await anext(changes)
    assert seen.empty()
    # A watch that nobody began may be closed as well.
    await hf.keys.watch("k").close()


async def test_a_watch_leaves_nothing_behind(hf: Holdfast) -> None:
    reconnects = len(hf.connection.on_reconnect)
    for _ in range(3):
        async with hf.keys.watch("k") as changes:
            await hf.keys.put("k", 1)
            await take(changes, 1)
    assert len(hf.connection.on_reconnect) == reconnects
    async with plain_client(url_of(hf)) as client:
        answer = await api(client, f"CONSUMER.NAMES.{KEYS_STREAM}", {})
        names = answer["consumers"]
        assert isinstance(names, list)
        assert not [name for name in names if hf.connection.lean.inbox_id in name]


# What happens to servers.


async def test_after_a_crash_of_the_server_nothing_is_missing(own_server: OwnServer) -> None:
    """Changes before, during and after the outage; the writer is another client than the watcher."""
    async with connect(own_server.url) as hf, connect(own_server.url) as writer, hf.keys.watch("k") as changes:
        for n in range(20):
            await writer.keys.put("k", n)
        assert len(await take(changes, 10)) == 10
        writing = asyncio.create_task(_write(writer, 60))
        await own_server.restart()
        await writing
        seen = await take_until(changes, "k", 80)
    assert [version for _, version in seen] == list(range(11, 81))


async def _write(writer: Holdfast, count: int) -> None:
    for n in range(count):
        await writer.keys.put("k", n)


async def test_a_watch_waits_for_a_server_that_is_away(own_server: OwnServer) -> None:
    async with connect(own_server.url) as hf, hf.keys.watch("k") as changes:
        await hf.keys.put("k", 1)
        await take(changes, 1)
        await own_server.kill()
        waiting = asyncio.create_task(take(changes, 1))
        await asyncio.wait([waiting], timeout=0.5)
        assert not waiting.done()
        await own_server.start(with_streams=False)
        await hf.keys.put("k", 2)
        assert told(await waiting) == [("k", 2, "put")]


async def test_a_watch_waits_for_a_server_that_has_jetstream_switched_off(
    hf: Holdfast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one has that stops, and still answers for a while; what else it refuses is told."""
    refusals: list[ApiError] = []
    read = StreamReader.read

    async def stopping(reader: StreamReader, **limits: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return await read(reader, **limits)

    async with hf.keys.watch("k") as changes:
        monkeypatch.setattr(StreamReader, "read", stopping)
        refusals += [ApiError(ApiFailure(503, code, "JetStream not enabled"), "STREAM.INFO") for code in (10039, 10076)]
        await hf.keys.put("k", 1)
        assert told(await take(changes, 1)) == [("k", 1, "put")]
        assert refusals == []
        refusals.append(ApiError(ApiFailure(400, 10025, "bad request"), "STREAM.INFO"))
        with pytest.raises(ApiError, match="bad request"):
            await take(changes, 1)


async def _recreate(server: OwnServer) -> None:
    """The stream as it would be after a loss of everything: of the same name, empty, with another epoch."""
    async with plain_client(server.url) as client:
        await api(client, f"STREAM.DELETE.{KEYS_STREAM}")
    async with open_connection(server.url) as connection:
        await ensure_topology(connection)


async def test_a_stream_that_was_made_anew_is_followed_from_its_beginning(own_server: OwnServer) -> None:
    async with connect(own_server.url) as hf, hf.keys.watch("k") as changes:
        for n in range(10):
            await hf.keys.put("k", n)
        old = (await take(changes, 10))[-1]
        await _recreate(own_server)
        async with connect(own_server.url) as new:
            for n in range(3):
                await new.keys.put("k", f"new {n}")
            seen = await take(changes, 3)
            assert [change.version for change in seen] == [1, 2, 3]
            assert (await seen[0].load()).body == "new 0"
            assert str(seen[0].position).partition(":")[0] != str(old.position).partition(":")[0]
            # A position in the old life says nothing of the new one: all of it may be new.
            async with new.keys.watch("k", after=old.position) as again:
                assert [change.version for change in await take(again, 3)] == [1, 2, 3]


async def test_a_stream_made_anew_between_the_entry_and_the_first_look_is_noticed(own_server: OwnServer) -> None:
    async with connect(own_server.url) as hf:
        for n in range(10):
            await hf.keys.put("k", n)
        async with hf.keys.watch("k") as changes:
            await _recreate(own_server)
            async with connect(own_server.url) as new:
                for n in range(3):
                    await new.keys.put("k", n)
            assert [change.version for change in await take(changes, 3)] == [1, 2, 3]
