"""Conversations: the contexts of a session in order, read lazily, hot and cold, and forked without copying."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from holdfast.client import Event, Holdfast, connect, lineage
from holdfast.client.conversations import FORKED, ConversationTracker
from holdfast.client.sync import connect as connect_blocking
from holdfast.lake import Lake, compact
from holdfast.schemas.errors import InvalidFieldError, InvalidNameError, InvalidRefError, NotFoundError
from holdfast.schemas.ids import new_event_id, now_ms
from holdfast.streams.connection import open_connection
from holdfast.workers.control import evict, flush
from tests.running import own_server, running, settings_in, target_of

if TYPE_CHECKING:
    from holdfast.client.conversations import Conversation
    from holdfast.schemas.refs import Ref

pytestmark = pytest.mark.asyncio(loop_scope="module")


class System:
    """A server with workers that do nothing by the clock."""

    def __init__(self, url: str, lake: Path) -> None:
        self.url = url
        self.lake = lake

    async def archive(self) -> None:
        async with open_connection(target_of(self.url)) as control:
            await flush(control)

    async def make_cold(self) -> None:
        async with open_connection(target_of(self.url)) as control:
            await flush(control)
            assert (await evict(control, 0.0)).left == 0

    async def compact(self) -> None:
        lake = await asyncio.to_thread(Lake.open, self.lake)
        await asyncio.to_thread(lambda: compact(lake, at_ms=now_ms() + 2 * 86_400_000))
        await asyncio.to_thread(lake.close)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[System]:
    data: Path = tmp_path_factory.mktemp("conversations")
    settings = settings_in(data)
    async with own_server(data) as server, running(server.url, settings):
        yield System(server.url, settings.lake)


@pytest_asyncio.fixture(loop_scope="module")
async def hf(system: System, namespace: str) -> AsyncGenerator[Holdfast]:
    async with connect(system.url, namespace, "planner") as client:
        yield client


async def say(hf: Holdfast, session: str, *texts: str) -> list[Event]:
    return [
        await hf.emit(
            "said", session=session, context={"role": ("user", "agent")[n % 2], "text": text}, context_kind="turn"
        )
        for n, text in enumerate(texts)
    ]


async def texts(conversation: Conversation) -> list[str]:
    return [(await message.body())["text"] async for message in conversation]


# The tracker


async def test_B41_B42_contexts_added_to_a_session_are_its_chain_in_order(
    hf: Holdfast, system: System, namespace: str
) -> None:
    tracker = hf.conversation_tracker
    refs = await hf.put_many([{"n": n} for n in range(5)])
    added = [await tracker.add_context_to_session("session_123", ref) for ref in refs]
    assert [(event.context_ref, event.session_id, event.name) for event in added] == [
        (ref, "session_123", "conversation:context") for ref in refs
    ]
    await tracker.add_context_to_session("another", refs[0])
    await tracker.add_context_to_session("session_123", refs[0])  # said again
    assert await tracker.get_session_context_chain("session_123") == [*refs, refs[0]]
    assert await tracker.get_session_context_chain("nobody's") == []
    # Another process, and after all has left the hot tier and the lake was compacted.
    await system.archive()
    last = await hf.put({"n": 5})
    await tracker.add_context_to_session("session_123", last)
    await system.make_cold()
    await system.compact()
    async with connect(system.url, namespace, "other", cache_bytes=0) as other:
        chain = await ConversationTracker(other).get_session_context_chain("session_123")
        assert chain == [*refs, refs[0], last]
        assert [(await other.resolve(ref)).body["n"] for ref in chain] == [0, 1, 2, 3, 4, 0, 5]


async def test_B41_what_is_no_reference_or_session_is_refused(hf: Holdfast) -> None:
    tracker, ref = hf.conversation_tracker, await hf.put("x")
    for bad in ("ctx_agent_abc123", "", "text", f"{ref}x"):
        with pytest.raises(InvalidRefError):
            await tracker.add_context_to_session("s", bad)
    for bad_session in ("", "x" * 257):
        with pytest.raises(InvalidFieldError) as refused:
            await tracker.add_context_to_session(bad_session, ref)
        assert refused.value.field == "session_id"
    assert await tracker.get_session_context_chain("s") == []


async def test_B41_an_addition_within_an_event_is_its_child(hf: Holdfast) -> None:
    event = await hf.emit("asked", session="elsewhere", correlation="c")
    with lineage.within(event):
        added = await hf.conversation_tracker.add_context_to_session("s", await hf.put("x"))
    assert (added.parent_event_id, added.session_id, added.correlation_id) == (event.event_id, "s", "c")


async def test_B42_events_that_carry_a_context_are_in_the_chain_and_others_are_not(hf: Holdfast) -> None:
    first = await hf.emit("said", session="s", context={"text": "hello"})
    await hf.emit("agent:status", {"state": "thinking"}, session="s")
    ref = await hf.put({"text": "hi"})
    async with hf.working_on(first):
        await hf.resolve(ref)
    await hf.conversation_tracker.add_context_to_session("s", ref)
    assert await hf.conversation_tracker.get_session_context_chain("s") == [first.context_ref, ref]


async def test_B43_the_summary_has_exactly_this_shape(hf: Holdfast) -> None:
    start = await hf.emit("completion:request", session="session_123", correlation="corr_789", context={"goal": "fly"})
    ref = await hf.put({"answer": 42}, kind="completion")
    with lineage.within(start):
        added = await hf.conversation_tracker.add_context_to_session("session_123", ref, agent="planner")
    assert await hf.conversation_tracker.get_agent_conversation_summary("planner") == {
        "agent_id": "planner",
        "session_id": "session_123",
        "status": "active_session",
        "conversation_started": start.context_ref,
        "context_chain_length": 2,
        "contexts": [
            {
                "ref": start.context_ref,
                "context": {
                    "_event_id": start.event_id,
                    "_correlation_id": "corr_789",
                    "_root_event_id": start.event_id,
                    "_event_depth": 0,
                    "_agent_id": "planner",
                    "_session_id": "session_123",
                    "_timestamp": start.timestamp.timestamp(),
                    "_ksi_context_ref": start.context_ref,
                    "session_id": "session_123",
                    "agent_id": "planner",
                },
            },
            {
                "ref": ref,
                "context": {
                    "_event_id": added.event_id,
                    "_correlation_id": "corr_789",
                    "_parent_event_id": start.event_id,
                    "_root_event_id": start.event_id,
                    "_event_depth": 1,
                    "_agent_id": "planner",
                    "_session_id": "session_123",
                    "_timestamp": added.timestamp.timestamp(),
                    "_ksi_context_ref": ref,
                    "session_id": "session_123",
                    "agent_id": "planner",
                },
            },
        ],
    }
    # The fields that the earlier system's example shows.
    chosen = await hf.conversation_tracker.get_agent_conversation_summary(
        "planner", include_fields=["_event_id", "correlation_id", "session_id", "agent_id", "body"]
    )
    assert chosen["contexts"][1] == {
        "ref": ref,
        "context": {
            "_event_id": added.event_id,
            "_correlation_id": "corr_789",
            "session_id": "session_123",
            "agent_id": "planner",
            "body": {"answer": 42},
        },
    }


async def test_B43_an_agent_without_a_session_has_no_active_one(hf: Holdfast) -> None:
    await hf.emit("agent:status", agent="loner")
    for agent in ("loner", "unknown"):
        assert await hf.conversation_tracker.get_agent_conversation_summary(agent) == {
            "agent_id": agent,
            "session_id": None,
            "status": "no_active_session",
            "conversation_started": None,
            "context_chain_length": 0,
            "contexts": [],
        }
    await hf.emit("agent:status", agent="loner", session="quiet")
    summary = await hf.conversation_tracker.get_agent_conversation_summary("loner")
    assert (summary["status"], summary["session_id"], summary["contexts"]) == ("active_session", "quiet", [])
    with pytest.raises(InvalidNameError):
        await hf.conversation_tracker.get_agent_conversation_summary("")
    with pytest.raises(InvalidFieldError, match="one text"):
        await hf.conversation_tracker.get_agent_conversation_summary("loner", include_fields="body")


async def test_B43_the_session_is_that_of_the_newest_event_and_the_newest_contexts_are_listed(
    hf: Holdfast, system: System
) -> None:
    tracker = hf.conversation_tracker
    await say(hf, "old", "a", "b")
    await system.make_cold()
    said = await say(hf, "new", *(f"turn {n}" for n in range(130)))
    await hf.emit("agent:status")  # of no session
    await hf.emit("said", session="another agent's", agent="other")
    for is_cold in (False, True):
        if is_cold:
            await system.make_cold()
        summary = await tracker.get_agent_conversation_summary("planner")
        assert (summary["session_id"], summary["context_chain_length"]) == ("new", 130)
        assert summary["conversation_started"] == said[0].context_ref
        assert [item["ref"] for item in summary["contexts"]] == [event.context_ref for event in said[-100:]]
    await hf.emit("said", session="old")
    summary = await tracker.get_agent_conversation_summary("planner", limit=1)
    assert (summary["session_id"], summary["context_chain_length"]) == ("old", 2)
    assert len(summary["contexts"]) == 1
    assert len((await tracker.get_agent_conversation_summary("planner", limit=None))["contexts"]) == 2


async def test_B41_B42_B43_work_without_an_event_loop(hf: Holdfast, system: System) -> None:
    def use() -> tuple[list[Ref], str | None]:
        with connect_blocking(system.url, hf.namespace, "blocking") as client:
            tracker = client.conversation_tracker
            for n in range(3):
                tracker.add_context_to_session("s", client.put({"n": n}))
            return tracker.get_session_context_chain("s"), tracker.get_agent_conversation_summary("blocking")[
                "session_id"
            ]

    chain, session = await asyncio.to_thread(use)
    assert session == "s"
    assert [(await hf.resolve(ref)).body for ref in chain] == [{"n": 0}, {"n": 1}, {"n": 2}]


async def test_conversations_and_receipts_are_read_without_an_event_loop(hf: Holdfast, system: System) -> None:
    events = await say(hf, "s", "a", "b", "c")

    def use() -> None:
        with connect_blocking(system.url, hf.namespace, "blocking") as client:
            conversation = client.conversation("s")
            assert [(message.kind, message.body()["text"]) for message in conversation] == [("turn", t) for t in "abc"]
            assert [message.role() for message in conversation.messages()] == ["user", "agent", "user"]
            branch = client.fork("s", at=events[1])
            assert (branch.count(), branch.forked_from()) == (2, ("s", events[1].event_id))
            assert branch.refs() == conversation.refs()[:2]
            assert [event.name for event in branch.events()] == ["said", "said", FORKED]
            first = conversation.refs()[0]
            with client.working_on(events[2]) as context:
                assert context["agent_id"] == "blocking"
                client.resolve(first)
                made = client.put({"text": "d"})
                child = client.emit("said", context=made)
            assert child.parent_event_id == events[2].event_id
            [work] = client.inputs_of(made).works
            assert ([item.ref for item in work.read], work.agent_id) == ([first], "blocking")
            assert [use.event_id for use in client.used_by(first)] == [events[2].event_id]

    await asyncio.to_thread(use)


# Reading


async def test_a_conversation_is_read_in_order_and_its_bodies_when_they_are_asked_for(
    hf: Holdfast, system: System, namespace: str
) -> None:
    events = await say(hf, "s", *(f"turn {n}" for n in range(7)))
    await hf.emit("agent:status", session="s")
    async with connect(system.url, namespace, "reader", cache_bytes=0) as reader:
        conversation = reader.conversation("s")
        messages = [message async for message in conversation]
        assert [message.event.event_id for message in messages] == [event.event_id for event in events]
        assert [message.kind for message in messages] == ["turn"] * 7
        assert await messages[3].body() == {"role": "agent", "text": "turn 3"}
        assert [await message.role() for message in messages[:2]] == ["user", "agent"]
        assert await conversation.refs() == [event.context_ref for event in events]
        assert await conversation.count() == 7
        assert await conversation.forked_from() is None
        whole = await conversation.messages()
        sent = reader.connection.client.stats["out_msgs"]
        assert [(await message.body())["text"] for message in whole] == [f"turn {n}" for n in range(7)]
        assert reader.connection.client.stats["out_msgs"] == sent, "they were resolved together, before"
        # The end of one that goes on is not the end for ever.
        await say(hf, "s", "late")
        assert await conversation.count() == 8
        assert await reader.conversation("nobody's").messages() == []


async def test_equal_turns_have_bodies_of_their_own(hf: Holdfast) -> None:
    for _ in range(2):
        await hf.emit("said", session="s", agent="one", context={"text": "ok"}, context_kind="turn")
    whole = await hf.conversation("s").messages()
    lazily = [message async for message in hf.conversation("s")]
    for first, second in (whole, lazily):
        (await first.body())["text"] = "changed"
        (await first.context()).body["text"] = "changed too"
        for message in (first, second):
            assert await message.body() == {"text": "ok"}
        assert (await second.context()).body == {"text": "ok"}
    summary = await hf.conversation_tracker.get_agent_conversation_summary("one", include_fields=["body"])
    told = [entry["context"]["body"] for entry in summary["contexts"]]
    told[0]["text"] = "changed"
    assert told[1] == {"text": "ok"}


async def test_a_long_conversation_comes_a_page_at_a_time(hf: Holdfast) -> None:
    ref = await hf.put("x")
    await asyncio.gather(*(hf.emit("said", {"n": n}, session="long", context=ref) for n in range(1_203)))
    calls = hf.connection.client.stats["out_msgs"]
    async for message in hf.conversation("long"):
        assert message.ref == ref
        break
    assert hf.connection.client.stats["out_msgs"] - calls == 1, "the rest was not asked for"
    assert sorted([message.event.data["n"] async for message in hf.conversation("long")]) == list(range(1_203))
    assert await hf.conversation("long").count() == len(await hf.conversation("long").refs()) == 1_203


async def test_a_missing_body_is_told_where_it_is_asked_for(hf: Holdfast) -> None:
    [event] = await say(hf, "s", "here")
    await hf.emit("said", session="s", context=f"ctx_turn_{'a' * 32}")
    messages = [message async for message in hf.conversation("s")]
    assert (await messages[0].body())["text"] == "here"
    assert messages[0].ref == event.context_ref
    with pytest.raises(NotFoundError):
        await messages[1].body()
    with pytest.raises(NotFoundError):
        await hf.conversation("s").messages()


# Forks


async def test_a_fork_shares_what_came_before_and_diverges_after_without_a_copy(hf: Holdfast, system: System) -> None:
    events = await say(hf, "trunk", "a", "b", "c", "d")
    before = [event async for event in hf.query()]
    branch = await hf.fork("trunk", at=events[1])
    [fork] = [event async for event in hf.query() if event not in before]
    assert (fork.name, fork.session_id, fork.parent_event_id) == (FORKED, branch.session_id, events[1].event_id)
    assert fork.data == {"from": "trunk", "at": events[1].event_id}
    assert await texts(branch) == ["a", "b"]
    await say(hf, branch.session_id, "x", "y")
    await say(hf, "trunk", "e")
    for archive in (None, system.archive, system.make_cold, system.compact):
        if archive is not None:
            await archive()
        assert await texts(branch) == ["a", "b", "x", "y"]
        assert await texts(hf.conversation("trunk")) == ["a", "b", "c", "d", "e"]
    assert await branch.forked_from() == ("trunk", events[1].event_id)
    assert await branch.count() == 4
    assert await hf.conversation_tracker.get_session_context_chain(branch.session_id) == await branch.refs()


async def test_forks_of_forks_at_any_place(hf: Holdfast) -> None:
    trunk = await say(hf, "t", "a", "b", "c")
    await hf.fork("t", at=trunk[1], name="t1")
    own = await say(hf, "t1", "d", "e")
    await hf.fork("t1", at=own[0], name="t2")  # in its own part
    await say(hf, "t2", "f")
    await hf.fork("t1", at=trunk[0], name="t3")  # in what it was forked from
    await say(hf, "t3", "g")
    end = await say(hf, "t3", "h")
    await hf.fork("t3", at=end[0].event_id, name="t4")
    status = await hf.emit("agent:status", session="t4")  # an event without a context
    await say(hf, "t4", "i")
    await hf.fork("t4", at=status, name="t5")
    said = {name: await texts(hf.conversation(name)) for name in ("t", "t1", "t2", "t3", "t4", "t5")}
    assert said == {
        "t": ["a", "b", "c"],
        "t1": ["a", "b", "d", "e"],
        "t2": ["a", "b", "d", "f"],
        "t3": ["a", "g", "h"],
        "t4": ["a", "g", "h", "i"],
        "t5": ["a", "g", "h"],
    }


async def test_a_long_line_of_forks_is_read_to_its_beginning(hf: Holdfast) -> None:
    [event] = await say(hf, "f0", "0")
    for number in range(1, 40):
        await hf.fork(f"f{number - 1}", at=event, name=f"f{number}")
        [event] = await say(hf, f"f{number}", str(number))
    assert await texts(hf.conversation("f39")) == [str(number) for number in range(40)]


async def test_requests_for_conversations_are_checked(hf: Holdfast) -> None:
    events = await say(hf, "s", *(str(n) * 300_000 for n in range(5)))
    page = await hf.call_resolver("conversation", {"session_id": "s", "data": False, "limit": 3})
    assert [item["event_id"] for item in page["events"]] == [event.event_id for event in events[:3]]
    rest = await hf.call_resolver("conversation", {"session_id": "s", "cursor": page["cursor"]})
    assert [item["event_id"] for item in rest["events"]] == [event.event_id for event in events[3:]]
    big = [await hf.emit("big", {"text": "x" * 400_000}, session="big") for _ in range(5)]
    assert [event.event_id async for event in hf.conversation("big").events()] == [event.event_id for event in big]
    for endpoint, request, field in (
        ("conversation", {}, "session_id"),
        ("conversation", {"session_id": ""}, "session_id"),
        ("conversation", {"session_id": "s", "limit": 1_001}, "limit"),
        ("conversation", {"session_id": "s", "cursor": "junk"}, "cursor"),
        ("conversation", {"session_id": "s", "more": 1}, "more"),
        ("conversation_count", {}, "session_id"),
        ("newest_session", {"agent_id": ""}, "agent_id"),
    ):
        with pytest.raises(InvalidFieldError) as refused:
            await hf.call_resolver(endpoint, request)
        assert refused.value.field == field


async def test_what_cannot_be_forked_is_refused(hf: Holdfast) -> None:
    events = await say(hf, "s", "a", "b")
    [foreign] = await say(hf, "other", "x")
    for at in (foreign, foreign.event_id, str(new_event_id()), "no-such-event"):
        with pytest.raises(NotFoundError) as refused:
            await hf.fork("s", at=at)
        assert refused.value.field == "at"
    branch = await hf.fork("s", at=events[0])
    with pytest.raises(NotFoundError):  # after the fork
        await hf.fork(branch.session_id, at=events[1])
    for name in ("other", "s"):
        with pytest.raises(InvalidFieldError) as taken:
            await hf.fork("s", at=events[0], name=name)
        assert taken.value.field == "name"
    named = await hf.fork("s", at=events[0], name="named")
    # The same again, as after a time-out, is the same fork; another under its name is none.
    assert (await hf.fork("s", at=events[0], name="named")).session_id == named.session_id
    with pytest.raises(InvalidFieldError):
        await hf.fork("s", at=events[1], name="named")
    assert len([event async for event in hf.query(session="named")]) == 1


async def test_of_two_that_fork_to_one_name_at_once_one_is_told_no(hf: Holdfast) -> None:
    events = await say(hf, "s", "a", "b")
    outcomes = await asyncio.gather(*(hf.fork("s", at=event, name="one") for event in events), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, InvalidFieldError)]
    assert len(refused) == 1
    winner = outcomes.index(next(outcome for outcome in outcomes if outcome is not refused[0]))
    assert await texts(hf.conversation("one")) == ["a", "b"][: winner + 1]


async def test_forks_that_lead_in_a_circle_or_nowhere_are_left_out(hf: Holdfast) -> None:
    a, b = (await say(hf, "ca", "a"))[0], (await say(hf, "cb", "b"))[0]
    strange: list[Any] = [{"from": "cb", "at": b.event_id}, {"from": 5}, None, "x", {"from": "", "at": ""}]
    await hf.emit(FORKED, strange[0], session="ca")
    await hf.emit(FORKED, {"from": "ca", "at": a.event_id}, session="cb")
    assert await texts(hf.conversation("ca")) == ["a", "b"]
    assert await texts(hf.conversation("cb")) == ["a", "b"]
    for number, data in enumerate(strange[1:]):
        await hf.emit(FORKED, data, session=f"junk{number}")
        await say(hf, f"junk{number}", "own")
        assert await texts(hf.conversation(f"junk{number}")) == ["own"]
    # At an event that is not there: all that was said before the fork.
    await hf.emit(FORKED, {"from": "cx", "at": str(new_event_id())}, session="lost")
    await say(hf, "lost", "own")
    await say(hf, "cx", "late")
    assert await texts(hf.conversation("lost")) == ["own"]
