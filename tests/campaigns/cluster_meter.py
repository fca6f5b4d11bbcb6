"""How much memory and how many open files some processes have, over time.  Holds no tests itself."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Mapping
from typing import Final

from holdfast.ops.torture.rig import usage_of
from holdfast.ops.torture.usage import UsageLog, UsageSummary, not_flat

SAMPLE_S: Final = 5.0
CAMPAIGN: Final = "campaign"
"""The process that runs the campaign.  It remembers what was written, so it grows, and is not judged."""


class Meter:
    """Samples processes by name.  A process may be another one each time: nodes are killed and started again."""

    def __init__(
        self, processes: Mapping[str, Callable[[], int | None]], together: Mapping[str, Collection[str]] | None = None
    ) -> None:
        self._processes = {**processes, CAMPAIGN: os.getpid}
        self._together = together
        self._usage = UsageLog()

    async def run(self) -> None:
        """Samples until it is cancelled."""
        while True:
            now = time.monotonic()
            for name, pid_of in self._processes.items():
                pid = pid_of()
                usage = None if pid is None else usage_of(pid)
                if pid is not None and usage is not None:
                    self._usage.take(name, pid, now, usage)
            await asyncio.sleep(SAMPLE_S)

    def summary(self) -> dict[str, UsageSummary]:
        """Returns what each process held, by the rule of :mod:`holdfast.ops.torture.usage`."""
        return self._usage.summary(together=self._together)

    def not_flat(self) -> list[str]:
        """Returns the processes that grow, and by how much."""
        return not_flat({name: usage for name, usage in self.summary().items() if name != CAMPAIGN})
