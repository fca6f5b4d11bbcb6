"""Damaged files that the archiver passed over: once they are healed, it shows which of their rows were repeated.

Rows of a damaged file that cannot be told may be any.  The archiver goes on all the same: what it archives meanwhile
may be in such a file already.  Before it does so it leaves a *note*, ``<table>/_passed_over/<file>.json``.  Once the
file is whole again, put back in its place or replaced by another, the archiver compares its rows with the others and
takes out those that are repeated (:func:`drop_repetitions`).  Until that is done, whoever reads by SQL is refused what
a note concerns (:func:`doubtful_files`), so no count ever has a row twice.  A note that is settled stays for a while,
for those who have read an earlier version of the table.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import duckdb
import msgspec

from holdfast.lake.checksums import find_damage, readable, whole_damage
from holdfast.lake.columns import ROWS_PER_GROUP, to_rows
from holdfast.lake.commit import Change, removal_of
from holdfast.lake.files import fsync_directory, make_directory, write_durably
from holdfast.lake.index_rows import DROP_REPETITIONS as ACTION
from holdfast.lake.parquet_reading import open_parquet, read_group
from holdfast.lake.quarantine import damaged_error
from holdfast.lake.views import file_scan
from holdfast.lake.writer import FileWriter, remove_files
from holdfast.schemas.errors import (
    DamagedError,
    FenceError,
    HoldfastError,
    IntegrityError,
    RetryError,
    UnavailableError,
)
from holdfast.schemas.ids import now_ms
from holdfast.schemas.rows import ContextRow, Position, Row, Table

if TYPE_CHECKING:
    from holdfast.lake.checksums import Damage
    from holdfast.lake.log import FileEntry, Snapshot
    from holdfast.lake.lookup import Lookup
    from holdfast.lake.table import LakeTable

logger = logging.getLogger(__name__)

DIRECTORY: Final = "_passed_over"
KEPT_MS: Final = 600_000
"""How long a settled note stays: no statement lasts longer on a picture of before."""
_COMPARED: Final = 1_000

_IDENTITY: Final[dict[Table, str]] = {
    "contexts": "ref",
    "events": "namespace, event_id",
    "key_versions": "namespace, key, version",
}

IsSame = Callable[[Row, Row], bool]
"""Whether two rows of one identity say the same."""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was passed over; ``settled`` is the version of the table that has none of its rows twice."""

    path: str
    day: str
    epoch: str
    first_seq: int
    last_seq: int
    written_ms: int
    settled: int | None = None
    v: int = 1

    def concerns(self, entry: FileEntry) -> bool:
        """Whether a file may hold rows of the one that was passed over: it, its replacement, or what they became."""
        is_near = entry.min_seq <= self.last_seq and entry.max_seq >= self.first_seq
        return (entry.day, entry.epoch) == (self.day, self.epoch) and is_near


_NOTE: Final = msgspec.json.Decoder(Note)


def read_notes(directory: Path) -> dict[Path, Note]:
    """Returns the notes of a table by where they are; raises UnavailableError when one cannot be read."""
    notes: dict[Path, Note] = {}
    for path in sorted((directory / DIRECTORY).glob("*.json")):
        try:
            notes[path] = _NOTE.decode(path.read_bytes())
        except FileNotFoundError:
            continue  # removed meanwhile
        except (OSError, ValueError) as error:
            raise UnavailableError(
                f"{path} cannot be read: {error}", hint="remove it: then 'holdfast verify' tells what is stored twice"
            ) from error
    return notes


def pass_over(snapshot: Snapshot, paths: Iterable[str]) -> None:
    """Notes, durably, that rows are archived from now on which nobody compared with those of these damaged files."""
    known = {note.path for note in read_notes(snapshot.directory).values() if note.settled is None}
    for path in paths:
        entry = snapshot.files[path]
        if path in known:
            continue
        note = Note(
            path=path,
            day=entry.day,
            epoch=entry.epoch,
            first_seq=entry.min_seq,
            last_seq=entry.max_seq,
            written_ms=now_ms(),
        )
        make_directory(snapshot.directory / DIRECTORY)
        _write(snapshot.directory / DIRECTORY / f"{Path(path).name}.json", note)
        logger.warning(
            "archiving goes on past a damaged file",
            extra={"action": "passed_over", "path": str(snapshot.directory / path)},
        )


def doubtful_files(snapshot: Snapshot) -> dict[str, Damage]:
    """Returns the files of a version with rows that another file may repeat, as what they are to a reader: damaged."""
    return {
        entry.path: whole_damage(
            entry, "it was damaged, and the archiver has yet to compare it with what it archived since"
        )
        for note in read_notes(snapshot.directory).values()
        if note.settled is None or note.settled > snapshot.version
        for entry in snapshot.files.values()
        if note.concerns(entry)
    }


def drop_repetitions(table: LakeTable, lookup: Lookup, is_same: IsSame, *, at_ms: int | None = None) -> int:
    """Takes out the rows of healed files that were archived again meanwhile; returns how many.

    Each row that goes says the same as one that stays, and whose file is sound at that moment: one elsewhere, or
    else the latest.  A context becomes a touch, which says that it was stored then.  Rows of one identity that
    contradict each other both stay, and are told; but a manifest, which may have been archived unchecked, goes for a
    body, wherever it is.  A file that is found damaged is put into quarantine, and its rows wait.  A process killed on
    the way leaves the note, and the next call does the rest.
    """
    now = now_ms() if at_ms is None else at_ms
    dropped = 0
    for path, note in read_notes(table.directory).items():
        if note.settled is not None and now < note.written_ms + KEPT_MS:
            continue
        snapshot = table.refresh()
        damaged = table.quarantine.of(snapshot)
        entries = [entry for entry in snapshot.files.values() if note.concerns(entry)]
        if any(entry.path in damaged for entry in entries):
            continue
        # What cannot be compared with now is compared when it is healed itself.
        pass_over(snapshot, damaged)
        try:
            # Rot would hide what is repeated.
            _require_sound(table, entries)
            repeated = _repeated(table, snapshot, note, entries, damaged, lookup, is_same) if entries else []
            _take_out(table, snapshot, repeated)
        except (FenceError, DamagedError):
            continue  # merged with others meanwhile, or in quarantine now: the next call finds it there
        gone = sum(len(places.gone) for places in repeated)
        dropped += gone
        if note.settled is not None and not gone:
            path.unlink(missing_ok=True)
            fsync_directory(path.parent)
        else:
            _write(path, msgspec.structs.replace(note, settled=table.refresh().version, written_ms=now))
    return dropped


def _write(path: Path, note: Note) -> None:
    try:
        write_durably(path, msgspec.json.encode(note))
    except OSError as error:
        raise UnavailableError(
            f"{path} cannot be written: {error}", hint="free space on its disk, or mend it"
        ) from error


def _require_sound(table: LakeTable, entries: Iterable[FileEntry]) -> None:
    """Reads files again, whatever was read before: rot must not be written anew, with checksums that call it sound.

    Raises DamagedError for one that is damaged, and in quarantine now; FenceError for one that has left the table.
    """
    for entry in entries:
        damage = find_damage(table.directory, entry, again=True)
        if damage is not None:
            raise _quarantined(table, entry, damage)


def _quarantined(table: LakeTable, entry: FileEntry, damage: Damage) -> IntegrityError:
    if entry.path not in table.refresh().files:
        return FenceError(f"{entry.path} is no longer in {table.directory}", hint="it is looked for anew")
    table.quarantine.add(entry, damage)
    return damaged_error(table.directory, damage)


class _Place(NamedTuple):
    """Where a row is.  ``is_healed``: it is one of those that were passed over.

    ``rank`` is above 0 for a manifest: 1 when it makes its body, 2 when that is not known.  A row goes for one of a
    lower rank, wherever it is.
    """

    path: str
    position: Position
    is_healed: bool
    rank: int


class _Places(NamedTuple):
    """Where the rows of one identity are: those that stay, and those that go."""

    staying: list[_Place]
    gone: list[_Place]


def _repeated(
    table: LakeTable,
    snapshot: Snapshot,
    note: Note,
    entries: list[FileEntry],
    damaged: Collection[str],
    lookup: Lookup,
    is_same: IsSame,
) -> list[_Places]:
    """Returns the identities of which rows go: of those passed over, and manifests for whose body there is another."""
    found = _rows_of_one_identity(table, snapshot, note, entries, damaged)
    repeated: list[_Places] = []
    for start in range(0, len(found), _COMPARED):
        some = found[start : start + _COMPARED]
        # Of one digest there is one content, unless there is nothing but manifests of it.
        asked = [places for places in some if table.name != "contexts" or all(place.rank for place in places)]
        rows = lookup.rows_at(table.name, [place.position for places in asked for place in places])
        for places in some:
            ranked = places
            if table.name == "contexts" and places[0].position in rows:
                ranked = _ranked(places, rows, lookup)
            told = _tell_apart(ranked, None if table.name == "contexts" else rows, is_same)
            if told.gone:
                repeated.append(told)
            if len(told.staying) > 1 and any(place.is_healed for place in told.staying):
                logger.error(
                    "two rows of one identity contradict each other",
                    extra={
                        "action": "contradiction",
                        "table": table.name,
                        "places": [place.position for place in told.staying],
                    },
                )
    return repeated


def _rows_of_one_identity(
    table: LakeTable, snapshot: Snapshot, note: Note, entries: list[FileEntry], damaged: Collection[str]
) -> list[list[_Place]]:
    """Returns the rows that have an identity in common with one that was passed over, two of each at least."""
    identity = _IDENTITY[table.name]
    is_contexts = table.name == "contexts"
    stored = "AND form <> 'touch'" if is_contexts else ""
    healed = {entry.path for entry in entries}
    paths = {Path(path).name: path for path in snapshot.files}
    compared = [entry for path, entry in snapshot.files.items() if path not in damaged]
    with _answering(table, compared), duckdb.connect(":memory:") as duck:
        found = duck.execute(
            f"SELECT filename, epoch, stream_seq, {'form' if is_contexts else 'NULL'}, {identity} "  # noqa: S608  own names
            f"FROM {file_scan(snapshot, damaged)} JOIN ("
            f"SELECT DISTINCT {identity} FROM {file_scan(snapshot, snapshot.files.keys() - healed)} "
            f"WHERE epoch = ? AND stream_seq BETWEEN ? AND ? {stored}) USING ({identity}) "
            f"WHERE true {stored} QUALIFY count(*) OVER (PARTITION BY {identity}) > 1",
            [note.epoch, note.first_seq, note.last_seq],
        ).fetchall()
    by_identity: dict[Any, list[_Place]] = defaultdict(list)
    for file, epoch, seq, form, *key in found:
        path = paths[Path(file).name]
        is_healed = path in healed and epoch == note.epoch and note.first_seq <= seq <= note.last_seq
        rank = 2 if form == "manifest" else 0
        by_identity[tuple(key)].append(_Place(path, Position(epoch, seq), is_healed, rank))
    return list(by_identity.values())


def _ranked(places: list[_Place], rows: Mapping[Position, Row], lookup: Lookup) -> list[_Place]:
    """Returns the places of manifests of one digest, with those told that make its body: of two, one may be forged."""
    manifests = [row for place in places if isinstance(row := rows[place.position], ContextRow)]
    if len({row.body for row in manifests}) == 1:
        return [place._replace(rank=1) for place in places]
    return [
        place._replace(rank=1 if _makes_its_body(row, lookup) else 2)
        for place, row in zip(places, manifests, strict=True)
    ]


def _makes_its_body(row: ContextRow, lookup: Lookup) -> bool:
    try:
        lookup.join(row)
    except RetryError:
        raise
    except HoldfastError:
        return False  # forged, or damage hides it
    return True


def _tell_apart(places: list[_Place], rows: Mapping[Position, Row] | None, is_same: IsSame) -> _Places:
    """Returns which rows of one identity stay; ``rows`` are their contents, None when the ranks say it all.

    What goes is measured against what stays and against nothing else: of two that were both passed over, one goes.
    """
    told = _Places([], [])
    for place in sorted(places, key=lambda place: (place.rank, place.is_healed, -place.position.seq)):
        best = told.staying[0].rank if told.staying else place.rank
        if rows is None:
            repeats = [other for other in told.staying if other.rank < 2]
        else:
            repeats = [other for other in told.staying if is_same(rows[place.position], rows[other.position])]
        may_go = place.is_healed or place.rank > best
        (told.gone if repeats and may_go else told.staying).append(place)
    return told


def _take_out(table: LakeTable, snapshot: Snapshot, repeated: list[_Places]) -> None:
    """Rewrites the files of the rows that go, if these and those of the rows that stay are sound."""
    gone: dict[str, set[int]] = defaultdict(set)
    for places in repeated:
        for place in places.gone:
            gone[place.path].add(place.position.seq)
    relied_on = {place.path for places in repeated for place in places.staying}
    _require_sound(table, [snapshot.files[path] for path in sorted(relied_on | gone.keys())])
    last = snapshot.transactions.get(ACTION)
    after = last.version if last else None
    for path, seqs in gone.items():
        after = _rewrite(table, snapshot.files[path], seqs, after)


@contextmanager
def _answering(table: LakeTable, entries: Iterable[FileEntry]) -> Generator[None]:
    try:
        yield
    except duckdb.Error as error:
        # Rot that nobody has met yet, the disk, or files that were merged and removed meanwhile.
        _require_sound(table, entries)
        raise UnavailableError(
            f"healed files of {table.directory} cannot be compared: {error}", hint="nothing: it is tried again"
        ) from error


def _rewrite(table: LakeTable, entry: FileEntry, repeated: Collection[int], after: int | None) -> int:
    """Replaces a file by one without the rows that are repeated; nothing takes its place when all are.

    Returns the number of this taking out; ``after`` is the last one that was seen when the rows were compared.  Raises
    FenceError when there was another: it may have taken out what was to stay.
    """
    with FileWriter(table.name, table.directory, entry.day, entry.epoch) as writer:
        is_empty = True
        for content in _groups(table, entry):
            rows = _without(to_rows(table.name, content), repeated)
            for start in range(0, len(rows), ROWS_PER_GROUP):
                writer.write_group(rows[start : start + ROWS_PER_GROUP])
                is_empty = False
        written = [] if is_empty else [writer.finish()]
        if is_empty:
            writer.discard()
    number = 1 if after is None else after + 1

    def replacement(snapshot: Snapshot) -> Change:
        if entry.path not in snapshot.files:
            raise FenceError(f"{entry.path} is no longer in {snapshot.directory}", hint="it is looked for anew")
        return Change(
            action=ACTION,
            app_id=ACTION,
            version=number,
            expected=after,
            adds=[file.add_action() for file in written],
            removes=[removal_of(entry, now_ms())],
        )

    try:
        table.commit(replacement)
    except (FenceError, UnavailableError):
        remove_files(table.directory, [file.entry for file in written])
        raise
    logger.warning(
        "repeated rows of a healed file were taken out",
        extra={"action": ACTION, "path": str(table.directory / entry.path)},
    )
    return number


def _groups(table: LakeTable, entry: FileEntry) -> Iterator[Any]:
    path = table.directory / entry.path
    try:
        with readable(path), open_parquet(path) as parquet:
            for group in range(parquet.metadata.num_row_groups):
                yield read_group(parquet, group)
    except FileNotFoundError as error:
        raise FenceError(f"{path} was removed meanwhile", hint="it is looked for anew") from error
    except IntegrityError as error:
        # Compared a moment ago; but files of earlier releases have nothing but the checksums of their pages.
        raise _quarantined(table, entry, whole_damage(entry, error.message)) from error


def _without(rows: list[Row], repeated: Collection[int]) -> list[Row]:
    kept: list[Row] = []
    for row in rows:
        if row.seq not in repeated:
            kept.append(row)
        elif isinstance(row, ContextRow):
            kept.append(row if row.form == "touch" else msgspec.structs.replace(row, form="touch", body=b""))
    return kept
