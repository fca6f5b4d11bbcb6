from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from holdfast.lake import EventFilter, Lake, connect, query_events
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.refs import Ref
from tests.test_lake_samples import EPOCH, T0_MS, MemoryTail, event, events

if TYPE_CHECKING:
    from holdfast.lake.duck import Connection
    from holdfast.schemas.rows import EventRow

ALL = EventFilter()


@pytest.fixture
def tail() -> MemoryTail:
    return MemoryTail()


@pytest.fixture
def connection(lake: Lake, tail: MemoryTail) -> Iterator[Connection]:
    """Events 1 to 100: 60 archived, 40 in the tail."""
    rows = [
        event(
            seq,
            stored_at_ms=T0_MS + seq // 4,
            parent_event_id=event(seq - 1).id if seq > 1 else None,
            extra=b'{"x":1}' if seq == 9 else None,
            context_ref=Ref(f"ctx_{'plan' if seq % 2 else 'plan_b'}_" + "c" * 32),
        )
        for seq in range(1, 101)
    ]
    for row in rows:
        tail.streams["events"].publish(row)
    lake.append("events", rows[:60], epoch=EPOCH, first_seq=1, last_seq=60)
    with connect(lake.path, tail=tail) as opened:
        yield opened


def seqs(rows: list[EventRow]) -> list[int]:
    return [row.seq for row in rows]


def test_pages_follow_each_other_without_gap_or_repetition(connection: Connection) -> None:
    found: list[int] = []
    cursor = None
    for _ in range(20):
        page = query_events(connection, ALL, limit=7, cursor=cursor)
        found += seqs(page.events)
        cursor = page.cursor
    assert found == list(range(1, 101))


def test_what_is_stored_later_comes_later(connection: Connection, tail: MemoryTail) -> None:
    page = query_events(connection, ALL, limit=1000)
    assert len(page.events) == 100
    assert query_events(connection, ALL, cursor=page.cursor).events == []
    assert query_events(connection, ALL, cursor=page.cursor).cursor == page.cursor
    tail.streams["events"].publish(event(101))
    assert seqs(query_events(connection, ALL, cursor=page.cursor).events) == [101]


def test_events_come_back_as_they_were_stored(connection: Connection, tail: MemoryTail) -> None:
    page = query_events(connection, ALL, limit=100)
    assert page.events == tail.streams["events"].rows


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (EventFilter(session_id="session-3"), list(range(30, 40))),
        (EventFilter(correlation_id="correlation-7"), list(range(35, 40))),
        (EventFilter(agent_id="agent-2", session_id="session-0"), [2, 5, 8]),
        (EventFilter(event_id=event(42).id), [42]),
        (EventFilter(event_id=event(77).id, namespace="default"), [77]),
        (EventFilter(event_id=event(77).id, namespace="other"), []),
        (EventFilter(name="agent:status", session_id="session-10"), [100]),
        (EventFilter(name="agent:nothing"), []),
        (EventFilter(kind="plan", session_id="session-1"), [11, 13, 15, 17, 19]),
        (EventFilter(kind="plan_b", session_id="session-1"), [10, 12, 14, 16, 18]),
        (EventFilter(kind="pla"), []),
        (EventFilter(session_id="' OR 1=1 --"), []),
        (EventFilter(kind="%"), []),
    ],
)
def test_filters(connection: Connection, where: EventFilter, expected: list[int]) -> None:
    assert seqs(query_events(connection, where, limit=1000).events) == expected


def test_since_is_inclusive_and_until_exclusive(connection: Connection) -> None:
    page = query_events(connection, ALL, since_ms=T0_MS + 2, until_ms=T0_MS + 4, limit=1000)
    assert seqs(page.events) == list(range(8, 16))
    rest = query_events(connection, ALL, since_ms=T0_MS + 2, until_ms=T0_MS + 4, limit=1000, cursor=page.cursor)
    assert rest.events == []


@pytest.mark.parametrize("limit", [0, -1, 1001])
def test_a_limit_out_of_range_is_refused(connection: Connection, limit: int) -> None:
    with pytest.raises(InvalidFieldError, match="limit") as caught:
        query_events(connection, ALL, limit=limit)
    assert (caught.value.field, caught.value.limit) == ("limit", 1000)


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "nonsense",
        "é",
        "*" * 5000,
        base64.urlsafe_b64encode(b'[1,"e"]').decode(),
        base64.urlsafe_b64encode(b'[99999999999999999999,"e",1]').decode(),
        base64.urlsafe_b64encode(b'[-1,"e",1]').decode(),
        base64.urlsafe_b64encode(b'[1,"e",9223372036854775808]').decode(),
        base64.urlsafe_b64encode(b'{"a":1}').decode(),
    ],
)
def test_a_cursor_not_of_ours_is_refused(connection: Connection, cursor: str) -> None:
    with pytest.raises(InvalidFieldError, match="cursor") as caught:
        query_events(connection, ALL, cursor=cursor)
    assert caught.value.field == "cursor"


@pytest.mark.parametrize("event_id", ["", "nonsense", "'; DROP VIEW events; --"])
def test_an_event_id_that_is_no_uuid_is_refused(connection: Connection, event_id: str) -> None:
    with pytest.raises(InvalidFieldError, match="not a UUID"):
        query_events(connection, EventFilter(event_id=event_id))


@pytest.mark.parametrize(("since_ms", "until_ms"), [(-1, None), (None, 1 << 62)])
def test_a_time_out_of_range_is_refused(connection: Connection, since_ms: int | None, until_ms: int | None) -> None:
    with pytest.raises(InvalidFieldError, match="milliseconds"):
        query_events(connection, ALL, since_ms=since_ms, until_ms=until_ms)


def test_order_holds_across_epochs(lake: Lake) -> None:
    lake.append("events", events(1, 5), epoch=EPOCH, first_seq=1, last_seq=5)
    late = [event(seq, id=event(50 + seq).id, epoch="a-later-epoch", stored_at_ms=T0_MS + 50 + seq) for seq in (1, 2)]
    lake.append("events", late, epoch="a-later-epoch", first_seq=1, last_seq=2)
    with connect(lake.path) as connection:
        first = query_events(connection, ALL, limit=4)
        second = query_events(connection, ALL, limit=4, cursor=first.cursor)
        assert [row.id for row in (*first.events, *second.events)] == [
            *(event(seq).id for seq in range(1, 6)),
            *(row.id for row in late),
        ]
