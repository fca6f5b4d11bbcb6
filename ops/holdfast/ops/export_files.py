"""Files of exports: opened, told from others, compressed and decompressed."""

from __future__ import annotations

import asyncio
import gzip
import io
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO, Final, cast

from holdfast.schemas import limits
from holdfast.schemas.errors import HoldfastError, InvalidFieldError, NotFoundError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LINE_BYTES: Final = 8 * limits.CHUNK_BYTES
"""Longest line: a stored form is 512 KiB at most, and JSON may need six characters for a byte of it."""

FIRST_LINE: Final = re.compile(rb'\s*\{\s*"type"\s*:\s*"holdfast-export"')
UNREADABLE: Final = (OSError, EOFError, zlib.error, zstd.ZstdError)
"""What reading a file may raise that is cut short, damaged or gone."""

_BUFFER_BYTES: Final = limits.MIB
_GZIP: Final = b"\x1f\x8b"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"


def is_export(path: Path) -> bool:
    """Whether a file begins as an export does; False for what cannot be read."""
    try:
        with open_export(path) as file:
            return FIRST_LINE.match(file.readline(LINE_BYTES)) is not None
    except (*UNREADABLE, HoldfastError):
        return False


def open_export(path: Path) -> BinaryIO:
    """Opens an export for reading, decompressed when it is gzip or zstd (told by its first bytes).

    Raises NotFoundError, or InvalidFieldError when it cannot be opened.
    """
    try:
        file = path.open("rb", buffering=_BUFFER_BYTES)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {str(path)!r}", field="path") from error
    except (OSError, ValueError) as error:
        raise InvalidFieldError(f"{str(path)[:200]!r} cannot be opened: {error}", field="path") from error
    return decompressed(file)


def decompressed(file: BinaryIO) -> BinaryIO:
    """Returns what reads a file, or its plain content when it is compressed; closing it closes the file."""
    magic = file.read(4)
    file.seek(0)
    if magic.startswith(_GZIP):
        return _Owning(cast(io.RawIOBase, gzip.GzipFile(fileobj=file)), file)
    if magic == _ZSTD:
        return _Owning(cast(io.RawIOBase, zstd.ZstdFile(file)), file)
    return file


def compressed(file: BinaryIO, name: str) -> BinaryIO:
    """Returns what writes to a file, compressed when ``name`` ends in .gz or .zst; closing it ends the compression
    and leaves the file open."""
    if name.endswith(".gz"):
        # Without a time of its own, equal exports are equal files.
        return cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0))
    if name.endswith(".zst"):
        return cast(BinaryIO, zstd.ZstdFile(file, "wb"))
    return cast(BinaryIO, _LeftOpen(file))


@asynccontextmanager
async def spooled_stdin() -> AsyncGenerator[Path]:
    """Yields a file with what comes on standard input, which can be read twice; it is gone after the block."""
    with tempfile.NamedTemporaryFile(prefix="holdfast-import-") as file:
        await asyncio.to_thread(shutil.copyfileobj, sys.stdin.buffer, cast(BinaryIO, file))
        file.flush()
        yield Path(file.name)


class _Owning(io.BufferedReader):
    """A buffered reader of decompressed bytes that closes the file under it too."""

    def __init__(self, raw: io.RawIOBase, file: BinaryIO) -> None:
        super().__init__(raw, _BUFFER_BYTES)
        self._file_below = file

    def close(self) -> None:
        super().close()
        self._file_below.close()


class _LeftOpen:
    """A file as its writer sees it, whose closing is somebody else's."""

    def __init__(self, file: BinaryIO) -> None:
        self.write = file.write

    def close(self) -> None:
        """Does nothing."""
