"""Where a row is: digests, event ids and key versions to stream positions, in LMDB.

The index is a cache of the lake and nothing else: it can be deleted at any time.  It stores positions, not files, so
compaction does not touch it.  Each table's part is stamped with the version of the table that it covers, and with the
fingerprint of that commit, since a torn commit may have been set aside and another have taken its number.

Every process keeps its own index.  A refresh is one write transaction with LMDB's ``sync`` on and ``metasync`` off:
the tree cannot be damaged by a power cut, at most the last refresh is undone, and the next one repeats it.  With
``sync`` off a power cut could leave a tree that looks whole and answers wrongly, which nothing would detect.

========  ==========================================  ====================
database  key                                         value
========  ==========================================  ====================
contexts  digest (20 bytes)                           epoch number, seq
events    UUID (16 bytes), namespace                  epoch number, seq
keys      BLAKE2b-16 of (namespace, key), version     epoch number, seq
meta      ``table:<name>``, ``epoch:<number>``        stamp, epoch
========  ==========================================  ====================
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import lmdb
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from holdfast.lake.log import FileEntry, Snapshot, TornCommitError, read_commit
from holdfast.schemas.errors import ConfigurationError, UnavailableError
from holdfast.schemas.refs import Digest, digest_to_bytes
from holdfast.schemas.rows import TABLES, Position, Table

if TYPE_CHECKING:
    from holdfast.lake.lake import Lake

logger = logging.getLogger(__name__)

FORMAT: Final = b"holdfast-index-1"
INITIAL_MAP_BYTES: Final = 1 << 30
"""Address space at first, doubled when full; the file itself is sparse and grows with use."""

_EPOCH_PREFIX: Final = b"epoch:"
_PLACE: Final = struct.Struct("<HQ")
_VERSION: Final = struct.Struct(">Q")
_DATABASES: Final[dict[Table, bytes]] = {"contexts": b"contexts", "events": b"events", "key_versions": b"keys"}
_COLUMNS: Final[dict[Table, list[str]]] = {
    "contexts": ["ref", "form", "epoch", "stream_seq"],
    "events": ["event_id", "namespace", "epoch", "stream_seq"],
    "key_versions": ["namespace", "key", "version", "epoch", "stream_seq"],
}

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


class _Stamp(msgspec.Struct, frozen=True):
    table_id: str
    version: int
    fingerprint: bytes
    rows: int


class _Environment(NamedTuple):
    env: lmdb.Environment
    meta: Any
    databases: dict[Table, Any]
    epochs: dict[int, str]
    lock: threading.Lock


# LMDB corrupts itself when one process opens a file twice, so py-lmdb refuses it: share by path, count users.
_open: dict[tuple[int, str], list[Any]] = {}
_open_lock = threading.Lock()


class LakeIndex:
    """The index of one process over one lake.  Safe to use from several threads.

    Opening the same path again in the process shares the environment.  Not usable in a child after ``fork``: open it
    anew there.
    """

    def __init__(self, path: Path, shared: _Environment) -> None:
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
                users = _open[key] = [_open_environment(root), 0]
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
                self._shared.env.close()

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
        with self._shared.env.begin(db=self._shared.databases["key_versions"], buffers=False) as txn:
            cursor = txn.cursor()
            there = cursor.prev() if cursor.set_range(bound) else cursor.last()
            while there and len(found) < limit and cursor.key().startswith(prefix):
                found.append((_VERSION.unpack(cursor.key()[16:])[0], self._position(cursor.value())))
                there = cursor.prev()
        return found

    def _find(self, table: Table, keys: Iterator[tuple[Any, bytes]]) -> dict[Any, Position]:
        found: dict[Any, Position] = {}
        with self._shared.env.begin(db=self._shared.databases[table], buffers=False) as txn:
            for key, raw in keys:
                value = txn.get(raw)
                if value is not None:
                    found[key] = self._position(value)
        return found

    def _position(self, value: bytes) -> Position:
        number, seq = _PLACE.unpack(value)
        epoch = self._shared.epochs.get(number)
        if epoch is None:  # another process has added an epoch
            self._shared.epochs.update(_read_epochs(self._shared))
            epoch = self._shared.epochs[number]
        return Position(epoch, seq)

    def version(self, table: Table) -> int:
        """Returns the version of a table that the index covers; -1 before the first refresh."""
        with self._shared.env.begin() as txn:
            stamp = self._stamp(txn, table)
        return -1 if stamp is None else stamp.version

    def count(self, table: Table) -> int:
        """Returns how many entries there are for a table."""
        with self._shared.env.begin() as txn:
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
            if stamp is not None and (stamp.version, stamp.fingerprint) == (snapshot.version, snapshot.fingerprint):
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
        for entry in new_files:
            rows += self._add_file(txn, snapshot, entry)
        total = rows + (0 if anew or stamp is None else stamp.rows)
        new_stamp = _Stamp(snapshot.table_id, snapshot.version, snapshot.fingerprint, total)
        txn.put(_stamp_key(table), msgspec.msgpack.encode(new_stamp), db=self._shared.meta)
        return rows, anew

    def _add_file(self, txn: lmdb.Transaction, snapshot: Snapshot, entry: FileEntry) -> int:
        table = snapshot.table
        database = self._shared.databases[table]
        rows = 0
        with pq.ParquetFile(snapshot.directory / entry.path) as parquet:
            for batch in parquet.iter_batches(batch_size=65_536, columns=_COLUMNS[table]):
                epochs = {epoch: self._epoch_number(txn, epoch) for epoch in batch.column("epoch").unique().to_pylist()}
                pack = _PLACE.pack
                places = [
                    pack(epochs[epoch], seq)
                    for epoch, seq in zip(
                        batch.column("epoch").to_pylist(), batch.column("stream_seq").to_pylist(), strict=True
                    )
                ]
                # Sorted, neighbours land on the same page: fewer pages are written.  The first position of a key
                # stays: a later row of the same key is a repetition.
                items = sorted(_items(table, batch, places))
                with txn.cursor(db=database) as cursor:
                    cursor.putmulti(items, overwrite=False)
                rows += batch.num_rows
        return rows

    def _epoch_number(self, txn: lmdb.Transaction, epoch: str) -> int:
        # Read from the transaction, not from memory: what an aborted one had given out is not remembered.
        known = _read_epochs(self._shared, txn)
        for number, name in known.items():
            if name == epoch:
                return number
        number = max(known, default=0) + 1
        txn.put(_EPOCH_PREFIX + b"%d" % number, epoch.encode(), db=self._shared.meta)
        return number

    def _stamp(self, txn: lmdb.Transaction, table: Table) -> _Stamp | None:
        raw = txn.get(_stamp_key(table), db=self._shared.meta)
        return None if raw is None else msgspec.msgpack.decode(raw, type=_Stamp)


def _stamp_key(table: Table) -> bytes:
    return f"table:{table}".encode()


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


def _files_since(snapshot: Snapshot, stamp: _Stamp) -> list[FileEntry] | None:
    """Returns the files appended after a stamp; None when the stamp is not of this table's past."""
    if stamp.table_id != snapshot.table_id or stamp.version > snapshot.version:
        return None
    try:
        covered = read_commit(snapshot.directory, stamp.version)
        if covered is None or covered.fingerprint != stamp.fingerprint:
            return None
        entries: list[FileEntry] = []
        for version in range(stamp.version + 1, snapshot.version + 1):
            commit = read_commit(snapshot.directory, version)
            if commit is None:
                return None
            # A compaction's files hold rows that are known already, but for those that it took from files appended,
            # and taken out again, since the stamp.
            entries.extend(commit.adds)
    except TornCommitError:
        return None
    live = [entry for entry in entries if entry.path in snapshot.files]
    return sorted(live, key=lambda entry: (entry.epoch, entry.min_seq))


def _read_epochs(shared: _Environment, txn: lmdb.Transaction | None = None) -> dict[int, str]:
    if txn is None:
        with shared.env.begin() as own:
            return _read_epochs(shared, own)
    epochs: dict[int, str] = {}
    with txn.cursor(db=shared.meta) as cursor:
        if cursor.set_range(_EPOCH_PREFIX):
            for item in cursor:
                key, value = bytes(item[0]), bytes(item[1])
                if not key.startswith(_EPOCH_PREFIX):
                    break
                epochs[int(key.removeprefix(_EPOCH_PREFIX))] = value.decode()
    return epochs


def _open_environment(root: Path) -> _Environment:
    try:
        return _try_open(root)
    except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError, lmdb.PageNotFoundError) as error:
        reason: Exception = error
    except _ForeignIndexError as error:
        reason = error
    logger.warning(
        "index is damaged or foreign, starting an empty one",
        extra={"action": "index_discarded", "path": str(root), "error": str(reason)},
    )
    shutil.rmtree(root)
    try:
        return _try_open(root)
    except (lmdb.Error, _ForeignIndexError) as error:
        raise ConfigurationError(f"no index can be made in {root}: {error}", hint="check the disk") from error


class _ForeignIndexError(Exception):
    """The directory holds an LMDB file that is not an index of this format."""


def _try_open(root: Path) -> _Environment:
    root.mkdir(parents=True, exist_ok=True)
    env = lmdb.open(
        str(root), map_size=_map_bytes(root), max_dbs=8, metasync=False, sync=True, readahead=False, max_readers=512
    )
    try:
        # Reading a mapped page that the file does not have is a bus error, which nothing can catch.
        used = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if (root / "data.mdb").stat().st_size < used:
            raise _ForeignIndexError("the file is shorter than its own account of it")
        meta = env.open_db(b"meta")
        with env.begin(write=True) as txn:
            found = txn.get(b"format", db=meta)
            if found is None:
                txn.put(b"format", FORMAT, db=meta)
            elif found != FORMAT:
                raise _ForeignIndexError(f"format is {found[:40]!r}, this release writes {FORMAT!r}")
        databases: dict[Table, Any] = {table: env.open_db(name) for table, name in _DATABASES.items()}
    except BaseException:
        env.close()
        raise
    shared = _Environment(env, meta, databases, {}, threading.Lock())
    shared.epochs.update(_read_epochs(shared))
    return shared


def _map_bytes(root: Path) -> int:
    data = root / "data.mdb"
    used = data.stat().st_size if data.exists() else 0
    size = INITIAL_MAP_BYTES
    while size < used * 2:
        size *= 2
    return size
