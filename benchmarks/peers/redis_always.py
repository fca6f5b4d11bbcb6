"""Redis 7 alone, every write flushed before it is answered: ``appendonly yes``, ``appendfsync always``.

Redis flushes once for all commands that one turn of its loop has read, so concurrent writers share a flush.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.peer import ConflictError
from benchmarks.peers.servers import PeerMissingError, redis

_UPDATE: Final = """
local head = redis.call('HMGET', KEYS[1], 'version', 'body')
local version = tonumber(head[1] or '0')
if version ~= tonumber(ARGV[2]) then return 0 end
if version > 0 then redis.call('RPUSH', KEYS[1] .. ':versions', head[2]) end
redis.call('HSET', KEYS[1], 'version', version + 1, 'body', ARGV[1])
return version + 1
"""
"""A version compared and written, and the one before it moved to the earlier ones, in one step of the server."""

_PATCH: Final = """
local head = redis.call('HMGET', KEYS[1], 'version', 'body')
local body = cjson.decode(head[2])
for name, value in pairs(cjson.decode(ARGV[1])) do body[name] = value end
redis.call('RPUSH', KEYS[1] .. ':versions', head[2])
redis.call('HSET', KEYS[1], 'version', head[1] + 1, 'body', cjson.encode(body))
"""


def connection_options(port: int) -> dict[str, Any]:
    """Returns what makes redis-py's connections fastest: a connection for each task, no timer and no retry around a
    command.  Three quarters of the time a command takes with its defaults."""
    return {
        "host": "127.0.0.1",
        "port": port,
        "protocol": 2,
        "socket_timeout": None,
        "socket_connect_timeout": None,
        "retry": None,
        "max_connections": 1_024,
    }


class RedisAlways:
    """Redis as the only store.  Made by :func:`open_redis_always`."""

    name = "redis_always"
    what = "Redis 7 alone, appendfsync always"

    def __init__(self, client: Any) -> None:
        self._client = client
        self._update = client.register_script(_UPDATE)
        self._patch = client.register_script(_PATCH)

    async def put(self, key: str, body: bytes) -> None:
        await self._client.set(key, body, nx=True)

    async def put_many(self, items: Sequence[tuple[str, bytes]]) -> None:
        await self._client.mset(dict(items))

    async def get(self, key: str) -> bytes:
        body: bytes | None = await self._client.get(key)
        if body is None:
            raise RuntimeError("Redis has lost a context that was just written")
        return body

    async def get_many(self, keys: Sequence[str]) -> list[bytes]:
        bodies: list[bytes] = await self._client.mget(keys)
        return bodies

    async def update(self, key: str, body: bytes, expected: int) -> None:
        if not await self._update(keys=[f"key:{key}"], args=[body, expected]):
            raise ConflictError(key)

    async def patch(self, key: str, members: bytes) -> None:
        await self._patch(keys=[f"key:{key}"], args=[members])

    async def history(self, key: str) -> list[bytes]:
        earlier: list[bytes] = await self._client.lrange(f"key:{key}:versions", 0, -1)
        return [*earlier, await self._client.hget(f"key:{key}", "body")]

    async def bytes_in_memory(self) -> int:
        used: int = (await self._client.info("memory"))["used_memory"]
        return used


@asynccontextmanager
async def open_redis_always(parent: Path) -> AsyncGenerator[RedisAlways]:
    """Runs the server and connects to it; raises PeerMissingError when something is not installed."""
    try:
        from redis.asyncio import ConnectionPool, Redis
    except ImportError as error:
        raise PeerMissingError(f"{error.name} is not installed: pip install 'holdfast[peers]'") from error
    async with redis(parent, durable=True) as (port, _):
        connections = ConnectionPool(**connection_options(port))
        client = Redis(connection_pool=connections)
        try:
            yield RedisAlways(client)
        finally:
            await client.aclose()
            await connections.aclose()
