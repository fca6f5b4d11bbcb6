"""Names and their subject tokens: one pair of functions, ``decode_token(encode_token(name)) == name``.

A token that is safe in a subject stands for itself, so that ordinary names stay readable and any NATS client can
write them.  Every other name is escaped: the marker ``x--``, then ASCII letters and digits as they are and each
other byte of its UTF-8 as ``_hh``.  A safe name that begins with the marker is escaped too, so the mapping is
one-to-one.  Dots, wildcards, ``$``, spaces, control characters and Unicode therefore never reach a subject raw.
"""

from __future__ import annotations

import re
from typing import Final

from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidNameError

MARKER: Final = "x--"

CHUNK_KIND: Final = "chunk"
"""The kind of the parts of a large body."""

_SAFE: Final = re.compile(r"[A-Za-z0-9_-]+\Z")
_ESCAPED: Final = re.compile(r"(?:[A-Za-z0-9]|_[0-9a-f]{2})*\Z")
_KIND: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{limits.KIND_CHARS}}}\Z")
_PLAIN_BYTES: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")


def encode_token(name: str) -> str:
    """Returns the subject token of ``name``: characters ``[A-Za-z0-9_-]`` only, never empty.

    Raises InvalidNameError when ``name`` is not well-formed Unicode (a lone surrogate).
    """
    if _SAFE.match(name) and not name.startswith(MARKER):
        return name
    try:
        raw = name.encode()
    except UnicodeEncodeError as error:
        raise InvalidNameError(
            f"name {name[:80]!r} holds a lone surrogate", field="name", hint="send well-formed Unicode"
        ) from error
    return MARKER + "".join(chr(byte) if byte in _PLAIN_BYTES else f"_{byte:02x}" for byte in raw)


def is_token(text: str) -> bool:
    """Whether ``text`` may stand in a subject as one token: characters ``[A-Za-z0-9_-]``, at least one."""
    return _SAFE.match(text) is not None


def decode_token(token: str) -> str:
    """Returns the name that ``token`` stands for.

    Raises InvalidNameError for a token that :func:`encode_token` never makes, so that no two tokens share a name.
    """
    if not token.startswith(MARKER):
        if _SAFE.match(token):
            return token
        raise _not_a_token(token)
    escaped = token[len(MARKER) :]
    if not _ESCAPED.match(escaped):
        raise _not_a_token(token)
    parts = re.split(r"_([0-9a-f]{2})", escaped)
    raw = b"".join(bytes.fromhex(part) if i % 2 else part.encode() for i, part in enumerate(parts))
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise _not_a_token(token) from error
    if encode_token(name) != token:
        raise _not_a_token(token)
    return name


def _not_a_token(token: str) -> InvalidNameError:
    return InvalidNameError(
        f"subject token {token[:80]!r} is not an encoded name",
        field="subject",
        hint="use [A-Za-z0-9_-], or encode the name with holdfast.schemas.names.encode_token",
    )


def is_well_formed(text: str) -> bool:
    """Whether ``text`` has a form in UTF-8: no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_namespace(namespace: object) -> str:
    """Returns ``namespace`` when it is text of 1 to 64 UTF-8 bytes; raises InvalidNameError otherwise."""
    return _check(namespace, "namespace", limits.NAMESPACE_BYTES)


def check_agent(agent: object) -> str:
    """Returns ``agent`` when it is text of 1 to 256 UTF-8 bytes; raises InvalidNameError otherwise."""
    return _check(agent, "agent_id", limits.NAME_BYTES)


def check_event_name(name: object) -> str:
    """Returns ``name`` when it is text of 1 to 512 UTF-8 bytes with at most 16 segments, split at colons."""
    text = _check(name, "name", limits.EVENT_NAME_BYTES)
    segments = text.split(":")
    if len(segments) > limits.NAME_SEGMENTS:
        raise InvalidNameError(
            f"event name {text[:80]!r} has {len(segments)} segments, the limit is {limits.NAME_SEGMENTS}",
            field="name",
            limit=limits.NAME_SEGMENTS,
        )
    return text


def check_key(key: object) -> str:
    """Returns ``key``, the name of a named context, when it is text of 1 to 768 UTF-8 bytes in at most 32 segments.

    Dots part the segments; prefixes of keys are looked up by them.
    """
    text = _check(key, "key", limits.KEY_BYTES)
    segments = text.count(".") + 1
    if segments > limits.KEY_SEGMENTS:
        raise InvalidNameError(
            f"key {text[:80]!r} has {segments} segments, the limit is {limits.KEY_SEGMENTS}",
            field="key",
            limit=limits.KEY_SEGMENTS,
        )
    return text


def check_kind(kind: object) -> str:
    """Returns ``kind`` when it is 1 to 64 of ``[A-Za-z0-9_-]``: it is part of the reference, which people read.

    ``chunk`` is refused: the parts of large bodies are of that kind, and a context of it could be taken for one.
    """
    if kind == CHUNK_KIND:
        raise InvalidNameError(
            f"kind {CHUNK_KIND!r} is reserved for the parts of large bodies", field="kind", hint="choose another kind"
        )
    if isinstance(kind, str) and _KIND.match(kind):
        return kind
    shown = repr(kind)[:80]
    raise InvalidNameError(
        f"kind {shown} is not 1 to {limits.KIND_CHARS} of the characters A-Z a-z 0-9 _ -",
        field="kind",
        limit=limits.KIND_CHARS,
    )


def _check(value: object, field: str, limit_bytes: int) -> str:
    if not isinstance(value, str):
        raise InvalidNameError(f"{field} is {type(value).__name__}, not text", field=field, limit=limit_bytes)
    if not value:
        raise InvalidNameError(f"{field} is empty", field=field, limit=limit_bytes)
    # A character is a byte at least: long input is refused without encoding it.
    if len(value) > limit_bytes:
        raise _too_long(value, field, len(value), limit_bytes)
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise InvalidNameError(
            f"{field} {value[:80]!r} holds a lone surrogate", field=field, hint="send well-formed Unicode"
        ) from error
    if size > limit_bytes:
        raise _too_long(value, field, size, limit_bytes)
    return value


def _too_long(value: str, field: str, size: int, limit_bytes: int) -> InvalidNameError:
    return InvalidNameError(
        f"{field} {value[:40]!r}… has {size} bytes or more, the limit is {limit_bytes}",
        field=field,
        limit=limit_bytes,
    )
