"""The compactor: many small files to few large ones, and removal of files that no version of the lake names any more.

Archiving every few seconds makes a small file each time; queries want few large ones.  Readers that opened an earlier
version go on for a day: replaced files stay that long.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import msgspec

from holdfast.lake.compaction import CompactionReport, VacuumReport, compact, vacuum
from holdfast.schemas.errors import FenceError, HoldfastError
from holdfast.workers.waiting import wait_for_event

if TYPE_CHECKING:
    from holdfast.lake.lake import Lake

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CompactCounters(msgspec.Struct):
    """Rounds run, files merged away, files written, files removed for good, rounds lost to another compactor."""

    rounds: int = 0
    merged: int = 0
    written: int = 0
    removed: int = 0
    fenced: int = 0
    failed: int = 0


class Compactor:
    """Merges and vacuums a lake, now and then."""

    def __init__(self, lake: Lake, *, interval_s: float) -> None:
        self._lake = lake
        self._interval_s = interval_s
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="holdfast-compactor")
        self._wake = asyncio.Event()
        self.counters = CompactCounters()

    async def run(self) -> None:
        """Runs a round every ``interval_s`` seconds.  Never returns; a failed round is told and tried again."""
        while True:
            await wait_for_event(self._wake, self._interval_s)
            try:
                await self.round()
            except FenceError:
                self.counters.fenced += 1  # another compactor was faster: its work is as good as ours
            except (HoldfastError, OSError):
                self.counters.failed += 1
                logger.exception("compaction failed", extra={"action": "compaction_failed"})

    async def round(self) -> tuple[CompactionReport, VacuumReport]:
        """Merges what is due and removes what is no longer needed; returns what was done."""
        merged = await self._in_thread(lambda: compact(self._lake))
        removed = await self._in_thread(lambda: vacuum(self._lake))
        self.counters.rounds += 1
        self.counters.merged += merged.files_before
        self.counters.written += merged.files_after
        self.counters.removed += removed.replaced_files + removed.orphaned_files
        if merged.files_before:
            logger.info(
                "files merged",
                extra={"action": "compacted", "before": merged.files_before, "after": merged.files_after},
            )
        return merged, removed

    async def close(self) -> None:
        """Waits for the merge under way: cut short it would have been for nothing."""
        await asyncio.to_thread(self._executor.shutdown)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)
