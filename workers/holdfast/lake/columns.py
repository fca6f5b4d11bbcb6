"""The physical columns of the three tables: row Structs to Arrow batches and back, and how Parquet encodes them.

===============  =====================  =============================================================
column           Parquet                why
===============  =====================  =============================================================
few values       dictionary             namespaces, kinds, agents, sessions
sequences, time  DELTA_BINARY_PACKED    neighbours differ by little
UUIDs            FIXED(16), UUID,       v7 ids share a prefix with their neighbour: 11.1 bytes each.
                 DELTA_BYTE_ARRAY       BYTE_STREAM_SPLIT reaches 10.8, but DuckDB 2.0 refuses to read it
references       DELTA_BYTE_ARRAY       ``ctx_<kind>_`` costs nothing, the digest its 20 bytes after zstd;
                                        ids of producers, which share a prefix too, a tenth less (ADR 10)
bodies, JSON     DELTA_LENGTH_…         lengths apart from bytes
===============  =====================  =============================================================

A body that is valid UTF-8 is in ``body``, any other (and every chunk, which may split a character) in
``body_binary``: exact bytes either way.  Of a joint its list is in ``body``, the bytes behind in ``body_binary``, near
to those that they resemble.  ``created_at`` is null in the rows that bring no context of their own
(``chunk``, ``joint``, ``touch``), so that a file's null count tells how many contexts it brings without opening it.
``source_id`` is null where ``event_id`` holds it, whatever the row says (ADR 12); it is there again in rows and views.
Times are naive UTC (``timestamp_ntz``): a TIMESTAMPTZ would need pytz to reach Python from DuckDB.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from operator import attrgetter
from typing import Any, Final, Literal, NamedTuple, cast

import pyarrow as pa
from deltalake import Schema

from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.ids import unpacked_source_id
from holdfast.schemas.refs import parse_ref
from holdfast.schemas.rows import ContextRow, EventRow, Form, KeyVersionRow, Op, Row, Table

ROWS_PER_GROUP: Final = 2_000
"""Most rows in a row group: a point look-up reads one group whole."""

BODY_BYTES_PER_GROUP: Final = 2 * 1024 * 1024
"""Most bytes of bodies in a row group, for the same reason; a larger body has a group of its own."""

COMPACTED_ROWS_PER_GROUP: Final = 4_000
"""Most rows in a row group of a compacted file (ADR 9): zstd finds nothing again beyond one."""

COMPACTED_BODY_BYTES_PER_GROUP: Final = 3 * 1024 * 1024
"""Most bytes of bodies in one; a look-up takes a fifth longer."""

BLOOM_FALSE_POSITIVES: Final = 0.025
"""How often a Bloom filter names a row group that does not hold the value (ADR 10): sizes are powers of two, and this
is half the size of 0.01 for the rows of our groups."""

LEVEL: Final = 3
"""The level of zstd in files just archived: the archiver waits for it."""

COMPACTED_LEVEL: Final = 12
"""The same in compacted files: a tenth smaller for twice the time, and nobody waits.  From 15 on the time grows tenfold
for 2 %."""

Storage = Literal["dictionary", "delta", "uuid", "reference", "bytes", "plain"]

_ENCODINGS: Final[dict[Storage, str]] = {
    "delta": "DELTA_BINARY_PACKED",
    "uuid": "DELTA_BYTE_ARRAY",
    "reference": "DELTA_BYTE_ARRAY",
    "bytes": "DELTA_LENGTH_BYTE_ARRAY",
    "plain": "PLAIN",
}


class Column(NamedTuple):
    """A physical column: its Arrow type, how Parquet stores it, whether it has a Bloom filter."""

    name: str
    type: Any
    storage: Storage
    bloom: bool = False


_TEXT: Final = pa.string()
_TIME: Final = pa.timestamp("us")
_SEQUENCE: Final = pa.int64()
_UUID: Final = pa.uuid()

_PLACE: Final = (Column("epoch", _TEXT, "dictionary"), Column("stream_seq", _SEQUENCE, "delta"))

COLUMNS: Final[dict[Table, tuple[Column, ...]]] = {
    "contexts": (
        Column("ref", _TEXT, "reference", bloom=True),
        Column("namespace", _TEXT, "dictionary"),
        Column("kind", _TEXT, "dictionary"),
        Column("content_type", _TEXT, "dictionary"),
        Column("form", _TEXT, "dictionary"),
        Column("body", _TEXT, "bytes"),
        Column("body_binary", pa.binary(), "bytes"),
        Column("size", _SEQUENCE, "delta"),
        Column("created_at", _TIME, "delta"),
        Column("stored_at", _TIME, "delta"),
        Column("expires_at", _TIME, "delta"),
        *_PLACE,
    ),
    "events": (
        Column("event_id", _UUID, "uuid", bloom=True),
        Column("namespace", _TEXT, "dictionary"),
        Column("name", _TEXT, "dictionary"),
        Column("timestamp", _TIME, "delta"),
        Column("stored_at", _TIME, "delta"),
        Column("agent_id", _TEXT, "dictionary"),
        Column("session_id", _TEXT, "dictionary", bloom=True),
        Column("correlation_id", _TEXT, "dictionary", bloom=True),
        Column("parent_event_id", _UUID, "plain"),
        Column("root_event_id", _UUID, "dictionary"),
        Column("event_depth", pa.int32(), "delta"),
        Column("client_id", _TEXT, "dictionary"),
        Column("originator", _TEXT, "dictionary"),
        Column("context_ref", _TEXT, "reference", bloom=True),
        Column("data", _TEXT, "bytes"),
        Column("extra", _TEXT, "bytes"),
        Column("source_id", _TEXT, "reference"),
        Column("traceparent", _TEXT, "reference"),
        *_PLACE,
    ),
    "key_versions": (
        Column("namespace", _TEXT, "dictionary"),
        Column("key", _TEXT, "dictionary", bloom=True),
        Column("version", _SEQUENCE, "delta"),
        Column("op", _TEXT, "dictionary"),
        Column("ref", _TEXT, "reference", bloom=True),
        Column("event_id", _UUID, "uuid"),
        Column("changed_by", _TEXT, "dictionary"),
        Column("change_type", _TEXT, "dictionary"),
        Column("tags", pa.list_(_TEXT), "dictionary"),
        Column("session_id", _TEXT, "dictionary", bloom=True),
        Column("agent_id", _TEXT, "dictionary"),
        Column("timestamp", _TIME, "delta"),
        Column("stored_at", _TIME, "delta"),
        Column("expires_at", _TIME, "delta"),
        Column("source", _TEXT, "dictionary"),
        Column("confidence", pa.float64(), "plain"),
        Column("proposed_by", _TEXT, "dictionary"),
        Column("approved_by", _TEXT, "dictionary"),
        Column("approved_at", _TIME, "delta"),
        *_PLACE,
    ),
}

ROW_TYPES: Final[dict[Table, type[Row]]] = {
    "contexts": ContextRow,
    "events": EventRow,
    "key_versions": KeyVersionRow,
}


@cache
def arrow_schema(table: Table) -> Any:
    """Returns the Arrow schema of a table's files, without the partition column."""
    return pa.schema([(column.name, column.type) for column in COLUMNS[table]])


@cache
def delta_schema(table: Table) -> Schema:
    """Returns the Delta schema of a table: UUIDs are ``binary`` there, ``day`` is the partition column."""
    fields = [(column.name, pa.binary() if column.type == _UUID else column.type) for column in COLUMNS[table]]
    return Schema.from_arrow(pa.schema([*fields, ("day", pa.date32())]))


@cache
def parquet_options(table: Table, *, compacted: bool = False) -> dict[str, Any]:
    """Returns the keyword arguments of ``pyarrow.parquet.ParquetWriter`` for a table's files."""
    columns = COLUMNS[table]
    return {
        "compression": "zstd",
        "compression_level": COMPACTED_LEVEL if compacted else LEVEL,
        # A page is compressed by itself: one holds all bodies of a row group.
        "data_page_size": COMPACTED_BODY_BYTES_PER_GROUP if compacted else BODY_BYTES_PER_GROUP,
        "use_dictionary": [_leaf(column) for column in columns if column.storage == "dictionary"],
        "column_encoding": {
            _leaf(column): _ENCODINGS[column.storage] for column in columns if column.storage != "dictionary"
        },
        # Statistics of bodies and JSON would copy large values into the footer, and prune nothing.
        "write_statistics": [_leaf(column) for column in columns if column.storage != "bytes"],
        "bloom_filter_options": {
            column.name: {
                "ndv": COMPACTED_ROWS_PER_GROUP if compacted else ROWS_PER_GROUP,
                "fpp": BLOOM_FALSE_POSITIVES,
            }
            for column in columns
            if column.bloom
        },
        "write_page_checksum": True,
    }


def _leaf(column: Column) -> str:
    return f"{column.name}.list.element" if pa.types.is_list(column.type) else column.name


def day_of(stored_at_ms: int) -> str:
    """Returns the partition of a row: the UTC day on which the server stored it, ``YYYY-MM-DD``."""
    return datetime.fromtimestamp(stored_at_ms / 1000, tz=UTC).strftime("%Y-%m-%d")


def to_batch(table: Table, rows: Sequence[Row]) -> Any:
    """Returns the rows as one Arrow record batch of :func:`arrow_schema`.

    Raises InvalidFieldError when a value does not fit its column (an id that is no UUID, JSON that is not UTF-8).
    """
    schema = arrow_schema(table)
    bodies = _body_columns(cast(Sequence[ContextRow], rows)) if table == "contexts" else {}
    arrays = [bodies[column.name] if column.name in bodies else _to_array(column, rows) for column in COLUMNS[table]]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _stored_source_id(row: EventRow) -> str | None:
    # Most are in the event's id already.
    return None if row.source_id is None or row.source_id == unpacked_source_id(row.id) else row.source_id


# Columns whose attribute in the row has another name, or that are derived.
_GETTERS: Final[dict[str, Callable[[Any], Any]]] = {
    "event_id": lambda row: row.id if isinstance(row, EventRow) else row.event_id,
    "source_id": _stored_source_id,
    "stream_seq": attrgetter("seq"),
    "created_at": lambda row: None if row.form in ("chunk", "joint", "touch") else row.stored_at_ms,
}


def _to_array(column: Column, rows: Sequence[Row]) -> Any:
    getter = _GETTERS.get(column.name)
    if getter is None:
        getter = attrgetter(f"{column.name}_ms" if column.type == _TIME else column.name)
    values = list(map(getter, rows))
    try:
        if column.type == _TIME:
            return pa.array(values, pa.timestamp("ms")).cast(_TIME)
        if column.type == _UUID:
            raw = [None if value is None else _uuid_bytes(value) for value in values]
            return pa.ExtensionArray.from_storage(_UUID, pa.array(raw, pa.binary(16)))
        return pa.array(values, column.type)
    except (pa.ArrowException, ValueError, UnicodeEncodeError) as error:
        raise InvalidFieldError(
            f"column {column.name} cannot hold a value of rows {rows[0].seq} to {rows[-1].seq}: {error}",
            field=column.name,
            hint="such a message belongs among the dead letters",
        ) from error


def _uuid_bytes(text: str) -> bytes:
    raw = bytes.fromhex(text.replace("-", ""))
    if len(raw) != 16:
        raise ValueError(f"{text[:80]!r} is not a UUID")
    return raw


def _body_columns(rows: Sequence[ContextRow]) -> dict[str, Any]:
    """Returns ``body`` and ``body_binary``: each body in one of them, as its bytes decide."""
    texts: list[bytes | None] = []
    others: list[bytes | None] = []
    for row in rows:
        text = other = None
        if row.form in ("plain", "manifest"):
            text = row.body
        elif row.form == "chunk":
            other = row.body
        elif row.form == "joint":
            text, _, other = row.body.partition(b"\n")
        texts.append(text)
        others.append(other)
    try:
        # The cast validates the whole batch at once; most batches hold nothing but text.
        text_array = pa.array(texts, pa.binary()).cast(_TEXT)
    except pa.ArrowInvalid:
        for position, text in enumerate(texts):
            if text is not None and not _is_utf8(text):
                texts[position], others[position] = None, text
        text_array = pa.array(texts, pa.binary()).cast(_TEXT)
    return {"body": text_array, "body_binary": pa.array(others, pa.binary())}


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def to_rows(table: Table, batch: Any) -> list[Row]:
    """Returns the rows of an Arrow batch or table that holds every column; the inverse of :func:`to_batch`."""
    columns: dict[str, list[Any]] = {}
    for column in COLUMNS[table]:
        array = batch.column(column.name)
        if column.type == _TIME:
            columns[f"{column.name}_ms"] = array.cast(pa.int64()).to_pylist()
        elif column.type == _UUID:
            columns[column.name] = [None if raw is None else str(uuid.UUID(bytes=raw)) for raw in _storage(array)]
        elif column.storage == "bytes" and column.name in ("body", "data", "extra"):
            columns[column.name] = array.cast(pa.binary()).to_pylist()
        else:
            columns[column.name] = array.to_pylist()
    names = list(columns)
    build = _BUILDERS[table]
    return [build(dict(zip(names, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def _storage(array: Any) -> list[bytes | None]:
    # Compacted by a foreign tool, a UUID column may come back as plain binary.
    if isinstance(array, pa.ChunkedArray):
        return [raw for chunk in array.chunks for raw in _storage(chunk)]
    raw: list[bytes | None] = (array.storage if isinstance(array, pa.ExtensionArray) else array).to_pylist()
    return raw


def _milliseconds(values: dict[str, Any], *names: str) -> None:
    for name in names:
        if values[name] is not None:
            values[name] //= 1000


def _build_context(values: dict[str, Any]) -> ContextRow:
    _milliseconds(values, "stored_at_ms", "expires_at_ms")
    text, binary = values["body"], values.pop("body_binary")
    values["body"] = stored_body(values["form"], text, binary)
    del values["created_at_ms"]
    values["digest"] = parse_ref(values.pop("ref")).digest
    values["seq"] = values.pop("stream_seq")
    return ContextRow(**values)


def stored_body(form: Form, text: bytes | None, binary: bytes | None) -> bytes:
    """Returns a row's ``body`` from its two columns."""
    if form == "joint":
        return (text or b"") + b"\n" + (binary or b"")
    return text if text is not None else binary or b""


def _build_event(values: dict[str, Any]) -> EventRow:
    _milliseconds(values, "timestamp_ms", "stored_at_ms")
    values["id"] = values.pop("event_id")
    if values["source_id"] is None:
        values["source_id"] = unpacked_source_id(values["id"])
    values["seq"] = values.pop("stream_seq")
    return EventRow(**values)


def _build_key_version(values: dict[str, Any]) -> KeyVersionRow:
    _milliseconds(values, "timestamp_ms", "stored_at_ms", "expires_at_ms", "approved_at_ms")
    values["tags"] = tuple(values["tags"] or ())
    values["op"] = cast(Op, values["op"])
    values["seq"] = values.pop("stream_seq")
    return KeyVersionRow(**values)


_BUILDERS: Final[dict[Table, Callable[[dict[str, Any]], Row]]] = {
    "contexts": _build_context,
    "events": _build_event,
    "key_versions": _build_key_version,
}


def body_bytes(row: Row) -> int:
    """Returns how many bytes of body or JSON a row brings into its row group."""
    if isinstance(row, ContextRow):
        return len(row.body)
    if isinstance(row, EventRow):
        return len(row.data or b"") + len(row.extra or b"")
    return 0
