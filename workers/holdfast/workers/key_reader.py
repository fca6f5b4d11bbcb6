"""Versions of named contexts from the lake: what readers ask for once the hot tier has given what it holds.

The hot tier holds a suffix of each key's chain of versions, the lake a prefix that overlaps it; so a reader looks hot
first.  Version numbers have no gaps, and the server's times ascend with them, so every look-up goes by number through
the index and reads single row groups: nothing here scans.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar

from holdfast.lake.lookup import Lookup
from holdfast.schemas.errors import HoldfastError, InvalidFieldError, UnavailableError

if TYPE_CHECKING:
    from holdfast.lake.index import LakeIndex
    from holdfast.lake.lake import Lake
    from holdfast.schemas.rows import KeyVersionRow, Position

T = TypeVar("T")

PAGE_VERSIONS: Final = 1_000
"""Most versions of one page: each may lie in a row group of its own."""

_LARGEST: Final = 2**63 - 1


class ColdKeys:
    """Reads archived versions of named contexts.  Any number of tasks may ask at once; the lake is read in one thread.

    An answer of "not there" is given only after the newest version of the lake has been read.  Raises IntegrityError
    when a row that is known is not where it should be, UnavailableError when the lake cannot be read.
    """

    def __init__(self, lake: Lake, index: LakeIndex) -> None:
        self._lake = lake
        self._index = index
        self._lookup = Lookup(lake, index)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="holdfast-cold-keys")

    async def last(self, namespace: str, key: str) -> KeyVersionRow | None:
        """Returns the newest archived version of a key, whatever it says; None when none was ever archived."""

        def read() -> KeyVersionRow | None:
            self._index.refresh(self._lake)
            rows = self._rows_before(namespace, key, None, 1)
            return rows[0] if rows else None

        return await self._in_thread(read)

    async def get(self, namespace: str, key: str, version: int) -> KeyVersionRow | None:
        """Returns one version of a key, or None when it is not archived."""
        if not 1 <= version <= _LARGEST:
            return None
        wanted = (namespace, key, version)
        return await self._in_thread(lambda: self._lookup.get_key_versions([wanted]).get(wanted))

    async def page(self, namespace: str, key: str, before_version: int | None, limit: int) -> list[KeyVersionRow]:
        """Returns the ``limit`` newest archived versions below ``before_version`` (None: of all), newest first.

        Fewer only when there are no more.
        """
        if not 1 <= limit <= PAGE_VERSIONS:
            raise InvalidFieldError(f"limit {limit} is not 1 to {PAGE_VERSIONS}", field="limit", limit=PAGE_VERSIONS)
        before = before_version if before_version is None or before_version <= _LARGEST else None
        if before is not None and before <= 1:
            return []

        def read() -> list[KeyVersionRow]:
            known = self._known_before(namespace, key, before, limit)
            # Versions are archived in their order: when the one right below is known, so is everything under it.
            if before is None or not known or known[0][0] != before - 1:
                self._index.refresh(self._lake)
            return self._rows_before(namespace, key, before, limit)

        return await self._in_thread(read)

    async def as_of(self, namespace: str, key: str, at_ms: int) -> KeyVersionRow | None:
        """Returns the newest archived version that the server had stored by ``at_ms``; None when there was none.

        The caller knows that every version it has not seen in the hot tier is archived.
        """

        def read() -> KeyVersionRow | None:
            # A version that is not known yet may be the newest at that time, unless a known one is past it.
            newest = self._rows_before(namespace, key, None, 1)
            if not newest or newest[0].stored_at_ms <= at_ms:
                self._index.refresh(self._lake)
                newest = self._rows_before(namespace, key, None, 1)
            if not newest or newest[0].stored_at_ms <= at_ms:
                return newest[0] if newest else None
            return self._search(namespace, key, at_ms, newest[0].version)

        return await self._in_thread(read)

    async def close(self) -> None:
        """Waits for the look-up under way and closes the open files."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self._lookup.close)
        await asyncio.to_thread(self._executor.shutdown)

    def _search(self, namespace: str, key: str, at_ms: int, too_new: int) -> KeyVersionRow | None:
        """Halves the versions below ``too_new`` until the newest of those stored by ``at_ms`` is left."""
        best: KeyVersionRow | None = None
        old_enough = 0
        while too_new - old_enough > 1:
            middle = (old_enough + too_new) // 2
            rows = self._rows_before(namespace, key, middle + 1, 1)
            if not rows or rows[0].version <= old_enough:
                old_enough = middle  # nothing stands between
            elif rows[0].stored_at_ms <= at_ms:
                best, old_enough = rows[0], middle
            else:
                too_new = rows[0].version
        return best

    def _rows_before(self, namespace: str, key: str, before: int | None, limit: int) -> list[KeyVersionRow]:
        known = self._known_before(namespace, key, before, limit)
        rows = self._lookup.get_key_versions((namespace, key, version) for version, _ in known)
        return [rows[namespace, key, version] for version, _ in known]

    def _known_before(self, namespace: str, key: str, before: int | None, limit: int) -> list[tuple[int, Position]]:
        try:
            return self._index.key_versions_before(namespace, key, before, limit)
        except UnavailableError:  # not filled yet, or damaged and begun anew
            self._index.refresh(self._lake)
            return self._index.key_versions_before(namespace, key, before, limit)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, call)
        except HoldfastError:
            raise
        except OSError as error:
            raise UnavailableError(f"the lake cannot be read: {error}", hint="see 'holdfast health'") from error
