"""The resolver's contracts, as a plain nats-py client meets them."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import pytest_asyncio

from holdfast.client import connect
from holdfast.schemas import limits
from holdfast.schemas.ids import MAX_MS, new_event_id
from holdfast.streams.connection import Connection, open_connection
from holdfast.workers.control import evict, flush
from tests.running import own_server, put_version, running, settings_in, target_of
from tests.support import plain_client

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

pytestmark = pytest.mark.asyncio(loop_scope="module")

Answer = dict[str, Any]


class Plain:
    """A service caller without any of our code: subjects and JSON."""

    def __init__(self, client: Client, namespace: str) -> None:
        self.client = client
        self.namespace = namespace

    async def call(self, endpoint: str, request: object) -> Answer:
        raw = request if isinstance(request, bytes) else json.dumps(request).encode()
        reply = await self.client.request(f"ctx.{self.namespace}.{endpoint}", raw, timeout=20)
        assert not reply.headers or "Nats-Service-Error-Code" not in reply.headers, reply.data
        answer: Answer = json.loads(reply.data)
        return answer

    async def refused(self, endpoint: str, request: object) -> tuple[str, str | None, Any]:
        """Calls what must be refused; returns (code, field, limit) of the error."""
        raw = request if isinstance(request, bytes) else json.dumps(request).encode()
        reply = await self.client.request(f"ctx.{self.namespace}.{endpoint}", raw, timeout=20)
        assert reply.headers is not None
        assert 400 <= int(reply.headers["Nats-Service-Error-Code"]) < 600
        assert reply.headers["Nats-Service-Error"]
        error = json.loads(reply.data)["error"]
        assert error["message"]
        return error["code"], error.get("field"), error.get("limit")

    async def emit(self, path: str, message: object, headers: dict[str, str] | None = None) -> None:
        raw = message if isinstance(message, bytes) else json.dumps(message).encode()
        ack = await self.client.jetstream().publish(f"ctx.{self.namespace}.event.{path}", raw, headers=headers)
        assert ack.stream == "CTX_EVENTS"

    async def put(self, body: object, kind: str = "note") -> str:
        return str((await self.call("put", {"kind": kind, "body": body}))["ref"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[str]:
    """A system that archives when it is told to."""
    data: Path = tmp_path_factory.mktemp("resolver")
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


async def make_cold(control: Connection) -> None:
    await flush(control)
    assert (await evict(control, 0.0)).left == 0


# The script of "Done when": what a user without the SDK does.


async def test_B07_B15_B69_a_plain_client_publishes_an_inline_context_finds_it_and_gets_its_body(url: str) -> None:
    async with plain_client(url) as nc:
        body = {"goal": "book a flight", "steps": [1, 2.50, None, "é"]}
        await nc.jetstream().publish(
            "ctx.default.event.agent7.status",
            json.dumps({"session_id": "plain-script", "context": body, "data": {"state": "ready"}}).encode(),
        )
        found = await nc.request("ctx.default.query", b'{"session_id": "plain-script"}', timeout=20)
        [event] = json.loads(found.data)["events"]
        assert (event["agent_id"], event["name"], event["data"]) == ("agent7", "status", {"state": "ready"})
        resolved = await nc.request(
            "ctx.default.resolve", json.dumps({"ref": event["context_ref"]}).encode(), timeout=20
        )
        answer = json.loads(resolved.data)
        assert answer["body"] == body
        assert set(answer) >= {"ref", "kind", "body", "size", "created_at", "tier"}
        info = await nc.request("$SRV.INFO.holdfast", b"", timeout=20)
        assert json.loads(info.data)["name"] == "holdfast"


async def test_B07_the_service_is_discoverable(plain: Plain) -> None:
    for verb in ("PING", "INFO", "STATS"):
        reply = await plain.client.request(f"$SRV.{verb}.holdfast", b"", timeout=20)
        answer = json.loads(reply.data)
        assert answer["name"] == "holdfast"
        if verb == "INFO":
            subjects = {endpoint["name"]: endpoint["subject"] for endpoint in answer["endpoints"]}
            expected = {"resolve", "resolve_batch", "put", "query", "stats", "health"}
            assert expected <= set(subjects)
            assert all(subjects[name] == f"ctx.*.{name}" for name in expected)


# resolve and put


@pytest.mark.parametrize("is_cold", [False, True])
async def test_B26_put_and_resolve_have_the_stated_fields(plain: Plain, control: Connection, is_cold: bool) -> None:
    ref = await plain.put({"b": 1, "a": [1.50, "ü"]}, kind="completion")
    if is_cold:
        await make_cold(control)
    answer = await plain.call("resolve", {"ref": ref})
    assert answer.pop("created_at").endswith("Z")
    assert answer == {
        "ref": ref,
        "kind": "completion",
        "body": {"b": 1, "a": [1.5, "ü"]},
        "size": len(json.dumps({"b": 1, "a": [1.50, "ü"]})),
        "tier": "lake" if is_cold else "hot",
        "content_type": "application/json",
    }


async def test_a_body_is_stored_as_its_exact_text(plain: Plain) -> None:
    ref = (await plain.call("put", b'{"kind": "note", "body": {"z":1,  "a": 1.50} }'))["ref"]
    reply = await plain.client.request(f"ctx.{plain.namespace}.resolve", json.dumps({"ref": ref}).encode(), timeout=20)
    assert b'{"z":1,  "a": 1.50}' in reply.data


async def test_text_and_bytes_come_back_as_they_were_put(plain: Plain, control: Connection) -> None:
    raw = bytes(range(256))
    text = (await plain.call("put", {"body_text": "naïve"}))["ref"]
    binary = (await plain.call("put", {"body_base64": base64.b64encode(raw).decode()}))["ref"]
    typed = (
        await plain.call("put", {"body_base64": base64.b64encode(b"\x89PNG").decode(), "content_type": "image/png"})
    )["ref"]
    for _ in range(2):
        assert (await plain.call("resolve", {"ref": text}))["body_text"] == "naïve"
        answer = await plain.call("resolve", {"ref": binary})
        assert base64.b64decode(answer["body_base64"]) == raw
        assert (await plain.call("resolve", {"ref": typed}))["content_type"] == "image/png"
        await make_cold(control)


async def test_B52_put_of_an_equal_context_gives_the_same_reference(plain: Plain) -> None:
    assert await plain.put({"a": 1}) == await plain.put({"a": 1})
    assert await plain.put({"a": 1}) != await plain.put({"a": 1}, kind="other")


async def test_sdk_and_service_agree_on_references(plain: Plain, url: str) -> None:
    async with connect(url, plain.namespace) as hf:
        ref = await hf.put({"a": 1, "b": [True]}, kind="note")
    assert (await plain.call("put", b'{"kind": "note", "body": {"a":1,"b":[true]}}'))["ref"] == ref


async def test_B26_B27_fields_limit_the_answer(plain: Plain) -> None:
    ref = await plain.put({"long": "x" * 1000})
    assert set(await plain.call("resolve", {"ref": ref, "fields": ["ref", "size"]})) == {"ref", "size"}
    batch = await plain.call("resolve_batch", {"refs": [ref], "fields": ["kind"]})
    assert batch["contexts"] == {ref: {"kind": "note"}}


async def test_an_expired_context_is_not_found(plain: Plain) -> None:
    gone = (await plain.call("put", {"body": 1, "expires_at": "2020-01-01T00:00:00Z"}))["ref"]
    kept = (await plain.call("put", {"body": 1, "expires_at": "2120-01-01T00:00:00Z"}))["ref"]
    assert await plain.refused("resolve", {"ref": gone}) == ("not_found", "ref", None)
    answer = await plain.call("resolve", {"ref": kept})
    assert answer["expires_at"] == "2120-01-01T00:00:00.000Z"
    assert (await plain.call("resolve_batch", {"refs": [gone, kept]}))["not_found"] == [gone]


async def test_another_namespace_sees_nothing(plain: Plain, control: Connection) -> None:
    ref = await plain.put({"secret": 1})
    other = Plain(plain.client, "elsewhere")
    for _ in range(2):
        assert (await other.refused("resolve", {"ref": ref}))[0] == "not_found"
        assert (await other.call("resolve_batch", {"refs": [ref]}))["not_found"] == [ref]
        await make_cold(control)


async def test_a_large_body_is_refused_by_resolve_with_the_limit_and_the_way_out(plain: Plain, url: str) -> None:
    async with connect(url, plain.namespace) as hf:
        large = await hf.put("x" * (limits.REPLY_BYTES + 1))
        middling = await hf.put("y" * (limits.CHUNK_BYTES + 1))
    assert await plain.refused("resolve", {"ref": large}) == ("too_large", "body", limits.REPLY_BYTES)
    batch = await plain.call("resolve_batch", {"refs": [large, middling]})
    assert batch["errors"][large]["code"] == "too_large"
    assert len(batch["contexts"][middling]["body_text"]) == limits.CHUNK_BYTES + 1
    # What it is can be told without the body.
    answer = await plain.call("resolve", {"ref": large, "fields": ["kind", "size"]})
    assert answer == {"kind": "context", "size": limits.REPLY_BYTES + 1}


# resolve_batch


@pytest.mark.parametrize("is_cold", [False, True])
async def test_B27_B94_a_batch_of_a_thousand_tells_found_from_missing(plain: Plain, url: str, is_cold: bool) -> None:
    async with connect(url, plain.namespace) as hf:
        refs = await hf.put_many([{"n": n} for n in range(990)])
        if is_cold:
            await make_cold(hf.connection)
    unknown = [f"ctx_note_{'a' * 31}{letter}" for letter in "abcdefghij"]
    answer = await plain.call("resolve_batch", {"refs": [*unknown, *refs]})
    assert (answer["resolved_count"], answer["not_found"]) == (990, unknown)
    assert {ref: context["body"] for ref, context in answer["contexts"].items()} == {
        ref: {"n": n} for n, ref in enumerate(refs)
    }
    assert {context["tier"] for context in answer["contexts"].values()} == {"lake" if is_cold else "hot"}
    assert await plain.refused("resolve_batch", {"refs": [*unknown, *refs, refs[0]]}) == (
        "invalid_field",
        "refs",
        limits.BATCH_REFS,
    )


async def test_a_batch_over_the_limit_of_a_reply_is_continued_by_next(plain: Plain, url: str) -> None:
    async with connect(url, plain.namespace) as hf:
        refs: list[str] = list(await hf.put_many([f"{n}" * 100_000 for n in range(30, 60)]))
    left, seen, rounds = refs, dict[str, Any](), 0
    while left:
        answer = await plain.call("resolve_batch", {"refs": left})
        assert len(json.dumps(answer)) <= limits.REPLY_BYTES + 1_000
        assert answer["not_found"] == []
        seen |= answer["contexts"]
        left = answer.get("next", [])
        rounds += 1
    assert list(seen) == refs
    assert rounds > 5


async def test_a_batch_makes_progress_whatever_is_first_in_it(plain: Plain, url: str) -> None:
    """A context as large as an answer may be: it goes, and the rest is named."""
    async with connect(url, plain.namespace) as hf:
        small = await hf.put("y")
        probe = await hf.put("x" * 100_001)
        reply = await plain.client.request(f"ctx.{plain.namespace}.resolve", json.dumps({"ref": probe}).encode())
        frame = len(reply.data) - 100_001
        largest = await hf.put("x" * (limits.REPLY_BYTES - frame))
    left: list[str] = [largest, small]
    rounds = 0
    while left:
        answer = await plain.call("resolve_batch", {"refs": left})
        assert len(answer["contexts"]) > 0
        left = answer.get("next", [])
        rounds += 1
    assert rounds == 2


async def test_what_was_asked_for_before_is_answered_the_same(plain: Plain) -> None:
    refs = [await plain.put({"n": n}) for n in range(3)]
    request = json.dumps({"refs": refs}).encode()
    batches = {(await plain.client.request(f"ctx.{plain.namespace}.resolve_batch", request)).data for _ in range(3)}
    assert len(batches) == 1
    first = await plain.call("resolve", {"ref": refs[0]})
    assert await plain.call("resolve", {"ref": refs[0]}) == first
    assert json.loads(batches.pop())["contexts"][refs[0]] == first
    # Known and new ones in one request.
    refs.insert(1, await plain.put({"n": 9}))
    assert [item["body"]["n"] for item in (await plain.call("resolve_batch", {"refs": refs}))["contexts"].values()] == [
        0, 9, 1, 2,
    ]  # fmt: skip
    # What is refused is refused also for a context that is at hand.
    assert (await plain.refused("resolve", {"ref": refs[0], "fields": ["nothing"]}))[1] == "fields"
    assert (await Plain(plain.client, "elsewhere").refused("resolve", {"ref": refs[0]}))[0] == "not_found"
    assert (await plain.refused("resolve", {"ref": refs[0].replace("ctx_note_", "ctx_plan_")}))[0] == "not_found"


async def test_msgpack_is_answered_to_who_asks_for_it(plain: Plain) -> None:
    raw = bytes(range(256))
    refs = [
        await plain.put({"a": 1.50}),
        (await plain.call("put", {"body_base64": base64.b64encode(raw).decode()}))["ref"],
    ]
    unknown = f"ctx_note_{'a' * 32}"

    async def ask(endpoint: str, request: object, accept: str = "text/plain, application/msgpack;q=1") -> Msg:
        return await plain.client.request(
            f"ctx.{plain.namespace}.{endpoint}", json.dumps(request).encode(), timeout=20, headers={"Accept": accept}
        )

    for _ in range(2):
        reply = await ask("resolve_batch", {"refs": [*refs, unknown]})
        assert (reply.headers or {})["Content-Type"] == "application/msgpack"
        answer = msgspec.msgpack.decode(reply.data)
        assert [answer["contexts"][ref]["body"] for ref in refs] == [b'{"a": 1.5}', raw]
        assert (answer["resolved_count"], answer["not_found"]) == (2, [unknown])
        reply = await ask("resolve", {"ref": refs[1]})
        assert msgspec.msgpack.decode(reply.data) == answer["contexts"][refs[1]]
        assert json.loads((await ask("resolve", {"ref": refs[0]}, "application/json")).data)["body"] == {"a": 1.5}
    chosen = await ask("resolve", {"ref": refs[0], "fields": ["kind", "body", "body_text"]})
    assert msgspec.msgpack.decode(chosen.data) == {"kind": "note", "body": b'{"a": 1.5}'}
    refused = await ask("resolve", {"ref": unknown})
    assert json.loads(refused.data)["error"]["code"] == "not_found"


# query


async def test_B28_query_answers_with_the_stated_fields(plain: Plain) -> None:
    parent, child = new_event_id(), new_event_id()
    await plain.emit("a.start", {"id": parent, "session_id": "s", "timestamp": "2026-01-31T09:30:00.125Z"})
    await plain.emit(
        "b.step.done",
        {
            "id": child,
            "session_id": "s",
            "correlation_id": "c",
            "parent_event_id": parent,
            "root_event_id": parent,
            "event_depth": 1,
            "client_id": "cl",
            "originator": "o",
            "context": {"x": 1},
            "context_kind": "plan",
            "data": {"y": 2},
            "unknown": [3],
        },
    )
    answer = await plain.call("query", {"session_id": "s"})
    first, second = answer["events"]
    assert (first["event_id"], first["timestamp"], first["event_depth"]) == (parent, "2026-01-31T09:30:00.125Z", 0)
    assert second.pop("stored_at")
    assert second.pop("timestamp")
    ref = second.pop("context_ref")
    assert ref.startswith("ctx_plan_")
    assert second == {
        "event_id": child,
        "name": "step:done",
        "namespace": plain.namespace,
        "agent_id": "b",
        "session_id": "s",
        "correlation_id": "c",
        "parent_event_id": parent,
        "root_event_id": parent,
        "event_depth": 1,
        "client_id": "cl",
        "originator": "o",
        "data": {"y": 2},
        "extra": {"unknown": [3]},
    }
    assert (await plain.call("resolve", {"ref": ref}))["body"] == {"x": 1}


@pytest.mark.parametrize("is_cold", [False, True])
async def test_B28_each_condition_selects_and_all_must_hold(plain: Plain, control: Connection, is_cold: bool) -> None:
    chosen = new_event_id()
    await plain.emit("a.x", {"session_id": "s1", "correlation_id": "c1", "id": chosen, "context": 1})
    await plain.emit("a.y", {"session_id": "s2", "correlation_id": "c1", "context": 2, "context_kind": "plan"})
    await plain.emit("b.x", {"session_id": "s1", "id": "my own id"})
    if is_cold:
        await flush(control)

    async def count(**conditions: object) -> int:
        return len((await plain.call("query", conditions))["events"])

    assert await count() == 3
    assert await count(session_id="s1") == 2
    assert await count(correlation_id="c1") == 2
    assert await count(agent_id="a") == 2
    assert await count(name="x") == 2
    assert await count(kind="plan") == 1
    assert await count(kind="pla") == 0
    assert await count(event_id=chosen) == 1
    assert await count(event_id="my own id") == 1
    assert await count(agent_id="a", name="x", session_id="s1") == 1
    assert await count(agent_id="b", correlation_id="c1") == 0
    assert await count(session_id="' OR 1=1 --") == 0
    assert await count(since="2100-01-01T00:00:00Z") == 0
    assert await count(until="2100-01-01T00:00:00Z") == 3
    [event] = (await plain.call("query", {"event_id": chosen}))["events"]
    assert await count(since=event["stored_at"]) == 3
    assert await count(until=event["stored_at"]) == 0


async def test_B28_query_has_a_default_limit_and_a_cursor(plain: Plain) -> None:
    for n in range(25):
        await plain.emit("a.x", {"data": n})
    first = await plain.call("query", {})
    assert [event["data"] for event in first["events"]] == list(range(20))
    second = await plain.call("query", {"cursor": first["cursor"]})
    assert [event["data"] for event in second["events"]] == list(range(20, 25))
    end = await plain.call("query", {"cursor": second["cursor"]})
    assert end["events"] == []
    # The end is a place to go on from.
    await plain.emit("a.x", {"data": "late"})
    late = await plain.call("query", {"cursor": end["cursor"]})
    assert [event["data"] for event in late["events"]] == ["late"]
    empty = await plain.call("query", {"session_id": "nobody"})
    assert empty == {"events": [], "cursor": None}


async def test_pages_are_stable_while_events_are_archived_and_come_in(plain: Plain, url: str) -> None:
    async with connect(url, plain.namespace) as hf:
        stored: list[str] = [(await hf.emit("a:x", n)).event_id for n in range(60)]
        seen: list[str] = []
        cursor: str | None = None
        for page in range(100):
            request = {"limit": 7} if cursor is None else {"limit": 7, "cursor": cursor}
            answer = await plain.call("query", request)
            if not answer["events"]:
                break
            seen += [event["event_id"] for event in answer["events"]]
            cursor = answer["cursor"]
            # Between the pages the boundary of hot and cold moves through them, and new events come last.
            if page % 2 == 0:
                await flush(hf.connection)
            if page < 5:
                stored += [(await hf.emit("a:x", "more")).event_id for _ in range(3)]
    assert seen == stored


async def test_a_page_over_the_limit_of_a_reply_is_cut_short_and_continued(plain: Plain) -> None:
    for n in range(8):
        await plain.emit("a.x", {"data": {"n": n, "pad": "x" * 300_000}})
    seen: list[int] = []
    request: Answer = {"limit": 1000}
    while True:
        answer = await plain.call("query", request)
        if not answer["events"]:
            break
        assert len(answer["events"]) < 8
        seen += [event["data"]["n"] for event in answer["events"]]
        request["cursor"] = answer["cursor"]
    assert seen == list(range(8))


# stats and health


async def test_B29_B30_stats_and_health_have_the_stated_fields(plain: Plain, control: Connection) -> None:
    await plain.put({"n": new_event_id()})
    await plain.emit("a.x", {})
    await put_version(control, plain.namespace, "k", 1)
    stats = await plain.call("stats", {})
    assert set(stats) == {"hot", "contexts", "events", "keys", "lake", "watermarks", "handlers", "dead", "scrub"}
    assert set(stats["hot"]) == {"contexts", "bytes"}
    assert stats["events"]["unarchived"] >= 1
    assert stats["keys"]["live"] >= 1
    assert set(stats["lake"]) == {"contexts", "events", "key_versions", "bytes", "files"}
    assert set(stats["watermarks"]) == {"contexts", "events", "key_versions"}
    await flush(control)
    after = await plain.call("stats", {})
    assert after["events"]["unarchived"] == 0
    assert all(mark["lag"] == 0 for mark in after["watermarks"].values())
    assert after["lake"]["contexts"] > stats["lake"]["contexts"]
    assert await plain.call("health", {}) == {
        "ok": True,
        "problems": [],
        "lag": {"contexts": 0, "events": 0, "key_versions": 0},
    }
    assert await plain.call("health", b"") == await plain.call("health", {})


# errors


@pytest.mark.parametrize(
    ("endpoint", "request_", "expected"),
    [
        ("resolve", {}, ("invalid_field", "ref", None)),
        ("resolve", {"ref": 1}, ("invalid_field", "ref", None)),
        ("resolve", {"ref": "ctx_note_short"}, ("invalid_ref", "ref", None)),
        ("resolve", {"ref": "ctx_note_" + "a" * 32, "surplus": 1}, ("invalid_field", "surplus", None)),
        ("resolve", {"ref": "ctx_note_" + "a" * 32}, ("not_found", "ref", None)),
        ("resolve", {"ref": "ctx_note_" + "a" * 32, "fields": ["nope"]}, ("invalid_field", "fields", None)),
        ("resolve_batch", {"refs": "x"}, ("invalid_field", "refs", None)),
        ("resolve_batch", {"refs": ["x"]}, ("invalid_ref", "ref", None)),
        ("put", {}, ("invalid_field", "body", None)),
        ("put", {"body": 1, "body_text": "x"}, ("invalid_field", "body", None)),
        ("put", {"body": 1, "kind": "a b"}, ("invalid_name", "kind", limits.KIND_CHARS)),
        ("put", {"body": 1, "kind": "k" * 65}, ("invalid_name", "kind", limits.KIND_CHARS)),
        ("put", {"body_base64": "***"}, ("invalid_field", "body_base64", None)),
        ("put", {"body_text": "x", "content_type": "a\nb"}, ("invalid_field", "content_type", 128)),
        ("put", {"body": 1, "expires_at": "soon"}, ("invalid_field", "expires_at", None)),
        ("put", {"body": 1, "expires_at": "1969-01-01T00:00:00Z"}, ("invalid_field", "expires_at", MAX_MS)),
        ("query", {"limit": 0}, ("invalid_field", "limit", 1)),
        ("query", {"limit": 1001}, ("invalid_field", "limit", limits.QUERY_LIMIT_MAX)),
        ("query", {"limit": "x"}, ("invalid_field", "limit", None)),
        ("query", {"since": "yesterday"}, ("invalid_field", "since", None)),
        ("query", {"until": 10**18}, ("invalid_field", "until", None)),
        ("query", {"cursor": "zzz"}, ("invalid_field", "cursor", None)),
        ("query", {"session_id": ""}, ("invalid_field", "session_id", 1)),
        ("query", {"session_id": "x" * 257}, ("invalid_field", "session_id", limits.ID_CHARS)),
        ("stats", [], ("invalid_field", "request", None)),
        ("health", b"{", ("invalid_field", "request", None)),
        ("fetch", {"digests": ["a"] * 1001}, ("too_large", "digests", limits.BATCH_REFS)),
    ],
)
async def test_an_error_names_code_field_and_limit(
    plain: Plain, endpoint: str, request_: object, expected: tuple[str, str, object]
) -> None:
    assert await plain.refused(endpoint, request_) == expected
