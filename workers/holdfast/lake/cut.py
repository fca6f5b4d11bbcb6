"""A table as of a place in its stream, and the files that tell it: what a backup takes of the lake."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pyarrow as pa

from holdfast.lake.log import (
    Commit,
    Snapshot,
    apply,
    checkpoint_path,
    commit_path,
    list_checkpoints,
    read_checkpoint,
    read_commit,
)
from holdfast.schemas.errors import GapError, IntegrityError

if TYPE_CHECKING:
    from holdfast.lake.table import LakeTable
    from holdfast.schemas.rows import Table

logger = logging.getLogger(__name__)


class TableCut(msgspec.Struct, frozen=True, kw_only=True):
    """A version of a table.  ``log`` are the files that tell it, relative to the table: a checkpoint, and the commits
    from there on."""

    snapshot: Snapshot
    checkpoint: Path | None
    commits: list[Path]


def cut_table(table: LakeTable, *, epoch: str, first_seq: int, last_seq: int) -> TableCut:
    """Returns the newest version of a table that holds nothing of its stream beyond ``last_seq``.

    For an image of the stream that holds ``first_seq`` to ``last_seq`` of one life, taken before this call: together
    they hold everything, and the table is not ahead.  Raises GapError when they do not: what was purged before the
    image was taken is in a version that goes beyond it, or in none.
    """
    newest = table.refresh()
    version = _version_within(newest, f"{table.name}/{epoch}", last_seq)
    snapshot, base = _load_version(table.name, table.directory, version)
    mark = snapshot.watermark
    archived = mark.seq if mark is not None and mark.epoch == epoch else None
    # Of a life that the table holds nothing of yet, nothing can have been purged either, beyond what it began with.
    if archived is not None and archived < first_seq - 1:
        raise GapError(
            f"{table.directory} is archived up to {archived}, the image of its stream begins at {first_seq}",
            hint="the commit that archived what is between was set aside or lost: run holdfast verify",
        )
    commits = [commit_path(table.directory, number) for number in range(max(0, base), snapshot.version + 1)]
    is_summarised = base >= 0
    return TableCut(
        snapshot=snapshot,
        checkpoint=checkpoint_path(table.directory, base).relative_to(table.directory) if is_summarised else None,
        commits=[path.relative_to(table.directory) for path in commits if not is_summarised or path.exists()],
    )


def _version_within(newest: Snapshot, app_id: str, last_seq: int) -> int:
    """Walks back from the newest version while it archives more of the stream than up to ``last_seq``."""
    known = newest.transactions.get(app_id)
    watermark = newest.watermark
    if known is None or watermark is None:
        return newest.version  # nothing of this life is archived: all of it is in the image
    prefix = f"{newest.table}/"
    is_newest_life = f"{prefix}{watermark.epoch}" == app_id
    if is_newest_life and known.version <= last_seq:
        return newest.version
    version = newest.version
    for number in range(newest.version, 0, -1):
        commit = read_commit(newest.directory, number)
        if commit is None:
            raise IntegrityError(
                f"the log of {newest.directory} does not reach back to {app_id} {last_seq}", hint="run holdfast verify"
            )
        if commit.info.get("action") != "append":
            continue
        if f"{prefix}{commit.info['epoch']}" == app_id and commit.info["last_seq"] <= last_seq:
            return version
        version = number - 1
    return version


def _load_version(table: Table, directory: Path, version: int) -> tuple[Snapshot, int]:
    """Returns a table as of a version, and the version of the checkpoint that it was read from; -1 for none.

    Raises IntegrityError when the log does not reach back far enough.
    """
    base = Snapshot(table, directory, -1, "", {}, {}, {}, b"")
    for number in reversed(list_checkpoints(directory)):
        if number > version:
            continue
        try:
            base = read_checkpoint(table, directory, number)
            break
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError, IntegrityError) as error:
            logger.warning(
                "checkpoint cannot be read, using an earlier one",
                extra={"action": "checkpoint_skipped", "table": table, "version": number, "error": str(error)},
            )
    commits: list[Commit] = []
    for number in range(base.version + 1, version + 1):
        commit = read_commit(directory, number)
        if commit is None:
            raise IntegrityError(
                f"the log of {directory} does not tell version {version}: commit {number} is missing",
                hint="run holdfast verify",
            )
        commits.append(commit)
    return apply(base, commits) if commits else base, base.version
