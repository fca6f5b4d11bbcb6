"""The versions of a key, hot and cold: by number, as of a time, and all in order.

The hot tier holds the end of a chain, the lake everything that was archived; so a version is looked for hot, then cold.
A version that is trimmed between the two looks is archived, so the second look finds it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

from holdfast.streams.key_log import Head, KeyLog

if TYPE_CHECKING:
    from holdfast.client.key_cold import ColdKeySource
    from holdfast.schemas.rows import KeyVersionRow

_HOT_REVISIONS: Final = 2_000
"""Revisions of one key that are read from the hot tier to show its history: some 600 KB.  The bucket can only be read
forward, so of a longer chain the archived part is asked of the resolver first."""

_COLD_PAGE: Final = 200


class KeyHistory:
    """Reads the chains of one namespace."""

    def __init__(self, namespace: str, log: KeyLog, cold: ColdKeySource) -> None:
        self._namespace = namespace
        self._log = log
        self._cold = cold

    async def version(self, key: str, number: int) -> Head | None:
        """Returns a version by its number, or None when there is none."""
        head = await self._log.head(self._namespace, key)
        if head.row is not None:
            if number == head.row.version:
                return head
            if number > head.row.version:
                return None
        if number < 1:
            return None
        if head.row is not None:
            held = await self._log.count(self._namespace, key)
            if held <= _HOT_REVISIONS:
                async for revision in self._log.revisions(self._namespace, key):
                    if revision.row is not None and revision.row.version >= number:
                        if revision.row.version == number:
                            return revision
                        break  # the hot part begins after it
                row = await self._cold.get(key, number)
                return None if row is None else Head(row)
        row = await self._cold.get(key, number)
        if row is not None:
            return Head(row)
        # A long chain of which this version is not archived yet.
        async for revision in self._log.revisions(self._namespace, key):
            if revision.row is not None and revision.row.version == number:
                return revision
        return None

    async def as_of(self, key: str, at_ms: int) -> Head:
        """Returns the newest version that had been stored by a time of the server's."""
        found = await self._log.as_of(self._namespace, key, at_ms)
        if found.row is not None:
            return found
        # The hot tier holds the end of the chain: what it begins with says whether there is anything before.
        oldest = await self._oldest(key)
        if oldest is not None and oldest.version == 1:
            return Head()
        if oldest is None and not (await self._log.info()).heads_archived:
            return Head()
        row = await self._cold.as_of(key, at_ms)
        return Head() if row is None else Head(row)

    async def newest_first(self, key: str, before: int | None) -> AsyncIterator[KeyVersionRow]:
        """Yields the versions below ``before`` (None: all), newest first, cold ones a page at a time."""
        held = await self._log.count(self._namespace, key)
        if held <= _HOT_REVISIONS:
            hot = [
                revision.row
                async for revision in self._log.revisions(self._namespace, key)
                if revision.row is not None and (before is None or revision.row.version < before)
            ]
            for row in reversed(hot):
                yield row
                before = row.version
        else:
            async for row in self._long(key, before):
                yield row
                before = row.version
            return
        if before is not None and before <= 1:
            return
        if before is None and not held and not (await self._log.info()).heads_archived:
            return
        async for row in self._archived(key, before):
            yield row

    async def from_version(self, key: str, number: int) -> AsyncIterator[KeyVersionRow]:
        """Yields the versions from a number on, oldest first, up to the newest of now."""
        oldest = await self._oldest(key)
        first_hot = None if oldest is None else oldest.version
        if first_hot is None or first_hot > number:
            end = first_hot if first_hot is not None else None
            older: list[KeyVersionRow] = []
            async for row in self._archived(key, end):
                if row.version < number:
                    break
                older.append(row)
            for row in reversed(older):
                yield row
                number = row.version + 1
        async for revision in self._log.revisions(self._namespace, key):
            if revision.row is not None and revision.row.version >= number:
                yield revision.row

    async def _oldest(self, key: str) -> KeyVersionRow | None:
        async for revision in self._log.revisions(self._namespace, key):
            return revision.row
        return None

    async def _long(self, key: str, before: int | None) -> AsyncIterator[KeyVersionRow]:
        """A chain with a long hot part: what is not archived yet is read hot, the rest from the lake, page by page."""
        archived = await self._cold.last(key)
        floor, from_seq = (0, 1) if archived is None else (archived.version, archived.seq)
        fresh = [
            revision.row
            async for revision in self._log.revisions(self._namespace, key, from_seq=from_seq)
            if revision.row is not None and revision.row.version > floor
        ]
        for row in reversed(fresh):
            if before is None or row.version < before:
                yield row
                before = row.version
        async for row in self._archived(key, before):
            yield row

    async def _archived(self, key: str, before: int | None) -> AsyncIterator[KeyVersionRow]:
        while before is None or before > 1:
            page = await self._cold.page(key, before, _COLD_PAGE)
            if not page:
                return
            for row in page:
                yield row
                before = row.version
