from __future__ import annotations

import os
import random
import re
import stat
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow.parquet as pq
import pytest

import holdfast.lake.duck as duck_module
import holdfast.lake.footers as footers_module
from holdfast.lake import Lake, LakeIndex, compact, connect, vacuum, write_views_file
from holdfast.lake.compaction import MergePolicy
from holdfast.lake.duck import Connection, ViewsFile
from holdfast.lake.views import view_statements
from holdfast.schemas.errors import ConfigurationError, DataDirectoryError, GapError, UnavailableError
from tests.test_lake_samples import (
    EPOCH,
    T0_MS,
    MemoryStream,
    MemoryTail,
    archive,
    chunked,
    context,
    contexts,
    event,
    events,
    key_versions,
    touch,
)

if TYPE_CHECKING:
    from holdfast.schemas.rows import Row, Table

COUNT = "SELECT count(*) FROM {}"
LATER_MS = 2_000_000_000_000


def count(connection: Any, view: str) -> int:
    found: int = connection.execute(COUNT.format(view)).fetchone()[0]
    return found


def test_an_empty_lake_has_empty_views(lake: Lake) -> None:
    with connect(lake.path) as connection:
        for view in ("contexts", "events", "key_versions", "contexts_stored"):
            assert count(connection, view) == 0
        assert connection.execute("SELECT ref, body, body_bytes, day FROM contexts").fetchall() == []


def test_a_missing_lake_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataDirectoryError):
        connect(tmp_path / "nowhere")


def test_views_have_the_documented_columns_and_types(lake: Lake) -> None:
    archive(lake, "events", [event(1)])
    with connect(lake.path) as connection:
        types = {name: kind for name, kind, *_ in connection.execute("DESCRIBE events").fetchall()}
        assert types["event_id"] == types["parent_event_id"] == "UUID"
        assert types["timestamp"] == types["stored_at"] == "TIMESTAMP"
        assert types["data"] == types["session_id"] == "VARCHAR"
        names = [name for name, *_ in connection.execute("DESCRIBE contexts").fetchall()]
        assert names == [
            *("ref", "namespace", "kind", "content_type", "body", "body_bytes", "size"),
            *("created_at", "expires_at", "epoch", "stream_seq", "day"),
        ]


def test_values_come_out_as_they_went_in(lake: Lake) -> None:
    archive(lake, "contexts", [context(1, b'{"a":1}', expires_at_ms=T0_MS + 60_000), context(2, b"\xff\x00")])
    archive(lake, "events", [event(1)])
    archive(lake, "key_versions", [*key_versions(1, 3)])
    with connect(lake.path) as connection:
        found = connection.execute("SELECT body, body_bytes, expires_at FROM contexts ORDER BY stream_seq").fetchall()
        assert found == [
            ('{"a":1}', b'{"a":1}', datetime.fromisoformat("2026-01-31T09:01:00")),
            (None, b"\xff\x00", None),
        ]
        hot = connection.execute("SELECT body->>'$.a' FROM contexts WHERE stream_seq = 1").fetchall()
        assert hot == [("1",)]
        for literal in (event(1).id, uuid.UUID(event(1).id)):
            assert connection.execute("SELECT name FROM events WHERE event_id = ?", [literal]).fetchone() == (
                "agent:status",
            )
        assert connection.execute("SELECT tags, op, version FROM key_versions WHERE version = 2").fetchone() == (
            ["a", "b"],
            "put",
            2,
        )
        assert connection.execute("SELECT DISTINCT day FROM events").fetchone() == (date(2026, 1, 31),)


def test_filters_on_ids_read_one_row_group_but_for_a_few_false_positives(lake: Lake) -> None:
    archive(lake, "contexts", [*contexts(1, 20_000)])
    archive(lake, "events", [*events(1, 20_000)])
    numbers = range(700, 720)
    with connect(lake.path) as connection:
        for queries in (
            [f"SELECT size FROM contexts WHERE ref = '{context(n).ref}'" for n in numbers],
            [f"SELECT name FROM events WHERE event_id = '{event(n).id}'" for n in numbers],
            [f"SELECT name FROM events WHERE session_id = 'session-{n}'" for n in numbers],
            [f"SELECT name FROM events WHERE correlation_id = 'correlation-{n}'" for n in numbers],
        ):
            scanned = [_row_groups_scanned(connection, sql) for sql in queries]
            # A Bloom filter says of 2.5 % of the groups that they may hold what they do not hold.
            assert sum(scanned) <= 1.5 * len(scanned), scanned


def _row_groups_scanned(connection: Connection, sql: str) -> int:
    plan = connection.execute(f"EXPLAIN ANALYZE {sql}").fetchall()[0][1]
    found = re.search(r"Row Groups Scanned: (\d+) / 10", plan)
    assert found is not None, plan
    return int(found[1])


def test_chunked_bodies_are_whole_and_parts_are_hidden(lake: Lake) -> None:
    rnd = random.Random(3)
    binary = rnd.randbytes(700_000)
    text = ("né " * 100_000).encode()
    rows: list[Row] = [context(1)]
    for body in (binary, text):
        rows += chunked(len(rows) + 1, body, 65_537)
    rows.append(touch(context(1), len(rows) + 1))
    archive(lake, "contexts", rows)
    with connect(lake.path) as connection:
        found = connection.execute("SELECT size, body, body_bytes FROM contexts ORDER BY stream_seq").fetchall()
        assert found == [
            (context(1).size, context(1).body.decode(), context(1).body),
            (len(binary), None, binary),
            (len(text), text.decode(), text),
        ]
        assert count(connection, "contexts_stored") == len(rows)
        assert lake.statistics("contexts").contexts == 3


def test_a_manifest_that_lacks_a_chunk_shows_no_body(lake: Lake) -> None:
    rows = chunked(1, bytes(range(250)), 100)
    archive(lake, "contexts", [rows[0], *rows[2:]])
    with connect(lake.path) as connection:
        assert connection.execute("SELECT size, body, body_bytes FROM contexts").fetchall() == [(250, None, None)]


@pytest.mark.parametrize("name", ["it's", 'a"b', "a[b]c", "a*b?c", "a b", "é世", "a{b}", "a%b", "-- x;"])
def test_odd_directory_names_are_taken_literally(tmp_path: Path, name: str) -> None:
    lake = Lake.open(tmp_path / name / "lake", create=True)
    archive(lake, "contexts", [*contexts(1, 3)])
    with connect(lake.path) as connection:
        assert count(connection, "contexts") == 3
    with duckdb.connect(str(write_views_file(lake)), read_only=True) as plain:
        assert count(plain, "contexts") == 3


def test_files_that_are_not_committed_are_not_read(lake: Lake) -> None:
    archive(lake, "contexts", [*contexts(1, 10)])
    source = lake.path / "contexts" / lake.files("contexts")[0].path
    (source.parent / "part-orphan.parquet").write_bytes(source.read_bytes())
    compact(lake, at_ms=2_000_000_000_000)
    with connect(lake.path) as connection:
        assert count(connection, "contexts") == 10


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_file_of_an_earlier_release_may_lack_a_column(lake: Lake, lacking: int) -> None:
    archive(lake, "events", [*events(1, 5)])
    archive(lake, "events", [*events(6, 8)])
    with connect(lake.path, compare=False) as connection:
        asked = "SELECT count(agent_id), count(*) FROM events"
        assert connection.execute(asked).fetchall() == [(8, 8)]
    path = sorted(lake.path / "events" / entry.path for entry in lake.files("events"))[lacking]
    content = pq.ParquetFile(path).read()
    pq.write_table(content.drop_columns(["agent_id"]), path)
    with connect(lake.path, compare=False) as connection:
        assert connection.execute(asked).fetchall() == [(8 - content.num_rows, 8)]
        archive(lake, "events", [*events(9, 12)])
        assert connection.execute(asked).fetchall() == [(12 - content.num_rows, 12)]


def test_every_statement_sees_what_was_committed_before_it(lake: Lake) -> None:
    with connect(lake.path) as connection:
        for seq in range(1, 6):
            archive(lake, "events", [event(seq)])
            assert count(connection, "events") == seq
            assert connection.sql("SELECT count(*) FROM events").fetchall() == [(seq,)]
            assert connection.table("events").count("*").fetchall() == [(seq,)]


def test_pinned_statements_see_one_moment(lake: Lake) -> None:
    archive(lake, "events", [event(1)])
    with connect(lake.path) as connection:
        with connection.pinned():
            assert count(connection, "events") == 1
            archive(lake, "events", [event(2)])
            assert count(connection, "events") == 1
        assert count(connection, "events") == 2


def test_the_connection_behaves_like_duckdbs(lake: Lake) -> None:
    archive(lake, "events", [*events(1, 5)])
    with connect(lake.path, config={"threads": 1}) as connection:
        frame = connection.execute("SELECT event_depth FROM events ORDER BY stream_seq").df()
        assert frame["event_depth"].tolist() == [1, 2, 3, 0, 1]
        assert connection.execute("SELECT 1 AS one").description[0][0] == "one"
        connection.execute("CREATE TABLE mine AS SELECT * FROM events")
        assert count(connection, "mine") == 5
        assert connection.execute("SELECT ? + ?", [1, 2]).fetchone() == (3,)
        with pytest.raises(duckdb.Error):
            connection.execute("DELETE FROM events")
        with pytest.raises(AttributeError):
            _ = connection.nonsense


def test_cursors_of_several_threads_do_not_disturb_each_other(lake: Lake) -> None:
    tail = MemoryTail()
    connection = connect(lake.path, tail=tail)
    lock = threading.Lock()
    published = archived = 0
    stop = threading.Event()

    def read() -> None:
        cursor = connection.cursor()
        while not stop.is_set():
            with lock:
                before = published
            found = count(cursor, "events")
            with lock:
                after = published
            assert before <= found <= after
        cursor.close()

    stream = tail.streams["events"]
    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for _ in range(40):
                with lock:
                    for row in events(published + 1, published + 25):
                        stream.publish(row)
                    published += 25
                if published - archived >= 75:
                    archive(lake, "events", [row for row in stream.rows if row.seq <= archived + 50])
                    archived += 50
                    with lock:
                        stream.purge_up_to(archived)
        finally:
            stop.set()
        for reader in readers:
            reader.result()
    assert count(connection, "events") == published
    connection.close()
    assert tail.closed


def test_the_tail_joins_on_where_the_lake_ends(lake: Lake) -> None:
    tail = MemoryTail()
    rows = events(1, 30)
    for row in rows:
        tail.streams["events"].publish(row)
    archive(lake, "events", [*rows[:20]])
    with connect(lake.path, tail=tail) as connection:
        found = connection.execute("SELECT stream_seq FROM events ORDER BY 1").fetchall()
        assert [seq for (seq,) in found] == list(range(1, 31))
        assert connection.execute("SELECT day FROM events WHERE stream_seq = 30").fetchone() == (date(2026, 1, 31),)


@pytest.mark.parametrize("with_index", [False, True])
def test_what_is_stored_twice_is_shown_once(lake: Lake, tmp_path: Path, with_index: bool) -> None:
    tail = MemoryTail()
    stored = tail.streams["contexts"]
    for seq in range(1, 11):
        stored.publish(context(seq))
    archive(lake, "contexts", [*contexts(1, 10)])
    stored.purge_up_to(10)
    again = [context(11, context(3).body), context(12), context(13, context(12).body), touch(context(4), 14)]
    for row in again:
        stored.publish(row)
    happened = tail.streams["events"]
    for seq in range(1, 4):
        happened.publish(event(seq))
    archive(lake, "events", [*events(1, 3)])
    happened.publish(event(4, id=event(2).id))
    happened.publish(event(5, id=event(2).id, namespace="other"))
    index = LakeIndex.open(tmp_path / "index") if with_index else None
    with connect(lake.path, tail=tail, index=index) as connection:
        assert count(connection, "contexts") == 11
        assert count(connection, "events") == 4
        # The archiver keeps the first of each and notes the rest: the count stays.
        lake.append("contexts", [again[1], touch(again[0], 13)], epoch=EPOCH, first_seq=11, last_seq=14)
        assert count(connection, "contexts") == 11


def test_an_index_ahead_of_the_picture_does_not_hide_rows(lake: Lake, tmp_path: Path) -> None:
    """The index learns of a commit between the picture of the lake and that of the tail."""
    tail = MemoryTail()
    for row in events(1, 10):
        tail.streams["events"].publish(row)
    rival = Lake.open(lake.path)

    def archive_meanwhile(table: Table) -> None:
        if table == "events":
            tail.before_read = None
            archive(rival, "events", [*events(1, 10)])

    tail.before_read = archive_meanwhile
    with LakeIndex.open(tmp_path / "index") as index, connect(lake.path, tail=tail, index=index) as connection:
        assert count(connection, "events") == 10


@pytest.mark.parametrize("known", [False, True])
def test_a_purge_between_lake_and_tail_is_noticed(lake: Lake, known: bool) -> None:
    """Archived and purged after the picture of the lake: neither picture alone holds the rows."""
    tail = MemoryTail()
    stream = tail.streams["events"]
    for row in events(1, 40):
        stream.publish(row)
    rival = Lake.open(lake.path)
    first = 1
    if known:
        archive(rival, "events", [*events(1, 10)])
        first = 11

    def purge_meanwhile(table: Table) -> None:
        if table == "events":
            tail.before_read = None
            archive(rival, "events", [*events(first, 30)])
            stream.purge_up_to(30)

    tail.before_read = purge_meanwhile
    with connect(lake.path, tail=tail) as connection:
        assert count(connection, "events") == 40


def test_a_tail_that_loses_its_place_to_a_purge_is_asked_again(lake: Lake) -> None:
    tail = MemoryTail()
    stream = tail.streams["events"]
    for row in events(1, 40):
        stream.publish(row)
    rival = Lake.open(lake.path)

    def purge_meanwhile(table: Table) -> None:
        if table == "events":
            tail.before_read = None
            archive(rival, "events", [*events(1, 30)])
            stream.purge_up_to(30)
            raise UnavailableError("message 1 is not delivered")

    tail.before_read = purge_meanwhile
    with connect(lake.path, tail=tail) as connection:
        assert count(connection, "events") == 40


def test_a_tail_that_does_not_answer_is_an_error(lake: Lake) -> None:
    tail = MemoryTail()
    with connect(lake.path, tail=tail) as connection:

        def refuse(_table: Table) -> None:
            raise UnavailableError("no answer")

        tail.before_read = refuse
        with pytest.raises(UnavailableError, match="no answer"):
            count(connection, "events")
        tail.before_read = None
        assert count(connection, "events") == 0


def test_messages_in_neither_place_are_an_error(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.lake.snapshot.RETRY_PAUSE_S", 0.0)
    tail = MemoryTail()
    archive(lake, "events", [*events(1, 10)])
    stream = tail.streams["events"]
    stream.last_seq, stream.first_seq = 19, 15
    stream.publish(event(20))
    with pytest.raises(GapError, match="neither stream nor lake"):
        connect(lake.path, tail=tail)
    assert tail.closed


def test_a_stream_that_begins_late_is_no_gap(lake: Lake) -> None:
    tail = MemoryTail()
    stream = tail.streams["events"]
    stream.last_seq, stream.first_seq = 99, 100
    stream.publish(event(100))
    with connect(lake.path, tail=tail) as connection:
        assert count(connection, "events") == 1


def test_a_new_epoch_of_the_stream_is_followed(lake: Lake) -> None:
    tail = MemoryTail()
    for row in events(1, 10):
        tail.streams["events"].publish(row)
    archive(lake, "events", [*events(1, 10)])
    with connect(lake.path, tail=tail) as connection:
        assert count(connection, "events") == 10
        # Made anew: the same sequences, other content; one event was sent again by its producer.
        second = tail.streams["events"] = MemoryStream("epoch-2")
        fresh = [event(seq, id=event(100 + seq).id, epoch="epoch-2") for seq in range(1, 8)]
        for row in fresh:
            second.publish(row)
        second.publish(event(8, id=event(5).id, epoch="epoch-2"))
        assert count(connection, "events") == 17
        archive(lake, "events", [*fresh[:4]])
        second.purge_up_to(4)
        assert count(connection, "events") == 17
        archive(lake, "events", [*fresh[4:]])
        assert count(connection, "events") == 17


def test_only_new_tail_rows_are_asked_for(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    tail = MemoryTail()
    for row in events(1, 100):
        tail.streams["events"].publish(row)
    asked: list[int] = []
    read = tail.read

    def spy(table: Table, after: Any) -> Any:
        if table == "events":
            asked.append(after.seq if after else 0)
        return read(table, after)

    monkeypatch.setattr(tail, "read", spy)
    with connect(lake.path, tail=tail) as connection:
        count(connection, "events")
        tail.streams["events"].publish(event(101))
        assert count(connection, "events") == 101
        count(connection, "events")
    assert asked == [0, 0, 100, 100, 101]


def test_manifest_and_chunks_may_be_on_both_sides(lake: Lake) -> None:
    tail = MemoryTail()
    body = bytes(range(256)) * 4
    rows = chunked(1, body, 300)
    for row in rows:
        tail.streams["contexts"].publish(row)
    with connect(lake.path, tail=tail) as connection:
        for archived in range(len(rows) + 1):
            if archived:
                archive(lake, "contexts", [rows[archived - 1]])
            assert connection.execute("SELECT body_bytes FROM contexts").fetchall() == [(body,)]


def test_nats_url_loads_the_adapter_by_name(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duck_module, "_TAIL_ADAPTER", "holdfast.streams.absent")
    with pytest.raises(ConfigurationError, match=r"needs holdfast\.streams\.absent"):
        connect(lake.path, "nats://127.0.0.1:1")


def test_a_notebook_needs_neither_the_index_nor_nats(lake: Lake) -> None:
    archive(lake, "events", [*events(1, 5)])
    script = (
        "import sys; sys.modules['lmdb'] = sys.modules['nats'] = None\n"
        "from holdfast.lake import connect\n"
        "c = connect(sys.argv[1]); print(c.execute('SELECT count(*) FROM events').fetchall())\n"
        "print(sorted(m for m in sys.modules if m.startswith(('holdfast.streams', 'holdfast.client'))))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(lake.path)], capture_output=True, text=True, check=True
    ).stdout
    assert output.split("\n")[:2] == ["[(5,)]", "[]"]


def test_plain_duckdb_opens_the_file_of_views(lake: Lake) -> None:
    rows: list[Row] = [*contexts(1, 10), *chunked(11, bytes(range(250)), 100)]
    archive(lake, "contexts", rows)
    archive(lake, "events", [*events(1, 20)])
    path = write_views_file(lake)
    assert path == lake.path / "holdfast.duckdb"
    script = (
        "import duckdb, sys; c = duckdb.connect(sys.argv[1], read_only=True);"
        "print(c.execute('SELECT count(*) FROM contexts').fetchone()[0],"
        " c.execute('SELECT count(*) FROM events').fetchone()[0],"
        " c.execute('SELECT body_bytes FROM contexts ORDER BY stream_seq DESC').fetchone()[0] == bytes(range(250)))"
    )
    output = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "11 20 True"
    assert [entry.name for entry in lake.path.iterdir() if entry.name.startswith(".")] == []


def test_a_reader_of_the_file_survives_its_replacement_and_a_vacuum(lake: Lake) -> None:
    for seq in range(1, 25, 2):
        archive(lake, "events", [*events(seq, seq + 1)])
    path = write_views_file(lake)
    with duckdb.connect(str(path), read_only=True) as reader:
        compact(lake, at_ms=2_000_000_000_000)
        vacuum(lake)
        write_views_file(lake)
        assert count(reader, "events") == 24
    with duckdb.connect(str(path), read_only=True) as reader:
        assert count(reader, "events") == 24


def test_a_file_of_views_opened_for_writing_does_not_spoil_the_next(lake: Lake) -> None:
    archive(lake, "events", [*events(1, 5)])
    path = write_views_file(lake)
    script = (
        "import duckdb, os, sys; c = duckdb.connect(sys.argv[1]); c.execute('CREATE TABLE mine(a INT)'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == 9
    archive(lake, "events", [*events(6, 8)])
    write_views_file(lake)
    with duckdb.connect(str(path)) as plain:
        assert count(plain, "events") == 8


def test_the_file_of_views_is_begun_anew_when_its_files_were_merged_and_removed_meanwhile(lake: Lake) -> None:
    archive(lake, "events", [*events(1, 5)])
    archive(lake, "events", [*events(6, 8)])
    other = Lake.open(lake.path)
    compact(other, policy=MergePolicy(min_files=2), at_ms=LATER_MS)
    vacuum(other, older_than_s=-60.0)
    with duckdb.connect(str(write_views_file(lake)), read_only=True) as plain:
        assert count(plain, "events") == 8


def test_the_file_of_views_is_not_begun_anew_for_ever(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever merges faster than the views are made cannot hold their maker up; the file that was stays."""
    archive(lake, "events", [event(1)])
    path = write_views_file(lake)
    other = Lake.open(lake.path)
    tries: list[int] = []

    def overtaken(*arguments: Any, **options: Any) -> Any:
        tries.append(1)
        seq = other.statistics("events").rows + 1
        archive(other, "events", [event(seq)])
        compact(other, policy=MergePolicy(min_files=2), at_ms=LATER_MS)
        vacuum(other, older_than_s=-60.0)
        return view_statements(*arguments, **options)

    monkeypatch.setattr(duck_module, "view_statements", overtaken)
    with pytest.raises(UnavailableError, match="is not there") as raised:
        write_views_file(lake)
    assert len(tries) == duck_module.VIEWS_FILE_TRIES
    assert "next commit" in str(raised.value.hint)
    monkeypatch.undo()
    assert path.exists()
    with duckdb.connect(str(write_views_file(lake)), read_only=True) as plain:
        assert count(plain, "events") == len(tries) + 1


def test_a_file_of_the_lake_that_is_gone_is_named_by_the_maker_of_views(lake: Lake) -> None:
    archive(lake, "events", [event(1)])
    [entry] = lake.files("events")
    (lake.path / "events" / entry.path).unlink()
    with pytest.raises(UnavailableError, match=entry.path) as raised:
        write_views_file(lake)
    assert "holdfast verify" in str(raised.value.hint)
    assert "TMPDIR" not in str(raised.value.hint)


def test_the_file_of_views_is_written_once_a_second_and_only_on_change(lake: Lake) -> None:
    now = [100.0]
    views = ViewsFile(lake, clock=lambda: now[0])
    assert views.update()
    archive(lake, "events", [event(1)])
    assert not views.update()
    now[0] += 1.0
    assert views.update()
    now[0] += 10.0
    assert not views.update()


def test_a_read_only_lake_can_be_queried(lake: Lake) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    archive(lake, "events", [*events(1, 5)])
    folders = [lake.path, *(path for path in lake.path.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with connect(lake.path) as connection:
            assert count(connection, "events") == 5
    finally:
        for folder in folders:
            folder.chmod(stat.S_IRWXU)


def footers_bytes(connection: Connection) -> int:
    found = connection.execute("SELECT memory_usage_bytes FROM duckdb_memory() WHERE tag = 'OBJECT_CACHE'").fetchone()
    return int(found[0])


def test_footers_of_files_that_were_merged_are_forgotten(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB keeps the footer of each file that it has read, long after that file left the lake."""
    monkeypatch.setattr(footers_module, "STALE_FOOTERS", 4)
    one = most = 0
    with connect(lake.path, config={"memory_limit": "512MB"}) as connection:
        limit = connection.execute("SELECT current_setting('memory_limit')").fetchone()
        for number in range(1, 25):
            archive(lake, "events", [event(number)])
            if number % 4 == 0:
                compact(lake, policy=MergePolicy(min_files=2), at_ms=LATER_MS)
            assert connection.execute("SELECT count(*), max(name) FROM events").fetchone()[0] == number
            most = max(most, footers_bytes(connection))
            one = one or most
        assert most < 14 * one  # 30 files there were
        assert connection.execute("SELECT current_setting('memory_limit')").fetchone() == limit


def test_footers_are_kept_while_memory_cannot_be_made_short(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of one's own stay where they are, other threads undisturbed, and a limit of one's own is left alone."""
    monkeypatch.setattr(footers_module, "STALE_FOOTERS", 0)

    def merge(connection: Connection, first: int) -> bool:
        """Whether a merge made less of the footers."""
        for number in range(first, first + 3):
            archive(lake, "events", [event(number)])
            count(connection, "events WHERE name <> ''")
        before = footers_bytes(connection)
        compact(lake, policy=MergePolicy(min_files=2), at_ms=LATER_MS)
        count(connection, "events WHERE name <> ''")
        return footers_bytes(connection) < before

    with connect(lake.path) as connection:
        assert merge(connection, 1)
        connection.execute("CREATE TABLE mine AS SELECT range AS n FROM range(300000)")
        assert not merge(connection, 4)
        connection.execute("DROP TABLE mine")
        assert merge(connection, 7)
        connection.execute("SET memory_limit = '400MB'")
        assert not merge(connection, 10)
        connection.execute("RESET memory_limit")
        connection.cursor().close()
        assert not merge(connection, 13)
