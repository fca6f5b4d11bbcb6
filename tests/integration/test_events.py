"""Events on a real server: stored once under their id, in a lineage, carrying references."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.client import Event, Holdfast, connect
from holdfast.schemas.errors import HoldfastError, InvalidFieldError, InvalidNameError, InvalidRefError, TooLargeError
from holdfast.schemas.ids import new_event_id, normal_event_id
from holdfast.streams.decode import decode_event
from holdfast.streams.events import NewEvent
from holdfast.streams.pull import StreamReader
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import EVENTS_STREAM
from tests.support import stable_id

if TYPE_CHECKING:
    from holdfast.schemas.rows import EventRow
    from holdfast.streams.connection import Connection


async def rows_of(connection: Connection, namespace: str) -> list[EventRow]:
    info = await stream_info(connection, EVENTS_STREAM)
    reader = StreamReader(connection, EVENTS_STREAM, max(1, info.first_seq), allow_gaps=True)
    rows: list[EventRow] = []
    while reader.next_seq <= info.last_seq:
        messages, _ = await reader.read(limit=10_000)
        rows += [decode_event(m).row for m in messages if m.subject.startswith(f"ctx.{namespace}.")]
    await reader.close()
    return rows


async def test_an_event_that_states_a_parent_and_itself_as_root_is_stored_so(
    hf: Holdfast, connection: Connection
) -> None:
    itself, parent = new_event_id(), new_event_id()
    await hf.publish_many(
        [
            NewEvent(
                namespace=hf.namespace, agent_id="a", name="n", id=itself, parent_event_id=parent, root_event_id=itself
            )
        ]
    )
    [row] = await rows_of(connection, hf.namespace)
    assert (row.parent_event_id, row.root_event_id) == (parent, itself)


async def test_an_event_is_stored_as_it_was_returned(hf: Holdfast, connection: Connection) -> None:
    ref = await hf.put({"a": 1})
    at = datetime(2026, 1, 31, 9, 30, 0, 125_000, tzinfo=UTC)
    event = await hf.emit(
        "agent:status",
        {"state": "ready"},
        context=ref,
        session="s1",
        correlation="c1",
        client="cl",
        originator="o",
        timestamp=at,
    )
    assert (event.timestamp, event.context_ref, event.event_depth, event.root_event_id) == (at, ref, 0, event.event_id)
    (row,) = await rows_of(connection, hf.namespace)
    assert (row.id, row.name, row.agent_id) == (event.event_id, "agent:status", "tester")
    assert (row.session_id, row.correlation_id, row.client_id, row.originator) == ("s1", "c1", "cl", "o")
    assert (row.context_ref, row.data) == (ref, b'{"state":"ready"}')
    assert (row.root_event_id, row.parent_event_id, row.event_depth) == (event.event_id, None, 0)
    assert row.timestamp_ms == round(at.timestamp() * 1000)


@pytest.mark.parametrize("body", [{"a": 1}, [1], b"\x00", "text that is no reference", "ctx_looks_like_one", 5, False])
async def test_a_body_given_as_context_is_stored_first(hf: Holdfast, body: Any) -> None:
    event = await hf.emit("e", context=body, context_kind="note")
    assert event.context_ref is not None
    hf.cache.forget(event.context_ref)
    context = await hf.resolve(event.context_ref)
    assert (context.body, context.kind) == (body, "note")


async def test_a_child_inherits_what_it_does_not_say(hf: Holdfast, connection: Connection) -> None:
    root = await hf.emit("a", session="s", correlation="c")
    child = await hf.emit("b", parent=root)
    grandchild = await hf.emit("c", parent=child, session="other")
    stranger = await hf.emit("d", parent=root.event_id)
    assert (child.session_id, child.correlation_id, child.event_depth) == ("s", "c", 1)
    assert (grandchild.session_id, grandchild.correlation_id, grandchild.event_depth) == ("other", "c", 2)
    assert grandchild.parent_event_id == child.event_id
    assert {each.root_event_id for each in (root, child, grandchild)} == {root.event_id}
    # Of a parent known by its id alone, neither session nor root is known.
    assert (stranger.parent_event_id, stranger.session_id, stranger.root_event_id) == (root.event_id, None, None)
    rows = {row.id: row for row in await rows_of(connection, hf.namespace)}
    for event in (root, child, grandchild, stranger):
        row = rows[event.event_id]
        assert (row.parent_event_id, row.root_event_id, row.event_depth, row.session_id) == (
            event.parent_event_id,
            event.root_event_id,
            event.event_depth,
            event.session_id,
        )


async def test_a_repeated_id_is_stored_once(hf: Holdfast, connection: Connection) -> None:
    event_id = str(new_event_id())
    await asyncio.gather(*(hf.emit("e", {"i": i}, event_id=event_id) for i in range(40)))
    await hf.emit("e", event_id=event_id)
    assert [row.id for row in await rows_of(connection, hf.namespace)] == [event_id]


@pytest.mark.parametrize("event_id", [str(new_event_id(0)), "step-1"], ids=["uuid", "short"])
async def test_one_id_in_two_namespaces_is_two_events(
    hf: Holdfast, nats_server: str, connection: Connection, event_id: str
) -> None:
    await hf.emit("e", event_id=event_id)
    async with connect(nats_server, namespace=hf.namespace + "-2") as other:
        await other.emit("e", event_id=event_id)
    assert len(await rows_of(connection, hf.namespace + "-2")) == 1


@pytest.mark.parametrize("given", ["step-17", "E4AFAF66-494B-4E70-BEFB-82ABEA9B168B", "ünï\x00 code"])
async def test_an_id_that_is_no_uuid_becomes_one_and_is_kept(hf: Holdfast, connection: Connection, given: str) -> None:
    first = await hf.emit("e", event_id=given)
    again = await hf.emit("e", event_id=given)
    child = await hf.emit("f", parent=given)
    assert first.event_id == again.event_id == normal_event_id(hf.namespace, given)[0]
    assert (first.source_id, child.parent_event_id) == (given, first.event_id)
    rows = await rows_of(connection, hf.namespace)
    assert [(row.id, row.source_id) for row in rows] == [(first.event_id, given), (child.event_id, None)]


async def test_prepared_events_are_told_apart_as_new_or_known(hf: Holdfast) -> None:
    events = [NewEvent(namespace=hf.namespace, agent_id="a", name="e", data=i) for i in range(600)]
    assert await hf.publish_many(events[:300]) == [True] * 300
    assert await hf.publish_many(events) == [False] * 300 + [True] * 300
    assert await hf.publish_many([]) == []


@pytest.mark.parametrize(
    "name", ["a.b", "a b", "*", ">", "$SYS", "a\x00b", "ünï", "a:b:c", ":", "a::b", "x--", "x--_41", "x" * 512]
)
async def test_any_name_reaches_the_stream_and_comes_back(hf: Holdfast, connection: Connection, name: str) -> None:
    await hf.emit(name, agent=name[:256])
    (row,) = await rows_of(connection, hf.namespace)
    assert (row.name, row.agent_id) == (name, name[:256])


@pytest.mark.parametrize(
    ("arguments", "error", "field"),
    [
        ({"name": ""}, InvalidNameError, "name"),
        ({"name": "x" * 513}, InvalidNameError, "name"),
        ({"name": "x" * 10_000}, InvalidNameError, "name"),
        ({"name": ":".join("a" * 17)}, InvalidNameError, "name"),
        ({"name": "\ud800"}, InvalidNameError, "name"),
        ({"name": 5}, InvalidNameError, "name"),
        ({"name": None}, InvalidNameError, "name"),
        ({"agent": ""}, InvalidNameError, "agent_id"),
        ({"agent": "x" * 257}, InvalidNameError, "agent_id"),
        ({"session": ""}, InvalidFieldError, "session_id"),
        ({"session": "x" * 257}, InvalidFieldError, "session_id"),
        ({"session": 5}, InvalidFieldError, "session_id"),
        ({"correlation": b"x"}, InvalidFieldError, "correlation_id"),
        ({"client": ["x"]}, InvalidFieldError, "client_id"),
        ({"originator": {}}, InvalidFieldError, "originator"),
        ({"session": "\ud800"}, InvalidFieldError, "session_id"),
        ({"data": float("nan")}, InvalidFieldError, "data"),
        ({"data": float("inf")}, InvalidFieldError, "data"),
        ({"data": {"a": [float("-inf")]}}, InvalidFieldError, "data"),
        ({"data": b"x"}, InvalidFieldError, "data"),
        ({"data": object()}, InvalidFieldError, "data"),
        ({"data": "\ud800"}, InvalidFieldError, "data"),
        ({"data": "x" * 1_000_000}, TooLargeError, "data"),
        ({"timestamp": datetime(2026, 1, 1)}, InvalidFieldError, "timestamp"),  # noqa: DTZ001  naive on purpose
        ({"timestamp": datetime(1969, 12, 31, tzinfo=UTC)}, InvalidFieldError, "timestamp"),
        ({"timestamp": 5}, InvalidFieldError, "timestamp"),
        ({"event_id": ""}, InvalidFieldError, "event_id"),
        ({"event_id": 5}, InvalidFieldError, "event_id"),
        ({"event_id": "x" * 257}, InvalidFieldError, "event_id"),
        ({"event_id": "\ud800"}, InvalidFieldError, "event_id"),
        ({"parent": ""}, InvalidFieldError, "parent"),
        ({"parent": 5}, InvalidFieldError, "parent"),
        ({"traceparent": "x"}, InvalidFieldError, "traceparent"),
        ({"traceparent": "\ud800"}, InvalidFieldError, "traceparent"),
        ({"traceparent": 5}, InvalidFieldError, "traceparent"),
        ({"context": float("nan")}, InvalidFieldError, "body"),
        ({"context": object()}, InvalidFieldError, "body"),
        ({"context": {}, "context_kind": "a b"}, InvalidNameError, "kind"),
    ],
    ids=stable_id,
)
async def test_what_may_not_be_sent_is_refused_by_name(
    hf: Holdfast, connection: Connection, arguments: dict[str, Any], error: type[HoldfastError], field: str
) -> None:
    sent: dict[str, Any] = {"name": "e"}
    with pytest.raises(error) as caught:
        await hf.emit(**(sent | arguments))
    assert caught.value.field == field
    assert await rows_of(connection, hf.namespace) == []


async def test_nesting_is_bounded(hf: Holdfast) -> None:
    def nested(depth: int) -> list[Any]:
        value: list[Any] = []
        for _ in range(depth - 1):
            value = [value]
        return value

    await hf.emit("e", nested(64))
    with pytest.raises(InvalidFieldError) as caught:
        await hf.emit("e", nested(65))
    assert (caught.value.field, caught.value.limit) == ("data", 64)
    with pytest.raises(InvalidFieldError):
        await hf.emit("e", nested(100_000))


async def test_a_bad_prepared_event_is_refused_before_anything_is_sent(hf: Holdfast, connection: Connection) -> None:
    good = NewEvent(namespace=hf.namespace, agent_id="a", name="e")
    bad: list[dict[str, Any]] = [
        {"id": "no uuid"},
        {"parent_event_id": "no uuid"},
        {"root_event_id": ""},
        {"timestamp_ms": -1},
        {"timestamp_ms": 253_402_300_800_000},
        {"event_depth": -1},
        {"event_depth": 2**31},
        {"source_id": ""},
    ]
    for change in bad:
        fields: dict[str, Any] = {"namespace": hf.namespace, "agent_id": "a", "name": "e"}
        event = NewEvent(**(fields | change))
        with pytest.raises(InvalidFieldError):
            await hf.publish_many([good, event])
    with pytest.raises(InvalidRefError):
        await hf.publish_many([NewEvent(namespace=hf.namespace, agent_id="a", name="e", context_ref="x")])  # type: ignore[arg-type]
    assert await rows_of(connection, hf.namespace) == []


async def test_times_survive_to_the_millisecond(hf: Holdfast, connection: Connection) -> None:
    moments = [
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(2026, 1, 1, 0, 0, 0, 1_000, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC),
        datetime(2026, 7, 1, 12, tzinfo=UTC) + timedelta(milliseconds=999),
    ]
    events: list[Event] = [await hf.emit("e", timestamp=moment) for moment in moments]
    assert [event.timestamp for event in events] == moments
    rows = await rows_of(connection, hf.namespace)
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    assert [epoch + timedelta(milliseconds=row.timestamp_ms) for row in rows] == moments
