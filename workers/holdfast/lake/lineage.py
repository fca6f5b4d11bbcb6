"""Where an event came from, and what it led to: SQL recursion over hot and cold events in one picture.

What links events is ``parent_event_id``.  A tree is found without a look at the lake for each of its levels: one scan
makes a slim list of links, the recursion runs over that list in memory, and the rows of one page are read at the end.
``root_event_id`` keeps the list short: a descendant has the root of the event asked for, or that event as its root, or
none is known of it.  So an event that claims a parent in one tree and a root in another is not in the tree of that
parent.  Where no root is known, not even of an ancestor, the links of every root are followed.

Parents are what producers say, so they may be missing, or go round in a circle: a missing parent ends a chain, and
every event is given once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

import msgspec

from holdfast.lake.scan import SELECT_EVENTS, SELECT_PLACES, check_uuid, event_of_row
from holdfast.schemas.errors import InvalidFieldError, NotFoundError
from holdfast.schemas.limits import QUERY_LIMIT_MAX
from holdfast.schemas.lineage import RECEIPT
from holdfast.schemas.rows import EventRow

LIMIT_DEFAULT: Final = 500
"""Events of one page of a chain or tree: all of most."""

_KNOWN_ROOTS: Final = 2
"""After links of so many roots have been followed the links of every root are: forged roots must not cost a scan for
each event."""


class ChainPage(msgspec.Struct, frozen=True):
    """Some of an event's ancestors, the first of them first; the event itself is the last of all.

    ``complete``: the first one has no parent.  Otherwise its parent is not stored, or is one of its descendants.
    ``cursor`` goes on after the last of these; None when that is the event itself.
    """

    events: list[EventRow]
    complete: bool
    cursor: str | None


class TreePage(msgspec.Struct, frozen=True):
    """Some events of a tree in pre-order.  ``cursor`` goes on after the last of them; None at the end of the tree."""

    events: list[EventRow]
    cursor: str | None


class Link(msgspec.Struct, frozen=True, array_like=True):
    """An event and the one it stands under.  ``seq`` is its place in the stream."""

    event_id: str
    parent_event_id: str | None
    seq: int
    root_event_id: str | None = None
    is_receipt: bool = False


class _Pinnable(Protocol):
    def execute(self, query: Any, parameters: Any = ..., /) -> Any: ...

    def pinned(self) -> AbstractContextManager[Any]: ...


class FindBelow(Protocol):
    """What :func:`tree` and :func:`descendants` are."""

    def __call__(
        self,
        connection: _Pinnable,
        namespace: str,
        event_id: str,
        *,
        limit: int = ...,
        cursor: str | None = ...,
        receipts: bool = ...,
        json: bool = ...,
    ) -> TreePage:
        """Returns the next events below an event."""
        ...


_LINKS: Final = "SELECT event_id, parent_event_id, root_event_id, stream_seq{more} FROM events WHERE namespace = ?"
_OF_ROOTS: Final = " AND (root_event_id IN ({roots}) OR root_event_id IS NULL)"

# UNION, not UNION ALL: what was reached before is not followed again, so a circle ends.
_UP: Final = """
WITH RECURSIVE links AS MATERIALIZED ({links}), above AS (
    SELECT CAST(? AS UUID) AS event_id
    UNION
    SELECT links.parent_event_id FROM above JOIN links USING (event_id) WHERE links.parent_event_id IS NOT NULL
)
SELECT CAST(event_id AS VARCHAR), CAST(parent_event_id AS VARCHAR), stream_seq, CAST(root_event_id AS VARCHAR)
FROM links SEMI JOIN above USING (event_id)
"""
_DOWN: Final = """
WITH RECURSIVE links AS MATERIALIZED ({links}), below AS (
    SELECT CAST(? AS UUID) AS event_id
    UNION
    SELECT links.event_id FROM below JOIN links ON links.parent_event_id = below.event_id
)
SELECT CAST(event_id AS VARCHAR), CAST(parent_event_id AS VARCHAR), stream_seq, NULL, name = ?
FROM links SEMI JOIN below USING (event_id)
ORDER BY stored_at, epoch, stream_seq
"""
# Sequences narrow the files and their pages down, and are no key: two epochs may have the same.
_ROWS: Final = """WHERE namespace = ? AND stream_seq IN (SELECT unnest(CAST(? AS BIGINT[])))
    AND event_id IN (SELECT unnest(CAST(? AS UUID[])))"""


def chain(
    connection: _Pinnable,
    namespace: str,
    event_id: str,
    *,
    limit: int = LIMIT_DEFAULT,
    cursor: str | None = None,
    json: bool = True,
) -> ChainPage:
    """Returns the next events of the chain of parents that ends with an event, whatever roots they claim.

    ``connection`` is one of :func:`holdfast.lake.connect`, not within its ``pinned()``.  Without ``json``, ``data``
    and ``extra`` are left out.  Raises NotFoundError when the event is not stored, InvalidFieldError for what is no
    UUID, for a limit out of range and for a cursor that is not of this chain.
    """
    start, after = _arguments(event_id, limit, cursor)
    with connection.pinned():
        above, complete = _climb(connection, namespace, start)
        page, is_end = _part(above[::-1], after, limit)
        events = _rows(connection, namespace, page, json=json)
    return ChainPage(events, complete, None if is_end else page[-1].event_id)


def tree(
    connection: _Pinnable,
    namespace: str,
    event_id: str,
    *,
    limit: int = LIMIT_DEFAULT,
    cursor: str | None = None,
    receipts: bool = False,
    json: bool = True,
) -> TreePage:
    """Returns the next events of the tree below an event, itself first, in pre-order: a parent, then its children.

    Siblings are in the order of storing: (``stored_at``, epoch, sequence).  An event that is stored between two pages
    is in a later one if its place is behind the cursor; nothing is repeated or left out that was there before.
    Receipts are left out unless asked for.  Arguments and errors as of :func:`chain`.
    """
    return _page(connection, namespace, event_id, limit, cursor, receipts=receipts, json=json, itself=True)


def descendants(
    connection: _Pinnable,
    namespace: str,
    event_id: str,
    *,
    limit: int = LIMIT_DEFAULT,
    cursor: str | None = None,
    receipts: bool = False,
    json: bool = True,
) -> TreePage:
    """Returns the same as :func:`tree` without the event itself."""
    return _page(connection, namespace, event_id, limit, cursor, receipts=receipts, json=json, itself=False)


def _page(
    connection: _Pinnable,
    namespace: str,
    event_id: str,
    limit: int,
    cursor: str | None,
    *,
    receipts: bool,
    json: bool,
    itself: bool,
) -> TreePage:
    start, after = _arguments(event_id, limit, cursor)
    with connection.pinned():
        links = pre_order(_links_below(connection, namespace, start), start)
        # The event asked for is given even if it is a receipt.
        wanted = [link for link in links if (itself if link.event_id == start else receipts or not link.is_receipt)]
        page, is_end = _part(wanted, after, limit)
        events = _rows(connection, namespace, page, json=json)
    return TreePage(events, None if is_end else page[-1].event_id)


def _arguments(event_id: str, limit: int, cursor: str | None) -> tuple[str, str | None]:
    if not 1 <= limit <= QUERY_LIMIT_MAX:
        raise InvalidFieldError(
            f"limit {limit} is not 1 to {QUERY_LIMIT_MAX}", field="limit", limit=QUERY_LIMIT_MAX, hint="use the cursor"
        )
    return check_uuid(event_id), None if cursor is None else check_uuid(cursor, "cursor")


def _part(links: list[Link], after: str | None, limit: int) -> tuple[list[Link], bool]:
    """The links of one page, and whether they are the last."""
    first = 0
    if after is not None:
        places = [place for place, link in enumerate(links) if link.event_id == after]
        if not places:
            raise InvalidFieldError(
                f"cursor {after} is not an event of this lineage",
                field="cursor",
                hint="pass the cursor of the page before, or none to begin anew",
            )
        first = places[0] + 1
    return links[first : first + limit], len(links) <= first + limit


def pre_order(links: list[Link], start: str) -> list[Link]:
    """Returns the links of a tree in pre-order, children in the order given; ``start`` is its topmost event.

    Links that do not hang together with it are left out.  Works at any depth.
    """
    children: dict[str | None, list[Link]] = {}
    top: Link | None = None
    for link in links:
        if link.event_id == start:
            top = link  # not a child, even if its parent is one of its descendants
        else:
            children.setdefault(link.parent_event_id, []).append(link)
    ordered: list[Link] = []
    pending = [] if top is None else [top]
    while pending:
        link = pending.pop()
        ordered.append(link)
        pending.extend(reversed(children.get(link.event_id, ())))
    return ordered


def _climb(connection: _Pinnable, namespace: str, start: str) -> tuple[list[Link], bool]:
    """The links from an event up to its first ancestor, and whether that one has no parent."""
    root = _root_of(connection, namespace, start)
    roots: set[str] = set()
    while True:
        if root is not None:
            roots.add(root)
        scan, values = _scan(namespace, roots if len(roots) <= _KNOWN_ROOTS else None)
        rows = connection.execute(_UP.format(links=scan), [*values, start]).fetchall()
        above, end = _follow({row[0]: Link(*row) for row in rows}, start)
        if end is None or any(link.event_id == end for link in above):
            return above, end is None
        try:
            root = _root_of(connection, namespace, end)  # stored, but with another root?
        except NotFoundError:
            return above, False


def _follow(by_id: dict[str, Link], start: str) -> tuple[list[Link], str | None]:
    """The links from an event upwards, and the parent at which they end: none, one met before, or one not there."""
    above: list[Link] = []
    met: set[str] = set()
    current: str | None = start
    while current is not None and current in by_id and current not in met:
        met.add(current)
        above.append(by_id[current])
        current = by_id[current].parent_event_id
    return above, current


def _links_below(connection: _Pinnable, namespace: str, start: str) -> list[Link]:
    """The links of an event and its descendants, in the order of storing."""
    root = _root_of(connection, namespace, start)
    if root is None:
        above, _ = _climb(connection, namespace, start)
        root = next((link.root_event_id for link in above if link.root_event_id is not None), None)
    scan, values = _scan(namespace, None if root is None else {root, start}, ", stored_at, epoch, name")
    rows = connection.execute(_DOWN.format(links=scan), [*values, start, RECEIPT]).fetchall()
    return [Link(*row) for row in rows]


def _root_of(connection: _Pinnable, namespace: str, event_id: str) -> str | None:
    """The root of an event that is stored, None where it is not known."""
    row = connection.execute(
        "SELECT CAST(root_event_id AS VARCHAR) FROM events WHERE namespace = ? AND event_id = CAST(? AS UUID)",
        [namespace, event_id],
    ).fetchone()
    if row is None:
        raise NotFoundError(
            f"no event {event_id} in namespace {namespace!r}", field="event_id", hint="give the id of a published event"
        )
    root: str | None = row[0]
    return root


def _scan(namespace: str, roots: set[str] | None, more: str = "") -> tuple[str, list[object]]:
    """The list of links of some roots, and of events whose root is not known; of None: of every event."""
    links = _LINKS.format(more=more)
    if roots is None:
        return links, [namespace]
    if not roots:
        return f"{links} AND root_event_id IS NULL", [namespace]
    listed = ", ".join("CAST(? AS UUID)" for _ in roots)
    return links + _OF_ROOTS.format(roots=listed), [namespace, *sorted(roots)]


def _rows(connection: _Pinnable, namespace: str, links: list[Link], *, json: bool) -> list[EventRow]:
    """The events of some links, in their order."""
    if not links:
        return []
    rows = connection.execute(
        (SELECT_EVENTS if json else SELECT_PLACES) + _ROWS,
        [namespace, [link.seq for link in links], [link.event_id for link in links]],
    ).fetchall()
    events = {event.id: event for event in map(event_of_row, rows)}
    return [events[link.event_id] for link in links]
