"""What callers give to ``hf.keys``: taken as it is meant, or refused by name."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.client.key_arguments import (
    check_expected_version,
    check_moment_ms,
    check_prefix,
    check_tags,
    check_ttl_ms,
    check_version,
)
from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidFieldError, InvalidNameError, TooLargeError
from tests.support import examples, stable_id


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ((), ()),
        (["b", "a", "b"], ("b", "a")),
        ({"only"}, ("only",)),
        ((tag for tag in ("x", "y")), ("x", "y")),
        (["ü", " ", "a.b", "\x00"], ("ü", " ", "a.b", "\x00")),
        (["x" * limits.ID_CHARS], ("x" * limits.ID_CHARS,)),
        ([str(n) for n in range(limits.TAGS)] * 2, tuple(str(n) for n in range(limits.TAGS))),
    ],
    ids=stable_id,
)
def test_E34_tags_are_kept_in_order_each_once(tags: Any, expected: tuple[str, ...]) -> None:
    assert check_tags(tags) == expected


@pytest.mark.parametrize(
    "tags", ["important", b"important", 5, None, [5], [None], [""], ["x" * (limits.ID_CHARS + 1)], ["\ud800"]]
)
def test_E34_what_is_no_list_of_text_is_no_tags(tags: Any) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        check_tags(tags)
    assert caught.value.field == "tags"


def test_E34_too_many_tags_are_told_with_the_limit() -> None:
    with pytest.raises(TooLargeError) as caught:
        check_tags(str(n) for n in range(limits.TAGS + 1))
    assert (caught.value.field, caught.value.limit) == ("tags", limits.TAGS)


@pytest.mark.parametrize(
    ("ttl", "milliseconds"),
    [
        (None, None),
        (1, 1_000),
        (0.25, 250),
        (1e-9, 1),
        (math.inf, math.inf),
        (limits.TTL_S, limits.TTL_S * 1_000),
        (timedelta(minutes=2), 120_000),
        (timedelta(microseconds=1), 1),
    ],
)
def test_E31_times_to_live_are_seconds_or_timedeltas(ttl: Any, milliseconds: float | None) -> None:
    assert check_ttl_ms(ttl) == milliseconds


@pytest.mark.parametrize(
    "ttl", [0, -1, -math.inf, math.nan, True, False, "5", limits.TTL_S + 1, timedelta(0), timedelta(days=-1), [1], b"1"]
)
def test_E31_other_times_to_live_are_refused_with_the_limit(ttl: Any) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        check_ttl_ms(ttl)
    assert (caught.value.field, caught.value.limit) == ("ttl", limits.TTL_S)
    assert len(str(caught.value)) < 300


@examples(200)
@given(st.floats() | st.integers())
def test_E31_any_number_is_a_time_to_live_of_at_least_a_millisecond_or_refused(ttl: float) -> None:
    try:
        milliseconds = check_ttl_ms(ttl)
    except InvalidFieldError:
        assert not 0 < ttl <= limits.TTL_S
        return
    assert milliseconds is not None
    assert milliseconds == math.inf or 1 <= milliseconds <= limits.TTL_S * 1_000
    assert ttl == math.inf or abs(milliseconds - ttl * 1_000) <= 1


def test_moments_are_milliseconds_whatever_their_zone() -> None:
    moment = datetime(2026, 1, 1, 12, 0, 0, 123_999, tzinfo=UTC)
    assert check_moment_ms(moment, "as_of") == 1_767_268_800_123
    assert check_moment_ms(moment.astimezone(timezone(timedelta(hours=-7))), "as_of") == 1_767_268_800_123
    assert check_moment_ms(datetime(1950, 1, 1, tzinfo=UTC), "as_of") == 0


@pytest.mark.parametrize("moment", [None, 5, "2026-01-01", datetime(2026, 1, 1)])  # noqa: DTZ001  what is refused
def test_a_moment_without_a_zone_is_refused(moment: Any) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        check_moment_ms(moment, "as_of")
    assert caught.value.field == "as_of"


@pytest.mark.parametrize("version", [0, 1, -1, 2**80])
def test_the_number_of_a_version_is_any_whole_number(version: int) -> None:
    assert check_version(version) == version


@pytest.mark.parametrize("version", [None, True, 1.0, "1", b"1", [1]])
def test_what_is_no_whole_number_is_no_version(version: Any) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        check_version(version, "v1")
    assert caught.value.field == "v1"


def test_an_expected_version_is_none_zero_or_a_number() -> None:
    assert [check_expected_version(version) for version in (None, 0, 7)] == [None, 0, 7]
    for wrong in (-1, True, 1.5, "1"):
        with pytest.raises(InvalidFieldError) as caught:
            check_expected_version(wrong)
        assert caught.value.field == "expected_version"


def test_a_prefix_is_the_beginning_of_a_key() -> None:
    for prefix in ("", "a", "a.", "a..b", ".", "x" * limits.KEY_BYTES, "ü*>$ "):
        assert check_prefix(prefix) == prefix
    for wrong in (None, 5, b"a", "x" * (limits.KEY_BYTES + 1), "." * limits.KEY_SEGMENTS, "\ud800"):
        with pytest.raises(InvalidNameError) as caught:
            check_prefix(wrong)
        assert caught.value.field == "key"
