"""What the second copy of a table holds: each data file with its size and SHA-256, a line each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from holdfast.lake.files import write_durably

_Identity = tuple[int, int, int]


class CopiedFile(msgspec.Struct, frozen=True):
    """A data file of the copy, by its path in the table."""

    path: str
    size: int
    sha256: str


class CopySums:
    """The file of sums of one table's copy.

    A line is added for each file that was copied; once as many lines are of no use any more as there are files, all of
    it is written anew, in one step.  One at a time writes, of all processes; any number read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_as: _Identity | None = None
        self._files: dict[str, CopiedFile] = {}
        self._lines = 0
        self._ends_torn = False

    def files(self) -> Mapping[str, CopiedFile]:
        """Returns what the copy holds, by path; reads the file when somebody has written to it since."""
        found = self._identity()
        if found != self._read_as:
            self._read()
            self._read_as = found
        return self._files

    def add(self, file: CopiedFile) -> None:
        """Notes, durably, a file that was copied."""
        self.files()
        # A crash may have left half a line, which this one shall not be part of.
        line = b"\n" * self._ends_torn + msgspec.json.encode(file) + b"\n"
        with self._path.open("ab") as sums:
            sums.write(line)
            sums.flush()
            os.fsync(sums.fileno())
        self._files[file.path] = file
        self._lines += 1
        self._ends_torn = False
        self._read_as = self._identity()

    def forget(self, paths: Iterable[str]) -> None:
        """Forgets files that the copy does not hold any more; their lines may stay a while."""
        self.files()
        for path in paths:
            self._files.pop(path, None)
        if self._lines > 0 and self._lines >= 2 * len(self._files):
            write_durably(self._path, b"".join(msgspec.json.encode(file) + b"\n" for file in self._files.values()))
            self._lines = len(self._files)
            self._ends_torn = False
            self._read_as = self._identity()

    def _identity(self) -> _Identity | None:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _read(self) -> None:
        self._files, self._lines, self._ends_torn = {}, 0, False
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        self._ends_torn = not content.endswith(b"\n") and bool(content)
        for line in content.splitlines():
            self._lines += 1
            try:
                file = msgspec.json.decode(line, type=CopiedFile)
            except msgspec.MsgspecError:
                continue  # torn by a crash: the file is copied once more
            self._files[file.path] = file
