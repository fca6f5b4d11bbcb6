"""Small durable steps on files: what a crash or a power cut may leave is decided here."""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path
from typing import Final

UNNAMED: Final = re.compile(r"\..+\.[0-9a-f]{32}\Z")
"""How a file is called until it is whole, and gets its name."""


def fsync_file(path: Path) -> None:
    """Flushes a file's content to the device."""
    _fsync(path, os.O_RDONLY)


def fsync_directory(path: Path) -> None:
    """Flushes a directory: the names made, renamed or removed in it."""
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Replaces a file so that it holds the old or the new content, whole, through any crash.

    Raises OSError when the disk refuses; the old content then stays, and nothing is left beside it.  What a killed
    process leaves is hidden, and named so that a vacuum knows it (:mod:`holdfast.lake.litter`).
    """
    temporary = path.with_name(f".{path.name.removeprefix('.')}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Creates a directory with its missing parents, each durable in its own parent."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    fsync_directory(path.parent)


def move_aside(path: Path, to: Path) -> Path:
    """Renames a file into directory ``to`` under a name that is free, durably; returns the new path."""
    make_directory(to)
    target = to / path.name
    number = 1
    while target.exists():
        target = to / f"{path.name}.{number}"
        number += 1
    path.rename(target)
    fsync_directory(path.parent)
    fsync_directory(to)
    return target
