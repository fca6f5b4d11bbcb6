"""PostgreSQL 15 and Redis 7, written through: a context, or a key's next version, in one transaction; then the cache.

Tuned: one statement is the whole transaction (one round trip and one flush), prepared, over connections that stay open;
the cache is set after the commit, and read first.  A cache that was not set in time is filled by the next reader.

The connections are not those of asyncpg's own pool: it resets each one that is given back by a query, which is a second
round trip after every statement, and with that query left out it still takes a fifth more of the processors' time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.peer import ConflictError
from benchmarks.peers.redis_always import connection_options
from benchmarks.peers.servers import PeerMissingError, postgres, redis

POOL: Final = 64
"""Connections that stay open: one for each of 64 tasks, and many times the cores, so that commits share flushes.  With
32, 128 or 256 of them its rate is the same within the noise, for 64 tasks and for 256."""

_SCHEMA: Final = """
CREATE TABLE contexts (key text PRIMARY KEY, version int NOT NULL, body bytea NOT NULL,
                       stored_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE versions (key text NOT NULL, version int NOT NULL, body bytea NOT NULL,
                       stored_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (key, version));
-- No attempt at compression: bodies of this size are below what is compressed anyway.
ALTER TABLE contexts ALTER COLUMN body SET STORAGE EXTERNAL;
ALTER TABLE versions ALTER COLUMN body SET STORAGE EXTERNAL;
"""
_PUT: Final = "INSERT INTO contexts (key, version, body) VALUES ($1, 1, $2)"
_PUT_MANY: Final = """
INSERT INTO contexts (key, version, body) SELECT key, 1, body FROM unnest($1::text[], $2::bytea[]) AS given (key, body)
"""
# Both parts see the table as it was before the statement, so that what is moved is the version that is replaced.
_UPDATE: Final = """
WITH head AS (
    UPDATE contexts SET version = version + 1, body = $2, stored_at = now() WHERE key = $1 AND version = $3
    RETURNING key
)
INSERT INTO versions (key, version, body, stored_at)
SELECT key, version, body, stored_at FROM contexts JOIN head USING (key) RETURNING version
"""
# The lock is waited for first: what is merged and moved is then the newest version, whoever else wrote meanwhile.
_PATCH: Final = """
WITH old AS (SELECT key, version, body, stored_at FROM contexts WHERE key = $1 FOR UPDATE),
kept AS (INSERT INTO versions (key, version, body, stored_at) SELECT key, version, body, stored_at FROM old)
UPDATE contexts SET version = old.version + 1, stored_at = now(),
    body = convert_to((convert_from(old.body, 'UTF8')::jsonb || $2::jsonb)::text, 'UTF8')
FROM old WHERE contexts.key = old.key RETURNING contexts.body
"""
_HISTORY: Final = """
SELECT body FROM (SELECT key, version, body FROM versions UNION ALL SELECT key, version, body FROM contexts) AS every
WHERE key = $1 ORDER BY version
"""


class Connections:
    """Connections of asyncpg that stay open, with those of its methods that are used here.

    A task takes the one that was given back last, or waits for one.  Nothing is reset in between: what is executed
    here leaves nothing behind in its session.
    """

    def __init__(self, connections: Sequence[Any]) -> None:
        self._all = connections
        self._free: asyncio.LifoQueue[Any] = asyncio.LifoQueue()
        for connection in connections:
            self._free.put_nowait(connection)

    async def execute(self, query: str, *arguments: Any) -> None:
        await self._on_one("execute", query, *arguments)

    async def executemany(self, query: str, arguments: Sequence[Any]) -> None:
        await self._on_one("executemany", query, arguments)

    async def fetch(self, query: str, *arguments: Any) -> list[Any]:
        rows: list[Any] = await self._on_one("fetch", query, *arguments)
        return rows

    async def fetchval(self, query: str, *arguments: Any) -> Any:
        return await self._on_one("fetchval", query, *arguments)

    async def _on_one(self, method: str, *arguments: Any) -> Any:
        connection = await self._free.get()
        try:
            return await getattr(connection, method)(*arguments)
        finally:
            self._free.put_nowait(connection)

    async def close(self) -> None:
        """Closes every connection, in use or not."""
        for connection in self._all:
            await connection.close()


class PostgresRedis:
    """The write-through design.  Made by :func:`open_postgres_redis`."""

    name = "postgres_redis"
    what = "PostgreSQL 15 (synchronous_commit on) and a Redis 7 cache, written through"

    def __init__(self, pool: Connections, cache: Any) -> None:
        self.pool = pool
        self._cache = cache

    async def put(self, key: str, body: bytes) -> None:
        await self.pool.execute(_PUT, key, body)
        await self._cache.set(key, body)

    async def put_many(self, items: Sequence[tuple[str, bytes]]) -> None:
        await self.pool.execute(_PUT_MANY, [key for key, _ in items], [body for _, body in items])
        await self._cache.mset(dict(items))

    async def get(self, key: str) -> bytes:
        body: bytes | None = await self._cache.get(key)
        if body is None:
            raise RuntimeError("the cache has lost a context that was just written")
        return body

    async def get_many(self, keys: Sequence[str]) -> list[bytes]:
        bodies: list[bytes] = await self._cache.mget(keys)
        return bodies

    async def update(self, key: str, body: bytes, expected: int) -> None:
        if await self.pool.fetchval(_UPDATE, key, body, expected) is None:
            raise ConflictError(key)
        await self._cache.set(key, body)

    async def patch(self, key: str, members: bytes) -> None:
        await self._cache.set(key, await self.pool.fetchval(_PATCH, key, members.decode()))

    async def history(self, key: str) -> list[bytes]:
        return [body for (body,) in await self.pool.fetch(_HISTORY, key)]

    async def bytes_in_memory(self) -> int:
        used: int = (await self._cache.info("memory"))["used_memory"]
        return used


@asynccontextmanager
async def open_postgres_redis(parent: Path) -> AsyncGenerator[PostgresRedis]:
    """Runs both servers and connects to them; raises PeerMissingError when something is not installed."""
    try:
        import asyncpg
        from redis.asyncio import ConnectionPool, Redis
    except ImportError as error:
        raise PeerMissingError(f"{error.name} is not installed: pip install 'holdfast[peers]'") from error
    async with postgres(parent) as address, redis(parent, durable=False) as (port, _):
        pool = await _connected(asyncpg, address)
        connections = ConnectionPool(**connection_options(port))
        cache = Redis(connection_pool=connections)
        try:
            await pool.execute(_SCHEMA)
            yield PostgresRedis(pool, cache)
        finally:
            await cache.aclose()
            await connections.aclose()
            await pool.close()


async def _connected(asyncpg: Any, address: str) -> Connections:
    """The port is open a moment before the database accepts."""
    for _ in range(100):
        try:
            first = await asyncpg.connect(address)
        except (asyncpg.CannotConnectNowError, ConnectionError):
            await asyncio.sleep(0.1)
        else:
            return Connections([first, *[await asyncpg.connect(address) for _ in range(POOL - 1)]])
    raise PeerMissingError("PostgreSQL did not become ready in ten seconds")
