"""The export runner: every version of every key of a namespace, and the bodies they refer to, into one file.

Two stages run at once, joined by a short queue: versions are read a page at a time, oldest first, and their bodies are
loaded hot or cold, checked, and written before them::

    keys ──heads, pages of history──▶ [4] ──load stored forms, check──▶ file

Bodies are written in the form they are stored in, so a conversation that was stored after every turn takes in the file
what it takes in the hot tier, not the square of it.  Memory holds the names of the keys, some pages of versions, a
window of bodies and the parts last used, whatever the size of the store.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from holdfast.client.cold import ResolverClient
from holdfast.client.key_cold import RemoteColdKeys
from holdfast.client.near_cache import NearCache
from holdfast.client.reading import BodyReader
from holdfast.ops.system import first_cause
from holdfast.schemas import limits
from holdfast.schemas.errors import HoldfastError, IntegrityError, NotFoundError
from holdfast.schemas.ids import now_ms
from holdfast.schemas.refs import digest_to_bytes, parse_ref
from holdfast.streams.codec import decode_manifest, join, require_chunks
from holdfast.streams.hot import HotTier
from holdfast.streams.key_log import KeyLog

if TYPE_CHECKING:
    from pathlib import Path

    from holdfast.client import Holdfast
    from holdfast.ops.export_format import ExportWriter
    from holdfast.schemas.refs import Digest, Ref
    from holdfast.schemas.rows import ContextRow, KeyVersionRow

PAGE_VERSIONS: Final = 500
"""Versions read and written together."""

WINDOW_BYTES: Final = 8 * limits.MIB
"""About how many bytes of bodies are held before they are written; one body in parts may be larger."""

PARTS_BYTES: Final = 64 * limits.MIB
"""Parts kept: the versions of a growing body share them."""

SEEN: Final = 250_000
"""Contexts remembered as written, the least recently used forgotten first: some 40 MB.  What is forgotten is written
again when it comes again, which costs bytes and nothing else."""

_HEADS: Final = 1_000
_COLD_PAGE: Final = 200
_KEYS_AT_ONCE: Final = 16
"""Keys whose first page is asked for at once: a page is a round trip, and the lake answers many together."""

_QUEUED_PAGES: Final = 4
_FIRST_WINDOW: Final = 32
_PARTS_AT_ONCE: Final = 64
"""Parts asked for at once: of the largest, 32 MiB."""

T = TypeVar("T")


class ExportCounts(msgspec.Struct, kw_only=True):
    """What an export holds; the members of ``export --json``.

    ``contexts`` counts stored forms: a body in parts is one, and each of its parts is one.  ``missing`` are references
    whose body could not be read: their versions are in the file all the same.
    """

    keys: int = 0
    versions: int = 0
    contexts: int = 0
    missing: int = 0
    seconds: float = 0.0


class SeenDigests:
    """The digests that came by last, up to a number."""

    def __init__(self, most: int = SEEN) -> None:
        self._most = most
        # As bytes: half the memory of the text.
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def add(self, digest: Digest) -> bool:
        """Remembers a digest; whether it was new."""
        raw = digest_to_bytes(digest)
        if raw in self._digests:
            self._digests.move_to_end(raw)
            return False
        self._digests[raw] = None
        if len(self._digests) > self._most:
            self._digests.popitem(last=False)
        return True

    def __contains__(self, digest: Digest) -> bool:
        return digest_to_bytes(digest) in self._digests


class PartReader:
    """Reads the parts of bodies, keeping those last used, and sees that they make the body that the digest names."""

    def __init__(self, reader: BodyReader, *, limit_bytes: int = PARTS_BYTES) -> None:
        self._reader = reader
        self._cache = NearCache(limit_bytes)

    def remember(self, parts: Iterable[ContextRow]) -> None:
        """Keeps parts that are at hand."""
        now = now_ms()
        for part in parts:
            self._cache.add(part.digest, part, now)

    async def check(self, manifest: ContextRow) -> dict[Digest, ContextRow]:
        """Returns the parts of a body, each checked, and all of them together against the manifest's digest.

        Raises NotFoundError when a part is stored nowhere, DigestMismatchError or another IntegrityError when one is
        damaged or they do not make the body, UnavailableError when only the lake could hold one and no resolver
        answers.
        """
        digests = list(dict.fromkeys(decode_manifest(manifest.body).chunks))
        now = now_ms()
        parts: dict[Digest, ContextRow] = {}
        errors: dict[Digest, HoldfastError] = {}
        for digest in digests:
            row = self._cache.get(digest, now)
            if row is not None:
                parts[digest] = row
        for window in _windows([digest for digest in digests if digest not in parts], _PARTS_AT_ONCE):
            found, _, failed = await self._reader.load_stored(window)
            errors |= failed
            chunks = {digest: row for digest, row in found.items() if row.form == "chunk"}
            parts |= chunks
            self.remember(chunks.values())
        require_chunks(manifest, parts, errors)
        bodies = {digest: row.body for digest, row in parts.items()}
        await asyncio.to_thread(join, manifest, bodies)
        return parts


class KeyExport:
    """One export of one namespace.

    ``prefix``: the beginning of the keys to export.  ``archived_keys``: keys that may have left the bucket of keys,
    beside those that are in it.  ``on_progress`` is called with the counts so far after each page, ``on_missing`` with
    each reference whose body could not be read.
    """

    def __init__(
        self,
        hf: Holdfast,
        writer: ExportWriter,
        *,
        prefix: str = "",
        archived_keys: Iterable[str] = (),
        on_progress: Callable[[ExportCounts], None] = lambda _: None,
        on_missing: Callable[[str, HoldfastError], None] = lambda _ref, _error: None,
    ) -> None:
        self.counts = ExportCounts()
        self._hf = hf
        self._writer = writer
        self._prefix = prefix
        self._archived_keys = [key for key in archived_keys if key.startswith(prefix)]
        self._on_progress = on_progress
        self._on_missing = on_missing
        self._log = KeyLog(hf.connection)
        self._resolver = ResolverClient(hf.connection, hf.namespace)
        self._cold = RemoteColdKeys(self._resolver, hf.namespace)
        self._reader = BodyReader(HotTier(hf.connection), self._resolver, hf.namespace)
        self._parts = PartReader(self._reader)
        self._seen = SeenDigests()
        self._window = _FIRST_WINDOW

    async def run(self) -> ExportCounts:
        """Writes the whole export, the closing line included, and returns the counts.

        Keys are exported as they are when they are reached: what is written meanwhile is in it or not, each version
        whole.  Raises UnavailableError when a version or a body is only in the lake and no resolver answers.
        """
        started = time.perf_counter()
        pages: asyncio.Queue[list[KeyVersionRow] | None] = asyncio.Queue(_QUEUED_PAGES)
        try:
            async with asyncio.TaskGroup() as stages:
                stages.create_task(self._read(pages))
                stages.create_task(self._write(pages))
        except BaseExceptionGroup as failures:
            raise first_cause(failures) from failures
        await asyncio.to_thread(self._writer.finish)
        self.counts.seconds = round(time.perf_counter() - started, 3)
        return self.counts

    async def _read(self, pages: asyncio.Queue[list[KeyVersionRow] | None]) -> None:
        page: list[KeyVersionRow] = []
        async for versions in self._versions():
            page += versions
            if len(page) >= PAGE_VERSIONS:
                await pages.put(page)
                page = []
        if page:
            await pages.put(page)
        await pages.put(None)

    async def _versions(self) -> AsyncIterator[list[KeyVersionRow]]:
        """Versions in runs: the keys in order, of each the oldest first."""
        namespace = self._hf.namespace
        present = await self._log.keys(namespace, self._prefix)
        for keys in _windows(sorted({*present, *self._archived_keys}), _HEADS):
            heads = await self._log.heads(namespace, keys)
            for some in _windows(keys, _KEYS_AT_ONCE):
                chains = [self._chain(key, heads[key].row if key in heads else None) for key in some]
                first = await asyncio.gather(*map(_next_page, chains))
                for chain, beginning in zip(chains, first, strict=True):
                    page = beginning
                    yield page
                    while len(page) == PAGE_VERSIONS:
                        page = await _next_page(chain)
                        yield page

    async def _chain(self, key: str, head: KeyVersionRow | None) -> AsyncIterator[KeyVersionRow]:
        """The versions of a key, oldest first, up to its head as it was read; None: it has left the bucket."""
        if head is None:
            head = await self._cold.last(key)
        if head is None:
            return
        if head.version == 1:
            yield head
            return
        wanted = 1
        async for revision in self._log.revisions(self._hf.namespace, key):
            row = revision.row
            if row is None or row.version < wanted:
                continue
            # What the bucket does not hold (any more) is archived: versions have no gaps.
            async for old in self._archived(key, wanted, min(row.version, head.version + 1)):
                yield old
            wanted = row.version
            if wanted > head.version:
                return
            yield row
            wanted += 1
        async for old in self._archived(key, wanted, head.version + 1):
            yield old

    async def _archived(self, key: str, start: int, end: int) -> AsyncIterator[KeyVersionRow]:
        """The archived versions from ``start`` up to ``end``, oldest first; the lake tells them newest first."""
        while start < end:
            before = stop = min(start + _COLD_PAGE, end)
            rows: list[KeyVersionRow] = []
            while before > start:
                page = await self._cold.page(key, before, before - start)
                if not page:
                    break
                rows += page
                before = page[-1].version
            for row in reversed(rows):
                if row.version >= start:
                    yield row
            start = stop

    async def _write(self, pages: asyncio.Queue[list[KeyVersionRow] | None]) -> None:
        while (page := await pages.get()) is not None:
            await self._write_contexts(page)
            await asyncio.to_thread(self._write_versions, page)
            writer, counts = self._writer, self.counts
            counts.keys, counts.versions, counts.contexts = writer.keys, writer.versions, writer.contexts
            counts.missing = writer.missing
            self._on_progress(counts)

    def _write_versions(self, page: Sequence[KeyVersionRow]) -> None:
        for row in page:
            self._writer.write_version(row)

    async def _write_contexts(self, page: Sequence[KeyVersionRow]) -> None:
        refs: dict[Digest, Ref] = {}
        for row in page:
            if row.ref is not None:
                digest = parse_ref(row.ref).digest
                if self._seen.add(digest):
                    refs[digest] = row.ref
        waiting = list(refs)
        while waiting:
            digests, waiting = waiting[: self._window], waiting[self._window :]
            found, _, errors = await self._reader.load_stored(digests)
            ready: list[ContextRow] = []
            size = 0
            for digest in digests:
                try:
                    rows = await self._forms(refs[digest], found.pop(digest, None), errors.get(digest))
                except (IntegrityError, NotFoundError) as error:
                    # The others, and the history of this one, are not to suffer for it.
                    self._writer.write_missing(refs[digest], error)
                    self._on_missing(refs[digest], error)
                    continue
                ready += rows
                size += sum(len(row.body) for row in rows)
                if sum(len(row.body) for row in ready) >= WINDOW_BYTES:
                    await asyncio.to_thread(self._write_rows, ready)
                    ready = []
            await asyncio.to_thread(self._write_rows, ready)
            # The next window is as wide as bodies of this size allow.
            mean = max(1, size // len(digests))
            self._window = min(max(1, WINDOW_BYTES // mean), limits.BATCH_REFS, 4 * self._window)

    def _write_rows(self, rows: Iterable[ContextRow]) -> None:
        for row in rows:
            self._writer.write_context(row)

    async def _forms(self, ref: Ref, row: ContextRow | None, error: HoldfastError | None) -> list[ContextRow]:
        """What is to be written for a context: its parts that are not in the file yet, and its stored form.

        Raises IntegrityError or NotFoundError when it cannot be read.
        """
        if row is None or row.ref != ref:
            raise error or NotFoundError(f"{ref} is stored nowhere", field="ref", hint="see 'holdfast verify'")
        if row.form != "manifest":
            return [row]
        try:
            parts = await self._parts.check(row)
        except (IntegrityError, NotFoundError):
            # The hot copy may be damaged where the lake's is sound.
            cold = (await self._resolver.fetch([row.digest], cold=True))[0].get(row.digest)
            if cold is None:
                raise
            row, parts = cold, await self._parts.check(cold) if cold.form == "manifest" else {}
        return [*(part for digest, part in parts.items() if self._seen.add(digest)), row]


def keys_in_lake(lake: Path, namespace: str, prefix: str) -> list[str]:
    """Returns every key of a namespace that the lake knows; blocks on the disk."""
    from holdfast.lake import connect

    with connect(lake) as connection:
        rows = connection.execute(
            "SELECT DISTINCT key FROM key_versions WHERE namespace = ? AND starts_with(key, ?)", [namespace, prefix]
        ).fetchall()
    return [key for (key,) in rows]


async def _next_page(chain: AsyncIterator[KeyVersionRow]) -> list[KeyVersionRow]:
    page: list[KeyVersionRow] = []
    async for row in chain:
        page.append(row)
        if len(page) == PAGE_VERSIONS:
            break
    return page


def _windows(items: Sequence[T], size: int) -> Iterable[list[T]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))


__all__ = ["ExportCounts", "KeyExport", "PartReader", "SeenDigests", "keys_in_lake"]
