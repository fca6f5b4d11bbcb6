"""``holdfast import``: every step once, whatever is imported again; what is malformed is named and the rest goes on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.ops.importing import WINDOW_STEPS, ImportCounts, TraceImport
from holdfast.ops.traces import Malformed, find_traces
from tests.command_line import CommandLine

if TYPE_CHECKING:
    from holdfast.client import Holdfast


def step(session: str, seq: int, **fields: Any) -> str:
    return json.dumps({"session_id": session, "seq": seq, "role": "user", "content": f"{session} {seq}", **fields})


def write_steps(path: Path, lines: list[str]) -> Path:
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """Two sessions of three steps; the first steps say the same, and one stated its cause and its time."""
    lines = [
        step("a", 0, content="the same system prompt", role="system"),
        step("a", 1, ts="2025-11-18T22:55:06.125Z"),
        step("a", 2, caused_by=0, caused_by_source="tool_call_id"),
        step("b", 0, content="the same system prompt", role="system"),
        step("b", 1),
        step("b", 2),
    ]
    return write_steps(tmp_path / "small.steps.jsonl.gz", lines)


async def import_once(hf: Holdfast, path: Path) -> tuple[ImportCounts, list[Malformed]]:
    malformed: list[Malformed] = []
    counts = await TraceImport(hf, on_malformed=malformed.append).run(find_traces([path]).files)
    return counts, malformed


async def test_a_second_import_adds_nothing(hf: Holdfast, steps: Path) -> None:
    first, _ = await import_once(hf, steps)
    assert (first.files, first.steps, first.contexts, first.distinct_contexts) == (1, 6, 6, 5)
    assert (first.events, first.errors) == (6, 0)
    second, _ = await import_once(hf, steps)
    assert (second.steps, second.distinct_contexts, second.events) == (6, 5, 0)


async def test_windows_keep_count_and_order(hf: Holdfast, tmp_path: Path) -> None:
    number = 2 * WINDOW_STEPS + 7
    path = write_steps(tmp_path / "long.steps.jsonl.gz", [step("long", seq) for seq in range(number)])
    shown: list[int] = []
    runner = TraceImport(hf, on_progress=lambda counts: shown.append(counts.steps))
    counts = await runner.run(find_traces([path]).files)
    assert (counts.steps, counts.events, counts.distinct_contexts) == (number, number, number)
    assert shown == [WINDOW_STEPS, 2 * WINDOW_STEPS, number]


async def test_malformed_lines_are_named_and_the_rest_is_imported(hf: Holdfast, tmp_path: Path) -> None:
    lines = [step("m", 0), "{nonsense", step("m", 1), json.dumps({"session_id": "m", "seq": -1, "role": "user"})]
    path = write_steps(tmp_path / "odd.steps.jsonl.gz", lines)
    counts, malformed = await import_once(hf, path)
    assert (counts.steps, counts.events, counts.errors) == (2, 2, 2)
    assert [(Path(place.path).name, place.line) for place in malformed] == [(path.name, 2), (path.name, 4)]


def test_the_command_tells_counts_and_places(tmp_path: Path, steps: Path) -> None:
    holdfast = CommandLine(tmp_path / "data")
    counts = holdfast("import", str(steps), "--json").json
    assert set(counts) == {"files", "steps", "contexts", "distinct_contexts", "events", "errors", "seconds"}
    assert (counts["files"], counts["steps"], counts["events"], counts["errors"]) == (1, 6, 6, 0)

    odd = tmp_path / "odd.jsonl"
    odd.write_text(f"{step('o', 0)}\n{{nonsense\n{step('o', 1)}\n")
    outcome = holdfast("import", str(odd), "--json")
    assert (outcome.json["steps"], outcome.json["errors"]) == (2, 1)
    assert (outcome.error["code"], outcome.error["path"], outcome.error["line"]) == ("malformed", str(odd), 2)
    assert f"malformed: {odd}:2: " in holdfast("import", str(odd)).err

    unreadable = tmp_path / "none.jsonl"
    unreadable.write_text("nonsense\n" * 30)
    outcome = holdfast("import", str(unreadable), "--format", "steps", status=1)
    assert outcome.err.count(f"malformed: {unreadable}:") == 20
    assert "and 10 more that could not be read" in outcome.err


def test_lineage_times_and_counts_in_sql(tmp_path: Path, steps: Path) -> None:
    holdfast = CommandLine(tmp_path / "data")
    with holdfast.up():
        check_sql(holdfast, steps)


def check_sql(holdfast: CommandLine, steps: Path) -> None:
    holdfast("import", str(steps))
    holdfast("flush")
    query = """
        SELECT session_id AS session, data ->> '$.ordinal' AS ordinal, name, event_depth AS depth,
            data ->> '$.parent_source' AS source, timestamp = stored_at AS is_server_time, timestamp AS at,
            parent_event_id IS NOT NULL AS has_parent
        FROM events ORDER BY stream_seq
    """
    rows = holdfast("sql", query, "--json").lines
    assert [(row["session"], row["ordinal"]) for row in rows] == [(s, str(n)) for s in "ab" for n in range(3)]
    assert rows[1]["at"] == "2025-11-18T22:55:06.125000"
    assert [row["is_server_time"] for row in rows] == [True, False, True, True, True, True]
    assert (rows[2]["source"], rows[2]["depth"]) == ("tool_call_id", 1)
    assert [row["has_parent"] for row in rows] == [False, True, True] * 2
    # Everything again, later, after the hot tier is empty: the archiver knows these ids for ever.
    holdfast("evict", "--older-than", "0s")
    assert holdfast("import", str(steps), "--json").json["distinct_contexts"] == 5
    holdfast("flush")
    assert holdfast("sql", "SELECT count(*) AS n FROM events", "--json").json == {"n": 6}
    assert holdfast("sql", "SELECT count(*) AS n FROM contexts", "--json").json == {"n": 5}
    assert holdfast("dead", "--json").lines == []
    assert holdfast("verify", "--json").json["ok"] is True


@pytest.mark.slow
@pytest.mark.traces
@pytest.mark.timeout(240)
def test_recorded_traces_are_stored_archived_and_found_again(tmp_path: Path, traces: Path) -> None:
    """The whole main path on real input: import, flush, evict, and every reference from the lake, byte for byte."""
    holdfast = CommandLine(tmp_path / "data")
    path = traces / "steps"
    expected = json.loads((traces / "stats.json").read_text()) if (traces / "stats.json").is_file() else {}
    assert isinstance(expected, dict)
    with holdfast.up():
        first = holdfast("import", str(path), "--json").json
        assert (first["files"], first["steps"], first["events"], first["errors"]) == (2, 26_412, 26_412, 0)
        holdfast("flush")
        holdfast("evict", "--older-than", "0s")
        assert holdfast("stats", "--json").json["hot"]["contexts"] == 0
        count = "SELECT (SELECT count(*) FROM events) AS events, (SELECT count(*) FROM contexts) AS contexts"
        counts = holdfast("sql", count, "--json").json
        assert counts == {"events": 26_412, "contexts": first["distinct_contexts"]}

        bodies = bodies_of(path)
        refs = list(bodies)
        assert len(refs) == first["distinct_contexts"]
        resolved = holdfast("resolve", "-", "--raw", stdin="\n".join(refs).encode())
        assert resolved.raw == b"".join(bodies.values())

        holdfast("import", str(path))
        holdfast("flush")
        assert holdfast("sql", count, "--json").json == counts
        assert holdfast("verify", "--json").json["ok"] is True


def bodies_of(path: Path) -> dict[str, bytes]:
    """The reference and the exact body of every step, worked out here, without a server."""
    from holdfast.ops.traces import Step, read_path
    from holdfast.schemas.refs import compute_digest

    return {
        f"ctx_{record.kind}_{compute_digest('default', record.kind, record.body)}": record.body
        for record in read_path(path)
        if isinstance(record, Step)
    }
