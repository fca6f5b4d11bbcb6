"""When faults strike: a function of the seed."""

from __future__ import annotations

import pytest

from holdfast.ops.torture.faults import FAULTS, chosen_faults, register
from holdfast.ops.torture.schedule import CALM_S, plan
from holdfast.schemas.errors import InvalidFieldError

NAMES = ["kill-server", "evict", "poison"]


def test_the_same_seed_gives_the_same_plan() -> None:
    assert plan(7, 60, NAMES) == plan(7, 60, list(reversed(NAMES)))
    assert plan(7, 60, NAMES) != plan(8, 60, NAMES)
    assert plan(7, 60, NAMES) != plan(7, 60, NAMES[:2])


def test_faults_come_in_order_of_time_and_leave_the_ends_calm() -> None:
    steps = plan(7, 60, NAMES)
    times = [step.at_s for step in steps]
    assert times == sorted(times)
    assert times[0] > CALM_S
    assert times[-1] <= 60 - CALM_S
    assert 25 < len(steps) < 100


def test_each_fault_comes_before_any_comes_again() -> None:
    steps = plan(7, 60, NAMES)
    for start in range(0, len(steps) - 2, 3):
        assert {step.fault for step in steps[start : start + 3]} == set(NAMES)
    assert len({step.seed for step in steps}) == len(steps)


def test_no_faults_and_no_time_give_no_plan() -> None:
    assert plan(7, 60, []) == []
    assert plan(7, 1.5, NAMES) == []


def test_faults_are_chosen_by_name() -> None:
    assert chosen_faults(" kill-server, evict ") == ["kill-server", "evict"]
    every = chosen_faults(None)
    assert {"kill-server", "stop-server", "kill-worker", "stop-worker", "kill-client", "failpoint"} < set(every)
    assert {"proxy", "duplicate", "clock", "second-archiver", "late-archiver", "lost-tail"} < set(every)
    assert {"recreated-stream", "evict", "poison", "oversize"} < set(every)
    assert all(FAULTS[name].what for name in every)


def test_an_unknown_fault_is_refused_with_those_known() -> None:
    with pytest.raises(InvalidFieldError, match="no fault 'earthquake'") as raised:
        chosen_faults("kill-server,earthquake")
    assert "kill-server" in (raised.value.hint or "")


def test_a_fault_is_registered_once() -> None:
    with pytest.raises(ValueError, match="registered already"):
        register("kill-server", "again")(FAULTS["kill-server"].inject)
