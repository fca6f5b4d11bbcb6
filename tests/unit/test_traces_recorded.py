"""The recorded traces of real agents: every step is read, in both the common view and the originals."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable

import pytest

from holdfast.ops.traces import Malformed, Step, find_traces, read_path, step_event
from tests.unit.traces_samples import recorded

pytestmark = pytest.mark.traces


def read_steps(*parts: str) -> list[Step]:
    path = recorded().joinpath(*parts)
    steps: list[Step] = []
    for record in read_path(path):
        assert not isinstance(record, Malformed), record
        steps.append(record)
    return steps


def by_session(steps: Iterable[Step]) -> dict[str, list[Step]]:
    sessions: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        sessions[step.session_id].append(step)
    return sessions


def test_every_step_of_the_common_view_is_read() -> None:
    steps = read_steps("steps")

    assert len(steps) == 26_412
    assert len(by_session(steps)) == 200 + 277
    assert Counter(step.parent_source for step in steps) == {"order": 24_771, "tool_call_id": 1_164, "none": 477}
    assert sum(step.timestamp_ms is not None for step in steps) == 10_275
    assert len({step_event("default", step).id for step in steps}) == 26_412
    assert len({(step.kind, step.body) for step in steps}) == 22_217


def test_sessions_of_the_common_view_are_whole_and_linked() -> None:
    for steps in by_session(read_steps("steps")).values():
        assert [step.ordinal for step in steps] == list(range(len(steps)))
        assert [step.depth for step in steps] == list(range(len(steps)))
        assert {step.root_source_id for step in steps} == {steps[0].source_id}
        assert [step.parent_source_id for step in steps[1:]] == [step.source_id for step in steps[:-1]]


def test_bodies_of_the_common_view_lose_nothing() -> None:
    """What the event says and what the body holds make up the line again."""
    import gzip

    path = recorded() / "steps" / "tau-bench-airline.steps.jsonl.gz"
    steps = read_steps("steps", path.name)
    with gzip.open(path) as lines:
        for line, step in zip(lines, steps, strict=True):
            record = json.loads(line)
            if step.parent_ordinal is not None:
                assert (record.pop("caused_by"), record.pop("caused_by_source")) == (
                    step.parent_ordinal,
                    step.parent_source,
                )
            assert (record.pop("session_id"), record.pop("seq")) == (step.session_id, step.ordinal)
            assert json.loads(step.body) == record


def test_tau_bench_originals_agree_with_the_common_view() -> None:
    original = read_steps("tau-bench-airline")
    view = read_steps("steps", "tau-bench-airline.steps.jsonl.gz")

    assert len(original) == 5_308
    assert len(by_session(original)) == 200
    assert sum(step.parent_source == "tool_call_id" for step in original) == 1_164
    for attribute in ("session_id", "ordinal", "kind", "parent_ordinal", "parent_source", "depth"):
        assert [getattr(step, attribute) for step in original] == [getattr(step, attribute) for step in view]


@pytest.mark.slow
def test_mini_swe_agent_originals_agree_with_the_common_view() -> None:
    original = by_session(read_steps("mini-swe-agent-gemini3"))
    view = by_session(read_steps("steps", "mini-swe-agent.steps.jsonl.gz"))

    assert sum(map(len, original.values())) == 21_104
    assert original.keys() == view.keys()
    assert len(original) == 277
    for session, steps in original.items():
        for attribute in ("ordinal", "kind", "agent_id", "timestamp_ms", "parent_ordinal"):
            mine = [getattr(step, attribute) for step in steps]
            theirs = [getattr(step, attribute) for step in view[session]]
            if attribute == "agent_id":
                theirs = ["mini-swe-agent" if agent == "assistant" else agent for agent in theirs]
            assert mine == theirs, (session, attribute)
    assert any(b'"reasoning' in step.body for steps in original.values() for step in steps)


def test_nothing_beside_the_traces_is_taken_for_one() -> None:
    found = find_traces([recorded()])

    assert Counter(file.format for file in found.files) == {"mini-swe-agent": 277, "steps": 2, "tau-bench": 1}
    names = {path.name for path in found.skipped}
    assert {"stats.json", "MANIFEST.sha256", "outcomes.csv", "tau-bench-airline.sessions.jsonl.gz"} <= names


def test_parsing_the_common_view_is_fast() -> None:
    """26,412 steps take 0.4 s on two cores; the bound is loose for machines that are busy."""
    started = time.monotonic()
    count = len(read_steps("steps"))

    assert count / (time.monotonic() - started) > 26_412 / 6
