"""Named contexts whose newest versions a server has lost: they are put back, and numbers are given once."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from holdfast.client import connect
from holdfast.lake import connect as connect_lake
from holdfast.schemas.errors import UnavailableError
from holdfast.streams.key_log import KeyLog
from holdfast.streams.wire import KEYS_STREAM
from holdfast.workers import lost_heads
from holdfast.workers.control import accept_gap, archiver_status, flush
from tests.running import dead_letters, own_server, running, settings_in
from tests.support import api, plain_client

if TYPE_CHECKING:
    from nats.aio.client import Client

pytestmark = pytest.mark.asyncio


async def test_a_key_whose_newest_versions_were_lost_goes_on_after_them(tmp_path: Path) -> None:
    """The stream's files are put back to what they were; the lake holds what was written since."""
    store, kept = tmp_path / "nats", tmp_path / "kept"
    settings = settings_in(tmp_path)
    async with own_server(tmp_path) as server:
        async with connect(server.url) as hf:
            for name in ("plan", "still", "gone"):
                await hf.keys.put(name, {"n": 1})
            await hf.keys.delete("gone")
        await server.stop()
        shutil.copytree(store, kept)
        await server.start(with_streams=False)
        async with running(server.url, settings), connect(server.url) as hf:
            for number in range(2, 6):
                await hf.keys.put("plan", {"n": number})
            await hf.keys.put("gone", {"n": 3})
            await hf.keys.delete("gone")
            await hf.keys.put("new", {"n": 1})
            await flush(hf.connection)
        await server.kill()
        shutil.rmtree(store)
        shutil.move(kept, store)
        await server.start(with_streams=False)
        async with running(server.url, settings), connect(server.url, cache_bytes=0) as hf:
            await flush(hf.connection)
            assert [problem.object for problem in (await archiver_status(hf.connection)).problems]
            assert ((await hf.keys.get("plan")).version, (await hf.keys.get("plan")).body) == (5, {"n": 5})
            # The next version has the next number, of a key that never was in this stream, too.
            assert (await hf.keys.put("plan", {"n": 6})).version == 6
            assert (await hf.keys.put("gone", {"n": 5})).version == 5
            assert (await hf.keys.put("new", {"n": 2})).version == 2
            assert (await hf.keys.put("still", {"n": 2})).version == 2
            await flush(hf.connection)
            for name, last in {"plan": 6, "gone": 5, "new": 2, "still": 2}.items():
                assert [version.version async for version in hf.keys.history(name)] == list(range(last, 0, -1))
            assert [(await hf.keys.get("plan", number)).body for number in range(1, 7)] == [
                {"n": number} for number in range(1, 7)
            ]
            assert await dead_letters(hf) == []
            for table in ("contexts", "events", "key_versions"):
                await accept_gap(hf.connection, table)
            async with plain_client(server.url) as client:
                last_seq = await _last_seq(client)
        # What was put back once is not put back again.
        async with running(server.url, settings), connect(server.url) as hf:
            await flush(hf.connection)
            assert (await archiver_status(hf.connection)).problems == []
            async with plain_client(server.url) as client:
                assert await _last_seq(client) == last_seq


async def test_a_client_that_was_there_before_the_stream_was_made_anew_goes_on_after_what_is_archived(
    tmp_path: Path,
) -> None:
    """It remembers, for minutes, that a key without a head has no versions."""
    settings = settings_in(tmp_path)
    async with own_server(tmp_path) as server, connect(server.url, cache_bytes=0) as hf:
        async with running(server.url, settings):
            for number in range(1, 4):
                await hf.keys.put("plan", {"n": number})
            await hf.keys.put("gone", {"n": 1})
            await hf.keys.delete("gone")
            await flush(hf.connection)
        async with plain_client(server.url) as client:
            await client.jetstream().delete_stream(KEYS_STREAM)
        async with running(server.url, msgspec.structs.replace(settings, accept_lost_streams=True)):
            await flush(hf.connection)
            assert (await hf.keys.get("plan")).body == {"n": 3}
            assert (await hf.keys.put("plan", {"n": 4})).version == 4
            assert (await hf.keys.put("gone", {"n": 3})).version == 3
            await flush(hf.connection)
            assert [version.version async for version in hf.keys.history("plan")] == [4, 3, 2, 1]
            assert [version.version async for version in hf.keys.history("gone")] == [3, 2, 1]
            assert await dead_letters(hf) == []


async def test_an_archiver_whose_list_of_keys_finds_no_memory_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[KeyLog] = []
    close = KeyLog.close

    async def noted(self: KeyLog) -> None:
        closed.append(self)
        await close(self)

    settings = settings_in(tmp_path)
    async with own_server(tmp_path) as server, connect(server.url, cache_bytes=0) as hf:
        async with running(server.url, settings):
            for number in range(1, 4):
                await hf.keys.put("plan", {"n": number})
            await flush(hf.connection)
        async with plain_client(server.url) as client:
            await client.jetstream().delete_stream(KEYS_STREAM)
        monkeypatch.setattr(KeyLog, "close", noted)
        scarce = partial(connect_lake, config={"memory_limit": "100KB", "temp_directory": ""})
        monkeypatch.setattr(lost_heads, "connect", scarce)
        async with running(server.url, msgspec.structs.replace(settings, accept_lost_streams=True)):
            with pytest.raises(UnavailableError, match="cannot be listed: Out of Memory"):
                await flush(hf.connection)
            assert closed
            monkeypatch.undo()
            await flush(hf.connection)
            assert ((await hf.keys.get("plan")).version, (await hf.keys.get("plan")).body) == (3, {"n": 3})
            assert (await archiver_status(hf.connection)).problems == []


async def _last_seq(client: Client) -> Any:
    state: Any = (await api(client, f"STREAM.INFO.{KEYS_STREAM}"))["state"]
    return state["last_seq"]
