"""Identity of steps: the same wherever a file lies, different for different content, one content an id."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdfast.ops.traces import Format, Step, read_path, step_event
from holdfast.ops.traces.chain import SessionChain
from holdfast.schemas.errors import InvalidFieldError, InvalidNameError
from tests.unit.traces_samples import (
    chat,
    claude_code_lines,
    jsonl,
    packed,
    read,
    samples,
    step_lines,
    steps_of,
    tau_bench_runs,
)

SAMPLES = [pytest.param(*sample, id=f"{number}-{sample[0]}") for number, sample in enumerate(samples())]


@pytest.mark.parametrize(("source_format", "raw", "count"), SAMPLES)
def test_a_file_gives_the_same_steps_at_another_path_and_compressed(
    source_format: Format, raw: bytes, count: int, tmp_path: Path
) -> None:
    suffix = "jsonl" if raw.count(b"}\n{") else "json"
    plain = tmp_path / f"a.{suffix}"
    moved = tmp_path / "elsewhere" / f"other name.{suffix}.gz"
    moved.parent.mkdir()
    plain.write_bytes(raw)
    moved.write_bytes(packed(raw))

    first = list(read_path(plain))

    assert len(first) == count
    assert list(read_path(moved)) == first
    assert list(read_path(plain, source_format)) == first


@pytest.mark.parametrize(("source_format", "raw", "count"), SAMPLES)
def test_event_ids_are_distinct_and_differ_by_namespace(source_format: Format, raw: bytes, count: int) -> None:
    steps = steps_of(read(raw, source_format))
    ids = {step_event("default", step).id for step in steps}

    assert len(ids) == count
    if source_format != "claude-code":
        assert ids.isdisjoint(step_event("other", step).id for step in steps)


def test_a_file_that_has_grown_adds_its_new_steps_only() -> None:
    for source_format, lines in (("steps", step_lines(1, 5)), ("claude-code", claude_code_lines(3))):
        short, long = (steps_of(read(jsonl(part), source_format)) for part in (lines[:8], lines))  # type: ignore[arg-type]  # a Literal in a tuple widens to str
        assert long[: len(short)] == short


def test_two_runs_of_one_task_and_trial_have_no_id_in_common() -> None:
    runs = tau_bench_runs(2, 2)
    other = json.loads(json.dumps(runs[0]))
    other["traj"][-1]["content"] += " Goodbye."

    first, second = (steps_of(read(json.dumps([run]).encode(), "tau-bench")) for run in (runs[0], other))

    assert {step.session_id for step in first} == {step.session_id for step in second}
    assert {step.source_id for step in first}.isdisjoint(step.source_id for step in second)


def test_an_id_never_names_two_contents() -> None:
    """Sessions that share an id and begin alike part where they differ, and stay apart where they are alike again."""
    seen: dict[str, Step] = {}
    for seed in range(3):
        messages = chat(3)
        messages[2]["content"] = f"differs {seed}"
        lines = [{"session_id": "s", "seq": seq, **message} for seq, message in enumerate(messages)]
        for step in steps_of(read(jsonl(lines), "steps")):
            assert seen.setdefault(step.source_id, step) == step
    assert len(seen) == 2 + 3 * (len(chat(3)) - 2)


@pytest.mark.parametrize(
    "change",
    [
        {"ordinal": 8}, {"agent_id": "b"}, {"kind": "l"}, {"body": b"1"}, {"timestamp_ms": 0},
        {"parent": 0, "parent_source": "stated"},
    ],
    ids=str,
)  # fmt: skip
def test_everything_the_event_says_is_part_of_its_identity(change: dict[str, object]) -> None:
    def last(more: dict[str, object]) -> Step:
        chain = SessionChain("steps", "s")
        for body in (b"x", b"y"):
            chain.add(agent_id="a", kind="k", body=body)
        fields: dict[str, object] = {"agent_id": "a", "kind": "k", "body": b"0", "ordinal": 7} | more
        return chain.add(**fields)  # type: ignore[arg-type]  # the fields are the test's parameters

    assert last(change).source_id != last({}).source_id
    assert last({}) == last({})


def test_format_session_and_salt_are_part_of_identity() -> None:
    chains = [
        SessionChain("steps", "s"),
        SessionChain("tau-bench", "s"),
        SessionChain("steps", "t"),
        SessionChain("steps", "s", correlation_id="c"),
        SessionChain("steps", "s", salt="1"),
    ]
    assert len({chain.add(agent_id="a", kind="k", body=b"0").source_id for chain in chains}) == len(chains)


def test_a_step_that_is_refused_leaves_no_trace_in_its_session() -> None:
    chain = SessionChain("steps", "s")
    with pytest.raises(InvalidNameError):
        chain.add(agent_id="", kind="k", body=b"0")
    with pytest.raises(InvalidNameError):
        chain.add(agent_id="a", kind="no kind", body=b"0")
    with pytest.raises(InvalidFieldError):
        chain.add(agent_id="a", kind="k", body=b"[" * 65 + b"]" * 65)

    assert len(chain) == 0
    assert chain.add(agent_id="a", kind="k", body=b"0").parent_source == "none"


def test_ids_are_pinned() -> None:
    """Ids of an earlier import must come out again for ever: a second import after an upgrade adds nothing."""
    [step] = steps_of(read(b'{"session_id":"s","seq":0,"role":"user","content":"hello"}', "steps"))

    assert step.source_id == "steps:6815948b863e5703ffc4f0589518ed03"
    assert step_event("default", step).id == "df3e0463-4d92-8527-9f14-7cb44fa1100c"
