"""Step results and the context registry, as a pipeline that is resumed uses them."""

from __future__ import annotations

import asyncio
import copy
import gc
import re
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from holdfast.client import (
    ContextReference,
    ContextRegistry,
    Holdfast,
    StepResultManager,
    connect,
    get_context_registry,
    get_step_result_manager,
)
from holdfast.client.background import ClientShare
from holdfast.client.key_ring import KeyRing
from holdfast.schemas.errors import (
    EncryptionKeyError,
    InvalidBodyError,
    InvalidFieldError,
    InvalidNameError,
    NotFoundError,
    UnknownOutcomeError,
    VersionConflictError,
)
from holdfast.schemas.policies import KeyPolicy
from holdfast.schemas.refs import parse_ref
from holdfast.streams.wire import HOT_STREAM, hot_subject
from tests.command_line import environment

if TYPE_CHECKING:
    from holdfast.client.pipeline_store import SavedStep

KEYWORDS = {"main": "green tea", "others": ["matcha", "sencha"]}
BRIEF = {"audience": "people who drink tea", "tone": "calm"}
ARTICLE = {"title": "Tea", "body": "It is green."}


@pytest.fixture
def registry(hf: Holdfast) -> ContextRegistry:
    return ContextRegistry(hf)


@pytest.fixture
def manager(registry: ContextRegistry) -> StepResultManager:
    return StepResultManager(registry)


@pytest_asyncio.fixture
async def elsewhere(nats_server: str, namespace: str) -> AsyncIterator[ContextRegistry]:
    """The registry of another process, as it were: a connection and a memory of its own."""
    async with connect(nats_server, namespace=namespace, agent="elsewhere") as hf:
        yield ContextRegistry(hf)


def sent(hf: Holdfast) -> int:
    return hf.connection.client.stats["out_msgs"]


def outcomes(history: list[SavedStep]) -> list[tuple[str, str, int]]:
    return [(step.record.execution_context_id, step.record.step_name, step.version) for step in history]


# What is saved is found


async def test_A05_A11_A13_A17_a_saved_result_is_in_the_registry(
    manager: StepResultManager, elsewhere: ContextRegistry
) -> None:
    reference = await manager.save_step_result(
        job_id="job-1",
        step_number=1,
        step_name="seo_keywords",
        result_data=KEYWORDS,
        input_snapshot={"input_content": "tea"},
        context_keys_used=["input_content"],
    )
    assert await elsewhere.get_context(job_id="job-1", key="seo_keywords") == KEYWORDS
    assert await elsewhere.get_context("job-1", "keywords", step_name="seo_keywords") == KEYWORDS
    assert await elsewhere.resolve_context(reference) == KEYWORDS


async def test_A17_what_was_never_saved_is_none(manager: StepResultManager) -> None:
    assert await manager.registry.get_context("job-1", "seo_keywords") is None
    await manager.save_step_result("job-1", 1, "seo_keywords", KEYWORDS)
    assert await manager.registry.get_context("job-1", "brief") is None
    assert await manager.registry.get_context("job-2", "seo_keywords") is None
    assert await manager.registry.get_context("job-1", "seo_keywords", execution_context_id="1") is None


async def test_A18_many_keys_in_one_query(manager: StepResultManager) -> None:
    await manager.save_step_result("job-1", 1, "seo_keywords", KEYWORDS)
    await manager.save_step_result("job-1", 2, "marketing_brief", BRIEF)
    found = await manager.registry.query_context(job_id="job-1", keys=["seo_keywords", "marketing_brief", "article"])
    assert found == {"seo_keywords": KEYWORDS, "marketing_brief": BRIEF}
    assert await manager.registry.query_context("job-1", []) == {}


async def test_equal_results_of_two_steps_are_objects_of_their_own(
    manager: StepResultManager, registry: ContextRegistry
) -> None:
    for number, name in enumerate(("a", "b"), start=1):
        await manager.save_step_result("job-1", number, name, {"status": "ok"}, input_snapshot={"status": "ok"})
    found = await registry.query_context("job-1", ["a", "b"])
    found["a"]["status"] = "changed"
    assert found["b"] == {"status": "ok"}
    history = await registry.get_full_history("job-1")
    history["0"]["a"]["status"] = "changed"
    assert history["0"]["b"] == {"status": "ok"}
    audit = await registry.get_step_audit("job-1", "a")
    audit.result["status"] = "changed"
    assert audit.input_snapshot == {"status": "ok"}


async def test_A18_a_query_costs_the_same_whatever_the_number_of_keys(manager: StepResultManager, hf: Holdfast) -> None:
    for number in range(40):
        await manager.save_step_result("job-1", number, f"step {number}", {"number": number})
    async with connect(hf.connection.target, hf.namespace, cache_bytes=0) as fresh:
        registry = ContextRegistry(fresh)
        await registry.query_context("job-1", ["step 0"])
        before = sent(fresh)
        found = await registry.query_context("job-1", [f"step {number}" for number in range(40)])
        assert len(found) == 40
        # The records are read one by one, at once; job, versions and results take a request each.
        assert sent(fresh) - before <= 40 + 8


@pytest.mark.parametrize("data", [{"a": 1}, ["a", None, 1.5], "text", b"\x00bytes", None, 17, True, {}, ""])
async def test_A01_data_of_any_kind_comes_back_as_it_was(manager: StepResultManager, data: Any) -> None:
    reference = await manager.save_step_result("job-1", 1, "step", data, input_snapshot={"given": 1})
    assert await manager.registry.resolve_context(reference) == data
    assert (await manager.registry.get_step_audit("job-1", "step")).result == data


async def test_A29_results_of_existing_code_are_taken(manager: StepResultManager) -> None:
    @dataclass
    class Point:
        x: int

    class Model:
        """What pydantic's models look like from outside."""

        def model_dump(self, mode: str) -> dict[str, Any]:
            assert mode == "json"
            return {"of": "model"}

    moment = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)
    await manager.save_step_result("job-1", 1, "step", {"at": moment, "point": Point(1), "model": Model(), 3: {"a"}})
    assert await manager.registry.get_context("job-1", "step") == {
        "at": "2026-01-31T09:30:00Z",
        "point": {"x": 1},
        "model": {"of": "model"},
        "3": ["a"],
    }


async def test_what_has_no_form_in_json_is_refused_and_nothing_is_saved(manager: StepResultManager) -> None:
    itself: list[Any] = []
    itself.append(itself)
    for bad in ({"x": object()}, {"x": float("nan")}, itself):
        with pytest.raises(InvalidBodyError):
            await manager.save_step_result("job-1", 1, "step", bad)
        with pytest.raises(InvalidBodyError):
            await manager.save_step_result("job-1", 1, "step", {}, input_snapshot=bad)
    assert await manager.registry.get_execution_contexts("job-1") == []
    assert await manager.registry.get_full_history("job-1") == {}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"job_id": ""}, "job_id"),
        ({"job_id": 5}, "job_id"),
        ({"job_id": "x" * 257}, "job_id"),
        ({"root_job_id": ""}, "root_job_id"),
        ({"step_name": "\ud800"}, "step_name"),
        ({"step_number": -1}, "step_number"),
        ({"step_number": True}, "step_number"),
        ({"relative_step_number": "1"}, "relative_step_number"),
        ({"execution_context_id": "first"}, "execution_context_id"),
        ({"execution_context_id": -1}, "execution_context_id"),
        ({"context_keys_used": "input_content"}, "context_keys_used"),
        ({"context_keys_used": [1]}, "context_keys_used"),
        ({"metadata": {"x": object()}}, "metadata"),
        ({"metadata": {"x": float("inf")}}, "metadata"),
        ({"metadata": ["x"]}, "metadata"),
    ],
)
async def test_a_bad_argument_is_named(manager: StepResultManager, change: dict[str, Any], field: str) -> None:
    arguments: dict[str, Any] = {"job_id": "j", "step_number": 1, "step_name": "s", "result_data": {}, **change}
    with pytest.raises(InvalidFieldError) as caught:
        await manager.save_step_result(**arguments)
    assert caught.value.field == field
    assert await manager.registry.get_jobs() == []


async def test_names_that_are_too_long_together_are_refused_before_anything_is_stored(
    manager: StepResultManager,
) -> None:
    with pytest.raises(InvalidNameError, match="job id and step name"):
        await manager.save_step_result("ü" * 100, 1, "ß" * 100, {})
    assert await manager.registry.get_jobs() == []


async def test_A10_jobs_contexts_and_steps_are_laid_out_by_name(manager: StepResultManager, hf: Holdfast) -> None:
    await manager.save_step_result("job-1", 1, "seo_keywords", KEYWORDS)
    await manager.begin_execution_context("job-1")
    await manager.save_step_result("job-1", 2, "article", ARTICLE)
    keys = [version.key async for version in hf.keys.list("job.")]
    assert keys == ["job.job-1.context_0.seo_keywords", "job.job-1.context_1.article"]


async def test_names_with_dots_and_anything_else_are_kept_apart(manager: StepResultManager) -> None:
    names = [
        ("a", "b.c"), ("a.b", "c"), ("a.context_0.b", "c"), ("a", "context_0.b.c"), ("ä*>", " $\n"), ("x--", "x--a"),
    ]  # fmt: skip
    for job, step in names:
        await manager.save_step_result(job, 1, step, [job, step])
    for job, step in names:
        assert (await manager.registry.get_full_history(job))["0"][step] == [job, step]
    assert {record.job_id for record in await manager.registry.get_jobs()} == {job for job, _ in names}


# Versions and execution contexts


async def test_A01_A06_saving_a_step_twice_keeps_both(manager: StepResultManager) -> None:
    """An earlier system overwrote the file in place."""
    first = await manager.save_step_result("job-1", 1, "article", ARTICLE, input_snapshot={"draft": 1})
    second = await manager.save_step_result("job-1", 1, "article", {"title": "Better"}, input_snapshot={"draft": 2})
    registry = manager.registry
    assert (first.version, second.version) == (1, 2)
    assert await registry.get_context("job-1", "article") == {"title": "Better"}
    assert await registry.resolve_context(first) == ARTICLE
    assert (await registry.get_step_audit("job-1", "article", version=1)).input_snapshot == {"draft": 1}
    assert outcomes(await registry.history("job-1")) == [("0", "article", 1), ("0", "article", 2)]
    with pytest.raises(NotFoundError):
        await registry.get_step_audit("job-1", "article", version=3)


async def test_A19_full_history_by_execution_context(manager: StepResultManager, elsewhere: ContextRegistry) -> None:
    await manager.save_step_result("job-1", 2, "marketing_brief", BRIEF)
    await manager.save_step_result("job-1", 1, "seo_keywords", KEYWORDS)
    await manager.begin_execution_context("job-1")
    await manager.save_step_result("job-1", 3, "article_generation", ARTICLE)
    history = await elsewhere.get_full_history("job-1")
    assert history == {
        "0": {"seo_keywords": KEYWORDS, "marketing_brief": BRIEF},
        "1": {"article_generation": ARTICLE},
    }
    assert list(history["0"]) == ["seo_keywords", "marketing_brief"]  # by step number
    assert await elsewhere.get_full_history("nobody") == {}


async def test_A04_the_newest_context_wins_and_old_ones_answer_with_their_own(manager: StepResultManager) -> None:
    """An earlier system's index did not know contexts, so that asking for an old one gave the newest."""
    registry = manager.registry
    for number in range(12):
        await manager.save_step_result("job-1", 1, "article", {"of": number}, execution_context_id=str(number))
        assert await registry.get_context("job-1", "article") == {"of": number}
    for number in range(12):
        for form in (number, str(number), f"context_{number}"):
            assert await registry.get_context("job-1", "article", execution_context_id=form) == {"of": number}
        reference = registry.get_context_reference("job-1", "article", str(number))
        assert await registry.resolve_context(reference) == {"of": number}
    # A late save in an old context is that context's alone.
    await manager.save_step_result("job-1", 1, "article", {"of": "late"}, execution_context_id=3)
    assert await registry.get_context("job-1", "article") == {"of": 11}
    assert await registry.get_context("job-1", "article", execution_context_id=3) == {"of": "late"}


async def test_A04_A27_a_resumed_job_reads_what_was_there_and_writes_its_own(
    manager: StepResultManager, elsewhere: ContextRegistry
) -> None:
    await manager.save_step_result("job-1", 1, "seo_keywords", KEYWORDS)
    await manager.save_step_result("job-1", 2, "brief", BRIEF)
    resumed = StepResultManager(elsewhere)
    assert await resumed.begin_execution_context("job-1-resumed", root_job_id="job-1") == "1"
    # Before it has saved anything, and under its own id.
    assert await elsewhere.get_context("job-1-resumed", "seo_keywords") == KEYWORDS
    await resumed.save_step_result("job-1-resumed", 2, "brief", {"tone": "loud"})
    assert await elsewhere.get_context("job-1", "brief") == {"tone": "loud"}
    assert await elsewhere.get_context("job-1", "brief", execution_context_id="0") == BRIEF
    third = await manager.save_step_result("job-1-again", 3, "article", ARTICLE, root_job_id="job-1-resumed")
    assert (third.job_id, third.root_job_id, third.execution_context_id) == ("job-1-again", "job-1", "2")
    expected = {
        "0": {"seo_keywords": KEYWORDS, "brief": BRIEF},
        "1": {"brief": {"tone": "loud"}},
        "2": {"article": ARTICLE},
    }
    for job in ("job-1", "job-1-resumed", "job-1-again"):
        assert await elsewhere.get_full_history(job) == expected


async def test_a_job_has_one_root(manager: StepResultManager) -> None:
    await manager.save_step_result("job-2", 1, "step", 1, root_job_id="job-1")
    await manager.save_step_result("job-2", 1, "step", 2)  # told once is enough
    await manager.save_step_result("job-2", 1, "step", 3, root_job_id="job-1")
    for other in ("job-3", "job-2.1"):
        with pytest.raises(InvalidFieldError, match="'job-1' already") as caught:
            await manager.save_step_result("job-2", 1, "step", 4, root_job_id=other)
        assert caught.value.field == "root_job_id"
    with pytest.raises(InvalidFieldError, match="'job-1' already"):
        await manager.save_step_result("job-1", 1, "step", 4, root_job_id="job-3")
    assert await manager.registry.get_full_history("job-1") == {"1": {"step": 3}}


async def test_A04_saves_go_to_the_context_that_their_own_job_began_last(manager: StepResultManager) -> None:
    async def save(job: str) -> str | None:
        return (await manager.save_step_result(job, 1, "step", {}, root_job_id="root")).execution_context_id

    assert await save("first resumed") == "1"  # 0 is the root's own, even when it comes late
    assert await save("second resumed") == "2"
    assert await save("root") == "0"
    assert await save("first resumed") == "1"
    assert await manager.begin_execution_context("first resumed") == "3"
    assert await save("first resumed") == "3"
    assert await save("second resumed") == "2"
    assert await save("root") == "0"
    assert [(c.id, c.job_id) for c in await manager.registry.get_execution_contexts("root")] == [
        ("0", "root"), ("1", "first resumed"), ("2", "second resumed"), ("3", "first resumed"),
    ]  # fmt: skip


async def test_A04_a_context_that_is_named_counts_like_one_that_was_begun(
    manager: StepResultManager, elsewhere: ContextRegistry
) -> None:
    await manager.save_step_result("job", 1, "step", {"of": 0})
    await manager.save_step_result("job", 1, "step", {"of": 5}, execution_context_id=5)
    assert await elsewhere.get_context("job", "step") == {"of": 5}
    assert await elsewhere.begin_execution_context("job") == "6"


async def test_A04_workers_that_resume_at_once_get_a_context_each(nats_server: str, namespace: str) -> None:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(nats_server, namespace)) for _ in range(4)]
        registries = [ContextRegistry(hf) for hf in clients]
        await registries[0].register_step_output("job", "step", 1, {"of": "first run"})
        begun = await asyncio.gather(
            *(registry.begin_execution_context("job") for registry in registries for _ in range(5))
        )
        assert sorted(begun, key=int) == [str(number) for number in range(1, 21)]
        await asyncio.gather(
            *(
                registries[n % 4].register_step_output("job", "step", 1, {"of": number}, execution_context_id=number)
                for n, number in enumerate(begun)
            )
        )
        history = await registries[0].get_full_history("job")
        assert history == {"0": {"step": {"of": "first run"}}} | {number: {"step": {"of": number}} for number in begun}


async def test_A04_one_of_two_workers_resumes_when_both_say_what_they_saw(
    manager: StepResultManager, elsewhere: ContextRegistry
) -> None:
    await manager.save_step_result("job", 1, "step", {})
    attempts = [registry.begin_execution_context("job", expected="0") for registry in (manager.registry, elsewhere)]
    done = await asyncio.gather(*attempts, return_exceptions=True)
    assert done.count("1") == 1
    (conflict,) = [outcome for outcome in done if isinstance(outcome, VersionConflictError)]
    assert (conflict.expected, conflict.actual) == (0, 1)
    assert len(await elsewhere.get_execution_contexts("job")) == 2
    with pytest.raises(NotFoundError, match="no execution context yet"):
        await elsewhere.begin_execution_context("nobody", expected=0)
    assert await elsewhere.begin_execution_context("nobody") == "0"


# What others write


async def test_a_record_that_somebody_else_wrote_is_told_by_its_key(manager: StepResultManager, hf: Holdfast) -> None:
    await manager.save_step_result("job-1", 1, "good", {})
    await hf.keys.put("job.job-1.context_0.bad", {"not": "a record"})
    await hf.keys.put("job.job-1.context_0.bad.deeper", "no step's key")
    await hf.keys.put("jobs.bad", ["not a job"])
    with pytest.raises(InvalidBodyError, match=r"job\.job-1\.context_0\.bad") as caught:
        await manager.registry.get_context("job-1", "bad")
    assert caught.value.hint is not None
    assert await manager.registry.get_context("job-1", "good") == {}
    assert [record.job_id for record in await manager.registry.get_jobs()] == ["job-1"]


async def test_steps_are_found_without_their_job(
    manager: StepResultManager, elsewhere: ContextRegistry, hf: Holdfast
) -> None:
    await manager.save_step_result("job-1", 1, "step", {"of": 0})
    await manager.save_step_result("job-1", 1, "step", {"of": 10}, execution_context_id=10)
    await manager.save_step_result("job-1", 1, "step", {"of": 9}, execution_context_id=9)
    await hf.keys.delete("jobs.job-1")
    assert await elsewhere.get_context("job-1", "step") == {"of": 10}


# Inputs and the audit


async def test_A03_A14_A15_A28_the_audit_gives_exactly_what_a_step_used(
    manager: StepResultManager, elsewhere: ContextRegistry
) -> None:
    given: dict[str, Any] = {"input_content": {"text": "tea"}, "seo_keywords": KEYWORDS, "unused": [1, 2]}
    await manager.save_step_result(
        "job-1",
        2,
        "brief",
        BRIEF,
        metadata={"tokens_used": 120, "status": "success"},
        input_snapshot=given,
        context_keys_used=["seo_keywords", "input_content", "absent"],
        relative_step_number=1,
    )
    given["seo_keywords"] = "changed by the next step"
    audit = await elsewhere.get_step_audit("job-1", "brief")
    assert audit.input_snapshot == {"input_content": {"text": "tea"}, "seo_keywords": KEYWORDS, "unused": [1, 2]}
    assert audit.used == {"seo_keywords": KEYWORDS, "input_content": {"text": "tea"}}
    assert audit.context_keys_used == ("seo_keywords", "input_content", "absent")
    assert audit.result == BRIEF
    assert audit.metadata == {"tokens_used": 120, "status": "success"}
    assert (audit.step_number, audit.relative_step_number, audit.version) == (2, 1, 1)
    as_dict = await manager.get_step_result_by_name("job-1", "brief")
    assert as_dict["result"] == BRIEF
    assert as_dict["input_snapshot"] == audit.input_snapshot
    assert (await manager.get_full_context_history("job-1"))["0"]["brief"] == as_dict
    with pytest.raises(NotFoundError, match="no step 'article'"):
        await elsewhere.get_step_audit("job-1", "article")


async def test_A28_references_in_an_input_tell_the_version_that_was_used(
    manager: StepResultManager, elsewhere: ContextRegistry, hf: Holdfast
) -> None:
    first = await manager.save_step_result("job-1", 1, "seo_keywords", KEYWORDS)
    pending = manager.registry.get_context_reference("job-1", "seo_keywords")
    await manager.save_step_result(
        "job-1", 2, "brief", BRIEF, input_snapshot={"a": first, "b": pending}, context_keys_used=["a", "b"]
    )
    nested = await manager.save_step_result(
        "job-1", 3, "plan", {"of": [manager.registry.get_context_reference("job-1", "seo_keywords")]}
    )
    await manager.save_step_result("job-1", 1, "seo_keywords", {"main": "coffee"})
    audit = await elsewhere.get_step_audit("job-1", "brief")
    assert audit.used == {"a": KEYWORDS, "b": KEYWORDS}
    assert audit.input_ref is not None
    stored = (await hf.resolve(audit.input_ref)).body
    assert stored == {"a": first.to_dict(), "b": first.to_dict()}  # and nothing of the data
    assert await elsewhere.resolve_context(nested) == {"of": [first.to_dict()]}


async def test_A26_equal_inputs_and_results_are_stored_once(manager: StepResultManager, hf: Holdfast) -> None:
    for number in range(5):
        await manager.save_step_result("job-1", number, f"step {number}", KEYWORDS, input_snapshot={"a": 1, "b": 2})
    await manager.save_step_result("job-1", 6, "step 6", {"b": 2, "a": 1})
    steps = await manager.registry.get_steps("job-1")
    results, inputs = {s.record.result for s in steps}, {s.record.input for s in steps[:5]}
    assert len(inputs) == 1
    assert len(results) == 2
    assert results > inputs  # the last result is the others' input


async def test_A26_references_keep_memory_flat(manager: StepResultManager, hf: Holdfast) -> None:
    size, count = 1 << 19, 32
    for number in range(count):
        await manager.save_step_result("job-1", number, f"step {number}", f"{number} " * (size // 3))
    async with connect(hf.connection.target, hf.namespace, cache_bytes=0) as fresh:
        registry = ContextRegistry(fresh)
        names = [f"step {number}" for number in range(count)]
        await registry.get_context("job-1", "nothing yet")
        gc.collect()
        tracemalloc.start()
        try:
            references = await registry.get_context_references("job-1", names)
            audits = await registry.history("job-1")
            _, peak = tracemalloc.get_traced_memory()
            assert len(references) == len(audits) == count
            assert peak < size, "pointers hold data"
            for name in names:
                assert len(await registry.resolve_context(references[name])) > size // 2
            gc.collect()
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < size
        assert peak < 8 * size, "more than a step's data at a time"


async def test_A08_large_results_are_stored_compressed(manager: StepResultManager, hf: Holdfast) -> None:
    large = {"text": "the same words again and again " * 2_000}
    references = {
        size: await manager.save_step_result("job-1", 1, size, data) for size, data in (("large", large), ("small", {}))
    }
    assert [references[size].compressed for size in ("large", "small")] == [True, False]
    stored = {}
    for size, reference in references.items():
        assert reference.ref is not None
        subject = hot_subject(hf.namespace, parse_ref(reference.ref).digest)
        message = await hf.connection.api(f"STREAM.MSG.GET.{HOT_STREAM}", {"last_by_subj": subject})
        stored[size] = len(message["message"].get("data", ""))
    assert stored["large"] < 5_000
    assert await manager.registry.get_context("job-1", "large") == large
    for enable in (True, False):
        registry = ContextRegistry(hf, enable_compression=enable)
        assert await registry.get_context("job-1", "large") == large


async def test_A01_a_crash_leaves_the_step_saved_or_not(
    manager: StepResultManager, elsewhere: ContextRegistry, hf: Holdfast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever write of a save is the last to arrive, readers see the old result or the new one, and its input."""
    await manager.save_step_result("job-1", 1, "article", {"draft": 0}, input_snapshot={"draft": 0})

    def dies_at(number: int, write: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
        async def call(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == number:
                raise UnknownOutcomeError("the process was killed")
            return await write(*arguments, **options)

        return call

    died, draft = 0, {"draft": 0}
    for number in range(1, 10):
        calls: list[int] = []
        job, draft = f"resumed {number}", {"draft": number}
        with monkeypatch.context() as patch:
            for owner, name in ((hf, "put"), (hf.keys, "put"), (hf.keys, "update")):
                patch.setattr(owner, name, dies_at(number, getattr(owner, name), calls))
            try:
                await manager.save_step_result(job, 1, "article", draft, input_snapshot=draft, root_job_id="job-1")
            except UnknownOutcomeError:
                died += 1
                assert await elsewhere.get_context("job-1", "article") == {"draft": 0}
            else:
                break
        assert await elsewhere.get_full_history("job-1") == {"0": {"article": {"draft": 0}}}
        # The same call again, as a worker that is started anew makes it, saves it.
        again = f"again {number}"
        await ContextRegistry(hf).register_step_output(again, "article", 1, again, draft, root_job_id=again)
        audit = await elsewhere.get_step_audit(again, "article")
        assert (audit.result, audit.input_snapshot) == (again, draft)
    assert died == 5, "link, execution context, result, input, record"
    audit = await elsewhere.get_step_audit("job-1", "article")
    assert audit.result == audit.input_snapshot == draft


async def test_data_and_record_are_encrypted_where_the_policy_says_so(hf: Holdfast, elsewhere: ContextRegistry) -> None:
    async with connect(hf.connection.target, hf.namespace, key_ring=KeyRing.of({"k1": b"k" * 32}, "k1")) as sealing:
        await sealing.keys.set_policy("job.", KeyPolicy(encrypt=True))
        secret = StepResultManager(sealing)
        reference = await secret.save_step_result("job-1", 1, "step", KEYWORDS, input_snapshot=BRIEF)
        audit = await secret.registry.get_step_audit("job-1", "step")
        assert (audit.result, audit.input_snapshot) == (KEYWORDS, BRIEF)
        plain = await secret.save_step_result("job-2", 1, "step", KEYWORDS, encrypt=False)
    assert await elsewhere.resolve_context(plain) == KEYWORDS
    record = await hf.keys.head("job.job-1.context_0.step")
    assert record is not None
    for ref in (reference.ref, audit.input_ref, record.ref):
        assert ref is not None
        with pytest.raises(EncryptionKeyError):
            await elsewhere.resolve_context(ref)
    with pytest.raises(EncryptionKeyError):
        await elsewhere.get_context("job-1", "step")


# Accessors


@pytest.fixture
def found_server(nats_server: str, namespace: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOLDFAST_NATS_URL", nats_server)
    monkeypatch.setenv("HOLDFAST_NAMESPACE", namespace)
    asyncio.run(get_context_registry().close())  # that of another test
    return nats_server


def test_A12_A16_the_accessors_need_no_set_up_and_any_event_loop_will_do(found_server: str, namespace: str) -> None:
    async def first() -> None:
        manager = get_step_result_manager()
        await manager.save_step_result(
            job_id="job-1",
            step_number=1,
            step_name="seo_keywords",
            result_data=KEYWORDS,
            input_snapshot={"input_content": "tea"},
            context_keys_used=["input_content"],
        )

    async def second() -> None:
        registry = get_context_registry()
        assert await registry.get_context(job_id="job-1", key="seo_keywords") == KEYWORDS
        reference = registry.get_context_reference(job_id="job-1", step_name="seo_keywords")
        await get_step_result_manager().save_step_result("job-1", 1, "seo_keywords", {})
        assert await registry.resolve_context(reference) == KEYWORDS
        async with connect(found_server, namespace) as hf:
            assert await ContextRegistry(hf).get_context("job-1", "seo_keywords") == {}

    assert get_context_registry() is get_context_registry()
    assert get_step_result_manager() is get_step_result_manager()
    assert get_step_result_manager().registry is get_context_registry()
    asyncio.run(first())
    asyncio.run(second())


def test_A16_a_closed_registry_is_replaced(found_server: str) -> None:
    closed = get_context_registry()

    async def use_and_close() -> None:
        await get_step_result_manager().save_step_result("job-1", 1, "step", 1)
        await closed.close()
        assert closed.is_closed
        assert get_context_registry() is not closed
        assert await get_context_registry().get_context("job-1", "step") == 1
        await get_context_registry().close()

    asyncio.run(use_and_close())


async def test_a_registry_leaves_the_client_that_it_was_given_open(hf: Holdfast, nats_server: str) -> None:
    registry = ContextRegistry(hf)
    await registry.close()
    assert not registry.is_closed
    assert await registry.get_context("job-1", "step") is None
    share = ClientShare(nats_server, hf.namespace)
    shared = StepResultManager(ContextRegistry(share))
    await shared.save_step_result("job-1", 1, "step", 1)
    await shared.registry.close()
    assert await registry.get_context("job-1", "step") == 1
    await share.aclose()


GUIDE = Path(__file__).parents[2] / "docs" / "pipelines.md"


async def test_A12_A16_A29_the_example_of_the_guide_runs_as_it_stands(
    nats_server: str, namespace: str, tmp_path: Path
) -> None:
    example, printed = re.findall(r"^```(?:python)?\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "error", "-X", "dev", "-c", example],
        env=environment(HOLDFAST_NATS_URL=nats_server, HOLDFAST_NAMESPACE=namespace),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # Development mode tells of every callback of over 0.1 s, which on a busy machine may be any.
    told = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
    assert (done.stdout, told, done.returncode) == (printed, [], 0)


# A pipeline


Step = Callable[[Mapping[str, Any]], Any]


class Pipeline:
    """As small as can be: steps by name, each with the context keys that it needs."""

    def __init__(self, steps: Mapping[str, tuple[list[str], Step]], manager: StepResultManager | None = None) -> None:
        self._steps = steps
        self._manager = manager

    async def run(self, job_id: str, context: dict[str, Any], names: list[str], root: str | None = None) -> None:
        for number, name in enumerate(names, 1):
            required, step = self._steps[name]
            if self._manager is None:
                context[name] = step(context)  # as it was before there was a registry
                continue
            if root is not None:
                await self._manager.begin_execution_context(job_id, root_job_id=root)
                root = None
            given = await self._manager.registry.resolve_missing(context, required, job_id)
            context[name] = await self._manager.save_step_result(
                job_id, number, name, step(given), input_snapshot=context, context_keys_used=required
            )


STEPS: dict[str, tuple[list[str], Step]] = {
    "seo_keywords": (["input_content"], lambda context: {"main": context["input_content"].upper()}),
    "brief": (["seo_keywords"], lambda context: {"about": context["seo_keywords"]["main"]}),
    "article": (
        ["brief", "seo_keywords"],
        lambda context: [context["brief"]["about"], context["seo_keywords"]["main"]],
    ),
}


async def test_A22_A23_A25_A27_A29_a_pipeline_passes_references_and_is_resumed(
    manager: StepResultManager, elsewhere: ContextRegistry
) -> None:
    context: dict[str, Any] = {"input_content": "tea"}
    await Pipeline(STEPS, manager).run("job-1", context, ["seo_keywords", "brief"])
    # A22, A23: each output is registered, and what is handed on is a reference to it.
    assert await elsewhere.query_context("job-1", ["seo_keywords", "brief"]) == {
        "seo_keywords": {"main": "TEA"},
        "brief": {"about": "TEA"},
    }
    assert isinstance(context["seo_keywords"], ContextReference)
    audit = await elsewhere.get_step_audit("job-1", "brief")
    assert audit.used == {"seo_keywords": {"main": "TEA"}}
    # A25, A27: after approval another process goes on, with nothing in its hands.
    resumed: dict[str, Any] = {}
    await Pipeline(STEPS, StepResultManager(elsewhere)).run("job-2", resumed, ["article"], root="job-1")
    assert await elsewhere.resolve_context(resumed["article"]) == ["TEA", "TEA"]
    assert await manager.registry.get_full_history("job-1") == {
        "0": {"seo_keywords": {"main": "TEA"}, "brief": {"about": "TEA"}},
        "1": {"article": ["TEA", "TEA"]},
    }
    # A29: the same steps without a registry.
    direct: dict[str, Any] = {"input_content": "tea"}
    await Pipeline(STEPS).run("job-3", direct, list(STEPS))
    assert direct["article"] == ["TEA", "TEA"]


async def test_A24_A29_references_and_data_may_be_mixed(manager: StepResultManager) -> None:
    registry = manager.registry
    saved = await manager.save_step_result("job-1", 1, "saved", {"n": 1})
    await manager.save_step_result("job-1", 2, "looked up", {"n": 2})
    context = {"direct": {"n": 0}, "saved": saved.to_dict(), "other": saved}
    before = copy.copy(context)
    given = await registry.resolve_missing(context, ["direct", "saved", "looked up"], "job-1")
    assert given == {"direct": {"n": 0}, "saved": {"n": 1}, "looked up": {"n": 2}, "other": saved}
    assert context == before
    assert await registry.resolve_missing({"direct": 1}, ["direct"]) == {"direct": 1}


async def test_A25_context_keys_that_are_nowhere_are_named(manager: StepResultManager) -> None:
    await manager.save_step_result("job-1", 1, "there", {})
    with pytest.raises(NotFoundError, match="context keys here, gone are neither") as caught:
        await manager.registry.resolve_missing({}, ["there", "here", "gone"], "job-1")
    assert caught.value.field == "required_keys"
    with pytest.raises(NotFoundError, match="there"):
        await manager.registry.resolve_missing({}, ["there"])
