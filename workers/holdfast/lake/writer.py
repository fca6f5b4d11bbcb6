"""Rows to durable Parquet files that nobody sees yet.

A file is written under a temporary name in ``_tmp``, fsynced, opened again and counted, renamed into its partition
and made durable there.  Only a commit of the Delta log makes it part of the table: before that it is an orphan, which
readers never see and :func:`holdfast.lake.compaction.vacuum` removes.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import pyarrow.parquet as pq
from deltalake.transaction import AddAction

from holdfast.lake.checksums import compute_checksums
from holdfast.lake.columns import (
    BODY_BYTES_PER_GROUP,
    COMPACTED_ROWS_PER_GROUP,
    ROWS_PER_GROUP,
    arrow_schema,
    body_bytes,
    day_of,
    parquet_options,
    to_batch,
)
from holdfast.lake.files import fsync_directory, make_directory
from holdfast.lake.log import Checksums, FileEntry, Snapshot
from holdfast.schemas.errors import FenceError, IntegrityError
from holdfast.schemas.failpoints import failpoint
from holdfast.schemas.ids import iso_from_ms, now_ms
from holdfast.schemas.rows import ContextRow, Row, Table

TEMPORARY: Final = "_tmp"
"""Folder for files being written, inside the table: a rename must not cross file systems.  Delta readers ignore
names that begin with an underscore."""

_MS_PER_DAY: Final = 86_400_000


class WrittenFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file in its place, durable, not yet committed."""

    entry: FileEntry
    min_stored_ms: int
    max_stored_ms: int
    checksums: Checksums

    def add_action(self, *, data_change: bool = True) -> AddAction:
        """Returns the action that makes the file part of the table."""
        entry = self.entry
        stats = {
            "numRecords": entry.rows,
            "minValues": {
                "epoch": entry.epoch,
                "stream_seq": entry.min_seq,
                "stored_at": iso_from_ms(self.min_stored_ms).removesuffix("Z"),
            },
            "maxValues": {
                "epoch": entry.epoch,
                "stream_seq": entry.max_seq,
                "stored_at": iso_from_ms(self.max_stored_ms).removesuffix("Z"),
            },
            "nullCount": {"stream_seq": 0, "created_at": entry.rows - entry.contexts},
            "holdfast": {"sha256": self.checksums.sha256, "crc32": self.checksums.parts},
        }
        return AddAction(
            path=entry.path,
            size=entry.size_bytes,
            partition_values={"day": entry.day},
            modification_time=entry.modified_ms,
            data_change=data_change,
            stats=msgspec.json.encode(stats).decode(),
        )


class FileWriter:
    """Writes one Parquet file of one table, day and epoch; rows in ascending sequence.

    ``compacted`` files are compressed harder, over larger row groups.

    Use as a context manager: leaving it with an exception removes what was written.  ``finish`` returns the file in its
    place; a process killed on the way leaves an orphan at most.
    """

    def __init__(self, table: Table, directory: Path, day: str, epoch: str, *, compacted: bool = False) -> None:
        self._table: Table = table
        self._directory = directory
        self._day = day
        self._epoch = epoch
        self._name = f"part-{uuid.uuid4()}.parquet"
        self._temporary = directory / TEMPORARY / self._name
        make_directory(self._temporary.parent)
        # The sink is ours, so that the fsync is on the descriptor that was written.
        self._sink = self._temporary.open("xb")
        options = parquet_options(table, compacted=compacted)
        self._parquet: Any = pq.ParquetWriter(self._sink, arrow_schema(table), **options)
        self._rows = 0
        self._contexts = 0
        self._seqs: tuple[int, int] | None = None
        self._times: tuple[int, int] | None = None
        self._placed: Path | None = None

    @property
    def size_bytes(self) -> int:
        """How many bytes have been written so far."""
        return self._sink.tell()

    def write_group(self, rows: Sequence[Row]) -> None:
        """Writes rows as one row group."""
        self._account(
            len(rows),
            sum(1 for row in rows if not isinstance(row, ContextRow) or row.form in ("plain", "manifest")),
            (rows[0].seq, rows[-1].seq),
            (min(row.stored_at_ms for row in rows), max(row.stored_at_ms for row in rows)),
        )
        self._parquet.write_batch(to_batch(self._table, rows), row_group_size=ROWS_PER_GROUP)

    def copy_group(self, batch: Any) -> None:
        """Writes an Arrow table of this schema as one row group, as it is."""
        seqs: list[int] = batch.column("stream_seq").to_pylist()
        times: list[int] = batch.column("stored_at").cast("int64").to_pylist()
        brought = batch.num_rows
        if self._table == "contexts":
            brought -= batch.column("created_at").null_count
        self._account(batch.num_rows, brought, (seqs[0], seqs[-1]), (min(times) // 1000, max(times) // 1000))
        self._parquet.write_table(batch, row_group_size=COMPACTED_ROWS_PER_GROUP)

    def _account(self, rows: int, contexts: int, seqs: tuple[int, int], times: tuple[int, int]) -> None:
        self._rows += rows
        self._contexts += contexts
        self._seqs = (min(self._seqs[0], seqs[0]), max(self._seqs[1], seqs[1])) if self._seqs else seqs
        self._times = (min(self._times[0], times[0]), max(self._times[1], times[1])) if self._times else times

    def finish(self) -> WrittenFile:
        """Makes the file durable under its final name and returns it."""
        assert self._seqs is not None and self._times is not None, "a file has at least one row"
        self._parquet.close()
        self._sink.flush()
        failpoint("lake.before_parquet_fsync")
        os.fsync(self._sink.fileno())
        self._sink.close()
        failpoint("lake.after_parquet_fsync")
        partition = self._directory / f"day={self._day}"
        try:
            checksums = self._verify()
            make_directory(partition)
            failpoint("lake.before_rename")
            # The name is a fresh UUID, so the rename replaces nothing.
            self._placed = self._temporary.rename(partition / self._name)
            fsync_directory(partition)
            # Another process may have made the partition, and died before its name was durable.
            fsync_directory(self._directory)
            failpoint("lake.after_rename")
            size_bytes = self._placed.stat().st_size
        except FileNotFoundError as error:
            # Who is stopped for a day over a file finds it removed as an orphan.
            raise FenceError(
                f"{self._temporary} was removed before it was finished", hint="nothing was committed; write it again"
            ) from error
        entry = FileEntry(
            path=f"day={self._day}/{self._name}",
            day=self._day,
            size_bytes=size_bytes,
            rows=self._rows,
            contexts=self._contexts,
            epoch=self._epoch,
            min_seq=self._seqs[0],
            max_seq=self._seqs[1],
            modified_ms=now_ms(),
            checksums=checksums,
        )
        return WrittenFile(entry=entry, min_stored_ms=self._times[0], max_stored_ms=self._times[1], checksums=checksums)

    def _verify(self) -> Checksums:
        found: int = pq.read_metadata(self._temporary).num_rows
        if found != self._rows:
            raise IntegrityError(
                f"{self._temporary} holds {found} rows, {self._rows} were written",
                hint="check the disk; nothing was committed",
            )
        return compute_checksums(self._temporary)

    def discard(self) -> None:
        """Removes the file, wherever it is by now; it must not have been committed."""
        # Marked as closed, not closed: that would write a footer, perhaps to a full disk.
        self._parquet.is_open = False
        self._sink.close()
        self._temporary.unlink(missing_ok=True)
        if self._placed is not None:
            self._placed.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()


class RowsWriter:
    """Writes rows, in ascending sequence, to one file for each day they were stored on, as they come.

    Holds one row group for each day in memory.  After an error of :meth:`write` or :meth:`finish`, and after
    :meth:`discard`, nothing is left behind, and nothing more can be written.
    """

    def __init__(self, table: Table, directory: Path, *, epoch: str) -> None:
        self._table: Table = table
        self._directory = directory
        self._epoch = epoch
        self._partitions: dict[str, _Partition] = {}
        self._last_seq = -1
        # Rows of one millisecond-day are neighbours: the day's text is worked out once a day, not once a row.
        self._day_number = -1
        self._partition: _Partition | None = None

    def write(self, rows: Iterable[Row]) -> None:
        """Takes in rows; raises ValueError when one is of another table or epoch or out of order, InvalidFieldError
        when a value does not fit."""
        try:
            for row in rows:
                if row.seq <= self._last_seq or row.epoch != self._epoch:
                    raise ValueError(
                        f"row {row.epoch}/{row.seq} follows {self._epoch}/{self._last_seq}: "
                        "rows must ascend in one epoch"
                    )
                self._last_seq = row.seq
                if self._partition is None or row.stored_at_ms // _MS_PER_DAY != self._day_number:
                    self._day_number = row.stored_at_ms // _MS_PER_DAY
                    self._partition = self._partition_of(day_of(row.stored_at_ms))
                self._partition.add(row)
        except BaseException:
            self.discard()
            raise

    def finish(self) -> list[WrittenFile]:
        """Makes the files durable under their final names and returns them."""
        try:
            # The names of new partitions and of renamed files are durable; the temporary folder need not be.
            return [partition.finish() for partition in self._partitions.values()]
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Removes what was written; none of it must have been committed."""
        for partition in self._partitions.values():
            partition.writer.discard()

    def _partition_of(self, day: str) -> _Partition:
        partition = self._partitions.get(day)
        if partition is None:
            writer = FileWriter(self._table, self._directory, day, self._epoch)
            partition = self._partitions[day] = _Partition(writer)
        return partition


def write_rows(table: Table, directory: Path, rows: Iterable[Row], *, epoch: str) -> list[WrittenFile]:
    """Writes rows, in ascending sequence, and returns the files; the contract is that of :class:`RowsWriter`."""
    writer = RowsWriter(table, directory, epoch=epoch)
    writer.write(rows)
    return writer.finish()


class _Partition:
    """The file of one day and the row group being gathered for it."""

    def __init__(self, writer: FileWriter) -> None:
        self.writer = writer
        self._group: list[Row] = []
        self._group_bytes = 0

    def add(self, row: Row) -> None:
        size = body_bytes(row)
        if self._group and (len(self._group) >= ROWS_PER_GROUP or self._group_bytes + size > BODY_BYTES_PER_GROUP):
            self._flush()
        self._group.append(row)
        self._group_bytes += size

    def _flush(self) -> None:
        self.writer.write_group(self._group)
        self._group = []
        self._group_bytes = 0

    def finish(self) -> WrittenFile:
        self._flush()
        return self.writer.finish()


def require_kept(snapshot: Snapshot, entries: Iterable[FileEntry]) -> None:
    """Raises FenceError when files that are about to be committed were removed as orphans meanwhile.

    To be called with the snapshot that the commit goes on top of.  Whoever removes a file says so in the log before
    (:mod:`holdfast.lake.orphans`); one that was said to be removed so long ago that the log has forgotten it is gone.
    """
    for entry in entries:
        if entry.path in snapshot.removals or not (snapshot.directory / entry.path).exists():
            raise FenceError(
                f"{snapshot.directory / entry.path} was removed before it was committed",
                hint="nothing was committed; write its rows again",
            )


def remove_files(directory: Path, entries: Iterable[FileEntry]) -> None:
    """Removes files that were written and will not be committed."""
    for entry in entries:
        (directory / entry.path).unlink(missing_ok=True)
