"""What the text of an embedded event says: its members, where they stand, and the values that become columns."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, Final

import msgspec

from holdfast.ops.embedded import holes
from holdfast.ops.embedded.holes import Time
from holdfast.ops.embedded.scanning import Member, members_of
from holdfast.schemas import limits
from holdfast.schemas.bodies import check_json
from holdfast.schemas.errors import HoldfastError
from holdfast.schemas.lineage import ALIASES
from holdfast.schemas.names import is_well_formed

CONTEXT: Final = "_ksi_context"
"""The member that holds an embedded context."""

NAMES: Final = ("event", "event_name", "name")
_LINEAGE: Final = {alias.encode(): field for alias, field in ALIASES.items() if field != "context_ref"}
FIELDS: Final = _LINEAGE | {field.encode(): field for field in _LINEAGE.values()}
_REFERENCE: Final = frozenset({b"_ksi_context_ref", b"_event_id"})


class Identity(msgspec.Struct, frozen=True):
    """Which event a text is: its own id, else a digest of the text; and when it was, where it says."""

    key: str
    is_stated: bool
    at_ms: int | None
    is_migrated: bool
    """Whether it carries a reference in the place of an embedded context already."""


def identity_of(text: bytes) -> Identity:
    """Returns which event a text is; never raises."""
    fields = read_fields(text)
    if isinstance(fields, str):
        return Identity(digest_key(text), False, None, False)
    stated = stated_id(fields)
    return Identity(
        stated or digest_key(text),
        stated is not None,
        None if fields.time is None else fields.time.at_ms,
        fields.is_migrated,
    )


class Fields(msgspec.Struct):
    """What a text says: its members, those of its context, and the values that become columns."""

    members: list[Member]
    context: list[Member]
    values: dict[str, Any]
    time: Time | None
    data: Member | None
    is_migrated: bool


def read_fields(text: bytes) -> Fields | str:
    """Returns what a text says, or why it cannot be read."""
    try:
        check_json(text, field="event")
    except HoldfastError as error:
        return error.message
    members = members_of(text) if text.lstrip(b" \t\r\n").startswith(b"{") else None
    if members is None:
        return "it is not a JSON object"
    context: list[Member] = []
    is_migrated = False
    for member in members:
        if member.name == CONTEXT.encode():
            is_object = text[member.start : member.start + 1] == b"{"
            context = members_of(text, member.start) if is_object else []
            names = {found.name for found in context}
            is_reference = text[member.start : member.start + 5] == b'"ctx_'
            is_migrated = is_reference or (b"_ksi_context_ref" in names and names <= _REFERENCE)
    values: dict[str, Any] = {}
    time: Time | None = None
    # What the context says goes before what stands around it.
    for member in (*context, *members):
        field = FIELDS.get(member.name)
        if field is None or field in values:
            continue
        raw = text[member.start : member.end]
        if field == "timestamp":
            time = time or holes.time_in(raw)
        else:
            value = holes.whole_in(raw) if field == "event_depth" else holes.text_in(raw)
            if value is not None:
                values[field] = value
    for name in NAMES:
        found = next((member for member in members if member.name == name.encode()), None)
        if found is not None and "name" not in values:
            value = holes.text_in(text[found.start : found.end])
            if value is not None:
                values["name"] = value
    data = [member for member in members if member.name == b"data"]
    return Fields(members, context, values, time, data[0] if len(data) == 1 else None, is_migrated)


def stated_id(fields: Fields) -> str | None:
    """Returns the id that an event says it has, when it can be one."""
    return label(fields.values.get("event_id"))


def digest_key(text: bytes) -> str:
    """Returns what a text without an id of its own is known by."""
    return "text:" + blake2b(text, digest_size=20).hexdigest()


def label(value: Any) -> str | None:
    """Returns a value that can be an id of an event, a session and the like; None for any other."""
    return value if isinstance(value, str) and 0 < len(value) <= limits.ID_CHARS and is_well_formed(value) else None
