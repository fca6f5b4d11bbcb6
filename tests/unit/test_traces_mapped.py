"""Any JSON lines by a map, and OpenHands' events: causes stated by id, wherever in the file they stand."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.ops.traces import Malformed, Record, Source, Step, detect, mapped, openhands, parse_map, step_event
from holdfast.schemas.errors import InvalidFieldError
from tests.unit.traces_samples import jsonl, malformed_of, packed, read, steps_of

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SPANS = "session=trace_id,id=span_id,parent=parent_span_id,name=op.name,agent=op.by,timestamp=start"


def read_mapped(raw: bytes, text: str) -> list[Record]:
    return list(mapped.read(Source.of_bytes(raw, "sample"), parse_map(text)))


def span(trace: str, span_id: Any, parent: Any = None, **more: Any) -> dict[str, Any]:
    return {"trace_id": trace, "span_id": span_id, "parent_span_id": parent, **more}


def parents(steps: list[Step]) -> list[int | None]:
    """The place of each step's cause among the steps."""
    places = {step.source_id: place for place, step in enumerate(steps)}
    return [None if step.parent_source_id is None else places[step.parent_source_id] for step in steps]


def test_fields_are_where_the_map_says() -> None:
    record = span("t", "a", op={"name": "llm:call", "by": "planner"}, start="2026-01-31T09:30:00Z", more=[1])
    [step] = steps_of(read_mapped(jsonl([record]), SPANS))
    assert (step.session_id, step.agent_id, step.name, step.kind) == ("t", "planner", "llm:call", "record")
    assert (step.timestamp_ms, step.correlation_id) == (1_769_851_800_000, "t")
    assert json.loads(step.body) == record
    text = "session==one,agent==me,kind==plan,body=op,correlation=trace_id"
    [step] = steps_of(read_mapped(jsonl([record]), text))
    assert (step.session_id, step.agent_id, step.kind, step.correlation_id) == ("one", "me", "plan", "t")
    assert (step.name, json.loads(step.body)) == ("step:plan", record["op"])


def test_a_member_whose_name_has_a_dot_goes_before_a_path() -> None:
    records = [{"service.name": "x", "service": {"name": "y"}}, {"service": {"name": "y"}}]
    steps = steps_of(read_mapped(jsonl(records), "agent=service.name"))
    assert [step.agent_id for step in steps] == ["x", "y"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1_754_300_000, 1_754_300_000_000),
        (1_754_300_000.125, 1_754_300_000_125),
        (1_754_300_000_125, 1_754_300_000_125),
        (1_754_300_000_125_000, 1_754_300_000_125),
        ("1754300000125000000", 1_754_300_000_125),
        ("2025-08-04T09:33:20.125", 1_754_300_000_125),
        (None, None),
    ],
)
def test_times_in_any_usual_unit(value: Any, expected: int | None) -> None:
    assert mapped.time_ms(value) == expected


def test_a_cause_may_come_later_or_in_another_session() -> None:
    records = [
        span("t1", "c", "b"),
        span("t1", "b", "a"),
        span("t2", "a"),
        span("t2", "d", "b"),
        span("t2", "e", "nowhere"),
    ]
    for raw in (jsonl(records), json.dumps(records, indent=1).encode(), packed(jsonl(records))):
        steps = steps_of(read_mapped(raw, SPANS))
        assert parents(steps) == [1, 2, None, 1, None]
        assert [step.depth for step in steps] == [2, 1, 0, 2, 0]
        assert [step.root_source_id for step in steps] == [steps[2].source_id] * 4 + [steps[4].source_id]
        assert [step.parent_source for step in steps] == ["stated", "stated", "none", "stated", "none"]


def test_an_id_holds_in_its_own_session_first_and_elsewhere_only_when_it_is_the_only_one() -> None:
    records = [span("t1", 1), span("t2", 1), span("t2", 2, 1), span("t3", 9, 1), span("t4", 3, 2)]
    steps = steps_of(read_mapped(jsonl(records), SPANS))
    assert parents(steps) == [None, None, 1, None, 2]


def test_what_states_no_cause_follows_the_step_before_when_asked_to() -> None:
    records = [span("t", "a"), span("u", "x"), span("t", "b"), span("t", "c", "a")]
    assert parents(steps_of(read_mapped(jsonl(records), SPANS))) == [None, None, None, 0]
    steps = steps_of(read_mapped(jsonl(records), f"{SPANS},otherwise=previous"))
    assert parents(steps) == [None, None, 0, 0]
    assert [step.parent_source for step in steps] == ["none", "none", "order", "stated"]
    assert parents(steps_of(read_mapped(jsonl(records), "session=trace_id"))) == [None, None, 0, 2]


def test_a_circle_of_causes_is_told_and_opened() -> None:
    records = read_mapped(
        jsonl([span("t", "a", "b"), span("t", "b", "c"), span("t", "c", "a"), span("t", "s", "s")]), SPANS
    )
    assert [place.line for place in malformed_of(records)] == [1, 4]
    assert parents(steps_of(records)) == [None, 2, 0, None]


def test_a_long_chain_of_later_causes_is_no_recursion() -> None:
    count = 5_000
    records = [span("t", number, number + 1) for number in range(count)]
    steps = steps_of(read_mapped(jsonl(records), SPANS))
    assert [step.depth for step in steps] == list(range(count - 1, -1, -1))


def test_identity_follows_from_what_is_said_and_from_all_causes() -> None:
    def ids(*records: dict[str, Any]) -> list[str]:
        return [step.source_id for step in steps_of(read_mapped(jsonl(records), SPANS))]

    a, b = span("t", "a"), span("t", "b", "a")
    assert ids(a, b) == ids(a, b)
    assert ids(a, b, span("t", "c"))[:2] == ids(a, b)
    # Another cause makes another event, all the way down.
    changed = ids(span("t", "a", more=1), b)
    assert changed[0] != ids(a, b)[0]
    assert changed[1] != ids(a, b)[1]
    uuid = "0190a3b0-0000-7000-8000-000000000001"
    [first, copy] = steps_of(read_mapped(jsonl([span("t", uuid), span("t", uuid)]), SPANS))
    assert step_event("default", first).id == uuid
    assert copy.source_id != uuid


def test_malformed_records_are_named_and_the_rest_goes_on() -> None:
    raw = b'{"trace_id": "t", "span_id": "a"}\n{nonsense\n{"span_id": "b"}\n' + jsonl(
        [span("t", {"x": 1}), span("t", "c", "a", start="yesterday"), span("t", "d", "a")]
    )
    records = read_mapped(raw, SPANS)
    assert [place.line for place in malformed_of(records)] == [2, 3, 4, 5]
    assert parents(steps_of(records)) == [None, 0]


@pytest.mark.parametrize("text", ["", "x=y", "id", "id=", "id=a,id=b", "otherwise=never", "session=a,,id=b"])
def test_a_map_that_maps_nothing_is_refused(text: str) -> None:
    with pytest.raises(InvalidFieldError) as refused:
        parse_map(text)
    assert refused.value.field == "map"


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12), st.none() | st.integers(0, 12)), max_size=14))
def test_whatever_the_causes_every_record_is_one_step_of_a_forest(records: list[tuple[int, int, int | None]]) -> None:
    raw = jsonl([span(f"t{trace}", own, parent) for trace, own, parent in records]) or b"\n"
    found = read_mapped(raw, SPANS)
    steps = steps_of(found)
    assert len(steps) == len(records)
    by_id = {step.source_id: step for step in steps}
    for step in steps:
        if step.parent_source_id is None:
            assert (step.depth, step.root_source_id) == (0, step.source_id)
        else:
            parent = by_id[step.parent_source_id]
            assert (step.depth, step.root_source_id) == (parent.depth + 1, parent.root_source_id)


def openhands_events() -> list[dict[str, Any]]:
    at = "2025-02-03T10:00:0{}.000001"
    return [
        {"id": 0, "timestamp": at.format(0), "source": "user", "message": "Fix", "action": "message", "args": {}},
        {"id": 1, "timestamp": at.format(1), "source": "agent", "action": "run", "args": {"command": "ls"}},
        {"id": 2, "timestamp": at.format(2), "source": "agent", "action": "read", "args": {"path": "a"}},
        {"id": 3, "timestamp": at.format(3), "source": "agent", "cause": 1, "observation": "run", "content": "a"},
        {"id": 4, "timestamp": at.format(4), "source": "agent", "cause": 2, "observation": "read", "content": "b"},
        {"id": 5, "timestamp": at.format(5), "source": "agent", "action": "finish", "args": {}},
    ]


def test_openhands_events_follow_from_the_actions_they_name() -> None:
    events = openhands_events()
    shapes = {
        "array": json.dumps(events).encode(),
        "lines": jsonl(events),
        "evaluation": jsonl([{"instance_id": "django__1", "instruction": "x", "history": events}]),
        "pairs": jsonl([{"instance_id": "p", "history": [events[:1], [events[1], events[3]], [events[2], events[4]]]}]),
    }
    for shape, raw in shapes.items():
        assert detect(Source.of_bytes(raw, "x.json")) == "openhands", shape
        steps = steps_of(read(raw, "openhands"))
        if shape == "pairs":
            assert parents(steps) == [None, 0, 1, 2, 3]
            continue
        assert parents(steps) == [None, 0, 1, 1, 2, 4]
        assert [step.parent_source for step in steps] == ["none", "order", "order", "stated", "stated", "order"]
        assert [step.kind for step in steps] == [
            "user",
            "tool_call",
            "tool_call",
            "tool_result",
            "tool_result",
            "tool_call",
        ]
        assert [step.agent_id for step in steps] == ["user", "openhands", "openhands", "tool", "tool", "openhands"]
        assert steps[1].timestamp_ms == 1_738_576_801_000
        assert json.loads(steps[3].body) == events[3]
        if shape == "evaluation":
            assert {step.session_id for step in steps} == {"django__1"}


def test_openhands_odd_events_are_named() -> None:
    events: list[Any] = [*openhands_events()[:2], "text", {"id": 7}, {"id": -1, "cause": -1, "observation": "null"}]
    records = read(json.dumps(events).encode(), "openhands")
    assert len(malformed_of(records)) == 2
    assert parents(steps_of(records)) == [None, 0, 1]
    assert all(isinstance(record, Step | Malformed) for record in openhands.read(Source.of_bytes(b"[[[", "x")))


def test_zstd_is_read_like_any_other_compression_and_damage_is_told() -> None:
    raw = jsonl(span("t", number, number - 1 if number else None) for number in range(200))
    frames = zstd.compress(raw[:500]) + zstd.compress(raw[500:])
    assert parents(steps_of(read_mapped(frames, SPANS))) == [None, *range(199)]
    cut = read_mapped(frames[:-30], SPANS)
    assert malformed_of(cut)
    assert "cannot be read further" in malformed_of(cut)[-1].reason
    broken = bytearray(frames)
    broken[len(frames) // 2] ^= 0xFF
    assert malformed_of(read_mapped(bytes(broken), SPANS))
