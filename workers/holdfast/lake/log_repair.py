"""Mends a damaged log by its redundancy: the copies of commits; and what a checkpoint is compared with.

For processes that write.  A damaged commit file is moved aside, never removed, and its copy put in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Final

import msgspec
import pyarrow as pa

from holdfast.lake.files import fsync_directory, fsync_file, move_aside
from holdfast.lake.log import (
    LOG_DIRECTORY,
    Commit,
    Snapshot,
    checkpoint_path,
    commit_path,
    fingerprint_of,
    list_checkpoints,
    list_versions,
    parse_commit,
    read_checkpoint,
)
from holdfast.lake.log_copies import checkpoint_is_sound, keep_copy, read_copy
from holdfast.lake.parquet_reading import read_columns
from holdfast.schemas.errors import IntegrityError

logger = logging.getLogger(__name__)

DAMAGED_DIRECTORY: Final = "damaged"
LAST_CHECKPOINT: Final = "_last_checkpoint"
"""deltalake's hint of the newest checkpoint."""

_UNREADABLE: Final = (ValueError, TypeError, AttributeError, RecursionError)


def repair_log(directory: Path) -> list[int]:
    """Puts the copy of each damaged commit in its place, durably; returns the versions that were mended.

    Safe beside one who cleans the log: what is gone by the time that it is looked at needs no mending.
    """
    mended: list[int] = []
    later: Commit | None = None
    for version in reversed(list_versions(directory)):
        try:
            later, is_mended = _mend_commit(directory, version, later)
        except FileNotFoundError:
            later = None  # cleaned away since it was listed
            continue
        if is_mended:
            mended.append(version)
    return mended


def _mend_commit(directory: Path, version: int, later: Commit | None) -> tuple[Commit | None, bool]:
    """Mends a commit, or its copy; returns what the commit says then, and whether it was mended itself.

    Raises FileNotFoundError when the commit is gone.
    """
    raw = commit_path(directory, version).read_bytes()
    found = _parsed(version, raw)
    if found is not None and not _is_other(found, later):
        _renew_torn_copy(directory, version)
        return found, False
    copy = read_copy(directory, version)
    copied = None if copy is None else _parsed(version, copy)
    if copy is None or copied is None or copied.fingerprint == fingerprint_of(raw) or _is_other(copied, later):
        return found, False
    _replace(directory, version, copy)
    return copied, True


def _renew_torn_copy(directory: Path, version: int) -> None:
    """Copies are not synced: one that a power cut left in part is made anew from its commit, which is sound."""
    copy = read_copy(directory, version)
    if copy is not None and _parsed(version, copy) is None:
        keep_copy(directory, version, commit_path(directory, version))


def differing_commits(directory: Path) -> list[tuple[int, str]]:
    """Returns the commits that are not, byte for byte, what their successor or their copy says; not a torn one."""
    found: list[tuple[int, str]] = []
    later: Commit | None = None
    for version in reversed(list_versions(directory)):
        try:
            raw = commit_path(directory, version).read_bytes()
        except FileNotFoundError:
            continue  # cleaned away since it was listed
        commit = _parsed(version, raw)
        copy = read_copy(directory, version)
        if commit is None:
            # The newest one without a copy is torn, which is told by itself.
            if later is not None or found or copy is not None:
                found.append((version, "does not say what was written"))
        elif _is_other(commit, later):
            found.append((version, "is not the one that its successor was built on"))
        elif copy is not None and fingerprint_of(copy) != commit.fingerprint:
            found.append((version, "and its copy differ"))
        later = commit
    return found[::-1]


def _parsed(version: int, raw: bytes) -> Commit | None:
    try:
        return parse_commit(version, raw)
    except _UNREADABLE:
        return None


def _is_other(commit: Commit, later: Commit | None) -> bool:
    """Whether a commit is not the one that its successor names, or was robbed of its digest."""
    if later is None or "previous" not in later.info:
        return commit.version > 0 and "sum" not in commit.info
    return bool(later.info["previous"] != commit.fingerprint.hex())


def _replace(directory: Path, version: int, content: bytes) -> None:
    path = commit_path(directory, version)
    aside = move_aside(path, directory / LOG_DIRECTORY / DAMAGED_DIRECTORY)
    temporary = path.with_name(f".{path.name}.mended")
    temporary.write_bytes(content)
    fsync_file(temporary)
    temporary.rename(path)
    fsync_directory(path.parent)
    logger.warning(
        "damaged commit mended from its copy",
        extra={"action": "commit_mended", "path": str(path), "aside": str(aside)},
    )


def checkpoint_says(base: Snapshot) -> bool:
    """Whether the checkpoint of a version says what the commits up to it say."""
    try:
        found = read_checkpoint(base.table, base.directory, base.version)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError, IntegrityError):
        return False
    return (found.files, found.transactions) == (base.files, base.transactions)


def require_readable_checkpoint(directory: Path, version: int) -> None:
    """Raises OSError or ArrowException when a checkpoint is not what was written, or cannot be read.

    One without a checksum counts as sound, and may have been torn by a power cut: it is read.
    """
    path = checkpoint_path(directory, version)
    if not checkpoint_is_sound(directory, version, path):
        raise OSError("it is not what was written")
    read_columns(path, ["txn", "metaData", "add"])


def drop_bad_hint(directory: Path, *, going: Collection[int] = ()) -> bool:
    """Removes ``_last_checkpoint`` when it names no checkpoint that is there and will stay; returns whether it did.

    Nothing is lost by it: it only saves deltalake a listing.
    """
    hint = directory / LOG_DIRECTORY / LAST_CHECKPOINT
    try:
        named = msgspec.json.decode(hint.read_bytes(), type=dict)["version"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        named = None
    if named in list_checkpoints(directory) and named not in going:
        return False
    hint.unlink(missing_ok=True)
    return True
