"""``holdfast demo``: the agents hand on references only, and what is shown is true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import CommandLine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_the_demo_of_the_agents_shows_every_part(tmp_path: Path) -> None:
    holdfast = CommandLine(tmp_path / "data", TMPDIR=str(tmp_path))
    text = holdfast("demo").out
    for title in (
        "Three agents",
        "Equal contexts",
        "in bytes",
        "Hot, then archived, then cold",
        "in SQL",
        "comes from",
    ):
        assert title in text
    assert "module:reviewed" in text
    assert "identical" in text
    assert "differ" not in text
    # Its own directory is gone, and the one of the surroundings was not touched.
    assert not list(tmp_path.glob("holdfast-demo-*"))
    assert not holdfast.data.exists()


def test_the_demo_on_a_data_directory_keeps_what_it_stored(tmp_path: Path) -> None:
    holdfast = CommandLine(tmp_path / "data")
    kept = tmp_path / "kept"
    story = holdfast("demo", "--data", str(kept), "--json").json
    modules = story["modules"]
    assert modules > 100
    assert story["storage"]["events"] == 3 * modules + 1
    assert [(line["tiers"], line["same"]) for line in story["resolved"]] == [(["hot", "lake"], True)] * 6
    assert story["archived"]["left"] == 0
    sizes = story["bytes"]
    assert sizes["lineage_embedded"] > sizes["embedded"] > sizes["archived"]
    rules = next(line for line in story["deduplication"] if line["kind"] == "rules")
    assert (rules["mentions"], rules["distinct"]) == (modules, 1)
    names = [step["event"]["name"] for step in story["lineage"]]
    assert names == ["library:listed", "module:found", "module:measured", "module:reviewed"]
    # No body travels in an event.
    longest = "SELECT max(length(data)) AS longest FROM events"
    assert holdfast("sql", "--data", str(kept), longest, "--json").json["longest"] < 200
    assert holdfast("verify", "--data", str(kept), "--json").json["ok"] is True


def test_the_demo_of_traces_shows_the_same_figures(tmp_path: Path) -> None:
    holdfast = CommandLine(tmp_path / "data")
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
    assert all(line["same"] for line in story["resolved"])
    assert "Recorded traces" in holdfast("demo", "--traces", str(path)).out
