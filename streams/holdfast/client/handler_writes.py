"""Receipts of events that end at the same time are stored together.

The committer groups whatever is emitted, and settles each message by itself.  Receipts come by the hundred, and of a
group only one outcome matters: stored, all of it, or not known, and then each is handed to the committer.  So a group
is one atomic batch.  One is under way at a time; meanwhile the next one gathers.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

from holdfast.schemas import limits
from holdfast.schemas.errors import HoldfastError
from holdfast.streams.committer import SINGLY_UP_TO
from holdfast.streams.events import NewEvent, encode_event
from holdfast.streams.publish import Refused, publish_batch

if TYPE_CHECKING:
    from holdfast.client.store import Holdfast

logger = logging.getLogger(__name__)


class _Write:
    __slots__ = ("events", "future", "messages")

    def __init__(self, events: list[NewEvent], future: asyncio.Future[bool]) -> None:
        self.events = events
        self.messages = [encode_event(event) for event in events]
        self.future = future


class GroupedWrites:
    """Stores events of many callers in groups.

    What waits here is bounded by its callers, each of which waits for its own.  A cancelled caller's events may be
    stored or not.
    """

    def __init__(self, hf: Holdfast) -> None:
        self._hf = hf
        self._waiting: deque[_Write] = deque()
        self._writing: asyncio.Task[None] | None = None

    async def store(self, events: list[NewEvent]) -> None:
        """Stores events durably, in order; one whose id is known already counts as stored.

        Errors as of :meth:`Holdfast.publish_many`, each caller's its own.
        """
        loop = asyncio.get_running_loop()
        write = _Write(events, loop.create_future())
        self._waiting.append(write)
        if self._writing is None:
            # A bare task: it ends by itself with the last write, and close() waits for it.
            self._writing = loop.create_task(self._write_groups(), name="holdfast-grouped-writes")
        if not await write.future:
            # Not as a group, or nobody knows: what is stored already is known by its id.
            await self._hf.publish_many(events)

    async def close(self) -> None:
        """Waits until everything that was handed in has been tried."""
        if self._writing is not None:
            await self._writing

    async def _write_groups(self) -> None:
        try:
            while self._waiting:
                group, is_stored = self._take(), False
                try:
                    is_stored = await self._store_group(group)
                finally:
                    for write in group:
                        if not write.future.done():  # its caller may have been cancelled
                            write.future.set_result(is_stored)
        finally:
            self._writing = None

    def _take(self) -> list[_Write]:
        group: list[_Write] = []
        count = size = 0
        while self._waiting and count < limits.BATCH_MESSAGES and size < limits.BATCH_BYTES:
            write = self._waiting[0]
            count += len(write.messages)
            if group and count > limits.BATCH_MESSAGES:
                break
            group.append(self._waiting.popleft())
            size += sum(message.size for message in write.messages)
        return group

    async def _store_group(self, group: list[_Write]) -> bool:
        """Whether everything of the group is stored now; if not, nobody knows of any part of it."""
        messages = [message for write in group for message in write.messages]
        try:
            if len(messages) > SINGLY_UP_TO:
                await publish_batch(self._hf.connection, messages)
            elif len(group) > 1:
                await self._hf.publish_many([event for write in group for event in write.events])
            else:
                return False  # alone: its caller stores it, and has its errors
        except (HoldfastError, Refused) as error:
            logger.debug("a group was not stored as one", extra={"action": "group_refused", "error": repr(error)})
            return False
        except Exception:
            # What waits behind it must not wait for ever; each caller meets the error by itself.
            logger.exception("a group could not be sent", extra={"action": "group_failed"})
            return False
        return True
