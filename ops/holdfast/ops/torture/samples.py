"""What is measured while a run goes on: watermarks, and what each process holds."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from holdfast.lake import Lake
from holdfast.ops.torture.check import Sample
from holdfast.ops.torture.plain import STREAMS
from holdfast.ops.torture.rig import TortureRig, usage_of
from holdfast.ops.torture.seen import Mark
from holdfast.ops.torture.usage import UsageLog, UsageSummary
from holdfast.schemas.errors import HoldfastError
from holdfast.schemas.rows import TABLES
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.topology import stream_info

SAMPLE_S: Final = 0.5
_ANSWER_S: Final = 2.0


class Sampler:
    """Takes samples of a rig until it is cancelled."""

    def __init__(self, rig: TortureRig, *, every_s: float = SAMPLE_S) -> None:
        self._rig = rig
        self._every_s = every_s
        self._usage = UsageLog()
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
            if usage is not None:
                self._usage.take(name, child.pid, at_s, usage)

    async def _take_marks(self, connection: Connection, started: float) -> None:
        # The streams first: what is purged of them later is below a watermark that is read later.
        infos = {stream: await stream_info(connection, stream) for stream in STREAMS.values()}
        marks: list[Mark] = []
        if self._rig.lake.is_dir():
            lake = await asyncio.to_thread(Lake.open, self._rig.lake)
            for table in TABLES:
                info = infos[STREAMS[table]]
                found = await asyncio.to_thread(lake.watermark, table)
                epoch, seq = (None, 0) if found is None else (found.epoch, found.seq)
                marks.append(Mark(info.name, info.epoch, epoch, seq, info.first_seq, info.last_seq, info.messages))
        self.samples.append(Sample(round(time.monotonic() - started, 3), marks))

    def summary(self) -> dict[str, UsageSummary]:
        """Returns what each process held."""
        return self._usage.summary()
