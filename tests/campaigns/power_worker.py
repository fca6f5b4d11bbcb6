"""Workers that are killed with the machine.

Everything is done far more often than an operator would have it, so that a power cut falls into the middle of it:
a commit for each few messages, a checkpoint for each four commits, a merge of each three files, and whatever is
archived is purged, and trimmed, at once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.lake import Lake, compaction, table
from holdfast.lake.index import LakeIndex
from holdfast.schemas import failpoints
from holdfast.schemas.errors import HoldfastError
from holdfast.schemas.ids import now_ms
from holdfast.streams.connection import open_connection
from holdfast.streams.connection_target import ConnectionTarget
from holdfast.streams.hot import HotTier
from holdfast.workers import compactor
from holdfast.workers.settings import WorkerName, WorkerSettings
from holdfast.workers.system import run_workers
from holdfast.workers.trim import Trimmer

if TYPE_CHECKING:
    from holdfast.workers.system import RunningWorkers

DUPLICATE_WINDOW_S: Final = 1.0
"""Of the campaign's streams: nothing younger leaves the event log."""

CHECKPOINT_EVERY: Final = 4
_MONTH_MS: Final = 32 * 86_400_000
_TEN_MINUTES_MS: Final = 660_000

POINTS: Final[dict[str, tuple[str, ...]]] = {
    "archiving": (
        "lake.before_parquet_fsync",
        "lake.after_parquet_fsync",
        "lake.before_rename",
        "lake.after_rename",
        "lake.before_commit",
        "lake.after_commit",
        "lake.after_log_fsync",
    ),
    "purge": ("archiver.before_purge", "archiver.after_purge"),
    "trimming": ("archiver.before_trim", "archiver.after_trim"),
}
"""Where a worker may pull the plug itself, by the kind of round."""


class UpkeepTask(msgspec.Struct, tag="upkeep"):
    """What to run.

    ``armed`` is a failpoint and the call at which it kills the process.  Without ``syncs`` the workers sync nothing:
    a fault planted to see it found.
    """

    url: str
    lake: str
    index: str
    purges: bool = False
    merges: bool = False
    trims: bool = False
    armed: tuple[str, int] | None = None
    syncs: bool = True

    def settings(self) -> WorkerSettings:
        """Settings of workers that never rest."""
        never_s = 3_600.0
        return WorkerSettings(
            lake=Path(self.lake),
            index=Path(self.index),
            archive_interval_s=0.02,
            archive_rows=200,
            hot_window_s=0.0,
            purge_interval_s=0.03 if self.purges else never_s,
            compact_interval_s=0.1 if self.merges else never_s,
            duplicate_window_s=DUPLICATE_WINDOW_S,
        )


async def run_workers_of(task: UpkeepTask) -> None:
    _replace(table, "CHECKPOINT_INTERVAL", CHECKPOINT_EVERY)
    _replace(compactor, "compact", partial(compaction.compact, policy=compaction.MergePolicy(min_files=3)))
    # Files that no commit names stay: one may be about to be committed.
    _replace(compactor, "vacuum", partial(compaction.vacuum, older_than_s=0.0, log_older_than_s=0.0))
    if not task.syncs:
        _replace(os, "fsync", lambda _: None)
    if task.armed is not None:
        point, hit = task.armed
        failpoints.arm(point, lambda _: os.kill(os.getpid(), 9), hit=hit)
    names: list[WorkerName] = ["archiver", "compactor"]
    target = ConnectionTarget(url=task.url, origin="campaign")
    async with AsyncExitStack() as stack:
        workers = await stack.enter_async_context(run_workers(target, names, task.settings()))
        tell("ready")
        async with asyncio.TaskGroup() as group:
            group.create_task(_wait_failed(workers))
            if task.trims:
                trimmer = await stack.enter_async_context(_trimmer(task))
                group.create_task(_trim_for_ever(trimmer))


def _replace(module: object, name: str, value: object) -> None:
    """For the rest of this process, which is a short one."""
    setattr(module, name, value)


async def _wait_failed(workers: RunningWorkers) -> None:
    await workers.wait_failed()


@asynccontextmanager
async def _trimmer(task: UpkeepTask) -> AsyncGenerator[Trimmer]:
    """A trimmer to which each round is a month from now, and ten minutes after the one before."""
    rounds = count()
    target = ConnectionTarget(url=task.url, origin="campaign")
    lake = await asyncio.to_thread(Lake.open, Path(task.lake))
    with LakeIndex.open(Path(f"{task.index}-trimmer")) as index, ThreadPoolExecutor(1) as executor:
        async with open_connection(target, name="trimmer") as connection:
            hot = HotTier(connection)
            trimmer = Trimmer(
                connection,
                hot,
                lake,
                index,
                executor,
                hot_window_s=0.0,
                clock_ms=lambda: now_ms() + _MONTH_MS + next(rounds) * _TEN_MINUTES_MS,
            )
            try:
                yield trimmer
            finally:
                await trimmer.close()
                await hot.close()


async def _trim_for_ever(trimmer: Trimmer) -> None:
    while True:
        try:
            done = await trimmer.round(budget_s=None)
        except HoldfastError as error:
            tell(f"trim failed: {error}")
            await asyncio.sleep(0.05)
            continue
        if done.revisions:
            tell(f"trimmed {done.revisions}")
        await asyncio.sleep(0.01)


def tell(line: str) -> None:
    # One write: a process that is killed has told the line or has not.
    os.write(1, f"{line}\n".encode())
