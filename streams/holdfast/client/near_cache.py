"""The near cache: contexts that this process just stored or read, bounded by bytes and by age."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from holdfast.schemas.rows import ContextRow

MAX_AGE_MS: Final = 60_000
"""A context that was erased is served from here for a minute at most.  Two clocks count it, and the first ends it: the
wall clock may be set back, and the monotonic one stands still while a machine sleeps."""

DEFAULT_BYTES: Final = 32 * 1024 * 1024

_ENTRY_BYTES: Final = 600
"""What an entry costs beside its body, roughly."""


class CacheCounters(msgspec.Struct):
    """How often a reference was found, was not, and was dropped to make room."""

    hits: int = 0
    misses: int = 0
    evicted: int = 0


class NearCache:
    """Least recently used contexts, by reference or digest, up to ``limit_bytes``.

    A context is immutable, so an entry is right or absent.  ``now_ms`` of each call is the wall clock, ``ticks_s`` the
    monotonic one.
    """

    def __init__(self, limit_bytes: int = DEFAULT_BYTES, *, ticks_s: Callable[[], float] = time.monotonic) -> None:
        self._limit_bytes = limit_bytes
        self._ticks_s = ticks_s
        self._bytes = 0
        self._entries: OrderedDict[str, tuple[int, float, ContextRow]] = OrderedDict()
        self.counters = CacheCounters()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key in self._entries

    def get(self, key: object, now_ms: int) -> ContextRow | None:
        """Returns the context if it is here, young enough and not expired; what is no text is never here."""
        if not isinstance(key, str):
            return None  # callers look here before they check a reference: what is none may have no hash
        entry = self._entries.get(key)
        if entry is None:
            self.counters.misses += 1
            return None
        until_ms, until_s, row = entry
        if now_ms >= until_ms or self._ticks_s() >= until_s:
            self._drop(key)
            self.counters.misses += 1
            return None
        self._entries.move_to_end(key)
        self.counters.hits += 1
        return row

    def add(self, key: str, row: ContextRow, now_ms: int) -> None:
        """Remembers a context; one that is over an eighth of the cache is not worth what it would push out."""
        cost = len(row.body) + _ENTRY_BYTES
        if key in self._entries:
            self._drop(key)
        if cost * 8 > self._limit_bytes:
            return
        until_ms = now_ms + MAX_AGE_MS
        if row.expires_at_ms is not None:
            until_ms = min(until_ms, row.expires_at_ms)
        self._entries[key] = until_ms, self._ticks_s() + MAX_AGE_MS / 1000, row
        self._bytes += cost
        while self._bytes > self._limit_bytes:
            self._drop(next(iter(self._entries)))
            self.counters.evicted += 1

    def forget(self, key: str) -> None:
        """Drops a context, if it is here."""
        if key in self._entries:
            self._drop(key)

    def _drop(self, key: str) -> None:
        _, _, row = self._entries.pop(key)
        self._bytes -= len(row.body) + _ENTRY_BYTES
