"""What the resolver is asked of named contexts and what it answers: one Struct each, every field with its limit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, cast

import msgspec
from msgspec import Meta

from holdfast.schemas import limits
from holdfast.schemas.bodies import check_json
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.ids import iso_from_ms
from holdfast.workers.requests import PutRequest, context_of_put, context_reply

if TYPE_CHECKING:
    from holdfast.client.model import Tier
    from holdfast.schemas.rows import ContextRow, KeyVersionRow
    from holdfast.streams.hot import NewContext

HISTORY_LIMIT_DEFAULT: Final = 100
HISTORY_LIMIT_MAX: Final = 1_000
LIST_LIMIT_DEFAULT: Final = 100
LIST_LIMIT_MAX: Final = 1_000

_LARGEST: Final = 2**63 - 1

_Key = Annotated[str, Meta(max_length=limits.KEY_BYTES)]
_Label = Annotated[str, Meta(min_length=1, max_length=limits.ID_CHARS)]
_Agent = Annotated[str, Meta(min_length=1, max_length=limits.NAME_BYTES)]
_Tags = Annotated[list[_Label], Meta(max_length=limits.TAGS)]
_Version = Annotated[int, Meta(ge=1, le=_LARGEST)]
_Expected = Annotated[int, Meta(ge=0, le=_LARGEST)]
_Ttl = Annotated[float, Meta(gt=0, le=limits.TTL_S)] | Literal["never"]
"""Seconds, or ``"never"`` where a policy would let it expire."""


class KeyGetRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for a key's newest version, one by its number, or the one of a time (ISO 8601 or milliseconds since 1970).

    ``body``: with its body, or what is known of the version alone.  ``cold``, for a reader that has looked in the hot
    tier itself: what the lake holds, tombstones included; it has no bodies.
    """

    key: _Key
    version: _Version | None = None
    as_of: str | int | None = None
    body: bool = True
    cold: bool = False


class KeyWrite(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every write of a key may carry.  ``expected_version``: 0 for "there must be none"."""

    key: _Key
    expected_version: _Expected | None = None
    agent_id: _Agent | None = None
    changed_by: _Label | None = None
    change_type: _Label | None = None


class KeyPutRequest(KeyWrite, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Asks to write a version: exactly one of ``body`` (JSON, stored as its exact text), ``body_text``,
    ``body_base64``."""

    body: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    body_text: str | None = None
    body_base64: str | None = None
    kind: str = "context"
    content_type: str | None = None
    tags: _Tags = []
    session_id: _Label | None = None
    ttl: _Ttl | None = None


class KeyPatchRequest(KeyWrite, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Asks to merge an object into a key's body (RFC 7386): null removes a member, other objects merge in turn."""

    merge: msgspec.Raw
    tags: _Tags | None = None
    session_id: _Label | None = None
    ttl: _Ttl | None = None


class KeyAppendRequest(KeyWrite, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Asks to append one item to the list that a key holds."""

    item: msgspec.Raw
    tags: _Tags | None = None
    session_id: _Label | None = None
    ttl: _Ttl | None = None


class KeyDeleteRequest(KeyWrite, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Asks to write a tombstone; the history stays."""


class KeyRollbackRequest(KeyWrite, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Asks for a new version that equals an old one."""

    version: _Version


class KeyHistoryRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for versions below ``before``, newest first.  ``cold`` as in :class:`KeyGetRequest`."""

    key: _Key
    before: _Version | None = None
    limit: Annotated[int, Meta(ge=1, le=HISTORY_LIMIT_MAX)] = HISTORY_LIMIT_DEFAULT
    cold: bool = False


class KeyListRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for the live keys that begin with ``prefix`` and fit every condition, in order of key."""

    prefix: _Key = ""
    tags: _Tags = []
    session_id: _Label | None = None
    agent_id: _Agent | None = None
    limit: Annotated[int, Meta(ge=1, le=LIST_LIMIT_MAX)] = LIST_LIMIT_DEFAULT
    cursor: _Key | None = None


class KeyDiffRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for what turns the body of version ``v1`` into that of ``v2``."""

    key: _Key
    v1: _Version
    v2: _Version


class KeyCommitRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Asks to write several keys, all or none; ``bodies`` are JSON, ``expected`` versions are those of
    :class:`KeyWrite`."""

    bodies: dict[_Key, msgspec.Raw] = {}
    deletes: list[_Key] = []
    expected: dict[_Key, _Expected] | None = None
    tags: _Tags = []
    session_id: _Label | None = None
    agent_id: _Agent | None = None
    ttl: _Ttl | None = None
    changed_by: _Label | None = None
    change_type: _Label | None = None


def body_of_put(namespace: str, request: KeyPutRequest) -> NewContext:
    """Returns the body that a put asks to store, as a context; raises a typed error naming what does not fit."""
    return context_of_put(
        namespace,
        PutRequest(
            kind=request.kind,
            body=request.body,
            body_text=request.body_text,
            body_base64=request.body_base64,
            content_type=request.content_type,
        ),
    )


def decoded(raw: msgspec.Raw, field: str) -> Any:
    """Returns the value of a member that is any JSON; raises InvalidFieldError when it is nested too deeply."""
    text = bytes(raw)
    check_json(text, field)
    return msgspec.json.decode(text)


def merge_of(raw: msgspec.Raw) -> dict[str, Any]:
    """Returns the object that a patch merges."""
    merge = decoded(raw, "merge")
    if not isinstance(merge, dict):
        raise InvalidFieldError(
            "merge is not a JSON object", field="merge", hint='send {"member": value}; null removes a member'
        )
    return cast("dict[str, Any]", merge)


def ttl_of(ttl: float | str | None) -> float | None:
    """Returns a time to live as the SDK takes it."""
    return math.inf if isinstance(ttl, str) else ttl


def row_members(row: KeyVersionRow) -> dict[str, Any]:
    """Returns a version as an answer holds it, without its body; absent members are left out."""
    members: dict[str, Any] = {
        "key": row.key,
        "version": row.version,
        "op": row.op,
        "ref": row.ref,
        "tags": list(row.tags),
        "session_id": row.session_id,
        "agent_id": row.agent_id,
        "changed_by": row.changed_by,
        "change_type": row.change_type,
        "timestamp": iso_from_ms(row.timestamp_ms),
        # Of a version just written the server's time is not known yet.
        "stored_at": iso_from_ms(row.stored_at_ms) if row.stored_at_ms else None,
        "expires_at": None if row.expires_at_ms is None else iso_from_ms(row.expires_at_ms),
        "event_id": row.event_id,
        "source": row.source,
        "confidence": row.confidence,
        "proposed_by": row.proposed_by,
        "approved_by": row.approved_by,
        "approved_at": None if row.approved_at_ms is None else iso_from_ms(row.approved_at_ms),
        "epoch": row.epoch or None,
        "seq": row.seq or None,
    }
    return {name: value for name, value in members.items() if value is not None}


def version_members(row: KeyVersionRow, epoch: str = "") -> dict[str, Any]:
    """Returns a version as an answer to people's programs holds it: where it stands is one ``position``.

    ``epoch``: of the stream it was read from, unless the row says.
    """
    members = row_members(row)
    members.pop("epoch", None)
    seq = members.pop("seq", None)
    if seq and (row.epoch or epoch):
        members["position"] = f"{row.epoch or epoch}:{seq}"
    return members


def body_members(row: ContextRow, tier: Tier) -> dict[str, Any]:
    """Returns a body as the answer of a get holds it: in ``body``, ``body_text`` or ``body_base64``."""
    reply = context_reply(row, tier)
    bodies = {"body": reply.body, "body_text": reply.body_text, "body_base64": reply.body_base64}
    held = {name: value for name, value in bodies.items() if value is not msgspec.UNSET}
    return {"content_type": row.content_type, **held}
