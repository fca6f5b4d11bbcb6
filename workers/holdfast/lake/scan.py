"""Events by session, agent, correlation, root, parent, reference, kind, name or time, a page at a time.

The order is that of storing: (``stored_at``, epoch, sequence), oldest first.  It never changes and new events come
last, so a cursor neither skips nor repeats an event whatever is stored meanwhile, and a reader at the end can ask
again with its last cursor.  Values are bound, never part of the SQL.
"""

from __future__ import annotations

import base64
import uuid
from typing import Any, Final, Protocol

import msgspec

from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.limits import QUERY_LIMIT_DEFAULT, QUERY_LIMIT_MAX
from holdfast.schemas.lineage import OWN_NAMES
from holdfast.schemas.refs import Ref, parse_ref
from holdfast.schemas.rows import EventRow


class EventFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which events: all given fields must match.  ``kind`` is that of the event's context.

    Holdfast's own events (receipts, and what it tells handlers: names that begin with ``holdfast:``) are left out,
    unless ``receipts`` is set, or ``name`` or ``event_id`` asks for them.
    """

    namespace: str | None = None
    session_id: str | None = None
    agent_id: str | None = None
    correlation_id: str | None = None
    event_id: str | None = None
    kind: str | None = None
    name: str | None = None
    root_event_id: str | None = None
    parent_event_id: str | None = None
    context_ref: str | None = None
    originator: str | None = None
    receipts: bool = False


class EventPage(msgspec.Struct, frozen=True):
    """Some events in order.  ``cursor`` continues after the last of them; None when there were none."""

    events: list[EventRow]
    cursor: str | None


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where an event stands in the order of storing."""

    stored_at_ms: int
    epoch: str
    seq: int


class _Sql(Protocol):
    def execute(self, query: Any, parameters: Any = ..., /) -> Any: ...


_PLACE: Final = msgspec.json.Decoder(Place)
_MAX_MS: Final = 253_402_300_799_999
_TEXT_FILTERS: Final = ("namespace", "session_id", "agent_id", "correlation_id", "name", "context_ref", "originator")
_ID_FILTERS: Final = ("event_id", "root_event_id", "parent_event_id")
_DIGEST_CHARS: Final = 32

_COLUMNS: Final = """namespace, CAST(event_id AS VARCHAR), name, agent_id, epoch_ms(stored_at), epoch, stream_seq,
    epoch_ms("timestamp"), session_id, correlation_id, CAST(parent_event_id AS VARCHAR),
    CAST(root_event_id AS VARCHAR), event_depth, client_id, originator, context_ref, {data}, {extra}, source_id,
    traceparent"""

SELECT_EVENTS: Final = f"SELECT {_COLUMNS.format(data='data', extra='extra')}\nFROM events\n"
"""Selects what :func:`event_of_row` makes an event of; conditions and the like are to follow."""

SELECT_PLACES: Final = f"SELECT {_COLUMNS.format(data='NULL', extra='NULL')}\nFROM events\n"
"""The same without the JSON of the events, which is most of their bytes."""


def query_events(
    connection: _Sql,
    where: EventFilter,
    *,
    since_ms: int | None = None,
    until_ms: int | None = None,
    limit: int = QUERY_LIMIT_DEFAULT,
    cursor: str | None = None,
    json: bool = True,
) -> EventPage:
    """Returns the next events that match, oldest first; without ``json`` their ``data`` and ``extra`` are left out.

    ``connection`` is one of :func:`holdfast.lake.connect`, or any DuckDB connection that has the views.  Times are
    those of storing: ``since_ms`` inclusive, ``until_ms`` exclusive.  Raises InvalidFieldError for a value that can
    match nothing by its form: a limit out of range, a cursor not of ours, an event id that is no UUID; InvalidRefError
    for a ``context_ref`` that is no reference.
    """
    if not 1 <= limit <= QUERY_LIMIT_MAX:
        raise InvalidFieldError(
            f"limit {limit} is not 1 to {QUERY_LIMIT_MAX}", field="limit", limit=QUERY_LIMIT_MAX, hint="use the cursor"
        )
    conditions, values = _conditions(where)
    if since_ms is not None:
        conditions.append("stored_at >= make_timestamp_ms(?)")
        values.append(_check_time(since_ms, "since"))
    if until_ms is not None:
        conditions.append("stored_at < make_timestamp_ms(?)")
        values.append(_check_time(until_ms, "until"))
    if cursor is not None:
        place = decode_cursor(cursor)
        # The first condition says less than the second, but can be pushed into the files.
        conditions.append("stored_at >= make_timestamp_ms(?)")
        conditions.append("(stored_at, epoch, stream_seq) > (make_timestamp_ms(?), ?, ?)")
        values += [place.stored_at_ms, place.stored_at_ms, place.epoch, place.seq]
    sql = SELECT_EVENTS if json else SELECT_PLACES
    if conditions:
        sql += f"WHERE {' AND '.join(conditions)}\n"
    sql += "ORDER BY stored_at, epoch, stream_seq LIMIT ?"
    rows = connection.execute(sql, [*values, limit]).fetchall()
    events = [event_of_row(row) for row in rows]
    last = events[-1] if events else None
    return EventPage(events, cursor if last is None else encode_cursor(last))


def _conditions(where: EventFilter) -> tuple[list[str], list[object]]:
    conditions: list[str] = []
    values: list[object] = []
    for field in _TEXT_FILTERS:
        value = getattr(where, field)
        if value is not None:
            conditions.append(f"{field} = ?")
            values.append(value)
    for field in _ID_FILTERS:
        value = getattr(where, field)
        if value is not None:
            conditions.append(f"{field} = CAST(? AS UUID)")
            values.append(check_uuid(value, field))
    if where.context_ref is not None:
        parse_ref(where.context_ref)
    if not where.receipts and where.name is None and where.event_id is None:
        conditions.append("NOT starts_with(name, ?)")
        values.append(OWN_NAMES)
    if where.kind is not None:
        # A digest has no underscore and a fixed length, so prefix and length pin the kind.
        prefix = f"ctx_{where.kind}_"
        conditions.append("starts_with(context_ref, ?) AND length(context_ref) = ?")
        values += [prefix, len(prefix) + _DIGEST_CHARS]
    return conditions, values


def check_uuid(text: str, field: str = "event_id") -> str:
    """Returns a UUID in its usual form; raises InvalidFieldError naming the field when it is none."""
    try:
        return str(uuid.UUID(text))
    except ValueError as error:
        raise InvalidFieldError(
            f"event id {text[:80]!r} is not a UUID", field=field, hint="give the id that emit returned"
        ) from error


def _check_time(at_ms: int, field: str) -> int:
    if not 0 <= at_ms <= _MAX_MS:
        raise InvalidFieldError(f"{field} {at_ms} is not in milliseconds of the years 1970 to 9999", field=field)
    return at_ms


def encode_cursor(last: EventRow) -> str:
    """Returns the cursor that goes on after an event, in the order of storing."""
    raw = msgspec.json.encode(Place(last.stored_at_ms, last.epoch, last.seq))
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def decode_cursor(cursor: str) -> Place:
    """Returns the place of a cursor of :func:`encode_cursor`; raises InvalidFieldError when it is not one of ours."""
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        place = _PLACE.decode(raw)
        if 0 <= place.stored_at_ms <= _MAX_MS and 0 <= place.seq < 1 << 63:
            return place
    except (ValueError, msgspec.DecodeError, msgspec.ValidationError):
        pass  # told below, like a place out of range
    raise InvalidFieldError(
        f"cursor {cursor[:80]!r} is not one of ours", field="cursor", hint="pass the cursor of the page before"
    )


def event_of_row(row: tuple[Any, ...]) -> EventRow:
    """Returns the event of a row of :data:`SELECT_EVENTS`."""
    data, extra, context_ref = row[16], row[17], row[15]
    return EventRow(
        namespace=row[0],
        id=row[1],
        name=row[2],
        agent_id=row[3],
        stored_at_ms=row[4],
        epoch=row[5],
        seq=row[6],
        timestamp_ms=row[7],
        session_id=row[8],
        correlation_id=row[9],
        parent_event_id=row[10],
        root_event_id=row[11],
        event_depth=row[12],
        client_id=row[13],
        originator=row[14],
        context_ref=None if context_ref is None else Ref(context_ref),
        data=None if data is None else data.encode(),
        extra=None if extra is None else extra.encode(),
        source_id=row[18],
        traceparent=row[19],
    )
