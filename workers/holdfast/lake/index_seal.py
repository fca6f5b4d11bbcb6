"""Whether an index file is what its last user left: LMDB itself has no checksums.

A flipped bit in a page may make LMDB answer wrongly, answer "not there", or crash.  So whoever closes an index leaves a
*seal*: the size and CRC-32 of the file.  Who opens it compares them first, and takes the seal away.  After a crash
there is none: then every entry is read once and compared with the check that it carries, and their number with what
the stamps say.  A mark lies in the directory meanwhile, with how many such readings have been begun and not ended: a
damaged page may kill its reader, and so may an operator, but hardly twice in a row.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    import lmdb

DATA: Final = "data.mdb"
_SEAL: Final = "seal"
_CHECKING: Final = "checking"
_READ_BYTES: Final = 1 << 20

MOST_UNENDED: Final = 2
"""Readings that did not end, one after another, before the index is given up."""


class _Seal(msgspec.Struct, frozen=True):
    size: int
    crc32: int


def _measure(root: Path) -> _Seal:
    crc = size = 0
    with (root / DATA).open("rb", buffering=0) as file:
        while piece := file.read(_READ_BYTES):
            crc = zlib.crc32(piece, crc)
            size += len(piece)
    return _Seal(size, crc)


def seal(root: Path) -> None:
    """Seals an index that was closed; a failure only costs the next user a reading of every entry."""
    try:
        (root / _SEAL).write_bytes(msgspec.json.encode(_measure(root)))
    except OSError:
        (root / _SEAL).unlink(missing_ok=True)


def reason_to_discard(root: Path) -> str | None:
    """Returns why an index must not be opened, None when it may be; takes the seal away."""
    if not (root / DATA).exists():
        return None
    unended = _left_behind(root / _CHECKING)
    if unended >= MOST_UNENDED:
        return f"{unended} checks of its entries did not end"
    try:
        raw = (root / _SEAL).read_bytes()
    except FileNotFoundError:
        _begin_check(root, unended + 1)
        return None
    (root / _SEAL).unlink(missing_ok=True)
    try:
        stated = msgspec.json.decode(raw, type=_Seal)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return "its seal cannot be read"
    return None if stated == _measure(root) else "it is not what its last user left"


# The marks of checks under way in this process: locked, so that another process tells them from those left behind.
_marks: dict[Path, int] = {}


def _left_behind(mark: Path) -> int:
    """How many checks were begun, one after another, and did not end."""
    try:
        descriptor = os.open(mark, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A byte for each; one that was killed before it wrote its own had not read anything yet.
        return os.fstat(descriptor).st_size
    except BlockingIOError:
        return 0  # another process checks it just now
    finally:
        os.close(descriptor)


def _begin_check(root: Path, number: int) -> None:
    descriptor = os.open(root / _CHECKING, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, number)
    except BlockingIOError:
        os.close(descriptor)
    else:
        _marks[root] = descriptor


def check_entries(
    root: Path,
    env: lmdb.Environment,
    databases: Mapping[Any, Any],
    expected: Callable[[lmdb.Transaction, Any], int | None],
    is_sound: Callable[[bytes, bytes], bool],
) -> str | None:
    """Reads every entry of an index that has no seal; returns what is wrong, None when nothing is.

    ``expected`` returns how many entries a database has by its stamp; None when nothing is known of it.
    """
    mark = _marks.pop(root, None)
    if mark is None:
        return None
    wrong = None
    with env.begin(buffers=False) as txn:
        for name, database in databases.items():
            count = 0
            for key, value in txn.cursor(db=database).iternext(keys=True, values=True):
                count += 1
                if not is_sound(key, value):
                    wrong = f"entry {count} of {name} is damaged"
                    break
            known = expected(txn, name)
            if wrong is None and known is not None and known != count:
                wrong = f"{name} has {count} entries, its stamp says {known}"
    (root / _CHECKING).unlink(missing_ok=True)
    os.close(mark)
    return wrong
