"""What the index is filled with: the identities in the files of a table, and the keys under which it keeps them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from holdfast.lake.checksums import find_damage
from holdfast.lake.log import FileEntry, Snapshot, TornCommitError, read_commit
from holdfast.lake.memory import moved
from holdfast.lake.parquet_reading import open_parquet, read_batches
from holdfast.lake.quarantine import Quarantine
from holdfast.lake.salvage import IDENTITY_COLUMNS, salvage_group
from holdfast.schemas.refs import digest_to_bytes

if TYPE_CHECKING:
    from holdfast.lake.index_environment import Stamp
    from holdfast.schemas.rows import Table

VERSION: Final = struct.Struct(">Q")

DROP_REPETITIONS: Final = "drop_repetitions"
"""What the log calls a commit that takes out rows (:mod:`holdfast.lake.passed_over`)."""


def identities_in(snapshot: Snapshot, entry: FileEntry) -> tuple[Iterator[Any], bool]:
    """Returns the identities in a file, as Arrow batches, and whether they are all: of a damaged one what is sound."""
    damage = find_damage(snapshot.directory, entry)
    if damage is None:
        return _whole_file(snapshot, entry), True
    Quarantine(snapshot.directory).add(entry, damage)
    if damage.groups is None:
        return iter(()), False
    found: list[Any] = []
    groups = len(entry.checksums.parts) - 1 if entry.checksums else 0
    for group in range(groups):
        content = salvage_group(snapshot.table, snapshot.directory, entry, group)
        if content is not None:
            found.append(content)
    return iter(found), len(found) == groups


def _whole_file(snapshot: Snapshot, entry: FileEntry) -> Iterator[Any]:
    with open_parquet(snapshot.directory / entry.path, checks_pages=entry.checksums is None) as parquet:
        for batch in read_batches(parquet, IDENTITY_COLUMNS[snapshot.table]):
            moved(batch.nbytes)
            yield batch


def readable_again(snapshot: Snapshot, skipped: Sequence[str]) -> list[str]:
    """Returns the files that were damaged, and are in quarantine no more: put back in their place."""
    if not skipped:
        return []
    damaged = Quarantine(snapshot.directory).files()
    return [path for path in skipped if path in snapshot.files and path not in damaged]


def event_key(raw_id: bytes, namespace: str) -> bytes:
    """Returns the key of an event."""
    return raw_id + namespace.encode()


def version_key(namespace: str, key: str, version: int) -> bytes:
    """Returns the key of a version; the first 16 bytes are those of all versions of its key."""
    raw = namespace.encode()
    hasher = blake2b(len(raw).to_bytes(8, "little") + raw + key.encode(), digest_size=16)
    return hasher.digest() + VERSION.pack(version)


def items_of(table: Table, batch: Any, places: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Returns the keys of a batch of identities with their places; a touch brings none."""
    if table == "contexts":
        refs, forms = batch.column("ref").to_pylist(), batch.column("form").to_pylist()
        return [
            (digest_to_bytes(ref[-32:]), place)
            for ref, form, place in zip(refs, forms, places, strict=True)
            if form != "touch"
        ]
    namespaces = batch.column("namespace").to_pylist()
    if table == "events":
        column = batch.column("event_id")
        ids = (column.storage if isinstance(column, pa.ExtensionArray) else column).to_pylist()
        return [
            (event_key(raw, namespace), place) for raw, namespace, place in zip(ids, namespaces, places, strict=True)
        ]
    keys, versions = batch.column("key").to_pylist(), batch.column("version").to_pylist()
    return [
        (version_key(namespace, key, version), place)
        for namespace, key, version, place in zip(namespaces, keys, versions, places, strict=True)
    ]


def files_since(snapshot: Snapshot, stamp: Stamp) -> list[FileEntry] | None:
    """Returns the files with rows that a stamp does not cover; None when the stamp is not of this table's past."""
    if stamp.table_id != snapshot.table_id or stamp.version > snapshot.version:
        return None
    try:
        covered = read_commit(snapshot.directory, stamp.version)
        if covered is None or covered.fingerprint != stamp.fingerprint:
            return None
        unknown = set(stamp.skipped)
        entries: list[FileEntry] = []
        for version in range(stamp.version + 1, snapshot.version + 1):
            commit = read_commit(snapshot.directory, version)
            # Which of two equal rows has gone the entry of one does not tell.
            if commit is None or commit.info.get("action") == DROP_REPETITIONS:
                return None
            # What compaction makes of files that are known, all of them, holds nothing new.
            if commit.info.get("action") == "compact" and unknown.isdisjoint(gone.path for gone in commit.removals):
                continue
            entries.extend(commit.adds)
            unknown.update(entry.path for entry in commit.adds)
    except TornCommitError:
        return None
    live = [entry for entry in entries if entry.path in snapshot.files]
    return sorted(live, key=lambda entry: (entry.epoch, entry.min_seq))
