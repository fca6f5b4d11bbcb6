"""The LMDB environment of an index: opened, made anew when damaged or foreign, opened again when it has failed."""

from __future__ import annotations

import logging
import shutil
import struct
import threading
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import lmdb
import msgspec

from holdfast.lake.index_seal import check_entries, reason_to_discard, seal
from holdfast.schemas.errors import ConfigurationError, UnavailableError

if TYPE_CHECKING:
    from holdfast.schemas.rows import Table

logger = logging.getLogger(__name__)

FORMAT: Final = b"holdfast-index-2"
INITIAL_MAP_BYTES: Final = 1 << 30
"""Address space at first, doubled when full; the file itself is sparse and grows with use."""

EPOCH_PREFIX: Final = b"epoch:"
PLACE: Final = struct.Struct("<HQ")
ENTRY: Final = struct.Struct("<HQI")
"""Epoch number, sequence, and the check of key and place."""
_CHECK: Final = struct.Struct("<I")

DAMAGED: Final = (
    lmdb.InvalidError,
    lmdb.CorruptedError,
    lmdb.VersionMismatchError,
    lmdb.PageNotFoundError,
    lmdb.BadValsizeError,
)
"""What LMDB raises on a file that is not what it wrote."""

_DATABASES: Final[dict[Table, bytes]] = {"contexts": b"contexts", "events": b"events", "key_versions": b"keys"}


class IndexDamagedError(UnavailableError):
    """An entry of the index is damaged; the next use begins an empty index, which is filled from the lake."""

    code = "index_damaged"


class Stamp(msgspec.Struct, frozen=True):
    """What a table's part of the index covers."""

    table_id: str
    version: int
    fingerprint: bytes
    rows: int
    entries: int
    # Files with rows that could not be read, by path.
    skipped: tuple[str, ...] = ()


def stamp_key(table: Table) -> bytes:
    """Returns where a table's stamp is."""
    return f"table:{table}".encode()


def read_stamp(txn: lmdb.Transaction, meta: Any, table: Table) -> Stamp | None:
    """Returns a table's stamp; None before the first refresh."""
    raw = txn.get(stamp_key(table), db=meta)
    try:
        return None if raw is None else msgspec.msgpack.decode(raw, type=Stamp)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise IndexDamagedError(f"the stamp of {table} in the index cannot be read: {error}") from error


def check_of(key: bytes, place: bytes) -> bytes:
    """Returns what an entry carries behind its place."""
    return _CHECK.pack(zlib.crc32(place, zlib.crc32(key)))


def is_sound(key: bytes, value: bytes) -> bool:
    """Whether an entry is what was written."""
    return len(value) == ENTRY.size and value[PLACE.size :] == check_of(key, value[: PLACE.size])


class _Opened(NamedTuple):
    env: lmdb.Environment
    meta: Any
    databases: dict[Table, Any]
    epochs: dict[int, str]


class Environment:
    """An open environment, shared by all that use its path in this process, and opened anew when it has failed.

    After an error of the disk in the middle of a commit, LMDB refuses every further transaction until the environment
    is opened again; what was committed is whole.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._opened: _Opened | None = self._open()
        self._is_damaged = False
        self._users = 0
        self._changed = threading.Condition()
        self.lock = threading.Lock()

    @property
    def env(self) -> lmdb.Environment:
        """The LMDB environment.  To be asked for within :meth:`in_use`."""
        return self._now.env

    @property
    def meta(self) -> Any:
        """The database of stamps and epochs.  To be asked for within :meth:`in_use`."""
        return self._now.meta

    @property
    def databases(self) -> dict[Table, Any]:
        """The database of each table.  To be asked for within :meth:`in_use`."""
        return self._now.databases

    @property
    def epochs(self) -> dict[int, str]:
        """Epochs by number, as far as they were read.  To be asked for within :meth:`in_use`."""
        return self._now.epochs

    @property
    def _now(self) -> _Opened:
        assert self._opened is not None, "the environment is used outside of in_use()"
        return self._opened

    @contextmanager
    def in_use(self) -> Generator[None]:
        """Keeps the environment open while the block lasts, and opens it anew before that when it has failed.

        Re-entrant: a use within a use never waits.
        """
        self._begin()
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Closes the environment, if it is open."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.env.close()
            if not self._is_damaged:
                seal(self._root)

    def discard_after_use(self) -> None:
        """Has an empty environment begun once nobody uses this one: it is damaged."""
        self._is_damaged = True

    def _begin(self) -> None:
        with self._changed:
            while self._users == 0 and self._has_failed():
                # Nobody is inside a transaction: only then may it be closed.
                self.close()
                if self._is_damaged:
                    logger.warning(
                        "index is damaged, starting an empty one",
                        extra={"action": "index_discarded", "path": str(self._root)},
                    )
                    shutil.rmtree(self._root)
                    self._is_damaged = False
                self._opened = self._open()
            self._users += 1

    def _open(self) -> _Opened:
        try:
            return _open_environment(self._root)
        except (lmdb.Error, OSError) as error:
            raise UnavailableError(
                f"the index {self._root} cannot be opened: {error}",
                hint="free space on its disk, or mend it; the index is a cache, and may be deleted while unused",
            ) from error

    def _has_failed(self) -> bool:
        if self._opened is None or self._is_damaged:
            return True
        try:
            self._opened.env.begin().abort()
        except lmdb.PanicError:
            return True
        return False


def read_epochs(shared: Environment | _Opened, txn: lmdb.Transaction | None = None) -> dict[int, str]:
    """Returns the epochs by number, as the database holds them, seen from ``txn`` if one is given."""
    if txn is None:
        with shared.env.begin() as own:
            return read_epochs(shared, own)
    epochs: dict[int, str] = {}
    with txn.cursor(db=shared.meta) as cursor:
        if cursor.set_range(EPOCH_PREFIX):
            for item in cursor:
                key, value = bytes(item[0]), bytes(item[1])
                if not key.startswith(EPOCH_PREFIX):
                    break
                epochs[int(key.removeprefix(EPOCH_PREFIX))] = value.decode()
    return epochs


def _open_environment(root: Path) -> _Opened:
    try:
        wrong = reason_to_discard(root)
        if wrong is not None:
            raise _ForeignIndexError(wrong)
        return _try_open(root)
    except (*DAMAGED, IndexDamagedError, _ForeignIndexError, ValueError) as error:
        reason: Exception = error
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


def _try_open(root: Path) -> _Opened:
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

        def stated(txn: lmdb.Transaction, table: Table) -> int | None:
            stamp = read_stamp(txn, meta, table)
            return None if stamp is None else stamp.entries

        wrong = check_entries(root, env, databases, stated, is_sound)
        if wrong is not None:
            raise _ForeignIndexError(wrong)
        opened = _Opened(env, meta, databases, {})
        opened.epochs.update(read_epochs(opened))
    except BaseException:
        env.close()
        raise
    return opened


def _map_bytes(root: Path) -> int:
    data = root / "data.mdb"
    used = data.stat().st_size if data.exists() else 0
    size = INITIAL_MAP_BYTES
    while size < used * 2:
        size *= 2
    return size
