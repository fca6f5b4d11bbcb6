"""The memory of a process and all its children, sampled while they work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

import psutil

_SAMPLE_S: Final = 0.05


class Peak:
    """The highest resident memory seen so far, pages that processes share counted in each; and its parts by name."""

    def __init__(self) -> None:
        self.mb = 0.0
        self.parts_mb: dict[str, float] = {}

    def note(self, parts_bytes: dict[str, int]) -> None:
        """Notes one sample."""
        mb = round(sum(parts_bytes.values()) / 1e6, 1)
        if mb > self.mb:
            self.mb = mb
            self.parts_mb = {name: round(size / 1e6, 1) for name, size in parts_bytes.items()}


@asynccontextmanager
async def watch_memory(pid: int) -> AsyncGenerator[Peak]:
    """Samples the process tree under ``pid`` every 50 ms while the block lasts."""
    peak = Peak()
    root = psutil.Process(pid)
    peak.note(_resident(root))

    async def sample() -> None:
        while True:
            peak.note(_resident(root))
            await asyncio.sleep(_SAMPLE_S)

    task = asyncio.create_task(sample())
    try:
        yield peak
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _resident(root: psutil.Process) -> dict[str, int]:
    parts: dict[str, int] = {}
    for process in (root, *root.children(recursive=True)):
        try:
            name = process.name()
            parts[name] = parts.get(name, 0) + process.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # ended since it was listed
    return parts
