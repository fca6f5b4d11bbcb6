"""The archiver: streams → Parquet → lake, then purges, and trims, what is archived and old.

Of several archivers on one lake directory one is active (:mod:`holdfast.workers.archiver_lock`).  The lock only saves
work; what makes two writers safe is the lake's commit protocol.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from holdfast.lake.duck import ViewsFile, write_views_file
from holdfast.schemas.errors import (
    FenceError,
    HoldfastError,
    IntegrityError,
    InvalidFieldError,
    RetryError,
    UnavailableError,
)
from holdfast.schemas.failpoints import failpoint
from holdfast.schemas.problems import Problem
from holdfast.schemas.rows import TABLES, Table
from holdfast.streams.retry import call_with_retry
from holdfast.streams.service import Call, Handler, decode_request, serve
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import STREAM_OF_TABLE
from holdfast.streams.write_probe import require_writing
from holdfast.workers.archive_plan import lake_unavailable
from holdfast.workers.archive_table import TableArchiver, problem_of
from holdfast.workers.archiver_lock import set_torn_commits_aside, take_lock
from holdfast.workers.control import (
    ACCEPT_GAP_SUBJECT,
    EVICT_SUBJECT,
    FLUSH_SUBJECT,
    STATUS_SUBJECT,
    TRIM_SUBJECT,
    AcceptGapRequest,
    ArchiverStatus,
    EvictReport,
    EvictRequest,
    FlushReport,
    TableStatus,
    TrimReport,
    TrimRequest,
)
from holdfast.workers.lake_copy import keep_copy
from holdfast.workers.purge import ANCHORS_READ, DivergedError, purge_archived
from holdfast.workers.settings import START_S
from holdfast.workers.trim import Trimmed, Trimmer
from holdfast.workers.waiting import wait_for_event

if TYPE_CHECKING:
    from holdfast.lake.index import LakeIndex
    from holdfast.lake.lake import Lake
    from holdfast.streams.connection import Connection
    from holdfast.streams.hot import HotTier
    from holdfast.workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_S: Final = 0.5
"""How often the backlog is looked at, to start a commit before its time when it is a full one."""

_TRIM_PAUSE_S: Final = 5.0
"""Between rounds of trimming while there is more to trim than one round does."""

_BACKOFF_S: Final = 2.0

_MOST_FENCED: Final = 10
"""How often an archiver may lose to another one without that one having got any further."""

_MAX_AGE_S: Final = 315_360_000.0

# Events first: archiving one may store its inline context, which then is archived in the same round.
_ORDER: Final[tuple[Table, ...]] = ("events", "contexts", "key_versions")


class Archiver:
    """The active archiver.  Made by :func:`run_archiver`; one round, purge or flush at a time."""

    def __init__(
        self, connection: Connection, hot: HotTier, lake: Lake, index: LakeIndex, settings: WorkerSettings
    ) -> None:
        self._connection = connection
        self._lake = lake
        self._index = index
        self._settings = settings
        # One thread: the lake's steps of one archiver are a sequence.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="holdfast-archiver")
        self._tables = {
            table: TableArchiver(table, connection=connection, hot=hot, lake=lake, index=index, executor=self._executor)
            for table in TABLES
        }
        self._turn = asyncio.Lock()
        self._wake = asyncio.Event()
        self._trimmer = Trimmer(connection, hot, lake, index, self._executor, hot_window_s=settings.hot_window_s)
        self._views = ViewsFile(lake)
        self._next_purge = 0.0
        self._next_trim = 0.0
        self._stopping = False
        self._copy_problem: Problem | None = None

    def counters(self) -> dict[str, int]:
        """What was done since the start, as ``<table>_<count>``."""
        return {
            f"{table}_{name}": value
            for table, archiver in self._tables.items()
            for name, value in msgspec.structs.asdict(archiver.counters).items()
        }

    def problems(self) -> list[Problem]:
        """What keeps a stream from being archived or purged now, and what was lost."""
        return [
            problem
            for archiver in self._tables.values()
            for problem in (archiver.problem, archiver.purge_problem, *archiver.alarms)
            if problem is not None
        ] + ([] if self._copy_problem is None else [self._copy_problem])

    async def run(self) -> None:
        """Archives a round whenever messages have waited for ``archive_interval_s``, or a full commit waits.

        Returns after :meth:`stop`, when the round under way has ended.  An error of one stream is told, and tried
        again; it stops neither the others nor this loop.
        """
        last_round = 0.0
        while not self._stopping:
            due = time.monotonic() - last_round >= self._settings.archive_interval_s
            if due or await self._backlog_is_full():
                async with self._turn:
                    await self._round()
                    await self._purge_if_due()
                    await self._trim_if_due()
                last_round = time.monotonic()
            if any(archiver.problem for archiver in self._tables.values()):
                await wait_for_event(self._wake, _BACKOFF_S)
            else:
                await wait_for_event(self._wake, min(_POLL_S, self._settings.archive_interval_s))

    def stop(self) -> None:
        """Asks :meth:`run` to return once the round under way has ended."""
        self._stopping = True
        self._wake.set()

    async def flush(self) -> FlushReport:
        """Archives everything that was acknowledged before the call; returns when it is fsynced in the lake."""
        started = time.perf_counter()
        rows = dict.fromkeys(TABLES, 0)
        async with self._turn:
            for table in _ORDER:
                rows[table] = await self._archive_all(table)
            for archiver in self._tables.values():
                # Told once the others are archived: one stream's problem does not hold them up.
                _raise_problem(archiver)
            # Whoever flushes may open the views file next: it is renewed even if it was a moment ago.
            await self._in_thread(lambda: write_views_file(self._lake))
            failpoint("archiver.before_ack")
        marks: dict[Table, int] = {}
        for archiver in self._tables.values():
            mark = await archiver.watermark()
            marks[archiver.table] = 0 if mark is None else mark.seq
        report = FlushReport(
            rows=rows,
            watermarks=marks,
            seconds=round(time.perf_counter() - started, 3),
        )
        failpoint("archiver.after_ack")
        return report

    async def evict(self, older_than_s: float) -> EvictReport:
        """Purges from the hot tier what is archived and older than ``older_than_s``; the event log stays."""
        if not 0 <= older_than_s <= _MAX_AGE_S:
            raise InvalidFieldError(
                f"older_than_s is {older_than_s}, not 0 to {_MAX_AGE_S:.0f} seconds",
                field="older_than_s",
                limit=int(_MAX_AGE_S),
            )
        async with self._turn:
            purged = await self._purge("contexts", older_than_s, None)
        info = await stream_info(self._connection, STREAM_OF_TABLE["contexts"])
        return EvictReport(purged=purged, left=info.messages)

    async def trim(self, most_versions: int | None) -> TrimReport:
        """Archives the versions of named contexts, then trims each to its newest ``most_versions`` in the hot tier.

        Without a number, by its policy and the hot window.  What is younger than 10 minutes stays.
        """
        table: Table = "key_versions"
        async with self._turn:
            await self._archive_all(table)
            _raise_problem(self._tables[table])
            done = await self._trim(most_versions, in_background=False)
        info = await stream_info(self._connection, STREAM_OF_TABLE[table])
        return TrimReport(keys=done.keys, revisions=done.revisions, left=info.messages)

    async def status(self) -> ArchiverStatus:
        """Where archiving of each stream stands, and what stops it."""
        tables: dict[Table, TableStatus] = {}
        for archiver in self._tables.values():
            info = await stream_info(self._connection, archiver.stream)
            # As of the last cycle: the thread of the lake may be busy with a commit for seconds.
            mark = archiver.mark
            seq = mark.seq if mark is not None and mark.epoch == info.epoch else max(0, info.first_seq - 1)
            tables[archiver.table] = TableStatus(
                epoch=info.epoch, watermark=seq, last_seq=info.last_seq, lag=max(0, info.last_seq - seq)
            )
        return ArchiverStatus(
            tables=tables,
            problems=self.problems(),
            counters=self.counters(),
            archive_interval_s=self._settings.archive_interval_s,
        )

    async def accept_gap(self, table: Table) -> dict[str, object]:
        """Gives up the messages missing at the archiver's position in a stream, for good, and says which."""
        async with self._turn:
            accepted = await self._tables[table].accept_gap()
        self._wake.set()
        first_seq, last_seq = accepted.span or (None, None)
        return {"table": table, "from": first_seq, "to": last_seq, "alarms": accepted.alarms}

    async def close(self) -> None:
        """Waits for the round under way, then drops consumers and the thread."""
        async with self._turn:
            for archiver in self._tables.values():
                await archiver.close()
            await self._trimmer.close()
            await asyncio.to_thread(self._executor.shutdown)

    async def _round(self) -> None:
        for table in _ORDER:
            archiver = self._tables[table]
            try:
                info = await stream_info(self._connection, archiver.stream)
            except HoldfastError as error:
                self._note(archiver, error)
                continue
            await self._archive_up_to(archiver, info.last_seq)
        self._copy_problem = await self._in_thread(lambda: keep_copy(self._lake))
        try:
            await self._in_thread(self._views.update)
        except (HoldfastError, OSError):
            logger.exception("the views file was not renewed", extra={"action": "views_failed"})

    async def _archive_all(self, table: Table) -> int:
        """Archives what was acknowledged before the call; returns how many rows."""
        archiver = self._tables[table]
        before = archiver.counters.rows
        await self._archive_up_to(archiver, (await stream_info(self._connection, archiver.stream)).last_seq)
        return archiver.counters.rows - before

    async def _archive_up_to(self, archiver: TableArchiver, target: int) -> None:
        """Archives until the target is reached; notes an error as the stream's problem and returns."""
        fenced, fenced_at = 0, archiver.mark
        while True:
            try:
                done = await archiver.cycle(limit=self._settings.archive_rows, up_to=target)
            except FenceError:
                # Another archiver was faster.  That is its good right, as often as it gets further by it; again and
                # again at one place would be a fault of ours.
                archiver.counters.fenced += 1
                try:
                    stands_at = await archiver.watermark()
                except OSError as error:
                    self._note(archiver, lake_unavailable(error))
                    return
                fenced = fenced + 1 if stands_at == fenced_at else 1
                fenced_at = stands_at
                if fenced > _MOST_FENCED:
                    raise
                continue
            except HoldfastError as error:
                self._note(archiver, error)
                return
            except OSError as error:
                self._note(archiver, lake_unavailable(error))
                return
            archiver.problem = None
            fenced = 0
            if done == 0:
                return

    def _note(self, archiver: TableArchiver, error: HoldfastError) -> None:
        archiver.counters.failed += 1
        problem = _problem_of(archiver, error)
        level = logging.WARNING if isinstance(error, RetryError) else logging.ERROR
        if archiver.problem is None or archiver.problem.what != problem.what:
            logger.log(
                level,
                "stream cannot be archived now",
                extra={"action": "archive_stopped", "stream": archiver.stream, "error": str(error)},
            )
        archiver.problem = problem

    async def _purge_if_due(self) -> None:
        if time.monotonic() < self._next_purge:
            return
        self._next_purge = time.monotonic() + self._settings.purge_interval_s
        settings = self._settings
        # Younger than the duplicate window, a purged event's id could be stored again after a restart of the server.
        event_window_s = max(settings.hot_window_s, settings.duplicate_window_s)
        for archiver, window_s, most in (
            (self._tables["contexts"], settings.hot_window_s, settings.hot_messages),
            (self._tables["events"], event_window_s, None),
        ):
            if archiver.problem is None:
                try:
                    await self._purge(archiver.table, window_s, most)
                except (HoldfastError, OSError):
                    logger.exception("nothing was purged", extra={"action": "purge_failed", "stream": archiver.stream})

    async def _purge(self, table: Table, older_than_s: float, most_messages: int | None) -> int:
        archiver = self._tables[table]
        purged = await self._guarded(archiver, lambda: self._purge_checked(archiver, older_than_s, most_messages))
        archiver.counters.purged += purged
        return purged

    async def _trim_if_due(self) -> None:
        archiver = self._tables["key_versions"]
        if archiver.problem is not None or time.monotonic() < self._next_trim:
            return
        pause_s = self._settings.purge_interval_s
        try:
            if not (await self._trim(None, in_background=True)).is_done:
                pause_s = min(pause_s, _TRIM_PAUSE_S)
        except (HoldfastError, OSError):
            logger.exception("nothing was trimmed", extra={"action": "trim_failed", "stream": archiver.stream})
        self._next_trim = time.monotonic() + pause_s

    async def _trim(self, most_versions: int | None, *, in_background: bool) -> Trimmed:
        archiver = self._tables["key_versions"]

        async def trim() -> Trimmed:
            _raise_lost(archiver)
            if most_versions is not None:
                return await self._trimmer.trim_to(most_versions)
            return await self._trimmer.round() if in_background else await self._trimmer.round(budget_s=None)

        done = await self._guarded(archiver, trim)
        archiver.counters.purged += done.revisions
        return done

    async def _guarded(self, archiver: TableArchiver, take_away: Callable[[], Awaitable[T]]) -> T:
        """Notes what keeps a stream from being purged as its problem, and raises it."""
        try:
            await require_writing(self._connection)
            outcome = await take_away()
        except HoldfastError as error:
            if archiver.problem is None:
                archiver.purge_problem = _problem_of(archiver, error)
            if isinstance(error, DivergedError):
                archiver.distrust()
            raise
        archiver.purge_problem = None
        return outcome

    async def _purge_checked(self, archiver: TableArchiver, older_than_s: float, most_messages: int | None) -> int:
        table = archiver.table
        _raise_lost(archiver)
        # Whoever purges first makes durable what it relies on: the commit may be another process's.
        watermark = await self._in_thread(lambda: self._lake.durable_watermark(table))
        if watermark is None:
            return 0
        info = await stream_info(self._connection, archiver.stream)
        anchors = await self._in_thread(lambda: self._lake.anchors(table, info.first_seq, most=ANCHORS_READ))
        purged, _ = await purge_archived(
            self._connection,
            table,
            watermark=watermark,
            anchors=anchors,
            older_than_s=older_than_s,
            most_messages=most_messages,
            handler_bytes=self._settings.handler_bytes,
        )
        return purged

    async def _backlog_is_full(self) -> bool:
        for archiver in self._tables.values():
            try:
                info = await stream_info(self._connection, archiver.stream)
                await archiver.note_end(info)
            except (HoldfastError, OSError):
                return True  # the round tells the problem
            if info.last_seq - archiver.archived_seq >= self._settings.archive_rows:
                return True
        return False

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)


@asynccontextmanager
async def run_archiver(
    connection: Connection,
    hot: HotTier,
    lake: Lake,
    index: LakeIndex,
    settings: WorkerSettings,
    *,
    on_standby: Callable[[], None] | None = None,
) -> AsyncGenerator[Archiver]:
    """Waits for the lock of the lake, then yields the active archiver, answering its control calls.

    ``on_standby`` is called when another archiver is active and this one begins to wait.

    At the end the round under way is finished and the lock given up.
    """
    async with AsyncExitStack() as stack:
        lock = await take_lock(settings.lake, on_standby)
        stack.callback(os.close, lock)
        await call_with_retry(lambda: set_torn_commits_aside(connection, lake), deadline_s=START_S)
        archiver = Archiver(connection, hot, lake, index, settings)
        stack.push_async_callback(archiver.close)
        await stack.enter_async_context(
            serve(
                connection,
                name="holdfast-archiver",
                version="1.0.0",
                description="Archives Holdfast's streams into the lake",
                endpoints=_endpoints(archiver),
                namespace_at=None,
                drain_timeout_s=settings.drain_timeout_s,
            )
        )
        yield archiver


def _endpoints(archiver: Archiver) -> dict[str, tuple[str, Handler]]:
    evict_decoder = msgspec.json.Decoder(EvictRequest)
    gap_decoder = msgspec.json.Decoder(AcceptGapRequest)
    trim_decoder = msgspec.json.Decoder(TrimRequest)

    async def flush(call: Call) -> None:
        await call.reply(msgspec.json.encode(await archiver.flush()))

    async def evict(call: Call) -> None:
        request = decode_request(call.data, evict_decoder)
        await call.reply(msgspec.json.encode(await archiver.evict(request.older_than_s)))

    async def trim(call: Call) -> None:
        request = decode_request(call.data, trim_decoder)
        await call.reply(msgspec.json.encode(await archiver.trim(request.most_versions)))

    async def status(call: Call) -> None:
        await call.reply(msgspec.json.encode(await archiver.status()))

    async def accept_gap(call: Call) -> None:
        request = decode_request(call.data, gap_decoder)
        await call.reply(msgspec.json.encode(await archiver.accept_gap(request.table)))

    return {
        "flush": (FLUSH_SUBJECT, flush),
        "evict": (EVICT_SUBJECT, evict),
        "trim": (TRIM_SUBJECT, trim),
        "status": (STATUS_SUBJECT, status),
        "accept_gap": (ACCEPT_GAP_SUBJECT, accept_gap),
    }


def _problem_of(archiver: TableArchiver, error: HoldfastError) -> Problem:
    if isinstance(error, IntegrityError):
        return problem_of(archiver.table, error)
    return Problem(
        invariant="I8",
        object=archiver.stream,
        what=error.message,
        next_step=error.hint or "nothing: it is tried again",
    )


def _raise_problem(archiver: TableArchiver) -> None:
    if archiver.problem is not None:
        raise UnavailableError(
            f"{archiver.stream} cannot be archived: {archiver.problem.what}", hint=archiver.problem.next_step
        )


def _raise_lost(archiver: TableArchiver) -> None:
    if archiver.problem is not None and archiver.problem.invariant in ("I1", "I3"):
        raise UnavailableError(
            f"nothing is purged from {archiver.stream}: {archiver.problem.what}", hint=archiver.problem.next_step
        )
