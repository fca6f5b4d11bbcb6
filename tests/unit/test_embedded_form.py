"""Embedded events taken apart and put together again: byte for byte, whatever they are."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.ops.embedded.form import (
    KIND,
    UNREADABLE,
    Parts,
    event_id_of,
    rebuild,
    referring,
    split,
)
from holdfast.ops.embedded.reading import identity_of
from holdfast.ops.embedded.source import Item
from holdfast.ops.embedded.survey import IdSet, hash_of, survey
from holdfast.schemas.ids import derived_event_id, normal_event_id
from holdfast.streams.decode import decode_event
from holdfast.streams.messages import StoredMessage

if TYPE_CHECKING:
    from holdfast.schemas.rows import EventRow

NAMESPACE = "tests"
OTHERS = frozenset({"evt_parent", "evt_root", "0190a3b0-0000-7000-8000-000000000001"})


def parts_of(text: bytes, occurrence: int = 0) -> Parts:
    return split(NAMESPACE, text, known=OTHERS.__contains__, agent="someone", occurrence=occurrence)


def row_of(parts: Parts) -> EventRow:
    """The row that the lake holds, by way of the message on the wire."""
    message = parts.message()
    return decode_event(StoredMessage(message.subject, message.headers, message.payload, 1, 1_000, "epoch")).row


def originals(known: Iterable[str] = OTHERS) -> dict[str, str | None]:
    return dict(normal_event_id(NAMESPACE, key) for key in known)


def rebuilt(parts: Parts) -> bytes:
    return rebuild(row_of(parts), parts.form, parts.content_type, originals().get)


def example(**changes: Any) -> dict[str, Any]:
    context = {
        "_event_id": "evt_abc123",
        "_correlation_id": "corr_def456",
        "_parent_event_id": "evt_parent",
        "_root_event_id": "evt_root",
        "_event_depth": 3,
        "_agent_id": "my_agent",
        "_session_id": "session_123",
        "_timestamp": 1640995200.1234567,
    } | changes
    return {"event": "agent:status", "data": {"status": "active"}, "_ksi_context": context}


def test_B61_an_event_becomes_lineage_in_columns_and_a_form_that_its_shape_shares() -> None:
    first = parts_of(json.dumps(example()).encode())
    second = parts_of(json.dumps(example(_event_id="evt_2", _event_depth=9, _timestamp=1.5, _session_id="b")).encode())
    assert first.reason is None
    assert first.ref == second.ref
    assert first.ref.startswith(f"ctx_{KIND}_")
    row = row_of(first)
    assert (row.name, row.agent_id, row.session_id, row.correlation_id) == (
        "agent:status", "my_agent", "session_123", "corr_def456",
    )  # fmt: skip
    assert (row.id, row.source_id) == normal_event_id(NAMESPACE, "evt_abc123")
    assert row.parent_event_id == normal_event_id(NAMESPACE, "evt_parent")[0]
    assert row.root_event_id == normal_event_id(NAMESPACE, "evt_root")[0]
    assert (row.event_depth, row.timestamp_ms, row.data) == (3, 1_640_995_200_123, b'{"status": "active"}')
    # The form is JSON itself: what is no lineage can be read in it.
    custom = parts_of(json.dumps(example(tenant="blue", attempts=[1, 2])).encode())
    shown = json.loads(custom.form)["_ksi_context"]
    assert (shown["tenant"], shown["attempts"], shown["_event_id"]) == ("blue", [1, 2], {"$": "event_id"})


@pytest.mark.parametrize(
    "change",
    [
        {"_timestamp": 1640995200.0},
        {"_timestamp": 1640995200},
        {"_timestamp": 1640995200123},
        {"_timestamp": 0.001},
        {"_timestamp": "2025-08-04T12:00:00.123456+00:00"},
        {"_timestamp": "2025-08-04T12:00:00.123Z"},
        {"_root_event_id": "evt_abc123"},
        {"_parent_event_id": "0190a3b0-0000-7000-8000-000000000001"},
        {"_event_id": "0190a3b0-0000-7000-8000-00000000abcd"},
        {"_agent_id": "ein Ägent: mit.Punkt"},
        {"_client_id": "c1", "_originator": "o1"},
        {"_event_depth": 0},
    ],
)
def test_the_spellings_of_earlier_systems_need_no_form_of_their_own(change: dict[str, Any]) -> None:
    one = parts_of(json.dumps(example(**change)).encode())
    assert one.reason is None
    assert rebuilt(one) == json.dumps(example(**change)).encode()
    assert b"2025-08" not in one.form
    assert b"1640995" not in one.form
    assert b"evt_" not in one.form


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[1, 2]",
        b"\xff\xfe",
        b'"text"',
        b"{}",
        b'{"event": "a", "event": "b"}',
        b'{"_ksi_context": {"_event_id": "x", "_event_id": "y"}}',
        b'{"data": 1, "data": 2, "_ksi_context": {}}',
        b'{"data": {"$":"name"}, "event": {"$":"data"}}',
        b' {\t"event" :"a:b"\r,"data":null}\r',
        b'{"event": "a", "_ksi_context": {"_event_depth": 1.0, "_timestamp": 1e9, "_event_id": 7}}',
        b'{"event": "a", "_ksi_context": {"_event_depth": -1, "_timestamp": 1.500}}',
        b'{"event": "", "_ksi_context": {"_event_id": "", "_agent_id": ""}}',
        b'{"event": "\\u0061", "_ksi_context": {"_event_id": "\\/", "_session_id": "\\ud83d\\ude00"}}',
        b'{"event": "a", "_ksi_context": {"_event_id": "\\ud800"}}',
        b'{"event": "a", "_ksi_context": {"_parent_event_id": "evt_elsewhere", "_root_event_id": "evt_far"}}',
        b'{"event": "a", "_ksi_context": {"_event_id": "e", "_parent_event_id": "e", "_root_event_id": "e"}}',
        b'{"event": "a", "_ksi_context": "ctx_embedded_x"}',
        b'{"event": "a", "data": ' + b"[" * 63 + b"]" * 63 + b"}",
        b'{"event": "a", "data": ' + b"[" * 200 + b"]" * 200 + b"}",
        b'{"event": "' + b"a" * 2000 + b'", "_ksi_context": {"_session_id": "' + b"s" * 300 + b'"}}',
        b'{"event": "a", "data": "' + b"x" * 1_000_000 + b'"}',
    ],
)
def test_odd_events_come_back_as_they_were(text: bytes) -> None:
    for occurrence in (0, 1):
        assert rebuilt(parts_of(text, occurrence)) == text


def test_what_is_no_event_is_kept_whole_and_says_why() -> None:
    parts = parts_of(b"{nonsense")
    assert parts.event.name == UNREADABLE
    assert parts.is_unreadable
    assert parts.reason is not None
    assert "not JSON" in parts.reason
    assert parts.form == b"{nonsense"


def test_an_event_that_must_be_whole_still_has_its_lineage() -> None:
    event = example() | {"data": {"$": "name"}, "more": {"$": "name"}}
    text = json.dumps(event, separators=(",", ":")).encode()
    parts = parts_of(text)
    assert parts.reason is not None
    row = row_of(parts)
    assert (row.session_id, row.event_depth, row.name) == ("session_123", 3, "agent:status")
    assert rebuilt(parts) == text


def test_B61_a_cause_of_another_source_takes_no_form_of_its_own_where_its_id_holds_what_it_was() -> None:
    elsewhere = [
        parts_of(json.dumps(example(_parent_event_id=f"evt_{n}", _root_event_id="elsewhere:1")).encode())
        for n in (1, 2)
    ]
    assert elsewhere[0].ref == elsewhere[1].ref
    assert [rebuild(row_of(each), each.form, each.content_type, lambda _: None) for each in elsewhere] == [
        json.dumps(example(_parent_event_id=f"evt_{n}", _root_event_id="elsewhere:1")).encode() for n in (1, 2)
    ]
    # Of a longer one nothing but a hash would be left.
    longer = parts_of(json.dumps(example(_parent_event_id="event of another source")).encode())
    assert b"event of another source" in longer.form


def test_B61_the_uuid_of_a_short_id_comes_back_as_the_uuid() -> None:
    given, parent = (normal_event_id(NAMESPACE, each)[0] for each in ("evt_1", "evt_2"))
    text = json.dumps(example(_event_id=given, _parent_event_id=parent)).encode()
    parts = parts_of(text)
    assert (parts.reason, row_of(parts).id, row_of(parts).source_id) == (None, given, "evt_1")
    assert rebuilt(parts) == text


def test_a_repeated_id_is_an_event_of_its_own_and_keeps_its_original() -> None:
    text = json.dumps(example()).encode()
    first, second = parts_of(text), parts_of(text, occurrence=1)
    assert first.event.id != second.event.id
    assert second.event.source_id == "evt_abc123"
    assert second.event.id == derived_event_id(NAMESPACE, "embedded", "evt_abc123", "1")
    assert event_id_of(NAMESPACE, "evt_abc123", 1)[0] == second.event.id
    assert rebuilt(second) == text
    assert row_of(second).source_id == "evt_abc123"


def test_the_new_form_refers_and_is_known_again() -> None:
    text = json.dumps(example()).encode()
    new = referring(text, "evt_abc123", parts_of(text).ref)
    assert json.loads(new) == {
        "event": "agent:status",
        "data": {"status": "active"},
        "_ksi_context": parts_of(text).ref,
        "_event_id": "evt_abc123",
    }
    assert identity_of(new).is_migrated
    assert not identity_of(text).is_migrated
    assert referring(new, "other", parts_of(text).ref) == new


def test_a_survey_tells_recent_events_and_numbers_repeated_ids() -> None:
    texts = [
        json.dumps(example(_event_id=name, _timestamp=at)).encode()
        for name, at in (("a", 100.0), ("b", 90_000.0), ("a", 90_001.0), ("c", 90_002.0))
    ]
    found = survey([Item(number, text) for number, text in enumerate(texts, 1)], recent_s=3600.0)
    assert (found.events, found.recent_from, found.newest_ms) == (4, 1, 90_002_000)
    assert "a" in found.ids
    assert "d" not in found.ids
    occurrences = found.ids.occurrences()
    assert [occurrences.next(key) for key in ("a", "b", "a", "c")] == [0, 0, 1, 0]
    assert "x" not in IdSet([hash_of("y")])


_ALIASES = [
    "_event_id", "_correlation_id", "_parent_event_id", "_root_event_id", "_event_depth", "_agent_id", "_client_id",
    "_originator", "_timestamp", "_session_id", "event_id", "timestamp", "iteration", "_ksi_context_ref",
]  # fmt: skip
_IDS = st.sampled_from([*sorted(OTHERS), "evt_1", "evt_elsewhere", "0190a3b0-0000-7000-8000-0000000000ff", "", "ä b"])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_CONTEXTS = st.dictionaries(
    st.sampled_from(_ALIASES),
    st.one_of(_IDS, st.integers(-5, 2**40), st.floats(0, 2e9), st.text(string.printable, max_size=8), _JSON),
    max_size=12,
)
_EVENTS = st.fixed_dictionaries(
    {},
    optional={
        "event": st.one_of(st.sampled_from(["agent:status", "x", ""]), _JSON),
        "event_name": st.text(max_size=5),
        "data": _JSON,
        "_ksi_context": st.one_of(_CONTEXTS, _JSON),
        "event_id": _IDS,
        "timestamp": st.floats(0, 2e9),
        "more": _JSON,
    },
)
_SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " :  ")])


@given(event=_EVENTS, separators=_SEPARATORS, ascii_only=st.booleans(), occurrence=st.integers(0, 1))
def test_B63_taking_apart_and_putting_together_is_the_identity(
    event: dict[str, Any], separators: tuple[str, str], ascii_only: bool, occurrence: int
) -> None:
    text = json.dumps(event, separators=separators, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert rebuilt(parts_of(text, occurrence)) == text


@given(st.binary(max_size=60), st.integers(0, 1))
def test_any_bytes_come_back(text: bytes, occurrence: int) -> None:
    assert rebuilt(parts_of(text, occurrence)) == text
    identity_of(text)
