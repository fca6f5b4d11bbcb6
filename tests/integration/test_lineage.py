"""Events that know where they come from, by the implicit and by the explicit path, on a real server."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.client import DepthLimitError, Event, Holdfast, connect, lineage
from holdfast.client.handler_runner import event_of_row
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.ids import new_event_id, normal_event_id
from holdfast.schemas.limits import LINEAGE_DEPTH
from tests.integration.test_events import rows_of
from tests.support import plain_client

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection


def place(event: Event) -> tuple[Any, ...]:
    return (
        event.parent_event_id,
        event.root_event_id,
        event.event_depth,
        event.correlation_id,
        event.session_id,
        event.agent_id,
        event.client_id,
        event.originator,
        event.attributes,
    )


async def test_B12_B18_B25_what_is_emitted_within_an_event_is_its_child(hf: Holdfast, connection: Connection) -> None:
    root = await hf.emit(
        "plan:made", session="s1", correlation="c1", agent="planner", client="web-7", originator="chief"
    )
    with lineage.within(root):
        child = await hf.emit("plan:step")
        with lineage.within(child):
            grandchild = await hf.emit("plan:detail")
    assert place(child) == (root.event_id, root.event_id, 1, "c1", "s1", "planner", "web-7", "chief", {})
    assert place(grandchild) == (child.event_id, root.event_id, 2, "c1", "s1", "planner", "web-7", "chief", {})
    rows = {row.id: row for row in await rows_of(connection, hf.namespace)}
    stored = rows[grandchild.event_id]
    assert (stored.parent_event_id, stored.root_event_id, stored.event_depth) == (child.event_id, root.event_id, 2)


async def test_B75_both_paths_give_the_same_place_and_each_works_without_the_other(hf: Holdfast) -> None:
    root = await hf.emit("plan:made", session="s1", correlation="c1", agent="planner")
    with lineage.within({**lineage.of(root), "mood": "calm"}):
        implicit = await hf.emit("plan:step")
    explicit = await hf.emit("plan:step", lineage={**lineage.of(root), "mood": "calm"})
    assert place(implicit) == place(explicit)
    assert explicit.attributes == {"mood": "calm"}


async def test_explicit_wins_over_implicit_as_a_whole_and_named_arguments_over_both(hf: Holdfast) -> None:
    one = await hf.emit("one", session="s1", correlation="c1")
    two = await hf.emit("two", session="s2")
    with lineage.within(one):
        under_two = await hf.emit("child", lineage=lineage.of(two))
        alone = await hf.emit("root", lineage={})
        named = await hf.emit("child", session="s3", agent="other")
        parent = await hf.emit("child", parent=two)
    assert (under_two.parent_event_id, under_two.session_id, under_two.correlation_id) == (two.event_id, "s2", None)
    assert (alone.parent_event_id, alone.session_id, alone.event_depth) == (None, None, 0)
    assert (named.parent_event_id, named.session_id, named.agent_id) == (one.event_id, "s3", "other")
    assert (parent.parent_event_id, parent.session_id, parent.event_depth) == (two.event_id, "s2", 1)


async def test_B23_a_lineage_of_another_system_is_a_place_for_children(hf: Holdfast) -> None:
    given = {
        "_event_id": "evt_123", "_root_event_id": "evt_000", "_parent_event_id": "evt_000", "_event_depth": 1,
        "_correlation_id": "corr_456", "_agent_id": "my_agent", "_session_id": "session_123", "_timestamp": 1.5,
    }  # fmt: skip
    child = await hf.emit("agent:status", lineage=given)
    assert child.parent_event_id == normal_event_id(hf.namespace, "evt_123")[0]
    assert child.root_event_id == normal_event_id(hf.namespace, "evt_000")[0]
    assert (child.event_depth, child.correlation_id, child.agent_id) == (2, "corr_456", "my_agent")
    # One that names no event of its own is that of the event to be.
    itself = await hf.emit("agent:status", lineage={"parent_event_id": "evt_123", "event_depth": 2})
    assert (itself.parent_event_id, itself.event_depth) == (child.parent_event_id, 2)
    # With a parent and no stated root, the root is not known: never a wrong one.
    assert itself.root_event_id is None


async def test_B20_B64_B67_attributes_are_inherited_stored_and_read_back(hf: Holdfast, connection: Connection) -> None:
    root = await hf.emit("batch")
    with lineage.within(root):
        for index, item in enumerate(["tea", "cake"]):
            with lineage.iteration(index, item):
                step = await hf.emit("batch:item")
                assert step.attributes == {"iteration": {"index": index, "item": item}}
                under = await hf.emit("batch:detail", lineage={**step.lineage, "template": {"tone": "dry"}})
                assert under.attributes["iteration"]["item"] == item
                assert under.attributes["template"] == {"tone": "dry"}
    extras = [row.extra for row in await rows_of(connection, hf.namespace) if row.name == "batch:item"]
    assert extras == [
        b'{"attributes":{"iteration":{"index":0,"item":"tea"}}}',
        b'{"attributes":{"iteration":{"index":1,"item":"cake"}}}',
    ]
    with pytest.raises(InvalidFieldError) as refused, lineage.within({"notes": object()}):
        await hf.emit("batch:item")
    assert refused.value.field == "attributes"


async def test_B21_B70_a_lineage_goes_to_another_process_by_headers_and_on_from_there(
    hf: Holdfast, nats_server: str, namespace: str
) -> None:
    root = await hf.emit("request", session="s1", agent="gateway")
    headers = lineage.to_headers(lineage.of(root))
    async with connect(nats_server, namespace=namespace, agent="service") as service:
        with lineage.within(lineage.from_headers(headers)):
            answer = await service.emit("request:done", agent="service")
    assert (answer.parent_event_id, answer.session_id, answer.agent_id) == (root.event_id, "s1", "service")


async def test_a_trace_of_another_tool_is_continued_by_every_event_below(hf: Holdfast, connection: Connection) -> None:
    foreign = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    root = await hf.emit("request", lineage=lineage.from_headers(foreign))
    with lineage.within(root):
        child = await hf.emit("request:step")
    assert root.parent_event_id is None
    traces = [row.traceparent for row in await rows_of(connection, hf.namespace)]
    assert [trace.split("-")[1] for trace in traces if trace] == ["4bf92f3577b34da6a3ce929d0e0e4736"] * 2
    assert len(set(traces)) == 2
    assert child.traceparent == traces[1]
    assert child.correlation_id == "4bf92f3577b34da6a3ce929d0e0e4736"


async def test_B22_B72_B73_a_test_sees_each_context_exactly_and_may_put_in_its_own(hf: Holdfast) -> None:
    injected = {"event_id": new_event_id(), "event_depth": 0, "session_id": "mocked", "agent_id": "mock"}
    with lineage.capture() as seen:
        with lineage.within(injected):
            first = await hf.emit("one", {"n": 1})
        await hf.emit("two", lineage=injected)
        await hf.emit("three", parent=first)
        await hf.emit("four")
    assert [(item.name, item.path) for item in seen] == [
        ("one", "implicit"),
        ("two", "explicit"),
        ("three", "parent"),
        ("four", "none"),
    ]
    assert seen[0].parent == injected
    assert seen[0].data == {"n": 1}
    assert seen[0].lineage == lineage.of(first)
    assert seen[2].parent == lineage.of(first)
    assert seen[3].parent is None
    await hf.emit("five")
    assert len(seen) == 4


async def test_B73_B75_each_path_is_counted(hf: Holdfast) -> None:
    before = lineage.counters()
    root = await hf.emit("root")
    with lineage.within(root):
        await hf.emit("child")
        await hf.emit("child", lineage=root.lineage)
    await hf.emit("child", parent=root)
    after = lineage.counters()
    gained = {name: getattr(after, name) - getattr(before, name) for name in after.__struct_fields__}
    assert gained == {"implicit": 1, "explicit": 1, "parent": 1, "none": 1, "overridden": 1}


async def test_B24_a_thread_reads_the_lineage_it_was_called_under_and_emits_into_it(hf: Holdfast) -> None:
    root = await hf.emit("root", session="s1")
    loop = asyncio.get_running_loop()

    def work() -> Event:
        assert (lineage.current() or {})["event_id"] == root.event_id
        return asyncio.run_coroutine_threadsafe(hf.emit("from:thread"), loop).result(30)

    with lineage.within(root):
        child = await asyncio.to_thread(work)
    assert (child.parent_event_id, child.session_id) == (root.event_id, "s1")


async def test_B66_a_coordinator_changes_the_lineage_of_the_agents_below_it(hf: Holdfast) -> None:
    root = await hf.emit("workflow:started", agent="coordinator", session="s1")
    with lineage.within(root), lineage.spawn("analyst"):
        with lineage.within(lineage.merge(lineage.current() or {}, {"budget": 3})):
            work = await hf.emit("agent:spawned")
        with lineage.within(work):
            report = await hf.emit("agent:report")
    assert (report.agent_id, report.originator, report.attributes) == ("analyst", "coordinator", {"budget": 3})
    assert report.root_event_id == root.event_id


async def test_B81_a_lineage_without_end_is_stopped_and_a_long_chain_that_names_its_parent_is_not(
    hf: Holdfast,
) -> None:
    event = await hf.emit("ping")
    for _ in range(LINEAGE_DEPTH):
        with lineage.within(event):
            event = await hf.emit("ping")
    assert event.event_depth == LINEAGE_DEPTH
    with lineage.within(event), pytest.raises(DepthLimitError, match="depth 65") as stopped:
        await hf.emit("ping")
    assert (stopped.value.depth, stopped.value.limit) == (LINEAGE_DEPTH + 1, LINEAGE_DEPTH)
    with pytest.raises(DepthLimitError):
        await hf.emit("ping", lineage=event.lineage)
    assert (await hf.emit("turn", parent=event)).event_depth == LINEAGE_DEPTH + 1


async def test_B82_B86_named_contexts_are_signed_by_the_current_event(hf: Holdfast) -> None:
    root = await hf.emit("root", session="s1", agent="planner")
    with lineage.within(root):
        value = await hf.keys.put("plan.current", {"step": 1})
        patched = await hf.keys.patch("plan.current", {"step": 2}, agent="reviewer")
    assert (value.session, value.agent) == ("s1", "planner")
    assert (patched.session, patched.agent) == ("s1", "reviewer")
    assert (await hf.keys.put("plan.other", 1)).agent == "tester"
    other = await hf.emit("other", session="s2", agent="writer")
    with lineage.within(root):
        explicit = await hf.keys.put("plan.other", 2, lineage=other.lineage)
        kept = await hf.keys.rollback("plan.other", 1)
    assert (explicit.session, explicit.agent) == ("s2", "writer")
    # What is not said of a version stays as it was: its session is not that of whoever changed it.
    assert (kept.session, kept.agent) == (None, "planner")


async def test_B85_the_time_in_a_lineage_is_that_of_the_event_in_seconds(hf: Holdfast) -> None:
    began = time.time()
    event = await hf.emit("root")
    assert began - 0.001 <= lineage.of(event)["timestamp"] <= time.time()


async def test_what_an_idempotent_handler_emits_twice_is_stored_once(hf: Holdfast, connection: Connection) -> None:
    root = await hf.emit("root")
    ids: list[set[str]] = []
    for order in ((1, 2, 2), (2, 1, 2)):
        mint = lineage.IdMint(hf.namespace, "handler", root.event_id)
        with lineage.enter(lineage.of(root), mint=mint):
            ids.append({(await hf.emit("child", {"n": n})).event_id for n in order})
    assert ids[0] == ids[1]
    assert len(ids[0]) == 3
    rows = [row for row in await rows_of(connection, hf.namespace) if row.name == "child"]
    assert {row.id for row in rows} == ids[0]
    assert len(rows) == 3


async def test_an_idempotent_handler_begins_a_tree_of_its_own_once(hf: Holdfast, connection: Connection) -> None:
    worked_on = await hf.emit("root")
    began: list[Event] = []
    for _ in range(2):
        with lineage.enter(lineage.of(worked_on), mint=lineage.IdMint(hf.namespace, "handler", worked_on.event_id)):
            began.append(await hf.emit("begun", {"n": 1}, lineage={}))
    assert began[0].event_id == began[1].event_id
    assert {(event.root_event_id, event.parent_event_id, event.event_depth) for event in began} == {
        (began[0].event_id, None, 0)
    }
    [row] = [row for row in await rows_of(connection, hf.namespace) if row.name == "begun"]
    assert (row.id, row.root_event_id) == (began[0].event_id, began[0].event_id)


async def test_an_idempotent_handler_keeps_equal_children_of_several_parents_apart_in_whatever_order(
    hf: Holdfast, connection: Connection
) -> None:
    root = await hf.emit("root")
    parents = [await hf.emit("part", parent=root) for _ in range(2)]
    # The second run comes to them in another order, as tasks do.
    for order in (parents, parents[::-1]):
        with lineage.enter(lineage.of(root), mint=lineage.IdMint(hf.namespace, "handler", root.event_id)):
            for parent in order[: 1 if order is parents else 2]:
                await hf.emit("done", {"ok": True}, parent=parent)
    rows = [row for row in await rows_of(connection, hf.namespace) if row.name == "done"]
    assert sorted(row.parent_event_id or "" for row in rows) == sorted(parent.event_id for parent in parents)


async def test_an_idempotent_handler_keeps_the_time_it_gives(hf: Holdfast, connection: Connection) -> None:
    root, at = await hf.emit("root"), datetime(2024, 5, 1, 12, 0, tzinfo=UTC)
    for _ in range(2):
        with lineage.enter(lineage.of(root), mint=lineage.IdMint(hf.namespace, "handler", root.event_id)):
            emitted = await hf.emit("measured", {"n": 1}, timestamp=at)
            assert emitted.timestamp == at
    [row] = [row for row in await rows_of(connection, hf.namespace) if row.name == "measured"]
    assert row.timestamp_ms == int(at.timestamp() * 1000)


async def test_attributes_never_stand_in_for_what_an_event_does_not_say_and_both_paths_agree(
    hf: Holdfast, connection: Connection, namespace: str, nats_server: str
) -> None:
    stranger = "0198c3a1-7c3e-7d52-9b1f-0d6a2f4e8b11"
    attributes = {
        "session_id": 5, "_correlation_id": "hidden", "root_event_id": stranger, "traceparent": 7, "context_ref": "x",
        "_ksi_context_ref": [], "mood": "calm",
    }  # fmt: skip
    message = json.dumps({"parent_event_id": stranger, "attributes": attributes}).encode()
    async with plain_client(nats_server) as client:
        await client.jetstream().publish(f"ctx.{namespace}.event.agent.raw", message)
    [row] = await rows_of(connection, namespace)
    event = event_of_row(row)
    assert lineage.of(event).items() >= {"mood": "calm", "parent_event_id": stranger}.items()
    assert not {"session_id", "correlation_id", "root_event_id", "_correlation_id"} & lineage.of(event).keys()
    with lineage.within(event):
        implicit = await hf.emit("child")
    explicit = await hf.emit("child", lineage=lineage.of(event))
    for child in (implicit, explicit):
        assert (child.parent_event_id, child.root_event_id) == (row.id, None)
        assert (child.session_id, child.correlation_id, child.attributes) == (None, None, {"mood": "calm"})


async def test_an_idempotent_handler_that_sets_the_lineage_by_hand_emits_the_same_ids_again(
    hf: Holdfast, connection: Connection
) -> None:
    worked_on, other = await hf.emit("root"), await hf.emit("other")
    for _ in range(2):
        with lineage.enter(lineage.of(worked_on), mint=lineage.IdMint(hf.namespace, "handler", worked_on.event_id)):
            with lineage.within(other):
                await hf.emit("child", {"n": 1})
            with lineage.within({**lineage.of(worked_on), "agent_id": "reviewer"}):
                await hf.emit("child", {"n": 1})
            async with hf.working_on(other):
                await hf.emit("child", {"n": 2})
    rows = [row for row in await rows_of(connection, hf.namespace) if row.name == "child"]
    assert [row.parent_event_id for row in rows] == [other.event_id, worked_on.event_id, other.event_id]
