"""Records of jobs and steps: their keys, which execution context comes next, what is a reference."""

from __future__ import annotations

import gc
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from holdfast.client import ContextReference
from holdfast.client.context_reference import PendingReference, PendingReferences, is_reference_dict
from holdfast.client.pipeline_records import (
    ExecutionContext,
    JobRecord,
    StepRecord,
    check_execution_context,
    first_context,
    job_key,
    next_context,
    parse_step_key,
    read_record,
    step_key,
    steps_prefix,
    with_context,
)
from holdfast.schemas.errors import InvalidBodyError, InvalidFieldError, InvalidNameError
from holdfast.schemas.limits import KEY_SEGMENTS
from holdfast.schemas.names import check_key
from holdfast.schemas.refs import Ref
from tests.support import examples

NOW = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=24)
REF = Ref("ctx_step_" + "a" * 32)


def record(**changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "job_id": "job-2",
        "root_job_id": "job-1",
        "step_name": "article",
        "step_number": 3,
        "execution_context_id": "1",
        "timestamp": NOW.isoformat(),
        "result": REF,
        **changes,
    }
    return StepRecord(**values)


def job(*contexts: tuple[int, str]) -> JobRecord:
    begun = tuple(ExecutionContext(id=str(n), job_id=job_id, started_at=NOW.isoformat()) for n, job_id in contexts)
    return JobRecord(job_id="root", created_at=NOW.isoformat(), execution_contexts=begun)


@examples(200)
@given(NAMES, st.integers(0, 999_999_999), NAMES)
def test_a_key_tells_job_context_and_step(job_id: str, number: int, step: str) -> None:
    key = check_key(step_key(job_id, str(number), step))
    assert parse_step_key(key) == (job_id, str(number), step)
    assert key.count(".") == 3 < KEY_SEGMENTS
    assert key.startswith(steps_prefix(job_id, str(number)))
    check_key(job_key(job_id))


@examples(100)
@given(NAMES, NAMES)
def test_keys_of_one_job_are_never_among_those_of_another(one: str, other: str) -> None:
    assume(one != other)
    assert not step_key(one, "0", "step").startswith(steps_prefix(other))
    assert job_key(one) != job_key(other)


@pytest.mark.parametrize(
    "key",
    ["job.a.context_0", "job.a.context_0.b.c", "job.a.context_00.b", "job.a.context_.b", "job.a.ctx_0.b",
     "jobs.a.context_0.b", "job.a.context_-1.b", "job.a.context_0.x--_zz", ""],
)  # fmt: skip
def test_keys_of_anything_else_are_told(key: str) -> None:
    assert parse_step_key(key) is None


def test_names_that_make_too_long_a_key_are_refused() -> None:
    with pytest.raises(InvalidNameError, match="limit is 768"):
        step_key("x" * 250, "0", "ü" * 256)
    with pytest.raises(InvalidNameError, match="job id make"):
        job_key("ü" * 256)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (12, "12"), ("0", "0"), ("7", "7"), ("context_3", "3")])
def test_an_execution_context_has_several_spellings(value: object, text: str) -> None:
    assert check_execution_context(value) == text


@pytest.mark.parametrize("value", ["", "01", "-1", -1, 1.0, True, None, "context_", "CONTEXT_1", "1\n", "9" * 10])
def test_what_is_no_execution_context_is_refused(value: object) -> None:
    with pytest.raises(InvalidFieldError, match="execution context"):
        check_execution_context(value)


def test_which_execution_context_comes_next() -> None:
    empty = job()
    assert (first_context(empty, "root"), first_context(empty, "resumed")) == ("0", "1")
    assert (next_context(empty, "root"), next_context(empty, "resumed")) == ("0", "1")
    late = job((1, "resumed"), (4, "resumed"))
    assert (first_context(late, "root"), first_context(late, "another")) == ("0", "5")
    assert (next_context(late, "root"), next_context(late, "resumed")) == ("5", "5")
    assert first_context(job((0, "root")), "another") == "1"
    assert (late.newest_of("resumed"), late.newest_of("root")) == ("4", None)
    assert job((9, "a"), (10, "a")).numbers == (10, 9)  # as numbers, not as text


def test_a_context_is_on_record_once() -> None:
    once = with_context(job(), "2", "resumed", NOW)
    assert with_context(once, "2", "other", NOW) is once
    assert [(c.id, c.job_id) for c in once.execution_contexts] == [("2", "resumed")]


def test_the_forms_of_the_records() -> None:
    """Readers of tomorrow read what is written today: these are stored for good."""
    step = {
        "v": 1,
        "job_id": "job-2",
        "root_job_id": "job-1",
        "step_name": "article",
        "step_number": 3,
        "execution_context_id": "1",
        "timestamp": "2026-01-31T09:30:00+00:00",
        "result": REF,
    }
    assert msgspec.to_builtins(record()) == step
    assert read_record(StepRecord, {**step, "a_later_field": 1}, "k") == record()
    full = {**step, "input": REF, "context_keys_used": ["a"], "compressed": True, "relative_step_number": 1,
            "metadata": {"x": 1}}  # fmt: skip
    expected = record(input=REF, context_keys_used=("a",), compressed=True, relative_step_number=1, metadata={"x": 1})
    assert read_record(StepRecord, full, "k") == expected
    assert msgspec.json.decode(msgspec.json.encode(expected)) == full
    begun = {"id": "0", "job_id": "root", "started_at": "2026-01-31T09:30:00+00:00"}
    root = {"v": 1, "job_id": "root", "created_at": "2026-01-31T09:30:00+00:00", "execution_contexts": [begun]}
    assert msgspec.json.decode(msgspec.json.encode(job((0, "root")))) == root
    assert read_record(JobRecord, root, "k") == job((0, "root"))


@pytest.mark.parametrize("body", [None, [], "text", b"bytes", {}, {"v": 2}, {"v": 1, "job_id": 5}])
def test_a_body_that_is_no_record_is_told_with_its_key(body: object) -> None:
    with pytest.raises(InvalidBodyError, match=r"under key 'job\.a'") as caught:
        read_record(StepRecord, body, "job.a")
    assert caught.value.hint == "see who wrote it: holdfast history job.a"


def test_a_reference_survives_its_dict() -> None:
    reference = ContextReference.of_record(record(compressed=True), 7)
    told = reference.to_dict()
    assert told == {
        "job_id": "job-2",
        "step_name": "article",
        "step_number": 3,
        "execution_context_id": "1",
        "timestamp": NOW.isoformat(),
        "compressed": True,
        "root_job_id": "job-1",
        "version": 7,
        "ref": REF,
    }
    again = ContextReference.from_dict(told)
    assert again == reference
    assert hash(again) == hash(reference)
    assert again.is_pinned
    assert repr(again) == "ContextReference(job-2 context_1 article, version 7)"
    assert ContextReference.from_dict({**told, "version": 8}) != reference
    assert reference != told


def test_a_reference_is_made_by_place_as_it_always_was() -> None:
    made = ContextReference("job-1", "article", 3, "0", NOW.isoformat(), True)
    assert (made.step_number, made.execution_context_id, made.compressed) == (3, "0", True)
    assert not made.is_pinned


@pytest.mark.parametrize(
    "change",
    [{"job_id": 5}, {"step_name": ""}, {"step_number": "3"}, {"execution_context_id": "x"}, {"timestamp": 5},
     {"compressed": "yes"}, {"version": 0}, {"version": True}, {"ref": "ctx_bad"}, {"root_job_id": ""}],
)  # fmt: skip
def test_a_damaged_reference_is_refused(change: dict[str, Any]) -> None:
    told = ContextReference.of_record(record(), 1).to_dict()
    with pytest.raises(InvalidFieldError):
        ContextReference.from_dict({**told, **change})


def test_a_reference_without_a_member_is_refused_and_the_member_named() -> None:
    told = ContextReference.of_record(record(), 1).to_dict()
    del told["step_number"]
    with pytest.raises(InvalidFieldError, match="missing step_number"):
        ContextReference.from_dict(told)


def test_data_is_not_taken_for_a_reference() -> None:
    told = ContextReference.of_record(record(), 1).to_dict()
    assert is_reference_dict(told)
    assert is_reference_dict({name: told[name] for name in told if name not in ("version", "ref", "root_job_id")})
    assert not is_reference_dict({**told, "result": {}})
    assert not is_reference_dict({name: told[name] for name in told if name != "timestamp"})
    assert not is_reference_dict({**told, "job_id": ["a list"]})
    assert not is_reference_dict([told])


def test_pending_references_are_held_weakly_and_until_they_are_pinned() -> None:
    async def never(reference: ContextReference) -> None:
        raise AssertionError(reference)

    pending = PendingReferences()
    held = [PendingReference("job", "step", None, never) for _ in range(300)]
    for number in range(300):
        pending.add(held[number])
    for _ in range(1_000):
        pending.add(PendingReference("job", "dropped", None, never))
    assert len(pending.of_step("step")) == 300
    held[0].pin(record(), 1)
    del held[1]
    gc.collect()
    assert len(pending.of_step("step")) == 298
    assert pending.of_step("dropped") == []
    assert pending.of_step("another") == []
