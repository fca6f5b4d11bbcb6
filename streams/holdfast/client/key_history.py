"""The versions of a key, hot and cold: by number, as of a time, and all in order.

The hot tier holds the end of a chain, the lake everything that was archived; so a version is looked for hot, then cold.
A version that is trimmed between the two looks is archived, so the second look finds it.  The lake is asked only for
what the hot tier does not hold.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

from holdfast.streams.key_chains import Head

if TYPE_CHECKING:
    from holdfast.client.key_cold import ColdKeySource
    from holdfast.schemas.rows import KeyVersionRow
    from holdfast.streams.key_log import KeyLog

_HOT_PAGE: Final = 500
"""Versions read from the hot tier at once: some 150 KB.  It reads forward only, so a page is read whole."""

_COLD_PAGE: Final = 200


class KeyHistory:
    """Reads the chains of one namespace."""

    def __init__(self, namespace: str, log: KeyLog, cold: ColdKeySource) -> None:
        self._namespace = namespace
        self._log = log
        self._cold = cold

    async def version(self, key: str, number: int) -> Head | None:
        """Returns a version by its number, or None when there is none."""
        if number < 1:
            return None
        head = await self._log.head(self._namespace, key)
        if head.row is None and not await self._may_be_cold():
            return None
        if head.row is not None and number > head.row.version:
            return None
        found = await self._log.version(self._namespace, key, number, head)
        if found is not None:
            return found
        row = await self._cold.get(key, number)
        return None if row is None else Head(row)

    async def as_of(self, key: str, at_ms: int) -> Head:
        """Returns the newest version that had been stored by a time of the server's."""
        found = await self._log.as_of(self._namespace, key, at_ms)
        if found.row is not None:
            return found
        # The hot tier holds the end of the chain: what it begins with says whether there is anything before.
        oldest = await self._oldest(key)
        if oldest is not None and oldest.version == 1:
            return Head()
        if oldest is None and not await self._may_be_cold():
            return Head()
        row = await self._cold.as_of(key, at_ms)
        return Head() if row is None else Head(row)

    async def newest_first(self, key: str, before: int | None) -> AsyncIterator[KeyVersionRow]:
        """Yields the versions below ``before`` (None: all), newest first, hot and cold ones a page at a time."""
        head = await self._log.head(self._namespace, key)
        if head.row is None and not await self._may_be_cold():
            return
        if head.row is not None:
            below = head.row.version + 1
            before = below if before is None else min(before, below)
            async for row in self._hot(key, head, before):
                yield row
                before = row.version
        async for row in self._archived(key, before):
            yield row

    async def from_version(self, key: str, number: int) -> AsyncIterator[KeyVersionRow]:
        """Yields the versions from a number on, oldest first, up to the newest of now."""
        number = max(1, number)
        is_hot = False
        async for revision in self._log.revisions(self._namespace, key):
            if revision.row is None:
                continue
            is_hot = True
            if revision.row.version < number:
                continue
            for row in await self._between(key, number, revision.row.version):
                yield row
            yield revision.row
            number = revision.row.version + 1
        if not is_hot and await self._may_be_cold():
            for row in await self._between(key, number, None):
                yield row

    async def _hot(self, key: str, head: Head, before: int) -> AsyncIterator[KeyVersionRow]:
        """Versions below ``before``, newest first, as far down as the hot tier holds them."""
        oldest = await self._oldest(key)
        while oldest is not None and before > oldest.version:
            first = await self._log.version(self._namespace, key, max(oldest.version, before - _HOT_PAGE), head)
            if first is None or first.row is None:
                return  # trimmed since: all of it is in the lake
            page: list[KeyVersionRow] = []
            async for revision in self._log.revisions(self._namespace, key, from_seq=first.row.seq):
                if revision.row is None:
                    continue
                if revision.row.version >= before:
                    break
                page.append(revision.row)
            for row in reversed(page):
                if row.version < before - 1:
                    return  # trimmed while it was read
                if row.version < before:
                    yield row
                    before = row.version

    async def _oldest(self, key: str) -> KeyVersionRow | None:
        async for revision in self._log.revisions(self._namespace, key, page=1):
            return revision.row
        return None

    async def _between(self, key: str, first: int, before: int | None) -> list[KeyVersionRow]:
        """The archived versions from ``first`` on that are below ``before``, oldest first."""
        rows: list[KeyVersionRow] = []
        if before is None or before > first:
            async for row in self._archived(key, before):
                if row.version < first:
                    break
                rows.append(row)
        return rows[::-1]

    async def _archived(self, key: str, before: int | None) -> AsyncIterator[KeyVersionRow]:
        while before is None or before > 1:
            page = await self._cold.page(key, before, _COLD_PAGE)
            if not page:
                return
            for row in page:
                yield row
                before = row.version

    async def _may_be_cold(self) -> bool:
        """Whether a key without a version in the hot tier may have some in the lake."""
        return (await self._log.info()).heads_archived
