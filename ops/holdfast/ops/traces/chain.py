"""The chain of one session's steps: identities, parents, roots and depths, given out step by step."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import Final

from holdfast.ops.traces.model import Format, ParentSource, Step
from holdfast.ops.traces.records import check_session_id
from holdfast.schemas.bodies import check_nesting, check_size
from holdfast.schemas.names import check_agent, check_event_name, check_kind

_PERSON: Final = b"holdfast-stp-1"
_DIGEST_BYTES: Final = 16


class SessionChain:
    """Gives each step of one session its identity and its place in the tree.

    A step's ``index`` is its place among the steps added so far.  Memory grows by about 32 bytes a step, and by the
    ids and call ids that the source itself states.
    """

    def __init__(
        self, source_format: Format, session_id: str, *, correlation_id: str | None = None, salt: str = ""
    ) -> None:
        """``salt`` tells apart two sessions that share an id yet are known to be different; it is part of identity."""
        self.session_id = check_session_id(session_id)
        self.calls: dict[str, int] = {}
        """Index of the step that made a tool call, by the call's id; kept by the reader."""
        self._format: Format = source_format
        self._correlation_id = correlation_id or session_id
        self._salt = salt
        self._digests = bytearray()
        self._ordinals = array("q")
        self._depths = array("I")
        self._roots = array("I")
        self._stated_ids: dict[int, str] = {}
        # Filled only once an ordinal is not the index: most sources number without gaps.
        self._indexes: dict[int, int] | None = None

    def __len__(self) -> int:
        return len(self._ordinals)

    def index_of(self, ordinal: int) -> int | None:
        """Returns the index of the newest step with that ordinal."""
        if self._indexes is not None:
            return self._indexes.get(ordinal)
        return ordinal if 0 <= ordinal < len(self) else None

    def add(
        self,
        *,
        agent_id: str,
        kind: str,
        body: bytes,
        timestamp_ms: int | None = None,
        ordinal: int | None = None,
        parent: int | None = None,
        parent_source: ParentSource = "order",
        is_root: bool = False,
        stated_id: str | None = None,
    ) -> Step:
        """Returns the next step; ``parent`` is an index, None for the step before.

        Raises InvalidNameError, InvalidFieldError or TooLargeError, and then has added nothing.
        """
        name = f"step:{check_kind(kind)}"
        check_event_name(name)
        check_agent(agent_id)
        check_size(body)
        check_nesting(body)
        index = len(self)
        number = index if ordinal is None else ordinal
        if is_root or index == 0:
            parent, parent_source = None, "none"
        elif parent is None:
            parent, parent_source = index - 1, "order"
        parent_id = None if parent is None else self._source_id(parent)
        digest = self._digest(number, agent_id, name, timestamp_ms, parent_id, parent_source, body)
        self._append(index, number, digest, parent, stated_id)
        return Step(
            format=self._format,
            session_id=self.session_id,
            correlation_id=self._correlation_id,
            agent_id=agent_id,
            ordinal=number,
            kind=kind,
            name=name,
            body=body,
            timestamp_ms=timestamp_ms,
            source_id=self._source_id(index),
            parent_ordinal=None if parent is None else self._ordinals[parent],
            parent_source_id=parent_id,
            parent_source=parent_source,
            root_source_id=self._source_id(self._roots[index]),
            depth=self._depths[index],
        )

    def _append(self, index: int, ordinal: int, digest: bytes, parent: int | None, stated_id: str | None) -> None:
        if ordinal != index and self._indexes is None:
            self._indexes = {known: known for known in range(index)}
        if self._indexes is not None:
            self._indexes[ordinal] = index
        self._ordinals.append(ordinal)
        self._digests += digest
        self._depths.append(0 if parent is None else self._depths[parent] + 1)
        self._roots.append(index if parent is None else self._roots[parent])
        if stated_id is not None:
            self._stated_ids[index] = stated_id

    def _source_id(self, index: int) -> str:
        stated = self._stated_ids.get(index)
        if stated is not None:
            return stated
        start = index * _DIGEST_BYTES
        return f"{self._format}:{self._digests[start : start + _DIGEST_BYTES].hex()}"

    def _digest(
        self,
        ordinal: int,
        agent_id: str,
        name: str,
        timestamp_ms: int | None,
        parent_id: str | None,
        parent_source: ParentSource,
        body: bytes,
    ) -> bytes:
        texts = (
            self._format,
            self.session_id,
            self._correlation_id,
            self._salt,
            str(ordinal),
            agent_id,
            name,
            "" if timestamp_ms is None else str(timestamp_ms),
            parent_id or "",
            parent_source,
        )
        hasher = blake2b(digest_size=_DIGEST_BYTES, person=_PERSON)
        for part in (*(text.encode() for text in texts), body):
            hasher.update(len(part).to_bytes(8, "little"))
            hasher.update(part)
        return hasher.digest()
