"""What a receipt holds: which contexts were read in working on an event, and which were made.  Pure, but for a lock.

A receipt is an event under the event worked on, named :data:`~holdfast.schemas.lineage.RECEIPT`, with the data::

    {"handler": text | null, "read": [{"ref", "size"}], "produced": [{"ref", "size", "reads", "event_id"?}],
     "left_out"?, "left_out_produced"?, "receipt"?, "part"?, "parts"?}

``read`` is in the order of first reading; ``reads`` says how many of them came before: the inputs of what was produced
are ``read[:reads]``.  ``left_out`` counts readings that there was no room for, on the receipt and before each thing
produced.  What one message does not hold is told in several, which name the first as ``receipt``; their lists continue
each other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta

from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidFieldError, InvalidRefError
from holdfast.schemas.ids import EventId, derived_event_id, normal_event_id
from holdfast.schemas.lineage import RECEIPT
from holdfast.schemas.refs import Digest, Ref, parse_ref
from holdfast.streams.decode import MAX_DEPTH
from holdfast.streams.events import NewEvent

if TYPE_CHECKING:
    from holdfast.client.model import Event

MOST: Final = 10_000
"""Most contexts that a recorder holds, of those read and of those produced each: about a megabyte."""

_ENVELOPE_BYTES: Final = 32 * limits.KIB
"""Room for everything in the message of a receipt but its two lists."""

_PART_BYTES: Final = limits.EVENT_BYTES - _ENVELOPE_BYTES

_Count = Annotated[int, Meta(ge=0)]


class _Named(msgspec.Struct, frozen=True, kw_only=True):
    ref: Ref
    size: _Count

    @property
    def digest(self) -> Digest:
        """The digest of the context: what its bytes were checked against."""
        return parse_ref(self.ref).digest

    @property
    def kind(self) -> str:
        """The kind of the context."""
        return parse_ref(self.ref).kind


class Reading(_Named, frozen=True, kw_only=True):
    """A context that was read; ``size`` is in bytes, of the body under the digest."""


class Produced(_Named, frozen=True, kw_only=True, omit_defaults=True):
    """A context that was made; ``event_id`` is the event that carries it, when one does.

    ``reads`` of the contexts read had been read by then.  ``left_out``: how many more, that the receipt had no room
    for.
    """

    reads: _Count
    event_id: EventId | None = None
    left_out: _Count = 0


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a recorder has noted; the counts are of what it had no room for."""

    read: Sequence[Reading] = ()
    produced: Sequence[Produced] = ()
    left_out: int = 0
    left_out_produced: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing was read and nothing made."""
        return not (self.read or self.produced)


class ReadRecorder:
    """Takes note of the contexts that are read and made in working on one event.  Any thread may use it.

    Each context counts once: as an input from its first reading on, as an output from when it was first made.  It
    holds ``most`` of each; of those beyond, it keeps the number.
    """

    def __init__(self, *, most: int = MOST) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._read: dict[Ref, Reading] = {}
        self._produced: list[Produced] = []
        self._first: dict[Ref, int] = {}
        self._carried: set[tuple[Ref, str]] = set()
        self._left_out = 0
        self._left_out_produced = 0

    def read(self, ref: Ref, size: int) -> None:
        """Notes that a context was resolved."""
        with self._lock:
            if ref in self._read:
                return
            if len(self._read) >= self._most:
                self._left_out += 1
            else:
                self._read[ref] = Reading(ref=ref, size=size)

    def produced(self, ref: Ref, size: int, event_id: str | None = None) -> None:
        """Notes that a context was stored; ``event_id`` is the event that carries it, when there is one."""
        with self._lock:
            if ref not in self._first:
                self._add(Produced(ref=ref, size=size, reads=len(self._read), left_out=self._left_out))
            if event_id is not None:
                self._carry(ref, EventId(event_id))

    def referred(self, ref: Ref, event_id: str) -> None:
        """Notes that an event was emitted with a reference: of a context made here, that event carries it.

        Of any other, it hands on what somebody else made, and that is no output.
        """
        with self._lock:
            self._carry(ref, EventId(event_id))

    @property
    def count(self) -> int:
        """How many contexts were read and made so far."""
        return len(self._read) + len(self._produced)

    def record(self) -> Record:
        """Returns what was noted so far."""
        with self._lock:
            return Record(
                read=tuple(self._read.values()),
                produced=tuple(self._produced),
                left_out=self._left_out,
                left_out_produced=self._left_out_produced,
            )

    def _add(self, made: Produced) -> None:
        if len(self._produced) >= self._most:
            self._left_out_produced += 1
            return
        self._first.setdefault(made.ref, len(self._produced))
        self._produced.append(made)

    def _carry(self, ref: Ref, event_id: EventId) -> None:
        place = self._first.get(ref)
        if place is None or (ref, event_id) in self._carried:
            return
        made = self._produced[place]
        carried = msgspec.structs.replace(made, event_id=event_id)
        if made.event_id is None:
            self._produced[place] = carried
            self._carried.add((ref, event_id))
        elif len(self._carried) < self._most:
            self._carried.add((ref, event_id))
            self._add(carried)
        else:
            self._left_out_produced += 1


class ReceiptData(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The data of a receipt, or of one part of it."""

    handler: str | None = None
    read: list[Reading] = []
    produced: list[Produced] = []
    left_out: _Count = 0
    left_out_produced: _Count = 0
    receipt: str | None = None
    part: _Count = 0
    parts: Annotated[int, Meta(ge=1)] = 1


def receipt_events(
    context: Mapping[str, Any],
    record: Record,
    *,
    namespace: str,
    agent: str,
    receipt_id: EventId,
    timestamp_ms: int | None,
    handler: str | None = None,
) -> list[NewEvent]:
    """Returns the events that tell what was read and made in working on the event of ``context``, in normal form.

    One event, unless it does not fit one message.  To be published in this order: the one with ``receipt_id`` is the
    last, so that when it is stored all of them are.  ``timestamp_ms`` None leaves the time to the server, as for a
    receipt that may be written again.  Raises InvalidFieldError when ``context`` names no event.
    """
    event_id = context.get("event_id")
    if event_id is None:
        raise InvalidFieldError(
            "a receipt is of an event, and this lineage names none", field="event_id", hint="see hf.working_on"
        )
    parent = normal_event_id(namespace, str(event_id))[0]
    root = context.get("root_event_id", parent if context.get("parent_event_id") is None else None)
    depth = context.get("event_depth", 0 if context.get("parent_event_id") is None else 1)
    parts = _parts(record, handler)
    events = [
        NewEvent(
            namespace=namespace,
            agent_id=agent,
            name=RECEIPT,
            id=receipt_id if number == 0 else derived_event_id(namespace, "receipt-part", receipt_id, str(number)),
            timestamp_ms=timestamp_ms,
            data=_plain(data, number, len(parts), receipt_id),
            session_id=context.get("session_id"),
            correlation_id=context.get("correlation_id"),
            parent_event_id=parent,
            root_event_id=None if root is None else normal_event_id(namespace, str(root))[0],
            event_depth=min(depth + 1, MAX_DEPTH),
        )
        for number, data in enumerate(parts)
    ]
    return [*events[1:], events[0]]


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of work on an event, as its receipt tells it.

    ``read`` is in the order of first reading.  ``recorded_at``: when the work had ended.  ``left_out`` and
    ``left_out_produced`` count what the receipt had no room for, ``missing_parts`` the messages of it that are not
    stored.
    """

    receipt_id: EventId
    event_id: EventId
    handler: str | None
    agent_id: str
    recorded_at: datetime
    read: tuple[Reading, ...]
    produced: tuple[Produced, ...]
    left_out: int = 0
    left_out_produced: int = 0
    missing_parts: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether everything read and made is told."""
        return not (self.left_out or self.left_out_produced or self.missing_parts)

    def narrowed_to(self, ref: str) -> Work | None:
        """Returns the part of it that made one context: with what had been read by then; None when none did."""
        made = tuple(item for item in self.produced if item.ref == ref)
        if not made:
            return None
        return msgspec.structs.replace(
            self, read=self.read[: made[0].reads], produced=made, left_out=made[0].left_out, left_out_produced=0
        )

    def after(self, ref: str) -> tuple[Produced, ...]:
        """Returns what was made once a context had been read; nothing when it was not."""
        place = next((place for place, item in enumerate(self.read) if item.ref == ref), None)
        return () if place is None else tuple(item for item in self.produced if item.reads > place)


def receipt_data(event: Event) -> ReceiptData | None:
    """Returns the data of a receipt; None when it is none that can be read: any client may have sent it."""
    if event.name != RECEIPT or event.parent_event_id is None:
        return None
    try:
        data = msgspec.convert(event.data, ReceiptData)
        for item in (*data.read, *data.produced):
            parse_ref(item.ref)
    except (msgspec.ValidationError, InvalidRefError):
        return None
    return data if _is_of(event, data.receipt, data.part) else None


def works_of(events: Iterable[Event]) -> list[Work]:
    """Returns the pieces of work that receipts tell of, in the order of the receipts; parts are put together."""
    gathered: dict[str, dict[int, tuple[Event, ReceiptData]]] = {}
    for event in events:
        data = receipt_data(event)
        if data is not None:
            gathered.setdefault(data.receipt or event.event_id, {}).setdefault(data.part, (event, data))
    return [_joined(EventId(receipt_id), parts) for receipt_id, parts in gathered.items()]


def _is_of(event: Event, receipt_id: str | None, part: int) -> bool:
    """Whether an event is the part of a receipt that it says it is."""
    if receipt_id is None or part == 0:
        return receipt_id in (None, event.event_id)
    return event.event_id == derived_event_id(event.namespace, "receipt-part", receipt_id, str(part))


def _joined(receipt_id: EventId, parts: dict[int, tuple[Event, ReceiptData]]) -> Work:
    ordered = [parts[number] for number in sorted(parts)]
    event, first = ordered[0]
    assert event.parent_event_id is not None
    return Work(
        receipt_id=receipt_id,
        event_id=event.parent_event_id,
        handler=first.handler,
        agent_id=event.agent_id,
        recorded_at=event.timestamp,
        read=tuple(item for _, data in ordered for item in data.read),
        produced=tuple(item for _, data in ordered for item in data.produced),
        left_out=first.left_out,
        left_out_produced=first.left_out_produced,
        missing_parts=max(0, first.parts - len(ordered)),
    )


def _parts(record: Record, handler: str | None) -> list[ReceiptData]:
    parts = [ReceiptData(handler=handler, left_out=record.left_out, left_out_produced=record.left_out_produced)]
    size = 0
    items: list[Reading | Produced] = [*record.read, *record.produced]
    for item in items:
        bytes_of_item = len(msgspec.json.encode(item)) + 1
        if size + bytes_of_item > _PART_BYTES:
            parts.append(ReceiptData(handler=handler))
            size = 0
        size += bytes_of_item
        if isinstance(item, Produced):
            parts[-1].produced.append(item)
        else:
            parts[-1].read.append(item)
    return parts


def _plain(data: ReceiptData, number: int, parts: int, receipt_id: EventId) -> dict[str, Any]:
    if parts > 1:
        data = msgspec.structs.replace(data, receipt=receipt_id, part=number, parts=parts)
    members: dict[str, Any] = {"handler": data.handler, "read": [], "produced": []}
    members.update(msgspec.to_builtins(data))
    return members


__all__ = [
    "MOST",
    "Produced",
    "ReadRecorder",
    "Reading",
    "ReceiptData",
    "Record",
    "Work",
    "receipt_data",
    "receipt_events",
    "works_of",
]
