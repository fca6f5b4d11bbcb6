"""Bodies: from what an agent has in hand to exact bytes, and the checks that any JSON from outside must pass."""

from __future__ import annotations

import math
import re
from typing import Any, Final, cast

import msgspec

from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidBodyError, InvalidFieldError, TooLargeError
from holdfast.schemas.refs import JSON

TEXT: Final = "text/plain; charset=utf-8"
BINARY: Final = "application/octet-stream"

Body = str | bytes | bytearray | memoryview | dict[str, Any] | list[Any] | msgspec.Struct | int | float | bool | None
"""What ``put`` accepts: text, bytes, or anything that JSON can hold."""

# Sorted keys: equal dicts give equal bytes and so one reference, whatever order they were built in.
_ENCODER: Final = msgspec.json.Encoder(order="sorted")
_DECODER: Final = msgspec.json.Decoder()

# A string, or one bracket: what nesting depends on.  Possessive quantifiers are not in Python 3.11; the alternation
# below cannot backtrack, since each branch starts with another character.  A string without an end reaches to the
# end of the text: were it no match, every quote in it would be tried as another beginning, in quadratic time.
_STRUCTURE: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_CONTENT_TYPE: Final = re.compile(r"[\x21-\x7e][\x20-\x7e]*\Z")


def encode_body(body: Body, content_type: str | None = None) -> tuple[bytes, str]:
    """Returns the exact bytes of ``body`` and its content type.

    Text becomes UTF-8, bytes stay as they are, everything else becomes JSON with sorted keys.  A content type given
    by the caller is kept; JSON given as bytes under ``application/json`` is checked.  Raises InvalidBodyError for
    what cannot be encoded, TooLargeError over 64 MiB.
    """
    if isinstance(body, str):
        try:
            raw = body.encode()
        except UnicodeEncodeError as error:
            raise InvalidBodyError("body holds a lone surrogate", field="body", hint="send well-formed text") from error
        chosen = TEXT if content_type is None else content_type
    elif isinstance(body, bytes | bytearray | memoryview):
        raw = bytes(body)
        chosen = BINARY if content_type is None else content_type
    else:
        raw = encode_json(body)
        chosen = JSON if content_type is None else content_type
    check_size(raw)
    check_content_type(chosen)
    if chosen == JSON:
        if isinstance(body, str | bytes | bytearray | memoryview):
            check_json(raw, field="body")
        else:
            check_nesting(raw, field="body")
    return raw, chosen


def decode_body(raw: bytes, content_type: str) -> Any:
    """Returns what the bytes stand for: JSON as Python objects, text as str, anything else as bytes."""
    if content_type == JSON:
        try:
            return _DECODER.decode(raw)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidBodyError(f"body is not JSON: {error}", field="body") from error
    if content_type.startswith("text/"):
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise InvalidBodyError(f"body is not UTF-8: {error}", field="body") from error
    return raw


def check_size(raw: bytes, field: str = "body") -> None:
    """Raises TooLargeError when a body is over 64 MiB."""
    if len(raw) > limits.BODY_BYTES:
        raise TooLargeError(
            f"{field} has {len(raw)} bytes, the limit is {limits.BODY_BYTES}",
            field=field,
            limit=limits.BODY_BYTES,
            hint="store it elsewhere and put its address, or split it",
        )


def check_content_type(content_type: object) -> str:
    """Returns ``content_type`` when it is printable ASCII of at most 128 characters (it travels in a header)."""
    if (
        isinstance(content_type, str)
        and len(content_type) <= limits.CONTENT_TYPE_CHARS
        and _CONTENT_TYPE.match(content_type)
    ):
        return content_type
    raise InvalidFieldError(
        f"content type {repr(content_type)[:80]} is not 1 to {limits.CONTENT_TYPE_CHARS} characters of printable ASCII",
        field="content_type",
        limit=limits.CONTENT_TYPE_CHARS,
    )


def check_nesting(raw: bytes, field: str = "body") -> None:
    """Raises InvalidFieldError when JSON is nested deeper than 64; ``raw`` need not be valid otherwise.

    Works on the bytes, before any parser recurses into them.
    """
    # Most JSON is flat: fewer opening brackets in all than the limit cannot nest deeper than it.
    if raw.count(b"[") + raw.count(b"{") <= limits.NESTING:
        return
    depth = 0
    for match in _STRUCTURE.finditer(raw):
        character = raw[match.start()]
        if character in b"[{":
            depth += 1
            if depth > limits.NESTING:
                raise InvalidFieldError(
                    f"{field} is nested deeper than {limits.NESTING}", field=field, limit=limits.NESTING
                )
        elif character in b"]}":
            depth -= 1


def check_json(raw: bytes, field: str = "body") -> None:
    """Raises a typed error unless ``raw`` is valid UTF-8 JSON (no NaN, no lone surrogate) of nesting 64 at most."""
    check_nesting(raw, field)
    try:
        raw.decode()
        _DECODER.decode(raw)
    except UnicodeDecodeError as error:
        raise InvalidBodyError(f"{field} is not UTF-8: {error}", field=field) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidBodyError(f"{field} is not JSON: {error}", field=field) from error


def encode_json(body: object, field: str = "body") -> bytes:
    """Returns ``body`` as JSON with sorted keys; raises InvalidBodyError for what JSON has no form for."""
    try:
        raw = _ENCODER.encode(body)
    except (TypeError, ValueError, OverflowError, UnicodeEncodeError, RecursionError) as error:
        raise InvalidBodyError(
            f"{field} of type {type(body).__name__} cannot be encoded as JSON: {error}",
            field=field,
            hint="pass what JSON can hold",
        ) from error
    # msgspec writes NaN and infinities as null, silently: look for them only where there is a null.
    if b"null" in raw and _holds_non_finite(msgspec.to_builtins(body)):
        raise InvalidBodyError(
            f"{field} holds NaN or an infinity, which JSON has no form for",
            field=field,
            hint="send null or text instead",
        )
    return raw


def _holds_non_finite(value: Any) -> bool:
    pending: list[Any] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, float):
            if not math.isfinite(item):
                return True
        elif isinstance(item, dict):
            pending.extend(cast("dict[str, Any]", item).values())
        elif isinstance(item, list | tuple | set | frozenset):
            pending.extend(cast("list[Any]", item))
    return False
