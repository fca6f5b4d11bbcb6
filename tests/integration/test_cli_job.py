"""``holdfast job`` against a system that runs: the contracts of its ``--json``, exit statuses, what a person reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path

import pytest

from holdfast.client import StepResultManager, connect
from holdfast.streams.connection import open_connection
from holdfast.streams.wire import KEYS_STREAM, key_subject
from tests.command_line import CommandLine, InProcess, Service, in_process

STEP_MEMBERS = {
    "job_id", "root_job_id", "step_name", "step_number", "execution_context_id", "timestamp", "version",
    "result", "input", "context_keys_used", "compressed", "relative_step_number", "metadata",
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs") / "data"


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
    with in_process(directory, monkeypatch, capfdbinary, HOLDFAST_NAMESPACE=namespace) as commands:
        yield commands


@pytest.fixture
def pipeline(running: Service, namespace: str) -> Callable[[Callable[[StepResultManager], Awaitable[object]]], None]:
    """Runs what an agent does with a step result manager."""

    def run(use: Callable[[StepResultManager], Awaitable[object]]) -> None:
        async def connected() -> None:
            async with connect(running.ready["nats_url"], namespace) as hf:
                await use(StepResultManager(hf))

        asyncio.run(connected())

    return run


async def two_runs(manager: StepResultManager) -> None:
    await manager.save_step_result(
        "job-1", 1, "seo_keywords", {"main": "tea"}, input_snapshot={"topic": "TEA"}, context_keys_used=["topic"]
    )
    await manager.save_step_result("job-1", 2, "brief", {"draft": 1})
    await manager.save_step_result("job-1", 2, "brief", {"draft": 2})
    await manager.save_step_result("job-2", 3, "article", "Tea is green.", root_job_id="job-1")


Run = Callable[[Callable[[StepResultManager], Awaitable[object]]], None]


def test_nothing_is_told_when_there_is_nothing(holdfast: InProcess) -> None:
    outcome = holdfast("job", "list")
    assert (outcome.out, outcome.err) == ("", "no jobs\n")
    assert holdfast("job", "list", "--json").lines == []
    for command in (("show", "job-1"), ("history", "job-1")):
        error = holdfast("job", *command, "--json", status=4).error
        assert error["code"] == "not_found"
        assert "'job-1'" in error["message"]
        assert "job list" in error["hint"]
    assert "no step 'brief'" in holdfast("job", "step", "job-1", "brief", status=4).err


def test_jobs_are_listed_with_their_runs(holdfast: InProcess, pipeline: Run) -> None:
    pipeline(two_runs)
    root, resumed = holdfast("job", "list", "--json").lines
    assert (root["job_id"], resumed["job_id"], resumed["root_job_id"]) == ("job-1", "job-2", "job-1")
    assert [(c["id"], c["job_id"]) for c in root["execution_contexts"]] == [("0", "job-1"), ("1", "job-2")]
    assert set(root["execution_contexts"][0]) == {"id", "job_id", "started_at"}
    assert set(resumed) == {"job_id", "root_job_id", "created_at"}
    table = holdfast("job").out
    assert "execution contexts" in table
    assert "job-2" in table


def test_A10_a_job_is_shown_by_execution_context(holdfast: InProcess, pipeline: Run) -> None:
    pipeline(two_runs)
    shown = holdfast("job", "show", "job-1", "--json").json
    assert holdfast("job", "show", "job-2", "--json").json == shown
    assert shown["job_id"] == "job-1"
    found = {
        context["id"]: [(step["step_number"], step["step_name"], step["version"]) for step in context["steps"]]
        for context in shown["execution_contexts"]
    }
    assert found == {"0": [(1, "seo_keywords", 1), (2, "brief", 2)], "1": [(3, "article", 1)]}
    assert set(shown["execution_contexts"][0]["steps"][0]) == STEP_MEMBERS
    person = holdfast("job", "show", "job-1").out
    assert person.index("context_0") < person.index("seo_keywords") < person.index("context_1")
    assert person.index("context_1") < person.index("article")


def test_steps_without_their_job_are_shown_too(holdfast: InProcess, pipeline: Run) -> None:
    pipeline(two_runs)
    holdfast("rm", "jobs.job-1")
    shown = holdfast("job", "show", "job-1", "--json").json
    assert [(c["id"], c["job_id"]) for c in shown["execution_contexts"]] == [("0", "job-1"), ("1", "job-2")]


def test_A01_history_lists_superseded_results_too(holdfast: InProcess, pipeline: Run) -> None:
    pipeline(two_runs)
    lines = holdfast("job", "history", "job-1", "--json").lines
    assert [(line["step_name"], line["version"]) for line in lines] == [
        ("seo_keywords", 1), ("brief", 1), ("brief", 2), ("article", 1),
    ]  # fmt: skip
    assert set(lines[0]) == STEP_MEMBERS
    briefs = holdfast("job", "history", "job-1", "--step", "brief", "--json").lines
    assert [line["version"] for line in briefs] == [1, 2]
    later = holdfast("job", "history", "job-1", "--context", "context_1", "--json").lines
    assert [line["step_name"] for line in later] == ["article"]
    assert holdfast("job", "history", "job-1", "--step", "none", "--json", status=4).error["field"] == "job"
    assert holdfast("job", "history", "job-1").out.count("brief") == 2
    assert holdfast("resolve", briefs[0]["result"], "--json").json["body"] == {"draft": 1}


def test_A28_a_step_is_shown_with_what_it_used(holdfast: InProcess, pipeline: Run) -> None:
    pipeline(two_runs)
    audit = holdfast("job", "step", "job-1", "seo_keywords", "--json").json
    assert (audit["used"], audit["input_snapshot"], audit["result"]) == (
        {"topic": "TEA"}, {"topic": "TEA"}, {"main": "tea"},
    )  # fmt: skip
    assert audit["result_ref"].startswith("ctx_step_")
    person = holdfast("job", "step", "job-1", "seo_keywords").out
    assert person.index("used    topic") < person.index("TEA") < person.index('"tea"')
    assert holdfast("job", "step", "job-1", "brief", "--json").json["result"] == {"draft": 2}
    assert holdfast("job", "step", "job-1", "brief", "--version", "1", "--json").json["result"] == {"draft": 1}
    assert holdfast("job", "step", "job-2", "article", "--raw").raw == b"Tea is green."
    error = holdfast("job", "step", "job-1", "brief", "--context", "1", "--json", status=4).error
    assert "execution context 1" in error["message"]
    assert "no version 7" in holdfast("job", "step", "job-1", "brief", "--version", "7", status=4).err
    assert holdfast("job", "step", "job-1", "brief", "--context", "first", "--json", status=2).error["field"] == (
        "execution_context_id"
    )


def test_bytes_are_shown_as_bytes(holdfast: InProcess, pipeline: Run) -> None:
    pipeline(lambda manager: manager.save_step_result("job-1", 1, "image", b"\x89PNG\x00"))
    assert holdfast("job", "step", "job-1", "image", "--json").json["result_base64"] == "iVBORwA="
    assert holdfast("job", "step", "job-1", "image", "--raw").raw == b"\x89PNG\x00"


async def forget_superseded(url: str, namespace: str) -> None:
    """What the janitor does with superseded versions, once they are archived and old enough."""
    subject = key_subject(namespace, "job.job-1.context_0.brief")
    async with open_connection(url) as connection:
        purged = await connection.api(f"STREAM.PURGE.{KEYS_STREAM}", {"filter": subject, "keep": 1})
    assert purged["purged"] == 1


def test_A01_A27_everything_is_there_after_it_has_left_the_hot_tier(
    holdfast: InProcess, running: Service, namespace: str, pipeline: Run
) -> None:
    pipeline(two_runs)
    before = [
        json.loads(holdfast("job", *command, "--json").raw)
        for command in (("show", "job-1"), ("step", "job-1", "brief", "--version", "1"), ("step", "job-1", "article"))
    ]
    history = holdfast("job", "history", "job-1", "--json").lines
    holdfast("flush")
    asyncio.run(forget_superseded(running.ready["nats_url"], namespace))
    assert holdfast("evict", "--older-than", "0s", "--json").json["left"] == 0
    after = [
        json.loads(holdfast("job", *command, "--json").raw)
        for command in (("show", "job-1"), ("step", "job-1", "brief", "--version", "1"), ("step", "job-1", "article"))
    ]
    assert after == before
    assert holdfast("job", "history", "job-1", "--json").lines == history
    # And a run that goes on from there.
    pipeline(lambda manager: manager.save_step_result("job-3", 4, "review", {"ok": True}, root_job_id="job-2"))
    assert [c["id"] for c in holdfast("job", "show", "job-1", "--json").json["execution_contexts"]] == ["0", "1", "2"]
