"""Answers of the resolver, kept in the form that they go out in: a context is immutable, so its answer is too.

An answer is right or absent, as its body was checked when it was read; where it was read and when the body was stored
is told as it was then, a minute ago at most.  What has expired, or was erased, is not served from here after that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

from holdfast.client.near_cache import MAX_AGE_MS, CacheCounters

CACHE_BYTES: Final = 64 * 1024 * 1024
"""Answers kept by a resolver: some 50,000 of 700 bytes."""

_ENTRY_BYTES: Final = 500
"""What an entry costs beside the answer, roughly."""


class CachedReply(NamedTuple):
    """An encoded answer of so many bytes, and until when it holds."""

    encoded: msgspec.Raw
    size: int
    until_ms: int


_Space = tuple[str, bool]
"""A namespace, and whether the answers are msgpack."""


class ReplyCache:
    """Answers by namespace, encoding and reference, bounded in bytes; the oldest makes room.

    Not the least recently used: an answer is read anew after a minute in any case, and moving an entry at each look-up
    would take longer than the look-up.
    """

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._spaces: dict[_Space, dict[str, CachedReply]] = {}
        self._by_age: deque[tuple[_Space, str, CachedReply]] = deque()
        self.counters = CacheCounters()

    def __len__(self) -> int:
        return len(self._by_age)

    @property
    def size_bytes(self) -> int:
        """What the answers take, with what it costs to keep them."""
        return self._bytes

    def get(self, namespace: str, ref: str, packed: bool, now_ms: int) -> CachedReply | None:
        """Returns the answer for a reference if it is here and still holds."""
        entry = self._spaces.get((namespace, packed), {}).get(ref)
        if entry is None or now_ms >= entry.until_ms:
            self.counters.misses += 1
            return None
        self.counters.hits += 1
        return entry

    def get_all(
        self, namespace: str, refs: Iterable[str], packed: bool, now_ms: int
    ) -> tuple[dict[str, msgspec.Raw], int] | None:
        """Returns the answers for references, and their bytes in all, if every one is here; None otherwise."""
        space = self._spaces.get((namespace, packed), {})
        found: dict[str, msgspec.Raw] = {}
        total = 0
        for ref in refs:
            entry = space.get(ref)
            if entry is None:
                self.counters.misses += 1
                return None
            encoded, size, until_ms = entry
            if now_ms >= until_ms:
                self.counters.misses += 1
                return None
            found[ref] = encoded
            total += size
        self.counters.hits += len(found)
        return found, total

    def add(
        self, namespace: str, ref: str, packed: bool, encoded: bytes, *, expires_at_ms: int | None, now_ms: int
    ) -> None:
        """Remembers an answer; one that is over an eighth of the cache is not worth what it would push out."""
        size = len(encoded)
        if (size + _ENTRY_BYTES) * 8 > self._limit_bytes:
            return
        key = (namespace, packed)
        space = self._spaces.setdefault(key, {})
        known = space.get(ref)
        if known is not None and now_ms < known.until_ms:
            return  # two asked at once: the age of an answer is that of its first reading
        until_ms = now_ms + MAX_AGE_MS
        if expires_at_ms is not None:
            until_ms = min(until_ms, expires_at_ms)
        entry = space[ref] = CachedReply(msgspec.Raw(encoded), size, until_ms)
        self._by_age.append((key, ref, entry))
        self._bytes += size + _ENTRY_BYTES
        while self._by_age and (self._bytes > self._limit_bytes or now_ms >= self._by_age[0][2].until_ms):
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        key, ref, entry = self._by_age.popleft()
        self._bytes -= entry.size + _ENTRY_BYTES
        self.counters.evicted += 1
        space = self._spaces.get(key, {})
        # Another one may have taken its place since it expired.
        if space.get(ref) is entry:
            del space[ref]
            if not space:
                del self._spaces[key]
