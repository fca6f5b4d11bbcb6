"""Causes that traces state arrive as they are: the tree of a session equals the data's own links."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.ops.importing import TraceImport
from holdfast.ops.traces import Step, TraceFile, find_traces, parse_map, read_file
from tests.command_line import CommandLine
from tests.unit.traces_samples import jsonl

if TYPE_CHECKING:
    from holdfast.client import Holdfast

TREE = """
    WITH RECURSIVE tree AS (
        SELECT event_id, root_event_id, 0 AS depth FROM events WHERE parent_event_id IS NULL
        UNION ALL SELECT e.event_id, t.root_event_id, t.depth + 1 FROM events e JOIN tree t
            ON e.parent_event_id = t.event_id
    )
    SELECT e.event_id, e.session_id, e.data ->> '$.ordinal' AS ordinal, p.session_id AS parent_session,
        p.data ->> '$.ordinal' AS parent, e.data ->> '$.parent_source' AS source,
        e.event_depth = t.depth AS depth_agrees, e.root_event_id = t.root_event_id AS root_agrees
    FROM events e JOIN tree t USING (event_id) LEFT JOIN events p ON p.event_id = e.parent_event_id
    ORDER BY e.session_id, e.stream_seq
"""


def openhands_session(turns: int) -> list[dict[str, Any]]:
    """Two actions at a time, their observations in the opposite order."""
    events: list[dict[str, Any]] = [{"id": 0, "source": "user", "action": "message", "args": {"content": "Go."}}]
    for turn in range(turns):
        first = 1 + 4 * turn
        events += [
            {"id": first, "source": "agent", "action": "run", "args": {"command": f"a{turn}"}},
            {"id": first + 1, "source": "agent", "action": "read", "args": {"path": f"b{turn}"}},
            {"id": first + 2, "source": "agent", "cause": first + 1, "observation": "read", "content": "b"},
            {"id": first + 3, "source": "agent", "cause": first, "observation": "run", "content": "a"},
        ]
    return events


def links(rows: list[dict[str, Any]]) -> dict[tuple[str, int], tuple[str, int] | None]:
    """From each event to its parent, both as session and place."""
    return {
        (row["session_id"], int(row["ordinal"])): (
            None if row["parent"] is None else (row["parent_session"], int(row["parent"]))
        )
        for row in rows
    }


def test_the_tree_of_a_session_is_that_of_the_stated_causes(tmp_path: Path) -> None:
    """OpenHands' events, and spans by a map whose causes come later and stand in another session."""
    holdfast = CommandLine(tmp_path / "data")
    sessions = {f"task-{number}": openhands_session(3) for number in range(2)}
    runs = tmp_path / "output.jsonl"
    runs.write_bytes(jsonl({"instance_id": name, "history": events} for name, events in sessions.items()))
    spans = [
        {"trace": "inner", "id": "s3", "up": "s2"},
        {"trace": "inner", "id": "s2", "up": "s1"},
        {"trace": "outer", "id": "s0"},
        {"trace": "outer", "id": "s1", "up": "s0"},
    ]
    mapped = tmp_path / "spans.json"
    mapped.write_text(json.dumps(spans))
    with holdfast.up():
        assert holdfast("import", str(runs), "--json").json["events"] == 26
        field_map = "session=trace,id=id,parent=up"
        assert holdfast("import", str(mapped), "--map", field_map, "--json").json["events"] == 4
        assert holdfast("import", str(mapped), "--map", field_map, "--json").json["events"] == 0
        rows = holdfast("sql", "--live", TREE, "--json").lines
        assert "maps nothing" in holdfast("import", str(mapped), "--map", "x=y", status=2).err
        assert "exclude" in holdfast("import", str(mapped), "--map", "id=id", "--format", "steps", status=2).err
    assert all(row["depth_agrees"] and row["root_agrees"] for row in rows)
    expected: dict[tuple[str, int], tuple[str, int] | None] = {
        ("inner", 0): ("inner", 1),
        ("inner", 1): ("outer", 1),
        ("outer", 0): None,
        ("outer", 1): ("outer", 0),
    }
    for name, events in sessions.items():
        for event in events:
            cause = event.get("cause", event["id"] - 1)
            expected[name, event["id"]] = None if cause < 0 else (name, cause)
    assert links(rows) == expected
    assert {row["source"] for row in rows if "task" in row["session_id"]} == {"none", "order", "stated"}


async def test_recorded_causes_survive_a_map(hf: Holdfast, tmp_path: Path) -> None:
    """The common view of traces, read by a map, gives the links that its own reader gives."""
    lines = [
        {"session_id": "a", "seq": 0, "role": "user", "content": "x"},
        {"session_id": "a", "seq": 1, "role": "assistant", "content": "y", "caused_by": 0},
        {"session_id": "a", "seq": 2, "role": "tool", "content": "z", "caused_by": 0},
    ]
    path = tmp_path / "some.steps.jsonl"
    path.write_bytes(jsonl(lines))
    field_map = parse_map("session=session_id,id=seq,parent=caused_by,agent=role,otherwise=previous")
    found = TraceFile(path, "mapped", 0, field_map)
    own = [step for step in read_file(find_traces([path]).files[0]) if isinstance(step, Step)]
    steps = [step for step in read_file(found) if isinstance(step, Step)]
    assert [step.parent_ordinal for step in steps] == [step.parent_ordinal for step in own] == [None, 0, 0]
    counts = await TraceImport(hf).run([found])
    assert (counts.steps, counts.events, counts.errors) == (3, 3, 0)


@pytest.mark.traces
@pytest.mark.timeout(180)
def test_recorded_tool_calls_are_the_parents_of_their_results(tmp_path: Path, traces: Path) -> None:
    """tau-bench: each tool message hangs from the assistant's message that made its tool_call_id, 1,164 of them."""
    folder = traces / "tau-bench-airline"
    if not folder.is_dir():
        pytest.skip("no recorded tau-bench runs")
    holdfast = CommandLine(tmp_path / "data")
    with holdfast.up():
        assert holdfast("import", str(folder), "--json").json["events"] == 5_308
        rows = holdfast("sql", "--live", TREE, "--json").lines
    assert len(rows) == 5_308
    assert all(row["depth_agrees"] and row["root_agrees"] for row in rows)
    runs = [run for path in sorted(folder.glob("*.json")) for run in json.loads(path.read_bytes())]
    stored: dict[str, dict[int, int | None]] = defaultdict(dict)
    for (session, place), parent in links(rows).items():
        assert parent is None or parent[0] == session
        stored[session][place] = None if parent is None else parent[1]
    explicit = 0
    for run in runs:
        links_of_run = stored[f"airline-task{run['task_id']:03d}-trial{run['trial']}"]
        callers: dict[str, int] = {}
        for place, message in enumerate(run["traj"]):
            caller = callers.get(message.get("tool_call_id", ""))
            explicit += caller is not None
            expected = caller if caller is not None else place - 1 if place else None
            assert links_of_run[place] == expected
            callers.update({call["id"]: place for call in message.get("tool_calls") or ()})
    assert explicit == sum(row["source"] == "tool_call_id" for row in rows) == 1_164
