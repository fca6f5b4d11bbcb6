"""The shape of an orchestration's snapshot, and what is checked of it.  Pure decisions.

A snapshot is a JSON object: ``{"orchestration_id", "pattern_name", "state", "agents": {id: {"profile", "spawned",
"vars"}}, "routing_rules", "vars"}``, with ``reason`` when one was given; further members, of it and of its agents, stay
as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final, cast

import msgspec
from msgspec import Meta

from holdfast.schemas import limits
from holdfast.schemas.bodies import check_nesting, encode_json
from holdfast.schemas.errors import InvalidBodyError, InvalidFieldError, InvalidRefError
from holdfast.schemas.ids import EventId
from holdfast.schemas.names import is_well_formed
from holdfast.schemas.refs import Ref, parse_ref

Snapshot = dict[str, Any]
"""A snapshot as a plain dict, every member of the shape present."""

KIND: Final = "orchestration_state"
"""The kind of the contexts that hold snapshots."""

PREFIX: Final = "orchestration:"
"""What the name of a transition's event begins with; the state follows."""

RECOVERED: Final = "recovered"
"""The state that recovery tells by itself, as ``orchestration:recovered``; none that can be captured."""

STATE_CHARS: Final = 64
"""Longest state: it is a segment of an event's name."""

REASON_CHARS: Final = 1_000
"""Longest reason: it travels in the event too."""

_Id = Annotated[str, Meta(min_length=1, max_length=limits.ID_CHARS)]


class CapturedState(msgspec.Struct, frozen=True, kw_only=True):
    """A transition of an orchestration, as its event tells it; ``context_ref`` is the snapshot's reference.

    With ``state`` "recovered" it tells that the snapshot was recovered then.
    """

    state: str
    context_ref: Ref
    captured_at: datetime
    event_id: EventId
    agent_id: str
    reason: str | None = None


class _Agent(msgspec.Struct):
    profile: str | None = None
    spawned: bool = False
    vars: dict[str, Any] = {}


class _Shape(msgspec.Struct):
    orchestration_id: _Id
    state: Annotated[str, Meta(min_length=1, max_length=STATE_CHARS)]
    pattern_name: str | None = None
    agents: dict[str, _Agent] = {}
    routing_rules: list[Any] = []
    vars: dict[str, Any] = {}
    reason: Annotated[str, Meta(max_length=REASON_CHARS)] | None = None


_PLACE: Final = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`\Z")
_MEMBER: Final = re.compile(r"missing required field `([^`]+)`")


def new_snapshot(orchestration_id: str, state: str, payload: Mapping[str, Any] | None, **named: Any) -> Snapshot:
    """Returns the snapshot of a transition: ``payload``, with what is ``named`` in the place of its members.

    Members of the shape that nobody gave are there and empty.  Raises InvalidFieldError naming the member that does
    not fit, also when the payload speaks of another orchestration or state.
    """
    if payload is not None and not isinstance(payload, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidFieldError(f"payload is {type(payload).__name__}, not a dict", field="payload")
    given = {name: value for name, value in named.items() if value is not None}
    identity = {"orchestration_id": orchestration_id, "state": state}
    # As JSON holds it: a copy of the caller's, and what no body may be is told before anything is sent.
    raw = encode_json({**(payload or {}), **given}, field="payload")
    check_nesting(raw, field="payload")
    members: Snapshot = msgspec.json.decode(raw)
    for name, value in identity.items():
        said = members.get(name)
        if said not in (None, value):
            raise InvalidFieldError(
                f"the payload says {name} {repr(said)[:80]}, the call {value!r}",
                field=name,
                hint=f"leave {name} out of the payload",
            )
    return _whole({**members, **identity}, "snapshot", InvalidFieldError)


def snapshot_in(ref: str, body: object) -> Snapshot:
    """Returns the snapshot that a stored context holds, members of the shape that are absent filled in.

    Raises InvalidBodyError naming the member when the context holds no snapshot.
    """
    return _whole(body, ref, InvalidBodyError)


def check_snapshot_ref(ref: object) -> Ref:
    """Returns a reference when it is one of a snapshot; raises InvalidRefError otherwise."""
    kind = parse_ref(ref).kind
    if kind != KIND:
        raise InvalidRefError(
            f"{ref} is a context of kind {kind!r}, not {KIND!r}",
            field="context_ref",
            hint="list an orchestration's snapshots with 'holdfast orchestration history ID'",
        )
    return Ref(str(ref))


def check_state(state: object, *, reserved: tuple[str, ...] = ()) -> str:
    """Returns a state when it can be a segment of an event's name; raises InvalidFieldError otherwise."""
    if not (isinstance(state, str) and 0 < len(state) <= STATE_CHARS and ":" not in state and is_well_formed(state)):
        raise InvalidFieldError(
            f"state {repr(state)[:80]} is not text of 1 to {STATE_CHARS} characters without a colon",
            field="state",
            limit=STATE_CHARS,
        )
    if state in reserved:
        raise InvalidFieldError(
            f"state {state!r} is told by Holdfast itself", field="state", hint="capture it under another name"
        )
    return state


def state_of(name: str, prefix: str) -> str | None:
    """Returns the state that an event's name tells, None when it tells none."""
    state = name.removeprefix(prefix)
    return None if state == name or not state or ":" in state else state


def event_data(snapshot: Snapshot) -> dict[str, Any]:
    """Returns what the event of a transition says beside the reference: enough to list and to listen by."""
    members = ("orchestration_id", "pattern_name", "state", "reason")
    return {name: snapshot[name] for name in members if snapshot.get(name) is not None}


def told_by(data: object) -> dict[str, Any]:
    """Returns the members of an event's data; none when it is no object."""
    return cast("dict[str, Any]", data) if isinstance(data, dict) else {}


def _whole(body: object, what: str, failure: type[InvalidFieldError]) -> Snapshot:
    if not isinstance(body, dict):
        raise failure(f"{what} is no snapshot of an orchestration: not a JSON object", field="snapshot")
    try:
        shape = msgspec.convert(body, _Shape)
    except msgspec.ValidationError as error:
        text = str(error)
        place, member = _PLACE.search(text), _MEMBER.search(text)
        path = [place[1] if place else "", member[1] if member else ""]
        raise failure(
            f"{what} is no snapshot of an orchestration: {text}", field=".".join(filter(None, path)) or "snapshot"
        ) from error
    members = {**cast("Snapshot", body)}
    for name in ("pattern_name", "routing_rules", "vars"):
        members[name] = getattr(shape, name)
    agents: dict[str, dict[str, Any]] = members.get("agents", {})
    members["agents"] = {
        name: {**agents[name], "profile": agent.profile, "spawned": agent.spawned, "vars": agent.vars}
        for name, agent in shape.agents.items()
    }
    return members
