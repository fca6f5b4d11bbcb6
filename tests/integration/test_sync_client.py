"""The blocking client: every twin is there, and does what the asynchronous one does."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, assert_type

import pytest

from holdfast.client import ConfigurationError, Context, Event, Holdfast, NotFoundError, Ref, UnavailableError
from holdfast.client.background import ClientShare, close_background_loop
from holdfast.client.key_model import KeyValue, KeyVersion
from holdfast.client.keys import Keys
from holdfast.client.sync import SyncHoldfast, SyncKeys, connect
from holdfast.schemas.errors import ClosedError, VersionConflictError
from tests.running import running, settings_in
from tests.support import LIMIT_S

if TYPE_CHECKING:
    from pathlib import Path

FOR_IMPORTERS = {"publish_many", "store_many", "import_version", "import_versions"}
"""What works on prepared records is not part of the blocking client."""


@pytest.fixture(autouse=True)
def no_loop_left() -> Generator[None]:
    yield
    close_background_loop()


@pytest.fixture
def blocking(nats_server: str, namespace: str) -> Generator[SyncHoldfast]:
    with connect(nats_server, namespace, "tester") as client:
        yield client


def public(kind: type) -> dict[str, Callable[..., Any]]:
    return {name: member for name, member in vars(kind).items() if not name.startswith("_") and callable(member)}


@pytest.mark.parametrize(("kind", "twin"), [(Holdfast, SyncHoldfast), (Keys, SyncKeys)])
def test_every_method_has_a_blocking_twin_with_the_same_arguments(kind: type, twin: type) -> None:
    methods, twins = public(kind), public(twin)
    missing = set(methods) - set(twins) - FOR_IMPORTERS - ({"close"} if kind is Keys else set())
    assert missing == set()
    for name in set(methods) & set(twins):
        if name != "close":
            wanted = [each.replace(annotation="") for each in inspect.signature(methods[name]).parameters.values()]
            found = [each.replace(annotation="") for each in inspect.signature(twins[name]).parameters.values()]
            assert found == wanted, name
        assert twins[name].__doc__, name


def test_contexts_are_stored_resolved_and_errors_are_raised(blocking: SyncHoldfast) -> None:
    ref = blocking.put({"goal": "book"}, kind="plan")
    assert_type(ref, Ref)
    assert ref.startswith("ctx_plan_")
    assert_type(blocking.resolve(ref), Context)
    assert blocking.resolve(ref).body == {"goal": "book"}
    refs = blocking.put_many([1, 2, 3])
    assert [context.body for context in blocking.resolve_many(refs).found.values()] == [1, 2, 3]
    event = blocking.emit("plan:made", {"steps": 3}, context=ref, session="s1")
    assert_type(event, Event)
    assert (event.context_ref, event.agent_id) == (ref, "tester")


def test_named_contexts_are_written_read_and_listed(blocking: SyncHoldfast) -> None:
    keys = blocking.keys
    assert_type(keys.put("plan.a", {"n": 1}, tags=["new"]), KeyValue)
    assert keys.patch("plan.a", {"m": 2}).version == 2
    assert keys.update("plan.a", lambda body: body | {"o": 3}).body == {"n": 1, "m": 2, "o": 3}
    assert keys.append("plan.b", "first").body == ["first"]
    assert keys.get("plan.a", 1).body == {"n": 1}
    head = keys.head("plan.a")
    assert head is not None
    assert head.version == 3
    assert keys.get_many(["plan.a", "plan.b", "plan.c"]).keys() == {"plan.a", "plan.b"}
    assert keys.rollback("plan.a", 1).version == 4
    assert keys.diff("plan.a", 1, 2) == [{"op": "add", "path": "/m", "value": 2}]
    assert keys.commit({"plan.c": 1, "plan.d": 2}, {"plan.c": 0})["plan.d"].version == 1
    assert [version.key for version in keys.list("plan.")] == ["plan.a", "plan.b", "plan.c", "plan.d"]
    assert keys.delete("plan.d").deleted
    with pytest.raises(NotFoundError):
        keys.get("plan.d")
    with pytest.raises(VersionConflictError) as caught:
        keys.put("plan.a", 5, expected_version=1)
    assert (caught.value.expected, caught.value.actual) == (1, 4)


def test_history_is_read_page_by_page_and_may_be_left_early(blocking: SyncHoldfast) -> None:
    for n in range(1, 41):
        blocking.keys.put("k", {"n": n})
    versions = blocking.keys.history("k")
    assert_type(versions, Iterator[KeyVersion])
    assert [version.version for version in versions] == list(range(40, 0, -1))
    assert [version.version for version in islice(blocking.keys.history("k"), 5)] == [40, 39, 38, 37, 36]
    newest = next(blocking.keys.history("k", limit=1))
    assert blocking.keys.load(newest).body == {"n": 40}
    assert list(blocking.keys.history("never written")) == []


def test_a_watch_blocks_for_the_next_change_and_ends_when_it_is_closed(blocking: SyncHoldfast) -> None:
    with blocking.keys.watch("plan.") as changes:
        assert changes.next(0.01) is None
        blocking.keys.put("plan.a", 1)
        blocking.keys.put("other", 1)
        blocking.keys.put("plan.b", 1)
        assert next(changes).key == "plan.a"
        second = changes.next(LIMIT_S)
        assert second is not None
        assert second.key == "plan.b"
        with ThreadPoolExecutor(1) as thread:
            rest = thread.submit(list, changes)
            threading.Timer(0.05, changes.close).start()
            assert rest.result(LIMIT_S) == []
    changes.close()


def test_a_watch_whose_connection_is_closed_for_good_ends(nats_server: str, namespace: str) -> None:
    with connect(nats_server, namespace) as blocking, blocking.keys.watch("k") as changes:
        share = ClientShare(nats_server, namespace, blocking.agent)
        with ThreadPoolExecutor(1) as thread:
            rest = thread.submit(list, changes)
            share.call(lambda hf: hf.connection.client.close())
            assert rest.result(LIMIT_S) == []
        assert changes.next(LIMIT_S) is None
        share.close()


def test_a_change_that_came_after_one_gave_up_waiting_is_not_lost(blocking: SyncHoldfast) -> None:
    with blocking.keys.watch("k") as changes:
        for n in range(1, 30):
            assert changes.next(0.0005 * (n % 3)) is None
            blocking.keys.put("k", n)
            assert next(changes).version == n


def test_threads_share_a_client(blocking: SyncHoldfast) -> None:
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda n: blocking.keys.patch("k", {str(n): n}), range(200)))
    value = blocking.keys.get("k")
    assert (value.version, value.body) == (200, {str(n): n for n in range(200)})


async def test_events_are_queried_through_the_resolver(nats_server: str, namespace: str, tmp_path: Path) -> None:
    async with running(nats_server, settings_in(tmp_path), ["resolver"]):

        def use() -> None:
            with connect(nats_server, namespace) as hf:
                for n in range(5):
                    hf.emit("step:done", n, session="s1")
                assert [event.data for event in hf.query(session="s1")] == [0, 1, 2, 3, 4]
                assert hf.health()["ok"] in (True, False)
                assert hf.stats()
                with pytest.raises(NotFoundError):
                    hf.resolve(f"ctx_plan_{'a' * 32}")

        await asyncio.to_thread(use)


def test_connecting_fails_at_once_and_a_closed_client_says_so(
    nats_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UnavailableError, match="no NATS server"):
        connect("nats://127.0.0.1:1")
    for name in ("HOLDFAST_NATS_URL", "HOLDFAST_NATS_CONTEXT", "NATS_URL", "NATS_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path))
    with pytest.raises(ConfigurationError, match="holdfast up"):
        connect()
    client = connect(nats_server)
    client.close()
    client.close()
    with pytest.raises(ClosedError, match="closed"):
        client.put(1)
