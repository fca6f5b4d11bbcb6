"""What the states of an optimization say: its outcome, its durations, and what changed between them.  Pure decisions.

The body of a state is ``{"optimization_id", "state", "data", …}``: ``data`` is what the caller gave, the rest are the
further members that it named, such as ``component_content`` and ``result``.  Of a body are read:

* the *score*: the first number among ``result.best_score``, ``result.score``, ``result.metric``, the same of ``data``,
  then ``best_score``, ``score``, ``metric`` of the body itself;
* the *framework*: text at ``framework`` of ``data``, else of the body itself, else of ``result``;
* the *configuration*: the first object among ``config``, ``settings``, ``parameters`` of ``data``, then of the body
  itself, then of ``result``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import jsonpatch
import msgspec

from holdfast.client.orchestration_snapshots import state_of, told_by
from holdfast.schemas.bodies import check_nesting, encode_json
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.ids import EventId, iso_from_ms, ms_from_utc
from holdfast.schemas.refs import Ref

if TYPE_CHECKING:
    from holdfast.client.model import Event

KIND: Final = "optimization_state"
"""The kind of the contexts that hold states."""

PREFIX: Final = "optimization:"
"""What the name of a state's event begins with; the state follows."""

MAX_STATES: Final = 10_000
"""Most states of one optimization that are looked at together."""

PAGE: Final = 1_000
"""Most states reported at once, with their bodies."""

Status = Literal["completed", "failed", "running"]

COMPLETED: Final = ("completed",)
FAILED: Final = ("failed", "cancelled")
"""The states that end a run; in any other one it is running."""

SCORE_MEMBERS: Final = ("best_score", "score", "metric")
CONFIG_MEMBERS: Final = ("config", "settings", "parameters")

_IDENTITY: Final = ("optimization_id", "state", "data")


class StateReport(msgspec.Struct, frozen=True, kw_only=True):
    """One state of an optimization.

    ``duration_s``: until the next state, None for the last.  ``diff``: the operations (RFC 6902) that make its body of
    the one before; None for the first.  ``error`` says why there is no body, such as "not_found".
    ``performance``: the score and the member it was read from.  ``lineage``: that of its event, in explicit form.
    """

    state: str
    context_ref: Ref
    event_id: EventId
    agent_id: str
    started_at: datetime
    duration_s: float | None = None
    body: Any = None
    diff: list[dict[str, Any]] | None = None
    performance: dict[str, Any] | None = None
    lineage: dict[str, Any] = {}
    error: str | None = None


class Introspection(msgspec.Struct, frozen=True, kw_only=True):
    """An optimization from its first state to its last.

    ``duration_s``: from the first state to the one that ended it; None while it runs.  ``states`` are those asked for,
    out of ``total``; ``next`` is the ``after`` to go on with, None at the end.
    """

    optimization_id: str
    status: Status
    framework: str | None = None
    started_at: datetime
    ended_at: datetime | None = None
    duration_s: float | None = None
    total: int
    states: list[StateReport]
    next: int | None = None


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """How values are spread; ``median`` and ``p95``, the 95th percentile, are interpolated."""

    count: int
    min: float
    median: float
    p95: float
    max: float


class BestRun(msgspec.Struct, frozen=True, kw_only=True):
    """The run with the best score, and its configuration, if its states tell one."""

    optimization_id: str
    score: float
    context_ref: Ref
    config: Any = None


class StateDurations(msgspec.Struct, frozen=True, kw_only=True):
    """How often a state was reached, and for how long it lasted where another one followed."""

    state: str
    count: int
    seconds: Spread | None = None


class FrameworkAnalysis(msgspec.Struct, frozen=True, kw_only=True):
    """The runs of one framework; None stands for those that name none.

    ``seconds``: durations of the runs that ended; ``scores``: of the runs that have one.
    """

    framework: str | None
    runs: int
    completed: int
    failed: int
    running: int
    seconds: Spread | None = None
    scores: Spread | None = None
    best: BestRun | None = None
    states: list[StateDurations] = []


class Analysis(msgspec.Struct, frozen=True, kw_only=True):
    """The runs of each framework, most runs first.

    ``unread``: states of other publishers whose score is not taken into account, since there are too many to read.
    """

    frameworks: list[FrameworkAnalysis]
    unread: int = 0


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What an optimization's events say as a whole."""

    status: Status
    framework: str | None
    started_at: datetime
    ended_at: datetime | None
    duration_s: float | None


def new_body(optimization_id: str, state: str, data: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the body of a state; raises InvalidFieldError for what it cannot hold."""
    for name in _IDENTITY:
        if name in extra:
            raise InvalidFieldError(f"{name} is no further member of a state", field=name, hint="it is there already")
    raw = encode_json({**extra, "data": data}, field="data")
    check_nesting(raw, field="data")
    members: dict[str, Any] = msgspec.json.decode(raw)
    return {**members, "optimization_id": optimization_id, "state": state}


def event_data(body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the event of a state says beside the reference: its performance, for analysis without the bodies."""
    facts = {
        "optimization_id": body["optimization_id"],
        "state": body["state"],
        "framework": framework_in(body),
        "performance": performance_in(body),
    }
    return {name: value for name, value in facts.items() if value is not None}


def performance_in(body: object) -> dict[str, Any] | None:
    """Returns ``{"score", "member"}`` of a state's body, None when there is no score in it."""
    for place, holder in _holders(body, "result", "data", ""):
        for name in SCORE_MEMBERS:
            score = holder.get(name)
            if isinstance(score, int | float) and not isinstance(score, bool) and abs(score) <= sys.float_info.max:
                return {"score": float(score), "member": f"{place}.{name}" if place else name}
    return None


def framework_in(body: object) -> str | None:
    """Returns the framework that a state's body names."""
    for _, holder in _holders(body, "data", "", "result"):
        name = holder.get("framework")
        if isinstance(name, str) and name:
            return name
    return None


def config_in(body: object) -> dict[str, Any] | None:
    """Returns the configuration that a state's body holds."""
    for _, holder in _holders(body, "data", "", "result"):
        for name in CONFIG_MEMBERS:
            found = holder.get(name)
            if isinstance(found, dict):
                return cast("dict[str, Any]", found)
    return None


def status_of(state: str) -> Status:
    """Returns whether a run whose last state is this one has ended, and how."""
    if state in COMPLETED:
        return "completed"
    return "failed" if state in FAILED else "running"


def states_among(events: Sequence[Event]) -> list[Event]:
    """Returns the events that tell a state of an optimization, in the order given."""
    return [event for event in events if state_of(event.name, PREFIX) is not None and event.context_ref is not None]


def seconds_between(earlier: datetime, later: datetime) -> float:
    """Returns the seconds from one state to the next; clocks of two machines may differ, so never below 0."""
    return max(0.0, (later - earlier).total_seconds())


def summarize(states: Sequence[Event], bodies: Mapping[Ref, Any]) -> Summary:
    """Returns what the states of one optimization, at least one, say as a whole.

    The framework is the one named last, by an event or, where it says nothing, by one of the ``bodies`` at hand.
    """
    last = states[-1]
    status = status_of(str(state_of(last.name, PREFIX)))
    frameworks = (
        told_by(event.data).get("framework") or framework_in(bodies.get(cast("Ref", event.context_ref)))
        for event in reversed(states)
    )
    ended_at = None if status == "running" else last.timestamp
    return Summary(
        status=status,
        framework=next((name for name in frameworks if isinstance(name, str)), None),
        started_at=states[0].timestamp,
        ended_at=ended_at,
        duration_s=None if ended_at is None else seconds_between(states[0].timestamp, ended_at),
    )


def report_of(
    states: Sequence[Event], position: int, bodies: Mapping[Ref, Any], failed: Mapping[Ref, str]
) -> StateReport:
    """Returns the report of one state.

    ``bodies`` holds its body and that of the state before it, as far as they can be had; ``failed`` says why one
    cannot.
    """
    event = states[position]
    ref = cast("Ref", event.context_ref)
    following = states[position + 1] if position + 1 < len(states) else None
    before = cast("Ref", states[position - 1].context_ref) if position > 0 else None
    return StateReport(
        state=str(state_of(event.name, PREFIX)),
        context_ref=ref,
        event_id=event.event_id,
        agent_id=event.agent_id,
        started_at=event.timestamp,
        duration_s=None if following is None else seconds_between(event.timestamp, following.timestamp),
        body=bodies.get(ref),
        diff=difference(bodies[before], bodies[ref]) if before is not None and {before, ref} <= bodies.keys() else None,
        performance=performance_in(bodies.get(ref)),
        lineage=event.lineage,
        error=None if ref in bodies else failed.get(ref, "not_found"),
    )


def difference(before: object, after: object) -> list[dict[str, Any]]:
    """Returns the operations (RFC 6902) that make one body of another."""
    return list(jsonpatch.make_patch(before, after))


def introspection_members(found: Introspection) -> dict[str, Any]:
    """Returns an introspection as answers and ``--json`` hold it: times in ISO 8601, absent where None."""
    members = {name: value for name, value in msgspec.structs.asdict(found).items() if value is not None}
    return {**members, **_times(members), "states": [state_members(state) for state in found.states]}


def state_members(report: StateReport) -> dict[str, Any]:
    """Returns a state as answers and ``--json`` hold it; ``diff`` of the first and ``duration_s`` of the last are
    null."""
    members = {
        name: value
        for name, value in msgspec.structs.asdict(report).items()
        if value is not None or name in ("duration_s", "diff", "body")
    }
    return {**members, **_times(members)}


def _times(members: Mapping[str, Any]) -> dict[str, str]:
    return {name: iso_from_ms(ms_from_utc(value)) for name, value in members.items() if isinstance(value, datetime)}


def _holders(body: object, *places: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects in a body where a member is looked for, in order; "" is the body itself."""
    if not isinstance(body, dict):
        return []
    members = cast("dict[str, Any]", body)
    found = [(place, members.get(place) if place else members) for place in places]
    return [(place, holder) for place, holder in found if isinstance(holder, dict)]
