"""Named contexts as a plain nats-py client meets them: ``ctx.<ns>.key.…``, JSON in and JSON out."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from holdfast.client import connect
from holdfast.client.key_ring import KeyRing
from holdfast.schemas import limits
from holdfast.schemas.policies import KeyPolicy
from holdfast.streams.connection import Connection, open_connection
from holdfast.workers.control import evict, flush
from tests.running import own_server, running, settings_in, target_of
from tests.support import plain_client

if TYPE_CHECKING:
    from nats.aio.client import Client

pytestmark = pytest.mark.asyncio(loop_scope="module")

Answer = dict[str, Any]


class Plain:
    """A caller without any of our code: subjects and JSON."""

    def __init__(self, client: Client, namespace: str) -> None:
        self.client = client
        self.namespace = namespace

    async def call(self, endpoint: str, **request: object) -> Answer:
        reply = await self.client.request(
            f"ctx.{self.namespace}.key.{endpoint}", json.dumps(request).encode(), timeout=20
        )
        assert not reply.headers or "Nats-Service-Error-Code" not in reply.headers, reply.data
        assert len(reply.data) <= limits.REPLY_BYTES
        answer: Answer = json.loads(reply.data)
        return answer

    async def error(self, endpoint: str, request: object) -> Answer:
        """Calls what must be refused; returns the error."""
        raw = request if isinstance(request, bytes) else json.dumps(request).encode()
        reply = await self.client.request(f"ctx.{self.namespace}.key.{endpoint}", raw, timeout=20)
        assert reply.headers is not None, reply.data
        error: Answer = json.loads(reply.data)["error"]
        assert 400 <= int(reply.headers["Nats-Service-Error-Code"]) < 500, error
        assert error["message"]
        return error

    async def body(self, key: str, **request: object) -> Any:
        return (await self.call("get", key=key, **request))["body"]

    async def versions(self, key: str, **request: object) -> list[int]:
        return [item["version"] for item in (await self.call("history", key=key, **request))["versions"]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[str]:
    """A system that archives when it is told to."""
    data: Path = tmp_path_factory.mktemp("keys")
    async with own_server(data) as server, running(server.url, settings_in(data)):
        yield server.url


@pytest_asyncio.fixture(loop_scope="module")
async def plain(url: str, namespace: str) -> AsyncGenerator[Plain]:
    async with plain_client(url) as client:
        yield Plain(client, namespace)


@pytest_asyncio.fixture(loop_scope="module")
async def control(url: str) -> AsyncGenerator[Connection]:
    async with open_connection(target_of(url)) as connection:
        yield connection


# What a user without the SDK does.


async def test_E36_E39_a_plain_client_writes_changes_reads_and_deletes(url: str) -> None:
    async with plain_client(url) as nc:

        async def call(endpoint: str, request: dict[str, Any]) -> Answer:
            reply = await nc.request(f"ctx.default.key.{endpoint}", json.dumps(request).encode(), timeout=20)
            return {"status": (reply.headers or {}).get("Nats-Service-Error-Code"), **json.loads(reply.data)}

        put = await call("put", {"key": "plan.trip", "body": {"goal": "fly", "budget": 300}, "tags": ["travel"]})
        assert (put["version"], put["op"], put["tags"]) == (1, "put", ["travel"])
        patched = await call("patch", {"key": "plan.trip", "merge": {"budget": 400}, "expected_version": 1})
        assert (patched["version"], patched["op"]) == (2, "patch")
        assert (await call("get", {"key": "plan.trip"}))["body"] == {"goal": "fly", "budget": 400}
        assert [item["key"] for item in (await call("list", {"prefix": "plan."}))["keys"]] == ["plan.trip"]

        conflict = await call("put", {"key": "plan.trip", "body": 1, "expected_version": 1})
        assert conflict["status"] == "409"
        assert conflict["error"]["details"] == {"key": "plan.trip", "expected": 1, "actual": 2}

        deleted = await call("delete", {"key": "plan.trip"})
        assert (deleted["version"], deleted["op"]) == (3, "delete")
        assert (await call("get", {"key": "plan.trip"}))["status"] == "404"
        assert (await call("list", {"prefix": "plan."}))["keys"] == []
        history = await call("history", {"key": "plan.trip"})
        assert [(item["version"], item["op"]) for item in history["versions"]] == [
            (3, "delete"), (2, "patch"), (1, "put")
        ]  # fmt: skip


async def test_the_endpoints_are_discoverable(plain: Plain) -> None:
    reply = await plain.client.request("$SRV.INFO.holdfast", b"", timeout=20)
    subjects = {endpoint["subject"] for endpoint in json.loads(reply.data)["endpoints"]}
    names = ("get", "put", "patch", "history", "list", "delete", "append", "rollback", "diff", "commit")
    assert {f"ctx.*.key.{name}" for name in names} <= subjects


# get


async def test_E29_E30_E34_E37_E38_get_has_the_stated_members(plain: Plain) -> None:
    await plain.call(
        "put", key="k", body={"a": 1}, kind="plan", tags=["x", "y"], session_id="s", agent_id="planner",
        ttl=3600, changed_by="ann", change_type="first draft",
    )  # fmt: skip
    answer = await plain.call("get", key="k")
    for time in ("timestamp", "stored_at", "expires_at"):
        assert answer.pop(time).endswith("Z")
    assert answer.pop("ref").startswith("ctx_plan_")
    assert answer.pop("event_id")
    assert ":" in answer.pop("position")
    assert answer == {
        "key": "k",
        "version": 1,
        "op": "put",
        "tags": ["x", "y"],
        "session_id": "s",
        "agent_id": "planner",
        "changed_by": "ann",
        "change_type": "first draft",
        "content_type": "application/json",
        "body": {"a": 1},
    }
    bare = await plain.call("get", key="k", body=False)
    assert "body" not in bare
    assert bare["version"] == 1


async def test_exact_text_text_and_bytes_come_back_as_they_were_put(plain: Plain) -> None:
    raw = b'{"key": "exact", "body": {"z":1,  "a": 1.50} }'
    await plain.client.request(f"ctx.{plain.namespace}.key.put", raw, timeout=20)
    reply = await plain.client.request(f"ctx.{plain.namespace}.key.get", b'{"key": "exact"}', timeout=20)
    assert b'{"z":1,  "a": 1.50}' in reply.data
    await plain.call("put", key="text", body_text="naïve")
    assert (await plain.call("get", key="text"))["body_text"] == "naïve"
    await plain.call("put", key="bytes", body_base64=base64.b64encode(b"\x89PNG").decode(), content_type="image/png")
    answer = await plain.call("get", key="bytes")
    assert (base64.b64decode(answer["body_base64"]), answer["content_type"]) == (b"\x89PNG", "image/png")


async def test_E03_versions_are_read_by_number_and_by_time_hot_and_cold(plain: Plain, control: Connection) -> None:
    for n in range(1, 6):
        await plain.call("put", key="v", body={"n": n})
    stored = [item["stored_at"] for item in reversed((await plain.call("history", key="v"))["versions"])]
    for _ in range(2):
        for n in range(1, 6):
            assert await plain.body("v", version=n) == {"n": n}
        newest_at = {at: n for n, at in enumerate(stored, 1)}
        for at, n in newest_at.items():
            assert await plain.body("v", as_of=at) == {"n": n}
        assert (await plain.error("get", {"key": "v", "version": 6}))["code"] == "not_found"
        assert (await plain.error("get", {"key": "v", "as_of": "2020-01-01T00:00:00Z"}))["code"] == "not_found"
        await flush(control)
        await evict(control, 0.0)


async def test_what_the_lake_holds_is_told_apart(plain: Plain, control: Connection) -> None:
    """The SDK asks so when it has looked in the hot tier itself."""
    await plain.call("put", key="c", body=1, changed_by="ann")
    await plain.call("delete", key="c")
    cold = {"key": "c", "cold": True, "body": False}
    assert (await plain.error("get", cold))["code"] == "not_found"
    assert await plain.call("history", key="c", cold=True) == {"versions": [], "next": None}
    await flush(control)
    assert (await plain.call("get", **cold))["op"] == "delete"
    archived = await plain.call("get", **cold, version=1)
    assert (archived["op"], archived["changed_by"]) == ("put", "ann")
    assert archived["epoch"]
    assert archived["seq"] > 0
    assert await plain.versions("c", cold=True) == [2, 1]
    assert await plain.versions("c", cold=True, before=2) == [1]
    refused = await plain.error("get", {"key": "c", "cold": True})
    assert refused["field"] == "body"


async def test_a_body_that_does_not_fit_an_answer_is_refused_and_its_version_told(plain: Plain, url: str) -> None:
    async with connect(url, plain.namespace) as hf:
        await hf.keys.put("large", "x" * (limits.REPLY_BYTES + 1))
    error = await plain.error("get", {"key": "large"})
    assert (error["code"], error["limit"]) == ("too_large", limits.REPLY_BYTES)
    assert "SDK" in error["hint"]
    assert (await plain.call("get", key="large", body=False))["version"] == 1


# Writes


async def test_E31_a_key_expires_and_a_policy_can_be_overruled(plain: Plain, url: str) -> None:
    async with connect(url, plain.namespace) as hf:
        await hf.keys.set_policy("short.", KeyPolicy(ttl_s=3600))
    assert "expires_at" in await plain.call("put", key="short.a", body=1)
    assert "expires_at" not in await plain.call("put", key="short.b", body=1, ttl="never")
    await plain.call("put", key="gone", body=1, ttl=0.001)
    async with asyncio.timeout(20):
        while True:
            reply = await plain.client.request(f"ctx.{plain.namespace}.key.get", b'{"key": "gone"}', timeout=20)
            if b'"not_found"' in reply.data:
                break
    # What has expired is no obstacle to "there must be none".
    await plain.call("put", key="gone", body=2, expected_version=0)
    assert await plain.body("gone") == 2


async def test_E37_append_goes_to_a_list_that_may_not_be_there_yet(plain: Plain) -> None:
    for n in range(2):
        await plain.call("append", key="chat", item={"n": n})
    appended = await plain.call("append", key="chat", item={"n": 2}, change_type="append", tags=["t"])
    assert (appended["version"], appended["change_type"], appended["tags"]) == (3, "append", ["t"])
    assert await plain.body("chat") == [{"n": 0}, {"n": 1}, {"n": 2}]
    await plain.call("put", key="object", body={})
    assert (await plain.error("append", {"key": "object", "item": 1}))["code"] == "invalid_body"


async def test_patches_of_many_callers_all_survive(plain: Plain) -> None:
    await asyncio.gather(*(plain.call("patch", key="shared", merge={f"f{n}": n}) for n in range(40)))
    assert await plain.body("shared") == {f"f{n}": n for n in range(40)}
    assert await plain.versions("shared") == list(range(40, 0, -1))
    await plain.call("patch", key="shared", merge={"f0": None, "f1": {"deep": {"a": 1}}})
    await plain.call("patch", key="shared", merge={"f1": {"deep": {"b": 2}}})
    body = await plain.body("shared")
    assert "f0" not in body
    assert body["f1"] == {"deep": {"a": 1, "b": 2}}


async def test_E03_rollback_and_diff(plain: Plain) -> None:
    await plain.call("put", key="r", body={"a": 1, "b": [1, 2]})
    await plain.call("put", key="r", body={"a": 2, "b": [1, 2, 3]})
    difference = await plain.call("diff", key="r", v1=1, v2=2)
    assert {(step["op"], step["path"]) for step in difference["operations"]} == {("replace", "/a"), ("add", "/b/2")}
    back = await plain.call("rollback", key="r", version=1, changed_by="ann")
    assert (back["version"], back["op"], back["changed_by"]) == (3, "rollback", "ann")
    assert await plain.body("r") == {"a": 1, "b": [1, 2]}
    assert (await plain.call("diff", key="r", v1=1, v2=3))["operations"] == []
    assert (await plain.error("rollback", {"key": "r", "version": 9}))["code"] == "not_found"


async def test_E14_a_commit_writes_all_keys_or_none(plain: Plain) -> None:
    await plain.call("put", key="b", body="old")
    written = await plain.call(
        "commit", bodies={"a": {"n": 1}, "c": [1]}, deletes=["b"], expected={"a": 0, "b": 1}, tags=["batch"]
    )
    assert {key: item["version"] for key, item in written["versions"].items()} == {"a": 1, "b": 2, "c": 1}
    assert (await plain.call("get", key="a"))["tags"] == ["batch"]
    assert (await plain.error("get", {"key": "b"}))["code"] == "not_found"
    conflict = await plain.error("commit", {"bodies": {"a": 2, "d": 1}, "expected": {"a": 7}})
    assert conflict["code"] == "version_conflict"
    assert conflict["details"] == {"key": "a", "expected": 7, "actual": 1}
    assert await plain.body("a") == {"n": 1}
    assert (await plain.error("get", {"key": "d"}))["code"] == "not_found"


async def test_a_conflict_names_both_versions_in_every_write(plain: Plain) -> None:
    await plain.call("put", key="w", body={"a": 1})
    writes: list[tuple[str, Answer]] = [
        ("put", {"body": 1}), ("patch", {"merge": {}}), ("append", {"item": 1}), ("delete", {}),
        ("rollback", {"version": 1}),
    ]  # fmt: skip
    for endpoint, members in writes:
        error = await plain.error(endpoint, {"key": "w", "expected_version": 5, **members})
        assert error["code"] == "version_conflict", endpoint
        assert error["details"] == {"key": "w", "expected": 5, "actual": 1}
        assert error["field"] == "expected_version"
    assert (await plain.error("put", {"key": "w", "body": 1, "expected_version": 0}))["details"]["actual"] == 1
    assert await plain.versions("w") == [1]


async def test_E01_what_one_writes_the_other_reads_at_once(plain: Plain, url: str) -> None:
    async with connect(url, plain.namespace, agent="sdk") as hf:
        for n in range(1, 6):
            await plain.call("put", key="both", body={"n": 2 * n - 1})
            assert (await hf.keys.get("both")).body == {"n": 2 * n - 1}
            await hf.keys.put("both", {"n": 2 * n})
            assert await plain.body("both") == {"n": 2 * n}
    assert await plain.versions("both") == list(range(10, 0, -1))


# history and list


async def test_history_goes_on_from_page_to_page_hot_and_cold(plain: Plain, control: Connection) -> None:
    for n in range(1, 8):
        await plain.call("put", key="h", body=n)
    for _ in range(2):
        seen: list[int] = []
        request: Answer = {"key": "h", "limit": 3}
        while True:
            answer = await plain.call("history", **request)
            seen += [item["version"] for item in answer["versions"]]
            if answer["next"] is None:
                break
            request["before"] = answer["next"]
        assert seen == [7, 6, 5, 4, 3, 2, 1]
        assert await plain.versions("h", before=3) == [2, 1]
        await flush(control)
    assert (await plain.call("history", key="nobody")) == {"versions": [], "next": None}


async def test_E29_E30_E34_list_selects_and_pages_in_order_of_key(plain: Plain) -> None:
    for n in range(7):
        await plain.call(
            "put", key=f"p.{n}", body=n, tags=["even"] if n % 2 == 0 else ["odd", "t"],
            session_id=f"s{n % 3}", agent_id=f"a{n}",
        )  # fmt: skip
    await plain.call("put", key="q.0", body=1)
    await plain.call("delete", key="p.6")

    async def keys(**conditions: object) -> list[str]:
        found: list[str] = []
        cursor: str | None = None
        while True:
            more = {} if cursor is None else {"cursor": cursor}
            answer = await plain.call("list", **conditions, **more)
            found += [item["key"] for item in answer["keys"]]
            cursor = answer["cursor"]
            if cursor is None:
                return found

    assert await keys() == ["p.0", "p.1", "p.2", "p.3", "p.4", "p.5", "q.0"]
    assert await keys(prefix="p.", limit=2) == ["p.0", "p.1", "p.2", "p.3", "p.4", "p.5"]
    assert await keys(tags=["odd"]) == ["p.1", "p.3", "p.5"]
    assert await keys(tags=["odd", "t"], limit=1) == ["p.1", "p.3", "p.5"]
    assert await keys(tags=["odd", "even"]) == []
    assert await keys(session_id="s1") == ["p.1", "p.4"]
    assert await keys(agent_id="a3") == ["p.3"]
    assert await keys(prefix="p.3") == ["p.3"]
    assert await keys(prefix="nobody") == []


async def test_answers_stop_before_the_limit_and_say_how_to_go_on(plain: Plain) -> None:
    tags = [f"{n:03}" + "t" * (limits.ID_CHARS - 3) for n in range(limits.TAGS)]  # 16 KB a version
    for n in range(70):
        await plain.call("put", key=f"wide.{n:03}", body=n, tags=tags)
    first = await plain.call("list", prefix="wide.", limit=1000)
    assert 0 < len(first["keys"]) < 70
    rest = await plain.call("list", prefix="wide.", limit=1000, cursor=first["cursor"])
    assert [item["key"] for item in first["keys"] + rest["keys"]] == [f"wide.{n:03}" for n in range(70)]
    assert rest["cursor"] is None
    for _ in range(70):
        await plain.call("patch", key="tall", merge={}, tags=tags)
    newest = await plain.call("history", key="tall", limit=1000)
    assert 0 < len(newest["versions"]) < 70
    older = await plain.call("history", key="tall", limit=1000, before=newest["next"])
    assert [item["version"] for item in newest["versions"] + older["versions"]] == list(range(70, 0, -1))


async def test_E05_a_conversation_that_grows_is_read_whole_hot_and_cold(plain: Plain, control: Connection) -> None:
    """It is stored in parts that its versions share: a reader without the SDK sees bodies and nothing of that."""
    turns = [{"n": n, "content": f"turn {n} " * 40} for n in range(30)]
    for turn in turns:
        await plain.call("append", key="talk", item=turn)
    for _ in range(2):
        assert await plain.body("talk") == turns
        assert await plain.body("talk", version=17) == turns[:17]
        await flush(control)
        await evict(control, 0.0)


async def test_namespaces_by_the_dozen_keep_apart(url: str, namespace: str) -> None:
    async with plain_client(url) as client:
        callers = [Plain(client, f"{namespace}-{n}") for n in range(30)]
        for change in range(3):
            await asyncio.gather(
                *(caller.call("patch", key="k", merge={f"{change}": n}) for n, caller in enumerate(callers))
            )
        bodies = await asyncio.gather(*(caller.body("k") for caller in callers))
        assert bodies == [{"0": n, "1": n, "2": n} for n in range(30)]


async def test_any_name_is_a_key_and_no_name_leaves_the_namespace(plain: Plain) -> None:
    names = ["a", "a.b", "a b", "*", ">", "a.>", "$KV", "é.ü", "x--", "\u0000", "a..b", ".", "/etc/passwd", "'; --"]
    for n, name in enumerate(names):
        await plain.call("put", key=name, body=n)
    for n, name in enumerate(names):
        assert await plain.body(name) == n
    listed = (await plain.call("list"))["keys"]
    assert sorted(item["key"] for item in listed) == sorted(names)
    elsewhere = Plain(plain.client, plain.namespace + "x")
    assert (await elsewhere.call("list"))["keys"] == []
    assert (await elsewhere.error("get", {"key": "a"}))["code"] == "not_found"


async def test_E32_a_sealed_body_is_told_as_it_is_stored(plain: Plain, url: str) -> None:
    secret = {"secret": "canary-5d1f"}
    ring = KeyRing.of({"k1": bytes(range(32))}, "k1")
    async with connect(url, plain.namespace, key_ring=ring) as hf:
        await hf.keys.set_policy("safe.", KeyPolicy(encrypt=True))
        await hf.keys.put("sealed", secret, encrypt=True)
        assert (await hf.keys.get("sealed")).body == secret
    answer = await plain.call("get", key="sealed")
    assert answer["content_type"] == "application/vnd.holdfast.sealed"
    sealed = base64.b64decode(answer["body_base64"])
    assert sealed[:3] == b"HFE"
    assert b"canary" not in sealed
    # Without a key nothing can be changed in it, and where a policy wants encryption nothing is stored plain.
    reply = await plain.client.request(
        f"ctx.{plain.namespace}.key.patch", b'{"key": "sealed", "merge": {}}', timeout=20
    )
    assert json.loads(reply.data)["error"]["code"] == "encryption_key"
    reply = await plain.client.request(f"ctx.{plain.namespace}.key.put", b'{"key": "safe.a", "body": 1}', timeout=20)
    assert json.loads(reply.data)["error"]["code"] == "encryption_key"
    assert (await plain.error("get", {"key": "safe.a"}))["code"] == "not_found"
    # What the caller has sealed by itself is stored as it is.
    envelope = {"body_base64": answer["body_base64"], "content_type": answer["content_type"]}
    await plain.call("put", key="safe.a", **envelope)
    async with connect(url, plain.namespace, key_ring=ring) as hf:
        assert (await hf.keys.get("safe.a")).body == secret
    forged = envelope | {"key": "safe.b", "body_base64": base64.b64encode(b'{"plain": 1}').decode()}
    assert (await plain.error("put", forged))["code"] == "invalid_body"


# Bad input


@pytest.mark.parametrize(
    ("endpoint", "request_", "code", "field"),
    [
        ("get", {}, "invalid_field", "key"),
        ("get", {"key": ""}, "invalid_name", "key"),
        ("get", {"key": 1}, "invalid_field", "key"),
        ("get", {"key": "k" * 769}, "invalid_field", "key"),
        ("get", {"key": "é" * 768}, "invalid_name", "key"),
        ("get", {"key": ".".join("a" * 33)}, "invalid_name", "key"),
        ("get", {"key": "k", "version": 0}, "invalid_field", "version"),
        ("get", {"key": "k", "version": "1"}, "invalid_field", "version"),
        ("get", {"key": "k", "version": 1, "as_of": 1}, "invalid_field", "as_of"),
        ("get", {"key": "k", "as_of": "yesterday"}, "invalid_field", "as_of"),
        ("get", {"key": "k", "as_of": 10**18}, "invalid_field", "as_of"),
        ("get", {"key": "k", "as_of": -1}, "invalid_field", "as_of"),
        ("get", {"key": "k", "surplus": 1}, "invalid_field", "surplus"),
        ("get", {"key": "nobody"}, "not_found", "key"),
        ("get", b"{", "invalid_field", "request"),
        ("get", b"\xff", "invalid_field", "request"),
        ("get", b'"text"', "invalid_field", "request"),
        ("put", {"key": "k"}, "invalid_field", "body"),
        ("put", {"key": "k", "body": 1, "body_text": "x"}, "invalid_field", "body"),
        ("put", {"key": "k", "body_base64": "***"}, "invalid_field", "body_base64"),
        ("put", {"key": "k", "body": 1, "kind": "a b"}, "invalid_name", "kind"),
        ("put", {"key": "k", "body": 1, "content_type": "a\nb"}, "invalid_field", "content_type"),
        ("put", {"key": "k", "body": 1, "expected_version": -1}, "invalid_field", "expected_version"),
        ("put", {"key": "k", "body": 1, "tags": ["t"] * 65}, "invalid_field", "tags"),
        ("put", {"key": "k", "body": 1, "tags": [""]}, "invalid_field", "tags[0]"),
        ("put", {"key": "k", "body": 1, "session_id": "s" * 257}, "invalid_field", "session_id"),
        ("put", {"key": "k", "body": 1, "agent_id": ""}, "invalid_field", "agent_id"),
        ("put", {"key": "k", "body": 1, "ttl": 0}, "invalid_field", "ttl"),
        ("put", {"key": "k", "body": 1, "ttl": limits.TTL_S + 1}, "invalid_field", "ttl"),
        ("put", {"key": "k", "body": 1, "ttl": "soon"}, "invalid_field", "ttl"),
        ("put", b'{"key": "k", "body": ' + b"[" * 65 + b"]" * 65 + b"}", "invalid_field", "body"),
        ("patch", {"key": "k"}, "invalid_field", "merge"),
        ("patch", {"key": "k", "merge": [1]}, "invalid_field", "merge"),
        ("patch", b'{"key": "k", "merge": {"a": ' + b"[" * 65 + b"]" * 65 + b"}}", "invalid_field", "merge"),
        ("append", {"key": "k"}, "invalid_field", "item"),
        ("delete", {"key": "nobody"}, "not_found", "key"),
        ("rollback", {"key": "nobody", "version": 1}, "not_found", "version"),
        ("rollback", {"key": "k"}, "invalid_field", "version"),
        ("diff", {"key": "nobody", "v1": 1, "v2": 2}, "not_found", "version"),
        ("history", {"key": "k", "limit": 0}, "invalid_field", "limit"),
        ("history", {"key": "k", "limit": 1001}, "invalid_field", "limit"),
        ("history", {"key": "k", "before": 0}, "invalid_field", "before"),
        ("history", {"key": ""}, "invalid_name", "key"),
        ("list", {"limit": 0}, "invalid_field", "limit"),
        ("list", {"prefix": 1}, "invalid_field", "prefix"),
        ("list", {"prefix": "p" * 769}, "invalid_field", "prefix"),
        ("list", {"tags": "t"}, "invalid_field", "tags"),
        ("commit", {}, "invalid_field", "bodies"),
        ("commit", {"bodies": {"": 1}}, "invalid_name", "key"),
        ("commit", {"bodies": {"a": 1}, "deletes": ["a"]}, "invalid_field", "deletes"),
        ("commit", {"bodies": {str(n): n for n in range(limits.COMMIT_KEYS + 1)}}, "too_large", "bodies"),
        ("commit", {"bodies": {"a": 1}, "expected": {"b": 1}}, "invalid_field", "expected"),
    ],
)
async def test_an_error_names_code_and_field(
    plain: Plain, endpoint: str, request_: object, code: str, field: str
) -> None:
    error = await plain.error(endpoint, request_)
    assert (error["code"], error.get("field")) == (code, field)


async def test_junk_kills_nothing(plain: Plain) -> None:
    await plain.call("put", key="alive", body={"n": 1})
    generator = random.Random(20_260_131)
    names = ("get", "put", "patch", "history", "list", "delete", "append", "rollback", "diff", "commit")
    members = (
        "key", "version", "as_of", "body", "body_text", "merge", "item", "expected_version", "tags", "ttl", "prefix",
        "cursor", "limit", "before", "bodies", "deletes", "expected", "cold", "v1", "v2", "kind", "session_id",
    )  # fmt: skip
    values: tuple[Any, ...] = (
        None, True, -1, 0, 1, 2**63, 10**400, 1.5, "", "x", "alive", "\ud800", "*", [], ["x"], {}, {"x": None},
        {"alive": 0}, "9" * 5_000, [[[[1]]]],
    )  # fmt: skip
    for _ in range(300):
        request = {name: generator.choice(values) for name in generator.sample(members, generator.randint(0, 6))}
        raw = bytearray(json.dumps(request).encode())
        if raw and generator.random() < 0.3:
            raw[generator.randrange(len(raw))] = generator.randrange(256)
        name = generator.choice(names)
        reply = await plain.client.request(f"ctx.{plain.namespace}.key.{name}", bytes(raw), timeout=20)
        if reply.headers and "Nats-Service-Error-Code" in reply.headers:
            # Refused for a reason: not an error of the resolver's own.
            error = json.loads(reply.data)["error"]
            assert int(reply.headers["Nats-Service-Error-Code"]) < 500, (name, bytes(raw), error)
    await plain.call("put", key="alive", body={"n": 2})
    assert await plain.body("alive") == {"n": 2}
