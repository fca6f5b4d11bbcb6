"""States of optimizations: what is read of a body, how long states last, what changed between them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from holdfast.client.model import Event
from holdfast.client.optimization_records import (
    config_in,
    difference,
    event_data,
    framework_in,
    new_body,
    performance_in,
    report_of,
    state_members,
    states_among,
    status_of,
    summarize,
)
from holdfast.schemas.errors import InvalidBodyError, InvalidFieldError
from holdfast.schemas.ids import EventId, new_event_id
from holdfast.schemas.refs import Ref

START = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)


def event(state: str, at_s: float, number: int, data: Any = None) -> Event:
    return Event(
        event_id=EventId(new_event_id()),
        name=f"optimization:{state}",
        namespace="n",
        agent_id="optimizer",
        timestamp=START + timedelta(seconds=at_s),
        context_ref=ref(number),
        data=data,
    )


def ref(number: int) -> Ref:
    return Ref(f"ctx_optimization_state_{'a' * 31}{'abcdefgh'[number]}")


@pytest.mark.parametrize(
    ("body", "performance"),
    [
        ({"result": {"score": 1, "best_score": 0.5}}, {"score": 0.5, "member": "result.best_score"}),
        ({"result": {"score": 1}, "data": {"best_score": 2}}, {"score": 1.0, "member": "result.score"}),
        ({"result": {"metric": 3}}, {"score": 3.0, "member": "result.metric"}),
        ({"result": {"score": "0.9"}, "data": {"score": 0.1}}, {"score": 0.1, "member": "data.score"}),
        ({"score": 7}, {"score": 7.0, "member": "score"}),
        ({"result": {"score": True}}, None),
        ({"result": {"score": 10**400}}, None),
        ({"result": [1]}, None),
        ({}, None),
        ("text", None),
        (None, None),
    ],
)  # fmt: skip
def test_B74_the_score_is_the_first_number_of_the_members_stated(body: Any, performance: Any) -> None:
    assert performance_in(body) == performance


def test_B74_an_event_says_framework_and_performance_of_its_state() -> None:
    body = new_body("opt_1", "completed", {"framework": "dspy", "config": {"k": 3}}, {"result": {"best_score": 0.82}})
    assert body == {
        "optimization_id": "opt_1", "state": "completed", "data": {"framework": "dspy", "config": {"k": 3}},
        "result": {"best_score": 0.82},
    }  # fmt: skip
    assert event_data(body) == {
        "optimization_id": "opt_1", "state": "completed", "framework": "dspy",
        "performance": {"score": 0.82, "member": "result.best_score"},
    }  # fmt: skip
    assert event_data(new_body("opt_1", "initializing", None, {})) == {
        "optimization_id": "opt_1", "state": "initializing",
    }  # fmt: skip


def test_framework_and_configuration_are_found_where_they_are_stated_to_be() -> None:
    assert framework_in({"data": {"framework": ""}, "framework": "b", "result": {"framework": "c"}}) == "b"
    assert framework_in({"data": {"framework": 5}}) is None
    assert config_in({"data": {"parameters": {"p": 1}}, "config": {"c": 1}}) == {"p": 1}
    assert config_in({"data": {"config": "text"}, "result": {"settings": {"s": 1}}}) == {"s": 1}
    assert config_in("text") is None


def test_a_further_member_cannot_take_the_place_of_one_that_is_there() -> None:
    with pytest.raises(InvalidFieldError) as refused:
        new_body("opt_1", "x", None, {"optimization_id": "other"})
    assert refused.value.field == "optimization_id"
    with pytest.raises(InvalidBodyError):
        new_body("opt_1", "x", object(), {})


def test_only_the_states_stated_end_a_run() -> None:
    assert [status_of(state) for state in ("completed", "failed", "cancelled", "optimizing", "")] == [
        "completed", "failed", "failed", "running", "running",
    ]  # fmt: skip


def test_B48_durations_reach_from_state_to_state_and_never_below_zero() -> None:
    states = [
        event("initializing", 0, 0),
        event("optimizing", 2.5, 1),
        event("evaluating", 1, 2),
        event("completed", 10, 3),
    ]
    reports = [report_of(states, position, {}, {}) for position in range(4)]
    assert [report.duration_s for report in reports] == [2.5, 0.0, 9.0, None]
    summary = summarize(states, {})
    assert (summary.status, summary.duration_s, summary.ended_at) == ("completed", 10.0, states[3].timestamp)
    running = summarize(states[:2], {})
    assert (running.status, running.duration_s, running.ended_at) == ("running", None, None)


def test_the_framework_of_a_run_is_the_one_named_last() -> None:
    states = [event("a", 0, 0, {"framework": "old"}), event("b", 1, 1, {"framework": "new"}), event("c", 2, 2)]
    assert summarize(states, {}).framework == "new"
    assert summarize(states, {ref(2): {"data": {"framework": "of the body"}}}).framework == "of the body"
    assert summarize(states[:1] + states[2:], {}).framework == "old"
    assert summarize([event("a", 0, 0, "text")], {}).framework is None


def test_B48_a_report_says_what_changed_since_the_state_before() -> None:
    states = [event("a", 0, 0), event("b", 1, 1), event("c", 2, 2), event("d", 3, 3)]
    bodies = {ref(0): {"n": 1, "gone": 1}, ref(1): {"n": 2}, ref(3): {"n": 2}}
    reports = [report_of(states, position, bodies, {ref(2): "digest_mismatch"}) for position in range(4)]
    assert reports[0].diff is None
    assert reports[1].diff is not None
    assert sorted(reports[1].diff, key=lambda operation: str(operation["path"])) == [
        {"op": "remove", "path": "/gone"},
        {"op": "replace", "path": "/n", "value": 2},
    ]
    assert (reports[2].body, reports[2].diff, reports[2].error) == (None, None, "digest_mismatch")
    assert (reports[3].body, reports[3].diff, reports[3].error) == ({"n": 2}, None, None)
    assert report_of(states, 1, {}, {}).error == "not_found"
    assert reports[1].lineage["event_id"] == states[1].event_id


def test_bodies_that_are_no_objects_have_a_difference_too() -> None:
    assert difference("text", {"a": 1}) == [{"op": "replace", "path": "", "value": {"a": 1}}]
    assert difference([1, 2], [1, 2, 3]) == [{"op": "add", "path": "/2", "value": 3}]
    assert difference({"a": 1}, {"a": 1}) == []


def test_a_state_as_json_has_its_times_in_iso_8601() -> None:
    members = state_members(report_of([event("a", 0.125, 0)], 0, {ref(0): {}}, {}))
    assert members["started_at"] == "2026-01-31T09:30:00.125Z"
    assert (members["duration_s"], members["diff"], members["body"]) == (None, None, {})
    assert "error" not in members


def test_other_events_of_the_same_correlation_are_no_states() -> None:
    states = states_among([event("optimizing:step", 0, 0), event("done", 0, 1)])
    assert [state.name for state in states] == ["optimization:done"]
    assert states_among([msgspec.structs.replace(states[0], context_ref=None)]) == []
