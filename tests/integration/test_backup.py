"""Backups of a running system, and restores into an empty one: rows E73, E78 and E79."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import pytest
import pytest_asyncio

from holdfast.client import connect
from holdfast.lake import Lake, vacuum
from holdfast.lake.commit import Change, write_checkpoint
from holdfast.lake.log import Snapshot, list_checkpoints
from holdfast.ops.backup_restore import restore_backup
from holdfast.ops.verify import verify
from holdfast.schemas import failpoints
from holdfast.schemas.errors import DataDirectoryError, IntegrityError, NotFoundError
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.publish import Outgoing, publish
from holdfast.streams.stream_images import image_names
from holdfast.streams.topology import stream_info
from holdfast.workers.backup.listing import backup_age_s, list_backups
from holdfast.workers.backup.making import make_backup
from holdfast.workers.backup.manifest import choose, plan_retention, read_manifest, read_manifests
from holdfast.workers.backup.schedule import BackupSchedule
from holdfast.workers.control import evict, flush
from tests.command_line import CommandLine
from tests.running import Acknowledged, own_server, running, settings_in
from tests.support import OwnServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


class Source:
    """A running system, some of it archived and evicted, and what it has acknowledged."""

    def __init__(self, server: OwnServer, folder: Path, connection: Connection) -> None:
        self.url = server.url
        self.lake = folder / "lake"
        self.folder = folder
        self.connection = connection
        self.acknowledged = Acknowledged()

    async def grow(self) -> None:
        await self.acknowledged.add(self.url, 20)
        await flush(self.connection)
        await evict(self.connection, 0.0)
        await self.acknowledged.add(self.url, 10)


@pytest_asyncio.fixture
async def source(tmp_path: Path) -> AsyncIterator[Source]:
    folder = tmp_path / "source"
    async with (
        own_server(folder) as server,
        running(server.url, settings_in(folder)),
        open_connection(server.url) as connection,
    ):
        system = Source(server, folder, connection)
        await system.grow()
        yield system


async def test_the_log_may_be_cleaned_while_the_files_of_the_lake_are_copied(source: Source, tmp_path: Path) -> None:
    """A large lake takes hours to copy; the checkpoint that its version was read from stays for one."""
    table = Lake.open(source.lake).table("events")
    write_checkpoint(table.snapshot)
    cut_from = list_checkpoints(table.directory)

    def clean(_: str) -> None:
        for number in (1, 2):
            change = Change(action="vacuum", app_id="test", version=number, expected=number - 1 or None)
            table.commit(partial(_unchanged, change))
            write_checkpoint(table.refresh())
        vacuum(Lake.open(source.lake), log_older_than_s=-60)

    failpoints.arm("backup.after_stream", clean, hit=len(image_names()))
    await make_backup(source.connection, source.lake, tmp_path / "backups")
    assert not {*cut_from} & {*list_checkpoints(table.directory)}
    report = await restore_backup(tmp_path / "backups", tmp_path / "restored")
    assert report.violations == []
    assert report.archived > 0


def _unchanged(change: Change, _: Snapshot) -> Change:
    return change


async def test_E79_what_was_acknowledged_before_a_backup_is_restored_exactly_once(
    source: Source, tmp_path: Path
) -> None:
    raw = await publish(
        source.connection, Outgoing("ctx.default.event.raw.said", {}, b'{"data": {"word": "without an id"}}')
    )
    made = await make_backup(source.connection, source.lake, tmp_path / "backups")
    assert made.messages > 10
    assert made.rows > 60
    # Acknowledged after the backup: gone with the system.
    async with connect(source.url) as hf:
        later = await hf.put({"written": "after the backup"})

    report = await restore_backup(tmp_path / "backups", tmp_path / "restored")

    assert report.violations == []
    assert report.archived > 0
    with duckdb.connect(str(tmp_path / "restored" / "lake" / "holdfast.duckdb"), read_only=True) as plain:
        assert plain.execute("SELECT count(*) FROM events").fetchone() == (31,)
    again = OwnServer(tmp_path / "restored")
    infos = await again.start()
    try:
        settings = settings_in(tmp_path / "restored")
        async with running(again.url, settings), open_connection(again.url) as connection:
            async with connect(again.url, cache_bytes=0) as hf:
                with pytest.raises(NotFoundError):
                    await hf.resolve(later)
                found = [event async for event in hf.query(name="said")]
                assert [event.data for event in found] == [{"word": "without an id"}]
            source.acknowledged.events[str(found[0].event_id)] = None
            await source.acknowledged.check(again.url, settings.lake)
            assert (await verify(settings.lake, connection)).violations == []
            # The next message takes the sequence that a lost one may have had: in another life of the stream.
            after = await publish(
                connection, Outgoing("ctx.default.event.raw.said", {}, b'{"data": {"word": "another"}}')
            )
            assert after.seq == raw.seq + 1
            assert infos["CTX_EVENTS"].epoch != (await stream_info(source.connection, "CTX_EVENTS")).epoch
            await flush(connection)
            assert (await verify(settings.lake, connection)).violations == []
    finally:
        await again.stop()


async def test_E73_a_second_backup_copies_only_what_is_new(source: Source, tmp_path: Path) -> None:
    backups = tmp_path / "backups"
    first = await make_backup(source.connection, source.lake, backups)
    await source.grow()
    second = await make_backup(source.connection, source.lake, backups)
    old, new = read_manifest(backups, first.id), read_manifest(backups, second.id)
    shared = set(old.objects()) & set(new.objects())
    assert {file.sha256 for file in old.tables["contexts"].files} < shared
    assert second.new_objects == len(new.objects()) - len(shared)
    assert second.new_bytes == sum(size for sha256, size in new.objects().items() if sha256 not in shared)
    assert choose(backups).id == second.id


async def test_E73_E79_the_command_line_makes_and_lists_backups_and_refuses_a_system_that_is_not_empty(
    source: Source, tmp_path: Path
) -> None:
    backups = str(tmp_path / "backups")
    run = CommandLine(source.folder, HOLDFAST_NATS_URL=source.url)
    made = (await asyncio.to_thread(run, "backup", backups, "--json")).json
    listed = (await asyncio.to_thread(run, "backups", backups, "--verify", "--json")).json
    assert (listed["id"], listed["state"], listed["new_bytes"]) == (made["id"], "verified", made["new_bytes"])
    refused = await asyncio.to_thread(run, "restore", backups, "--json", status=3)
    assert refused.error["code"] == "data_directory"
    assert "choose a new directory" in refused.error["hint"]
    # Nor are the streams of a server that is in use ever touched.
    empty = ("--data", str(tmp_path / "empty"))
    refused = await asyncio.to_thread(run, "restore", backups, *empty, "--json", status=3)
    assert "on this server is not empty" in refused.error["message"]
    assert (await stream_info(source.connection, "KV_ctx-hot")).messages > 0


async def test_E79_a_damaged_backup_is_told_and_leaves_nothing_in_place(source: Source, tmp_path: Path) -> None:
    backups = tmp_path / "backups"
    made = await make_backup(source.connection, source.lake, backups)
    file = read_manifest(backups, made.id).tables["events"].files[0]
    path = backups / "objects" / file.sha256[:2] / file.sha256
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    assert [listing.state for listing in list_backups(backups)] == ["complete"]
    assert [listing.state for listing in list_backups(backups, verify=True)] == ["damaged"]
    with pytest.raises(IntegrityError, match="does not hash"):
        await restore_backup(backups, tmp_path / "restored")
    assert [path.name for path in (tmp_path / "restored").iterdir()] == ["lock"]


async def test_a_file_that_was_stored_damaged_is_stored_again_once_it_is_mended(source: Source, tmp_path: Path) -> None:
    backups = tmp_path / "backups"
    lake = Lake.open(source.lake)
    entry = lake.files("events")[0]
    assert entry.checksums is not None
    path = lake.table("events").directory / entry.path
    sound = path.read_bytes()
    path.write_bytes(bytes([*sound[:-100], sound[-100] ^ 1, *sound[-99:]]))

    async def stored() -> tuple[list[str], str]:
        made = await make_backup(source.connection, source.lake, backups)
        files = read_manifest(backups, made.id).tables["events"].files
        return made.damaged, next(file.sha256 for file in files if file.path == entry.path)

    told = [f"events/{entry.path}"]
    first_told, damaged = await stored()
    assert first_told == told
    assert damaged != entry.checksums.sha256
    # Told by each backup, for as long as it is so.
    assert await stored() == (told, damaged)
    path.write_bytes(sound)
    assert await stored() == ([], entry.checksums.sha256)
    assert (await restore_backup(backups, tmp_path / "restored")).violations == []


async def test_E78_backups_are_made_every_six_hours_and_kept_for_thirty_days(source: Source, tmp_path: Path) -> None:
    backups = tmp_path / "backups"
    now = 1_800_000_000_000
    settings = settings_in(source.folder, backup_directory=backups)
    schedule = BackupSchedule(source.connection, settings, clock_ms=lambda: now)
    first = await schedule.round()
    assert first is not None
    now += 6 * HOUR_MS - 1
    assert await schedule.round() is None
    now += 1
    # Another process that starts finds the same in the directory.
    schedule = BackupSchedule(source.connection, settings, clock_ms=lambda: now)
    assert await schedule.round() is not None
    assert schedule.status().problems == []
    now += 30 * DAY_MS
    last = await schedule.round()
    assert last is not None
    assert first.id in last.removed
    now += 90 * DAY_MS
    settings = settings_in(source.folder, backup_directory=backups, lake=tmp_path / "away")
    schedule = BackupSchedule(source.connection, settings, clock_ms=lambda: now)
    assert await schedule.round() is None
    # The newest is kept whatever its age, and that none came after it is told with its cause.
    assert [listing.id for listing in list_backups(backups)][-1] == last.id
    assert [problem.what for problem in schedule.status().problems] == [
        f"{tmp_path}/away/contexts holds no table",
        "the newest complete backup is 2160.0 h old, one is due every 6.0 h",
    ]
    assert backup_age_s(backups, now) == 90 * 86_400


async def test_a_backup_made_under_a_clock_that_was_ahead_does_not_end_backups(source: Source, tmp_path: Path) -> None:
    backups = tmp_path / "backups"
    now = 1_800_000_000_000
    settings = settings_in(source.folder, backup_directory=backups)
    schedule = BackupSchedule(source.connection, settings, clock_ms=lambda: now)
    now += 365 * DAY_MS
    ahead = await schedule.round()
    assert ahead is not None
    now -= 365 * DAY_MS
    made = await schedule.round()
    assert made is not None
    assert schedule.status().age_s == 0
    now += 6 * HOUR_MS - 1
    assert await schedule.round() is None
    now += 1 + 40 * DAY_MS
    manifests, _ = read_manifests(backups)
    assert {manifest.id for manifest in manifests} == {ahead.id, made.id}
    # The newest that is believed is kept, whatever its age.
    assert plan_retention(manifests, now_ms=now, retention_s=30 * 86_400) == []
    assert backup_age_s(backups, now) == 40 * 86_400 + 6 * 3_600


async def test_a_directory_of_something_else_is_never_taken_for_backups(source: Source, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(DataDirectoryError, match="not empty"):
        await make_backup(source.connection, source.lake, tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


async def test_E79_what_a_restore_stores_itself_takes_no_position_of_the_life_before(tmp_path: Path) -> None:
    """Archiving an event stores the context that came with it, where the lost system may have stored another one."""
    folder = tmp_path / "source"
    inline = b'{"data": {}, "context": {"said": "inline"}}'
    async with own_server(folder) as server, open_connection(server.url) as connection:
        Lake.open(folder / "lake", create=True)
        await publish(connection, Outgoing("ctx.default.event.raw.said", {}, inline))
        await make_backup(connection, folder / "lake", tmp_path / "backups")
        life = (await stream_info(connection, "KV_ctx-hot")).epoch
    report = await restore_backup(tmp_path / "backups", tmp_path / "restored")
    assert report.archived == 2
    assert [entry.epoch == life for entry in Lake.open(tmp_path / "restored" / "lake").files("contexts")] == [False]
