"""The processes that die with the machine: each forked from one that has everything imported, since it lives for less
than a second.

``python -m tests.campaigns.power_processes`` is such a nursery: a task comes in a line, and a process is made of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec

from tests.campaigns.power_load import LoadTask, run_load
from tests.campaigns.power_worker import UpkeepTask, run_workers_of
from tests.support import LIMIT_S

MODULE: Final = "tests.campaigns.power_processes"
ROOT: Final = Path(__file__).parents[2]
_PR_SET_PDEATHSIG: Final = 1


def serve() -> None:
    """Forks a process for each task that comes, one after the other, and tells how it ended."""
    _die_with_parent()
    for line in sys.stdin.buffer:
        task = msgspec.json.decode(line, type=LoadTask | UpkeepTask)
        child = os.fork()
        if not child:
            _die_with_parent()
            try:
                asyncio.run(run_load(task) if isinstance(task, LoadTask) else run_workers_of(task))
            finally:
                os._exit(1)
        os.write(1, f"pid {child}\n".encode())
        _, status = os.waitpid(child, 0)
        os.write(1, f"end {os.waitstatus_to_exitcode(status)}\n".encode())


def _die_with_parent() -> None:
    """Has the kernel kill this process when the one that started it dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Nursery:
    """A process that forks others.  One at a time; :func:`nursery` makes it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._lines: asyncio.Queue[str] = asyncio.Queue()
        self._pid: int | None = None
        self.told: list[str] = []

    async def start(self, task: LoadTask | UpkeepTask) -> None:
        """Forks a process for a task; returns when it is ready."""
        assert self._process.stdin is not None
        self.told.clear()
        self._process.stdin.write(msgspec.json.encode(task) + b"\n")
        self._pid = int((await self.until("pid")).split()[1])
        await self.until("ready")

    async def until(self, *words: str) -> str:
        """Returns the next line that begins with one of some words; ``end`` if the process ends before."""
        assert self._process.stdout is not None
        while True:
            line = (await asyncio.wait_for(self._process.stdout.readline(), LIMIT_S)).decode().strip()
            if not line:
                raise RuntimeError("the process that forks others has died")
            self.told.append(line)
            if line.startswith("end"):
                self._pid = None
                return line
            if line.split(" ")[0] in words:
                return line

    def kill(self) -> None:
        """Kills the process; :meth:`ended` waits for its end."""
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    async def ended(self) -> None:
        """Waits until the process is dead; harmless when there is none."""
        while self._pid is not None:
            await self.until("end")


@asynccontextmanager
async def nursery(stderr: Path) -> AsyncGenerator[Nursery]:
    """Yields a nursery; whatever it forked is dead at the end of the block."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with stderr.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", MODULE),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=environment,
        )
    made = Nursery(process)
    try:
        yield made
    finally:
        made.kill()
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), LIMIT_S)
        except TimeoutError:
            process.kill()
            await process.wait()


if __name__ == "__main__":
    serve()
