"""SQLite in this process (WAL, ``synchronous=FULL``) behind an ordered dict that forgets the least recently used.

In its best form: one thread writes, and commits all that waits in one transaction; reads come from the dict and, where
it has forgotten, from a connection of the reader's own.  One writer alone commits on the spot, which is faster than
handing over.  It serves one process: what another one is to see, it must read from the file.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks.peers.peer import ConflictError

DICT_ENTRIES: Final = 100_000
_MOST_IN_A_COMMIT: Final = 1_000
_SCHEMA: Final = """
CREATE TABLE contexts (key TEXT PRIMARY KEY, version INTEGER NOT NULL, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE versions (key TEXT NOT NULL, version INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (key, version))
    WITHOUT ROWID;
"""

Work = Callable[[sqlite3.Connection], object]


class SqliteDict:
    """The embedded design.  Made by :func:`open_sqlite_dict`."""

    name = "sqlite_dict"
    what = "SQLite (WAL, synchronous=FULL) and a dict, in process"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = _connect(path)
        self._connection.executescript(_SCHEMA)
        self._dict: OrderedDict[str, bytes] = OrderedDict()
        self._waiting: SimpleQueue[tuple[Work, asyncio.Future[object]] | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._writers = 0
        self._thread = threading.Thread(target=self._write, name="sqlite-writer")
        self._thread.start()

    async def put(self, key: str, body: bytes) -> None:
        def insert(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO contexts VALUES (?, 1, ?)", (key, body))

        await self._do(insert)
        self._keep(key, body)

    async def put_many(self, items: Sequence[tuple[str, bytes]]) -> None:
        def insert(connection: sqlite3.Connection) -> None:
            connection.executemany("INSERT INTO contexts VALUES (?, 1, ?)", items)

        await self._do(insert)
        for key, body in items:
            self._keep(key, body)

    async def get(self, key: str) -> bytes:
        body = self._dict.get(key)
        if body is None:
            (body,) = self._connection.execute("SELECT body FROM contexts WHERE key = ?", (key,)).fetchone()
            self._keep(key, body)
        else:
            self._dict.move_to_end(key)
        return body

    async def get_many(self, keys: Sequence[str]) -> list[bytes]:
        return [await self.get(key) for key in keys]

    async def update(self, key: str, body: bytes, expected: int) -> None:
        def swap(connection: sqlite3.Connection) -> bool:
            moved = connection.execute(
                "INSERT INTO versions SELECT key, version, body FROM contexts WHERE key = ? AND version = ?",
                (key, expected),
            ).rowcount
            if moved:
                connection.execute("UPDATE contexts SET version = version + 1, body = ? WHERE key = ?", (body, key))
            return bool(moved)

        if not await self._do(swap):
            raise ConflictError(key)
        self._keep(key, body)

    async def patch(self, key: str, members: bytes) -> None:
        def merge(connection: sqlite3.Connection) -> bytes:
            connection.execute("INSERT INTO versions SELECT key, version, body FROM contexts WHERE key = ?", (key,))
            [(body,)] = connection.execute(
                "UPDATE contexts SET version = version + 1, "
                "body = CAST(json_patch(CAST(body AS TEXT), CAST(? AS TEXT)) AS BLOB) WHERE key = ? RETURNING body",
                (members, key),
            ).fetchall()
            return bytes(body)

        merged = await self._do(merge)
        assert isinstance(merged, bytes)
        self._keep(key, merged)

    async def history(self, key: str) -> list[bytes]:
        rows = self._connection.execute(
            "SELECT version, body FROM versions WHERE key = ? "
            "UNION ALL SELECT version, body FROM contexts WHERE key = ? ORDER BY version",
            (key, key),
        )
        return [body for _, body in rows]

    async def bytes_in_memory(self) -> int:
        # What the dict takes beyond the bodies is small change; pages of SQLite are bounded.
        return sum(len(key) + len(body) + 200 for key, body in self._dict.items())

    def close(self) -> None:
        """Ends the writing thread and closes the files."""
        self._waiting.put(None)
        self._thread.join()
        self._connection.close()

    def _keep(self, key: str, body: bytes) -> None:
        self._dict[key] = body
        self._dict.move_to_end(key)
        if len(self._dict) > DICT_ENTRIES:
            self._dict.popitem(last=False)

    async def _do(self, work: Work) -> object:
        self._writers += 1
        try:
            if self._writers == 1:
                # Room for others to come: whoever is alone does it here.
                await asyncio.sleep(0)
            if self._writers == 1:
                return self._commit_alone(work)
            future: asyncio.Future[object] = self._loop.create_future()
            self._waiting.put((work, future))
            return await future
        finally:
            self._writers -= 1

    def _commit_alone(self, work: Work) -> object:
        self._connection.execute("BEGIN IMMEDIATE")
        outcome = work(self._connection)
        self._connection.execute("COMMIT")
        return outcome

    def _write(self) -> None:
        connection = _connect(self._path)
        while (first := self._waiting.get()) is not None:
            group = [first]
            while len(group) < _MOST_IN_A_COMMIT and not self._waiting.empty():
                another = self._waiting.get()
                if another is None:
                    self._waiting.put(None)
                    break
                group.append(another)
            connection.execute("BEGIN IMMEDIATE")
            outcomes = [(future, work(connection)) for work, future in group]
            connection.execute("COMMIT")
            self._loop.call_soon_threadsafe(_tell, outcomes)
        connection.close()


def _tell(outcomes: Sequence[tuple[asyncio.Future[object], object]]) -> None:
    for future, outcome in outcomes:
        if not future.done():
            future.set_result(outcome)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


@asynccontextmanager
async def open_sqlite_dict(parent: Path) -> AsyncGenerator[SqliteDict]:
    """Opens a new database below ``parent``."""
    with TemporaryDirectory(prefix="holdfast-sqlite-", dir=parent) as directory:
        peer = SqliteDict(Path(directory) / "contexts.db")
        try:
            yield peer
        finally:
            peer.close()
