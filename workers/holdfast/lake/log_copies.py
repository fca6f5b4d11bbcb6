"""Copies of commits and checksums of checkpoints, beside the log: what a damaged log file is recognised and mended by.

``<table>/_log_copy`` holds a copy of each commit file, and of each checkpoint its SHA-256.  A copy is written after the
commit is durable, and not synced itself: a commit without one is no worse off than it was.  Because it comes after the
fsync, a commit file that does not parse and has a good copy was acknowledged, and damaged since.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from holdfast.lake.files import fsync_file

logger = logging.getLogger(__name__)

DIRECTORY: Final = "_log_copy"

_CHECKSUM: Final = re.compile(rb"[0-9a-f]{64}")
_NAME: Final = re.compile(r"(\d{20})\.(?:json|checkpoint\.sha256)")

_ENCODER: Final = msgspec.msgpack.Encoder(order="deterministic")


def digest_of(said: Any) -> str:
    """Returns the digest of a structure of plain values."""
    return hashlib.blake2b(_ENCODER.encode(said), digest_size=16).hexdigest()


def copy_path(directory: Path, version: int) -> Path:
    """Returns where the copy of a commit is."""
    return directory / DIRECTORY / f"{version:020d}.json"


def checksum_path(directory: Path, version: int) -> Path:
    """Returns where the SHA-256 of a checkpoint is."""
    return directory / DIRECTORY / f"{version:020d}.checkpoint.sha256"


def read_copy(directory: Path, version: int) -> bytes | None:
    """Returns the copy of a commit, whatever it holds; None when there is none."""
    try:
        return copy_path(directory, version).read_bytes()
    except OSError:
        return None


def keep_copy(directory: Path, version: int, source: Path, *, anew: bool = False) -> None:
    """Copies a commit file that is durable, if it was not copied yet; a failure is logged: only redundancy is lost.

    ``anew`` for a commit just made: what may be there is of another one that was set aside.
    """
    target = copy_path(directory, version)
    # After a power cut one may be there that is empty, or half of it.
    if anew or read_copy(directory, version) != source.read_bytes():
        _write(target, source.read_bytes)


def keep_checksum(directory: Path, version: int, checkpoint: Path) -> None:
    """Notes the SHA-256 of a checkpoint that was just written and found right."""
    _write(
        checksum_path(directory, version),
        lambda: hashlib.sha256(checkpoint.read_bytes()).hexdigest().encode(),
        # Unlike a copy: torn, it would condemn a good checkpoint, and with it the only account of removed commits.
        is_synced=True,
    )


def _write(target: Path, content: Any, *, is_synced: bool = False) -> None:
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        target.parent.mkdir(exist_ok=True)
        temporary.write_bytes(content())
        if is_synced:
            fsync_file(temporary)
        temporary.rename(target)
    except OSError as error:
        logger.warning(
            "no copy of a log file was kept",
            extra={"action": "log_copy_failed", "path": str(target), "error": str(error)},
        )
        temporary.unlink(missing_ok=True)


def checkpoint_is_sound(directory: Path, version: int, checkpoint: Path) -> bool:
    """Whether a checkpoint is what was written; one of which no checksum is known counts as sound."""
    try:
        stated = checksum_path(directory, version).read_bytes()
    except FileNotFoundError:
        return True
    if not _CHECKSUM.fullmatch(stated):
        return True  # torn or damaged itself: it says nothing of the checkpoint
    return hashlib.sha256(checkpoint.read_bytes()).hexdigest().encode() == stated


def drop_copies(directory: Path, versions: Iterable[int]) -> None:
    """Removes the copies of commits that were removed themselves."""
    for version in versions:
        copy_path(directory, version).unlink(missing_ok=True)


def drop_copies_before(directory: Path, before: int, *, commits: Iterable[int], checkpoints: Iterable[int]) -> None:
    """Removes every copy and checksum of a version below ``before`` but those of ``commits`` and ``checkpoints``: also
    what somebody left who was killed before he came to it."""
    folder = directory / DIRECTORY
    kept = {copy_path(directory, version).name for version in commits}
    kept |= {checksum_path(directory, version).name for version in checkpoints}
    names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208  a Path for each of 100,000 takes a second
    for name in names:
        match = _NAME.fullmatch(name)
        if match is not None and int(match[1]) < before and name not in kept:
            (folder / name).unlink(missing_ok=True)
