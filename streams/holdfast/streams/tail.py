"""The live tail for readers that have no event loop: what the streams hold beyond a position, kept and kept up.

A reader in a notebook asks with plain calls; a thread of its own runs the connection.  Rows that were read once stay
in memory until the lake's watermark has passed them, so that asking again costs only what is new.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final, TypeVar

from holdfast.schemas.errors import HoldfastError, UnavailableError
from holdfast.schemas.rows import ContextRow, Position, Row, Table, TailSnapshot
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.decode import decode_row
from holdfast.streams.pull import StreamReader
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import STREAM_OF_TABLE

if TYPE_CHECKING:
    from holdfast.streams.connection_target import ConnectionTarget

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_ROWS: Final = 1_000_000
"""Most rows of one stream kept in memory.  Beyond it the reader is told that the archiver is behind."""

MAX_BYTES: Final = 512 * 1024 * 1024
"""Most bytes of messages of one stream kept in memory."""

_READ: Final = 5_000
_CALL_S: Final = 120.0


class ResidentTail:
    """The rows of one stream beyond a position that moves forward.  Runs on an event loop; one reader at a time."""

    def __init__(self, connection: Connection, table: Table) -> None:
        self._connection = connection
        self._table: Table = table
        self._stream = STREAM_OF_TABLE[table]
        self._rows: list[Row] = []
        self._bytes = 0
        self._after = -1
        self._epoch = ""
        self._reader: StreamReader | None = None
        self._lock = asyncio.Lock()

    async def read(self, after: Position | None) -> TailSnapshot:
        """Returns the rows after ``after`` up to the stream's end as of now.

        A message that is no row (it will be a dead letter) is left out, as the archiver leaves it out.
        """
        async with self._lock:
            info = await stream_info(self._connection, self._stream)
            # A position in another life of the stream says nothing about this one: all of it is beyond.
            after_seq = after.seq if after is not None and after.epoch == info.epoch else 0
            if info.messages and info.first_seq > after_seq + 1 and after_seq:
                return TailSnapshot(rows=[], epoch=info.epoch, first_seq=info.first_seq, last_seq=info.last_seq)
            is_behind = self._reader is None or self._reader.next_seq <= after_seq
            if info.epoch != self._epoch or after_seq < self._after or is_behind:
                await self._restart(info.epoch, max(after_seq, info.first_seq - 1))
            # First: what is archived does not count against the bounds of what is not.
            self._forget_up_to(after_seq)
            first_seq = info.first_seq
            if await self._catch_up(info.last_seq):
                # Purged between the look at the stream and the reading of it.  Where the stream begins now tells the
                # caller that rows are missing here, and that the lake has them.
                first_seq = (await stream_info(self._connection, self._stream)).first_seq
            rows = [row for row in self._rows if row.seq <= info.last_seq]
            return TailSnapshot(rows=rows, epoch=info.epoch, first_seq=first_seq, last_seq=info.last_seq)

    async def close(self) -> None:
        """Drops the rows and the consumer."""
        if self._reader is not None:
            await self._reader.close()
        self._rows = []

    async def _restart(self, epoch: str, after_seq: int) -> None:
        if self._reader is not None:
            await self._reader.close()
        # Gaps are judged by the archiver; a reader shows what is there.
        self._reader = StreamReader(self._connection, self._stream, after_seq + 1, allow_gaps=True)
        self._rows, self._bytes = [], 0
        self._after, self._epoch = after_seq, epoch

    async def _catch_up(self, last_seq: int) -> bool:
        """Reads up to a sequence; returns whether sequences were passed over that hold no message."""
        reader = self._reader
        if reader is None:
            return False
        passed_over = reader.passed_over
        while reader.next_seq <= last_seq:
            messages, info = await reader.read(limit=_READ, up_to=last_seq)
            for message in messages:
                try:
                    row = decode_row(self._table, message)
                    self._rows.append(row)
                    # A body is kept inflated, however small its message was.
                    self._bytes += len(row.body) if isinstance(row, ContextRow) else len(message.payload)
                except HoldfastError as error:
                    logger.debug("not a row", extra={"action": "tail_skip", "seq": message.seq, "error": str(error)})
            if len(self._rows) > MAX_ROWS or self._bytes > MAX_BYTES:
                await self._restart(self._epoch, self._after)
                raise UnavailableError(
                    f"more than {MAX_ROWS} rows or {MAX_BYTES} bytes of {self._table} are not archived yet",
                    hint="is an archiver running? see 'holdfast health'",
                )
            if not messages and reader.next_seq <= min(last_seq, info.last_seq) and not info.messages:
                break
        return reader.passed_over != passed_over

    def _forget_up_to(self, seq: int) -> None:
        if seq <= self._after:
            return
        kept = [row for row in self._rows if row.seq > seq]
        if len(kept) < len(self._rows):
            self._bytes = self._bytes * len(kept) // max(1, len(self._rows))
            self._rows = kept
        self._after = seq


class StreamTail:
    """A live tail with plain (blocking) calls; owns a thread with an event loop and a connection.

    Made by :func:`open_tail`.  Safe to call from several threads.
    """

    def __init__(self, target: ConnectionTarget | str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="holdfast-tail", daemon=True)
        self._thread.start()
        self._stack = AsyncExitStack()
        self._tails: dict[Table, ResidentTail] = {}
        self._closed = False
        try:
            self._call(self._open(target))
        except BaseException:
            self._stop()
            raise

    def read(self, table: Table, after: Position | None) -> TailSnapshot:
        """Returns the rows of a table's stream after a position; see :class:`ResidentTail`."""
        if self._closed:
            raise UnavailableError("the live tail is closed", hint="open another one")
        return self._call(self._tails[table].read(after))

    def close(self) -> None:
        """Closes the connection and ends the thread; harmless when called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self._call(self._close())
        finally:
            self._stop()

    async def _open(self, target: ConnectionTarget | str) -> None:
        connection = await self._stack.enter_async_context(open_connection(target, name="holdfast-tail"))
        for table in STREAM_OF_TABLE:
            self._tails[table] = ResidentTail(connection, table)

    async def _close(self) -> None:
        for tail in self._tails.values():
            await tail.close()
        await self._stack.aclose()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(_CALL_S)
        except TimeoutError as error:
            future.cancel()
            raise UnavailableError("the live tail did not answer in time", hint="check the NATS server") from error

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if not self._thread.is_alive():
            self._loop.close()


def open_tail(target: ConnectionTarget | str) -> StreamTail:
    """Opens a live tail on the server that ``target`` names; raises UnavailableError when none answers."""
    return StreamTail(target)
