"""The commit protocol: one Delta commit, fenced and durable, or none.

1. The predecessor's commit file is fsynced, so that only the last commit of a log can ever be torn.
2. One handle of deltalake is opened, must stand at the expected version, and its ``txn`` must be what the caller
   requires: deltalake itself accepts a fresh handle that repeats a ``txn``.
3. The same handle commits, once: the log's next number is taken by whoever links it first.
4. The commit file and its directory are fsynced; deltalake never does.

deltalake's own checkpoints and log clean-up are off: they run after the commit, unsynced, and a bad checkpoint keeps a
table from opening.  :func:`write_checkpoint` makes ours.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction, RemoveAction

from holdfast.lake.columns import delta_schema
from holdfast.lake.files import fsync_directory, fsync_file, make_directory, move_aside
from holdfast.lake.log import (
    LOG_DIRECTORY,
    OUR_INFO,
    FileEntry,
    Removal,
    Snapshot,
    TornCommitError,
    checkpoint_path,
    commit_digest,
    commit_path,
    entry_of,
    list_checkpoints,
    list_versions,
    read_commit,
)
from holdfast.lake.log import (
    Transaction as ReadTransaction,
)
from holdfast.lake.log_copies import drop_copies, keep_checksum, keep_copy
from holdfast.lake.log_repair import (
    LAST_CHECKPOINT,
    checkpoint_says,
    drop_bad_hint,
    repair_log,
    require_readable_checkpoint,
)
from holdfast.schemas.errors import FenceError, IntegrityError, UnavailableError
from holdfast.schemas.failpoints import failpoint
from holdfast.schemas.ids import now_ms
from holdfast.schemas.rows import Position, Table

logger = logging.getLogger(__name__)

CHECKPOINT_INTERVAL: Final = 50
"""Commits from one checkpoint to the next: opening a table parses all that came after, 0.1 ms each."""

TORN_DIRECTORY: Final = "torn"

_CONFIGURATION: Final = {
    "delta.checkpointInterval": "1000000000",
    "delta.enableExpiredLogCleanup": "false",
}
_NO_HOOKS: Final = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)


class CommitRaceError(Exception):
    """Another process took the next version; nothing of ours was committed.  Read the log again and decide."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What one commit does.  ``expected`` is the ``txn`` version of ``app_id`` that must be in force before it."""

    action: str
    app_id: str
    version: int
    expected: int | None
    adds: Sequence[AddAction] = ()
    removes: Sequence[RemoveAction] = ()
    info: dict[str, Any] = {}


def removal_of(entry: FileEntry, at_ms: int) -> RemoveAction:
    """Returns what takes a file out of its table while its rows stay, in another one."""
    return RemoveAction(
        entry.path,
        data_change=False,
        deletion_timestamp=at_ms,
        size=entry.size_bytes,
        partition_values={"day": entry.day},
    )


class TornCommit(msgspec.Struct, frozen=True, kw_only=True):
    """A last commit that does not parse.  ``earlier`` is the watermark of the version before it."""

    table: Table
    path: str
    version: int
    earlier: Position | None


def create_table(table: Table, directory: Path) -> None:
    """Creates an empty, durable Delta table; does nothing when there is one."""
    make_directory(directory)
    if list_versions(directory) == [0] and _is_torn(directory, 0):
        # Power failed while the table was being made: nothing can have been in it.
        move_aside(commit_path(directory, 0), directory / LOG_DIRECTORY / TORN_DIRECTORY)
    if not list_versions(directory):
        DeltaTable.create(
            str(directory),
            schema=delta_schema(table),
            mode="ignore",
            partition_by=["day"],
            configuration=_CONFIGURATION,
            post_commithook_properties=_NO_HOOKS,
        )
    # Whoever made the table, or its last commit, may have died before its fsync.
    fsync_directory(directory)
    make_durable(directory, list_versions(directory)[-1])
    repair_log(directory)


def make_durable(directory: Path, version: int) -> None:
    """Flushes a commit file and the log's directory."""
    fsync_file(commit_path(directory, version))
    fsync_directory(directory / LOG_DIRECTORY)


def commit(base: Snapshot, change: Change) -> int:
    """Commits ``change`` on top of ``base``, durably; returns the new version.

    Raises FenceError when the ``txn`` in force is not the expected one, CommitRaceError when the log moved on from
    ``base``, TornCommitError when a torn commit is in the way, UnavailableError when the log cannot be written.
    After any other error the outcome is in the log: read it.
    """
    directory = base.directory
    if read_commit(directory, base.version + 1) is not None:
        raise CommitRaceError(base.version + 1)
    try:
        make_durable(directory, base.version)
        keep_copy(directory, base.version, commit_path(directory, base.version))
    except FileNotFoundError as error:
        if list_versions(directory)[-1:] > [base.version]:
            raise CommitRaceError(base.version + 1) from error  # the log moved on so far that it was cleaned past it
        raise
    handle = _open_handle(base)
    if handle.version() != base.version:
        raise CommitRaceError(handle.version())
    found = handle.transaction_version(change.app_id)
    if found != change.expected:
        raise FenceError(
            f"{directory} stands at {change.app_id} {found}, this commit continues {change.expected}",
            hint="read the watermark again and start the cycle anew",
        )
    commit_id = uuid.uuid4().hex
    updated = max([now_ms(), *(known.updated + 1 for known in base.transactions.values())])
    info = {"v": 1, "action": change.action, "commit_id": commit_id, "previous": base.fingerprint.hex(), **change.info}
    info["sum"] = _digest(change, updated, info)
    properties = CommitProperties(
        custom_metadata={OUR_INFO: info},
        max_commit_retries=0,
        app_transactions=[Transaction(change.app_id, change.version, updated)],
    )
    failpoint("lake.before_commit")
    try:
        handle.create_write_transaction(
            [*change.adds, *change.removes],
            "append",
            delta_schema(base.table),
            ["day"],
            commit_properties=properties,
            post_commithook_properties=_NO_HOOKS,
        )
    except DeltaError as error:
        _check_lost(base, commit_id, error)
    failpoint("lake.after_commit")
    if not commit_path(directory, base.version).exists():
        # Old commits go, oldest first, once the log has moved on far beyond them: who was stopped before this commit
        # for that long may have taken a number that was free again.
        raise CommitRaceError(base.version + 1)
    make_durable(directory, base.version + 1)
    failpoint("lake.after_log_fsync")
    keep_copy(directory, base.version + 1, commit_path(directory, base.version + 1), anew=True)
    return base.version + 1


def _digest(change: Change, updated: int, info: dict[str, Any]) -> str:
    """Returns the digest of what will be read of this commit."""
    return commit_digest(
        [
            entry_of(add.path, add.size, dict(add.partition_values), add.modification_time, add.stats)
            for add in change.adds
        ],
        [Removal(remove.path, remove.deletion_timestamp or 0) for remove in change.removes],
        [ReadTransaction(change.app_id, change.version, updated)],
        info,
    )


def _open_handle(base: Snapshot) -> DeltaTable:
    """Opens deltalake's handle; a checkpoint or hint that keeps it from opening is set aside first."""
    try:
        return DeltaTable(str(base.directory))
    except DeltaError:
        repair_checkpoints(base.table, base.directory)
        repair_log(base.directory)
    try:
        return DeltaTable(str(base.directory))
    except DeltaError as error:
        raise IntegrityError(
            f"the log of {base.directory} cannot be opened: {error}",
            hint="run holdfast verify; nothing was committed, and the streams keep what is not archived",
        ) from error


def _check_lost(base: Snapshot, commit_id: str, error: DeltaError) -> None:
    """Returns when the failed call has committed after all; otherwise raises what became of it."""
    taken = read_commit(base.directory, base.version + 1)
    if taken is None:
        if list_versions(base.directory)[-1:] > [base.version]:
            raise CommitRaceError(base.version + 1) from error  # taken, and cleaned away since
        raise UnavailableError(
            f"{base.directory} cannot be committed to: {error}", hint="check free space and permissions, then retry"
        ) from error
    if taken.info.get("commit_id") != commit_id:
        raise CommitRaceError(base.version + 1) from error


def find_torn(base: Snapshot) -> TornCommit | None:
    """Returns the torn commit right after ``base``, if there is one."""
    version = base.version + 1
    if not _is_torn(base.directory, version):
        return None
    return TornCommit(
        table=base.table, path=str(commit_path(base.directory, version)), version=version, earlier=base.watermark
    )


def _is_torn(directory: Path, version: int) -> bool:
    try:
        read_commit(directory, version)
    except TornCommitError:
        return True
    return False


def set_torn_aside(base: Snapshot, torn: TornCommit) -> Path:
    """Moves a torn commit out of the log, durably; returns where to.

    Only for a caller who knows that the stream still holds everything after ``torn.earlier``: what the commit said is
    archived again from there.
    """
    if find_torn(base) != torn:
        raise FenceError(f"{torn.path} is no longer a torn commit", hint="open the lake again")
    target = move_aside(Path(torn.path), base.directory / LOG_DIRECTORY / TORN_DIRECTORY)
    drop_copies(base.directory, [torn.version])
    logger.warning(
        "torn commit set aside",
        extra={"action": "torn_commit_set_aside", "table": torn.table, "version": torn.version, "path": str(target)},
    )
    return target


def write_checkpoint(base: Snapshot) -> None:
    """Writes a durable checkpoint of ``base``; a failure is logged, since the commits stay and say the same."""
    directory, version = base.directory, base.version
    path = checkpoint_path(directory, version)
    try:
        DeltaTable(str(directory), version=version).create_checkpoint()
        fsync_file(path)
        fsync_file(path.with_name(LAST_CHECKPOINT))
        fsync_directory(path.parent)
        if not checkpoint_says(base):
            # deltalake reads the log by itself: what it read was damaged, or it reads something else than we do.
            move_aside(path, path.parent / TORN_DIRECTORY)
            path.with_name(LAST_CHECKPOINT).unlink(missing_ok=True)
            raise OSError(f"{path} does not say what the log says")
        keep_checksum(directory, version, path)
    except (DeltaError, OSError) as error:
        # Who was stopped in here for hours may have written a hint of a checkpoint that was cleaned away meanwhile.
        drop_bad_hint(directory)
        logger.warning(
            "checkpoint was not written",
            extra={"action": "checkpoint_failed", "table": base.table, "version": version, "error": str(error)},
        )


def repair_checkpoints(table: Table, directory: Path) -> None:
    """Moves checkpoints that a power cut left unreadable out of the log: deltalake would not open the table.

    Nothing is lost by it: commits are kept, and say the same.
    """
    log = directory / LOG_DIRECTORY
    drop_bad_hint(directory)
    for version in reversed(list_checkpoints(directory)):
        path = checkpoint_path(directory, version)
        try:
            require_readable_checkpoint(directory, version)
        except (pa.ArrowException, OSError) as error:
            (log / LAST_CHECKPOINT).unlink(missing_ok=True)
            target = move_aside(path, log / TORN_DIRECTORY)
            logger.warning(
                "unreadable checkpoint set aside",
                extra={
                    "action": "checkpoint_set_aside",
                    "table": table,
                    "path": str(target),
                    "error": str(error),
                },
            )
        else:
            return
