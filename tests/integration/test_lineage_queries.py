"""Chains, trees and queries of events over hot and archived as one, as the SDK and a plain client meet them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from holdfast.client import Event, Holdfast, connect
from holdfast.client.event_reader import Conditions, EventReader
from holdfast.lake import Lake
from holdfast.lake import connect as connect_lake
from holdfast.schemas.errors import InvalidFieldError, InvalidRefError, NotFoundError
from holdfast.schemas.ids import new_event_id
from holdfast.schemas.lineage import RECEIPT
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.consumer import DurableConsumer, ack_floor
from holdfast.streams.events import NewEvent
from holdfast.streams.hot import HotTier
from holdfast.streams.pull import read_one
from holdfast.streams.topology import purge_below, stream_info
from holdfast.streams.wire import EVENTS_STREAM
from holdfast.workers import interning
from holdfast.workers.control import evict, flush
from holdfast.workers.ingester import CONSUMER as INGESTER
from tests.integration.test_events import rows_of
from tests.running import eventually, own_server, running, settings_in, target_of
from tests.support import plain_client
from tests.test_lake_samples import EPOCH, event

if TYPE_CHECKING:
    from holdfast.lake.duck import Connection as LakeConnection
    from holdfast.streams.messages import StoredMessage
    from holdfast.streams.topology import StreamInfo

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Reader(EventReader):
    """What a client is made of, for queries alone."""

    def __init__(self, hf: Holdfast) -> None:
        self._resolver = hf._resolver
        self.namespace = hf.namespace

    async def call(self, endpoint: str, request: object) -> dict[str, Any]:
        """An endpoint as any client calls it."""
        return await self._resolver.call(endpoint, request)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[str]:
    """A system that archives when it is told to."""
    data: Path = tmp_path_factory.mktemp("lineage")
    async with own_server(data) as server, running(server.url, settings_in(data)):
        yield server.url


@pytest_asyncio.fixture(loop_scope="module")
async def hf(url: str, namespace: str) -> AsyncGenerator[Holdfast]:
    async with connect(url, namespace, "planner", cache_bytes=0) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def control(url: str) -> AsyncGenerator[Connection]:
    async with open_connection(target_of(url)) as connection:
        yield connection


@pytest.fixture
def reader(hf: Holdfast) -> Reader:
    return Reader(hf)


async def publish(hf: Holdfast, *events: tuple[str, str | None, str | None], **more: Any) -> None:
    """Stores events of an id, a parent and a root, in this order."""
    prepared = [
        NewEvent(
            namespace=hf.namespace, agent_id="a", name="e", id=own, parent_event_id=parent, root_event_id=root, **more
        )
        for own, parent, root in events
    ]
    assert await hf.publish_many(prepared) == [True] * len(prepared)


def ids_of(events: list[Event]) -> list[str]:
    return [str(each.event_id) for each in events]


async def make_cold(control: Connection) -> None:
    """Archives everything, and empties both tiers of what is archived."""
    await flush(control)
    await evict(control, 0.0)
    await purge_below(control, EVENTS_STREAM, (await stream_info(control, EVENTS_STREAM)).last_seq + 1)


# Chains and trees


async def test_B12_a_chain_leads_to_the_root_and_a_tree_to_every_leaf(
    hf: Holdfast, reader: Reader, control: Connection
) -> None:
    root = await hf.emit("plan:made", session="s", correlation="c")
    left = await hf.emit("tool:called", parent=root)
    right = await hf.emit("tool:called", parent=root, agent="worker")
    other = await hf.emit("plan:made")
    deep = await hf.emit("tool:answered", {"n": 1}, parent=left)
    late = await hf.emit("tool:answered", parent=right)
    for place in ("hot", "archived"):
        assert await reader.chain(deep) == [await stored(reader, each) for each in (root, left, deep)], place
        assert ids_of(await reader.tree(root)) == ids_of([root, left, deep, right, late])
        assert ids_of(await reader.tree(left)) == ids_of([left, deep])
        assert ids_of(await reader.descendants(root)) == ids_of([left, deep, right, late])
        assert await reader.descendants(late) == []
        assert await reader.tree(other.event_id) == [await stored(reader, other)]
        assert await reader.chain(root.event_id) == [await stored(reader, root)]
        await make_cold(control)


async def stored(reader: Reader, event: Event) -> Event:
    [found] = [each async for each in reader.query(event_id=event.event_id)]
    assert (found.name, found.parent_event_id, found.root_event_id) == (
        event.name,
        event.parent_event_id,
        event.root_event_id,
    )
    return found


async def test_a_parent_that_is_not_stored_ends_the_chain(hf: Holdfast, reader: Reader) -> None:
    lost, orphan, child = (str(new_event_id()) for _ in range(3))
    await publish(hf, (orphan, lost, None), (child, orphan, None))
    assert ids_of(await reader.chain(child)) == [orphan, child]
    assert ids_of(await reader.tree(orphan)) == [orphan, child]
    answer = await reader.call("chain", {"event_id": child})
    assert (answer["complete"], answer["cursor"]) == (False, None)
    # When it comes after all, it takes its place.
    await publish(hf, (lost, None, None))
    assert ids_of(await reader.chain(child)) == [lost, orphan, child]
    assert (await reader.call("chain", {"event_id": child}))["complete"] is True
    assert ids_of(await reader.tree(lost)) == [lost, orphan, child]


async def test_forged_parents_that_go_round_in_a_circle_end(hf: Holdfast, reader: Reader) -> None:
    one, two, three, itself, below = (str(new_event_id()) for _ in range(5))
    await publish(hf, (one, three, one), (two, one, one), (three, two, one), (itself, itself, itself))
    await publish(hf, (below, two, one))
    assert ids_of(await reader.chain(below)) == [three, one, two, below]
    assert (await reader.call("chain", {"event_id": below}))["complete"] is False
    assert ids_of(await reader.tree(two)) == [two, three, one, below]
    assert ids_of(await reader.tree(itself)) == [itself]
    assert ids_of(await reader.chain(itself)) == [itself]


async def test_what_claims_another_root_is_not_in_the_tree_but_keeps_its_chain(hf: Holdfast, reader: Reader) -> None:
    root, child, stranger, unknown = (str(new_event_id()) for _ in range(4))
    await publish(hf, (root, None, None), (child, root, root), (stranger, child, str(new_event_id())))
    await publish(hf, (unknown, child, None))
    assert ids_of(await reader.tree(root)) == [root, child, unknown]
    assert ids_of(await reader.chain(stranger)) == [root, child, stranger]
    # A chain of which every event claims a root of its own ends as well.
    above, chain = root, [root]
    for _ in range(8):
        own = str(new_event_id())
        await publish(hf, (own, above, str(new_event_id())))
        chain.append(above := own)
    assert ids_of(await reader.chain(above)) == chain


@pytest.mark.parametrize("knows_root", [True, False])
async def test_a_tree_of_any_depth_is_whole(hf: Holdfast, reader: Reader, *, knows_root: bool) -> None:
    ids = [str(new_event_id()) for _ in range(3_000)]
    root = ids[0] if knows_root else None
    await publish(hf, *[(own, ids[n - 1] if n else None, root if n else None) for n, own in enumerate(ids)])
    assert ids_of(await reader.tree(ids[0])) == ids
    assert ids_of(await reader.chain(ids[-1])) == ids
    assert ids_of(await reader.tree(ids[2_990])) == ids[2_990:]
    assert ids_of(await reader.tree(ids[0], limit=7)) == ids[:7]


async def test_pages_of_a_tree_stay_right_while_it_grows(hf: Holdfast, reader: Reader) -> None:
    root, left, right = (str(new_event_id()) for _ in range(3))
    await publish(hf, (root, None, None), (left, root, root), (right, root, root))
    first = await reader.call("tree", {"event_id": root, "limit": 2})
    assert [each["event_id"] for each in first["events"]] == [root, left]
    below, late = str(new_event_id()), str(new_event_id())
    await publish(hf, (below, left, root), (late, root, root))
    second = await reader.call("tree", {"event_id": root, "limit": 2, "cursor": first["cursor"]})
    assert [each["event_id"] for each in second["events"]] == [below, right]
    third = await reader.call("tree", {"event_id": root, "limit": 2, "cursor": second["cursor"]})
    assert [each["event_id"] for each in third["events"]] == [late]
    assert third["cursor"] is None
    pages = await reader.call("descendants", {"event_id": root, "limit": 4})
    assert ([each["event_id"] for each in pages["events"]], pages["cursor"]) == ([left, below, right, late], None)


async def test_receipts_are_left_out_unless_asked_for(hf: Holdfast, reader: Reader) -> None:
    root = await hf.emit("work", correlation="c")
    receipt = await hf.emit(RECEIPT, {"read": []}, parent=root)
    child = await hf.emit("done", parent=root)
    assert ids_of(await reader.tree(root)) == ids_of([root, child])
    assert ids_of(await reader.tree(root, receipts=True)) == ids_of([root, receipt, child])
    assert ids_of(await reader.descendants(root, receipts=True)) == ids_of([receipt, child])
    assert ids_of([each async for each in reader.query(correlation="c")]) == ids_of([root, child])
    ways: list[Conditions] = [{"receipts": True}, {"name": RECEIPT}, {"event_id": receipt.event_id}]
    for asked in ways:
        found = ids_of([each async for each in reader.query(**asked)])
        assert str(receipt.event_id) in found
    assert ids_of(await reader.tree(receipt)) == ids_of([receipt])


async def test_a_producers_own_id_names_an_event_everywhere(hf: Holdfast, reader: Reader) -> None:
    root = await hf.emit("a", event_id="step-1")
    child = await hf.emit("b", event_id="step-2", parent=root)
    assert ids_of(await reader.chain("step-2")) == ids_of([root, child])
    assert ids_of(await reader.tree("step-1")) == ids_of([root, child])
    assert ids_of([each async for each in reader.query(root="step-1")]) == ids_of([root, child])
    assert ids_of([each async for each in reader.query(parent="step-1")]) == ids_of([child])


@pytest.mark.parametrize("endpoint", ["chain", "tree", "descendants"])
@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({}, "event_id"),
        ({"event_id": ""}, "event_id"),
        ({"event_id": 5}, "event_id"),
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"cursor": "junk"}, "cursor"),
        ({"cursor": str(new_event_id())}, "cursor"),
        ({"fields": ["name", "nothing"]}, "fields"),
        ({"depth": 3}, "depth"),
    ],
)
async def test_bad_requests_are_refused_by_field(
    hf: Holdfast, reader: Reader, endpoint: str, request_: dict[str, Any], field: str
) -> None:
    event = await hf.emit("e")
    whole = {"event_id": event.event_id, **request_} if request_ else {}
    with pytest.raises(InvalidFieldError) as caught:
        await reader.call(endpoint, whole)
    assert caught.value.field == field
    if field == "fields":
        assert "event_id, name" in (caught.value.hint or "")


@pytest.mark.parametrize("endpoint", ["chain", "tree", "descendants"])
async def test_what_is_not_stored_is_told_as_not_found(reader: Reader, endpoint: str) -> None:
    with pytest.raises(NotFoundError, match="no event nothing of that name in"):
        await reader.call(endpoint, {"event_id": "nothing of that name"})


async def test_answers_are_cut_at_their_size_and_go_on(hf: Holdfast, reader: Reader) -> None:
    root = await hf.emit("e", "x" * 400_000)
    event = root
    for n in range(5):
        event = await hf.emit("e", f"{n}" * 400_000, parent=event)
    for endpoint, asked, least in (("tree", root, 6), ("chain", event, 6), ("descendants", root, 5)):
        answer = await reader.call(endpoint, {"event_id": asked.event_id})
        assert 0 < len(answer["events"]) < least
        assert answer["cursor"] == answer["events"][-1]["event_id"]
    tree = await reader.tree(root)
    assert [each.data[0] for each in tree] == ["x", "0", "1", "2", "3", "4"]
    assert ids_of(await reader.chain(event)) == ids_of(tree)
    # Without the data, one answer has room for all.
    answer = await reader.call("tree", {"event_id": root.event_id, "fields": ["event_id", "event_depth"]})
    assert [each["event_depth"] for each in answer["events"]] == list(range(6))
    assert set(answer["events"][0]) == {"event_id", "event_depth"}


async def test_every_reference_in_an_answer_resolves(hf: Holdfast, reader: Reader, url: str) -> None:
    """A context inside a raw event is stored before a reference to it is told."""
    async with plain_client(url) as client:
        for n in range(5):
            message = {"id": f"raw-{n}", "context": {"n": n}, "data": n}
            if n:
                message["parent_event_id"] = f"raw-{n - 1}"
            await client.jetstream().publish(f"ctx.{hf.namespace}.event.agent.step", json.dumps(message).encode())
        for event in await reader.tree("raw-0"):
            assert event.context_ref is not None
            assert (await hf.resolve(event.context_ref)).body == {"n": event.data}


async def test_only_events_that_the_ingester_has_not_come_to_are_looked_at_one_by_one(
    tmp_path: Path, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer of a thousand events does not cost a thousand round trips because one of them is new."""
    looked_at: list[int] = []

    async def read_and_count(connection: Connection, info: StreamInfo, seq: int) -> StoredMessage | None:
        looked_at.append(seq)
        return await read_one(connection, info, seq)

    monkeypatch.setattr(interning, "read_one", read_and_count)
    async with own_server(tmp_path) as server, connect(server.url, namespace, "planner") as hf:
        ingester = DurableConsumer(hf.connection, EVENTS_STREAM, INGESTER)
        await ingester.open()
        for n in range(8):
            await hf.emit("e", context={"n": n})
        async with plain_client(server.url) as client:
            await client.jetstream().publish(f"ctx.{namespace}.event.agent.step", b'{"context": {"n": 8}}')
        settled = 0
        while settled < 8:
            for delivery in await ingester.fetch(8 - settled):
                await ingester.ack(delivery)
                settled += 1
        await eventually(lambda: _floor_is(hf.connection, 8))
        await ingester.close()
        rows = await rows_of(hf.connection, namespace)
        hot = HotTier(hf.connection)
        await interning.InlineContexts(hf.connection, hot).intern_ahead(rows)
        await hot.close()
        assert looked_at == [9]
        assert rows[-1].context_ref is not None
        assert (await hf.resolve(rows[-1].context_ref)).body == {"n": 8}


async def _floor_is(connection: Connection, seq: int) -> bool:
    return await ack_floor(connection, EVENTS_STREAM, INGESTER) == seq


async def test_answers_carry_the_trace(hf: Holdfast, reader: Reader) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    event = await hf.emit("e", traceparent=trace)
    assert [each.traceparent for each in await reader.tree(event)] == [trace]
    page = await reader.query_page(event_id=event.event_id, fields=["traceparent", "data"])
    assert page.events == [{"traceparent": trace}]


async def test_two_namespaces_with_the_same_ids_do_not_meet(hf: Holdfast, reader: Reader, url: str) -> None:
    root, here, there = (str(new_event_id()) for _ in range(3))
    await publish(hf, (root, None, None), (here, root, root))
    async with connect(url, hf.namespace + "-2") as other:
        await publish(other, (root, None, None), (there, root, root))
        assert ids_of(await Reader(other).tree(root)) == [root, there]
        with pytest.raises(NotFoundError):
            await Reader(other).chain(here)
    assert ids_of(await reader.tree(root)) == [root, here]


# Queries


async def test_B28_B58_B92_events_are_found_by_each_condition(
    hf: Holdfast, reader: Reader, control: Connection
) -> None:
    ref = await hf.put({"a": 1}, kind="note")
    start = datetime.now(UTC)
    one = await hf.emit("a:x", context=ref, correlation="c1", session="s1", originator="o1")
    two = await hf.emit("a:y", parent=one, correlation="c2", agent="worker")
    three = await hf.emit("b:x", context=ref, correlation="c1", session="s2", originator="o2")
    conditions: list[tuple[dict[str, Any], list[Event]]] = [
        ({"correlation": "c1"}, [one, three]),
        ({"correlation": "c1", "session": "s2"}, [three]),
        ({"session": "s1"}, [one, two]),
        ({"agent": "worker"}, [two]),
        ({"event_id": two.event_id}, [two]),
        ({"root": one}, [one, two]),
        ({"parent": one}, [two]),
        ({"parent": two}, []),
        ({"ref": ref}, [one, three]),
        ({"originator": "o2"}, [three]),
        ({"name": "a:x"}, [one]),
        ({"kind": "note", "correlation": "c1"}, [one, three]),
        ({"since": start}, [one, two, three]),
        ({"until": start}, []),
        ({"correlation": "nobody's"}, []),
    ]
    for place in ("hot", "archived"):
        for given, expected in conditions:
            assert ids_of([each async for each in reader.query(**given)]) == ids_of(expected), (place, given)
        # The contexts of a correlation: one query and one look-up of all their references.
        found = [each.context_ref async for each in reader.query(correlation="c1") if each.context_ref]
        assert (await hf.resolve_many(found)).found[ref].body == {"a": 1}
        await make_cold(control)


async def test_query_pages_go_on_and_see_what_is_stored_meanwhile(hf: Holdfast, reader: Reader) -> None:
    for n in range(5):
        await hf.emit("e", n)
    page = await reader.query_page(limit=2)
    assert [each.data for each in page.events] == [0, 1]
    rest = await reader.query_page(cursor=page.cursor, fields=["data", "event_depth"])
    assert rest.events == [{"data": n, "event_depth": 0} for n in (2, 3, 4)]
    end = await reader.query_page(cursor=rest.cursor)
    assert (end.events, end.cursor) == ([], rest.cursor)
    await hf.emit("e", 5)
    assert [each.data for each in (await reader.query_page(cursor=end.cursor)).events] == [5]
    assert [each async for each in reader.query(fields=["data"], limit=3)] == [{"data": n} for n in range(3)]


@pytest.mark.parametrize(
    ("given", "error", "field"),
    [
        ({"fields": ["nothing"]}, InvalidFieldError, "fields"),
        ({"fields": "name"}, InvalidFieldError, "fields"),
        ({"ref": "junk"}, InvalidRefError, None),
        ({"cursor": "junk"}, InvalidFieldError, "cursor"),
        ({"limit": 1001}, InvalidFieldError, "limit"),
        ({"root": ""}, InvalidFieldError, "root_event_id"),
        ({"originator": "x" * 257}, InvalidFieldError, "originator"),
    ],
)
async def test_conditions_that_are_none_are_refused(
    reader: Reader, given: dict[str, Any], error: type[Exception], field: str | None
) -> None:
    with pytest.raises(error) as caught:
        await reader.query_page(**given)
    if field is not None:
        assert getattr(caught.value, "field", None) == field


async def test_a_condition_that_does_not_exist_is_a_type_error(reader: Reader) -> None:
    with pytest.raises(TypeError, match="choose from session, agent"):
        reader.query(sesion="s")  # type: ignore[call-overload]


def groups_read(connection: LakeConnection, condition: str, value: str) -> tuple[int, int]:
    """How many row groups a look-up reads, and of how many."""
    plan: str = connection.execute(
        f"EXPLAIN ANALYZE SELECT name FROM events WHERE namespace = 'default' AND {condition}", [value]
    ).fetchall()[0][1]
    line = next(line for line in plan.splitlines() if "Row Groups Scanned" in line)
    read, whole = line.split(":")[1].strip(" │").split("/")
    return int(read), int(whole)


async def test_B92_look_ups_by_correlation_event_and_agent_read_what_they_need(tmp_path: Path) -> None:
    def measure() -> None:
        lake = Lake.open(tmp_path / "lake", create=True)
        rows = [
            event(n, correlation_id=f"correlation-{n // 10}", agent_id=f"agent-{n // 2_000}") for n in range(1, 20_001)
        ]
        lake.append("events", rows, epoch=EPOCH, first_seq=1, last_seq=len(rows))
        with connect_lake(lake.path) as connection:
            for condition, value, most in (
                ("correlation_id = ?", "correlation-700", 1),
                ("event_id = CAST(? AS UUID)", event(12_345).id, 1),
                ("agent_id = ?", "agent-3", 3),  # its events stand in three groups
            ):
                read, whole = groups_read(connection, condition, value)
                assert whole >= 8
                assert read <= most, condition

    await asyncio.to_thread(measure)


# Resolving, stats and health


async def test_B26_B27_B94_one_request_resolves_many_references_hot_and_cold(
    hf: Holdfast, reader: Reader, control: Connection
) -> None:
    cold = [await hf.put({"cold": n}) for n in range(3)]
    await make_cold(control)
    hot = [await hf.put({"hot": n}) for n in range(3)]
    missing = "ctx_context_" + "a" * 32
    answer = await reader.call("resolve_batch", {"refs": [*cold, missing, *hot], "fields": ["body", "tier"]})
    assert answer["contexts"] == {
        **{ref: {"body": {"cold": n}, "tier": "lake"} for n, ref in enumerate(cold)},
        **{ref: {"body": {"hot": n}, "tier": "hot"} for n, ref in enumerate(hot)},
    }
    assert (answer["resolved_count"], answer["not_found"]) == (6, [missing])
    assert (await reader.call("resolve", {"ref": cold[0]}))["body"] == {"cold": 0}
    with pytest.raises(NotFoundError):
        await reader.call("resolve", {"ref": missing})


async def test_B29_B30_stats_count_each_thing_once(hf: Holdfast, reader: Reader, control: Connection) -> None:
    await flush(control)
    before = await hf.stats()
    first = await hf.emit("e", context={"n": str(new_event_id())}, correlation=str(new_event_id()), agent=hf.namespace)
    await hf.emit("e", parent=first, agent=hf.namespace)
    for _ in ("hot", "archived and hot"):
        now = await hf.stats()
        for name, more in (("total", 2), ("agents", 1), ("correlations", 1), ("trees", 1)):
            assert now["events"][name] == before["events"][name] + more, name
        assert now["contexts"]["total"] == before["contexts"]["total"] + 1
        assert now["contexts"]["archived"] + now["contexts"]["unarchived"] == now["contexts"]["total"]
        assert now["events"]["newest_event"] > (before["events"]["newest_event"] or "")
        assert now["events"]["oldest_event"] <= now["events"]["newest_event"]
        await flush(control)
    assert (await hf.stats())["contexts"]["unarchived"] == 0
    assert (await hf.health())["ok"] is True
