"""Where a new event stands: from what the caller names, hands over and is within.  Pure decisions."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from holdfast.client.lineage import Path, Scope
from holdfast.client.lineage_context import Lineage, attributes_of, continued_trace, from_dict
from holdfast.client.model import Event
from holdfast.schemas import limits
from holdfast.schemas.bodies import encode_json
from holdfast.schemas.errors import DepthLimitError, InvalidFieldError
from holdfast.schemas.ids import EventId, ms_from_utc, new_event_id, normal_event_id, now_ms, utc_from_ms
from holdfast.schemas.lineage import ATTRIBUTES, INHERITED_FIELDS
from holdfast.streams.decode import MAX_DEPTH
from holdfast.streams.events import NewEvent, check_id_text


class Named(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller of ``emit`` named itself; it goes before everything inherited."""

    session_id: str | None = None
    correlation_id: str | None = None
    agent_id: str | None = None
    client_id: str | None = None
    originator: str | None = None
    parent: Event | str | None = None
    event_id: str | None = None
    timestamp: datetime | None = None
    traceparent: str | None = None


class Placed(msgspec.Struct, frozen=True):
    """A new event, the lineage it came from, by which path, and whether an implicit one was passed over."""

    event: NewEvent
    parent: Lineage | None
    path: Path
    overridden: bool


def place_event(
    namespace: str,
    agent: str,
    name: str,
    data: Any,
    named: Named,
    *,
    lineage: Mapping[str, Any] | None,
    scope: Scope | None,
) -> Placed:
    """Returns a new event with its place in a lineage.

    ``agent`` signs it when nothing else says who.  Raises InputError naming the field that does not fit,
    DepthLimitError when the lineage is as deep as it may be.
    """
    context: Lineage | None = None
    path: Path = "none"
    if lineage is not None:
        context, path = from_dict(lineage), "explicit"
    elif scope is not None:
        context, path = scope.context, "implicit"
    inherited: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    if context is not None:
        inherited = {field: context[field] for field in INHERITED_FIELDS if field in context}
        attributes = attributes_of(context)
    parent_id, root_id, depth = None, None, 0
    if named.parent is not None:
        path = "parent"
        parent_id, root_id, depth, context, inherited = _under_parent(namespace, named.parent, context, inherited)
    elif context is not None:
        parent_id, root_id, depth = _under_lineage(namespace, context)
        if depth > limits.LINEAGE_DEPTH:
            raise DepthLimitError(
                f"event {name!r} would stand at depth {depth} below {context.get('root_event_id', parent_id)}, "
                f"the limit is {limits.LINEAGE_DEPTH}",
                depth=depth,
                limit=limits.LINEAGE_DEPTH,
                hint="do handlers answer each other without end? a long chain that is meant to be names its parent=",
            )
    identity, source_id = _identity(namespace, named.event_id)
    trace = named.traceparent
    if trace is None and context is not None and "traceparent" in context:
        trace = continued_trace(context["traceparent"], identity)
    event = NewEvent(
        namespace=namespace,
        agent_id=inherited.get("agent_id", agent) if named.agent_id is None else named.agent_id,
        name=name,
        id=identity,
        timestamp_ms=now_ms() if named.timestamp is None else moment_ms(named.timestamp, "timestamp"),
        data=data,
        session_id=_first(named.session_id, inherited.get("session_id")),
        correlation_id=_first(named.correlation_id, inherited.get("correlation_id")),
        parent_event_id=parent_id,
        root_event_id=identity if parent_id is None else root_id,
        event_depth=depth,
        client_id=_first(named.client_id, inherited.get("client_id")),
        originator=_first(named.originator, inherited.get("originator")),
        source_id=source_id,
        traceparent=trace,
        attributes=attributes or None,
    )
    return Placed(event, context, path, overridden=path == "explicit" and scope is not None)


def minted(event: NewEvent, scope: Scope | None, *, is_timed: bool = False) -> NewEvent:
    """Returns the event with the id that its content has in the handler it comes from, if that one is idempotent.

    It then has no time of its own, unless the handler gave one (``is_timed``), which is part of its content: what is
    repeated must say the same each time.
    """
    if scope is None or scope.mint is None:
        return event
    texts = (event.name, event.agent_id, event.session_id, event.correlation_id, event.context_ref, event.originator)
    content = [(text or "").encode() for text in texts]
    # Equal children of several parents are different content, whichever is emitted first.
    content.append((event.parent_event_id or "").encode())
    at_ms = event.timestamp_ms if is_timed else None
    content.append(b"" if at_ms is None else str(at_ms).encode())
    content.append(b"" if event.data is None else encode_json(event.data, field="data"))
    content.append(b"" if event.attributes is None else encode_json(event.attributes, field=ATTRIBUTES))
    identity = scope.mint.next(content)
    trace = None if event.traceparent is None else continued_trace(event.traceparent, identity)
    root_id = identity if event.parent_event_id is None else event.root_event_id
    return msgspec.structs.replace(event, id=identity, root_event_id=root_id, timestamp_ms=at_ms, traceparent=trace)


def is_under(lineage: Mapping[str, Any] | None, scope: Scope) -> bool:
    """Whether a lineage in explicit form, or none, is that of the event that is worked on."""
    return lineage is None or from_dict(lineage).get("event_id") == scope.context.get("event_id")


def event_of(event: NewEvent) -> Event:
    """Returns a published event as its publisher sees it."""
    return Event(
        event_id=EventId(event.id),
        name=event.name,
        namespace=event.namespace,
        agent_id=event.agent_id,
        timestamp=utc_from_ms(now_ms() if event.timestamp_ms is None else event.timestamp_ms),
        session_id=event.session_id,
        correlation_id=event.correlation_id,
        parent_event_id=None if event.parent_event_id is None else EventId(event.parent_event_id),
        root_event_id=None if event.root_event_id is None else EventId(event.root_event_id),
        event_depth=event.event_depth,
        client_id=event.client_id,
        originator=event.originator,
        context_ref=event.context_ref,
        data=event.data,
        source_id=event.source_id,
        traceparent=event.traceparent,
        extra=None if event.attributes is None else {ATTRIBUTES: event.attributes},
    )


def moment_ms(moment: object, field: str) -> int:
    """Returns milliseconds since 1970 of an aware datetime; raises InvalidFieldError for anything else."""
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise InvalidFieldError(
            f"{field} is not a datetime with a time zone", field=field, hint="use datetime.now(UTC)"
        )
    at_ms = ms_from_utc(moment)
    if at_ms < 0:
        raise InvalidFieldError(f"{field} {moment.isoformat()} is before 1970", field=field)
    return at_ms


def _under_lineage(namespace: str, context: Lineage) -> tuple[str | None, str | None, int]:
    """Parent, root and depth of an event emitted under a lineage."""
    event_id, above = context.get("event_id"), context.get("parent_event_id")
    root = context.get("root_event_id")
    root_id = None if root is None else normal_event_id(namespace, root)[0]
    if event_id is not None:
        parent_id = normal_event_id(namespace, event_id)[0]
        # An event without a parent is its own root; with one and no stated root, the root is not known.
        return (
            parent_id,
            root_id or (parent_id if above is None else None),
            context.get("event_depth", 0 if above is None else 1) + 1,
        )
    if above is not None:
        # A lineage that names no event of its own is that of the event to be.
        return normal_event_id(namespace, above)[0], root_id, max(1, context.get("event_depth", 1))
    return None, None, 0


def _under_parent(
    namespace: str, parent: Event | str, context: Lineage | None, inherited: dict[str, Any]
) -> tuple[str, str | None, int, Lineage | None, dict[str, Any]]:
    if isinstance(parent, Event):
        followed = {
            field: value for field in ("session_id", "correlation_id") if (value := getattr(parent, field)) is not None
        }
        # Any client may claim any depth: the deepest there is has children of its own depth.
        depth = min(parent.event_depth + 1, MAX_DEPTH)
        return parent.event_id, parent.root_event_id, depth, parent.lineage, {**inherited, **followed}
    parent_id = normal_event_id(namespace, check_id_text(parent, "parent"))[0]
    if context is not None and "event_id" in context:
        placed = _under_lineage(namespace, context)
        if placed[0] == parent_id:  # the current event, named: all of its place is known
            return parent_id, placed[1], placed[2], context, inherited
    return parent_id, None, 1, None, inherited


def _identity(namespace: str, given: str | None) -> tuple[str, str | None]:
    if given is None:
        return new_event_id(), None
    return normal_event_id(namespace, check_id_text(given, "event_id"))


def _first(*values: str | None) -> str | None:
    return next((value for value in values if value is not None), None)
