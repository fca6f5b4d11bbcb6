"""A look-up index of one's own: LMDB must not be shared between processes that cannot see each other's pids."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

from holdfast.schemas.errors import DataDirectoryError

_MOST: Final = 64
"""Processes of one role on one data directory."""


def claim_index_directory(wanted: Path) -> tuple[Path, int]:
    """Returns a directory that no other process uses, and the open descriptor that holds the claim.

    ``wanted`` itself when it is free, else ``<wanted>-2``, ``<wanted>-3`` …: a second resolver in another container
    keeps an index of its own.  The kernel gives the claim up when the descriptor is closed or the process ends; what
    is in the directory stays, and the next process goes on from there.
    """
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        for number in range(1, _MOST + 1):
            directory = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            descriptor = os.open(f"{directory}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            return directory, descriptor
    except OSError as error:
        raise DataDirectoryError(
            f"the index directory {wanted} cannot be used: {error.strerror}", hint="check its owner and its disk"
        ) from error
    raise DataDirectoryError(
        f"{_MOST} processes use an index beside {wanted} already", hint="stop some of them, or use another --data"
    )
