"""Identifiers and clocks: UUIDv7 for new things, UUIDv8 for things that carry a foreign id."""

from __future__ import annotations

import os
import re
import time
import uuid
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Final, NewType

MAX_MS: Final = 253_402_300_799_999
"""The last millisecond of the year 9999, UTC."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

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
    return EventId(str(uuid.UUID(int=value)))


def derived_event_id(namespace: str, *source: str) -> EventId:
    """Returns the UUIDv8 (RFC 9562, 5.8) of a foreign id: always the same for the same namespace and source."""
    hasher = blake2b(digest_size=16, person=b"holdfast-evt-1")
    for part in (namespace, *source):
        raw = part.encode("utf-8", "surrogatepass")
        hasher.update(len(raw).to_bytes(8, "little"))
        hasher.update(raw)
    value = int.from_bytes(hasher.digest())
    value = value & ~(0xF << 76) | 0x8 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return EventId(str(uuid.UUID(int=value)))


def is_canonical_uuid(text: str) -> bool:
    """Whether ``text`` is a UUID in its usual text form, in lower case."""
    return _CANONICAL_UUID.match(text) is not None


def normal_event_id(namespace: str, source_id: str) -> tuple[EventId, str | None]:
    """Returns the event id of an id given by a producer, and the original when it is not a UUID itself."""
    # Only the canonical form is an id of ours, not braces, a URN or upper case, which uuid.UUID also takes.
    if is_canonical_uuid(source_id):
        return EventId(source_id), None
    return derived_event_id(namespace, "source-id", source_id), source_id


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
