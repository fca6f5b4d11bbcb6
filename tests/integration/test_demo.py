"""``holdfast demo``: the agents hand on references only, and what is shown is true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import CommandLine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_the_agents_hand_on_references_and_what_is_shown_is_kept(tmp_path: Path) -> None:
    holdfast = CommandLine(tmp_path / "data")
    kept = str(tmp_path / "kept")
    text = holdfast("demo", "--data", kept).out
    for title in (
        "Three agents",
        "Equal contexts",
        "in bytes",
        "Hot, then archived, then cold",
        "in SQL",
        "comes from",
    ):
        assert title in text
    assert text.count("identical") == 6
    assert "differ" not in text

    query = """
        SELECT name, count(*) AS events, count(DISTINCT context_ref) AS contexts, count(DISTINCT agent_id) AS agents,
            max(length(data)) AS longest, max(event_depth) AS depth
        FROM events GROUP BY name ORDER BY depth
    """
    listed, found, measured, reviewed = holdfast("sql", "--data", kept, query, "--json").lines
    modules = found["events"]
    assert modules > 100
    assert f"{modules} modules" in text
    assert [line["name"] for line in (listed, found, measured, reviewed)] == [
        "library:listed", "module:found", "module:measured", "module:reviewed",
    ]  # fmt: skip
    assert (listed["events"], measured["events"], reviewed["events"]) == (1, modules, modules)
    assert [line["depth"] for line in (listed, found, measured, reviewed)] == [0, 1, 2, 3]
    # No body travels in an event, and the reviewer's rules are stored once.
    assert max(line["longest"] for line in (listed, found, measured, reviewed)) < 200
    assert holdfast(
        "sql", "--data", kept, "SELECT count(*) AS n FROM contexts WHERE kind = 'rules'", "--json"
    ).json == {"n": 1}
    assert holdfast("verify", "--data", kept, "--json").json["ok"] is True
    assert not holdfast.data.exists()


def test_the_demo_of_traces_shows_the_same_figures(tmp_path: Path) -> None:
    holdfast = CommandLine(tmp_path / "data", TMPDIR=str(tmp_path))
    path = tmp_path / "few.steps.jsonl"
    lines = [
        {"session_id": f"s{session}", "seq": seq, "role": "user", "content": f"step {seq} " * 50}
        for session in range(3)
        for seq in range(10)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    story = holdfast("demo", "--traces", str(path), "--json").json
    assert story["imported"]["steps"] == 30
    assert story["imported"]["distinct_contexts"] == 10
    assert story["bytes"]["embedded"] > story["bytes"]["compressed"]
    assert [(line["tiers"], line["same"]) for line in story["resolved"]] == [(["hot", "lake"], True)] * 6
    assert (story["archived"]["purged"], story["archived"]["left"]) == (10, 0)
    assert [step["event"]["event_depth"] for step in story["lineage"]] == list(range(10))
    assert "Recorded traces" in holdfast("demo", "--traces", str(path)).out
    # Its own directory is gone, and the one of the surroundings was not touched.
    assert not list(tmp_path.glob("holdfast-demo-*"))
    assert not holdfast.data.exists()
