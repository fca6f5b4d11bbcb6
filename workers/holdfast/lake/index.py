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
*skipped*: until it is healed, "not known" may not be said of anything (:meth:`LakeIndex.ask`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import lmdb
import msgspec

from holdfast.lake.checksums import whole_damage
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
from holdfast.lake.index_rows import (
    VERSION,
    event_key,
    files_since,
    identities_in,
    items_of,
    readable_again,
    version_key,
)
from holdfast.lake.quarantine import Quarantine, damaged_error
from holdfast.schemas.errors import DamagedError, UnavailableError
from holdfast.schemas.refs import Digest, digest_to_bytes
from holdfast.schemas.rows import TABLES, Position, Table

if TYPE_CHECKING:
    from holdfast.lake.lake import Lake
    from holdfast.lake.log import FileEntry, Snapshot

logger = logging.getLogger(__name__)

EventKey = tuple[str, str]
"""(namespace, event id)."""
VersionKey = tuple[str, str, int]
"""(namespace, key, version)."""


RENEW_PAGES: Final = 8_192
"""A commit that may have written so many pages, 32 MiB, has the index opened anew: LMDB keeps their memory."""

_RAW_KEYS: Final[dict[Table, Callable[[Any], bytes]]] = {
    "contexts": digest_to_bytes,
    "events": lambda key: event_key(uuid.UUID(key[1]).bytes, key[0]),
    "key_versions": lambda key: version_key(*key),
}


class Answer(NamedTuple):
    """What the index knows of some keys: positions, and the damaged files that may hold what is missing from them."""

    positions: dict[Any, Position]
    skipped: tuple[str, ...]


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
        return self._find("contexts", digests)

    def find_events(self, keys: Iterable[EventKey]) -> dict[EventKey, Position]:
        """Returns the positions of these (namespace, event id), of those that are known."""
        return self._find("events", keys)

    def find_key_versions(self, keys: Iterable[VersionKey]) -> dict[VersionKey, Position]:
        """Returns the positions of these (namespace, key, version), of those that are known."""
        return self._find("key_versions", keys)

    def last_key_version(self, namespace: str, key: str) -> tuple[int, Position] | None:
        """Returns the highest archived version of a key and its position."""
        last = self.key_versions_before(namespace, key, None, 1)
        return last[0] if last else None

    def key_versions_before(
        self, namespace: str, key: str, version: int | None, limit: int
    ) -> list[tuple[int, Position]]:
        """Returns up to ``limit`` archived versions of a key below ``version`` (None: from the highest), descending.

        Raises UnavailableError where the index is empty because it was never refreshed, or has just been begun anew.
        """
        prefix = version_key(namespace, key, 0)[:16]
        # The first key that is too high, then back from there.
        bound = prefix + b"\xff" * 9 if version is None else prefix + VERSION.pack(version)
        found: list[tuple[int, Position]] = []
        with self._reading() as shared, shared.env.begin(db=shared.databases["key_versions"], buffers=False) as txn:
            stamp = self._stamp(txn, "key_versions")
            if stamp is None:
                raise UnavailableError(f"the index {self.path} is being built", hint="try again")
            if stamp.skipped:
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
                found.append((VERSION.unpack(raw[16:])[0], self._position(raw, cursor.value())))
                there = cursor.prev()
        return found

    def ask(self, table: Table, keys: Iterable[Any], *, version: int) -> Answer:
        """Returns the positions of these keys (of contexts: digests), and what may hide others.

        What is missing then is neither in ``version`` of the table nor in any before, unless in a file that is
        ``skipped``.  Raises UnavailableError when that cannot be said: the index does not cover that version, since it
        was not refreshed, or was found damaged meanwhile and begun anew.
        """
        wanted = list(keys)
        with self._reading() as shared, shared.env.begin(buffers=False) as txn:
            found = self._found(txn, shared.databases[table], ((key, _RAW_KEYS[table](key)) for key in wanted))
            stamp = self._stamp(txn, table)
        if all(key in found for key in wanted):
            return Answer(found, ())
        if stamp is None or stamp.version < version:
            covered = "nothing" if stamp is None else f"version {stamp.version}"
            raise UnavailableError(
                f"the index {self.path} covers {covered} of {table}, not version {version}",
                hint="nothing: it is refreshed, and asked again",
            )
        return Answer(found, stamp.skipped)

    def require(self, lake: Lake, table: Table, keys: Iterable[Any]) -> dict[Any, Position]:
        """Returns the positions of these keys after a refresh: what is missing, the lake of this moment does not hold.

        Raises UnavailableError as :meth:`ask`, and DamagedError when rows of a damaged file may be what is missing.
        """
        version = self.refresh(lake).versions[table]
        snapshot = lake.snapshot(table)
        answer = self.ask(table, keys, version=version)
        for path in answer.skipped:
            entry = snapshot.files.get(path)
            if entry is None:  # another process has healed it, or has got further with the index than this lake is read
                raise UnavailableError(f"{snapshot.directory / path} was damaged, and is gone", hint="try again")
            record = Quarantine(snapshot.directory).files().get(path)
            damage = record.damage() if record else whole_damage(entry, "it could not be read")
            raise damaged_error(snapshot.directory, damage)
        return answer.positions

    @contextmanager
    def _reading(self) -> Generator[Environment]:
        """Within the block, what LMDB raises is told as an error of ours; after damage the next use makes it anew."""
        with self._using(self._not_read) as shared:
            yield shared

    @contextmanager
    def _using(self, told: Callable[[lmdb.Error], UnavailableError]) -> Generator[Environment]:
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
            except lmdb.MapResizedError as error:
                self._shared.take_over_after_use()
                raise told(error) from error
            except lmdb.Error as error:
                raise told(error) from error

    def _not_read(self, error: lmdb.Error) -> UnavailableError:
        return UnavailableError(f"the index {self.path} cannot be read: {error}", hint="check its disk; try again")

    def _find(self, table: Table, keys: Iterable[Any]) -> dict[Any, Position]:
        with self._reading() as shared, shared.env.begin(buffers=False) as txn:
            return self._found(txn, shared.databases[table], ((key, _RAW_KEYS[table](key)) for key in keys))

    def _found(self, txn: lmdb.Transaction, database: Any, keys: Iterable[tuple[Any, bytes]]) -> dict[Any, Position]:
        found: dict[Any, Position] = {}
        for key, raw in keys:
            value = txn.get(raw, db=database)
            if value is not None:
                found[key] = self._position(raw, bytes(value))
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
        with self._reading() as shared, shared.env.begin() as txn:
            stamp = self._stamp(txn, table)
        return -1 if stamp is None else stamp.version

    def count(self, table: Table) -> int:
        """Returns how many entries there are for a table."""
        with self._reading() as shared, shared.env.begin() as txn:
            entries: int = txn.stat(shared.databases[table])["entries"]
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
        except IndexDamagedError:
            # Begun anew by the next use: this one, or whoever asks only after a refresh would never get that far.
            return self._update_all(lake, forget=forget)

    def _update_all(self, lake: Lake, *, forget: bool) -> IndexReport:
        started = time.monotonic()
        lake.refresh()
        versions: dict[Table, int] = {}
        rebuilt: list[Table] = []
        rows = 0
        for table in TABLES:
            snapshot = lake.snapshot(table)
            versions[table] = snapshot.version
            if not forget and self._covers(snapshot):
                continue
            added, anew = self._growing(snapshot, forget=forget)
            rows += added
            if anew:
                rebuilt.append(table)
        return IndexReport(
            versions=versions, rows_added=rows, rebuilt=tuple(rebuilt), seconds=time.monotonic() - started
        )

    def _covers(self, snapshot: Snapshot) -> bool:
        with self._reading() as shared, shared.env.begin() as txn:
            stamp = self._stamp(txn, snapshot.table)
        return (
            stamp is not None
            and (stamp.version, stamp.fingerprint) == (snapshot.version, snapshot.fingerprint)
            and not (stamp.skipped and readable_again(snapshot, stamp.skipped))
        )

    def _growing(self, snapshot: Snapshot, *, forget: bool) -> tuple[int, bool]:
        """Updates one table's part, with a larger map if the present one is full."""
        with self._shared.lock:
            while True:
                # Grown outside of the use, when nobody else is inside either: it ends every transaction under way.
                with self._using(self._not_updated) as shared:
                    full_bytes: int = shared.env.info()["map_size"]
                    try:
                        with shared.writing() as txn:
                            added, anew = self._update_table(txn, snapshot, forget=forget)
                            pages: int = txn.stat(shared.databases[snapshot.table])["leaf_pages"]
                        if min(added, pages) >= RENEW_PAGES:
                            shared.renew_after_use()
                        return added, anew
                    except lmdb.MapFullError:
                        pass
                    except lmdb.MapResizedError:
                        full_bytes = 0  # another process has grown it
                try:
                    self._shared.grow(full_bytes)
                except lmdb.Error as error:
                    raise self._not_updated(error) from error

    def _not_updated(self, error: lmdb.Error) -> UnavailableError:
        return UnavailableError(
            f"the index {self.path} cannot be brought up to date: {error}",
            hint="free space on its disk; it is a cache, and may be deleted while nothing uses it",
        )

    def _update_table(self, txn: lmdb.Transaction, snapshot: Snapshot, *, forget: bool) -> tuple[int, bool]:
        table = snapshot.table
        # Read inside the write transaction: another process may have done the work meanwhile.
        stamp = self._stamp(txn, table)
        new_files = None if forget or stamp is None else files_since(snapshot, stamp)
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
        again = readable_again(snapshot, known)
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
        batches, is_whole = identities_in(snapshot, entry)
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
        items = sorted((key, place + check_of(key, place)) for key, place in items_of(table, batch, places))
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
