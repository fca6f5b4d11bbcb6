"""The scrub: reads every file of a lake again, slowly, and compares it with what was written.

Bits rot where nobody reads.  One pass compares the SHA-256 of every data file, mends what is damaged of the log, puts
damaged files into quarantine, heals them from the second copy where there is one, and takes files out of quarantine
that are sound again.  How far a pass has come is kept beside the lake, so that a restart goes on from there.
"""

from __future__ import annotations

import logging
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.lake.checksums import Damage, find_damage, sha256_of, whole_damage
from holdfast.lake.commit import repair_checkpoints
from holdfast.lake.log_repair import repair_log
from holdfast.lake.salvage import name_rows
from holdfast.schemas.errors import UnavailableError
from holdfast.schemas.ids import iso_from_ms
from holdfast.schemas.rows import TABLES, Table

if TYPE_CHECKING:
    from holdfast.lake.lake import Lake
    from holdfast.lake.log import FileEntry
    from holdfast.lake.table import LakeTable

logger = logging.getLogger(__name__)

FILE: Final = ".scrub.json"


class ScrubState(msgspec.Struct, kw_only=True):
    """How far a pass has come.  ``after`` is the last file compared, as ``<table>/<path>``; None between passes."""

    after: str | None = None
    files: int = 0
    bytes: int = 0
    started_ms: int = 0
    last_full_pass_ms: int | None = None
    v: int = 1


class Scrub:
    """The scrub of one lake, for the process that has it as its duty.  Every call blocks."""

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._path = lake.path / FILE
        self._state = _read_state(self._path)

    def _write(self) -> None:
        temporary = self._path.with_name(f"{FILE}.{uuid.uuid4().hex}")
        try:
            temporary.write_bytes(msgspec.json.encode(self._state))
            temporary.replace(self._path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            logger.warning("scrub could not keep its place", extra={"action": "scrub_failed", "error": str(error)})

    def is_due(self, at_ms: int, interval_s: float) -> bool:
        """Whether a pass is under way, or the last one began so long ago that the next is due.

        Or in a time to come: the clock was ahead then.
        """
        started_ms = self._state.started_ms
        return self._state.after is not None or not started_ms <= at_ms < started_ms + interval_s * 1000

    def step(self, most_bytes: int, *, at_ms: int) -> int:
        """Compares the next files, up to about ``most_bytes``, beginning a pass if none is under way; returns how many.

        0 when the pass has ended.  Raises UnavailableError when the disk does not answer.
        """
        if self._state.after is None:
            self._state = ScrubState(after="", started_ms=at_ms, last_full_pass_ms=self._state.last_full_pass_ms)
            self.mend_logs()
        self._lake.refresh()
        left = self._files()
        size = count = 0
        for key, table, entry in left:
            if count and size + entry.size_bytes > most_bytes:
                break
            self.check(self._lake.table(table), entry)
            self._state.after = key
            self._state.files += 1
            self._state.bytes += entry.size_bytes
            size += entry.size_bytes
            count += 1
        if count == len(left):
            self.recheck_quarantine()
            self._state.after, self._state.last_full_pass_ms = None, at_ms
        self._write()
        return count if self._state.after is not None else 0

    def _files(self) -> list[tuple[str, Table, FileEntry]]:
        """The files after the place, in the order of their names: one that is added meanwhile may wait for the next."""
        every: list[tuple[str, Table, FileEntry]] = sorted(
            (f"{table}/{entry.path}", table, entry) for table in TABLES for entry in self._lake.files(table)
        )
        return [item for item in every if item[0] > (self._state.after or "")]

    def mend_logs(self) -> list[str]:
        """Mends what is damaged of the tables' logs; returns the commits concerned."""
        mended: list[str] = []
        for table in TABLES:
            directory = self._lake.table(table).directory
            repair_checkpoints(table, directory)
            mended += [f"{table} {version}" for version in repair_log(directory)]
        return mended

    def check(self, table: LakeTable, entry: FileEntry) -> Damage | None:
        """Compares one file, whole; damage is recorded, and healed from the copy if that is sound."""
        damage = damage_of(table.directory, entry)
        if damage is None:
            table.quarantine.remove(entry.path)
            return None
        path = table.directory / entry.path
        if self._lake.copies is not None and self._lake.copies.heal(path) and damage_of(table.directory, entry) is None:
            table.quarantine.remove(entry.path)
            return None
        if entry.path in table.refresh().files:
            table.quarantine.add(entry, damage, name_rows(table.name, table.directory, entry, damage))
        return damage

    def recheck_quarantine(self) -> int:
        """Looks at every file in quarantine again; returns how many are still damaged."""
        damaged = 0
        for name in TABLES:
            table = self._lake.table(name)
            snapshot = table.refresh()
            for path in list(table.quarantine.files()):
                entry = snapshot.files.get(path)
                if entry is None:
                    table.quarantine.remove(path)  # healed by another file, or given up
                elif self.check(table, entry) is not None:
                    damaged += 1
        return damaged

    def progress(self) -> dict[str, Any]:
        """Returns what ``stats`` shows."""
        return _told(self._lake, self._state)


def scrub_progress(lake: Lake) -> dict[str, Any]:
    """Returns how far the scrub of a lake is, whichever process does it: what ``stats`` shows."""
    return _told(lake, _read_state(lake.path / FILE))


def _told(lake: Lake, state: ScrubState) -> dict[str, Any]:
    """``files`` and ``bytes`` are of the pass under way, or of the last one."""
    return {
        "files": state.files,
        "files_total": sum(len(lake.files(table)) for table in TABLES),
        "bytes": state.bytes,
        "last_full_pass": None if state.last_full_pass_ms is None else iso_from_ms(state.last_full_pass_ms),
        "damaged": len(lake.problems()),
    }


def _read_state(path: Path) -> ScrubState:
    try:
        return msgspec.json.decode(path.read_bytes(), type=ScrubState)
    except (OSError, ValueError):
        return ScrubState()  # nothing is lost by it but the place


def damage_of(directory: Path, entry: FileEntry) -> Damage | None:
    """Compares a file with both its checksums, reading it again whatever was read before."""
    damage = find_damage(directory, entry, again=True)
    if damage is not None or entry.checksums is None:
        return damage
    try:
        actual = sha256_of(directory / entry.path)
    except FileNotFoundError:
        return whole_damage(entry, "the file is missing")
    except OSError as error:
        raise UnavailableError(f"{directory / entry.path} cannot be read: {error}", hint="check the disk") from error
    return None if actual == entry.checksums.sha256 else whole_damage(entry, "its SHA-256 is not what was written")
