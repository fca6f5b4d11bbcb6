"""``holdfast migrate``: embedded contexts become references in five steps, and every event comes back byte for byte."""

from __future__ import annotations

import gzip
import json
import sqlite3
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from holdfast.schemas.ids import normal_event_id
from tests.command_line import CommandLine, InProcess, Service, in_process
from tests.embedded_samples import events, lines, read_table, write_table

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("migration") / "data"


@pytest.fixture(scope="module")
def running(directory: Path) -> Generator[Service]:
    with CommandLine(directory, HOLDFAST_ARCHIVE_INTERVAL_S="3600").up() as service:
        yield service


@pytest.fixture
def holdfast(
    running: Service,
    directory: Path,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> Generator[InProcess]:
    """Commands in this process, in a namespace of the test's own."""
    assert running.ready["ready"] is True
    with in_process(directory, monkeypatch, capfdbinary, HOLDFAST_NAMESPACE=namespace) as commands:
        yield commands


def rows(holdfast: InProcess, namespace: str, columns: str = "*") -> list[dict[str, Any]]:
    """The stored events of a namespace in the order of storing, by SQL."""
    query = f"SELECT {columns} FROM events WHERE namespace = '{namespace}' ORDER BY stored_at, stream_seq"
    return holdfast("sql", "--live", query, "--json").lines


def test_B63_embedded_contexts_become_references_in_five_steps(
    holdfast: InProcess, namespace: str, tmp_path: Path
) -> None:
    found = events(1_200)
    path = tmp_path / "events.ndjson.gz"
    path.write_bytes(gzip.compress(lines(found)))

    outcome = holdfast("migrate", str(path), "--recent", "48h")
    # 1: the source was read; 2: nothing to do for new events; 3: the last 48 hours come first; 4: the others.
    said = outcome.err.splitlines()
    assert [line.partition(" ")[0] for line in said] == ["1/5", "2/5", "3/5", "4/5"]
    assert "1,200 events" in said[0]
    assert "refer to their contexts already" in said[1]
    assert "96 recent events" in said[2]
    assert "1,104 older events" in said[3]
    stored = rows(holdfast, namespace, "json_extract(data, '$.n')::INT AS n")
    assert [row["n"] for row in stored] == [*range(1_104, 1_200), *range(1_104)]

    # 5: only after everything was found equal in the lake is the embedded form replaced, with a backup.
    report = holdfast("migrate", str(path), "--clean-up", "--json").json
    assert (report["resumed"], report["sent"]) == (1_200, 0)
    assert report["verification"] == {"events": 1_200, "equal": 1_200, "missing": 0, "different": 0, "places": []}
    new = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert {event["_ksi_context"] for event in new} == refs_of(holdfast, namespace)
    assert [event["_event_id"] for event in new] == [event["_ksi_context"]["_event_id"] for event in found]
    assert gzip.decompress(Path(report["backup"]).read_bytes()) == lines(found)

    # What was cleaned up is given back by the store alone, and is not migrated twice.
    again = holdfast("migrate", str(path), "--json").json
    assert (again["events"], again["sent"], again["references_already"]) == (0, 0, 1_200)
    out = tmp_path / "out.ndjson"
    assert holdfast("migrate", str(path), "--rebuild", str(out), "--json").json["events"] == 1_200
    assert out.read_bytes() == lines(found)
    assert holdfast("dead", "--json").lines == []


def refs_of(holdfast: InProcess, namespace: str) -> set[str]:
    return {row["context_ref"] for row in rows(holdfast, namespace, "DISTINCT context_ref, stored_at, stream_seq")}


def test_B50_the_lineage_of_the_store_is_that_of_the_embedded_contexts(
    holdfast: InProcess, namespace: str, tmp_path: Path
) -> None:
    found = events(140)
    path = tmp_path / "events.jsonl.zst"
    path.write_bytes(zstd.compress(lines(found)))
    report = holdfast("import", str(path), "--json").json
    # Every event had some 250 bytes of context; all of them share the contexts of the two shapes that there are.
    assert (report["events"], report["new"], report["contexts"], report["whole"]) == (140, 140, 2, 0)
    by_id = {row["event_id"]: row for row in rows(holdfast, namespace)}
    for event in found:
        context = event["_ksi_context"]
        row = by_id[normal_event_id(namespace, context["_event_id"])[0]]
        assert row["source_id"] == context["_event_id"]
        parent = context.get("_parent_event_id")
        assert row["parent_event_id"] == (None if parent is None else normal_event_id(namespace, parent)[0])
        assert row["root_event_id"] == normal_event_id(namespace, context["_root_event_id"])[0]
        assert row["event_depth"] == context["_event_depth"]
        for field in ("agent_id", "session_id", "correlation_id"):
            assert row[field] == context[f"_{field}"]
        assert json.loads(row["data"]) == event["data"]
        assert len(row["context_ref"]) < 60
    # Down from a root by the parents that the store holds, against the links of the source.
    tree = f"""
        WITH RECURSIVE tree AS (
            SELECT event_id, 0 AS steps FROM events WHERE source_id = 'evt_00000007' AND namespace = '{namespace}'
            UNION ALL SELECT e.event_id, steps + 1 FROM events e JOIN tree t ON e.parent_event_id = t.event_id
                WHERE namespace = '{namespace}'
        ) SELECT source_id, steps, event_depth FROM tree JOIN events USING (event_id)
        WHERE namespace = '{namespace}' ORDER BY source_id
    """
    shown = holdfast("sql", "--live", tree, "--json").lines
    assert [(row["source_id"], row["steps"]) for row in shown] == [
        (event["_ksi_context"]["_event_id"], event["_ksi_context"]["_event_depth"]) for event in found[7:14]
    ]
    assert all(row["steps"] == row["event_depth"] for row in shown)


def test_importing_again_adds_nothing(holdfast: InProcess, namespace: str, tmp_path: Path) -> None:
    path = tmp_path / "events.ndjson"
    path.write_bytes(lines(events(60)))
    assert holdfast("import", str(path), "--format", "embedded", "--json").json["new"] == 60
    copy = tmp_path / "elsewhere.ndjson"
    copy.write_bytes(lines(events(80)))
    report = holdfast("import", str(copy), "--json").json
    assert (report["sent"], report["new"], report["resumed"]) == (80, 20, 0)
    assert len(rows(holdfast, namespace, "event_id, stored_at, stream_seq")) == 80


def test_a_table_is_migrated_and_its_contexts_replaced_in_one_transaction(
    holdfast: InProcess, namespace: str, tmp_path: Path
) -> None:
    found = events(30)
    path = tmp_path / "ksi.db"
    write_table(path, found)
    before = read_table(path)
    report = holdfast("migrate", str(path), "--clean-up", "--json").json
    assert report["verification"]["equal"] == 30
    after = read_table(path)
    assert [row[:3] for row in after] == [row[:3] for row in before]
    for event, row in zip(found, after, strict=True):
        context = json.loads(row[3])
        assert context["_event_id"] == event["_ksi_context"]["_event_id"]
        assert set(context) == {"_event_id", "_ksi_context_ref"}
    assert holdfast("resolve", json.loads(after[0][3])["_ksi_context_ref"]).status == 0
    assert read_table(Path(report["backup"])) == before
    assert holdfast("migrate", str(path), "--json").json["references_already"] == 30
    out = tmp_path / "out.ndjson"
    holdfast("migrate", str(path), "--rebuild", str(out))
    rebuilt = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert rebuilt == found
    # The cells themselves, as they were.
    assert [json.dumps(event["_ksi_context"]) for event in rebuilt] == [row[3] for row in before]


def test_a_column_with_whole_events_can_be_named(holdfast: InProcess, tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE log (id INTEGER PRIMARY KEY, entry TEXT)")
        database.executemany("INSERT INTO log (entry) VALUES (?)", [(json.dumps(event),) for event in events(5)])
    assert "no table with embedded events" in holdfast("migrate", str(path), status=2).err
    named = ("--table", "log", "--columns", "json=entry")
    report = holdfast("migrate", str(path), *named, "--clean-up", "--no-backup", "--json").json
    assert (report["events"], report["verification"]["equal"], "backup" in report) == (5, 5, False)
    with closing(sqlite3.connect(path)) as database:
        entries = [json.loads(entry) for (entry,) in database.execute("SELECT entry FROM log ORDER BY id")]
    assert all(entry["_ksi_context"].startswith("ctx_embedded_") for entry in entries)
    assert [entry["_event_id"] for entry in entries] == [f"evt_{number:08x}" for number in range(5)]


def test_odd_lines_come_back_and_are_named(holdfast: InProcess, tmp_path: Path) -> None:
    twice = events(2)[1]
    odd = [
        b'{"event": "a:b", "_ksi_context": {"_event_id": "evt_1", "_event_id": "evt_1"}}',
        b"{nonsense",
        json.dumps(twice).encode(),
        json.dumps(twice).encode(),
        b'{"event": "", "data": {"$":"name"}, "_ksi_context": {"_timestamp": 1e9}}\r',
        b"\xff\xfe",
        '{"event": "ä", "data": "\\u0000", "_ksi_context": {"_session_id": "\U0001f600"}}'.encode(),
    ]
    path = tmp_path / "odd.ndjson"
    path.write_bytes(b"".join(line + b"\n" for line in odd))
    outcome = holdfast("migrate", str(path), "--verify")
    assert f"kept whole: {path}:2: event is not JSON" in outcome.err
    assert f"kept whole: {path}:6: event is not UTF-8" in outcome.err
    assert "7 of 7 events come back byte for byte" in outcome.out
    out = tmp_path / "out.ndjson"
    holdfast("migrate", str(path), "--rebuild", str(out))
    assert out.read_bytes() == path.read_bytes()


def test_nothing_is_cleaned_up_when_an_event_is_not_equal(holdfast: InProcess, namespace: str, tmp_path: Path) -> None:
    path = tmp_path / "events.ndjson"
    path.write_bytes(lines(events(20)))
    holdfast("migrate", str(path))
    # The same ids, one of them with other content: the store keeps what it had.
    changed = events(20)
    changed[4]["data"] = {"n": "another"}
    changed[5]["_ksi_context"]["_session_id"] = "another"
    path.write_bytes(lines(changed))
    outcome = holdfast("migrate", str(path), "--clean-up", "--json", status=5)
    verification = outcome.json["verification"]
    assert (verification["equal"], verification["different"]) == (18, 2)
    assert [place["line"] for place in verification["places"]] == [5, 6]
    assert path.read_bytes() == lines(changed)
    assert sorted(found.name for found in tmp_path.iterdir() if found.is_file()) == ["events.ndjson"]


def test_errors_say_what_to_do(holdfast: InProcess, tmp_path: Path) -> None:
    missing = tmp_path / "none.ndjson"
    assert holdfast("migrate", str(missing), "--json", status=4).error["code"] == "not_found"
    out = str(tmp_path / "out")
    error = holdfast("migrate", str(missing), "--rebuild", out, "--json", status=4).error
    assert "no migration of" in error["message"]
    path = tmp_path / "events.ndjson"
    path.write_bytes(lines(events(2)))
    assert "no SQLite database" in holdfast("migrate", str(path), "--table", "x", "--json", status=2).error["message"]
    broken = tmp_path / "broken.ndjson.gz"
    broken.write_bytes(gzip.compress(lines(events(50)))[:-20])
    assert "cannot be read further" in holdfast("migrate", str(broken), "--json", status=2).error["message"]
