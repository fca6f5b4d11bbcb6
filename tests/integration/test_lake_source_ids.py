"""Ids of producers in SQL: they are read out of the events' ids, in the way that Python reads them."""

from __future__ import annotations

import random
import uuid
from typing import TYPE_CHECKING

import duckdb
import pyarrow.parquet as pq

from holdfast.lake import Lake, LakeIndex, Lookup, compact, connect, verify_lake, write_views_file
from holdfast.schemas.ids import normal_event_id, packed_event_id, unpacked_source_id
from tests.test_lake_samples import EPOCH, T0_MS, MemoryTail, event

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from holdfast.schemas.rows import EventRow

GIVEN = [
    "evt_00c0ffee",
    "order-17",
    "7",
    "~",
    "span0f067aa0ba902b7",
    "no-hex-in-it",
    "a long id of a producer",
    "ü",
    None,
]
SHOWN = "SELECT CAST(event_id AS VARCHAR), source_id FROM events ORDER BY stream_seq"


def row_of(seq: int, given: str | None) -> EventRow:
    if given is None:
        return event(seq)
    return event(seq, id=normal_event_id("default", given)[0], source_id=given)


def archive(lake: Lake, rows: list[EventRow]) -> None:
    lake.append("events", [*rows], epoch=EPOCH, first_seq=rows[0].seq, last_seq=rows[-1].seq)


def test_archived_compacted_live_and_in_plain_duckdb_they_are_what_the_producer_gave(
    lake: Lake, tmp_path: Path
) -> None:
    rows = [row_of(seq, given) for seq, given in enumerate(GIVEN * 2, 1)]
    rows = [
        *rows[: len(GIVEN)],
        *(event(row.seq, id=row.id, source_id=row.source_id, namespace="n2") for row in rows[9:]),
    ]
    archive(lake, rows[:6])
    archive(lake, rows[6:12])
    tail = MemoryTail()
    for row in rows:
        tail.streams["events"].publish(row)
    shown = [(row.id, row.source_id) for row in rows]
    with connect(lake.path, tail=tail) as connection:
        assert connection.execute(SHOWN).fetchall() == shown
        for given in GIVEN[:8]:
            found = connection.execute(
                "SELECT namespace FROM events WHERE source_id = ? ORDER BY 1", [given]
            ).fetchall()
            assert found == [("default",), ("n2",)]
        assert connection.execute("SELECT count(*) FROM events WHERE source_id LIKE 'evt%'").fetchone() == (2,)
    archive(lake, rows[12:])
    compact(lake, at_ms=T0_MS + 2 * 86_400_000)
    lake.refresh()
    with duckdb.connect(str(write_views_file(lake)), read_only=True) as plain:
        assert plain.execute(SHOWN).fetchall() == shown
    with LakeIndex.open(tmp_path / "index") as index, Lookup(lake, index) as lookup:
        assert lookup.get_events((row.namespace, row.id) for row in rows) == {
            (row.namespace, row.id): row for row in rows
        }
    assert verify_lake(lake.path).ok
    # They take room only where the event's id does not hold them.
    texts = [
        text
        for path in lake.snapshot("events").files
        for text in pq.ParquetFile(lake.snapshot("events").directory / path).read().column("source_id").to_pylist()
    ]
    assert [text for text in texts if text is not None] == GIVEN[6:8] * 2


def test_sql_and_python_read_the_same_out_of_any_id(lake: Lake) -> None:
    chance = random.Random(11)
    ids = {str(uuid.UUID(int=chance.getrandbits(128))) for _ in range(50)}
    for _ in range(3_000):
        size, tail = chance.randint(0, 9), chance.randint(0, 15)
        alphabet = chance.choice(["evt_", "!~", "abcdef", "g0", " \x7f\x80~"])
        prefix = "".join(chance.choices(alphabet, k=size)).encode("latin-1")
        digits = "".join(chance.choices("0123456789abcdef", k=tail))
        packed = packed_event_id(prefix.decode("latin-1") + digits)
        if packed is not None:
            ids.add(packed)
            # Changed in one digit it may still be an id of that kind, or none.
            place = chance.choice([place for place in range(36) if packed[place] != "-"])
            ids.add(packed[:place] + chance.choice("0123456789abcdef") + packed[place + 1 :])
        room = (prefix.hex().ljust(max(0, 24 - tail), "0") + digits)[:24].rjust(24, "0")
        ids.add(f"1d1d{size:x}{tail:x}{room[:2]}-{room[2:6]}-8{room[6:9]}-8{room[9:12]}-{room[12:]}")
    expected = {each: unpacked_source_id(each) for each in ids}
    assert 500 < sum(held is not None for held in expected.values()) < len(ids) - 500
    archive(lake, [event(seq, id=each) for seq, each in enumerate(sorted(ids), 1)])
    with connect(lake.path) as connection:
        assert dict(connection.execute(SHOWN).fetchall()) == expected


def test_text_in_files_of_an_earlier_release_is_shown(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.lake.columns.unpacked_source_id", lambda _: None)
    archive(lake, [row_of(1, "evt_1")])
    monkeypatch.undo()
    [name] = lake.snapshot("events").files
    written = pq.ParquetFile(lake.snapshot("events").directory / name).read(["source_id"])
    assert written.column("source_id").to_pylist() == ["evt_1"]
    with connect(lake.path) as connection:
        assert connection.execute(SHOWN).fetchall() == [(packed_event_id("evt_1"), "evt_1")]


def test_an_id_is_still_found_in_one_row_group_and_what_is_not_asked_for_is_not_read(lake: Lake) -> None:
    archive(lake, [row_of(seq, f"evt_{seq * 7919:08x}") for seq in range(1, 20_001)])
    wanted = normal_event_id("default", f"evt_{7 * 7919:08x}")[0]
    with connect(lake.path) as connection:
        sql = f"EXPLAIN ANALYZE SELECT name, source_id FROM events WHERE event_id = '{wanted}'"
        plan = connection.execute(sql).fetchall()[0][1]
        assert "Row Groups Scanned: 1 / 10" in plan, plan
        plan = connection.execute("EXPLAIN SELECT name FROM events").fetchall()[0][1]
        assert "event_id" not in plan, plan
