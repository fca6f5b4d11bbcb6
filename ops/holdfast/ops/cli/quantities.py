"""Durations, times and sizes as people write and read them."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from typing import Final

from holdfast.schemas.errors import InvalidFieldError

_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)")
_DURATION: Final = re.compile(rf"(?:{_PART.pattern})+\Z")
_LONGEST_S: Final = 315_360_000.0
"""Ten years, as everywhere in the settings."""

_SIZES: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def parse_duration_s(text: str, field: str) -> float:
    """Returns the seconds of ``0s``, ``15m``, ``24h``, ``7d``, ``1h30m``; raises InvalidFieldError otherwise."""
    if _DURATION.match(text):
        total_s = sum(float(number) * _UNITS_S[unit] for number, unit in _PART.findall(text))
        if math.isfinite(total_s) and total_s <= _LONGEST_S:
            return total_s
    raise InvalidFieldError(
        f"{field} {text[:40]!r} is not a duration up to ten years", field=field, hint="write it like 0s, 15m, 24h or 7d"
    )


def parse_moment(text: str, field: str, now: datetime) -> datetime:
    """Returns the UTC time of ISO 8601 text (without a zone it is UTC), or of a duration: that long before ``now``."""
    if _DURATION.match(text):
        return now - timedelta(seconds=parse_duration_s(text, field))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidFieldError(
            f"{field} {text[:40]!r} is not a time",
            field=field,
            hint="write it like 2026-01-31T09:30:00Z, or 15m for a quarter of an hour ago",
        ) from error
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def format_bytes(count: float) -> str:
    """Returns a size with three significant digits: ``0 B``, ``1.21 KiB``, ``43.2 MiB``."""
    size = float(count)
    for unit in _SIZES:
        if size < 999.5 or unit == _SIZES[-1]:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """Returns a time that was measured: ``180 µs``, ``1.6 ms``, ``2.31 s``."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s"
