"""``hf.keys`` as its users meet it: values and versions, changes, history, lists."""

from __future__ import annotations

import asyncio
import math
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import jsonpatch
import pytest

from holdfast.client import Holdfast, connect
from holdfast.client.keys import UNCHANGED
from holdfast.schemas.errors import InvalidBodyError, NotFoundError, UnavailableError, VersionConflictError
from holdfast.schemas.refs import parse_ref
from holdfast.streams.wire import hot_subject
from tests.key_support import keys_in, reader_of, url_of, versions_of
from tests.support import plain_client

if TYPE_CHECKING:
    from tests.conftest import StartServer

pytestmark = pytest.mark.asyncio


# Values and versions.


async def test_E08_E46_E47_what_is_put_is_got_by_everybody(hf: Holdfast) -> None:
    put = await hf.keys.put("plan.trip", {"goal": "fly", "budget": 300}, tags=["travel"], session="s1")
    assert (put.key, put.version, put.op, put.namespace, put.agent) == ("plan.trip", 1, "put", hf.namespace, "tester")
    async with reader_of(hf) as other:
        for client in (hf, other):
            value = await client.keys.get("plan.trip")
            assert value.body == {"goal": "fly", "budget": 300}
            assert value.raw == b'{"budget":300,"goal":"fly"}'
            assert (value.version, value.tags, value.session, value.agent) == (1, ("travel",), "s1", "tester")
            assert (value.ref, value.event_id, value.position) == (put.ref, put.event_id, put.position)
            assert value.stored_at is not None
            assert abs(value.stored_at - value.timestamp) < timedelta(seconds=20)
            assert (await value.load()).ref == put.ref
            assert (await client.resolve(str(put.ref))).body == value.body


@pytest.mark.parametrize(
    "body",
    [{}, [], "", b"", 0, False, None, "text ü", b"\x00\xff", [None], {"a": {"b": [1, {"c": None}]}}, 1.5],
    ids=str,
)
async def test_any_body_comes_back_as_it_was(hf: Holdfast, body: Any) -> None:
    await hf.keys.put("k", body)
    async with reader_of(hf) as other:
        value = await other.keys.get("k")
        assert value.body == body
        assert type(value.body) is type(body)


async def test_a_body_that_a_reader_changes_is_changed_for_nobody_else(hf: Holdfast) -> None:
    put = await hf.keys.put("k", {"list": [1]})
    put.body["list"].append(2)
    (await hf.keys.get("k")).body["list"].append(3)
    assert (await hf.keys.get("k")).body == {"list": [1]}
    patched = await hf.keys.patch("k", {"n": 1})
    assert patched.body == {"list": [1], "n": 1}


async def test_E03_every_write_is_a_version_without_gaps(hf: Holdfast) -> None:
    for n in range(1, 6):
        assert (await hf.keys.put("k", n)).version == n
    assert [(await hf.keys.get("k", n)).body for n in range(1, 6)] == [1, 2, 3, 4, 5]
    assert await versions_of(hf, "k") == [(n, "put") for n in (5, 4, 3, 2, 1)]
    for number in (0, -1, 6, 2**70):
        with pytest.raises(NotFoundError) as caught:
            await hf.keys.get("k", number)
        assert caught.value.field == "version"


async def test_a_key_that_was_never_written_is_absent_without_any_resolver(hf: Holdfast) -> None:
    """No resolver runs here: nothing must be asked of the lake to know it."""
    for get in (hf.keys.get("k"), hf.keys.get("k", 1), hf.keys.get("k", as_of=datetime.now(UTC))):
        with pytest.raises(NotFoundError, match="'k'"):
            await get
    assert await hf.keys.head("k") is None
    assert await hf.keys.get_many(["k", "j"]) == {}
    assert await versions_of(hf, "k") == []
    assert [version async for version in hf.keys.history("k", before=5)] == []
    with pytest.raises(NotFoundError):
        await hf.keys.delete("k")
    with pytest.raises(NotFoundError):
        await hf.keys.update("k", lambda _: UNCHANGED)
    with pytest.raises(NotFoundError):
        await hf.keys.rollback("k", 1)


async def test_get_many_leaves_out_what_is_not_there(hf: Holdfast) -> None:
    await asyncio.gather(*(hf.keys.put(f"k{n}", n) for n in range(30)))
    await hf.keys.delete("k7")
    wanted = [f"k{n}" for n in range(40)] + ["k1"]
    async with reader_of(hf) as other:
        for client in (hf, other):
            found = await client.keys.get_many(wanted)
            assert {key: value.body for key, value in found.items()} == {f"k{n}": n for n in range(30) if n != 7}
            assert list(found) == [f"k{n}" for n in range(30) if n != 7]
            assert all(value.position for value in found.values())
    assert await hf.keys.get_many([]) == {}


async def test_get_many_of_more_keys_than_one_request_takes(hf: Holdfast) -> None:
    await asyncio.gather(*(hf.keys.put(f"many.{n}", n) for n in range(1_100)))
    found = await hf.keys.get_many(f"many.{n}" for n in range(1_200))
    assert {key: value.body for key, value in found.items()} == {f"many.{n}": n for n in range(1_100)}


# Expected versions.


async def test_E03_a_conflict_carries_both_versions_and_writes_nothing(hf: Holdfast) -> None:
    await hf.keys.put("k", "one", expected_version=0)
    await hf.keys.put("k", "two", expected_version=1)
    writes = [
        hf.keys.put("k", "x", expected_version=1),
        hf.keys.put("k", "x", expected_version=0),
        hf.keys.patch("k", {"x": 1}, expected_version=7),
        hf.keys.append("k", 1, expected_version=1),
        hf.keys.update("k", lambda body: body, expected_version=1),
        hf.keys.delete("k", expected_version=1),
        hf.keys.rollback("k", 1, expected_version=1),
        hf.keys.commit({"k": "x", "other": 1}, {"k": 1}),
    ]
    for write, expected in zip(writes, (1, 0, 7, 1, 1, 1, 1, 1), strict=True):
        with pytest.raises(VersionConflictError) as caught:
            await write
        assert (caught.value.key, caught.value.expected, caught.value.actual) == ("k", expected, 2)
        assert str(expected) in str(caught.value)
        assert "2" in str(caught.value)
    assert await versions_of(hf, "k") == [(2, "put"), (1, "put")]
    assert await hf.keys.head("other") is None


async def test_only_one_of_many_that_expect_the_same_version_wins(hf: Holdfast) -> None:
    async with AsyncExitStack() as stack:
        clients = [hf, *[await stack.enter_async_context(reader_of(hf)) for _ in range(3)]]
        outcomes = await asyncio.gather(
            *(clients[n % 4].keys.put("k", n, expected_version=0) for n in range(20)), return_exceptions=True
        )
    won = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert len(won) == 1
    assert all(isinstance(outcome, VersionConflictError) for outcome in outcomes if outcome is not won[0])
    assert (await hf.keys.get("k")).body == won[0].body


async def test_a_deleted_key_is_expected_as_version_zero(hf: Holdfast) -> None:
    await hf.keys.put("k", 1)
    await hf.keys.delete("k")
    with pytest.raises(VersionConflictError) as caught:
        await hf.keys.put("k", 2, expected_version=1)
    assert caught.value.actual == 0
    assert (await hf.keys.put("k", 2, expected_version=0)).version == 3


# Patch, append, update.


async def test_E36_D05_a_patch_merges_and_creates(hf: Holdfast) -> None:
    assert (await hf.keys.patch("k", {"a": 1, "b": {"c": 2, "gone": None}})).body == {"a": 1, "b": {"c": 2}}
    patched = await hf.keys.patch("k", {"b": {"d": 3}, "a": None}, changed_by="ann", change_type="correction")
    assert (patched.body, patched.version, patched.op) == ({"b": {"c": 2, "d": 3}}, 2, "patch")
    assert (patched.changed_by, patched.change_type, patched.agent) == ("ann", "correction", "tester")
    assert (await hf.keys.get("k", 1)).body == {"a": 1, "b": {"c": 2}}


async def test_E37_append_grows_a_list_and_nothing_else(hf: Holdfast) -> None:
    for n in range(3):
        await hf.keys.append("k", {"n": n}, change_type="append")
    value = await hf.keys.get("k")
    assert (value.body, value.version, value.change_type) == ([{"n": 0}, {"n": 1}, {"n": 2}], 3, "append")
    await hf.keys.put("o", {"a": 1})
    with pytest.raises(InvalidBodyError, match="not a list") as caught:
        await hf.keys.append("o", 1)
    assert caught.value.field == "body"
    await hf.keys.put("t", "text")
    with pytest.raises(InvalidBodyError, match="not JSON"):
        await hf.keys.patch("t", {"a": 1})
    assert [(await hf.keys.get(key)).version for key in ("o", "t")] == [1, 1]


async def test_E34_E29_E31_tags_session_and_expiry_stay_through_changes(hf: Holdfast) -> None:
    put = await hf.keys.put("k", {}, tags=["b", "a"], session="s1", ttl=3_600)
    patched = await hf.keys.patch("k", {"x": 1})
    assert (patched.tags, patched.session, patched.expires_at) == (("b", "a"), "s1", put.expires_at)
    changed = await hf.keys.patch("k", {"x": 2}, tags=["c"], session="s2", ttl=math.inf)
    assert (changed.tags, changed.session, changed.expires_at) == (("c",), "s2", None)
    replaced = await hf.keys.put("k", {})
    assert (replaced.tags, replaced.session, replaced.expires_at) == ((), None, None)


async def test_update_is_read_modify_and_write(hf: Holdfast) -> None:
    created = await hf.keys.update("k", lambda body: body + 1, default=41, op="put", kind="counter")
    assert (created.body, created.op, created.context.kind) == (42, "put", "counter")
    same = await hf.keys.update("k", lambda _: UNCHANGED)
    assert (same.body, same.version) == (42, 1)
    updated = await hf.keys.update("k", lambda body: body * 2)
    assert (updated.body, updated.version, updated.op, updated.context.kind) == (84, 2, "patch", "counter")
    with pytest.raises(ZeroDivisionError):
        await hf.keys.update("k", lambda body: body / 0)
    assert (await hf.keys.get("k")).version == 2


async def test_the_kind_of_a_key_stays_through_changes_that_come_together(hf: Holdfast) -> None:
    await hf.keys.put("k", {}, kind="plan")
    values = await asyncio.gather(*(hf.keys.patch("k", {str(n): n}) for n in range(10)))
    assert {value.context.kind for value in values} == {"plan"}


async def test_E01_D02_concurrent_changes_of_one_key_all_survive_each_as_a_version(hf: Holdfast) -> None:
    """From one process and from another at the same time."""
    async with reader_of(hf) as other:
        values = await asyncio.gather(
            *((hf if n % 2 else other).keys.patch("k", {f"field{n}": n}) for n in range(200)),
        )
        assert sorted(value.version for value in values) == list(range(1, 201))
        assert (await other.keys.get("k")).body == {f"field{n}": n for n in range(200)}
        history = [version async for version in hf.keys.history("k")]
        assert [version.version for version in history] == list(range(200, 0, -1))
        assert len({version.event_id for version in history}) == 200
        before: dict[str, int] = {}
        for number in range(1, 201):
            body = (await hf.keys.get("k", number)).body
            assert len(body) == number
            assert body.items() >= before.items()
            before = body


async def test_one_change_that_fails_does_not_hurt_those_it_came_with(hf: Holdfast) -> None:
    def fails(body: Any) -> Any:
        raise LookupError("my own fault")

    def stops(body: Any) -> Any:
        return next(iter(()))

    await hf.keys.put("k", [])
    outcomes = await asyncio.gather(
        hf.keys.append("k", 1),
        hf.keys.update("k", fails),
        hf.keys.append("k", 2),
        hf.keys.patch("k", {"x": 1}, expected_version=99),
        hf.keys.update("k", stops),
        hf.keys.update("k", lambda _: object()),
        hf.keys.append("k", 3),
        return_exceptions=True,
    )
    kinds = [type(outcome) for outcome in outcomes if isinstance(outcome, BaseException)]
    assert kinds == [LookupError, VersionConflictError, RuntimeError, InvalidBodyError]
    assert (await hf.keys.get("k")).body == [1, 2, 3]
    assert (await hf.keys.get("k")).version == 4


async def test_a_put_does_not_need_the_body_that_a_patch_beside_it_cannot_read(start_server: StartServer) -> None:
    """The body was purged behind our back and no resolver runs: only what begins with the old body fails."""
    server = await start_server()
    async with connect(server.url, cache_bytes=0) as own:
        value = await own.keys.put("k", {"a": 1})
    async with plain_client(server.url) as client:
        subject = hot_subject("default", parse_ref(str(value.ref)).digest)
        await client.jetstream().purge_stream("KV_ctx-hot", subject=subject)
    async with connect(server.url, cache_bytes=0) as own:
        lost, also, put, patched = await asyncio.gather(
            own.keys.patch("k", {"b": 1}),
            own.keys.patch("k", {"b": 2}),
            own.keys.put("k", {"c": 1}),
            own.keys.patch("k", {"d": 1}),
            return_exceptions=True,
        )
        assert isinstance(lost, UnavailableError)
        assert isinstance(also, UnavailableError)
        assert not isinstance(put, BaseException)
        assert not isinstance(patched, BaseException)
        assert (await own.keys.get("k")).body == {"c": 1, "d": 1}


async def test_a_change_whose_caller_was_cancelled_still_lands(hf: Holdfast) -> None:
    await hf.keys.put("k", [])
    waiting = [asyncio.create_task(hf.keys.append("k", n)) for n in range(5)]
    last = asyncio.create_task(hf.keys.append("k", "last"))
    await asyncio.sleep(0)  # each has begun, none has an answer
    for task in waiting:
        task.cancel()
    assert (await last).body[-1] == "last"
    await asyncio.wait(waiting)
    assert all(task.cancelled() for task in waiting)
    body = (await hf.keys.get("k")).body
    assert body in ([*range(5), "last"], ["last"])
    assert (await hf.keys.get("k")).version == 1 + len(body)


async def test_a_closing_client_waits_for_what_it_was_given(hf: Holdfast) -> None:
    async with connect(url_of(hf), hf.namespace) as client:
        tasks = [asyncio.create_task(client.keys.append("k", n)) for n in range(20)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert all(task.done() for task in tasks)
    assert (await hf.keys.get("k")).body == [*range(20)]


# Deleting, rolling back, history, diff.


async def test_E39_a_deleted_key_is_absent_and_its_history_stays(hf: Holdfast) -> None:
    await hf.keys.put("k", 1, tags=["t"], session="s1")
    tombstone = await hf.keys.delete("k", changed_by="ann")
    assert (tombstone.version, tombstone.op, tombstone.deleted, tombstone.ref) == (2, "delete", True, None)
    assert (tombstone.tags, tombstone.session, tombstone.changed_by) == (("t",), "s1", "ann")
    with pytest.raises(NotFoundError):
        await tombstone.load()
    for get in (hf.keys.get("k"), hf.keys.get("k", 2)):
        with pytest.raises(NotFoundError):
            await get
    with pytest.raises(NotFoundError):
        await hf.keys.delete("k")
    assert await hf.keys.get_many(["k"]) == {}
    assert await keys_in(hf) == []
    head = await hf.keys.head("k")
    assert head is not None
    assert (head.version, head.deleted) == (2, True)
    assert (await hf.keys.get("k", 1)).body == 1
    assert await versions_of(hf, "k") == [(2, "delete"), (1, "put")]
    assert (await hf.keys.patch("k", {"new": True})).body == {"new": True}


async def test_E03_a_rollback_is_a_new_version_equal_to_the_old(hf: Holdfast) -> None:
    first = await hf.keys.put("k", {"plan": "A"}, tags=["good"], session="s1")
    await hf.keys.put("k", {"plan": "B"})
    back = await hf.keys.rollback("k", 1, changed_by="ann")
    assert (back.version, back.op, back.body, back.ref) == (3, "rollback", {"plan": "A"}, first.ref)
    assert (back.tags, back.session, back.changed_by) == (("good",), "s1", "ann")
    await hf.keys.delete("k")
    assert (await hf.keys.rollback("k", 2)).body == {"plan": "B"}
    assert await versions_of(hf, "k") == [(5, "rollback"), (4, "delete"), (3, "rollback"), (2, "put"), (1, "put")]
    with pytest.raises(NotFoundError, match="tombstone"):
        await hf.keys.rollback("k", 4)
    with pytest.raises(NotFoundError):
        await hf.keys.rollback("k", 9)


async def test_A03_history_is_newest_first_and_read_as_far_as_asked(hf: Holdfast) -> None:
    for n in range(1, 8):
        await hf.keys.put("k", n, changed_by=f"user{n}")

    async def numbers(**options: Any) -> list[int]:
        return [version.version async for version in hf.keys.history("k", **options)]

    assert await numbers() == [7, 6, 5, 4, 3, 2, 1]
    assert await numbers(limit=2) == [7, 6]
    assert await numbers(before=4) == [3, 2, 1]
    assert await numbers(before=4, limit=1) == [3]
    assert await numbers(before=1) == await numbers(limit=0) == []
    assert await numbers(before=100) == [7, 6, 5, 4, 3, 2, 1]
    async for version in hf.keys.history("k"):
        assert version.changed_by == f"user{version.version}"
        assert (await version.load()).body == version.version


async def test_diff_tells_what_makes_one_version_of_the_other(hf: Holdfast) -> None:
    bodies: list[Any] = [
        {"a": 1, "b": [1, 2, 3], "c": {"x": None}},
        {"a": 2, "b": [1, 3], "d": "new"},
        [1, [2], {"k": [0, False, 0.0]}],
        [1, [2], {"k": [False, 0, 0.0]}],
        "text",
    ]
    for body in bodies[:4]:
        await hf.keys.put("k", body)
    for v1 in range(1, 5):
        for v2 in range(1, 5):
            operations = await hf.keys.diff("k", v1, v2)
            made = jsonpatch.apply_patch(bodies[v1 - 1], operations)
            assert repr(made) == repr(bodies[v2 - 1])
            assert (operations == []) == (v1 == v2)
    await hf.keys.put("k", bodies[4])
    with pytest.raises(InvalidBodyError):
        await hf.keys.diff("k", 4, 5)


# Lists.


async def test_E29_E30_E34_a_list_selects_by_the_beginning_and_by_what_was_said(hf: Holdfast) -> None:
    await hf.keys.put("a.b.c", 1, tags=["x", "y"], session="s1")
    await hf.keys.put("a.bc", 1, tags=["x"], agent="planner")
    await hf.keys.put("a.b", 1, session="s1", agent="planner")
    await hf.keys.put("ab", 1, tags=["y"])
    await hf.keys.put("a..b", 1)
    await hf.keys.put("z", 1)
    await hf.keys.delete("z")
    assert await keys_in(hf) == ["a..b", "a.b", "a.b.c", "a.bc", "ab"]
    assert await keys_in(hf, "a.") == ["a..b", "a.b", "a.b.c", "a.bc"]
    assert await keys_in(hf, "a.b") == ["a.b", "a.b.c", "a.bc"]
    assert await keys_in(hf, "a.b.") == ["a.b.c"]
    assert await keys_in(hf, "a.bc") == ["a.bc"]
    assert await keys_in(hf, "a..") == ["a..b"]
    assert await keys_in(hf, "b") == []
    assert await keys_in(hf, tags=["x"]) == ["a.b.c", "a.bc"]
    assert await keys_in(hf, tags=["x", "y"]) == ["a.b.c"]
    assert await keys_in(hf, session="s1") == ["a.b", "a.b.c"]
    assert await keys_in(hf, agent="planner") == ["a.b", "a.bc"]
    assert await keys_in(hf, "a.b", tags=["x"], session="s1") == ["a.b.c"]


async def test_a_list_is_whole_however_many_keys_there_are(hf: Holdfast) -> None:
    await asyncio.gather(*(hf.keys.put(f"many.{n:04}", n) for n in range(1_100)), hf.keys.put("few.1", 1))
    assert await keys_in(hf, "many.") == [f"many.{n:04}" for n in range(1_100)]
    assert await keys_in(hf, "many.01") == [f"many.01{n:02}" for n in range(100)]
    assert len(await keys_in(hf)) == 1_101


async def test_another_namespace_sees_nothing_of_it(hf: Holdfast) -> None:
    await hf.keys.put("k", "mine")
    for namespace in (f"{hf.namespace}x", f"{hf.namespace}.k", "*", ">"):
        async with connect(url_of(hf), namespace) as other:
            assert await other.keys.head("k") is None
            assert await keys_in(other, "k") == []


@pytest.mark.parametrize(
    "key", [".", "..a", "a.*.>", "$KV.x", " ", "\x00\n", "x--_41", "ü.𝄞", "k" * 768, ".".join("k" * 32)]
)
async def test_anything_may_stand_in_a_key(hf: Holdfast, key: str) -> None:
    await hf.keys.put("other", 0)
    await hf.keys.put(key, [1])
    assert (await hf.keys.append(key, 2)).version == 2
    assert (await hf.keys.get(key)).body == [1, 2]
    assert await keys_in(hf, key) == [key]
    assert list(await hf.keys.get_many([key, "other"])) == [key, "other"]
    assert await versions_of(hf, key) == [(2, "patch"), (1, "put")]
