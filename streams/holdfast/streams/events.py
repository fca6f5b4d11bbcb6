"""The event log: what happened, in order, carrying references instead of contexts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.schemas import limits
from holdfast.schemas.bodies import check_nesting, encode_json
from holdfast.schemas.errors import InvalidFieldError, TooLargeError
from holdfast.schemas.ids import MAX_MS, is_canonical_uuid, iso_from_ms, new_event_id, now_ms, unpacked_source_id
from holdfast.schemas.lineage import ATTRIBUTES
from holdfast.schemas.names import is_well_formed
from holdfast.schemas.refs import Ref, parse_ref
from holdfast.streams.committer import Committer, Settled
from holdfast.streams.decode import MAX_DEPTH, EventBody, is_traceparent, timestamps_agree
from holdfast.streams.publish import Outgoing
from holdfast.streams.wire import H_MSG_ID, H_TRACEPARENT, event_subject, message_id

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection


class NewEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event to be published.  ``id`` makes a repetition harmless: one id is stored once.

    ``timestamp_ms`` None leaves the time to the server: what a producer repeats without knowing when it happened must
    say the same each time.
    """

    namespace: str
    agent_id: str
    name: str
    id: str = msgspec.field(default_factory=new_event_id)
    timestamp_ms: int | None = msgspec.field(default_factory=now_ms)
    data: Any = None
    context_ref: Ref | None = None
    session_id: str | None = None
    correlation_id: str | None = None
    parent_event_id: str | None = None
    root_event_id: str | None = None
    event_depth: int = 0
    client_id: str | None = None
    originator: str | None = None
    source_id: str | None = None
    traceparent: str | None = None
    attributes: dict[str, Any] | None = None


class EventLog:
    """Publishes events durably, many at once."""

    def __init__(self, connection: Connection) -> None:
        self._committer = Committer(connection)

    async def publish_many(self, events: Sequence[NewEvent]) -> list[Settled]:
        """Stores events durably, in order, and tells of each whether its id was known already.

        Raises a typed error for what may not be published, before anything is sent.
        """
        return await self._committer.store_many([encode_event(event) for event in events])

    async def close(self) -> None:
        """Waits until every event that was handed in has an outcome."""
        await self._committer.close()


def encode_event(event: NewEvent) -> Outgoing:
    """Returns the message of an event; raises a typed error naming the field that may not be sent."""
    for field in ("session_id", "correlation_id", "client_id", "originator", "source_id"):
        value = getattr(event, field)
        if value is not None:
            check_id_text(value, field)
    for field in ("id", "parent_event_id", "root_event_id"):
        _check_event_id(getattr(event, field), field, is_optional=field != "id")
    if event.context_ref is not None:
        parse_ref(event.context_ref)
    if event.timestamp_ms is not None and not 0 <= event.timestamp_ms <= MAX_MS:
        raise InvalidFieldError("timestamp is not from 1970 to 9999", field="timestamp", limit=MAX_MS)
    if not 0 <= event.event_depth <= MAX_DEPTH:
        raise InvalidFieldError(
            f"event_depth is not a whole number from 0 to {MAX_DEPTH}", field="event_depth", limit=MAX_DEPTH
        )
    if event.traceparent is not None and not is_traceparent(event.traceparent):
        raise InvalidFieldError(
            f"traceparent {repr(event.traceparent)[:60]} is not of the W3C form",
            field="traceparent",
            hint="leave it out",
        )
    if isinstance(event.data, bytes | bytearray | memoryview):
        raise InvalidFieldError("data is bytes, not JSON", field="data", hint="put bytes as a context instead")
    at_ms = event.timestamp_ms
    is_derived_root = event.root_event_id == event.id and event.parent_event_id is None
    body = EventBody(
        timestamp=None if at_ms is None or timestamps_agree(event.id, at_ms) else iso_from_ms(at_ms),
        session_id=event.session_id,
        correlation_id=event.correlation_id,
        parent_event_id=event.parent_event_id,
        # What a reader derives is not sent: a root of itself, the depth of a root or of its child.
        root_event_id=None if is_derived_root else event.root_event_id,
        event_depth=event.event_depth if event.event_depth != (0 if event.parent_event_id is None else 1) else None,
        client_id=event.client_id,
        originator=event.originator,
        context_ref=event.context_ref,
        data=_raw_json(event.data, "data"),
        attributes=_raw_json(event.attributes, ATTRIBUTES),
        source_id=None if event.source_id == unpacked_source_id(event.id) else event.source_id,
    )
    payload = msgspec.json.encode(body)
    if len(payload) > limits.EVENT_BYTES:
        raise TooLargeError(
            f"event has {len(payload)} bytes, the limit is {limits.EVENT_BYTES}",
            field="data",
            limit=limits.EVENT_BYTES,
            hint="store what is large with put, and pass its reference as context",
        )
    headers = {H_MSG_ID: message_id(event.namespace, event.id)}
    if event.traceparent is not None:
        headers[H_TRACEPARENT] = event.traceparent
    return Outgoing(event_subject(event.namespace, event.agent_id, event.name), headers, payload)


def _raw_json(value: Any, field: str) -> msgspec.Raw | None:
    if value is None:
        return None
    raw = encode_json(value, field=field)
    check_nesting(raw, field=field)
    return msgspec.Raw(raw)


def check_id_text(value: object, field: str) -> str:
    """Returns ``value`` when it is well-formed text of 1 to 256 characters; raises InvalidFieldError otherwise."""
    if isinstance(value, str) and 0 < len(value) <= limits.ID_CHARS and is_well_formed(value):
        return value
    raise InvalidFieldError(
        f"{field} is not well-formed text of 1 to {limits.ID_CHARS} characters", field=field, limit=limits.ID_CHARS
    )


def _check_event_id(value: object, field: str, *, is_optional: bool) -> None:
    if value is None and is_optional:
        return
    # A reader turns anything else into another id: what was sent would not be found again under it.
    if not (isinstance(value, str) and is_canonical_uuid(value)):
        raise InvalidFieldError(
            f"{field} {repr(value)[:60]} is not a UUID in canonical form", field=field, hint="use normal_event_id"
        )
