"""What a power cut leaves of the lake's files, made by hand: on machines without loop devices too."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.client import connect
from holdfast.lake import Lake, LakeIndex, Lookup, vacuum, verify_lake
from holdfast.lake import connect as connect_lake
from holdfast.lake import table as table_module
from holdfast.lake.log import LOG_DIRECTORY, checkpoint_path, commit_path, list_checkpoints
from holdfast.lake.log_copies import DIRECTORY as COPIES_DIRECTORY
from holdfast.lake.log_copies import checksum_path, copy_path, drop_copies
from holdfast.lake.writer import TEMPORARY
from holdfast.schemas.rows import TABLES, Position
from holdfast.streams.topology import begin_epoch, purge_below
from holdfast.streams.wire import EVENTS_STREAM, HOT_STREAM
from holdfast.workers.control import flush
from tests.running import Acknowledged, own_server, running, settings_in
from tests.test_lake_samples import EPOCH, contexts, events

pytestmark = pytest.mark.faults


def archive(lake: Lake, first: int, last: int) -> None:
    lake.append("contexts", contexts(first, last), epoch=EPOCH, first_seq=first, last_seq=last)


def shown(path: Path) -> list[int]:
    with connect_lake(path) as sql:
        return [seq for (seq,) in sql.execute("SELECT stream_seq FROM contexts_stored ORDER BY 1").fetchall()]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


TEARS = [empty, halve, zero]


# What must be synced: on a file system that keeps nothing but what it was asked to keep


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The paths of everything that was fsynced."""
    paths: set[str] = set()
    fsync = os.fsync

    def note(descriptor: int) -> None:
        paths.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return paths


def unsynced_names(lake: Path, synced: set[str]) -> list[str]:
    """Returns the directories whose names nobody has synced, of those that a reader needs."""
    passed_over = {TEMPORARY, COPIES_DIRECTORY}
    return [
        folder
        for folder, folders, names in os.walk(lake)
        if (folders or names) and not passed_over.intersection(Path(folder).parts) and folder not in synced
        if not {*folders, *names} <= passed_over
    ]


def test_every_name_on_the_way_to_a_row_is_synced(tmp_path: Path, synced: set[str]) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    assert unsynced_names(path, synced) == []
    archive(lake, 1, 10)
    assert unsynced_names(path, synced) == []
    [entry] = lake.files("contexts")
    log = commit_path(path / "contexts", 1)
    # The Parquet file was synced under its temporary name; renamed, it is the same file.
    assert str(path / "contexts" / TEMPORARY / Path(entry.path).name) in synced
    assert str(log) in synced


def test_a_partition_that_a_dead_process_made_is_synced_by_the_next(tmp_path: Path, synced: set[str]) -> None:
    path = tmp_path / "lake"
    archive(Lake.open(path, create=True), 1, 1)
    [entry] = Lake.open(path).files("contexts")
    other = tmp_path / "other"
    lake = Lake.open(other, create=True)
    # Killed between making the folder and syncing its name.
    (other / "contexts" / entry.path).parent.mkdir()
    (other / "contexts" / TEMPORARY).mkdir()
    synced.clear()
    archive(lake, 1, 1)
    assert str(other / "contexts") in synced


# Torn files


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checksum_of_a_checkpoint_costs_nothing(
    tmp_path: Path, tear: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commits that a checkpoint summarises are removed: if its checksum condemned it, the table would be gone."""
    monkeypatch.setattr(table_module, "CHECKPOINT_INTERVAL", 4)
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    last = 9
    for seq in range(1, last + 1):
        lake.append("events", events(seq, seq), epoch=EPOCH, first_seq=seq, last_seq=seq)
    directory = path / "events"
    vacuum(lake, log_older_than_s=-60.0)
    assert not commit_path(directory, 1).exists()
    for version in list_checkpoints(directory):
        tear(checksum_path(directory, version))
    again = Lake.open(path)
    assert again.statistics("events").rows == last
    for create in (False, True):
        again = Lake.open(path, create=create)
        assert again.statistics("events").rows == last
        assert again.watermark("events") == Position(EPOCH, last)
    again.append("events", events(last + 1, last + 1), epoch=EPOCH, first_seq=last + 1, last_seq=last + 1)
    assert verify_lake(path).ok


@pytest.mark.parametrize("tear", TEARS)
def test_parquet_that_no_commit_names_is_ignored_and_cleaned_away(tmp_path: Path, tear: Callable[[Path], None]) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    archive(lake, 1, 100)
    archive(lake, 101, 200)
    [_, lost] = lake.files("contexts")
    # The commit never came to the disk, the file only in part.
    commit_path(path / "contexts", 2).unlink()
    drop_copies(path / "contexts", [2])
    tear(path / "contexts" / lost.path)
    half = path / "contexts" / TEMPORARY / Path(lost.path).name
    empty(half)

    lake = Lake.open(path, create=True)
    assert lake.watermark("contexts") == Position(EPOCH, 100)
    assert shown(path) == list(range(1, 101))
    assert verify_lake(path).ok
    with LakeIndex.open(tmp_path / "index") as index:
        index.refresh(lake)
        archive(lake, 101, 250)
        index.refresh(lake)
        with Lookup(lake, index) as lookup:
            assert len(lookup.get_contexts([row.digest for row in contexts(1, 250)])) == 250
    vacuum(lake, orphans_older_than_s=-60.0)
    assert not (path / "contexts" / lost.path).exists()
    assert not half.exists()
    assert shown(path) == list(range(1, 251))


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_copy_of_a_commit_is_made_anew(tmp_path: Path, tear: Callable[[Path], None]) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    archive(lake, 1, 10)
    archive(lake, 11, 20)
    for version in (0, 1, 2):
        tear(copy_path(path / "contexts", version))
    lake = Lake.open(path, create=True)
    assert verify_lake(path).violations == []
    archive(lake, 21, 30)
    assert shown(path) == list(range(1, 31))
    assert verify_lake(path).violations == []


def test_the_checksum_of_a_checkpoint_is_synced(
    tmp_path: Path, synced: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "CHECKPOINT_INTERVAL", 2)
    lake = Lake.open(tmp_path / "lake", create=True)
    archive(lake, 1, 1)
    archive(lake, 2, 2)
    checksum = checksum_path(tmp_path / "lake" / "contexts", 2)
    assert checksum.exists()
    assert any(Path(path).name.startswith(f".{checksum.name}.") for path in synced)


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_and_its_hint_and_a_torn_commit_at_once(
    tmp_path: Path, tear: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "CHECKPOINT_INTERVAL", 4)
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    last = 5
    for seq in range(1, last + 1):
        lake.append("events", events(seq, seq), epoch=EPOCH, first_seq=seq, last_seq=seq)
    directory = path / "events"
    for torn in (
        checkpoint_path(directory, last - 1),
        directory / LOG_DIRECTORY / "_last_checkpoint",
        checksum_path(directory, last - 1),
        commit_path(directory, last),
    ):
        tear(torn)
    drop_copies(directory, [last])
    lake = Lake.open(path, create=True)
    assert lake.watermark("events") == Position(EPOCH, last - 1)
    [torn_commit] = lake.torn_commits()
    lake.set_aside(torn_commit)
    lake.append("events", events(last, last + 5), epoch=EPOCH, first_seq=last, last_seq=last + 5)
    assert Lake.open(path).statistics("events").rows == last + 5
    assert verify_lake(path).ok


def test_an_index_that_is_torn_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    archive(lake, 1, 300)
    rows = contexts(1, 300)
    for number, tear in enumerate(TEARS):
        folder = tmp_path / f"index{number}"
        with LakeIndex.open(folder) as index:
            index.refresh(lake)
        for name in folder.glob("*.mdb"):
            tear(name)
        with LakeIndex.open(folder) as index:
            index.refresh(lake)
            with Lookup(lake, index) as lookup:
                assert len(lookup.get_contexts([row.digest for row in rows])) == 300


# An archiver that starts again


@pytest.mark.asyncio
async def test_a_torn_commit_that_began_an_epoch_does_not_stop_the_archiver(tmp_path: Path) -> None:
    """The log lost its tail, a new epoch began in its middle, and power failed before that was noted in the lake.

    What stands before the epoch's beginning is archived, and may have been purged.
    """
    settings = settings_in(tmp_path)
    async with own_server(tmp_path) as server:
        stored = Acknowledged()
        await stored.add(server.url, 40)
        async with running(server.url, settings), connect(server.url) as hf:
            await flush(hf.connection)
        async with connect(server.url) as hf:
            for table, stream in (("events", EVENTS_STREAM), ("contexts", HOT_STREAM)):
                await purge_below(hf.connection, stream, 20)
                mark = Lake.open(settings.lake).watermark("events" if table == "events" else "contexts")
                assert mark is not None
                await begin_epoch(hf.connection, stream, mark.seq + 1)
        for table in TABLES[:2]:
            torn = commit_path(settings.lake / table, Lake.open(settings.lake).version(table) + 1)
            torn.write_bytes(b"")
        await stored.add(server.url, 10)
        async with running(server.url, settings), connect(server.url) as hf:
            await flush(hf.connection)
            await stored.check(server.url, settings.lake)
            assert (await hf.health())["problems"] == []
        assert (await asyncio.to_thread(verify_lake, settings.lake)).violations == []
