"""The file of a checkpoint: what the hot tier held at one point, in one compressed file that tells whether it is whole.

The file is one zstd stream.  Decompressed it is the line ``holdfast-checkpoint`` and then frames, each four bytes of
length (little endian) and that many bytes of msgpack:

===========  ========================================================================================================
frame        members, in order
===========  ========================================================================================================
``header``   ``v``, ``checkpoint_id``, ``created_at_ms``, ``holdfast`` (its release), ``namespace`` (nil: all), and
             ``points``: of each stream its name, epoch, first and last sequence at the point of the capture
``item``     one stored message: ``stream`` (its place in ``points``), ``subject``, ``seq``, ``stored_at_ms``,
             ``headers`` (without those that only told the server what to do), ``payload``, and of an event
             ``event_id``: an event without an id of its own has one by its place in the stream
``summary``  what came before it: ``items`` of each stream, ``purged`` (positions that were archived and left the hot
             tier while it was read), ``elsewhere`` (references to what the hot tier did not hold), ``unreadable``
``end``      ``digest``: BLAKE2b of 160 bits over every decompressed byte before this frame
===========  ========================================================================================================

Items stand in the order contexts, versions of keys, events, dead letters, those of a stream by their sequence: so what
an item refers to stands before it.  Readers pass over members behind those they know; a change that such a reader
would get wrong comes with another ``v``.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import msgspec
from msgspec import Meta

from holdfast.schemas import limits
from holdfast.schemas.errors import (
    ConfigurationError,
    DigestMismatchError,
    IntegrityError,
    InvalidFieldError,
    NotFoundError,
)
from holdfast.schemas.refs import DIGEST_BYTES, digest_from_bytes
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.wire import DEAD_STREAM, EVENTS_STREAM, HOT_STREAM, KEYS_STREAM

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FORMAT_VERSION: Final = 1

STREAMS: Final = (HOT_STREAM, KEYS_STREAM, EVENTS_STREAM, DEAD_STREAM)
"""The streams of a checkpoint in the order of its items."""

CONTEXTS, KEYS, EVENTS, DEAD = range(4)

ITEM_NAMES: Final = ("contexts", "versions", "events", "dead_letters")
"""What the items of each stream are called in counts."""

PAGE_ITEMS: Final = limits.BATCH_MESSAGES
PAGE_BYTES: Final = limits.BATCH_BYTES
"""Items taken together, and most bytes of payloads in them (one may be larger): bounds memory, and makes a batch."""

_MAGIC: Final = b"holdfast-checkpoint\n"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_LEVEL: Final = 3
_LENGTH_BYTES: Final = 4
_PERSON: Final = b"holdfast-chk-1"
_BUFFER_BYTES: Final = limits.MIB

_FRAME_BYTES: Final = 65 * limits.MIB
"""Longest frame: the server takes no message over 64 MiB, whatever its settings."""

_UNREADABLE: Final = (OSError, EOFError, zstd.ZstdError)


class Point(msgspec.Struct, frozen=True, array_like=True):
    """Where a stream stood when it was captured: everything up to ``last_seq`` that was still there is in the file."""

    stream: str
    epoch: str
    first_seq: int
    last_seq: int


class Header(msgspec.Struct, frozen=True, array_like=True, tag="header", kw_only=True):
    """The first frame.  ``namespace`` None: all namespaces."""

    v: int
    checkpoint_id: str
    created_at_ms: int
    holdfast: str
    namespace: str | None
    points: tuple[Point, Point, Point, Point]


class Item(msgspec.Struct, frozen=True, array_like=True, tag="item"):
    """One stored message."""

    stream: Annotated[int, Meta(ge=0, le=3)]
    subject: str
    seq: int
    stored_at_ms: int
    headers: dict[str, str]
    payload: bytes
    event_id: str | None = None


class Summary(msgspec.Struct, frozen=True, array_like=True, tag="summary"):
    """What the file holds, by stream in the order of the items, and what it does not."""

    items: tuple[int, int, int, int]
    purged: int = 0
    elsewhere: int = 0
    unreadable: int = 0


class End(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    """The last frame."""

    digest: str


class CheckpointInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a whole checkpoint says of itself.  ``size`` is that of the file in bytes."""

    header: Header
    summary: Summary
    digest: str
    size: int


_Frame = Header | Item | Summary | End
_DECODER: Final[msgspec.msgpack.Decoder[_Frame]] = msgspec.msgpack.Decoder(_Frame)
_ENCODER: Final = msgspec.msgpack.Encoder()


def new_header(
    checkpoint_id: str, created_at_ms: int, namespace: str | None, points: tuple[Point, Point, Point, Point]
) -> Header:
    """Returns the header of a checkpoint that this release writes."""
    return Header(
        v=FORMAT_VERSION,
        checkpoint_id=checkpoint_id,
        created_at_ms=created_at_ms,
        holdfast=installed_version("holdfast"),
        namespace=namespace,
        points=points,
    )


class CheckpointWriter:
    """Writes a checkpoint; blocks on the file.

    It is written under a temporary name beside ``path`` and takes its own in :meth:`finish`, once it is on the disk:
    whatever stood there before stays until then.  :meth:`abort` leaves nothing behind; after ``finish`` it is harmless.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._path = path
        # Not by the process id alone: that comes again, and what a killed one left behind would be in the way.
        self._partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
        self._hasher = _hasher()
        self._items = [0, 0, 0, 0]
        self._header = header
        try:
            self._file: BinaryIO | None = self._partial.open("xb", buffering=_BUFFER_BYTES)
        except (OSError, ValueError) as error:
            raise unwritable(path, error) from error
        self._zstd = zstd.ZstdFile(self._file, "wb", level=_LEVEL)
        try:
            self._write(_MAGIC + _framed(header))
        except BaseException:
            self.abort()
            raise

    def write(self, items: Sequence[Item]) -> None:
        """Writes items; raises ConfigurationError when the disk is full."""
        raw = b"".join(map(_framed, items))
        self._write(raw)
        for item in items:
            self._items[item.stream] += 1

    def finish(self, *, purged: int = 0, elsewhere: int = 0, unreadable: int = 0) -> CheckpointInfo:
        """Writes the end, syncs the file, gives it its name and returns what it says of itself."""
        contexts, keys, events, dead = self._items
        summary = Summary((contexts, keys, events, dead), purged, elsewhere, unreadable)
        self._write(_framed(summary))
        digest = digest_from_bytes(self._hasher.digest())
        file = self._file
        assert file is not None, "the file has been closed"
        try:
            self._zstd.write(_framed(End(digest)))
            self._zstd.close()
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._file = None
            size = self._partial.stat().st_size
            self._partial.replace(self._path)
            sync_directory(self._path.parent)
        except OSError as error:
            self._partial.unlink(missing_ok=True)
            raise unwritable(self._path, error) from error
        return CheckpointInfo(header=self._header, summary=summary, digest=digest, size=size)

    def abort(self) -> None:
        """Removes what was written, unless it is finished."""
        file, self._file = self._file, None
        if file is None:
            return
        for thing in (self._zstd, file):
            try:
                thing.close()
            except OSError:
                pass  # the disk is full, or gone: that has been told
        self._partial.unlink(missing_ok=True)

    def _write(self, raw: bytes) -> None:
        self._hasher.update(raw)
        try:
            self._zstd.write(raw)
        except OSError as error:
            raise unwritable(self._path, error) from error


class CheckpointReader:
    """Reads a checkpoint from its beginning, page by page; blocks on the file.

    The running digest is compared at the end: what is yielded before is not yet known to be whole.  Every method
    raises IntegrityError where the file is damaged or cut short, InvalidFieldError when it is no checkpoint or one of a
    later version, NotFoundError when there is no file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hasher = _hasher()
        self._number = 0
        self._info: CheckpointInfo | None = None
        try:
            self._file = path.open("rb", buffering=_BUFFER_BYTES)
        except FileNotFoundError as error:
            raise NotFoundError(
                f"there is no checkpoint {str(path)!r}", field="path", hint="make one with 'holdfast checkpoint save'"
            ) from error
        except (OSError, ValueError) as error:
            raise InvalidFieldError(f"{str(path)[:200]!r} cannot be opened: {error}", field="path") from error
        try:
            self._zstd = zstd.ZstdFile(self._file)
            self.header = self._read_header()
        except BaseException:
            self._file.close()
            raise

    @property
    def info(self) -> CheckpointInfo:
        """What the file says of itself; known once all pages have been read, and so been checked."""
        assert self._info is not None, "the file has not been read to its end"
        return self._info

    def pages(self, *, items: int = PAGE_ITEMS, size: int = PAGE_BYTES) -> Iterator[list[Item]]:
        """Yields the items in order; those of a page are of one stream."""
        counts = [0, 0, 0, 0]
        last = (0, -1)
        page: list[Item] = []
        held = 0
        while True:
            frame = self._read_frame()
            if isinstance(frame, Summary):
                break
            if not isinstance(frame, Item):
                raise self._damaged(f"frame {self._number} is none that belongs there")
            place = (frame.stream, frame.seq)
            if place <= last:
                raise self._damaged(f"item {self._number} stands out of order")
            if page and (len(page) >= items or held >= size or frame.stream != last[0]):
                yield page
                page, held = [], 0
            last = place
            counts[frame.stream] += 1
            held += len(frame.payload)
            page.append(frame)
        if page:
            yield page
        if tuple(counts) != frame.items:
            raise self._damaged(f"it counts {frame.items} items and holds {tuple(counts)}")
        self._info = self._read_end(frame)

    def close(self) -> None:
        """Closes the file."""
        self._zstd.close()
        self._file.close()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_header(self) -> Header:
        name = str(self._path)
        try:
            is_zstd = self._file.read(len(_ZSTD)) == _ZSTD
            self._file.seek(0)
        except OSError as error:
            raise InvalidFieldError(f"{name[:200]!r} cannot be read: {error}", field="path") from error
        if not is_zstd:
            raise _foreign(name)
        magic = self._read(len(_MAGIC))
        if magic != _MAGIC:
            raise _foreign(name)
        self._hasher.update(magic)
        frame = self._read_frame()
        if not isinstance(frame, Header):
            raise _foreign(name)
        if frame.v != FORMAT_VERSION:
            raise InvalidFieldError(
                f"{name} is a checkpoint of version {frame.v}, this release reads {FORMAT_VERSION}",
                field="v",
                hint="upgrade holdfast",
            )
        if tuple(point.stream for point in frame.points) != STREAMS:
            raise self._damaged("it names other streams")
        return frame

    def _read_end(self, summary: Summary) -> CheckpointInfo:
        digest = digest_from_bytes(self._hasher.digest())
        end = self._read_frame()
        if not isinstance(end, End):
            raise self._damaged("its closing frame is missing")
        if end.digest != digest:
            raise DigestMismatchError(
                f"checkpoint {self._path} is damaged: it hashes to {digest}, not to {end.digest[:40]} as it says",
                field="path",
                hint="use another copy of the file; nothing of it was taken",
            )
        if self._read(1):
            raise self._damaged("something follows its end")
        return CheckpointInfo(header=self.header, summary=summary, digest=digest, size=self._path.stat().st_size)

    def _read_frame(self) -> _Frame:
        prefix = self._read(_LENGTH_BYTES)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < _LENGTH_BYTES:
            raise self._damaged(f"it is cut short after frame {self._number}")
        if length > _FRAME_BYTES:
            raise self._damaged(f"frame {self._number + 1} claims {length} bytes")
        raw = self._read(length)
        if len(raw) < length:
            raise self._damaged(f"it is cut short in frame {self._number + 1}")
        self._number += 1
        try:
            frame = _DECODER.decode(raw)
        except UNDECODABLE as error:
            raise self._damaged(f"frame {self._number} does not decode: {error}") from error
        if not isinstance(frame, End):
            self._hasher.update(prefix)
            self._hasher.update(raw)
        return frame

    def _read(self, size: int) -> bytes:
        try:
            raw = self._zstd.read(size)
            # A read may end at a block of the compression.
            while 0 < len(raw) < size:
                more = self._zstd.read(size - len(raw))
                if not more:
                    break
                raw += more
        except _UNREADABLE as error:
            raise self._damaged(f"it cannot be read beyond frame {self._number}: {error}") from error
        return raw

    def _damaged(self, what: str) -> IntegrityError:
        return IntegrityError(
            f"checkpoint {self._path} is damaged: {what}",
            field="path",
            hint="use another copy of the file; nothing of it was taken",
        )


def check_file(path: Path) -> CheckpointInfo:
    """Reads a whole checkpoint, and returns what it says of itself; errors as of :class:`CheckpointReader`."""
    with CheckpointReader(path) as reader:
        for _ in reader.pages():
            pass
        return reader.info


def read_header(path: Path) -> Header:
    """Returns the header of a checkpoint, without reading the rest; errors as of :class:`CheckpointReader`."""
    with CheckpointReader(path) as reader:
        return reader.header


def unwritable(path: Path, error: Exception) -> ConfigurationError:
    """Returns what to raise when a checkpoint cannot be written."""
    reason = error.strerror if isinstance(error, OSError) else None
    return ConfigurationError(
        f"checkpoint {str(path)[:200]!r} cannot be written: {(reason or str(error)).lower()}",
        field="path",
        hint="make room or choose another place; what stood there before is as it was",
    )


def sync_directory(path: Path) -> None:
    """Sees to it that the names in a directory are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _framed(frame: _Frame) -> bytes:
    raw = _ENCODER.encode(frame)
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw


def _foreign(name: str) -> InvalidFieldError:
    return InvalidFieldError(
        f"{name} is no checkpoint", field="path", hint="make one with 'holdfast checkpoint save FILE'"
    )


def _hasher() -> blake2b:
    return blake2b(digest_size=DIGEST_BYTES, person=_PERSON)
