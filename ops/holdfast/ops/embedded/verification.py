"""Whether the store gives back every embedded event, byte for byte, and has its lineage; and the way back.

Reads the live view of the lake: what is archived, and what the streams hold beyond that.  Blocks on the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

import msgspec

from holdfast.ops.embedded.form import KIND, Parts, rebuild
from holdfast.ops.embedded.migration import Place, Progress, in_source_order, parts_of
from holdfast.ops.embedded.source import EmbeddedSource, Item
from holdfast.ops.embedded.survey import IdSet
from holdfast.schemas.errors import HoldfastError, IntegrityError
from holdfast.schemas.ids import unpacked_source_id
from holdfast.schemas.refs import Ref
from holdfast.schemas.rows import EventRow
from holdfast.streams.decode import decode_event
from holdfast.streams.messages import StoredMessage

WINDOW: Final = 20_000
"""Events asked for together: each question reads the ids of all files once."""

MOST_LISTED: Final = 20
_FORMS: Final = 4_096

_SELECT: Final = """
SELECT namespace, CAST(event_id AS VARCHAR), name, agent_id, epoch_ms(stored_at), epoch, stream_seq,
    epoch_ms("timestamp"), session_id, correlation_id, CAST(parent_event_id AS VARCHAR),
    CAST(root_event_id AS VARCHAR), event_depth, client_id, originator, context_ref, encode(data), encode(extra),
    source_id
FROM events WHERE namespace = ? AND """
_COMPARED: Final = (
    "id", "name", "agent_id", "session_id", "correlation_id", "parent_event_id", "root_event_id", "event_depth",
    "client_id", "originator", "source_id",
)  # fmt: skip


class Sql(Protocol):
    """What runs SQL over the lake: ``holdfast.lake.connect``."""

    def execute(self, query: Any, parameters: Any = ..., /) -> Any: ...  # noqa: D102


class Verification(msgspec.Struct, kw_only=True):
    """What was found: each event is ``equal``, or is listed among the first of those that are not."""

    events: int = 0
    equal: int = 0
    missing: int = 0
    different: int = 0
    places: list[Place] = []

    @property
    def ok(self) -> bool:
        """Whether every event is there and equal."""
        return self.equal == self.events


class _Form(NamedTuple):
    body: bytes
    content_type: str


class EmbeddedStore:
    """The embedded events that a namespace holds, put together again."""

    def __init__(self, sql: Sql, namespace: str) -> None:
        self._sql = sql
        self._namespace = namespace
        self._forms: dict[str, _Form] = {}

    def rows(self, ids: Sequence[str]) -> dict[str, EventRow]:
        """Returns the events of these ids that are there."""
        found = self._sql.execute(
            _SELECT + "event_id IN (SELECT CAST(unnest(?) AS UUID))", [self._namespace, list(ids)]
        ).fetchall()
        return {row.id: row for row in map(_row, found)}

    def rows_between(self, first_seq: int, last_seq: int) -> list[EventRow]:
        """Returns the embedded events at these places of the stream, in order."""
        found = self._sql.execute(
            _SELECT + "stream_seq BETWEEN ? AND ? AND starts_with(context_ref, ?) ORDER BY epoch, stream_seq",
            [self._namespace, first_seq, last_seq, f"ctx_{KIND}_"],
        ).fetchall()
        return [_row(row) for row in found]

    def texts(self, rows: Sequence[EventRow]) -> list[bytes | HoldfastError]:
        """Returns the original text of each event, or why it cannot be put together."""
        others = {other for row in rows for other in (row.parent_event_id, row.root_event_id) if other is not None}
        known = {row.id: row.source_id for row in rows}
        asked = [other for other in others if other not in known and unpacked_source_id(other) is None]
        originals = known | self._sources(asked)
        self._load_forms({row.context_ref for row in rows if row.context_ref is not None})
        return [self._text(row, originals) for row in rows]

    def _text(self, row: EventRow, originals: dict[str, str | None]) -> bytes | HoldfastError:
        form = self._forms.get(row.context_ref or "")
        if form is None:
            return IntegrityError(f"the form {row.context_ref} of event {row.id} is not there")
        try:
            return rebuild(row, form.body, form.content_type, originals.get)
        except HoldfastError as error:
            return error

    def _sources(self, ids: Sequence[str]) -> dict[str, str | None]:
        if not ids:
            return {}
        return dict(
            self._sql.execute(
                "SELECT CAST(event_id AS VARCHAR), source_id FROM events "
                "WHERE namespace = ? AND event_id IN (SELECT CAST(unnest(?) AS UUID))",
                [self._namespace, list(ids)],
            ).fetchall()
        )

    def _load_forms(self, refs: set[Ref]) -> None:
        wanted = [ref for ref in refs if ref not in self._forms]
        if len(self._forms) + len(wanted) > _FORMS:
            self._forms.clear()
            wanted = list(refs)
        if wanted:
            found = self._sql.execute(
                "SELECT ref, body_bytes, content_type FROM contexts_of(?) WHERE namespace = ?",
                [wanted, self._namespace],
            ).fetchall()
            self._forms |= {ref: _Form(bytes(body), content_type) for ref, body, content_type in found}


def verify(store: EmbeddedStore, namespace: str, source: EmbeddedSource, ids: IdSet) -> Verification:
    """Compares every event of a source with what the store gives back: its bytes, and its place in the lineage."""
    report = Verification()
    window: list[tuple[Item, Parts]] = []
    for item, parts, _ in parts_of(namespace, source, ids):
        window.append((item, parts))
        if len(window) == WINDOW:
            _compare(store, window, report)
            window = []
    _compare(store, window, report)
    return report


def _compare(store: EmbeddedStore, window: Sequence[tuple[Item, Parts]], report: Verification) -> None:
    rows = store.rows([parts.event.id for _, parts in window]) if window else {}
    there = [rows[parts.event.id] for _, parts in window if parts.event.id in rows]
    texts = {row.id: text for row, text in zip(there, store.texts(there), strict=True)}
    for item, parts in window:
        report.events += 1
        row = rows.get(parts.event.id)
        if row is None:
            report.missing += 1
            _list(report, item, f"event {parts.event.id} is not in the store")
            continue
        reason = _difference(item, parts, row, texts[row.id])
        if reason is None:
            report.equal += 1
        else:
            report.different += 1
            _list(report, item, reason)


def _difference(item: Item, parts: Parts, row: EventRow, text: bytes | HoldfastError) -> str | None:
    if isinstance(text, HoldfastError):
        return text.message
    if text != item.text:
        return f"event {row.id} does not come back as it was"
    message = parts.message()
    expected = decode_event(StoredMessage(message.subject, message.headers, message.payload, 1, 0, "")).row
    for field in _COMPARED:
        if getattr(row, field) != getattr(expected, field):
            return f"event {row.id} has {field} {getattr(row, field)!r}, not {getattr(expected, field)!r}"
    if parts.event.timestamp_ms is not None and row.timestamp_ms != expected.timestamp_ms:
        return f"event {row.id} has another time"
    return None


def write_back(store: EmbeddedStore, progress: Progress, out: BinaryIO) -> int:
    """Writes the events of a migration as NDJSON in the order of the source; returns their number.

    Needs nothing of the source.  Raises IntegrityError when an event is missing or the whole is not what was read.
    """
    hasher = blake2b(digest_size=20)
    count = 0
    for run in in_source_order(progress):
        for first in range(run.seq, run.seq + run.count, WINDOW):
            last = min(first + WINDOW, run.seq + run.count) - 1
            rows = store.rows_between(first, last)
            if len(rows) != last - first + 1:
                raise IntegrityError(
                    f"{len(rows)} of {last - first + 1} events are at sequences {first} to {last}",
                    hint="run 'holdfast migrate' on the source again, then --verify",
                )
            for text in store.texts(rows):
                if isinstance(text, HoldfastError):
                    raise text
                for piece in (text, b"\n"):
                    hasher.update(piece)
                    out.write(piece)
                count += 1
    if hasher.hexdigest() != progress.digest:
        raise IntegrityError(
            f"the events of {progress.source} do not make up what was read: {count} of {progress.events}",
            hint="run 'holdfast migrate' on the source again, then --verify",
        )
    return count


def _list(report: Verification, item: Item, reason: str) -> None:
    if len(report.places) < MOST_LISTED:
        report.places.append(Place(item.line, reason))


def _row(row: Iterable[Any]) -> EventRow:
    (
        namespace, event_id, name, agent_id, stored_at_ms, epoch, seq, timestamp_ms, session_id, correlation_id,
        parent_event_id, root_event_id, event_depth, client_id, originator, context_ref, data, extra, source_id,
    ) = row  # fmt: skip
    return EventRow(
        namespace=namespace,
        id=event_id,
        name=name,
        agent_id=agent_id,
        stored_at_ms=stored_at_ms,
        epoch=epoch,
        seq=seq,
        timestamp_ms=timestamp_ms,
        session_id=session_id,
        correlation_id=correlation_id,
        parent_event_id=parent_event_id,
        root_event_id=root_event_id,
        event_depth=event_depth,
        client_id=client_id,
        originator=originator,
        context_ref=context_ref,
        data=data,
        extra=extra,
        source_id=source_id,
    )
