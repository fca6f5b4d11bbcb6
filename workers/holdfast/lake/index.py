"""Where a row is: digests, event ids and key versions to stream positions, in LMDB.

The index is a cache of the lake and nothing else: it can be deleted at any time.  It stores positions, not files, so
compaction does not touch it.  Each table's part is stamped with the version of the table that it covers, and with the
fingerprint of that commit, since a torn commit may have been set aside and another have taken its number.

Every process keeps its own index.  A refresh is one write transaction with LMDB's ``sync`` on and ``metasync`` off:
the tree cannot be damaged by a power cut, at most the last refresh is undone, and the next one repeats it.  With
``sync`` off a power cut could leave a tree that looks whole and answers wrongly, which nothing would detect.

========  ==========================================  ===========================
database  key                                         value
========  ==========================================  ===========================
contexts  digest (20 bytes)                           epoch number, seq, check
events    UUID (16 bytes), namespace                  epoch number, seq, check
keys      BLAKE2b-16 of (namespace, key), version     epoch number, seq, check
meta      ``table:<name>``, ``epoch:<number>``        stamp, epoch
========  ==========================================  ===========================

The check is a CRC-32 of the entry: a damaged one is recognised when it is read, and the index made anew; that nothing
is missing is seen when it is opened (:mod:`holdfast.lake.index_seal`).  Rows of a damaged file that cannot be told are
*skipped*: until it is healed, "not known" may not be said of anything (:meth:`LakeIndex.require_complete`).
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
import uuid
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import lmdb
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from holdfast.lake.checksums import find_damage, whole_damage
from holdfast.lake.index_environment import (
    DAMAGED,
    ENTRY,
    EPOCH_PREFIX,
    PLACE,
    Environment,
    IndexDamagedError,
    Stamp,
    check_of,
    is_sound,
    read_epochs,
    read_stamp,
    stamp_key,
)
from holdfast.lake.log import FileEntry, Snapshot, TornCommitError, read_commit
from holdfast.lake.memory import moved
from holdfast.lake.quarantine import Quarantine, damaged_error
from holdfast.lake.salvage import IDENTITY_COLUMNS, salvage_group
from holdfast.schemas.errors import DamagedError, UnavailableError
from holdfast.schemas.refs import Digest, digest_to_bytes
from holdfast.schemas.rows import TABLES, Position, Table

if TYPE_CHECKING:
    from holdfast.lake.lake import Lake

logger = logging.getLogger(__name__)

_VERSION: Final = struct.Struct(">Q")

EventKey = tuple[str, str]
"""(namespace, event id)."""
VersionKey = tuple[str, str, int]
"""(namespace, key, version)."""


class IndexReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a refresh did, for each table."""

    versions: dict[Table, int]
    rows_added: int
    rebuilt: tuple[Table, ...]
    seconds: float


# LMDB corrupts itself when one process opens a file twice, so py-lmdb refuses it: share by path, count users.
_open: dict[tuple[int, str], list[Any]] = {}
_open_lock = threading.Lock()


class LakeIndex:
    """The index of one process over one lake.  Safe to use from several threads.

    Opening the same path again in the process shares the environment.  Not usable in a child after ``fork``: open it
    anew there.
    """

    def __init__(self, path: Path, shared: Environment) -> None:
        self.path = path
        self._shared = shared
        self._closed = False

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens the index in directory ``path``, making an empty one when there is none or it is damaged."""
        root = Path(path).absolute()
        key = (os.getpid(), str(root.resolve()))
        with _open_lock:
            users = _open.get(key)
            if users is None:
                users = _open[key] = [Environment(root), 0]
            users[1] += 1
        return cls(root, users[0])

    def close(self) -> None:
        """Gives up this use of the index; the last one closes the environment."""
        if self._closed:
            return
        self._closed = True
        key = (os.getpid(), str(self.path.resolve()))
        with _open_lock:
            users = _open.get(key)
            if users is None:
                return
            users[1] -= 1
            if users[1] == 0:
                del _open[key]
                self._shared.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- reading

    def find_contexts(self, digests: Iterable[Digest]) -> dict[Digest, Position]:
        """Returns the positions of the rows that hold the bodies of these digests, of those that are known."""
        return self._find("contexts", ((digest, digest_to_bytes(digest)) for digest in digests))

    def find_events(self, keys: Iterable[EventKey]) -> dict[EventKey, Position]:
        """Returns the positions of these (namespace, event id), of those that are known."""
        return self._find("events", ((key, _event_key(uuid.UUID(key[1]).bytes, key[0])) for key in keys))

    def find_key_versions(self, keys: Iterable[VersionKey]) -> dict[VersionKey, Position]:
        """Returns the positions of these (namespace, key, version), of those that are known."""
        return self._find("key_versions", ((key, _version_key(*key)) for key in keys))

    def last_key_version(self, namespace: str, key: str) -> tuple[int, Position] | None:
        """Returns the highest archived version of a key and its position."""
        last = self.key_versions_before(namespace, key, None, 1)
        return last[0] if last else None

    def key_versions_before(
        self, namespace: str, key: str, version: int | None, limit: int
    ) -> list[tuple[int, Position]]:
        """Returns up to ``limit`` archived versions of a key below ``version`` (None: from the highest), descending."""
        prefix = _version_key(namespace, key, 0)[:16]
        # The first key that is too high, then back from there.
        bound = prefix + b"\xff" * 9 if version is None else prefix + _VERSION.pack(version)
        found: list[tuple[int, Position]] = []
        with self._reading() as shared, shared.env.begin(db=shared.databases["key_versions"], buffers=False) as txn:
            stamp = self._stamp(txn, "key_versions")
            if stamp is not None and stamp.skipped:
                # A version that nobody can read may be any version.
                raise DamagedError(
                    f"versions of keys cannot be read: {', '.join(stamp.skipped)} of the lake is damaged",
                    file=stamp.skipped[0],
                    hint="see 'holdfast health'",
                )
            cursor = txn.cursor()
            there = cursor.prev() if cursor.set_range(bound) else cursor.last()
            while there and len(found) < limit and cursor.key().startswith(prefix):
                raw = cursor.key()
                found.append((_VERSION.unpack(raw[16:])[0], self._position(raw, cursor.value())))
                there = cursor.prev()
        return found

    def require_complete(self, snapshot: Snapshot) -> None:
        """Raises DamagedError when rows of this table's part could not be read: anything may be among them."""
        with self._reading() as shared, shared.env.begin() as txn:
            stamp = self._stamp(txn, snapshot.table)
        for path in () if stamp is None else stamp.skipped:
            entry = snapshot.files.get(path)
            if entry is not None:
                record = Quarantine(snapshot.directory).files().get(path)
                damage = record.damage() if record else whole_damage(entry, "it could not be read")
                raise damaged_error(snapshot.directory, damage)

    @contextmanager
    def _reading(self) -> Generator[Environment]:
        """Within the block, what LMDB raises on a damaged file is told as such; the next use makes the index anew."""
        with self._shared.in_use():
            try:
                yield self._shared
            except DAMAGED as error:
                self._shared.discard_after_use()
                raise IndexDamagedError(
                    f"the index {self.path} is damaged: {error}", hint="it is built anew; try again"
                ) from error
            except IndexDamagedError:
                self._shared.discard_after_use()
                raise

    def _find(self, table: Table, keys: Iterator[tuple[Any, bytes]]) -> dict[Any, Position]:
        found: dict[Any, Position] = {}
        with self._reading() as shared, shared.env.begin(db=shared.databases[table], buffers=False) as txn:
            for key, raw in keys:
                value = txn.get(raw)
                if value is not None:
                    found[key] = self._position(raw, value)
        return found

    def _position(self, key: bytes, value: bytes) -> Position:
        if not is_sound(key, value):
            raise IndexDamagedError(f"the index {self.path} is damaged", hint="it is built anew; try again")
        number, seq, _ = ENTRY.unpack(value)
        epoch = self._shared.epochs.get(number)
        if epoch is None:  # another process has added an epoch
            self._shared.epochs.update(read_epochs(self._shared))
            epoch = self._shared.epochs.get(number)
        if epoch is None:
            raise IndexDamagedError(f"the index {self.path} names no epoch {number}", hint="it is built anew")
        return Position(epoch, seq)

    def version(self, table: Table) -> int:
        """Returns the version of a table that the index covers; -1 before the first refresh."""
        with self._shared.in_use(), self._shared.env.begin() as txn:
            stamp = self._stamp(txn, table)
        return -1 if stamp is None else stamp.version

    def count(self, table: Table) -> int:
        """Returns how many entries there are for a table."""
        with self._shared.in_use(), self._shared.env.begin() as txn:
            entries: int = txn.stat(self._shared.databases[table])["entries"]
        return entries

    # -- keeping up

    def refresh(self, lake: Lake) -> IndexReport:
        """Brings the index up to the newest version of every table, reading only what was appended since.

        A part that belongs to another table, is ahead of the lake or covers a commit that was set aside is built anew,
        with a warning.  A process killed on the way leaves the index as it was.
        """
        return self._update(lake, forget=False)

    def rebuild(self, lake: Lake) -> IndexReport:
        """Builds every part of the index anew from the lake."""
        return self._update(lake, forget=True)

    def _update(self, lake: Lake, *, forget: bool) -> IndexReport:
        try:
            with self._shared.in_use():
                return self._update_all(lake, forget=forget)
        except lmdb.Error as error:
            raise UnavailableError(
                f"the index {self.path} cannot be brought up to date: {error}",
                hint="free space on its disk; it is a cache, and may be deleted while nothing uses it",
            ) from error

    def _update_all(self, lake: Lake, *, forget: bool) -> IndexReport:
        started = time.monotonic()
        lake.refresh()
        versions: dict[Table, int] = {}
        rebuilt: list[Table] = []
        rows = 0
        for table in TABLES:
            snapshot = lake.snapshot(table)
            versions[table] = snapshot.version
            with self._shared.env.begin() as txn:
                stamp = None if forget else self._stamp(txn, table)
            if (
                stamp is not None
                and (stamp.version, stamp.fingerprint) == (snapshot.version, snapshot.fingerprint)
                and not (stamp.skipped and _readable_again(snapshot, stamp.skipped))
            ):
                continue
            added, anew = self._growing(snapshot, forget=forget)
            rows += added
            if anew:
                rebuilt.append(table)
        return IndexReport(
            versions=versions, rows_added=rows, rebuilt=tuple(rebuilt), seconds=time.monotonic() - started
        )

    def _growing(self, snapshot: Snapshot, *, forget: bool) -> tuple[int, bool]:
        """Updates one table's part, with a larger map if the present one is full."""
        with self._shared.lock:
            while True:
                try:
                    with self._shared.env.begin(write=True) as txn:
                        return self._update_table(txn, snapshot, forget=forget)
                except lmdb.MapFullError:
                    self._shared.env.set_mapsize(self._shared.env.info()["map_size"] * 2)
                except lmdb.MapResizedError:
                    self._shared.env.set_mapsize(0)  # another process has grown it

    def _update_table(self, txn: lmdb.Transaction, snapshot: Snapshot, *, forget: bool) -> tuple[int, bool]:
        table = snapshot.table
        # Read inside the write transaction: another process may have done the work meanwhile.
        stamp = self._stamp(txn, table)
        new_files = None if forget or stamp is None else _files_since(snapshot, stamp)
        anew = new_files is None
        if new_files is None:
            if stamp is not None and not forget:
                logger.warning(
                    "index does not match the lake, building it anew",
                    extra={"action": "index_rebuilt", "table": table, "path": str(self.path)},
                )
            txn.drop(self._shared.databases[table], delete=False)
            new_files = sorted(snapshot.files.values(), key=lambda entry: (entry.epoch, entry.min_seq))
        rows = 0
        known = () if anew or stamp is None else stamp.skipped
        again = _readable_again(snapshot, known)
        skipped = [path for path in known if path in snapshot.files and path not in again]
        for entry in [*new_files, *(snapshot.files[path] for path in again)]:
            added, is_whole = self._add_file(txn, snapshot, entry)
            rows += added
            if not is_whole:
                skipped.append(entry.path)
        total = rows + (0 if anew or stamp is None else stamp.rows)
        entries: int = txn.stat(self._shared.databases[table])["entries"]
        new_stamp = Stamp(
            snapshot.table_id,
            snapshot.version,
            snapshot.fingerprint,
            total,
            entries,
            tuple(dict.fromkeys(skipped)),
        )
        txn.put(stamp_key(table), msgspec.msgpack.encode(new_stamp), db=self._shared.meta)
        return rows, anew

    def _add_file(self, txn: lmdb.Transaction, snapshot: Snapshot, entry: FileEntry) -> tuple[int, bool]:
        """Adds the rows of a file; returns how many, and whether those were all."""
        rows = 0
        batches, is_whole = _identities(snapshot, entry)
        for batch in batches:
            self._add_batch(txn, snapshot.table, batch)
            rows += batch.num_rows
        return rows, is_whole

    def _add_batch(self, txn: lmdb.Transaction, table: Table, batch: Any) -> None:
        epochs = {epoch: self._epoch_number(txn, epoch) for epoch in batch.column("epoch").unique().to_pylist()}
        pack = PLACE.pack
        places = [
            pack(epochs[epoch], seq)
            for epoch, seq in zip(
                batch.column("epoch").to_pylist(), batch.column("stream_seq").to_pylist(), strict=True
            )
        ]
        # Sorted, neighbours land on the same page: fewer pages are written.  The first position of a key stays: a
        # later row of the same key is a repetition.
        items = sorted((key, place + check_of(key, place)) for key, place in _items(table, batch, places))
        with txn.cursor(db=self._shared.databases[table]) as cursor:
            cursor.putmulti(items, overwrite=False)

    def _epoch_number(self, txn: lmdb.Transaction, epoch: str) -> int:
        # Read from the transaction, not from memory: what an aborted one had given out is not remembered.
        known = read_epochs(self._shared, txn)
        for number, name in known.items():
            if name == epoch:
                return number
        number = max(known, default=0) + 1
        txn.put(EPOCH_PREFIX + b"%d" % number, epoch.encode(), db=self._shared.meta)
        return number

    def _stamp(self, txn: lmdb.Transaction, table: Table) -> Stamp | None:
        return read_stamp(txn, self._shared.meta, table)


def _identities(snapshot: Snapshot, entry: FileEntry) -> tuple[Iterator[Any], bool]:
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
    with pq.ParquetFile(snapshot.directory / entry.path, page_checksum_verification=entry.checksums is None) as parquet:
        for batch in parquet.iter_batches(batch_size=65_536, columns=IDENTITY_COLUMNS[snapshot.table]):
            moved(batch.nbytes)
            yield batch


def _readable_again(snapshot: Snapshot, skipped: Sequence[str]) -> list[str]:
    """Returns the files that were damaged, and are in quarantine no more: put back in their place."""
    if not skipped:
        return []
    damaged = Quarantine(snapshot.directory).files()
    return [path for path in skipped if path in snapshot.files and path not in damaged]


def _event_key(raw_id: bytes, namespace: str) -> bytes:
    return raw_id + namespace.encode()


def _version_key(namespace: str, key: str, version: int) -> bytes:
    raw = namespace.encode()
    hasher = blake2b(len(raw).to_bytes(8, "little") + raw + key.encode(), digest_size=16)
    return hasher.digest() + _VERSION.pack(version)


def _items(table: Table, batch: Any, places: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
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
            (_event_key(raw, namespace), place) for raw, namespace, place in zip(ids, namespaces, places, strict=True)
        ]
    keys, versions = batch.column("key").to_pylist(), batch.column("version").to_pylist()
    return [
        (_version_key(namespace, key, version), place)
        for namespace, key, version, place in zip(namespaces, keys, versions, places, strict=True)
    ]


def _files_since(snapshot: Snapshot, stamp: Stamp) -> list[FileEntry] | None:
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
            if commit is None:
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
