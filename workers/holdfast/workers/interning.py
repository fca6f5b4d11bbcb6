"""Storing inline contexts ahead of the ingester, so that every reference in an answer resolves."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from holdfast.schemas.errors import HoldfastError, RetryError
from holdfast.streams.consumer import ack_floor
from holdfast.streams.decode import decode_event
from holdfast.streams.pull import read_one
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import EVENTS_STREAM
from holdfast.workers.ingester import CONSUMER as INGESTER

if TYPE_CHECKING:
    from holdfast.schemas.rows import EventRow
    from holdfast.streams.connection import Connection
    from holdfast.streams.hot import HotTier

logger = logging.getLogger(__name__)


class InlineContexts:
    """The inline contexts of events in the stream, seen from a service that is about to tell their references."""

    def __init__(self, connection: Connection, hot: HotTier) -> None:
        self._connection = connection
        self._hot = hot

    async def intern_ahead(self, events: Iterable[EventRow]) -> None:
        """Stores the inline contexts of events that the ingester has not come to yet.

        Only an event that is still in the stream can be one; what is archived was interned before.  To be called with
        the events of an answer before it is sent; raises RetryError when a context could not be stored now.
        """
        referring = [row for row in events if row.context_ref is not None]
        newest = max((row.seq for row in referring), default=0)
        if newest == 0:
            return
        ingested = await self._ingested()
        if newest <= ingested:
            return
        info = await stream_info(self._connection, EVENTS_STREAM)
        for row in referring:
            # A round trip for each of the rest: these are those of the last moments alone.
            if row.epoch != info.epoch or row.seq < info.first_seq or row.seq <= ingested:
                continue
            message = await read_one(self._connection, info, row.seq)
            inline = None if message is None else decode_event(message).inline
            if inline is not None:
                try:
                    await self._hot.put_many([inline])
                except RetryError:
                    raise
                except HoldfastError as error:
                    # The archiver makes a dead letter of it; the other events are good.
                    logger.warning(
                        "not interned", extra={"action": "intern_refused", "seq": row.seq, "error": str(error)}
                    )

    async def _ingested(self) -> int:
        try:
            return await ack_floor(self._connection, EVENTS_STREAM, INGESTER)
        except HoldfastError:
            return 0  # no ingester has ever run: look at every event
