"""Purging a stream below its watermark, and the checks without which nothing is purged."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from holdfast.schemas.errors import HoldfastError, IntegrityError
from holdfast.schemas.failpoints import failpoint
from holdfast.schemas.ids import now_ms
from holdfast.streams.decode import decode_row
from holdfast.streams.pull import read_one
from holdfast.streams.topology import StreamInfo, first_seq_since, purge_below, stream_info
from holdfast.streams.wire import STREAM_OF_TABLE
from holdfast.workers.archive_plan import identity_of, plan_purge
from holdfast.workers.handler_floors import hold_back

if TYPE_CHECKING:
    from holdfast.schemas.rows import Anchor, Position, Table
    from holdfast.streams.connection import Connection

logger = logging.getLogger(__name__)

ANCHORS_READ: Final = 200
"""Newest anchors taken from the log for a check: reading all of a day's commits each minute would cost seconds."""

SETTLED_S: Final = 600.0
"""Of a replicated stream, the newest message older than this stays, and all that are younger.  A node syncs the log of
its group for each acknowledgement, but the stream's own files only when it takes a snapshot of the group, every three
minutes.  When everything up to the last snapshot has been purged since, and the power of all nodes fails, each of them
finds less in its files than the snapshot says, waits for a leader to send it the rest, and there never is one (seen
with nats-server 2.15.1).  This is more than three times as long as two snapshots are apart."""

_ANCHORS_CHECKED: Final = 8
"""Anchors looked at in one check: the newest, where a lost tail shows first, and some spread over the rest."""


class DivergedError(IntegrityError):
    """A stream holds something else at a sequence than what was archived from it."""

    code = "diverged"


async def check_anchors(connection: Connection, table: Table, info: StreamInfo, anchors: Sequence[Anchor]) -> None:
    """Raises DivergedError when the stream holds something else at an anchor's sequence, or nothing.

    Anchors that have been purged (below the first sequence) or lie beyond the stream's end are passed over: the first
    is our own doing, the second shows by itself.
    """
    held = [anchor for anchor in anchors if info.first_seq <= anchor.seq <= info.last_seq]
    step = max(1, len(held) // _ANCHORS_CHECKED)
    for anchor in dict.fromkeys([*held[-1:], *held[::-step]]):
        message = await read_one(connection, info, anchor.seq)
        found = "nothing"
        if message is not None:
            try:
                found = identity_of(decode_row(table, message))
            except HoldfastError as error:
                found = f"an undecodable message ({error.code})"
            if found == anchor.identity and message.stored_at_ms == anchor.stored_at_ms:
                continue
        if message is None and (table == "key_versions" or await _purged_since(connection, info, anchor.seq)):
            continue  # a superseded version may have been trimmed, and another archiver may purge at the same time
        raise DivergedError(
            f"stream {info.name} holds {found} at sequence {anchor.seq}, where {anchor.identity} was archived",
            hint="the stream lost its tail and went on; nothing is purged until it was compared with the lake anew",
        )


async def _purged_since(connection: Connection, info: StreamInfo, seq: int) -> bool:
    now = await stream_info(connection, info.name)
    return now.epoch == info.epoch and seq < now.first_seq


async def purge_archived(
    connection: Connection,
    table: Table,
    *,
    watermark: Position,
    anchors: Sequence[Anchor],
    older_than_s: float,
    most_messages: int | None = None,
    handler_bytes: int = 0,
) -> tuple[int, StreamInfo]:
    """Purges what is archived and old, or over the count; returns how many messages went and the stream's state after.

    Of a replicated stream the newest settled message stays, see ``SETTLED_S``.
    Of the event log, up to ``handler_bytes`` are kept longer for consumers that have not come to them yet.
    ``watermark`` must be durable, and not older than ``anchors``.  Raises DivergedError, purging nothing, when the
    stream is not what was archived.
    """
    stream = STREAM_OF_TABLE[table]
    info = await stream_info(connection, stream)
    if info.epoch != watermark.epoch or not info.messages:
        return 0, info
    first_young = await first_seq_since(connection, stream, now_ms() - int(older_than_s * 1000))
    below = plan_purge(
        watermark=watermark.seq,
        first_seq=info.first_seq,
        last_seq=info.last_seq,
        first_young_seq=first_young,
        messages=info.messages,
        most_messages=most_messages,
    )
    if below is None:
        return 0, info
    if info.replicas > 1:
        first_unsettled = await first_seq_since(connection, stream, now_ms() - int(SETTLED_S * 1000))
        below = min(below, (info.last_seq + 1 if first_unsettled is None else first_unsettled) - 1)
        if below <= info.first_seq:
            return 0, info
    await check_anchors(connection, table, info, anchors)
    if table == "events":
        below = await hold_back(connection, info, below, most_bytes=handler_bytes)
        if below <= info.first_seq:
            return 0, info
    failpoint("archiver.before_purge")
    await purge_below(connection, stream, below)
    failpoint("archiver.after_purge")
    after = await stream_info(connection, stream)
    purged = max(0, after.first_seq - info.first_seq)
    logger.info(
        "stream purged below its watermark",
        extra={"action": "purged", "stream": stream, "below": below, "messages": purged, "watermark": watermark.seq},
    )
    return purged, after
