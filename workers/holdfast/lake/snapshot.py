"""One consistent picture of lake and tail, taken for each statement.

The picture is: a version of each table, then, of each stream, the rows after that version's watermark.  The order
matters.  A row that is archived between the two steps is still in the stream's answer, since a purge stays below the
watermark; read the other way round, it could be missed.  When a purge has passed the watermark by, the lake holds a
newer version: the picture is taken anew.

Rows of the tail are kept from one picture to the next, so that a statement asks for new ones only.  A row is shown
unless an earlier row has its identity (reference, or event id, or key and version): a fact about what lies before the
row in its stream, so it is worked out once, when the row is first seen, against the lake and the tail so far.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
import pyarrow as pa

from holdfast.lake.columns import arrow_schema, to_batch
from holdfast.lake.log import Snapshot
from holdfast.schemas.errors import GapError, UnavailableError
from holdfast.schemas.rows import TABLES, ContextRow, EventRow, Position, Row, Table, TailSnapshot

if TYPE_CHECKING:
    from holdfast.lake.lake import Lake

ATTEMPTS: Final = 20
"""How often a picture is taken anew.  Each time a purge has overtaken the reader, which happens hourly, not 20
times in a row: then messages are missing that the lake does not hold."""

RETRY_PAUSE_S: Final = 0.05
"""Between attempts: the commit that explains a purge is visible before the purge, so this waits for nothing."""

Identity = tuple[str, ...]


class Tail(Protocol):
    """The rows that are in the streams and not yet in the lake.

    ``read`` returns the rows after ``after``, in stream order, up to the stream's last sequence at the time of the
    call: every row acknowledged before the call is among them.  Without ``after``, or when ``after`` is of another
    epoch than the stream's, it returns every row that the stream holds.  It may raise UnavailableError: then it is
    asked again if the lake has moved on meanwhile.  One call at a time is made.
    """

    def read(self, table: Table, after: Position | None) -> TailSnapshot:
        """Returns the rows of a table's stream after a position."""
        ...

    def close(self) -> None:
        """Gives up connection and memory; the tail is not read any more."""
        ...


class Picture(msgspec.Struct, frozen=True):
    """What one statement sees.  ``tails`` holds Arrow tables, of the tables that have a tail; ``number`` tells
    pictures apart."""

    number: int
    snapshots: dict[Table, Snapshot]
    tails: dict[Table, Any]


FindKnown = Callable[[Snapshot, Sequence[Row]], set[Identity]]
"""Returns which identities of some tail rows the lake holds in an earlier row."""


class PictureTaker:
    """Takes pictures of a lake, with its tail if there is one.  Safe to use from several threads."""

    def __init__(
        self, lake: Lake, tail: Tail | None, find_known: FindKnown, *, tables: Sequence[Table] = TABLES
    ) -> None:
        self._lake = lake
        self._tail = tail
        self._resident: dict[Table, _ResidentTail] = {table: _ResidentTail(table, find_known) for table in tables}
        self._last: Picture | None = None
        self._lock = threading.Lock()

    def take(self) -> Picture:
        """Returns a picture of this moment: every row acknowledged before the call is in it, once.

        The very last picture is returned again when nothing has changed.  Raises GapError when messages are missing
        from a stream that the lake does not hold either.
        """
        with self._lock:
            attempt = 0
            while True:
                self._lake.refresh()
                snapshots: dict[Table, Snapshot] = {table: self._lake.snapshot(table) for table in TABLES}
                behind = self._catch_up(snapshots)
                if behind is None:
                    return self._remember(snapshots)
                attempt += 1
                if attempt == ATTEMPTS:
                    raise GapError(
                        f"messages of {behind} are in neither stream nor lake, after {snapshots[behind].watermark}",
                        hint="run holdfast verify",
                    )
                if attempt > 1:
                    time.sleep(RETRY_PAUSE_S)

    def _catch_up(self, snapshots: dict[Table, Snapshot]) -> Table | None:
        """Brings every tail up to date; returns a table whose stream was purged beyond the snapshot, if any."""
        if self._tail is None:
            return None
        for table, resident in self._resident.items():
            try:
                if not resident.catch_up(snapshots[table], self._tail, self._has_moved):
                    return table
            except UnavailableError:
                # A purge may also pass while the tail reads, and take away what it waits for.
                if not self._has_moved(snapshots[table]):
                    raise
                return table
        return None

    def _has_moved(self, snapshot: Snapshot) -> bool:
        self._lake.refresh(snapshot.table)
        return self._lake.snapshot(snapshot.table) is not snapshot

    def _remember(self, snapshots: dict[Table, Snapshot]) -> Picture:
        tails: dict[Table, Any] = {}
        if self._tail is not None:
            tails = {table: resident.shown() for table, resident in self._resident.items()}
        last = self._last
        if (
            last is None
            or any(last.snapshots[table] is not snapshots[table] for table in TABLES)
            or any(last.tails[table] is not tails[table] for table in tails)
        ):
            last = self._last = Picture(last.number + 1 if last else 1, snapshots, tails)
        return last

    def close(self) -> None:
        """Closes the tail."""
        if self._tail is not None:
            self._tail.close()


class _ResidentTail:
    """The tail rows of one table that are after its watermark."""

    def __init__(self, table: Table, find_known: FindKnown) -> None:
        self._table: Table = table
        self._find_known = find_known
        self._epoch: str | None = None
        self._read_to = 0
        self._rows: list[_TailRow] = []
        self._identities: dict[Identity, int] = {}
        self._shown: Any = arrow_schema(table).empty_table()
        self._shown_rows: list[Row] = []

    def shown(self) -> Any:
        """Returns the rows to show, as an Arrow table; the same object while they are the same."""
        return self._shown

    def catch_up(self, snapshot: Snapshot, tail: Tail, has_moved: Callable[[Snapshot], bool]) -> bool:
        """Reads what is new, drops what is archived; False when the lake has to be read again first."""
        watermark = snapshot.watermark
        if self._epoch is None and watermark is not None:
            self._start(watermark.epoch)
        after = self._known_to(snapshot)
        answer = tail.read(self._table, None if after is None else Position(self._epoch or "", after))
        if answer.epoch != self._epoch:
            # Another life of the stream: what was read of the old one is gone, its archived part is in the lake.
            self._start(answer.epoch)
            after = self._known_to(snapshot)
            answer = tail.read(self._table, Position(answer.epoch, after or 0))
            if answer.epoch != self._epoch:
                return False
        if answer.first_seq > (after or 0) + 1 and (after is not None or has_moved(snapshot)):
            # Purged in between, so archived.  Where this life of the stream begins is not known before its first
            # archiving: then a purge is told from a late beginning by the commit that must come before it.
            return False
        self._extend(snapshot, [row for row in answer.rows if row.seq > (after or 0)])
        self._read_to = max(self._read_to, after or 0, answer.last_seq)
        self._drop(self._archived(snapshot) or 0)
        return True

    def _known_to(self, snapshot: Snapshot) -> int | None:
        archived = self._archived(snapshot)
        return max(archived or 0, self._read_to) if archived is not None or self._read_to else None

    def _start(self, epoch: str) -> None:
        self._epoch = epoch
        self._read_to = 0
        self._rows = []
        self._identities = {}

    def _archived(self, snapshot: Snapshot) -> int | None:
        entry = snapshot.transactions.get(f"{self._table}/{self._epoch}")
        return None if entry is None else entry.version

    def _extend(self, snapshot: Snapshot, rows: Sequence[Row]) -> None:
        fresh = [row for row in rows if not (isinstance(row, ContextRow) and row.form == "touch")]
        candidates = [row for row in fresh if identity_of(row) not in self._identities]
        known = self._find_known(snapshot, candidates) if candidates else set[Identity]()
        for row in candidates:
            identity = identity_of(row)
            # The first of several in this very answer is the one to show.
            if identity not in self._identities:
                self._identities[identity] = row.seq
                self._rows.append(_TailRow(row.seq, identity, None if identity in known else row))

    def _drop(self, archived: int) -> None:
        if self._rows and self._rows[0].seq <= archived:
            for row in self._rows:
                if row.seq <= archived:
                    del self._identities[row.identity]
            self._rows = [row for row in self._rows if row.seq > archived]
        shown = [row.shown for row in self._rows if row.shown is not None]
        if len(shown) != len(self._shown_rows) or (shown and shown[0] is not self._shown_rows[0]):
            self._shown = self._to_arrow(shown)
            self._shown_rows = shown

    def _to_arrow(self, shown: list[Row]) -> Any:
        old = self._shown_rows
        if old and len(shown) > len(old) and shown[0] is old[0]:
            # Appended to: only the new rows are converted.
            more = pa.Table.from_batches([to_batch(self._table, shown[len(old) :])])
            return pa.concat_tables([self._shown, more])
        if not shown:
            return arrow_schema(self._table).empty_table()
        if old and shown[0] is not old[0] and shown[-1] is old[-1]:
            return self._shown.slice(len(old) - len(shown))
        return pa.Table.from_batches([to_batch(self._table, shown)])


class _TailRow(msgspec.Struct, frozen=True):
    seq: int
    identity: Identity
    shown: Row | None


def identity_of(row: Row) -> Identity:
    """Returns what makes two rows of one table the same thing stored twice."""
    if isinstance(row, ContextRow):
        return (row.digest,)
    if isinstance(row, EventRow):
        return (row.namespace, row.id)
    return (row.namespace, row.key, str(row.version))


def identities_of(rows: Iterable[Row]) -> list[Identity]:
    """Returns the identities of some rows, in their order."""
    return [identity_of(row) for row in rows]
