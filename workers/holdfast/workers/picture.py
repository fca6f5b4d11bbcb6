"""A picture of the whole system at one moment: what health is judged by and metrics are made of.

Every part is asked for at the same time and waited for ``PART_S`` at most: whatever is broken, stopped or hung, the
picture is there in time and says which part did not answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.lake.scrub import scrub_progress
from holdfast.lake.table import TableStatistics
from holdfast.schemas.errors import HoldfastError, UnavailableError
from holdfast.schemas.ids import now_ms
from holdfast.schemas.problems import Problem
from holdfast.schemas.rows import TABLES, Position, Table
from holdfast.streams.consumer import ConsumerState, consumer_states
from holdfast.streams.messages import parse_time_ms
from holdfast.streams.topology import StreamInfo, first_seq_since, stream_info
from holdfast.streams.wire import DEAD_STREAM, EVENTS_STREAM, STREAM_OF_TABLE
from holdfast.streams.write_probe import WriteState, probe_writes
from holdfast.workers.alarms import read_alarms
from holdfast.workers.control import ArchiverStatus, archiver_status
from holdfast.workers.reports import WorkerReport, ask_reports
from holdfast.workers.settings import WORKERS

if TYPE_CHECKING:
    from holdfast.lake.lake import Lake
    from holdfast.streams.connection import Connection

PART_S: Final = 5.0
"""How long a part may take.  With what is asked after it, an answer takes six seconds at most."""

_OLDEST_S: Final = 1.0
DEAD_WITHIN_S: Final = 600.0
"""Dead letters of the last ten minutes tell whether they are growing."""


class Failure(msgspec.Struct, frozen=True):
    """Why a part could not be looked at."""

    what: str
    next_step: str


class LakeState(msgspec.Struct, kw_only=True):
    """What the lake says of itself; ``torn`` names the tables whose last commit is torn."""

    marks: dict[Table, Position | None] = {}
    statistics: dict[Table, TableStatistics] = {}
    torn: list[str] = []
    problems: list[Problem] = []
    alarms: list[Problem] = []
    scrub: dict[str, Any] = {}


class Picture(msgspec.Struct, kw_only=True):
    """The system at one moment.  What is None, or missing, could not be looked at: ``failures`` says why, by part.

    ``oldest_ms``: when the oldest message that is not archived yet was stored, by table.  ``clock_apart_ms``: how far
    the server's clock is ahead of this machine's.  ``recent_dead``: dead letters of the last ten minutes.
    """

    at_ms: int = 0
    streams: dict[str, StreamInfo] = {}
    lake: LakeState | None = None
    oldest_ms: dict[Table, int] = {}
    clock_apart_ms: int | None = None
    writes: WriteState | None = None
    archiver: ArchiverStatus | None = None
    reports: list[WorkerReport] | None = None
    consumers: list[ConsumerState] | None = None
    recent_dead: int | None = None
    failures: dict[str, Failure] = {}

    def lag(self, table: Table) -> int | None:
        """Messages of a table's stream that are not archived yet; None when the picture does not show it."""
        info = self.streams.get(STREAM_OF_TABLE[table])
        if info is None or self.lake is None or table not in self.lake.marks:
            return None
        return max(0, info.last_seq - archived_seq(info, self.lake.marks[table]))


class Observer:
    """Takes pictures.  One for each resolver; close it at the end.

    ``clock_ms`` is this machine's clock.  At most one reading of the lake is under way at a time: of a disk that hangs,
    more would hang too.
    """

    def __init__(self, connection: Connection, lake: Lake, *, clock_ms: Callable[[], int] = now_ms) -> None:
        self.connection = connection
        self._lake = lake
        self._clock_ms = clock_ms
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="holdfast-health")
        self._reading: asyncio.Future[LakeState] | None = None
        self._reading_since_s = 0.0

    async def close(self) -> None:
        """Gives the thread up; one that hangs in a read is not waited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def picture(self, *, probe: bool = True) -> Picture:
        """Returns the system as it is now.  ``probe``: also have the server store something."""
        taken = Picture(at_ms=self._clock_ms(), streams={}, failures={}, oldest_ms={})
        parts: dict[str, Awaitable[Any]] = {
            "lake": self._read_lake(taken),
            "archiver": self._ask_archiver(taken),
            "workers": self._ask_workers(taken),
            "consumers": self._ask_consumers(taken),
            "dead letters": self._ask_dead(taken),
            "clock": self._ask_clock(taken),
        }
        if probe:
            parts["server"] = self._probe(taken)
        for stream in (*STREAM_OF_TABLE.values(), DEAD_STREAM):
            parts[stream] = self._ask_stream(taken, stream)
        await self._in_time(taken, parts, PART_S)
        await self._in_time(
            taken,
            {
                f"{STREAM_OF_TABLE[table]} oldest": self._ask_oldest(taken, table)
                for table in TABLES
                if taken.lag(table)
            },
            _OLDEST_S,
        )
        return taken

    async def _in_time(self, taken: Picture, parts: dict[str, Awaitable[Any]], limit_s: float) -> None:
        """Waits for parts and notes what became of each that is not in the picture."""
        tasks = {asyncio.ensure_future(work): part for part, work in parts.items()}
        if not tasks:
            return
        try:
            done, pending = await asyncio.wait(tasks, timeout=limit_s)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        for task in pending:
            # Not awaited: a thread cannot be called back, and what it finds is of no use any more.
            task.cancel()
            taken.failures[tasks[task]] = Failure(
                f"has not answered within {limit_s:g} s", "see whether its process, its machine or its disk is stuck"
            )
        for task in done:
            error = task.exception()
            if isinstance(error, HoldfastError):
                taken.failures[tasks[task]] = Failure(error.message, error.hint or "see its log")
            elif error is not None:
                raise error

    async def _read_lake(self, taken: Picture) -> None:
        loop = asyncio.get_running_loop()
        if self._reading is None or self._reading.done():
            self._reading_since_s = time.monotonic()
            self._reading = loop.run_in_executor(self._executor, self._lake_state)
        elif time.monotonic() - self._reading_since_s > PART_S:
            raise UnavailableError(
                f"a read of {self._lake.path} has not come back for {time.monotonic() - self._reading_since_s:.0f} s",
                hint="see whether the disk of the lake is mounted and answers; hot contexts and the log are served",
            )
        taken.lake = await asyncio.shield(self._reading)

    def _lake_state(self) -> LakeState:
        lake = self._lake
        try:
            return LakeState(
                marks={table: lake.watermark(table) for table in TABLES},
                statistics={table: lake.statistics(table) for table in TABLES},
                torn=[torn.table for torn in lake.torn_commits()],
                problems=lake.problems(),
                alarms=read_alarms(lake.path),
                scrub=scrub_progress(lake),
            )
        except OSError as error:
            raise UnavailableError(
                f"the lake in {lake.path} cannot be read: {error.strerror or error}",
                hint="see its disk and who may read it; hot contexts and the log are served meanwhile",
            ) from error

    async def _ask_stream(self, taken: Picture, stream: str) -> None:
        taken.streams[stream] = await stream_info(self.connection, stream)

    async def _ask_archiver(self, taken: Picture) -> None:
        taken.archiver = await archiver_status(self.connection)

    async def _ask_workers(self, taken: Picture) -> None:
        taken.reports = await ask_reports(self.connection, WORKERS)

    async def _ask_consumers(self, taken: Picture) -> None:
        taken.consumers = [state async for state in consumer_states(self.connection, EVENTS_STREAM)]

    async def _ask_dead(self, taken: Picture) -> None:
        info = await stream_info(self.connection, DEAD_STREAM)
        since = await first_seq_since(self.connection, DEAD_STREAM, taken.at_ms - int(DEAD_WITHIN_S * 1000))
        taken.recent_dead = 0 if since is None else max(0, info.last_seq - since + 1)

    async def _ask_clock(self, taken: Picture) -> None:
        before_ms = self._clock_ms()
        answer = await self.connection.api(f"STREAM.INFO.{EVENTS_STREAM}")
        after_ms = self._clock_ms()
        server_ms = parse_time_ms(answer["ts"])
        # Within the time that the question took, any difference is none.
        taken.clock_apart_ms = max(server_ms - after_ms, 0) + min(server_ms - before_ms, 0)

    async def _probe(self, taken: Picture) -> None:
        taken.writes = await probe_writes(self.connection)

    async def _ask_oldest(self, taken: Picture, table: Table) -> None:
        stream = STREAM_OF_TABLE[table]
        assert taken.lake is not None
        after = archived_seq(taken.streams[stream], taken.lake.marks[table])
        request = {"seq": after + 1, "next_by_subj": ">"}
        answer = await self.connection.api(f"STREAM.MSG.GET.{stream}", request, timeout_s=_OLDEST_S)
        taken.oldest_ms[table] = parse_time_ms(answer["message"]["time"])


def archived_seq(info: StreamInfo, mark: Position | None) -> int:
    """Returns the last sequence of a stream that is archived, by the watermark of its table."""
    return mark.seq if mark is not None and mark.epoch == info.epoch else max(0, info.first_seq - 1)


def lag_of(info: StreamInfo, mark: Position | None) -> int:
    """Returns how many messages of a stream stand above the watermark of its table."""
    return max(0, info.last_seq - archived_seq(info, mark))
