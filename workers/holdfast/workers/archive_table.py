"""The archiving of one stream into one table: a cycle, and what must hold before and after it.

A cycle, with what a crash after each step leaves behind:

1. read a contiguous run from the watermark + 1, a piece at a time — nothing has changed;
2. decode, leave out repetitions — nothing has changed;
3. store inline contexts, bury what cannot be processed — both are create-once, a redo changes nothing;
4. write Parquet, and once all pieces are written fsync, rename, fsync — a file that no commit names is no part of the
   table;
5. commit to the Delta log, fsync — the run is archived; from here on a redo begins after it;
6. tell who waits for it — a waiter of a dead process asks again.

Steps 1 and 2 of the next piece, also of the next run, are done while the others are at work; what was read ahead is
thrown away with the connection that it came by, and after any error.  So is a run that was read by two connections: a
server that lost its tail in between gives the lost sequences to other messages, which would be passed over.

The Delta commit refuses a run that does not begin where the last one ended, so of several archivers, or of one that was
paused and wakes late, one commits and the others throw their work away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from holdfast.lake.columns import to_batch
from holdfast.schemas import limits
from holdfast.schemas.errors import FenceError, GapError, HoldfastError, IntegrityError, InvalidFieldError, RetryError
from holdfast.schemas.problems import Problem
from holdfast.streams.dead import bury
from holdfast.streams.pull import StreamReader
from holdfast.streams.topology import StreamInfo, begin_epoch, mark_heads_archived, stream_info
from holdfast.streams.wire import STREAM_OF_TABLE
from holdfast.workers.alarms import AcceptedGap, end_alarms, raise_alarm, read_alarms
from holdfast.workers.archive_intake import Intake, Piece
from holdfast.workers.archive_plan import (
    Decided,
    Rejected,
    contradiction,
    decode_run,
    deduplicate_by_key,
    deduplicate_contexts,
    identity_key,
    join_contexts,
    key_of,
    same_content,
)
from holdfast.workers.archive_run import Run
from holdfast.workers.archived_rows import ArchivedRows
from holdfast.workers.lost_heads import restore_heads
from holdfast.workers.manifest_check import ManifestChecker
from holdfast.workers.purge import ANCHORS_READ, DivergedError, check_anchors
from holdfast.workers.stream_marks import Mark, StreamMarks, lost_since, newest_mark

if TYPE_CHECKING:
    from holdfast.lake.index import LakeIndex
    from holdfast.lake.lake import Lake
    from holdfast.schemas.rows import Position, Row, Table
    from holdfast.streams.connection import Connection
    from holdfast.streams.hot import HotTier, NewContext
    from holdfast.streams.messages import StoredMessage

logger = logging.getLogger(__name__)

T = TypeVar("T")

_COMPARED: Final = 5_000
_COMPARED_BYTES: Final = 16 * limits.MIB


class ArchiveCounters(msgspec.Struct):
    """What one table's archiver has done since it started."""

    cycles: int = 0
    rows: int = 0
    repeated: int = 0
    interned: int = 0
    dead: int = 0
    fenced: int = 0
    failed: int = 0
    purged: int = 0


class TableArchiver:
    """Archives one stream.  One cycle at a time; the caller sees to that.

    ``problem`` is set while archiving of this stream is stopped, ``purge_problem`` while its purging is; both say what
    to do.  ``alarms`` tell what was lost, until the loss is accepted: they outlive this process.  ``archived_seq`` and
    ``mark`` are the watermark as of the last cycle.
    """

    def __init__(
        self,
        table: Table,
        *,
        connection: Connection,
        hot: HotTier,
        lake: Lake,
        index: LakeIndex,
        executor: ThreadPoolExecutor,
    ) -> None:
        self.table: Table = table
        self.stream = STREAM_OF_TABLE[table]
        self.counters = ArchiveCounters()
        self.problem: Problem | None = None
        self.purge_problem: Problem | None = None
        self.alarms: list[Problem] = []
        self._alarms_read = False
        self.mark: Position | None = None
        self._connection = connection
        self._hot = hot
        self._lake = lake
        self._index = index
        self._executor = executor
        self._archived = ArchivedRows(table, lake, index)
        self._manifests = ManifestChecker(hot, lake, index, self._in_thread)
        self._intake: Intake | None = None
        self._checked_reconnects = -1
        self._checked_epoch = ""
        self.archived_seq = 0
        self._marks = StreamMarks(lake.path)
        self._last_mark: Mark | None = None

    async def watermark(self) -> Position | None:
        """Returns the newest archived position."""
        return await self._in_thread(lambda: self._lake.watermark(self.table))

    async def cycle(self, *, limit: int, up_to: int | None = None) -> int:
        """Archives one run and returns how many messages it spanned; 0 when there was nothing to archive.

        Raises GapError or another IntegrityError when the stream is not what the lake remembers: nothing is archived
        or purged until that is mended.  A FenceError means that another archiver was faster, and is no fault.
        """
        while (spanned := await self._cycle(limit=limit, up_to=up_to)) is None:
            logger.info("connected anew, and read anew", extra={"action": "run_discarded", "table": self.table})
        return spanned

    async def _cycle(self, *, limit: int, up_to: int | None) -> int | None:
        """As :meth:`cycle`; None, with nothing archived, when the connection was lost meanwhile."""
        info = await self._checked()
        reconnects = self._checked_reconnects
        if self._intake is None:
            self.mark = watermark = await self.watermark()
            reader = StreamReader(
                self._connection, self.stream, _start(watermark, info), allow_gaps=self.table == "key_versions"
            )
            self._intake = Intake(self.table, reader)
        intake = self._intake
        run = Run(self._lake, self.table, intake.next_seq)
        try:
            dead = await self._fill(run, intake, reconnects, limit=limit, up_to=up_to)
            if self._connection.reconnects != reconnects:
                await self._in_thread(run.discard)
                await self._restart()
                return None
            if not run.spanned:
                await self._in_thread(self._archived.settle)
                return 0
            self.mark = await self._in_thread(run.commit)
        except BaseException as error:
            # Whatever went wrong, the next cycle begins where the lake says.  In the lake's thread, which may still be
            # at work for a cycle that was cancelled: a commit that has begun is not undone.
            self._executor.submit(run.discard)
            self._intake = None
            await intake.close()
            if isinstance(error, GapError):
                await self._raise_overtaken(info, run.first_seq)
            raise
        self.archived_seq = run.last_seq
        self.counters.cycles += 1
        self.counters.rows += run.rows
        self.counters.dead += dead
        logger.debug(
            "run archived",
            extra={"action": "archived", "table": self.table, "rows": run.rows, "last_seq": run.last_seq},
        )
        return run.spanned

    async def _fill(self, run: Run, intake: Intake, reconnects: int, *, limit: int, up_to: int | None) -> int:
        """Writes a run, up to its commit; returns how many of its messages were buried."""
        dead = 0
        while run.spanned < limit and not run.is_full:
            piece = await self._next_piece(intake, run, limit=limit, up_to=up_to)
            self.archived_seq = run.first_seq - 1
            if piece is None or self._connection.reconnects != reconnects:
                # Nothing of a piece that may be of another life is stored or buried: it will be read under its own.
                break
            if not run.spanned:
                await self._in_thread(self._archived.refresh)
            rows, rejected = await self._prepare(piece, run.decided)
            for letter in rejected:
                await bury(self._connection, self.stream, letter.message, letter.error)
            await self._in_thread(partial(run.write, piece, rows))
            dead += len(rejected)
        return dead

    async def _next_piece(self, intake: Intake, run: Run, *, limit: int, up_to: int | None) -> Piece | None:
        """Returns the next piece of a run; None when what is there is in it already."""
        try:
            return await intake.take(left=limit - run.spanned, limit=limit, up_to=up_to)
        except GapError:
            if not run.spanned:
                raise
            # What stands before the gap is archived; the next cycle meets the gap itself.
            await self._restart()
            return None

    async def accept_gap(self) -> AcceptedGap:
        """Records the messages that are missing at the archiver's position as lost, and moves past them.

        Ends the stream's alarms, whether or not anything is missing there.
        """
        info = await stream_info(self._connection, self.stream)
        watermark = await self.watermark()
        first_seq = _start(watermark, info)
        reader = StreamReader(self._connection, self.stream, first_seq, allow_gaps=True)
        try:
            messages, info = await reader.read(limit=1)
        finally:
            await reader.close()
        found = messages[0].seq if messages else info.last_seq + 1
        ended = await self._in_thread(lambda: end_alarms(self._lake.path, self.stream))
        self.alarms.clear()
        if found <= first_seq:
            return AcceptedGap(None, ended)
        await self._in_thread(
            lambda: self._lake.append(self.table, [], epoch=info.epoch, first_seq=first_seq, last_seq=found - 1)
        )
        logger.warning(
            "gap accepted",
            extra={"action": "gap_accepted", "table": self.table, "from": first_seq, "to": found - 1},
        )
        self.problem = None
        await self._restart()
        return AcceptedGap((first_seq, found - 1), ended)

    def distrust(self) -> None:
        """Has the next cycle compare stream and lake again."""
        self._checked_reconnects = -1

    async def close(self) -> None:
        """Drops the consumer and closes the files of the lake."""
        await self._restart()
        await self._in_thread(self._manifests.close)

    async def _raise_overtaken(self, info: StreamInfo, first_seq: int) -> None:
        """Raises FenceError when another archiver has archived what is missing here, and purged it: no gap then."""
        watermark = await self.watermark()
        if watermark is not None and watermark.epoch == info.epoch and watermark.seq >= first_seq:
            raise FenceError(
                f"{self.stream} was archived up to {watermark.seq} by another archiver, and purged",
                hint="the cycle begins anew at the watermark",
            )

    async def _checked(self) -> StreamInfo:
        """Checks that the stream still is what the lake remembers of it, once for each connection and each epoch.

        It may be made anew at any time, by whoever may do so: that shows in its epoch alone.
        """
        if not self._alarms_read:
            known = await self._in_thread(lambda: read_alarms(self._lake.path))
            self.alarms = [alarm for alarm in known if alarm.object == self.stream]
            self._alarms_read = True
        info = await stream_info(self._connection, self.stream)
        if self._is_checked(info):
            return info
        reconnects = self._connection.reconnects
        watermark = await self.watermark()
        # Once more, after the watermark: another archiver may have archived what came after the first look, and a
        # stream that ends before its watermark has lost something.
        info = await stream_info(self._connection, self.stream)
        epoch, is_cut = info.epoch, await self._compare_mark(info, watermark)
        if watermark is not None and watermark.epoch == info.epoch:
            info = await self._continued(info, watermark)
        elif info.first_seq > info.epoch_start and info.last_seq:
            await self._alarm(
                f"{info.name} begins at sequence {info.first_seq}, and the lake holds nothing of what stood before",
                "is the lake's directory the right one? Then what was purged is lost: 'holdfast accept-gap' says so",
            )
        elif watermark is not None:
            logger.warning(
                "stream was created anew: archiving starts at its beginning",
                extra={"action": "new_epoch", "table": self.table, "old": watermark.epoch, "new": info.epoch},
            )
            await self._tell_of_lost_heads()
        if is_cut and info.epoch == epoch:
            # Readers that stood behind the watermark cannot tell by themselves.
            info = await self._begin_epoch(_start(watermark, info))
        await self._restart()
        self._checked_reconnects, self._checked_epoch = reconnects, info.epoch
        return info

    def _is_checked(self, info: StreamInfo) -> bool:
        return self._checked_reconnects == self._connection.reconnects and self._checked_epoch == info.epoch

    async def note_end(self, info: StreamInfo) -> None:
        """Remembers how far the stream reaches, durably, once it was found to be what the lake remembers."""
        if self._is_checked(info):
            if self._last_mark is None:
                self._last_mark = await self._in_thread(lambda: self._marks.get(self.stream))
            mark = await newest_mark(self._connection, info, self._last_mark)
            if mark is not None:
                await self._in_thread(lambda: self._marks.put(self.stream, mark))
                self._last_mark = mark

    async def _compare_mark(self, info: StreamInfo, watermark: Position | None) -> bool:
        """Raises an alarm when something was lost before it was archived; returns whether that was the stream's end."""
        may_be_trimmed = self.table == "key_versions"
        mark = await self._in_thread(lambda: self._marks.get(self.stream))
        lost = await lost_since(self._connection, info, mark, watermark, may_be_trimmed=may_be_trimmed)
        if lost is None:
            return False
        await self._alarm(
            f"{info.name} lost messages: {lost.what}",
            "what is in the lake is safe, and archiving goes on; check the server's disk and its durability mode. "
            "Producers may still hold what they sent; 'holdfast accept-gap' ends the alarm",
        )
        return lost.is_cut

    async def _continued(self, info: StreamInfo, watermark: Position) -> StreamInfo:
        """Returns the stream's state when it still is what the lake remembers, or that of the epoch begun anew.

        A server that lost its tail gives the sequences of lost messages to new ones, as soon as anybody publishes:
        by the time it shows, some may stand there.  So nothing is purged to lift the next sequence.  The new epoch
        begins at the first message that the lake does not hold; what is read again from there is deduplicated.
        """
        try:
            anchors = await self._in_thread(lambda: self._lake.anchors(self.table, info.first_seq, most=ANCHORS_READ))
            await check_anchors(self._connection, self.table, info, anchors)
            if info.last_seq >= watermark.seq:
                return info
            what = f"it ends at sequence {info.last_seq}, {watermark.seq} was archived"
        except DivergedError as error:
            what = error.message
        await self._alarm(
            f"{info.name} lost messages: {what}",
            "what is in the lake is safe; acknowledged messages that were not archived yet may be lost. Check the "
            "server's disk and its durability mode; 'holdfast accept-gap' ends the alarm",
        )
        await self._tell_of_lost_heads()
        info = await stream_info(self._connection, self.stream)
        return await self._begin_epoch(await self._first_unarchived(info))

    async def _begin_epoch(self, start: int) -> StreamInfo:
        info = await begin_epoch(self._connection, self.stream, start)
        if start > 1:
            await self._in_thread(
                lambda: self._lake.append(self.table, [], epoch=info.epoch, first_seq=1, last_seq=start - 1)
            )
        return info

    async def _tell_of_lost_heads(self) -> None:
        """Tells clients that keys may have versions in the lake which the stream has not, and puts the newest back.

        Before the lake goes on, and before anything else: until then, whoever writes, or has heard it otherwise a
        moment ago, gives a number again that is taken.
        """
        if self.table == "key_versions":
            await mark_heads_archived(self._connection)
            await restore_heads(self._connection, self._lake, self._index, self._executor)

    async def _first_unarchived(self, info: StreamInfo) -> int:
        """Returns the first sequence whose message the lake does not hold, wherever it stood when it was archived."""
        reader = StreamReader(self._connection, self.stream, max(1, info.first_seq), allow_gaps=True)
        try:
            while reader.next_seq <= info.last_seq:
                messages, _ = await reader.read(limit=_COMPARED, up_to=info.last_seq, max_bytes=_COMPARED_BYTES)
                if not messages:
                    break
                found = await self._in_thread(partial(self._unarchived_in, messages))
                if found is not None:
                    return found
        finally:
            await reader.close()
        return info.last_seq + 1

    def _unarchived_in(self, messages: list[StoredMessage]) -> int | None:
        self._archived.refresh()
        for message in messages:
            rows = decode_run(self.table, [message]).rows
            held = self._archived.positions(rows) if rows else {}
            # Not by the positions of its parts: those may be held while it is not.
            if not any(identity_key(row) in held for row in rows):
                return message.seq
        return None

    async def _alarm(self, what: str, next_step: str) -> None:
        """Raises an alarm, durably: what follows makes the stream look well again, and this process may end."""
        alarm = Problem(invariant="I1", object=self.stream, what=what, next_step=next_step)
        if alarm not in self.alarms:
            logger.error("messages were lost", extra={"action": "lost", "stream": self.stream, "what": what})
            await self._in_thread(lambda: raise_alarm(self._lake.path, alarm))
            self.alarms.append(alarm)

    async def _restart(self) -> None:
        """The next cycle begins where the lake says."""
        intake, self._intake = self._intake, None
        if intake is not None:
            await intake.close()

    async def _prepare(self, piece: Piece, decided: Decided) -> tuple[list[Row], list[Rejected]]:
        """Returns the rows to commit and the messages to bury, once what came inline is stored."""
        run, messages = piece.run, piece.messages
        refused = await self._intern(run.inline) if run.inline else {}
        if self.table == "contexts":
            refused = await self._manifests.forged(run.rows)
        elif self.table == "key_versions":
            refused = await self._in_thread(lambda: _unfit(self.table, run.rows))
        rows = [row for row in run.rows if row.seq not in refused] if refused else run.rows
        rejected = list(run.rejected)
        if refused:
            rejected += [Rejected(message, refused[message.seq]) for message in messages if message.seq in refused]
        if self.table == "contexts":
            archived = await self._in_thread(lambda: self._archived.positions(rows))
            return await self._in_thread(
                lambda: join_contexts(deduplicate_contexts(rows, archived, decided), archived, decided)
            ), rejected
        # Read before anything is decided: a row that turns out not to be readable is archived once more.
        stored = await self._in_thread(lambda: self._archived.stored(rows))
        result = deduplicate_by_key(rows, stored, decided)
        self.counters.repeated += result.repeated
        if not result.contested:
            return result.rows, rejected
        by_seq = {message.seq: message for message in messages}
        for row in result.contested:
            earlier = decided.by_key.get(key_of(row)) or stored.get(key_of(row))
            if earlier is not None and same_content(earlier, row):
                self.counters.repeated += 1
            else:
                rejected.append(contradiction(row, by_seq[row.seq]))
        return result.rows, rejected

    async def _intern(self, inline: list[tuple[int, NewContext]]) -> dict[int, HoldfastError]:
        """Stores what came inline; returns, by the event's sequence, why a context cannot be stored ever.

        Such an event, whose reference would name nothing, is a dead letter, and holds up no other.
        """
        try:
            puts = await self._hot.put_many([context for _, context in inline])
        except RetryError:
            raise
        except HoldfastError as error:
            if len(inline) == 1:
                return {inline[0][0]: error}
        else:
            self.counters.interned += sum(not put.existed for put in puts)
            return {}
        refused: dict[int, HoldfastError] = {}
        for item in inline:
            refused |= await self._intern([item])
        return refused

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)


def _unfit(table: Table, rows: list[Row]) -> dict[int, HoldfastError]:
    """Returns, by sequence, why rows do not fit their table's columns: such a row must not hold up the others."""
    try:
        to_batch(table, rows)
    except InvalidFieldError as error:
        if len(rows) == 1:
            return {rows[0].seq: error}
    else:
        return {}
    middle = len(rows) // 2
    return _unfit(table, rows[:middle]) | _unfit(table, rows[middle:])


def problem_of(table: Table, error: IntegrityError) -> Problem:
    """Returns what to tell an operator of a stream that cannot be archived."""
    invariant = "I1" if isinstance(error, GapError) else "I3"
    return Problem(
        invariant=invariant,
        object=STREAM_OF_TABLE[table],
        what=error.message,
        next_step=error.hint or "see the archiver's log",
    )


def _start(watermark: Position | None, info: StreamInfo) -> int:
    if watermark is not None and watermark.epoch == info.epoch:
        return watermark.seq + 1
    # No cursor for this life of the stream: from its first message (a stream that never held one says 0).
    return max(1, info.first_seq, info.epoch_start)
