"""The janitor: writes the ``expire`` version of named contexts whose time has come.

Readers treat an expired key as absent at once, by its ``expires_at``; the version that the janitor writes makes it
visible in the history and to watchers.  It is written by compare-and-set on the version that expired, so a newer
version wins, and a second janitor, or a redo after a crash, changes nothing.  What is due is decided by the server's
clock, as readers do.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.schemas.errors import ConfigurationError, GapError, HoldfastError, UnavailableError
from holdfast.schemas.failpoints import failpoint
from holdfast.schemas.ids import derived_event_id
from holdfast.streams.committer import OutlivedError
from holdfast.streams.decode import KeyVersionBody, decode_key_version
from holdfast.streams.key_log import KeyLog
from holdfast.streams.publish import WRONG_LAST_SEQUENCE, Outgoing, Refused, publish
from holdfast.streams.pull import StreamReader
from holdfast.streams.server_clock import ServerClock
from holdfast.streams.service import Call, decode_request, serve
from holdfast.streams.storing import store_with_retry
from holdfast.streams.wire import H_EXPECT_SUBJECT_SEQ, H_MSG_ID, KEYS_STREAM, message_id, parse_key_subject
from holdfast.workers.control import CLEANUP_SUBJECT, CleanupReport, Empty
from holdfast.workers.waiting import wait_for_event

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection
    from holdfast.streams.key_chains import Head

logger = logging.getLogger(__name__)

INTERVAL_S: Final = 1.0
"""How late an expire version may be: readers do not wait for it."""

IN_FLIGHT: Final = 64
"""Expire versions under way at once: one after another, ten thousand keys of one session would take a minute."""

_READ: Final = 5_000
_STALE: Final = 10_000
"""Entries of versions that were overtaken since, beyond as many as there are keys, before they are swept."""


class JanitorCounters(msgspec.Struct):
    """Versions read, keys expired, expiries that a newer version had overtaken."""

    read: int = 0
    expired: int = 0
    overtaken: int = 0


class ExpiringVersion(msgspec.Struct, frozen=True):
    """What the janitor remembers of a key that has an expiry: what its expire version will say."""

    namespace: str
    epoch: str
    seq: int
    version: int
    expires_at_ms: int
    session_id: str | None
    agent_id: str | None
    losses: int
    """How often the connection had been lost when it was read: since then its sequence may have been given again."""


class Janitor:
    """Follows ``ctx-keys`` and expires what is due.  Remembers only keys that have an expiry.

    ``clock_ms`` stands in for the server's clock.
    """

    def __init__(self, connection: Connection, *, clock_ms: Callable[[], int] | None = None) -> None:
        self._connection = connection
        self._clock_ms = clock_ms
        self._log = KeyLog(connection)
        self._clock = ServerClock(connection)
        self._reader = StreamReader(connection, KEYS_STREAM, 1, allow_gaps=True)
        self._due: list[tuple[int, int, str]] = []
        self._versions: dict[str, ExpiringVersion] = {}
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()
        self.counters = JanitorCounters()

    async def run(self) -> None:
        """Expires what is due, every second.  Never returns; an unreachable server is waited for."""
        while True:
            try:
                await self.round()
            except GapError as error:
                # The stream is gone: when it is there again, it is read from its beginning.
                logger.warning("janitor has no stream", extra={"action": "janitor_retry", "error": str(error)})
            except ConfigurationError:
                raise
            except HoldfastError as error:
                # Also what the server refuses, such as while it stops or recovers.
                logger.warning("janitor cannot go on yet", extra={"action": "janitor_retry", "error": str(error)})
            await wait_for_event(self._wake, INTERVAL_S)

    async def round(self) -> int:
        """Reads what is new and writes the expire versions that are due; returns how many were written."""
        async with self._turn:
            try:
                await self._follow()
            except GapError as error:
                # The stream began anew, or is gone: what is remembered of it says nothing any more.
                logger.warning("janitor starts anew", extra={"action": "janitor_restarted", "error": str(error)})
                await self._forget()
                await self._follow()
            return await self._expire_due()

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
            losses = self._connection.losses
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
                self._remember(
                    message.subject,
                    ExpiringVersion(
                        version.namespace,
                        version.epoch,
                        version.seq,
                        version.version,
                        version.expires_at_ms,
                        version.session_id,
                        version.agent_id,
                        losses,
                    ),
                )

    def _remember(self, subject: str, version: ExpiringVersion) -> None:
        self._versions[subject] = version
        heapq.heappush(self._due, (version.expires_at_ms, version.seq, subject))
        if len(self._due) > 2 * len(self._versions) + _STALE:
            # A key that is written every second with a day to live would leave 86,400 entries behind.
            self._due = [(kept.expires_at_ms, kept.seq, name) for name, kept in self._versions.items()]
            heapq.heapify(self._due)

    async def _expire_due(self) -> int:
        if not self._due:
            return 0
        now = await self._clock.now_ms() if self._clock_ms is None else self._clock_ms()
        written = 0
        while due := self._take_due(now):
            outcomes = await asyncio.gather(
                *(self._expire(subject, version, now) for subject, version in due), return_exceptions=True
            )
            written += sum(outcome for outcome in outcomes if isinstance(outcome, int))
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
        return written

    def _take_due(self, now: int) -> list[tuple[str, ExpiringVersion]]:
        taken: list[tuple[str, ExpiringVersion]] = []
        while self._due and self._due[0][0] <= now and len(taken) < IN_FLIGHT:
            _, seq, subject = heapq.heappop(self._due)
            version = self._versions.get(subject)
            if version is None or version.seq != seq:
                continue  # overtaken by a newer version that we have read
            del self._versions[subject]
            taken.append((subject, version))
        return taken

    async def _expire(self, subject: str, version: ExpiringVersion, now: int, after_seq: int | None = None) -> int:
        losses = self._connection.losses
        if version.losses != losses:
            row = (await self._head(subject, version)).row
            known = version.seq, version.version, version.expires_at_ms
            if row is None or (row.seq, row.version, row.expires_at_ms) != known:
                self.counters.overtaken += 1
                return 0
            version = msgspec.structs.replace(version, losses=losses)
        event_id = derived_event_id(version.namespace, "expire", version.epoch, str(version.seq))
        body = KeyVersionBody(
            version=version.version + 1,
            op="expire",
            event_id=event_id,
            changed_by="janitor",
            change_type="expire",
            session_id=version.session_id,
            agent_id=version.agent_id,
            timestamp_ms=now,
        )
        expected = version.seq if after_seq is None else after_seq
        headers = {H_EXPECT_SUBJECT_SEQ: str(expected), H_MSG_ID: message_id(version.namespace, event_id)}
        message = Outgoing(subject, headers, msgspec.json.encode(body))
        try:
            await store_with_retry(self._connection, KEYS_STREAM, lambda: self._publish(message, losses))
        except Refused:
            head = await self._head(subject, version)
            if after_seq is None and head.row is not None and head.row.seq == version.seq:
                if head.last_seq > expected:
                    # What stands behind it is no version: somebody put something of his own on the subject.
                    return await self._expire(subject, version, now, head.last_seq)
                # A refusal with nothing in the way: by a leader that was deposed.  It stays due, for the next round.
                self._remember(subject, version)
                raise UnavailableError(f"{KEYS_STREAM} refused an expire version, and nothing was in its way") from None
            self.counters.overtaken += 1
            return 0
        except BaseException:
            # Unknown or not stored: it stays due.
            self._remember(subject, version)
            raise
        self.counters.expired += 1
        return 1

    async def _head(self, subject: str, version: ExpiringVersion) -> Head:
        """The end of a key; when nobody can say, the version stays due."""
        try:
            return await self._log.head(*parse_key_subject(subject))
        except BaseException:
            self._remember(subject, version)
            raise

    async def _publish(self, message: Outgoing, losses: int) -> None:
        failpoint("janitor.before_expire")
        if losses != self._connection.losses:
            raise OutlivedError
        try:
            await publish(self._connection, message)
        except Refused as refused:
            if refused.err_code == WRONG_LAST_SEQUENCE:
                raise
            raise UnavailableError(
                f"{KEYS_STREAM} does not take an expire version: {refused}", hint="see the server's log and its disk"
            ) from refused
        failpoint("janitor.after_expire")


@asynccontextmanager
async def run_janitor(connection: Connection, *, drain_timeout_s: float) -> AsyncGenerator[Janitor]:
    """Yields a janitor that answers ``hf.janitor.cleanup``; its loop is the caller's to run."""
    async with AsyncExitStack() as stack:
        janitor = Janitor(connection)
        stack.push_async_callback(janitor.close)
        decoder = msgspec.json.Decoder(Empty)

        async def cleanup(call: Call) -> None:
            decode_request(call.data, decoder)
            await call.reply(msgspec.json.encode(CleanupReport(await janitor.round())))

        await stack.enter_async_context(
            serve(
                connection,
                name="holdfast-janitor",
                version="1.0.0",
                description="Expires Holdfast's named contexts",
                endpoints={"cleanup": (CLEANUP_SUBJECT, cleanup)},
                namespace_at=None,
                drain_timeout_s=drain_timeout_s,
            )
        )
        yield janitor
