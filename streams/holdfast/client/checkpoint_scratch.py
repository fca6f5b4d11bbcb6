"""What a checkpoint has to remember of every item: kept on the disk beyond some megabytes, so that memory is bounded.

A database without a name is SQLite's own temporary file, gone with the connection.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Final, Self, TypeVar

T = TypeVar("T")

_AT_ONCE: Final = 500
_CACHE_KIB: Final = 32 * 1024


class Scratch:
    """Bytes by key, until it is closed.  Every call blocks; may be used from several threads, one at a time."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KIB}", "temp_store = FILE"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE kept (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")

    def add(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Keeps what is not kept yet: the first value of a key stays."""
        self._write("INSERT OR IGNORE INTO kept VALUES (?, ?)", entries)

    def put(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Keeps values, in the place of earlier ones."""
        self._write("INSERT OR REPLACE INTO kept VALUES (?, ?)", entries)

    def find(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Returns the values of those keys that have one."""
        found: dict[bytes, bytes] = {}
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            marks = ",".join("?" * len(some))
            # Nothing but question marks is put into the statement.
            rows = self._database.execute(f"SELECT key, value FROM kept WHERE key IN ({marks})", some)  # noqa: S608
            found.update(rows.fetchall())
        return found

    def close(self) -> None:
        """Forgets everything."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, statement: str, entries: Iterable[tuple[bytes, bytes]]) -> None:
        self._database.execute("BEGIN")
        self._database.executemany(statement, entries)
        self._database.execute("COMMIT")


def fingerprint(*parts: str | bytes) -> bytes:
    """Returns 16 bytes that stand for some parts, in this order."""
    hasher = blake2b(digest_size=16, person=b"holdfast-chk-f")
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        hasher.update(len(raw).to_bytes(8, "little"))
        hasher.update(raw)
    return hasher.digest()


async def in_thread(work: Callable[[], T]) -> T:
    """Runs blocking work in a thread and returns what it returns.

    A cancel is raised when the work has ended: whoever cleans up then finds no thread at work on the same things.
    """
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise
