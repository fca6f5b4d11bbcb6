"""A disk that loses its power: an ext4 file system in a file, copied as it stands.

What a process writes lies in the kernel's cache until the kernel, or an fsync, hands it to the block device.  Here the
block device is a file: once every process on it is dead, a copy of that file is exactly what had reached the device,
and a file system mounted from the copy is what a machine finds after a power cut.

``commit=300`` keeps ext4 from committing its journal every five seconds by itself, so that what survives is what
somebody asked to be synced.  A copy keeps the order in which blocks came to the device; a torn cut mixes them, see
``power_torn``.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

MIB: Final = 1024 * 1024
IMAGE_BYTES: Final = 192 * MIB
"""Room for some thousand messages and a small lake; the file is sparse, so only what is used is copied."""

MOUNT_OPTIONS: Final = "loop,commit=300,noatime"
_TOOLS: Final = ("mkfs.ext4", "mount", "umount", "sync", "cp")
_UNMOUNT_TRIES: Final = 50
_CLONE_NEWNS: Final = 0x00020000


def missing() -> str | None:
    """Returns why no image can be mounted here; None when one can."""
    if os.geteuid() != 0:
        return "power cuts need root, to mount a file system in a file"
    absent = [tool for tool in _TOOLS if shutil.which(tool, path=_path()) is None]
    if absent:
        return f"power cuts need {', '.join(absent)}"
    if not Path("/dev/loop-control").exists():
        return "power cuts need loop devices"
    return None


def keep_mounts_to_this_process() -> None:
    """Gives this process, and what it starts, mounts of their own: however it ends, none is left behind.

    To be called before there are threads.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) == 0:
        _run("mount", "--make-rprivate", "/")


class Disk:
    """A file system in a file, mounted; every :meth:`cut` puts a copy of the file in its place."""

    def __init__(self, folder: Path, *, size_bytes: int = IMAGE_BYTES) -> None:
        self._folder = folder
        self._size_bytes = size_bytes
        self._image: Path | None = None
        self._made = 0
        self.mounted_at = folder / "disk"
        self.used_bytes = 0

    def make(self) -> None:
        """Makes an empty file system and mounts it, in place of the one before."""
        self.close()
        image = self._next_image()
        with image.open("xb") as file:
            file.truncate(self._size_bytes)
        # No reserved blocks, and tables that are made when they are used: the file stays small.
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(image))
        self._mount(image)

    def cut(self, tear: Callable[[Path, Path], None] | None = None) -> float:
        """Mounts what had reached the device by now; returns the seconds that the copying took.

        Every process that writes there must be dead: a copy of a device that is written to is of no moment.  ``tear``
        is called with the folder of everything that was written, and the folder of what had reached the device: it
        may put some of the first into the second.
        """
        assert self._image is not None, "no file system is mounted"
        started = time.monotonic()
        earlier, image = self._image, self._next_image()
        _run("cp", "--sparse=always", str(earlier), str(image))
        taken = time.monotonic() - started
        if tear is not None:
            with _mounted(image, self._folder / "torn") as survived:
                tear(self.mounted_at, survived)
        _unmount(self.mounted_at)
        earlier.unlink()
        self._mount(image)
        return taken

    def sync(self) -> None:
        """Has everything written so far come to the device."""
        _run("sync", "-f", str(self.mounted_at))

    def keep(self, folder: Path) -> Path:
        """Copies the file system as it is now, synced, for whoever looks into what went wrong; returns where to."""
        assert self._image is not None, "no file system is mounted"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / self._image.name
        self.sync()
        _run("cp", "--sparse=always", str(self._image), str(target))
        return target

    def close(self) -> None:
        """Unmounts and removes the file; harmless when there is none."""
        image, self._image = self._image, None
        if image is not None:
            _unmount(self.mounted_at)
            image.unlink(missing_ok=True)

    def _next_image(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._made += 1
        return self._folder / f"disk-{self._made}.ext4"

    def _mount(self, image: Path) -> None:
        _mount(image, self.mounted_at)
        self._image = image
        self.used_bytes = image.stat().st_blocks * 512


def _mount(image: Path, place: Path) -> None:
    place.mkdir(exist_ok=True)
    # The loop device is let go of by itself when the file system is unmounted.
    _run("mount", "-t", "ext4", "-o", MOUNT_OPTIONS, str(image), str(place))


def _unmount(place: Path) -> None:
    # A process that was just killed may hold the file system for a moment yet.
    reason = ""
    for attempt in range(_UNMOUNT_TRIES):
        done = subprocess.run(["umount", str(place)], env=_environment(), capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        reason = done.stderr.strip()
        time.sleep(0.01 * (attempt + 1))
    # Lazily: the device goes away with its last user, instead of staying for ever.
    _run("umount", "--lazy", str(place))
    raise RuntimeError(f"{place} could not be unmounted: {reason}")


@contextmanager
def _mounted(image: Path, place: Path) -> Generator[Path]:
    _mount(image, place)
    try:
        yield place
    finally:
        _unmount(place)


def _run(*command: str) -> None:
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _path(), "LC_ALL": "C"}
