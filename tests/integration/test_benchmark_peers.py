"""The stores that the benchmarks compare with do what they are measured for, each in its best form."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from benchmarks.bench_analytics import postgres_side
from benchmarks.peers.figures import PEERS, next_version, open_peers
from benchmarks.peers.peer import ConflictError, Peer
from benchmarks.peers.postgres_redis import PostgresRedis

pytestmark = pytest.mark.timeout(120)


@asynccontextmanager
async def running(name: str) -> AsyncGenerator[Peer]:
    """Runs a peer, or skips the test where it is not installed."""
    said: list[str] = []
    # Not below a directory of this user alone: PostgreSQL runs as another one.
    async with open_peers(Path(tempfile.gettempdir()), [name], said.append) as peers:
        peer = peers.of(name)
        if peer is None:
            pytest.skip(said[0])
        yield peer


@pytest.mark.parametrize("name", PEERS)
async def test_a_peer_keeps_every_version_and_refuses_what_comes_too_late(name: str) -> None:
    async with running(name) as peer:
        await peer.put("one", b"alone")
        await peer.put_many([("two", b"a"), ("three", b"b")])
        assert [await peer.get("one"), *await peer.get_many(["two", "three"])] == [b"alone", b"a", b"b"]
        for version in range(4):
            await next_version(peer, "key", f"v{version + 1}".encode(), version)
        for expected in (1, 3, 5):
            with pytest.raises(ConflictError):
                await peer.update("key", b"lost", expected)
        assert await peer.history("key") == [b"v1", b"v2", b"v3", b"v4"]


@pytest.mark.parametrize("name", PEERS)
async def test_no_member_is_lost_when_many_change_one_key_of_a_peer(name: str) -> None:
    async with running(name) as peer:
        await next_version(peer, "key", b'{"first":0}', 0)
        async with asyncio.TaskGroup() as group:
            for number in range(100):
                group.create_task(peer.patch("key", msgspec.json.encode({f"n{number}": number})))
        versions = [msgspec.json.decode(body) for body in await peer.history("key")]
        assert versions[-1] == {"first": 0, **{f"n{number}": number for number in range(100)}}
        assert [len(version) for version in versions] == list(range(1, 102))


async def test_postgres_stores_each_body_once() -> None:
    async with running("postgres_redis") as peer:
        assert isinstance(peer, PostgresRedis)
        await peer.put("one", b"alone")
        await peer.put_many([("two", b"a"), ("three", b"b")])
        await peer.update("three", b"c", 1)
        bodies = await peer.pool.fetch("SELECT body FROM contexts UNION ALL SELECT body FROM versions ORDER BY body")
        assert [body for (body,) in bodies] == [b"a", b"alone", b"b", b"c"]


async def test_postgres_knows_how_many_groups_to_expect() -> None:
    async with running("postgres_redis") as peer:
        assert isinstance(peer, PostgresRedis)
        side, told = await postgres_side(peer, 20_000)
        assert (await side.run(2)).count == 2
        assert told["groups"] == 8_400
        # Without statistics it expects as many as there are rows.
        [_, expected] = told["plan"][0].split("rows=")
        assert 0.8 * 8_400 < int(expected.split()[0]) < 1.2 * 8_400
