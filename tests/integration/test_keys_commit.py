"""``hf.keys.commit``: several keys or none."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.schemas import limits
from holdfast.schemas.errors import NotFoundError, VersionConflictError
from tests.key_support import keys_in, reader_of, versions_of

if TYPE_CHECKING:
    from holdfast.client import Holdfast

pytestmark = pytest.mark.asyncio


async def test_E14_a_commit_writes_every_key_as_its_next_version(hf: Holdfast) -> None:
    await hf.keys.put("a", 1)
    await hf.keys.put("gone", 1, tags=["t"])
    written = await hf.keys.commit(
        {"a": {"n": 2}, "b": "text"}, {"a": 1, "b": 0}, deletes=["gone"], session="s1", tags=["x"], changed_by="ann"
    )
    assert {key: (version.version, version.op) for key, version in written.items()} == {
        "a": (2, "put"),
        "b": (1, "put"),
        "gone": (2, "delete"),
    }
    async with reader_of(hf) as other:
        for key, body in (("a", {"n": 2}), ("b", "text")):
            value = await other.keys.get(key)
            assert (value.body, value.session, value.tags, value.changed_by) == (body, "s1", ("x",), "ann")
            assert value.position == written[key].position is not None
            assert (await written[key].load()).body == body
        with pytest.raises(NotFoundError):
            await other.keys.get("gone")


async def test_E14_a_conflict_of_one_key_leaves_all_as_they_were(hf: Holdfast) -> None:
    await hf.keys.put("a", "old")
    await hf.keys.put("b", "old")
    await hf.keys.put("b", "newer")
    with pytest.raises(VersionConflictError) as caught:
        await hf.keys.commit({"a": "x", "b": "x", "c": "x"}, {"a": 1, "b": 1})
    assert (caught.value.key, caught.value.expected, caught.value.actual) == ("b", 1, 2)
    with pytest.raises(NotFoundError, match="'absent'"):
        await hf.keys.commit({"a": "x"}, deletes=["b", "absent"])
    assert [(await hf.keys.get(key)).body for key in ("a", "b")] == ["old", "newer"]
    assert await keys_in(hf) == ["a", "b"]
    assert await versions_of(hf, "b") == [(2, "put"), (1, "put")]


async def test_a_commit_of_nothing_writes_nothing(hf: Holdfast) -> None:
    assert await hf.keys.commit({}) == {}
    assert await keys_in(hf) == []


async def test_a_commit_may_be_as_large_as_its_limit(hf: Holdfast) -> None:
    bodies = {f"k{n}": {"n": n, "text": "x" * 1_000} for n in range(limits.COMMIT_KEYS)}
    written = await hf.keys.commit(bodies)
    assert len(written) == limits.COMMIT_KEYS
    seqs = [int(str(version.position).rpartition(":")[2]) for version in written.values()]
    assert seqs == list(range(seqs[0], seqs[0] + limits.COMMIT_KEYS))
    found = await hf.keys.get_many(bodies)
    assert {key: value.body for key, value in found.items()} == bodies


async def test_commits_and_single_writes_of_the_same_keys_lose_nothing(hf: Holdfast) -> None:
    """Each commit adds one to five counters, each update to one of them: from two processes at once."""
    names = [f"counter{n}" for n in range(5)]
    await hf.keys.commit(dict.fromkeys(names, 0))

    async def add_to_all(client: Holdfast) -> int:
        lost = 0
        for _ in range(10):
            while True:
                values = await client.keys.get_many(names)
                try:
                    await client.keys.commit(
                        {key: value.body + 1 for key, value in values.items()},
                        {key: value.version for key, value in values.items()},
                    )
                    break
                except VersionConflictError:
                    lost += 1
        return lost

    async def add_to_one(client: Holdfast, key: str) -> None:
        for _ in range(10):
            await client.keys.update(key, lambda body: body + 1)

    async with reader_of(hf) as other:
        await asyncio.gather(
            add_to_all(hf), add_to_all(other), add_to_one(hf, "counter0"), add_to_one(other, "counter0"),
            add_to_one(other, "counter3"),
        )  # fmt: skip
        values = await other.keys.get_many(names)
    assert [values[name].body for name in names] == [40, 20, 20, 30, 20]
    assert [values[name].version for name in names] == [41, 21, 21, 31, 21]


async def test_a_commit_without_expectations_is_still_all_or_none(hf: Holdfast) -> None:
    """Under a competing writer: whoever reads both keys in one commit's version reads one commit's bodies."""
    stop = asyncio.Event()

    async def compete() -> None:
        while not stop.is_set():
            await hf.keys.put("a", "single")

    competing = asyncio.create_task(compete())
    async with reader_of(hf) as other:
        for n in range(20):
            await other.keys.commit({"a": n, "b": n})
        stop.set()
        await competing
        commits: dict[str, list[Any]] = {}
        for key in ("a", "b"):
            bodies = [(await version.load()).body async for version in other.keys.history(key)]
            commits[key] = [body for body in bodies if body != "single"]
    assert commits["a"] == commits["b"] == list(range(19, -1, -1))


async def test_E31_every_key_of_a_commit_expires(hf: Holdfast) -> None:
    written = await hf.keys.commit({"a": 1, "b": 2}, ttl=60)
    assert all(version.expires_at is not None for version in written.values())
    written = await hf.keys.commit({"a": 1}, ttl=math.inf)
    assert written["a"].expires_at is None
