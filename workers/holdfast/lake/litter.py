"""What killed processes leave beside the tables: files on their way to a name that they never got.

None of it is ever read.  Each is written under a name of its own and renamed, or linked, to the one that counts; a
process killed in between leaves it, and nothing but a vacuum takes it away.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from holdfast.lake.files import UNNAMED
from holdfast.lake.log import LOG_DIRECTORY
from holdfast.schemas.ids import now_ms
from holdfast.schemas.rows import TABLES

VIEWS_WORKSHOP: Final = "holdfast-views-"
"""How the folders begin, among the system's temporary files, in which the views file is made."""

SHARED_AGE_S: Final = 86_400.0

_STAGED: Final = re.compile(r".+#\d+\Z")
"""A file of the log that deltalake's store had not linked or renamed yet."""


def remove_litter(lake: Path, before_ms: float) -> tuple[int, int]:
    """Removes what was left before a time, and is nobody's any more; returns how many files or folders, and bytes.

    A process that has been working on one of them for longer fails to give it its name, and tries again.  Among the
    system's temporary files, which other lakes have a part in, only what is a day old is taken for left, whatever the
    caller says.
    """
    count = size = 0
    for path in _litter(lake):
        is_ours = path.is_relative_to(lake)
        try:
            stat = path.lstat()
            if stat.st_uid != os.geteuid():
                continue
            if stat.st_mtime * 1000 > (before_ms if is_ours else now_ms() - SHARED_AGE_S * 1000):
                continue
            if path.is_dir():
                size += sum(inner.lstat().st_size for inner in path.iterdir())
                shutil.rmtree(path)
            else:
                size += stat.st_size
                path.unlink()
        except FileNotFoundError:
            continue  # another vacuum was here
        count += 1
    return count, size


def _litter(lake: Path) -> Iterator[Path]:
    folders = [lake]
    for table in TABLES:
        folders += [lake / table, *(lake / table).glob("_*")]
    for folder in folders:
        if folder.is_dir():
            yield from (path for path in folder.iterdir() if UNNAMED.match(path.name) and path.is_file())
        if folder.name == LOG_DIRECTORY:
            yield from (path for path in folder.iterdir() if _STAGED.match(path.name))
    for path in Path(tempfile.gettempdir()).glob(f"{VIEWS_WORKSHOP}*"):
        if path.is_dir() and not path.is_symlink():
            yield path
