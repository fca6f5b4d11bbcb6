"""Shared by the tests of named contexts.  Holds no tests itself."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from holdfast.client import Holdfast, connect
from holdfast.client.cold import ResolverClient
from holdfast.client.growing import GrowingBodies
from holdfast.client.key_cold import RemoteColdKeys
from holdfast.client.key_ring import KeyRing
from holdfast.client.keys import Keys
from holdfast.client.near_cache import NearCache
from holdfast.client.reading import BodyReader
from holdfast.schemas.ids import new_event_id, now_ms
from holdfast.schemas.rows import KeyVersionRow
from holdfast.streams.hot import HotTier
from holdfast.streams.key_log import KeyLog
from holdfast.streams.server_clock import ServerClock

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection

RING = KeyRing.of({"k1": secrets.token_bytes(32)}, "k1")


class MovedClock(ServerClock):
    """The server's clock, and some time that this test says has gone by."""

    passed_ms = 0

    async def now_ms(self) -> int:
        return await super().now_ms() + self.passed_ms


def a_version(number: int, *, key: str = "plan", namespace: str = "default") -> KeyVersionRow:
    """A version as a writer makes it: where it will stand is the server's to say."""
    return KeyVersionRow(
        namespace=namespace,
        key=key,
        version=number,
        op="delete",
        event_id=new_event_id(),
        timestamp_ms=now_ms(),
        stored_at_ms=0,
        epoch="",
        seq=0,
    )


def shorten_writes(hf: Holdfast, deadline_s: float = 1.5) -> None:
    """Lets a client give up a body that nobody takes sooner than the 30 s that users have."""
    hf._hot._committer._deadline_s = deadline_s


def keys_of(connection: Connection, namespace: str, clock: ServerClock) -> Keys:
    """Named contexts on a clock of the test's."""
    hot, resolver = HotTier(connection), ResolverClient(connection, namespace)
    reader = BodyReader(hot, resolver, namespace)
    return Keys(
        connection,
        namespace,
        "tester",
        log=KeyLog(connection),
        bodies=GrowingBodies(namespace, hot, reader, NearCache()),
        cold=RemoteColdKeys(resolver, namespace),
        clock=clock,
        ring=RING,
    )


@asynccontextmanager
async def reader_of(hf: Holdfast, **options: Any) -> AsyncGenerator[Holdfast]:
    """Another process, as far as the server can tell: a client that has cached nothing."""
    async with connect(url_of(hf), hf.namespace, "reader", cache_bytes=0, **options) as other:
        yield other


def url_of(hf: Holdfast) -> str:
    url = hf.connection.client.connected_url
    assert url is not None
    return url.geturl()


async def versions_of(hf: Holdfast, key: str) -> list[tuple[int, str]]:
    return [(version.version, version.op) async for version in hf.keys.history(key)]


async def keys_in(hf: Holdfast, prefix: str = "", **options: Any) -> list[str]:
    return [version.key async for version in hf.keys.list(prefix, **options)]
