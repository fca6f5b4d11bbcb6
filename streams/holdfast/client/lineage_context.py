"""The explicit form of a lineage: a plain dict, checked, merged, carried over transports.  Pure functions.

See :mod:`holdfast.schemas.lineage` for the members; :mod:`holdfast.client.lineage` hands these functions on.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidFieldError, TooLargeError
from holdfast.schemas.ids import MAX_MS, EventId, derived_event_id, normal_event_id, unpacked_source_id
from holdfast.schemas.lineage import ALIASES, ATTRIBUTES, FIELDS, IDENTITY_FIELDS
from holdfast.schemas.refs import parse_ref
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.decode import is_traceparent
from holdfast.streams.events import check_id_text

if TYPE_CHECKING:
    from holdfast.client.model import Event

Lineage = dict[str, Any]
"""A lineage in explicit form; see :mod:`holdfast.schemas.lineage`."""

HEADER: Final = "Hf-Lineage"
"""Message or HTTP header that carries a lineage as ASCII JSON; ``traceparent`` goes beside it for other tools."""

HEADER_BYTES: Final = 8 * limits.KIB
"""Longest value of that header: servers and proxies refuse longer ones."""

_TRACE_PARENT: Final = "traceparent"
_UNDERSCORED: Final = {name: alias for alias, name in ALIASES.items()}
_FIELD_SET: Final = frozenset(FIELDS)
_RESERVED: Final = _FIELD_SET | ALIASES.keys()
_TRACE: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_TEXT_FIELDS: Final = tuple(
    name for name in FIELDS if name not in ("event_depth", "timestamp", "context_ref", "traceparent")
)
_OBJECT: Final = msgspec.json.Decoder(dict[str, Any])


def of_event(event: Event) -> Lineage:
    """Returns the lineage of an event: under it, whatever is emitted is a child of that event."""
    # Any client may have written them: none hides, nor stands in for, what the event itself says or leaves out.
    lineage: Lineage = {
        name: value for name, value in event.attributes.items() if value is not None and name not in _RESERVED
    }
    lineage["event_id"] = event.event_id
    lineage["event_depth"] = event.event_depth
    lineage["agent_id"] = event.agent_id
    lineage["timestamp"] = event.timestamp.timestamp()
    for name in _OPTIONAL:
        value = getattr(event, name)
        if value is not None:
            lineage[name] = value
    return lineage


_OPTIONAL: Final = (
    "parent_event_id", "root_event_id", "correlation_id", "session_id", "client_id", "originator", "context_ref",
    "traceparent",
)  # fmt: skip


def from_dict(given: Mapping[str, Any]) -> Lineage:
    """Returns a lineage in its normal form: aliases under their own names, absent where None, every member checked.

    A member under its own name wins over its alias; what is no field is an attribute and stays.  Ids of other systems
    are taken as they are.  Raises InvalidFieldError naming the member that cannot be.
    """
    if not isinstance(given, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers are not type-checked
        raise InvalidFieldError(
            f"a lineage is a dict, not {type(given).__name__}", field="lineage", hint="see lineage.from_headers"
        )
    lineage: Lineage = {}
    for key, value in given.items():
        name = ALIASES.get(key, key)
        if value is None or (name != key and given.get(name) is not None):
            continue
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidFieldError("a member of a lineage has a name that is no text", field="lineage")
        lineage[name] = value
    for name in _TEXT_FIELDS:
        if name in lineage:
            check_id_text(lineage[name], name)
    if "context_ref" in lineage:
        parse_ref(lineage["context_ref"])
    depth = lineage.get("event_depth", 0)
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise InvalidFieldError("event_depth is not a whole number from 0", field="event_depth")
    timestamp = lineage.get("timestamp", 0)
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float) or not 0 <= timestamp <= MAX_MS / 1000:
        raise InvalidFieldError(
            "timestamp is not in seconds since 1970", field="timestamp", hint="use moment.timestamp()"
        )
    if "traceparent" in lineage and not is_traceparent(lineage["traceparent"]):
        raise InvalidFieldError(
            f"traceparent {repr(lineage['traceparent'])[:60]} is not of the W3C form", field="traceparent"
        )
    return lineage


def with_underscores(lineage: Mapping[str, Any]) -> Lineage:
    """Returns a lineage under the names that earlier systems use (``_event_id`` …); attributes keep theirs."""
    return {_UNDERSCORED.get(name, name): value for name, value in from_dict(lineage).items()}


def attributes_of(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the members of a lineage in normal form that are no fields."""
    return {name: value for name, value in lineage.items() if name not in _FIELD_SET}


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> Lineage:
    """Returns one lineage of two; where both have a member, the second wins.

    What says which event it is (event, parent, root, depth, time, reference, trace) is taken from one of them as a
    whole: from the second when it names an event or a parent, else from the first.  So a place in a tree is never put
    together of two trees.
    """
    a, b = from_dict(first), from_dict(second)
    placed_by = b if "event_id" in b or "parent_event_id" in b else a
    merged = {name: value for name, value in {**a, **b}.items() if name not in IDENTITY_FIELDS}
    return merged | {name: placed_by[name] for name in IDENTITY_FIELDS if name in placed_by}


def to_headers(lineage: Mapping[str, Any]) -> dict[str, str]:
    """Returns the headers that carry a lineage over NATS, HTTP or any transport with text headers.

    Raises TooLargeError when its attributes are too large for a header: send those as a context.
    """
    normal = from_dict(lineage)
    try:
        text = msgspec.json.encode(normal).decode()
    except (TypeError, ValueError) as error:
        raise InvalidFieldError(f"an attribute of the lineage is not JSON: {error}", field=ATTRIBUTES) from error
    # Header values are printable ASCII: JSON can spell every other character so.
    ascii_text = "".join(character if " " <= character <= "~" else _escaped(character) for character in text)
    if len(ascii_text) > HEADER_BYTES:
        raise TooLargeError(
            f"the lineage has {len(ascii_text)} bytes, a header holds {HEADER_BYTES}",
            field=ATTRIBUTES,
            limit=HEADER_BYTES,
            hint="put what is large as a context and hand on its reference",
        )
    headers = {HEADER: ascii_text}
    if "event_id" in normal or "traceparent" in normal:
        headers[_TRACE_PARENT] = to_traceparent(normal)
    return headers


def from_headers(headers: Mapping[str, str]) -> Lineage | None:
    """Returns the lineage that headers carry, whatever the case of their names; None when they carry none.

    Of a W3C ``traceparent`` alone there is a lineage as of :func:`from_traceparent`; one that does not parse is
    ignored, as that standard asks.  Raises InvalidFieldError when our own header is damaged.
    """
    by_name = {name.lower(): value for name, value in headers.items()}
    text = by_name.get(HEADER.lower())
    if text is not None:
        try:
            return from_dict(_OBJECT.decode(text))
        except (*UNDECODABLE, UnicodeEncodeError) as error:  # of text, not bytes: it may hold a lone surrogate
            raise InvalidFieldError(f"header {HEADER} is not a JSON object: {error}", field=HEADER) from error
    trace = by_name.get(_TRACE_PARENT)
    return None if trace is None or not is_traceparent(trace) else from_traceparent(trace)


def to_traceparent(lineage: Mapping[str, Any]) -> str:
    """Returns the W3C ``traceparent`` of a lineage: what another tool needs to show it in one trace.

    The trace is that of ``traceparent`` if the lineage came in with one, else its root event; the span is its event.
    Raises InvalidFieldError when it has neither.
    """
    normal = from_dict(lineage)
    given = _TRACE.match(normal.get("traceparent", ""))
    event_id = normal.get("event_id")
    if given is None and event_id is None:
        raise InvalidFieldError("a lineage without an event has no trace", field="event_id", hint="emit an event first")
    span = given[3] if given is not None and event_id is None else _uuid_hex(str(event_id))[16:]
    if given is not None:
        return f"{given[1]}-{given[2]}-{span}-{given[4]}"
    return f"00-{_uuid_hex(str(normal.get('root_event_id', event_id)))}-{span}-01"


def from_traceparent(text: str) -> Lineage:
    """Returns the lineage of a W3C ``traceparent`` of another tool: its trace id is the correlation id.

    What is emitted under it is a root that continues the trace.  Raises InvalidFieldError for text of another form.
    """
    found = _TRACE.match(text) if is_traceparent(text) else None
    if found is None:
        raise InvalidFieldError(f"traceparent {text[:60]!r} is not of the W3C form", field="traceparent")
    return {"correlation_id": found[2], "traceparent": text}


def continued_trace(traceparent: str, event_id: str) -> str:
    """Returns the ``traceparent`` of an event that continues a trace: the same trace, the event as its span."""
    return to_traceparent({"traceparent": traceparent, "event_id": event_id})


class IdMint:
    """Makes the ids of what an idempotent handler emits: the same content gets the same id when it is run again.

    An id follows from the handler, the event it works on, the content, and how many equal ones went before, so a
    second run repeats the ids of the first whatever the order, and different content never shares one.
    """

    def __init__(self, namespace: str, handler: str, event_id: str) -> None:
        self._source = (namespace, "emitted", handler, event_id)
        self._seen: dict[bytes, int] = {}

    def next(self, content: Iterable[bytes]) -> EventId:
        """Returns the id of an event with that content."""
        hasher = blake2b(digest_size=16, person=b"holdfast-mint-1")
        for part in content:
            hasher.update(len(part).to_bytes(8, "little"))
            hasher.update(part)
        digest = hasher.digest()
        repeat = self._seen.get(digest, 0)
        self._seen[digest] = repeat + 1
        return derived_event_id(*self._source, digest.hex(), str(repeat))


def _uuid_hex(event_id: str) -> str:
    normal = normal_event_id("", event_id)[0]
    # Spans are the second half of an id, of which packed ones may have no more there than a counter, or nothing.
    held = unpacked_source_id(normal)
    return uuid.UUID(normal if held is None else derived_event_id("", "trace", held)).hex


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


def attributes_in(extra: object) -> dict[str, Any]:
    """Returns the attributes among the further members of an event's message; empty when there are none."""
    found: object = cast("dict[str, object]", extra).get(ATTRIBUTES) if isinstance(extra, dict) else None
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
