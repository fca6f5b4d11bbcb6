"""The SQL that compares optimization runs, over a table of events of the test's own."""

from __future__ import annotations

from collections.abc import Generator
from datetime import datetime, timedelta
from typing import Any

import duckdb
import pytest

from holdfast.lake.optimizations import Outcome, Runs, analyze, refs_of_runs, untold_refs

START = datetime(2026, 1, 31, 9, 30)  # noqa: DTZ001  as the lake holds it: naive, in UTC
START_MS = 1_769_851_800_000
ALL = Runs(namespace="n")


class Events:
    """States of runs, stored in the order they are added in."""

    def __init__(self, duck: duckdb.DuckDBPyConnection) -> None:
        self.duck = duck
        self._seq = 0

    def add(self, run: str | None, state: str, at_s: float = 0, data: str | None = None, **changes: Any) -> str:
        """Adds a state and returns its reference."""
        self._seq += 1
        ref: str = changes.get("ref", f"ctx_optimization_state_{self._seq:032d}")
        stored = START + timedelta(seconds=self._seq)
        row = [changes.get("namespace", "n"), run, f"optimization:{state}", START + timedelta(seconds=at_s), stored]
        self.duck.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, 'e', ?, ?, ?)", [*row, self._seq, ref, data])
        return ref

    def analyze(self, runs: Runs = ALL, *outcomes: Outcome, best: Any = "highest") -> list[dict[str, Any]]:
        return analyze(self.duck, runs, outcomes, completed=["completed"], failed=["failed"], best=best)


@pytest.fixture
def events() -> Generator[Events]:
    with duckdb.connect() as duck:
        duck.execute(
            "CREATE TABLE events (namespace VARCHAR, correlation_id VARCHAR, name VARCHAR, timestamp TIMESTAMP, "
            "stored_at TIMESTAMP, epoch VARCHAR, stream_seq BIGINT, context_ref VARCHAR, data VARCHAR)"
        )
        yield Events(duck)


def told(score: float | None = None, framework: str = "dspy") -> str:
    performance = "" if score is None else f', "performance": {{"score": {score}}}'
    return f'{{"optimization_id": "x", "framework": "{framework}"{performance}}}'


def test_B49_without_runs_there_is_nothing(events: Events) -> None:
    assert events.analyze() == []
    assert untold_refs(events.duck, "n") == ([], 0)
    assert refs_of_runs(events.duck, "n", []) == {}


def test_B49_a_state_lasts_until_the_next_one_and_the_last_has_no_end(events: Events) -> None:
    for state, at_s in (("initializing", 0), ("optimizing", 2), ("completed", 12)):
        events.add("a", state, at_s, told())
    (dspy,) = events.analyze()
    assert dspy["seconds"] == {"count": 1, "min": 12.0, "median": 12.0, "p95": 12.0, "max": 12.0}
    assert [(state["state"], state["seconds"] and state["seconds"]["median"]) for state in dspy["states"]] == [
        ("initializing", 2.0), ("optimizing", 10.0), ("completed", None),
    ]  # fmt: skip


def test_B49_clocks_that_differ_make_no_negative_duration(events: Events) -> None:
    for state, at_s in (("initializing", 10), ("optimizing", 5), ("completed", 9)):
        events.add("a", state, at_s, told())
    (dspy,) = events.analyze()
    assert dspy["seconds"]["max"] == 0.0
    assert [state["seconds"] and state["seconds"]["min"] for state in dspy["states"]] == [0.0, 4.0, None]


def test_B49_a_run_that_was_begun_again_is_running(events: Events) -> None:
    for state in ("initializing", "failed", "optimizing"):
        events.add("a", state, 0, told())
    (dspy,) = events.analyze()
    assert (dspy["runs"], dspy["failed"], dspy["running"], dspy["seconds"]) == (1, 0, 1, None)


def test_B49_the_score_of_a_run_is_the_last_that_its_states_tell(events: Events) -> None:
    events.add("a", "optimizing", 0, told(0.9))
    ref = events.add("a", "optimizing", 1, told(0.5))
    events.add("a", "completed", 2, told())
    (dspy,) = events.analyze()
    assert dspy["best"] == {"optimization_id": "a", "score": 0.5, "context_ref": ref}


def test_B49_the_best_of_equals_began_first(events: Events) -> None:
    for run, at_s in (("c", 3), ("a", 1), ("b", 2), ("d", 1)):
        events.add(run, "completed", at_s, told(1))
    events.add("worse", "completed", 0, told(0))
    assert events.analyze()[0]["best"]["optimization_id"] == "d"
    assert events.analyze(best="lowest")[0]["best"]["optimization_id"] == "worse"


@pytest.mark.parametrize("score", ["1e999", "-1e999", '"0.9"', "true", "null", "[1]", '{"a": 1}'])
def test_B49_what_is_no_number_is_no_score(events: Events, score: str) -> None:
    events.add("a", "completed", 0, f'{{"optimization_id": "a", "performance": {{"score": {score}}}}}')
    (found,) = events.analyze()
    assert (found["completed"], found["scores"], found["best"]) == (1, None, None)


def test_B49_what_a_body_says_counts_where_the_event_says_nothing(events: Events) -> None:
    silent, loud = events.add("a", "completed"), events.add("b", "completed", 0, told(0.5))
    (dspy,) = events.analyze(ALL, Outcome(silent, "dspy", 0.7), Outcome(loud, "other", 0.9))
    assert (dspy["framework"], dspy["runs"], dspy["scores"]["max"]) == ("dspy", 2, 0.7)
    assert dspy["best"] == {"optimization_id": "a", "score": 0.7, "context_ref": silent}


def test_B49_other_events_are_no_states(events: Events) -> None:
    events.add("a", "completed", 0, told(), namespace="other")
    events.add("a", "completed:part", 0, told())
    events.add("a", "completed", 0, told(), ref=f"ctx_plan_{'a' * 32}")
    events.add("a", "completed", 0, told(), ref=f"ctx_optimization_state_x_{'a' * 32}")
    events.add(None, "completed", 0, told())
    assert events.analyze() == []


def test_B49_runs_are_chosen_by_the_time_of_their_first_state(events: Events) -> None:
    for run, at_s in (("a", 0), ("b", 10), ("c", 20)):
        events.add(run, "initializing", at_s, told())
        events.add(run, "completed", at_s + 100, told())
    (dspy,) = events.analyze(Runs(namespace="n", since_ms=START_MS + 10_000, until_ms=START_MS + 20_000))
    assert (dspy["runs"], dspy["seconds"]["count"]) == (1, 1)
    assert events.analyze(Runs(namespace="n", framework="none")) == []


def test_B49_data_that_is_no_json_to_sql_is_passed_over(events: Events) -> None:
    ref = events.add("a", "completed", 0, '{"x": "\\ud800"')
    assert untold_refs(events.duck, "n") == ([ref], 0)
    (found,) = events.analyze()
    assert (found["framework"], found["completed"]) == (None, 1)


def test_B49_only_so_many_bodies_are_asked_for_and_the_rest_is_counted(events: Events) -> None:
    refs = [events.add("a", "optimizing") for _ in range(5)]
    events.add("a", "optimizing", ref=refs[0])
    events.add("a", "completed", 0, told())
    assert untold_refs(events.duck, "n", limit=2) == ([refs[0], refs[4]], 3)
    assert untold_refs(events.duck, "n") == ([refs[0], *reversed(refs[1:])], 0)


def test_the_references_of_a_run_come_newest_first(events: Events) -> None:
    refs = [events.add("a", "optimizing") for _ in range(60)]
    other = events.add("b", "optimizing")
    events.add("c", "optimizing")
    assert refs_of_runs(events.duck, "n", ["a", "b"]) == {"a": refs[:9:-1], "b": [other]}
