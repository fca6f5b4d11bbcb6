"""How one handler's events come in and are settled: taken in large windows, begun in turn, kept alive, told done.

An event that was taken is in one of three states.  It *waits*: only as many do as this process begins within some
milliseconds, since another process could run them; when the functions hang it is handed back.  It is *at work*: as many
as the handler's concurrency allows.  Or it *ends*: its function has returned, its place is another event's, and what
came of it is being stored; many end at once, so that one write to the server stores what came of all of them.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.client.handler_policy import Again, HandlerOptions, Settlement, delay_s, events_ahead, is_often, turn
from holdfast.schemas import limits
from holdfast.schemas.errors import ClosedError, ConfigurationError, HoldfastError, RetryError
from holdfast.schemas.failpoints import failpoint
from holdfast.streams.retry import WRITE_DEADLINE_S, call_with_retry

if TYPE_CHECKING:
    from holdfast.streams.consumer import Delivery, DurableConsumer

logger = logging.getLogger(__name__)

MOST_ENDING: Final = 1_024
"""Events of one handler that may be ending at once: a full atomic batch of them is stored while the next gathers."""

HELD_BYTES: Final = 32 * limits.MIB
"""No more events are taken while those that are held have so many bytes."""

LONGEST_WAIT_S: Final = 30.0
"""What has waited so long, behind functions that do not return, is handed back: another process may begin it."""

HANDED_BACK_S: Final = 20.0
"""After which time that is delivered again: by then no pull of this process is open any more that could bring it."""

_REOPEN_S: Final = 1.0
_MEAN_OVER: Final = 16
"""Over about so many functions the mean of their times is taken."""


class HandlerCounters(msgspec.Struct):
    """Events done, passed over (not for this handler, or done before), handed back to be tried again, and given up."""

    done: int = 0
    skipped: int = 0
    again: int = 0
    dead: int = 0


class Place:
    """The place of one delivery among those at work."""

    __slots__ = ("_began_s", "_leave", "delivery", "has_run")

    def __init__(self, delivery: Delivery, leave: Callable[[float | None], None]) -> None:
        self.delivery: Final = delivery
        self.has_run = False
        """Whether the function was called: what is passed over does not tell how long that takes."""
        self._began_s = time.perf_counter()
        self._leave: Callable[[float | None], None] | None = leave

    def leave(self) -> None:
        """Makes room for another event, once: the function is done with this one, which is not settled yet."""
        leave, self._leave = self._leave, None
        if leave is not None:
            leave(time.perf_counter() - self._began_s if self.has_run else None)


Work = Callable[[Place], Awaitable[Settlement]]
"""Does whatever is to be done about a delivery, and returns how it is settled."""


class Intake:
    """Takes the deliveries of one handler in this process and settles them."""

    def __init__(
        self, consumer: DurableConsumer, options: HandlerOptions, counters: HandlerCounters, work: Work
    ) -> None:
        self._consumer = consumer
        self._options = options
        self._counters = counters
        self._work = work
        # By identity: a consumer that was made anew, or lost its last state, delivers under an ack subject once more.
        self._held: dict[int, Delivery] = {}
        self._held_bytes = 0
        self._waiting: deque[tuple[Delivery, float]] = deque()  # each with the time since when
        self._at_work = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._freed = asyncio.Event()
        self._mean_s: float | None = None
        self._is_wary = False  # what came last was handed out often; the server has such events delivered first
        self._renewing: asyncio.Task[None] | None = None
        # Where one event ends, another one begins; it is to know nothing of that one's lineage and variables.
        self._context = contextvars.copy_context()

    async def open(self) -> None:
        """Creates the consumer, or goes on with the one that is there."""
        await call_with_retry(self._consumer.open, deadline_s=WRITE_DEADLINE_S)

    async def run(self) -> None:
        """Takes events as there is room for them.  Never returns; no event ends it."""
        # A bare task: what is held when this ends is kept alive until finish() has seen to it.
        self._renewing = asyncio.get_running_loop().create_task(self._renew(), name="holdfast-handler-renewal")
        while True:
            try:
                await self._take()
            except RetryError as error:
                logger.warning(
                    "handler cannot go on yet",
                    extra={"action": "handler_retry", "handler": self._options.name, "error": str(error)},
                )
                await self._reopen()

    async def stop(self) -> None:
        """Takes no more events, and hands back what was taken and not begun."""
        waiting, self._waiting = self._waiting, deque()
        # First, or what is handed back comes here again, one attempt later, while there is a pull to bring it.
        await self._consumer.close()
        for delivery, _ in waiting:
            self._forget(delivery)
            await self._settle(delivery, Again(0.0))

    async def finish(self, timeout_s: float) -> None:
        """Waits for what was begun, then cancels the rest, which goes to others at once."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)

    async def _take(self) -> None:
        # Whatever was asked for is taken as it comes: only what is held is kept alive.
        while not self._consumer.asked_for and self._room() <= self._ahead() // 2:
            self._freed.clear()
            await self._freed.wait()
        fetched = await self._consumer.fetch(self._consumer.asked_for or self._room())
        now_s = time.perf_counter()
        if fetched:
            self._is_wary = any(is_often(delivery.attempt) for delivery in fetched)
        for delivery in sorted(fetched, key=lambda each: turn(each.attempt, random.random())):  # noqa: S311
            self._held[id(delivery)] = delivery
            self._held_bytes += len(delivery.message.payload)
            self._waiting.append((delivery, now_s))
        self._begin()

    def _ahead(self) -> int:
        return 0 if self._is_wary else events_ahead(self._options.concurrency, self._mean_s)

    def _room(self) -> int:
        """How many more events may be taken."""
        if self._held_bytes >= HELD_BYTES or len(self._tasks) >= self._options.concurrency + MOST_ENDING:
            return 0
        return self._options.concurrency + self._ahead() - self._at_work - len(self._waiting)

    def _begin(self) -> None:
        """Begins what waits, as far as there are places."""
        options, tasks = self._options, self._tasks
        create_task = asyncio.get_running_loop().create_task
        while self._waiting and self._at_work < options.concurrency and len(tasks) < options.concurrency + MOST_ENDING:
            self._at_work += 1
            # A bare task: it settles its own delivery whatever happens, and finish() waits for it.
            place = Place(self._waiting.popleft()[0], self._left)
            task = create_task(self._attend(place), context=self._context.copy())
            tasks.add(task)
            task.add_done_callback(self._ended)

    def _left(self, took_s: float | None) -> None:
        if took_s is not None:
            self._mean_s = took_s if self._mean_s is None else self._mean_s + (took_s - self._mean_s) / _MEAN_OVER
        self._at_work -= 1
        self._freed.set()
        self._begin()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._freed.set()
        self._begin()

    async def _attend(self, place: Place) -> None:
        delivery = place.delivery
        settlement: Settlement = Again(0.0)  # of one that is cancelled
        try:
            settlement = await self._work(place)
        except Exception as error:
            # Not of the handler's function: of what is around it.
            logger.exception("a delivery could not be worked on", extra=about(self._options, delivery, error))
            settlement = Again(delay_s(self._options, delivery.attempt))
        finally:
            place.leave()
            self._forget(delivery)
            await self._settle(delivery, settlement)

    def _forget(self, delivery: Delivery) -> None:
        if self._held.pop(id(delivery), None) is not None:
            self._held_bytes -= len(delivery.message.payload)

    async def _settle(self, delivery: Delivery, settlement: Settlement) -> None:
        try:
            if isinstance(settlement, Again):
                self._counters.again += 1
                await self._consumer.nak(delivery, settlement.delay_s)
            elif settlement == "term":
                self._counters.dead += 1
                await self._consumer.term(delivery)
            else:
                failpoint("handler.before_ack")
                await self._consumer.ack(delivery)
        except (RetryError, ClosedError) as error:
            # It is delivered again when its time is up.
            logger.debug("a delivery was not settled", extra=about(self._options, delivery, error))

    async def _renew(self) -> None:
        """Keeps what is held from being delivered again, however long it is worked on or ends."""
        renewed: set[int] = set()
        while True:
            await asyncio.sleep(min(self._options.ack_wait_s, LONGEST_WAIT_S) / 6)
            await self._hand_back()
            # What has come since the last look is renewed by the next one: a third of the ack wait at most goes by.
            known, renewed = renewed, set(self._held)
            for key in known & renewed:
                delivery = self._held.get(key)
                if delivery is None:
                    continue  # settled meanwhile
                try:
                    await self._consumer.in_progress(delivery)
                except RetryError as error:
                    # The next time, if it is still ours.
                    logger.debug("a delivery was not renewed", extra=about(self._options, delivery, error))
                except Exception as error:
                    # All the others are kept alive by this task too.
                    logger.exception("a delivery could not be renewed", extra=about(self._options, delivery, error))

    async def _hand_back(self) -> None:
        """Hands back what has waited too long; nothing is taken ahead until functions are quick again."""
        since_s = time.perf_counter() - LONGEST_WAIT_S
        while self._waiting and self._waiting[0][1] <= since_s:
            delivery, _ = self._waiting.popleft()
            self._mean_s = LONGEST_WAIT_S
            self._forget(delivery)
            await self._settle(delivery, Again(HANDED_BACK_S))

    async def _reopen(self) -> None:
        await asyncio.sleep(_REOPEN_S)
        await self._consumer.close()
        try:
            await self._consumer.open()
        except ConfigurationError:
            raise
        except HoldfastError as error:
            # Also what the server refuses, such as while it recovers; the next fetch comes back here.
            logger.debug("the consumer is not there yet", extra={"action": "handler_retry", "error": str(error)})


def about(options: HandlerOptions, delivery: Delivery, error: Exception | None) -> dict[str, object]:
    """Returns the fields of a log record about a delivery."""
    return {
        "action": "handler_event",
        "handler": options.name,
        "seq": delivery.message.seq,
        "attempt": delivery.attempt,
        "error": repr(error),
    }
