"""What a power cut leaves of the files in which nats-server describes its streams, made by hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.client import connect
from holdfast.ops.highway_hash import highway_hash_64
from holdfast.ops.server import EmbeddedServer
from holdfast.ops.server_config import ServerSettings
from holdfast.ops.stream_files import CHECKSUM, DESCRIPTION, checksum_of, finish_stream_files
from holdfast.streams.connection import open_connection
from holdfast.streams.connection_target import ConnectionTarget
from holdfast.streams.topology import StreamInfo, ensure_topology, mark_heads_archived, stream_info
from holdfast.streams.wire import DEAD_STREAM, KEYS_STREAM

pytestmark = pytest.mark.faults

PENDING = f"{CHECKSUM}.tmp"


def embedded(data: Path) -> EmbeddedServer:
    return EmbeddedServer(ServerSettings(data=data, announce=False, start_timeout_s=5.0))


def folder_of(data: Path, stream: str) -> Path:
    [folder] = data.glob(f"jetstream/*/streams/{stream}")
    return folder


async def filled(data: Path, *, changed: bool) -> tuple[StreamInfo, bytes]:
    """Stores a key and changes its stream; returns the stream, and the checksum of its description before."""
    async with embedded(data) as server:
        target = ConnectionTarget(url=server.info.nats_url, origin="test")
        async with open_connection(target) as connection:
            await ensure_topology(connection)
            before = (folder_of(data, KEYS_STREAM) / CHECKSUM).read_bytes()
            async with connect(server.info.nats_url) as hf:
                await hf.keys.put("plan", {"step": 1})
            if changed:
                await mark_heads_archived(connection)
            return await stream_info(connection, KEYS_STREAM), before


def cut_off(folder: Path, checksum: bytes | None, pending: bytes | None) -> None:
    """Leaves the checksum of the description before, and what had come of the next."""
    path, description = folder / CHECKSUM, folder / DESCRIPTION
    path.unlink()
    if checksum is not None:
        path.write_bytes(checksum)
        at = description.stat().st_mtime_ns - 10_000_000
        os.utime(path, ns=(at, at))
    if pending is not None:
        (folder / PENDING).write_bytes(pending)


@pytest.mark.asyncio
@pytest.mark.parametrize("left", ["before", "none", "empty", "pending", "torn-pending"])
async def test_a_change_of_a_stream_that_was_cut_off_costs_nothing(tmp_path: Path, left: str) -> None:
    """The server itself would pass over the stream, with all that was acknowledged in it, and never be ready."""
    data = tmp_path / "data"
    stood, before = await filled(data, changed=True)
    folder = folder_of(data, KEYS_STREAM)
    right = (folder / CHECKSUM).read_bytes()
    assert right != before
    pending = {"pending": right, "torn-pending": right[:5]}.get(left)
    cut_off(folder, {"none": None, "empty": b""}.get(left, before), pending)
    async with embedded(data) as server, connect(server.info.nats_url) as hf:
        now = await stream_info(hf.connection, KEYS_STREAM)
        assert (now.epoch, now.messages, now.heads_archived) == (stood.epoch, 1, True)
        assert (await hf.keys.get("plan")).body == {"step": 1}
        assert (await hf.keys.put("plan", {"step": 2})).version == 2
    assert (folder / CHECKSUM).read_bytes() == right


def bare(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def without_description(folder: Path) -> None:
    bare(folder)
    (folder / "msgs").mkdir()
    (folder / f"{DESCRIPTION}.tmp").write_bytes(b'{"na')


def without_checksum(folder: Path) -> None:
    (folder / CHECKSUM).unlink()


@pytest.mark.asyncio
@pytest.mark.parametrize("leave", [bare, without_description, without_checksum])
async def test_a_machine_that_lost_power_while_it_made_its_streams_starts(
    tmp_path: Path, leave: Callable[[Path], None]
) -> None:
    data = tmp_path / "data"
    await filled(data, changed=False)
    leave(folder_of(data, DEAD_STREAM))
    async with embedded(data) as server, connect(server.info.nats_url) as hf:
        await ensure_topology(hf.connection)
        assert (await stream_info(hf.connection, DEAD_STREAM)).epoch
        assert (await hf.keys.get("plan")).body == {"step": 1}


@pytest.mark.asyncio
async def test_what_was_not_cut_off_is_left_as_it_is(tmp_path: Path) -> None:
    data = tmp_path / "data"
    await filled(data, changed=True)
    assert finish_stream_files(data) == []
    folder = folder_of(data, KEYS_STREAM)
    for path in data.glob(f"jetstream/*/streams/*/{DESCRIPTION}"):
        assert checksum_of(path.parent.name, path.read_bytes()) == (path.parent / CHECKSUM).read_bytes()
    description = folder / DESCRIPTION
    stat, content = description.stat(), description.read_bytes()
    # A bit that flipped on the disk: the file was not written since.
    flipped = content.replace(b'"holdfast.epoch"', b'"holdfast.epocl"')
    assert flipped != content
    description.write_bytes(flipped)
    os.utime(description, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert finish_stream_files(data) == []
    # Written since, and of no use: not a description, or that of another stream.
    for other in (b"", b"\x00" * 40, b"[" * 100_000, content.replace(KEYS_STREAM.encode(), b"KV_ctx-keyz")):
        description.write_bytes(other)
        assert finish_stream_files(data) == []
    # Messages without a description are never taken for a stream that was not made.
    description.unlink()
    assert finish_stream_files(data) == []
    assert list(folder.glob("msgs/*.blk"))


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, 0x907A56DE22C26E53), (1, 0x7EAB43AAC7CDDD78), (3, 0x5C6BEFAB8A463D80), (13, 0xA89A58CE65E641FF)],
)
def test_the_hash_is_that_of_its_published_examples(size: int, expected: int) -> None:
    found = highway_hash_64(bytes(range(32)), bytes(range(size)))
    assert int.from_bytes(found, "little") == expected
