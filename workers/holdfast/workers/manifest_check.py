"""Whether manifests make the bodies that their keys name: asked of each before it is archived.

One in the lake under a digest that is not its own would turn every later storing of the true context into a
repetition, and so lose it.  A growing conversation is one manifest a turn over chunks that they share: chunks are kept,
within a bound, from one manifest, and from one run, to the next, so that each is fetched once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from holdfast.lake.lookup import Lookup
from holdfast.lake.manifests import ChunkCache
from holdfast.schemas import limits
from holdfast.schemas.errors import DigestMismatchError, HoldfastError, NotFoundError, RetryError
from holdfast.schemas.rows import ContextRow, Row
from holdfast.streams.codec import Manifest, decode_manifest, join

if TYPE_CHECKING:
    from holdfast.lake.index import LakeIndex
    from holdfast.lake.lake import Lake
    from holdfast.schemas.refs import Digest
    from holdfast.streams.hot import HotTier

CACHE_BYTES: Final = 32 * limits.MIB
"""Most bytes of chunks kept between runs: those of some hundred conversations under way."""

FETCHED: Final = 128
"""Chunks fetched at once: 64 MiB at most, as much as the largest body."""

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]
ChunkKey = tuple[str, "Digest"]
"""A chunk belongs to its namespace: a manifest of another must not name it."""


class ManifestChecker:
    """Checks the manifests of one run after another; ``in_thread`` runs a call in the thread that reads the lake."""

    def __init__(self, hot: HotTier, lake: Lake, index: LakeIndex, in_thread: InThread) -> None:
        self._hot = hot
        self._lookup = Lookup(lake, index)
        self._in_thread = in_thread
        self._cache: ChunkCache[ChunkKey] = ChunkCache(CACHE_BYTES)

    async def forged(self, rows: Sequence[Row]) -> dict[int, HoldfastError]:
        """Returns, by sequence, what is wrong with the manifests that do not make the body their key names.

        ``rows`` are those of one run.  Raises RetryError when that cannot be told now.
        """
        forged: dict[int, HoldfastError] = {}
        manifests: list[tuple[ContextRow, Manifest]] = []
        own: dict[ChunkKey, bytes] = {}
        for row in rows:
            if not isinstance(row, ContextRow):
                continue
            if row.form == "chunk":
                own[row.namespace, row.digest] = row.body
            elif row.form == "manifest":
                try:
                    manifests.append((row, decode_manifest(row.body)))
                except HoldfastError as error:
                    forged[row.seq] = error
        for number, (row, manifest) in enumerate(manifests):
            try:
                bodies = await self._bodies(row, manifest, manifests[number + 1 : number + 1 + FETCHED], own)
                await asyncio.to_thread(join, row, bodies)
            except RetryError:
                raise
            except HoldfastError as error:
                forged[row.seq] = error
            self._cache.shrink()
        # What the next turns of these conversations will name again.
        named = {(row.namespace, digest) for row, manifest in manifests for digest in manifest.chunks}
        for key in named.intersection(own):
            self._cache.add(key, own[key])
            self._cache.shrink()
        return forged

    def close(self) -> None:
        """Closes the files of the lake; call it in the thread that reads them."""
        self._lookup.close()

    async def _bodies(
        self,
        row: ContextRow,
        manifest: Manifest,
        following: Sequence[tuple[ContextRow, Manifest]],
        own: dict[ChunkKey, bytes],
    ) -> dict[Digest, bytes]:
        """Returns the chunks of a manifest; stops fetching when they make more bytes than it promises."""
        wanted = list(dict.fromkeys(manifest.chunks))
        bodies: dict[Digest, bytes] = {}
        missing: list[Digest] = []
        for digest in wanted:
            key = (row.namespace, digest)
            body = own.get(key) or self._cache.get(key)
            if body is None:
                missing.append(digest)
            else:
                bodies[digest] = body
        for start in range(0, len(missing), FETCHED):
            some = missing[start : start + FETCHED]
            ahead = [] if len(missing) > FETCHED else self._ahead(row.namespace, some, following, own)
            found = await self._fetch(row, some, ahead)
            bodies |= {digest: found[digest] for digest in some}
            size = sum(len(bodies.get(digest, b"")) for digest in manifest.chunks)
            if size > manifest.size:
                raise DigestMismatchError(
                    f"the chunks of {row.ref} are {size} bytes or more, not {manifest.size}", field="body"
                )
        return bodies

    def _ahead(
        self,
        namespace: str,
        some: list[Digest],
        following: Sequence[tuple[ContextRow, Manifest]],
        own: dict[ChunkKey, bytes],
    ) -> list[Digest]:
        """Chunks that the next manifests will want, as many as may be fetched along with ``some``."""
        ahead: dict[Digest, None] = {}
        for row, manifest in following:
            if row.namespace != namespace:
                continue
            for digest in manifest.chunks:
                key = (namespace, digest)
                if digest not in some and key not in own and key not in self._cache:
                    ahead[digest] = None
            if len(ahead) + len(some) >= FETCHED:
                break
        return list(ahead)[: FETCHED - len(some)]

    async def _fetch(self, row: ContextRow, wanted: list[Digest], ahead: list[Digest]) -> dict[Digest, bytes]:
        found, _ = await self._hot.get_stored_many(row.namespace, [*wanted, *ahead])
        left = [digest for digest in wanted if digest not in found]
        if left:
            # Chunks are acknowledged before their manifest is sent: these have left the hot tier, or never were.
            found |= await self._cold([*left, *(digest for digest in ahead if digest not in found)], left)
        for digest in left:
            if digest not in found:
                # Asked of the leader: a replica that is behind must not make a dead letter of a good manifest.
                part = await self._hot.get_stored(row.namespace, digest)
                if part is not None:
                    found[digest] = part
        bodies = {
            digest: part.body
            for digest, part in found.items()
            if part.form == "chunk" and part.namespace == row.namespace
        }
        for digest in wanted:
            if digest not in bodies:
                raise NotFoundError(
                    f"the manifest of {row.ref} names a chunk {digest} that is stored nowhere",
                    field="chunks",
                    hint="store chunks before their manifest, or use the SDK",
                )
        for digest, body in bodies.items():
            self._cache.add((row.namespace, digest), body)
        return bodies

    async def _cold(self, digests: list[Digest], wanted: list[Digest]) -> dict[Digest, ContextRow]:
        try:
            found: dict[Digest, ContextRow] = await self._in_thread(lambda: self._lookup.get_contexts(digests))
        except RetryError:
            raise
        except HoldfastError:
            if len(digests) == len(wanted):
                raise
            # A damaged chunk of a later manifest is that one's matter.
            found = await self._in_thread(lambda: self._lookup.get_contexts(wanted))
        return found
