"""The archiving of one stream into one table: a cycle, and what must hold before and after it.

A cycle, with what a crash after each step leaves behind:

1. read a contiguous run from the watermark + 1 — nothing has changed;
2. decode, leave out repetitions — nothing has changed;
3. store inline contexts, bury what cannot be processed — both are create-once, a redo changes nothing;
4. write Parquet, fsync, rename, fsync — a file that no commit names is no part of the table;
5. commit to the Delta log, fsync — the run is archived; from here on a redo begins after it;
6. tell who waits for it — a waiter of a dead process asks again.

The Delta commit refuses a run that does not begin where the last one ended, so of several archivers, or of one that was
paused and wakes late, one commits and the others throw their work away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from holdfast.lake.lookup import Lookup
from holdfast.schemas.errors import GapError, IntegrityError
from holdfast.schemas.rows import ContextRow, EventRow, KeyVersionRow, Position, Row, Table
from holdfast.streams.dead import bury
from holdfast.streams.pull import StreamReader
from holdfast.streams.topology import StreamInfo, stream_info
from holdfast.streams.wire import STREAM_OF_TABLE
from holdfast.workers.archive_plan import (
    Rejected,
    anchors_of,
    contradiction,
    decode_run,
    deduplicate_by_key,
    deduplicate_contexts,
    key_of,
    same_content,
)
from holdfast.workers.control import Problem
from holdfast.workers.purge import check_anchors, fence_lost_tail

if TYPE_CHECKING:
    from holdfast.lake.index import LakeIndex
    from holdfast.lake.lake import Lake
    from holdfast.streams.connection import Connection
    from holdfast.streams.hot import HotTier
    from holdfast.streams.messages import StoredMessage

logger = logging.getLogger(__name__)

T = TypeVar("T")


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

    ``problem`` is set while archiving or purging of this stream is stopped, and says what to do.  ``archived_seq`` is
    the watermark as of the last cycle.
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
        self._connection = connection
        self._hot = hot
        self._lake = lake
        self._index = index
        self._executor = executor
        self._reader: StreamReader | None = None
        self._checked_reconnects = -1
        self.archived_seq = 0

    async def watermark(self) -> Position | None:
        """Returns the newest archived position."""
        return await self._in_thread(lambda: self._lake.watermark(self.table))

    async def cycle(self, *, limit: int, up_to: int | None = None) -> int:
        """Archives one run and returns how many messages it spanned; 0 when there was nothing to archive.

        Raises GapError or another IntegrityError when the stream is not what the lake remembers: nothing is archived
        or purged until that is mended.  A FenceError means that another archiver was faster, and is no fault.
        """
        info = await self._checked()
        if self._reader is None:
            watermark = await self.watermark()
            self._reader = StreamReader(
                self._connection, self.stream, _start(watermark, info), allow_gaps=self.table == "key_versions"
            )
        reader = self._reader
        first_seq = reader.next_seq
        try:
            messages, info = await reader.read(limit=limit, up_to=up_to)
            self.archived_seq = first_seq - 1
            if reader.next_seq == first_seq:
                return 0
            rows, rejected = await self._prepare(messages)
            for letter in rejected:
                await bury(self._connection, self.stream, letter.message, letter.error)
            last_seq = reader.next_seq - 1
            await self._in_thread(
                lambda: self._lake.append(
                    self.table,
                    rows,
                    epoch=info.epoch,
                    first_seq=first_seq,
                    last_seq=last_seq,
                    anchors=anchors_of(rows),
                )
            )
        except BaseException:
            # Whatever went wrong, the next cycle begins where the lake says.
            self._reader = None
            await reader.close()
            raise
        self.archived_seq = last_seq
        self.counters.cycles += 1
        self.counters.rows += len(rows)
        self.counters.dead += len(rejected)
        logger.debug(
            "run archived",
            extra={"action": "archived", "table": self.table, "rows": len(rows), "last_seq": last_seq},
        )
        return last_seq - first_seq + 1

    async def accept_gap(self) -> tuple[int, int] | None:
        """Records the messages that are missing at the archiver's position as lost, and moves past them.

        Returns the range of sequences that was given up, or None when nothing is missing.
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
        if found <= first_seq:
            return None
        await self._in_thread(
            lambda: self._lake.append(self.table, [], epoch=info.epoch, first_seq=first_seq, last_seq=found - 1)
        )
        logger.warning(
            "gap accepted",
            extra={"action": "gap_accepted", "table": self.table, "from": first_seq, "to": found - 1},
        )
        self.problem = None
        self._reader = None
        return first_seq, found - 1

    async def close(self) -> None:
        """Drops the consumer."""
        if self._reader is not None:
            await self._reader.close()

    async def _checked(self) -> StreamInfo:
        """Checks once for each connection that the stream still is what the lake remembers of it."""
        info = await stream_info(self._connection, self.stream)
        if self._checked_reconnects == self._connection.reconnects:
            return info
        watermark = await self.watermark()
        if watermark is not None and watermark.epoch == info.epoch:
            anchors = await self._in_thread(lambda: self._lake.anchors(self.table, info.first_seq))
            await check_anchors(self._connection, self.table, info, anchors)
            if info.last_seq < watermark.seq:
                await fence_lost_tail(self._connection, self.stream, info, watermark)
                info = await stream_info(self._connection, self.stream)
        elif watermark is not None:
            logger.warning(
                "stream was created anew: archiving starts at its beginning",
                extra={"action": "new_epoch", "table": self.table, "old": watermark.epoch, "new": info.epoch},
            )
        if self._reader is not None:
            await self._reader.close()
            self._reader = None
        self._checked_reconnects = self._connection.reconnects
        return info

    async def _prepare(self, messages: list[StoredMessage]) -> tuple[list[Row], list[Rejected]]:
        """Returns the rows to commit and the messages to bury, once what came inline is stored."""
        run = await self._in_thread(lambda: decode_run(self.table, messages))
        if run.inline:
            puts = await self._hot.put_many(run.inline)
            self.counters.interned += sum(not put.existed for put in puts)
        await self._in_thread(lambda: self._index.refresh(self._lake))
        if self.table == "contexts":
            digests = [row.digest for row in run.rows if isinstance(row, ContextRow)]
            archived = await self._in_thread(lambda: self._index.find_contexts(digests))
            return deduplicate_contexts(run.rows, archived), run.rejected
        result = deduplicate_by_key(run.rows, await self._in_thread(lambda: self._known(run.rows)))
        self.counters.repeated += result.repeated
        if not result.contested:
            return result.rows, run.rejected
        by_seq = {message.seq: message for message in messages}
        stored = await self._in_thread(lambda: self._stored(result.contested))
        rejected = list(run.rejected)
        accepted = {key_of(row): row for row in result.rows}
        for row in result.contested:
            earlier = accepted.get(key_of(row)) or stored.get(key_of(row))
            if earlier is not None and same_content(earlier, row):
                self.counters.repeated += 1
            else:
                rejected.append(contradiction(row, by_seq[row.seq]))
        return result.rows, rejected

    def _known(self, rows: list[Row]) -> Any:
        """Keys of these rows that the lake holds already."""
        if self.table == "events":
            return self._index.find_events([(row.namespace, row.id) for row in rows if isinstance(row, EventRow)])
        return self._index.find_key_versions(
            [(row.namespace, row.key, row.version) for row in rows if isinstance(row, KeyVersionRow)]
        )

    def _stored(self, rows: list[Row]) -> dict[Any, Row]:
        """The lake's own rows under the keys of these."""
        lookup = Lookup(self._lake, self._index)
        if self.table == "events":
            return dict(lookup.get_events([(row.namespace, row.id) for row in rows if isinstance(row, EventRow)]))
        return dict(
            lookup.get_key_versions(
                [(row.namespace, row.key, row.version) for row in rows if isinstance(row, KeyVersionRow)]
            )
        )

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)


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
    return max(1, info.first_seq)
