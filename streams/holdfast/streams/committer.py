"""Group commit: concurrent writes to one stream are sent together, and each learns its own outcome.

An atomic batch costs the server 2.7 ms whatever its size (up to some hundred messages), a single publish 0.15–0.25 ms,
both synced to disk.  So what has come together by the next turn of the event loop is sent singly, pipelined, when it
is little, and as one atomic batch when it is much; how much that is is learned where the order of messages means
nothing (:mod:`holdfast.streams.pacing`).  While two batches are under way, more gathers.  Nothing waits for a timer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, cast

import msgspec

from holdfast.schemas import limits
from holdfast.schemas.errors import HoldfastError, RetryError, UnavailableError, UnknownOutcomeError
from holdfast.streams.connection import ApiError, ApiFailure, Connection
from holdfast.streams.pacing import SINGLY_UP_TO, Pace
from holdfast.streams.publish import (
    BATCH_DUPLICATE,
    SUBJECT_FULL,
    WRONG_LAST_SEQUENCE,
    Outgoing,
    PubAck,
    Refused,
    check_payload,
    publish_batch,
    publish_each,
)
from holdfast.streams.retry import WRITE_DEADLINE_S
from holdfast.streams.storing import store_with_retry, stream_of

logger = logging.getLogger(__name__)

_SPREAD: Final = 1 / 30
"""By how much of their deadline writes of one batch may differ in age: they end together, when the oldest must."""

_IN_FLIGHT: Final = 2
"""Batches under way at once: one being stored while the next is sent.  More only make them smaller."""

QUEUED_BYTES: Final = 32 * limits.MIB
"""Most bytes waiting to be sent; a writer that brings more waits."""


class Settled(msgspec.Struct, frozen=True):
    """The outcome of one write: stored now at ``seq``, or known to be stored already."""

    seq: int
    existed: bool = False


Verifier = Callable[[Sequence[Outgoing]], Awaitable[dict[str, Settled | HoldfastError]]]
"""Given messages some of which are refused because their subject is taken, returns by subject what is there:
the same content (settled) or another (an error).  Subjects that are free are left out."""


class OutlivedError(HoldfastError):
    """The connection was lost since what a message expects was read, so that it was not sent, or not sent again.

    A server that comes back may have lost its end: behind the sequence that is expected something else may stand.
    """

    code = "outlived"

    def __init__(self) -> None:
        super().__init__("the connection was lost since the write began", hint="read what it follows, and write again")


class _Call:
    """What one caller waits for: a future for all of its messages together, its own to cancel."""

    __slots__ = ("future", "has_failed", "left", "outcomes")

    def __init__(self, count: int) -> None:
        self.future: asyncio.Future[list[Settled]] = asyncio.get_running_loop().create_future()
        self.outcomes: list[Settled | HoldfastError | None] = [None] * count
        self.left = count
        self.has_failed = False

    def take(self, place: int, outcome: Settled | HoldfastError) -> None:
        self.outcomes[place] = outcome
        self.left -= 1
        if isinstance(outcome, HoldfastError):
            self.has_failed = True
        if self.left or self.future.done():
            return
        if self.has_failed:
            self.future.set_exception(next(each for each in self.outcomes if isinstance(each, HoldfastError)))
            # A caller that is cancelled at this moment does not look at it any more.
            self.future.exception()
        else:
            self.future.set_result(cast("list[Settled]", self.outcomes))


class _Write:
    """One message, the calls that wait for it, each with the place of it in the call, and its outcome once known.

    Its time runs from ``since_s``, by the loop's clock: also while it waits for its turn.
    """

    __slots__ = ("calls", "is_settled", "losses", "message", "since_s", "size")

    def __init__(
        self, message: Outgoing, size: int, since_s: float, call: _Call, place: int, losses: int | None
    ) -> None:
        self.message = message
        self.losses = losses
        self.size = size
        self.since_s = since_s
        self.calls = [(call, place)]
        self.is_settled = False


class Committer:
    """Writes to one stream, with group commit.

    With a ``verifier``, messages are create-once by subject: equal subjects share one write, a taken subject is
    looked at before its outcome is told, and messages may be stored in any order.  Without one, each message itself
    says what lets it in once at most, a ``Nats-Msg-Id`` or the sequence that it must follow, and a refusal is told as
    the ApiError that it is.  They are stored in the order in which they were handed in, unless an attempt has to be
    repeated: of what went singly, or behind a batch that is repeated, some may then be stored before what it followed.

    A write that is not acknowledged within ``deadline_s`` of being handed in ends by its last attempt, one at least;
    those sent together end together, up to a thirtieth of that time early.
    UnknownOutcomeError says that it may have been stored, as StorageFailedError does as soon as the server is known to
    store nothing; sending it again is safe.  UnavailableError says that it was not: it was refused each time, or never
    sent, its time having gone by behind writes that nobody answered.  Cancelling a caller does not recall what was
    handed in; cancelling :meth:`close` abandons it.
    """

    def __init__(
        self, connection: Connection, *, verifier: Verifier | None = None, deadline_s: float = WRITE_DEADLINE_S
    ) -> None:
        self._connection = connection
        self._verifier = verifier
        self._deadline_s = deadline_s
        self._queue: deque[_Write] = deque()
        self._by_subject: dict[str, _Write] = {}
        self._queued_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._in_flight = 0
        self._pace = Pace(learns=verifier is not None)
        self._is_starting = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def store(self, message: Outgoing, *, losses: int | None = None) -> Settled:
        """Stores one message durably and returns its outcome; ``losses`` as of :meth:`store_many`."""
        return (await self.store_many([message], losses=losses))[0]

    async def store_many(self, messages: Sequence[Outgoing], *, losses: int | None = None) -> list[Settled]:
        """Stores messages and returns their outcomes in order; raises the first error when all have ended.

        ``losses`` is for messages that name the sequence which they must follow: how often the connection had been
        lost when that was read.  Once it has been lost again they are not sent any more: OutlivedError, and whether an
        attempt before that was stored is unknown.
        Raises TooLargeError before anything is sent when a message is over what the server takes.
        """
        sizes = [check_payload(self._connection, message) for message in messages]
        if not sizes:
            return []
        call = _Call(len(sizes))
        clock = asyncio.get_running_loop().time
        since_s = clock()
        for place, message in enumerate(messages):
            if not self._room.is_set():
                since_s = clock()  # of a long call only what has to wait here has waited
                while not self._room.is_set():
                    await self._room.wait()
            self._enqueue(message, sizes[place], since_s, call, place, losses)
        return await call.future

    async def close(self) -> None:
        """Waits until everything handed in has an outcome."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _enqueue(
        self, message: Outgoing, size: int, since_s: float, call: _Call, place: int, losses: int | None
    ) -> None:
        if self._verifier is not None:
            known = self._by_subject.get(message.subject)
            if known is not None:
                known.calls.append((call, place))
                return
        write = _Write(message, size, since_s, call, place, losses)
        if self._verifier is not None:
            self._by_subject[message.subject] = write
        self._queue.append(write)
        self._queued_bytes += size
        if self._queued_bytes >= QUEUED_BYTES:
            self._room.clear()
        if not self._is_starting and self._in_flight < _IN_FLIGHT:
            self._is_starting = True
            self._start()

    def _settle(self, write: _Write, outcome: Settled | HoldfastError) -> None:
        if write.is_settled:
            return
        write.is_settled = True
        # Who brings the same from now on is not told what was true before.
        if self._verifier is not None:
            del self._by_subject[write.message.subject]
        for call, place in write.calls:
            call.take(place, outcome)

    def _start(self) -> None:
        task = asyncio.get_running_loop().create_task(self._work(), name="holdfast-group-commit")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _work(self) -> None:
        # Its first step is the next turn of the loop: all that has come together by then goes together.
        self._is_starting = False
        self._in_flight += 1
        try:
            while self._queue:
                await self._commit(self._take())
        finally:
            self._in_flight -= 1

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            # Its loop ends: nobody is left to send what still waits.
            self._is_starting = False
            while self._queue and not self._in_flight:
                self._fail(self._take(), UnavailableError("the write was abandoned while closing, and never sent"))

    def _take(self) -> list[_Write]:
        batch: list[_Write] = []
        size = 0
        at_most = self._pace.together(len(self._queue))
        while len(batch) < at_most and size < limits.BATCH_BYTES:
            write = self._queue[0]
            if batch and abs(write.since_s - batch[0].since_s) > _SPREAD * self._deadline_s:
                break
            self._queue.popleft()
            size += write.size
            batch.append(write)
        self._queued_bytes -= size
        if self._queued_bytes < QUEUED_BYTES:
            self._room.set()
        return batch

    async def _commit(self, batch: list[_Write]) -> None:
        waited_s = asyncio.get_running_loop().time() - min(write.since_s for write in batch)
        try:
            await store_with_retry(
                self._connection,
                stream_of(batch[0].message.subject),
                lambda: self._attempt(batch),
                deadline_s=self._deadline_s - waited_s,
            )
        except UnknownOutcomeError as error:
            self._fail(batch, error)
            self._give_up_overdue(error)
        except HoldfastError as error:
            self._fail(batch, error)
        except Exception as error:
            logger.exception("group commit failed", extra={"action": "group_commit_failed"})
            self._fail(batch, UnknownOutcomeError(f"the write failed unexpectedly: {error!r}"))
        finally:
            self._fail(
                batch,
                UnknownOutcomeError(
                    "the write was abandoned while closing, before its acknowledgement came",
                    hint="the same call may be sent again",
                ),
            )

    def _give_up_overdue(self, error: UnknownOutcomeError) -> None:
        """Ends what has waited for all of its time behind a write that nobody answered.

        An attempt for each batch of it would take as long again as an answer is waited for, one after the other.
        """
        until_s = asyncio.get_running_loop().time() - self._deadline_s
        overdue = [write for write in self._queue if write.since_s <= until_s]
        if not overdue:
            return
        self._queue = deque(write for write in self._queue if write.since_s > until_s)
        self._queued_bytes -= sum(write.size for write in overdue)
        if self._queued_bytes < QUEUED_BYTES:
            self._room.set()
        reason = f"the write was never sent, since those before it were not acknowledged: {error.message}"
        self._fail(overdue, UnavailableError(reason, hint=error.hint))

    async def _attempt(self, batch: list[_Write]) -> None:
        """Settles what can be settled; raises a RetryError while some of it cannot."""
        clock = asyncio.get_running_loop().time
        for write in batch:
            if write.losses is not None and write.losses != self._connection.losses:
                self._settle(write, OutlivedError())
        pending = [write for write in batch if not write.is_settled]
        while not self._pace.goes_singly(len(pending)):
            messages = [write.message for write in pending]
            began = clock()
            try:
                seqs = await publish_batch(self._connection, messages)
            except Refused as refusal:
                if refusal.err_code == WRONG_LAST_SEQUENCE and self._verifier is not None:
                    taken = await self._verifier(messages)
                    settled = self._settle_taken(pending, taken)
                    if settled:
                        pending = [write for write in pending if not write.is_settled]
                        continue
                elif refusal.err_code != BATCH_DUPLICATE:
                    logger.debug("batch refused", extra={"action": "batch_refused", "err_code": refusal.err_code})
                break  # singly, each tells its own outcome
            except RetryError:
                raise
            except Exception:
                # One member that cannot be sent at all must not fail the others.
                logger.debug("batch not sent", exc_info=True, extra={"action": "batch_not_sent"})
                break
            self._pace.stored_in_batch(len(pending), clock() - began)
            for write, seq in zip(pending, seqs, strict=True):
                self._settle(write, Settled(seq))
            return
        for start in range(0, len(pending), limits.BATCH_MESSAGES):
            await self._singly(pending[start : start + limits.BATCH_MESSAGES])

    async def _singly(self, pending: list[_Write]) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        outcomes = await publish_each(self._connection, [write.message for write in pending])
        # What is refused is not synced, and says nothing of what storing costs.
        stored = all(isinstance(outcome, PubAck) for outcome in outcomes)
        self._pace.stored_singly(len(outcomes) if stored else 0, clock() - began)
        retry: RetryError | None = None
        refused: list[_Write] = []
        for write, outcome in zip(pending, outcomes, strict=True):
            match outcome:
                case PubAck():
                    self._settle(write, Settled(outcome.seq, outcome.duplicate))
                case Refused() if outcome.err_code == WRONG_LAST_SEQUENCE and self._verifier is not None:
                    refused.append(write)
                case Refused():
                    self._settle(write, _error_of(outcome, write.message.subject))
                case RetryError():
                    # They are tried again together: that one may have been stored outweighs that others were not.
                    retry = retry if isinstance(retry, UnknownOutcomeError) else outcome
                case HoldfastError():
                    self._settle(write, outcome)
                case _:
                    logger.error("a write failed", exc_info=outcome, extra={"action": "write_failed"})
                    self._settle(write, UnavailableError(f"the write failed unexpectedly: {outcome!r}"))
        if refused and self._verifier is not None:
            self._settle_taken(refused, await self._verifier([write.message for write in refused]))
            if not all(write.is_settled for write in refused):
                # Taken when we wrote, free when we looked: a purge went by in between.  Write it again.
                retry = retry or UnavailableError("the hot tier was purged during a write")
        if retry is not None:
            raise retry

    def _settle_taken(self, pending: Sequence[_Write], taken: dict[str, Settled | HoldfastError]) -> bool:
        settled = False
        for write in pending:
            outcome = taken.get(write.message.subject)
            if outcome is None:
                continue
            settled = True
            self._settle(write, outcome)
        return settled

    def _fail(self, batch: Sequence[_Write], error: HoldfastError) -> None:
        for write in batch:
            self._settle(write, error)


def _error_of(refusal: Refused, subject: str) -> HoldfastError:
    if refusal.err_code == SUBJECT_FULL:
        return UnavailableError(
            f"the stream of {subject} is full: {refusal.description}",
            hint="let the archiver catch up ('holdfast health'), or raise the server's storage limit",
        )
    return ApiError(ApiFailure(400, refusal.err_code, refusal.description), subject)


__all__ = ["QUEUED_BYTES", "SINGLY_UP_TO", "Committer", "OutlivedError", "Settled", "Verifier"]
