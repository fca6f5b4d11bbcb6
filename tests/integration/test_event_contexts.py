"""The contexts of events as dicts with references, as code of the earlier system uses them."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from holdfast.client import Holdfast, connect, lineage
from holdfast.client.background import close_background_loop
from holdfast.client.event_contexts import EventContextManager, get_context_manager
from holdfast.schemas.errors import (
    ConflictError,
    DepthLimitError,
    InputError,
    InvalidFieldError,
    InvalidNameError,
    InvalidRefError,
    NotFoundError,
)
from holdfast.schemas.ids import normal_event_id
from holdfast.schemas.refs import parse_ref
from holdfast.streams.connection import open_connection
from holdfast.workers.control import evict, flush
from tests.running import own_server, running, settings_in, target_of

if TYPE_CHECKING:
    from holdfast.schemas.refs import Ref

pytestmark = pytest.mark.asyncio(loop_scope="module")

AT = 1_640_995_200.25
EXAMPLES = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", re.DOTALL | re.MULTILINE)
"""An example of a page, and what it prints."""

NOWHERE = f"ctx_event_{'a' * 32}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[str]:
    """A system that archives when it is told to."""
    data: Path = tmp_path_factory.mktemp("event-contexts")
    async with own_server(data) as server, running(server.url, settings_in(data)):
        yield server.url


@pytest_asyncio.fixture(loop_scope="module")
async def hf(url: str, namespace: str) -> AsyncGenerator[Holdfast]:
    async with connect(url, namespace, "my_agent") as client:
        yield client


@pytest.fixture
def contexts(hf: Holdfast) -> EventContextManager:
    return EventContextManager(hf)


async def make_cold(url: str) -> None:
    async with open_connection(target_of(url)) as control:
        await flush(control)
        assert (await evict(control, 0.0)).left == 0


async def printed_by(example: str, url: str, namespace: str) -> str:
    environment = {**os.environ, "HOLDFAST_NATS_URL": url, "HOLDFAST_NAMESPACE": namespace}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", example), env=environment, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def events_of(hf: Holdfast) -> list[Any]:
    return [event async for event in hf.query()]


# Creating


async def test_B11_B13_B16_a_context_is_created_with_a_reference_of_its_own(
    hf: Holdfast, contexts: EventContextManager
) -> None:
    context = await contexts.create_context(
        event_id="evt_abc123", timestamp=AT, agent_id="my_agent", session_id="session_xyz", custom_field="value"
    )
    ref = context.pop("_ref")
    assert context == {
        "_event_id": "evt_abc123",
        "_timestamp": AT,
        "_agent_id": "my_agent",
        "_session_id": "session_xyz",
        "_root_event_id": "evt_abc123",
        "_event_depth": 0,
        "custom_field": "value",
    }
    assert parse_ref(ref).kind == "event"
    assert (await hf.resolve(ref)).body == context
    named = EventContextManager(hf, kind="completion_user")
    assert (await named.create_context("e", AT))["_ref"].startswith("ctx_completion_user_")
    other = await contexts.create_context("evt_abc124", AT, "my_agent", "session_xyz", custom_field="value")
    assert other["_ref"] != ref


async def test_B51_B52_identical_contexts_share_one_reference_and_are_stored_once(
    hf: Holdfast, contexts: EventContextManager, url: str, namespace: str
) -> None:
    async with connect(url, namespace, "another") as other:
        made = [
            await manager.create_context("e", AT, "a", "s", "c", tags=["x"], n=n)
            for manager in (contexts, EventContextManager(other))
            for n in (1, 1, 2)
        ]
    assert [len({context["_ref"] for context in made if context["n"] == n}) for n in (1, 2)] == [1, 1]
    # One context, many events that refer to it.
    ref = made[0]["_ref"]
    for number in range(5):
        await contexts.store_event_with_context({"event_name": "again", "event_id": f"e{number}", "context_ref": ref})
    assert [event.context_ref for event in await events_of(hf)] == [ref] * 5


async def test_B13_a_context_within_an_event_is_that_of_its_child(hf: Holdfast, contexts: EventContextManager) -> None:
    root = await hf.emit("a", session="s", correlation="c")
    event = await hf.emit("b", parent=root)
    with lineage.within(event):
        context = await contexts.create_context("child", AT)
        named = await contexts.create_context("child", AT, agent_id="x", session_id="t", correlation_id="d")
    assert {key: context[key] for key in context if key.startswith("_") and key != "_ref"} == {
        "_event_id": "child",
        "_timestamp": AT,
        "_parent_event_id": event.event_id,
        "_root_event_id": root.event_id,
        "_event_depth": 2,
        "_agent_id": "my_agent",
        "_session_id": "s",
        "_correlation_id": "c",
    }
    assert (named["_agent_id"], named["_session_id"], named["_correlation_id"]) == ("x", "t", "d")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"event_id": ""}, "event_id"),
        ({"event_id": "x" * 257}, "event_id"),
        ({"timestamp": -1}, "timestamp"),
        ({"timestamp": float("nan")}, "timestamp"),
        ({"timestamp": "now"}, "timestamp"),
        ({"agent_id": ""}, "agent_id"),
        ({"session_id": 5}, "session_id"),
        ({"_ref": "x"}, "_ref"),
        ({"context_ref": NOWHERE}, "context_ref"),
        ({"_event_id": "other"}, "_event_id"),
        ({"event_depth": -1}, "event_depth"),
        ({"thing": object()}, "body"),
    ],
)
async def test_B13_what_does_not_fit_is_refused_by_name(
    contexts: EventContextManager, given: dict[str, Any], field: str
) -> None:
    arguments: dict[str, Any] = {"event_id": "e", "timestamp": AT, **given}
    with pytest.raises(InputError) as refused:
        await contexts.create_context(**arguments)
    assert refused.value.field == field


# Storing


async def test_B14_B17_an_event_holds_the_reference_instead_of_the_context(
    hf: Holdfast, contexts: EventContextManager
) -> None:
    context = await contexts.create_context("evt_123", AT, "worker", "s", "c", note="long " * 50)
    ref = await contexts.store_event_with_context(
        {"event_id": "evt_123", "event_name": "agent:status", "data": {"agent_id": "test"}}
    )
    assert ref == context["_ref"]
    [event] = await events_of(hf)
    assert event.event_id == normal_event_id(hf.namespace, "evt_123")[0]
    assert (event.source_id, event.name, event.data) == ("evt_123", "agent:status", {"agent_id": "test"})
    assert (event.context_ref, event.agent_id, event.session_id, event.correlation_id) == (ref, "worker", "s", "c")
    assert event.timestamp == datetime.fromtimestamp(AT, UTC)
    assert event.attributes == {}, "nothing of the context travels with the event"
    assert await contexts.get_event_with_context("evt_123") == {
        "event_id": "evt_123",
        "event_name": "agent:status",
        "timestamp": AT,
        "data": {"agent_id": "test"},
        "agent_id": "worker",
        "session_id": "s",
        "correlation_id": "c",
        "root_event_id": event.event_id,
        "event_depth": 0,
        "_ksi_context": ref,
        "context": context,
    }


async def test_B15_a_context_is_created_for_an_event_with_metadata(hf: Holdfast, contexts: EventContextManager) -> None:
    given = {"event": "agent:status", "event_id": "e1", "timestamp": AT, "data": 1}
    ref = await contexts.store_event_with_context({**given, "agent_id": "a", "_session_id": "s", "x": 2})
    assert await contexts.get_context(ref) == {
        "_ref": ref,
        "_event_id": "e1",
        "_timestamp": AT,
        "_agent_id": "a",
        "_session_id": "s",
        "_root_event_id": "e1",
        "_event_depth": 0,
        "x": 2,
    }
    bare = await contexts.store_event_with_context({"event_name": "bare"})
    context = await contexts.get_context(bare)
    assert abs(context["_timestamp"] - time.time()) < 60
    found = await contexts.get_event_with_context(context["_event_id"])
    assert found is not None
    assert (found["event_name"], found["data"], found["agent_id"]) == ("bare", None, "my_agent")
    # A context that was created has its place, wherever its event is stored.
    await contexts.create_context("e3", AT)
    with lineage.within(await hf.emit("elsewhere", session="other")):
        await contexts.store_event_with_context({"event_name": "n", "event_id": "e3", "more": 1})
    found = await contexts.get_event_with_context("e3")
    assert found is not None
    assert (found["event_depth"], found.get("parent_event_id"), found.get("session_id")) == (0, None, None)
    # Metadata beside a context that was created before adds to it.
    await contexts.create_context("e2", AT, "a", first=1)
    both = await contexts.store_event_with_context(
        {"event_name": "n", "event_id": "e2", "second": 2, "session_id": "t"}
    )
    context = await contexts.get_context(both)
    assert (context["first"], context["second"], context["_agent_id"], context["_session_id"]) == (1, 2, "a", "t")
    [event] = [event async for event in hf.query(session="t")]
    assert (event.context_ref, event.agent_id) == (both, "a")


async def test_B18_children_know_the_context_of_their_parent(hf: Holdfast, contexts: EventContextManager) -> None:
    await contexts.create_context("parent", AT, "a", "s", goal="fly")
    parent_ref = await contexts.store_event_with_context({"event_id": "parent", "event_name": "asked"})
    [parent] = await events_of(hf)
    with lineage.within(parent):
        current = lineage.current()
        assert current is not None
        assert current["context_ref"] == parent_ref
        await contexts.create_context("child", AT + 1)
        await contexts.store_event_with_context({"event_id": "child", "event_name": "answered"})
        plain = await hf.emit("noted")
    child = await contexts.get_event_with_context("child")
    assert child is not None
    assert (child["parent_event_id"], child["root_event_id"], child["event_depth"]) == (
        parent.event_id,
        parent.event_id,
        1,
    )
    assert (child["session_id"], plain.parent_event_id) == ("s", parent.event_id)
    above = await contexts.get_event_with_context(child["parent_event_id"])
    assert above is not None
    assert (above["_ksi_context"], above["context"]["goal"]) == (parent_ref, "fly")


async def test_B55_a_handler_stores_its_event_and_answers_with_the_reference(
    hf: Holdfast, contexts: EventContextManager
) -> None:
    async def my_handler(data: Any, context: dict[str, Any] | None = None) -> dict[str, Any]:
        my_context = await contexts.create_context(event_id="my_event_123", timestamp=AT, custom_field="value")
        event_data = {"event_id": my_context["_event_id"], "event_name": "my:event", "data": data}
        return {"status": "success", "context_ref": await contexts.store_event_with_context(event_data)}

    asked = await hf.emit("ask", {"n": 1})
    with lineage.within(asked) as context:
        answer = await my_handler(asked.data, context)
    assert answer["status"] == "success"
    assert (await contexts.get_context(answer["context_ref"]))["custom_field"] == "value"
    [event] = [event async for event in hf.query(name="my:event")]
    assert (event.context_ref, event.parent_event_id, event.data) == (answer["context_ref"], asked.event_id, {"n": 1})


async def test_B17_storing_an_event_again_never_replaces_it(
    hf: Holdfast, contexts: EventContextManager, url: str, namespace: str
) -> None:
    event = {"event_id": "e", "event_name": "n", "timestamp": AT, "data": {"a": 1, "b": [2]}, "agent_id": "a"}
    ref = await contexts.store_event_with_context(event)
    async with connect(url, namespace, "another") as other:
        assert await EventContextManager(other).store_event_with_context(event) == ref
    for changed in ({"data": {"a": 2}}, {"event_name": "m"}, {"session_id": "s"}, {"_ksi_context": ref, "data": None}):
        with pytest.raises(ConflictError) as refused:
            await contexts.store_event_with_context({**event, **changed})
        assert refused.value.field == "event_id"
    await make_cold(url)
    with pytest.raises(ConflictError):
        await contexts.store_event_with_context({**event, "data": {"a": 3}})
    [stored] = await events_of(hf)
    assert (stored.data, stored.context_ref) == (event["data"], ref)


async def test_a_receipt_tells_of_an_event_stored_with_its_context(hf: Holdfast, contexts: EventContextManager) -> None:
    source = await hf.put("source")
    asked = await hf.emit("ask")
    async with hf.working_on(asked):
        await hf.resolve(source)
        made = await contexts.create_context("made", AT)
        await contexts.store_event_with_context({"event_name": "other", "context_ref": await hf.put("no reading")})
        ref = await contexts.store_event_with_context({"event_id": "made", "event_name": "answer"})
    assert ref == made["_ref"]
    [work] = (await hf.inputs_of(ref)).works
    assert [item.ref for item in work.read] == [source]
    assert [item.ref for item in (await hf.inputs_of(asked)).read] == [source]
    assert [(item.ref, item.event_id) for item in work.produced] == [(ref, normal_event_id(hf.namespace, "made")[0])]


async def test_events_that_cannot_be_stored_are_refused(hf: Holdfast, contexts: EventContextManager) -> None:
    for event, expected in (
        ({}, InvalidNameError),
        ({"event_name": ""}, InvalidNameError),
        ({"event_name": "n", "event_id": 5}, InvalidFieldError),
        ({"event_name": "n", "context_ref": "ctx_agent_abc"}, InvalidRefError),
        ({"event_name": "n", "context_ref": NOWHERE}, NotFoundError),
        ({"event_name": "n", "timestamp": "x"}, InvalidFieldError),
        ({"event_name": "n", "_ksi_context": {"_event_id": ["x"]}}, InvalidFieldError),
        ({"event_name": "n", "_ksi_context": ["ctx"]}, InvalidRefError),
        ({"event_name": "n", "data": object()}, InputError),
    ):
        with pytest.raises(expected):
            await contexts.store_event_with_context(event)
    with lineage.within({"event_id": "deep", "event_depth": 64}), pytest.raises(DepthLimitError):
        await contexts.store_event_with_context({"event_name": "n"})
    assert await events_of(hf) == []


# Reading


async def test_B56_B57_contexts_are_got_singly_and_together_hot_and_cold(
    hf: Holdfast, contexts: EventContextManager, url: str, namespace: str
) -> None:
    made = [await contexts.create_context(f"e{n}", AT, n=n) for n in range(3)]
    text = await hf.put("a text")
    refs: list[Ref] = [context["_ref"] for context in made]
    for is_cold in (False, True):
        if is_cold:
            await make_cold(url)
        async with connect(url, namespace, "reader", cache_bytes=0) as reader:
            other = EventContextManager(reader)
            assert await other.get_context(refs[0]) == made[0]
            assert await other.get_contexts([*refs, text, NOWHERE, refs[0]]) == {
                refs[0]: made[0],
                refs[1]: made[1],
                refs[2]: made[2],
                text: {"_ref": text, "body": "a text"},
                NOWHERE: None,
            }
            with pytest.raises(NotFoundError):
                await other.get_context(NOWHERE)
            with pytest.raises(InvalidRefError):
                await other.get_contexts(["ctx_1"])
    # What one caller changes is its own.
    (await contexts.get_context(refs[0]))["n"] = 99
    assert (await contexts.get_context(refs[0]))["n"] == 0


async def test_B58_contexts_are_queried_by_what_their_events_say(
    hf: Holdfast, contexts: EventContextManager, url: str
) -> None:
    for n in range(6):
        await contexts.store_event_with_context(
            {
                "event_id": f"e{n}",
                "event_name": "n",
                "timestamp": AT,
                "agent_id": f"agent{n % 2}",
                "session_id": f"s{n % 3}",
                "correlation_id": "corr_456" if n < 4 else "other",
                "n": n,
            }
        )
        if n == 2:
            await make_cold(url)
    await hf.emit("without", correlation="corr_456")
    plain = await hf.emit("with", correlation="plain", session="q", context={"text": "x"})

    async def numbers(**conditions: Any) -> list[int]:
        return [context["n"] for context in await contexts.query_contexts(**conditions)]

    assert await numbers(correlation_id="corr_456") == [0, 1, 2, 3]
    assert await numbers(correlation_id="corr_456", agent_id="agent1") == [1, 3]
    assert await numbers(session_id="s0") == [0, 3]
    assert await numbers(event_id="e5") == [5]
    assert await numbers(correlation_id="corr_456", limit=2) == [0, 1]
    assert await numbers(correlation_id="nobody's") == []
    stored = [event.stored_at for event in await events_of(hf)]
    assert await numbers(since=stored[3], correlation_id="corr_456") == [3]
    assert await numbers(until=stored[3].timestamp(), correlation_id="corr_456") == [0, 1, 2]
    [context] = await contexts.query_contexts(event_id="e4")
    assert context == {
        **await contexts.get_context(context["_ref"]),
        "_ksi_context_ref": context["_ref"],
    }
    # Of a context that says nothing of its event, the event says it.
    [context] = await contexts.query_contexts(correlation_id="plain")
    assert (context["text"], context["_event_id"], context["_session_id"]) == ("x", plain.event_id, "q")
    for limit in (0, 1_001):
        with pytest.raises(InvalidFieldError):
            await contexts.query_contexts(limit=limit)
    with pytest.raises(InvalidFieldError):
        await contexts.query_contexts(since=-5.0)


async def test_B12_the_chain_of_an_event_begins_with_its_root(hf: Holdfast, contexts: EventContextManager) -> None:
    root = await hf.emit("a", context={"n": 1})
    event = await hf.emit("b", parent=root)
    with lineage.within(event):
        await contexts.store_event_with_context({"event_id": "e", "event_name": "c"})
    chain = await contexts.get_event_chain("e")
    assert [(item["event_name"], item["event_id"]) for item in chain] == [
        ("a", root.event_id),
        ("b", event.event_id),
        ("c", "e"),
    ]
    assert chain[0]["_ksi_context"] == root.context_ref
    assert "_ksi_context" not in chain[1]
    assert await contexts.get_event_with_context("no-such-event") is None


# Carrying


async def test_B62_the_current_context_is_copied_and_restored(hf: Holdfast, contexts: EventContextManager) -> None:
    event = await hf.emit("a", session="s")
    with lineage.within(event):
        saved = contexts.copy_current_context()
    assert contexts.copy_current_context() is None

    async def elsewhere(given: Any) -> tuple[str | None, str | None]:
        contexts.restore_context(given)
        child = await hf.emit("b")
        return child.parent_event_id, child.session_id

    assert await asyncio.create_task(elsewhere(saved)) == (event.event_id, "s")
    created = await contexts.create_context("mine", AT, session_id="t")
    await contexts.store_event_with_context({"event_id": "mine", "event_name": "m"})
    # A dict that create_context returned stands for its event.
    parent = normal_event_id(hf.namespace, "mine")[0]
    assert await asyncio.create_task(elsewhere(created)) == (parent, "t")
    assert lineage.current() is None


async def test_B54_the_process_has_one_manager_that_needs_no_set_up(
    url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_NATS_URL", url)
    monkeypatch.setenv("HOLDFAST_NAMESPACE", namespace)
    cm = get_context_manager()
    await cm.close()  # one of another test may have been made elsewhere
    cm = get_context_manager()
    assert get_context_manager() is cm
    async with connect(url, namespace, "other") as hf:
        event = await hf.emit("a")
        with lineage.within(event):
            context = await cm.create_context("e", AT)
            await cm.store_event_with_context({"event_id": "e", "event_name": "b"})
        assert (await hf.resolve(context["_ref"])).body["_parent_event_id"] == event.event_id
        [child] = [found async for found in hf.query(name="b")]
        assert (child.parent_event_id, child.agent_id) == (event.event_id, "other")
    # From another event loop, in another thread.
    found = await asyncio.to_thread(lambda: asyncio.run(cm.get_context(context["_ref"])))
    assert found == context
    await cm.close()
    assert cm.is_closed
    again = get_context_manager()
    assert again is not cm
    assert await again.get_context(context["_ref"]) == context
    await again.close()
    await asyncio.to_thread(close_background_loop)


async def test_B61_an_embedded_context_becomes_a_reference(hf: Holdfast, contexts: EventContextManager) -> None:
    embedded = {
        "_event_id": "evt_old",
        "_correlation_id": "corr_456",
        "_parent_event_id": "evt_000",
        "_root_event_id": "evt_000",
        "_event_depth": 1,
        "_agent_id": "old_agent",
        "_timestamp": AT,
        "custom": [1],
    }
    ref = await contexts.store_event_with_context(
        {"event": "agent:status", "event_id": "evt_old", "data": {"agent_id": "test"}, "_ksi_context": embedded}
    )
    assert await contexts.get_context(ref) == {"_ref": ref, **embedded}
    found = await contexts.get_event_with_context("evt_old")
    assert found is not None
    root = normal_event_id(hf.namespace, "evt_000")[0]
    assert (found["parent_event_id"], found["root_event_id"], found["event_depth"]) == (root, root, 1)
    assert (found["agent_id"], found["timestamp"], found["_ksi_context"]) == ("old_agent", AT, ref)


async def test_B61_the_page_on_conversations_tells_what_changes_and_its_examples_run(url: str, namespace: str) -> None:
    pages = Path(__file__).parents[2] / "docs"
    for page in ("conversations.md", "receipts.md"):
        found: list[tuple[str, str]] = EXAMPLES.findall((pages / page).read_text())
        assert found, page
        for number, (example, printed) in enumerate(found):
            assert await printed_by(example, url, f"{namespace}-{number}") == printed, page
    changes = (pages / "conversations.md").read_text()
    assert all(word in changes for word in ("`_ksi_context`", "get_context_manager", "`context`"))
