"""Commands on snapshots, against a system that runs: their ``--json``, exit statuses, what a person reads."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.command_line import CommandLine, InProcess, Service, environment, in_process

AGENTS = {"agent_1": {"profile": "analyst", "spawned": True, "vars": {"role": "data_analyzer"}}}
PAYLOAD = json.dumps({"pattern_name": "analysis", "agents": AGENTS, "vars": {"target": "dataset.csv"}})
RUN = '{"framework": "dspy", "config": {"trials": 3}}'


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snapshots") / "data"


@pytest.fixture(scope="module")
def running(directory: Path) -> Generator[Service]:
    # Archiving happens when a test asks for it, and then only.
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


def make_cold(holdfast: InProcess) -> None:
    holdfast("flush")
    holdfast("evict", "--older-than", "0s")


def test_B44_B45_B46_an_orchestration_is_captured_listed_and_recovered(holdfast: InProcess) -> None:
    captured = holdfast("orchestration", "capture", "orch_1", "running", "--payload", PAYLOAD, "--json").json
    ref = captured["context_ref"]
    assert captured == {"orchestration_id": "orch_1", "state": "running", "context_ref": ref}
    ended = holdfast(
        "orchestration", "capture", "orch_1", "terminated", "-p", "-", "--reason", "completed", stdin=PAYLOAD.encode()
    ).out.strip()  # fmt: skip
    make_cold(holdfast)
    recovered = holdfast("orchestration", "recover", ref, "--json").json
    assert recovered == {
        "context_ref": ref,
        "snapshot": {
            "orchestration_id": "orch_1", "pattern_name": "analysis", "state": "running", "agents": AGENTS,
            "routing_rules": [], "vars": {"target": "dataset.csv"},
        },
    }  # fmt: skip
    lines = holdfast("orchestration", "history", "orch_1", "--json").lines
    assert [(line["state"], line["context_ref"]) for line in lines] == [
        ("running", ref), ("terminated", ended), ("recovered", ref),
    ]  # fmt: skip
    assert [line["reason"] for line in lines] == [None, "completed", None]
    (event,) = holdfast("query", "--name", "orchestration:recovered", "--json").lines
    assert (event["parent_event_id"], event["agent_id"]) == (lines[0]["event_id"], "cli")


def test_B45_a_person_reads_the_snapshot(holdfast: InProcess) -> None:
    ref = holdfast("orchestration", "capture", "orch_1", "running", "--payload", PAYLOAD).out.strip()
    text = holdfast("orchestration", "recover", ref).out
    assert text.splitlines()[0] == "orch_1  running  analysis"
    assert 'agent_1  analyst  yes      {"role":"data_analyzer"}' in text
    assert 'vars           {"target":"dataset.csv"}' in text
    table = holdfast("orchestration", "history", "orch_1").out.splitlines()
    assert table[0].split() == ["captured", "state", "reason", "by", "snapshot"]
    assert [line.split()[3] for line in table[1:]] == ["running", "recovered"]


def test_B45_what_cannot_be_recovered_is_told(holdfast: InProcess) -> None:
    plan = holdfast("put", "{}", "--kind", "plan").out.strip()
    error = holdfast("orchestration", "recover", plan, "--json", status=2).error
    assert (error["code"], error["field"]) == ("invalid_ref", "context_ref")
    assert holdfast("orchestration", "recover", "ctx_orchestration_state_" + "a" * 32, status=4).err.startswith("error")
    assert holdfast("orchestration", "history", "none", "--json", status=4).error["code"] == "not_found"
    for payload in ("[1]", "{", '{"agents": 1}'):
        holdfast("orchestration", "capture", "orch_1", "running", "--payload", payload, status=2)
    holdfast("orchestration", "capture", "orch_1", "recovered", status=2)
    assert holdfast("query", "--json").lines == []


def test_B47_B48_an_optimization_is_captured_and_looked_into(holdfast: InProcess) -> None:
    holdfast("optimization", "capture", "opt_1", "initializing", RUN)
    holdfast("optimization", "capture", "opt_1", "optimizing", "-", stdin=RUN.encode())
    result = '{"result": {"best_score": 0.82}}'
    last = holdfast("optimization", "capture", "opt_1", "completed", RUN, "-x", result, "--json").json
    hot = holdfast("optimization", "introspect", "opt_1", "--json").json
    make_cold(holdfast)
    found = holdfast("optimization", "introspect", "opt_1", "--json").json
    assert found == hot
    assert (found["status"], found["framework"], found["total"]) == ("completed", "dspy", 3)
    assert found["duration_s"] == pytest.approx(sum(state["duration_s"] or 0 for state in found["states"]))
    assert [state["state"] for state in found["states"]] == ["initializing", "optimizing", "completed"]
    assert found["states"][2]["context_ref"] == last["context_ref"]
    assert {"op": "add", "path": "/result", "value": {"best_score": 0.82}} in found["states"][2]["diff"]
    text = holdfast("optimization", "introspect", "opt_1", "--changes").out
    assert text.startswith("opt_1  dspy  completed  after ")
    assert "optimizing → completed" in text
    assert "~ /result" in text or "/result" in text
    assert "0.82" in text


def test_B49_runs_are_compared(holdfast: InProcess) -> None:
    for number, score in enumerate((0.5, 0.9, 0.7)):
        run = json.dumps({"framework": "dspy", "config": {"trials": number}})
        holdfast("optimization", "capture", f"opt_{number}", "optimizing", run)
        result = json.dumps({"result": {"score": score}})
        holdfast("optimization", "capture", f"opt_{number}", "completed", run, "--extra", result)
    holdfast("optimization", "capture", "opt_x", "failed")
    lines = holdfast("optimization", "analyze", "--json").lines
    make_cold(holdfast)
    assert holdfast("optimization", "analyze", "--json").lines == lines
    dspy, unnamed = lines
    assert (dspy["framework"], dspy["runs"], dspy["completed"], dspy["scores"]["median"]) == ("dspy", 3, 3, 0.7)
    assert (dspy["best"]["optimization_id"], dspy["best"]["config"]) == ("opt_1", {"trials": 1})
    assert (unnamed["framework"], unnamed["failed"], unnamed["best"]) == (None, 1, None)
    assert holdfast("optimization", "analyze", "-f", "dspy", "--best", "lowest", "--json").json["best"]["score"] == 0.5
    assert holdfast("optimization", "analyze", "--until", "1h", "--json").lines == []
    text = holdfast("optimization", "analyze").out
    assert text.split("\n")[0].split() == [
        "framework", "runs", "completed", "failed", "running", "min", "median", "p95", "max", "best", "by", "run",
    ]  # fmt: skip
    assert 'best settings of dspy: {"trials":1}' in text
    assert holdfast("optimization", "introspect", "none", "--json", status=4).error["code"] == "not_found"
    holdfast("optimization", "capture", "opt_1", "x", "--extra", '{"data": 1}', status=2)
    holdfast("optimization", "capture", "opt_1", "x", "-", "--extra", "-", status=2)


def test_both_groups_explain_themselves(holdfast: InProcess) -> None:
    assert "recover" in holdfast("orchestration").out
    assert "introspect" in holdfast("optimization").out


def test_the_page_on_snapshots_prints_what_it_says(running: Service) -> None:
    page = (Path(__file__).parents[2] / "docs" / "snapshots.md").read_text()
    [(example, printed)] = re.findall(
        r"^```python\n(.*?)^```\n\nIt prints:\n\n```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE
    )
    done = subprocess.run(
        [sys.executable, "-c", example],
        env=environment(HOLDFAST_NATS_URL=running.ready["nats_url"]),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == printed, done.stderr
