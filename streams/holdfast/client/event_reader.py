"""Reading events: by what they say, and by what they follow from; hot and archived as one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Generic, TypedDict, TypeVar, Unpack, overload

import msgspec

from holdfast.client.emitting import moment_ms
from holdfast.client.model import Event
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.limits import QUERY_LIMIT_DEFAULT, QUERY_LIMIT_MAX

if TYPE_CHECKING:
    from holdfast.client.cold import ResolverClient

T = TypeVar("T")

_PAGE: Final = 500


class Conditions(TypedDict, total=False):
    """What a query may ask of events: all conditions given must hold; None is no condition.

    ``kind`` is that of the event's context and ``ref`` that context; ``root`` is the event that a tree begins with,
    ``parent`` the one directly above.  ``since`` (inclusive) and ``until`` (exclusive) are times of storing.  Receipts
    are left out unless ``receipts`` is set, or ``name`` or ``event_id`` asks for them.  An id may be a producer's own.
    """

    session: str | None
    agent: str | None
    correlation: str | None
    event_id: str | None
    kind: str | None
    name: str | None
    since: datetime | None
    until: datetime | None
    root: Event | str | None
    parent: Event | str | None
    ref: str | None
    originator: str | None
    receipts: bool


_MEMBERS: Final = {
    "session": "session_id",
    "agent": "agent_id",
    "correlation": "correlation_id",
    "root": "root_event_id",
    "parent": "parent_event_id",
    "ref": "context_ref",
}
"""Members of a request that have another name than the condition."""


class EventPage(msgspec.Struct, Generic[T], frozen=True):
    """Some events in the order they were stored.

    ``cursor`` goes on after the last of them, also later, when more are stored; of an empty page it is the one that
    was given.  A page may hold fewer events than asked for, since answers are bounded: only an empty one is the end.
    """

    events: list[T]
    cursor: str | None


class EventReader:
    """Queries of the events of one namespace, answered by the resolver.

    Each sees every event acknowledged before the call.  All raise UnavailableError when no resolver answers.
    """

    _resolver: ResolverClient
    namespace: str

    @overload
    def query(
        self, *, limit: int | None = None, fields: None = None, **conditions: Unpack[Conditions]
    ) -> AsyncIterator[Event]: ...

    @overload
    def query(
        self, *, limit: int | None = None, fields: Sequence[str], **conditions: Unpack[Conditions]
    ) -> AsyncIterator[dict[str, Any]]: ...

    def query(
        self, *, limit: int | None = None, fields: Sequence[str] | None = None, **conditions: Unpack[Conditions]
    ) -> AsyncIterator[Event] | AsyncIterator[dict[str, Any]]:
        """Yields the events that fit the :class:`Conditions` given, in the order they were stored.

        ``limit`` bounds their number; without it all are yielded, a page at a time.  With ``fields`` each event is a
        dict with those of its members that it has, times as text.  Raises InputError naming a condition that is none.
        """
        request = _request(conditions, fields)
        return self._query(request, limit) if fields is None else self._query_fields(request, limit)

    @overload
    async def query_page(
        self,
        *,
        limit: int = QUERY_LIMIT_DEFAULT,
        cursor: str | None = None,
        fields: None = None,
        **conditions: Unpack[Conditions],
    ) -> EventPage[Event]: ...

    @overload
    async def query_page(
        self,
        *,
        limit: int = QUERY_LIMIT_DEFAULT,
        cursor: str | None = None,
        fields: Sequence[str],
        **conditions: Unpack[Conditions],
    ) -> EventPage[dict[str, Any]]: ...

    async def query_page(
        self,
        *,
        limit: int = QUERY_LIMIT_DEFAULT,
        cursor: str | None = None,
        fields: Sequence[str] | None = None,
        **conditions: Unpack[Conditions],
    ) -> EventPage[Event] | EventPage[dict[str, Any]]:
        """Returns the next events, up to 1,000, that fit the :class:`Conditions` given, after those before ``cursor``.

        As :meth:`query`, for a caller who keeps the cursor.
        """
        request = _request(conditions, fields)
        if cursor is not None:
            request["cursor"] = cursor
        answer = await self._resolver.call("query", request | {"limit": limit})
        if fields is not None:
            return EventPage(answer["events"], answer["cursor"])
        return EventPage(msgspec.convert(answer["events"], list[Event]), answer["cursor"])

    async def chain(self, event: Event | str) -> list[Event]:
        """Returns the ancestors of an event, the first of them first, and the event as the last.

        A parent that is not stored ends the chain, so does one that was met before: then the first one has a
        ``parent_event_id``.  Raises NotFoundError when the event is not stored.
        """
        return [found async for found in self._pages("chain", event)]

    async def tree(self, root: Event | str, *, receipts: bool = False, limit: int | None = None) -> list[Event]:
        """Returns an event and all its descendants in pre-order, siblings in the order they were stored.

        ``limit``: the first so many of them.  Receipts are left out unless asked for, and so are events that state
        another root than their parent's.  Raises NotFoundError when the event is not stored.
        """
        return [found async for found in self._pages("tree", root, receipts=receipts, limit=limit)]

    async def descendants(self, event: Event | str, *, receipts: bool = False, limit: int | None = None) -> list[Event]:
        """Returns all descendants of an event: its :meth:`tree` without itself."""
        return [found async for found in self._pages("descendants", event, receipts=receipts, limit=limit)]

    async def _query(self, request: dict[str, Any], limit: int | None) -> AsyncIterator[Event]:
        async for item in self._query_fields(request, limit):
            yield msgspec.convert(item, Event)

    async def _query_fields(self, request: dict[str, Any], limit: int | None) -> AsyncIterator[dict[str, Any]]:
        left = limit
        while left is None or left > 0:
            answer = await self._resolver.call(
                "query", request | {"limit": _PAGE if left is None else min(left, _PAGE)}
            )
            for item in answer["events"]:
                yield item
            if left is not None:
                left -= len(answer["events"])
            # A page may be cut short by its size, so only an empty one is the end.
            if not answer["events"]:
                return
            request["cursor"] = answer["cursor"]

    async def _pages(
        self, endpoint: str, event: Event | str, *, receipts: bool = False, limit: int | None = None
    ) -> AsyncIterator[Event]:
        request: dict[str, Any] = {"event_id": _id_of(event)}
        if receipts:
            request["receipts"] = True
        left = limit
        while left is None or left > 0:
            # Each page of a tree costs a walk over all of it: few large ones.
            most = QUERY_LIMIT_MAX if left is None else min(left, QUERY_LIMIT_MAX)
            answer = await self._resolver.call(endpoint, request | {"limit": most})
            for item in answer["events"]:
                yield msgspec.convert(item, Event)
            if answer["cursor"] is None:
                return
            request["cursor"] = answer["cursor"]
            if left is not None:
                left -= len(answer["events"])


def _request(conditions: Conditions, fields: Sequence[str] | None) -> dict[str, Any]:
    known = Conditions.__annotations__
    request: dict[str, Any] = {}
    for name, value in conditions.items():
        if name not in known:
            raise TypeError(f"there is no condition {name!r}: choose from {', '.join(known)}")
        if value is None or value is False:
            continue
        if isinstance(value, datetime):
            value = moment_ms(value, name)  # noqa: PLW2901  the same value, as it travels
        request[_MEMBERS.get(name, name)] = _id_of(value) if isinstance(value, Event) else value
    if fields is not None:
        if isinstance(fields, str):
            raise InvalidFieldError("fields is text", field="fields", hint=f"give a list, such as [{fields[:40]!r}]")
        request["fields"] = list(fields)
    return request


def _id_of(event: Event | str) -> str:
    return event.event_id if isinstance(event, Event) else event


__all__ = ["Conditions", "EventPage", "EventReader"]
