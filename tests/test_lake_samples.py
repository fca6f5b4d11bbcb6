"""Rows for the lake's tests, made up and reproducible; and a tail kept in memory.  Holds no tests itself."""

from __future__ import annotations

import hashlib
import uuid
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.schemas.ids import derived_event_id
from holdfast.schemas.refs import JSON, Digest, Ref, compute_digest
from holdfast.schemas.rows import (
    ContextRow,
    EventRow,
    Form,
    KeyVersionRow,
    Position,
    Row,
    Table,
    TailSnapshot,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdfast.lake import Lake

T0_MS = 1_769_850_000_000  # 2026-01-31 09:00 UTC
EPOCH = "epoch-1"


def context(seq: int, body: bytes | None = None, **changes: Any) -> ContextRow:
    """A context whose body depends on its sequence alone, unless given."""
    raw = b'{"step":%d,"text":"%s"}' % (seq, hashlib.sha256(b"%d" % seq).hexdigest().encode()) if body is None else body
    values: dict[str, Any] = {
        "namespace": "default",
        "kind": "completion",
        "content_type": JSON,
        "body": raw,
        "size": len(raw),
        "stored_at_ms": T0_MS + seq,
        "epoch": EPOCH,
        "seq": seq,
        "expires_at_ms": None,
        "form": "plain",
        **changes,
    }
    values.setdefault(
        "digest",
        compute_digest(
            values["namespace"],
            values["kind"],
            raw,
            content_type=values["content_type"],
            expires_at_ms=values["expires_at_ms"],
        ),
    )
    return ContextRow(**values)


def contexts(first: int, last: int, **changes: Any) -> list[ContextRow]:
    return [context(seq, **changes) for seq in range(first, last + 1)]


def chunked(first_seq: int, body: bytes, chunk_bytes: int, **changes: Any) -> list[ContextRow]:
    """The rows of a body stored in chunks: each distinct chunk once, then the manifest."""
    rows: list[ContextRow] = []
    digests: list[Digest] = []
    for start in range(0, len(body), chunk_bytes):
        part = body[start : start + chunk_bytes]
        row = context(
            first_seq + len(rows), part, kind="chunk", content_type="application/octet-stream", form="chunk", **changes
        )
        if row.digest not in digests:
            rows.append(row)
        digests.append(row.digest)
    whole = context(first_seq + len(rows), body, **changes)
    manifest = msgspec.json.encode({"v": 1, "size": len(body), "chunks": digests})
    rows.append(msgspec.structs.replace(whole, body=manifest, form="manifest"))
    return rows


def touch(row: ContextRow, seq: int) -> ContextRow:
    form: Form = "touch"
    return msgspec.structs.replace(row, body=b"", form=form, seq=seq, stored_at_ms=T0_MS + seq)


def event(seq: int, **changes: Any) -> EventRow:
    values: dict[str, Any] = {
        "namespace": "default",
        "id": derived_event_id("default", "event", str(seq)),
        "name": "agent:status",
        "agent_id": f"agent-{seq % 3}",
        "stored_at_ms": T0_MS + seq,
        "epoch": EPOCH,
        "seq": seq,
        "timestamp_ms": T0_MS + seq - 5,
        "session_id": f"session-{seq // 10}",
        "correlation_id": f"correlation-{seq // 5}",
        "event_depth": seq % 4,
        "context_ref": Ref("ctx_completion_" + "a" * 32),
        "data": b'{"n":%d}' % seq,
        **changes,
    }
    return EventRow(**values)


def events(first: int, last: int, **changes: Any) -> list[EventRow]:
    return [event(seq, **changes) for seq in range(first, last + 1)]


def key_version(seq: int, **changes: Any) -> KeyVersionRow:
    values: dict[str, Any] = {
        "namespace": "default",
        "key": "plan.today",
        "version": seq,
        "op": "put",
        "timestamp_ms": T0_MS + seq,
        "stored_at_ms": T0_MS + seq,
        "epoch": EPOCH,
        "seq": seq,
        "ref": Ref("ctx_plan_" + "b" * 32),
        "event_id": str(uuid.UUID(int=seq)),
        "tags": ("a", "b"),
        "confidence": 0.5,
        **changes,
    }
    return KeyVersionRow(**values)


def key_versions(first: int, last: int, **changes: Any) -> list[KeyVersionRow]:
    return [key_version(seq, **changes) for seq in range(first, last + 1)]


TEN_ROWS: dict[Table, list[Row]] = {
    "contexts": [*contexts(1, 10)],
    "events": [*events(1, 10)],
    "key_versions": [*key_versions(1, 10)],
}


def archive(lake: Lake, table: Table, rows: Sequence[Row]) -> None:
    """Appends rows of one stream as the archiver does."""
    lake.append(table, rows, epoch=rows[0].epoch, first_seq=rows[0].seq, last_seq=rows[-1].seq)


class MemoryStream:
    """One stream as the tail sees it: rows by ascending sequence, a first and a last one, an epoch."""

    def __init__(self, epoch: str = EPOCH) -> None:
        self.epoch = epoch
        self.rows: list[Row] = []
        self.first_seq = 1
        self.last_seq = 0

    def publish(self, row: Row) -> None:
        assert row.seq == self.last_seq + 1
        self.rows.append(row)
        self.last_seq = row.seq

    def purge_up_to(self, seq: int) -> None:
        self.rows = [row for row in self.rows if row.seq > seq]
        self.first_seq = max(self.first_seq, seq + 1)


class MemoryTail:
    """A Tail over streams in memory.  ``before_read`` is called before each read, to interleave other work."""

    def __init__(self) -> None:
        self.streams: dict[Table, MemoryStream] = {
            "contexts": MemoryStream(),
            "events": MemoryStream(),
            "key_versions": MemoryStream(),
        }
        self.before_read: Any = None
        self.reads = 0
        self.closed = False

    def read(self, table: Table, after: Position | None) -> TailSnapshot:
        self.reads += 1
        if self.before_read is not None:
            self.before_read(table)
        stream = self.streams[table]
        start = after.seq if after is not None and after.epoch == stream.epoch else 0
        rows = [row for row in stream.rows if row.seq > start]
        return TailSnapshot(rows=rows, epoch=stream.epoch, first_seq=stream.first_seq, last_seq=stream.last_seq)

    def close(self) -> None:
        self.closed = True
