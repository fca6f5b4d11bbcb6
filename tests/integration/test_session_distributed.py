"""Sessions that agents, processes and machines share: what the distributed store promises beyond the local one."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from blockbuster import BlockingError, blockbuster_ctx

from holdfast.client import ContextManager, SessionSettings, connect
from holdfast.client.background import CLOSE_S, ClientShare, close_background_loop
from holdfast.client.session_manager import session_key
from holdfast.client.watch import KeyWatch
from holdfast.schemas.errors import (
    ConfigurationError,
    InvalidBodyError,
    NotFoundError,
    UnavailableError,
)
from holdfast.schemas.ids import now_ms
from holdfast.streams.connection import open_connection
from holdfast.workers.janitor import Janitor
from tests.session_support import Recorder, end_of_threads, without_stamp
from tests.support import LIMIT_S

if TYPE_CHECKING:
    from holdfast.client import Holdfast
    from tests.support import OwnServer

ROOT: Final = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_thread_left() -> Generator[None]:
    yield
    end_of_threads()


async def test_D09_the_janitor_ends_expired_sessions_for_every_manager(own_server: OwnServer) -> None:
    settings = SessionSettings(time_based_expiration=True, session_expiration_seconds=3_600)
    async with (
        ContextManager(settings, url=own_server.url, agent="planner") as planner,
        ContextManager(settings, url=own_server.url, agent="executor") as executor,
        open_connection(own_server.url) as connection,
    ):
        recorder = Recorder()
        await executor.async_register_listener(recorder)
        long_id = "😀" * 256  # its key does not spell it
        await planner.async_create_session("a.b")
        await planner.async_create_session(long_id)
        janitor = Janitor(connection, clock_ms=lambda: now_ms() + 7_200_000)
        assert await janitor.round() == 2
        await janitor.close()
        events = await asyncio.to_thread(recorder.wait, 4)
        assert [(event.session_id, event.type) for event in events[:2]] == [("a.b", "created"), (long_id, "created")]
        assert {(event.session_id, event.type) for event in events[2:]} == {("a.b", "expired"), (long_id, "expired")}
        assert [(event.data, event.agent) for event in events[2:]] == [({}, None)] * 2
        assert await executor.async_get_context("a.b") == {}
        await executor.async_set_context("a.b", "again", 1)
        await asyncio.to_thread(recorder.wait, 5)
        assert recorder.told()[4] == ("a.b", "created")


@pytest.fixture
def distributed(nats_server: str, namespace: str) -> Generator[ContextManager]:
    with ContextManager(SessionSettings(), url=nats_server, namespace=namespace, agent="tester") as manager:
        yield manager


def test_D01_D06_D14_a_session_outlives_every_client(nats_server: str, namespace: str) -> None:
    with ContextManager(url=nats_server, namespace=namespace) as first:
        first.set_context("s", "kept", {"for": "ever"})
    close_background_loop()
    with ContextManager(url=nats_server, namespace=namespace) as second:
        assert without_stamp(second.get_context("s")) == {"kept": {"for": "ever"}}


async def test_D08_each_change_renews_the_expiry_of_the_key(hf: Holdfast, nats_server: str, namespace: str) -> None:
    settings = SessionSettings(time_based_expiration=True, session_expiration_seconds=1_000)
    async with ContextManager(settings, url=nats_server, namespace=namespace) as sessions:
        await sessions.async_create_session("s")
        await sessions.async_set_context("s", "a", 1)
        versions = [version async for version in hf.keys.history(session_key("s"))]
        for version in versions:
            assert version.expires_at is not None
            assert abs((version.expires_at - version.timestamp).total_seconds() - 1_000) < 5
        later, earlier = versions
        assert later.expires_at is not None
        assert earlier.expires_at is not None
        assert later.expires_at >= earlier.expires_at
    async with ContextManager(SessionSettings(), url=nats_server, namespace=namespace) as lasting:
        await lasting.async_set_context("s", "b", 1)
    head = await hf.keys.head(session_key("s"))
    assert head is not None
    assert head.expires_at is None


async def test_D02_D06_every_change_is_a_version_with_its_author(
    hf: Holdfast, nats_server: str, namespace: str
) -> None:
    for agent in ("planner", "executor"):
        async with ContextManager(url=nats_server, namespace=namespace, agent=agent) as sessions:
            await sessions.async_create_session("s")
            await sessions.async_set_context("s", agent, 1)
    async with ContextManager(url=nats_server, namespace=namespace, agent="closer") as sessions:
        await sessions.async_delete_context("s")
        await sessions.async_create_session("s")
    versions = [version async for version in hf.keys.history(session_key("s"))]
    assert [(v.version, v.agent, v.change_type, v.session) for v in reversed(versions)] == [
        (1, "planner", "created", "s"),
        (2, "planner", "updated", "s"),
        (3, "executor", "updated", "s"),
        (4, "executor", "updated", "s"),
        (5, "closer", "deleted", "s"),
        (6, "closer", "created", "s"),
    ]
    assert (await hf.keys.get(session_key("s"), 4)).body.keys() == {"_timestamp", "planner", "executor"}


async def test_D02_D19_two_clients_take_turns_in_ending_and_beginning_a_session(
    nats_server: str, namespace: str
) -> None:
    """Each remembers a state that the other has changed since."""
    async with (
        ContextManager(url=nats_server, namespace=namespace, agent="one") as one,
        ContextManager(url=nats_server, namespace=namespace, agent="other") as other,
    ):
        recorder = Recorder()
        await one.async_register_listener(recorder)
        for n in range(10):
            first, second = (one, other) if n % 2 else (other, one)
            await first.async_set_context("s", "by first", n)
            await second.async_set_context("s", "by second", n)
            content = await first.async_get_context("s")
            assert without_stamp(content) == {"by first": n, "by second": n}
            await first.async_delete_context("s")
            if n % 3 == 0:
                await second.async_create_session("s")
                await first.async_delete_context("s")
                await second.async_delete_context("s")
        await asyncio.to_thread(recorder.wait, 38)
        expected = []
        for n in range(10):
            expected += ["created", "updated", "deleted"] + (["created", "deleted"] if n % 3 == 0 else [])
        assert [event.type for event in recorder.events] == expected


ENDING: Final = """
import sys, threading
from holdfast.client import ContextManager

sessions = ContextManager(url=sys.argv[1], namespace=sys.argv[2])
told = threading.Event()
sessions.register_listener(lambda event: told.set())
async def listener(event): told.set()
sessions.register_listener(listener)
sessions.create_session("s")
assert told.wait(10)
print("ends")
"""


def test_D22_a_program_with_listeners_may_simply_end(nats_server: str, namespace: str) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ENDING, nats_server, namespace],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")
    assert time.monotonic() - started < CLOSE_S


async def test_D20_the_asynchronous_twins_leave_the_loop_free(nats_server: str, namespace: str) -> None:
    """No call of the standard library that blocks is made on the caller's loop; the blocking methods make some."""
    sessions = ContextManager(url=nats_server, namespace=namespace)
    await sessions.async_create_session("s")  # begins the thread
    with blockbuster_ctx(["holdfast.client", "holdfast.streams"]):
        with pytest.raises(BlockingError):
            _read_often(sessions)
        await sessions.async_set_context("s", "a", 1)
        assert without_stamp(await sessions.async_get_context("s")) == {"a": 1}
        await sessions.async_delete_context("s")
        await sessions.aclose()


def _read_often(sessions: ContextManager) -> None:
    # One call waits for nothing when its answer is there already.
    for _ in range(1_000):
        sessions.get_context("s")


OTHER_PROCESS: Final = """
import sys
from holdfast.client import ContextManager

url, namespace, name = sys.argv[1:]
with ContextManager(url=url, namespace=namespace, agent=name) as sessions:
    for n in range(50):
        sessions.update_partial_context("shared", {"by": {name: {str(n): n}}})
        sessions.set_context("shared", name, n)
"""


def test_D02_D04_D22_several_processes_share_a_session_and_listeners_see_them_all(
    distributed: ContextManager, nats_server: str, namespace: str
) -> None:
    recorder = Recorder()
    distributed.register_listener(recorder)
    names = ["one", "two", "three"]
    started = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", OTHER_PROCESS, nats_server, namespace, name])
        for name in names
    ]
    assert [process.wait(LIMIT_S) for process in started] == [0, 0, 0]
    content = distributed.get_context("shared")
    assert content["by"] == {name: {str(n): n for n in range(50)} for name in names}
    assert [content[name] for name in names] == [49, 49, 49]
    events = recorder.wait(300)
    assert [event.version for event in events] == list(range(1, 301))
    assert [event.type for event in events] == ["created"] + ["updated"] * 299
    for name in names:
        assert len([event for event in events if event.agent == name]) == 100
    stamps = [(event.data or {})["_timestamp"] for event in events]
    assert stamps == sorted(set(stamps))
    assert events[-1].data == content


async def test_D22_changes_made_past_the_session_manager_are_told_too(
    hf: Holdfast, nats_server: str, namespace: str
) -> None:
    async with ContextManager(url=nats_server, namespace=namespace) as sessions:
        recorder = Recorder()
        await sessions.async_register_listener(recorder)
        key = session_key("s")
        await hf.keys.put("session.not.one", {"three": "segments"})
        await hf.keys.put("sessions", {})
        await hf.keys.put(key, {"a": 1})
        await hf.keys.patch(key, {"b": 2})
        await hf.keys.delete(key)
        await hf.keys.put(key, {"c": 3})
        await hf.keys.rollback(key, 2)
        await hf.keys.put(key, ["no", "session"])
        await sessions.async_set_context("s2", "a", 1)
        events = await asyncio.to_thread(recorder.wait, 7)
        assert [event.type for event in events] == [
            *("created", "updated", "deleted", "created", "updated", "updated", "created")
        ]
        assert [event.data for event in events[:6]] == [
            {"a": 1},
            {"a": 1, "b": 2},
            {},
            {"c": 3},
            {"a": 1, "b": 2},
            None,
        ]
        with pytest.raises(InvalidBodyError, match="holds list"):
            await sessions.async_get_context("s")
        with pytest.raises(InvalidBodyError, match="holds list"):
            await sessions.async_set_context("s", "k", 1)
        await sessions.async_delete_context("s")
        await sessions.async_set_context("s", "works", "again")


async def test_D01_D22_nothing_is_lost_and_no_event_missed_when_the_server_is_killed(own_server: OwnServer) -> None:
    async with ContextManager(url=own_server.url) as sessions:
        recorder = Recorder()
        await sessions.async_register_listener(recorder)
        await sessions.async_update_partial_context("s", {"n": 0, "before": "the crash"})
        await asyncio.to_thread(recorder.wait, 1)
        await own_server.restart()
        async with connect(own_server.url, agent="faster") as other:
            # Before the manager's own connection is back, perhaps.
            for n in range(1, 20):
                await other.keys.patch(session_key("s"), {"n": n})
        await sessions.async_set_context("s", "n", 20)
        events = await asyncio.to_thread(recorder.wait, 21)
        assert [(event.data or {})["n"] for event in events] == list(range(21))
        assert without_stamp(await sessions.async_get_context("s")) == {"n": 20, "before": "the crash"}


async def test_D22_a_listener_hears_on_after_its_connection_was_closed_for_good(
    nats_server: str, namespace: str
) -> None:
    """As over credentials that are good no longer, and have been mended since."""
    async with ContextManager(url=nats_server, namespace=namespace) as sessions:
        recorder = Recorder()
        await sessions.async_register_listener(recorder)
        share = ClientShare(nats_server, namespace, "agent")
        await sessions.async_set_context("s", "n", 1)
        await asyncio.to_thread(recorder.wait, 1)
        await share.run(lambda hf: hf.connection.client.close())
        await share.aclose()
        await sessions.async_set_context("s", "n", 2)
        events = await asyncio.to_thread(recorder.wait, 2)
        assert [(event.data or {})["n"] for event in events] == [1, 2]


async def test_D22_a_listener_that_is_interrupted_before_its_first_event_misses_none(
    nats_server: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, stored = KeyWatch.__anext__, threading.Event()

    async def interrupted(watch: KeyWatch) -> Any:
        await asyncio.to_thread(stored.wait, LIMIT_S)
        monkeypatch.setattr(KeyWatch, "__anext__", step)
        raise RuntimeError("interrupted")

    async with ContextManager(url=nats_server, namespace=namespace) as sessions:
        recorder = Recorder()
        monkeypatch.setattr(KeyWatch, "__anext__", interrupted)
        await sessions.async_register_listener(recorder)
        await sessions.async_set_context("s", "n", 1)
        stored.set()
        events = await asyncio.to_thread(recorder.wait, 1)
        assert [(event.type, (event.data or {})["n"]) for event in events] == [("created", 1)]


async def test_a_lost_body_is_an_error_and_no_empty_session(hf: Holdfast, nats_server: str, namespace: str) -> None:
    async with ContextManager(url=nats_server, namespace=namespace) as sessions:
        await sessions.async_set_context("s", "a", 1)
        head = await hf.keys.head(session_key("s"))
        assert head is not None
        assert head.ref is not None
        digest = head.ref.rpartition("_")[2]
        await hf.connection.api("STREAM.PURGE.KV_ctx-hot", {"filter": f"$KV.ctx-hot.{namespace}.{digest}"})
        async with ContextManager(url=nats_server, namespace=namespace, agent="without a cache") as reader:
            with pytest.raises((NotFoundError, UnavailableError)):
                await reader.async_get_context("s")
            with pytest.raises((NotFoundError, UnavailableError)):
                await reader.async_set_context("s", "b", 2)


def test_D06_without_a_server_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOLDFAST_NATS_URL", "HOLDFAST_NATS_CONTEXT", "NATS_URL", "NATS_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path))
    sessions = ContextManager()  # connects to nothing yet
    with pytest.raises(ConfigurationError, match="holdfast up"):
        sessions.create_session("s")
    monkeypatch.setenv("USE_REDIS_CACHING", "false")
    with ContextManager() as local:
        local.create_session("s")
        assert local.get_context("s")


FORK: Final = """
import os, sys, time
from holdfast.client import ContextManager

url, namespace, kind = sys.argv[1:]
sessions = ContextManager({"USE_REDIS_CACHING": kind == "distributed"}, url=url, namespace=namespace)
events = []
sessions.register_listener(events.append)
sessions.set_context("s", "parent", 1)
pid = os.fork()
if pid == 0:
    assert sessions.get_context("s")["parent"] == 1
    sessions.set_context("s", "child", 2)
    mine = []
    sessions.register_listener(mine.append)
    sessions.register_listener(events.append)
    sessions.set_context("s", "child", 3)
    while not mine or mine[-1].data.get("child") != 3:
        time.sleep(0.005)
    sessions.close()
    sys.exit(0)
_, status = os.waitpid(pid, 0)
assert status == 0, status
sessions.set_context("s", "parent", 4)
while not events or events[-1].data.get("parent") != 4:
    time.sleep(0.005)
content = sessions.get_context("s")
print(content["parent"], content.get("child"), [event.data.get("child") for event in events])
"""


@pytest.mark.parametrize(
    ("kind", "printed"), [("distributed", "4 3 [None, 2, 3, 3]\n"), ("memory", "4 None [None, None]\n")]
)
def test_D04_a_forked_child_shares_the_distributed_store_and_has_a_copy_of_the_local_one(
    nats_server: str, namespace: str, kind: str, printed: str
) -> None:
    done = subprocess.run(
        # Python 3.12 warns of every fork beside threads: that it works is what is tested.
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", FORK, nats_server, namespace, kind],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, "")


DEMO: Final = """
import asyncio

from holdfast.client import ContextManager

cm = ContextManager()

session = "session_001"
cm.create_session(session)
cm.set_context(session, "user_query", "How do I book a flight?")
cm.set_context(session, "agent", "chat_agent")
print("Initial Context:", cm.get_context(session))

partial_update = {"intent": "booking", "details": {"class": "economy", "flexible": True}}
cm.update_partial_context(session, partial_update)
print("After Partial Update:", cm.get_context(session))

if cm.async_enabled:

    async def async_demo():
        await cm.async_set_context(session, "async_key", "async_value")
        ctx = await cm.async_get_context(session)
        print("Async Context:", ctx)

    asyncio.run(async_demo())

cm.delete_context(session)
print("Final Context:", cm.get_context(session))
"""


def _run_plainly(program: str, url: str) -> list[str]:
    """What a program prints that is run as a user would, without its time stamps."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "HOLDFAST_NATS_URL": url},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return re.sub(r"'_timestamp': [0-9.]+", "'_timestamp': …", done.stdout).splitlines()


def test_D20_D21_D22_the_demonstration_of_the_context_manager_runs_as_it_stands(own_server: OwnServer) -> None:
    initial, updated, asynchronous, final = _run_plainly(DEMO, own_server.url)
    assert initial == (
        "Initial Context: {'_timestamp': …, 'agent': 'chat_agent', 'user_query': 'How do I book a flight?'}"
    )
    assert updated == (
        "After Partial Update: {'_timestamp': …, 'agent': 'chat_agent', 'details': {'class': 'economy', "
        "'flexible': True}, 'intent': 'booking', 'user_query': 'How do I book a flight?'}"
    )
    assert asynchronous.startswith("Async Context: {'_timestamp': …, 'agent': 'chat_agent', 'async_key': 'async_value'")
    assert final == "Final Context: {}"


def _guide() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "sessions.md").read_text()
    return re.findall(r"^```python\n(.*?)^```\n+^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("example", "printed"), _guide())
def test_D23_examples_of_the_guide_print_what_the_guide_says(example: str, printed: str, own_server: OwnServer) -> None:
    assert _run_plainly(example, own_server.url) == printed.splitlines()


def test_D23_the_guide_has_its_examples() -> None:
    assert len(_guide()) >= 2


@pytest.mark.slow
@pytest.mark.timeout(300)  # 32,000 durable writes: some 25 s on two quiet cores
def test_D04_32_threads_times_1000_operations_lose_no_update(
    nats_server: str, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each thread's every effect is in the end result, and each operation is one version, without a gap."""
    caplog.set_level(logging.WARNING)
    threads, operations, shared = 32, 1_000, 8
    sessions = ContextManager(url=nats_server, namespace=namespace)

    def work(thread: int) -> list[int]:
        """Counts its operations by session; every 20th merges into a tree, the others set a field of its own."""
        done = [0] * shared
        for n in range(operations):
            session = (thread + n) % shared
            if n % 20 == 0:
                sessions.update_partial_context(f"s{session}", {"marks": {str(thread): {str(n): n}}})
            else:
                sessions.set_context(f"s{session}", f"last of {thread}", n)
            done[session] += 1
        return done

    with sessions, ThreadPoolExecutor(threads) as pool:
        done = list(pool.map(work, range(threads)))
        contents = [sessions.get_context(f"s{session}") for session in range(shared)]
    for session, content in enumerate(contents):
        assert len(without_stamp(content)) == threads + 1
        for thread in range(threads):
            mine = [n for n in range(operations) if (thread + n) % shared == session]
            assert content[f"last of {thread}"] == [n for n in mine if n % 20][-1]
            assert content["marks"].get(str(thread), {}) == {str(n): n for n in mine if n % 20 == 0}
    asyncio.run(_check_versions(nats_server, namespace, [sum(column) for column in zip(*done, strict=True)]))
    assert [record.message for record in caplog.records] == []


async def _check_versions(url: str, namespace: str, counts: list[int]) -> None:
    async with connect(url, namespace=namespace) as hf:
        for session, count in enumerate(counts):
            head = await hf.keys.head(session_key(f"s{session}"))
            assert head is not None
            assert head.version == count
            async with asyncio.timeout(LIMIT_S), hf.keys.watch(head.key, from_version=1) as versions:
                numbers = [(await anext(versions)).version for _ in range(count)]
            assert numbers == list(range(1, count + 1))
