"""A backup or a restore that is killed at any step leaves nothing that looks whole, and the next one goes on."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import pytest_asyncio

from holdfast.ops.backup_restore import restore_backup
from holdfast.ops.data_directory import DataDirectory
from holdfast.schemas.errors import DataDirectoryError
from holdfast.streams.connection import open_connection
from holdfast.workers.backup.listing import list_backups
from holdfast.workers.backup.making import make_backup
from holdfast.workers.backup.manifest import read_manifest
from holdfast.workers.control import flush
from tests.running import Acknowledged, own_server, running, settings_in
from tests.support import LIMIT_S, OwnServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_BACKUP: Final = """
import asyncio, sys
from pathlib import Path
from holdfast.streams.connection import open_connection
from holdfast.workers.backup.making import make_backup

async def main():
    async with open_connection(sys.argv[1]) as connection:
        report = await make_backup(connection, Path(sys.argv[2]), Path(sys.argv[3]), retention_s=float(sys.argv[4]))
    print(report.id)

asyncio.run(main())
"""
_RESTORE: Final = """
import asyncio, sys
from pathlib import Path
from holdfast.ops.backup_restore import restore_backup

asyncio.run(restore_backup(Path(sys.argv[1]), Path(sys.argv[2])))
"""
POINTS: Final = (
    "backup.after_object=kill:2",
    "backup.after_object=kill:6",
    "backup.after_stream=kill:3",
    "backup.before_manifest=kill",
    "backup.after_manifest=kill",
    "backup.before_collect=kill",
)


@pytest_asyncio.fixture
async def source(tmp_path: Path) -> AsyncIterator[tuple[OwnServer, Acknowledged, Path]]:
    acknowledged = Acknowledged()
    async with own_server(tmp_path) as server:
        async with running(server.url, settings_in(tmp_path)), open_connection(server.url) as connection:
            await acknowledged.add(server.url, 10)
            await flush(connection)
            await acknowledged.add(server.url, 10)
        yield server, acknowledged, tmp_path


async def test_E73_a_backup_killed_at_any_step_is_no_backup_or_a_whole_one(
    source: tuple[OwnServer, Acknowledged, Path],
) -> None:
    server, acknowledged, folder = source
    whole = 0
    for point in POINTS:
        assert await run_process(_BACKUP, point, server.url, folder / "lake", folder / "backups", 0.0) == -9, point
        states = [listing.state for listing in list_backups(folder / "backups", verify=True)]
        expected = whole + ("after_manifest" in point or "before_collect" in point)
        # What retention had begun to take away when it was killed is gone or whole.
        assert set(states) <= {"verified"}, point
        assert len(states) == (min(1, expected) if "before_collect" in point else expected), point
        whole = len(states)
    async with open_connection(server.url) as connection:
        report = await make_backup(connection, folder / "lake", folder / "backups", retention_s=0.0)
    # What the killed ones had copied of the lake is not copied again, and what they alone had is swept out.
    assert [listing.id for listing in list_backups(folder / "backups", verify=True)] == [report.id]
    objects = {path.name for path in (folder / "backups" / "objects").glob("*/*")}
    assert objects == set(read_manifest(folder / "backups", report.id).objects())
    await restore_backup(folder / "backups", folder / "restored")
    await _check(folder / "restored", acknowledged)


async def test_E79_a_restore_killed_at_any_step_is_refused_by_up_and_begins_anew(
    source: tuple[OwnServer, Acknowledged, Path],
) -> None:
    server, acknowledged, folder = source
    async with open_connection(server.url) as connection:
        await make_backup(connection, folder / "lake", folder / "backups")
    data = folder / "restored"
    for point in ("restore.after_lake=kill", "restore.after_stream=kill:2", "restore.before_layout=kill"):
        assert await run_process(_RESTORE, point, folder / "backups", data) == -9, point
        with pytest.raises(DataDirectoryError, match="cut off"):
            DataDirectory(data).open()
    await restore_backup(folder / "backups", data)
    await _check(data, acknowledged)


async def run_process(code: str, failpoint: str, *arguments: object) -> int:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, *map(str, arguments)),
        env={**os.environ, "HOLDFAST_FAILPOINTS": failpoint},
        stdout=asyncio.subprocess.DEVNULL,
    )
    return await asyncio.wait_for(process.wait(), LIMIT_S)


async def _check(data: Path, acknowledged: Acknowledged) -> None:
    again = OwnServer(data)
    await again.start()
    try:
        async with running(again.url, settings_in(data)):
            await acknowledged.check(again.url, data / "lake")
    finally:
        await again.stop()
