from __future__ import annotations

import uuid
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.lake.columns import COLUMNS, ROW_TYPES, arrow_schema, delta_schema, to_batch, to_rows
from holdfast.lake.writer import write_rows
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.ids import normal_event_id
from holdfast.schemas.rows import TABLES, ContextRow, EventRow, KeyVersionRow, Row
from tests.test_lake_samples import (
    EPOCH,
    T0_MS,
    chunked,
    context,
    contexts,
    event,
    events,
    key_version,
    key_versions,
    touch,
)

ODD_BODIES = [
    b"",
    b"\x00",
    b"a\x00b\x00",
    b"\xff\xfe\x00\x80",
    b"\xed\xa0\x80",  # a lone surrogate in UTF-8's form: not UTF-8
    b"\xc0\x80",  # an overlong NUL: not UTF-8
    "Grüße, 世界 🚀 \u2028".encode(),
    b'{"a": [1, 2,  3]}\n',
    ("x" * 10_000).encode(),
    bytes(range(256)) * 40,
]

times_ms = st.integers(0, 253_402_300_799_999)
texts = st.text(max_size=40)
optional_texts = st.none() | texts
uuids = st.uuids().map(str)


@pytest.mark.parametrize("body", ODD_BODIES, ids=range(len(ODD_BODIES)))
def test_every_body_keeps_its_exact_bytes(body: bytes) -> None:
    rows: list[Row] = [context(1), context(2, body), context(3)]
    assert to_rows("contexts", to_batch("contexts", rows)) == rows


def test_text_bodies_are_text_and_others_are_binary() -> None:
    batch = to_batch("contexts", [context(1, b"text"), context(2, b"\xff"), context(3, b"")])
    assert batch.column("body").to_pylist() == ["text", None, ""]
    assert batch.column("body_binary").to_pylist() == [None, b"\xff", None]


def test_chunks_are_binary_even_when_they_are_text() -> None:
    rows = chunked(1, "éèà".encode() * 10, 5)
    batch = to_batch("contexts", rows)
    assert batch.column("body").to_pylist()[:-1] == [None] * (len(rows) - 1)
    assert to_rows("contexts", batch) == rows


def test_touches_bring_no_context() -> None:
    row = context(1)
    batch = to_batch("contexts", [row, touch(row, 2)])
    assert batch.column("created_at").null_count == 1
    assert to_rows("contexts", batch) == [row, touch(row, 2)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=200), min_size=1, max_size=8), st.none() | times_ms)
def test_contexts_round_trip(bodies: list[bytes], expires_at_ms: int | None) -> None:
    rows = [context(seq, body, expires_at_ms=expires_at_ms) for seq, body in enumerate(bodies, 1)]
    assert to_rows("contexts", to_batch("contexts", rows)) == rows


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        EventRow,
        namespace=texts,
        id=uuids,
        name=texts,
        agent_id=texts,
        stored_at_ms=times_ms,
        epoch=st.just(EPOCH),
        seq=st.integers(1, 1 << 62),
        timestamp_ms=times_ms,
        session_id=optional_texts,
        correlation_id=optional_texts,
        parent_event_id=st.none() | uuids,
        root_event_id=st.none() | uuids,
        event_depth=st.integers(0, 1 << 31 - 1),
        client_id=optional_texts,
        originator=optional_texts,
        data=st.none() | texts.map(str.encode),
        extra=st.none() | texts.map(str.encode),
        source_id=optional_texts,
        traceparent=optional_texts,
    )
)
def test_events_round_trip(row: EventRow) -> None:
    assert to_rows("events", to_batch("events", [row])) == [row]


def test_an_id_of_a_producer_takes_room_only_where_the_events_id_does_not_hold_it() -> None:
    packed, hashed, said = "evt_00c0ffee", "evt of a long name: 00c0ffee", "said by the producer"
    rows = [
        event(seq, id=normal_event_id("ns", each)[0], source_id=each) for seq, each in enumerate([packed, hashed], 1)
    ]
    rows += [event(3, id=normal_event_id("ns", packed)[0], source_id=said), event(4)]
    batch = to_batch("events", [*rows])
    assert batch.column("source_id").to_pylist() == [None, hashed, said, None]
    assert to_rows("events", batch) == rows
    # Files of an earlier release hold the text.
    column = batch.schema.get_field_index("source_id")
    texts = pa.array([row.source_id for row in rows], pa.string())
    assert to_rows("events", batch.set_column(column, "source_id", texts)) == rows


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        KeyVersionRow,
        namespace=texts,
        key=texts,
        version=st.integers(1, 1 << 62),
        op=st.sampled_from(["put", "patch", "delete", "rollback", "expire"]),
        timestamp_ms=times_ms,
        stored_at_ms=times_ms,
        epoch=st.just(EPOCH),
        seq=st.integers(1, 1 << 62),
        event_id=st.none() | uuids,
        changed_by=optional_texts,
        tags=st.lists(texts, max_size=3).map(tuple),
        expires_at_ms=st.none() | times_ms,
        confidence=st.none() | st.floats(allow_nan=False),
        approved_at_ms=st.none() | times_ms,
    )
)
def test_key_versions_round_trip(row: KeyVersionRow) -> None:
    assert to_rows("key_versions", to_batch("key_versions", [row])) == [row]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (event(7, parent_event_id="not-a-uuid"), "parent_event_id"),
        (event(7, id="00"), "event_id"),
        (event(7, data=b"\xff"), "data"),
        (event(7, session_id="\ud800"), "session_id"),
    ],
)
def test_a_value_that_does_not_fit_is_named(row: EventRow, field: str) -> None:
    with pytest.raises(InvalidFieldError, match="rows 7 to 7") as caught:
        to_batch("events", [row])
    assert caught.value.field == field


def test_every_field_of_a_row_has_a_column() -> None:
    renamed = {"digest": "ref", "id": "event_id", "seq": "stream_seq"}
    for table in TABLES:
        columns = {column.name for column in COLUMNS[table]}
        for field in ROW_TYPES[table].__struct_fields__:
            # An event id is named alike in two tables; parts are told by the hot tier alone, and become joints.
            if (table, field) in {("key_versions", "event_id"), ("contexts", "parts")}:
                continue
            assert renamed.get(field, field.removesuffix("_ms")) in columns


def test_delta_and_parquet_name_the_same_columns() -> None:
    for table in TABLES:
        names = [field.name for field in delta_schema(table).fields]
        assert names == [*arrow_schema(table).names, "day"]


def test_files_have_the_stated_encodings_and_duckdb_reads_them(tmp_path: Path) -> None:
    """DuckDB 2.0 reads no BYTE_STREAM_SPLIT of ids: an encoding that it cannot read must not come back."""
    samples: list[tuple[str, list[Row]]] = [
        ("contexts", [*contexts(1, 50), context(51, b"\xff\x00")]),
        ("events", [*events(1, 50, parent_event_id=str(uuid.uuid4()), root_event_id=str(uuid.uuid4()))]),
        ("key_versions", [*key_versions(1, 50)]),
    ]
    for table, rows in samples:
        [written] = write_rows(table, tmp_path / table, rows, epoch=EPOCH)  # type: ignore[arg-type]  # str for Table
        path = tmp_path / table / written.entry.path
        group = pq.read_metadata(path).row_group(0)
        encodings = {group.column(i).path_in_schema: group.column(i).encodings for i in range(group.num_columns)}
        for column in COLUMNS[table]:  # type: ignore[index]  # str for Table
            leaf = f"{column.name}.list.element" if column.name == "tags" else column.name
            expected = {"dictionary": "RLE_DICTIONARY", "delta": "DELTA_BINARY_PACKED", "uuid": "DELTA_BYTE_ARRAY"}
            assert expected.get(column.storage, "") in [*encodings[leaf], ""]
            if column.bloom:
                index = list(encodings).index(leaf)
                found = duckdb.execute(
                    "SELECT bloom_filter_length FROM parquet_metadata(?) WHERE path_in_schema = ?", [str(path), leaf]
                ).fetchone()
                assert index >= 0
                assert found is not None
                assert found[0] > 0
        assert duckdb.execute("SELECT count(*) FROM read_parquet(?)", [str(path)]).fetchone() == (len(rows),)
        assert len(duckdb.execute("SELECT * FROM read_parquet(?)", [str(path)]).fetchall()) == len(rows)


def test_row_groups_stay_below_their_bounds(tmp_path: Path) -> None:
    rows = [
        *contexts(1, 4500),
        *(context(seq, b"z%d" % seq + b"y" * 700_000) for seq in range(4501, 4508)),
        context(4508, b"w" * 5_000_000),
        context(4509),
    ]
    [written] = write_rows("contexts", tmp_path, rows, epoch=EPOCH)
    metadata = pq.read_metadata(tmp_path / written.entry.path)
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert counts == [2000, 2000, 502, 2, 2, 1, 1, 1]
    assert written.entry.rows == 4509


def test_rows_of_two_days_make_two_files(tmp_path: Path) -> None:
    midnight = 1_769_904_000_000
    rows = [context(seq, stored_at_ms=midnight + (seq % 3 - 1) * 1000) for seq in range(1, 10)]
    written = write_rows("contexts", tmp_path, rows, epoch=EPOCH)
    assert sorted(file.entry.day for file in written) == ["2026-01-31", "2026-02-01"]
    assert sum(file.entry.rows for file in written) == 9
    found = [row for file in written for row in to_rows("contexts", pq.ParquetFile(tmp_path / file.entry.path).read())]
    assert sorted(found, key=lambda row: row.seq) == rows


@pytest.mark.parametrize("rows", [[context(2), context(1)], [context(1), context(1)], [context(1, epoch="other")]])
def test_rows_out_of_order_leave_nothing_behind(tmp_path: Path, rows: list[ContextRow]) -> None:
    with pytest.raises(ValueError, match="must ascend"):
        write_rows("contexts", tmp_path, rows, epoch=EPOCH)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_row_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InvalidFieldError):
        write_rows("events", tmp_path, [*events(1, 5000), event(5001, id="zz")], epoch=EPOCH)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_times_are_kept_to_the_millisecond() -> None:
    row = key_version(1, expires_at_ms=T0_MS + 1, approved_at_ms=0)
    assert to_rows("key_versions", to_batch("key_versions", [row])) == [row]
