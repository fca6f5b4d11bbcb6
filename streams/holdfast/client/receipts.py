"""Receipts: which contexts an event read and which it produced, written down and asked again.

::

    async with hf.working_on(event):
        plan = await hf.resolve(ref)
        answer = await hf.put({"steps": plan.body["steps"][:3]})

    [work] = (await hf.inputs_of(answer)).works      # read: exactly what came before it, with digests and sizes
    for use in await hf.used_by(ref):
        print(use.event_id, [item.ref for item in use.produced])

Handlers of ``hf.on`` have receipts by themselves.  The answers are those of the whole namespace, hot and cold; see
:mod:`holdfast.client.receipt_records` for what a receipt holds.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client import lineage
from holdfast.client.model import Event
from holdfast.client.receipt_records import (
    Produced,
    Reading,
    ReadRecorder,
    Record,
    Work,
    receipt_data,
    receipt_events,
    works_of,
)
from holdfast.schemas.errors import InvalidFieldError, InvalidRefError
from holdfast.schemas.ids import EventId, derived_event_id, new_event_id, normal_event_id, now_ms
from holdfast.schemas.refs import Ref, parse_ref
from holdfast.streams.events import check_id_text

if TYPE_CHECKING:
    from holdfast.client.lineage_context import Lineage
    from holdfast.client.store import Holdfast
    from holdfast.streams.events import NewEvent

_PAGE: Final = 500
_REMEMBERED: Final = 4_096
"""Readings that were told one by one, which this process remembers so as not to tell them again."""


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """That a context was read in working on an event.

    ``event`` is None when that event itself is not stored.  ``produced``: what was made after the reading, in order.
    ``recorded_at``: when the work had ended.  ``is_complete``: whether the receipt had room for everything.
    """

    event_id: EventId
    event: Event | None
    handler: str | None
    agent_id: str
    recorded_at: datetime
    size: int
    produced: tuple[Produced, ...]
    is_complete: bool


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """What an event was worked out from, or what made a context.

    ``works``: each piece of work on the event; of a context, each that made it, with what had been read by then and
    nothing later.  ``carried_by``, of a context: the events whose context it is, in order.
    """

    works: list[Work]
    carried_by: list[Event] = []

    @property
    def read(self) -> list[Reading]:
        """The contexts read, each once, in the order of first reading."""
        first: dict[Ref, Reading] = {}
        for work in self.works:
            for item in work.read:
                first.setdefault(item.ref, item)
        return list(first.values())

    @property
    def produced(self) -> list[Produced]:
        """The contexts made, in order."""
        return [item for work in self.works for item in work.produced]

    @property
    def events(self) -> list[EventId]:
        """The events worked on, each once."""
        return list(dict.fromkeys(work.event_id for work in self.works))

    @property
    def is_complete(self) -> bool:
        """Whether everything that was read and made is told."""
        return all(work.is_complete for work in self.works)


class Receipts:
    """The receipts of one namespace, through one client."""

    def __init__(self, hf: Holdfast) -> None:
        self._hf = hf
        self._told: dict[EventId, None] = {}

    @asynccontextmanager
    async def working_on(self, event: Event | Mapping[str, Any], *, track: bool = True) -> AsyncGenerator[Lineage]:
        """Works on an event while the block lasts, as a handler would; yields the lineage.

        The event, or a lineage in explicit form, is the current one, signed by this client's agent: what is emitted is
        its child.  When the block ends without an error, and it has read or made any context, its receipt is stored;
        ``track=False`` leaves that out.
        """
        context, recorder = begin_work(event, self._hf.agent, track=track)
        outer = lineage.scope()
        with lineage.enter(context, reads=recorder, mint=None if outer is None else outer.mint):
            yield dict(context)
        if recorder is not None:
            await self.write(context, recorder.record())

    async def write(
        self,
        context: Mapping[str, Any],
        record: Record,
        *,
        handler: str | None = None,
        receipt_id: EventId | None = None,
    ) -> None:
        """Stores the receipt of work on the event of ``context``, in normal form, unless there is nothing to tell.

        With a ``receipt_id`` it is stored in any case, once, and has no time of its own: the mark that the work is
        done.
        """
        events = self.events_of(context, record, handler=handler, receipt_id=receipt_id)
        if events:
            await self._hf.publish_many(events)

    def events_of(
        self,
        context: Mapping[str, Any],
        record: Record,
        *,
        handler: str | None = None,
        receipt_id: EventId | None = None,
    ) -> list[NewEvent]:
        """Returns the events that :meth:`write` stores, in this order; none when there is nothing to tell."""
        if receipt_id is None and record.is_empty:
            return []
        return receipt_events(
            context,
            record,
            namespace=self._hf.namespace,
            agent=context.get("agent_id", self._hf.agent),
            receipt_id=new_event_id() if receipt_id is None else receipt_id,
            timestamp_ms=now_ms() if receipt_id is None else None,
            handler=handler,
        )

    async def record_read(self, context: Mapping[str, Any] | None, ref: Ref, size: int) -> None:
        """Stores, at once, that the event of ``context`` read a context; the same again changes nothing.

        For reading outside of work that has a receipt.  Raises InvalidFieldError when there is no event.
        """
        await self._record(context, Record(read=(Reading(ref=ref, size=size),)), "read", ref, str(size))

    async def record_made(self, context: Mapping[str, Any] | None, ref: Ref, size: int) -> None:
        """Stores, at once, that a context was made in working on the event of ``context``; as :meth:`record_read`."""
        await self._record(context, Record(produced=(Produced(ref=ref, size=size, reads=0),)), "made", ref, str(size))

    async def _record(self, context: Mapping[str, Any] | None, record: Record, *told: str) -> None:
        given = _check_event(lineage.from_dict(context or {}))
        # All that the receipt says is in its id: what has one id must be the same.
        source = [str(given.get(field, "")) for field in _IN_A_RECEIPT]
        receipt_id = derived_event_id(self._hf.namespace, *told, self._hf.agent, *source)
        if receipt_id in self._told:
            return
        await self.write(given, record, receipt_id=receipt_id)
        self._told[receipt_id] = None
        while len(self._told) > _REMEMBERED:
            self._told.pop(next(iter(self._told)), None)

    async def used_by(self, ref: str) -> list[Use]:
        """Returns the events that read a context, in the order of their receipts, with what came of it.

        An event that was worked on several times, by several handlers or again, is there for each.  Raises
        InvalidRefError for what is no reference, UnavailableError when no resolver answers.
        """
        parse_ref(ref)
        receipts, worked_on = await self._gather({"ref": ref, "role": "read"})
        uses: list[Use] = []
        for work in await self._works(receipts):
            size = next((item.size for item in work.read if item.ref == ref), None)
            if size is not None:
                uses.append(
                    Use(
                        event_id=work.event_id,
                        event=worked_on.get(work.event_id),
                        handler=work.handler,
                        agent_id=work.agent_id,
                        recorded_at=work.recorded_at,
                        size=size,
                        produced=work.after(ref),
                        is_complete=work.is_complete,
                    )
                )
        return uses

    async def inputs_of(self, event_or_ref: Event | str) -> Inputs:
        """Returns what was read, and made, in working on an event; of a reference, what made it and out of what.

        An equal context that was made several times has a piece of work for each time.  Raises InputError for what is
        neither an event id nor a reference, UnavailableError when no resolver answers.
        """
        if isinstance(event_or_ref, str):
            ref = _as_ref(event_or_ref)
            if ref is not None:
                return await self._makers(ref)
        given = event_or_ref.event_id if isinstance(event_or_ref, Event) else check_id_text(event_or_ref, "event_id")
        event_id = normal_event_id(self._hf.namespace, given)[0]
        receipts, _ = await self._gather({"event_id": event_id})
        return Inputs(works=works_of(receipts))

    async def _makers(self, ref: Ref) -> Inputs:
        found, _ = await self._gather({"ref": ref, "role": "produced"})
        receipts = [event for event in found if receipt_data(event) is not None]
        works = [part for work in await self._works(receipts) if (part := work.narrowed_to(ref)) is not None]
        return Inputs(works=works, carried_by=[event for event in found if event.context_ref == ref])

    async def _works(self, receipts: list[Event]) -> list[Work]:
        """The pieces of work that these receipts tell of, whole: a part brings the other parts along."""
        split = {
            event.parent_event_id for event in receipts if (data := receipt_data(event)) is not None and data.parts > 1
        }
        told = {work.receipt_id: work for work in works_of(receipts)}
        for event_id in split:
            siblings, _ = await self._gather({"event_id": event_id})
            told |= {work.receipt_id: work for work in works_of(siblings) if work.receipt_id in told}
        return list(told.values())

    async def _gather(self, asked: dict[str, Any]) -> tuple[list[Event], dict[EventId, Event]]:
        events: list[Event] = []
        worked_on: dict[EventId, Event] = {}
        async for page in self._pages(asked):
            events += [msgspec.convert(item, Event) for item in page["events"]]
            for item in page["worked_on"]:
                event = msgspec.convert(item, Event)
                worked_on[event.event_id] = event
            for event_id in page["left_out"]:  # large ones, which the page had no room for
                async for event in self._hf.query(event_id=event_id):
                    worked_on[event.event_id] = event
        return events, worked_on

    async def _pages(self, asked: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        request = {**asked, "limit": _PAGE}
        while True:
            page = await self._hf.call_resolver("receipts", request)
            if not page["events"]:
                return
            yield page
            request["cursor"] = page["cursor"]


def begin_work(event: Event | Mapping[str, Any], agent: str, *, track: bool) -> tuple[Lineage, ReadRecorder | None]:
    """Returns the lineage under which an agent works on an event, and what takes note of what is read and made."""
    given = event.lineage if isinstance(event, Event) else lineage.from_dict(event)
    context = {**given, "agent_id": agent}
    if not track:
        return context, None
    _check_event(context)
    return context, ReadRecorder()


_IN_A_RECEIPT: Final = (
    "event_id", "parent_event_id", "root_event_id", "event_depth", "session_id", "correlation_id", "agent_id",
)  # fmt: skip


def _check_event(context: Mapping[str, Any]) -> Mapping[str, Any]:
    if "event_id" not in context:
        raise InvalidFieldError(
            "there is no event for which to note what is read",
            field="track",
            hint="read within hf.working_on(event) or lineage.within(event), or leave track out",
        )
    return context


def _as_ref(text: str) -> Ref | None:
    try:
        parse_ref(text)
    except InvalidRefError:
        # What reads like a reference is not taken for an event's id: it would have no inputs, without a word.
        if text.startswith("ctx_"):
            raise
        return None
    return Ref(text)


__all__ = ["Inputs", "Produced", "ReadRecorder", "Reading", "Receipts", "Record", "Use", "Work", "receipt_events"]
