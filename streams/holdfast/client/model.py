"""What the SDK hands to its callers: contexts, events and the outcome of a batch."""

from __future__ import annotations

from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from holdfast.schemas.bodies import decode_body
from holdfast.schemas.ids import EventId, utc_from_ms
from holdfast.schemas.refs import Ref

if TYPE_CHECKING:
    from holdfast.schemas.rows import ContextRow

Tier = Literal["cache", "hot", "lake"]
"""Where a context came from: this process, the KV bucket, or the archive."""


class Context:
    """A stored context, read from ``tier``.  Immutable: equal references mean equal contexts."""

    def __init__(self, row: ContextRow, tier: Tier) -> None:
        self._row = row
        self.tier: Tier = tier

    @property
    def ref(self) -> Ref:
        """The reference it was resolved by."""
        return self._row.ref

    @property
    def kind(self) -> str:
        """What sort of context it is; part of the reference."""
        return self._row.kind

    @property
    def namespace(self) -> str:
        """The namespace it is stored in; under the digest, so no other namespace resolves this reference."""
        return self._row.namespace

    @property
    def content_type(self) -> str:
        """The media type of ``raw``, such as ``application/json``."""
        return self._row.content_type

    @property
    def raw(self) -> bytes:
        """The exact bytes that were stored, already checked against the reference."""
        return self._row.body

    @property
    def size(self) -> int:
        """Bytes of ``raw``, whatever form it is stored in."""
        return self._row.size

    @property
    def created_at(self) -> datetime:
        """When the server stored it, UTC: the first time, once it is in the lake; in the hot tier, since it is there.

        From the near cache of the process that put it: that process's time of the acknowledgement.
        """
        return utc_from_ms(self._row.stored_at_ms)

    @property
    def expires_at(self) -> datetime | None:
        """When the reference ceases to resolve, UTC; None for never."""
        return None if self._row.expires_at_ms is None else utc_from_ms(self._row.expires_at_ms)

    @cached_property
    def body(self) -> Any:
        """``raw`` decoded, on first use: JSON as Python objects, text as str, anything else as bytes.

        Raises InvalidBodyError when ``raw`` is not what its content type says.
        """
        return decode_body(self._row.body, self._row.content_type)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Context) and other.ref == self.ref and other.namespace == self.namespace

    def __hash__(self) -> int:
        return hash((self.namespace, self.ref))

    def __repr__(self) -> str:
        return f"Context({self.ref}, {self.size} bytes, {self.tier})"


class Resolved(msgspec.Struct, frozen=True):
    """The outcome of resolving many references: what was found, and what is stored nowhere (or has expired)."""

    found: dict[Ref, Context]
    missing: list[Ref]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened, with its place in a lineage.  Times are UTC.

    ``timestamp`` is the producer's time, ``stored_at`` the server's (None for an event just emitted); ``data`` is
    decoded JSON.  The root of a lineage has depth 0 and is its own root.
    """

    event_id: EventId
    name: str
    namespace: str
    agent_id: str
    timestamp: datetime
    session_id: str | None = None
    correlation_id: str | None = None
    parent_event_id: EventId | None = None
    root_event_id: EventId | None = None
    event_depth: int = 0
    client_id: str | None = None
    originator: str | None = None
    context_ref: Ref | None = None
    data: Any = None
    stored_at: datetime | None = None
    source_id: str | None = None
    extra: Any = None
