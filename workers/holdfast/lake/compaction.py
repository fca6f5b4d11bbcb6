"""Small files to large ones, and away with what is no longer needed.

Compaction is our own rewrite, committed as one add-and-remove with the shared transaction ``compactor``: of two
compactors one wins.  deltalake's ``optimize`` is never used: run from two processes it doubled rows, exit code 0.
Rows are copied as they are, none dropped and none merged: the multiset of rows is preserved.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from holdfast.lake.checksums import find_damage
from holdfast.lake.columns import (
    COLUMNS,
    COMPACTED_BODY_BYTES_PER_GROUP,
    COMPACTED_ROWS_PER_GROUP,
    arrow_schema,
    day_of,
)
from holdfast.lake.commit import Change, removal_of
from holdfast.lake.litter import remove_litter
from holdfast.lake.log import FileEntry, Snapshot
from holdfast.lake.log_cleaning import CHECKPOINT_AGE_S, clean_log
from holdfast.lake.memory import give_back, moved
from holdfast.lake.orphans import disown, orphans_of
from holdfast.lake.parquet_reading import open_parquet, read_group
from holdfast.lake.quarantine import Quarantine, damaged_error
from holdfast.lake.writer import FileWriter, WrittenFile, remove_files, require_kept
from holdfast.schemas.errors import DamagedError, FenceError, IntegrityError, UnavailableError
from holdfast.schemas.ids import now_ms
from holdfast.schemas.rows import TABLES, Table

if TYPE_CHECKING:
    from holdfast.lake.lake import Lake
    from holdfast.lake.table import LakeTable

logger = logging.getLogger(__name__)

COMPACTOR: Final = "compactor"
DAY_S: Final = 86_400.0


class MergePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When files are merged.

    A file that is half full is left alone.  Others are merged with neighbours of their own size class, so that a
    row is rewritten once for each class, not once for each merge; those to which nothing is added any more (of a day
    that is over, of a stream's earlier life), with any neighbour.  So are those of a day that have become more than
    ``most_files``, as happens when large and small ones take turns.
    """

    target_rows: int = 250_000
    target_bytes: int = 256 * 1024 * 1024
    min_files: int = 10
    most_files: int = 64


class MergeGroup(msgspec.Struct, frozen=True):
    """Neighbouring files of one day and epoch that become one file, in order of sequence."""

    day: str
    epoch: str
    files: tuple[FileEntry, ...]


class CompactionReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of compaction did."""

    groups: int = 0
    files_before: int = 0
    files_after: int = 0
    rows: int = 0
    bytes_before: int = 0
    bytes_after: int = 0


class VacuumReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of vacuum removed."""

    replaced_files: int = 0
    orphaned_files: int = 0
    log_files: int = 0
    bytes: int = 0


def plan_merge(
    files: Sequence[FileEntry], *, today: str, live_epoch: str | None = None, policy: MergePolicy | None = None
) -> list[MergeGroup]:
    """Returns which files to merge, oldest first.

    ``today`` is the UTC day that is not over yet, ``YYYY-MM-DD``; ``live_epoch`` the life of the stream that is
    archived now, None when each may be.
    """
    rule = policy or MergePolicy()
    partitions: dict[tuple[str, str], list[FileEntry]] = defaultdict(list)
    for entry in files:
        partitions[entry.day, entry.epoch].append(entry)
    groups: list[MergeGroup] = []
    for (day, epoch), entries in sorted(partitions.items()):
        entries.sort(key=lambda entry: entry.min_seq)
        is_over = day < today or live_epoch not in (None, epoch)
        is_crowded = sum(1 for entry in entries if _size_class(entry, rule)) > rule.most_files
        any_class = is_over or is_crowded
        fewest = 2 if any_class else rule.min_files
        filled = [group for run in _runs(entries, rule, any_class=any_class) for group in _fill(run, rule)]
        groups += [MergeGroup(day, epoch, tuple(group)) for group in filled if len(group) >= fewest]
    return groups


def _size_class(entry: FileEntry, policy: MergePolicy) -> int:
    """Returns 0 for a file that is full enough, then one more for each tenth."""
    fill = max(entry.rows / policy.target_rows, entry.size_bytes / policy.target_bytes)
    return next((number for number, bound in enumerate((0.5, 0.05, 0.005)) if fill >= bound), 3)


def _runs(entries: Sequence[FileEntry], policy: MergePolicy, *, any_class: bool) -> Iterator[list[FileEntry]]:
    """Yields maximal runs of neighbours that may be merged with each other."""
    run: list[FileEntry] = []
    run_class = 0
    for entry in entries:
        size_class = _size_class(entry, policy)
        if any_class and size_class:
            size_class = 1
        if run and size_class != run_class:
            yield run
            run = []
        if size_class:
            run.append(entry)
            run_class = size_class
    if run:
        yield run


def _fill(run: Sequence[FileEntry], policy: MergePolicy) -> Iterator[list[FileEntry]]:
    """Yields groups of neighbours that stay below the target together."""
    group: list[FileEntry] = []
    rows = size = 0
    for entry in run:
        if group and (rows + entry.rows > policy.target_rows or size + entry.size_bytes > policy.target_bytes):
            yield group
            group, rows, size = [], 0, 0
        group.append(entry)
        rows += entry.rows
        size += entry.size_bytes
    if group:
        yield group


def compact(
    lake: Lake, *, policy: MergePolicy | None = None, at_ms: int | None = None, tables: Sequence[Table] = TABLES
) -> CompactionReport:
    """Merges the small files of a lake; safe beside an archiver, readers and another compactor.

    One commit for each group.  A group whose files another compactor took first is left to it.  A process killed on
    the way leaves orphans at most.
    """
    today = day_of(now_ms() if at_ms is None else at_ms)
    report = CompactionReport()
    for name in tables:
        table = lake.table(name)
        damaged = Quarantine(table.directory).files()
        snapshot = table.refresh()
        entries = [entry for entry in snapshot.files.values() if entry.path not in damaged]
        live_epoch = None if snapshot.watermark is None else snapshot.watermark.epoch
        for group in plan_merge(entries, today=today, live_epoch=live_epoch, policy=policy):
            try:
                written = _merge(table, group)
            except FenceError:
                logger.info("group was compacted by another process", extra={"action": "merge_lost", "table": name})
                continue
            except DamagedError:
                continue  # it is in quarantine now, which tells it; its neighbours are merged next time
            report = CompactionReport(
                groups=report.groups + 1,
                files_before=report.files_before + len(group.files),
                files_after=report.files_after + 1,
                rows=report.rows + written.rows,
                bytes_before=report.bytes_before + sum(entry.size_bytes for entry in group.files),
                bytes_after=report.bytes_after + written.size_bytes,
            )
    if report.groups:
        give_back()
    return report


def _merge(table: LakeTable, group: MergeGroup) -> FileEntry:
    with FileWriter(table.name, table.directory, group.day, group.epoch, compacted=True) as writer:
        _check(table, group.files)
        try:
            for content in _row_groups(table.name, table.directory, group.files):
                writer.copy_group(content)
        except IntegrityError:
            _require_current(table, group.files)
            raise
        written = writer.finish()
        expected = sum(entry.rows for entry in group.files)
        if written.entry.rows != expected:
            raise IntegrityError(
                f"merging {len(group.files)} files of {table.directory} gave {written.entry.rows} rows of {expected}",
                hint="run holdfast verify; nothing was committed",
            )
    try:
        table.commit(lambda snapshot: _replacement(snapshot, group, written))
    except (FenceError, UnavailableError):
        if written.entry.path not in table.refresh().files:
            remove_files(table.directory, [written.entry])
        raise
    return written.entry


def _check(table: LakeTable, files: Sequence[FileEntry]) -> None:
    """Damage must not be copied: with new checksums over it, nothing would find it again."""
    directory = table.directory
    for entry in files:
        damage = find_damage(directory, entry, again=True)
        if damage is not None:
            _require_current(table, files)
            Quarantine(directory).add(entry, damage)
            raise damaged_error(directory, damage)


def _require_current(table: LakeTable, files: Sequence[FileEntry]) -> None:
    """Raises FenceError when files that cannot be read are none of the table any more: who was paused for a day may
    find them merged by another compactor, and removed."""
    known = table.refresh().files
    if any(entry.path not in known for entry in files):
        raise FenceError(f"files to merge are no longer in {table.directory}", hint="plan anew")


def _replacement(snapshot: Snapshot, group: MergeGroup, written: WrittenFile) -> Change:
    gone = [entry.path for entry in group.files if entry.path not in snapshot.files]
    if gone:
        raise FenceError(f"{len(gone)} files to merge are no longer in {snapshot.directory}", hint="plan anew")
    require_kept(snapshot, [written.entry])
    at_ms = now_ms()
    last = snapshot.transactions.get(COMPACTOR)
    return Change(
        action="compact",
        app_id=COMPACTOR,
        version=last.version + 1 if last else 1,
        expected=last.version if last else None,
        adds=[written.add_action(data_change=False)],
        removes=[removal_of(entry, at_ms) for entry in group.files],
    )


def _row_groups(table: Table, directory: Path, files: Sequence[FileEntry]) -> Iterator[Any]:
    """Yields the rows of some files, in their order, as row groups of the proper size; holds one at a time."""
    pending: list[Any] = []
    rows = size = 0
    for entry in files:
        for content in _read_file(directory / entry.path):
            for piece, piece_bytes in _pieces(table, _conform(table, content)):
                if pending and (
                    rows + piece.num_rows > COMPACTED_ROWS_PER_GROUP
                    or size + piece_bytes > COMPACTED_BODY_BYTES_PER_GROUP
                ):
                    yield pa.concat_tables(pending).combine_chunks()
                    pending, rows, size = [], 0, 0
                pending.append(piece)
                rows += piece.num_rows
                size += piece_bytes
    if pending:
        yield pa.concat_tables(pending).combine_chunks()


def _read_file(path: Path) -> Iterator[Any]:
    """Yields the row groups of a file, their checksums verified: damage must not be copied."""
    try:
        with open_parquet(path) as parquet:
            for number in range(parquet.num_row_groups):
                content = read_group(parquet, number)
                moved(content.nbytes)
                yield content
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"{path} cannot be read: {error}", hint="run holdfast verify") from error


def _pieces(table: Table, content: Any) -> Iterator[tuple[Any, int]]:
    """Yields a row group of a file, or parts of it when it is over the bounds, each with its bytes of bodies."""
    sizes = _body_sizes(table, content)
    start = total = 0
    for row, size in enumerate(sizes):
        if row > start and (row - start >= COMPACTED_ROWS_PER_GROUP or total + size > COMPACTED_BODY_BYTES_PER_GROUP):
            yield content.slice(start, row - start), total
            start, total = row, 0
        total += size
    if start < len(sizes):
        yield content.slice(start), total


def _body_sizes(table: Table, content: Any) -> list[int]:
    names = {"contexts": ("body", "body_binary"), "events": ("data", "extra"), "key_versions": ()}[table]
    sizes = [0] * content.num_rows
    for name in names:
        lengths: list[int | None] = pc.call_function("binary_length", [content.column(name)]).to_pylist()
        sizes = [size + (length or 0) for size, length in zip(sizes, lengths, strict=True)]
    return sizes


def _conform(table: Table, content: Any) -> Any:
    """Returns a row group with this release's columns: those that an earlier release did not write are null."""
    present = set(content.column_names)
    arrays = [
        content.column(column.name) if column.name in present else pa.nulls(content.num_rows, column.type)
        for column in COLUMNS[table]
    ]
    return pa.Table.from_arrays(arrays, schema=arrow_schema(table))


def vacuum(
    lake: Lake,
    older_than_s: float = DAY_S,
    *,
    orphans_older_than_s: float = DAY_S,
    log_older_than_s: float = 7 * DAY_S,
    at_ms: int | None = None,
) -> VacuumReport:
    """Removes files that no reader can need: replaced by compaction, left by a crash, summarised by checkpoints, and
    checkpoints that others have replaced.

    The newest commit is made durable first, so that no power cut can bring a removed file back into use.  Files not
    named in the log are orphans only after ``orphans_older_than_s``: a younger one is most likely about to be
    committed.  An older one may still be, by a process that was stopped for so long, or by one whose clock is right
    when ours is not: :mod:`holdfast.lake.orphans` keeps the two apart.  What recovery needs of the log stays, however
    old it is (:mod:`holdfast.lake.log_cleaning`).  A table with a torn commit is left alone.
    """
    now = now_ms() if at_ms is None else at_ms
    replaced = orphaned = log_files = size = 0
    for name in TABLES:
        table = lake.table(name)
        if table.torn_commit() is not None:
            continue
        table.durable_watermark()
        snapshot = table.snapshot
        removals = snapshot.removals
        orphans: list[Path] = []
        for path in orphans_of(snapshot):
            removal = removals.get(str(path.relative_to(snapshot.directory)))
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # another vacuum was here
            if removal is not None and removal.removed_ms <= now - older_than_s * 1000:
                path.unlink(missing_ok=True)
                replaced += 1
                size += stat.st_size
            elif removal is None and stat.st_mtime * 1000 <= now - orphans_older_than_s * 1000:
                orphans.append(path)
                size += stat.st_size
        for path in disown(table, orphans):
            path.unlink(missing_ok=True)
            orphaned += 1
        log_files += len(
            clean_log(
                snapshot.directory,
                commits_before_ms=now - log_older_than_s * 1000,
                checkpoints_before_ms=now - min(log_older_than_s, CHECKPOINT_AGE_S) * 1000,
            )
        )
    litter, litter_bytes = remove_litter(lake.path, now - orphans_older_than_s * 1000)
    return VacuumReport(
        replaced_files=replaced, orphaned_files=orphaned + litter, log_files=log_files, bytes=size + litter_bytes
    )
