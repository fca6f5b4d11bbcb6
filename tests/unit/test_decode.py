"""From a message to a row: raw events of any publisher, judged field by field; pure, and never surprised."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdfast.schemas import limits
from holdfast.schemas.errors import (
    DigestMismatchError,
    HoldfastError,
    InvalidBodyError,
    InvalidFieldError,
    InvalidNameError,
    InvalidRefError,
    TooLargeError,
)
from holdfast.schemas.ids import derived_event_id, new_event_id, normal_event_id, now_ms
from holdfast.schemas.refs import JSON, Ref, compute_digest, format_ref
from holdfast.schemas.rows import TABLES, ContextRow, EventRow, KeyVersionRow
from holdfast.streams.codec import seal
from holdfast.streams.decode import decode_context, decode_event, decode_key_version, decode_row
from holdfast.streams.events import NewEvent, encode_event
from holdfast.streams.messages import StoredMessage
from holdfast.streams.wire import event_subject, hot_subject
from tests.support import examples

STORED_MS = 1_767_225_600_123
UUID7 = "019a2b3c-4d5e-7abc-8def-0123456789ab"
UUID4 = "3f2504e0-4f89-41d3-9a0c-0305e82c3301"
REF = "ctx_note_" + "a" * 32


def raw(payload: Any, **changes: Any) -> StoredMessage:
    fields: dict[str, Any] = {
        "subject": "ctx.ns.event.agent7.status",
        "headers": {},
        "payload": payload if isinstance(payload, bytes) else msgspec.json.encode(payload),
        "seq": 42,
        "stored_at_ms": STORED_MS,
        "epoch": "e1",
    }
    return StoredMessage(**(fields | changes))


def row_of(payload: Any, **changes: Any) -> EventRow:
    return decode_event(raw(payload, **changes)).row


class TestRawEvents:
    def test_an_empty_object_is_an_event(self) -> None:
        row = row_of({})
        assert (row.namespace, row.agent_id, row.name) == ("ns", "agent7", "status")
        assert row.id == derived_event_id("ns", "position", "e1", "42")
        assert (row.timestamp_ms, row.stored_at_ms) == (STORED_MS, STORED_MS)
        assert (row.epoch, row.seq) == ("e1", 42)
        assert (row.root_event_id, row.parent_event_id, row.event_depth) == (row.id, None, 0)
        assert (row.data, row.extra, row.context_ref, row.source_id) == (None, None, None, None)

    def test_every_field_is_taken_over(self) -> None:
        sent = {
            "id": UUID4,
            "timestamp": "2026-01-31T09:30:00.125Z",
            "session_id": "s",
            "correlation_id": "c",
            "parent_event_id": UUID7,
            "root_event_id": UUID7,
            "event_depth": 3,
            "client_id": "cl",
            "originator": "o",
            "context_ref": REF,
            "data": {"a": [1, None]},
            "v": 1,
        }
        row = row_of(sent)
        assert row == EventRow(
            namespace="ns",
            id=UUID4,
            name="status",
            agent_id="agent7",
            stored_at_ms=STORED_MS,
            epoch="e1",
            seq=42,
            timestamp_ms=1_769_851_800_125,
            session_id="s",
            correlation_id="c",
            parent_event_id=UUID7,
            root_event_id=UUID7,
            event_depth=3,
            client_id="cl",
            originator="o",
            context_ref=Ref(REF),
            data=b'{"a":[1,null]}',
        )

    def test_null_is_the_same_as_absent(self) -> None:
        members = [
            "id",
            "timestamp",
            "session_id",
            "parent_event_id",
            "event_depth",
            "context_ref",
            "context",
            "data",
            "v",
        ]
        assert row_of(dict.fromkeys(members)) == row_of({})

    def test_members_that_are_not_known_are_kept(self) -> None:
        row = row_of(b'{"zeta": [1, 2], "data": 5, "alpha":{"b":null}, "n": null}')
        assert msgspec.json.decode(row.extra or b"") == {"zeta": [1, 2], "alpha": {"b": None}, "n": None}
        assert row.data == b"5"

    @pytest.mark.parametrize("data", [b"0", b"false", b'""', b"[]", b"{}", b"1.50", b'"\\u00fc"', b"[ 1 , 2 ]"])
    def test_data_is_kept_as_it_was_written(self, data: bytes) -> None:
        assert row_of(b'{"data": ' + data + b" }").data == data

    def test_a_member_given_twice_counts_once(self) -> None:
        assert row_of(b'{"session_id":"a","session_id":"b"}').session_id == "b"


class TestIds:
    @pytest.mark.parametrize("given_id", [UUID4, UUID7])
    def test_a_uuid_is_the_id(self, given_id: str) -> None:
        for row in (
            row_of({"id": given_id}),
            row_of({"event_id": given_id}),
            row_of({}, headers={"Nats-Msg-Id": given_id}),
            row_of({}, headers={"Nats-Msg-Id": f"ns.{given_id}"}),
            row_of({"id": given_id}, headers={"Nats-Msg-Id": "other"}),
        ):
            assert (row.id, row.source_id) == (given_id, None)

    @pytest.mark.parametrize("given_id", ["step-1", UUID4.upper(), f"{{{UUID4}}}", "ü\x00", "x" * 256])
    def test_another_id_becomes_one_and_is_kept(self, given_id: str) -> None:
        expected = normal_event_id("ns", given_id)[0]
        row = row_of({"id": given_id})
        assert (row.id, row.source_id) == (expected, given_id)
        assert row.id[14] == "8"
        assert row_of({"parent_event_id": given_id}).parent_event_id == expected

    def test_a_short_id_is_kept_in_the_uuid_however_it_is_given(self) -> None:
        packed = normal_event_id("ns", "step-1")[0]
        for body, headers in (
            ({"id": "step-1"}, {}),
            ({"id": packed}, {}),
            ({}, {"Nats-Msg-Id": "ns.step-1"}),
            ({}, {"Nats-Msg-Id": f"ns.{packed}"}),
        ):
            row = row_of(body, headers=headers)
            assert (row.id, row.source_id) == (packed, "step-1")
        assert row_of({"id": packed, "source_id": "said otherwise"}).source_id == "said otherwise"

    def test_of_another_namespaces_prefix_the_whole_header_is_the_id(self) -> None:
        assert row_of({}, headers={"Nats-Msg-Id": f"other.{UUID4}"}).source_id == f"other.{UUID4}"

    def test_a_place_in_another_life_of_the_stream_is_another_id(self) -> None:
        ids = {row_of({}).id, row_of({}, seq=43).id, row_of({}, epoch="e2").id}
        ids.add(row_of({}, subject="ctx.ns2.event.a.b").id)
        assert len(ids) == 4

    def test_an_event_with_a_parent_is_not_its_own_root(self) -> None:
        row = row_of({"parent_event_id": UUID7})
        assert (row.root_event_id, row.event_depth) == (None, 1)
        assert row_of({"parent_event_id": UUID7, "event_depth": 0}).event_depth == 0

    def test_an_id_over_the_limit_in_the_header_is_refused(self) -> None:
        with pytest.raises(InvalidFieldError) as caught:
            row_of({}, headers={"Nats-Msg-Id": "x" * 257})
        assert caught.value.field == "Nats-Msg-Id"


class TestTimestamps:
    @pytest.mark.parametrize(
        ("given_time", "expected"),
        [
            ("2026-01-31T09:30:00.125Z", 1_769_851_800_125),
            ("2026-01-31T10:30:00.125+01:00", 1_769_851_800_125),
            ("2026-01-31T09:30:00.1259Z", 1_769_851_800_125),
            ("2026-01-31T09:30:00.125", 1_769_851_800_125),
            ("2026-01-31 09:30:00", 1_769_851_800_000),
            ("2026-01-31", 1_769_817_600_000),
            ("20260131T093000Z", 1_769_851_800_000),
            ("1970-01-01T00:00:00Z", 0),
            ("9999-12-31T23:59:59.999Z", 253_402_300_799_999),
            (1_769_851_800, 1_769_851_800_000),
            (1_769_851_800.125, 1_769_851_800_125),
            (1_769_851_800_125, 1_769_851_800_125),
            (1_769_851_800_125.9, 1_769_851_800_125),
            (0, 0),
            (0.5, 500),
            (100_000_000_000, 100_000_000_000_000),
            (100_000_000_001, 100_000_000_001),
        ],
    )
    def test_iso_seconds_and_milliseconds_are_understood(self, given_time: Any, expected: int) -> None:
        assert row_of({"timestamp": given_time}).timestamp_ms == expected

    @pytest.mark.parametrize(
        "given_time",
        [
            "",
            "yesterday",
            "2026-13-01",
            "1969-12-31T23:59:59.999Z",
            "0001-01-01T00:00:00+23:59",
            "9999-12-31T23:59:59-23:59",
            "²026-01-31",
            "1769851800",
            -1,
            -0.001,
            1e300,
            10**30,
            True,
            [],
            {},
            "x" * 10_000,
        ],
        ids=lambda value: repr(value)[:30],
    )
    def test_anything_else_is_refused(self, given_time: Any) -> None:
        with pytest.raises(InvalidFieldError) as caught:
            row_of({"timestamp": given_time})
        assert caught.value.field == "timestamp"
        assert len(str(caught.value)) < 300

    def test_without_one_the_id_or_the_server_says_when(self) -> None:
        at_ms = 1_700_000_000_456
        assert row_of({"id": new_event_id(at_ms)}).timestamp_ms == at_ms
        assert row_of({"id": UUID4}).timestamp_ms == STORED_MS
        # A version 7 beyond the year 9999 says nothing.
        assert row_of({"id": "ffffffff-ffff-7fff-bfff-ffffffffffff"}).timestamp_ms == STORED_MS


class TestContexts:
    @pytest.mark.parametrize(
        "text", [b'{"b": 1,\n "a": 2}', b"[ ]", b'"x"', b"5", b"false", b"0", b'"\\u00fc\xc3\xbc"', b'""']
    )
    def test_an_inline_context_is_its_exact_json_text(self, text: bytes) -> None:
        decoded = decode_event(raw(b'{"data":1, "context" :  ' + text + b"  }"))
        assert decoded.inline is not None
        assert (decoded.inline.body, decoded.inline.kind, decoded.inline.namespace) == (text, "event", "ns")
        assert (decoded.inline.content_type, decoded.inline.expires_at_ms) == (JSON, None)
        assert decoded.row.context_ref == format_ref("event", compute_digest("ns", "event", text))
        assert decoded.row.extra is None

    def test_a_context_may_name_its_kind(self) -> None:
        decoded = decode_event(raw({"context": {}, "context_kind": "note"}))
        assert decoded.inline is not None
        assert decoded.inline.kind == "note"
        assert (decoded.row.context_ref or "").startswith("ctx_note_")

    def test_a_reference_needs_no_context(self) -> None:
        decoded = decode_event(raw({"context_ref": REF, "context": None}))
        assert (decoded.inline, decoded.row.context_ref) == (None, REF)

    @pytest.mark.parametrize(
        ("members", "error", "field"),
        [
            ({"context": {}, "context_ref": REF}, InvalidFieldError, "context"),
            ({"context_ref": "x"}, InvalidRefError, "ref"),
            ({"context_ref": 5}, InvalidRefError, "ref"),
            ({"context_ref": {}}, InvalidRefError, "ref"),
            ({"context_ref": ""}, InvalidRefError, "ref"),
            ({"context": 1, "context_kind": "a b"}, InvalidNameError, "kind"),
            ({"context": 1, "context_kind": ""}, InvalidNameError, "kind"),
            ({"context": 1, "context_kind": 5}, InvalidNameError, "kind"),
        ],
    )
    def test_other_combinations_are_refused(self, members: Any, error: type[HoldfastError], field: str) -> None:
        with pytest.raises(error) as caught:
            decode_event(raw(members))
        assert caught.value.field == field


WRONG: list[Any] = [5, 1.5, True, [], {}, "", "x" * 257]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize(
    "field",
    [
        *("id", "event_id", "session_id", "correlation_id", "parent_event_id", "root_event_id", "client_id"),
        *("originator", "source_id"),
    ],
)
def test_a_text_field_of_a_wrong_type_or_length_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        row_of({field: value})
    assert (caught.value.field, caught.value.limit) == (field, limits.ID_CHARS)


@pytest.mark.parametrize("value", [-1, 2**31, 1.0, "1", True, [], {}])
def test_a_depth_of_a_wrong_type_or_size_is_refused(value: Any) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        row_of({"event_depth": value})
    assert caught.value.field == "event_depth"


@pytest.mark.parametrize("value", [0, 2, "1", 1.5, [], {}])
def test_another_version_is_refused(value: Any) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        row_of({"v": value})
    assert caught.value.field == "v"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"not json",
        b"[]",
        b"5",
        b"null",
        b'"x"',
        b"{",
        b'{"a":NaN}',
        b"\xff\xfe",
        b'{"a":"\xff"}',
        b'{"data":"\\ud800"}',
        b'{"\\udc00":1}',
        b"\xef\xbb\xbf{}",
        b"{}{}",
        b"[" * 100_000,
        b'{"a":' * 65 + b"1" + b"}" * 65,
        b'{"timestamp":1' + b"0" * 5_000 + b"}",
        b'{"event_depth":' + b"9" * 5_000 + b"}",
        b"\x00",
    ],
    ids=lambda payload: payload[:16].decode("latin-1"),
)
def test_a_payload_that_is_no_object_is_refused(payload: bytes) -> None:
    with pytest.raises((InvalidBodyError, InvalidFieldError)):
        decode_event(raw(payload))


def test_nesting_is_bounded_at_64() -> None:
    # The event's own object is one level.
    row_of(b'{"data":' + b"[" * 63 + b"]" * 63 + b"}")
    with pytest.raises(InvalidFieldError) as caught:
        row_of(b'{"data":' + b"[" * 64 + b"]" * 64 + b"}")
    assert caught.value.limit == 64


def test_an_event_over_its_bytes_is_refused() -> None:
    row_of(b'{"data":"' + b"x" * (limits.EVENT_BYTES - 11) + b'"}')
    with pytest.raises(TooLargeError) as caught:
        row_of(b'{"data":"' + b"x" * (limits.EVENT_BYTES - 10) + b'"}')
    assert (caught.value.field, caught.value.limit) == ("event", limits.EVENT_BYTES)


@pytest.mark.parametrize(
    "subject",
    [
        "ctx.ns.event.a",
        "ctx.ns.dead.a.b",
        "other.ns.event.a.b",
        "ctx..event.a.b",
        "ctx.ns.event..b",
        "ctx.ns.event.a.",
        "ctx.ns.event.a.b..c",
        "ctx.n\ufffd.event.a.b",
        "ctx.x--zz.event.a.b",
        "ctx.ns.event.x--.b",
        "ctx.ns.event.a." + ".".join("b" * 17),
        "ctx." + "n" * 65 + ".event.a.b",
        "ctx.ns.event." + "a" * 257 + ".b",
        "ctx.ns.event.a b.c",
        "",
    ],
    ids=lambda subject: subject[:30],
)
def test_a_subject_that_is_none_of_ours_is_refused(subject: str) -> None:
    with pytest.raises(InvalidNameError):
        decode_event(raw({}, subject=subject))


@pytest.mark.parametrize(
    ("header", "kept"),
    [
        ("00-" + "a" * 32 + "-" + "b" * 16 + "-01", True),
        ("cc-" + "a" * 32 + "-" + "b" * 16 + "-01-later-version", True),
        ("00-" + "A" * 32 + "-" + "b" * 16 + "-01", False),
        ("00-short", False),
        ("", False),
        ("x" * 100_000, False),
        ("\ufffd", False),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_a_traceparent_is_kept_if_it_is_one(header: str, kept: bool) -> None:
    assert row_of({}, headers={"traceparent": header}).traceparent == (header if kept else None)


@examples(200)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.dictionaries(
            st.sampled_from(
                [
                    *("id", "event_id", "timestamp", "session_id", "parent_event_id", "root_event_id", "event_depth"),
                    *("context_ref", "context", "context_kind", "data", "v", "source_id", "unknown"),
                ]
            ),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(),
                lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
                max_leaves=4,
            ),
        ).map(msgspec.json.encode),
    ),
    st.one_of(
        st.sampled_from(["ctx.ns.event.a.b", "$KV.ctx-hot.ns." + "a" * 32, "$KV.ctx-keys.ns.k", "ctx.x--.event.a.b"]),
        st.text(max_size=30),
    ),
    st.dictionaries(
        st.sampled_from(["Nats-Msg-Id", "Hf-Kind", "Hf-Exp", "Hf-Form", "traceparent"]), st.text(max_size=20)
    ),
)
@example(b"{}", "$KV.ctx-hot.ns.\u00b2", {})
def test_any_message_decodes_the_same_way_twice_or_is_a_typed_error(
    payload: bytes, subject: str, headers: dict[str, str]
) -> None:
    message = raw(payload, subject=subject, headers=headers)
    longest = 0
    for table in TABLES:
        try:
            row = decode_row(table, message)
        except HoldfastError as error:
            longest = max(longest, len(str(error)))
            continue
        assert decode_row(table, message) == row
        assert (row.epoch, row.seq, row.stored_at_ms) == ("e1", 42, STORED_MS)
        msgspec.json.encode(row)
    assert longest < 1_000


class TestOtherTables:
    def test_a_context_message_is_its_row(self) -> None:
        (form,) = seal("n.s", "note", b'{"a":1}', expires_at_ms=5)
        message = raw(form.payload, subject=hot_subject("n.s", form.digest), headers=form.headers)
        row = decode_context(message)
        assert row == decode_row("contexts", message)
        assert isinstance(row, ContextRow)
        assert (row.namespace, row.kind, row.body, row.expires_at_ms) == ("n.s", "note", b'{"a":1}', 5)
        assert (row.seq, row.epoch, row.stored_at_ms) == (42, "e1", STORED_MS)
        with pytest.raises(DigestMismatchError):
            decode_context(msgspec.structs.replace(message, subject=hot_subject("other", form.digest)))

    def test_a_key_version_is_its_row(self) -> None:
        sent = {"version": 3, "op": "put", "ref": REF, "tags": ["a"], "timestamp_ms": 5, "confidence": 0.5}
        row = decode_key_version(raw(sent, subject="$KV.ctx-keys.ns.plan.x--a_20b"))
        assert isinstance(row, KeyVersionRow)
        assert (row.namespace, row.key, row.version, row.op) == ("ns", "plan.a b", 3, "put")
        assert (row.ref, row.tags, row.timestamp_ms, row.confidence) == (REF, ("a",), 5, 0.5)
        assert (
            decode_key_version(raw({"version": 1, "op": "delete"}, subject="$KV.ctx-keys.ns.k")).timestamp_ms
            == STORED_MS
        )

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"[]",
            b"{}",
            {"version": 1},
            {"version": "1", "op": "put"},
            {"version": 1, "op": "other"},
            {"version": 1, "op": "put", "ref": "x"},
            {"version": 1, "op": "put", "tags": "a"},
            {"version": 1, "op": "put", "confidence": "high"},
            b'{"version":1,"op":"put","source":"\xff"}',
            b"[" * 10_000,
        ],
        ids=lambda value: repr(value)[:30],
    )
    def test_a_bad_key_version_is_refused(self, payload: Any) -> None:
        with pytest.raises(HoldfastError):
            decode_key_version(raw(payload, subject="$KV.ctx-keys.ns.k"))


JSON_VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63) | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner | st.none(), max_size=3) | st.dictionaries(st.text(), inner | st.none(), max_size=3),
    max_leaves=8,
)
ID_TEXTS = st.none() | st.text(min_size=1, max_size=20)
EVENT_IDS = st.one_of(st.integers(0, 253_402_300_799_999).map(new_event_id), st.uuids().map(str))
NAMES = st.text(min_size=1, max_size=16).filter(lambda name: name.count(":") < 16)


@examples(200)
@given(
    st.builds(
        NewEvent,
        namespace=NAMES,
        agent_id=NAMES,
        name=NAMES,
        id=EVENT_IDS,
        timestamp_ms=st.integers(0, 253_402_300_799_999),
        data=st.none() | JSON_VALUES,
        context_ref=st.none() | st.just(Ref(REF)),
        session_id=ID_TEXTS,
        correlation_id=ID_TEXTS,
        parent_event_id=st.none() | EVENT_IDS,
        root_event_id=st.none() | EVENT_IDS,
        event_depth=st.integers(0, 2**31 - 1),
        client_id=ID_TEXTS,
        originator=ID_TEXTS,
        source_id=ID_TEXTS,
        traceparent=st.none() | st.just("00-" + "a" * 32 + "-" + "b" * 16 + "-01"),
    )
)
def test_what_is_encoded_decodes_to_the_same(event: NewEvent) -> None:
    outgoing = encode_event(event)
    assert outgoing.subject == event_subject(event.namespace, event.agent_id, event.name)
    message = StoredMessage(outgoing.subject, outgoing.headers, outgoing.payload, 42, STORED_MS, "e1")
    decoded = decode_event(message)
    row = decoded.row
    assert decoded.inline is None
    for field in (
        *("namespace", "agent_id", "name", "id", "timestamp_ms", "context_ref", "session_id", "correlation_id"),
        *("parent_event_id", "event_depth", "client_id", "originator", "source_id", "traceparent"),
    ):
        assert getattr(row, field) == getattr(event, field), field
    own_root = event.id if event.parent_event_id is None else None
    assert row.root_event_id == (event.root_event_id or own_root)
    assert (None if row.data is None else msgspec.json.decode(row.data)) == event.data
    assert row.extra is None


def test_an_event_of_the_sdk_says_nothing_twice() -> None:
    event = NewEvent(namespace="ns", agent_id="a", name="b:c", data={"x": 1}, timestamp_ms=None)
    stamped = msgspec.structs.replace(event, timestamp_ms=int(event.id.replace("-", "")[:12], 16))
    assert encode_event(event).payload == encode_event(stamped).payload == b'{"data":{"x":1}}'
    assert encode_event(event).headers == {"Nats-Msg-Id": f"ns.{event.id}"}
    assert abs(now_ms() - (stamped.timestamp_ms or 0)) < 60_000
    identity, source_id = normal_event_id("ns", "evt_1")
    of_producer = msgspec.structs.replace(event, id=identity, source_id=source_id)
    assert encode_event(of_producer).payload == b'{"data":{"x":1}}'
