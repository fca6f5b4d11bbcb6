"""Versions of keys that are written while the connection is lost: a server that comes back may have lost its end."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from holdfast.client import connect
from holdfast.ops.torture.proxy import Proxy
from holdfast.schemas.errors import UnavailableError, UnknownOutcomeError
from holdfast.schemas.ids import now_ms
from holdfast.streams.decode import encode_key_version
from holdfast.streams.key_chains import Head
from holdfast.streams.key_log import Following, KeyLog, LostRaceError, NewVersion
from holdfast.streams.publish import Outgoing, publish
from holdfast.streams.wire import key_subject
from holdfast.workers.janitor import Janitor
from tests.key_support import a_version
from tests.running import eventually, own_server, rolled_back

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from holdfast.client import Holdfast
    from holdfast.client.key_model import KeyValue
    from holdfast.schemas.rows import KeyVersionRow
    from holdfast.streams.connection import Connection
    from tests.support import OwnServer

pytestmark = pytest.mark.asyncio

HOUR_MS = 3_600_000


class Swallowing(Proxy):
    """Knows whether a version was swallowed."""

    has_swallowed = False

    def pieces(self, data: bytes) -> list[bytes]:
        self.has_swallowed = self.has_swallowed or (self.mode == "half-open" and b"$KV.ctx-keys." in data)
        return super().pieces(data)


@asynccontextmanager
async def cut_off(server: OwnServer) -> AsyncGenerator[tuple[Holdfast, Swallowing]]:
    """A client behind a proxy, with one version of a key stored."""
    async with Swallowing(urlsplit(server.url).port or 0, seed=1) as proxy, connect(proxy.url) as hf:
        await hf.keys.put("plan", 1)
        yield hf, proxy


async def swallowed(
    hf: Holdfast, proxy: Swallowing, changes: int, monkeypatch: pytest.MonkeyPatch
) -> list[asyncio.Task[KeyValue]]:
    """Begins to put ``changes`` versions, which the server never hears of, and cuts the connection."""
    write_all = KeyLog.write_all

    async def sent_into_silence(self: KeyLog, versions: Sequence[Following]) -> list[KeyVersionRow]:
        monkeypatch.setattr(KeyLog, "write_all", write_all)
        proxy.mode = "half-open"
        return await write_all(self, versions)

    monkeypatch.setattr(KeyLog, "write_all", sent_into_silence)
    tasks = [asyncio.create_task(hf.keys.put("plan", f"late {number}")) for number in range(changes)]
    await eventually(lambda: proxy.has_swallowed)
    proxy.mode = "refuse"
    proxy.reset()
    await eventually(lambda: not hf.connection.client.is_connected)
    return tasks


@pytest.mark.parametrize("changes", [1, 5])
async def test_a_write_under_way_when_the_server_loses_its_end_goes_behind_what_stands_there_now(
    tmp_path: Path, changes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with own_server(tmp_path) as server, cut_off(server) as (hf, proxy):
        async with rolled_back(server, tmp_path):
            await eventually(lambda: hf.connection.client.is_connected)
            assert [(await hf.keys.put("plan", number)).version for number in (2, 3)] == [2, 3]
            tasks = await swallowed(hf, proxy, changes, monkeypatch)
        async with connect(server.url) as other:
            await other.keys.put("something else", 1)
            assert (await other.keys.put("plan", "other")).version == 2  # at the sequence that version 3 had
        proxy.mode = "through"
        assert [done.version for done in await asyncio.gather(*tasks)] == [*range(3, 3 + changes)]
        assert [version.version async for version in hf.keys.history("plan")] == [*range(2 + changes, 0, -1)]


@pytest.mark.parametrize("changes", [1, 5])
async def test_a_write_under_way_when_the_connection_alone_is_lost_is_stored_once(
    tmp_path: Path, changes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with own_server(tmp_path) as server, cut_off(server) as (hf, proxy):
        tasks = await swallowed(hf, proxy, changes, monkeypatch)
        proxy.mode = "through"
        assert [done.version for done in await asyncio.gather(*tasks)] == [*range(2, 2 + changes)]
        assert [version.version async for version in hf.keys.history("plan")] == [*range(1 + changes, 0, -1)]


class TestWhatStandsThereAfterTheLoss:
    async def test_the_version_itself_put_back_from_the_lake_under_another_sequence(
        self, hf: Holdfast, connection: Connection
    ) -> None:
        log = KeyLog(connection)
        first = a_version(1, namespace=hf.namespace)
        await put_back(connection, first)
        connection.losses += 1
        assert (await log.write(NewVersion(first), after=Head())).event_id == first.event_id
        second, third = a_version(2, namespace=hf.namespace), a_version(3, namespace=hf.namespace)
        head = await log.head(hf.namespace, "plan")
        for row in (second, third):
            await put_back(connection, row)
        connection.losses += 1
        stored = await log.write_all([(NewVersion(second), head), (NewVersion(third), None)])
        assert [row.event_id for row in stored] == [second.event_id, third.event_id]
        assert [version.version async for version in hf.keys.history("plan")] == [3, 2, 1]
        await log.close()

    async def test_another_version_under_its_number(self, hf: Holdfast, connection: Connection) -> None:
        log = KeyLog(connection)
        await hf.keys.put("plan", "other")
        connection.losses += 1
        with pytest.raises(LostRaceError):
            await log.write(NewVersion(a_version(1, namespace=hf.namespace)), after=Head())
        assert [version.version async for version in hf.keys.history("plan")] == [1]
        await log.close()

    async def test_a_part_of_versions_that_were_written_together(self, hf: Holdfast, connection: Connection) -> None:
        log = KeyLog(connection)
        first, second = a_version(1, namespace=hf.namespace), a_version(2, namespace=hf.namespace)
        await put_back(connection, first)
        connection.losses += 1
        with pytest.raises(UnknownOutcomeError, match=r"^1 of 2 versions"):
            await log.write_all([(NewVersion(first), Head()), (NewVersion(second), None)])
        assert [version.version async for version in hf.keys.history("plan")] == [1]
        await log.close()

    async def test_nobody_can_say(self, hf: Holdfast, connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
        log = KeyLog(connection)

        async def away(*_: object) -> Head:
            raise UnavailableError("the server is away")

        monkeypatch.setattr(log, "head", away)
        connection.losses += 1
        with pytest.raises(UnknownOutcomeError, match="the server is away"):
            await log.write(NewVersion(a_version(1, namespace=hf.namespace)), after=Head())
        await log.close()


async def test_an_expiry_that_was_read_before_the_connection_was_lost_is_not_written_upon_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    async def away(*_: object) -> Head:
        raise UnavailableError("the server is away")

    async with own_server(tmp_path) as server, connect(server.url) as hf:
        await hf.keys.put("plan", 1, ttl=60)
        async with rolled_back(server, tmp_path):
            await hf.keys.put("plan", 2, ttl=60)
            await hf.keys.put("plan", 3, ttl=60)
            late = False
            janitor = Janitor(hf.connection, clock_ms=lambda: now_ms() + (HOUR_MS if late else 0))
            assert await janitor.round() == 0
            before = hf.connection.reconnects
        async with connect(server.url) as other:
            await other.keys.put("something else", 1)
            assert (await other.keys.put("plan", "other", ttl=7_200)).version == 2  # where version 3 was
        await eventually(lambda: hf.connection.reconnects > before)
        late = True
        with monkeypatch.context() as patched:
            patched.setattr(KeyLog, "head", away)
            with pytest.raises(UnavailableError, match="the server is away"):
                await janitor.round()
        await janitor.round()
        assert [version.version async for version in hf.keys.history("plan")] == [2, 1]
        await janitor.close()


async def put_back(connection: Connection, row: KeyVersionRow) -> None:
    await publish(connection, Outgoing(key_subject(row.namespace, row.key), {}, encode_key_version(row)))
