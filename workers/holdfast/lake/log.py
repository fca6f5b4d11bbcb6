"""Reads a Delta log: which files a table consists of, and up to where each stream is archived.

Written against the Delta transaction protocol (https://github.com/delta-io/delta, PROTOCOL.md), for the part of it
that our tables use: JSON commits, classic checkpoints, no deletion vectors.  It exists beside deltalake because a
reader must be able to stop *before* a torn last commit, which deltalake takes for an empty one, and because
following the log commit by commit costs microseconds where reopening a table costs milliseconds.

A commit is *torn* when its file does not parse to the end: the machine lost power between its creation and the
fsync, so nobody was told of it.  Only the last commit can be torn: every committer fsyncs its predecessor first.

A flipped bit may leave a file that parses and says something else.  So every commit carries a digest of what it says,
a copy of it is kept outside the log and stands in for it, and a checkpoint is believed only with its SHA-256
(:mod:`holdfast.lake.log_copies`).  A damaged commit that has successors, no good copy and no newer checkpoint stops
every reader: the set of files is never another one silently.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec
import pyarrow as pa

from holdfast.lake.log_copies import checkpoint_is_sound, digest_of, read_copy
from holdfast.lake.parquet_reading import read_columns
from holdfast.schemas.errors import IntegrityError
from holdfast.schemas.rows import Anchor, Position, Table

logger = logging.getLogger(__name__)

LOG_DIRECTORY: Final = "_delta_log"
OUR_INFO: Final = "holdfast"
MOST_REMOVALS: Final = 50_000
"""How many of the files that left a table a process remembers, the latest: two days of a commit every five seconds.
Delta's checkpoints forget them after a week, and a vacuum takes away by their age those that nobody remembers."""

_COMMIT_NAME: Final = re.compile(r"(\d{20})\.json\Z")
_CHECKPOINT_NAME: Final = re.compile(r"(\d{20})\.checkpoint\.parquet\Z")


class Checksums(msgspec.Struct, frozen=True):
    """SHA-256 of a whole file; of each of its parts where it ends and its CRC-32
    (:mod:`holdfast.lake.checksums`)."""

    sha256: str
    parts: tuple[tuple[int, int], ...]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One live Parquet file of a table, as its add action describes it.

    ``contexts`` is how many rows bring a context of their own (of other tables: every row).  ``path`` is relative to
    the table's directory.  Files of earlier releases have no ``checksums``.
    """

    path: str
    day: str
    size_bytes: int
    rows: int
    contexts: int
    epoch: str
    min_seq: int
    max_seq: int
    modified_ms: int = 0
    checksums: Checksums | None = None


class Removal(msgspec.Struct, frozen=True):
    """A file that a commit took out of the table; it stays on disk until it is vacuumed."""

    path: str
    removed_ms: int


class Transaction(msgspec.Struct, frozen=True):
    """A ``txn`` action: how far an application got.  ``updated`` orders the applications of one table."""

    app_id: str
    version: int
    updated: int


class Commit(msgspec.Struct, frozen=True):
    """One commit file, parsed.  ``info`` is our part of its commitInfo; ``fingerprint`` names its exact bytes."""

    version: int
    adds: tuple[FileEntry, ...]
    removals: tuple[Removal, ...]
    transactions: tuple[Transaction, ...]
    table_id: str | None
    info: dict[str, Any]
    fingerprint: bytes

    def anchors(self) -> list[Anchor]:
        """Returns the anchors that the archiver stored with this commit."""
        return [Anchor(*anchor) for anchor in self.info.get("anchors", ())]


class Snapshot(msgspec.Struct, frozen=True):
    """A table at one version.  Never changed in place: a later version is another Snapshot."""

    table: Table
    directory: Path
    version: int
    table_id: str
    files: dict[str, FileEntry]
    removals: dict[str, Removal]
    transactions: dict[str, Transaction]
    fingerprint: bytes

    @property
    def watermark(self) -> Position | None:
        """How far the table's stream is archived, in its newest epoch; None before the first append."""
        prefix = f"{self.table}/"
        streams = [entry for app_id, entry in self.transactions.items() if app_id.startswith(prefix)]
        if not streams:
            return None
        newest = max(streams, key=lambda entry: entry.updated)
        return Position(newest.app_id.removeprefix(prefix), newest.version)


class TornCommitError(IntegrityError):
    """A commit file that does not parse: never acknowledged, see :mod:`holdfast.lake.log`."""

    code = "torn_commit"


class _Metadata(msgspec.Struct):
    id: str


class _Add(msgspec.Struct, rename="camel"):
    path: str
    size: int
    partition_values: dict[str, str | None]
    modification_time: int = 0
    stats: str | None = None


class _Remove(msgspec.Struct, rename="camel"):
    path: str
    deletion_timestamp: int | None = None


class _Txn(msgspec.Struct, rename="camel"):
    app_id: str
    version: int
    last_updated: int | None = None


class _Action(msgspec.Struct, rename="camel"):
    add: _Add | None = None
    remove: _Remove | None = None
    txn: _Txn | None = None
    meta_data: _Metadata | None = None
    commit_info: dict[str, Any] | None = None


class _OurStats(msgspec.Struct):
    sha256: str
    crc32: tuple[tuple[int, int], ...]


class _Stats(msgspec.Struct, rename="camel"):
    num_records: int = 0
    min_values: dict[str, Any] = {}
    max_values: dict[str, Any] = {}
    null_count: dict[str, Any] = {}
    # Of ours, beside what Delta defines: a reader of statistics passes over what it does not know.
    holdfast: _OurStats | None = None


_ACTION: Final = msgspec.json.Decoder(_Action)
_STATS: Final = msgspec.json.Decoder(_Stats)


def commit_path(directory: Path, version: int) -> Path:
    """Returns the path of a table's commit file."""
    return directory / LOG_DIRECTORY / f"{version:020d}.json"


def fingerprint_of(raw: bytes) -> bytes:
    """Returns what tells two commits of one version apart: one may be set aside and another take its number."""
    return blake2b(raw, digest_size=16).digest()


def read_commit(directory: Path, version: int) -> Commit | None:
    """Returns a commit, or None when there is none of that version.

    One that does not parse, or does not say what was written, is read from its copy; TornCommitError without one.
    """
    path = commit_path(directory, version)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        commit = parse_commit(version, raw)
        return commit if "sum" in commit.info else _unless_copy_says_more(directory, commit)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        copy = read_copy(directory, version)
        if copy is not None:
            try:
                return parse_commit(version, copy)
            except (ValueError, TypeError, AttributeError, RecursionError):
                pass  # damaged as well: told below
        raise TornCommitError(
            f"commit {path} with {len(raw)} bytes does not parse: {error}",
            hint="it was never acknowledged; run `holdfast up` or `holdfast verify` to have it set aside",
        ) from error


def _unless_copy_says_more(directory: Path, commit: Commit) -> Commit:
    """A commit without a digest is of an earlier release, or a flipped bit hid its digest: then its copy has one."""
    copy = read_copy(directory, commit.version)
    if copy is None or fingerprint_of(copy) == commit.fingerprint:
        return commit
    try:
        copied = parse_commit(commit.version, copy)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return commit
    return copied if "sum" in copied.info else commit


def parse_commit(version: int, raw: bytes) -> Commit:
    """Returns a commit of these bytes; raises ValueError or the like when they are not what was written."""
    commit = _parse_commit(version, raw)
    stated = commit.info.get("sum")
    if stated is not None and stated != commit_digest(commit.adds, commit.removals, commit.transactions, commit.info):
        raise ValueError("it does not say what was written")
    return commit


def commit_digest(
    adds: Sequence[FileEntry],
    removals: Sequence[Removal],
    transactions: Sequence[Transaction],
    info: dict[str, Any],
) -> str:
    """Returns the digest of what a commit says: all that is read of it."""
    said = {name: value for name, value in info.items() if name != "sum"}
    return digest_of([adds, removals, transactions, said])


def _parse_commit(version: int, raw: bytes) -> Commit:
    adds: list[FileEntry] = []
    removals: list[Removal] = []
    transactions: list[Transaction] = []
    table_id = None
    info: dict[str, Any] = {}
    lines = raw.splitlines()
    if not lines:
        raise msgspec.DecodeError("the file is empty")
    for line in lines:
        action = _ACTION.decode(line)
        if action.add is not None:
            adds.append(_file_entry(action.add))
        elif action.remove is not None:
            removals.append(Removal(action.remove.path, action.remove.deletion_timestamp or 0))
        elif action.txn is not None:
            transactions.append(_transaction(action.txn))
        elif action.meta_data is not None:
            table_id = action.meta_data.id
        elif action.commit_info is not None:
            info = action.commit_info.get(OUR_INFO) or {}
    return Commit(version, tuple(adds), tuple(removals), tuple(transactions), table_id, info, fingerprint_of(raw))


def _transaction(txn: _Txn) -> Transaction:
    return Transaction(txn.app_id, txn.version, txn.last_updated or 0)


def _file_entry(add: _Add) -> FileEntry:
    stats = _STATS.decode(add.stats or "{}")
    rows = stats.num_records
    return FileEntry(
        path=add.path,
        day=add.partition_values.get("day") or "",
        size_bytes=add.size,
        rows=rows,
        contexts=rows - stats.null_count.get("created_at", 0),
        epoch=str(stats.min_values.get("epoch", "")),
        min_seq=stats.min_values.get("stream_seq", 0),
        max_seq=stats.max_values.get("stream_seq", 0),
        modified_ms=add.modification_time,
        checksums=None if stats.holdfast is None else Checksums(stats.holdfast.sha256, stats.holdfast.crc32),
    )


def entry_of(
    path: str, size: int, partition_values: dict[str, str | None], modification_time: int, stats: str
) -> FileEntry:
    """Returns what will be read of an add action that is about to be committed."""
    return _file_entry(_Add(path, size, partition_values, modification_time, stats))


def list_versions(directory: Path) -> list[int]:
    """Returns the versions of all commit files, ascending; empty when there is no table."""
    return list_log(directory)[0]


def list_log(directory: Path) -> tuple[list[int], list[int]]:
    """Returns the versions of all commit files and those of all checkpoints, each ascending, of one look."""
    log = directory / LOG_DIRECTORY
    names = os.listdir(log) if log.is_dir() else []  # noqa: PTH208  a Path for each of 100,000 names takes a second
    commits = sorted(int(match[1]) for name in names if (match := _COMMIT_NAME.match(name)))
    return commits, sorted(int(match[1]) for name in names if (match := _CHECKPOINT_NAME.match(name)))


def checkpoint_path(directory: Path, version: int) -> Path:
    """Returns the path of a table's checkpoint."""
    return directory / LOG_DIRECTORY / f"{version:020d}.checkpoint.parquet"


def list_checkpoints(directory: Path) -> list[int]:
    """Returns the versions of all checkpoints, ascending."""
    return list_log(directory)[1]


def load_snapshot(table: Table, directory: Path) -> Snapshot | None:
    """Returns the newest whole version of a table, or None when there is no table.

    Starts at the newest checkpoint that can be read; one that cannot is passed over, since an earlier one and the
    commits after it say the same.  A torn last commit is left out.
    """
    checkpoints = list_checkpoints(directory)
    while True:
        try:
            return _load_from(table, directory, checkpoints)
        except IntegrityError:
            # Who was stopped for hours between listing and reading finds the log cleaned: told by what is there now.
            listed, checkpoints = checkpoints, list_checkpoints(directory)
            if checkpoints == listed:
                raise


def _load_from(table: Table, directory: Path, checkpoints: Sequence[int]) -> Snapshot | None:
    base: Snapshot | None = None
    for version in reversed(checkpoints):
        try:
            base = read_checkpoint(table, directory, version)
            break
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError, IntegrityError) as error:
            logger.warning(
                "checkpoint cannot be read, using an earlier one",
                extra={"action": "checkpoint_skipped", "table": table, "version": version, "error": str(error)},
            )
    if base is None:
        base = Snapshot(table, directory, -1, "", {}, {}, {}, b"")
    snapshot = _follow(base)
    if snapshot.version >= 0:
        newest = list_versions(directory)[-1:]
        if newest and newest[0] > snapshot.version + 1:
            raise _broken_log(directory, snapshot.version + 1)
        return snapshot
    if list_versions(directory):
        raise IntegrityError(
            f"{directory} has a log of which neither a checkpoint nor the first commit can be read",
            hint="restore the log from a backup",
        )
    return None


def follow(snapshot: Snapshot) -> Snapshot:
    """Returns the newest whole version at or after ``snapshot``; the same object when there is none newer."""
    newest = _follow(snapshot)
    if newest is snapshot and not commit_path(snapshot.directory, snapshot.version).exists():
        # Left behind for so long that the log was cleaned past it.
        return load_snapshot(snapshot.table, snapshot.directory) or snapshot
    return newest


def _follow(snapshot: Snapshot) -> Snapshot:
    directory = snapshot.directory
    commits: list[Commit] = []
    while True:
        try:
            commit = read_commit(directory, snapshot.version + len(commits) + 1)
        except TornCommitError as error:
            # A commit file appears whole, by link: a torn one is from before the last start of the machine.
            version = snapshot.version + len(commits) + 1
            if commit_path(directory, version + 1).exists():
                # Others have gone on from it: not torn, but damaged since.  Passed over, it would take rows with it.
                raise _broken_log(directory, version) from error
            break
        if commit is None:
            break
        commits.append(commit)
    return apply(snapshot, commits) if commits else snapshot


def _broken_log(directory: Path, version: int) -> IntegrityError:
    return IntegrityError(
        f"commit {commit_path(directory, version)} is damaged or missing, and later ones build on it",
        hint="restore this file from a backup or from a copy of the lake; nothing is served from this table until then",
    )


def apply(snapshot: Snapshot, commits: list[Commit]) -> Snapshot:
    """Returns the snapshot after some commits that follow it without a gap."""
    files, removals = dict(snapshot.files), dict(snapshot.removals)
    transactions, table_id = dict(snapshot.transactions), snapshot.table_id
    for commit in commits:
        for removal in commit.removals:
            files.pop(removal.path, None)
            removals[removal.path] = removal
        for entry in commit.adds:
            files[entry.path] = entry
            removals.pop(entry.path, None)
        for transaction in commit.transactions:
            transactions[transaction.app_id] = transaction
        table_id = commit.table_id or table_id
    for path in list(islice(removals, max(0, len(removals) - MOST_REMOVALS))):
        del removals[path]
    last = commits[-1]
    return Snapshot(
        snapshot.table, snapshot.directory, last.version, table_id, files, removals, transactions, last.fingerprint
    )


def read_checkpoint(table: Table, directory: Path, version: int) -> Snapshot:
    """Returns the snapshot that a checkpoint holds; raises one of many kinds of errors when it cannot be read."""
    columns = ["add", "remove", "txn", "metaData"]
    if not checkpoint_is_sound(directory, version, checkpoint_path(directory, version)):
        raise IntegrityError("it is not what was written", hint="an earlier one and the commits since say the same")
    content = read_columns(checkpoint_path(directory, version), columns)
    adds: list[dict[str, Any]] = content.column("add").drop_null().to_pylist()
    removes: list[dict[str, Any]] = content.column("remove").drop_null().to_pylist()
    txns: list[dict[str, Any]] = content.column("txn").drop_null().to_pylist()
    metadata: list[dict[str, Any]] = content.column("metaData").drop_null().to_pylist()
    entries = [
        _file_entry(_Add(add["path"], add["size"], dict(add["partitionValues"]), add["modificationTime"], add["stats"]))
        for add in adds
    ]
    removals = [Removal(remove["path"], remove["deletionTimestamp"] or 0) for remove in removes]
    transactions = [_transaction(_Txn(txn["appId"], txn["version"], txn["lastUpdated"])) for txn in txns]
    try:
        fingerprint = fingerprint_of(commit_path(directory, version).read_bytes())
    except FileNotFoundError:
        fingerprint = b""
    return Snapshot(
        table,
        directory,
        version,
        metadata[0]["id"],
        {entry.path: entry for entry in entries},
        {removal.path: removal for removal in removals},
        {transaction.app_id: transaction for transaction in transactions},
        fingerprint,
    )
