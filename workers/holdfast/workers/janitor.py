"""The janitor: writes the ``expire`` version of named contexts whose time has come.

Readers treat an expired key as absent at once, by its ``expires_at``; the version that the janitor writes makes it
visible in the history and to watchers.  It is written by compare-and-set on the version that expired, so a newer
version wins, and a second janitor, or a redo after a crash, changes nothing.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.schemas.errors import GapError, HoldfastError, RetryError
from holdfast.schemas.ids import derived_event_id, now_ms
from holdfast.streams.decode import KeyVersionBody, decode_key_version
from holdfast.streams.publish import Outgoing, Refused, publish
from holdfast.streams.pull import StreamReader
from holdfast.streams.retry import WRITE_DEADLINE_S, call_with_retry
from holdfast.streams.wire import H_EXPECT_SUBJECT_SEQ, H_MSG_ID, KEYS_STREAM, message_id
from holdfast.workers.waiting import wait_for_event

if TYPE_CHECKING:
    from holdfast.schemas.rows import KeyVersionRow
    from holdfast.streams.connection import Connection

logger = logging.getLogger(__name__)

INTERVAL_S: Final = 1.0
"""How late an expire version may be: readers do not wait for it."""

_READ: Final = 5_000


class JanitorCounters(msgspec.Struct):
    """Versions read, keys expired, expiries that a newer version had overtaken."""

    read: int = 0
    expired: int = 0
    overtaken: int = 0


class Janitor:
    """Follows ``ctx-keys`` and expires what is due.  Remembers only keys that have an expiry."""

    def __init__(self, connection: Connection, *, clock_ms: Callable[[], int] = now_ms) -> None:
        self._connection = connection
        self._clock_ms = clock_ms
        self._reader = StreamReader(connection, KEYS_STREAM, 1, allow_gaps=True)
        self._due: list[tuple[int, int, str]] = []
        self._versions: dict[str, KeyVersionRow] = {}
        self._wake = asyncio.Event()
        self.counters = JanitorCounters()

    async def run(self) -> None:
        """Expires what is due, every second.  Never returns; an unreachable server is waited for."""
        while True:
            try:
                await self.round()
            except GapError as error:
                # The stream began anew, or is gone: what is remembered of it says nothing any more.
                logger.warning("janitor starts anew", extra={"action": "janitor_restarted", "error": str(error)})
                await self._forget()
            except RetryError as error:
                logger.warning("janitor cannot go on yet", extra={"action": "janitor_retry", "error": str(error)})
            await wait_for_event(self._wake, INTERVAL_S)

    async def round(self) -> int:
        """Reads what is new and writes the expire versions that are due; returns how many were written."""
        await self._follow()
        written = 0
        while self._due and self._due[0][0] <= self._clock_ms():
            _, seq, subject = heapq.heappop(self._due)
            version = self._versions.get(subject)
            if version is None or version.seq != seq:
                continue  # overtaken by a newer version that we have read
            del self._versions[subject]
            written += await self._expire(subject, version)
        return written

    async def close(self) -> None:
        """Drops the consumer."""
        await self._reader.close()

    async def _forget(self) -> None:
        await self._reader.close()
        self._reader = StreamReader(self._connection, KEYS_STREAM, 1, allow_gaps=True)
        self._due.clear()
        self._versions.clear()

    async def _follow(self) -> None:
        while True:
            messages, _ = await self._reader.read(limit=_READ)
            if not messages:
                return
            for message in messages:
                self.counters.read += 1
                try:
                    version = decode_key_version(message)
                except HoldfastError:
                    continue  # the archiver makes it a dead letter
                if version.expires_at_ms is None or version.op in ("delete", "expire"):
                    self._versions.pop(message.subject, None)
                    continue
                self._versions[message.subject] = version
                heapq.heappush(self._due, (version.expires_at_ms, version.seq, message.subject))

    async def _expire(self, subject: str, version: KeyVersionRow) -> int:
        event_id = derived_event_id(version.namespace, "expire", version.epoch, str(version.seq))
        body = KeyVersionBody(
            version=version.version + 1,
            op="expire",
            event_id=event_id,
            changed_by="janitor",
            change_type="expire",
            session_id=version.session_id,
            agent_id=version.agent_id,
            timestamp_ms=self._clock_ms(),
        )
        headers = {H_EXPECT_SUBJECT_SEQ: str(version.seq), H_MSG_ID: message_id(version.namespace, event_id)}
        message = Outgoing(subject, headers, msgspec.json.encode(body))
        try:
            await call_with_retry(lambda: publish(self._connection, message), deadline_s=WRITE_DEADLINE_S)
        except Refused:
            self.counters.overtaken += 1
            return 0
        except RetryError:
            # Unknown or not stored: it stays due.
            self._versions[subject] = version
            heapq.heappush(self._due, (version.expires_at_ms or 0, version.seq, subject))
            raise
        self.counters.expired += 1
        return 1
