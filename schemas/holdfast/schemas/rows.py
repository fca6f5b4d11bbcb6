"""The three kinds of record that the streams hold and the lake keeps, decoded: one Struct a row.

A stream message becomes a row by a pure function (``holdfast.streams.decode``), the same for the archiver, for the
live tail and for a replay, so that a row is the same whichever way it was reached.  Times are integer milliseconds
since 1970 UTC.  ``stored_at_ms`` is the server's, and is what partitions, pages and retention go by; ``timestamp_ms``
is the producer's.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from holdfast.schemas.refs import Digest, Ref, format_ref

Table = Literal["contexts", "events", "key_versions"]
"""A table of the lake; each is fed by one stream."""

TABLES: Final[tuple[Table, ...]] = ("contexts", "events", "key_versions")

Form = Literal["plain", "manifest", "chunk", "joint", "touch"]
"""How a context's body is held: as it is; as a list of chunks (``manifest``), whose bytes are ``chunk`` rows of
their own; or not at all (``touch``: the same context was stored again after it had left the hot tier).  A chunk that
was put together of others is a ``joint`` in the lake: a list of those, so that no byte is there twice."""

Op = Literal["put", "patch", "delete", "rollback", "expire"]

# ``gc=False`` below: a row holds texts and numbers, so it is in no cycle, and the collector need not look at it.


class Position(msgspec.Struct, frozen=True, order=True):
    """A place in one life of a stream.

    A sequence alone names nothing: after a lost tail or a re-created stream the same number holds other content.
    """

    epoch: str
    seq: int


class ContextRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One stored context.  ``body`` is the plain bytes (of a manifest its JSON, of a joint its JSON, a newline and the
    bytes that follow its parts); ``size`` is that of the
    whole plain body, also for those.  ``parts``: of a chunk that was put together, the stored chunks that it begins
    with, as its writer says; only what is read from the hot tier tells it."""

    namespace: str
    kind: str
    digest: Digest
    content_type: str
    body: bytes
    size: int
    stored_at_ms: int
    epoch: str
    seq: int
    form: Form = "plain"
    expires_at_ms: int | None = None
    parts: tuple[tuple[Digest, int], ...] = ()

    @property
    def ref(self) -> Ref:
        """The reference: kind and digest."""
        return format_ref(self.kind, self.digest)


class EventRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One event.  Ids are UUIDs in text form; ``source_id`` is a producer's own id where that was none.

    ``data`` and ``extra`` are JSON text: what the producer sent as ``data``, and the members of its message that
    Holdfast does not know.
    """

    namespace: str
    id: str
    name: str
    agent_id: str
    stored_at_ms: int
    epoch: str
    seq: int
    timestamp_ms: int
    session_id: str | None = None
    correlation_id: str | None = None
    parent_event_id: str | None = None
    root_event_id: str | None = None
    event_depth: int = 0
    client_id: str | None = None
    originator: str | None = None
    context_ref: Ref | None = None
    data: bytes | None = None
    extra: bytes | None = None
    source_id: str | None = None
    traceparent: str | None = None


class KeyVersionRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One version of one named context."""

    namespace: str
    key: str
    version: int
    op: Op
    timestamp_ms: int
    stored_at_ms: int
    epoch: str
    seq: int
    ref: Ref | None = None
    event_id: str | None = None
    changed_by: str | None = None
    change_type: str | None = None
    tags: tuple[str, ...] = ()
    session_id: str | None = None
    agent_id: str | None = None
    expires_at_ms: int | None = None
    source: str | None = None
    confidence: float | None = None
    proposed_by: str | None = None
    approved_by: str | None = None
    approved_at_ms: int | None = None


Row = ContextRow | EventRow | KeyVersionRow


class Anchor(msgspec.Struct, frozen=True):
    """What stood at one sequence when it was archived: enough to see later whether the stream still holds it.

    ``identity`` is the digest, the event id or ``key/version``.
    """

    seq: int
    stored_at_ms: int
    identity: str


class TailSnapshot(msgspec.Struct, frozen=True):
    """Rows of one stream after a position, in stream order, up to the server's last sequence at the time of asking.

    ``first_seq`` is the stream's first sequence at that time: when it is over the position's sequence + 1, a purge has
    passed the position by, the lake holds a newer watermark, and the reader starts anew.
    """

    rows: list[Row]
    epoch: str
    first_seq: int
    last_seq: int
