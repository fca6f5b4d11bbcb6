"""The answers that a resolver keeps: whole, bounded in bytes, and not for long."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.client.near_cache import MAX_AGE_MS
from holdfast.schemas.refs import compute_digest
from holdfast.schemas.rows import ContextRow
from holdfast.workers.contexts import Found
from holdfast.workers.reply_cache import ReplyCache
from holdfast.workers.resolver_contexts import ContextEndpoints


def add(cache: ReplyCache, ref: str, encoded: bytes = b"{}", at_ms: int = 0, expires_at_ms: int | None = None) -> None:
    cache.add("n", ref, False, encoded, expires_at_ms=expires_at_ms, now_ms=at_ms)


def has(cache: ReplyCache, ref: str, at_ms: int = 0) -> bool:
    return cache.get("n", ref, False, at_ms) is not None


def test_an_answer_is_kept_for_its_namespace_and_its_encoding_alone() -> None:
    cache = ReplyCache()
    add(cache, "a", b"1")
    assert cache.get_all("n", ["a"], False, 0) == ({"a": cache.get("n", "a", False, 0).encoded}, 1)  # type: ignore[union-attr]
    assert cache.get("m", "a", False, 0) is None
    assert cache.get("n", "a", True, 0) is None
    assert cache.get_all("n", ["a", "b"], False, 0) is None


def test_an_answer_is_served_for_a_minute_from_its_first_reading_and_not_beyond_its_expiry() -> None:
    cache = ReplyCache()
    add(cache, "a")
    add(cache, "a", at_ms=MAX_AGE_MS - 1)
    add(cache, "b", expires_at_ms=500)
    add(cache, "gone", at_ms=10, expires_at_ms=5)
    assert has(cache, "a", MAX_AGE_MS - 1)
    assert not has(cache, "a", MAX_AGE_MS)
    assert cache.get_all("n", ["a"], False, MAX_AGE_MS) is None
    assert has(cache, "b", 499)
    assert not has(cache, "b", 500)
    assert not has(cache, "gone", 10)


def test_the_oldest_answers_make_room_and_one_too_large_is_not_kept() -> None:
    cache = ReplyCache(10_000)
    for number in range(20):
        add(cache, str(number), b"x" * 500)
    assert [number for number in range(20) if has(cache, str(number))] == list(range(10, 20))
    add(cache, "large", b"x" * 1_000)
    assert not has(cache, "large")
    assert cache.size_bytes == 10_000


def test_it_never_holds_more_than_its_bytes_and_forgets_all_in_the_end() -> None:
    cache = ReplyCache(20_000)
    source = random.Random(1)
    now = 0
    for _ in range(3_000):
        now += source.randrange(2_000)
        expires = now + source.randrange(-10, 90_000) if source.random() < 0.5 else None
        space = source.choice("nm")
        ref = str(source.randrange(60))
        cache.add(space, ref, False, b"x" * source.randrange(2_000), expires_at_ms=expires, now_ms=now)
        assert 0 <= cache.size_bytes <= 20_000
    cache.add("n", "last", False, b"", expires_at_ms=None, now_ms=now + 10 * MAX_AGE_MS)
    assert len(cache) == 1


@pytest.mark.parametrize("is_fresh", [True, False])
async def test_an_answer_is_not_kept_for_a_second_minute_when_its_body_was_kept_for_one(is_fresh: bool) -> None:
    digest = compute_digest("n", "k", b"1")
    row = ContextRow(
        namespace="n", kind="k", digest=digest, content_type="application/json", body=b"1", size=1, stored_at_ms=0,
        epoch="e", seq=1, form="plain",
    )  # fmt: skip

    class Reader:
        async def get_many(self, namespace: str, digests: object, *, max_bytes: int) -> Any:
            return {digest: Found(row, "lake", is_fresh=is_fresh)}, {}

    async def reply(payload: bytes, headers: object) -> None:
        assert b'"body":1' in payload

    cache = ReplyCache()
    contexts: Any = Reader()
    call: Any = SimpleNamespace(namespace="n", data=b'{"ref":"%b"}' % row.ref.encode(), headers={}, reply=reply)
    await ContextEndpoints(contexts, asyncio.Semaphore(1), cache).resolve(call)
    assert len(cache) == is_fresh
