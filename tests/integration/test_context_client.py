"""The context client: store, get, update, delete, subscribe; each version kept, each change told."""

from __future__ import annotations

import asyncio
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from holdfast.client import ContextClient, connect, get_context, store_context, update_context
from holdfast.client.context_client import DEFAULT_TTL_S
from holdfast.client.context_functions import getContext, storeContext, updateContext
from holdfast.client.key_ring import KeyRing
from holdfast.schemas.errors import (
    ClosedError,
    EncryptionKeyError,
    HoldfastError,
    InvalidBodyError,
    InvalidFieldError,
    InvalidNameError,
    UnavailableError,
    VersionConflictError,
)
from holdfast.schemas.policies import KeyPolicy
from holdfast.streams.wire import hot_subject
from tests.running import own_server, running, settings_in
from tests.support import LIMIT_S, OwnServer

if TYPE_CHECKING:
    from holdfast.client import Holdfast
    from holdfast.client.context_model import StoredContext

GUIDE = Path(__file__).parents[2] / "docs" / "store.md"


@pytest_asyncio.fixture
async def store(nats_server: str, namespace: str) -> AsyncIterator[ContextClient]:
    """A context client of the test's own namespace."""
    async with ContextClient(nats_server, namespace, "tester") as client:
        yield client


@pytest_asyncio.fixture
async def other(nats_server: str, namespace: str) -> AsyncIterator[ContextClient]:
    """Another agent's context client of the same namespace, on a connection of its own."""
    async with ContextClient(nats_server, namespace, "other") as client:
        yield client


class Told:
    """Callbacks' changes, to be waited for."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def __call__(self, change: dict[str, Any]) -> None:
        self.queue.put_nowait(change)

    async def next(self) -> dict[str, Any]:
        return await asyncio.wait_for(self.queue.get(), LIMIT_S)


def seconds_to_live(context: StoredContext) -> float:
    assert context.expires_at is not None
    return (context.expires_at - datetime.now(UTC)).total_seconds()


# Store and get


async def test_E45_E46_E47_stores_and_gets_as_the_guide_shows(nats_server: str, namespace: str) -> None:
    client = ContextClient(nats_server, namespace)
    await client.initialize()
    stored = await client.store(
        "my-context",
        {"data": "important information", "timestamp": 1},
        {"sessionId": "session-123", "agentId": "agent-456", "ttl": 3600},
    )
    context = await client.get("my-context")
    assert context == stored
    assert context is not None
    assert context.data == {"data": "important information", "timestamp": 1}
    assert (context.key, context.version, context.op) == ("my-context", 1, "put")
    assert (context.session_id, context.agent_id) == ("session-123", "agent-456")
    assert 3590 < seconds_to_live(context) <= 3601
    await client.close()
    await client.close()
    with pytest.raises(ClosedError, match="closed"):
        await client.get("my-context")


async def test_E47_what_is_not_there_is_none(store: ContextClient) -> None:
    assert await store.get("nothing") is None
    await store.store("k", 1)
    assert await store.get("k", version=7) is None
    await store.delete("k")
    assert await store.get("k") is None


@pytest.mark.parametrize("data", [{"a": [1, None]}, [1, "two"], "text", "", "null", None, 0, False, 1.5, b"\x00\xff"])
async def test_E47_data_comes_back_as_it_was(store: ContextClient, data: Any) -> None:
    await store.store("k", data)
    found = await store.get("k")
    assert found is not None
    assert found.data == data
    assert type(found.data) is type(data)


async def test_E08_what_is_acknowledged_survives_a_crash_of_the_server(own_server: OwnServer) -> None:
    async with ContextClient(own_server.url) as store:
        await asyncio.gather(*(store.store(f"k{n}", {"n": n}) for n in range(50)))
        await own_server.restart()
    async with ContextClient(own_server.url) as store:
        found = await store.get_many([f"k{n}" for n in range(50)])
    assert {key: context.data for key, context in found.items()} == {f"k{n}": {"n": n} for n in range(50)}


async def test_E01_agents_share_contexts_between_executions(store: ContextClient, other: ContextClient) -> None:
    await store.store("plan", {"goal": "book a flight"})
    found = await other.get("plan")
    assert found is not None
    assert (found.data, found.agent_id) == ({"goal": "book a flight"}, "tester")
    await other.update("plan", {"seat": "12A"}, change_type="merge")
    again = await store.get("plan")
    assert again is not None
    assert (again.data, again.version, again.agent_id) == ({"goal": "book a flight", "seat": "12A"}, 2, "other")


async def test_E02_a_later_execution_finds_the_state_of_a_session(nats_server: str, namespace: str) -> None:
    async with ContextClient(nats_server, namespace, "first") as run:
        await run.store("state", {"step": 3}, {"sessionId": "s1"})
    async with ContextClient(nats_server, namespace, "second") as run:
        found = await run.get("state")
        assert found is not None
        assert (found.data, found.session_id) == ({"step": 3}, "s1")


async def test_contexts_are_named_contexts_under_the_prefix(store: ContextClient, hf: Holdfast) -> None:
    await store.store("plan", {"a": 1}, tags=["x"])
    assert (await hf.keys.get("store.plan")).body == {"a": 1}
    async with ContextClient(client=hf, prefix="mine.") as mine:
        assert await mine.get("plan") is None
        await mine.store("plan", 2)
    assert (await hf.keys.get("mine.plan")).body == 2, "the client that was handed in stays open"


# Options


async def test_E29_E30_E31_E34_options_in_both_spellings(store: ContextClient) -> None:
    tags = ("conversation", "important")
    camel = await store.store(
        "a", 1, {"sessionId": "s", "agentId": "g", "ttl": 60, "tags": list(tags), "changedBy": "me"}
    )
    minute = timedelta(minutes=1)
    snake = await store.store("b", 1, session_id="s", agent_id="g", ttl=minute, tags=tags, changed_by="me")
    for found in (camel, snake):
        assert (found.session_id, found.agent_id, found.changed_by) == ("s", "g", "me")
        assert found.tags == tags
        assert 50 < seconds_to_live(found) <= 61


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"sesionId": "s"}, "sesionId"),
        ({"limit": 3}, "limit"),
        ({"ttl": "1h"}, "ttl"),
        ({"ttl": 0}, "ttl"),
        ({"ttl": True}, "ttl"),
        ({"tags": "important"}, "tags"),
        ({"tags": [1]}, "tags"),
        ({"encrypt": "yes"}, "encrypt"),
        ({"sessionId": 7}, "session_id"),
        ({"expectedVersion": -1}, "expected_version"),
        ({"sessionId": "a", "session_id": "b"}, "session_id"),
        ({7: 1}, "7"),
        (["ttl"], "options"),
    ],
)
async def test_options_that_are_none_are_named(store: ContextClient, options: Any, field: str) -> None:
    with pytest.raises(InvalidFieldError) as raised:
        await store.store("k", 1, options)
    assert raised.value.field == field
    assert await store.get("k") is None


async def test_unknown_keywords_are_named_as_unknown_options(store: ContextClient) -> None:
    with pytest.raises(InvalidFieldError, match="there is no option 'colour'") as raised:
        await store.store("k", 1, colour="red")  # type: ignore[call-arg]  # that it is refused is the point
    assert "sessionId" in str(raised.value)
    with pytest.raises(InvalidFieldError, match="twice"):
        await store.store("k", 1, {"ttl": 5}, ttl=6)


@pytest.mark.parametrize("key", ["", "x" * 800, 7])
async def test_keys_that_are_none_are_refused(store: ContextClient, key: Any) -> None:
    for call in (store.store(key, 1), store.get(key), store.update(key, 1), store.delete(key), store.get_many([key])):
        with pytest.raises(InvalidNameError):
            await call


async def test_E25_E31_a_day_unless_ttl_or_policy_say_otherwise(store: ContextClient, hf: Holdfast) -> None:
    assert DEFAULT_TTL_S == 86_400
    assert abs(seconds_to_live(await store.store("day", 1)) - 86_400) < 10
    assert abs(seconds_to_live(await store.store("hour", 1, ttl=3600)) - 3600) < 10
    assert (await store.store("ever", 1, ttl=math.inf)).expires_at is None
    await hf.keys.set_policy("store.short.", KeyPolicy(ttl_s=120))
    async with ContextClient(client=hf) as other:
        assert abs(seconds_to_live(await other.store("short.k", 1)) - 120) < 10
        assert abs(seconds_to_live(await other.store("long.k", 1)) - 86_400) < 10


async def test_E13_E31_what_has_expired_is_gone(store: ContextClient) -> None:
    await store.store("brief", 1, ttl=0.05)
    started = time.monotonic()
    while await store.get("brief") is not None:
        assert time.monotonic() - started < LIMIT_S
    assert "brief" not in await store.get_many(["brief"])
    again = await store.store("brief", 2, expected_version=0)
    assert again.version >= 2


async def test_E13_expired_contexts_are_cleaned_up_and_told(tmp_path: Path) -> None:
    async with (
        own_server(tmp_path) as server,
        running(server.url, settings_in(tmp_path), ["janitor"]),
        ContextClient(server.url) as store,
    ):
        told = Told()
        store.on("contextChange", told)
        await store.subscribe("brief")
        await store.store("brief", 1, ttl=0.05)
        changes = [await told.next(), await told.next()]
        assert [(change["op"], change["deleted"]) for change in changes] == [("put", False), ("expire", True)]
        assert [version.op for version in await store.history("brief")] == ["expire", "put"]


async def test_E26_ten_versions_stay_hot_by_default(hf: Holdfast) -> None:
    assert (await hf.keys.policies()).policy_for("store.anything").max_versions == 10


async def test_E05_E27_E33_over_one_kib_is_stored_compressed(store: ContextClient, hf: Holdfast) -> None:
    small, large = {"text": "small"}, {"text": "the same again and again " * 200}
    for key, data, options in (("s", small, {}), ("l", large, {"compress": True}), ("n", [large], {"compress": False})):
        stored = await store.store(key, data, options)
        assert stored.ref is not None
        subject = hot_subject(hf.namespace, stored.ref.rpartition("_")[2])
        message = await hf.connection.lean.request(f"$JS.API.DIRECT.GET.KV_ctx-hot.{subject}")
        is_compressed = (message.headers or {}).get("Hf-Enc") == "zstd"
        # compress=False is taken and changes nothing but this sentence: what is stored is the store's business.
        assert is_compressed == (key != "s")
        assert is_compressed == (len(message.data) < 1024) or key == "s"
        found = await store.get(key)
        assert found is not None
        assert found.data == data


@pytest.fixture
def ring() -> KeyRing:
    return KeyRing.of({"k1": os.urandom(32)}, "k1")


async def test_E32_encrypt_seals_one_record(nats_server: str, namespace: str, ring: KeyRing) -> None:
    canary = "a secret that nobody must see"
    async with connect(nats_server, namespace, "tester", key_ring=ring) as hf, ContextClient(client=hf) as store:
        sealed = await store.store("secret", {"canary": canary}, {"encrypt": True})
        plain = await store.store("plain", {"canary": canary})
        for stored, is_plain in ((sealed, False), (plain, True)):
            assert stored.ref is not None
            subject = hot_subject(namespace, stored.ref.rpartition("_")[2])
            message = await hf.connection.lean.request(f"$JS.API.DIRECT.GET.KV_ctx-hot.{subject}")
            assert (canary.encode() in message.data) == is_plain
        found = await store.get("secret")
        assert found is not None
        assert found.data == {"canary": canary}
        # What was sealed stays so, however it changes.
        for change_type, data in (("merge", {"more": 1}), ("replace", {"canary": canary, "n": 2}), ("replace", canary)):
            changed = await store.update("secret", data, change_type=change_type)
            assert changed.ref is not None
            context = await hf.resolve(changed.ref)
            assert context.encrypted, change_type


async def test_E32_without_a_key_nothing_is_stored(nats_server: str, namespace: str, tmp_path: Path) -> None:
    none = KeyRing.from_environment({"HOME": str(tmp_path)})
    async with connect(nats_server, namespace, key_ring=none) as hf, ContextClient(client=hf) as store:
        with pytest.raises(EncryptionKeyError):
            await store.store("secret", 1, encrypt=True)
        assert await store.get("secret") is None


async def test_encryption_is_the_default_where_the_environment_says_so(
    nats_server: str, namespace: str, ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTEXT_ENCRYPTION_ENABLED", "true")
    async with connect(nats_server, namespace, "tester", key_ring=ring) as hf:
        async with ContextClient(client=hf) as store:
            assert await is_sealed(hf, await store.store("a", 1))
            assert not await is_sealed(hf, await store.store("b", 1, encrypt=False))
            assert await is_sealed(hf, await store.update("c", {"n": 1}))
        async with ContextClient(client=hf, encrypt=False) as store:
            assert not await is_sealed(hf, await store.store("d", 1))


async def is_sealed(hf: Holdfast, stored: Any) -> bool:
    return (await hf.resolve(stored.ref)).encrypted


# Update and delete


async def test_E36_update_replaces_and_creates(store: ContextClient) -> None:
    created = await store.update("k", {"a": 1})
    assert (created.version, created.data) == (1, {"a": 1})
    replaced = await store.update("k", {"b": 2}, {"changedBy": "agent-789"})
    assert (replaced.version, replaced.data, replaced.changed_by) == (2, {"b": 2}, "agent-789")
    found = await store.get("k")
    assert found is not None
    assert (found.data, found.change_type) == ({"b": 2}, "replace")


@pytest.mark.parametrize(
    ("before", "data", "after"),
    [
        ([1], [2, 3], [1, 2, 3]),
        ([1], {"a": 2}, [1, {"a": 2}]),
        ([1], "two", [1, "two"]),
        ("one ", "two null", "one two null"),
        (
            {"messages": ["m1"], "state": {"step": 1, "seen": [1]}, "kept": True},
            {"messages": ["m2", "m3"], "state": {"step": 2, "seen": [2]}, "updated": True},
            {"messages": ["m1", "m2", "m3"], "state": {"step": 2, "seen": [1, 2]}, "kept": True, "updated": True},
        ),
    ],
)
async def test_E37_E38_append(store: ContextClient, before: Any, data: Any, after: Any) -> None:
    await store.store("k", before, tags=["kept"], session_id="s")
    changed = await store.update("k", data, {"changeType": "append", "changedBy": "agent-789"})
    found = await store.get("k")
    assert found == changed
    assert found is not None
    assert found.data == after
    assert (found.change_type, found.changed_by) == ("append", "agent-789")
    assert (found.tags, found.session_id) == (("kept",), "s")


@pytest.mark.parametrize(("data", "after"), [([1], [1]), ({"a": 1}, {"a": 1}), ("text", "text"), (7, [7])])
async def test_E37_append_begins_what_is_not_there(store: ContextClient, data: Any, after: Any) -> None:
    assert (await store.update("new", data, change_type="append")).data == after


async def test_E37_merge_is_a_merge_patch(store: ContextClient) -> None:
    await store.store("k", {"a": {"b": 1, "c": 2}, "list": [1]})
    changed = await store.update("k", {"a": {"b": None, "d": 3}, "list": [2]}, change_type="merge")
    assert changed.data == {"a": {"c": 2, "d": 3}, "list": [2]}
    assert (await store.update("new", {"a": {"b": None, "c": 1}}, change_type="merge")).data == {"a": {"c": 1}}


@pytest.mark.parametrize(
    ("before", "data", "change_type", "error"),
    [
        (7, [1], "append", InvalidFieldError),
        ({"a": 1}, [1], "append", InvalidFieldError),
        ("text", 1, "append", InvalidFieldError),
        (b"bytes", b"more", "append", InvalidFieldError),
        ({"a": 1}, [1], "merge", InvalidFieldError),
        ({"a": 1}, {"a": 2}, "prepend", InvalidFieldError),
        ({"a": 1}, {"a": math.nan}, "replace", InvalidBodyError),
        ({"a": 1}, object(), "replace", InvalidBodyError),
    ],
)
async def test_E37_what_cannot_be_changed_so_is_refused(
    store: ContextClient, before: Any, data: Any, change_type: str, error: type[HoldfastError]
) -> None:
    await store.store("k", before)
    with pytest.raises(error):
        await store.update("k", data, change_type=change_type)
    found = await store.get("k")
    assert found is not None
    assert (found.version, found.data) == (1, before)


async def test_E36_replaces_data_of_another_sort(store: ContextClient) -> None:
    for data in ({"a": 1}, "text", b"bytes", ["list"], "again", {"b": 2}):
        await store.update("k", data, tags=["t"] if data == {"a": 1} else None)
    found = await store.get("k")
    assert found is not None
    assert (found.version, found.data, found.tags) == (6, {"b": 2}, ("t",))


@pytest.mark.parametrize("data", [["item"], "x"])
async def test_concurrent_appends_all_take_effect(store: ContextClient, other: ContextClient, data: Any) -> None:
    clients = [store, other] * 10
    await asyncio.gather(*(client.update("log", data, change_type="append") for client in clients))
    found = await store.get("log")
    assert found is not None
    assert (len(found.data), found.version) == (20, 20)


async def test_expected_version_guards_a_write(store: ContextClient) -> None:
    await store.store("k", 1, expected_version=0)
    for call in (
        store.store("k", 2, {"expectedVersion": 0}),
        store.update("k", {"a": 2}, expected_version=7),
        store.update("k", "text", expected_version=7),
        store.delete("k", expected_version=7),
    ):
        with pytest.raises(VersionConflictError) as raised:
            await call
        assert raised.value.actual == 1
    assert (await store.update("k", 2, expected_version=1)).version == 2


async def test_a_change_renews_the_time_to_live(store: ContextClient) -> None:
    await store.store("k", {"n": 0}, ttl=100)
    for n in range(1, 6):
        changed = await store.update("k", {"n": n})
        assert abs(seconds_to_live(changed) - 100) < 2
    assert abs(seconds_to_live(await store.update("k", "text")) - 100) < 2
    assert abs(seconds_to_live(await store.update("k", {"n": 9}, ttl=50)) - 50) < 2
    await store.store("ever", 1, ttl=math.inf)
    assert (await store.update("ever", {"n": 1})).expires_at is None
    assert abs(seconds_to_live(await store.update("new", {"n": 1})) - 86_400) < 10


async def test_E39_delete_keeps_the_history(store: ContextClient) -> None:
    await store.store("k", 1)
    assert await store.delete("k", {"changedBy": "cleaner"}) is True
    assert await store.delete("k") is False
    assert await store.delete("never") is False
    newest, oldest = await store.history("k")
    assert (newest.op, newest.changed_by, oldest.op) == ("delete", "cleaner", "put")
    with pytest.raises(InvalidFieldError, match="ttl"):
        await store.delete("k", ttl=5)


async def test_E03_history_and_rollback(store: ContextClient) -> None:
    for n in range(1, 6):
        await store.store("k", {"n": n}, changed_by=f"agent{n}")
    assert [(version.version, version.changed_by) for version in await store.history("k", limit=2)] == [
        (5, "agent5"),
        (4, "agent4"),
    ]
    back = await store.rollback("k", 2, changed_by="operator")
    assert (back.version, back.data, back.op, back.changed_by) == (6, {"n": 2}, "rollback", "operator")
    old = await store.get("k", version=5)
    assert old is not None
    assert old.data == {"n": 5}
    assert [version.version for version in await store.history("k")] == [6, 5, 4, 3, 2, 1]
    assert await store.history("never") == []


async def test_E14_batches(store: ContextClient) -> None:
    many = {f"k{n}": {"n": n} for n in range(150)}
    stored = await store.store_many(many, {"tags": ["batch"], "ttl": 60})
    assert list(stored) == list(many)
    found = await store.get_many([*many, "nothing"])
    assert {key: context.data for key, context in found.items()} == many
    assert {context.tags for context in found.values()} == {("batch",)}
    updated = await store.update_many({"k1": {"more": 1}, "new": {"more": 2}}, change_type="merge")
    assert {key: context.data for key, context in updated.items()} == {"k1": {"n": 1, "more": 1}, "new": {"more": 2}}
    assert await store.delete_many(["k1", "k2", "nothing", "k2"]) == {"k1": True, "k2": True, "nothing": False}
    assert set(await store.get_many(many)) == many.keys() - {"k1", "k2"}


async def test_E14_a_member_that_fails_does_not_stop_the_others(store: ContextClient) -> None:
    with pytest.raises(InvalidBodyError):
        await store.store_many({"a": 1, "b": object(), "c": 3})
    assert set(await store.get_many(["a", "b", "c"])) == {"a", "c"}
    with pytest.raises(InvalidNameError):
        await store.store_many({"d": 1, "": 2})
    assert await store.get("d") is None, "a bad key is told before anything is sent"


# Subscriptions


async def test_E48_E49_changes_by_anyone_are_told(store: ContextClient, other: ContextClient) -> None:
    told, awaited = Told(), Told()

    async def callback(change: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        awaited(change)

    store.on("contextChange", told)
    store.on("context_change", callback)
    await store.subscribe("plan")
    await other.store("planner", "begins alike and is another")
    await other.store("plan", {"a": 1}, session_id="s", tags=["t"])
    await store.update("plan", {"b": 2}, {"changeType": "merge", "changedBy": "me"})
    await other.delete("plan")
    changes = [await told.next() for _ in range(3)]
    assert [await awaited.next() for _ in range(3)] == changes
    first, second, third = changes
    assert (first["key"], first["version"], first["op"]) == ("plan", 1, "put")
    assert (first["agent_id"], first["session_id"], first["tags"]) == ("other", "s", ["t"])
    assert abs((datetime.now(UTC) - datetime.fromisoformat(first["timestamp"])).total_seconds()) < LIMIT_S
    assert first["timestamp"].endswith("Z")
    assert (second["version"], second["change_type"], second["changed_by"]) == (2, "merge", "me")
    assert (third["version"], third["op"], third["deleted"]) == (3, "delete", True)
    assert told.queue.empty()


async def test_E48_subscribe_need_not_be_awaited(store: ContextClient) -> None:
    told = Told()
    store.on("contextChange", told)
    _ = store.subscribe("k")
    await store.subscribe("k")  # the same subscription: nothing is told twice
    await store.store("k", 1)
    await store.store("k", 2)
    assert [(await told.next())["version"] for _ in range(2)] == [1, 2]


async def test_E49_a_callback_that_fails_does_not_stop_the_others(
    store: ContextClient, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(_: dict[str, Any]) -> None:
        raise ValueError("a bug of the callback")

    told = Told()
    store.on("contextChange", failing)
    store.on("contextChange", told)
    await store.subscribe("k")
    await store.store("k", 1)
    await store.store("k", 2)
    assert [(await told.next())["version"] for _ in range(2)] == [1, 2]
    assert "a callback failed" in caplog.text
    store.off("contextChange", told)
    await store.unsubscribe("k")
    await store.unsubscribe("k")
    with pytest.raises(InvalidFieldError, match="no event"):
        store.on("contextCreated", told)
    with pytest.raises(InvalidFieldError, match="not callable"):
        store.on("contextChange", 7)  # type: ignore[arg-type]  # that it is refused is the point


async def test_E49_nothing_is_missed_through_a_restart_of_the_server(own_server: OwnServer) -> None:
    async with ContextClient(own_server.url) as store, ContextClient(own_server.url) as writer:
        told = Told()
        store.on("contextChange", told)
        await store.subscribe("k")
        seen: set[int] = set()
        for restart in range(2):
            await asyncio.gather(*(writer.update("k", [n], change_type="append") for n in range(10)))
            await own_server.restart()
            await asyncio.gather(*(writer.update("k", [n], change_type="append") for n in range(10)))
            while len(seen) < 20 * (restart + 1):
                seen.add((await told.next())["version"])
        assert seen == set(range(1, 41))


async def test_unsubscribed_contexts_are_told_no_more(store: ContextClient) -> None:
    told = Told()
    store.on("contextChange", told)
    await store.subscribe("a")
    await store.subscribe("b")
    await store.unsubscribe("a")
    await store.store("a", 1)
    await store.store("b", 1)
    assert (await told.next())["key"] == "b"
    assert told.queue.empty()


async def test_a_callback_may_end_its_subscription(store: ContextClient) -> None:
    ended = asyncio.Event()
    told: list[int] = []

    async def once(change: dict[str, Any]) -> None:
        told.append(change["version"])
        await store.unsubscribe("k")
        ended.set()

    store.on("contextChange", once)
    await store.subscribe("k")
    await store.store("k", 1)
    await asyncio.wait_for(ended.wait(), LIMIT_S)
    after = Told()
    store.on("contextChange", after)
    await store.subscribe("other")
    await store.store("k", 2)
    await store.store("other", 1)
    assert (await after.next())["key"] == "other"
    assert told == [1, 1], "once for k, once for other"


# Search, health, quick functions


async def test_E50_search_says_that_it_is_not_available(store: ContextClient) -> None:
    found = await store.search("important information", {"sessionId": "s", "limit": 20, "offset": 0})
    assert (found.results, found.total, found.available) == ([], 0, False)
    assert "does not exist yet" in found.message
    with pytest.raises(InvalidFieldError, match="ttl"):
        await store.search("text", {"ttl": 1})


async def test_health_and_stats_are_those_of_the_system(tmp_path: Path) -> None:
    async with (
        own_server(tmp_path) as server,
        running(server.url, settings_in(tmp_path), ["archiver", "resolver"]),
        ContextClient(server.url) as store,
    ):
        await store.store("k", 1)
        assert (await store.stats())["hot"]["contexts"] >= 1
        assert "ok" in await store.health()


async def test_E51_quick_functions(nats_server: str, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_NATS_URL", nats_server)
    key = f"quick-{namespace}"
    assert await get_context(key) is None
    await store_context(key, {"message": "Hello World"}, {"ttl": 60})
    found = await get_context(key)
    assert found is not None
    assert found.data == {"message": "Hello World"}
    await update_context(key, {"more": 1}, change_type="merge")
    again = await getContext(key)
    assert again is not None
    assert again.data == {"message": "Hello World", "more": 1}
    assert (storeContext, updateContext) == (store_context, update_context)


async def test_E51_the_shared_client_ends_with_its_loop(nats_server: str, namespace: str) -> None:
    """Each ``asyncio.run`` has one of its own; nothing is said on stderr, nothing is waited for."""
    program = f"""
import asyncio, time
from holdfast.client import get_context, store_context
asyncio.run(store_context("k-{namespace}", 1))
print(asyncio.run(get_context("k-{namespace}")).data)
async def timed():
    await get_context("k-{namespace}")
    return time.monotonic()
ended = asyncio.run(timed())
print(time.monotonic() - ended < 1.5)
"""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "HOLDFAST_NATS_URL": nats_server},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.stdout.split(), done.stderr, done.returncode) == (["1", "True"], "", 0)


async def test_a_server_that_is_away_is_an_error_and_is_tried_again(own_server: OwnServer) -> None:
    url = own_server.url
    await own_server.stop()
    store = ContextClient(url)
    with pytest.raises(UnavailableError):
        await store.initialize()
    with pytest.raises(UnavailableError):
        await store.subscribe("k")
    await own_server.start()
    await store.store("k", 1)
    await store.subscribe("k")
    await store.close()


async def test_E52_an_agent_loads_processes_and_stores(
    nats_server: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_NATS_URL", nats_server)

    class MyAgent:
        id = namespace

        async def process_task(self, task: str) -> str:
            context = await get_context(f"agent-{self.id}-state")
            result = self.process_with_context(task, context.data if context else None)
            await update_context(f"agent-{self.id}-state", {"lastInput": task, "lastResult": result})
            return result

        def process_with_context(self, task: str, state: dict[str, Any] | None) -> str:
            return f"{task} after {state['lastInput'] if state else 'nothing'}"

    agent = MyAgent()
    assert await agent.process_task("one") == "one after nothing"
    assert await agent.process_task("two") == "two after one"
    state = await get_context(f"agent-{namespace}-state")
    assert state is not None
    assert (state.version, state.data) == (2, {"lastInput": "two", "lastResult": "two after one"})


async def test_E04_a_store_of_many_contexts_keeps_memory_bounded(store: ContextClient, hf: Holdfast) -> None:
    """What a client holds of what it stored is bounded by bytes: more than that goes through it."""
    async with ContextClient(client=hf) as client:
        for n in range(40):
            await client.store(f"k{n}", {"n": n, "text": os.urandom(500_000).hex()})
        first = await client.get("k0")
        assert first is not None
        assert first.data["n"] == 0
        assert len(hf.cache) < 40


@pytest.mark.parametrize("example", re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE))
async def test_E52_the_example_of_the_guide_runs(own_server: OwnServer, example: str) -> None:
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "error", "-c", example],
        env={**os.environ, "HOLDFAST_NATS_URL": own_server.url},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    # What is behind a hash in the guide is what it prints.
    assert done.stdout.splitlines() == re.findall(r"print\(.*\)  # (.*)", example)
