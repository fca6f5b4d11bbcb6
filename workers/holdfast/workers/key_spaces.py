"""What the resolver remembers of namespaces to serve their named contexts: the SDK's own parts, with the lake at hand.

Where the SDK asks a resolver, these look into the lake by themselves: a resolver that asked itself would wait for room
among its own requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from holdfast.client.growing import GrowingBodies
from holdfast.client.key_file import KeySet
from holdfast.client.key_history import KeyHistory
from holdfast.client.key_ring import KeyRing
from holdfast.client.keys import Keys
from holdfast.client.near_cache import NearCache
from holdfast.schemas import limits
from holdfast.streams.key_log import KeyLog

if TYPE_CHECKING:
    from holdfast.client.model import Tier
    from holdfast.client.reading import Loaded
    from holdfast.schemas.refs import Digest
    from holdfast.schemas.rows import KeyVersionRow
    from holdfast.streams.connection import Connection
    from holdfast.streams.hot import HotTier
    from holdfast.streams.server_clock import ServerClock
    from holdfast.workers.contexts import ContextReader, Found
    from holdfast.workers.key_reader import ColdKeys

_BODIES_BYTES: Final = 4 * 1024 * 1024
"""Bodies kept for one namespace, to compare the next version of a key with."""

AGENT: Final = "resolver"
"""Who has written a version whose writer does not say."""

_NAMESPACES: Final = 8
"""Namespaces whose heads and bodies are remembered: each may hold 32 MiB of bodies."""


class _NoKeys:
    """The key ring of one who has none."""

    origin = "the resolver"

    def stamp(self) -> object:
        return None

    def read(self) -> tuple[KeySet, object]:
        return KeySet({}, None), None


class _NamespaceReader:
    """Reads the contexts of one namespace, hot or from the lake, as the SDK does with a resolver."""

    def __init__(self, contexts: ContextReader, namespace: str) -> None:
        self._contexts = contexts
        self._namespace = namespace

    async def load_stored(self, digests: list[Digest]) -> Loaded:
        found, failed = await self._contexts.get_stored_many(self._namespace, digests)
        return {digest: item.row for digest, item in found.items()}, _tiers(found), failed

    async def load(self, digests: list[Digest]) -> Loaded:
        found, failed = await self._contexts.get_many(self._namespace, digests, max_bytes=limits.BODY_BYTES)
        return {digest: item.row for digest, item in found.items()}, _tiers(found), failed


class _NamespaceCold:
    """Reads the archived versions of one namespace's keys."""

    def __init__(self, cold: ColdKeys, namespace: str) -> None:
        self._cold = cold
        self._namespace = namespace

    async def last(self, key: str) -> KeyVersionRow | None:
        return await self._cold.last(self._namespace, key)

    async def get(self, key: str, version: int) -> KeyVersionRow | None:
        return await self._cold.get(self._namespace, key, version)

    async def page(self, key: str, before: int | None, limit: int) -> list[KeyVersionRow]:
        return await self._cold.page(self._namespace, key, before, limit)

    async def as_of(self, key: str, at_ms: int) -> KeyVersionRow | None:
        return await self._cold.as_of(self._namespace, key, at_ms)


class KeySpace:
    """What is remembered of one namespace, and how many requests use it."""

    def __init__(self, keys: Keys, history: KeyHistory, log: KeyLog) -> None:
        self.keys = keys
        self.history = history
        self.log = log
        self.users = 0


class KeySpaces:
    """The namespaces in use, and those used last.  ``contexts``, ``cold`` and ``clock`` are the caller's."""

    def __init__(
        self,
        connection: Connection,
        hot: HotTier,
        contexts: ContextReader,
        cold: ColdKeys,
        clock: ServerClock,
        *,
        replicas: int = 1,
    ) -> None:
        self._connection = connection
        self._hot = hot
        self._contexts = contexts
        self._cold = cold
        self._clock = clock
        self._replicas = replicas
        self._ring = KeyRing(_NoKeys())
        self._spaces: OrderedDict[str, KeySpace] = OrderedDict()

    @asynccontextmanager
    async def use(self, namespace: str) -> AsyncGenerator[KeySpace]:
        """Yields what there is for a namespace; it is not forgotten while the block lasts."""
        space = self._spaces.get(namespace)
        if space is None:
            space = self._spaces[namespace] = self._open(namespace)
        self._spaces.move_to_end(namespace)
        space.users += 1
        try:
            yield space
        finally:
            space.users -= 1
            # Nobody waits for anything in an idle one: dropping it forgets what it remembers, and that is all.
            for name in [name for name, other in self._spaces.items() if not other.users]:
                if len(self._spaces) <= _NAMESPACES:
                    break
                del self._spaces[name]

    async def close(self) -> None:
        """Waits until every write that was handed in has its outcome."""
        for space in self._spaces.values():
            await space.keys.close()
        self._spaces.clear()

    def _open(self, namespace: str) -> KeySpace:
        log = KeyLog(self._connection, replicas=self._replicas)
        cold = _NamespaceCold(self._cold, namespace)
        reader = _NamespaceReader(self._contexts, namespace)
        # No near cache: what was stored or read last is remembered with its shape.
        bodies = GrowingBodies(namespace, self._hot, reader, NearCache(0), cache_bytes=_BODIES_BYTES)
        keys = Keys(
            self._connection,
            namespace,
            AGENT,
            log=log,
            bodies=bodies,
            cold=cold,
            clock=self._clock,
            ring=self._ring,
        )
        return KeySpace(keys, KeyHistory(namespace, log, cold), log)


def _tiers(found: Mapping[Digest, Found]) -> dict[Digest, Tier]:
    return {digest: item.tier for digest, item in found.items()}
