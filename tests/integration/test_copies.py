"""The second copy of the lake: nothing is purged before it is there, and damage is healed from it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from holdfast.lake import Lake
from holdfast.lake.copies import Copies
from holdfast.ops.verify import verify
from holdfast.schemas.errors import ConfigurationError, UnavailableError
from holdfast.schemas.rows import TABLES
from holdfast.streams.connection import open_connection
from holdfast.workers.control import archiver_status, evict, flush
from tests.running import Acknowledged, eventually, own_server, running, settings_in

if TYPE_CHECKING:
    from holdfast.workers.control import ArchiverStatus


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


def flip(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
