"""Checksums of data files: recorded at commit, compared before anything of a file is believed.

Parquet's own page checksums leave page headers, Bloom filters, indexes and the footer uncovered, and DuckDB does not
look at them: of 600 flipped bits it served wrong values for two thirds and noticed a sixth.  So the add action of every
file carries, in its statistics, a SHA-256 of the whole and a CRC-32 of each part.  The parts are the row groups, in
order, and the tail behind them.  A look-up compares the part that it reads, each time; a scan compares whole files, the
first time that a process meets them.  CRC-32 finds every flipped bit and every burst up to 32 bits, at four times the
speed of SHA-256, which is for the scrub and for copies.

Files of earlier releases carry none; compaction gives them theirs.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from holdfast.lake.log import Checksums, FileEntry
from holdfast.schemas.errors import IntegrityError, UnavailableError

_READ_BYTES: Final = 1 << 20


class RowRange(msgspec.Struct, frozen=True, array_like=True):
    """Rows of one row group, or of a whole file: how many, and between which sequences."""

    rows: int
    first_seq: int
    last_seq: int


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with a data file, and which of its rows cannot be read for it.

    ``groups`` are the row groups concerned; None when nothing of the file can be believed.
    """

    path: str
    what: str
    epoch: str
    groups: tuple[int, ...] | None
    ranges: tuple[RowRange, ...]

    @property
    def rows(self) -> int:
        """How many rows cannot be read."""
        return sum(span.rows for span in self.ranges)

    def describe(self) -> str:
        """Returns what to tell of it: the rows by number and sequence, and the reason."""
        spans = ", ".join(f"{span.first_seq} to {span.last_seq}" for span in self.ranges)
        return f"{self.rows} rows of {self.epoch}, {spans}, cannot be read: {self.what}"


def part_ends(metadata: Any, size: int) -> list[int]:
    """Returns where the parts of a Parquet file end, the last at its size."""
    starts: list[int] = []
    ends: list[int] = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(column) for column in range(group.num_columns)]
        starts.append(min(_start(column) for column in columns))
        ends.append(max(_start(column) + column.total_compressed_size for column in columns))
    return [*starts[1:], *ends[-1:], size]


def _start(column: Any) -> int:
    dictionary: int | None = column.dictionary_page_offset
    data: int = column.data_page_offset
    return data if dictionary is None else min(dictionary, data)


def compute_checksums(path: Path) -> Checksums:
    """Returns the checksums of a file just written, reading it once."""
    size = path.stat().st_size
    whole = hashlib.sha256()
    parts: list[tuple[int, int]] = []
    with path.open("rb", buffering=0) as file:
        start = 0
        for end in part_ends(pq.read_metadata(path), size):
            crc = 0
            for piece in _pieces(file.fileno(), start, end):
                crc = zlib.crc32(piece, crc)
                whole.update(piece)
            parts.append((end, crc))
            start = end
    return Checksums(whole.hexdigest(), tuple(parts))


def _pieces(descriptor: int, start: int, end: int) -> Generator[bytes]:
    while start < end:
        piece = os.pread(descriptor, min(_READ_BYTES, end - start), start)
        if not piece:
            raise IntegrityError(f"ends at {start}, not at {end}", hint="run holdfast verify")
        yield piece
        start += len(piece)


def part_is_sound(descriptor: int, checksums: Checksums, part: int) -> bool:
    """Whether one part of an open file is what was written."""
    start = checksums.parts[part - 1][0] if part else 0
    end, expected = checksums.parts[part]
    crc = 0
    try:
        for piece in _pieces(descriptor, start, end):
            crc = zlib.crc32(piece, crc)
    except IntegrityError:
        return False
    return crc == expected


@contextmanager
def readable(path: Path) -> Generator[None]:
    """Translates what Arrow raises on a file: damage and a disk that does not answer are told apart."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        if getattr(error, "errno", None) is not None:
            raise UnavailableError(f"{path} cannot be read: {error}", hint="check the disk") from error
        raise IntegrityError(
            f"{path} is damaged: {error}", hint="run holdfast verify; restore the file from a backup"
        ) from error


# Which files this process has compared whole, by path, with what they were then: a file never changes under its name.
_sound: dict[Path, tuple[int, int, int]] = {}
_sound_lock = threading.Lock()
_MOST_REMEMBERED: Final = 100_000


def find_damage(directory: Path, entry: FileEntry, *, again: bool = False) -> Damage | None:
    """Compares a whole file with its checksums and returns what is wrong with it.

    Does so once in a process, unless the file's size, time or inode changes or ``again`` is set.  A file without
    checksums is compared by its size alone.  Raises UnavailableError when the disk does not answer.
    """
    path = directory / entry.path
    try:
        stat = path.stat()
    except FileNotFoundError:
        return whole_damage(entry, "the file is missing")
    except OSError as error:
        raise UnavailableError(f"{path} cannot be read: {error}", hint="check the disk") from error
    identity = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    if not again and _sound.get(path) == identity:
        return None
    if stat.st_size != entry.size_bytes:
        return whole_damage(entry, f"the file has {stat.st_size} bytes, the log says {entry.size_bytes}")
    checksums = entry.checksums
    if checksums is None:
        return None
    try:
        with readable(path), path.open("rb", buffering=0) as file:
            bad = [part for part in range(len(checksums.parts)) if not part_is_sound(file.fileno(), checksums, part)]
    except FileNotFoundError:
        return whole_damage(entry, "the file is missing")
    if bad:
        return damage_of_parts(directory, entry, bad)
    with _sound_lock:
        if len(_sound) >= _MOST_REMEMBERED:
            _sound.clear()
        _sound[path] = identity
    return None


def whole_damage(entry: FileEntry, what: str) -> Damage:
    """Returns the damage of a file of which nothing can be believed."""
    span = RowRange(entry.rows, entry.min_seq, entry.max_seq)
    return Damage(path=entry.path, what=what, epoch=entry.epoch, groups=None, ranges=(span,))


def damage_of_parts(directory: Path, entry: FileEntry, parts: Sequence[int]) -> Damage:
    """Returns the damage of a file whose ``parts`` are not what was written; a bad tail damages the whole."""
    assert entry.checksums is not None
    last = len(entry.checksums.parts) - 1
    if last in parts:
        return whole_damage(entry, "its footer or indexes differ from what was written")
    try:
        ranges = seq_ranges(pq.read_metadata(directory / entry.path))
    except (OSError, pa.ArrowException) as error:
        return whole_damage(entry, f"its footer cannot be read: {error}")
    named = ", ".join(str(part) for part in parts)
    return Damage(
        path=entry.path,
        what=f"row group {named} of {last} differs from what was written",
        epoch=entry.epoch,
        groups=tuple(parts),
        ranges=tuple(ranges[part] for part in parts),
    )


def seq_ranges(metadata: Any) -> list[RowRange]:
    """Returns how many rows each row group has, and of which sequences."""
    column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).name == "stream_seq")
    found: list[RowRange] = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        statistics = group.column(column).statistics
        found.append(RowRange(group.num_rows, statistics.min, statistics.max))
    return found


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
