"""Snapshots of orchestrations on a real server: captured at transitions, recovered hot and archived alike."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from holdfast.client import Holdfast, connect, lineage
from holdfast.client.orchestrations import Orchestrations
from holdfast.schemas.errors import InvalidBodyError, InvalidFieldError, InvalidRefError, NotFoundError
from holdfast.streams.connection import Connection, open_connection
from holdfast.workers.control import evict, flush
from tests.running import own_server, running, settings_in, target_of
from tests.support import plain_client

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAYLOAD: dict[str, Any] = {
    "pattern_name": "analysis",
    "agents": {"agent_1": {"profile": "analyst", "spawned": True, "vars": {"role": "data_analyzer"}}},
    "routing_rules": [{"from": "agent_1", "to": "*"}],
    "vars": {"target": "dataset.csv"},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[str]:
    """A system that archives when it is told to."""
    data: Path = tmp_path_factory.mktemp("orchestrations")
    async with own_server(data) as server, running(server.url, settings_in(data)):
        yield server.url


@pytest_asyncio.fixture(loop_scope="module")
async def hf(url: str, namespace: str) -> AsyncIterator[Holdfast]:
    """A client that asks the tiers each time."""
    async with connect(url, namespace, "conductor", cache_bytes=0) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def control(url: str) -> AsyncGenerator[Connection]:
    async with open_connection(target_of(url)) as connection:
        yield connection


async def make_cold(control: Connection) -> None:
    await flush(control)
    assert (await evict(control, 0.0)).left == 0


async def named(hf: Holdfast, name: str) -> list[Any]:
    return [event async for event in hf.query(name=name)]


async def test_B44_a_transition_is_a_context_and_an_event_under_the_current_one(hf: Holdfast) -> None:
    start = await hf.emit("agent:start", session="s1")
    with lineage.within(start):
        ref = await hf.orchestrations.capture("orch_123", "running", PAYLOAD)
        ended = await hf.orchestrations.capture("orch_123", "terminated", PAYLOAD, "completed")
    assert ref.startswith("ctx_orchestration_state_")
    assert ref != ended
    (event,) = await named(hf, "orchestration:running")
    assert (event.context_ref, event.correlation_id, event.agent_id) == (ref, "orch_123", "conductor")
    assert (event.parent_event_id, event.root_event_id, event.session_id) == (start.event_id, start.event_id, "s1")
    assert event.data == {"orchestration_id": "orch_123", "pattern_name": "analysis", "state": "running"}
    (event,) = await named(hf, "orchestration:terminated")
    assert event.data["reason"] == "completed"
    assert (await hf.resolve(ended)).body["reason"] == "completed"


@pytest.mark.parametrize("is_cold", [False, True])
async def test_B45_B46_recovery_gives_the_snapshot_and_tells_of_it(
    hf: Holdfast, control: Connection, is_cold: bool
) -> None:
    start = await hf.emit("agent:start", session="s1")
    ref = await hf.orchestrations.capture("orch_1", "running", {**PAYLOAD, "step": 7})
    if is_cold:
        await make_cold(control)
        assert (await hf.resolve(ref)).tier == "lake"
    with lineage.within(start):
        snapshot = await hf.orchestrations.recover(ref)
    assert snapshot == {"orchestration_id": "orch_1", "state": "running", **PAYLOAD, "step": 7}
    (captured,) = await named(hf, "orchestration:running")
    (recovered,) = await named(hf, "orchestration:recovered")
    assert recovered.parent_event_id == captured.event_id
    assert recovered.root_event_id == captured.root_event_id
    assert (recovered.context_ref, recovered.correlation_id) == (ref, "orch_1")


async def test_B44_the_same_state_twice_is_one_context_and_two_events(hf: Holdfast) -> None:
    first = await hf.orchestrations.capture("orch_1", "running", PAYLOAD)
    await hf.orchestrations.capture("orch_1", "paused", PAYLOAD)
    assert await hf.orchestrations.capture("orch_1", "running", PAYLOAD) == first
    captured = await named(hf, "orchestration:running")
    assert [event.context_ref for event in captured] == [first, first]
    await hf.orchestrations.recover(first)
    (recovered,) = await named(hf, "orchestration:recovered")
    assert recovered.parent_event_id == captured[1].event_id, "of two captures the newest counts"


async def test_history_and_latest_are_the_same_hot_and_archived(hf: Holdfast, control: Connection) -> None:
    assert await hf.orchestrations.history("orch_1") == []
    assert await hf.orchestrations.latest("orch_1") is None
    refs = [await hf.orchestrations.capture("orch_1", state, PAYLOAD) for state in ("created", "running")]
    refs.append(await hf.orchestrations.capture("orch_1", "terminated", {**PAYLOAD, "reason": "completed"}))
    await hf.orchestrations.recover(refs[1])
    await hf.orchestrations.capture("orch_2", "running", PAYLOAD)
    await hf.emit("orchestration:note", correlation="orch_1", context={"of": "another kind"})
    hot = await hf.orchestrations.history("orch_1")
    assert [item.state for item in hot] == ["created", "running", "terminated", "recovered"]
    assert [item.context_ref for item in hot] == [*refs, refs[1]]
    assert [item.reason for item in hot] == [None, None, "completed", None]
    assert {item.agent_id for item in hot} == {"conductor"}
    assert await hf.orchestrations.latest("orch_1") == refs[2]
    await make_cold(control)
    assert await hf.orchestrations.history("orch_1") == hot
    assert await hf.orchestrations.latest("orch_1") == refs[2]


async def test_a_snapshot_that_no_event_tells_of_is_recovered_under_the_current_event(hf: Holdfast) -> None:
    ref = await hf.put({"orchestration_id": "orch_1", "state": "running"}, kind="orchestration_state")
    start = await hf.emit("agent:start")
    with lineage.within(start):
        snapshot = await Orchestrations(hf).recover(ref)
    assert snapshot["agents"] == {}
    (recovered,) = await named(hf, "orchestration:recovered")
    assert (recovered.parent_event_id, recovered.correlation_id) == (start.event_id, "orch_1")


async def test_B45_what_is_no_snapshot_is_refused_and_nothing_is_told(hf: Holdfast) -> None:
    with pytest.raises(InvalidRefError):
        await hf.orchestrations.recover(await hf.put(PAYLOAD, kind="plan"))
    with pytest.raises(InvalidBodyError, match="agents"):
        await hf.orchestrations.recover(
            await hf.put({"orchestration_id": "o", "state": "s", "agents": [1]}, kind="orchestration_state")
        )
    with pytest.raises(InvalidBodyError):
        await hf.orchestrations.recover(await hf.put("running", kind="orchestration_state"))
    with pytest.raises(NotFoundError):
        await hf.orchestrations.recover("ctx_orchestration_state_" + "a" * 32)
    for identity, state, payload in (("", "running", {}), ("o", "recovered", {}), ("o", "x", {"agents": 1})):
        with pytest.raises(InvalidFieldError):
            await hf.orchestrations.capture(identity, state, payload)
    assert [event async for event in hf.query()] == []


@pytest.mark.parametrize("is_cold", [False, True])
async def test_B45_a_plain_client_recovers_by_request(
    hf: Holdfast, url: str, namespace: str, control: Connection, is_cold: bool
) -> None:
    ref = await hf.orchestrations.capture("orch_1", "running", PAYLOAD)
    if is_cold:
        await make_cold(control)
    async with plain_client(url) as nc:
        subject = f"ctx.{namespace}.orchestration.recover"
        reply = await nc.request(subject, json.dumps({"context_ref": ref}).encode(), timeout=20)
        answer = json.loads(reply.data)
        assert answer["snapshot"] == {"orchestration_id": "orch_1", "state": "running", **PAYLOAD}
        request = json.dumps({"context_ref": ref, "agent_id": "shell"}).encode()
        again = json.loads((await nc.request(subject, request, timeout=20)).data)
        plan = await hf.put({}, kind="plan")
        broken = await hf.put({"state": "x"}, kind="orchestration_state")
        refused = {}
        for given in ({"context_ref": plan}, {"context_ref": "ctx_orchestration_state_" + "b" * 32}, {},
                      {"context_ref": broken}, {"context_ref": ref, "more": 1}):  # fmt: skip
            reply = await nc.request(subject, json.dumps(given).encode(), timeout=20)
            error = json.loads(reply.data)["error"]
            refused[given.get("context_ref", ""), "more" in given] = error["code"], error["field"]
    assert list(refused.values()) == [
        ("invalid_ref", "context_ref"),
        ("not_found", "context_ref"),
        ("invalid_field", "context_ref"),
        ("invalid_body", "orchestration_id"),
        ("invalid_field", "more"),
    ]
    (captured,) = await named(hf, "orchestration:running")
    recovered = await named(hf, "orchestration:recovered")
    assert [event.event_id for event in recovered] == [answer["event_id"], again["event_id"]]
    assert [event.agent_id for event in recovered] == ["resolver", "shell"]
    for event in recovered:
        assert (event.parent_event_id, event.context_ref) == (captured.event_id, ref)
        assert (event.root_event_id, event.event_depth) == (captured.root_event_id, captured.event_depth + 1)
        assert event.correlation_id == "orch_1"
    assert answer["captured_event_id"] == captured.event_id


async def test_B45_a_snapshot_over_the_size_of_an_answer_is_refused_and_the_sdk_recovers_it(
    hf: Holdfast, url: str, namespace: str
) -> None:
    ref = await hf.orchestrations.capture("orch_1", "running", {"vars": {"text": "x" * 1_000_000}})
    async with plain_client(url) as nc:
        request = json.dumps({"context_ref": ref}).encode()
        reply = await nc.request(f"ctx.{namespace}.orchestration.recover", request, timeout=20)
    assert json.loads(reply.data)["error"]["code"] == "too_large"
    assert await named(hf, "orchestration:recovered") == []
    assert len((await hf.orchestrations.recover(ref))["vars"]["text"]) == 1_000_000
