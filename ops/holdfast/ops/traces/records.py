"""From raw JSON to checked fields, and from a chat message to a kind, an author and its tool calls.

Every function raises an :class:`~holdfast.schemas.errors.InputError` for what is not acceptable; readers turn it into
a :class:`~holdfast.ops.traces.model.Malformed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any, Final, TypeVar, cast

import msgspec

from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidBodyError, InvalidFieldError

JsonObject = dict[str, Any]

_DECODER: Final = msgspec.json.Decoder()
# Sorted keys, as the SDK encodes: equal objects give equal references.
_ENCODER: Final = msgspec.json.Encoder(order="sorted")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_LATEST_UNIX_S: Final = 253_402_300_799
"""The last second of the year 9999."""

CONTAINERS: Final = 1 << 20
"""Most arrays and objects in one step: decoded, an empty one takes thirty times the memory of its two bytes."""

_STRING_OR_OPENING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{]', re.DOTALL)

_KINDS: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool_result",
    "function": "tool_result",
}

_T = TypeVar("_T")


def decode_object(raw: bytes | msgspec.Raw) -> JsonObject:
    """Returns the JSON object that ``raw`` is; raises InvalidBodyError for anything else."""
    _check_containers(raw)
    value = _decode(_DECODER, raw)
    found = object_or_none(value)
    if found is None:
        raise InvalidBodyError(f"a JSON object is wanted, this is {_json_type(value)}", field="body")
    return found


def _check_containers(raw: bytes | msgspec.Raw) -> None:
    text = bytes(raw)
    if text.count(b"[") + text.count(b"{") <= CONTAINERS:
        return
    # Brackets within text cost nothing: count again without it.
    count = sum(1 for match in _STRING_OR_OPENING.finditer(text) if text[match.start()] != 0x22)
    if count > CONTAINERS:
        raise InvalidBodyError(f"holds {count} arrays and objects, the limit is {CONTAINERS}", limit=CONTAINERS)


def object_or_none(value: object) -> JsonObject | None:
    """Returns a decoded value that is an object."""
    return cast(JsonObject, value) if isinstance(value, dict) else None


def objects_in(value: object) -> Iterator[JsonObject]:
    """Yields the objects in a decoded value that is an array."""
    for item in cast(list[object], value) if isinstance(value, list) else ():
        found = object_or_none(item)
        if found is not None:
            yield found


def decode_as(decoder: msgspec.json.Decoder[_T], raw: bytes) -> _T:
    """Returns what a typed decoder makes of ``raw``; raises InvalidBodyError."""
    return _decode(decoder, raw)


def _decode(decoder: msgspec.json.Decoder[_T], raw: bytes | msgspec.Raw) -> _T:
    try:
        return decoder.decode(raw)
    except UnicodeDecodeError as error:
        raise InvalidBodyError(f"not UTF-8: {error.reason} (byte value {error.object[error.start]:#04x})") from error
    except RecursionError as error:
        raise InvalidBodyError(f"nested deeper than {limits.NESTING}", limit=limits.NESTING) from error
    # DecodeError is a ValueError, and so is the refusal of integers of thousands of digits.
    except ValueError as error:
        raise InvalidBodyError(f"not JSON of the format: {error}") from error


def encode(value: object) -> bytes:
    """Returns the JSON to store; raises InvalidBodyError for what decodes but has no JSON form."""
    try:
        return _ENCODER.encode(value)
    except (ValueError, OverflowError, RecursionError) as error:
        raise InvalidBodyError(f"cannot be written as JSON again: {error}") from error


def digest_of(parts: Iterator[bytes]) -> str:
    """Returns 16 hexadecimal characters that stand for a sequence of byte strings."""
    hasher = blake2b(digest_size=8, person=b"holdfast-ses-1")
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()


def text_field(record: JsonObject, field: str) -> str | None:
    """Returns a member that must be text where it is present and not null."""
    value = record.get(field)
    if value is None or isinstance(value, str):
        return value
    raise InvalidFieldError(f"{field} is {_json_type(value)}, not text", field=field)


def required_text(record: JsonObject, field: str) -> str:
    """Returns a member that must be text."""
    value = text_field(record, field)
    if value is None:
        raise InvalidFieldError(f"{field} is missing", field=field)
    return value


def integer_field(record: JsonObject, field: str) -> int | None:
    """Returns a member that must be an integer from 0 to 2**53 where it is present and not null."""
    value = record.get(field)
    if value is None:
        return None
    if type(value) is int and 0 <= value <= 1 << 53:
        return value
    raise InvalidFieldError(f"{field} is {repr(value)[:40]}, not an integer from 0 to 2**53", field=field)


def iso_ms(record: JsonObject, field: str) -> int | None:
    """Returns a member that must be ISO 8601 text, as milliseconds since 1970; a time without zone is UTC."""
    text = text_field(record, field)
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH) // _MILLISECOND
    except (ValueError, OverflowError) as error:
        raise InvalidFieldError(f"{field} {text[:40]!r} is not an ISO 8601 time", field=field) from error


def unix_ms(value: object) -> int | None:
    """Returns Unix seconds as milliseconds; None for anything that is not a plausible time."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LATEST_UNIX_S:
        return None
    return round(value * 1000)


def check_session_id(value: str) -> str:
    """Returns a session id when it is 1 to 256 characters."""
    if 0 < len(value) <= limits.ID_CHARS:
        return value
    raise InvalidFieldError(
        f"session id has {len(value)} characters, not 1 to {limits.ID_CHARS}",
        field="session_id",
        limit=limits.ID_CHARS,
    )


def message_kind(message: JsonObject) -> str:
    """Returns the kind of a chat message: its role, but ``tool_call`` and ``tool_result`` for those."""
    role = required_text(message, "role")
    if role == "assistant" and (message.get("tool_calls") or message.get("function_call")):
        return "tool_call"
    return _KINDS.get(role, role)


def author(kind: str, assistant: str) -> str:
    """Returns the agent id of whoever made a step: the assistant by its own name, the others by their role."""
    if kind in {"assistant", "tool_call"}:
        return assistant
    return "tool" if kind == "tool_result" else kind


def call_ids(message: JsonObject) -> Iterator[str]:
    """Yields the ids of the tool calls that an assistant message makes."""
    for call in objects_in(message.get("tool_calls")):
        call_id = call.get("id")
        if isinstance(call_id, str):
            yield call_id


def _json_type(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "an array"
        case _:
            return "an object"
