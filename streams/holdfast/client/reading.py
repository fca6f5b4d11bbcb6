"""Reading contexts by digest: from the hot tier, else through the resolver from the lake; chunks put together."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from holdfast.schemas.errors import HoldfastError, RetryError
from holdfast.streams.codec import decode_manifest, join, require_chunks

if TYPE_CHECKING:
    from holdfast.client.cold import ResolverClient
    from holdfast.client.model import Tier
    from holdfast.schemas.refs import Digest
    from holdfast.schemas.rows import ContextRow
    from holdfast.streams.hot import HotTier

Loaded = tuple["dict[Digest, ContextRow]", "dict[Digest, Tier]", "dict[Digest, HoldfastError]"]
"""What was found, the tier of each, and the errors of those that cannot be served; the rest is stored nowhere."""


class StoredReader(Protocol):
    """Reads contexts of one namespace."""

    async def load_stored(self, digests: list[Digest]) -> Loaded:
        """Returns what is stored under the digests as it is stored: a manifest stays one."""
        ...

    async def load(self, digests: list[Digest]) -> Loaded:
        """Returns whole contexts, each checked against its digest."""
        ...


class BodyReader:
    """Reads contexts of one namespace, hot before cold.

    Every method raises the hot tier's RetryError when that does not answer: what it holds is not known then, and a
    resolver would have to ask the same server.
    """

    def __init__(self, hot: HotTier, resolver: ResolverClient, namespace: str) -> None:
        self._hot = hot
        self._resolver = resolver
        self._namespace = namespace

    async def load(self, digests: list[Digest]) -> Loaded:
        """Returns whole contexts by digest; a damaged hot copy is passed over for a sound cold one."""
        return await self._whole(await self.load_stored(digests))

    async def load_one(self, digest: Digest) -> tuple[ContextRow | None, Tier]:
        """Returns a whole context, or None, and where it was read; raises the error of one that cannot be served."""
        hot: dict[Digest, ContextRow] = {}
        damaged: dict[Digest, HoldfastError] = {}
        try:
            # A single direct get is one message each way; a batched one is two back.
            row = await self._hot.get_stored(self._namespace, digest)
        except RetryError:
            raise  # it does not answer, which is no damaged copy
        except HoldfastError as error:
            damaged[digest] = error
        else:
            if row is not None:
                if row.form != "manifest":
                    return row, "hot"
                hot[digest] = row
        stored, tiers, failed = await self._whole(await self._with_cold([digest], hot, damaged))
        if digest in failed:
            raise failed[digest]
        return stored.get(digest), tiers.get(digest, "hot")

    async def _whole(self, loaded: Loaded) -> Loaded:
        stored, tiers, failed = loaded
        broken = await self._join(stored)
        again = [digest for digest in broken if tiers[digest] == "hot"]
        if again:
            # A manifest shows only when it is put together that it is none of its digest.
            cold, _ = await self._resolver.fetch(again, cold=True)
            still_broken = await self._join(cold)
            stored |= cold
            tiers |= dict.fromkeys(cold, "lake")
            broken = {digest: error for digest, error in broken.items() if digest not in cold} | still_broken
        return stored, tiers, failed | broken

    async def load_stored(self, digests: list[Digest]) -> Loaded:
        """Returns stored forms by digest; what only the lake holds takes a resolver."""
        if len(digests) == 1:
            try:
                row = await self._hot.get_stored(self._namespace, digests[0])
                hot, damaged = ({} if row is None else {digests[0]: row}), {}
            except RetryError:
                raise
            except HoldfastError as error:
                hot, damaged = {}, {digests[0]: error}
        else:
            hot, damaged = await self._hot.get_stored_many(self._namespace, digests) if digests else ({}, {})
        return await self._with_cold(digests, hot, damaged)

    async def _with_cold(
        self, digests: list[Digest], hot: dict[Digest, ContextRow], damaged: dict[Digest, HoldfastError]
    ) -> Loaded:
        tiers: dict[Digest, Tier] = dict.fromkeys(hot, "hot")
        left = [digest for digest in digests if digest not in hot]
        if not left:
            return hot, tiers, {}
        cold, failed = await self._resolver.fetch(left)
        tiers |= dict.fromkeys(cold, "lake")
        unserved = {digest: error for digest, error in (damaged | failed).items() if digest not in cold}
        return hot | cold, tiers, unserved

    async def _join(self, stored: dict[Digest, ContextRow]) -> dict[Digest, HoldfastError]:
        """Puts whole contexts in the place of manifests; takes out those that cannot be, and returns their errors."""
        manifests = [row for row in stored.values() if row.form == "manifest"]
        if not manifests:
            return {}
        parts = list(dict.fromkeys(digest for row in manifests for digest in decode_manifest(row.body).chunks))
        chunks, _, chunk_errors = await self.load_stored(parts)
        bodies = {digest: row.body for digest, row in chunks.items()}
        broken: dict[Digest, HoldfastError] = {}
        for row in manifests:
            del stored[row.digest]
            try:
                require_chunks(row, bodies, chunk_errors)
                stored[row.digest] = await asyncio.to_thread(join, row, bodies)
            except HoldfastError as error:
                broken[row.digest] = error
        return broken
