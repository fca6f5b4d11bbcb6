"""Conversations of forks of forks, by SQL, beside a model that copies."""

from __future__ import annotations

import uuid
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

import duckdb
import msgspec
from hypothesis import given
from hypothesis import strategies as st

from holdfast.lake.conversations import conversation_page, count_messages
from holdfast.schemas.conversations import FORKED
from tests.support import examples

_COLUMNS: Final = """
    namespace VARCHAR, event_id UUID, name VARCHAR, agent_id VARCHAR, stored_at TIMESTAMP, epoch VARCHAR,
    stream_seq BIGINT, "timestamp" TIMESTAMP, session_id VARCHAR, correlation_id VARCHAR, parent_event_id UUID,
    root_event_id UUID, event_depth INTEGER, client_id VARCHAR, originator VARCHAR, context_ref VARCHAR,
    data VARCHAR, extra VARCHAR, source_id VARCHAR, traceparent VARCHAR
"""
_INSERT: Final = """
INSERT INTO events (namespace, agent_id, epoch, "timestamp", event_depth, event_id, name, stored_at, stream_seq,
    session_id, context_ref, data)
VALUES ('n', 'a', 'e', make_timestamp_ms(0), 0, ?, ?, make_timestamp_ms(?), ?, ?, ?, ?)
"""


class Events:
    """A lake of one table, and what a conversation would be if a fork were a copy."""

    def __init__(self) -> None:
        self.duck = duckdb.connect()
        self.duck.execute(f"CREATE TABLE events ({_COLUMNS})")
        self.copied: dict[str, list[str]] = {"s0": []}
        self.carrying: set[str] = set()
        self._count = 0

    def execute(self, query: Any, parameters: Any = None, /) -> Any:
        return self.duck.execute(query, parameters)

    @contextmanager
    def pinned(self) -> Generator[Events]:
        yield self

    def add(self, session: str, *, name: str = "said", data: object = None, has_context: bool = True) -> None:
        self._count += 1
        event_id = str(uuid.UUID(int=self._count))
        # Several share a millisecond: their sequence tells them apart.
        encoded = None if data is None else msgspec.json.encode(data).decode()
        place = (1_000 + self._count // 3, self._count)
        self.duck.execute(_INSERT, [event_id, name, *place, session, "ctx" if has_context else None, encoded])
        self.copied[session].append(event_id)
        if has_context:
            self.carrying.add(event_id)

    def fork(self, source: str, place: int, target: str) -> None:
        at = self.copied[source][place]
        self.copied[target] = self.copied[source][: place + 1]
        self.add(target, name=FORKED, data={"from": source, "at": at}, has_context=False)

    def read(self, session: str, *, messages: bool, limit: int) -> list[str]:
        found: list[str] = []
        cursor = None
        while (page := conversation_page(self, "n", session, messages=messages, limit=limit, cursor=cursor)).events:
            found += [row.id for row in page.events]
            cursor = page.cursor
        return found


# What happens: an event in some session, with or without a context, or a fork of one at some place.
HAPPENINGS = st.lists(
    st.tuples(st.sampled_from(["say", "say", "note", "fork"]), st.integers(0, 50), st.integers(0, 50)), max_size=30
)


@examples(20)
@given(HAPPENINGS, st.integers(1, 9))
def test_a_fork_reads_as_a_copy_would(happenings: list[tuple[str, int, int]], limit: int) -> None:
    events = Events()
    for what, which, place in happenings:
        session = list(events.copied)[which % len(events.copied)]
        if what == "fork" and events.copied[session]:
            events.fork(session, place % len(events.copied[session]), f"s{len(events.copied)}")
        elif what != "fork":
            events.add(session, has_context=what == "say")
    for session, expected in events.copied.items():
        messages = [event_id for event_id in expected if event_id in events.carrying]
        assert events.read(session, messages=False, limit=limit) == expected
        assert events.read(session, messages=True, limit=500) == messages
        assert count_messages(events, "n", session) == len(messages)
        for event_id in (str(uuid.UUID(int=1)), *expected[:2]):
            found = conversation_page(events, "n", session, event_id=event_id).events
            assert [row.id for row in found] == [event_id] * (event_id in expected)
    events.duck.close()
