"""Optimization runs on a real server: captured, looked into, compared, hot and archived alike."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from holdfast.client import Holdfast, connect, lineage
from holdfast.client.optimization_records import introspection_members
from holdfast.schemas.errors import InvalidFieldError, NotFoundError, UnavailableError
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.events import NewEvent
from holdfast.workers.control import evict, flush
from tests.running import own_server, running, settings_in, target_of
from tests.support import plain_client

pytestmark = pytest.mark.asyncio(loop_scope="module")

START = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)
DATA: dict[str, Any] = {"framework": "dspy", "config": {"trials": 3}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[str]:
    """A system that archives when it is told to."""
    data: Path = tmp_path_factory.mktemp("optimizations")
    async with own_server(data) as server, running(server.url, settings_in(data)):
        yield server.url


@pytest_asyncio.fixture(loop_scope="module")
async def hf(url: str, namespace: str) -> AsyncIterator[Holdfast]:
    """A client that asks the tiers each time."""
    async with connect(url, namespace, "optimizer", cache_bytes=0) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def control(url: str) -> AsyncGenerator[Connection]:
    async with open_connection(target_of(url)) as connection:
        yield connection


async def make_cold(control: Connection) -> None:
    await flush(control)
    assert (await evict(control, 0.0)).left == 0


async def call(url: str, namespace: str, endpoint: str, request: dict[str, Any]) -> dict[str, Any]:
    """Calls an endpoint as a plain client; an error is returned as it came."""
    async with plain_client(url) as nc:
        reply = await nc.request(f"ctx.{namespace}.{endpoint}", json.dumps(request).encode(), timeout=20)
    answer: dict[str, Any] = json.loads(reply.data)
    return answer


async def add_run(
    hf: Holdfast,
    run: str,
    states: dict[str, float],
    *,
    framework: str | None,
    score: float | None = None,
    begun: datetime = START,
    is_foreign: bool = False,
    **data: Any,
) -> None:
    """Stores a run as another machine did it at known times: its last state tells the score.

    A foreign publisher says nothing in its events beside the reference.
    """
    events: list[NewEvent] = []
    named = {"framework": framework, **data} if framework is not None else data
    for state, at_s in states.items():
        body: dict[str, Any] = {"optimization_id": run, "state": state, "data": named}
        if score is not None and state == list(states)[-1]:
            body["result"] = {"best_score": score}
        told: dict[str, Any] = {"optimization_id": run, "state": state}
        if framework is not None:
            told["framework"] = framework
        if "result" in body:
            told["performance"] = {"score": score}
        events.append(
            NewEvent(
                namespace=hf.namespace,
                agent_id="optimizer",
                name=f"optimization:{state}",
                timestamp_ms=round((begun + timedelta(seconds=at_s)).timestamp() * 1000),
                correlation_id=run,
                context_ref=await hf.put(body, kind="optimization_state"),
                data=None if is_foreign else told,
            )
        )
    await hf.publish_many(events)


async def test_B47_each_state_is_a_context_and_an_event_under_the_explicit_lineage(hf: Holdfast) -> None:
    request = await hf.emit("optimize:requested", session="s1")
    current = await hf.emit("somewhere:else")
    context = lineage.of(request)
    with lineage.within(current):
        await hf.optimizations.capture("opt_1", "initializing", DATA, context)
        await hf.optimizations.capture("opt_1", "optimizing", DATA, context, component_content="text")
        ref = await hf.optimizations.capture("opt_1", "completed", DATA, context, result={"best_score": 0.82})
    events = [event async for event in hf.query(correlation="opt_1")]
    assert [event.name.split(":")[1] for event in events] == ["initializing", "optimizing", "completed"]
    assert {event.parent_event_id for event in events} == {request.event_id}
    assert {event.session_id for event in events} == {"s1"}
    assert events[2].context_ref == ref
    assert ref.startswith("ctx_optimization_state_")
    assert (await hf.resolve(str(events[1].context_ref))).body == {
        "optimization_id": "opt_1", "state": "optimizing", "data": DATA, "component_content": "text",
    }  # fmt: skip


async def test_B74_a_state_adds_performance_to_the_merged_context(hf: Holdfast) -> None:
    request = await hf.emit("optimize:requested", session="s1")
    merged = lineage.merge(lineage.of(request), {"_originator": "planner", "attempt": 2})
    await hf.optimizations.capture("opt_1", "completed", DATA, merged, result={"score": 3})
    (event,) = [event async for event in hf.query(name="optimization:completed")]
    assert event.data == {
        "optimization_id": "opt_1", "state": "completed", "framework": "dspy",
        "performance": {"score": 3.0, "member": "result.score"},
    }  # fmt: skip
    assert (event.originator, event.attributes, event.parent_event_id) == ("planner", {"attempt": 2}, request.event_id)


async def test_B47_without_a_context_a_state_belongs_to_the_current_event(hf: Holdfast) -> None:
    request = await hf.emit("optimize:requested")
    with lineage.within(request):
        first = await hf.optimizations.capture("opt_1", "optimizing")
        assert await hf.optimizations.capture("opt_1", "optimizing") == first
    events = [event async for event in hf.query(name="optimization:optimizing")]
    assert [event.parent_event_id for event in events] == [request.event_id] * 2
    refused: list[tuple[str, str, dict[str, Any]]] = [
        ("", "x", {}),
        ("o", "a:b", {}),
        ("o", "x", {"optimization_id": "p"}),
    ]
    for identity, state, extra in refused:
        with pytest.raises(InvalidFieldError):
            await hf.optimizations.capture(identity, state, **extra)


@pytest.mark.parametrize("is_cold", [False, True])
async def test_B48_introspection_tells_states_durations_bodies_and_changes(
    hf: Holdfast, url: str, namespace: str, control: Connection, is_cold: bool
) -> None:
    await add_run(
        hf, "opt_1", {"initializing": 0, "optimizing": 1.5, "completed": 61.5}, framework="dspy", score=0.82, trials=3
    )
    await add_run(hf, "opt_2", {"initializing": 0}, framework="dspy")
    if is_cold:
        await make_cold(control)
    found = await hf.optimizations.introspect("opt_1")
    assert (found.status, found.framework, found.duration_s, found.total) == ("completed", "dspy", 61.5, 3)
    assert (found.started_at, found.ended_at) == (START, START + timedelta(seconds=61.5))
    assert [(state.state, state.duration_s) for state in found.states] == [
        ("initializing", 1.5), ("optimizing", 60.0), ("completed", None),
    ]  # fmt: skip
    first, second, last = found.states
    assert first.diff is None
    assert second.diff == [{"op": "replace", "path": "/state", "value": "optimizing"}]
    assert last.diff is not None
    assert {"op": "add", "path": "/result", "value": {"best_score": 0.82}} in last.diff
    assert last.performance == {"score": 0.82, "member": "result.best_score"}
    assert last.body["data"] == {"framework": "dspy", "trials": 3}
    assert last.lineage["event_id"] == last.event_id
    assert last.lineage["correlation_id"] == "opt_1"
    answer = await call(url, namespace, "optimization.introspect", {"optimization_id": "opt_1"})
    assert answer == json.loads(json.dumps(introspection_members(found))), "the endpoint says the same"


async def test_B48_introspection_goes_on_where_a_page_ends(hf: Holdfast, url: str, namespace: str) -> None:
    for number in range(5):
        await hf.optimizations.capture("opt_1", "optimizing", {"trial": number})
    whole = await hf.optimizations.introspect("opt_1")
    assert (whole.status, whole.duration_s, whole.next) == ("running", None, None)
    for limit in (1, 2, 5):
        states: list[Any] = []
        answers: list[Any] = []
        after: int | None = 0
        while after is not None:
            page = await hf.optimizations.introspect("opt_1", after=after, limit=limit)
            request = {"optimization_id": "opt_1", "after": after, "limit": limit}
            answer = await call(url, namespace, "optimization.introspect", request)
            states += page.states
            answers += answer["states"]
            after = page.next
            assert after == answer.get("next")
        assert states == whole.states
        assert answers == json.loads(json.dumps(introspection_members(whole)["states"]))
    assert (await hf.optimizations.introspect("opt_1", after=5)).states == []


async def test_B48_an_answer_ends_before_it_is_too_large(hf: Holdfast, url: str, namespace: str) -> None:
    text = "x" * 310_000
    for number in range(4):
        await hf.optimizations.capture("opt_1", "optimizing", {"trial": number, "text": text})
    await hf.optimizations.capture("opt_1", "completed", {"text": "y" * 950_000})
    request: dict[str, Any] = {"optimization_id": "opt_1"}
    first = await call(url, namespace, "optimization.introspect", request)
    assert [state["body"]["data"]["trial"] for state in first["states"]] == [0, 1]
    assert (first["next"], first["total"], first["status"]) == (2, 5, "completed")
    second = await call(url, namespace, "optimization.introspect", {**request, "after": 2})
    assert [state.get("error") for state in second["states"]] == [None, None, "too_large"]
    assert second["states"][0]["diff"] == [{"op": "replace", "path": "/data/trial", "value": 2}]
    assert "next" not in second
    whole = await hf.optimizations.introspect("opt_1")
    assert len(whole.states[-1].body["data"]["text"]) == 950_000


async def test_B48_a_body_that_is_gone_is_told_and_the_rest_is_there(hf: Holdfast, url: str, namespace: str) -> None:
    await hf.optimizations.capture("opt_1", "initializing", DATA)
    gone = "ctx_optimization_state_" + "a" * 32
    await hf.emit("optimization:optimizing", context=gone, correlation="opt_1")
    await hf.optimizations.capture("opt_1", "completed", DATA)
    found = await hf.optimizations.introspect("opt_1")
    assert [state.error for state in found.states] == [None, "not_found", None]
    assert [state.diff for state in found.states] == [None, None, None]
    answer = await call(url, namespace, "optimization.introspect", {"optimization_id": "opt_1"})
    assert [state.get("error") for state in answer["states"]] == [None, "not_found", None]


async def test_B48_a_damaged_body_is_told_and_hides_no_other(hf: Holdfast, url: str, namespace: str) -> None:
    await hf.optimizations.capture("opt_1", "initializing", DATA)
    damaged = "ctx_optimization_state_" + "b" * 32
    async with plain_client(url) as nc:
        subject = f"$KV.ctx-hot.{namespace}.{'b' * 32}"
        await nc.jetstream().publish(subject, b'{"not": "it"}', headers={"Hf-Kind": "optimization_state"})
    await hf.emit("optimization:optimizing", context=damaged, correlation="opt_1")
    await hf.optimizations.capture("opt_1", "completed", {**DATA, "n": 1})
    found = await hf.optimizations.introspect("opt_1")
    assert [state.error for state in found.states] == [None, "digest_mismatch", None]
    assert [state.body is None for state in found.states] == [False, True, False]
    answer = await call(url, namespace, "optimization.introspect", {"optimization_id": "opt_1"})
    assert [state.get("error") for state in answer["states"]] == [None, "digest_mismatch", None]


async def test_B48_B49_bad_requests_are_refused_by_the_name_of_the_field(
    hf: Holdfast, url: str, namespace: str
) -> None:
    with pytest.raises(NotFoundError):
        await hf.optimizations.introspect("opt_1")
    with pytest.raises(InvalidFieldError):
        await hf.optimizations.introspect("opt_1", limit=0)
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        ("introspect", {}, "invalid_field", "optimization_id"),
        ("introspect", {"optimization_id": "none"}, "not_found", "optimization_id"),
        ("introspect", {"optimization_id": "o", "after": -1}, "invalid_field", "after"),
        ("introspect", {"optimization_id": "o" * 257}, "invalid_field", "optimization_id"),
        ("analyze_performance", {"framework": 5}, "invalid_field", "framework"),
        ("analyze_performance", {"since": "yesterday"}, "invalid_field", "since"),
        ("analyze_performance", {"until": 10**18}, "invalid_field", "until"),
        ("analyze_performance", {"best": "middle"}, "invalid_field", "best"),
        ("analyze_performance", {"more": 1}, "invalid_field", "more"),
    ]
    for endpoint, request, code, field in cases:
        error = (await call(url, namespace, f"optimization.{endpoint}", request))["error"]
        assert (error["code"], error["field"]) == (code, field), request


async def add_runs(hf: Holdfast) -> None:
    for number in range(20):
        await add_run(
            hf, f"dspy_{number}", {"initializing": 0, "optimizing": 1, "completed": 10 + number},
            framework="dspy", score=number / 100, begun=START + timedelta(hours=number), config={"trials": number},
        )  # fmt: skip
    await add_run(hf, "dspy_failed", {"initializing": 0, "failed": 2}, framework="dspy")
    await add_run(hf, "dspy_running", {"initializing": 0, "optimizing": 1}, framework="dspy")
    await add_run(
        hf, "foreign", {"started": 0, "completed": 5}, framework="other", score=7, is_foreign=True, config={"a": 1}
    )
    await add_run(hf, "unnamed", {"initializing": 0}, framework=None)


async def test_B49_analysis_is_the_same_hot_half_archived_and_archived(
    hf: Holdfast, url: str, namespace: str, control: Connection
) -> None:
    await add_runs(hf)
    await hf.emit("optimization:note", context={"of": "another kind"}, correlation="dspy_1")
    hot = await hf.optimizations.analyze_performance()
    dspy, *others = hot.frameworks
    assert (dspy.framework, dspy.runs, dspy.completed, dspy.failed, dspy.running) == ("dspy", 22, 20, 1, 1)
    seconds = sorted([2.0, *(10.0 + number for number in range(20))])
    assert dspy.seconds is not None
    assert (dspy.seconds.count, dspy.seconds.min, dspy.seconds.median, dspy.seconds.max) == (21, 2.0, seconds[10], 29.0)
    assert dspy.seconds.p95 == pytest.approx(seconds[19])
    assert dspy.scores is not None
    assert (dspy.scores.count, dspy.scores.min, dspy.scores.max) == (20, 0.0, 0.19)
    assert dspy.best is not None
    assert (dspy.best.optimization_id, dspy.best.score, dspy.best.config) == ("dspy_19", 0.19, {"trials": 19})
    assert (await hf.resolve(dspy.best.context_ref)).body["result"] == {"best_score": 0.19}
    assert [(state.state, state.count) for state in dspy.states] == [
        ("initializing", 22), ("failed", 1), ("optimizing", 21), ("completed", 20),
    ]  # fmt: skip
    lasted = {state.state: state.seconds for state in dspy.states}
    assert lasted["completed"] is None
    assert lasted["optimizing"] is not None
    assert (lasted["optimizing"].count, lasted["optimizing"].min, lasted["optimizing"].max) == (20, 9.0, 28.0)
    foreign, unnamed = sorted(others, key=lambda other: other.framework or "~")
    assert (foreign.framework, foreign.completed) == ("other", 1)
    assert foreign.best is not None
    assert (foreign.best.score, foreign.best.config) == (7.0, {"a": 1}), "of what no event tells, the body tells it"
    assert (unnamed.framework, unnamed.running, unnamed.seconds, unnamed.best) == (None, 1, None, None)

    await flush(control)
    assert await hf.optimizations.analyze_performance() == hot
    await make_cold(control)
    assert await hf.optimizations.analyze_performance() == hot
    await add_run(hf, "unnamed", {"completed": 3}, framework=None)
    after = await hf.optimizations.analyze_performance()
    (unnamed,) = [item for item in after.frameworks if item.framework is None]
    assert (unnamed.completed, unnamed.seconds is not None and unnamed.seconds.max) == (1, 3.0), "half hot, half cold"


async def test_B49_runs_are_chosen_by_framework_and_time(hf: Holdfast, url: str, namespace: str) -> None:
    await add_runs(hf)
    (dspy,) = (await hf.optimizations.analyze_performance("dspy")).frameworks
    assert dspy.framework == "dspy"
    assert (await hf.optimizations.analyze_performance("none")).frameworks == []
    hours = START + timedelta(hours=5), START + timedelta(hours=7)
    (some,) = (await hf.optimizations.analyze_performance("dspy", since=hours[0], until=hours[1])).frameworks
    assert (some.runs, some.best is not None and some.best.optimization_id) == (2, "dspy_6")
    lowest = await hf.optimizations.analyze_performance("dspy", best="lowest")
    assert lowest.frameworks[0].best is not None
    assert lowest.frameworks[0].best.optimization_id == "dspy_0"
    request = {"framework": "dspy", "since": "2026-01-31T14:30:00Z", "until": "2026-01-31T16:30:00Z"}
    answer = await call(url, namespace, "optimization.analyze_performance", request)
    (framework,) = answer["frameworks"]
    assert (framework["runs"], framework["best"]["config"], answer["unread"]) == (2, {"trials": 6}, 0)


async def test_B49_of_equal_scores_the_run_that_began_first_is_the_best(hf: Holdfast) -> None:
    for number in (3, 1, 2):
        await add_run(
            hf, f"opt_{number}", {"completed": 0}, framework="dspy", score=1, begun=START + timedelta(hours=number)
        )
    for best in ("highest", "lowest"):
        (dspy,) = (await hf.optimizations.analyze_performance(best=best)).frameworks
        assert dspy.best is not None
        assert dspy.best.optimization_id == "opt_1"


async def test_B47_B48_a_plain_publisher_captures_states_that_are_looked_into_at_once(
    hf: Holdfast, url: str, namespace: str
) -> None:
    async with plain_client(url) as nc:
        for state, result in (("started", None), ("completed", {"score": 4})):
            body = {"optimization_id": "opt_1", "state": state, "data": {"framework": "bash"}, "result": result}
            message = {
                "correlation_id": "opt_1",
                "context": body,
                "context_kind": "optimization_state",
            }
            await nc.jetstream().publish(
                f"ctx.{namespace}.event.shell.optimization.{state}", json.dumps(message).encode()
            )
    answer = await call(url, namespace, "optimization.introspect", {"optimization_id": "opt_1"})
    assert (answer["status"], answer["framework"], answer["states"][1]["body"]["result"]) == (
        "completed", "bash", {"score": 4},
    )  # fmt: skip
    (bash,) = (await hf.optimizations.analyze_performance()).frameworks
    assert (bash.framework, bash.completed, bash.best is not None and bash.best.score) == ("bash", 1, 4.0)


async def test_B49_data_that_is_no_json_to_sql_harms_nobody(hf: Holdfast, url: str, namespace: str) -> None:
    await add_run(hf, "opt_1", {"completed": 0}, framework="dspy", score=1)
    ref = await hf.put({"optimization_id": "opt_2", "state": "completed"}, kind="optimization_state")
    async with plain_client(url) as nc:
        for text in ('{"x": "\\ud800"}', '{"performance": {"score": 1e999}}', '"text"', '{"performance": []}'):
            message = f'{{"correlation_id": "opt_2", "context_ref": "{ref}", "data": {text}}}'
            await nc.publish(f"ctx.{namespace}.event.shell.optimization.completed", message.encode())
        await nc.flush()
    analysis = await hf.optimizations.analyze_performance()
    assert [item.framework for item in analysis.frameworks if item.framework is not None] == ["dspy"]
    (dspy,) = [item for item in analysis.frameworks if item.framework == "dspy"]
    assert dspy.best is not None


async def test_without_a_resolver_it_is_said(nats_server: str, namespace: str) -> None:
    async with connect(nats_server, namespace, "optimizer") as client:
        await client.optimizations.capture("opt_1", "completed", DATA)
        with pytest.raises(UnavailableError):
            await client.optimizations.analyze_performance()
