"""Reads any JSON lines, or a JSON array, by a map that says which member is what: ``--map``.

``session=trace_id,id=span_id,parent=parent_span_id,timestamp=start.time,agent==planner``: dotted paths into the record;
what begins with ``=`` is itself the value.

=============  ==========================================================  ======================================
field          what it is                                                  when it is left out
=============  ==========================================================  ======================================
session        the session                                                 one for the file, named by its content
id             what other records call this one; text or a whole number    it is nobody's cause
parent         the id of the record that this one follows from             see ``otherwise``
agent          who did it                                                  ``agent``
name           the event's name                                            ``step:<kind>``
kind           what sort of record it is                                   ``record``
timestamp      ISO 8601, or seconds, ms, µs or ns since 1970               the time of storing
correlation    the correlation id                                          the session
body           what to store as the context                                the whole record
otherwise      of a record without a cause in the file: ``none`` or        ``none``, and without ``parent``
               ``previous`` (the one before it in its session)             ``previous``
=============  ==========================================================  ======================================

A parent is looked for in its own session, then, where only one record of the file has that id, anywhere.  A UUID is
the event's id; any other id is part of what the event's own is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, cast

import msgspec

from holdfast.ops.traces.causes import Facts, Place, checked, read_causes
from holdfast.ops.traces.elements import read_elements
from holdfast.ops.traces.model import Malformed, Record
from holdfast.ops.traces.records import JsonObject, decode_object, digest_of, encode, iso_ms, object_or_none
from holdfast.ops.traces.sources import BLANK, Numbered, Source, read_lines
from holdfast.schemas.errors import InputError, InvalidFieldError, InvalidNameError
from holdfast.schemas.ids import MAX_MS
from holdfast.schemas.names import check_kind

FIELDS: Final = ("session", "id", "parent", "agent", "name", "kind", "timestamp", "correlation", "body")
OTHERWISE: Final = ("none", "previous")
DEFAULT_AGENT: Final = "agent"
DEFAULT_KIND: Final = "record"
_HEAD_BYTES: Final = 1 << 16
# A number of seconds, milliseconds, microseconds or nanoseconds of the years 1973 to 5138 is of one of these alone.
_SCALES: Final = ((10**11, 1_000.0), (10**14, 1.0), (10**17, 1e-3), (10**20, 1e-6))


class Selector(msgspec.Struct, frozen=True):
    """Where a field is: a path of member names, or a constant."""

    path: tuple[str, ...] = ()
    constant: str | None = None

    def of(self, record: JsonObject) -> Any:
        """Returns what stands there; None where there is nothing."""
        if self.constant is not None:
            return self.constant
        value: Any = record
        # A member whose name has a dot in it, as OpenTelemetry's do, goes before a path.
        whole = ".".join(self.path)
        if whole in record:
            return record[whole]
        for name in self.path:
            members = object_or_none(value)
            if members is None:
                return None
            value = members.get(name)
        return value


class FieldMap(msgspec.Struct, frozen=True):
    """Which member of a record is which field."""

    fields: dict[str, Selector]
    follow_order: bool

    def text(self, record: JsonObject, field: str) -> str | None:
        """Returns a field as text: as it is, or a whole number in decimal; None where there is none.

        Raises InvalidFieldError for anything else.
        """
        value = self.value(record, field)
        if value is None or value == "":
            return None
        if isinstance(value, str):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        raise InvalidFieldError(f"{field} is neither text nor a whole number", field=field)

    def value(self, record: JsonObject, field: str) -> Any:
        """Returns a field as it is decoded; None where there is none."""
        selector = self.fields.get(field)
        return None if selector is None else selector.of(record)


def parse_map(text: str) -> FieldMap:
    """Returns the map that a command line names; raises InvalidFieldError."""
    fields: dict[str, Selector] = {}
    otherwise: str | None = None
    for part in text.split(","):
        field, separator, where = part.strip().partition("=")
        if field == "otherwise" and where in OTHERWISE:
            otherwise = where
        elif field not in FIELDS or not separator or not where or field in fields:
            raise InvalidFieldError(
                f"{part[:80]!r} maps nothing",
                field="map",
                hint=f"write <field>=<path> or <field>==<constant>, of {', '.join(FIELDS)}, otherwise",
            )
        elif where.startswith("="):
            fields[field] = Selector(constant=where[1:])
        else:
            fields[field] = Selector(path=tuple(where.split(".")))
    if not fields:
        raise InvalidFieldError("the map names no field", field="map", hint="session=…,id=…,parent=…")
    return FieldMap(fields, otherwise == "previous" if otherwise else "parent" not in fields)


def read(source: Source, field_map: FieldMap) -> Iterator[Record]:
    """Yields a step for each record, in the order of the file; a step may come before its cause."""
    reader = _Reader(source, field_map)
    return read_causes(source, "mapped", reader.read, follow_order=field_map.follow_order)


def pieces(source: Source) -> Iterator[Numbered | Malformed]:
    """Yields the records of a JSON array, or of JSON lines, as text."""
    is_array = source.head(_HEAD_BYTES).lstrip(BLANK).startswith(b"[")
    return read_elements(source) if is_array else read_lines(source)


class _Reader:
    def __init__(self, source: Source, field_map: FieldMap) -> None:
        self._source = source
        self._map = field_map
        self._file_session: str | None = None

    def read(self) -> Iterator[Place]:
        for piece in pieces(self._source):
            if isinstance(piece, Malformed):
                yield piece
                continue
            line, raw = piece
            try:
                yield line, checked(self._facts(decode_object(raw)))
            except InputError as error:
                yield self._source.malformed(line, error.message)

    def _facts(self, record: JsonObject) -> Facts:
        text = self._map.text
        body = self._map.value(record, "body") if "body" in self._map.fields else record
        if body is None:
            raise InvalidFieldError("body is missing", field="body")
        return Facts(
            session=text(record, "session") or self._session(),
            id=text(record, "id"),
            parent=text(record, "parent"),
            agent=text(record, "agent") or DEFAULT_AGENT,
            name=text(record, "name"),
            kind=_kind(text(record, "kind")),
            timestamp_ms=time_ms(self._map.value(record, "timestamp")),
            correlation=text(record, "correlation"),
            body=encode(body),
        )

    def _session(self) -> str:
        if "session" in self._map.fields:
            raise InvalidFieldError("session is missing", field="session")
        if self._file_session is None:
            lines = (piece[1] if isinstance(piece, tuple) else b"" for piece in pieces(self._source))
            self._file_session = f"mapped-{digest_of(lines)}"
        return self._file_session


def time_ms(value: Any) -> int | None:
    """Returns a time as milliseconds since 1970; None for none.  Raises InvalidFieldError for what is none."""
    if value is None or value == "":
        return None
    if isinstance(value, str) and not value.isdigit():
        return iso_ms({"timestamp": value}, "timestamp")
    try:
        number = float(cast(Any, value))
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if isinstance(value, bool) or not number >= 0:
        raise InvalidFieldError(f"timestamp {repr(value)[:40]} is no time", field="timestamp")
    for limit, scale in _SCALES:
        if number < limit:
            at_ms = round(number * scale)
            if at_ms <= MAX_MS:
                return at_ms
            break
    raise InvalidFieldError(f"timestamp {repr(value)[:40]} is beyond the year 9999", field="timestamp")


def _kind(text: str | None) -> str:
    if text is None:
        return DEFAULT_KIND
    try:
        return check_kind(text)
    except InvalidNameError:
        # What one system calls a kind another calls by a whole sentence: it is in the body.
        return DEFAULT_KIND
