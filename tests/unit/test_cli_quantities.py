"""Durations, times and sizes as they are written and read on the command line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from holdfast.ops.cli.quantities import format_bytes, format_seconds, parse_duration_s, parse_moment
from holdfast.schemas.errors import InvalidFieldError

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0s", 0), ("250ms", 0.25), ("15m", 900), ("24h", 86_400), ("7d", 604_800), ("2w", 1_209_600), ("1h30m", 5_400),
     ("1.5h", 5_400)],
)  # fmt: skip
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration_s(text, "older-than") == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "-1s", "1 h", "1h 30m", "1y", "h1", "99999999d", "nan", "1e3s", "0s\n"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidFieldError, match="24h") as caught:
        parse_duration_s(text, "older-than")
    assert caught.value.field == "older-than"


def test_a_moment_is_iso_or_that_long_ago() -> None:
    assert parse_moment("2026-01-31T09:30:00Z", "since", NOW) == datetime(2026, 1, 31, 9, 30, tzinfo=UTC)
    assert parse_moment("2026-01-31T09:30:00+02:00", "since", NOW) == datetime(2026, 1, 31, 7, 30, tzinfo=UTC)
    assert parse_moment("2026-01-31", "since", NOW) == datetime(2026, 1, 31, tzinfo=UTC)
    assert parse_moment("15m", "since", NOW) == NOW - timedelta(minutes=15)


@pytest.mark.parametrize("text", ["yesterday", "", "2026-13-01", "12"])
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(InvalidFieldError, match="is not a time"):
        parse_moment(text, "since", NOW)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1024, "1 KiB"), (1_300_000, "1.24 MiB"), (1 << 30, "1 GiB"),
     (999.7 * 1024, "0.976 MiB"), (5 << 50, "5.12e+03 TiB")],
)  # fmt: skip
def test_sizes_have_three_digits(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.00018, "180 µs"), (0.0016, "1.6 ms"), (2.3149, "2.31 s"), (60, "60 s")]
)
def test_measured_times_have_a_fitting_unit(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
