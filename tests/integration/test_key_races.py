"""Named contexts where two writers meet, where caches are stale, where others put what is no version, and far back."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest
import pytest_asyncio

from holdfast.client import Holdfast, connect
from holdfast.client.key_history import KeyHistory
from holdfast.schemas.errors import (
    HoldfastError,
    InvalidBodyError,
    InvalidFieldError,
    NotFoundError,
    UnavailableError,
    VersionConflictError,
)
from holdfast.streams.decode import KeyVersionBody
from holdfast.streams.publish import Outgoing, publish
from holdfast.streams.wire import H_FORM, H_KIND, HOT_STREAM, KEYS_STREAM, hot_subject, key_subject
from tests.campaigns.rig import Rig
from tests.key_support import shorten_writes

if TYPE_CHECKING:
    from holdfast.client.key_cold import ColdKeySource
    from holdfast.client.key_model import KeyVersion
    from holdfast.client.keys import Keys
    from holdfast.schemas.rows import KeyVersionRow
    from tests.support import OwnServer

pytestmark = pytest.mark.asyncio

TURNS: Final = [{"role": "user", "content": f"turn {n}: " + "words and words " * 12} for n in range(40)]
LONG: Final = 2_300
"""Versions of a long chain: more than are read from the hot tier at once, several times over."""


@pytest_asyncio.fixture
async def other(nats_server: str, namespace: str) -> AsyncIterator[Holdfast]:
    """Another process's client of the same namespace, which remembers nothing of the first one's."""
    async with connect(nats_server, namespace=namespace, agent="other", cache_bytes=0) as client:
        yield client


@pytest_asyncio.fixture
async def rig() -> AsyncGenerator[Rig]:
    """A server of the test's own, with archiver and resolver, and two clients."""
    rig = Rig()
    try:
        await rig.start()
        yield rig
    finally:
        await rig.stop()


async def put_foreign(hf: Holdfast, key: str, payload: bytes = b"garbage") -> int:
    """What any client of NATS can do: ``nats kv put``."""
    return (await publish(hf.connection, Outgoing(key_subject(hf.namespace, key), {}, payload))).seq


async def numbers(versions: AsyncIterator[KeyVersion]) -> list[int]:
    return [version.version async for version in versions]


# Stale heads and expected versions.


async def test_a_stale_head_is_read_again_before_anything_is_refused(hf: Holdfast, other: Holdfast) -> None:
    """One client remembers the head that it wrote; all that it says is of the head that another has written since."""
    await hf.keys.put("plan", {"n": 1})
    await other.keys.delete("plan")
    with pytest.raises(NotFoundError):
        await hf.keys.delete("plan")
    assert (await hf.keys.put("plan", {"n": 3}, expected_version=0)).version == 3
    await other.keys.put("plan", {"n": 4})
    with pytest.raises(VersionConflictError) as caught:
        await hf.keys.patch("plan", {"n": 5}, expected_version=3)
    assert (caught.value.key, caught.value.expected, caught.value.actual) == ("plan", 3, 4)
    assert (await hf.keys.patch("plan", {"n": 5}, expected_version=4)).body == {"n": 5}
    await other.keys.put("plan", "text")
    with pytest.raises(InvalidBodyError):
        await hf.keys.patch("plan", {"n": 7})
    await other.keys.delete("plan")
    assert (await hf.keys.patch("plan", {"n": 8})).body == {"n": 8}
    assert await numbers(hf.keys.history("plan")) == list(range(8, 0, -1))


async def test_a_tombstone_may_be_expected_by_its_number_or_as_nothing(hf: Holdfast, other: Holdfast) -> None:
    await hf.keys.put("plan", 1)
    await hf.keys.delete("plan")
    for wrong in (1, 3):
        with pytest.raises(VersionConflictError) as caught:
            await other.keys.put("plan", 2, expected_version=wrong)
        assert caught.value.actual == 0
    assert (await other.keys.put("plan", 2, expected_version=2)).version == 3
    await other.keys.delete("plan")
    assert (await hf.keys.put("plan", 3, expected_version=0)).version == 5


async def test_of_many_that_expect_the_same_version_one_is_served(hf: Holdfast, other: Holdfast) -> None:
    for expected in range(3):
        outcomes = await asyncio.gather(
            *(
                keys.put("claim", {"n": number}, expected_version=expected)
                for number in range(15)
                for keys in (hf.keys, other.keys)
            ),
            return_exceptions=True,
        )
        won = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        lost = [outcome for outcome in outcomes if isinstance(outcome, VersionConflictError)]
        assert (len(won), len(lost)) == (1, 29)
        assert won[0].version == expected + 1
        assert {error.actual for error in lost} == {expected + 1}
        assert (await hf.keys.get("claim")).body == won[0].body


async def test_changes_that_are_refused_leave_those_beside_them_alone(hf: Holdfast) -> None:
    """Many changes of one key are written together; each has its own outcome."""
    await hf.keys.put("plan", {"n": 0})

    def fail(_: Any) -> Any:
        raise ValueError("of the caller's own")

    calls = [
        call
        for number in range(20)
        for call in (
            hf.keys.patch("plan", {f"f{number}": number}),
            hf.keys.patch("plan", {"lost": number}, expected_version=777),
            hf.keys.update("plan", fail),
            hf.keys.append("plan", number),
        )
    ]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    kinds = [type(outcome).__name__ for outcome in outcomes]
    assert kinds == ["KeyValue", "VersionConflictError", "ValueError", "InvalidBodyError"] * 20
    assert (await hf.keys.get("plan")).body == {"n": 0} | {f"f{number}": number for number in range(20)}
    assert await numbers(hf.keys.history("plan")) == list(range(21, 0, -1))


async def test_a_commit_meets_single_writes_of_its_own_process(hf: Holdfast) -> None:
    """They go different ways to the server; neither loses what the other writes."""
    names = [f"k{number}" for number in range(5)]
    commits = [
        hf.keys.commit({name: {"commit": number} for name in names}, change_type=f"c{number}") for number in range(4)
    ]
    patches = [hf.keys.patch(name, {f"f{number}": number}, change_type="p") for name in names for number in range(8)]
    await asyncio.gather(*commits, *patches)
    for name in names:
        history = [version async for version in hf.keys.history(name)]
        assert [version.version for version in history] == list(range(12, 0, -1))
        marks = sorted(version.change_type or "" for version in history)
        assert marks == ["c0", "c1", "c2", "c3", *["p"] * 8]


async def test_every_written_version_says_where_it_stands(hf: Holdfast) -> None:
    first = await hf.keys.put("plan", {"n": 1})
    assert first.position is not None
    second = await hf.keys.patch("plan", {"n": 2})
    async with hf.keys.watch("plan", after=first.position) as changes:
        change = await asyncio.wait_for(anext(changes), 10)
    assert (change.version, change.position) == (2, second.position)


# What is no version.


@pytest.mark.parametrize(
    "payload", [b"", b"garbage", b"[]", b'{"version":7}', b'{"version":0,"op":"put"}', b"\xff" * 99]
)
async def test_the_chain_goes_on_over_what_is_no_version(hf: Holdfast, other: Holdfast, payload: bytes) -> None:
    await hf.keys.put("plan", {"n": 1})
    for number in range(2, 5):
        await put_foreign(hf, "plan", payload)
        assert (await other.keys.get("plan")).body == {"n": number - 1}
        assert (await other.keys.get_many(["plan"]))["plan"].version == number - 1
        assert [version.version async for version in other.keys.list("pl")] == [number - 1]
        writer = (hf, other)[number % 2]
        assert (await writer.keys.put("plan", {"n": number}, expected_version=number - 1)).version == number
    await put_foreign(hf, "plan", payload)
    assert (await hf.keys.commit({"plan": {"n": 5}, "more": 1}))["plan"].version == 5
    assert await numbers(other.keys.history("plan")) == [5, 4, 3, 2, 1]
    assert (await other.keys.get("plan", 2)).body == {"n": 2}


async def test_a_key_that_holds_nothing_but_what_is_no_version_was_never_written(hf: Holdfast) -> None:
    for _ in range(40):
        await put_foreign(hf, "odd")
    assert await hf.keys.head("odd") is None
    assert [version async for version in hf.keys.history("odd")] == []
    for call in (hf.keys.get("odd"), hf.keys.get("odd", 1), hf.keys.delete("odd"), hf.keys.rollback("odd", 1)):
        with pytest.raises(NotFoundError):
            await call
    assert (await hf.keys.put("odd", 1)).version == 1


async def test_a_version_is_found_among_much_that_is_none(hf: Holdfast) -> None:
    for number in range(1, 6):
        await hf.keys.put("plan", {"n": number})
        await asyncio.gather(*(put_foreign(hf, "plan") for _ in range(150)))
    for number in range(1, 6):
        assert (await hf.keys.get("plan", number)).body == {"n": number}
    assert await numbers(hf.keys.history("plan")) == [5, 4, 3, 2, 1]
    assert (await hf.keys.head("plan") or pytest.fail("no head")).version == 5


async def test_a_hint_that_is_too_long_to_be_ours_is_not_followed(hf: Holdfast, other: Holdfast) -> None:
    """Anybody may write a version whose hint would have every reader ask for thousands of messages."""
    written = await hf.keys.put("plan", TURNS)
    body = KeyVersionBody(version=2, op="put", ref=written.ref, at=(5_000, *range(5_000)))
    await put_foreign(hf, "plan", msgspec.json.encode(body))
    before = other.connection.client.stats["out_msgs"]
    assert (await other.keys.get("plan")).body == TURNS
    assert other.connection.client.stats["out_msgs"] - before < 20


# Far back, without a lake to ask.


async def test_what_was_never_written_is_not_found_whether_a_resolver_runs_or_not(hf: Holdfast) -> None:
    for call in (hf.keys.get("never", 1), hf.keys.rollback("never", 1), hf.keys.diff("never", 1, 2)):
        with pytest.raises(NotFoundError):
            await call
    for bad in ("1", 1.0, True):
        with pytest.raises(InvalidFieldError):
            await hf.keys.get("never", bad)  # type: ignore[arg-type]
    assert [version async for version in hf.keys.history("never", before=5)] == []


async def test_a_long_chain_is_read_without_a_resolver_as_long_as_it_is_hot(hf: Holdfast, other: Holdfast) -> None:
    for start in range(0, LONG, 460):
        await asyncio.gather(
            *(hf.keys.put("long", number) for number in range(start, start + 460)),
            *(other.keys.put(f"beside.{number}", number) for number in range(start % 3 * 200)),
        )
    assert await numbers(other.keys.history("long")) == list(range(LONG, 0, -1))
    assert await numbers(other.keys.history("long", before=1_200, limit=3)) == [1_199, 1_198, 1_197]
    for number in (1, 2, 31, 32, 33, 499, 500, 501, 1_777, LONG - 1, LONG):
        assert (await other.keys.get("long", number)).version == number
    before = other.connection.client.stats["out_msgs"]
    await other.keys.get("long", 1_300)
    assert other.connection.client.stats["out_msgs"] - before < 20, "a version is looked for, not read up to"
    async with other.keys.watch("long", from_version=LONG - 2) as changes:
        assert [(await anext(changes)).version for _ in range(3)] == [LONG - 2, LONG - 1, LONG]


class _Trimmed:
    """The lake as a list, and a hot tier that is trimmed whenever the lake is not asked."""

    def __init__(self, rows: list[KeyVersionRow]) -> None:
        self._rows = {row.version: row for row in rows}

    async def last(self, key: str) -> KeyVersionRow | None:
        return self._rows[max(self._rows)]

    async def get(self, key: str, version: int) -> KeyVersionRow | None:
        return self._rows.get(version)

    async def page(self, key: str, before: int | None, limit: int) -> list[KeyVersionRow]:
        below = [number for number in sorted(self._rows, reverse=True) if before is None or number < before]
        return [self._rows[number] for number in below[: min(limit, 7)]]

    async def as_of(self, key: str, at_ms: int) -> KeyVersionRow | None:
        return None


async def test_a_history_is_whole_though_it_is_trimmed_while_it_is_read(hf: Holdfast) -> None:
    """Between any two pages the hot tier may let go of what was archived; the lake has it then."""
    count = 1_200
    written = list(await asyncio.gather(*(hf.keys.put("plan", n) for n in range(count))))
    rows = sorted((version.row for version in written), key=lambda row: row.version)
    cold: ColdKeySource = _Trimmed(rows)
    history = KeyHistory(hf.namespace, hf.keys._log, cold)
    for trimmed_at in (1, 499, 500, 501, 700, 999):
        found: list[int] = []
        async for row in history.newest_first("plan", None):
            found.append(row.version)
            if len(found) == trimmed_at:
                # Everything but the newest of what has not been read yet, and some of what has.
                request = {"filter": key_subject(hf.namespace, "plan"), "seq": rows[trimmed_at - 1].seq}
                await hf.connection.api(f"STREAM.PURGE.{KEYS_STREAM}", request)
        assert found == list(range(count, 0, -1)), f"trimmed after {trimmed_at}"
        assert [row.version async for row in history.from_version("plan", 3)] == list(range(3, count + 1))


# A server that goes away.


async def test_the_state_of_the_bucket_is_asked_again_when_the_answer_is_lost(own_server: OwnServer) -> None:
    """Before a key's first version is written; the write once failed with "unknown", though nothing was sent yet."""
    async with connect(own_server.url, agent="writer") as hf:
        assert own_server._server is not None
        own_server.signal(signal.SIGSTOP)
        asked = asyncio.create_task(hf.keys._log.info())
        await asyncio.sleep(0)  # it is sent, and nobody answers
        await own_server.restart()
        assert (await asked).name == KEYS_STREAM
        assert (await hf.keys.put("new", 1)).version == 1


# Parts and copies.


async def test_an_equal_body_is_stored_again_though_its_parts_have_left_the_hot_tier(rig: Rig) -> None:
    """One conversation under two keys: the first one's parts are in the lake, what names them is still hot."""
    one, two = rig.clients
    for length in range(20, 30):
        await one.keys.put("talk", TURNS[:length])
    await rig.archive()
    await rig.evict()
    await one.keys.put("talk", TURNS[:30])
    copy = await two.keys.put("copy", TURNS[:30])
    assert copy.ref == (await one.keys.get("talk")).ref
    async with connect(rig.server.url, agent="reader", cache_bytes=0) as reader:
        for key in ("talk", "copy"):
            assert (await reader.keys.get(key)).body == TURNS[:30]


@pytest.mark.slow
async def test_an_equal_body_that_cannot_be_looked_at_is_unavailable_not_a_conflict(rig: Rig) -> None:
    """Without a resolver nobody can tell whether it is equal."""
    one, two = rig.clients
    for length in (28, 29):
        await one.keys.put("talk", TURNS[:length])
    await rig.archive()
    await rig.evict()
    await one.keys.put("talk", TURNS[:30])
    await rig.stop_workers()
    async with connect(rig.server.url, agent="impatient") as impatient:
        shorten_writes(impatient)
        with pytest.raises(UnavailableError):
            await impatient.keys.put("copy", TURNS[:30])
    await rig.start_workers()
    assert (await two.keys.put("copy", TURNS[:30])).version == 1


async def test_a_damaged_manifest_is_passed_over_for_the_lake_s_with_a_hint_and_without(rig: Rig) -> None:
    hf = rig.clients[0]
    for length in range(20, 30):
        await hf.keys.put("talk", TURNS[:length])
    written = await hf.keys.put("talk", TURNS[:30])
    await rig.archive()
    assert written.ref is not None
    subject = hot_subject(hf.namespace, written.ref.rpartition("_")[2])
    await hf.connection.api(f"STREAM.PURGE.{HOT_STREAM}", {"filter": subject})
    await publish(hf.connection, Outgoing(subject, {H_KIND: "context", H_FORM: "manifest"}, b'{"size":1}'))
    async with connect(rig.server.url, agent="reader", cache_bytes=0) as reader:
        assert (await reader.keys.get("talk")).body == TURNS[:30]
        assert (await (await reader.keys.head("talk") or pytest.fail("no head")).load()).body == TURNS[:30]


# Names.


@pytest.mark.parametrize(
    "key",
    [
        *(
            ".",
            "..",
            "a.",
            ".a",
            "a..b",
            "*",
            ">",
            "a.*",
            "a.>",
            "$KV.ctx-keys.x",
            " ",
            "a b",
            "a\nb",
            "\x00",
            "x--",
            "x--_41",
        ),
        *("ü.ö", "日本.語", "🙂", "a" * 768, ".".join("a" * 32), "%s", "'\"\\", "holdfast.x", "history"),
    ],
)
async def test_a_key_is_any_text(hf: Holdfast, other: Holdfast, key: str) -> None:
    await hf.keys.put(key, {"n": 1})
    await other.keys.patch(key, {"n": 2})
    assert (await hf.keys.get(key)).body == {"n": 2}
    assert list(await hf.keys.get_many([key])) == [key]
    for prefix in {"", key, key[:1], key[: len(key) // 2], key.rpartition(".")[0]}:
        assert [found.key async for found in hf.keys.list(prefix)] == [key]
    assert await numbers(hf.keys.history(key)) == [2, 1]
    async with hf.keys.watch(key, from_version=1) as changes:
        assert [(await anext(changes)).key for _ in range(2)] == [key, key]
    assert set(await hf.keys.commit({key: 3, "beside": 4})) == {key, "beside"}
    assert (await hf.keys.delete(key)).version == 4


async def test_neighbouring_keys_are_not_confused(hf: Holdfast) -> None:
    names = ["a", "a.", "a.b", "ab", "a..b", "A", "a b", "a.b.c", "x--a", "ä", "a\u0308"]
    await hf.keys.commit({name: name for name in names})
    assert [found.key async for found in hf.keys.list()] == sorted(names)
    assert {key: value.body for key, value in (await hf.keys.get_many(names)).items()} == {name: name for name in names}
    for name in names:
        await hf.keys.delete(name)
        assert name not in await hf.keys.get_many(names)


@pytest.mark.parametrize("key", ["", "a" * 769, "ü" * 385, ".".join("a" * 33), "\ud800", 7, None])
async def test_what_is_no_key_is_refused_by_everything(hf: Holdfast, key: Any) -> None:
    async def all_of(versions: AsyncIterator[KeyVersion]) -> None:
        async for _ in versions:
            pass

    keys: Keys = hf.keys
    for call in (
        lambda: keys.put(key, 1),
        lambda: keys.get(key),
        lambda: keys.head(key),
        lambda: keys.get_many([key]),
        lambda: keys.patch(key, {}),
        lambda: keys.append(key, 1),
        lambda: keys.delete(key),
        lambda: keys.rollback(key, 1),
        lambda: keys.diff(key, 1, 2),
        lambda: all_of(keys.history(key)),
        lambda: keys.commit({key: 1, "fine": 1}),
    ):
        with pytest.raises(HoldfastError):
            await call()
    assert await hf.keys.get_many(["fine"]) == {}
