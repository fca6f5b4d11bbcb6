"""Manifests at the archiver: each is checked before it is archived, and checking many that share chunks is cheap."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import pytest_asyncio

from holdfast.client import connect
from holdfast.lake import Lake, verify_lake
from holdfast.lake import connect as connect_lake
from holdfast.lake.scrub import Scrub
from holdfast.schemas.bodies import BINARY
from holdfast.schemas.errors import DamagedError, UnavailableError
from holdfast.schemas.refs import Digest, Ref, compute_digest
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.hot import HotTier, NewContext
from holdfast.streams.publish import Outgoing, publish
from holdfast.streams.wire import hot_subject
from holdfast.workers import manifest_check
from holdfast.workers.control import archiver_status, evict, flush
from tests.running import dead_letters, own_server, running, settings_in, target_of

if TYPE_CHECKING:
    from tests.support import OwnServer

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncGenerator[OwnServer]:
    async with own_server(tmp_path) as started:
        yield started


@pytest_asyncio.fixture
async def system(server: OwnServer, tmp_path: Path) -> AsyncGenerator[Connection]:
    async with (
        running(server.url, settings_in(tmp_path), ["archiver"]),
        open_connection(target_of(server.url)) as connection,
    ):
        yield connection


async def store(connection: Connection, digest: str, payload: bytes, headers: dict[str, str], ns: str) -> None:
    await publish(connection, Outgoing(hot_subject(ns, digest), headers, payload))


async def put_chunk(connection: Connection, body: bytes, ns: str = "default") -> Digest:
    digest = compute_digest(ns, "chunk", body, content_type=BINARY)
    await store(connection, digest, body, {"Hf-Kind": "chunk", "Hf-Type": BINARY, "Hf-Form": "chunk"}, ns)
    return digest


async def put_manifest(
    connection: Connection, body: bytes, chunks: Iterable[str], tail: str = "", ns: str = "default", **changes: Any
) -> Digest:
    digest = compute_digest(ns, "note", body)
    manifest = {"size": len(body), "chunks": list(chunks), "tail": tail, "v": 2, **changes}
    await store(connection, digest, msgspec.json.encode(manifest), {"Hf-Kind": "note", "Hf-Form": "manifest"}, ns)
    return digest


async def talk(connection: Connection, turns: int, *, known: list[tuple[Digest, bytes]]) -> list[bytes]:
    """Stores a conversation that grows by a part a turn, after each turn; returns its bodies."""
    bodies: list[bytes] = []
    for turn in range(turns):
        part = random.Random(len(known)).randbytes(100).hex().encode()
        known.append((await put_chunk(connection, part), part))
        tail = f"turn {turn}"
        bodies.append(b"".join(raw for _, raw in known) + tail.encode())
        await put_manifest(connection, bodies[-1], [digest for digest, _ in known], tail)
    return bodies


def bodies_in(lake: Path) -> list[bytes]:
    with connect_lake(lake) as sql:
        return [raw for (raw,) in sql.execute("SELECT body_bytes FROM contexts ORDER BY stream_seq").fetchall()]


async def test_a_conversation_s_chunks_are_fetched_once_however_many_manifests_name_them(
    system: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[Digest] = []
    real = HotTier.get_stored_many

    async def counted(self: HotTier, namespace: str, digests: Iterable[Digest]) -> Any:
        wanted = list(digests)
        fetched.extend(wanted)
        return await real(self, namespace, wanted)

    monkeypatch.setattr(HotTier, "get_stored_many", counted)
    known: list[tuple[Digest, bytes]] = []
    bodies = await talk(system, 40, known=known)
    await flush(system)
    # Within a run the chunks are at hand; in the next run they are remembered.
    bodies += await talk(system, 40, known=known)
    await flush(system)
    # One that a round has parted from its first manifest may have been fetched, once; 80 times 40 are named.
    assert len(fetched) == len(set(fetched)) <= 80
    assert bodies_in(tmp_path / "lake") == bodies


async def test_a_restarted_archiver_fetches_each_chunk_once(
    server: OwnServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[Digest] = []
    real = HotTier.get_stored_many

    async def counted(self: HotTier, namespace: str, digests: Iterable[Digest]) -> Any:
        wanted = list(digests)
        fetched.extend(wanted)
        return await real(self, namespace, wanted)

    monkeypatch.setattr(HotTier, "get_stored_many", counted)
    known: list[tuple[Digest, bytes]] = []
    async with open_connection(target_of(server.url)) as connection:
        async with running(server.url, settings_in(tmp_path), ["archiver"]):
            bodies = await talk(connection, 40, known=known)
            await flush(connection)
        fetched.clear()
        async with running(server.url, settings_in(tmp_path), ["archiver"]):
            bodies += await talk(connection, 20, known=known)
            await flush(connection)
            assert len(fetched) == len(set(fetched))
            assert set(fetched) >= {digest for digest, _ in known[:40]}
            # Out of the hot tier, they come from the lake.
            await evict(connection, 0.0)
        fetched.clear()
        async with running(server.url, settings_in(tmp_path), ["archiver"]):
            bodies += await talk(connection, 20, known=known)
            await flush(connection)
            assert len(fetched) == len(set(fetched))
            assert set(fetched) >= {digest for digest, _ in known[:60]}
    assert bodies_in(tmp_path / "lake") == bodies
    assert verify_lake(tmp_path / "lake").violations == []


async def test_more_chunks_than_are_kept_or_fetched_at_once_change_no_verdict(
    system: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_check, "FETCHED", 3)
    parts = [b"%d" % n * 50 for n in range(20)]
    known = [(await put_chunk(system, part), part) for part in parts]
    await flush(system)
    bodies: list[bytes] = []
    for first in range(0, 18, 3):
        some = known[first : first + 8]
        bodies.append(b"".join(raw for _, raw in some))
        await put_manifest(system, bodies[-1], [digest for digest, _ in some])
    bad = b"z" * len(bodies[0])
    await put_manifest(system, bad, [digest for digest, _ in known[:8]])
    await flush(system)
    assert bodies_in(tmp_path / "lake") == bodies
    assert [letter.code for letter in await dead_letters(system)] == ["digest_mismatch"]


async def test_forged_manifests_are_dead_letters_and_hide_no_true_context(system: Connection, tmp_path: Path) -> None:
    part = b"part " * 100
    chunk = await put_chunk(system, part)
    elsewhere = await put_chunk(system, part, "other")
    async with connect(system.target.url) as hf:
        plain = await hf.put("not a chunk")
    wrong: list[tuple[bytes, dict[str, Any]]] = [
        (part + b"1", {"chunks": [chunk], "tail": "2"}),
        (part + b"2", {"chunks": [chunk], "tail": ""}),
        (part + b"3", {"chunks": [chunk] * 4_000, "tail": "3"}),
        (part + b"4", {"chunks": ["a" * 32], "tail": "4"}),
        (part + b"5", {"chunks": [elsewhere], "tail": "5"}),
        (b'"not a chunk"6', {"chunks": [plain.rpartition("_")[2]], "tail": "6"}),
        (part + b"7", {"chunks": [], "tail": "7"}),
        (part + b"8", {"chunks": [chunk], "tail": "8", "v": 3}),
        (part + b"9", {"chunks": [chunk], "tail": "9", "size": -1}),
    ]
    for body, members in wrong:
        await put_manifest(system, body, **members)
    good = part + b"good"
    await put_manifest(system, good, [chunk], "good")
    await flush(system)
    assert good in bodies_in(tmp_path / "lake")
    assert len(await dead_letters(system)) == len(wrong)
    lake = Lake.open(tmp_path / "lake")
    # Two chunks, a plain context, one good manifest.
    assert lake.statistics("contexts").rows == 4
    # The true contexts can still be stored and archived, once the forgeries have left their place.
    await evict(system, 0.0)
    hot = HotTier(system)
    await hot.put_many([NewContext(namespace="default", kind="note", body=body) for body, _ in wrong])
    await hot.close()
    await flush(system)
    assert {body for body, _ in wrong} < set(bodies_in(tmp_path / "lake"))
    assert verify_lake(tmp_path / "lake").violations == []


async def archived_and_damaged(server: OwnServer, data: Path) -> tuple[Digest, bytes, Path, bytes]:
    """A chunk that has left the hot tier, and whose row group in the lake has a flipped bit: digest and body of the
    chunk, path and sound content of the file."""
    part = random.Random(7).randbytes(2_000).hex().encode()
    async with (
        running(server.url, settings_in(data), ["archiver"]),
        open_connection(target_of(server.url)) as connection,
    ):
        chunk = await put_chunk(connection, part)
        await flush(connection)
        await evict(connection, 0.0)
    lake = Lake.open(data / "lake")
    [entry] = lake.files("contexts")
    path = lake.table("contexts").directory / entry.path
    stat, sound = path.stat(), path.read_bytes()
    assert entry.checksums is not None
    path.write_bytes(flipped(sound, entry.checksums.parts[0][0] // 2))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return chunk, part, path, sound


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


async def test_a_manifest_over_a_damaged_chunk_waits_until_that_is_healed(server: OwnServer, tmp_path: Path) -> None:
    chunk, part, path, sound = await archived_and_damaged(server, tmp_path)
    async with (
        running(server.url, settings_in(tmp_path), ["archiver"]),
        open_connection(target_of(server.url)) as connection,
    ):
        await put_manifest(connection, part + b"next", [chunk], "next")
        with pytest.raises(UnavailableError, match="cannot be checked"):
            await flush(connection)
        [problem] = (await archiver_status(connection)).problems
        assert str(path) in problem.what
        path.write_bytes(sound)
        assert Scrub(Lake.open(tmp_path / "lake")).recheck_quarantine() == 0
        # What can be checked again is: a forgery over the same chunk is still told from a good manifest.
        await put_manifest(connection, part + b"forged", [chunk], "forgery")
        await flush(connection)
        assert (await archiver_status(connection)).problems == []
        assert [letter.code for letter in await dead_letters(connection)] == ["digest_mismatch"]
    assert bodies_in(tmp_path / "lake") == [part + b"next"]


async def test_a_manifest_over_a_chunk_that_nobody_heals_is_archived_as_it_is(
    server: OwnServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_check, "PATIENCE_S", 0.0)
    chunk, part, path, sound = await archived_and_damaged(server, tmp_path)
    async with (
        running(server.url, settings_in(tmp_path), ["archiver", "resolver"]),
        open_connection(target_of(server.url)) as connection,
        connect(server.url, cache_bytes=0) as hf,
    ):
        refs = [Ref(f"ctx_note_{await put_manifest(connection, part + b'next', [chunk], 'next')}")]
        beside = await put_chunk(connection, b"beside" * 50)
        refs += [Ref(f"ctx_note_{await put_manifest(connection, b'beside' * 50 + b'!', [beside], '!')}")]
        # What is wrong whatever the damaged chunk holds is found all the same.
        await put_manifest(connection, part + b"forged", [chunk, "a" * 32], "forged")
        await flush(connection)
        assert [letter.code for letter in await dead_letters(connection)] == ["not_found"]
        await evict(connection, 0.0)
        assert (await hf.resolve(refs[1])).raw == b"beside" * 50 + b"!"
        with pytest.raises(DamagedError):
            await hf.resolve(refs[0])
        path.write_bytes(sound)
        assert (await hf.resolve(refs[0])).raw == part + b"next"
