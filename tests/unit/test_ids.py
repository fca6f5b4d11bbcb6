"""Identifiers: the bits of RFC 9562, the order of time, the stability of what is derived."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdfast.schemas.ids import (
    MAX_MS,
    derived_event_id,
    iso_from_ms,
    ms_from_utc,
    new_event_id,
    normal_event_id,
    now_ms,
    packed_event_id,
    unpacked_source_id,
    utc_from_ms,
)

TIMES = st.integers(0, MAX_MS)


@given(TIMES)
def test_a_new_id_is_a_version_7_of_its_time(at_ms: int) -> None:
    value = uuid.UUID(new_event_id(at_ms))
    assert (value.version, value.variant) == (7, uuid.RFC_4122)
    assert value.int >> 80 == at_ms
    assert str(value) == new_event_id(at_ms)[:14] + str(value)[14:]


def test_new_ids_are_new_and_of_now() -> None:
    before = now_ms()
    ids = [new_event_id() for _ in range(10_000)]
    after = now_ms()
    assert len(set(ids)) == 10_000
    stamps = [uuid.UUID(each).int >> 80 for each in ids]
    assert before <= min(stamps) <= max(stamps) <= after
    # Every one of the 74 random bits is drawn.
    drawn = 0
    for each in ids:
        drawn |= uuid.UUID(each).int ^ uuid.UUID(ids[0]).int
    assert drawn & (1 << 80) - 1 == (1 << 80) - 1 - (0xF << 76) - (0x3 << 62)


@given(st.lists(TIMES, min_size=2, max_size=2, unique=True))
def test_ids_sort_by_time(times: list[int]) -> None:
    earlier, later = sorted(times)
    assert new_event_id(earlier) < new_event_id(later)


@given(st.text(), st.lists(st.text(), max_size=3))
@example("ns", ["\ud800"])
def test_a_derived_id_is_a_version_8_and_always_the_same(namespace: str, source: list[str]) -> None:
    derived = derived_event_id(namespace, *source)
    value = uuid.UUID(derived)
    assert (value.version, value.variant) == (8, uuid.RFC_4122)
    assert derived == derived_event_id(namespace, *source)


def test_derived_ids_are_pinned() -> None:
    """They are stored: another release must derive the same."""
    assert derived_event_id("default", "source-id", "step-1") == "140c3cd8-c98e-8aa1-8d46-d6fdc47fba77"
    assert derived_event_id("türkis", "position", "e1", "42") == "ade2dae0-d056-85b7-b7ef-082f30effec6"


@given(st.lists(st.text(max_size=4), max_size=4), st.lists(st.text(max_size=4), max_size=4))
def test_derived_ids_of_different_sources_differ(one: list[str], other: list[str]) -> None:
    assert (derived_event_id("n", *one) == derived_event_id("n", *other)) == (one == other)


@given(st.uuids())
def test_a_uuid_is_its_own_id_in_canonical_form_only(value: uuid.UUID) -> None:
    text = str(value)
    assert normal_event_id("n", text) == (text, None)
    for form in (text.upper(), f"{{{text}}}", f"urn:uuid:{text}", value.hex, f" {text}", f"{text}\n"):
        if form != text:
            derived, source = normal_event_id("n", form)
            assert (source, uuid.UUID(derived).version) == (form, 8)


HEX_DIGITS = "0123456789abcdef"
SHORT_IDS = st.one_of(
    st.from_regex(r"[a-z]{1,6}[_.:-]?[0-9a-f]{0,12}", fullmatch=True),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=24),
    st.text(HEX_DIGITS, min_size=1, max_size=24),
)

PACKED = {
    "evt_abc123": "1d1d4665-7674-85f0-8000-000000abc123",
    "evt_00000007": "1d1d4865-7674-85f0-8000-000000000007",
    "7": "1d1d0100-0000-8000-8000-000000000007",
    "~": "1d1d107e-0000-8000-8000-000000000000",
    "order-17": "1d1d626f-7264-8657-822d-000000000017",
    "Order:A9F": "1d1d904f-7264-8657-823a-413946000000",
    "00f067aa0ba902b7": "1d1d1f30-0000-8000-80f0-67aa0ba902b7",  # sixteen digits: the first is a prefix
    "span0f067aa0ba902b7": "1d1d4f73-7061-86e0-80f0-67aa0ba902b7",  # the longest
    "no-hex-in-it": "1d1dc06e-6f2d-8686-8578-2d696e2d6974",
}


@pytest.mark.parametrize("source_id", PACKED)
def test_packed_ids_are_pinned(source_id: str) -> None:
    """They are stored: another release must pack and unpack the same."""
    assert normal_event_id("any namespace", source_id) == (PACKED[source_id], source_id)
    # An id that says more than itself says so too when it is given as the UUID.
    assert normal_event_id("another", PACKED[source_id]) == (PACKED[source_id], source_id)


@given(SHORT_IDS)
def test_what_is_packed_is_unpacked(source_id: str) -> None:
    packed = packed_event_id(source_id)
    digits = min(15, len(source_id) - len(source_id.rstrip(HEX_DIGITS)))
    assert (packed is not None) == (2 * (len(source_id) - digits) + digits <= 24)
    if packed is not None:
        value = uuid.UUID(packed)
        assert (str(value), value.version, value.variant) == (packed, 8, uuid.RFC_4122)
        assert unpacked_source_id(packed) == source_id


@pytest.mark.parametrize(
    "source_id", ["", "a b", "évt_1", "evt\x7f1", "evt_1\n", "\ud800", "evt-without-hex", "1" * 25]
)
def test_what_does_not_fit_is_hashed(source_id: str) -> None:
    assert packed_event_id(source_id) is None
    event_id, kept = normal_event_id("n", source_id)
    assert (event_id, kept) == (derived_event_id("n", "source-id", source_id), source_id)
    assert unpacked_source_id(event_id) is None


@given(
    st.text(HEX_DIGITS, min_size=2, max_size=2),
    st.one_of(st.text(HEX_DIGITS, min_size=26, max_size=26), SHORT_IDS.map(lambda text: text.encode().hex())),
)
@example("10", "61".ljust(26, "0"))  # "a" is a digit, not a prefix
@example("12", "7e" + "1" + "0" * 23)  # more than zeros between
@example("00", "0" * 26)
@example("f0", "21" * 13)
@example("0f", "0" * 10 + "f" * 16)
def test_there_is_one_spelling_of_each_packed_id(lengths: str, rest: str) -> None:
    """Whatever UUID begins like a packed id: either it is the very one of what it holds, or it holds nothing."""
    digits = ("1d1d" + lengths + rest.ljust(26, "0"))[:32]
    for version, variant in (("8", "8"), (digits[12], digits[16])):
        text = digits[:12] + version + digits[13:16] + variant + digits[17:]
        value = str(uuid.UUID(text))
        held = unpacked_source_id(value)
        assert held is None or packed_event_id(held) == value
        assert normal_event_id("n", value) == (value, held)


@pytest.mark.parametrize(
    "text", ["1d1d", "1d1d4665-7674-85f0-8000-000000abc12", "1D1D4665-7674-85F0-8000-000000ABC123"]
)
def test_what_is_no_event_id_holds_nothing(text: str) -> None:
    assert unpacked_source_id(text) is None


def test_no_hash_begins_like_a_packed_id() -> None:
    """Of 65,536 hashes one would: this is the first of them."""
    assert derived_event_id("n", "source-id", f"{41920:025d}") == "9d1dc205-ca90-8d13-a7e7-311ada6b910e"


@given(TIMES)
@example(MAX_MS)
@example(0)
def test_times_go_through_datetime_and_iso_exactly(at_ms: int) -> None:
    moment = utc_from_ms(at_ms)
    assert moment.tzinfo is UTC
    assert ms_from_utc(moment) == at_ms
    text = iso_from_ms(at_ms)
    assert text.endswith("Z")
    assert len(text) == len("2026-01-31T09:30:00.125Z")
    assert ms_from_utc(datetime.fromisoformat(text)) == at_ms


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (datetime(1970, 1, 1, tzinfo=UTC), 0),
        (datetime(1970, 1, 1, 0, 0, 0, 1_999, tzinfo=UTC), 1),
        (datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), -1),
        (datetime(1970, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))), 0),
    ],
)
def test_milliseconds_are_floored(moment: datetime, expected: int) -> None:
    assert ms_from_utc(moment) == expected
