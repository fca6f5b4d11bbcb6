"""A whole system on a small disk of its own, that can be filled, freed and made to fail.

Needs root: mounts a tmpfs, and attaches strace to processes of its own.  Holds no tests itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from holdfast.ops.server_config import LOG_FILE
from holdfast.ops.torture.disk_faults import end_tracer
from holdfast.ops.torture.load import SdkProducer
from holdfast.schemas.errors import StorageFailedError
from holdfast.schemas.limits import MIB
from holdfast.streams.local_server import read_local_server
from tests.campaigns.disk_waits import STACKS_SIGNAL, StalledError, until_told
from tests.support import LIMIT_S

if TYPE_CHECKING:
    from holdfast.client import Holdfast
    from holdfast.ops.torture.history import Attempt, HistoryWriter

DISK_BYTES: Final = 96 * MIB
ROOT: Final = Path(__file__).resolve().parents[2]
_MOUNT_S: Final = 30.0
_START_S: Final = 2 * LIMIT_S
_HOLDFAST: Final = """
from tests.campaigns.disk_waits import tell_stacks_when_asked
from holdfast.ops.cli.app import main

tell_stacks_when_asked()
main()
"""

Target = Literal["server", "up"]


def what_is_missing() -> str:
    """Why disks cannot be made to fail here; empty when they can."""
    if os.geteuid() != 0:
        return "mounting a disk and attaching strace need root"
    missing = [name for name in ("strace", "mount", "umount") if shutil.which(name) is None]
    return f"needs {', '.join(missing)}" if missing else ""


class Injection(msgspec.Struct, frozen=True):
    """An error that system calls of a process return: ``when`` as strace reads it, ``3`` or ``3+``."""

    target: Target
    calls: str
    error: str
    when: str


class SmallDisk:
    """A tmpfs with a ballast file that fills it."""

    def __init__(self, size: int = DISK_BYTES) -> None:
        self._size = size
        self.path = Path(tempfile.mkdtemp(prefix="holdfast-disk-"))
        self._mounted = False

    def mount(self) -> None:
        """Makes the file system."""
        options = f"size={self._size}"
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "holdfast-test", str(self.path)], check=True, timeout=_MOUNT_S
        )
        self._mounted = True

    def fill(self, leave: int = 0) -> None:
        """Fills it, all but the last ``leave`` bytes."""
        with (self.path / "ballast").open("ab", buffering=0) as file:
            disk = os.statvfs(self.path)
            chunk = max(0, disk.f_bavail * disk.f_frsize - leave)
            offset = os.fstat(file.fileno()).st_size
            while chunk:
                try:
                    os.posix_fallocate(file.fileno(), offset, chunk)
                    offset += chunk
                except OSError:
                    chunk //= 2
                chunk = chunk if not leave else 0

    def free(self) -> None:
        """Gives the room back."""
        (self.path / "ballast").unlink(missing_ok=True)

    def remove(self) -> None:
        """Unmounts and forgets it; lazily, should something still use it."""
        if self._mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=False, timeout=_MOUNT_S)
        with contextlib.suppress(OSError):
            self.path.rmdir()


class Watcher:
    """When something was acknowledged or refused for the disk, by kind; shared by the producers of a run."""

    def __init__(self) -> None:
        self.acknowledged_at_s: dict[str, float] = {}
        self.named_at_s: dict[str, float] = {}
        self.causes: Counter[str] = Counter()

    def forget(self) -> None:
        """Begins anew."""
        self.acknowledged_at_s.clear()
        self.named_at_s.clear()


class WatchedProducer(SdkProducer):
    """A producer that tells a watcher, besides the history, when its writes ended."""

    def __init__(self, hf: Holdfast, writer: HistoryWriter, name: str, seed: int, watcher: Watcher, kind: str) -> None:
        super().__init__(hf, writer, name, seed, kinds=[kind], batch=24, large_one_in=150)
        self._watcher = watcher

    def note_acknowledged(self, attempt: Attempt, *, seq: int | None = None, version: int | None = None) -> None:
        """Notes an acknowledgement."""
        super().note_acknowledged(attempt, seq=seq, version=version)
        self._watcher.acknowledged_at_s.setdefault(attempt.kind, time.monotonic())

    def note_error(
        self, attempts: Sequence[Attempt], error: Exception, again: Callable[[], Awaitable[Any]] | None = None
    ) -> None:
        """Notes an error."""
        super().note_error(attempts, error, again)
        if isinstance(error, StorageFailedError):
            self._watcher.causes[error.cause] += 1
            self._watcher.named_at_s.setdefault(attempts[0].kind, time.monotonic())


class DiskRig:
    """``holdfast up`` on a small disk, with all workers."""

    def __init__(self, folder: Path, disk: SmallDisk, process: asyncio.subprocess.Process | None = None) -> None:
        self.folder = folder
        self.disk = disk
        self.data = disk.path / "data"
        self.url = ""
        self.complaint = ""
        """What was wrong with the way in which it stopped."""
        self._process = process

    @property
    def lake(self) -> Path:
        return self.data / "lake"

    @property
    def log(self) -> Path:
        return self.folder / "up.log"

    async def start(self) -> None:
        """Starts the system and waits until it serves."""
        environment = os.environ | {
            "HOLDFAST_ARCHIVE_INTERVAL_S": "0.3",
            "HOLDFAST_COMPACT_INTERVAL_S": "1",
            "HOLDFAST_LOG_FORMAT": "json",
        }
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _HOLDFAST, "up", "--data", str(self.data), "--json"),
                env=environment,
                cwd=ROOT,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(_START_S):
                line = await self._process.stdout.readline()
        except TimeoutError as error:
            raise StalledError(f"'holdfast up' did not serve within {_START_S:g} s: {self.log}") from error
        if not line:
            raise StalledError(f"'holdfast up' ended before it served: {self.log.read_text()[-2000:]}")
        self.url = json.loads(line)["nats_url"]

    async def stop(self) -> str:
        """Asks the system to stop, and kills it when it does not; returns what went wrong, or nothing."""
        process = self._process
        if process is None or process.returncode is not None:
            return ""
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        if await ends_within(process, LIMIT_S):
            return ""
        await self.keep()
        self.kill()
        ends = "" if await ends_within(process, LIMIT_S) else ", nor when it was killed"
        return f"'holdfast up' did not stop within {LIMIT_S:g} s{ends}"

    def kill(self) -> None:
        """Kills the system, and with it its server."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def keep(self) -> None:
        """Keeps beside the history what a system that stands still would take with it: its stacks, the server's log."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(STACKS_SIGNAL)
            await until_told(self.log)
        logs = (self.data / LOG_FILE).parent
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(logs, self.folder / "server-logs", dirs_exist_ok=True)

    def ended(self) -> int | None:
        """The exit status of the system, None while it runs."""
        return None if self._process is None else self._process.returncode

    def told(self) -> Counter[str]:
        """How often the system's log tells of each action."""
        counted: Counter[str] = Counter()
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    counted[str(entry.get("action"))] += 1
        return counted

    @asynccontextmanager
    async def failing(self, injection: Injection) -> AsyncGenerator[None]:
        """Has system calls of the server, or of the process around it, fail while the block lasts."""
        assert self._process is not None
        if injection.target == "server":
            info = read_local_server(self.data)
            if info is None:
                yield  # it is being restarted: nothing to attach to
                return
            pid = info.pid
        else:
            pid = self._process.pid
        trace = self.folder / "strace.log"
        tracer = await asyncio.create_subprocess_exec(
            *("strace", "-f", "-qq", "-o", str(trace), "-p", str(pid)),
            *("-e", f"trace={injection.calls}"),
            *("-e", f"inject={injection.calls}:error={injection.error}:when={injection.when}"),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            yield
        finally:
            await end_tracer(tracer)


async def ends_within(process: asyncio.subprocess.Process, timeout_s: float) -> bool:
    """Whether a process ends in time."""
    try:
        async with asyncio.timeout(timeout_s):
            await process.wait()
    except TimeoutError:
        return False
    return True


@asynccontextmanager
async def disk_rig(folder: Path, size: int = DISK_BYTES) -> AsyncGenerator[DiskRig]:
    """Yields a running system on a disk of its own; whatever happens, it is stopped and unmounted."""
    folder.mkdir(parents=True, exist_ok=True)
    disk = SmallDisk(size)
    try:
        disk.mount()
        rig = DiskRig(folder, disk)
        try:
            await rig.start()
            yield rig
        except (asyncio.CancelledError, StalledError):
            await rig.keep()
            rig.kill()
            raise
        finally:
            disk.free()
            rig.complaint = await rig.stop()
    finally:
        disk.remove()
