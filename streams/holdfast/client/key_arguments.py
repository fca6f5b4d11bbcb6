"""What callers give to ``hf.keys``, checked: tags, times to live, moments."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import cast

from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidFieldError, TooLargeError
from holdfast.schemas.ids import ms_from_utc
from holdfast.schemas.names import check_key
from holdfast.streams.events import check_id_text

Ttl = float | timedelta | None
"""Time to live, in seconds or as a timedelta.  None: as the policy of the key's prefix says, else for ever;
``math.inf``: for ever."""


def check_tags(tags: object) -> tuple[str, ...]:
    """Returns tags, each once; raises InvalidFieldError for what are none, TooLargeError for too many."""
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise InvalidFieldError("tags is not a list of text", field="tags", hint='such as tags=["important"]')
    checked = tuple(dict.fromkeys(check_id_text(tag, "tags") for tag in cast("Iterable[object]", tags)))
    if len(checked) > limits.TAGS:
        raise TooLargeError(
            f"there are {len(checked)} tags, the limit is {limits.TAGS}", field="tags", limit=limits.TAGS
        )
    return checked


def check_prefix(prefix: object) -> str:
    """Returns the beginning of keys when there can be such keys; raises InvalidNameError otherwise."""
    return "" if prefix == "" else check_key(prefix)


def check_expected_version(expected: object) -> int | None:
    """Returns the number of the version that is expected, 0 for "there is none", or None for any."""
    number = None if expected is None else check_version(expected, "expected_version")
    if number is not None and number < 0:
        raise InvalidFieldError(
            f"expected_version {number} is below 0", field="expected_version", limit=0, hint="0 stands for no version"
        )
    return number


def check_ttl_ms(ttl: object) -> float | None:
    """Returns a time to live in milliseconds, ``math.inf`` for ever, None for the default of the prefix."""
    if ttl is None:
        return None
    seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
    if isinstance(seconds, int | float) and not isinstance(seconds, bool):
        if seconds == math.inf:
            return math.inf
        if 0 < seconds <= limits.TTL_S:
            return max(1, round(seconds * 1000))
    raise InvalidFieldError(
        f"ttl {repr(ttl)[:40]} is not over 0 and up to {limits.TTL_S} seconds",
        field="ttl",
        limit=limits.TTL_S,
        hint="None for the default of the prefix, math.inf for no end",
    )


def check_moment_ms(moment: object, field: str) -> int:
    """Returns integer milliseconds since 1970 of an aware datetime."""
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise InvalidFieldError(
            f"{field} is not a datetime with a time zone", field=field, hint="use datetime.now(UTC)"
        )
    return max(0, ms_from_utc(moment))


def check_version(version: object, field: str = "version") -> int:
    """Returns the number of a version; any whole number, since there may be none of it."""
    if isinstance(version, int) and not isinstance(version, bool):
        return version
    raise InvalidFieldError(f"{field} {repr(version)[:40]} is not a whole number", field=field)
