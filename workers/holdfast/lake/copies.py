"""A second copy of the lake in another directory, on another disk: each file copied, synced and verified.

The copy is a lake itself: the same tables, files and logs, so that ``--data`` of its parent, DuckDB or any Delta reader
can open it.  Data files are copied before the commits that name them.  What is purged from the streams is purged only
once the copy has it (:meth:`Copies.require`): of every archived row there are two copies at any moment, in the stream
and the lake, then in the lake and its copy.

While the other disk is away nothing is purged; archiving goes on, and the streams grow.  That is told, and ends by
itself when the disk is back.

What the lake removes (files that were merged, commits and checkpoints of its log) is removed from the copy after it,
but for what the copy itself is made of, and needs to be opened.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.lake.checksums import sha256_of
from holdfast.lake.copy_sums import CopiedFile, CopySums
from holdfast.lake.files import fsync_directory, make_directory, write_durably
from holdfast.lake.log import (
    LOG_DIRECTORY,
    FileEntry,
    Snapshot,
    checkpoint_path,
    commit_path,
    list_checkpoints,
    list_versions,
    load_snapshot,
)
from holdfast.lake.log_cleaning import follow_cleaning
from holdfast.lake.log_copies import checkpoint_is_sound
from holdfast.lake.log_repair import LAST_CHECKPOINT
from holdfast.schemas.errors import ConfigurationError, IntegrityError, UnavailableError
from holdfast.schemas.failpoints import failpoint
from holdfast.schemas.problems import Problem
from holdfast.schemas.rows import TABLES, Table

if TYPE_CHECKING:
    from holdfast.lake.lake import Lake
    from holdfast.lake.table import LakeTable

logger = logging.getLogger(__name__)

MARKER: Final = "holdfast-copy.json"
"""In the copy: whose copy it is."""
RECORD: Final = "_copy.json"
"""In the lake: which copy it has.  An empty mount point is not mistaken for it."""
SUMS: Final = "_sums.ndjson"
TURN_S: Final = 5.0
"""How long one call copies at most: an archiver that begins with a large lake goes on with its work in between."""

_TEMPORARY: Final = "_tmp"
_PIECE: Final = 1024 * 1024


class CopyReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one call copied; ``behind`` are files that are not copied yet."""

    files: int = 0
    bytes: int = 0
    behind: int = 0


class _Mark(msgspec.Struct, frozen=True):
    id: str


class _LogMark(msgspec.Struct, frozen=True):
    """How far the log is copied, and the hint of the newest checkpoint that there was."""

    snapshot: Snapshot
    hint: bytes | None


class Copies:
    """The copy of one lake.  Every call blocks; safe to use from several threads, and from one process that copies
    beside others that only :meth:`find`."""

    def __init__(self, lake: Path, directory: Path) -> None:
        self.lake = lake
        self.directory = directory
        self._lock = threading.RLock()
        self._sums = {name: CopySums(directory / name / SUMS) for name in TABLES}
        self._logged: dict[Table, _LogMark] = {}
        self._next_prune: dict[Table, float] = {}

    def catch_up(self, table: LakeTable, *, turn_s: float = TURN_S) -> CopyReport:
        """Copies what a table has and its copy has not, for ``turn_s`` seconds at most.

        Raises UnavailableError when the other disk is away, full or refuses a write, IntegrityError when a file of the
        lake is not what was committed: it is not copied.
        """
        deadline = time.monotonic() + turn_s
        with self._lock:
            try:
                self._claim()
                snapshot = table.refresh()
                known = self._known(table.name)
                missing = [entry for entry in snapshot.files.values() if not self._has(table.name, entry, known)]
                files = size = 0
                for number, entry in enumerate(missing):
                    if time.monotonic() >= deadline:
                        return CopyReport(files=files, bytes=size, behind=len(missing) - number)
                    self._sums[table.name].add(self._copy_data(table.name, snapshot.directory, entry))
                    files += 1
                    size += entry.size_bytes
                failpoint("copies.before_log")
                self._copy_log(snapshot)
                return CopyReport(files=files, bytes=size)
            except OSError as error:
                raise UnavailableError(
                    f"the copy of the lake in {self.directory} cannot be written: {error.strerror or error}",
                    hint="mount or mend that disk; nothing is purged meanwhile, and the streams grow",
                ) from error

    def require(self, table: LakeTable, version: int) -> None:
        """Raises UnavailableError unless the copy has a table up to a version, once it was given a turn to catch up."""
        report = self.catch_up(table)
        logged = self._logged.get(table.name)
        if report.behind or logged is None or logged.snapshot.version < version:
            raise UnavailableError(
                f"the copy of {table.name} in {self.directory} is {report.behind} files behind",
                hint="nothing: it catches up, and purging goes on then",
            )

    def find(self, path: Path) -> Path | None:
        """Returns the copy of a data file of the lake, read and found to be what was copied; None without one."""
        try:
            name, relative = self._place(path)
            known = self._known(name).get(relative)
            copy = self.directory / name / relative
            if known is None or copy.stat().st_size != known.size or sha256_of(copy) != known.sha256:
                return None
        except (OSError, ValueError, UnavailableError):
            return None
        return copy

    def heal(self, path: Path) -> bool:
        """Replaces a damaged or missing data file of the lake by its copy, in one step; False without a sound copy."""
        copy = self.find(path)
        if copy is None:
            return False
        make_directory(path.parent)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            _copy(copy, temporary)
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(path.parent)
        logger.warning("file of the lake healed from its copy", extra={"action": "healed", "path": str(path)})
        return True

    def prune(self, table: LakeTable, *, every_s: float = 0.0) -> int:
        """Removes from the copy what the lake does not have any more, of data and of the log; returns how many files.

        Does nothing, and returns 0, before ``every_s`` seconds have gone by since the last time.  Raises
        UnavailableError when the other disk is away, OSError when it refuses.
        """
        with self._lock:
            now = time.monotonic()
            if now < self._next_prune.get(table.name, now):
                return 0
            self._next_prune[table.name] = now + every_s
            self._claim()
            files = table.refresh().files
            target = self.directory / table.name
            gone = [
                path for path in self._known(table.name) if path not in files and not (table.directory / path).exists()
            ]
            # A copy that is days behind still consists of what the lake has merged and removed.
            own = self._stands_at(table.name).files if gone else {}
            gone = [path for path in gone if path not in own]
            for path in gone:
                (target / path).unlink(missing_ok=True)
            # Before their lines go: a file that a power cut brought back would be nobody's.
            for folder in {(target / path).parent for path in gone}:
                if folder.is_dir():
                    fsync_directory(folder)
            failpoint("copies.before_sums")
            self._sums[table.name].forget(gone)
            return len(gone) + self._prune_log(table)

    def _stands_at(self, table: Table) -> Snapshot:
        """Returns the version of the copy."""
        logged = self._logged.get(table)
        snapshot = load_snapshot(table, self.directory / table) if logged is None else logged.snapshot
        if snapshot is None:
            raise UnavailableError(
                f"the copy of {table} in {self.directory} has no log yet", hint="nothing: it catches up"
            )
        return snapshot

    def _prune_log(self, table: LakeTable) -> int:
        target = self.directory / table.name
        removed = follow_cleaning(table.directory, target)
        logged = self._logged.get(table.name)
        held = {*list_versions(target)}
        if logged is not None and any(
            number <= logged.snapshot.version and number not in held for number in list_versions(table.directory)
        ):
            # Somebody took commits out of the copy: the next turn looks at all of them.
            del self._logged[table.name]
        return len(removed)

    def compare(self, lake: Lake) -> tuple[int, list[Problem]]:
        """Reads every data file of the lake's copy; returns how many, and what is missing or damaged."""
        problems: list[Problem] = []
        count = 0
        for name in TABLES:
            for entry in lake.files(name):
                count += 1
                if self.find(lake.table(name).directory / entry.path) is None:
                    problems.append(
                        Problem(
                            invariant="I4",
                            object=f"{self.directory}/{name}/{entry.path}",
                            what="the copy of this file is missing or damaged",
                            next_step="remove it if it is there: the archiver copies it anew",
                        )
                    )
        return count, problems

    def _claim(self) -> None:
        """Checks that the directory is this lake's copy; a lake without one begins one in an empty directory."""
        record, marker = self.lake / RECORD, self.directory / MARKER
        if record.exists():
            mark = msgspec.json.decode(record.read_bytes(), type=_Mark)
            try:
                found = msgspec.json.decode(marker.read_bytes(), type=_Mark)
            except (OSError, msgspec.MsgspecError):
                found = None
            if found != mark:
                raise UnavailableError(
                    f"{self.directory} does not hold the copy of this lake",
                    hint=f"is its disk mounted? Nothing is purged meanwhile. To begin a new copy, remove {record}",
                )
            return
        make_directory(self.directory)
        if any(self.directory.iterdir()) and not marker.exists():
            raise ConfigurationError(
                f"copy_directory {self.directory} is not empty and holds no copy of a lake",
                field="copy_directory",
                hint="choose a new or an empty directory on another disk",
            )
        if not marker.exists():
            write_durably(marker, msgspec.json.encode(_Mark(uuid.uuid4().hex)))
        # A copy whose lake forgot it is compared file by file, like any other.
        write_durably(record, marker.read_bytes())

    def _known(self, table: Table) -> dict[str, CopiedFile]:
        with self._lock:
            return dict(self._sums[table].files())

    def _has(self, table: Table, entry: FileEntry, copied: Mapping[str, CopiedFile]) -> bool:
        known = copied.get(entry.path)
        if known is None or known.size != entry.size_bytes:
            return False
        if entry.checksums is not None and known.sha256 != entry.checksums.sha256:
            return False
        try:
            return (self.directory / table / entry.path).stat().st_size == known.size
        except FileNotFoundError:
            return False

    def _copy_data(self, table: Table, source_directory: Path, entry: FileEntry) -> CopiedFile:
        target = self.directory / table / entry.path
        temporary = self.directory / table / _TEMPORARY / target.name
        make_directory(temporary.parent)
        make_directory(target.parent)
        try:
            size, sha256 = _copy(source_directory / entry.path, temporary)
        except FileNotFoundError as error:
            raise IntegrityError(
                f"{error.filename} is part of the lake and is gone", hint="run holdfast verify"
            ) from error
        expected = sha256 if entry.checksums is None else entry.checksums.sha256
        if size != entry.size_bytes or sha256 != expected:
            temporary.unlink()
            raise IntegrityError(
                f"{source_directory / entry.path} is not what was committed: it is not copied",
                hint="'holdfast verify' tells which rows it held; nothing is purged until it is healed",
            )
        if sha256_of(temporary) != sha256:
            raise UnavailableError(
                f"{temporary} does not read back as it was written", hint="check the disk of copy_directory"
            )
        failpoint("copies.before_rename")
        temporary.rename(target)
        fsync_directory(target.parent)
        return CopiedFile(entry.path, size, sha256)

    def _copy_log(self, snapshot: Snapshot) -> None:
        """Copies the commits and checkpoints that the copy has not, up to a version.

        The first time in a process every commit is compared; from then on only what is new is looked at.
        """
        source, target = snapshot.directory, self.directory / snapshot.table
        make_directory(target / LOG_DIRECTORY)
        logged = self._logged.get(snapshot.table)
        if logged is not None and not commit_path(target, logged.snapshot.version).exists():
            logged = None  # an older state of the copy was put in its place
        # Read before the checkpoints are listed: one that is written meanwhile is found the next time.
        hint = _read_hint(source)
        if logged is not None and (logged.snapshot.version, logged.hint) == (snapshot.version, hint or b""):
            return
        if logged is None:
            wanted = [number for number in list_versions(source) if number <= snapshot.version]
        else:
            wanted = [*range(logged.snapshot.version + 1, snapshot.version + 1)]
        for number in wanted:
            # One may be there that is another: a torn commit is set aside, and another one takes its number.
            if not _same(commit_path(source, number), commit_path(target, number)):
                _replace(commit_path(source, number), commit_path(target, number))
        is_complete = True
        if logged is None or hint is None or hint != logged.hint:
            is_complete = self._copy_checkpoints(snapshot, target)
        fsync_directory(target / LOG_DIRECTORY)
        self._logged[snapshot.table] = _LogMark(snapshot, hint if is_complete else None)

    def _copy_checkpoints(self, snapshot: Snapshot, target: Path) -> bool:
        """Copies the checkpoints that the copy has not; returns whether it has them all now."""
        is_complete = True
        for number in list_checkpoints(snapshot.directory):
            source, path = checkpoint_path(snapshot.directory, number), checkpoint_path(target, number)
            if path.exists():
                continue
            try:
                is_sound = number <= snapshot.version and checkpoint_is_sound(snapshot.directory, number, source)
            except FileNotFoundError:
                continue  # cleaned away meanwhile
            if is_sound:
                _replace(source, path)
            else:
                is_complete = False  # one of a later version, or damaged: looked at again the next time
        return is_complete

    def _place(self, path: Path) -> tuple[Table, str]:
        relative = path.relative_to(self.lake)
        for name in TABLES:
            if relative.parts[0] == name:
                return name, str(Path(*relative.parts[1:]))
        raise ValueError(f"{path} is in no table")


def _copy(source: Path, target: Path) -> tuple[int, str]:
    """Copies a file and makes it durable; returns its size and sha256.  A file that is there is replaced."""
    found = hashlib.sha256()
    size = 0
    with source.open("rb") as reader, target.open("wb") as writer:
        while piece := reader.read(_PIECE):
            found.update(piece)
            writer.write(piece)
            size += len(piece)
        writer.flush()
        os.fsync(writer.fileno())
        # What is read back next shall come from the disk.
        os.posix_fadvise(writer.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return size, found.hexdigest()


def _read_hint(directory: Path) -> bytes | None:
    """Returns what tells, without a listing, whether there is a new checkpoint; None when nothing does."""
    try:
        return (directory / LOG_DIRECTORY / LAST_CHECKPOINT).read_bytes()
    except FileNotFoundError:
        return None


def _same(one: Path, other: Path) -> bool:
    try:
        return one.read_bytes() == other.read_bytes()
    except FileNotFoundError:
        return False


def _replace(source: Path, target: Path) -> None:
    """Copies a file of the log so that it is there whole or not at all; one that vanished meanwhile is left out."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        _copy(source, temporary)
        temporary.rename(target)
    except FileNotFoundError:
        if source.exists():
            raise
    finally:
        temporary.unlink(missing_ok=True)
