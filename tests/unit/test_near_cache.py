"""The near cache: bounded by bytes and by age, and never older than an expiry."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from holdfast.client.near_cache import MAX_AGE_MS, NearCache
from holdfast.schemas.refs import Digest, Ref, format_ref
from holdfast.schemas.rows import ContextRow


def row(name: str, size: int = 100, expires_at_ms: int | None = None) -> ContextRow:
    return ContextRow(
        namespace="n",
        kind="k",
        digest=Digest(name),
        content_type="application/json",
        body=b"x" * size,
        size=size,
        stored_at_ms=0,
        epoch="",
        seq=0,
        expires_at_ms=expires_at_ms,
    )


def ref(name: str) -> Ref:
    return format_ref("k", name)


def test_what_was_added_is_found() -> None:
    cache = NearCache()
    cache.add(ref("a"), row("a"), 0)
    assert cache.get(ref("a"), 0) == row("a")
    assert cache.get(ref("b"), 0) is None
    assert (cache.counters.hits, cache.counters.misses) == (1, 1)


def test_an_entry_lives_a_minute() -> None:
    cache = NearCache()
    cache.add(ref("a"), row("a"), 1_000)
    assert cache.get(ref("a"), 1_000 + MAX_AGE_MS - 1) is not None
    assert cache.get(ref("a"), 1_000 + MAX_AGE_MS) is None
    assert len(cache) == 0


def test_a_clock_that_is_set_back_does_not_prolong_a_life() -> None:
    ticks_s = 50.0
    cache = NearCache(ticks_s=lambda: ticks_s)
    cache.add(ref("a"), row("a"), 10_000_000)
    ticks_s += MAX_AGE_MS / 1000 - 1
    assert cache.get(ref("a"), 10_000_000 - 3_600_000) is not None
    ticks_s += 1
    assert cache.get(ref("a"), 10_000_000 - 3_600_000) is None
    assert len(cache) == 0


def test_what_is_no_text_is_not_here() -> None:
    cache = NearCache()
    cache.add(ref("a"), row("a"), 0)
    assert cache.get({"ref": ref("a")}, 0) is None


def test_reading_does_not_prolong_a_life() -> None:
    cache = NearCache()
    cache.add(ref("a"), row("a"), 0)
    for at_ms in range(0, MAX_AGE_MS, 10_000):
        assert cache.get(ref("a"), at_ms) is not None
    assert cache.get(ref("a"), MAX_AGE_MS) is None


def test_an_entry_ends_with_its_expiry() -> None:
    cache = NearCache()
    cache.add(ref("a"), row("a", expires_at_ms=500), 0)
    assert cache.get(ref("a"), 499) is not None
    assert cache.get(ref("a"), 500) is None
    cache.add(ref("b"), row("b", expires_at_ms=500), 600)
    assert cache.get(ref("b"), 600) is None


def test_the_least_recently_used_goes_first() -> None:
    cache = NearCache(10 * 1_600)
    for name in "abcdefghij":
        cache.add(ref(name), row(name, 1_000), 0)
    assert cache.get(ref("a"), 0) is not None
    cache.add(ref("k"), row("k", 1_000), 0)
    assert cache.get(ref("a"), 0) is not None
    assert cache.get(ref("b"), 0) is None
    assert cache.counters.evicted == 1


def test_what_would_push_out_too_much_is_not_kept() -> None:
    cache = NearCache(100_000)
    cache.add(ref("a"), row("a", 12_000), 0)
    assert len(cache) == 0
    cache.add(ref("a"), row("a", 11_000), 0)
    assert len(cache) == 1


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = NearCache(0)
    cache.add(ref("a"), row("a", 0), 0)
    assert cache.get(ref("a"), 0) is None


def test_forgetting_is_harmless_when_there_is_nothing() -> None:
    cache = NearCache()
    cache.add(ref("a"), row("a"), 0)
    for _ in range(2):
        cache.forget(ref("a"))
    assert (len(cache), cache._bytes) == (0, 0)


ACTIONS = st.tuples(
    st.sampled_from(["add", "get", "forget"]),
    st.sampled_from("abcdefgh"),
    st.integers(0, 3_000),
    st.none() | st.integers(0, 200_000),
    st.integers(0, 200_000),
)


@given(st.lists(ACTIONS, max_size=60))
def test_the_bound_holds_and_no_entry_is_stale(actions: list[tuple[str, str, int, int | None, int]]) -> None:
    cache = NearCache(20_000)
    added: dict[str, tuple[ContextRow, int]] = {}
    for action, name, size, expires_at_ms, now_ms in actions:
        if action == "add":
            added[name] = (row(name, size, expires_at_ms), now_ms)
            cache.add(ref(name), *added[name])
        elif action == "forget":
            added.pop(name, None)
            cache.forget(ref(name))
        else:
            found = cache.get(ref(name), now_ms)
            if found is not None:
                kept, since_ms = added[name]
                assert found == kept
                assert now_ms < since_ms + MAX_AGE_MS
                assert found.expires_at_ms is None or now_ms < found.expires_at_ms
        costs = [len(entry.body) + 600 for _, _, entry in cache._entries.values()]
        assert cache._bytes == sum(costs) <= 20_000
