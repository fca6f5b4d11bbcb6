"""Named contexts whose newest versions a server has lost: they are put back, and numbers are given once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from holdfast.client import Holdfast, connect
from holdfast.lake import connect as connect_lake
from holdfast.schemas.errors import UnavailableError
from holdfast.streams.decode import encode_key_version
from holdfast.streams.key_log import KeyLog
from holdfast.streams.topology import ensure_topology
from holdfast.streams.wire import KEYS_STREAM, key_subject
from holdfast.workers import lost_heads
from holdfast.workers.control import accept_gap, archiver_status, flush
from tests.running import dead_letters, eventually, own_server, rolled_back, running, settings_in
from tests.support import api, plain_client

if TYPE_CHECKING:
    from nats.aio.client import Client

    from holdfast.schemas.rows import KeyVersionRow
    from holdfast.streams.connection import Connection
    from holdfast.streams.key_chains import Head
    from holdfast.streams.publish import Outgoing
    from holdfast.workers.settings import WorkerSettings
    from tests.support import OwnServer

pytestmark = pytest.mark.asyncio


async def test_a_key_whose_newest_versions_were_lost_goes_on_after_them(tmp_path: Path) -> None:
    """The stream's files are put back to what they were; the lake holds what was written since."""
    settings = settings_in(tmp_path)
    async with own_server(tmp_path) as server:
        async with connect(server.url) as hf:
            for name in ("plan", "still", "gone"):
                await hf.keys.put(name, {"n": 1})
            await hf.keys.delete("gone")
        async with rolled_back(server, tmp_path), running(server.url, settings), connect(server.url) as hf:
            for number in range(2, 6):
                await hf.keys.put("plan", {"n": number})
            await hf.keys.put("gone", {"n": 3})
            await hf.keys.delete("gone")
            await hf.keys.put("new", {"n": 1})
            await flush(hf.connection)
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


async def test_a_stream_that_is_made_anew_while_the_archiver_runs_gets_its_heads_back(tmp_path: Path) -> None:
    """By another process, over the server's API: no connection was lost that could tell."""
    settings = settings_in(tmp_path)
    async with own_server(tmp_path) as server, running(server.url, settings):
        async with connect(server.url, cache_bytes=0) as hf:
            for number in range(1, 4):
                await hf.keys.put("plan", {"n": number})
            await flush(hf.connection)
            await hf.connection.api(f"STREAM.DELETE.{KEYS_STREAM}")
            await ensure_topology(hf.connection)
        async with connect(server.url, cache_bytes=0) as hf:
            await flush(hf.connection)
            assert (await hf.keys.get("plan")).body == {"n": 3}
            assert (await hf.keys.put("plan", {"n": 4})).version == 4
            await flush(hf.connection)
            assert [version.version async for version in hf.keys.history("plan")] == [4, 3, 2, 1]
            assert await dead_letters(hf) == []


async def test_a_head_remembered_from_before_a_lost_tail_is_not_taken_for_what_has_its_sequence_now(
    tmp_path: Path,
) -> None:
    async with own_server(tmp_path) as server, connect(server.url) as hf:
        await hf.keys.put("plan", 1)
        async with rolled_back(server, tmp_path):
            assert [(await hf.keys.put("plan", number)).version for number in (2, 3)] == [2, 3]
            before = hf.connection.reconnects
        async with connect(server.url) as other:
            await other.keys.put("something else", 1)
            assert (await other.keys.put("plan", "other")).version == 2  # at the sequence that version 3 had
        await eventually(lambda: hf.connection.reconnects > before)
        assert (await hf.keys.put("plan", "since")).version == 3
        assert [version.version async for version in hf.keys.history("plan")] == [3, 2, 1]


async def test_keys_that_were_written_last_are_put_back_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page by page, and within one."""
    monkeypatch.setattr(lost_heads, "_PAGE", 2)
    async with lost_versions(tmp_path, ["a", "b", "c", "d", "e", "c", "a"]) as (server, hf, settings):
        async with running(server.url, settings):
            await flush(hf.connection)
        async with plain_client(server.url) as client:
            stored = [await client.jetstream().get_msg(KEYS_STREAM, seq) for seq in range(1, 6)]
        assert [message.subject for message in stored] == [key_subject(hf.namespace, name) for name in "acedb"]


async def test_a_key_that_a_writer_was_faster_with_keeps_no_other_from_being_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with lost_versions(tmp_path, ["a", "b", "c", "b"]) as (server, hf, settings):
        heads = KeyLog.heads

        async def overtaken(self: KeyLog, namespace: str, keys: Iterable[str]) -> dict[str, Head]:
            found = await heads(self, namespace, keys)
            monkeypatch.setattr(KeyLog, "heads", heads)
            await hf.keys.put("b", {"n": "faster"})
            return found

        monkeypatch.setattr(KeyLog, "heads", overtaken)
        async with running(server.url, settings):
            await flush(hf.connection)
            assert [(await hf.keys.get(name)).body for name in ("a", "b", "c")] == [{"n": 0}, {"n": "faster"}, {"n": 2}]
            assert [record.__dict__["keys"] for record in caplog.records if "were put back" in record.message] == [2]


async def test_heads_that_were_read_before_the_connection_was_lost_are_read_again_before_anything_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may have lost its end once more."""
    done: list[str] = []
    heads, write = KeyLog.heads, lost_heads._write

    async def read(self: KeyLog, namespace: str, keys: Iterable[str]) -> dict[str, Head]:
        found = await heads(self, namespace, keys)
        if not done:
            self._connection.losses += 1
        done.append("read")
        return found

    async def written(connection: Connection, messages: list[Outgoing]) -> int:
        done.append("written")
        return await write(connection, messages)

    async with lost_versions(tmp_path, ["a", "b"]) as (server, hf, settings):
        monkeypatch.setattr(KeyLog, "heads", read)
        monkeypatch.setattr(lost_heads, "_write", written)
        async with running(server.url, settings):
            await flush(hf.connection)
            assert done[:3] == ["read", "read", "written"]
            assert [(await hf.keys.get(name)).body for name in ("a", "b")] == [{"n": 0}, {"n": 1}]


async def test_a_version_that_the_server_takes_no_more_keeps_no_other_from_being_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with lost_versions(tmp_path, ["a", "b", "c"]) as (server, hf, settings):
        limit = hf.connection.client.max_payload

        def swollen(row: KeyVersionRow) -> bytes:
            return encode_key_version(row) + b" " * (limit if row.key == "b" else 0)

        monkeypatch.setattr(lost_heads, "encode_key_version", swollen)
        async with running(server.url, settings):
            await flush(hf.connection)
            assert [(await hf.keys.get(name)).body for name in ("a", "c")] == [{"n": 0}, {"n": 2}]
        (told,) = [record for record in caplog.records if "were not put back" in record.message]
        assert (told.__dict__["keys"], told.__dict__["first"]) == (1, key_subject(hf.namespace, "b"))


@asynccontextmanager
async def lost_versions(
    tmp_path: Path, names: Sequence[str]
) -> AsyncGenerator[tuple[OwnServer, Holdfast, WorkerSettings]]:
    """A server whose stream of keys is no more, while versions of these keys, one after the other, are in the lake.

    The settings, of workers to come, accept that.
    """
    settings = settings_in(tmp_path)
    async with own_server(tmp_path) as server, connect(server.url, cache_bytes=0) as hf:
        async with running(server.url, settings):
            for number, name in enumerate(names):
                await hf.keys.put(name, {"n": number})
            await flush(hf.connection)
        async with plain_client(server.url) as client:
            await client.jetstream().delete_stream(KEYS_STREAM)
        yield server, hf, msgspec.structs.replace(settings, accept_lost_streams=True)


async def test_an_archiver_whose_list_of_keys_finds_no_memory_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[KeyLog] = []
    close = KeyLog.close

    async def noted(self: KeyLog) -> None:
        closed.append(self)
        await close(self)

    async with lost_versions(tmp_path, ["plan"] * 3) as (server, hf, settings):
        monkeypatch.setattr(KeyLog, "close", noted)
        scarce = partial(connect_lake, config={"memory_limit": "100KB", "temp_directory": ""})
        monkeypatch.setattr(lost_heads, "connect", scarce)
        async with running(server.url, settings):
            with pytest.raises(UnavailableError, match="cannot be listed: Out of Memory"):
                await flush(hf.connection)
            assert closed
            monkeypatch.undo()
            await flush(hf.connection)
            assert ((await hf.keys.get("plan")).version, (await hf.keys.get("plan")).body) == (3, {"n": 2})
            assert (await archiver_status(hf.connection)).problems == []


async def _last_seq(client: Client) -> Any:
    state: Any = (await api(client, f"STREAM.INFO.{KEYS_STREAM}"))["state"]
    return state["last_seq"]
