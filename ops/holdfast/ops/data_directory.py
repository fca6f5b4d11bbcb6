"""The data directory of one Holdfast instance: its layout, its lock and its small files.

::

    <data>/holdfast.json      the version of this layout
    <data>/lock               flock of the one instance; holds its process id
    <data>/server.json        the running embedded server, for discovery (holdfast.streams.local_server)
    <data>/nats-server.conf   generated at each start
    <data>/run/               the server's own ports file
    <data>/logs/              the server's log
    <data>/jetstream/         the server's streams
    <data>/lake/              the cold tier

Everything here blocks: call it from a thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Final

import msgspec

from holdfast.schemas.errors import DataDirectoryError
from holdfast.schemas.limits import MIB
from holdfast.streams.local_server import SERVER_FILE, process_start_ticks, read_local_server

LAYOUT_VERSION: Final = 1
LAYOUT_FILE: Final = "holdfast.json"
LOCK_FILE: Final = "lock"
RESTORING: Final = "restoring"
"""Where a backup is restored, before its parts are moved to their places."""
CONFIG_FILE: Final = "nats-server.conf"

LOCK_GRACE_S: Final = 5.0
"""How long a lock whose holder is dead may linger: its server, which shares the lock, is being killed by the kernel."""

LEAST_FREE_BYTES: Final = 4 * MIB
"""What must be free to start: the server's own files, and the first blocks of its streams and of the lake."""

_TMP: Final = ".tmp"
# A directory that holds other things and no layout file is somebody else's.
_OWN_NAMES: Final = frozenset(
    {
        LAYOUT_FILE,
        LOCK_FILE,
        CONFIG_FILE,
        SERVER_FILE,
        "run",
        "logs",
        "jetstream",
        "lake",
        "holdfast.toml",
        "lost+found",
    }
)
_POLL_S: Final = (0.005, 0.1)


class _Layout(msgspec.Struct):
    v: int


class _Holder(msgspec.Struct):
    pid: int
    start_ticks: int | None


class DirectoryInUseError(DataDirectoryError):
    """Another process holds the data directory; it may give it up."""


class DataDirectory:
    """An exclusive hold on a data directory, from :meth:`open` to :meth:`close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_fd: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether the directory is held."""
        return self._lock_fd is not None

    @property
    def lock_fd(self) -> int:
        """The descriptor of the lock.  A child that inherits it keeps the directory locked until it is dead too."""
        assert self._lock_fd is not None, "the directory is not open"
        return self._lock_fd

    def open(self) -> None:
        """Creates what is missing, checks the layout and takes the lock.

        Raises DataDirectoryError when the directory is in use, foreign, of another layout, or cannot be written;
        nothing is held then.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_layout()
            self._lock()
            self._write_layout()
            for name in ("run", "logs"):
                (self.path / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            self.close()
            raise unusable(self.path, error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Releases the lock; a second call does nothing."""
        fd, self._lock_fd = self._lock_fd, None
        if fd is None:
            return
        try:
            # While a killed child still dies, the lock outlives this call: nobody alive may look like its holder.
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)

    def _check_layout(self) -> None:
        try:
            raw = (self.path / LAYOUT_FILE).read_bytes()
        except FileNotFoundError:
            self._check_not_foreign()
            return
        try:
            version = msgspec.json.decode(raw, type=_Layout).v
        except msgspec.DecodeError as error:
            raise DataDirectoryError(
                f"{self.path / LAYOUT_FILE} is damaged: {error}",
                field="data",
                hint=f'if this is a holdfast data directory, write {{"v":{LAYOUT_VERSION}}} into it',
            ) from error
        if version != LAYOUT_VERSION:
            raise DataDirectoryError(
                f"data directory {self.path} has layout version {version}, this holdfast uses {LAYOUT_VERSION}",
                field="data",
                hint="use the holdfast release that wrote it, or choose another directory with --data",
            )

    def _check_not_foreign(self) -> None:
        strange = sorted(path.name for path in self.path.iterdir() if path.name.removesuffix(_TMP) not in _OWN_NAMES)
        if RESTORING in strange:
            raise DataDirectoryError(
                f"data directory {self.path} holds a restore that was cut off",
                field="data",
                hint="run the same 'holdfast restore' again: it begins anew",
            )
        if strange:
            raise DataDirectoryError(
                f"directory {self.path} is not empty and not a holdfast data directory: it holds {strange[0]!r}",
                field="data",
                hint="choose a new or an empty directory with --data",
            )

    def _lock(self) -> None:
        fd = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._flock(fd)
            pid = os.getpid()
            os.ftruncate(fd, 0)
            os.pwrite(fd, msgspec.json.encode(_Holder(pid, process_start_ticks(pid))), 0)
        except BaseException:
            os.close(fd)
            raise
        self._lock_fd = fd

    def _flock(self, fd: int) -> None:
        # flock and not a pid file: the kernel releases it however a process dies.  It knows no timeout, hence the poll.
        deadline = time.monotonic() + LOCK_GRACE_S
        pause, longest = _POLL_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                holder = _read_holder(fd)
                if holder is not None and process_start_ticks(holder.pid) == holder.start_ticks:
                    who = "this process" if holder.pid == os.getpid() else f"process {holder.pid}"
                    in_use = self._in_use(who, f"stop it with: kill {holder.pid}")
                    if holder.pid == os.getpid():
                        raise in_use from error
                    raise DirectoryInUseError(in_use.message, field=in_use.field, hint=in_use.hint) from error
                if time.monotonic() >= deadline:
                    raise self._left_behind() from error
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _in_use(self, who: str, hint: str) -> DataDirectoryError:
        return DataDirectoryError(
            f"data directory {self.path} is in use by {who}",
            field="data",
            hint=f"{hint}, or choose another directory with --data",
        )

    def _left_behind(self) -> DataDirectoryError:
        server = read_local_server(self.path)
        if server is None:
            return self._in_use("an unknown process", f"find it with: fuser {self.path / LOCK_FILE}")
        return self._in_use(f"a nats-server left behind, process {server.pid}", f"stop it with: kill {server.pid}")

    def _write_layout(self) -> None:
        if not (self.path / LAYOUT_FILE).exists():
            write_atomically(self.path / LAYOUT_FILE, msgspec.json.encode(_Layout(LAYOUT_VERSION)), durable=True)


def write_atomically(path: Path, content: bytes, *, durable: bool) -> None:
    """Replaces ``path`` so that a reader sees the old or the new content, whole; ``durable`` also fsyncs both."""
    temporary = path.with_name(path.name + _TMP)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(fd)
    temporary.replace(path)
    if durable:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def check_room(path: Path) -> None:
    """Raises DataDirectoryError when the disk of a data directory is so full that a server on it could not store."""
    try:
        disk = os.statvfs(path)
    except OSError as error:
        raise unusable(path, error) from error
    free = disk.f_bavail * disk.f_frsize
    if free < LEAST_FREE_BYTES:
        raise DataDirectoryError(
            f"the disk of data directory {path} is full: {free:,} bytes are free, a server needs {LEAST_FREE_BYTES:,}",
            field="data",
            hint="free some space, or choose another disk with --data",
        )


def unusable(path: Path, error: OSError) -> DataDirectoryError:
    """Returns the DataDirectoryError for an operating system's refusal, with what to do about it."""
    reason = (error.strerror or str(error)).lower()
    hints = {
        errno.EEXIST: "a file has that name: choose a directory with --data",
        errno.ENOTDIR: "a file has that name: choose a directory with --data",
        errno.ENOSPC: "free some space, or choose another disk with --data",
        errno.EDQUOT: "free some space, or choose another disk with --data",
    }
    hint = hints.get(
        error.errno or 0, f"make it writable for user id {os.geteuid()}, or choose another directory with --data"
    )
    return DataDirectoryError(f"data directory {path} cannot be used: {reason}", field="data", hint=hint)


def _read_holder(fd: int) -> _Holder | None:
    try:
        return msgspec.json.decode(os.pread(fd, 4096, 0), type=_Holder)
    except msgspec.DecodeError:  # its holder is about to write it, or has just died
        return None
