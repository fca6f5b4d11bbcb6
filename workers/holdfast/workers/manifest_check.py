"""Whether manifests make the bodies that their keys name: asked of each before it is archived.

One in the lake under a digest that is not its own would turn every later storing of the true context into a
repetition, and so lose it.  A growing conversation is one manifest a turn over chunks that they share: chunks are kept,
within a bound, from one manifest, and from one run, to the next, so that each is fetched once.

A chunk that has left the hot tier may be in a file of the lake that is damaged.  That says nothing against the
manifest, whose own bytes are whole: as a dead letter it would be in neither tier, even once the chunk is healed.  So
archiving waits for the scrub, which heals within seconds what can be healed.  It does not wait for ever, since what has
no second copy would stop the archiving of everything that follows: then the manifest is archived unchecked.  Whoever
asks for it is told of the damage, look-ups hash what they put together, and ``verify`` names it if it was forged after
all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from holdfast.lake.lookup import Lookup
from holdfast.lake.manifests import ChunkCache
from holdfast.schemas import limits
from holdfast.schemas.errors import (
    DamagedError,
    DigestMismatchError,
    HoldfastError,
    NotFoundError,
    RetryError,
    UnavailableError,
)
from holdfast.schemas.rows import ContextRow, Row
from holdfast.streams.codec import Manifest, decode_manifest, join

if TYPE_CHECKING:
    from holdfast.lake.index import LakeIndex
    from holdfast.lake.lake import Lake
    from holdfast.schemas.refs import Digest
    from holdfast.streams.hot import HotTier

logger = logging.getLogger(__name__)

CACHE_BYTES: Final = 32 * limits.MIB
"""Most bytes of chunks kept between runs: those of some hundred conversations under way."""

FETCHED: Final = 128
"""Chunks fetched at once: 64 MiB at most, as much as the largest body."""

PATIENCE_S: Final = 30.0
"""How long archiving waits for a damaged file to be healed, once for each file: three rounds of the scrub's healing,
and well under the minute in which everything is archived once a fault is over (I8)."""

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]
ChunkKey = tuple[str, "Digest"]
"""A chunk belongs to its namespace: a manifest of another must not name it."""


class ManifestChecker:
    """Checks the manifests of one run after another; ``in_thread`` runs a call in the thread that reads the lake.

    ``clock`` stands in for the monotonic clock.
    """

    def __init__(
        self,
        hot: HotTier,
        lake: Lake,
        index: LakeIndex,
        in_thread: InThread,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hot = hot
        self._lookup = Lookup(lake, index)
        self._in_thread = in_thread
        self._cache: ChunkCache[ChunkKey] = ChunkCache(CACHE_BYTES)
        self._clock = clock
        # Since when each damaged file is waited for: at most one entry for each file of the lake.  Kept when the wait
        # is over, or every turn of a conversation over a chunk that nobody can heal would begin another.
        self._damaged_since: dict[str, float] = {}

    async def forged(self, rows: Sequence[Row]) -> dict[int, HoldfastError]:
        """Returns, by sequence, what is wrong with the manifests that do not make the body their key names.

        ``rows`` are those of one run.  Raises RetryError when that cannot be told now.  A manifest of which it cannot
        be told for longer than ``PATIENCE_S``, for damage of the lake, is not among them.
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
            except _UnreadableError as unreadable:
                self._wait_for_healing(row, unreadable.error)
            except HoldfastError as error:
                forged[row.seq] = error
            self._cache.shrink()
        # What the next turns of these conversations will name again.
        named = {(row.namespace, digest) for row, manifest in manifests for digest in manifest.chunks}
        for key in named.intersection(own):
            self._cache.add(key, own[key])
            self._cache.shrink()
        return forged

    def _wait_for_healing(self, row: ContextRow, error: HoldfastError) -> None:
        """Raises UnavailableError while the file may still be healed; returns when that has been waited for."""
        now = self._clock()
        file = error.file if isinstance(error, DamagedError) else ""
        waited_s = now - self._damaged_since.setdefault(file, now)
        if waited_s < PATIENCE_S:
            raise UnavailableError(
                f"the manifest of {row.ref} cannot be checked: {error.message}",
                hint=f"{error.hint or 'run holdfast verify'}; after {PATIENCE_S:.0f} seconds it is archived unchecked",
            ) from error
        logger.warning(
            "manifest archived unchecked",
            extra={"action": "manifest_unchecked", "ref": row.ref, "seq": row.seq, "error": error.message},
        )

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
        """Returns the chunks of a manifest; stops fetching when they make more bytes than it promises.

        Raises _UnreadableError when the lake cannot give one, and nothing is wrong with the manifest as far as the
        others tell.
        """
        wanted = list(dict.fromkeys(manifest.chunks))
        bodies: dict[Digest, bytes] = {}
        missing: list[Digest] = []
        unreadable: dict[Digest, HoldfastError] = {}
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
            found = await self._fetch(row, some, ahead, unreadable)
            bodies |= {digest: found[digest] for digest in some if digest not in unreadable}
            size = sum(len(bodies.get(digest, b"")) for digest in manifest.chunks)
            if size > manifest.size:
                raise DigestMismatchError(
                    f"the chunks of {row.ref} are {size} bytes or more, not {manifest.size}", field="body"
                )
        if unreadable:
            raise _UnreadableError(next(iter(unreadable.values())))
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

    async def _fetch(
        self, row: ContextRow, wanted: list[Digest], ahead: list[Digest], unreadable: dict[Digest, HoldfastError]
    ) -> dict[Digest, bytes]:
        """Returns the bodies of the wanted chunks, and of those ahead that are found.

        Those that the lake holds, or may hold, and cannot give are noted in ``unreadable``.
        """
        found, _ = await self._hot.get_stored_many(row.namespace, [*wanted, *ahead])
        left = [digest for digest in wanted if digest not in found]
        if left:
            # Chunks are acknowledged before their manifest is sent: these have left the hot tier, or never were.
            cold, failed = await self._cold([*left, *(digest for digest in ahead if digest not in found)], left)
            found |= cold
            unreadable |= failed
        for digest in left:
            if digest not in found and digest not in unreadable:
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
            if digest not in bodies and digest not in unreadable:
                raise NotFoundError(
                    f"the manifest of {row.ref} names a chunk {digest} that is stored nowhere",
                    field="chunks",
                    hint="store chunks before their manifest, or use the SDK",
                )
        for digest, body in bodies.items():
            self._cache.add((row.namespace, digest), body)
        return bodies

    async def _cold(
        self, digests: list[Digest], wanted: list[Digest]
    ) -> tuple[dict[Digest, ContextRow], dict[Digest, HoldfastError]]:
        """Returns what the lake holds of ``digests``, and of those among ``wanted`` that it cannot give the error."""
        try:
            found: dict[Digest, ContextRow] = await self._in_thread(lambda: self._lookup.get_contexts(digests))
        except RetryError:
            raise
        except HoldfastError as error:
            # Whatever the lake cannot read of itself is no fault of the manifest's.
            if len(digests) == 1:
                return {}, {digests[0]: error}
            if len(digests) > len(wanted):
                # A damaged chunk of a later manifest is that one's matter.
                return await self._cold(wanted, wanted)
            # One damaged chunk must not hide the others, by which a forgery may show.
            found = {}
            failed: dict[Digest, HoldfastError] = {}
            for half in (wanted[: len(wanted) // 2], wanted[len(wanted) // 2 :]):
                more, more_failed = await self._cold(half, half)
                found |= more
                failed |= more_failed
            return found, failed
        return found, {}


class _UnreadableError(Exception):
    """A chunk of a manifest is one that the lake cannot give: ``error`` says why."""

    def __init__(self, error: HoldfastError) -> None:
        super().__init__(error.message)
        self.error = error
