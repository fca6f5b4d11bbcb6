"""Receipts by what they say: SQL over the views, hot and cold as one.

A receipt names references within its data.  A search for the text narrows the receipts down, what the JSON says
decides: text that only looks the same, or stands elsewhere, is no match.  Values are bound, never part of the SQL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from holdfast.lake.scan import SELECT_EVENTS as SELECT
from holdfast.lake.scan import EventPage, check_uuid, decode_cursor, encode_cursor, event_of_row
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.limits import QUERY_LIMIT_DEFAULT, QUERY_LIMIT_MAX
from holdfast.schemas.lineage import RECEIPT

if TYPE_CHECKING:
    from holdfast.schemas.rows import EventRow

Role = Literal["read", "produced"]
"""What a context is to the work that a receipt tells of."""


class _Sql(Protocol):
    def execute(self, query: Any, parameters: Any = ..., /) -> Any: ...


# Guarded: data are checked when they are stored, but one row that DuckDB took for no JSON would end every query.
_MENTIONS: Final = "CASE WHEN json_valid(data) THEN list_contains(json_extract_string(data, '$.{role}[*].ref'), ?) END"
_OF_EVENT: Final = "SELECT * FROM events WHERE namespace = ? AND name = ? AND parent_event_id = CAST(? AS UUID)"
_OF_REF: Final = "SELECT * FROM events WHERE namespace = ? AND name = ? AND contains(data, ?) AND ({mentions})"
_CARRYING: Final = "SELECT * FROM events WHERE namespace = ? AND name <> ? AND context_ref = ?"


def receipts_of_ref(
    connection: _Sql,
    namespace: str,
    ref: str,
    *,
    role: Role | None = None,
    limit: int = QUERY_LIMIT_DEFAULT,
    cursor: str | None = None,
) -> EventPage:
    """Returns the next receipts that name a reference, oldest first; None: in either role.

    Unless only those that read it are asked for, the events that carry the reference as their context are among them.
    """
    roles: tuple[Role, ...] = ("read", "produced") if role is None else (role,)
    mentions = " OR ".join(_MENTIONS.format(role=name) for name in roles)
    branches = [_OF_REF.format(mentions=mentions)]
    values: list[object] = [namespace, RECEIPT, ref, *(ref for _ in roles)]
    if role != "read":
        branches.append(_CARRYING)
        values += [namespace, RECEIPT, ref]
    return _page(connection, branches, values, limit, cursor)


def receipts_of_event(
    connection: _Sql, namespace: str, event_id: str, *, limit: int = QUERY_LIMIT_DEFAULT, cursor: str | None = None
) -> EventPage:
    """Returns the next receipts of work on an event, oldest first."""
    return _page(connection, [_OF_EVENT], [namespace, RECEIPT, check_uuid(event_id)], limit, cursor)


def _page(connection: _Sql, branches: list[str], values: list[object], limit: int, cursor: str | None) -> EventPage:
    if not 1 <= limit <= QUERY_LIMIT_MAX:
        raise InvalidFieldError(
            f"limit {limit} is not 1 to {QUERY_LIMIT_MAX}", field="limit", limit=QUERY_LIMIT_MAX, hint="use the cursor"
        )
    values = list(values)
    sql = f"WITH found AS ({' UNION ALL '.join(branches)})\n{SELECT.replace('FROM events', 'FROM found')}"
    if cursor is not None:
        place = decode_cursor(cursor)
        sql += "WHERE (stored_at, epoch, stream_seq) > (make_timestamp_ms(?), ?, ?)\n"
        values += [place.stored_at_ms, place.epoch, place.seq]
    rows = connection.execute(f"{sql} ORDER BY stored_at, epoch, stream_seq LIMIT ?", [*values, limit]).fetchall()
    events = [event_of_row(row) for row in rows]
    return EventPage(events, encode_cursor(events[-1]) if events else cursor)


def first_of(page: EventPage, count: int) -> EventPage:
    """Returns the first events of a page, at least one, with the cursor that goes on behind them."""
    if count >= len(page.events):
        return page
    events = page.events[: max(1, count)]
    return EventPage(events, encode_cursor(events[-1]))


def events_of_ids(connection: _Sql, namespace: str, event_ids: list[str]) -> list[EventRow]:
    """Returns the events of some ids that are stored, in the order of storing."""
    rows = connection.execute(
        f"{SELECT}WHERE namespace = ? AND event_id IN (SELECT CAST(unnest(?) AS UUID)) "
        "ORDER BY stored_at, epoch, stream_seq",
        [namespace, [check_uuid(event_id) for event_id in event_ids]],
    ).fetchall()
    return [event_of_row(row) for row in rows]
