"""Lineage as a whole, as its users meet it: over transports, in concurrent programs, out of references, after crashes.

What one part does by itself is shown beside that part's other tests.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from holdfast.client import (
    ConversationTracker,
    Event,
    EventContextManager,
    Holdfast,
    NotFoundError,
    checkpoints,
    connect,
    lineage,
)
from holdfast.client.optimizations import Optimizations
from holdfast.client.orchestrations import Orchestrations
from holdfast.lake import Lake, compact
from holdfast.lake import connect as connect_lake
from holdfast.schemas.ids import new_event_id, now_ms
from holdfast.streams.connection import open_connection
from holdfast.streams.topology import purge_below, stream_info
from holdfast.streams.wire import EVENTS_STREAM
from holdfast.workers.control import evict, flush
from holdfast.workers.janitor import Janitor
from tests.running import own_server, running, settings_in, target_of
from tests.support import LIMIT_S, OwnServer, plain_client

if TYPE_CHECKING:
    from nats.aio.client import Client

pytestmark = pytest.mark.asyncio(loop_scope="module")

DAY_MS = 86_400_000

SERVICE = """
import asyncio, json, sys
from holdfast.client import connect, lineage

async def main(path, url, namespace):
    reader, writer = await asyncio.open_unix_connection(path)
    async with connect(url, namespace, "service") as hf:
        asked = json.loads(await reader.readline())
        with lineage.within(lineage.from_dict(asked["context"])):
            answer = await hf.emit("service:answered", {"double": asked["data"] * 2})
        reply = {"data": answer.data, "context": lineage.with_underscores(answer.lineage)}
        writer.write(json.dumps(reply).encode() + b"\\n")
        await writer.drain()
    writer.close()

asyncio.run(main(*sys.argv[1:]))
"""
"""Another program: it knows of the caller what comes over its socket, and nothing else."""


class System:
    """A server with workers that do nothing by the clock."""

    def __init__(self, url: str, lake: Path) -> None:
        self.url = url
        self.lake = lake

    async def make_cold(self) -> None:
        """Archives everything, and empties both tiers of what is archived."""
        async with open_connection(target_of(self.url)) as control:
            await flush(control)
            assert (await evict(control, 0.0)).left == 0
            await purge_below(control, EVENTS_STREAM, (await stream_info(control, EVENTS_STREAM)).last_seq + 1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[System]:
    data: Path = tmp_path_factory.mktemp("lineage-acceptance")
    settings = settings_in(data)
    async with own_server(data) as server, running(server.url, settings):
        yield System(server.url, settings.lake)


@pytest_asyncio.fixture(loop_scope="module")
async def hf(system: System, namespace: str) -> AsyncGenerator[Holdfast]:
    async with connect(system.url, namespace, "planner", cache_bytes=0) as client:
        yield client


async def ask(client: Client, namespace: str, endpoint: str, request: object) -> Any:
    """An endpoint as a program without our code calls it."""
    reply = await client.request(f"ctx.{namespace}.{endpoint}", json.dumps(request).encode(), timeout=LIMIT_S)
    return json.loads(reply.data)


# Both paths


async def test_B02_B06_B12_whatever_runs_on_behalf_of_an_event_emits_below_it(hf: Holdfast, system: System) -> None:
    """Tasks, groups, threads and callbacks at once, and none of them says where it belongs."""
    loop = asyncio.get_running_loop()
    parents: dict[str, Event] = {}

    async def emit(name: str, noted: Event) -> Event:
        """Where it belongs is noted beside it, by hand, and not told to the client."""
        event = await hf.emit(name)
        parents[event.event_id] = noted
        return event

    async def worker(number: int, root: Event) -> None:
        task = await emit(f"task:{number}", root)
        with lineage.within(task):
            await asyncio.sleep(0)
            await emit("step:awaited", task)
            async with asyncio.TaskGroup() as group:
                group.create_task(emit("step:in-group", task))
                group.create_task(emit("step:in-group", task))
            await asyncio.to_thread(in_thread, task)
            await loop.run_in_executor(pool, in_thread, task)

    def in_thread(task: Event) -> None:
        asyncio.run_coroutine_threadsafe(emit("step:in-thread", task), loop).result(LIMIT_S)

    with lineage.ThreadPool(4) as pool:
        roots = [await hf.emit("program:started", n, session=f"s{n}") for n in range(3)]

        async def program(root: Event) -> None:
            with lineage.within(root):
                await asyncio.gather(*(worker(number, root) for number in range(8)))

        await asyncio.gather(*(program(root) for root in roots))
    assert len(parents) == 3 * 8 * 6
    for is_cold in (False, True):
        for root in roots:
            below = (await hf.tree(root))[1:]
            assert len(below) == 48
            for event in below:
                assert event.parent_event_id == parents[event.event_id].event_id
                assert (event.root_event_id, event.session_id) == (root.event_id, root.session_id)
                assert event.event_depth == (1 if event.name.startswith("task:") else 2)
        if not is_cold:
            await system.make_cold()


async def test_B21_B68_B69_B70_a_context_goes_over_a_socket_to_another_program_and_comes_back(
    hf: Holdfast, system: System, tmp_path: Path
) -> None:
    answered: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    root = await hf.emit("request", session="s1", correlation="c1", client="web-7", originator="chief")
    given = {**root.lineage, "tone": "dry"}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps({"data": 21, "context": given}).encode() + b"\n")
        answered.set_result(json.loads(await reader.readline()))
        writer.close()

    path = tmp_path / "s"
    async with await asyncio.start_unix_server(serve, path):
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVICE, path, system.url, hf.namespace)
        reply = await asyncio.wait_for(answered, LIMIT_S)
        assert await process.wait() == 0
    # It answers in the names of the earlier system; both programs mean the same event.
    context = lineage.from_dict(reply["context"])
    assert (reply["data"], reply["context"]["_parent_event_id"]) == ({"double": 42}, root.event_id)
    with lineage.within(context):
        shown = await hf.emit("answer:shown")
    tree = await hf.tree(root)
    assert [event.name for event in tree] == ["request", "service:answered", "answer:shown"]
    assert [event.event_depth for event in tree] == [0, 1, 2]
    assert shown.parent_event_id == tree[1].event_id
    for event in tree[1:]:
        assert (event.session_id, event.correlation_id) == ("s1", "c1")
        assert (event.client_id, event.originator, event.attributes) == ("web-7", "chief", {"tone": "dry"})


async def test_B67_a_template_rearranges_a_context_and_its_place_stays(hf: Holdfast) -> None:
    root = await hf.emit("workflow:started", session="s1", agent="coordinator")
    with lineage.within({**root.lineage, "budget": 3, "region": "north"}):
        known = lineage.current()
        assert known is not None
    # For its own access patterns: grouped, renamed, one left out.
    arranged = {
        **{name: known[name] for name in ("event_id", "root_event_id", "event_depth", "session_id", "agent_id")},
        "template": {"agent": known["agent_id"], "limits": {"budget": known["budget"]}},
    }
    child = await hf.emit("workflow:step", lineage=arranged)
    [stored] = [event async for event in hf.query(event_id=child.event_id)]
    assert (stored.parent_event_id, stored.root_event_id, stored.event_depth) == (root.event_id, root.event_id, 1)
    assert stored.attributes == {"template": {"agent": "coordinator", "limits": {"budget": 3}}}


async def test_B74_a_gateway_rebuilds_a_context_from_its_reference_and_adds_to_it(hf: Holdfast, system: System) -> None:
    manager = EventContextManager(hf)
    created = await manager.create_context("evt_1", 1_640_995_200.25, "my_agent", "s1", "c1", priority=2)
    await manager.store_event_with_context({"event_id": "evt_1", "event_name": "asked"})
    for is_cold in (False, True):
        # All that the gateway was handed is the reference.
        async with (
            connect(system.url, hf.namespace, "gateway", cache_bytes=0) as gateway,
            plain_client(system.url) as nc,
        ):
            answer = await ask(nc, hf.namespace, "resolve", {"ref": created["_ref"]})
            rebuilt = lineage.from_dict(answer["body"])
            merged = lineage.merge(rebuilt, {"client_id": "web-7", "performance": {"waited_ms": 12.5}})
            child = await gateway.emit("answered", lineage=merged)
        [parent, found] = await hf.chain(child)
        assert (parent.source_id, found.parent_event_id) == ("evt_1", parent.event_id)
        assert (found.session_id, found.correlation_id, found.agent_id) == ("s1", "c1", "my_agent")
        assert found.client_id == "web-7"
        assert found.attributes == {"priority": 2, "performance": {"waited_ms": 12.5}}
        if not is_cold:
            await system.make_cold()


async def test_B76_B77_B78_B79_B80_B81_B82_B83_B84_B85_B86_every_field_is_stored_and_told_to_any_client(
    hf: Holdfast, system: System
) -> None:
    ref = await hf.put({"goal": "fly"})
    root = await hf.emit("asked", session="s1", correlation="c1", client="web-7", originator="chief", agent="oracle")
    with lineage.within(root):
        child = await hf.emit("answered", context=ref)
    fields = [
        "event_id", "correlation_id", "context_ref", "parent_event_id", "root_event_id", "event_depth", "agent_id",
        "client_id", "originator", "timestamp", "session_id",
    ]  # fmt: skip
    async with plain_client(system.url) as nc:
        for is_cold in (False, True):
            answer = await ask(nc, hf.namespace, "query", {"event_id": child.event_id, "fields": fields})
            [told] = answer["events"]
            assert told.pop("timestamp").endswith("Z")
            assert told == {
                "event_id": child.event_id,
                "correlation_id": "c1",
                "context_ref": ref,
                "parent_event_id": root.event_id,
                "root_event_id": root.event_id,
                "event_depth": 1,
                "agent_id": "oracle",
                "client_id": "web-7",
                "originator": "chief",
                "session_id": "s1",
            }
            if not is_cold:
                await system.make_cold()


async def test_B82_events_go_by_their_agent_to_whoever_listens_for_it(hf: Holdfast, system: System) -> None:
    async with plain_client(system.url) as nc:
        subscription = await nc.subscribe(f"ctx.{hf.namespace}.event.oracle.>")
        await nc.flush()
        root = await hf.emit("asked")
        with lineage.within(root), lineage.spawn("oracle"):
            sent = [await hf.emit("thinking", n) for n in range(2)]
        await hf.emit("answered", parent=root)
        await hf.emit("asked:again", agent="oracle", lineage={})
        heard = [await subscription.next_msg(timeout=LIMIT_S) for _ in range(3)]
        assert [message.subject.rsplit(".", 1)[1] for message in heard] == ["thinking", "thinking", "again"]
        assert subscription.pending_msgs == 0
    found = [event.event_id async for event in hf.query(agent="oracle", root=root)]
    assert found == [event.event_id for event in sent]


async def test_B30_health_tells_of_a_stream_that_is_gone(tmp_path: Path) -> None:
    async with (
        own_server(tmp_path) as server,
        running(server.url, settings_in(tmp_path)),
        connect(server.url) as hf,
    ):
        await flush(hf.connection)
        assert await hf.health() == {"ok": True, "problems": [], "lag": {"contexts": 0, "events": 0, "key_versions": 0}}
        await hf.connection.api(f"STREAM.DELETE.{EVENTS_STREAM}")
        health = await hf.health()
        assert health["ok"] is False
        assert EVENTS_STREAM in [problem["object"] for problem in health["problems"]]
        assert all(problem["next_step"] for problem in health["problems"])


# Two tiers


async def test_B09_what_left_the_hot_tier_answers_any_question_in_sql(hf: Holdfast, system: System) -> None:
    root = await hf.emit("plan:made", session="s1", context={"budget": 300}, context_kind="plan")
    with lineage.within(root):
        for cost in (10, 25, 40):
            await hf.emit("tool:called", session="s2", context={"cost": cost}, context_kind="call")
    await system.make_cold()

    def find() -> list[Any]:
        with connect_lake(system.lake) as lake:
            found: list[Any] = lake.execute(
                """
                WITH RECURSIVE below AS (
                    SELECT event_id, context_ref, 0 AS level FROM events WHERE event_id = CAST($root AS UUID)
                    UNION ALL
                    SELECT child.event_id, child.context_ref, level + 1
                    FROM events AS child JOIN below ON child.parent_event_id = below.event_id
                )
                SELECT level, kind, count(*), sum(CAST(body->>'cost' AS INT))
                FROM below JOIN contexts ON ref = context_ref AND namespace = $namespace
                WHERE level = 0 OR CAST(body->>'cost' AS INT) > 20
                GROUP BY ALL ORDER BY level
                """,
                {"root": root.event_id, "namespace": hf.namespace},
            ).fetchall()
            return found

    assert await asyncio.to_thread(find) == [(0, "plan", 1, None), (1, "call", 2, 65)]


async def test_B05_B09_nothing_archived_is_deleted_for_its_age(hf: Holdfast, system: System) -> None:
    """The earlier system deleted what was 30 days old. Here only what was told to expire does."""
    ref = await hf.put({"goal": "fly"}, kind="plan")
    event = await hf.emit("plan:made", context=ref)
    await system.make_cold()
    later_ms = now_ms() + 3_650 * DAY_MS

    def clean() -> None:
        lake = Lake.open(system.lake)
        compact(lake, at_ms=later_ms)
        lake.close()

    await asyncio.to_thread(clean)
    janitor = Janitor(hf.connection, clock_ms=lambda: later_ms)
    await janitor.round()
    await janitor.close()
    context = await hf.resolve(ref)
    assert (context.body, context.tier) == ({"goal": "fly"}, "lake")
    assert [found.event_id for found in await hf.chain(event)] == [event.event_id]


async def test_B05_what_is_acknowledged_survives_the_death_of_the_server_at_that_moment(tmp_path: Path) -> None:
    """Nothing is written behind the caller's back: no task that may die with the process, no cache to be flushed."""
    server = OwnServer(tmp_path / "nats")
    settings = settings_in(tmp_path)
    try:
        await server.start()
        async with connect(server.url, agent="planner") as hf:
            event = await hf.emit("plan:made", context={"goal": "fly"})
            await server.kill()
        await server.start(with_streams=False)
        async with running(server.url, settings), connect(server.url, cache_bytes=0) as hf:
            for tier in ("hot", "lake"):
                [found] = await hf.chain(event)
                assert found.context_ref is not None
                context = await hf.resolve(found.context_ref)
                assert (context.body, context.tier) == ({"goal": "fly"}, tier)
                await flush(hf.connection)
                await evict(hf.connection, 0.0)
    finally:
        await server.stop()


async def test_B12_a_chain_is_not_kept_in_memory_and_outlives_every_process(tmp_path: Path) -> None:
    """Nothing that knows of the chain is running any more when it is asked for again."""
    settings = settings_in(tmp_path)
    async with own_server(tmp_path) as server:
        async with running(server.url, settings), connect(server.url) as hf:
            events = [await hf.emit("step", 0)]
            for number in range(1, 20):
                events.append(await hf.emit("step", number, parent=events[-1]))
            await flush(hf.connection)
            await purge_below(hf.connection, EVENTS_STREAM, (await stream_info(hf.connection, EVENTS_STREAM)).last_seq)
        await server.restart()
        async with running(server.url, settings_in(tmp_path, "another")), connect(server.url) as hf:
            assert [event.data for event in await hf.chain(events[-1])] == list(range(20))
            with pytest.raises(NotFoundError):
                await hf.chain(str(new_event_id()))


# Names


DOCUMENTED: list[tuple[object, dict[str, list[str]]]] = [
    (
        EventContextManager,
        {
            "create_context": ["event_id", "timestamp", "agent_id", "session_id"],
            "store_event_with_context": ["event"],
            "get_context": ["ref"],
            "get_contexts": ["refs"],
            "query_contexts": ["correlation_id", "agent_id", "session_id", "event_id", "since", "until", "limit"],
            "get_event_chain": ["event_id"],
            "get_event_with_context": ["event_id"],
            "copy_current_context": [],
            "restore_context": ["saved"],
        },
    ),
    (
        ConversationTracker,
        {
            "add_context_to_session": ["session_id", "context_ref"],
            "get_session_context_chain": ["session_id"],
            "get_agent_conversation_summary": ["agent_id", "include_fields"],
        },
    ),
    (
        checkpoints,
        {
            "capture_context_state": ["checkpoint_id"],
            "save_context_checkpoint": ["data"],
            "load_context_checkpoint": ["checkpoint_id"],
            "restore_context_state": ["data"],
        },
    ),
    (Orchestrations, {"capture": ["orchestration_id", "state", "payload", "reason"], "recover": ["context_ref"]}),
    (
        Optimizations,
        {"capture": ["opt_id", "state"], "introspect": ["opt_id"], "analyze_performance": ["framework"]},
    ),
]


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [(owner, name, parameters) for owner, functions in DOCUMENTED for name, parameters in functions.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_every_function_that_is_documented_exists(owner: object, name: str, parameters: list[str]) -> None:
    taken = inspect.signature(getattr(owner, name)).parameters
    assert set(parameters) <= set(taken)
