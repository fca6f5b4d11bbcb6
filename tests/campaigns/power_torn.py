"""What a power cut may leave of what was written and not yet synced: some of it, in any order.

After the writers are dead, the mounted file system still shows everything they wrote, and the copied image what was
synced of it.  The kernel might have written back anything in between by itself.  :func:`tear` chooses: of each file,
which of the pages that differ are there; of the names made, renamed and removed, all or none, since the journal of
the file system keeps their order.  A file whose name is there and whose content is not is empty, short, or zeros.

Nothing that was synced is touched, so nothing that was acknowledged may depend on what is chosen here.
"""

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

PAGE: Final = 4096
_GET_GENERATION: Final = 0x80087601
"""FS_IOC_GETVERSION of <linux/fs.h>, which is the same for all architectures of 64 bits but MIPS and PowerPC."""

_MOST_TOLD: Final = 20


def tear(written: Path, survived: Path, choice: random.Random) -> list[str]:
    """Puts some of what was only ``written`` into what ``survived``; returns what became of each file, for a report."""
    told: list[str] = []
    names = choice.random() < 0.7
    if names:
        _apply_names(written, survived, choice, told)
    for path in _files(survived):
        source = written / path
        if source.is_file():
            _mix(source, survived / path, choice, told)
    return told[:_MOST_TOLD]


def _files(root: Path) -> list[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders.sort()
        found += [Path(folder, name).relative_to(root) for name in sorted(names)]
    return found


def _apply_names(written: Path, survived: Path, choice: random.Random, told: list[str]) -> None:
    """Makes and removes what was made and removed: with the content that a file of that name had, or without."""
    there, wanted = set(_files(survived)), set(_files(written))
    # By what a file is, since a rename carries its content along.
    synced = {_identity(survived / path): path for path in there}
    moved = {path: synced[found] for path in wanted - there if (found := _identity(written / path)) in synced}
    contents = {path: (survived / old).read_bytes() for path, old in moved.items()}
    for path in sorted(there - wanted):
        (survived / path).unlink()
        told.append(f"{path}: removed")
    for path in sorted(wanted - there):
        target = survived / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path in contents:
            target.write_bytes(contents[path])
            told.append(f"{path}: renamed from {moved[path]}")
        else:
            target.write_bytes(b"")
            told.append(f"{path}: made")
    for folder, _, names in os.walk(survived, topdown=False):
        place = Path(folder).relative_to(survived)
        if not names and not (written / place).exists() and not any(Path(folder).iterdir()):
            Path(folder).rmdir()


def _identity(path: Path) -> tuple[int, bytes]:
    """The file's inode and the inode's generation, which another file of the same number has not."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_ino, fcntl.ioctl(file, _GET_GENERATION, bytes(8))


def _mix(source: Path, target: Path, choice: random.Random, told: list[str]) -> None:
    new, old = source.read_bytes(), target.read_bytes()
    if new == old:
        return
    what = choice.choice(("none", "prefix", "prefix", "pages", "pages", "zeros", "all"))
    mixed = _mixture(old, new, what, choice)
    if mixed != old:
        target.write_bytes(mixed)
        name = "/".join(target.parts[-3:])
        told.append(f"{name}: {what}, {len(old)} bytes synced, {len(new)} written, {len(mixed)} left")


def _mixture(old: bytes, new: bytes, what: str, choice: random.Random) -> bytes:
    """Returns ``old`` with some of what differs in ``new``, page by page."""
    if what == "none":
        return old
    if what == "all":
        return new
    if len(new) < len(old):
        # Truncated, and perhaps written again: the shortening has come to the disk, or has not.
        return new if choice.random() < 0.5 else old
    if what == "prefix":
        # The file grows as its pages come to the disk; where it ends in the middle of one, by the byte.
        end = choice.randint(len(old), len(new))
        return _by_pages(old, new[:end], lambda: True)
    if what == "zeros":
        # The length has come to the disk, the new pages have not.
        return old + bytes(len(new) - len(old))
    return _by_pages(old, new, lambda: choice.random() < 0.5)


def _by_pages(old: bytes, new: bytes, takes: Callable[[], bool]) -> bytes:
    mixed = bytearray(old.ljust(len(new), b"\0"))
    for start in range(0, len(new), PAGE):
        if old[start : start + PAGE] != new[start : start + PAGE] and takes():
            mixed[start : start + PAGE] = new[start : start + PAGE]
    return bytes(mixed)
