"""The memory of a process and all its children, sampled while they work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

import psutil

_SAMPLE_S: Final = 0.05


class Peak:
    """The highest resident memory seen so far, pages that processes share counted in each."""

    def __init__(self) -> None:
        self.bytes = 0

    @property
    def mb(self) -> float:
        return round(self.bytes / 1e6, 1)


@asynccontextmanager
async def watch_memory(pid: int) -> AsyncGenerator[Peak]:
    """Samples the process tree under ``pid`` every 50 ms while the block lasts."""
    peak = Peak()
    root = psutil.Process(pid)
    peak.bytes = _resident(root)

    async def sample() -> None:
        while True:
            peak.bytes = max(peak.bytes, _resident(root))
            await asyncio.sleep(_SAMPLE_S)

    task = asyncio.create_task(sample())
    try:
        yield peak
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _resident(root: psutil.Process) -> int:
    total = 0
    for process in (root, *root.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # ended since it was listed
    return total
