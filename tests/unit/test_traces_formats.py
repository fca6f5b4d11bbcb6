"""Each trace format on small samples: kinds, causes, times, sessions, bodies."""

from __future__ import annotations

import json

import msgspec
import pytest

from holdfast.ops.traces import Format, Step, step_event
from holdfast.schemas.names import check_agent, check_event_name, check_kind
from tests.unit.traces_samples import (
    SESSION,
    chat,
    claude_code_line,
    claude_code_lines,
    claude_code_uuid,
    jsonl,
    malformed_of,
    mini_swe_agent_run,
    read,
    samples,
    step_lines,
    steps_of,
    tau_bench_runs,
)

SAMPLES = [pytest.param(*sample, id=f"{number}-{sample[0]}") for number, sample in enumerate(samples())]


@pytest.mark.parametrize(("source_format", "raw", "count"), SAMPLES)
def test_every_step_of_a_well_formed_file_is_read(source_format: Format, raw: bytes, count: int) -> None:
    records = read(raw, source_format)

    assert malformed_of(records) == []
    assert len(records) == count


@pytest.mark.parametrize(("source_format", "raw", "count"), SAMPLES)
def test_no_parent_dangles_and_depth_counts_the_way_to_the_root(source_format: Format, raw: bytes, count: int) -> None:
    seen: dict[str, Step] = {}
    for step in steps_of(read(raw, source_format)):
        event = step_event("default", step)
        if step.parent_source_id is None:
            assert (step.parent_source, step.depth, step.parent_ordinal) == ("none", 0, None)
            assert event.root_event_id == event.id
        else:
            parent = seen[step.parent_source_id]
            assert parent.session_id == step.session_id
            assert parent.ordinal == step.parent_ordinal
            assert step.depth == parent.depth + 1
            assert step.root_source_id == parent.root_source_id
            assert event.parent_event_id == step_event("default", parent).id
        seen[step.source_id] = step
    assert len(seen) == count


@pytest.mark.parametrize(("source_format", "raw", "count"), SAMPLES)
def test_names_are_within_their_limits_and_bodies_are_sorted_json(
    source_format: Format, raw: bytes, count: int
) -> None:
    for step in steps_of(read(raw, source_format)):
        check_kind(step.kind)
        check_agent(step.agent_id)
        check_event_name(step.name)
        assert step.name == f"step:{step.kind}"
        assert msgspec.json.encode(msgspec.json.decode(step.body), order="sorted") == step.body


def test_steps_leave_to_the_event_what_belongs_there() -> None:
    line = {
        "seq": 0, "session_id": "s", "ts": "2026-01-31T10:30:00.125+01:00", "role": "user", "content": "b", "a": 1
    }  # fmt: skip
    [step] = steps_of(read(jsonl([line]), "steps"))

    assert step.body == b'{"a":1,"content":"b","role":"user"}'
    assert step.timestamp_ms == 1_769_851_800_125
    assert (step.session_id, step.correlation_id, step.ordinal, step.agent_id) == ("s", "s", 0, "user")


def test_steps_take_kind_and_author_from_kind_role_and_tool_calls() -> None:
    lines = [
        {"session_id": "s", "seq": 0, "role": "system"},
        {"session_id": "s", "seq": 1, "role": "assistant", "tool_calls": [{"id": "c"}]},
        {"session_id": "s", "seq": 2, "role": "tool", "tool_call_id": "c"},
        {"session_id": "s", "seq": 3, "role": "user", "kind": "tool_result"},
        {"session_id": "s", "seq": 4, "role": "assistant", "kind": "thought"},
    ]
    assert [(step.kind, step.agent_id) for step in steps_of(read(jsonl(lines), "steps"))] == [
        ("system", "system"),
        ("tool_call", "assistant"),
        ("tool_result", "tool"),
        ("tool_result", "tool"),
        ("thought", "assistant"),
    ]


def test_steps_follow_the_stated_cause_and_else_the_step_before() -> None:
    lines = [{"session_id": "s", "seq": seq, "role": "user", "content": str(seq)} for seq in range(5)]
    lines[2] |= {"caused_by": 0, "caused_by_source": "tool_call_id"}
    lines[3] |= {"caused_by": 1}
    lines[4] |= {"caused_by": 77, "caused_by_source": "tool_call_id"}

    steps = steps_of(read(jsonl(lines), "steps"))

    assert [step.parent_ordinal for step in steps] == [None, 0, 0, 1, 3]
    assert [step.parent_source for step in steps] == ["none", "order", "tool_call_id", "stated", "order"]
    assert [step.depth for step in steps] == [0, 1, 1, 2, 3]


def test_steps_of_mixed_sessions_and_with_gaps_keep_their_numbers() -> None:
    lines = step_lines(2, 2)
    mixed = [line for pair in zip(lines[:9], lines[9:], strict=True) for line in pair]
    del mixed[6]

    records = read(jsonl(mixed), "steps")

    assert malformed_of(records) == []
    first = [step for step in steps_of(records) if step.session_id == "session-0"]
    assert [step.ordinal for step in first] == [0, 1, 2, 4, 5, 6, 7, 8]
    assert [step.parent_ordinal for step in first] == [None, 0, 1, 2, 4, 5, 6, 7]


def test_a_steps_file_repeated_within_itself_gives_the_same_events() -> None:
    raw = jsonl(step_lines(2, 2))

    once, twice = steps_of(read(raw, "steps")), steps_of(read(raw + raw, "steps"))

    assert len(twice) == 2 * len(once)
    assert {step.source_id for step in twice} == {step.source_id for step in once}


def test_tau_bench_names_sessions_and_links_results_to_their_calls() -> None:
    steps = steps_of(read(json.dumps(tau_bench_runs(3, 2)).encode(), "tau-bench"))

    assert sorted({step.session_id for step in steps}) == [
        "airline-task000-trial0",
        "airline-task000-trial1",
        "airline-task001-trial0",
    ]
    results = [step for step in steps if step.kind == "tool_result"]
    assert len(results) == 6
    assert {step.parent_source for step in results} == {"tool_call_id"}
    assert {step.agent_id for step in steps} == {"system", "user", "tool", "tau-bench-agent"}
    assert {step.timestamp_ms for step in steps} == {None}


def test_results_of_parallel_calls_follow_from_the_one_message_that_made_them() -> None:
    calls = [{"id": "a", "type": "function"}, {"id": "b", "type": "function"}]
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "never made", "content": "0"},
    ]
    steps = steps_of(read(json.dumps(messages).encode(), "openai-messages"))

    assert [step.parent_ordinal for step in steps] == [None, 0, 1, 1, 3]
    assert steps[-1].parent_source == "order"


def test_mini_swe_agent_keeps_the_whole_reply_and_takes_its_time() -> None:
    run = mini_swe_agent_run(1)
    steps = steps_of(read(json.dumps(run).encode(), "mini-swe-agent"))

    assert [step.kind for step in steps] == ["system", "user", "tool_call", "tool_result"]
    assert [step.agent_id for step in steps] == ["system", "user", "mini-swe-agent", "tool"]
    assert [step.timestamp_ms for step in steps] == [None, None, 1_763_511_061_000, None]
    assert json.loads(steps[2].body) == run["messages"][2]
    assert {step.session_id for step in steps} == {"made__up-1"}


def test_openai_messages_take_the_session_that_is_stated() -> None:
    lines = [{"role": "user", "content": str(number), "session_id": f"s{number % 2}"} for number in range(4)]
    by_line = steps_of(read(jsonl(lines), "openai-messages"))
    document = {"id": "conv-1", "messages": chat(1)}
    by_object = steps_of(read(json.dumps(document).encode(), "openai-messages"))

    assert [(step.session_id, step.ordinal) for step in by_line] == [("s0", 0), ("s1", 0), ("s0", 1), ("s1", 1)]
    assert b"session_id" not in by_line[0].body
    assert {step.session_id for step in by_object} == {"conv-1"}


def test_openai_messages_without_a_session_are_named_by_their_content() -> None:
    first, again, other = (steps_of(read(json.dumps(chat(1, seed)).encode(), "openai-messages")) for seed in (0, 0, 1))
    assert first == again
    assert {step.session_id for step in first}.isdisjoint(step.session_id for step in other)


def test_openai_messages_name_the_assistant_that_is_named() -> None:
    lines = [{"role": "assistant", "name": "planner", "content": "x"}, {"role": "assistant", "content": "y"}]

    assert [step.agent_id for step in steps_of(read(jsonl(lines), "openai-messages"))] == ["planner", "assistant"]


def test_claude_code_keeps_uuids_as_event_ids_and_passes_over_bookkeeping() -> None:
    steps = steps_of(read(jsonl(claude_code_lines(1)), "claude-code"))

    assert [step_event("default", step).id for step in steps] == [claude_code_uuid(number) for number in range(6)]
    assert [step_event("default", step).source_id for step in steps] == [None] * 6
    assert [step.kind for step in steps] == ["user", "tool_call", "tool_call", "tool_result", "tool_result", "system"]
    assert [step.timestamp_ms for step in steps] == [1_769_851_800_000 + number for number in range(6)]


def test_claude_code_results_follow_from_the_call_and_other_lines_from_their_parent() -> None:
    steps = steps_of(read(jsonl(claude_code_lines(1)), "claude-code"))

    assert [step.parent_ordinal for step in steps] == [None, 0, 1, 1, 2, 4]
    assert [step.parent_source for step in steps] == [
        "none", "parentUuid", "parentUuid", "tool_call_id", "tool_call_id", "parentUuid"
    ]  # fmt: skip
    # What the parent link said stays in the body where the cause is another line.
    assert [b"parentUuid" in step.body for step in steps] == [False, False, False, True, True, False]
    assert all(b"sessionId" not in step.body and b'"uuid"' not in step.body for step in steps)


def test_claude_code_branches_where_two_lines_have_one_parent() -> None:
    message = {"role": "user", "content": "x"}
    lines = [claude_code_line(n, p, "user", message=message) for n, p in ((0, None), (1, 0), (2, 1), (3, 0))]

    assert [step.parent_ordinal for step in steps_of(read(jsonl(lines), "claude-code"))] == [None, 0, 1, 0]


def test_claude_code_goes_on_across_a_compaction() -> None:
    summary = {"role": "user", "content": "This session is being continued"}
    lines = [
        claude_code_line(0, None, "user", message={"role": "user", "content": "a"}),
        claude_code_line(1, 0, "assistant", message={"role": "assistant", "content": []}),
        claude_code_line(2, None, "system", subtype="compact_boundary", logicalParentUuid=claude_code_uuid(0)),
        claude_code_line(3, 2, "user", isCompactSummary=True, message=summary),
    ]
    steps = steps_of(read(jsonl(lines), "claude-code"))

    assert [step.parent_ordinal for step in steps] == [None, 0, 0, 2]
    assert [step.parent_source for step in steps] == ["none", "parentUuid", "logicalParentUuid", "parentUuid"]
    assert steps[3].kind == "summary"


def test_claude_code_subagents_are_sessions_of_their_own_in_one_correlation() -> None:
    more = {"isSidechain": True, "agentId": "a1b2c3"}
    lines = [
        claude_code_line(0, None, "user", message={"role": "user", "content": "task"}, **more),
        claude_code_line(1, 0, "assistant", message={"role": "assistant", "content": []}, **more),
    ]
    steps = steps_of(read(jsonl(lines), "claude-code"))

    assert {step.session_id for step in steps} == {f"{SESSION}/a1b2c3"}
    assert {step.correlation_id for step in steps} == {SESSION}
    assert [step.agent_id for step in steps] == ["claude-code", "claude-code-a1b2c3"]


def test_claude_code_copies_and_repeated_or_odd_uuids_get_ids_of_their_own() -> None:
    message = {"role": "user", "content": "x"}
    original = claude_code_line(0, None, "user", message=message)
    forked = claude_code_line(1, 0, "user", message=message, forkedFrom={"sessionId": "other", "messageUuid": "m"})
    odd = claude_code_line(2, 0, "user", message=message) | {"uuid": "abc123"}

    steps = steps_of(read(jsonl([original, original, forked, odd]), "claude-code"))

    events = [step_event("default", step) for step in steps]
    assert events[0].id == claude_code_uuid(0)
    assert len({event.id for event in events}) == 4
    assert all(event.source_id == step.source_id for event, step in zip(events[1:], steps[1:], strict=True))
    assert all(b'"uuid"' in step.body for step in steps[1:])


def test_claude_code_parent_in_another_file_counts_as_none_and_stays_in_the_body() -> None:
    lines = [claude_code_line(n, p, "user", message={"content": "x"}) for n, p in ((1, 0), (2, 1), (3, 900))]

    steps = steps_of(read(jsonl(lines), "claude-code"))

    assert [step.parent_ordinal for step in steps] == [None, 0, 1]
    assert steps[2].parent_source == "order"
    assert [b"parentUuid" in step.body for step in steps] == [True, False, True]


def test_claude_code_keeps_types_that_are_not_known_when_they_carry_a_uuid() -> None:
    lines = [claude_code_line(0, None, "attachment"), claude_code_line(1, 0, "what's this?"), {"type": "mode"}]

    assert [step.kind for step in steps_of(read(jsonl(lines), "claude-code"))] == ["attachment", "record"]
