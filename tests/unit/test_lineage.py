"""A lineage in explicit form: checked, merged, carried over transports, without any server."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.client import Event, lineage
from holdfast.client.lineage_context import HEADER_BYTES, IdMint, continued_trace
from holdfast.schemas.errors import InvalidFieldError, InvalidRefError, TooLargeError
from holdfast.schemas.ids import EventId, new_event_id, normal_event_id
from holdfast.schemas.lineage import FIELDS
from tests.support import examples

FULL: dict[str, Any] = {
    "event_id": "0198c0de-0000-7000-8000-000000000003",
    "correlation_id": "corr-456",
    "parent_event_id": "0198c0de-0000-7000-8000-000000000002",
    "root_event_id": "0198c0de-0000-7000-8000-000000000001",
    "event_depth": 2,
    "agent_id": "planner",
    "client_id": "web-7",
    "originator": "chief",
    "session_id": "s1",
    "timestamp": 1_640_995_200.25,
    "context_ref": "ctx_plan_" + "a" * 32,
}


def event(**changes: Any) -> Event:
    fields: dict[str, Any] = {
        "event_id": EventId(FULL["event_id"]),
        "name": "plan:step",
        "namespace": "default",
        "agent_id": "planner",
        "timestamp": datetime.fromtimestamp(FULL["timestamp"], UTC),
        "parent_event_id": FULL["parent_event_id"],
        "root_event_id": FULL["root_event_id"],
        "event_depth": 2,
        "correlation_id": "corr-456",
        "session_id": "s1",
        "client_id": "web-7",
        "originator": "chief",
        "context_ref": FULL["context_ref"],
    }
    return Event(**{**fields, **changes})


@pytest.mark.parametrize("name", list(FULL))
def test_B76_B77_B78_B79_B80_B81_B82_B83_B84_B85_B86_an_event_tells_every_field_in_explicit_form(name: str) -> None:
    assert lineage.of(event())[name] == FULL[name]
    alias = "_ksi_context_ref" if name == "context_ref" else f"_{name}"
    # What an earlier system wrote under its own names is read, and can be written for it again.
    assert lineage.from_dict({alias: FULL[name]}) == {name: FULL[name]}
    assert lineage.with_underscores(FULL)[alias] == FULL[name]


def test_what_an_event_does_not_know_is_absent() -> None:
    bare = event(
        parent_event_id=None, root_event_id=None, event_depth=0, correlation_id=None, session_id=None, client_id=None,
        originator=None, context_ref=None,
    )  # fmt: skip
    assert set(lineage.of(bare)) == {"event_id", "event_depth", "agent_id", "timestamp"}


def test_a_member_under_its_own_name_wins_over_its_alias_and_none_is_absent() -> None:
    assert lineage.from_dict({"_agent_id": "old", "agent_id": "new", "session_id": None, "mood": "calm"}) == {
        "agent_id": "new",
        "mood": "calm",
    }
    assert lineage.from_dict({"agent_id": None, "_agent_id": "old"}) == {"agent_id": "old"}


@pytest.mark.parametrize(
    ("given_", "field"),
    [
        ({"event_id": 5}, "event_id"),
        ({"session_id": ""}, "session_id"),
        ({"correlation_id": "c" * 257}, "correlation_id"),
        ({"event_depth": -1}, "event_depth"),
        ({"event_depth": True}, "event_depth"),
        ({"timestamp": "now"}, "timestamp"),
        ({"timestamp": -1.0}, "timestamp"),
        ({"traceparent": "00-1-2-3"}, "traceparent"),
        ({1: "x"}, "lineage"),
        ("ctx", "lineage"),
    ],
)
def test_a_member_that_cannot_be_is_named(given_: Any, field: str) -> None:
    with pytest.raises(InvalidFieldError) as refused:
        lineage.from_dict(given_)
    assert refused.value.field == field


def test_a_context_reference_must_be_one() -> None:
    with pytest.raises(InvalidRefError):
        lineage.from_dict({"context_ref": "my notes"})


def test_B23_B74_lineages_of_several_sources_merge_and_a_place_in_a_tree_comes_from_one_of_them() -> None:
    request = {"session_id": "s9", "agent_id": "gateway", "priority": 1, "trace_note": "a"}
    merged = lineage.merge(FULL, request)
    assert merged["event_id"] == FULL["event_id"]
    assert merged["event_depth"] == 2
    assert (merged["session_id"], merged["agent_id"], merged["priority"]) == ("s9", "gateway", 1)
    other = {"event_id": new_event_id(), "event_depth": 0}
    moved = lineage.merge(FULL, other)
    assert moved["event_id"] == other["event_id"]
    # Nothing of the other tree is left that could put this event below the wrong root.
    assert "parent_event_id" not in moved
    assert "root_event_id" not in moved
    assert moved["event_depth"] == 0
    assert moved["session_id"] == "s1"


_text = st.text(min_size=1, max_size=20).filter(lambda text: all(not 0xD800 <= ord(c) <= 0xDFFF for c in text))
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | _text, lambda inner: st.lists(inner, max_size=3)
)


@examples(60)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "event_id": _text,
            "session_id": _text,
            "correlation_id": _text,
            "agent_id": _text,
            "event_depth": st.integers(0, 100),
        },
    ),
    st.dictionaries(_text.filter(lambda n: n not in FIELDS and not n.startswith("_")), _json, max_size=3),
)
def test_B21_B68_B69_B70_a_lineage_comes_through_headers_and_json_as_it_was(
    fields: dict[str, Any], attributes: dict[str, Any]
) -> None:
    normal = lineage.from_dict({**attributes, **fields})
    headers = lineage.to_headers(normal)
    assert all(value.isascii() and "\n" not in value for value in headers.values())
    # HTTP and proxies change the case of names.
    assert lineage.from_headers({name.upper(): value for name, value in headers.items()}) == normal
    assert lineage.from_dict(json.loads(json.dumps(normal))) == normal


def test_headers_without_a_lineage_give_none_and_damaged_ones_are_told() -> None:
    assert lineage.from_headers({"Content-Type": "application/json"}) is None
    assert lineage.from_headers({"traceparent": "broken"}) is None
    with pytest.raises(InvalidFieldError, match=lineage.HEADER):
        lineage.from_headers({lineage.HEADER: "{"})
    with pytest.raises(TooLargeError):
        lineage.to_headers({**FULL, "notes": "x" * HEADER_BYTES})
    with pytest.raises(InvalidFieldError, match="not JSON"):
        lineage.to_headers({**FULL, "notes": object()})


def test_a_w3c_trace_goes_out_with_the_root_as_its_trace_and_the_event_as_its_span() -> None:
    trace = lineage.to_traceparent(FULL)
    version, trace_id, span, flags = trace.split("-")
    assert (version, flags) == ("00", "01")
    assert trace_id == uuid.UUID(FULL["root_event_id"]).hex
    assert span == uuid.UUID(FULL["event_id"]).hex[16:]
    assert lineage.to_headers(FULL)["traceparent"] == trace
    with pytest.raises(InvalidFieldError):
        lineage.to_traceparent({"session_id": "s"})


def test_ids_of_producers_have_spans_of_their_own_whatever_they_end_in() -> None:
    given = ["alpha_event", "gamma_event", "7", "8", "evt_abc123", "x" * 40]
    spans = [lineage.to_traceparent({"event_id": each}).split("-")[2] for each in given]
    assert len(set(spans)) == len(given)
    # No half of them is a count, or mostly zeros: they are random bits, as tools that sample traces expect.
    assert all(len(set(span)) > 4 for span in spans)
    same = normal_event_id("ns", "evt_abc123")[0]
    assert lineage.to_traceparent({"event_id": same}) == lineage.to_traceparent({"event_id": "evt_abc123"})


def test_a_w3c_trace_of_another_tool_comes_in_and_is_continued() -> None:
    foreign = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
    came_in = lineage.from_headers({"Traceparent": foreign})
    assert came_in == {"correlation_id": "4bf92f3577b34da6a3ce929d0e0e4736", "traceparent": foreign}
    assert came_in is not None
    assert lineage.to_traceparent(came_in) == foreign
    ours = continued_trace(foreign, FULL["event_id"])
    assert ours.split("-")[1] == foreign.split("-")[1]
    assert ours.split("-")[2] == uuid.UUID(FULL["event_id"]).hex[16:]
    with pytest.raises(InvalidFieldError):
        lineage.from_traceparent("4bf92f3577b34da6a3ce929d0e0e4736")


def test_B62_the_implicit_lineage_is_read_as_a_dict_of_ones_own() -> None:
    assert lineage.get() is None
    with lineage.within(FULL) as entered:
        assert entered == FULL
        read = lineage.get()
        assert read == FULL
        assert read is not None
        read["agent_id"] = "somebody else"
        assert lineage.current() == FULL
        with lineage.within(None):
            assert lineage.get() is None
    assert lineage.get() is None


async def test_B02_B06_it_goes_through_awaits_tasks_groups_threads_and_callbacks() -> None:
    seen: dict[str, Any] = {}

    def note(where: str) -> None:
        found = lineage.current()
        seen[where] = None if found is None else found["event_id"]

    async def noted(where: str) -> None:
        await asyncio.sleep(0)
        note(where)

    called_back = asyncio.Event()

    def callback() -> None:
        note("callback")
        called_back.set()

    loop = asyncio.get_running_loop()
    with lineage.ThreadPool(1) as pool:
        # A thread that has run before, without a lineage.
        await loop.run_in_executor(pool, note, "before")
        with lineage.within(FULL):
            await noted("await")
            await asyncio.create_task(noted("task"))
            async with asyncio.TaskGroup() as group:
                group.create_task(noted("task group"))
            await asyncio.to_thread(note, "to_thread")
            await loop.run_in_executor(pool, note, "thread pool")
            bound = lineage.bind(note)
            loop.call_soon(callback)
            running = asyncio.create_task(noted("outlives the block"))
        await loop.run_in_executor(None, bound, "bound")
        await running
        await called_back.wait()
        await loop.run_in_executor(pool, note, "after")
    assert seen.pop("before") is None
    assert seen.pop("after") is None
    assert seen == dict.fromkeys(
        (
            "await", "task", "task group", "to_thread", "thread pool", "callback", "outlives the block", "bound",
        ),
        FULL["event_id"],
    )  # fmt: skip


async def test_tasks_do_not_change_each_others_lineage() -> None:
    async def work(session: str) -> str:
        with lineage.within({"session_id": session}):
            await asyncio.sleep(0)
            found = lineage.current()
            assert found is not None
            return str(found["session_id"])

    names = [f"s{n}" for n in range(50)]
    assert await asyncio.gather(*map(work, names)) == names


def test_B20_B64_a_loop_marks_its_turns_and_an_inner_loop_keeps_the_outer_turn() -> None:
    with lineage.within(FULL):
        for index, item in enumerate(["tea", "cake"]):
            with lineage.iteration(index, item) as turn:
                assert turn["iteration"] == {"index": index, "item": item}
                assert turn["event_id"] == FULL["event_id"]
                with lineage.iteration(7) as inner:
                    assert inner["iteration"] == {"index": 7, "outer": {"index": index, "item": item}}
        assert lineage.current() == FULL


def test_B65_a_spawned_agent_knows_who_spawned_it() -> None:
    with lineage.within(FULL), lineage.spawn("analyst") as spawned:
        assert (spawned["agent_id"], spawned["originator"]) == ("analyst", "planner")
        with lineage.spawn("scraper") as below:
            assert (below["agent_id"], below["originator"]) == ("scraper", "analyst")
    with lineage.spawn("analyst", by="chief") as spawned:
        assert spawned == {"agent_id": "analyst", "originator": "chief"}


async def test_a_lineage_is_saved_and_restored_somewhere_else() -> None:
    with lineage.within(FULL):
        saved = lineage.copy_current_context()

    async def elsewhere() -> Any:
        lineage.restore_context(saved)
        return lineage.current()

    assert await asyncio.create_task(elsewhere()) == FULL
    assert lineage.current() is None


def test_an_idempotent_handler_emits_the_same_ids_in_whatever_order() -> None:
    first, second = IdMint("ns", "h", "e"), IdMint("ns", "h", "e")
    contents = [[b"a"], [b"b"], [b"a"], [b"", b"a"], [b"a", b""]]
    ids = [first.next(content) for content in contents]
    assert len(set(ids)) == len(ids)
    again = [second.next(content) for content in reversed(contents)]
    assert sorted(again) == sorted(ids)
    assert IdMint("ns", "other", "e").next([b"a"]) not in ids
    assert IdMint("other", "h", "e").next([b"a"]) not in ids
