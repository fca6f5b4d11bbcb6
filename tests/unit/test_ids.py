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
