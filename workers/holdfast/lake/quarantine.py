"""Which files of a table are known to be damaged: a record for each, beside the table.

``<table>/_quarantine/<file>.json`` says what is wrong with a file and which rows cannot be read for it.  The file
itself stays where it is and part of the table: whatever of it can be believed is served, and asking for the rest
raises DamagedError.  A record whose file has left the table, because it was healed or given up, counts for nothing.

Whoever works on the lake and meets damage records it; readers without write access are told just the same.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.lake.checksums import Damage, RowRange
from holdfast.lake.files import make_directory, write_durably
from holdfast.schemas.errors import DamagedError
from holdfast.schemas.ids import now_ms
from holdfast.schemas.problems import Problem

if TYPE_CHECKING:
    from holdfast.lake.log import FileEntry, Snapshot

logger = logging.getLogger(__name__)

DIRECTORY: Final = "_quarantine"
VERSION: Final = 1
NAMED_ROWS: Final = 1_000
"""Most identities that a record lists."""

HINT: Final = (
    "'holdfast verify --deep' names the rows; the janitor heals the file from the streams or a second copy if these "
    "still hold them, else restore it from a backup"
)


class QuarantineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One damaged file, as it is kept.  ``rows`` are the identities that could be made out: references, event ids, or
    names of keys with their version."""

    path: str
    what: str
    epoch: str
    groups: tuple[int, ...] | None
    ranges: tuple[RowRange, ...]
    found_at_ms: int
    rows: tuple[str, ...] = ()
    v: int = VERSION

    def damage(self) -> Damage:
        """Returns what is wrong with the file."""
        return Damage(path=self.path, what=self.what, epoch=self.epoch, groups=self.groups, ranges=self.ranges)


_RECORD: Final = msgspec.json.Decoder(QuarantineRecord)


class Quarantine:
    """The records of one table.  Reading costs one ``stat`` while nothing changes."""

    def __init__(self, table_directory: Path) -> None:
        self._table = table_directory
        self._directory = table_directory / DIRECTORY
        self._seen: tuple[int, int] | None = None
        self._records: dict[str, QuarantineRecord] = {}

    def files(self) -> dict[str, QuarantineRecord]:
        """Returns the records by the path of their file; also of files that have left the table since."""
        try:
            stat = self._directory.stat()
        except OSError:
            self._seen, self._records = None, {}
            return self._records
        seen = (stat.st_mtime_ns, stat.st_ino)
        if seen != self._seen:
            records = [self._read(path) for path in sorted(self._directory.glob("*.json"))]
            self._records = {record.path: record for record in records if record is not None}
            self._seen = seen
        return self._records

    def of(self, snapshot: Snapshot) -> dict[str, QuarantineRecord]:
        """Returns the records of files that are part of a version of the table."""
        return {path: record for path, record in self.files().items() if path in snapshot.files}

    def _read(self, path: Path) -> QuarantineRecord | None:
        try:
            return _RECORD.decode(path.read_bytes())
        except (OSError, ValueError) as error:
            logger.warning(
                "a record of quarantine cannot be read",
                extra={"action": "quarantine_unreadable", "path": str(path), "error": str(error)},
            )
            return None

    def add(self, entry: FileEntry, damage: Damage, rows: tuple[str, ...] = ()) -> QuarantineRecord:
        """Records a damaged file, durably; what was recorded of it before is replaced when more is known now."""
        known = self.files().get(entry.path)
        if known is not None and (known.groups, known.ranges) == (damage.groups, damage.ranges) and not rows:
            return known
        record = QuarantineRecord(
            path=damage.path,
            what=damage.what,
            epoch=damage.epoch,
            groups=damage.groups,
            ranges=damage.ranges,
            found_at_ms=known.found_at_ms if known else now_ms(),
            rows=rows[:NAMED_ROWS] or (known.rows if known else ()),
        )
        target = self._directory / f"{Path(entry.path).name}.json"
        logger.error(
            "a file of the lake is damaged",
            extra={"action": "file_damaged", "path": str(self._table / entry.path), "what": damage.describe()},
        )
        try:
            make_directory(self._directory)
            write_durably(target, msgspec.json.encode(record))
        except OSError as error:
            logger.warning(
                "a damaged file could not be recorded",
                extra={"action": "quarantine_failed", "path": str(target), "error": str(error)},
            )
        self._seen = None
        return record

    def remove(self, path: str) -> None:
        """Forgets a file that is healed, or has left the table."""
        (self._directory / f"{Path(path).name}.json").unlink(missing_ok=True)
        self._seen = None


def damaged_error(directory: Path, damage: Damage) -> DamagedError:
    """Returns the error for whoever asks for a row of a damaged file."""
    return DamagedError(
        f"{directory / damage.path} is damaged: {damage.describe()}",
        file=str(directory / damage.path),
        rows=damage.rows,
        first_seq=min(span.first_seq for span in damage.ranges),
        last_seq=max(span.last_seq for span in damage.ranges),
        hint=HINT,
    )


def problem_of(directory: Path, record: QuarantineRecord) -> Problem:
    """Returns what ``health`` tells of a damaged file."""
    what = record.damage().describe()
    if record.rows:
        more = "" if len(record.rows) >= record.damage().rows else ", …"
        what += f" ({', '.join(record.rows[:10])}{', …' if len(record.rows) > 10 else more})"
    return Problem(invariant="I4", object=str(directory / record.path), what=what, next_step=HINT)
