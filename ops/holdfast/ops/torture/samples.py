"""What is measured while a run goes on: watermarks, and what each process holds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from holdfast.lake import Lake
from holdfast.ops.torture.check import Sample
from holdfast.ops.torture.plain import STREAMS
from holdfast.ops.torture.rig import TortureRig, usage_of
from holdfast.ops.torture.seen import Mark
from holdfast.schemas.errors import HoldfastError
from holdfast.schemas.rows import TABLES
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.topology import stream_info

SAMPLE_S: Final = 0.5
WARM_UP_SHARE: Final = 1 / 3
"""The first part of a process's life, in which it loads code and fills caches, counts for nothing."""

_ANSWER_S: Final = 2.0


class UsageSummary(msgspec.Struct, frozen=True):
    """What a process held over its life, and how it grows: the slope of a straight line through all but the warm-up.

    ``seconds`` is how long its longest incarnation was watched; slopes are that one's.
    """

    starts: int
    seconds: float
    rss_mib_last: float
    rss_mib_most: float
    rss_mib_per_hour: float
    files_last: int
    files_most: int
    files_per_hour: float


class _Life(msgspec.Struct):
    """One incarnation of a process: (seconds, bytes, open files)."""

    pid: int
    points: list[tuple[float, int, int]]


class Sampler:
    """Takes samples of a rig until it is cancelled."""

    def __init__(self, rig: TortureRig, *, every_s: float = SAMPLE_S) -> None:
        self._rig = rig
        self._every_s = every_s
        self._lives: dict[str, list[_Life]] = {}
        self.samples: list[Sample] = []

    async def run(self, started: float) -> None:
        """Takes a sample every now and then; a server that is away is waited for."""
        while True:
            try:
                async with open_connection(self._rig.url) as connection:
                    while True:
                        self.take_usage(time.monotonic() - started)
                        async with asyncio.timeout(_ANSWER_S):
                            await self._take_marks(connection, started)
                        await asyncio.sleep(self._every_s)
            except (HoldfastError, OSError, TimeoutError):
                self.take_usage(time.monotonic() - started)
                await asyncio.sleep(self._every_s)

    def take_usage(self, at_s: float) -> None:
        """Notes what each process holds now."""
        for name, child in self._rig.children.items():
            usage = usage_of(child.pid) if child.is_running else None
            if usage is None:
                continue
            lives = self._lives.setdefault(name, [])
            if not lives or lives[-1].pid != child.pid:
                lives.append(_Life(child.pid, []))
            lives[-1].points.append((at_s, usage.rss_bytes, usage.open_files))

    async def _take_marks(self, connection: Connection, started: float) -> None:
        # The streams first: what is purged of them later is below a watermark that is read later.
        infos = {stream: await stream_info(connection, stream) for stream in STREAMS.values()}
        marks: list[Mark] = []
        if self._rig.lake.is_dir():
            lake = await asyncio.to_thread(Lake.open, self._rig.lake)
            for table in TABLES:
                info = infos[STREAMS[table]]
                found = await asyncio.to_thread(lake.watermark, table)
                epoch = None if found is None else found.epoch
                seq = found.seq if found is not None and found.epoch == info.epoch else 0
                marks.append(Mark(info.name, info.epoch, epoch, seq, info.first_seq, info.last_seq, info.messages))
        self.samples.append(Sample(round(time.monotonic() - started, 3), marks))

    def summary(self) -> dict[str, UsageSummary]:
        """Returns what each process held."""
        return {name: summarize([life.points for life in lives]) for name, lives in self._lives.items() if lives}


def summarize(lives: Sequence[Sequence[tuple[float, int, int]]]) -> UsageSummary:
    """Returns the summary of a process's incarnations, each a list of (seconds, bytes, open files)."""
    longest = max(lives, key=lambda points: points[-1][0] - points[0][0])
    warm = after_warm_up(longest)
    every = [point for points in lives for point in points]
    mib = 1024 * 1024
    return UsageSummary(
        starts=len(lives),
        seconds=round(longest[-1][0] - longest[0][0], 1),
        rss_mib_last=round(longest[-1][1] / mib, 1),
        rss_mib_most=round(max(point[1] for point in every) / mib, 1),
        rss_mib_per_hour=round(slope([(at_s, size / mib) for at_s, size, _ in warm]) * 3_600, 2),
        files_last=longest[-1][2],
        files_most=max(point[2] for point in every),
        files_per_hour=round(slope([(at_s, float(count)) for at_s, _, count in warm]) * 3_600, 2),
    )


def after_warm_up(points: Sequence[tuple[float, int, int]]) -> Sequence[tuple[float, int, int]]:
    """Returns the points after the first third of a life."""
    begins = points[0][0] + (points[-1][0] - points[0][0]) * WARM_UP_SHARE
    return [point for point in points if point[0] >= begins]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Returns the slope of the line of least squares through some points; 0 when there are fewer than two."""
    count = len(points)
    if count < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
