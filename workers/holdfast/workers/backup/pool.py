"""The directory of backups: its layout, its lock, and objects named by the sha256 of their content."""

from __future__ import annotations

import fcntl
import hashlib
import os
import uuid
from collections.abc import Container
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from holdfast.lake.checksums import sha256_of
from holdfast.lake.files import UNNAMED, fsync_directory, make_directory, write_durably
from holdfast.schemas.errors import DataDirectoryError, UnavailableError
from holdfast.schemas.failpoints import failpoint

LAYOUT_FILE: Final = "holdfast-backups.json"
LAYOUT_VERSION: Final = 1
OBJECTS: Final = "objects"
MANIFESTS: Final = "manifests"
TEMPORARY: Final = "tmp"
LOCK_FILE: Final = "lock"
UNFINISHED_FILE: Final = "unfinished.ndjson"

_PIECE: Final = 1024 * 1024


class Stored(msgspec.Struct, frozen=True):
    """An object: the sha256 of its content, its size, and whether this call brought it."""

    sha256: str
    size: int
    is_new: bool = False


class Pool:
    """The objects of one directory of backups.  Reading needs no lock; whoever writes holds it, by ``with``.

    ``create`` makes the directory; without it, DataDirectoryError tells that there are no backups.
    """

    def __init__(self, directory: Path, *, create: bool = False) -> None:
        self.directory = directory
        self._lock: int | None = None
        self._dirty: set[Path] = set()
        if create:
            _create(directory)
        _check_layout(directory)

    def __enter__(self) -> Self:
        fd = os.open(self.directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise UnavailableError(
                f"another process writes backups to {self.directory}", hint="wait until it has ended, then try again"
            ) from error
        self._lock = fd
        for left in (self.directory / TEMPORARY).iterdir():
            left.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lock is not None
        os.close(self._lock)
        self._lock = None

    def path(self, sha256: str) -> Path:
        """Returns where an object is."""
        return self.directory / OBJECTS / sha256[:2] / sha256

    def has(self, sha256: str, size: int) -> bool:
        """Whether an object is there, by its size; :meth:`is_sound` reads it."""
        try:
            return self.path(sha256).stat().st_size == size
        except FileNotFoundError:
            return False

    def is_sound(self, sha256: str, size: int) -> bool:
        """Whether an object is there and its content still hashes to its name."""
        return self.has(sha256, size) and sha256_of(self.path(sha256)) == sha256

    def writer(self) -> ObjectWriter:
        """Returns what a new object is written with."""
        return ObjectWriter(self)

    def add_file(self, source: Path) -> Stored:
        """Copies a file into the pool; raises FileNotFoundError when it is gone."""
        with source.open("rb") as file, self.writer() as writer:
            while piece := file.read(_PIECE):
                writer.write(piece)
            return writer.finish()

    def add_bytes(self, content: bytes) -> Stored:
        """Stores some bytes."""
        with self.writer() as writer:
            writer.write(content)
            return writer.finish()

    def place(self, temporary: Path, sha256: str, size: int) -> Stored:
        """Gives a synced temporary file its name; for :class:`ObjectWriter`."""
        if self.has(sha256, size):
            temporary.unlink()
            return Stored(sha256, size)
        target = self.path(sha256)
        make_directory(target.parent)
        temporary.rename(target)
        self._dirty.add(target.parent)
        failpoint("backup.after_object")
        return Stored(sha256, size, is_new=True)

    def flush(self) -> None:
        """Makes the names of new objects durable."""
        for directory in sorted(self._dirty):
            fsync_directory(directory)
        self._dirty.clear()

    def collect(self, keep: Container[str]) -> tuple[int, int]:
        """Removes the objects that are not in ``keep``; returns how many, and their bytes."""
        count = size = 0
        for folder in (self.directory / OBJECTS).iterdir():
            for path in folder.iterdir():
                if path.name not in keep:
                    size += path.stat().st_size
                    path.unlink()
                    count += 1
        return count, size


class ObjectWriter:
    """Writes one object; leaving the block without :meth:`finish` removes what was written."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._path = pool.directory / TEMPORARY / uuid.uuid4().hex
        self._file = self._path.open("xb")
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, piece: bytes) -> None:
        """Adds some bytes."""
        self._file.write(piece)
        self._hash.update(piece)
        self._size += len(piece)

    def finish(self) -> Stored:
        """Makes the content durable under its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._pool.place(self._path, self._hash.hexdigest(), self._size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def _create(directory: Path) -> None:
    make_directory(directory)
    if not (directory / LAYOUT_FILE).exists():
        ours = {OBJECTS, MANIFESTS, TEMPORARY, "lost+found"}
        names = (path.name for path in directory.iterdir())
        strange = sorted(name for name in names if name not in ours and not UNNAMED.match(name))
        if strange:
            raise DataDirectoryError(
                f"directory {directory} is not empty and holds no backups: it holds {strange[0]!r}",
                field="directory",
                hint="choose a new or an empty directory",
            )
    for name in (OBJECTS, MANIFESTS, TEMPORARY):
        make_directory(directory / name)
    if not (directory / LAYOUT_FILE).exists():
        write_durably(directory / LAYOUT_FILE, msgspec.json.encode({"v": LAYOUT_VERSION}))


def _check_layout(directory: Path) -> None:
    try:
        found = msgspec.json.decode((directory / LAYOUT_FILE).read_bytes(), type=dict[str, int])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataDirectoryError(
            f"{directory} holds no backups", field="directory", hint="make one with 'holdfast backup DIR'"
        ) from error
    except msgspec.MsgspecError as error:
        raise DataDirectoryError(
            f"{directory / LAYOUT_FILE} is damaged: {error}",
            field="directory",
            hint=f'if these are backups of holdfast, write {{"v":{LAYOUT_VERSION}}} into it',
        ) from error
    if found.get("v") != LAYOUT_VERSION:
        raise DataDirectoryError(
            f"{directory} holds backups of layout {found.get('v')}, this holdfast reads {LAYOUT_VERSION}",
            field="directory",
            hint="use the holdfast release that wrote them",
        )
