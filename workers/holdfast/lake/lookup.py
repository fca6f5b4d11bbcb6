"""Point look-ups: from an identity to its row by reading one row group.

Index → (epoch, sequence) → the file whose range holds it → the row group whose Parquet statistics hold it → that
group, decoded.  Files stay open with their footers, a bounded number of them; a batch reads each row group once.

Each time a row group is read its checksum is compared, and the footer's when a file is opened: damage is told as
DamagedError for the rows concerned, recorded (:mod:`holdfast.lake.quarantine`), and everything else is served.

Another process may have taken out a row that a later one repeats (:mod:`holdfast.lake.passed_over`).  When what the
index names has gone, it is refreshed once, and asked again.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeVar, cast

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from holdfast.lake.checksums import Damage, damage_of_parts, part_is_sound, readable, seq_ranges, whole_damage
from holdfast.lake.columns import to_rows
from holdfast.lake.index_environment import IndexDamagedError
from holdfast.lake.joints import assemble
from holdfast.lake.manifests import check_size, decode_manifest, join, require_chunks
from holdfast.lake.memory import moved
from holdfast.lake.parquet_reading import open_parquet, read_group
from holdfast.lake.quarantine import Quarantine, damaged_error
from holdfast.schemas.errors import DigestMismatchError, IntegrityError
from holdfast.schemas.refs import Digest, compute_digest
from holdfast.schemas.rows import ContextRow, EventRow, KeyVersionRow, Position, Row, Table

if TYPE_CHECKING:
    from holdfast.lake.index import EventKey, LakeIndex, VersionKey
    from holdfast.lake.lake import Lake
    from holdfast.lake.log import FileEntry, Snapshot

K = TypeVar("K")
Find = Callable[[list[K]], "dict[K, Position]"]

OPEN_FILES: Final = 64
"""How many files are kept open.  A footer of 125 row groups takes ~0.5 MB of memory."""

READERS: Final = 2
"""Threads that read row groups ahead of calls that want several; a call has one group ahead of it."""

KEPT_GROUPS: Final = 8
"""How many decoded row groups a call keeps while it looks up the parts of joints: 24 MiB of bodies."""

READ_ATTEMPTS: Final = 3

_CHUNKS_READ: Final = 128
"""Chunks of one body read at once: 64 MiB, as much as the largest body."""


class Lookup:
    """Reads rows by identity from one lake.  Safe to use from several threads; each call blocks on the disk.

    A row that the index does not know is looked for once more after a refresh of the index, so a ``None`` means that
    the lake of this moment does not hold it.
    """

    def __init__(self, lake: Lake, index: LakeIndex, *, open_files: int = OPEN_FILES) -> None:
        self._lake = lake
        self._index = index
        self._files = _OpenFiles(open_files)
        self._maps: dict[Table, _FileMap] = {}
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="holdfast-read-ahead")

    def close(self) -> None:
        """Closes the files; the lake and the index are the caller's."""
        self._readers.shutdown()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get_contexts(self, digests: Iterable[Digest]) -> dict[Digest, ContextRow]:
        """Returns the rows that hold these contexts, of those that the lake holds; manifests as stored.

        A joint comes as the chunk that it stands for.  Every body but a manifest's is hashed again:
        DigestMismatchError names the file and the row of one that is damaged, IntegrityError the part that a joint
        lacks.
        """
        groups = _Groups()
        found = self._stored(digests, groups)
        joints = [row for row in found.values() if row.form == "joint"]
        if joints:
            made, failed = assemble(joints, lambda parts: self._stored(parts, groups))
            if failed:
                raise next(iter(failed.values()))
            found |= made
        return found

    def _stored(self, digests: Iterable[Digest], groups: _Groups) -> dict[Digest, ContextRow]:
        """Returns rows as they are stored, checked but for those that name others."""
        found: dict[Digest, ContextRow] = {}
        for digest, (position, row) in self._named("contexts", digests, self._index.find_contexts, groups).items():
            found[digest] = context = cast(ContextRow, row)
            self._check(context, digest, position)
        return found

    def get_events(self, keys: Iterable[EventKey]) -> dict[EventKey, EventRow]:
        """Returns the events of these (namespace, id), of those that the lake holds."""
        found: dict[EventKey, EventRow] = {}
        for key, (position, row) in self._named("events", keys, self._index.find_events).items():
            event = found[key] = cast(EventRow, row)
            self._require_same("events", key, (event.namespace, event.id), position)
        return found

    def get_key_versions(self, keys: Iterable[VersionKey]) -> dict[VersionKey, KeyVersionRow]:
        """Returns the versions of these (namespace, key, version), of those that the lake holds."""
        found: dict[VersionKey, KeyVersionRow] = {}
        for key, (position, row) in self._named("key_versions", keys, self._index.find_key_versions).items():
            version = found[key] = cast(KeyVersionRow, row)
            self._require_same("key_versions", key, (version.namespace, version.key, version.version), position)
        return found

    def rows_at(self, table: Table, positions: Iterable[Position]) -> dict[Position, Row]:
        """Returns the rows at these positions, as they are stored; raises IntegrityError when one is not there."""
        return self._read(table, positions)

    def _named(
        self, table: Table, keys: Iterable[K], find: Find[K], groups: _Groups | None = None
    ) -> dict[K, tuple[Position, Row]]:
        """Returns the rows that the index names for these keys, and where they are.

        Raises IntegrityError when the newest index names a row that is not there; a touch is left to the caller.
        """
        wanted = list(dict.fromkeys(keys))
        positions = self._find(table, wanted, find)
        try:
            rows = self._read(table, positions.values(), groups)
            is_of_before = table == "contexts" and any(cast(ContextRow, row).form == "touch" for row in rows.values())
        except _MissingRowError:
            rows, is_of_before = {}, True
        if is_of_before:
            positions = self._index.require(self._lake, table, wanted)
            rows = self._read(table, positions.values(), groups)
        return {key: (position, rows[position]) for key, position in positions.items()}

    def _find(self, table: Table, wanted: list[K], find: Find[K]) -> dict[K, Position]:
        """Returns the positions of what the lake holds; raises DamagedError when damage hides whether it does."""
        try:
            positions = find(wanted)
        except IndexDamagedError:
            positions = {}  # the refresh builds it anew
        if len(positions) < len(wanted):
            positions = self._index.require(self._lake, table, wanted)
        return positions

    def _require_same(self, table: Table, key: object, actual: object, position: Position) -> None:
        if key != actual:
            raise IntegrityError(
                f"row {position.epoch}/{position.seq} of {table} is {actual}, where the index names {key}",
                hint="run holdfast verify; if it finds nothing, delete the index directory",
            )

    def get_body(self, digest: Digest) -> tuple[ContextRow, bytes] | None:
        """Returns a context's row and its whole body, chunks joined and the digest verified; None if not here.

        Raises IntegrityError when a chunk is missing, DigestMismatchError when the whole is not what it should be.
        """
        row = self.get_contexts([digest]).get(digest)
        if row is None:
            return None
        if row.form != "manifest":
            return row, row.body
        return row, self.join(row)

    def join(self, row: ContextRow) -> bytes:
        """Returns the whole body of a manifest's row, verified.

        Stops reading chunks when they make more bytes than the manifest promises.
        """
        manifest = decode_manifest(row)
        wanted = list(dict.fromkeys(manifest.chunks))
        chunks: dict[Digest, bytes] = {}
        for start in range(0, len(wanted), _CHUNKS_READ):
            some = self.get_contexts(wanted[start : start + _CHUNKS_READ])
            chunks |= {digest: chunk.body for digest, chunk in some.items()}
            check_size(row, manifest, {digest: len(body) for digest, body in chunks.items()}, so_far=True)
        require_chunks(row, manifest, chunks)
        return join(row, manifest, chunks)

    def _check(self, row: ContextRow, digest: Digest, position: Position) -> None:
        if row.form in ("manifest", "joint"):
            actual = row.digest  # the whole is checked when its chunks are joined
        else:
            actual = compute_digest(
                row.namespace, row.kind, row.body, content_type=row.content_type, expires_at_ms=row.expires_at_ms
            )
        if actual != digest:
            file = self._file_map("contexts").candidates(position)
            raise DigestMismatchError(
                f"row {position.epoch}/{position.seq} of {', '.join(entry.path for entry in file)} "
                f"hashes to {actual}, not to {digest}",
                hint="run holdfast verify; restore the file from a backup",
            )

    def _read(self, table: Table, positions: Iterable[Position], groups: _Groups | None = None) -> dict[Position, Row]:
        """Returns the rows at these positions, all of them."""
        wanted = set(positions)
        if not wanted:
            return {}
        missing: Position | None = None
        reason = ""
        damages: dict[str, Damage] = {}
        for attempt in range(READ_ATTEMPTS):
            if attempt:
                self._lake.refresh(table)
            try:
                rows = self._read_from(self._file_map(table), wanted, groups or _Groups(), damages)
            except FoundDamageError as found:
                # Compacted and vacuumed under us, the newest version names another file.
                self._lake.refresh(table)
                snapshot = self._lake.snapshot(table)
                self._files.drop(snapshot.directory / found.entry.path)
                missing, reason = None, found.damage.describe()
                if found.entry.path in snapshot.files:
                    damages[found.entry.path] = _record(snapshot, found.entry, found.damage)
                    # At midnight the range of the other day's file may hold a row as well.
                    hidden = [position for position in wanted if hides(damages[found.entry.path], position)]
                    if not all(self._file_map(table).candidates(position, damages) for position in hidden):
                        raise damaged_error(snapshot.directory, found.damage) from found
                continue
            if len(rows) == len(wanted):
                return rows
            missing = next(position for position in wanted if position not in rows)
            reason = f"there is no row {missing.epoch}/{missing.seq}, which the index names"
        if damages:
            raise damaged_error(self._lake.snapshot(table).directory, next(iter(damages.values())))
        raise (IntegrityError if missing is None else _MissingRowError)(
            f"{table} cannot be read: {reason}",
            hint="run holdfast verify; if it finds nothing, delete the index directory",
        )

    def _read_from(
        self, files: _FileMap, wanted: set[Position], groups: _Groups, damages: Mapping[str, Damage]
    ) -> dict[Position, Row]:
        by_file: dict[str, list[int]] = defaultdict(list)
        entries: dict[str, FileEntry] = {}
        for position in wanted:
            for entry in files.candidates(position, damages):
                entries[entry.path] = entry
                by_file[entry.path].append(position.seq)
        places = (
            (file, group, of_group)
            # One file after another, each opened once however many are kept open.
            for path, of_file in sorted(by_file.items())
            for file in [self._files.get(files.directory, entries[path])]
            for group, of_group in file.by_group(of_file)
        )
        rows: dict[Position, Row] = {}
        for content, seqs in self._one_ahead(places, groups):
            for row in to_rows(files.table, _with_seqs(content, seqs)):
                position = Position(row.epoch, row.seq)
                if position in wanted:
                    rows[position] = row
        return rows

    def _one_ahead(
        self, places: Iterator[tuple[_OpenFile, int, list[int]]], groups: _Groups
    ) -> Iterator[tuple[Any, list[int]]]:
        """Yields row groups with the sequences wanted of each; while rows are made of one, another thread reads the
        next, which pyarrow does without Python's lock."""
        here = next(places, None)
        if here is None:
            return
        content = groups.get(here[0], here[1])
        for there in places:
            reading = self._readers.submit(groups.get, there[0], there[1])
            yield content, here[2]
            here, content = there, reading.result()
        yield content, here[2]

    def _file_map(self, table: Table) -> _FileMap:
        snapshot = self._lake.snapshot(table)
        known = self._maps.get(table)
        if known is None or known.version != snapshot.version:
            known = self._maps[table] = _FileMap.of(snapshot)
            # What was merged away is read no more, and a file that is open keeps its space when it is removed.
            self._files.keep(snapshot.directory, snapshot.files)
        return known


class _FileMap(NamedTuple):
    """Which files may hold a sequence.  Ranges seldom overlap: at midnight, where two days interleave."""

    table: Table
    directory: Path
    version: int
    epochs: dict[str, tuple[list[int], list[int], list[FileEntry]]]

    @classmethod
    def of(cls, snapshot: Snapshot) -> _FileMap:
        by_epoch: dict[str, list[FileEntry]] = defaultdict(list)
        for entry in snapshot.files.values():
            by_epoch[entry.epoch].append(entry)
        epochs: dict[str, tuple[list[int], list[int], list[FileEntry]]] = {}
        for epoch, entries in by_epoch.items():
            entries.sort(key=lambda entry: entry.max_seq)
            lowest = list(accumulate((entry.min_seq for entry in reversed(entries)), min))[::-1]
            epochs[epoch] = [entry.max_seq for entry in entries], lowest, entries
        return cls(snapshot.table, snapshot.directory, snapshot.version, epochs)

    def candidates(self, position: Position, damages: Mapping[str, Damage] | None = None) -> list[FileEntry]:
        """Returns the files that may hold a row, without those in which damage would hide it."""
        ends, lowest, entries = self.epochs.get(position.epoch, ([], [], []))
        found: list[FileEntry] = []
        # From the first file that ends late enough, up to where every further one begins too late.
        for i in range(bisect_left(ends, position.seq), len(entries)):
            if lowest[i] > position.seq:
                break
            damage = damages.get(entries[i].path) if damages else None
            if entries[i].min_seq <= position.seq and not (damage and hides(damage, position)):
                found.append(entries[i])
        return found


def hides(damage: Damage, position: Position) -> bool:
    """Whether a row, if it is in the damaged file, cannot be read for it."""
    spans = damage.ranges if damage.epoch == position.epoch else ()
    return any(span.first_seq <= position.seq <= span.last_seq for span in spans)


def _record(snapshot: Snapshot, entry: FileEntry, damage: Damage) -> Damage:
    """Records what is wrong with a file, and returns all that is known of it.

    A look-up meets one row group: that must not take the place of what the scrub knows of the others.
    """
    quarantine = Quarantine(snapshot.directory)
    known = quarantine.files().get(entry.path)
    if known is not None and known.groups is not None and damage.groups is not None:
        spans = dict(zip((*known.groups, *damage.groups), (*known.ranges, *damage.ranges), strict=True))
        groups, ranges = zip(*sorted(spans.items()), strict=True)
        damage = msgspec.structs.replace(damage, what=f"{known.what}; {damage.what}", groups=groups, ranges=ranges)
    return quarantine.add(entry, damage).damage()


class _MissingRowError(IntegrityError):
    """The lake has no row where the index names one."""


class FoundDamageError(Exception):
    """A file is damaged: which, and how.  Told to the caller as DamagedError, if the file is still in use."""

    def __init__(self, entry: FileEntry, damage: Damage) -> None:
        super().__init__(damage.what)
        self.entry = entry
        self.damage = damage


class _OpenFile:
    """One Parquet file with its footer, and the sequence range of each row group."""

    def __init__(self, directory: Path, entry: FileEntry) -> None:
        self.directory = directory
        self.entry = entry
        self.path = path = directory / entry.path
        self._lock = threading.Lock()
        checksums = entry.checksums
        try:
            with readable(path):
                # One descriptor to compare and for Arrow to read: the same file, also when another takes its name.
                self._source: Any = pa.OSFile(str(path))
            size = os.fstat(self._source.fileno()).st_size
            if size != entry.size_bytes:
                what = f"the file has {size} bytes, the log says {entry.size_bytes}"
                raise FoundDamageError(entry, whole_damage(entry, what))
            if checksums is not None and not self._part_is_sound(len(checksums.parts) - 1):
                raise FoundDamageError(entry, damage_of_parts(directory, entry, [len(checksums.parts) - 1]))
            with readable(path):
                # With checksums of our own those of the pages say nothing more, and cost as much.
                self._parquet: Any = open_parquet(self._source, checks_pages=checksums is None)
        except FileNotFoundError as error:
            raise FoundDamageError(entry, whole_damage(entry, "the file is missing")) from error
        except IntegrityError as error:
            raise FoundDamageError(entry, whole_damage(entry, error.message)) from error
        self._ranges = seq_ranges(self._parquet.metadata)
        self._starts: list[int] = [span.first_seq for span in self._ranges]
        self._ends: list[int] = [span.last_seq for span in self._ranges]

    def groups_of(self, seq: int) -> list[int]:
        group = bisect_left(self._ends, seq)
        return [group] if group < len(self._ends) and self._starts[group] <= seq else []

    def by_group(self, seqs: Iterable[int]) -> list[tuple[int, list[int]]]:
        """Returns the row groups that may hold these sequences, in order, with those of each."""
        found: dict[int, list[int]] = defaultdict(list)
        for seq in seqs:
            for group in self.groups_of(seq):
                found[group].append(seq)
        return sorted(found.items())

    def read(self, group: int) -> Any:
        checksums = self.entry.checksums
        with self._lock:
            try:
                if checksums is not None and not self._part_is_sound(group):
                    raise FoundDamageError(self.entry, damage_of_parts(self.directory, self.entry, [group]))
                with readable(self.path):
                    content = read_group(self._parquet, group)
            except FileNotFoundError as error:
                raise FoundDamageError(self.entry, whole_damage(self.entry, "the file is missing")) from error
            except IntegrityError as error:
                damage = Damage(
                    path=self.entry.path,
                    what=error.message,
                    epoch=self.entry.epoch,
                    groups=(group,),
                    ranges=(self._ranges[group],),
                )
                raise FoundDamageError(self.entry, damage) from error
        moved(content.nbytes)
        return content

    def _part_is_sound(self, part: int) -> bool:
        checksums = self.entry.checksums
        return checksums is None or part_is_sound(self._source.fileno(), checksums, part)

    def close(self) -> None:
        with self._lock:
            self._source.close()


def _with_seqs(content: Any, seqs: Sequence[int]) -> Any:
    wanted = pc.SetLookupOptions(value_set=pa.array(seqs, pa.int64()))
    return content.filter(pc.call_function("is_in", [content.column("stream_seq")], wanted))


class _Groups:
    """Row groups decoded for one call, those used last: the parts of joints are near them, and often in one group."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[Path, int], Any] = OrderedDict()

    def get(self, file: _OpenFile, group: int) -> Any:
        path = file.path
        content = self._groups.get((path, group))
        if content is None:
            content = self._groups[path, group] = file.read(group)
            if len(self._groups) > KEPT_GROUPS:
                self._groups.popitem(last=False)
        else:
            self._groups.move_to_end((path, group))
        return content


class _OpenFiles:
    """The files used last, open."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, directory: Path, entry: FileEntry) -> _OpenFile:
        path = directory / entry.path
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _OpenFile(directory, entry)
                # Dropped, not closed: another thread may be reading it; it closes when the last one is done.
                if len(self._files) > self._limit:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
            return file

    def keep(self, directory: Path, paths: Container[str]) -> None:
        """Drops the files of a table that are none of these."""
        with self._lock:
            for path, file in list(self._files.items()):
                if file.directory == directory and file.entry.path not in paths:
                    del self._files[path]

    def drop(self, path: Path) -> None:
        with self._lock:
            self._files.pop(path, None)

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
