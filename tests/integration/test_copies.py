"""The second copy of the lake: nothing is purged before it is there, and damage is healed from it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from holdfast.lake import Lake, compact, vacuum, verify_lake
from holdfast.lake import copies as copies_module
from holdfast.lake import table as table_module
from holdfast.lake.copies import SUMS, Copies
from holdfast.lake.log import checkpoint_path, commit_path, list_checkpoints, list_versions
from holdfast.ops.verify import verify
from holdfast.schemas import failpoints
from holdfast.schemas.errors import ConfigurationError, UnavailableError
from holdfast.schemas.failpoints import FailpointError
from holdfast.schemas.rows import TABLES
from holdfast.streams.connection import open_connection
from holdfast.workers.control import archiver_status, evict, flush
from tests.running import Acknowledged, eventually, own_server, running, settings_in
from tests.test_lake_samples import EPOCH, events

if TYPE_CHECKING:
    from holdfast.workers.control import ArchiverStatus

LATER_MS = 2_000_000_000_000


async def test_nothing_is_purged_while_the_other_disk_is_away_and_it_catches_up_when_it_is_back(
    tmp_path: Path,
) -> None:
    copy = tmp_path / "disk" / "copy"
    acknowledged = Acknowledged()
    settings = settings_in(tmp_path, copy_directory=copy, archive_interval_s=0.05)
    async with (
        own_server(tmp_path) as server,
        running(server.url, settings),
        open_connection(server.url) as connection,
    ):
        await acknowledged.add(server.url, 20)
        await flush(connection)
        assert (await evict(connection, 0.0)).left == 0
        await asyncio.to_thread(acknowledged.check_by_sql, copy, None)

        (tmp_path / "disk").rename(tmp_path / "unplugged")
        (tmp_path / "disk" / "copy").mkdir(parents=True)  # an empty mount point
        await acknowledged.add(server.url, 20)
        await flush(connection)
        with pytest.raises(UnavailableError, match="does not hold the copy"):
            await evict(connection, 0.0)

        async def told() -> bool:
            status: ArchiverStatus = await archiver_status(connection)
            return any(problem.object.startswith("copy of lake/") for problem in status.problems)

        await eventually(told)
        assert list(copy.iterdir()) == []
        await acknowledged.check_by_sdk(server.url)

        copy.rmdir()
        copy.parent.rmdir()
        (tmp_path / "unplugged").rename(tmp_path / "disk")
        assert (await evict(connection, 0.0)).left == 0
        await eventually(lambda: _is_healthy(connection))
        await asyncio.to_thread(acknowledged.check_by_sql, copy, None)


async def _is_healthy(connection: object) -> bool:
    return (await archiver_status(connection)).problems == []  # type: ignore[arg-type]


async def test_a_damaged_file_of_the_lake_is_healed_from_its_copy_and_a_damaged_copy_is_not_believed(
    tmp_path: Path,
) -> None:
    acknowledged = Acknowledged()
    async with (
        own_server(tmp_path) as server,
        running(server.url, settings_in(tmp_path)),
        open_connection(server.url) as connection,
    ):
        await acknowledged.add(server.url, 20)
        await flush(connection)
    lake = Lake.open(tmp_path / "lake")
    copies = Copies(lake.path, tmp_path / "copy")
    for table in TABLES:
        assert copies.catch_up(lake.table(table)).behind == 0
        assert copies.catch_up(lake.table(table)).files == 0
    path = lake.table("contexts").directory / lake.files("contexts")[0].path
    whole = path.read_bytes()
    flip(path)
    assert Copies(lake.path, tmp_path / "copy").heal(path)
    assert path.read_bytes() == whole

    copy = copies.find(path)
    assert copy is not None
    flip(copy)
    assert copies.find(path) is None
    assert not copies.heal(path)
    count, problems = copies.compare(lake)
    assert count == sum(len(lake.files(table)) for table in TABLES)
    assert [problem.object for problem in problems] == [str(copy)]
    report = await verify(lake.path, None, deep=True, copy=tmp_path / "copy")
    assert [problem.object for problem in report.violations] == [str(copy)]
    assert (await verify(lake.path, None, deep=True)).ok
    # Taken away, it is copied anew.
    copy.unlink()
    assert copies.catch_up(lake.table("contexts")).files == 1
    assert copies.compare(lake)[1] == []


def test_a_directory_that_holds_something_else_is_not_written_to(tmp_path: Path) -> None:
    lake = Lake.open(tmp_path / "lake", create=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ConfigurationError, match="copy_directory"):
        Copies(lake.path, tmp_path / "photos").catch_up(lake.table("contexts"))
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def archived(path: Path, last: int, first: int = 1) -> Lake:
    """A lake with a commit for each event."""
    lake = Lake.open(path, create=True)
    for seq in range(first, last + 1):
        lake.append("events", events(seq, seq), epoch=EPOCH, first_seq=seq, last_seq=seq)
    return lake


def copied(lake: Lake, copy: Path) -> Copies:
    copies = Copies(lake.path, copy)
    for table in TABLES:
        assert copies.catch_up(lake.table(table)).behind == 0
    return copies


def log_of(directory: Path) -> tuple[list[int], list[int]]:
    return list_versions(directory), list_checkpoints(directory)


def remove_all_that_is_replaced(lake: Lake) -> None:
    compact(lake, at_ms=LATER_MS)
    vacuum(lake, -60, orphans_older_than_s=-60, log_older_than_s=-60)


def test_what_the_lake_removes_is_removed_from_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "CHECKPOINT_INTERVAL", 4)
    lake = archived(tmp_path / "lake", 17)
    copies, table = copied(lake, tmp_path / "copy"), lake.table("events")
    copy = tmp_path / "copy" / "events"
    assert copies.prune(table) == 0
    assert log_of(copy) == log_of(table.directory)

    remove_all_that_is_replaced(lake)
    archived(lake.path, 21, 18)
    assert copies.catch_up(table).files == 5
    # Of the data 17 files, of the log 12 commits and 2 checkpoints.
    assert copies.prune(table) == 17 + 14
    assert log_of(copy) == log_of(table.directory) == ([*range(12, 23)], [12, 16, 20])
    paths = sorted(entry.path for entry in lake.files("events"))
    assert sorted(json.loads(line)["path"] for line in (copy / SUMS).read_bytes().splitlines()) == paths
    assert sorted(str(path.relative_to(copy)) for path in copy.glob("day=*/*")) == paths

    assert verify_lake(tmp_path / "copy").violations[:1] == []
    assert Lake.open(tmp_path / "copy").statistics("events").rows == 21
    assert copies.compare(lake) == (5, [])
    assert copies.prune(table) == 0
    assert Copies(lake.path, tmp_path / "copy").catch_up(table).files == 0


def test_a_copy_that_is_behind_keeps_what_it_consists_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "CHECKPOINT_INTERVAL", 4)
    lake = archived(tmp_path / "lake", 17)
    copies, table = copied(lake, tmp_path / "copy"), lake.table("events")
    remove_all_that_is_replaced(lake)
    for pruning in (copies, Copies(lake.path, tmp_path / "copy")):
        pruning.prune(table)
        assert verify_lake(tmp_path / "copy", deep=True).ok
        assert Lake.open(tmp_path / "copy").statistics("events").rows == 17
    # Its newest checkpoint is destroyed: the one before must not go, though the lake has it no more.
    newest = checkpoint_path(tmp_path / "copy" / "events", 16)
    newest.write_bytes(b"not a checkpoint")
    copies.prune(table)
    assert Lake.open(tmp_path / "copy").statistics("events").rows == 17


def test_a_round_looks_only_at_what_is_new_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "CHECKPOINT_INTERVAL", 4)
    lake = archived(tmp_path / "lake", 5)
    copies, table = Copies(lake.path, tmp_path / "copy"), lake.table("events")
    copy = tmp_path / "copy" / "events"
    copies.catch_up(table)
    looked_at: list[str] = []
    for name in ("list_versions", "list_checkpoints"):
        monkeypatch.setattr(copies_module, name, _noted(name, looked_at))
    archived(lake.path, 7, 6)
    copies.catch_up(table)
    copies.catch_up(table)
    assert looked_at == []
    assert log_of(copy) == ([*range(8)], [4])
    archived(lake.path, 9, 8)
    copies.catch_up(table)
    copies.catch_up(table)
    assert looked_at == ["list_checkpoints"]
    assert log_of(copy) == ([*range(10)], [4, 8])
    # Somebody puts an older state of the copy in its place, or takes a commit out of it.
    commit_path(copy, 9).unlink()
    checkpoint_path(copy, 8).unlink()
    copies.catch_up(table)
    assert log_of(copy) == ([*range(10)], [4, 8])
    commit_path(copy, 3).unlink()
    copies.prune(table)
    copies.catch_up(table)
    assert log_of(copy) == ([*range(10)], [4, 8])


def _noted(name: str, calls: list[str]) -> Callable[[Path], list[int]]:
    real = {"list_versions": list_versions, "list_checkpoints": list_checkpoints}[name]

    def call(directory: Path) -> list[int]:
        calls.append(name)
        return real(directory)

    return call


def test_the_sums_outlive_half_a_line_and_are_read_again_when_another_process_writes_them(tmp_path: Path) -> None:
    lake = archived(tmp_path / "lake", 2)
    table = lake.table("events")
    writer, reader = Copies(lake.path, tmp_path / "copy"), Copies(lake.path, tmp_path / "copy")
    writer.catch_up(table)
    [first, second] = [table.directory / entry.path for entry in lake.files("events")]
    assert reader.find(first) is not None
    # The janitor has one of its own, and asks it for days.
    archived(lake.path, 3, 3)
    writer.catch_up(table)
    third = table.directory / lake.files("events")[2].path
    assert reader.find(third) is not None

    sums = tmp_path / "copy" / "events" / SUMS
    sums.write_bytes(sums.read_bytes()[:-10])
    writer = Copies(lake.path, tmp_path / "copy")
    assert writer.catch_up(table).files == 1
    assert Copies(lake.path, tmp_path / "copy").catch_up(table).files == 0
    assert [reader.find(path) is not None for path in (first, second, third)] == [True] * 3


def test_a_prune_cut_short_is_made_up_for(tmp_path: Path) -> None:
    lake = archived(tmp_path / "lake", 12)
    copies, table = copied(lake, tmp_path / "copy"), lake.table("events")
    remove_all_that_is_replaced(lake)
    copies.catch_up(table)
    failpoints.arm("copies.before_sums")
    with pytest.raises(FailpointError):
        copies.prune(table)
    again = Copies(lake.path, tmp_path / "copy")
    assert again.prune(table) == 12
    assert len((tmp_path / "copy" / "events" / SUMS).read_bytes().splitlines()) == 1
    assert verify_lake(tmp_path / "copy", deep=True).ok


def flip(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
