"""One table of the lake: its newest snapshot, and appending to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from holdfast.lake.commit import (
    CHECKPOINT_INTERVAL,
    Change,
    CommitRaceError,
    TornCommit,
    commit,
    create_table,
    find_torn,
    make_durable,
    repair_checkpoints,
    set_torn_aside,
    write_checkpoint,
)
from holdfast.lake.log import FileEntry, Snapshot, follow, list_checkpoints, load_snapshot, read_commit
from holdfast.lake.quarantine import Quarantine
from holdfast.lake.writer import RowsWriter, WrittenFile, remove_files, require_kept
from holdfast.schemas.errors import DataDirectoryError, FenceError, UnavailableError
from holdfast.schemas.rows import Anchor, Position, Row, Table

COMMIT_ATTEMPTS: Final = 20
"""How often a commit is tried anew after losing the race for a version number to the compactor.  A lost race
costs milliseconds, and compaction commits rarely: this many in a row mean that something else is wrong."""

ChangeMaker = Callable[[Snapshot], Change]


class CommitReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one append committed; when the caller sees it, it is durable."""

    table: Table
    version: int
    position: Position
    rows: int
    files: int
    bytes: int


class TableStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over a table's add actions.  ``contexts`` counts rows that bring a context of their own."""

    rows: int
    contexts: int
    files: int
    bytes: int


class LakeTable:
    """One Delta table.  Safe to use from several threads; of several processes that append, one wins."""

    def __init__(self, name: Table, directory: Path, snapshot: Snapshot) -> None:
        self.name: Table = name
        self.directory = directory
        self.quarantine = Quarantine(directory)
        self._snapshot = snapshot
        self._lock = threading.RLock()
        self._checkpointed = 0

    @classmethod
    def open(cls, name: Table, directory: Path, *, create: bool = False) -> LakeTable:
        """Opens the table at its newest whole version; creates it if it is missing and ``create`` is set.

        With ``create``, the caller is one who writes: unreadable checkpoints are moved aside.
        """
        if create:
            create_table(name, directory)
            repair_checkpoints(name, directory)
        snapshot = load_snapshot(name, directory)
        if snapshot is None:
            raise DataDirectoryError(
                f"{directory} holds no table", hint="give the lake's directory, or create it by running holdfast up"
            )
        return cls(name, directory, snapshot)

    @property
    def snapshot(self) -> Snapshot:
        """The version last seen."""
        return self._snapshot

    def refresh(self) -> Snapshot:
        """Returns the newest whole version: one failed ``open`` when nothing is new."""
        with self._lock:
            self._snapshot = follow(self._snapshot)
            return self._snapshot

    def durable_watermark(self) -> Position | None:
        """Returns the newest watermark after making it durable: what a purge may go by."""
        snapshot = self.refresh()
        make_durable(self.directory, snapshot.version)
        return snapshot.watermark

    def files(self) -> tuple[FileEntry, ...]:
        """Returns the files of the version last seen, by epoch and sequence."""
        return tuple(sorted(self._snapshot.files.values(), key=lambda entry: (entry.epoch, entry.min_seq)))

    def statistics(self) -> TableStatistics:
        """Returns the sums of the version last seen, without opening a file."""
        entries = self._snapshot.files.values()
        return TableStatistics(
            rows=sum(entry.rows for entry in entries),
            contexts=sum(entry.contexts for entry in entries),
            files=len(entries),
            bytes=sum(entry.size_bytes for entry in entries),
        )

    def anchors(self, from_seq: int = 0, *, most: int | None = None) -> list[Anchor]:
        """Returns the anchors of the current epoch at or after a sequence, ascending; the newest ``most`` of them.

        Reads back through the log until it has them, or finds a commit that ends before ``from_seq``.
        """
        snapshot = self.refresh()
        watermark = snapshot.watermark
        if watermark is None:
            return []
        found: list[Anchor] = []
        for info, anchors in self._appends(snapshot):
            if info["epoch"] != watermark.epoch or info["last_seq"] < from_seq:
                break
            found.extend(anchor for anchor in reversed(anchors) if anchor.seq >= from_seq)
            if most is not None and len(found) >= most:
                del found[most:]
                break
        return found[::-1]

    def _appends(self, snapshot: Snapshot) -> Iterator[tuple[dict[str, Any], list[Anchor]]]:
        for version in range(snapshot.version, 0, -1):
            commit_ = read_commit(self.directory, version)
            if commit_ is None:
                return
            if commit_.info.get("action") == "append":
                yield commit_.info, commit_.anchors()

    def torn_commit(self) -> TornCommit | None:
        """Returns the torn last commit, if there is one."""
        return find_torn(self.refresh())

    def set_aside(self, torn: TornCommit) -> None:
        """Moves a torn commit out of the log; see :func:`holdfast.lake.commit.set_torn_aside`."""
        with self._lock:
            set_torn_aside(self.refresh(), torn)

    def append(
        self,
        rows: Iterable[Row],
        *,
        epoch: str,
        first_seq: int,
        last_seq: int,
        anchors: Sequence[Anchor] = (),
    ) -> CommitReport:
        """Makes the rows of one contiguous run of the stream part of the table, all or none.

        ``rows`` ascend within ``first_seq`` to ``last_seq`` and may be fewer, or none: the watermark advances to
        ``last_seq`` all the same.  They are consumed one by one, so they need not all be in memory.  What is raised,
        and what a kill leaves, is as :class:`Append` says.
        """
        if not 0 < first_seq <= last_seq:
            raise ValueError(f"run from {first_seq} to {last_seq} is empty or begins before 1")
        with self._lock:
            run = self.begin_append(epoch=epoch, first_seq=first_seq)
            run.write(rows, up_to=last_seq)
            return run.commit(last_seq, anchors)

    def begin_append(self, *, epoch: str, first_seq: int) -> Append:
        """Begins a run of the stream, of which the length is not known yet.

        ``first_seq`` must be one after the epoch's watermark, or a FenceError is raised; in an epoch that has none yet,
        the caller states the start.
        """
        with self._lock:
            self._expected(self.refresh(), epoch, first_seq)
        return Append(self, epoch, first_seq)

    def commit_append(
        self, writer: RowsWriter, *, epoch: str, first_seq: int, last_seq: int, anchors: Sequence[Anchor]
    ) -> CommitReport:
        """Makes what was written part of the table; for :class:`Append`, whose contract it is."""
        with self._lock:
            written = writer.finish()
            version = self._commit_append(written, epoch, first_seq, last_seq, anchors)
            if self._snapshot.version == version and self._checkpoint_is_due(version):
                write_checkpoint(self._snapshot)
        return CommitReport(
            table=self.name,
            version=version,
            position=Position(epoch, last_seq),
            rows=sum(file.entry.rows for file in written),
            files=len(written),
            bytes=sum(file.entry.size_bytes for file in written),
        )

    def _checkpoint_is_due(self, version: int) -> bool:
        """Whether the last checkpoint is an interval ago: the commit that was to write it may have been another
        process's, which merges, or was killed right after it."""
        if version - self._checkpointed < CHECKPOINT_INTERVAL:
            return False
        self._checkpointed = max(list_checkpoints(self.directory), default=0)
        if version - self._checkpointed < CHECKPOINT_INTERVAL:
            return False
        self._checkpointed = version  # or tried, which is not tried again with every commit
        return True

    def _expected(self, snapshot: Snapshot, epoch: str, first_seq: int) -> int | None:
        """Returns the ``txn`` version that a run starting at ``first_seq`` continues; raises FenceError if none."""
        known = snapshot.transactions.get(f"{self.name}/{epoch}")
        if known is None:
            return None
        if known.version != first_seq - 1:
            raise FenceError(
                f"{self.directory} is archived up to {epoch}/{known.version}, this run begins at {first_seq}",
                hint="read the watermark again and start the cycle anew",
            )
        return known.version

    def _commit_append(
        self,
        written: Sequence[WrittenFile],
        epoch: str,
        first_seq: int,
        last_seq: int,
        anchors: Sequence[Anchor],
    ) -> int:
        info = {
            "epoch": epoch,
            "first_seq": first_seq,
            "last_seq": last_seq,
            "anchors": [[anchor.seq, anchor.stored_at_ms, anchor.identity] for anchor in anchors],
        }
        adds = [file.add_action() for file in written]

        def change(snapshot: Snapshot) -> Change:
            expected = self._expected(snapshot, epoch, first_seq)
            require_kept(snapshot, (file.entry for file in written))
            return Change(
                action="append",
                app_id=f"{self.name}/{epoch}",
                version=last_seq,
                expected=expected,
                adds=adds,
                info=info,
            )

        try:
            return self.commit(change)
        except (FenceError, UnavailableError):
            # Known not to be committed.  After any other error that is not known: the files stay, and are removed
            # as orphans if the log turns out not to name them.
            known = self.refresh().files
            remove_files(self.directory, (file.entry for file in written if file.entry.path not in known))
            raise

    def commit(self, make_change: ChangeMaker) -> int:
        """Commits what ``make_change`` makes of the newest snapshot, anew after each lost race; returns the version."""
        with self._lock:
            for _ in range(COMMIT_ATTEMPTS):
                snapshot = self.refresh()
                try:
                    version = commit(snapshot, make_change(snapshot))
                except CommitRaceError:
                    continue
                self.refresh()
                return version
        raise UnavailableError(
            f"{self.directory} was committed to by others {COMMIT_ATTEMPTS} times in a row",
            hint="see which other process commits to this lake",
        )


class Append:
    """One contiguous run of the stream on its way into a table: written as it comes, committed whole or not at all.

    One thread at a time.  :meth:`commit` raises FenceError when another process has advanced the epoch: nothing of this
    run was committed.  A process killed at any point leaves the run committed as a whole or not at all; the watermark
    says which.
    """

    def __init__(self, table: LakeTable, epoch: str, first_seq: int) -> None:
        self._table = table
        self._epoch = epoch
        self._first_seq = first_seq
        self._writer: RowsWriter | None = RowsWriter(table.name, table.directory, epoch=epoch)

    def write(self, rows: Iterable[Row], *, up_to: int) -> None:
        """Writes rows to files that nobody sees yet.

        They ascend from the last one written, and none is beyond ``up_to``; raises ValueError otherwise, and
        InvalidFieldError when a value does not fit its column.  After any error there is nothing left of the run.
        """
        assert self._writer is not None, "the run has ended"
        self._writer.write(_within(rows, self._first_seq, up_to))

    def commit(self, last_seq: int, anchors: Sequence[Anchor] = ()) -> CommitReport:
        """Makes the run, up to ``last_seq``, part of the table; when it returns, that is durable."""
        writer, self._writer = self._writer, None
        assert writer is not None, "the run has ended"
        return self._table.commit_append(
            writer, epoch=self._epoch, first_seq=self._first_seq, last_seq=last_seq, anchors=anchors
        )

    def discard(self) -> None:
        """Removes what was written of a run that will not be committed; does nothing once :meth:`commit` was called."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.discard()


def _within(rows: Iterable[Row], first_seq: int, last_seq: int) -> Iterator[Row]:
    for row in rows:
        if not first_seq <= row.seq <= last_seq:
            raise ValueError(f"row {row.seq} is outside its run, {first_seq} to {last_seq}")
        yield row
