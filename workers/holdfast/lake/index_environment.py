"""The LMDB environment of an index: opened, made anew when damaged or foreign, opened again when it has failed."""

from __future__ import annotations

import logging
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import lmdb
import msgspec

from holdfast.lake.index_seal import check_entries, reason_to_discard, seal
from holdfast.lake.memory import give_back
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


_PLACE_BYTES: Final = PLACE.size
_ENTRY_BYTES: Final = ENTRY.size


def is_sound(key: bytes, value: bytes, *, crc32: Callable[[bytes, int], int] = zlib.crc32) -> bool:
    """Whether an entry is what was written."""
    # As check_of says, spelt out: after a crash it is asked of millions before a worker serves.
    found = crc32(value[:_PLACE_BYTES], crc32(key, 0)).to_bytes(4, "little")
    return len(value) == _ENTRY_BYTES and value[_PLACE_BYTES:] == found


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
        self._held_back = 0
        self._is_outgrown = False
        self._is_swollen = False
        self._users = 0
        self._changed = threading.Condition()
        self._inside = threading.local()
        self.lock = threading.Lock()
        """For whoever writes, before :meth:`in_use`: who grows the map holds it, and waits for all users."""

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

        Waits while it is to be opened anew, or its map to be grown.  Re-entrant: a use within a use never waits.
        """
        self._begin()
        self._inside.depth = self._depth() + 1
        try:
            yield
        finally:
            self._inside.depth -= 1
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def _depth(self) -> int:
        depth: int = getattr(self._inside, "depth", 0)
        return depth

    @contextmanager
    def writing(self) -> Generator[lmdb.Transaction]:
        """A write transaction: committed after the block, aborted when that raises.  For within :meth:`in_use`."""
        txn = self.env.begin(write=True)
        try:
            yield txn
        except BaseException:
            # py-lmdb aborts in a moment in which no other thread is inside a call of it.  Of threads that read all the
            # time one always is: whoever comes now waits.
            with self._changed:
                self._held_back += 1
            try:
                txn.abort()
            finally:
                with self._changed:
                    self._held_back -= 1
                    self._changed.notify_all()
            raise
        txn.commit()

    def grow(self, full_bytes: int) -> None:
        """Doubles a map that was found to be full at that size; with 0, takes over what another process has made of it.

        Not to be called within :meth:`in_use`, for it waits until nobody is inside: a change of the map ends every
        transaction of the process.
        """
        with self._changed:
            self._held_back += 1
            try:
                while self._users:
                    self._changed.wait()
                if self._opened is None:
                    return  # closed meanwhile; whoever opens it takes the size from the file
                if full_bytes == 0:
                    self._opened.env.set_mapsize(0)
                elif self._opened.env.info()["map_size"] == full_bytes:
                    self._opened.env.set_mapsize(full_bytes * 2)
            finally:
                self._held_back -= 1
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

    def renew_after_use(self) -> None:
        """Has the environment opened anew once nobody is inside: LMDB keeps the memory of as many pages as its greatest
        transaction has written, up to 512 MiB, for as long as it is open."""
        self._is_swollen = True

    def take_over_after_use(self) -> None:
        """Has the size that another process has given the map taken over once nobody is inside."""
        self._is_outgrown = True

    def _begin(self) -> None:
        with self._changed:
            while not self._depth() and (self._held_back or (self._users and self._is_to_be_left())):
                self._changed.wait()
            if self._users == 0 and self._is_swollen:
                self._renew()
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

    def _is_to_be_left(self) -> bool:
        return self._is_outgrown or self._is_damaged or self._is_swollen

    def _renew(self) -> None:
        self._is_swollen = False
        if self._opened is None or self._is_damaged:
            return
        epochs = self._opened.epochs
        self._opened.env.close()
        self._opened = None  # until it is open again: what fails here is opened, and checked, as any other
        try:
            self._opened = _databases_of(_environment(self._root), epochs)
        except lmdb.Error:
            logger.warning(
                "index could not be opened again",
                exc_info=True,
                extra={"action": "index_reopened", "path": str(self._root)},
            )
        give_back()

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
        self._is_outgrown = False
        try:
            self._opened.env.begin().abort()
        except lmdb.MapResizedError:
            self._opened.env.set_mapsize(0)  # another process has grown it
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
    env = _environment(root)
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
        opened = _databases_of(env, {})

        def stated(txn: lmdb.Transaction, table: Table) -> int | None:
            stamp = read_stamp(txn, meta, table)
            return None if stamp is None else stamp.entries

        wrong = check_entries(root, env, opened.databases, stated, is_sound)
        if wrong is not None:
            raise _ForeignIndexError(wrong)
        opened.epochs.update(read_epochs(opened))
    except BaseException:
        env.close()
        raise
    return opened


def _environment(root: Path) -> lmdb.Environment:
    return lmdb.open(
        str(root), map_size=_map_bytes(root), max_dbs=8, metasync=False, sync=True, readahead=False, max_readers=512
    )


def _databases_of(env: lmdb.Environment, epochs: dict[int, str]) -> _Opened:
    return _Opened(env, env.open_db(b"meta"), {table: env.open_db(name) for table, name in _DATABASES.items()}, epochs)


def _map_bytes(root: Path) -> int:
    data = root / "data.mdb"
    used = data.stat().st_size if data.exists() else 0
    size = INITIAL_MAP_BYTES
    while size < used * 2:
        size *= 2
    return size
