"""The archiver goes on past a damaged file, and no row is shown twice once that file is healed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from holdfast.lake import Lake, LakeIndex, Lookup, compact, connect, verify_lake
from holdfast.lake.checksums import find_damage
from holdfast.lake.healing import heal_file
from holdfast.lake.passed_over import KEPT_MS, drop_repetitions, read_notes
from holdfast.lake.scrub import Scrub
from holdfast.schemas.errors import DamagedError, UnavailableError
from holdfast.schemas.ids import now_ms
from holdfast.workers.archive_plan import same_content
from holdfast.workers.archived_rows import ArchivedRows
from holdfast.workers.control import flush
from tests.running import own_server, running, settings_in
from tests.support import plain_client
from tests.test_lake_samples import EPOCH, TEN_ROWS, archive, events

if TYPE_CHECKING:
    from holdfast.schemas.rows import Row, Table


@pytest.fixture
def lake(lake: Lake) -> Lake:
    """Ten rows in each table."""
    for table, rows in TEN_ROWS.items():
        archive(lake, table, rows)
    return lake


def damage_footer(lake: Lake, table: Table) -> tuple[Path, bytes]:
    """Flips a bit in the footer of the first file of a table; returns where it is, and what it was."""
    path = lake.path / table / lake.files(table)[0].path
    sound = path.read_bytes()
    path.write_bytes(sound[:-40] + bytes([sound[-40] ^ 4]) + sound[-39:])
    return path, sound


def stored_again(table: Table, first_seq: int, count: int) -> list[Row]:
    """The first rows of a table as they are when they are sent once more."""
    return [msgspec.structs.replace(row, seq=first_seq + n) for n, row in enumerate(TEN_ROWS[table][:count])]


def passed_over(lake: Lake, index: LakeIndex, table: Table) -> tuple[Path, bytes, ArchivedRows]:
    """Archives three rows a second time, since the file that holds them cannot be read."""
    path, sound = damage_footer(lake, table)
    index.rebuild(lake)
    again = stored_again(table, 11, 3)
    archived = ArchivedRows(table, lake, index)
    archived.refresh()
    assert archived.positions(again) == {}
    lake.append(table, again, epoch=EPOCH, first_seq=11, last_seq=13)
    return path, sound, archived


def count(lake: Lake, table: Table) -> int:
    with connect(lake.path) as duck:
        [(rows,)] = duck.execute(f"SELECT count(*) FROM {table}").fetchall()
    return int(rows)


@pytest.mark.parametrize("table", TEN_ROWS)
@pytest.mark.parametrize("healed", ["put back", "put back and merged", "from the stream"])
def test_rows_archived_past_a_damaged_file_are_never_shown_twice(
    lake: Lake, index: LakeIndex, table: Table, healed: str
) -> None:
    path, sound, archived = passed_over(lake, index, table)
    with pytest.raises(DamagedError):
        count(lake, table)
    assert archived.settle() == 0
    if healed == "from the stream":
        [entry] = [entry for entry in lake.files(table) if entry.min_seq == 1]
        damage = find_damage(lake.path / table, entry, again=True)
        assert damage is not None
        assert heal_file(lake.table(table), entry, damage, TEN_ROWS[table])
    else:
        path.write_bytes(sound)
        assert Scrub(lake).recheck_quarantine() == 0
    if healed == "put back and merged":
        assert compact(lake, at_ms=2_000_000_000_000, tables=[table]).groups == 1
    with pytest.raises(DamagedError, match="has yet to compare"):
        count(lake, table)
    assert archived.settle() == 3
    assert archived.settle() == 0
    assert count(lake, table) == 10
    assert verify_lake(lake.path, deep=True).violations == []
    archived.refresh()
    assert len(archived.positions([*TEN_ROWS[table], *stored_again(table, 14, 3)])) == 10
    with Lookup(lake, index) as lookup:
        assert len(lookup.rows_at(table, archived.positions(TEN_ROWS[table]).values())) == 10


def test_a_settled_note_stays_for_those_who_read_before_and_is_compared_once_more(lake: Lake, index: LakeIndex) -> None:
    path, sound, archived = passed_over(lake, index, "events")
    path.write_bytes(sound)
    Scrub(lake).recheck_quarantine()
    assert archived.settle() == 3
    table = lake.table("events")
    [note] = read_notes(table.directory).values()
    assert note.settled == table.refresh().version
    # An archiver that had asked before, and commits now.
    late = stored_again("events", 14, 5)[4:]
    lake.append("events", late, epoch=EPOCH, first_seq=14, last_seq=18)
    with Lookup(lake, index) as lookup:
        assert drop_repetitions(table, lookup, same_content) == 0
        assert drop_repetitions(table, lookup, same_content, at_ms=now_ms() + KEPT_MS) == 1
        assert drop_repetitions(table, lookup, same_content, at_ms=now_ms() + 3 * KEPT_MS) == 0
    assert read_notes(table.directory) == {}
    assert count(lake, "events") == 10


def test_two_contents_of_one_id_both_stay(lake: Lake, index: LakeIndex, caplog: pytest.LogCaptureFixture) -> None:
    path, sound = damage_footer(lake, "events")
    index.rebuild(lake)
    other = msgspec.structs.replace(events(1, 1)[0], seq=11, data=b'{"n":"other"}')
    archived = ArchivedRows("events", lake, index)
    archived.refresh()
    assert archived.positions([other]) == {}
    lake.append("events", [other], epoch=EPOCH, first_seq=11, last_seq=11)
    path.write_bytes(sound)
    Scrub(lake).recheck_quarantine()
    assert archived.settle() == 0
    assert "contradict" in caplog.text
    assert count(lake, "events") == 11


def test_new_is_not_said_of_what_an_index_begun_anew_does_not_know(lake: Lake, index: LakeIndex) -> None:
    """Another thread may meet a damaged entry between the refresh of a run and the asking."""
    archived = ArchivedRows("events", lake, index)
    archived.refresh()
    version = index.version("events")
    index._shared.discard_after_use()
    key = ("default", events(7, 7)[0].id)
    with pytest.raises(UnavailableError, match="covers nothing of events"):
        index.ask("events", [key], version=version)
    assert set(archived.positions(TEN_ROWS["events"])) == {("default", row.id) for row in events(1, 10)}
    with pytest.raises(UnavailableError, match="covers version"):
        index.ask("events", [("default", events(99, 99)[0].id)], version=version + 1)


def test_who_is_told_what_the_lake_holds_is_refused_while_a_damaged_file_may_hold_it(
    lake: Lake, index: LakeIndex
) -> None:
    lake.append("events", events(11, 12), epoch=EPOCH, first_seq=11, last_seq=12)
    path, sound = damage_footer(lake, "events")
    index.rebuild(lake)
    held, hidden = (("default", row.id) for row in (events(11, 11)[0], events(5, 5)[0]))
    assert set(index.require(lake, "events", [held])) == {held}
    with pytest.raises(DamagedError, match="footer"):
        index.require(lake, "events", [held, hidden])
    path.write_bytes(sound)
    Scrub(lake).recheck_quarantine()
    assert set(index.require(lake, "events", [held, hidden])) == {held, hidden}


async def test_an_archiver_goes_on_past_a_damaged_file_and_leaves_out_what_it_held_once_that_is_back(
    tmp_path: Path,
) -> None:
    settings = settings_in(tmp_path)
    async with own_server(tmp_path) as server, plain_client(server.url) as client:
        stream = client.jetstream()

        async def send(first: int, last: int) -> None:
            for number in range(first, last + 1):
                await stream.publish("ctx.default.event.a.x", b'{"id": "e%d", "data": 1}' % number)

        await send(1, 10)
        async with running(server.url, settings, ["archiver"]) as workers:
            await flush(workers.connection)
        lake = Lake.open(settings.lake)
        path, sound = damage_footer(lake, "events")
        # A new index meets the damage; the one of before would still know.
        other = settings_in(tmp_path, "other")
        await send(3, 14)
        async with running(server.url, other, ["archiver", "resolver"]) as workers:
            await flush(workers.connection)
            lake.refresh()
            assert lake.statistics("events").rows == 22
            path.write_bytes(sound)
            await asyncio.to_thread(Scrub(lake).recheck_quarantine)
            await flush(workers.connection)
            assert await asyncio.to_thread(count, lake, "events") == 14
            await send(1, 15)
            await flush(workers.connection)
            assert await asyncio.to_thread(count, lake, "events") == 15
    assert verify_lake(settings.lake, deep=True).violations == []
