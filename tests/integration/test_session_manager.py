"""Sessions: one suite that the in-memory and the distributed store both pass."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import pytest

from holdfast.client import ContextManager, SessionSettings
from holdfast.schemas.errors import (
    ClosedError,
    ConfigurationError,
    InvalidBodyError,
    InvalidFieldError,
    InvalidNameError,
)
from tests.session_support import Recorder, end_of_threads, eventually, without_stamp
from tests.support import LIMIT_S

if TYPE_CHECKING:
    from holdfast.client.session_manager import SessionEvent

Make = Callable[..., ContextManager]
Store = Literal["memory", "distributed"]


@pytest.fixture(autouse=True)
def no_thread_left() -> Generator[None]:
    yield
    end_of_threads()


@pytest.fixture(params=["memory", "distributed"])
def store(request: pytest.FixtureRequest) -> Store:
    chosen: Store = request.param
    return chosen


@pytest.fixture
def make(store: Store, nats_server: str, namespace: str) -> Generator[Make]:
    """Makes managers of one store variant; closes them at the end."""
    made: list[ContextManager] = []

    def make_one(agent: str = "tester", clock: Callable[[], float] = time.time, **settings: Any) -> ContextManager:
        chosen = SessionSettings(use_redis_caching=store == "distributed", **settings)
        manager = ContextManager(chosen, url=nats_server, namespace=namespace, agent=agent, clock=clock)
        made.append(manager)
        return manager

    yield make_one
    for manager in made:
        manager.close()


@pytest.fixture
def sessions(make: Make) -> ContextManager:
    return make()


# What both stores promise.


def test_D01_D03_D15_D16_D17_D18_D19_the_life_of_a_session(sessions: ContextManager) -> None:
    assert sessions.get_context("s") == {}
    before = time.time()
    sessions.create_session("s")
    created = sessions.get_context("s")
    assert set(created) == {"_timestamp"}
    assert before <= created["_timestamp"] <= time.time()
    sessions.set_context("s", "user_query", "How do I book a flight?")
    sessions.set_context("s", "agent", "chat_agent")
    sessions.update_partial_context("s", {"intent": "booking", "details": {"class": "economy", "flexible": True}})
    sessions.update_partial_context("s", {"details": {"class": "first"}})
    assert without_stamp(sessions.get_context("s")) == {
        "user_query": "How do I book a flight?",
        "agent": "chat_agent",
        "intent": "booking",
        "details": {"class": "first", "flexible": True},
    }
    sessions.delete_context("s")
    assert sessions.get_context("s") == {}
    sessions.delete_context("s")
    sessions.set_context("s", "fresh", 1)
    assert without_stamp(sessions.get_context("s")) == {"fresh": 1}


def test_D15_creating_a_session_that_is_there_joins_it_and_wipes_nothing(make: Make) -> None:
    sessions = make()
    sessions.set_context("s", "precious", {"of": "another agent"})
    before = sessions.get_context("s")
    sessions.create_session("s")
    after = sessions.get_context("s")
    assert after["_timestamp"] > before["_timestamp"]
    assert after["precious"] == {"of": "another agent"}


def test_D16_every_change_bumps_the_time_stamp_even_when_the_clock_stands_still(make: Make) -> None:
    sessions = make(clock=lambda: 1_700_000_000.0)
    stamps: list[float] = []
    changes: list[Callable[[], None]] = [
        lambda: sessions.create_session("s"),
        lambda: sessions.create_session("s"),
        lambda: sessions.set_context("s", "a", 1),
        lambda: sessions.set_context("s", "a", 1),
        lambda: sessions.update_partial_context("s", {"b": 2}),
        lambda: sessions.update_partial_context("s", {}),
        lambda: sessions.update_partial_context("s", sessions.get_context("s")),
    ]
    for change in changes:
        change()
        stamps.append(sessions.get_context("s")["_timestamp"])
    assert stamps[0] == 1_700_000_000.0
    assert stamps == sorted(set(stamps))
    assert stamps[-1] < 1_700_000_000.1


def test_D05_D17_partial_updates_merge_recursively_and_keep_none(sessions: ContextManager) -> None:
    sessions.update_partial_context("s", {"a": {"b": {"c": 1, "d": 2}}, "list": [1, 2]})
    sessions.update_partial_context("s", {"a": {"b": {"d": None, "e": 3}}, "list": [3]})
    assert without_stamp(sessions.get_context("s")) == {"a": {"b": {"c": 1, "d": None, "e": 3}}, "list": [3]}
    sessions.set_context("s", "a", {"replaced": "as a whole"})
    sessions.set_context("s", "nothing", None)
    assert without_stamp(sessions.get_context("s")) == {
        "a": {"replaced": "as a whole"},
        "list": [3],
        "nothing": None,
    }


def test_D18_what_is_returned_and_what_was_given_are_the_callers_own(sessions: ContextManager) -> None:
    given = {"nested": {"list": [1]}}
    sessions.set_context("s", "value", given)
    given["nested"]["list"].append(2)
    sessions.get_context("s")["value"]["nested"]["list"].append(3)
    assert sessions.get_context("s")["value"] == {"nested": {"list": [1]}}


def test_both_stores_bring_values_back_as_json_does(sessions: ContextManager) -> None:
    sessions.set_context("s", "tuple", (1, (2,)))
    sessions.set_context("s", "", {"": [None, True, 1.5, "é\x00𝄞"]})
    sessions.set_context("s", "big", "x" * 2_000_000)
    content = sessions.get_context("s")
    assert content["tuple"] == [1, [2]]
    assert content[""] == {"": [None, True, 1.5, "é\x00𝄞"]}
    assert len(content["big"]) == 2_000_000


@pytest.mark.parametrize("bad", ["", "x" * 257, "\ud800", None, 7])
def test_D15_D16_D17_D18_D19_a_bad_session_id_is_refused_by_every_method(sessions: ContextManager, bad: Any) -> None:
    for call in (
        lambda: sessions.create_session(bad),
        lambda: sessions.set_context(bad, "k", 1),
        lambda: sessions.update_partial_context(bad, {}),
        lambda: sessions.get_context(bad),
        lambda: sessions.delete_context(bad),
    ):
        with pytest.raises(InvalidNameError) as caught:
            call()
        assert caught.value.field == "session_id"


def test_D16_D17_what_cannot_be_stored_is_refused_and_changes_nothing(sessions: ContextManager) -> None:
    sessions.set_context("s", "kept", 1)
    before = sessions.get_context("s")
    deep: list[Any] = []
    for _ in range(80):
        deep = [deep]
    cases: list[tuple[Callable[[], None], type[Exception]]] = [
        (lambda: sessions.set_context("s", "k", object()), InvalidBodyError),
        (lambda: sessions.set_context("s", "k", float("nan")), InvalidBodyError),
        (lambda: sessions.set_context("s", "k", deep), InvalidFieldError),
        (lambda: sessions.set_context("s", 5, 1), InvalidFieldError),  # type: ignore[arg-type]
        (lambda: sessions.set_context("s", "_timestamp", 0), InvalidFieldError),
        (lambda: sessions.update_partial_context("s", ["a"]), InvalidFieldError),  # type: ignore[arg-type]
    ]
    for wrong, error in cases:
        with pytest.raises(error):
            wrong()
    assert sessions.get_context("s") == before
    sessions.set_context("s", "works", "still")


def test_D03_D23_sessions_are_isolated_whatever_their_ids_look_like(sessions: ContextManager) -> None:
    ids = ["a", "a.b", "a.b.c", "a b", "a*", ">", "A", "ä", "x--a_2eb", "session.a", "😀" * 256, "😀" * 255, "z" * 256]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda session_id: sessions.set_context(session_id, "id", session_id), ids))
    for session_id in ids:
        assert without_stamp(sessions.get_context(session_id)) == {"id": session_id}
    sessions.delete_context("a")
    assert [session_id for session_id in ids if not sessions.get_context(session_id)] == ["a"]


def test_D04_threads_that_change_one_session_lose_nothing(sessions: ContextManager) -> None:
    def work(thread: int) -> None:
        for n in range(10):
            sessions.update_partial_context("shared", {"threads": {str(thread): {str(n): n}}})
            sessions.set_context("shared", f"last of {thread}", n)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(work, range(16)))
    content = sessions.get_context("shared")
    assert content["threads"] == {str(thread): {str(n): n for n in range(10)} for thread in range(16)}
    assert [content[f"last of {thread}"] for thread in range(16)] == [9] * 16


def test_D04_threads_that_create_change_and_delete_at_once_see_whole_sessions(sessions: ContextManager) -> None:
    """Whatever the order, a session is absent or holds fields of changes since it began; nothing fails."""

    def work(thread: int) -> None:
        for n in range(12):
            match (thread + n) % 4:
                case 0:
                    sessions.create_session("s")
                case 1:
                    sessions.delete_context("s")
                case 2:
                    sessions.set_context("s", "pair", [n, n])
                case _:
                    content = sessions.get_context("s")
                    if content:
                        pair = content.get("pair", [0, 0])
                        assert pair[0] == pair[1]
                        assert "_timestamp" in content

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))


async def test_D20_D21_every_operation_has_an_asynchronous_twin(make: Make) -> None:
    async with make() as sessions:
        assert sessions.async_enabled
        recorder = Recorder()
        await sessions.async_register_listener(recorder)
        await sessions.async_create_session("s")
        await sessions.async_set_context("s", "a", 1)
        await sessions.async_update_partial_context("s", {"b": {"c": 2}})
        assert without_stamp(await sessions.async_get_context("s")) == {"a": 1, "b": {"c": 2}}
        await sessions.async_delete_context("s")
        assert await sessions.async_get_context("s") == {}
        await asyncio.to_thread(recorder.wait, 4)
        assert [event.type for event in recorder.events] == ["created", "updated", "updated", "deleted"]
        with pytest.raises(InvalidNameError):
            await sessions.async_get_context("")
    with pytest.raises(ClosedError, match="closed"):
        await sessions.async_get_context("s")


async def test_D20_many_tasks_at_once_lose_nothing(make: Make) -> None:
    async with make() as sessions:
        await asyncio.gather(*(sessions.async_set_context("s", f"k{n}", n) for n in range(100)))
        assert without_stamp(await sessions.async_get_context("s")) == {f"k{n}": n for n in range(100)}


def test_D20_a_manager_serves_one_event_loop_after_another_and_threads_beside_them(sessions: ContextManager) -> None:
    async def add(n: int) -> None:
        await sessions.async_set_context("s", f"loop {n}", n)

    for n in range(3):
        asyncio.run(add(n))
        sessions.set_context("s", f"thread {n}", n)
    assert len(without_stamp(sessions.get_context("s"))) == 6


async def test_D10_asynchronous_operations_can_be_turned_off(make: Make) -> None:
    sessions = make(async_operations=False)
    assert not sessions.async_enabled
    for call in (
        sessions.async_create_session("s"),
        sessions.async_set_context("s", "k", 1),
        sessions.async_update_partial_context("s", {}),
        sessions.async_get_context("s"),
        sessions.async_delete_context("s"),
        sessions.async_register_listener(print),
    ):
        with pytest.raises(ConfigurationError, match="ASYNC_OPERATIONS"):
            await call


def test_D11_D22_listeners_are_told_of_every_change_in_order_with_its_data(make: Make) -> None:
    sessions, recorder = make(agent="planner"), Recorder()
    sessions.set_context("before", "listening", 1)
    sessions.register_listener(recorder)
    sessions.register_listener(recorder)  # again: changes nothing
    sessions.create_session("s")
    sessions.set_context("s", "a", {"n": 1})
    sessions.update_partial_context("s", {"a": {"m": 2}})
    sessions.delete_context("s")
    sessions.delete_context("s")  # there is nothing to delete: no event
    sessions.set_context("s", "again", True)
    sessions.set_context("before", "listening", 2)
    events = recorder.wait(6)
    assert [(event.session_id, event.type) for event in events] == [
        ("s", "created"),
        ("s", "updated"),
        ("s", "updated"),
        ("s", "deleted"),
        ("s", "created"),
        ("before", "updated"),
    ]
    data = [{key: value for key, value in (event.data or {}).items() if key != "_timestamp"} for event in events]
    assert data == [{}, {"a": {"n": 1}}, {"a": {"n": 1, "m": 2}}, {}, {"again": True}, {"listening": 2}]
    assert events[3].data == {}
    stamps = [(event.data or {}).get("_timestamp") for event in events]
    assert [stamp is not None for stamp in stamps] == [True, True, True, False, True, True]
    assert all(abs(event.timestamp.timestamp() - time.time()) < LIMIT_S for event in events)


def test_D22_a_listener_that_raises_stops_neither_itself_nor_others(
    sessions: ContextManager, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    def broken(event: SessionEvent) -> None:
        calls.append(event.session_id)
        raise SystemExit(event.session_id)

    recorder = Recorder()
    sessions.register_listener(broken)
    sessions.register_listener(recorder)
    for n in range(3):
        sessions.create_session(f"s{n}")
    recorder.wait(3)
    eventually(lambda: len([r for r in caplog.records if r.message == "session listener failed"]) == 3)
    assert calls == ["s0", "s1", "s2"]
    assert caplog.records[-1].exc_info


def test_D22_a_slow_listener_holds_up_neither_the_manager_nor_others(sessions: ContextManager) -> None:
    released, slow, quick = threading.Event(), Recorder(), Recorder()

    def wait_first(event: SessionEvent) -> None:
        assert released.wait(LIMIT_S)
        slow(event)

    sessions.register_listener(wait_first)
    sessions.register_listener(quick)
    for n in range(20):
        sessions.set_context("s", "n", n)
    assert [(event.data or {})["n"] for event in quick.wait(20)] == list(range(20))
    assert slow.events == []
    released.set()
    assert [(event.data or {})["n"] for event in slow.wait(20)] == list(range(20))


def test_D22_listeners_get_copies_and_may_use_the_manager(sessions: ContextManager) -> None:
    seen, recorder = Recorder(), Recorder()

    def meddle(event: SessionEvent) -> None:
        assert event.data is not None
        event.data["value"].append("mine")
        if event.session_id == "s":
            sessions.set_context("answer", "value", [sessions.get_context("s")["value"]])
        seen(event)

    sessions.register_listener(meddle)
    sessions.register_listener(recorder)
    sessions.set_context("s", "value", [1])
    seen.wait(2)
    assert [(event.data or {})["value"] for event in recorder.wait(2)] == [[1], [[1]]]
    assert sessions.get_context("s")["value"] == [1]


def test_D22_an_unregistered_listener_is_called_no_more(sessions: ContextManager) -> None:
    one, other = Recorder(), Recorder()
    sessions.register_listener(one)
    sessions.register_listener(other)
    sessions.create_session("s1")
    one.wait(1)
    assert sessions.unregister_listener(one)
    assert not sessions.unregister_listener(one)
    sessions.create_session("s2")
    other.wait(2)
    assert one.told() == [("s1", "created")]
    sessions.register_listener(one)
    sessions.create_session("s3")
    one.wait(2)


async def test_D22_an_asynchronous_listener_runs_on_the_loop_it_was_registered_on(make: Make) -> None:
    async with make() as sessions:
        queue: asyncio.Queue[SessionEvent] = asyncio.Queue()  # of this loop: of no use on another one

        async def listener(event: SessionEvent) -> None:
            assert asyncio.get_running_loop() is here
            await queue.put(event)

        here = asyncio.get_running_loop()
        await sessions.async_register_listener(listener)
        await sessions.async_set_context("s", "a", 1)
        await sessions.async_set_context("s", "a", 2)
        events = [await asyncio.wait_for(queue.get(), LIMIT_S) for _ in range(2)]
        assert [(event.type, (event.data or {})["a"]) for event in events] == [("created", 1), ("updated", 2)]


def test_D11_event_emission_can_be_turned_off(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    silent, recorder = make(event_emission=False), Recorder()
    silent.register_listener(recorder)
    assert [record.message for record in caplog.records] == ["listener will not be called: EVENT_EMISSION is off"]
    silent.create_session("s")
    assert not silent.unregister_listener(recorder)
    assert recorder.events == []


def test_D07_D08_a_session_expires_when_nobody_changes_it_and_each_change_renews_it(make: Make) -> None:
    life_s = 1.0
    sessions = make(time_based_expiration=True, session_expiration_seconds=life_s)
    started = time.monotonic()
    sessions.create_session("s")
    changes = 0
    while time.monotonic() - started < 2 * life_s:
        sessions.set_context("s", "n", changes)
        changes += 1
        time.sleep(0.01)
    assert sessions.get_context("s")["n"] == changes - 1  # it outlived its first end by being changed
    eventually(lambda: sessions.get_context("s") == {})
    sessions.set_context("s", "a new life", True)
    assert without_stamp(sessions.get_context("s")) == {"a new life": True}


def test_D07_without_time_based_expiration_a_session_stays(make: Make) -> None:
    sessions = make(time_based_expiration=False, session_expiration_seconds=0.001)
    sessions.create_session("s")
    time.sleep(0.01)  # not to synchronise: ten lives, had it any
    assert sessions.get_context("s")


def test_a_closed_manager_says_so(sessions: ContextManager) -> None:
    recorder = Recorder()
    with sessions:
        sessions.register_listener(recorder)
        sessions.create_session("s")
        recorder.wait(1)
    sessions.close()
    for call in (
        lambda: sessions.get_context("s"),
        lambda: sessions.create_session("s"),
        lambda: sessions.register_listener(recorder),
    ):
        with pytest.raises(ClosedError, match="closed"):
            call()


# What is the in-memory store's alone.


def test_D09_D13_expired_sessions_leave_memory_by_themselves_and_listeners_are_told() -> None:
    now = [1_000.0]
    settings = SessionSettings(
        use_redis_caching=False,
        time_based_expiration=True,
        session_expiration_seconds=60,
        garbage_collection_interval_seconds=0.005,
    )
    with ContextManager(settings, clock=lambda: now[0]) as sessions:
        recorder = Recorder()
        sessions.register_listener(recorder)
        sessions.create_session("old")
        now[0] += 30
        sessions.create_session("young")
        now[0] += 31  # nobody touches "old" any more: the collector finds it
        events = recorder.wait(3)
        assert (events[2].session_id, events[2].type, events[2].data) == ("old", "expired", {})
        assert events[2].timestamp.timestamp() == 1_060.0
        assert sessions.get_context("young")
        now[0] += 30
        recorder.wait(4)
        assert recorder.told()[3] == ("young", "expired")


def test_D09_without_collection_an_expired_session_is_absent_all_the_same() -> None:
    now = [1_000.0]
    settings = SessionSettings(
        use_redis_caching=False, time_based_expiration=True, session_expiration_seconds=60, garbage_collection=False
    )
    with ContextManager(settings, clock=lambda: now[0]) as sessions:
        recorder = Recorder()
        sessions.register_listener(recorder)
        sessions.set_context("s", "a", 1)
        assert not [each for each in threading.enumerate() if each.name == "holdfast-session-collector"]
        now[0] += 60
        assert sessions.get_context("s") == {}
        sessions.set_context("s", "b", 2)
        assert without_stamp(sessions.get_context("s")) == {"b": 2}
        recorder.wait(3)
        assert recorder.told() == [("s", "created"), ("s", "expired"), ("s", "created")]


def test_D13_the_in_memory_store_ends_with_those_who_hold_it() -> None:
    settings = SessionSettings(
        use_redis_caching=False, time_based_expiration=True, garbage_collection_interval_seconds=0.005
    )
    sessions = ContextManager(settings)
    other = ContextManager(settings)
    sessions.create_session("s")
    other.create_session("s")
    assert other.get_context("s")
    del sessions, other
    eventually(lambda: not [each for each in threading.enumerate() if each.name == "holdfast-session-collector"])
