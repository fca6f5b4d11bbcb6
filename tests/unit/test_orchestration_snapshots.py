"""Snapshots of orchestrations: their shape, what is filled in, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.client.orchestration_snapshots import (
    KIND,
    REASON_CHARS,
    STATE_CHARS,
    check_snapshot_ref,
    check_state,
    event_data,
    new_snapshot,
    snapshot_in,
    state_of,
)
from holdfast.schemas.errors import HoldfastError, InvalidBodyError, InvalidFieldError, InvalidRefError

WHOLE: dict[str, Any] = {
    "orchestration_id": "orch_123",
    "pattern_name": "analysis",
    "state": "running",
    "agents": {"agent_1": {"profile": "analyst", "spawned": True, "vars": {"role": "data_analyzer"}}},
    "routing_rules": [{"from": "agent_1", "to": "*"}],
    "vars": {"target": "dataset.csv"},
}


def test_B46_a_whole_payload_is_the_snapshot() -> None:
    assert new_snapshot("orch_123", "running", WHOLE) == WHOLE
    assert snapshot_in("ctx_x", WHOLE) == WHOLE


def test_B46_what_nobody_gave_is_there_and_empty() -> None:
    assert new_snapshot("o", "running", None) == {
        "orchestration_id": "o",
        "pattern_name": None,
        "state": "running",
        "agents": {},
        "routing_rules": [],
        "vars": {},
    }
    agents = new_snapshot("o", "running", {"agents": {"a": {"profile": "p"}, "b": {}}})["agents"]
    assert agents == {
        "a": {"profile": "p", "spawned": False, "vars": {}},
        "b": {"profile": None, "spawned": False, "vars": {}},
    }


def test_B44_what_is_named_goes_before_the_payload_and_the_rest_of_it_stays() -> None:
    payload = {**WHOLE, "step": 7, "agents": {"a": {"profile": "p", "queue": [1]}}}
    snapshot = new_snapshot("orch_123", "running", payload, vars={"target": "other"}, reason="why", routing_rules=None)
    assert snapshot["vars"] == {"target": "other"}
    assert snapshot["routing_rules"] == WHOLE["routing_rules"]
    assert (snapshot["step"], snapshot["reason"]) == (7, "why")
    assert snapshot["agents"]["a"] == {"profile": "p", "queue": [1], "spawned": False, "vars": {}}
    assert payload["vars"] == WHOLE["vars"], "the caller's own is left alone"
    assert event_data(snapshot) == {
        "orchestration_id": "orch_123", "pattern_name": "analysis", "state": "running", "reason": "why",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({"agents": []}, "agents"),
        ({"agents": {"a": 1}}, "agents[...]"),
        ({"agents": {"a": {"spawned": "yes"}}}, "agents[...].spawned"),
        ({"agents": {"a": {"vars": []}}}, "agents[...].vars"),
        ({"routing_rules": {}}, "routing_rules"),
        ({"vars": []}, "vars"),
        ({"pattern_name": 5}, "pattern_name"),
        ({"reason": "x" * (REASON_CHARS + 1)}, "reason"),
        ({"orchestration_id": "another"}, "orchestration_id"),
        ({"state": "terminated"}, "state"),
        ({"vars": {"x": object()}}, "payload"),
        ({"vars": {"x": float("nan")}}, "payload"),
        ([], "payload"),
    ],
)
def test_B46_a_payload_of_another_shape_is_refused_by_the_name_of_its_member(payload: Any, field: str) -> None:
    with pytest.raises(HoldfastError) as refused:
        new_snapshot("o", "running", payload)
    assert isinstance(refused.value, InvalidFieldError)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ("text", "snapshot"),
        (None, "snapshot"),
        ({}, "orchestration_id"),
        ({"orchestration_id": "o"}, "state"),
        ({**WHOLE, "agents": None}, "agents"),
        ({**WHOLE, "state": ""}, "state"),
    ],
)
def test_B46_a_damaged_snapshot_is_told_by_the_name_of_its_member(body: object, field: str) -> None:
    with pytest.raises(InvalidBodyError, match="ctx_x is no snapshot") as refused:
        snapshot_in("ctx_x", body)
    assert refused.value.field == field


def test_a_reference_of_another_kind_is_refused() -> None:
    digest = "a" * 32
    assert check_snapshot_ref(f"ctx_{KIND}_{digest}") == f"ctx_{KIND}_{digest}"
    for ref in (f"ctx_plan_{digest}", "junk", None):
        with pytest.raises(InvalidRefError):
            check_snapshot_ref(ref)


@pytest.mark.parametrize("state", ["", "a:b", "x" * (STATE_CHARS + 1), "\ud800", 5, None, "recovered"])
def test_what_is_no_state_is_refused(state: object) -> None:
    with pytest.raises(InvalidFieldError) as refused:
        check_state(state, reserved=("recovered",))
    assert refused.value.field == "state"


def test_a_state_is_what_the_name_of_the_event_says() -> None:
    assert check_state("läuft noch") == "läuft noch"
    assert state_of("orchestration:running", "orchestration:") == "running"
    for name in ("orchestration:", "orchestration:a:b", "other:running"):
        assert state_of(name, "orchestration:") is None
