"""Identifiers and clocks: UUIDv7 for new things, UUIDv8 for things that carry a foreign id.

A short foreign id is packed into its UUID and can be read out of it again; any other is hashed (ADR 12).  The
hexadecimal digits of a packed id, without hyphens::

    1d1d p h xxxxxx 8 xxx 8 xxxxxxxxxxxxxxx      evt_abc123  ->  1d1d4665-7674-85f0-8000-000000abc123

``x`` are 24 digits: from the left a prefix of ``p`` bytes, from the right ``h`` digits that stand for themselves, zeros
between.  ``h`` counts the hexadecimal digits that the id ends in, at most 15, and the prefix is what is before them: so
there is one spelling of each id, and the ids of one producer share all but their last digits.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import blake2b
from typing import Final, NewType

MAX_MS: Final = 253_402_300_799_999
"""The last millisecond of the year 9999, UTC."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

PACKED_MARK: Final = "1d1d"
"""What a packed id begins with, and no id derived by a hash."""

PACKED_DIGITS: Final = 24
"""Hexadecimal digits that a packed id has room for: two for each byte of the prefix, one for each digit behind it."""

PACKED_TAIL: Final = 15
"""Most digits that stand for themselves: those behind the variant of the UUID."""

_PREFIX: Final = re.compile(r"[!-~]*\Z")

_CANONICAL_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z")

EventId = NewType("EventId", str)
"""A UUID in its usual text form: version 7 when Holdfast makes it, version 8 when derived from a foreign id."""


def now_ms() -> int:
    """Returns wall time as integer milliseconds since 1970 UTC."""
    return time.time_ns() // 1_000_000


def new_event_id(at_ms: int | None = None) -> EventId:
    """Returns a new UUIDv7 (RFC 9562, 5.7): 48 bits of milliseconds, then 74 random bits."""
    stamp = now_ms() if at_ms is None else at_ms
    value = (stamp & (1 << 48) - 1) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    # As uuid.UUID writes it, in a third of the time: every write makes one.
    digits = f"{value:032x}"
    return EventId(f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}")


def derived_event_id(namespace: str, *source: str) -> EventId:
    """Returns the UUIDv8 (RFC 9562, 5.8) of a foreign id: always the same for the same namespace and source.

    It is never one of :func:`packed_event_id`.
    """
    hasher = blake2b(digest_size=16, person=b"holdfast-evt-1")
    for part in (namespace, *source):
        raw = part.encode("utf-8", "surrogatepass")
        hasher.update(len(raw).to_bytes(8, "little"))
        hasher.update(raw)
    value = int.from_bytes(hasher.digest())
    value = value & ~(0xF << 76) | 0x8 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    if value >> 112 == int(PACKED_MARK, 16):
        value ^= 1 << 127
    return EventId(str(uuid.UUID(int=value)))


def packed_event_id(source_id: str) -> EventId | None:
    """Returns the UUIDv8 that holds a foreign id itself; None for one that does not fit.

    What fits is printable ASCII without blanks, of up to 12 to 19 characters: the more of its last ones are hexadecimal
    digits in lower case, the longer.
    """
    if not 0 < len(source_id) <= PACKED_DIGITS:
        return None
    tail = min(len(source_id) - len(source_id.rstrip("0123456789abcdef")), PACKED_TAIL)
    prefix, digits = source_id[: len(source_id) - tail], source_id[len(source_id) - tail :]
    if 2 * len(prefix) + tail > PACKED_DIGITS or not _PREFIX.match(prefix):
        return None
    room = prefix.encode().hex().ljust(PACKED_DIGITS - tail, "0") + digits
    lengths = f"{len(prefix):x}{tail:x}"
    return EventId(f"{PACKED_MARK}{lengths}{room[:2]}-{room[2:6]}-8{room[6:9]}-8{room[9:12]}-{room[12:]}")


def unpacked_source_id(event_id: str) -> str | None:
    """Returns the foreign id that an event id holds, the inverse of :func:`packed_event_id`; None when it holds none.

    Of 6,000,000,000 random UUIDv8 of other makers one looks as if it held one.
    """
    if not event_id.startswith(PACKED_MARK) or not is_canonical_uuid(event_id):
        return None
    room = event_id[6:8] + event_id[9:13] + event_id[15:18] + event_id[20:23] + event_id[24:]
    size, tail = 2 * int(event_id[4], 16), int(event_id[5], 16)
    if size > PACKED_DIGITS - tail:
        return None
    source_id = bytes.fromhex(room[:size]).decode("latin-1") + room[PACKED_DIGITS - tail :]
    # Zeros between, prefix, count of digits, version and variant: all as they are made.
    return source_id if packed_event_id(source_id) == event_id else None


def is_canonical_uuid(text: str) -> bool:
    """Whether ``text`` is a UUID in its usual text form, in lower case."""
    return _CANONICAL_UUID.match(text) is not None


def normal_event_id(namespace: str, source_id: str) -> tuple[EventId, str | None]:
    """Returns the event id of an id given by a producer, and the original when it is not a UUID itself.

    The original follows from the event id wherever that holds it, so also of a packed id that is given as a UUID.
    Short originals have the same event id in every namespace: what names an event is namespace and id.
    """
    # Only the canonical form is an id of ours, not braces, a URN or upper case, which uuid.UUID also takes.
    if is_canonical_uuid(source_id):
        return EventId(source_id), unpacked_source_id(source_id)
    if len(source_id) > _REMEMBERED_LENGTH:
        return _given_event_id(namespace, source_id), source_id
    return _remembered_event_id(namespace, source_id), source_id


def _given_event_id(namespace: str, source_id: str) -> EventId:
    return packed_event_id(source_id) or derived_event_id(namespace, "source-id", source_id)


# An event's id comes back soon, as the parent and the root of those behind it, and in each worker that decodes them.
_remembered_event_id = lru_cache(maxsize=4096)(_given_event_id)
_REMEMBERED_LENGTH: Final = 128
"""Longer ids are worked out anew: what is remembered is bounded in bytes too."""


def utc_from_ms(at_ms: int) -> datetime:
    """Returns the aware UTC datetime of integer milliseconds since 1970."""
    # Not fromtimestamp: a float of seconds loses milliseconds in far years.
    return _EPOCH + timedelta(milliseconds=at_ms)


def ms_from_utc(moment: datetime) -> int:
    """Returns integer milliseconds since 1970 of an aware datetime, floored."""
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def iso_from_ms(at_ms: int) -> str:
    """Returns ISO 8601 with milliseconds and ``Z``, such as ``2026-01-31T09:30:00.125Z``."""
    return utc_from_ms(at_ms).isoformat(timespec="milliseconds").replace("+00:00", "Z")
