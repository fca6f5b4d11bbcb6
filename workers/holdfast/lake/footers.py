"""Keeps what DuckDB remembers of Parquet files bounded.

DuckDB keeps the footer of every file that it has read, 30 KB and more each, also when the file is in no version of the
lake any more: with each commit and each merge a service would grow.  It evicts footers only when memory is short, so
memory is made short for a moment, once more of them are of no use than of use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import duckdb

if TYPE_CHECKING:
    from holdfast.lake.log import Snapshot

STALE_FOOTERS: Final = 256
"""Footers of files that are gone which are kept in any case; reading the live ones anew costs 0.1 ms each."""

_LEAST: Final = "1KB"


class Footers:
    """The footers that one DuckDB instance remembers, counted from outside: those of every file that was shown.

    ``memory_limit`` is what the instance was configured with, None for DuckDB's own.
    """

    def __init__(self, duck: duckdb.DuckDBPyConnection, *, memory_limit: str | None = None) -> None:
        self._duck = duck
        self._configured = memory_limit
        self._shown: set[str] = set()
        self._limit = self._read()[0]

    def show(self, snapshots: Iterable[Snapshot]) -> bool:
        """Takes note of the files to be read from now on; whether the footers of others were forgotten.

        Nothing else may run on the instance meanwhile.
        """
        live = {f"{snapshot.table}/{path}" for snapshot in snapshots for path in snapshot.files}
        self._shown |= live
        if len(self._shown) - len(live) <= max(STALE_FOOTERS, len(live)):
            return False
        self._shown = live
        return self._forget()

    def _read(self) -> tuple[str, int]:
        found = self._duck.execute(
            "SELECT current_setting('memory_limit'),"
            " (SELECT sum(memory_usage_bytes) FROM duckdb_memory() WHERE tag <> 'OBJECT_CACHE')"
        ).fetchall()
        return found[0][0], found[0][1] or 0

    def _forget(self) -> bool:
        limit, others = self._read()
        if others or limit != self._limit:
            # Tables of one's own would have to go to the disk, and a limit of one's own can be read rounded only.
            return False
        try:
            # It refuses when something else is left; what could go is gone.
            with contextlib.suppress(duckdb.Error):
                self._duck.execute(f"SET memory_limit = '{_LEAST}'").fetchall()
        finally:
            restored = "RESET memory_limit" if self._configured is None else f"SET memory_limit = '{self._configured}'"
            self._duck.execute(restored).fetchall()
        return True
