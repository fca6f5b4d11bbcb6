"""How one value of an embedded event is spelled, and spelled again from what the store holds.

A *hole* stands in a form (see :mod:`holdfast.ops.embedded.form`) for a value that the event's own columns hold; it says
which, and in which spelling.  Each function returns None for a spelling that it cannot give back exactly: such a value
stays in the form as it is.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Final, NamedTuple

import msgspec

from holdfast.schemas.ids import MAX_MS, iso_from_ms

TEXT: Final = ""
UTF8: Final = "utf8"
"""Text with its characters as they are; :data:`TEXT` escapes what is not ASCII, as most writers of JSON do."""
SECONDS: Final = "s"
WHOLE_SECONDS: Final = "whole-s"
MILLISECONDS: Final = "ms"
ISO: Final = "iso"

_WHOLE: Final = re.compile(r"0|[1-9]\d{0,15}")
_DECIMAL: Final = re.compile(r"(0|[1-9]\d{0,11})\.(\d{1,40})")
_ISO: Final = re.compile(r'"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3})(\d{0,9})(Z|\+00:00|)"')
_LARGEST_SECONDS: Final = 10**11
_DECODER: Final = msgspec.json.Decoder()


class Time(NamedTuple):
    """A time as it was spelled: milliseconds, the digits behind them, and the spelling."""

    at_ms: int
    digits: str
    spelling: str


def text_in(raw: bytes) -> str | None:
    """Returns the text that a raw JSON value is; None for what is none."""
    if raw[:1] != b'"':
        return None
    value = _DECODER.decode(raw)
    return value if isinstance(value, str) else None


def spelling_of(raw: bytes, text: str) -> str | None:
    """Returns which spelling of ``text`` ``raw`` is."""
    return next((spelling for spelling in (TEXT, UTF8) if spell_text(text, spelling) == raw), None)


def spell_text(text: str, spelling: str) -> bytes:
    """Returns text as a JSON string."""
    return json.dumps(text, ensure_ascii=spelling == TEXT).encode("utf-8", "surrogatepass")


def whole_in(raw: bytes) -> int | None:
    """Returns the whole number that a raw JSON value plainly is."""
    text = raw.decode("ascii", "replace")
    return int(text) if _WHOLE.fullmatch(text) else None


def time_in(raw: bytes) -> Time | None:
    """Returns the time that a raw JSON value is: seconds, milliseconds (above 1e11) or ISO 8601 in UTC."""
    text = raw.decode("ascii", "replace")
    whole = whole_in(raw)
    decimal = _DECIMAL.fullmatch(text)
    iso = _ISO.fullmatch(text)
    found: Time | None = None
    if whole is not None:
        found = Time(whole, "", MILLISECONDS) if whole > _LARGEST_SECONDS else Time(whole * 1000, "", WHOLE_SECONDS)
    elif decimal is not None:
        fraction = decimal[2]
        found = Time(int(decimal[1]) * 1000 + int(fraction[:3].ljust(3, "0")), fraction[3:], SECONDS)
    elif iso is not None:
        try:
            moment = datetime.fromisoformat(iso[1] + "+00:00")
        except ValueError:
            return None
        found = Time(round(moment.timestamp() * 1000), iso[2], f"{ISO}{iso[3]}")
    if found is None or not 0 <= found.at_ms <= MAX_MS or spell_time(found) != raw:
        return None
    return found


def spell_time(time: Time) -> bytes:
    """Returns a time as the JSON value that it was."""
    if time.spelling == MILLISECONDS:
        return b"%d" % time.at_ms
    seconds, ms = divmod(time.at_ms, 1000)
    if time.spelling == WHOLE_SECONDS:
        return b"%d" % seconds
    if time.spelling == SECONDS:
        # As the shortest decimal is written: 0.5, not 0.500, and 7.0 for whole seconds.
        fraction = f"{ms:03}{time.digits}" if time.digits else f"{ms:03}".rstrip("0") or "0"
        return f"{seconds}.{fraction}".encode()
    return f'"{iso_from_ms(time.at_ms)[:-1]}{time.digits}{time.spelling.removeprefix(ISO)}"'.encode()
