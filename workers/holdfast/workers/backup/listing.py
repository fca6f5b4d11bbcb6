"""The list of backups, how old the newest is, and what that means for health.  Everything blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from holdfast.schemas.errors import DataDirectoryError, IntegrityError
from holdfast.schemas.problems import Problem
from holdfast.workers.backup.manifest import (
    BackupListing,
    backup_ids,
    listing_of,
    read_manifest,
    read_manifests,
    unsound_objects,
)
from holdfast.workers.backup.pool import Pool

LATE_FACTOR: Final = 2.0
"""Intervals after which a missing backup is a problem: one may take a while, or meet a restart."""


def list_backups(directory: Path, *, verify: bool = False) -> list[BackupListing]:
    """Returns the backups of a directory, oldest first; ``verify`` reads every object.

    Raises DataDirectoryError when the directory holds no backups.
    """
    pool = Pool(directory)
    known: dict[str, bool] = {}
    found: list[BackupListing] = []
    for backup_id in backup_ids(directory):
        try:
            manifest = read_manifest(directory, backup_id)
        except IntegrityError as error:
            found.append(_unreadable(backup_id, error.message))
            continue
        if not verify:
            missing = [sha256 for sha256, size in manifest.objects().items() if not pool.has(sha256, size)]
        else:
            missing = unsound_objects(pool, manifest, known)
        if missing:
            problem = f"{len(missing)} of {len(manifest.objects())} objects are damaged or missing"
            found.append(listing_of(manifest, state="damaged", problem=problem))
        elif manifest.damaged:
            problem = f"{len(manifest.damaged)} files of the lake were damaged when it was made"
            found.append(listing_of(manifest, state="damaged", problem=problem))
        else:
            found.append(listing_of(manifest, state="verified" if verify else "complete"))
    return found


def newest_backup_ms(directory: Path, now_ms: int) -> int | None:
    """Returns when the newest complete backup began, or None when there is none.

    One of a time to come was made under a clock that went wrong: nobody knows what it holds.
    """
    try:
        Pool(directory)
    except DataDirectoryError:
        return None
    manifests, _ = read_manifests(directory)
    return max((manifest.began_ms for manifest in manifests if manifest.began_ms <= now_ms), default=None)


def backup_age_s(directory: Path, now_ms: int) -> float | None:
    """Returns how old the newest complete backup is: everything acknowledged before then is in it."""
    began_ms = newest_backup_ms(directory, now_ms)
    return None if began_ms is None else (now_ms - began_ms) / 1000


def late_backup(age_s: float | None, *, running_s: float, interval_s: float, directory: str) -> Problem | None:
    """Returns the problem of a newest backup that is too old, or that there is none though it was due long ago."""
    if age_s is None:
        if running_s <= LATE_FACTOR * interval_s:
            return None
        what = "there is no complete backup"
    elif age_s <= LATE_FACTOR * interval_s:
        return None
    else:
        what = f"the newest complete backup is {age_s / 3600:.1f} h old, one is due every {interval_s / 3600:.1f} h"
    return Problem(
        invariant="I8",
        object=f"backups in {directory}",
        what=what,
        next_step=f"make one with 'holdfast backup {directory}' and see what it says",
    )


def _unreadable(backup_id: str, problem: str) -> BackupListing:
    return BackupListing(
        id=backup_id,
        time=backup_id.partition("-")[0],
        seconds=0.0,
        bytes=0,
        new_bytes=0,
        new_objects=0,
        messages=0,
        rows=0,
        state="damaged",
        problem=problem,
    )
