"""What the lake holds already of the rows that the archiver is about to write.

Only what the index does not know *and covers* is taken for new: an index that was begun anew meanwhile is refreshed and
asked again.  Rows of a damaged file that cannot be told may be any, and for that file, which may never be healed,
archiving does not wait: it is noted as passed over, and compared once it is healed (:mod:`holdfast.lake.passed_over`).
So are rows of a damaged file that the index still knows: what the stream has may be the only copy that can be read.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from holdfast.lake.checksums import find_damage, readable, whole_damage
from holdfast.lake.lookup import Lookup, hides
from holdfast.lake.parquet_reading import open_parquet, read_batches
from holdfast.lake.passed_over import drop_repetitions, pass_over, read_notes
from holdfast.lake.quarantine import Quarantine
from holdfast.lake.salvage import IDENTITY_COLUMNS
from holdfast.schemas.errors import DamagedError, IntegrityError, UnavailableError
from holdfast.schemas.rows import ContextRow, Position, Row, Table
from holdfast.workers.archive_plan import key_of, same_content

if TYPE_CHECKING:
    from holdfast.lake.checksums import Damage
    from holdfast.lake.index import LakeIndex
    from holdfast.lake.lake import Lake
    from holdfast.lake.log import FileEntry, Snapshot

_ATTEMPTS: Final = 3

_CLOCK_MS: Final = 3_600_000
"""How far the clock may have been set back between a note and a file that was written after it."""


class ArchivedRows:
    """The rows of one table of the lake, by identity.  Every call blocks; one at a time, in the archiver's thread."""

    def __init__(self, table: Table, lake: Lake, index: LakeIndex) -> None:
        self._table: Table = table
        self._lake = lake
        self._index = index
        self._version = -1
        self._noted: set[str] = set()

    def refresh(self) -> None:
        """Takes in what was archived since, by whomever."""
        self._noted.clear()
        self._version = self._index.refresh(self._lake).versions[self._table]

    def settle(self) -> int:
        """Takes out what healed files hold a second time, and returns how many rows that are.

        Not between :meth:`positions` and the commit of what it was asked for.
        """
        table = self._lake.table(self._table)
        if not read_notes(table.directory):
            return 0
        self.refresh()
        with Lookup(self._lake, self._index) as lookup:
            return drop_repetitions(table, lookup, same_content)

    def positions(self, rows: Sequence[Row]) -> dict[Any, Position]:
        """Returns where the lake holds these rows, by their keys; of contexts by digest, those of their parts as well.

        What is missing then is new, or in a damaged file that is noted as passed over.  Raises UnavailableError when
        the index cannot tell.
        """
        keys = self._keys(rows)
        for _ in range(_ATTEMPTS):
            try:
                answer = self._index.ask(self._table, keys, version=self._version)
            except UnavailableError:
                self._version = self._index.refresh(self._lake).versions[self._table]
                continue
            snapshot = self._lake.snapshot(self._table)
            if all(path in snapshot.files for path in answer.skipped if path not in self._noted):
                positions, damaged = self._readable(snapshot, answer.positions)
                unknown = {*answer.skipped, *damaged} - self._noted
                if unknown:
                    pass_over(snapshot, unknown)
                    self._noted |= unknown
                return positions
            # Healed by another file meanwhile, whose rows the index has to take in.
            self._version = self._index.refresh(self._lake).versions[self._table]
        raise UnavailableError(
            f"whether {len(keys)} rows of {self._table} are archived cannot be told: the index is being made anew",
            hint="nothing: it is tried again",
        )

    def stored(self, rows: Sequence[Row]) -> dict[Any, Row]:
        """Returns the lake's own rows under the keys of these, events or key versions, of those that can be read.

        What is missing then is as :meth:`positions` says: damage that this reading finds is passed over as well.
        """
        told: set[str] = set()
        with Lookup(self._lake, self._index) as lookup:
            while True:
                positions = self.positions(rows)
                try:
                    found = lookup.rows_at(self._table, positions.values())
                except DamagedError as error:
                    # The look-up has recorded it, so its rows are left out now, unless nothing can be recorded.
                    if error.message in told:
                        raise
                    told.add(error.message)
                    continue
                stored = {key_of(row): row for row in found.values()}
                if stored.keys() != positions.keys():
                    raise IntegrityError(
                        f"the index names rows of {self._table} where others are",
                        hint="run holdfast verify; if it finds nothing, delete the index directory",
                    )
                return stored

    def _readable(self, snapshot: Snapshot, positions: Mapping[Any, Position]) -> tuple[dict[Any, Position], set[str]]:
        """Returns the positions whose rows can be read, and the damaged files that may hold others.

        The index knows the first row of a key.  When that is in a damaged file, it may have been archived again since.
        """
        if not positions:
            return {}, set()  # the usual case: all are new
        # Read anew: what another object has recorded a moment ago must not be missed.
        damages = [record.damage() for record in Quarantine(snapshot.directory).of(snapshot).values()]
        hiding = [damage for damage in damages if any(hides(damage, place) for place in positions.values())]
        if not hiding:
            return dict(positions), set()
        hidden = {key for key, place in positions.items() if any(hides(damage, place) for damage in hiding)}
        damaged = {damage.path for damage in hiding}
        unreadable = {damage.path for damage in damages}
        again: dict[Any, Position] = {}
        for entry in _files_with_repetitions(snapshot, hiding):
            if entry.path in unreadable or not self._look_into(snapshot, entry, hidden, again):
                damaged.add(entry.path)
        left = {key: place for key, place in positions.items() if key not in hidden}
        return left | again, damaged if hidden - again.keys() else set()

    def _look_into(self, snapshot: Snapshot, entry: FileEntry, wanted: set[Any], found: dict[Any, Position]) -> bool:
        """Adds where a file holds rows with the wanted keys; False, and it is recorded, when it is damaged."""
        path = snapshot.directory / entry.path
        held: dict[Any, Position] = {}
        try:
            with readable(path), open_parquet(path) as parquet:
                for batch in read_batches(parquet, IDENTITY_COLUMNS[self._table]):
                    held.update(item for item in _identities(self._table, batch) if item[0] in wanted)
        except FileNotFoundError as error:
            self._lake.refresh(self._table)
            if entry.path not in self._lake.snapshot(self._table).files:
                raise UnavailableError(f"{path} was merged away", hint="nothing: it is tried again") from error
            damage = whole_damage(entry, "the file is missing")
        except IntegrityError as error:
            damage = find_damage(snapshot.directory, entry, again=True) or whole_damage(entry, error.message)
        else:
            found |= held
            return True
        Quarantine(snapshot.directory).add(entry, damage)
        return False

    def _keys(self, rows: Sequence[Row]) -> list[Any]:
        if self._table != "contexts":
            return [key_of(row) for row in rows]
        contexts = [row for row in rows if isinstance(row, ContextRow)]
        parts = [digest for row in contexts for digest, _ in row.parts]
        return list(dict.fromkeys([*(row.digest for row in contexts), *parts]))


def _files_with_repetitions(snapshot: Snapshot, hiding: Iterable[Damage]) -> list[FileEntry]:
    """Returns the files that may hold rows which damage seems to hide: those written since it was first passed over.

    And those of another day whose sequences overlap, as at midnight: the rows may never have been in the damaged file.
    """
    since_ms = [
        note.written_ms - _CLOCK_MS
        for note in read_notes(snapshot.directory).values()
        if note.settled is None and any(note.concerns(snapshot.files[damage.path]) for damage in hiding)
    ]
    return [
        entry
        for entry in snapshot.files.values()
        if (since_ms and entry.modified_ms >= min(since_ms)) or any(_overlaps(entry, damage) for damage in hiding)
    ]


def _overlaps(entry: FileEntry, damage: Damage) -> bool:
    spans = damage.ranges if entry.epoch == damage.epoch and entry.path != damage.path else ()
    return any(entry.min_seq <= span.last_seq and entry.max_seq >= span.first_seq for span in spans)


def _identities(table: Table, batch: Any) -> Iterator[tuple[Any, Position]]:
    """Yields the keys of a batch of identities, and where their rows are; no touches."""
    places = map(Position, batch.column("epoch").to_pylist(), batch.column("stream_seq").to_pylist())
    keys: Iterable[Any]
    if table == "contexts":
        refs, forms = batch.column("ref").to_pylist(), batch.column("form").to_pylist()
        keys = (None if form == "touch" else ref[-32:] for ref, form in zip(refs, forms, strict=True))
    elif table == "events":
        column = batch.column("event_id")
        # As bytes, where Arrow would make an object of each.
        raw_ids = getattr(column, "storage", column).to_pylist()
        keys = zip(batch.column("namespace").to_pylist(), (str(uuid.UUID(bytes=raw)) for raw in raw_ids), strict=True)
    else:
        keys = zip(*(batch.column(name).to_pylist() for name in ("namespace", "key", "version")), strict=True)
    yield from zip(keys, places, strict=True)
