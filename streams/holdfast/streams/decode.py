"""From a stream's message to a row: pure functions, the same for archiver, live tail, ingester and replay.

An event may come from any NATS client that can write JSON.  What it may send::

    {"id"?, "timestamp"?, "session_id"?, "correlation_id"?, "parent_event_id"?, "root_event_id"?, "event_depth"?,
     "client_id"?, "originator"?, "context_ref"? | "context"? with "context_kind"?, "data"?, …}

Agent and name are in the subject.  An id that is not a UUID becomes a UUIDv8 of it, the original is kept as
``source_id``; without one it is taken from ``Nats-Msg-Id``, else from the message's place in the stream.  ``context``
is interned under its exact JSON text.  Members that Holdfast does not know are kept as ``extra``.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from holdfast.schemas import limits
from holdfast.schemas.bodies import check_json
from holdfast.schemas.errors import InvalidBodyError, InvalidFieldError, TooLargeError
from holdfast.schemas.ids import MAX_MS, derived_event_id, is_canonical_uuid, ms_from_utc, normal_event_id
from holdfast.schemas.names import check_kind
from holdfast.schemas.refs import Ref, compute_digest, format_ref, parse_ref
from holdfast.schemas.rows import ContextRow, EventRow, KeyVersionRow, Op, Row, Table
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.codec import unseal
from holdfast.streams.header_block import own_headers
from holdfast.streams.hot import NewContext
from holdfast.streams.wire import (
    H_MSG_ID,
    H_TRACEPARENT,
    message_id,
    parse_event_subject,
    parse_hot_subject,
    parse_key_subject,
)

if TYPE_CHECKING:
    from holdfast.streams.messages import StoredMessage

DEFAULT_EVENT_KIND: Final = "event"
"""The kind of an inline context that does not name one."""

_MEMBERS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ANY: Final = msgspec.json.Decoder()
MAX_DEPTH: Final = 2**31 - 1
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[\x21-\x7e]{0,200})?\Z")
_LARGEST_SECONDS: Final = 1e11
"""A numeric timestamp up to this (the year 5138) is in seconds, above it in milliseconds (from 1973 on)."""


class DecodedEvent(msgspec.Struct, frozen=True):
    """An event's row, and the context that came inline with it, still to be stored."""

    row: EventRow
    inline: NewContext | None = None


class EventBody(msgspec.Struct, omit_defaults=True, kw_only=True):
    """An event as Holdfast's own SDK writes it: nothing that the subject or a header says already."""

    timestamp: str | None = None
    session_id: str | None = None
    correlation_id: str | None = None
    parent_event_id: str | None = None
    root_event_id: str | None = None
    event_depth: int | None = None
    client_id: str | None = None
    originator: str | None = None
    context_ref: str | None = None
    data: msgspec.Raw | None = None
    attributes: msgspec.Raw | None = None
    source_id: str | None = None
    v: int | None = None


_Label = Annotated[str, Meta(max_length=limits.ID_CHARS)]
_Milliseconds = Annotated[int, Meta(ge=0, le=MAX_MS)]


class KeyVersionBody(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A version of a named context on the wire.

    ``at`` is a hint for readers, and no part of the version: where the parts of its body stood in the hot tier when it
    was written, in order, as the highest sequence and then, for each part, how far it is below that.  The time is left
    out when ``event_id`` says it.
    """

    version: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    op: Op
    ref: str | None = None
    event_id: _Label | None = None
    changed_by: _Label | None = None
    change_type: _Label | None = None
    tags: Annotated[tuple[_Label, ...], Meta(max_length=limits.TAGS)] = ()
    session_id: _Label | None = None
    agent_id: _Label | None = None
    timestamp_ms: _Milliseconds | None = None
    expires_at_ms: _Milliseconds | None = None
    source: _Label | None = None
    confidence: float | None = None
    proposed_by: _Label | None = None
    approved_by: _Label | None = None
    approved_at_ms: _Milliseconds | None = None
    at: tuple[int, ...] = ()
    v: Literal[1] = 1


_KEY_VERSION: Final = msgspec.json.Decoder(KeyVersionBody)


def decode_row(table: Table, message: StoredMessage) -> Row:
    """Returns the row of a message of the stream that feeds ``table``; raises a typed error when it is none."""
    if table == "contexts":
        return decode_context(message)
    if table == "events":
        return decode_event(message).row
    return decode_key_version(message)


def decode_context(message: StoredMessage) -> ContextRow:
    """Returns the context of a hot-tier message, checked against its digest (a manifest stays one)."""
    namespace, digest = parse_hot_subject(message.subject)
    return unseal(
        namespace,
        digest,
        own_headers(message.headers),
        message.payload,
        stored_at_ms=message.stored_at_ms,
        epoch=message.epoch,
        seq=message.seq,
    )


def decode_event(message: StoredMessage) -> DecodedEvent:
    """Returns the event of a message, and the context it carries inline; raises a typed error naming the field."""
    address = parse_event_subject(message.subject)
    if len(message.payload) > limits.EVENT_BYTES:
        raise TooLargeError(
            f"event has {len(message.payload)} bytes, the limit is {limits.EVENT_BYTES}",
            field="event",
            limit=limits.EVENT_BYTES,
        )
    members = _Members(message.payload)
    namespace = address.namespace
    event_id, source_id = _identity(namespace, members, message)
    parent = _lineage_id(namespace, members.text("parent_event_id"))
    root = _lineage_id(namespace, members.text("root_event_id"))
    context_ref, inline = _context(namespace, members)
    timestamp_ms = _timestamp(members.value("timestamp"), event_id, message.stored_at_ms)
    row = EventRow(
        namespace=namespace,
        id=event_id,
        name=address.name,
        agent_id=address.agent,
        stored_at_ms=message.stored_at_ms,
        epoch=message.epoch,
        seq=message.seq,
        timestamp_ms=timestamp_ms,
        session_id=members.text("session_id"),
        correlation_id=members.text("correlation_id"),
        parent_event_id=parent,
        # An event without a parent is its own root; with a parent and no stated root, the root is not known.
        root_event_id=root or (event_id if parent is None else None),
        event_depth=members.count("event_depth", default=0 if parent is None else 1),
        client_id=members.text("client_id"),
        originator=members.text("originator"),
        context_ref=context_ref,
        data=members.raw("data"),
        source_id=members.text("source_id") or source_id,
        traceparent=_traceparent(message.headers.get(H_TRACEPARENT)),
        extra=members.rest(),
    )
    return DecodedEvent(row, inline)


def decode_key_version(message: StoredMessage) -> KeyVersionRow:
    """Returns the version of a named context that a message holds; raises a typed error when it is none."""
    return decode_key_head(message)[0]


def decode_key_head(message: StoredMessage) -> tuple[KeyVersionRow, tuple[int, ...]]:
    """Returns a version, as :func:`decode_key_version`, and its hint where the parts of its body stand."""
    namespace, key = parse_key_subject(message.subject)
    check_json(message.payload, field="key version")
    try:
        body = _KEY_VERSION.decode(message.payload)
    except UNDECODABLE as error:
        raise InvalidFieldError(f"key version does not decode: {error}", field="key version") from error
    ref = None
    if body.ref is not None:
        parse_ref(body.ref)
        ref = Ref(body.ref)
    row = KeyVersionRow(
        namespace=namespace,
        key=key,
        version=body.version,
        op=body.op,
        timestamp_ms=_version_time(body, message.stored_at_ms),
        stored_at_ms=message.stored_at_ms,
        epoch=message.epoch,
        seq=message.seq,
        ref=ref,
        # Whoever writes versions by hand may name any id: a UUID is what the lake has a column for.
        event_id=None if body.event_id is None else normal_event_id(namespace, body.event_id)[0],
        changed_by=body.changed_by,
        change_type=body.change_type,
        tags=body.tags,
        session_id=body.session_id,
        agent_id=body.agent_id,
        expires_at_ms=body.expires_at_ms,
        source=body.source,
        confidence=body.confidence,
        proposed_by=body.proposed_by,
        approved_by=body.approved_by,
        approved_at_ms=body.approved_at_ms,
    )
    return row, body.at


def encode_key_version(row: KeyVersionRow, at: tuple[int, ...] = ()) -> bytes:
    """Returns the payload of a version's message: what its subject says, and what can be derived, is left out."""
    of_id = None if row.event_id is None else _time_of(row.event_id)
    return msgspec.json.encode(
        KeyVersionBody(
            version=row.version,
            op=row.op,
            ref=row.ref,
            event_id=row.event_id,
            changed_by=row.changed_by,
            change_type=row.change_type,
            tags=row.tags,
            session_id=row.session_id,
            agent_id=row.agent_id,
            timestamp_ms=None if row.timestamp_ms == of_id else row.timestamp_ms,
            expires_at_ms=row.expires_at_ms,
            source=row.source,
            confidence=row.confidence,
            proposed_by=row.proposed_by,
            approved_by=row.approved_by,
            approved_at_ms=row.approved_at_ms,
            at=at,
        )
    )


def _version_time(body: KeyVersionBody, stored_at_ms: int) -> int:
    if body.timestamp_ms is not None:
        return body.timestamp_ms
    of_id = None if body.event_id is None else _time_of(body.event_id)
    return stored_at_ms if of_id is None else of_id


def _time_of(event_id: str) -> int | None:
    """As :func:`_time_in`, of any text."""
    return _time_in(event_id) if is_canonical_uuid(event_id) else None


class _Members:
    """The members of an event's JSON object, each taken once, so that the rest can be kept as it is."""

    def __init__(self, payload: bytes) -> None:
        check_json(payload, field="event")
        try:
            self._members: dict[str, msgspec.Raw] = _MEMBERS.decode(payload)
        except msgspec.ValidationError as error:
            raise InvalidBodyError(
                "event is not a JSON object", field="event", hint='send {"data": …, "context": …}'
            ) from error
        version = self.value("v")
        if version not in (None, 1):
            raise InvalidFieldError(
                f"event has version {repr(version)[:40]}, this release reads 1", field="v", hint="upgrade holdfast"
            )

    def raw(self, field: str) -> bytes | None:
        """The exact JSON text of a member; None when it is absent or null."""
        taken = self._members.pop(field, None)
        if taken is None:
            return None
        text = bytes(taken).strip()
        return None if text == b"null" else text

    def value(self, field: str) -> Any:
        text = self.raw(field)
        return None if text is None else _ANY.decode(text)

    def text(self, field: str) -> str | None:
        value = self.value(field)
        if value is None or (isinstance(value, str) and 0 < len(value) <= limits.ID_CHARS):
            return value
        raise InvalidFieldError(
            f"{field} is not text of 1 to {limits.ID_CHARS} characters", field=field, limit=limits.ID_CHARS
        )

    def count(self, field: str, default: int) -> int:
        value = self.value(field)
        if value is None:
            return default
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_DEPTH:
            return value
        raise InvalidFieldError(f"{field} is not a whole number from 0 to {MAX_DEPTH}", field=field, limit=MAX_DEPTH)

    def rest(self) -> bytes | None:
        return msgspec.json.encode(self._members) if self._members else None


def _identity(namespace: str, members: _Members, message: StoredMessage) -> tuple[str, str | None]:
    given = members.text("id") or members.text("event_id")
    if given is None:
        header = message.headers.get(H_MSG_ID, "")
        given = header.removeprefix(message_id(namespace, "")) or None
        if given is not None and len(given) > limits.ID_CHARS:
            raise InvalidFieldError(f"{H_MSG_ID} is over {limits.ID_CHARS} characters", field=H_MSG_ID)
    if given is None:
        return derived_event_id(namespace, "position", message.epoch, str(message.seq)), None
    return normal_event_id(namespace, given)


def _traceparent(given: str | None) -> str | None:
    # W3C Trace Context: one that does not parse is ignored, as if it had not been sent.
    return given if given is not None and is_traceparent(given) else None


def is_traceparent(given: object) -> bool:
    """Whether ``given`` has the form of a W3C ``traceparent``, of this or of a later version."""
    return isinstance(given, str) and _TRACEPARENT.match(given) is not None


def _lineage_id(namespace: str, given: str | None) -> str | None:
    return None if given is None else normal_event_id(namespace, given)[0]


def _context(namespace: str, members: _Members) -> tuple[Ref | None, NewContext | None]:
    ref = members.value("context_ref")
    body = members.raw("context")
    kind = members.value("context_kind")
    if body is None:
        if ref is None:
            return None, None
        parse_ref(ref)
        return Ref(ref), None
    if ref is not None:
        raise InvalidFieldError(
            "event carries both context and context_ref", field="context", hint="send one of the two"
        )
    kind = check_kind(DEFAULT_EVENT_KIND if kind is None else kind)
    return format_ref(kind, compute_digest(namespace, kind, body)), NewContext(
        namespace=namespace, kind=kind, body=body
    )


def _timestamp(value: Any, event_id: str, stored_at_ms: int) -> int:
    """Milliseconds of the producer's time: as given, else as its UUIDv7 says, else the server's."""
    if value is None:
        of_id = _time_in(event_id)
        return stored_at_ms if of_id is None else of_id
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError as error:
            raise _bad_timestamp(value) from error
        result = ms_from_utc(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        result = math.floor(value * 1000 if abs(value) <= _LARGEST_SECONDS else value)
    else:
        raise _bad_timestamp(value)
    if not 0 <= result <= MAX_MS:
        raise _bad_timestamp(value)
    return result


def _bad_timestamp(value: object) -> InvalidFieldError:
    return InvalidFieldError(
        f"timestamp {repr(value)[:60]} is not ISO 8601, seconds or milliseconds from 1970 to 9999",
        field="timestamp",
    )


def timestamps_agree(event_id: str, timestamp_ms: int) -> bool:
    """Whether an event's time need not be sent, since its UUIDv7 says the same."""
    return _time_in(event_id) == timestamp_ms


def _time_in(event_id: str) -> int | None:
    """The milliseconds that a UUIDv7 begins with; None for another version, or when they are beyond the year 9999."""
    if event_id[14] != "7":
        return None
    at_ms = int(event_id.replace("-", "")[:12], 16)
    return at_ms if at_ms <= MAX_MS else None


__all__ = [
    "DEFAULT_EVENT_KIND",
    "DecodedEvent",
    "EventBody",
    "KeyVersionBody",
    "decode_context",
    "decode_event",
    "decode_key_head",
    "decode_key_version",
    "decode_row",
    "encode_key_version",
    "is_traceparent",
    "timestamps_agree",
]
