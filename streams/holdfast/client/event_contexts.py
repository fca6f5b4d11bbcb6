"""The contexts of events as dicts, with references in the place of embedded ones.

::

    contexts = get_context_manager()
    context = await contexts.create_context("evt_123", time.time(), agent_id="planner", session_id="trip-42", n_legs=2)
    ref = await contexts.store_event_with_context({"event_id": "evt_123", "event_name": "plan:made", "data": {"n": 3}})
    assert ref == context["_ref"]

A context says what is known of an event, under the names ``_event_id``, ``_timestamp``, ``_agent_id``,
``_session_id``, ``_correlation_id``, ``_parent_event_id``, ``_root_event_id`` and ``_event_depth``, and whatever else
it was given, under names of its own.  It is stored as any context is, under a reference that follows from its content;
``_ref`` is that reference, and is not in it.  Other clients see the same: the event by :meth:`Holdfast.query`, the
context by :meth:`Holdfast.resolve`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import msgspec

from holdfast.client import lineage
from holdfast.client.background import ClientShare
from holdfast.client.context_registry import NAMESPACE_VARIABLE
from holdfast.client.emitting import Named, event_of, place_event
from holdfast.client.lineage_context import of_event, with_underscores
from holdfast.schemas import limits
from holdfast.schemas.bodies import encode_json
from holdfast.schemas.errors import ConflictError, InvalidFieldError
from holdfast.schemas.ids import MAX_MS, new_event_id, now_ms, utc_from_ms
from holdfast.schemas.lineage import ALIASES, INHERITED_FIELDS
from holdfast.schemas.names import check_event_name, check_kind
from holdfast.schemas.refs import Ref, parse_ref
from holdfast.streams.events import check_id_text

if TYPE_CHECKING:
    from holdfast.client.model import Context, Event
    from holdfast.client.store import Holdfast
    from holdfast.streams.events import NewEvent

T = TypeVar("T")

CONTEXT_KIND: Final = "event"
"""The kind of the contexts made here, unless told otherwise: their references begin with ``ctx_event_``."""

_AGENT: Final = "agent"
_REMEMBERED: Final = 4_096
"""Most contexts that a manager holds for the events that are still to come: some hundred bytes each."""
_BATCH: Final = 100

_REF: Final = "_ref"
_EMBEDDED: Final = "_ksi_context"
_REFERENCES: Final = (_REF, _EMBEDDED, "_ksi_context_ref", "context_ref")
"""Under which of these an event names its context."""
_OF_AN_EVENT: Final = frozenset({"event_id", "event_name", "event", "data", "timestamp", *_REFERENCES})
_OF_THE_EVENT: Final = ("_event_id", "_timestamp")
_ALIAS_OF: Final = {name: alias for alias, name in ALIASES.items() if name != "context_ref"}


class EventContextManager:
    """Creates, stores and finds the contexts of events.

    ``hf`` is an open client.  Without one the manager connects with its first call to the server that
    :func:`holdfast.client.connect` would find, in the namespace of ``HOLDFAST_NAMESPACE``, and may be used from any
    event loop; that connection is the background client's, closed when the interpreter exits or by :meth:`close`.
    ``kind`` is that of the contexts it makes.
    """

    def __init__(self, hf: Holdfast | ClientShare | None = None, *, kind: str = CONTEXT_KIND) -> None:
        self.kind = check_kind(kind)
        self._is_owner = hf is None
        if hf is None:
            hf = ClientShare(namespace=os.environ.get(NAMESPACE_VARIABLE) or "default", agent=_AGENT)
        self._client = hf
        self._created: dict[str, dict[str, Any]] = {}

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` has closed it; one on a client of the caller's is never closed."""
        return isinstance(self._client, ClientShare) and self._client.is_closed

    async def close(self) -> None:
        """Gives back the connection that it made itself; does nothing to a client that it was given."""
        if self._is_owner and isinstance(self._client, ClientShare):
            await self._client.aclose()

    async def create_context(
        self,
        event_id: str,
        timestamp: float,
        agent_id: str | None = None,
        session_id: str | None = None,
        correlation_id: str | None = None,
        **custom: Any,
    ) -> dict[str, Any]:
        """Stores the context of an event to be and returns it, with its reference as ``_ref``.

        Parent, root and depth are those of a child of the current event (see :mod:`holdfast.client.lineage`), and so
        are agent, session and correlation where they are not given.  Identical contexts are stored once and share one
        reference.  ``timestamp`` is in seconds since 1970.  Raises InputError naming the argument that does not fit.
        """
        named = {"agent_id": agent_id, "session_id": session_id, "correlation_id": correlation_id}
        known = _compose(event_id, timestamp, {**custom, **named}, lineage.current() or {})
        return await self._run(lambda hf: self._store_context(hf, known))

    async def store_event_with_context(self, event: Mapping[str, Any]) -> Ref:
        """Stores an event with its context, both durably, and returns the context's reference.

        ``event`` has the members ``event_name`` (or ``event``), ``event_id``, ``timestamp`` and ``data``, all but the
        first optional.  Its context is the one that it names by reference (``_ksi_context``, ``context_ref`` or
        ``_ref``); else the one that this manager created for its id; else one is created.  Further members, such as
        ``agent_id`` and ``session_id``, are metadata and go into the context, as does a context that is embedded as a
        dict under ``_ksi_context``.

        The same event again is stored once.  Raises ConflictError when its id is that of another event: what is stored
        is never replaced.
        """
        given = _read_event(event)
        return await self._run(lambda hf: self._store_event(hf, given))

    async def get_context(self, ref: str) -> dict[str, Any]:
        """Returns a context, as a dict of the caller's own, with its reference as ``_ref``.

        One whose body is no object is there as ``body``.  Errors as of :meth:`Holdfast.resolve`.
        """
        return await self._run(lambda hf: _resolved(hf, ref))

    async def get_contexts(self, refs: Iterable[str]) -> dict[str, dict[str, Any] | None]:
        """Returns many contexts by reference; None for those that are stored nowhere, or have expired."""
        wanted = list(dict.fromkeys(refs))
        found = await self._run(lambda hf: _resolve_all(hf, wanted))
        return {ref: None if (context := found.get(Ref(ref))) is None else _as_dict(context) for ref in wanted}

    async def query_contexts(
        self,
        *,
        correlation_id: str | None = None,
        agent_id: str | None = None,
        session_id: str | None = None,
        event_id: str | None = None,
        since: datetime | float | None = None,
        until: datetime | float | None = None,
        limit: int = limits.QUERY_LIMIT_DEFAULT,
    ) -> list[dict[str, Any]]:
        """Returns the contexts of the events that fit every condition, in the order the events were stored.

        Each is the context with ``_ref``, and what the event says of itself where the context does not.  ``since``
        (inclusive) and ``until`` (exclusive) are times of storing: aware datetimes, or seconds since 1970.  At most
        ``limit``, up to 1,000.  Of a context that is stored no more there is what the event says.
        """
        if not 1 <= limit <= limits.QUERY_LIMIT_MAX:
            raise InvalidFieldError(
                f"limit {limit} is not 1 to {limits.QUERY_LIMIT_MAX}", field="limit", limit=limits.QUERY_LIMIT_MAX
            )
        moments = _moment(since, "since"), _moment(until, "until")

        async def find(hf: Holdfast) -> list[dict[str, Any]]:
            events: list[Event] = []
            async for event in hf.query(
                correlation=correlation_id,
                agent=agent_id,
                session=session_id,
                event_id=event_id,
                since=moments[0],
                until=moments[1],
            ):
                if event.context_ref is not None:
                    events.append(event)
                if len(events) == limit:
                    break
            found = await _resolve_all(hf, [event.context_ref for event in events if event.context_ref is not None])
            return [_beside(event, found) for event in events]

        return await self._run(find)

    async def get_event_chain(self, event_id: str) -> list[dict[str, Any]]:
        """Returns an event and what it came from, the root first, each as a dict with ``_ksi_context``.

        See :meth:`get_event_with_context` for the members.  Raises NotFoundError when there is no such event.
        """

        async def find(hf: Holdfast) -> list[dict[str, Any]]:
            return [_event_dict(event) for event in await hf.chain(event_id)]

        return await self._run(find)

    async def get_event_with_context(self, event_id: str) -> dict[str, Any] | None:
        """Returns an event as a dict, with its context resolved as ``context``; None when there is no such event.

        Members: ``event_id`` (as it was given), ``event_name``, ``timestamp`` in seconds, ``data``, ``agent_id``, and
        where known ``session_id``, ``correlation_id`` and the others of its lineage; ``_ksi_context`` is the reference
        of its context.  ``context`` is None without one, or when it is stored no more.
        """

        async def find(hf: Holdfast) -> dict[str, Any] | None:
            async for event in hf.query(event_id=event_id, limit=1):
                ref = event.context_ref
                context = None if ref is None else (await _resolve_all(hf, [ref])).get(ref)
                return _event_dict(event) | {"context": None if context is None else _as_dict(context)}
            return None

        return await self._run(find)

    def copy_current_context(self) -> lineage.Scope | None:
        """Returns the implicit lineage of this moment, to be restored in another task, thread or callback."""
        return lineage.copy_current_context()

    def restore_context(self, saved: lineage.Scope | Mapping[str, Any] | None) -> None:
        """Makes a lineage that was copied, or a dict such as :meth:`create_context` returns, the current one.

        Until the running task ends; :func:`holdfast.client.lineage.within` does it for a block.
        """
        if isinstance(saved, Mapping) and _REF in saved:
            saved = {**{key: value for key, value in saved.items() if key != _REF}, "context_ref": saved[_REF]}
        lineage.restore_context(saved)

    async def _run(self, use: Callable[[Holdfast], Awaitable[T]]) -> T:
        if isinstance(self._client, ClientShare):
            return await self._client.run(use)
        return await use(self._client)

    async def _store_context(self, hf: Holdfast, known: dict[str, Any]) -> dict[str, Any]:
        context = {_REF: await hf.put(known, kind=self.kind), **known}
        self._created.pop(known["_event_id"], None)
        self._created[known["_event_id"]] = context
        while len(self._created) > _REMEMBERED:
            self._created.pop(next(iter(self._created)), None)
        return dict(context)

    async def _store_event(self, hf: Holdfast, given: _Given) -> Ref:
        if given.ref is not None:
            # Looked at for the event's place, which is no reading of what it holds.
            context = _as_dict(await hf.resolve(given.ref, track=False))
        elif given.embedded is not None:
            context = await self._store_context(
                hf, {"_event_id": given.event_id, **given.embedded, **_underscored(given.metadata)}
            )
        else:
            context = self._created.get(given.event_id) or {}
            if given.metadata or not context:
                before = {key: value for key, value in context.items() if key not in (*_OF_THE_EVENT, _REF)}
                at = context.get("_timestamp") if given.timestamp is None else given.timestamp
                # What was created has its place, wherever the event is stored.
                current = {} if context else lineage.current() or {}
                known = _compose(given.event_id, _now() if at is None else at, {**before, **given.metadata}, current)
                context = await self._store_context(hf, known)
        at = context.get("_timestamp") if given.timestamp is None else given.timestamp
        await _publish(hf, given, context, _now() if at is None else _seconds(at))
        return Ref(context[_REF])


class _Given(msgspec.Struct, frozen=True, kw_only=True):
    """An event as it was given, checked."""

    name: str
    event_id: str
    timestamp: float | None
    data: Any
    metadata: dict[str, Any]
    ref: Ref | None
    embedded: dict[str, Any] | None


def _read_event(event: Mapping[str, Any]) -> _Given:
    given_id, timestamp = event.get("event_id"), event.get("timestamp")
    named = next((event[key] for key in _REFERENCES if event.get(key) is not None), None)
    embedded: dict[str, Any] | None = None
    ref: Ref | None = None
    if isinstance(named, Mapping):
        embedded = {key: value for key, value in cast("Mapping[str, Any]", named).items() if key != _REF}
        lineage.from_dict(embedded)  # every member fits
    elif named is not None:
        parse_ref(named)
        ref = Ref(named)
    return _Given(
        name=check_event_name(event.get("event_name", event.get("event"))),
        event_id=str(new_event_id()) if given_id is None else check_id_text(given_id, "event_id"),
        timestamp=None if timestamp is None else _seconds(timestamp),
        data=event.get("data"),
        metadata={key: value for key, value in event.items() if key not in _OF_AN_EVENT and value is not None},
        ref=ref,
        embedded=embedded,
    )


def _compose(event_id: str, timestamp: object, said: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """The context of a child of the current event: what is said of it, and beyond that what it takes over."""
    known: dict[str, Any] = {"_event_id": check_id_text(event_id, "event_id"), "_timestamp": _seconds(timestamp)}
    known |= {f"_{name}": current[name] for name in INHERITED_FIELDS if name in current}
    parent = current.get("event_id")
    if parent is None:
        known |= {"_root_event_id": event_id, "_event_depth": 0}
    else:
        known |= {"_parent_event_id": parent, "_event_depth": current.get("event_depth", 0) + 1}
        root = current.get("root_event_id", parent if current.get("parent_event_id") is None else None)
        if root is not None:
            known["_root_event_id"] = root
    told = {name: value for name, value in _underscored(said).items() if value is not None}
    for name in (*_OF_THE_EVENT, *_REFERENCES):
        if name in told:
            raise InvalidFieldError(
                f"{name!r} is not a name for a field of one's own", field=name, hint="choose another name"
            )
    if "_parent_event_id" in told:  # another place than the current one, as a whole
        known = {name: value for name, value in known.items() if name != "_root_event_id"} | {"_event_depth": 1}
    context = known | told
    lineage.from_dict(context)  # every member fits
    return context


def _underscored(said: Mapping[str, Any]) -> dict[str, Any]:
    return {_ALIAS_OF.get(name, name): value for name, value in said.items()}


async def _publish(hf: Holdfast, told: _Given, context: Mapping[str, Any], timestamp: float) -> None:
    """Stores an event with the place and the reference that its context says."""
    scope = lineage.scope()
    given = {
        field: context[alias]
        for alias, field in ALIASES.items()
        if alias in context and field not in ("event_id", "timestamp", "context_ref")
    }
    if "parent_event_id" not in given:
        given = {field: value for field, value in given.items() if field not in ("root_event_id", "event_depth")}
    named = Named(event_id=told.event_id, timestamp=utc_from_ms(round(timestamp * 1000)))
    # A lineage that names no event of its own is that of the event to be.
    placed = place_event(hf.namespace, hf.agent, told.name, told.data, named, lineage=given, scope=scope)
    event = msgspec.structs.replace(placed.event, context_ref=Ref(context[_REF]))
    [is_new] = await hf.publish_many([event])
    if not is_new:
        await _check_same(hf, event)
        return
    if scope is not None and scope.reads is not None and event.context_ref is not None:
        scope.reads.referred(event.context_ref, event.id)
    lineage.note_emission(event_of(event), placed.parent, placed.path, overridden=placed.overridden)


async def _check_same(hf: Holdfast, event: NewEvent) -> None:
    async for stored in hf.query(event_id=event.id, limit=1):
        same = (stored.name, stored.context_ref) == (event.name, event.context_ref)
        if same and encode_json(stored.data, field="data") == encode_json(event.data, field="data"):
            return
        raise ConflictError(
            f"event {event.source_id or event.id} is stored already, as {stored.name!r} with other content",
            field="event_id",
            hint="give a new event an id of its own; what is stored stays",
        )


async def _resolved(hf: Holdfast, ref: str) -> dict[str, Any]:
    return _as_dict(await hf.resolve(ref))


async def _resolve_all(hf: Holdfast, refs: list[Any]) -> dict[Ref, Context]:
    found: dict[Ref, Context] = {}
    for start in range(0, len(refs), _BATCH):
        found |= (await hf.resolve_many(refs[start : start + _BATCH])).found
    return found


def _as_dict(context: Context) -> dict[str, Any]:
    body: object = context.decode()
    members = cast("dict[str, Any]", body) if isinstance(body, dict) else {"body": body}
    return {**members, _REF: context.ref}


def _beside(event: Event, found: Mapping[Ref, Context]) -> dict[str, Any]:
    """A context and what its event says of itself; where both say something, the context."""
    assert event.context_ref is not None
    context = found.get(event.context_ref)
    said = with_underscores(of_event(event))
    return {**said, **({_REF: event.context_ref} if context is None else _as_dict(context))}


def _event_dict(event: Event) -> dict[str, Any]:
    members: dict[str, Any] = {
        "event_id": event.source_id or event.event_id,
        "event_name": event.name,
        "timestamp": event.timestamp.timestamp(),
        "data": event.data,
        "agent_id": event.agent_id,
        "session_id": event.session_id,
        "correlation_id": event.correlation_id,
        "parent_event_id": event.parent_event_id,
        "root_event_id": event.root_event_id,
        "event_depth": event.event_depth,
        "client_id": event.client_id,
        "originator": event.originator,
        _EMBEDDED: event.context_ref,
    }
    return {name: value for name, value in members.items() if value is not None or name == "data"}


def _now() -> float:
    return now_ms() / 1000


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_MS / 1000:
        raise InvalidFieldError(
            f"timestamp {repr(value)[:40]} is not in seconds since 1970", field="timestamp", hint="use time.time()"
        )
    return float(value)


def _moment(value: datetime | float | None, field: str) -> datetime | None:
    if value is None or isinstance(value, datetime):
        return value
    if isinstance(value, bool) or not 0 <= value <= MAX_MS / 1000:
        raise InvalidFieldError(f"{field} {value} is not in seconds since 1970", field=field, hint="use time.time()")
    return utc_from_ms(round(value * 1000))


class _Accessor:
    """The one manager of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._manager: EventContextManager | None = None

    def manager(self) -> EventContextManager:
        with self._lock:
            if self._manager is None or self._manager.is_closed:
                self._manager = EventContextManager()
            return self._manager


_accessor: Final = _Accessor()


def get_context_manager() -> EventContextManager:
    """Returns the manager of this process, a new one when the last was closed; see :class:`EventContextManager`."""
    return _accessor.manager()


__all__ = ["CONTEXT_KIND", "EventContextManager", "get_context_manager"]
