"""Reading a stream for the archiver, and decoding it, one piece ahead of whoever writes the pieces.

While a piece is written, or a commit made durable, the next one is read and decoded: Parquet is compressed and synced
without Python's lock, so that the two share the cores.  What is in memory is bounded in bytes: one piece with whoever
writes it, one ahead, and the messages of which the one ahead is a part.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.schemas import limits
from holdfast.streams.messages import StoredMessage
from holdfast.streams.topology import StreamInfo
from holdfast.workers.archive_plan import DecodedRun, decode_run

if TYPE_CHECKING:
    from holdfast.schemas.rows import Table
    from holdfast.streams.pull import StreamReader

PIECE_MESSAGES: Final = 4_000
"""Most messages of a piece: two row groups of small ones."""

PIECE_BYTES: Final = 4 * limits.MIB
"""A piece is read until its messages have this many bytes; the last pull may bring twice as many more."""


class Piece(msgspec.Struct, frozen=True):
    """Messages of a stream in order, decoded.

    ``last_seq`` is the sequence up to which it tells of the stream: beyond the last message when what follows is an
    allowed gap.  ``info`` is the stream's state as of the reading.
    """

    messages: list[StoredMessage]
    run: DecodedRun
    last_seq: int
    info: StreamInfo


class Intake:
    """What is read of one stream, from ``next_seq`` on.  One :meth:`take` at a time.

    ``next_seq`` is the sequence after the last piece that was taken.
    """

    def __init__(self, table: Table, reader: StreamReader) -> None:
        self.next_seq = reader.next_seq
        self._table: Table = table
        self._reader = reader
        # Read and not decoded yet, with the sequence up to which they tell of the stream; empty, or of one reading.
        self._read: deque[StoredMessage] = deque()
        self._read_up_to = 0
        self._info: StreamInfo | None = None
        self._ahead: asyncio.Task[Piece | None] | None = None

    async def take(self, *, left: int, limit: int, up_to: int | None) -> Piece | None:
        """Returns the next piece of a run, or None at the stream's end; begins to read the one after it.

        ``left``: how many messages the run still takes; what was read ahead before it began may be more.  ``limit``:
        how many a run takes, of which the next may begin with what is read ahead.  The stream's end is that of the
        moment when it was last looked for, or ``up_to`` when that is earlier.  Raises what :meth:`StreamReader.read`
        raises; after that, and after a cancel, nothing is to be taken any more.
        """
        piece = None
        if self._ahead is not None:
            piece = await self._ahead
            self._ahead = None
        if piece is None:
            piece = await self._next(left, up_to)
        if piece is not None:
            self.next_seq = piece.last_seq + 1
            end = piece.info.last_seq if up_to is None else min(up_to, piece.info.last_seq)
            if self._read or self.next_seq <= end:
                more = left - len(piece.messages)
                # A bare task, since it outlives this call: the next call waits for it, or close() ends it.
                self._ahead = asyncio.get_running_loop().create_task(self._next(more if more > 0 else limit, up_to))
        return piece

    async def close(self) -> None:
        """Ends what is being read ahead, and drops the consumer."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)
        await self._reader.close()

    async def _next(self, limit: int, up_to: int | None) -> Piece | None:
        if not self._read:
            began = self._reader.next_seq
            messages, info = await self._reader.read(
                limit=min(limit, PIECE_MESSAGES), up_to=up_to, max_bytes=PIECE_BYTES
            )
            if self._reader.next_seq == began:
                return None
            self._read.extend(messages)
            self._read_up_to = self._reader.next_seq - 1
            self._info = info
        assert self._info is not None
        messages = list(self._read)
        run = await asyncio.to_thread(decode_run, self._table, messages)
        # Fewer than were given when they inflate beyond the bound: the others are the next piece.
        for _ in range(run.taken):
            self._read.popleft()
        last_seq = messages[run.taken - 1].seq if self._read else self._read_up_to
        return Piece(messages[: run.taken], run, last_seq, self._info)
