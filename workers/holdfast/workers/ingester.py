"""The ingester: stores the contexts that raw publishers send inline, soon after they are published.

Any NATS client may publish an event with its context in the message.  The message itself stays as it is; its row, and
the reference of its context, are a pure function of it.  What the ingester adds is that the reference resolves.  The
archiver does the same before it archives an event, so nothing depends on the ingester but how soon.

A crash at any point leaves deliveries unsettled; storing again is create-once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.schemas import limits
from holdfast.schemas.errors import ConfigurationError, HoldfastError, RetryError
from holdfast.streams.consumer import Delivery, DurableConsumer
from holdfast.streams.dead import bury
from holdfast.streams.decode import decode_event
from holdfast.streams.hot import NewContext
from holdfast.streams.wire import EVENTS_STREAM
from holdfast.workers.waiting import wait_for_event

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection
    from holdfast.streams.hot import HotTier

logger = logging.getLogger(__name__)

CONSUMER: Final = "hf-ingester"
_RETRY_DELAY_S: Final = 1.0


_IN_THREAD_BYTES: Final = 64 * limits.KIB
"""Deliveries over this are decoded in a thread: on the event loop they would take over 0.5 ms."""

_Outcome = NewContext | HoldfastError | None


class IngestCounters(msgspec.Struct):
    """Events seen, contexts stored (and those that were there already), dead letters, deliveries handed back."""

    events: int = 0
    stored: int = 0
    existed: int = 0
    dead: int = 0
    handed_back: int = 0


class Ingester:
    """Stores inline contexts.  Several may run: they share one durable consumer."""

    def __init__(self, connection: Connection, hot: HotTier) -> None:
        self._connection = connection
        self._hot = hot
        self._consumer = DurableConsumer(connection, EVENTS_STREAM, CONSUMER)
        self._wake = asyncio.Event()
        self.counters = IngestCounters()

    async def open(self) -> None:
        """Creates or compares the consumer."""
        await self._consumer.open()

    async def run(self) -> None:
        """Settles deliveries as they come.  Never returns; no message ends it."""
        while True:
            try:
                deliveries = await self._consumer.fetch()
                if deliveries:
                    await self._settle(deliveries)
            except ConfigurationError:
                raise
            except HoldfastError as error:
                # Also what the server refuses, such as while it stops or recovers.
                logger.warning("ingester cannot go on yet", extra={"action": "ingest_retry", "error": str(error)})
                await self._reopen()

    async def _reopen(self) -> None:
        """Looks after a pause whether the consumer is still there, and makes it anew if it is not."""
        await wait_for_event(self._wake, _RETRY_DELAY_S)
        await self._consumer.close()
        try:
            await self._consumer.open()
        except ConfigurationError:
            raise
        except HoldfastError as error:
            logger.debug("the consumer is not there yet", extra={"action": "ingest_retry", "error": str(error)})

    async def close(self) -> None:
        """Ends the subscription; unsettled deliveries go to another ingester, or come again."""
        await self._consumer.close()

    async def _settle(self, deliveries: list[Delivery]) -> None:
        inline: list[tuple[Delivery, NewContext]] = []
        for delivery, outcome in await _decoded(deliveries):
            self.counters.events += 1
            if isinstance(outcome, HoldfastError):
                await bury(self._connection, EVENTS_STREAM, delivery.message, outcome)
                self.counters.dead += 1
                await self._consumer.ack(delivery)
            elif outcome is None:
                await self._consumer.ack(delivery)
            else:
                inline.append((delivery, outcome))
        if not inline:
            return
        try:
            puts = await self._hot.put_many([context for _, context in inline])
        except HoldfastError as error:
            # One of them could not be stored.  Singly, so that it does not hold back the others.
            logger.warning("inline contexts are stored singly", extra={"action": "ingest_split", "error": str(error)})
            for delivery, context in inline:
                await self._settle_one(delivery, context)
            return
        for (delivery, _), put in zip(inline, puts, strict=True):
            self._count(existed=put.existed)
            await self._consumer.ack(delivery)

    async def _settle_one(self, delivery: Delivery, context: NewContext) -> None:
        try:
            put = (await self._hot.put_many([context]))[0]
        except RetryError:
            self.counters.handed_back += 1
            await self._consumer.nak(delivery, _RETRY_DELAY_S * min(60, 2**delivery.attempt))
        except HoldfastError as error:
            await bury(self._connection, EVENTS_STREAM, delivery.message, error)
            self.counters.dead += 1
            await self._consumer.ack(delivery)
        else:
            self._count(existed=put.existed)
            await self._consumer.ack(delivery)

    def _count(self, *, existed: bool) -> None:
        if existed:
            self.counters.existed += 1
        else:
            self.counters.stored += 1


async def _decoded(deliveries: Sequence[Delivery]) -> list[tuple[Delivery, _Outcome]]:
    """Returns with each delivery the context it carries inline, None for none, or why it is no event."""
    if sum(len(delivery.message.payload) for delivery in deliveries) <= _IN_THREAD_BYTES:
        return [(delivery, _decode(delivery)) for delivery in deliveries]
    return await asyncio.to_thread(lambda: [(delivery, _decode(delivery)) for delivery in deliveries])


def _decode(delivery: Delivery) -> _Outcome:
    try:
        return decode_event(delivery.message).inline
    except HoldfastError as error:
        return error
