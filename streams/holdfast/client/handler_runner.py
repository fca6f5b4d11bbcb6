"""One handler at work: takes its events from the server, runs the function over each, and settles them.

The order of things for one delivery, each durable before the next: what the function emits, its result, its receipt,
the acknowledgement.  A crash at any point means another delivery; an idempotent handler then repeats the same ids, and
is not run at all once its receipt is there.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client import lineage
from holdfast.client.cold import ResolverClient
from holdfast.client.handler_control import CatchUp, Instruction, Redeliver, decode_instruction, instruct, receipt_mark
from holdfast.client.handler_intake import HandlerCounters, Intake, Place, about
from holdfast.client.handler_policy import (
    ERROR,
    RESULT,
    Again,
    HandlerOptions,
    Settlement,
    as_typed,
    consumer_name,
    consumer_options,
    control_name,
    delay_s,
    error_data,
    is_surely_new,
    is_taken,
    judge,
    kills_its_handler,
    takes_context,
)
from holdfast.client.lineage_context import IdMint
from holdfast.client.model import Event
from holdfast.client.receipt_records import ReadRecorder, Record
from holdfast.schemas import limits
from holdfast.schemas.bodies import encode_json
from holdfast.schemas.errors import (
    GapError,
    HandlerError,
    HoldfastError,
    InputError,
    RetryError,
    UnavailableError,
)
from holdfast.schemas.failpoints import failpoint
from holdfast.schemas.ids import EventId, utc_from_ms
from holdfast.schemas.lineage import RECEIPT
from holdfast.streams.consumer import Delivery, DurableConsumer
from holdfast.streams.dead import FailedHandler, bury
from holdfast.streams.decode import decode_event
from holdfast.streams.wire import EVENTS_STREAM, reply_subject

if TYPE_CHECKING:
    from holdfast.client.handler_writes import GroupedWrites
    from holdfast.client.store import Holdfast
    from holdfast.schemas.rows import EventRow

logger = logging.getLogger(__name__)

REMEMBERED: Final = 10_000
"""Events that an idempotent handler knows to be done without asking: some 2 MB."""

_PAGE: Final = 200
"""Missed events that are taken up at once."""

_ASK_AGAIN_S: Final = 1.0

_LIGHT_RESULT_BYTES: Final = 16 * limits.KIB
_LIGHT_RECEIPT: Final = 100
"""What an event may leave behind, as a result or in references read and made, for its place to be another's while that
is stored: as many events may end at once, it bounds what they hold by some megabytes."""


class HandlerRunner:
    """Runs one handler in this process.  Others of its name, in any process, share its events with it."""

    def __init__(
        self, hf: Holdfast, options: HandlerOptions, function: Callable[..., Any], writes: GroupedWrites
    ) -> None:
        self._hf = hf
        self._writes = writes
        self.options = options
        self.consumer = consumer_name(hf.namespace, options.name)
        self._failing = FailedHandler(options.name, self.consumer)
        self.counters = HandlerCounters()
        self.gap: GapError | None = None
        """That events were missed which cannot be taken up now; None once they could be."""
        self._function = function
        self._takes_context = takes_context(function)
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004  an object whose call is a coroutine function
        )
        self._consumer = DurableConsumer(
            hf.connection, EVENTS_STREAM, self.consumer, consumer_options(hf.namespace, options)
        )
        self._resolver = ResolverClient(hf.connection, hf.namespace)
        # Of its own: those that the event loop shares are few, and others wait for them too.
        self._threads = None if self._is_async else lineage.ThreadPool(options.concurrency, "holdfast-handler")
        self._control = control_name(self.consumer)
        self._intake = Intake(self._consumer, options, self.counters, self._attend)
        self._in_hand: set[str] = set()
        self._done: dict[str, None] = {}

    async def open(self) -> None:
        """Creates the consumer, or goes on with the one that is there."""
        await self._intake.open()

    async def run(self) -> None:
        """Takes events as there is room for them.  Never returns; no event ends it."""
        await self._intake.run()

    async def stop_taking(self) -> None:
        """Takes no more events, and hands back what has arrived and was not begun."""
        await self._intake.stop()

    async def finish(self, timeout_s: float) -> None:
        """Waits for what is running, then cancels the rest, which goes to others at once."""
        await self._intake.finish(timeout_s)
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _attend(self, place: Place) -> Settlement:
        delivery = place.delivery
        try:
            decoded = decode_event(delivery.message)
        except HoldfastError:
            self.counters.skipped += 1
            return "ack"  # no event: the archiver makes it a dead letter
        row = decoded.row
        if row.name == self._control:
            return await self._follow(row, place)
        if not is_taken(self.options, row.name, row.originator):
            self.counters.skipped += 1
            return "ack"
        if decoded.inline is not None:
            # The reference of what a raw publisher sent inline resolves before the handler sees it.
            await self._hf.store_many([decoded.inline])
        is_new = is_surely_new(
            row.id,
            row.stored_at_ms,
            delivery.attempt,
            created_ms=self._consumer.created_ms,
            duplicate_window_s=self._consumer.duplicate_window_s,
        )
        return await self._handle(event_of_row(row), place, is_new=is_new)

    async def _follow(self, row: EventRow, place: Place) -> Settlement:
        """Does what an instruction says."""
        instruction = decode_instruction(row.data)
        if isinstance(instruction, CatchUp):
            return await self._catch_up(instruction, row, place.delivery)
        if isinstance(instruction, Redeliver):
            event = await self._find({"event_id": instruction.event_id})
            if event is not None and is_taken(self.options, event.name, event.originator):
                return await self._handle(event, place)
        self.counters.skipped += 1
        logger.warning("an instruction leads to no event", extra=about(self.options, place.delivery, None))
        return "ack"

    async def _handle(self, event: Event, place: Place, *, is_new: bool = False) -> Settlement:
        delivery = place.delivery
        if self.options.idempotent and event.event_id in self._in_hand:
            return Again(delay_s(self.options, delivery.attempt))  # delivered twice, and the first is not at its end
        self._in_hand.add(event.event_id)
        mark = receipt_mark(event.namespace, self.options.name, event.event_id) if self.options.idempotent else None
        try:
            # Known here to be done, it may look new: a server that was killed has forgotten the last it was told.
            if mark is not None and (mark in self._done or (not is_new and await self._is_done(mark))):
                self.counters.skipped += 1
                return "ack"
            if kills_its_handler(delivery.attempt, self.options.max_deliver):
                raise HandlerError(
                    f"handler {self.options.name!r} came to no end in {delivery.attempt - 1} deliveries of the event",
                    handler=self.options.name,
                    cause="interrupted",
                    hint="does the event kill the process that works on it?",
                )
            await self._run(event, place, mark)
        except Exception as error:  # noqa: BLE001  a handler may raise whatever it likes
            return await self._failed(event, delivery, error)
        finally:
            self._in_hand.discard(event.event_id)
        self.counters.done += 1
        return "ack"

    async def _run(self, event: Event, place: Place, mark: EventId | None) -> None:
        options = self.options
        context = {**event.lineage, "agent_id": options.agent}
        recorder = ReadRecorder() if options.track else None
        mint = IdMint(event.namespace, options.name, event.event_id) if options.idempotent else None
        failpoint("handler.before_run")
        place.has_run = True
        with lineage.enter(context, reads=recorder, mint=mint):
            returned = await self._call(event, dict(context))
            failpoint("handler.after_run")
            result = None if returned is None else encode_json(returned, field="result")
            if _may_leave(options, result, recorder):
                place.leave()
            if result is not None:
                await self._result(event, result)
        failpoint("handler.after_result")
        if event.name != RECEIPT:  # the receipt of a receipt would have one in its turn
            record = Record() if recorder is None else recorder.record()
            told = self._hf.receipts.events_of(context, record, handler=options.name, receipt_id=mark)
            if told:
                await self._writes.store(told)
        if mark is not None:
            self._remember(mark)

    async def _call(self, event: Event, context: dict[str, Any]) -> Any:
        try:
            if self.options.timeout_s is None:
                return await self._invoke(event, context)
            return await self._invoke_in_time(event, context, self.options.timeout_s)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancels this attempt: what it waited for was cancelled, and that is a failure like any other.
            raise RuntimeError("what the handler waited for was cancelled") from error

    async def _invoke(self, event: Event, context: dict[str, Any]) -> Any:
        arguments = (event, context) if self._takes_context else (event,)
        if self._is_async:
            return await self._function(*arguments)
        # In a thread, under this lineage; a time limit cannot end it there.
        returned = await asyncio.get_running_loop().run_in_executor(self._threads, self._function, *arguments)
        return await returned if inspect.isawaitable(returned) else returned

    async def _invoke_in_time(self, event: Event, context: dict[str, Any], timeout_s: float) -> Any:
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                return await self._invoke(event, context)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise UnavailableError(
                f"handler {self.options.name!r} did not end within {timeout_s} s",
                hint="give it more with timeout_s, if it is to take so long",
            ) from error

    async def _result(self, event: Event, result: bytes) -> None:
        data = msgspec.json.decode(result)
        # Named as the parent: an event of a long chain, such as a conversation's, is answered too.  No loop is made of
        # results alone, since each has a longer name.
        await self._tell(event, await self._hf.emit(f"{event.name}:{RESULT}", data, parent=event))

    async def _tell(self, event: Event, outcome: Event) -> None:
        """Tells a waiting client of an event that is stored; one that is not reached asks for it by and by."""
        if event.client_id is None:
            return
        try:
            subject = reply_subject(event.namespace, event.client_id)
            payload = msgspec.json.encode(outcome)
            if len(payload) + len(subject) < self._hf.connection.client.max_payload:
                await self._hf.connection.lean.publish(subject, payload)
        except HoldfastError as error:
            logger.debug("a client was not told", extra={"action": "reply_failed", "error": str(error)})

    async def _failed(self, event: Event, delivery: Delivery, error: Exception) -> Settlement:
        options = self.options
        verdict = judge(
            error,
            delivery.attempt,
            max_deliver=options.max_deliver,
            backoff_s=options.backoff_s,
            jitter=random.random(),  # noqa: S311  spreads attempts, guards nothing
        )
        if isinstance(verdict, Again):
            logger.warning(
                "handler failed, and is run again", extra=about(self.options, delivery, error), exc_info=error
            )
            return verdict
        typed = as_typed(error, options.name)
        try:
            await bury(self._hf.connection, EVENTS_STREAM, delivery.message, typed, handler=self._failing)
            failpoint("handler.after_bury")
            await self._tell_failure(event, delivery, typed)
        except RetryError as failure:
            logger.warning("a failed event could not be set aside yet", extra=about(self.options, delivery, failure))
            return Again(delay_s(self.options, delivery.attempt))
        logger.error("handler gave an event up", extra=about(self.options, delivery, error), exc_info=error)
        return "term"

    async def _tell_failure(self, event: Event, delivery: Delivery, error: HoldfastError) -> None:
        context = {**event.lineage, "agent_id": self.options.agent}
        # Its id follows from the delivery: a crash after this does not make another one.
        source = f"{self.options.name} failed at {delivery.message.epoch} {delivery.message.seq}"
        try:
            with lineage.enter(context, mint=IdMint(event.namespace, source, event.event_id)):
                outcome = await self._hf.emit(
                    # Named as the parent: at the limit of depth, too, a failure is told.
                    f"{event.name}:{ERROR}",
                    error_data(error, self.options.name),
                    parent=event,
                )
        except InputError as refusal:
            # A name of sixteen segments has no room for another.  The dead letter tells it all.
            logger.warning("a failure was not told as an event", extra=about(self.options, delivery, refusal))
            return
        await self._tell(event, outcome)

    async def _is_done(self, mark: EventId) -> bool:
        if await self._find({"event_id": mark, "name": RECEIPT}) is None:
            return False
        self._remember(mark)
        return True

    def _remember(self, mark: EventId) -> None:
        self._done[mark] = None
        if len(self._done) > REMEMBERED:
            del self._done[next(iter(self._done))]

    async def _find(self, conditions: dict[str, Any]) -> Event | None:
        """Asks for an event, for as long as nobody answers: what is not known must not be taken for no."""
        is_told = False
        while True:
            try:
                answer = await self._resolver.call("query", {**conditions, "limit": 1})
                return msgspec.convert(answer["events"][0], Event) if answer["events"] else None
            except RetryError as error:
                if not is_told:
                    is_told = True
                    logger.warning(
                        "handler waits for a resolver",
                        extra={"action": "handler_waits", "handler": self.options.name, "error": str(error)},
                    )
                await asyncio.sleep(_ASK_AGAIN_S)

    async def _catch_up(self, missed: CatchUp, row: EventRow, delivery: Delivery) -> Settlement:
        """Has a page of missed events delivered again, each by itself, and goes on to the next page."""
        # Among what was missed may be instructions for this handler.
        request: dict[str, Any] = {"since": missed.since, "until": missed.until, "limit": _PAGE, "receipts": True}
        if missed.cursor is not None:
            request["cursor"] = missed.cursor
        try:
            page = await self._resolver.call("query", request)
        except RetryError as error:
            self._miss(error)
            return Again(delay_s(self.options, delivery.attempt))
        instructions: list[tuple[Instruction, str]] = []
        for event in (msgspec.convert(item, Event) for item in page["events"]):
            if event.name == control_name(self.consumer):
                again = decode_instruction(msgspec.json.encode(event.data))
            elif is_taken(self.options, event.name, event.originator):
                again = Redeliver(event.event_id)
            else:
                continue
            if again is not None:
                instructions.append((again, event.event_id))
        if page["events"]:
            instructions.append((CatchUp(missed.since, missed.until, page["cursor"]), "next page"))
        await self._hf.publish_many(
            [
                instruct(row.namespace, self.consumer, self.options.agent, instruction, row.id, source)
                for instruction, source in instructions
            ]
        )
        logger.info(
            "handler takes up missed events",
            extra={"action": "handler_caught_up", "handler": self.options.name, "events": len(instructions)},
        )
        self.gap = None
        return "ack"

    def _miss(self, error: RetryError) -> None:
        if self.gap is None:
            self.gap = GapError(
                f"handler {self.options.name!r} has missed events that have left the log, and they cannot be read "
                f"from the lake: {error.message}",
                hint="start a resolver: they are taken up when one answers",
            )
            logger.error("handler has missed events", extra={"action": "handler_gap", "handler": self.options.name})


def _may_leave(options: HandlerOptions, result: bytes | None, recorder: ReadRecorder | None) -> bool:
    """Whether another function may begin before what this one brought about is stored.

    Whoever allows one event at a time has each handled wholly before the next.
    """
    is_light = len(result or b"") <= _LIGHT_RESULT_BYTES and (recorder is None or recorder.count <= _LIGHT_RECEIPT)
    return options.concurrency > 1 and is_light


def event_of_row(row: EventRow) -> Event:
    """Returns the event of a row, as a query answers with it."""
    return Event(
        event_id=EventId(row.id),
        name=row.name,
        namespace=row.namespace,
        agent_id=row.agent_id,
        timestamp=utc_from_ms(row.timestamp_ms),
        session_id=row.session_id,
        correlation_id=row.correlation_id,
        parent_event_id=None if row.parent_event_id is None else EventId(row.parent_event_id),
        root_event_id=None if row.root_event_id is None else EventId(row.root_event_id),
        event_depth=row.event_depth,
        client_id=row.client_id,
        originator=row.originator,
        context_ref=row.context_ref,
        data=None if row.data is None else msgspec.json.decode(row.data),
        stored_at=utc_from_ms(row.stored_at_ms),
        source_id=row.source_id,
        extra=None if row.extra is None else msgspec.json.decode(row.extra),
        traceparent=row.traceparent,
    )
