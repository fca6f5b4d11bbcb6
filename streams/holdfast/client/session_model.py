"""Sessions as plain values: their names, what a change does to one, what listeners are told.  Nothing here waits."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final, Literal, cast

import msgspec

from holdfast.schemas.bodies import decode_body, encode_json
from holdfast.schemas.errors import InvalidBodyError, InvalidFieldError, InvalidNameError
from holdfast.schemas.limits import ID_CHARS, KEY_BYTES
from holdfast.schemas.names import decode_token, encode_token, is_well_formed
from holdfast.schemas.refs import JSON

TIMESTAMP: Final = "_timestamp"
"""The field of a session that holds the time of its last change, in seconds since 1970, UTC."""

SESSION_PREFIX: Final = "session."
"""What the keys of sessions begin with."""

_HASHED: Final = "~"  # no encoded token begins with it

SessionEventType = Literal["created", "updated", "deleted", "expired"]
"""What can happen to a session."""

Change = Callable[[dict[str, Any]], dict[str, Any]]
"""From a session's content (a copy of its own; empty when there is none) to its new content.  May be called again."""


class SessionEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What a listener is told about one change of one session."""

    type: SessionEventType
    session_id: str
    data: dict[str, Any] | None
    """The whole content after the change, the listener's own copy; empty when the session is gone.  None when it
    could not be read (the event is told all the same)."""
    timestamp: datetime
    """When the change was made, UTC."""
    agent: str | None = None
    """Who made it; None where that is not known: in the in-memory store, and when a session expired."""
    version: int | None = None
    """The version of the session's key in ``hf.keys``; None in the in-memory store, which keeps none."""


def check_session_id(session_id: object) -> str:
    """Returns ``session_id`` when it is text of 1 to 256 characters; raises InvalidNameError otherwise."""
    if not isinstance(session_id, str):
        problem = f"is {type(session_id).__name__}, not text"
    elif not session_id:
        problem = "is empty"
    elif len(session_id) > ID_CHARS:
        problem = f"{session_id[:40]!r}… has {len(session_id)} characters, the limit is {ID_CHARS}"
    elif not is_well_formed(session_id):
        problem = f"{session_id[:80]!r} holds a lone surrogate"
    else:
        return session_id
    raise InvalidNameError(
        f"session_id {problem}", field="session_id", limit=ID_CHARS, hint="use a unique, descriptive text"
    )


def session_key(session_id: str) -> str:
    """Returns the key of a session in ``hf.keys``: ``session.`` and the id as one segment, whatever it holds.

    An id that is too long for a key once it is encoded (only ids of many non-ASCII characters are) is named by its
    BLAKE2b hash.  Different ids have different keys.  Raises InvalidNameError for what is no session id.
    """
    key = SESSION_PREFIX + encode_token(check_session_id(session_id))
    if len(key) <= KEY_BYTES:
        return key
    digest = blake2b(session_id.encode(), digest_size=20, person=b"holdfast-session").digest()
    return SESSION_PREFIX + _HASHED + base64.b32encode(digest).decode().lower()


def session_of(key: str, session: str | None) -> str | None:
    """Returns the session id that a key and its version's session field name; None when the key is no session's."""
    if session is not None:
        try:
            if session_key(session) == key:
                return session
        except InvalidNameError:
            pass  # written by someone else: the key decides
    token = key.removeprefix(SESSION_PREFIX)
    try:
        session_id = decode_token(token)
        return session_id if session_key(session_id) == key else None
    except InvalidNameError:
        return None


def fields_of(partial: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a partial context as JSON would bring it back: a deep copy, without the time stamp.

    Raises InvalidFieldError when it is no mapping, InvalidBodyError for what JSON has no form for.
    """
    if not isinstance(partial, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers without types
        raise InvalidFieldError(
            f"partial context is {type(partial).__name__}, not a dict", field="partial_context", hint="pass a dict"
        )
    raw = encode_json(dict(partial), field="partial_context")
    fields: dict[str, Any] = decode_body(raw, JSON)
    fields.pop(TIMESTAMP, None)  # what get_context returned may be handed back: the stamp is ours
    return fields


def field_of(key: object, value: object) -> dict[str, Any]:
    """Returns one field of a session as JSON would bring it back; errors as of :func:`fields_of`."""
    if not isinstance(key, str):
        raise InvalidFieldError(f"key is {type(key).__name__}, not text", field="key")
    if key == TIMESTAMP:
        raise InvalidFieldError(
            f"{TIMESTAMP} is kept by the session manager", field="key", hint="store your own time under another key"
        )
    field: dict[str, Any] = decode_body(encode_json({key: value}, field="value"), JSON)
    return field


def content_of(body: object, session_id: str) -> dict[str, Any]:
    """Returns a stored body when it is a session's; raises InvalidBodyError when someone stored another thing there."""
    if isinstance(body, dict):
        return cast("dict[str, Any]", body)
    raise InvalidBodyError(
        f"session {session_id[:80]!r} holds {type(body).__name__}, not a dict",
        field="session_id",
        hint="someone wrote its key by other means: roll the key back, or delete the session",
    )


def assigned(fields: dict[str, Any]) -> Change:
    """The change that sets fields, each as a whole."""
    return lambda current: current | fields


def merged(fields: dict[str, Any]) -> Change:
    """The change that merges fields in: dicts recursively, anything else as a whole; None is a value like any other."""
    return lambda current: merge(current, fields)


def merge(current: dict[str, Any], partial: dict[str, Any]) -> dict[str, Any]:
    """Returns a new dict: ``current`` with ``partial`` merged in recursively.  Neither is changed."""
    result = dict(current)
    for key, value in partial.items():
        before = result.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            result[key] = merge(cast("dict[str, Any]", before), cast("dict[str, Any]", value))
        else:
            result[key] = value
    return result


def unchanged(current: dict[str, Any]) -> dict[str, Any]:
    """The change that only renews a session's time stamp."""
    return current


def stamped(content: dict[str, Any], before: object, now_s: float) -> dict[str, Any]:
    """Returns ``content`` with its time stamp: ``now_s``, or just after ``before`` where clocks disagree."""
    stamp = now_s
    if isinstance(before, int | float) and not isinstance(before, bool) and before >= now_s:
        stamp = math.nextafter(before, math.inf)
    return content | {TIMESTAMP: stamp}
