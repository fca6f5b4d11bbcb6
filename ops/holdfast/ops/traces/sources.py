"""Trace files as bytes: decompressed and cut into lines, in bounded memory.

Nothing here raises for what a file holds: a place that cannot be read comes out as a
:class:`~holdfast.ops.traces.model.Malformed` in its turn, and the rest goes on where the rest can be found.
"""

from __future__ import annotations

import io
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from holdfast.ops.traces.model import Malformed
from holdfast.schemas import limits

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LINE_BYTES: Final = limits.BODY_BYTES + limits.MIB
"""Longest line: a body at its limit and the fields around it.  A longer one is passed over, never held."""

CHUNK_BYTES: Final = limits.MIB
"""Read, and decompressed, at a time."""

_GZIP: Final = b"\x1f\x8b"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_BOM: Final = b"\xef\xbb\xbf"
BLANK: Final = b" \t\r\n"
"""What JSON counts as blank."""

Numbered = tuple[int, bytes]
"""A piece of a file and the line, from 1, that it is or begins on."""


class Source:
    """A trace that can be opened as often as needed; ``name`` is what reports call it."""

    def __init__(self, name: str, open_binary: Callable[[], BinaryIO]) -> None:
        self.name = name
        self._open = open_binary

    @classmethod
    def of_path(cls, path: Path) -> Source:
        """Returns the source that is a file; it is opened when it is read."""
        return cls(str(path), lambda: path.open("rb"))

    @classmethod
    def of_bytes(cls, raw: bytes, name: str = "<bytes>") -> Source:
        """Returns the source that is bytes in hand."""
        return cls(name, lambda: io.BytesIO(raw))

    def malformed(self, line: int, reason: str) -> Malformed:
        """Returns the report of a line of this source that cannot be read; line 0 means the whole of it."""
        return Malformed(self.name, line, reason)

    def chunks(self) -> Iterator[bytes]:
        """Yields the decompressed content without a byte order mark.

        Compression is told by the first bytes, not by the name.  Raises OSError or zlib.error, after all that could
        be read: the cutters below turn that into a Malformed.
        """
        with self._open() as file:
            chunk = file.read(CHUNK_BYTES)
            if chunk.startswith(_GZIP):
                content = _gunzip(file, chunk)
            else:
                content = _unzstd(file, chunk) if chunk.startswith(_ZSTD) else _plain(file, chunk)
            for number, piece in enumerate(content):
                yield piece if number else piece.removeprefix(_BOM)

    def head(self, size_bytes: int) -> bytes:
        """Returns up to ``size_bytes`` from the beginning, less where the file cannot be read further."""
        head = bytearray()
        try:
            for chunk in self.chunks():
                head += chunk
                if len(head) >= size_bytes:
                    break
        except (OSError, zlib.error):
            pass  # Whoever reads the file meets the same fault and reports it.
        return bytes(head[:size_bytes])


def _plain(file: BinaryIO, first: bytes) -> Iterator[bytes]:
    chunk = first
    while chunk:
        yield chunk
        chunk = file.read(CHUNK_BYTES)


def _gunzip(file: BinaryIO, first: bytes) -> Iterator[bytes]:
    # Not gzip.open: its buffers lose what was decompressed before a fault, and a truncated file must give all it has.
    decompressor = zlib.decompressobj(wbits=31)
    pending = first
    while True:
        if decompressor.eof:
            # Members follow one another, perhaps padded with zeros (RFC 1952, 2.2).
            pending = decompressor.unused_data.lstrip(b"\0") or file.read(CHUNK_BYTES).lstrip(b"\0")
            if not pending:
                return
            decompressor = zlib.decompressobj(wbits=31)
        elif not pending:
            pending = file.read(CHUNK_BYTES)
            if not pending:
                raise zlib.error("the compressed file is truncated")
        before = decompressor.copy()
        try:
            piece = decompressor.decompress(pending, CHUNK_BYTES)
        except zlib.error:
            yield _up_to_fault(before, pending)
            raise
        pending = decompressor.unconsumed_tail
        if piece:
            yield piece


def _unzstd(file: BinaryIO, first: bytes) -> Iterator[bytes]:
    decompressor = zstd.ZstdDecompressor()
    pending = first
    while True:
        if decompressor.eof:
            # Frames follow one another (RFC 8878, 3).
            pending = decompressor.unused_data or file.read(CHUNK_BYTES)
            if not pending:
                return
            decompressor = zstd.ZstdDecompressor()
        elif decompressor.needs_input and not pending:
            pending = file.read(CHUNK_BYTES)
            if not pending:
                raise OSError("the compressed file is truncated")
        try:
            piece = decompressor.decompress(pending, max_length=CHUNK_BYTES)
        except zstd.ZstdError as error:
            raise OSError(f"the compressed file is damaged: {error}") from error
        pending = b""
        if piece:
            yield piece


class _Decompressor(Protocol):
    def decompress(self, data: bytes, /) -> bytes: ...


def _up_to_fault(decompressor: _Decompressor, pending: bytes) -> bytes:
    # The failed call gives nothing of what it had decompressed, up to a whole piece: byte by byte it comes out.
    content = bytearray()
    try:
        for number in range(len(pending)):
            content += decompressor.decompress(pending[number : number + 1])
    except zlib.error:
        pass  # The caller raises the same fault.
    return bytes(content)


def read_lines(source: Source, limit_bytes: int = LINE_BYTES) -> Iterator[Numbered | Malformed]:
    """Yields each line that is not blank, without its end; a file without any is malformed itself."""
    number = 1
    parts: list[bytes] = []
    held_bytes = 0
    found = False

    def take() -> Numbered | Malformed | None:
        nonlocal found
        if held_bytes > limit_bytes:
            found = True
            return source.malformed(number, f"the line has {held_bytes} bytes, the limit is {limit_bytes}")
        line = b"".join(parts).strip(BLANK)
        found = found or bool(line)
        return (number, line) if line else None

    try:
        for chunk in source.chunks():
            for position, piece in enumerate(chunk.split(b"\n")):
                if position:
                    taken = take()
                    if taken is not None:
                        yield taken
                    number += 1
                    parts.clear()
                    held_bytes = 0
                held_bytes += len(piece)
                if held_bytes > limit_bytes:
                    parts.clear()
                elif piece:
                    parts.append(piece)
    except (OSError, zlib.error) as error:
        # The line in hand is cut short: one report for both.
        yield source.malformed(number, f"cannot be read further: {error}")
        return
    taken = take()
    if taken is not None:
        yield taken
    if not found:
        yield source.malformed(1, "the file is empty")
