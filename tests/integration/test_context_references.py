"""References to step results: light, pinned to the data that they were taken of, and as good as the data itself."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from holdfast.client import ContextReference, ContextRegistry, Holdfast, StepResultManager, connect
from holdfast.schemas.errors import NotFoundError

KEYWORDS = {"main": "green tea", "others": ["matcha", "sencha"]}
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


async def test_A20_A21_references_carry_the_right_job(manager: StepResultManager, elsewhere: ContextRegistry) -> None:
    """An earlier system's references named the resumed job while the file lay under its root."""
    await manager.save_step_result("job-1", 1, "seo_keywords", KEYWORDS)
    saved = await manager.save_step_result("job-2", 2, "article", ARTICLE, root_job_id="job-1")
    assert (saved.job_id, saved.root_job_id) == ("job-2", "job-1")
    for job in ("job-1", "job-2"):
        for step, ran_by, data in (("seo_keywords", "job-1", KEYWORDS), ("article", "job-2", ARTICLE)):
            reference = await elsewhere.get_context_reference(job, step)
            assert reference is not None
            assert (reference.job_id, reference.root_job_id) == (ran_by, "job-1")
            told = msgspec.json.decode(msgspec.json.encode(reference.to_dict()))
            # Also with the members alone that references have always had.
            old = {name: told[name] for name in told if name not in ("root_job_id", "version", "ref")}
            for form in (reference, told, old, ContextReference.from_dict(old)):
                assert await elsewhere.resolve_context(form) == data


async def test_A02_A07_A20_a_reference_asks_nobody(manager: StepResultManager, hf: Holdfast) -> None:
    await manager.save_step_result("job-1", 1, "seo_keywords", KEYWORDS)
    before = sent(hf)
    reference = manager.registry.get_context_reference(job_id="job-1", step_name="seo_keywords")
    assert (reference.job_id, reference.step_name, reference.is_pinned) == ("job-1", "seo_keywords", False)
    assert "pending" in repr(reference)
    assert sent(hf) == before
    assert await manager.registry.resolve_context(reference) == KEYWORDS
    assert (reference.step_number, reference.execution_context_id, reference.version) == (1, "0", 1)


async def test_A20_a_reference_that_is_awaited_is_complete(manager: StepResultManager) -> None:
    saved = await manager.save_step_result("job-1", 1, "seo_keywords", KEYWORDS)
    reference = await manager.registry.get_context_reference("job-1", "seo_keywords")
    assert reference == saved
    assert await manager.registry.get_context_reference("job-1", "brief") is None
    many = await manager.registry.get_context_references("job-1", ["seo_keywords", "brief"])
    assert many == {"seo_keywords": saved}


async def test_A09_A21_whatever_form_a_reference_has_it_gives_the_data(
    manager: StepResultManager, elsewhere: ContextRegistry
) -> None:
    saved = await manager.save_step_result("job-1", 1, "seo_keywords", KEYWORDS)
    for form in (saved, saved.to_dict(), ContextReference.from_dict(saved.to_dict()), saved.ref):
        assert await elsewhere.resolve_context(form) == KEYWORDS


@pytest.mark.parametrize(
    "data", [{"seo": {"main": "tea"}}, {}, {"job_id": "j", "step_name": "s"}, [1], None, "text", "ctx_no", 5, b"\x00"]
)
async def test_A24_data_passed_directly_is_returned_as_it_is(
    registry: ContextRegistry, hf: Holdfast, data: Any
) -> None:
    before = sent(hf)
    assert await registry.resolve_context(data) is data
    assert sent(hf) == before


async def test_A09_a_reference_keeps_to_the_data_that_it_was_taken_of(
    manager: StepResultManager, elsewhere: ContextRegistry
) -> None:
    registry = manager.registry
    await manager.save_step_result("job-1", 1, "article", {"draft": 1})
    awaited = await registry.get_context_reference("job-1", "article")
    pending = registry.get_context_reference("job-1", "article")  # nobody has asked for it yet
    resumed = registry.get_context_reference("job-2", "article")
    assert awaited is not None
    await manager.begin_execution_context("job-2", root_job_id="job-1")
    await manager.save_step_result("job-1", 1, "article", {"draft": 2})
    await manager.save_step_result("job-2", 1, "article", {"draft": 3})
    for reference in (awaited, pending, resumed):
        assert await registry.resolve_context(reference) == {"draft": 1}
    # With its oldest members alone, the time tells which version it was.
    told = {name: value for name, value in awaited.to_dict().items() if name not in ("version", "ref")}
    assert await elsewhere.resolve_context(told) == {"draft": 1}
    with pytest.raises(NotFoundError, match="no step 'article'"):
        await elsewhere.resolve_context(told | {"timestamp": "2026-01-01T00:00:00+00:00"})
    assert await registry.resolve_context(registry.get_context_reference("job-1", "article")) == {"draft": 3}


async def test_a_reference_that_is_taken_too_early_finds_the_step_later(manager: StepResultManager) -> None:
    reference = manager.registry.get_context_reference("job-1", "article")
    with pytest.raises(NotFoundError, match="job 'job-1' has no step 'article'"):
        await manager.registry.resolve_context(reference)
    await manager.save_step_result("job-1", 1, "article", ARTICLE)
    assert await manager.registry.resolve_context(reference) == ARTICLE


async def test_references_that_were_dropped_are_forgotten(manager: StepResultManager, hf: Holdfast) -> None:
    registry = manager.registry
    dropped = [registry.get_context_reference(f"job-{number}", "article") for number in range(1_000)]
    dropped.clear()
    gc.collect()
    before = sent(hf)
    await manager.save_step_result("job-1", 1, "article", ARTICLE)
    assert sent(hf) - before < 20
