"""Steps whose causes are stated by id, wherever in the file the cause stands.

A file is read twice.  The first reading notes of each step what it is called, what it names as its cause, and a digest
of what it says; then every step has its place: parents are found, also behind their children and in other sessions.
The second reading yields the steps in the order of the file.  Memory grows by about 250 bytes a step; bodies are not
kept.  Hence, other than with formats that only look back, a step may come before its cause.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Final

import msgspec

from holdfast.ops.traces.model import Format, Malformed, ParentSource, Record, Step
from holdfast.ops.traces.records import check_session_id
from holdfast.ops.traces.sources import Source
from holdfast.schemas.bodies import check_nesting, check_size
from holdfast.schemas.ids import is_canonical_uuid
from holdfast.schemas.names import check_agent, check_event_name, check_kind

_PERSON: Final = b"holdfast-cau-1"
_DIGEST_BYTES: Final = 16
_NONE: Final = -1
_AMBIGUOUS: Final = -2


class Facts(msgspec.Struct, kw_only=True):
    """What one record says.  ``id`` and ``parent`` are as the source has them, and hold within ``session`` first."""

    session: str
    id: str | None
    parent: str | None
    agent: str
    kind: str
    body: bytes
    name: str | None = None
    timestamp_ms: int | None = None
    correlation: str | None = None


Place = tuple[int, Facts] | Malformed
"""The line of a record and what it says."""

ReadFacts = Callable[[], Iterator[Place]]
"""Reads the file once more, from its beginning."""


def read_causes(source: Source, source_format: Format, read: ReadFacts, *, follow_order: bool) -> Iterator[Record]:
    """Yields a step for each record, in the order of the file.

    What states no cause, or one that is not in the file, follows from the step before it in its session when
    ``follow_order``, else is the first of its tree.  A step that is among its own causes is malformed, and taken as
    the first of its tree.
    """
    plan = _Plan(source_format, follow_order=follow_order)
    for place in read():
        if not isinstance(place, Malformed):
            plan.add(place[1])
    plan.resolve()
    index = 0
    for place in read():
        if isinstance(place, Malformed):
            yield place
            continue
        line, facts = place
        if index >= len(plan):
            yield source.malformed(line, "the file has changed while it was read")
            return
        if index in plan.circular:
            yield source.malformed(line, f"{facts.id!r} is among its own causes; taken as the first of its tree")
        yield plan.step(index, facts)
        index += 1


def checked(facts: Facts) -> Facts:
    """Returns the facts when a step can be made of them; raises InputError naming the field that does not fit."""
    check_session_id(facts.session)
    if facts.correlation is not None:
        check_session_id(facts.correlation)
    check_agent(facts.agent)
    check_kind(facts.kind)
    check_event_name(_name(facts))
    check_size(facts.body)
    check_nesting(facts.body)
    return facts


class _Plan:
    def __init__(self, source_format: Format, *, follow_order: bool) -> None:
        self.circular: set[int] = set()
        self._format: Format = source_format
        self._follow_order = follow_order
        self._digests = bytearray()
        self._ordinals = array("q")
        self._parents = array("q")
        self._roots = array("q")
        self._depths = array("q")
        self._stated: dict[int, str] = {}
        self._wanted: dict[int, tuple[bytes, bytes]] = {}
        self._before: dict[bytes, tuple[int, int]] = {}
        self._by_session: dict[bytes, int] = {}
        self._anywhere: dict[bytes, int] = {}
        self._by_order = bytearray()

    def __len__(self) -> int:
        return len(self._ordinals)

    def add(self, facts: Facts) -> None:
        index = len(self._ordinals)
        session = _digest(facts.session)
        last, ordinal = self._before.get(session, (_NONE, 0))
        self._before[session] = index, ordinal + 1
        self._ordinals.append(ordinal)
        self._parents.append(last if self._follow_order else _NONE)
        self._by_order.append(self._follow_order and last != _NONE)
        if facts.parent is not None:
            self._wanted[index] = _digest(facts.session, facts.parent), _digest(facts.parent)
        if facts.id is not None:
            self._by_session.setdefault(_digest(facts.session, facts.id), index)
            anywhere = _digest(facts.id)
            self._anywhere[anywhere] = index if anywhere not in self._anywhere else _AMBIGUOUS
            if is_canonical_uuid(facts.id) and self._anywhere[anywhere] == index:
                self._stated[index] = facts.id
        self._digests += _content(self._format, ordinal, facts)

    def resolve(self) -> None:
        """Finds every parent, then roots, depths and identities from the roots on."""
        for index, (within, anywhere) in self._wanted.items():
            found = self._by_session.get(within, _NONE)
            if found == _NONE:
                found = max(_NONE, self._anywhere.get(anywhere, _NONE))
            if found != _NONE:
                self._parents[index] = found
                self._by_order[index] = False
        for kept in (self._wanted, self._before, self._by_session, self._anywhere):
            kept.clear()
        count = len(self)
        self._roots = array("q", [_NONE]) * count
        self._depths = array("q", [0]) * count
        for index in range(count):
            self._resolve_from(index)

    def _resolve_from(self, index: int) -> None:
        path: list[int] = []
        on_path: set[int] = set()
        at = index
        while at != _NONE and self._roots[at] == _NONE:
            if at in on_path:
                # The one that comes first in the file begins the tree.
                first = min(path[path.index(at) :])
                self.circular.add(first)
                self._parents[first] = _NONE
                self._by_order[first] = False
                self._resolve_from(index)
                return
            path.append(at)
            on_path.add(at)
            at = self._parents[at]
        for step in reversed(path):
            parent = self._parents[step]
            self._roots[step] = step if parent == _NONE else self._roots[parent]
            self._depths[step] = 0 if parent == _NONE else self._depths[parent] + 1
            self._identify(step, parent)

    def _identify(self, index: int, parent: int) -> None:
        """Makes the identity of what the step says and of its parent's, and so of all above it."""
        start = index * _DIGEST_BYTES
        above = "" if parent == _NONE else self._source_id(parent)
        hasher = blake2b(self._digests[start : start + _DIGEST_BYTES], digest_size=_DIGEST_BYTES, person=_PERSON)
        hasher.update(f"{self._source_of(index)}:{above}".encode())
        self._digests[start : start + _DIGEST_BYTES] = hasher.digest()

    def _source_id(self, index: int) -> str:
        stated = self._stated.get(index)
        if stated is not None:
            return stated
        start = index * _DIGEST_BYTES
        return f"{self._format}:{self._digests[start : start + _DIGEST_BYTES].hex()}"

    def _source_of(self, index: int) -> ParentSource:
        if self._parents[index] == _NONE:
            return "none"
        return "order" if self._by_order[index] else "stated"

    def step(self, index: int, facts: Facts) -> Step:
        parent = self._parents[index]
        return Step(
            format=self._format,
            session_id=facts.session,
            correlation_id=facts.correlation or facts.session,
            agent_id=facts.agent,
            ordinal=self._ordinals[index],
            kind=facts.kind,
            name=_name(facts),
            body=facts.body,
            timestamp_ms=facts.timestamp_ms,
            source_id=self._source_id(index),
            parent_ordinal=None if parent == _NONE else self._ordinals[parent],
            parent_source_id=None if parent == _NONE else self._source_id(parent),
            parent_source=self._source_of(index),
            root_source_id=self._source_id(self._roots[index]),
            depth=self._depths[index],
        )


def _name(facts: Facts) -> str:
    return facts.name or f"step:{facts.kind}"


def _content(source_format: Format, ordinal: int, facts: Facts) -> bytes:
    at = "" if facts.timestamp_ms is None else str(facts.timestamp_ms)
    texts = (
        source_format,
        facts.session,
        facts.correlation or facts.session,
        str(ordinal),
        facts.id or "",
        facts.agent,
        facts.kind,
        _name(facts),
        at,
    )
    return _digest(*texts, body=facts.body)


def _digest(*texts: str, body: bytes = b"") -> bytes:
    hasher = blake2b(digest_size=_DIGEST_BYTES, person=_PERSON)
    for part in (*(text.encode("utf-8", "surrogatepass") for text in texts), body):
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()


__all__ = ["Facts", "Place", "ReadFacts", "checked", "read_causes"]
