"""A run of a stream on its way into the lake, piece by piece: what was decided of it and written so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from holdfast.schemas import limits
from holdfast.workers.archive_plan import Decided, continue_anchors

if TYPE_CHECKING:
    from holdfast.lake.lake import Lake
    from holdfast.lake.table import Append
    from holdfast.schemas.rows import Anchor, Position, Row, Table
    from holdfast.workers.archive_intake import Piece

RUN_BYTES: Final = 128 * limits.MIB
"""Most bytes of one run, bodies inflated: bounds what its deduplication remembers, and the size of a file."""


class Run:
    """One run, which begins at ``first_seq``.  :meth:`write` and :meth:`commit` block; one call at a time.

    ``last_seq`` is the sequence up to which it tells of the stream, ``rows`` how many it brings.
    """

    def __init__(self, lake: Lake, table: Table, first_seq: int) -> None:
        self.first_seq = first_seq
        self.last_seq = first_seq - 1
        self.rows = 0
        self.decided = Decided()
        self._lake = lake
        self._table: Table = table
        self._append: Append | None = None
        self._anchors: list[Anchor] = []
        self._epoch = ""
        self._bytes = 0

    @property
    def spanned(self) -> int:
        """How many sequences of the stream it spans."""
        return self.last_seq - self.first_seq + 1

    @property
    def is_full(self) -> bool:
        """Whether it has as many bytes as one may have."""
        return self._bytes >= RUN_BYTES

    def write(self, piece: Piece, rows: Sequence[Row]) -> None:
        """Writes the rows that a piece brings, to files that nobody sees yet; the error is that of the lake."""
        if self._append is None:
            self._epoch = piece.info.epoch
            self._append = self._lake.begin_append(self._table, epoch=self._epoch, first_seq=self.first_seq)
        self._append.write(rows, up_to=piece.last_seq)
        self._anchors = continue_anchors(self._anchors, rows)
        self._bytes += piece.run.size
        self.rows += len(rows)
        self.last_seq = piece.last_seq

    def commit(self) -> Position:
        """Makes the run part of the lake, and returns the new watermark: when it returns, all of it is durable."""
        assert self._append is not None, "nothing was written"
        return self._append.commit(self.last_seq, self._anchors).position

    def discard(self) -> None:
        """Removes what was written and not committed."""
        if self._append is not None:
            self._append.discard()
