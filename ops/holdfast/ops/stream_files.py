"""Finishes what nats-server was writing about a stream when the power went: it does not do so itself.

A stream's description stands in ``meta.inf``, the checksum of it in ``meta.sum``.  The server replaces them one after
the other, each durably.  Cut off in between, by a power cut, a kill or a full disk, it finds a checksum that is not
that of the description, passes over the stream with all its messages, and is never ready.  Cut off while it makes the
stream, it finds a folder without a description, which is the same to it.

The description is whole in each of these cases, or nothing was ever stored: so the checksum is made anew, or the folder
removed.  A description that is older than its checksum was not cut off, it is damaged: it stays as it is.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Final

import msgspec

from holdfast.lake.files import fsync_directory, write_durably
from holdfast.ops.highway_hash import highway_hash_64
from holdfast.schemas.undecodable import UNDECODABLE

logger = logging.getLogger(__name__)

DESCRIPTION: Final = "meta.inf"
CHECKSUM: Final = "meta.sum"
_KEY: Final = "meta.key"
_PENDING: Final = f"{CHECKSUM}.tmp"


class _Description(msgspec.Struct):
    name: str


def checksum_of(name: str, description: bytes) -> bytes:
    """Returns what nats-server writes into ``meta.sum`` for a stream's ``meta.inf``."""
    return highway_hash_64(hashlib.sha256(name.encode()).digest(), description).hex().encode()


def finish_stream_files(data: Path) -> list[str]:
    """Finishes what was cut off in the streams of a data directory; returns the names of the streams concerned.

    No server may run there.  Raises OSError when the disk refuses.
    """
    finished: list[str] = []
    for folder in sorted(data.glob("jetstream/*/streams/*")):
        # With a point in front: a stream on its way out, which the server sees to.
        if not folder.is_dir() or folder.name.startswith(".") or (folder / _KEY).exists():
            continue
        what = _finish_checksum(folder) if (folder / DESCRIPTION).exists() else _remove_unmade(folder)
        if what:
            logger.warning(
                "a stream's files were cut off while they were written, and are whole again",
                extra={"action": "stream_files_finished", "stream": folder.name, "what": what},
            )
            finished.append(folder.name)
    return finished


def _finish_checksum(folder: Path) -> str:
    description, found = (folder / DESCRIPTION).read_bytes(), _read(folder / CHECKSUM)
    right = checksum_of(folder.name, description)
    if found == right or not _describes(description, folder.name):
        return ""
    if found and _read(folder / _PENDING) != right and not _is_newer(folder / DESCRIPTION, folder / CHECKSUM):
        return ""
    write_durably(folder / CHECKSUM, right)
    return "the checksum of its description was written"


def _remove_unmade(folder: Path) -> str:
    """A folder is made before its description is: without one, and without content, there never was a stream."""
    for place, _, names in os.walk(folder):
        if any(Path(place, name).stat().st_size and name != f"{DESCRIPTION}.tmp" for name in names):
            return ""
    shutil.rmtree(folder)
    fsync_directory(folder.parent)
    return "it had not been made yet"


def _describes(description: bytes, name: str) -> bool:
    try:
        return msgspec.json.decode(description, type=_Description).name == name
    except UNDECODABLE:
        return False


def _is_newer(path: Path, other: Path) -> bool:
    return path.stat().st_mtime_ns > other.stat().st_mtime_ns


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
