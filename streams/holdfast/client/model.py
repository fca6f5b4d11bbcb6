"""What the SDK hands to its callers: contexts, events and the outcome of a batch."""

from __future__ import annotations

from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from holdfast.client.encryption import SEALED, key_id_of, open_sealed
from holdfast.client.lineage_context import attributes_in, of_event
from holdfast.schemas.bodies import decode_body
from holdfast.schemas.errors import EncryptionKeyError, InvalidBodyError
from holdfast.schemas.ids import EventId, utc_from_ms
from holdfast.schemas.refs import Ref

if TYPE_CHECKING:
    from holdfast.client.key_ring import KeyRing
    from holdfast.schemas.rows import ContextRow

Tier = Literal["cache", "hot", "lake"]
"""Where a context came from: this process, the KV bucket, or the archive."""


class Context:
    """A stored context, read from ``tier``.  Immutable: equal references mean equal contexts.

    An encrypted one is opened with ``keys`` when ``raw``, ``body``, ``content_type`` or ``size`` is first asked for,
    and not before: that one key of many is lost is told by the contexts it sealed.  Then each of them raises
    EncryptionKeyError naming the key, or IntegrityError when the key of that id does not fit; asked again, they try
    again.  Opening megabytes takes a while: ``await asyncio.to_thread(lambda: context.raw)`` keeps the loop free.
    """

    def __init__(self, row: ContextRow, tier: Tier, keys: KeyRing | None = None) -> None:
        self._row = row
        self._keys = keys
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
        return self._opened[1]

    @property
    def raw(self) -> bytes:
        """The exact bytes that were put, already checked against the reference."""
        return self._opened[0]

    @property
    def size(self) -> int:
        """Bytes of ``raw``, whatever form it is stored in."""
        return len(self._opened[0])

    @property
    def stored_size(self) -> int:
        """Bytes of the body under the digest: ``size``, or when encrypted that of the envelope."""
        return self._row.size

    @property
    def stored(self) -> tuple[bytes, str]:
        """The bytes and the content type under the digest: ``raw`` and its own, or when encrypted the envelope and
        the content type of envelopes.  For those who hand contexts on as they are, without the key."""
        return self._row.body, self._row.content_type

    @property
    def encrypted(self) -> bool:
        """Whether the body is stored encrypted."""
        return self._row.content_type == SEALED

    @property
    def key_id(self) -> str | None:
        """The id of the key that the body is encrypted with; None when it is not, or when its envelope is damaged."""
        if not self.encrypted:
            return None
        try:
            return key_id_of(self._row.body)
        except InvalidBodyError:
            return None

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
        return decode_body(*self._opened)

    def decode(self) -> Any:
        """Returns ``body`` decoded anew: an object of the caller's own."""
        return decode_body(*self._opened)

    @cached_property
    def _opened(self) -> tuple[bytes, str]:
        row = self._row
        if not self.encrypted:
            return row.body, row.content_type
        if self._keys is None:
            raise EncryptionKeyError(f"{row.ref} is encrypted and no key ring is at hand", key_id=self.key_id)
        return open_sealed(self._keys, row.namespace, row.kind, row.body, row.expires_at_ms, what=row.ref)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Context) and other.ref == self.ref and other.namespace == self.namespace

    def __hash__(self) -> int:
        return hash((self.namespace, self.ref))

    def __repr__(self) -> str:
        # Never by opening it: a repr does not raise, and has nothing of the plaintext in it.
        sealed = f" sealed with {self.key_id}" if self.encrypted else ""
        return f"Context({self.ref}, {self._row.size} bytes{sealed}, {self.tier})"


class Resolved(msgspec.Struct, frozen=True):
    """The outcome of resolving many references: what was found, and what is stored nowhere (or has expired)."""

    found: dict[Ref, Context]
    missing: list[Ref]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened, with its place in a lineage.  Times are UTC.

    ``timestamp`` is the producer's time, ``stored_at`` the server's (None for an event just emitted); ``data`` is
    decoded JSON; ``extra`` holds the members of its message that are no fields.  The root of a lineage has depth 0 and
    is its own root.
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
    traceparent: str | None = None

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of its lineage: members of the explicit dict that are no fields, inherited by its children."""
        return attributes_in(self.extra)

    @property
    def lineage(self) -> dict[str, Any]:
        """Its lineage in explicit form: what is emitted with ``lineage=`` this is its child."""
        return of_event(self)
