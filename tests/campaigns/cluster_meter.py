"""How much memory and how many open files some processes have, over time.  Holds no tests itself."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import linear_regression, median
from typing import Final

import msgspec

SAMPLE_S: Final = 5.0
_MIB: Final = 1024 * 1024
_YOUNG_S: Final = 20.0
"""A process that was just started is not looked at: it is still reading what it stored."""


class Sample(msgspec.Struct, frozen=True):
    """What one process had at one moment."""

    at_s: float
    rss_bytes: int
    files: int


class Meter:
    """Samples processes by name.  A process may be another one each time: nodes are killed and started again."""

    def __init__(self, processes: Mapping[str, Callable[[], int | None]]) -> None:
        self._processes = {**processes, "campaign": os.getpid}
        self._samples: dict[str, list[Sample]] = {name: [] for name in self._processes}
        self._since: dict[str, tuple[int, float]] = {}

    async def run(self) -> None:
        """Samples until it is cancelled."""
        while True:
            for name, pid_of in self._processes.items():
                pid = pid_of()
                if pid is not None:
                    self._take(name, pid)
            await asyncio.sleep(SAMPLE_S)

    def summary(self) -> dict[str, dict[str, float]]:
        """Returns for each process the memory and the open files at the beginning and at the end (medians of a tenth
        of the samples), and the slopes of both over the second half, an hour."""
        return {name: _summary(samples) for name, samples in self._samples.items() if len(samples) > 1}

    def _take(self, name: str, pid: int) -> None:
        now = time.monotonic()
        if self._since.get(name, (0, 0.0))[0] != pid:
            self._since[name] = (pid, now)
        if name != "campaign" and now - self._since[name][1] < _YOUNG_S:
            return
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        except (OSError, IndexError, ValueError):
            return  # it has just ended
        self._samples[name].append(Sample(now, pages * os.sysconf("SC_PAGE_SIZE"), files))


def _summary(samples: Sequence[Sample]) -> dict[str, float]:
    tenth = max(1, len(samples) // 10)
    first, last = samples[:tenth], samples[-tenth:]
    half = samples[len(samples) // 2 :]
    return {
        "samples": len(samples),
        "first_mib": round(median(sample.rss_bytes for sample in first) / _MIB, 1),
        "last_mib": round(median(sample.rss_bytes for sample in last) / _MIB, 1),
        "most_mib": round(max(sample.rss_bytes for sample in samples) / _MIB, 1),
        "mib_per_hour": round(_slope(half, [sample.rss_bytes / _MIB for sample in half]) * 3600, 1),
        "first_files": median(sample.files for sample in first),
        "last_files": median(sample.files for sample in last),
        "most_files": max(sample.files for sample in samples),
        "files_per_hour": round(_slope(half, [float(sample.files) for sample in half]) * 3600, 1),
    }


def _slope(samples: Sequence[Sample], values: Sequence[float]) -> float:
    if len(samples) < 2:
        return 0.0
    return linear_regression([sample.at_s for sample in samples], values).slope
