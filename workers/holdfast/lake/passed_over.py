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
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import duckdb
import msgspec

from holdfast.lake.checksums import find_damage, readable, whole_damage
from holdfast.lake.columns import ROWS_PER_GROUP, to_rows
from holdfast.lake.commit import Change, removal_of
from holdfast.lake.files import fsync_directory, make_directory, write_durably
from holdfast.lake.index_rows import DROP_REPETITIONS as ACTION
from holdfast.lake.parquet_reading import open_parquet, read_group
from holdfast.lake.views import file_scan
from holdfast.lake.writer import FileWriter, remove_files
from holdfast.schemas.errors import FenceError, UnavailableError
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

    The later row stays.  Of two contexts the earlier becomes a touch, which says that it was stored then.  Rows of one
    identity that contradict each other both stay, and are told.  A process killed on the way leaves the note, and the
    next call does the rest.
    """
    now = now_ms() if at_ms is None else at_ms
    dropped = 0
    for path, note in read_notes(table.directory).items():
        if note.settled is not None and now < note.written_ms + KEPT_MS:
            continue
        snapshot = table.refresh()
        damaged = table.quarantine.of(snapshot)
        entries = [entry for entry in snapshot.files.values() if note.concerns(entry)]
        if any(entry.path in damaged or find_damage(table.directory, entry) for entry in entries):
            continue
        # What cannot be compared with now is compared when it is healed itself.
        pass_over(snapshot, damaged)
        repeated = _repeated(table, snapshot, note, entries, damaged, lookup, is_same) if entries else set[int]()
        try:
            for entry in entries:
                if any(entry.min_seq <= seq <= entry.max_seq for seq in repeated):
                    _rewrite(table, entry, repeated)
        except FenceError:
            continue  # merged with others meanwhile: the next call finds it there
        dropped += len(repeated)
        if note.settled is not None and not repeated:
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


def _repeated(
    table: LakeTable,
    snapshot: Snapshot,
    note: Note,
    entries: list[FileEntry],
    damaged: Collection[str],
    lookup: Lookup,
    is_same: IsSame,
) -> set[int]:
    """Returns the sequences, of those passed over, whose row another one repeats."""
    healed = {entry.path for entry in entries}
    own = file_scan(snapshot, snapshot.files.keys() - healed)
    stored = " AND own.form <> 'touch' AND other.form <> 'touch'" if table.name == "contexts" else ""
    with _answering(table.directory), duckdb.connect(":memory:") as duck:
        found = duck.execute(
            f"SELECT own.stream_seq, other.epoch, other.stream_seq FROM {file_scan(snapshot, damaged)} AS other "  # noqa: S608  own names
            f"JOIN {own} AS own USING ({_IDENTITY[table.name]}) "
            "WHERE own.epoch = ? AND own.stream_seq BETWEEN ? AND ? "
            f"AND (own.epoch, own.stream_seq) <> (other.epoch, other.stream_seq){stored}",
            [note.epoch, note.first_seq, note.last_seq],
        ).fetchall()
    pairs = {Position(note.epoch, seq): Position(epoch, other) for seq, epoch, other in found}
    if table.name == "contexts":
        return {place.seq for place in pairs}  # of one digest there is one content
    repeated: set[int] = set()
    places = list(pairs)
    for start in range(0, len(places), _COMPARED):
        some = places[start : start + _COMPARED]
        rows = lookup.rows_at(table.name, [*some, *(pairs[place] for place in some)])
        for place in some:
            if is_same(rows[place], rows[pairs[place]]):
                repeated.add(place.seq)
            else:
                logger.error(
                    "two rows of one identity contradict each other",
                    extra={"action": "contradiction", "table": table.name, "places": [place, pairs[place]]},
                )
    return repeated


@contextmanager
def _answering(directory: Path) -> Generator[None]:
    try:
        yield
    except duckdb.Error as error:
        # Compared with their checksums a moment ago: the disk, or files that were merged and removed meanwhile.
        raise UnavailableError(
            f"healed files of {directory} cannot be compared: {error}", hint="nothing: it is tried again"
        ) from error


def _rewrite(table: LakeTable, entry: FileEntry, repeated: Collection[int]) -> None:
    """Replaces a file by one without the rows that are repeated; nothing takes its place when all are."""
    with FileWriter(table.name, table.directory, entry.day, entry.epoch) as writer:
        is_empty = True
        path = table.directory / entry.path
        with readable(path), open_parquet(path, checks_pages=False) as parquet:
            for group in range(parquet.metadata.num_row_groups):
                rows = _without(to_rows(table.name, read_group(parquet, group)), repeated)
                for start in range(0, len(rows), ROWS_PER_GROUP):
                    writer.write_group(rows[start : start + ROWS_PER_GROUP])
                    is_empty = False
        written = [] if is_empty else [writer.finish()]
        if is_empty:
            writer.discard()

    def replacement(snapshot: Snapshot) -> Change:
        if entry.path not in snapshot.files:
            raise FenceError(f"{entry.path} is no longer in {snapshot.directory}", hint="it is looked for anew")
        last = snapshot.transactions.get(ACTION)
        return Change(
            action=ACTION,
            app_id=ACTION,
            version=last.version + 1 if last else 1,
            expected=last.version if last else None,
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


def _without(rows: list[Row], repeated: Collection[int]) -> list[Row]:
    kept: list[Row] = []
    for row in rows:
        if row.seq not in repeated:
            kept.append(row)
        elif isinstance(row, ContextRow):
            kept.append(row if row.form == "touch" else msgspec.structs.replace(row, form="touch", body=b""))
    return kept
