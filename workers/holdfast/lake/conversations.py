"""A session with all that it was forked from, as one list of events; the newest session of an agent.

A fork is an event of the new session that names the session and the event it was forked at.  Everything up to that
event belongs to the new session too.  The order is that of storing, and what a fork shares was stored before it: so one
query over the sessions of a line of forks, each up to the place where it was left, is the conversation.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

import msgspec

from holdfast.lake.scan import (
    SELECT_EVENTS,
    SELECT_PLACES,
    EventPage,
    Place,
    check_uuid,
    decode_cursor,
    encode_cursor,
    event_of_row,
)
from holdfast.schemas.conversations import FORKED
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.limits import QUERY_LIMIT_DEFAULT, QUERY_LIMIT_MAX
from holdfast.schemas.lineage import RECEIPT

logger = logging.getLogger(__name__)


class _Pinnable(Protocol):
    def execute(self, query: Any, parameters: Any = ..., /) -> Any: ...

    def pinned(self) -> AbstractContextManager[Any]: ...


class Span(msgspec.Struct, frozen=True):
    """A session's share in a conversation: its events up to a place, or all."""

    session_id: str
    until: Place | None = None


class NewestSession(msgspec.Struct, frozen=True):
    """The session of an agent's newest event that has one, and that event; None where there is none."""

    session_id: str | None = None
    event_id: str | None = None


# The first fork of a session is the one that counts, whatever is said later.  Guarded: data are checked when they are
# stored, but one row that DuckDB took for no JSON would end every query.  UNION, not UNION ALL: a circle ends.
_LINE: Final = """
WITH RECURSIVE forks AS MATERIALIZED (
    SELECT session_id, epoch_ms(stored_at) AS stored_at_ms, epoch, stream_seq,
        CASE WHEN json_valid(data) AND json_type(data, '$.from') = 'VARCHAR'
            THEN json_extract_string(data, '$.from') END AS origin,
        CASE WHEN json_valid(data) THEN try_cast(json_extract_string(data, '$.at') AS UUID) END AS forked_at
    FROM events WHERE namespace = ? AND name = ? {and_session}
    QUALIFY row_number() OVER (PARTITION BY session_id ORDER BY stored_at, epoch, stream_seq) = 1
)"""
_FORK: Final = _LINE.format(and_session="AND session_id = ?") + " SELECT 1 FROM forks WHERE origin IS NOT NULL"  # noqa: S608  own text
_FORKS: Final = (
    _LINE.format(and_session="AND session_id IS NOT NULL")  # noqa: S608  own text
    + """, line AS (
    SELECT * FROM forks WHERE session_id = ?
    UNION
    SELECT forks.* FROM line JOIN forks ON forks.session_id = line.origin
)
SELECT line.session_id, line.origin, line.stored_at_ms, line.epoch, line.stream_seq,
    epoch_ms(events.stored_at), events.epoch, events.stream_seq
FROM line LEFT JOIN events ON events.namespace = ? AND events.event_id = line.forked_at
WHERE line.origin IS NOT NULL
"""
)


def spans_of(connection: _Pinnable, namespace: str, session_id: str) -> list[Span]:
    """Returns the sessions that a session is made of, itself first, each with where it was left.

    A fork that leads into its own line is left out; one at an event that is not stored shares what was there when it
    was made.
    """
    if not connection.execute(_FORK, [namespace, FORKED, session_id]).fetchall():
        return [Span(session_id)]
    rows = connection.execute(_FORKS, [namespace, FORKED, session_id, namespace]).fetchall()
    forks = {row[0]: (row[1], Place(*row[2:5] if row[5] is None else row[5:8])) for row in rows}
    spans = {session_id: Span(session_id)}
    current, left = session_id, None
    while current in forks:
        origin, place = forks[current]
        if origin in spans:
            # Not by a client of ours: somebody wrote forks that lead in a circle.
            logger.debug("fork left out", extra={"action": "fork_left_out", "session": current, "origin": origin})
            break
        # A fork in what was shared before leaves the line where that was left.
        left = place if left is None else min(left, place, key=_order)
        spans[origin] = Span(origin, left)
        current = origin
    return list(spans.values())


def conversation_page(
    connection: _Pinnable,
    namespace: str,
    session_id: str,
    *,
    messages: bool = False,
    json: bool = True,
    event_id: str | None = None,
    limit: int = QUERY_LIMIT_DEFAULT,
    cursor: str | None = None,
) -> EventPage:
    """Returns the next events of a session and of what it was forked from, oldest first; receipts are left out.

    ``messages``: only those that carry a context.  ``event_id``: only that one, if it is among them.  Without ``json``
    their ``data`` and ``extra`` are left out.
    """
    if not 1 <= limit <= QUERY_LIMIT_MAX:
        raise InvalidFieldError(
            f"limit {limit} is not 1 to {QUERY_LIMIT_MAX}", field="limit", limit=QUERY_LIMIT_MAX, hint="use the cursor"
        )
    with connection.pinned():
        condition, values = _within(spans_of(connection, namespace, session_id), namespace)
        if messages:
            condition += " AND context_ref IS NOT NULL"
        if event_id is not None:
            condition += " AND event_id = CAST(? AS UUID)"
            values.append(check_uuid(event_id))
        if cursor is not None:
            place = decode_cursor(cursor)
            # The first condition says less than the second, but can be pushed into the files.
            condition += " AND stored_at >= make_timestamp_ms(?)"
            condition += " AND (stored_at, epoch, stream_seq) > (make_timestamp_ms(?), ?, ?)"
            values += [place.stored_at_ms, place.stored_at_ms, place.epoch, place.seq]
        select = SELECT_EVENTS if json else SELECT_PLACES
        sql = f"{select}WHERE {condition} ORDER BY stored_at, epoch, stream_seq LIMIT ?"
        rows = connection.execute(sql, [*values, limit]).fetchall()
    events = [event_of_row(row) for row in rows]
    return EventPage(events, encode_cursor(events[-1]) if events else cursor)


def count_messages(connection: _Pinnable, namespace: str, session_id: str) -> int:
    """Returns how many events of a session, and of what it was forked from, carry a context."""
    with connection.pinned():
        condition, values = _within(spans_of(connection, namespace, session_id), namespace)
        sql = f"SELECT count(*) FROM events WHERE {condition} AND context_ref IS NOT NULL"  # noqa: S608  own text
        [(count,)] = connection.execute(sql, values).fetchall()
    return int(count)


def newest_session(connection: _Pinnable, namespace: str, agent_id: str) -> NewestSession:
    """Returns the session that an agent's newest event with a session is in; receipts do not count."""
    row = connection.execute(
        """SELECT session_id, CAST(event_id AS VARCHAR) FROM events
        WHERE namespace = ? AND agent_id = ? AND session_id IS NOT NULL AND name <> ?
        ORDER BY stored_at DESC, epoch DESC, stream_seq DESC LIMIT 1""",
        [namespace, agent_id, RECEIPT],
    ).fetchone()
    return NewestSession() if row is None else NewestSession(row[0], row[1])


def _within(spans: list[Span], namespace: str) -> tuple[str, list[object]]:
    """The condition for the events of a conversation, and its values."""
    sessions = [span.session_id for span in spans]
    condition = "namespace = ? AND name <> ?"
    if len(spans) == 1:
        return f"{condition} AND session_id = ?", [namespace, RECEIPT, sessions[0]]
    # The first session has no end; the others are compared with theirs by a look-up in a map of all.
    others, ends = sessions[1:], [span.until for span in spans if span.until is not None]
    condition += " AND session_id IN (SELECT unnest(CAST(? AS VARCHAR[])))"
    condition += (
        " AND (session_id = ? OR (stored_at, epoch, stream_seq) <= ("
        "make_timestamp_ms(map(CAST(? AS VARCHAR[]), CAST(? AS BIGINT[]))[session_id]), "
        "map(CAST(? AS VARCHAR[]), CAST(? AS VARCHAR[]))[session_id], "
        "map(CAST(? AS VARCHAR[]), CAST(? AS BIGINT[]))[session_id]))"
    )
    return condition, [
        *(namespace, RECEIPT, sessions, sessions[0]),
        *(others, [end.stored_at_ms for end in ends]),
        *(others, [end.epoch for end in ends]),
        *(others, [end.seq for end in ends]),
    ]


def _order(place: Place) -> tuple[int, str, int]:
    return place.stored_at_ms, place.epoch, place.seq
