"""Removing files that no commit names, against whoever may still be about to commit them.

An orphan is told from a file on its way into the table by its age, and age can deceive: a process may be stopped for a
day between writing a file and committing it, or the clock of the one who removes may be wrong.  The commit would name a
file that is gone, with the watermark behind its rows.  So the log decides here as well: who removes commits first that
the files are removed, who commits a file looks first whether it was, and of two commits at one version one is made
anew, after the other was read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from deltalake.transaction import RemoveAction

from holdfast.lake.commit import Change
from holdfast.lake.writer import TEMPORARY
from holdfast.schemas.failpoints import failpoint
from holdfast.schemas.ids import now_ms

if TYPE_CHECKING:
    from holdfast.lake.log import Snapshot
    from holdfast.lake.table import LakeTable

VACUUM: Final = "vacuum"
"""The application, in the log, that disowns orphans."""

_OUR_FILE: Final = re.compile(r"part-[0-9a-f-]{36}\.parquet\Z")
_DAY: Final = re.compile(r"day=(.+)\Z")


def orphans_of(snapshot: Snapshot) -> list[Path]:
    """Returns the files of ours in a table's directory that are not part of it: orphans, and what was replaced."""
    folders = [*snapshot.directory.glob("day=*"), snapshot.directory / TEMPORARY]
    present = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    return [
        path
        for path in present
        if _OUR_FILE.match(path.name) and str(path.relative_to(snapshot.directory)) not in snapshot.files
    ]


def disown(table: LakeTable, orphans: Sequence[Path]) -> list[Path]:
    """Commits that these files are removed, and returns those that may go now: without what was committed meanwhile.

    A file that has no final name yet needs no commit: who wants to rename it finds it gone.
    """
    placed = {str(path.relative_to(table.directory)): path for path in orphans if path.parent.name != TEMPORARY}
    going = [path for path in orphans if path.parent.name == TEMPORARY]
    if not placed:
        return going

    def removal(snapshot: Snapshot) -> Change:
        for name in [name for name in placed if name in snapshot.files]:
            del placed[name]
        last = snapshot.transactions.get(VACUUM)
        at_ms = now_ms()
        return Change(
            action="vacuum",
            app_id=VACUUM,
            version=last.version + 1 if last else 1,
            expected=last.version if last else None,
            removes=[
                RemoveAction(name, data_change=False, deletion_timestamp=at_ms, partition_values=_partition(path))
                for name, path in placed.items()
            ],
        )

    failpoint("vacuum.before_commit")
    table.commit(removal)
    failpoint("vacuum.after_commit")
    return [*going, *placed.values()]


def _partition(path: Path) -> dict[str, str | None]:
    match = _DAY.match(path.parent.name)
    return {"day": match[1] if match else None}
