"""The archiver believes nothing of a damaged file, though its index is of before, and other indexes catch up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest

from holdfast.lake import Lake, LakeIndex, Lookup, connect, verify_lake
from holdfast.lake.checksums import find_damage
from holdfast.lake.passed_over import read_notes
from holdfast.lake.quarantine import Quarantine
from holdfast.lake.scrub import Scrub
from holdfast.schemas.errors import DamagedError, DigestMismatchError, IntegrityError
from holdfast.schemas.rows import ContextRow, Position
from holdfast.workers import archive_table
from holdfast.workers.archive_plan import DecodedRun, deduplicate_contexts, key_of
from holdfast.workers.archive_table import TableArchiver
from holdfast.workers.archived_rows import ArchivedRows
from holdfast.workers.control import flush
from tests.running import own_server, running, settings_in
from tests.support import plain_client
from tests.test_lake_samples import EPOCH, TEN_ROWS, archive, context, event, events, touch

if TYPE_CHECKING:
    from holdfast.schemas.rows import Row, Table

MIDNIGHT_MS = 1_769_904_000_000


@pytest.fixture
def lake(lake: Lake) -> Lake:
    """Ten rows in each table."""
    for table, rows in TEN_ROWS.items():
        archive(lake, table, rows)
    return lake


@pytest.fixture
def index(tmp_path: Path, lake: Lake) -> Iterator[LakeIndex]:
    """An index of before any damage."""
    with LakeIndex.open(tmp_path / "index") as opened:
        opened.refresh(lake)
        yield opened


def damage(lake: Lake, table: Table, offset: int, *, file: int = 0) -> Callable[[], None]:
    """Flips a bit of a file; returns what puts it back, and has the scrub look at it."""
    path = lake.path / table / lake.files(table)[file].path
    sound = path.read_bytes()
    raw = bytearray(sound)
    raw[offset] ^= 4
    path.write_bytes(raw)

    def put_back() -> None:
        path.write_bytes(sound)
        assert Scrub(lake).recheck_quarantine() == 0

    return put_back


def record(lake: Lake, table: Table, *, file: int = 0) -> None:
    """Records a damaged file, as the scrub does."""
    entry = lake.files(table)[file]
    found = find_damage(lake.path / table, entry, again=True)
    assert found is not None
    Quarantine(lake.path / table).add(entry, found)


def stored_again(table: Table, first_seq: int, count: int) -> list[Row]:
    """The first rows of a table as they are when they are sent once more."""
    return [msgspec.structs.replace(row, seq=first_seq + n) for n, row in enumerate(TEN_ROWS[table][:count])]


def asked(table: Table, lake: Lake, index: LakeIndex) -> ArchivedRows:
    archived = ArchivedRows(table, lake, index)
    archived.refresh()
    return archived


def append(lake: Lake, table: Table, rows: Sequence[Row]) -> None:
    lake.append(table, rows, epoch=EPOCH, first_seq=rows[0].seq, last_seq=rows[-1].seq)


def count(lake: Lake, table: Table) -> int:
    with connect(lake.path) as duck:
        [(rows,)] = duck.execute(f"SELECT count(*) FROM {table}").fetchall()
    return int(rows)


def keys(rows: Sequence[Row]) -> list[Any]:
    return [row.digest if isinstance(row, ContextRow) else key_of(row) for row in rows]


@pytest.mark.parametrize("table", TEN_ROWS)
@pytest.mark.parametrize("offset", [-40, 100], ids=["footer", "row group"])
def test_what_an_index_of_before_knows_of_a_damaged_file_is_archived_again_and_once(
    lake: Lake, index: LakeIndex, table: Table, offset: int
) -> None:
    put_back = damage(lake, table, offset)
    record(lake, table)
    archived = asked(table, lake, index)
    again = stored_again(table, 11, 3)
    known = archived.positions(again)
    assert known == {}
    if table == "contexts":
        again = deduplicate_contexts(again, known)
        assert [row.form for row in again if isinstance(row, ContextRow)] == ["plain"] * 3
    append(lake, table, again)
    assert len(read_notes(lake.path / table)) == 1
    # Sent once more: now there is a row that can be read, though the index names the first.
    archived.refresh()
    found = archived.positions(stored_again(table, 14, 4))
    assert list(found.values()) == [Position(EPOCH, seq) for seq in (11, 12, 13)]
    if table != "contexts":
        assert [row.seq for row in archived.stored(stored_again(table, 14, 4)).values()] == [11, 12, 13]
    put_back()
    with pytest.raises(DamagedError, match="has yet to compare"):
        count(lake, table)
    assert archived.settle() == 3
    assert count(lake, table) == 10
    assert verify_lake(lake.path, deep=True).violations == []


def test_a_body_whose_parts_are_in_a_damaged_file_is_no_list_of_them(lake: Lake, index: LakeIndex) -> None:
    part = TEN_ROWS["contexts"][0]
    assert isinstance(part, ContextRow)
    whole = msgspec.structs.replace(context(11), parts=((part.digest, part.size),))
    assert asked("contexts", lake, index).positions([whole]) == {part.digest: Position(EPOCH, 1)}
    damage(lake, "contexts", 100)
    record(lake, "contexts")
    assert asked("contexts", lake, index).positions([whole]) == {}


@pytest.mark.parametrize("table", ["events", "key_versions"])
def test_damage_that_only_the_archiver_meets_is_recorded_and_passed_over(
    lake: Lake, index: LakeIndex, table: Table
) -> None:
    damage(lake, table, -40)
    archived = asked(table, lake, index)
    again = stored_again(table, 11, 3)
    assert len(archived.positions(again)) == 3
    assert archived.stored(again) == {}
    assert len(Quarantine(lake.path / table).files()) == 1
    assert len(read_notes(lake.path / table)) == 1


def test_rows_of_the_other_day_are_known_although_their_sequences_are_in_a_damaged_range(
    tmp_path: Path, index: LakeIndex
) -> None:
    """At midnight two files interleave: a row of the sound one must not be archived twice."""
    lake = Lake.open(tmp_path / "two days", create=True)
    rows = [event(seq, stored_at_ms=MIDNIGHT_MS + (-1000 if seq % 2 else 1000)) for seq in range(1, 21)]
    append(lake, "events", rows)
    assert [entry.min_seq for entry in lake.files("events")] == [1, 2]
    index.rebuild(lake)
    put_back = damage(lake, "events", -40)
    archived = asked("events", lake, index)
    again = [msgspec.structs.replace(row, seq=row.seq + 20) for row in rows]
    even = [row.seq for row in rows if row.seq % 2 == 0]
    assert sorted(row.seq for row in archived.stored(again).values()) == even
    append(lake, "events", [row for row in again if row.seq % 2])
    put_back()
    assert archived.settle() == 10
    assert count(lake, "events") == 20


def test_what_a_look_up_meets_does_not_take_the_place_of_what_is_known(tmp_path: Path, index: LakeIndex) -> None:
    lake = Lake.open(tmp_path / "groups", create=True)
    rows = events(1, 5000)
    append(lake, "events", [*rows])
    index.rebuild(lake)
    [entry] = lake.files("events")
    assert entry.checksums is not None
    groups = len(entry.checksums.parts) - 1
    assert groups > 1
    for group in range(groups):
        damage(lake, "events", entry.checksums.parts[group][0] - 100)
    with Lookup(lake, index) as lookup:
        for row in (rows[0], rows[-1]):
            with pytest.raises(DamagedError, match="row group"):
                lookup.get_events([("default", row.id)])
    assert Quarantine(lake.path / "events").files()[entry.path].groups == (0, groups - 1)
    archived = asked("events", lake, index)
    assert archived.positions([rows[0], rows[-1]]) == {}


@pytest.mark.parametrize("table", TEN_ROWS)
def test_a_row_taken_out_by_another_process_is_found_where_it_is_now(
    lake: Lake, index: LakeIndex, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_lake = Lake.open(lake.path)
    with LakeIndex.open(tmp_path / "other") as other, Lookup(other_lake, other) as lookup:
        get: Callable[[list[Any]], Mapping[Any, Row]] = {
            "contexts": cast(Any, lookup.get_contexts),
            "events": cast(Any, lookup.get_events),
            "key_versions": cast(Any, lookup.get_key_versions),
        }[table]
        other.refresh(other_lake)
        put_back = damage(lake, table, -40)
        record(lake, table)
        archived = asked(table, lake, index)
        again = stored_again(table, 11, 3)
        assert archived.positions(again) == {}
        append(lake, table, again)
        put_back()
        assert archived.settle() == 3
        other_lake.refresh()  # as any look-up does that meets something new
        refreshed: list[Lake] = []
        refresh = other.refresh

        def noted(of: Lake) -> Any:
            refreshed.append(of)
            return refresh(of)

        monkeypatch.setattr(other, "refresh", noted)
        assert get(keys(TEN_ROWS[table][5:])) == dict(zip(keys(TEN_ROWS[table][5:]), TEN_ROWS[table][5:], strict=True))
        assert refreshed == []
        assert [row.seq for row in get(keys(TEN_ROWS[table])).values()] == [11, 12, 13, *range(4, 11)]
        assert get(keys(again)) == dict(zip(keys(again), again, strict=True))
        assert len(refreshed) == 1


def test_what_the_newest_index_names_wrongly_is_told_after_one_refresh(
    tmp_path: Path, index: LakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = Lake.open(tmp_path / "forged", create=True)
    first = context(1)
    append(lake, "contexts", [touch(first, 1), context(3)])
    append(lake, "events", [event(5)])
    index.rebuild(lake)
    refreshed: list[Lake] = []
    refresh = index.refresh

    def noted(of: Lake) -> Any:
        refreshed.append(of)
        return refresh(of)

    def names(wanted: Sequence[Any], *_: Any) -> dict[Any, Position]:
        return dict.fromkeys(wanted, Position(EPOCH, 1))

    def required(of: Lake, _: Table, wanted: Sequence[Any]) -> dict[Any, Position]:
        noted(of)
        return names(wanted)

    monkeypatch.setattr(index, "find_contexts", names)
    monkeypatch.setattr(index, "find_events", names)
    monkeypatch.setattr(index, "require", required)
    with Lookup(lake, index) as lookup:
        with pytest.raises(DigestMismatchError):
            lookup.get_contexts([first.digest])
        assert len(refreshed) == 1
        with pytest.raises(IntegrityError, match=f"no row {EPOCH}/1, which the index names"):
            lookup.get_events([("default", event(1).id)])
        assert len(refreshed) == 2


def test_a_chunk_is_not_archived_because_its_parts_are(
    lake: Lake, index: LakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stream begun anew archiving begins at the first message that the lake does not hold."""
    part = TEN_ROWS["contexts"][0]
    assert isinstance(part, ContextRow)
    rows: dict[int, Row] = {10: part, 11: msgspec.structs.replace(context(11), parts=((part.digest, part.size),))}
    none = cast(Any, None)
    archiver = TableArchiver("contexts", connection=none, hot=none, lake=lake, index=index, executor=none)

    def decoded(_: Table, messages: list[Any]) -> DecodedRun:
        return DecodedRun([rows[message.seq] for message in messages], [], [], 1, 1)

    class Message(msgspec.Struct):
        seq: int

    monkeypatch.setattr(archive_table, "decode_run", decoded)
    assert archiver._unarchived_in(cast(Any, [Message(10), Message(11)])) == 11


@pytest.mark.parametrize("is_recorded", [True, False])
async def test_an_archiver_with_an_index_of_before_goes_on_past_a_damaged_file(
    tmp_path: Path, is_recorded: bool
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
            put_back = damage(lake, "events", -40)
            if is_recorded:
                record(lake, "events")
            await send(3, 14)
            await flush(workers.connection)
            await send(5, 6)
            await flush(workers.connection)
            lake.refresh()
            assert lake.statistics("events").rows == 22
            await asyncio.to_thread(put_back)
            await flush(workers.connection)
            assert await asyncio.to_thread(count, lake, "events") == 14
            await send(1, 15)
            await flush(workers.connection)
            assert await asyncio.to_thread(count, lake, "events") == 15
    assert verify_lake(settings.lake, deep=True).violations == []
