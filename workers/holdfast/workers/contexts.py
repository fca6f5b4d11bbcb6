"""Contexts from the hot tier, else from the lake: what the resolver reads.

A context leaves the hot tier only after it is durable in the lake, so looking hot first and cold second cannot miss it
in between.  Cold look-ups that come together are read together: the lake is asked for many at once, one batch at a
time, in one thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from holdfast.client.model import Tier
from holdfast.client.near_cache import NearCache
from holdfast.lake.lookup import Lookup
from holdfast.schemas.errors import (
    HoldfastError,
    InputError,
    IntegrityError,
    RetryError,
    TooLargeError,
    UnavailableError,
)
from holdfast.schemas.ids import now_ms
from holdfast.schemas.rows import ContextRow
from holdfast.streams.codec import decode_manifest, join, require_chunks

if TYPE_CHECKING:
    from holdfast.lake.index import LakeIndex
    from holdfast.lake.lake import Lake
    from holdfast.schemas.refs import Digest
    from holdfast.streams.hot import HotTier

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BATCH: Final = 1_000
CACHE_BYTES: Final = 32 * 1024 * 1024
"""Bodies kept that were read from the lake: a cold read costs 2 ms, and the same few are asked for again."""


class Found(msgspec.Struct, frozen=True):
    """A stored form (a manifest stays one) and the tier it was read from; ``is_fresh``: now, not up to a minute ago."""

    row: ContextRow
    tier: Tier
    is_fresh: bool = True


class ColdReader:
    """Reads stored forms from the lake by digest, batching what comes together."""

    def __init__(self, lake: Lake, index: LakeIndex) -> None:
        self._index = index
        self._lookup = Lookup(lake, index)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="holdfast-cold")
        self._waiting: dict[Digest, asyncio.Future[ContextRow | None]] = {}
        self._cache = NearCache(CACHE_BYTES)
        self._running: asyncio.Task[None] | None = None

    async def get_many(self, digests: Iterable[Digest]) -> tuple[dict[Digest, Found], dict[Digest, HoldfastError]]:
        """Returns what the lake holds, and the error of each that it cannot serve; the rest is not there.

        Before anything is said to be missing, the newest version of the lake has been read.
        """
        found: dict[Digest, Found] = {}
        failed: dict[Digest, HoldfastError] = {}
        futures: dict[Digest, asyncio.Future[ContextRow | None]] = {}
        now = now_ms()
        for digest in digests:
            cached = self._cache.get(digest, now)
            if cached is not None:
                found[digest] = Found(cached, "lake", is_fresh=False)
            else:
                futures[digest] = self._enqueue(digest)
        for digest, future in futures.items():
            try:
                row = await asyncio.shield(future)
            except HoldfastError as error:
                failed[digest] = error
                continue
            if row is not None:
                found[digest] = Found(row, "lake")
        return found, failed

    async def in_reading_order(self, digests: list[Digest]) -> list[Digest]:
        """Returns the digests as the lake stores them, each once; those that the index does not know come last."""
        if len(digests) <= 1:
            return digests
        places = await self.in_thread(lambda: self._index.find_contexts(digests))
        known = sorted(places, key=lambda digest: (places[digest].epoch, places[digest].seq))
        return list(dict.fromkeys([*known, *digests]))

    async def in_thread(self, call: Callable[[], T]) -> T:
        """Runs a call in the thread that reads the lake."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def close(self) -> None:
        """Waits for the batch under way and closes the open files."""
        if self._running is not None:
            await asyncio.gather(self._running, return_exceptions=True)
        await self.in_thread(self._lookup.close)
        await asyncio.to_thread(self._executor.shutdown)

    def _enqueue(self, digest: Digest) -> asyncio.Future[ContextRow | None]:
        future = self._waiting.get(digest)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._waiting[digest] = future
            if self._running is None:
                self._running = asyncio.get_running_loop().create_task(self._drain(), name="holdfast-cold-reads")
        return future

    async def _drain(self) -> None:
        try:
            while self._waiting:
                # What was asked for while the last batch was read makes up the next one.
                batch = {digest: self._waiting.pop(digest) for digest in list(self._waiting)[:_BATCH]}
                outcomes = await self._read(list(batch))
                for digest, future in batch.items():
                    outcome = outcomes.get(digest)
                    if isinstance(outcome, HoldfastError):
                        future.set_exception(outcome)
                    else:
                        future.set_result(outcome)
        finally:
            self._running = None

    async def _read(self, digests: list[Digest]) -> dict[Digest, ContextRow | HoldfastError]:
        try:
            # Refreshes the lake and its index itself before it leaves anything out.
            rows = await self.in_thread(lambda: self._lookup.get_contexts(digests))
        except Exception as error:
            # Whatever it is: those who wait for this batch must be told something.
            if not isinstance(error, HoldfastError | OSError):
                logger.exception("cold read failed", extra={"action": "cold_read_failed", "digests": len(digests)})
            if len(digests) == 1 or isinstance(error, RetryError | OSError):
                # What does not answer now would not answer for each of them either.
                return dict.fromkeys(digests, _typed(error))
            # One damaged row must not hide the others, nor cost each of them a reading of its own.
            middle = len(digests) // 2
            return await self._read(digests[:middle]) | await self._read(digests[middle:])
        now = now_ms()
        for row in rows.values():
            self._cache.add(row.digest, row, now)
        return dict(rows)


class ContextReader:
    """Reads contexts hot, then cold."""

    def __init__(self, hot: HotTier, cold: ColdReader) -> None:
        self._hot = hot
        self._cold = cold

    async def get_stored_many(
        self, namespace: str, digests: Iterable[Digest], *, cold: bool = False
    ) -> tuple[dict[Digest, Found], dict[Digest, HoldfastError]]:
        """Returns stored forms of one namespace, and the error of each that cannot be served.

        ``cold``: of the lake alone.
        """
        wanted = list(dict.fromkeys(digests))
        hot, damaged = ({}, {}) if cold else await self._get_hot(namespace, wanted)
        found = {digest: Found(row, "hot") for digest, row in hot.items()}
        left = [digest for digest in wanted if digest not in found]
        if not left:
            return found, {}
        archived, failed = await self._cold.get_many(left)
        # The namespace is under the digest: a row of another is no answer to this question.
        found |= {digest: item for digest, item in archived.items() if item.row.namespace == namespace}
        return found, {digest: error for digest, error in (damaged | failed).items() if digest not in found}

    async def _get_hot(
        self, namespace: str, digests: list[Digest]
    ) -> tuple[dict[Digest, ContextRow], dict[Digest, HoldfastError]]:
        if len(digests) != 1:
            return await self._hot.get_stored_many(namespace, digests)
        # One direct get is one message back, a batched one two.
        try:
            row = await self._hot.get_stored(namespace, digests[0])
        except (IntegrityError, InputError) as error:
            return {}, {digests[0]: error}
        return ({} if row is None else {row.digest: row}), {}

    async def get_many(
        self, namespace: str, digests: Iterable[Digest], *, max_bytes: int
    ) -> tuple[dict[Digest, Found], dict[Digest, HoldfastError]]:
        """Returns whole contexts of one namespace, chunks joined and checked.

        One of over ``max_bytes`` ends in TooLargeError before its chunks are read.
        """
        found, failed = await self.get_stored_many(namespace, digests)
        broken = await self._join(namespace, found, max_bytes)
        again = [digest for digest, (item, _) in broken.items() if item.tier == "hot"]
        if again:
            # A manifest shows only when it is put together that it is none of its digest.
            cold, _ = await self.get_stored_many(namespace, again, cold=True)
            still_broken = await self._join(namespace, cold, max_bytes)
            found |= cold
            broken = {digest: item for digest, item in broken.items() if digest not in cold} | still_broken
        return found, failed | {digest: error for digest, (_, error) in broken.items()}

    async def _join(
        self, namespace: str, found: dict[Digest, Found], max_bytes: int
    ) -> dict[Digest, tuple[Found, HoldfastError]]:
        """Puts whole contexts in the place of manifests; takes out and returns those that cannot be."""
        broken: dict[Digest, tuple[Found, HoldfastError]] = {}
        # One after another: the chunks of many are many times what any answer holds.
        for digest, item in list(found.items()):
            if item.row.form != "manifest":
                continue
            del found[digest]
            try:
                found[digest] = await self._whole(namespace, item, max_bytes)
            except HoldfastError as error:
                broken[digest] = item, error
        return broken

    async def _whole(self, namespace: str, item: Found, max_bytes: int) -> Found:
        row = item.row
        if row.size > max_bytes:
            raise TooLargeError(
                f"{row.ref} has {row.size} bytes, the limit of an answer is {max_bytes}",
                field="body",
                limit=max_bytes,
                hint="resolve it with the SDK, which fetches a large body in parts",
            )
        parts = decode_manifest(row.body).chunks
        chunks, errors = await self.get_stored_many(namespace, parts)
        require_chunks(row, chunks, errors)
        bodies = {digest: chunk.row.body for digest, chunk in chunks.items()}
        return msgspec.structs.replace(item, row=await asyncio.to_thread(join, row, bodies))


def _typed(error: Exception) -> HoldfastError:
    if isinstance(error, HoldfastError):
        return error
    return UnavailableError(f"the lake cannot be read: {error}", hint="see 'holdfast health'")
