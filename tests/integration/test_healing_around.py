"""Healed files whose rows were archived again: wherever both copies have got to, one of them stays, and is sound."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import pytest

from holdfast.lake import Lake, LakeIndex, Lookup, compact, connect, verify_lake
from holdfast.lake import passed_over as passing_over
from holdfast.lake.checksums import find_damage
from holdfast.lake.healing import heal_file
from holdfast.lake.passed_over import drop_repetitions, pass_over, read_notes
from holdfast.lake.scrub import Scrub
from holdfast.schemas.errors import FenceError
from holdfast.workers.archive_plan import same_content
from holdfast.workers.archived_rows import ArchivedRows
from tests.test_lake_samples import EPOCH, T0_MS, chunked, context, contexts, events, key_versions, touch

if TYPE_CHECKING:
    from holdfast.lake.checksums import Damage
    from holdfast.lake.log import FileEntry
    from holdfast.schemas.rows import ContextRow, Row, Table

ROWS: dict[Table, list[Row]] = {
    "contexts": [*contexts(1, 20)],
    "events": [*events(1, 20)],
    "key_versions": [*key_versions(1, 20)],
}
LATER_MS = 2_000_000_000_000


def append(lake: Lake, table: Table, rows: Sequence[Row]) -> FileEntry:
    """Archives some rows as a file of their own."""
    first, last = rows[0].seq, rows[-1].seq
    lake.append(table, rows, epoch=EPOCH, first_seq=first, last_seq=last)
    return next(entry for entry in lake.files(table) if (entry.min_seq, entry.max_seq) == (first, last))


def again(row: Row, seq: int) -> Row:
    """A row as it is when it is sent once more."""
    return msgspec.structs.replace(row, seq=seq, stored_at_ms=T0_MS + seq)


def path_of(lake: Lake, table: Table, entry: FileEntry) -> Path:
    return lake.path / table / entry.path


def flip(path: Path, place: int) -> None:
    """Flips a bit, and leaves the times as they were: what rots has no new ones."""
    stat = path.stat()
    raw = bytearray(path.read_bytes())
    raw[place] ^= 4
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def damage(lake: Lake, table: Table, entry: FileEntry) -> Damage:
    """Damages the footer of a file, of which nothing can be told then, and has the archiver pass it over."""
    flip(path_of(lake, table, entry), -40)
    found = Scrub(lake).check(lake.table(table), entry)
    assert found is not None
    pass_over(lake.table(table).refresh(), [entry.path])
    return found


def put_back(lake: Lake, table: Table, entry: FileEntry) -> None:
    flip(path_of(lake, table, entry), -40)
    assert Scrub(lake).check(lake.table(table), entry) is None


def merge(lake: Lake, table: Table) -> FileEntry:
    """Merges the files that are not damaged into one; returns it."""
    assert compact(lake, at_ms=LATER_MS, tables=[table]).groups == 1
    lake.refresh()
    return next(entry for entry in lake.files(table) if entry.min_seq == 1)


def settle(lake: Lake, index: LakeIndex, table: Table, first: Literal["file", "around"] = "file") -> int:
    """Settles the notes, those of the shorter files first, or those of the longer."""
    archived = ArchivedRows(table, lake, index)
    archived.refresh()

    def in_order(directory: Path) -> dict[Path, passing_over.Note]:
        notes = sorted(read_notes(directory).items(), key=lambda item: item[1].last_seq - item[1].first_seq)
        return dict(notes if first == "file" else notes[::-1])

    with pytest.MonkeyPatch.context() as patch, Lookup(lake, index) as lookup:
        patch.setattr(passing_over, "read_notes", in_order)
        return drop_repetitions(lake.table(table), lookup, same_content)


def count(lake: Lake, table: Table) -> int:
    with connect(lake.path) as duck:
        [(rows,)] = duck.execute(f"SELECT count(*) FROM {table}").fetchall()
    return int(rows)


def forms(lake: Lake) -> dict[int, str]:
    with connect(lake.path) as duck:
        return dict(duck.execute("SELECT stream_seq, form FROM contexts_stored ORDER BY stream_seq").fetchall())


def passed_over_and_merged_around(lake: Lake, table: Table) -> tuple[FileEntry, FileEntry]:
    """A damaged file with rows 11 to 20, and one that was merged around it, whose row 21 is row 13 once more."""
    rows = ROWS[table]
    append(lake, table, rows[:10])
    damaged = append(lake, table, rows[10:])
    damage(lake, table, damaged)
    append(lake, table, [again(rows[12], 21)])
    around = merge(lake, table)
    assert (around.min_seq, around.max_seq) == (1, 21)
    return damaged, around


@pytest.mark.parametrize("table", ROWS)
@pytest.mark.parametrize("first", ["file", "around"])
def test_of_a_row_and_its_copy_that_were_both_passed_over_one_stays(
    lake: Lake, index: LakeIndex, table: Table, first: Literal["file", "around"]
) -> None:
    damaged, around = passed_over_and_merged_around(lake, table)
    damage(lake, table, around)
    for entry in (damaged, around):
        put_back(lake, table, entry)
    assert settle(lake, index, table, first) == 1
    assert settle(lake, index, table, first) == 0
    assert count(lake, table) == 20
    assert verify_lake(lake.path, deep=True).ok


@pytest.mark.parametrize("table", ROWS)
@pytest.mark.parametrize("first", ["file", "around"])
@pytest.mark.parametrize("healed", ["put back", "from the stream"])
def test_a_file_merged_of_rows_and_their_copies_keeps_one_of_each(
    lake: Lake, index: LakeIndex, table: Table, first: Literal["file", "around"], healed: str
) -> None:
    rows = ROWS[table][:11]
    copies = [again(row, 12 + n) for n, row in enumerate(rows[:3])]
    entry = append(lake, table, rows)
    damage(lake, table, entry)
    append(lake, table, copies)
    put_back(lake, table, entry)
    merged = merge(lake, table)
    found = damage(lake, table, merged)
    if healed == "put back":
        put_back(lake, table, merged)
    else:
        assert heal_file(lake.table(table), merged, found, [*rows, *copies])
    assert settle(lake, index, table, first) == 3
    assert count(lake, table) == 11
    assert verify_lake(lake.path, deep=True).ok


def test_each_content_of_an_id_stays_once(lake: Lake, index: LakeIndex) -> None:
    """Of several copies elsewhere one contradicts the row, and one does not."""
    rows = events(1, 10)
    other = msgspec.structs.replace(rows[2], data=b'{"n":"other"}')
    entry = append(lake, "events", rows)
    damage(lake, "events", entry)
    append(lake, "events", [again(rows[2], 11)])
    append(lake, "events", [again(other, 12)])
    put_back(lake, "events", entry)
    assert settle(lake, index, "events") == 1
    with connect(lake.path) as duck:
        kept = duck.execute("SELECT stream_seq FROM events WHERE event_id = ? ORDER BY 1", [rows[2].id]).fetchall()
    assert kept == [(11,), (12,)]


def test_another_who_took_out_rows_meanwhile_may_have_taken_what_was_to_stay(
    lake: Lake, index: LakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two archivers, for a moment: each has decided which of the two rows stays."""
    entry = append(lake, "events", events(1, 10))
    damage(lake, "events", entry)
    later = append(lake, "events", [again(events(3, 3)[0], 11), *events(12, 14)])
    damage(lake, "events", later)
    for each in (entry, later):
        put_back(lake, "events", each)
    table = lake.table("events")
    rewrite = passing_over._rewrite

    def overtaken(*arguments: object) -> int:
        monkeypatch.setattr(passing_over, "_rewrite", rewrite)
        other = Lake.open(lake.path)
        assert settle(other, index, "events", "around") == 1
        return rewrite(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(passing_over, "_rewrite", overtaken)
    assert settle(lake, index, "events", "file") == 0
    table.refresh()
    assert settle(lake, index, "events") == 0
    assert count(lake, "events") == 13
    with pytest.raises(FenceError):
        rewrite(table, next(iter(table.snapshot.files.values())), {1}, None)


@pytest.mark.parametrize("table", ROWS)
@pytest.mark.parametrize("rotten", ["the healed file", "the file of the rows that stay"])
def test_rot_is_neither_rewritten_nor_relied_on(lake: Lake, index: LakeIndex, table: Table, rotten: str) -> None:
    rows = ROWS[table][:10]
    entry = append(lake, table, rows)
    damage(lake, table, entry)
    later = append(lake, table, [again(row, row.seq + 10) for row in rows[:3]])
    put_back(lake, table, entry)
    directory = lake.path / table
    of_rot = entry if rotten == "the healed file" else later
    for each in (entry, later):
        assert find_damage(directory, each) is None
    assert of_rot.checksums is not None
    flip(path_of(lake, table, of_rot), of_rot.checksums.parts[0][0] // 2)
    files = set(lake.table(table).refresh().files)
    assert settle(lake, index, table) == 0
    assert set(lake.table(table).refresh().files) == files
    assert of_rot.path in lake.table(table).quarantine.files()
    notes = read_notes(directory).values()
    assert all(note.settled is None for note in notes)
    flip(path_of(lake, table, of_rot), of_rot.checksums.parts[0][0] // 2)
    assert Scrub(lake).recheck_quarantine() == 0
    assert settle(lake, index, table) == 3
    assert count(lake, table) == 10


def test_pages_are_compared_of_files_without_checksums(
    lake: Lake, index: LakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of earlier releases: nothing else tells."""
    entry = append(lake, "contexts", contexts(1, 10))
    damage(lake, "contexts", entry)
    append(lake, "contexts", [again(row, row.seq + 10) for row in contexts(1, 3)])
    put_back(lake, "contexts", entry)
    monkeypatch.setattr(passing_over, "find_damage", lambda *_, **__: None)
    path = path_of(lake, "contexts", entry)
    flip(path, path.read_bytes().index(b"\x28\xb5\x2f\xfd", path.stat().st_size // 4) + 12)
    assert settle(lake, index, "contexts") == 0
    assert entry.path in lake.table("contexts").quarantine.files()
    assert entry.path in lake.table("contexts").refresh().files


def forged_manifest(row: ContextRow, seq: int) -> ContextRow:
    body = msgspec.json.encode({"v": 1, "size": row.size, "chunks": ["a" * 32]})
    return msgspec.structs.replace(row, form="manifest", body=body, seq=seq, stored_at_ms=T0_MS + seq)


@pytest.mark.parametrize("copy", ["later", "later, both passed over", "earlier"])
def test_no_body_goes_for_a_manifest(lake: Lake, index: LakeIndex, copy: str) -> None:
    """A manifest may be archived unchecked, while damage hides its chunks."""
    true = context(3)
    if copy == "earlier":
        entry = append(lake, "contexts", [context(1), forged_manifest(true, 2)])
        damage(lake, "contexts", entry)
        append(lake, "contexts", [true, context(4)])
    else:
        entry = append(lake, "contexts", [context(1), true, context(4)])
        damage(lake, "contexts", entry)
        append(lake, "contexts", [forged_manifest(true, 5), context(6)])
    put_back(lake, "contexts", entry)
    if copy == "later, both passed over":
        entry = merge(lake, "contexts")
        damage(lake, "contexts", entry)
        put_back(lake, "contexts", entry)
    assert settle(lake, index, "contexts") == 1
    found = forms(lake)
    assert found[3] == "plain"
    assert found[2 if copy == "earlier" else 5] == "touch"
    index.refresh(lake)
    with Lookup(lake, index) as lookup:
        stored = lookup.get_body(true.digest)
    assert stored is not None
    assert stored[1] == true.body
    assert verify_lake(lake.path, deep=True).ok


@pytest.mark.parametrize("forged", ["earlier", "later"])
def test_of_two_manifests_the_one_that_makes_the_body_stays(lake: Lake, index: LakeIndex, forged: str) -> None:
    body = b"a" * 3_000 + b"b" * 3_000
    *chunks, manifest = chunked(1, body, 3_000)
    append(lake, "contexts", chunks)
    false = forged_manifest(manifest, 4)
    pair = [again(false, 3), again(manifest, 4)] if forged == "earlier" else [manifest, false]
    entry = append(lake, "contexts", pair[:1])
    damage(lake, "contexts", entry)
    append(lake, "contexts", pair[1:])
    put_back(lake, "contexts", entry)
    assert settle(lake, index, "contexts") == 1
    index.refresh(lake)
    with Lookup(lake, index) as lookup:
        stored = lookup.get_body(manifest.digest)
    assert stored is not None
    assert stored[1] == body


@pytest.mark.parametrize("state", ["as archived", "settled"])
def test_a_file_is_healed_whose_rows_a_file_merged_around_it_repeats(lake: Lake, index: LakeIndex, state: str) -> None:
    """The copy is in a file that begins before the damaged one; settled, the row has become a touch of it."""
    damaged, _ = passed_over_and_merged_around(lake, "contexts")
    if state == "settled":
        put_back(lake, "contexts", damaged)
        assert settle(lake, index, "contexts") == 1
        damaged = next(entry for entry in lake.files("contexts") if entry.min_seq == 11)
        damage(lake, "contexts", damaged)
    found = find_damage(lake.path / "contexts", damaged, again=True)
    assert found is not None
    assert heal_file(lake.table("contexts"), damaged, found, ROWS["contexts"][10:])
    assert settle(lake, index, "contexts") == (0 if state == "settled" else 1)
    assert {seq for seq, form in forms(lake).items() if form == "touch"} == {13}
    assert count(lake, "contexts") == 20
    assert verify_lake(lake.path, deep=True).ok


def test_what_a_file_merged_around_it_held_before_is_a_touch_again(lake: Lake, index: LakeIndex) -> None:
    append(lake, "contexts", contexts(1, 10))
    rows = [context(11), again(context(5), 12), context(13)]
    damaged = append(lake, "contexts", [rows[0], touch(context(5), 12), rows[2]])
    found = damage(lake, "contexts", damaged)
    append(lake, "contexts", [again(context(13), 14)])
    merge(lake, "contexts")
    assert heal_file(lake.table("contexts"), damaged, found, rows)
    healed = next(entry for entry in lake.table("contexts").refresh().files.values() if entry.min_seq == 11)
    assert (healed.rows, healed.contexts) == (3, 2)
    assert settle(lake, index, "contexts") == 1
    assert {seq for seq, form in forms(lake).items() if form == "touch"} == {12, 13}
    assert verify_lake(lake.path, deep=True).ok
