"""Makes a backup of a running system: an image of each stream, then of the lake what belongs to it.

The order makes the whole consistent while everything goes on.  For each stream first its image, then its table at the
newest version that is not ahead of the image: what the image does not hold any more was purged, and purged is only what
a version before had archived.  Events and versions come before contexts, so that whatever they refer to is in what
comes later; dead letters come last, since the archiver buries a message before it moves past it.  A commit made
meanwhile is in the backup whole, or not at all and then its messages are in the image.
"""

from __future__ import annotations

import asyncio
import io
import logging
import secrets
import tarfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.lake.copies import Copies
from holdfast.lake.cut import TableCut, cut_table
from holdfast.lake.lake import Lake
from holdfast.lake.log import FileEntry, parse_commit
from holdfast.lake.log_copies import read_copy
from holdfast.schemas.errors import DataDirectoryError, HoldfastError, UnavailableError
from holdfast.schemas.failpoints import failpoint
from holdfast.schemas.ids import now_ms
from holdfast.streams.stream_images import StreamImage, image_names, take_image
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import STREAM_OF_TABLE
from holdfast.workers.backup.manifest import (
    FileObject,
    Manifest,
    StreamBackup,
    TableBackup,
    plan_retention,
    read_manifests,
    remove_backups,
    write_manifest,
)
from holdfast.workers.backup.pool import UNFINISHED_FILE, ObjectWriter, Pool, Stored

if TYPE_CHECKING:
    from holdfast.schemas.rows import Table
    from holdfast.streams.connection import Connection

logger = logging.getLogger(__name__)

RETENTION_S: Final = 30 * 86_400.0
"""Thirty days."""

_EPOCH_ATTEMPTS: Final = 3
_TABLE_OF_STREAM: Final[dict[str, Table]] = {stream: table for table, stream in STREAM_OF_TABLE.items()}

FindCopy = Callable[[Path], Path | None]


class BackupReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup holds and what it brought; ``removed`` are older ones that retention took away, ``damaged`` files
    of the lake that are not what was committed, and of which there is no sound copy.

    ``stream_seconds`` is how long the images took, by stream.
    """

    id: str
    bytes: int
    new_bytes: int
    new_objects: int
    messages: int
    rows: int
    seconds: float
    stream_seconds: dict[str, float]
    stream_bytes: dict[str, int]
    removed: list[str]
    damaged: list[str]


class _Known(msgspec.Struct, frozen=True):
    """A file of the lake that an earlier backup holds; its name is never used again for another content, but what was
    stored of it may be damaged."""

    table: str
    path: str
    sha256: str
    size: int


class _Journal:
    """The objects that the pool holds of a lake: of earlier backups, and of one that was cut off."""

    def __init__(self, pool: Pool, manifests: list[Manifest]) -> None:
        self._path = pool.directory / UNFINISHED_FILE
        self._by_path: dict[tuple[str, str], _Known] = {}
        self.unfinished: set[str] = set()
        for manifest in manifests:
            for table, backup in manifest.tables.items():
                for file in backup.files:
                    self._by_path[table, file.path] = _Known(table, file.path, file.sha256, file.size)
        for known in self._read_unfinished():
            self._by_path[known.table, known.path] = known
            self.unfinished.add(known.sha256)
        self._file = self._path.open("ab")

    def find(self, table: str, entry: FileEntry) -> _Known | None:
        """Returns what the pool holds of a file, unless it is not what was committed: that was stored damaged."""
        known = self._by_path.get((table, entry.path))
        return known if known is not None and _agrees(known, entry) else None

    def note(self, known: _Known) -> None:
        """Not synced: when the note is lost, the file is copied once more."""
        self._by_path[known.table, known.path] = known
        self.unfinished.add(known.sha256)
        self._file.write(msgspec.json.encode(known) + b"\n")
        self._file.flush()

    def forget(self) -> None:
        """The backup is complete: its manifest says the same."""
        self._path.unlink(missing_ok=True)
        self.unfinished.clear()

    def close(self) -> None:
        self._file.close()

    def _read_unfinished(self) -> Iterator[_Known]:
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                yield msgspec.json.decode(line, type=_Known)
            except msgspec.MsgspecError:
                continue  # torn by a kill


async def make_backup(
    connection: Connection,
    lake: Path,
    directory: Path,
    *,
    retention_s: float = RETENTION_S,
    copies: Path | None = None,
    clock_ms: Callable[[], int] = now_ms,
) -> BackupReport:
    """Makes a backup of a system in a directory of backups, and takes away those older than ``retention_s``.

    Everything acknowledged before the call is in it.  Cut off at any moment, it leaves no backup, and what it had
    copied of the lake need not be copied again.  ``copies`` is where a second copy of the lake is: a damaged file is
    taken from there.
    Raises UnavailableError when another backup is made there or the disk refuses it, IntegrityError when what is
    archived and what the streams hold do not fit together.
    """
    began_ms = clock_ms()
    started = time.perf_counter()
    with _told(directory):
        pool = await asyncio.to_thread(Pool, directory, create=True)
        with pool:
            manifests, damaged = await asyncio.to_thread(read_manifests, directory)
            for what in damaged:
                logger.error("manifest is damaged", extra={"action": "backup_manifest_damaged", "what": what})
            opened = await asyncio.to_thread(Lake.open, lake)
            journal = await asyncio.to_thread(_Journal, pool, manifests)
            try:
                find_copy = None if copies is None else Copies(opened.path, copies).find
                work = _Work(connection, opened, pool, journal, find_copy)
                try:
                    streams, tables = await work.run()
                finally:
                    work.stop()
                manifest = Manifest(
                    id=_new_id(began_ms),
                    began_ms=began_ms,
                    ended_ms=clock_ms(),
                    holdfast=version("holdfast"),
                    streams=streams,
                    tables=tables,
                    new_objects=work.new_objects,
                    new_bytes=work.new_bytes,
                    damaged=work.damaged,
                )
                await asyncio.to_thread(write_manifest, pool, manifest)
                await asyncio.to_thread(journal.forget)
                doomed = plan_retention([*manifests, manifest], now_ms=clock_ms(), retention_s=retention_s)
                await asyncio.to_thread(remove_backups, pool, doomed, unfinished=journal.unfinished)
            finally:
                journal.close()
                opened.close()
    report = BackupReport(
        id=manifest.id,
        bytes=manifest.total_bytes,
        new_bytes=manifest.new_bytes,
        new_objects=manifest.new_objects,
        messages=sum(stream.image.state.messages for stream in streams.values()),
        rows=sum(table.rows for table in tables.values()),
        seconds=round(time.perf_counter() - started, 3),
        stream_seconds=work.stream_seconds,
        stream_bytes={name: stream.size for name, stream in streams.items()},
        removed=[old.id for old in doomed],
        damaged=work.damaged,
    )
    logger.info(
        "backup made",
        extra={"action": "backup_made", "backup": report.id, "bytes": report.bytes, "new_bytes": report.new_bytes},
    )
    return report


class _LogObjects(msgspec.Struct, frozen=True):
    """The log of a table as of its cut, stored."""

    checkpoint: FileObject | None
    commits: FileObject


class _Work:
    """The copying of one backup."""

    def __init__(
        self, connection: Connection, lake: Lake, pool: Pool, journal: _Journal, find_copy: FindCopy | None
    ) -> None:
        self._connection = connection
        self._lake = lake
        self._pool = pool
        self._journal = journal
        self._find_copy = find_copy
        self.new_objects = 0
        self.new_bytes = 0
        self.damaged: list[str] = []
        self.stream_seconds: dict[str, float] = {}
        self._is_stopped = threading.Event()

    def stop(self) -> None:
        """Has the thread that copies end with the file that it is at: a cancel must not wait for all the rest."""
        self._is_stopped.set()

    async def run(self) -> tuple[dict[str, StreamBackup], dict[Table, TableBackup]]:
        streams: dict[str, StreamBackup] = {}
        cuts: dict[Table, tuple[TableCut, _LogObjects]] = {}
        for name in image_names():
            table = _TABLE_OF_STREAM.get(name)
            streams[name], cut = await self._stream(name, table)
            if table is not None and cut is not None:
                # At once: files of the lake stay for a day after they were replaced, checkpoints for an hour.
                cuts[table] = cut, await asyncio.to_thread(self._log, cut)
            failpoint("backup.after_stream")
        tables: dict[Table, TableBackup] = {}
        for table, (cut, log) in cuts.items():
            tables[table] = await asyncio.to_thread(self._table, table, cut, log)
        return streams, tables

    async def _stream(self, name: str, table: Table | None) -> tuple[StreamBackup, TableCut | None]:
        started = time.perf_counter()
        for _ in range(_EPOCH_ATTEMPTS):
            image, stored = await self._image(name)
            cut = None
            if table is not None:
                state = image.state
                cut = await asyncio.to_thread(
                    cut_table,
                    self._lake.table(table),
                    epoch=image.epoch,
                    first_seq=state.first_seq,
                    last_seq=state.last_seq,
                )
            if (await stream_info(self._connection, name)).epoch == image.epoch:
                self._count(stored)
                self.stream_seconds[name] = round(time.perf_counter() - started, 3)
                return StreamBackup(image=image, sha256=stored.sha256, size=stored.size), cut
        raise UnavailableError(f"stream {name} began new lives while it was backed up", hint="see 'holdfast health'")

    async def _image(self, name: str) -> tuple[StreamImage, Stored]:
        with self._pool.writer() as writer:

            async def write(piece: bytes) -> None:
                await asyncio.to_thread(writer.write, piece)

            image = await take_image(self._connection, name, write)
            return image, await asyncio.to_thread(_finish, writer)

    def _log(self, cut: TableCut) -> _LogObjects:
        directory = cut.snapshot.directory
        checkpoint: FileObject | None = None
        if cut.checkpoint is not None:
            stored = self._pool.add_file(directory / cut.checkpoint)
            self._count(stored)
            checkpoint = FileObject(path=str(cut.checkpoint), sha256=stored.sha256, size=stored.size)
        commits = self._pool.add_bytes(_tar(directory, cut.commits))
        self._count(commits)
        return _LogObjects(checkpoint, FileObject(path="log.tar", sha256=commits.sha256, size=commits.size))

    def _table(self, table: Table, cut: TableCut, log: _LogObjects) -> TableBackup:
        directory = cut.snapshot.directory
        found = (self._data_file(table, directory, entry) for entry in cut.snapshot.files.values())
        files = [file for file in found if file is not None]
        if log.checkpoint is not None:
            files.append(log.checkpoint)
        mark = cut.snapshot.watermark
        return TableBackup(
            version=cut.snapshot.version,
            epoch=None if mark is None else mark.epoch,
            seq=0 if mark is None else mark.seq,
            rows=sum(entry.rows for entry in cut.snapshot.files.values()),
            files=files,
            log=log.commits,
        )

    def _data_file(self, table: Table, directory: Path, entry: FileEntry) -> FileObject | None:
        """Stores a Parquet file, or takes an earlier backup's that is what was committed.  A damaged one is taken from
        its copy; without one, as it is, and told: by each backup until it is mended."""
        if self._is_stopped.is_set():
            raise UnavailableError("the backup was cancelled")
        known = self._journal.find(table, entry)
        if known is not None and self._pool.has(known.sha256, known.size):
            return FileObject(path=known.path, sha256=known.sha256, size=known.size)
        source = directory / entry.path
        stored = self._add(source)
        if stored is None or not _agrees(stored, entry):
            copy = None if self._find_copy is None else self._find_copy(source)
            copied = None if copy is None else self._add(copy)
            if copied is None or not _agrees(copied, entry):
                self.damaged.append(f"{table}/{entry.path}")
                logger.error("file of the lake is damaged", extra={"action": "backup_damaged", "path": str(source)})
            else:
                stored = copied
        if stored is None:
            return None
        self._count(stored)
        self._journal.note(_Known(table, entry.path, stored.sha256, stored.size))
        return FileObject(path=entry.path, sha256=stored.sha256, size=stored.size)

    def _add(self, source: Path) -> Stored | None:
        try:
            return self._pool.add_file(source)
        except FileNotFoundError:
            return None

    def _count(self, stored: Stored) -> None:
        if stored.is_new:
            self.new_objects += 1
            self.new_bytes += stored.size


def _finish(writer: ObjectWriter) -> Stored:
    return writer.finish()


def _agrees(stored: Stored | _Known, entry: FileEntry) -> bool:
    """Whether an object is what the commit says of the file; files of earlier releases have a size alone."""
    if entry.checksums is not None and entry.checksums.sha256 != stored.sha256:
        return False
    return stored.size == entry.size_bytes


def _tar(directory: Path, paths: list[Path]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for path in paths:
            raw = _commit_bytes(directory, path)
            entry = tarfile.TarInfo(str(path))
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return content.getvalue()


def _commit_bytes(directory: Path, path: Path) -> bytes:
    raw = (directory / path).read_bytes()
    number = int(path.stem)
    try:
        parse_commit(number, raw)
    except (ValueError, TypeError, AttributeError, RecursionError):
        # It was read from its copy a moment ago, or there would be no cut.
        return read_copy(directory, number) or raw
    return raw


def _new_id(at_ms: int) -> str:
    moment = datetime.fromtimestamp(at_ms / 1000, UTC)
    return f"{moment:%Y%m%dT%H%M%S}.{at_ms % 1000:03d}Z-{secrets.token_hex(3)}"


@contextmanager
def _told(directory: Path) -> Generator[None]:
    """Says of the operating system's refusals which directory they are about."""
    try:
        yield
    except HoldfastError:
        raise
    except PermissionError as error:
        raise DataDirectoryError(
            f"{error.filename or directory} cannot be used: {(error.strerror or str(error)).lower()}",
            field="directory",
            hint="make it writable, or choose another directory",
        ) from error
    except OSError as error:
        raise UnavailableError(
            f"the backup in {directory} was not made: {(error.strerror or str(error)).lower()}",
            hint="free space or mend the disk, then try again: what was copied need not be copied again",
        ) from error
