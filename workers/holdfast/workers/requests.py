"""What the resolver is asked and what it answers: one Struct each, every field with its limit."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from holdfast.client.model import Tier
from holdfast.lake.lineage import LIMIT_DEFAULT
from holdfast.lake.scan import EventFilter, query_events
from holdfast.schemas import limits
from holdfast.schemas.bodies import TEXT, check_content_type, check_json, check_size, encode_body
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.ids import MAX_MS, iso_from_ms, ms_from_utc, normal_event_id
from holdfast.schemas.names import check_kind
from holdfast.schemas.refs import JSON
from holdfast.streams.hot import NewContext

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from holdfast.lake.duck import Connection as LakeConnection
    from holdfast.lake.scan import EventPage
    from holdfast.schemas.rows import ContextRow, EventRow

_Id = Annotated[str, Meta(min_length=1, max_length=limits.ID_CHARS)]

FIELDS: Final = (
    "ref", "kind", "body", "body_text", "body_base64", "size", "created_at", "tier", "content_type", "expires_at",
)  # fmt: skip
"""What an answer tells of a context."""

EVENT_FIELDS: Final = (
    "event_id", "name", "namespace", "agent_id", "timestamp", "stored_at", "session_id", "correlation_id",
    "parent_event_id", "root_event_id", "event_depth", "client_id", "originator", "context_ref", "data", "extra",
    "source_id", "traceparent",
)  # fmt: skip
"""What an answer tells of an event."""

_JSON_FIELDS: Final = frozenset({"data", "extra"})


class ResolveRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for one context; ``fields`` limits the answer to these of :data:`FIELDS`."""

    ref: str
    fields: list[str] | None = None


class ResolveBatchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for up to 1,000 contexts."""

    refs: Annotated[list[str], Meta(max_length=limits.BATCH_REFS)]
    fields: list[str] | None = None


class PutRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks to store a context: exactly one of ``body`` (JSON, stored as its exact text), ``body_text``,
    ``body_base64``."""

    kind: str = "context"
    body: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    body_text: str | None = None
    body_base64: str | None = None
    content_type: str | None = None
    expires_at: datetime | None = None


class QueryRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for events; all conditions given must hold.  Times are of storing: ISO 8601 or milliseconds since 1970.

    ``fields`` limits what is told of each event to these of :data:`EVENT_FIELDS`.  Receipts are left out unless
    ``receipts`` is set, or ``name`` or ``event_id`` asks for them.
    """

    session_id: _Id | None = None
    agent_id: Annotated[str, Meta(min_length=1, max_length=limits.NAME_BYTES)] | None = None
    correlation_id: _Id | None = None
    event_id: _Id | None = None
    kind: Annotated[str, Meta(min_length=1, max_length=limits.KIND_CHARS)] | None = None
    name: Annotated[str, Meta(min_length=1, max_length=limits.EVENT_NAME_BYTES)] | None = None
    since: str | int | None = None
    until: str | int | None = None
    limit: Annotated[int, Meta(ge=1, le=limits.QUERY_LIMIT_MAX)] = limits.QUERY_LIMIT_DEFAULT
    cursor: Annotated[str, Meta(max_length=1_000)] | None = None
    root_event_id: _Id | None = None
    parent_event_id: _Id | None = None
    context_ref: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    originator: _Id | None = None
    receipts: bool = False
    fields: list[str] | None = None


class MetricsRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for the metrics, as JSON or as the text that Prometheus reads."""

    format: Literal["json", "prometheus"] = "json"


class ChainRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for an event's ancestors and itself."""

    event_id: _Id
    cursor: Annotated[str, Meta(max_length=1_000)] | None = None
    limit: Annotated[int, Meta(ge=1, le=limits.QUERY_LIMIT_MAX)] = LIMIT_DEFAULT
    fields: list[str] | None = None


class TreeRequest(ChainRequest, frozen=True, forbid_unknown_fields=True):
    """Asks for the events below an event."""

    receipts: bool = False


class ContextReply(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One context.  Its body is in ``body`` (JSON, exact text), ``body_text`` or ``body_base64``."""

    ref: str
    kind: str
    size: int
    created_at: str
    tier: Tier
    content_type: str
    body: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    body_text: str | msgspec.UnsetType = msgspec.UNSET
    body_base64: str | msgspec.UnsetType = msgspec.UNSET
    expires_at: str | msgspec.UnsetType = msgspec.UNSET


class PackedReply(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One context as msgpack has it: ``body`` is the exact bytes, whatever they are."""

    ref: str
    kind: str
    size: int
    created_at: str
    tier: Tier
    content_type: str
    body: bytes
    expires_at: str | msgspec.UnsetType = msgspec.UNSET


def context_of_put(namespace: str, request: PutRequest) -> NewContext:
    """Returns the context that a put asks to store; raises a typed error naming the field that does not fit."""
    given = [
        name
        for name, present in (
            ("body", request.body is not msgspec.UNSET),
            ("body_text", request.body_text is not None),
            ("body_base64", request.body_base64 is not None),
        )
        if present
    ]
    if len(given) != 1:
        raise InvalidFieldError(
            f"put carries {' and '.join(given) or 'no body'}",
            field="body",
            hint="send one of body, body_text, body_base64",
        )
    if not isinstance(request.body, msgspec.UnsetType):
        raw = bytes(request.body).strip()
        content_type = JSON if request.content_type is None else check_content_type(request.content_type)
        check_size(raw)
        check_json(raw, field="body")
    elif request.body_text is not None:
        raw, content_type = encode_body(request.body_text, request.content_type or TEXT)
    else:
        raw, content_type = encode_body(_from_base64(request.body_base64 or ""), request.content_type)
    return NewContext(
        namespace=namespace,
        kind=check_kind(request.kind),
        body=raw,
        content_type=content_type,
        expires_at_ms=_expiry(request.expires_at),
    )


def context_reply(row: ContextRow, tier: Tier) -> ContextReply:
    """Returns the answer for a context."""
    reply = ContextReply(
        ref=row.ref,
        kind=row.kind,
        size=row.size,
        created_at=iso_from_ms(row.stored_at_ms),
        tier=tier,
        content_type=row.content_type,
        expires_at=msgspec.UNSET if row.expires_at_ms is None else iso_from_ms(row.expires_at_ms),
    )
    if row.content_type == JSON and _is_json(row.body):
        return msgspec.structs.replace(reply, body=msgspec.Raw(row.body))
    if row.content_type.startswith("text/"):
        try:
            return msgspec.structs.replace(reply, body_text=row.body.decode())
        except UnicodeDecodeError:
            pass  # said to be text and is not: as bytes it is exact
    return msgspec.structs.replace(reply, body_base64=base64.b64encode(row.body).decode())


def packed_reply(row: ContextRow, tier: Tier) -> PackedReply:
    """Returns the answer for a context, for msgpack."""
    return PackedReply(
        ref=row.ref,
        kind=row.kind,
        size=row.size,
        created_at=iso_from_ms(row.stored_at_ms),
        tier=tier,
        content_type=row.content_type,
        body=row.body,
        expires_at=msgspec.UNSET if row.expires_at_ms is None else iso_from_ms(row.expires_at_ms),
    )


def choose_fields(reply: ContextReply | PackedReply, fields: list[str] | None) -> object:
    """Returns the answer with these fields only; None means all of them."""
    if fields is None:
        return reply
    return {name: value for name in fields if (value := getattr(reply, name, msgspec.UNSET)) is not msgspec.UNSET}


def check_fields(fields: list[str] | None, choices: tuple[str, ...] = FIELDS) -> None:
    """Raises InvalidFieldError when a field is asked for that an answer does not have."""
    for name in fields or ():
        if name not in choices:
            raise InvalidFieldError(
                f"there is no field {name[:40]!r}", field="fields", hint=f"choose from {', '.join(choices)}"
            )


def needs_json(fields: list[str] | None) -> bool:
    """Whether an answer with these fields of events holds any of their JSON."""
    return fields is None or not _JSON_FIELDS.isdisjoint(fields)


def event_reply(row: EventRow, fields: list[str] | None = None) -> dict[str, Any]:
    """Returns an event, or these fields of it, as the answer of a query holds it; absent members are left out."""
    members: dict[str, Any] = {
        "event_id": row.id,
        "name": row.name,
        "namespace": row.namespace,
        "agent_id": row.agent_id,
        "timestamp": iso_from_ms(row.timestamp_ms),
        "stored_at": iso_from_ms(row.stored_at_ms),
        "session_id": row.session_id,
        "correlation_id": row.correlation_id,
        "parent_event_id": row.parent_event_id,
        "root_event_id": row.root_event_id,
        "event_depth": row.event_depth,
        "client_id": row.client_id,
        "originator": row.originator,
        "context_ref": row.context_ref,
        "data": None if row.data is None else msgspec.Raw(row.data),
        "extra": None if row.extra is None else msgspec.Raw(row.extra),
        "source_id": row.source_id,
        "traceparent": row.traceparent,
    }
    return {name: members[name] for name in fields or EVENT_FIELDS if members[name] is not None}


def query_of(namespace: str, request: QueryRequest) -> Callable[[LakeConnection], EventPage]:
    """Returns what runs a query; raises InvalidFieldError for a time that is none."""
    where = EventFilter(
        namespace=namespace,
        session_id=request.session_id,
        agent_id=request.agent_id,
        correlation_id=request.correlation_id,
        event_id=_known_id(namespace, request.event_id),
        kind=request.kind,
        name=request.name,
        root_event_id=_known_id(namespace, request.root_event_id),
        parent_event_id=_known_id(namespace, request.parent_event_id),
        context_ref=request.context_ref,
        originator=request.originator,
        receipts=request.receipts,
    )
    since = None if request.since is None else time_ms(request.since, "since")
    until = None if request.until is None else time_ms(request.until, "until")
    return lambda lake: query_events(
        lake,
        where,
        since_ms=since,
        until_ms=until,
        limit=request.limit,
        cursor=request.cursor,
        json=needs_json(request.fields),
    )


def _known_id(namespace: str, given: str | None) -> str | None:
    return None if given is None else event_id_of(namespace, given)


class EventsReply:
    """Events of an answer, as many as it has room for."""

    def __init__(self, rows: Sequence[EventRow], fields: list[str] | None) -> None:
        self.items: list[msgspec.Raw] = []
        self.last: EventRow | None = None
        size = 0
        for row in rows:
            encoded = msgspec.json.encode(event_reply(row, fields))
            size += len(encoded) + 1
            # The first one always goes: an answer without progress would be asked for again for ever.
            if size > limits.REPLY_BYTES and self.items:
                break
            self.items.append(msgspec.Raw(encoded))
            self.last = row
        self.is_whole = len(self.items) == len(rows)


def _expiry(moment: datetime | None) -> int | None:
    if moment is None:
        return None
    at_ms = ms_from_utc(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    # A context stored with such an expiry could not be read again.
    if not 0 <= at_ms <= MAX_MS:
        raise InvalidFieldError(
            f"expires_at {moment.isoformat()} is not from 1970 to 9999", field="expires_at", limit=MAX_MS
        )
    return at_ms


def event_id_of(namespace: str, given: str) -> str:
    """Returns the id under which an event is stored: a producer's own id that is no UUID has one derived from it."""
    return normal_event_id(namespace, given)[0]


def time_ms(value: str | int, field: str) -> int:
    """Returns milliseconds since 1970 of ISO 8601 text or of a number that is that already."""
    if isinstance(value, int):
        return value
    try:
        moment = datetime.fromisoformat(value)
        aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return round(aware.timestamp() * 1000)
    except (ValueError, OverflowError) as error:
        raise InvalidFieldError(
            f"{field} {value[:60]!r} is not ISO 8601", field=field, hint="such as 2026-01-31T09:30:00Z"
        ) from error


def _is_json(body: bytes) -> bool:
    # Bytes may have been stored under application/json by any client: they are checked before they become part of a
    # reply, which must be JSON as a whole.
    try:
        check_json(body)
    except InvalidFieldError:
        return False
    return True


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise InvalidFieldError("body_base64 is not base64", field="body_base64") from error
