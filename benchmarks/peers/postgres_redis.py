"""PostgreSQL 15 and Redis 7, written through: the context and its version in one transaction, then the cache.

Tuned: one statement is the whole transaction (one round trip and one flush), prepared, over a pool of connections; the
cache is set after the commit, and read first.  A cache that was not set in time is filled by the next reader.
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

POOL: Final = 32
"""Connections of the pool: many times the cores, so that commits share flushes."""

_SCHEMA: Final = """
CREATE TABLE contexts (key text PRIMARY KEY, version int NOT NULL, body bytea NOT NULL,
                       stored_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE versions (key text NOT NULL, version int NOT NULL, body bytea NOT NULL,
                       stored_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (key, version));
-- No attempt at compression: bodies of this size are below what is compressed anyway.
ALTER TABLE contexts ALTER COLUMN body SET STORAGE EXTERNAL;
ALTER TABLE versions ALTER COLUMN body SET STORAGE EXTERNAL;
"""
_PUT: Final = """
WITH head AS (INSERT INTO contexts (key, version, body) VALUES ($1, 1, $2) RETURNING key, version, body)
INSERT INTO versions (key, version, body) SELECT key, version, body FROM head
"""
_PUT_MANY: Final = """
WITH given AS (SELECT * FROM unnest($1::text[], $2::bytea[]) AS given (key, body)),
head AS (INSERT INTO contexts (key, version, body) SELECT key, 1, body FROM given RETURNING key, version, body)
INSERT INTO versions (key, version, body) SELECT key, version, body FROM head
"""
_UPDATE: Final = """
WITH head AS (
    UPDATE contexts SET version = version + 1, body = $2, stored_at = now() WHERE key = $1 AND version = $3
    RETURNING key, version, body
)
INSERT INTO versions (key, version, body) SELECT key, version, body FROM head RETURNING version
"""
_VERSION: Final = "SELECT version FROM contexts WHERE key = $1"


class PostgresRedis:
    """The write-through design.  Made by :func:`open_postgres_redis`."""

    name = "postgres_redis"
    what = "PostgreSQL 15 (synchronous_commit on) and a Redis 7 cache, written through"

    def __init__(self, pool: Any, cache: Any) -> None:
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

    async def version(self, key: str) -> int:
        return await self.pool.fetchval(_VERSION, key) or 0

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


async def _connected(asyncpg: Any, address: str) -> Any:
    """The port is open a moment before the database accepts."""
    for _ in range(100):
        try:
            return await asyncpg.create_pool(address, min_size=POOL, max_size=POOL)
        except (asyncpg.CannotConnectNowError, ConnectionError):
            await asyncio.sleep(0.1)
    raise PeerMissingError("PostgreSQL did not become ready in ten seconds")
