"""The types that callers of the SDK rely on, pinned: mypy and pyright check this file, and nothing here is run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, assert_type

import msgspec

from holdfast.client import Context, Event, EventId, Holdfast, Ref, Resolved, Tier, connect
from holdfast.client.key_model import KeyValue, KeyVersion
from holdfast.client.keys import UNCHANGED
from holdfast.client.watch import KeyWatch
from holdfast.schemas.policies import KeyPolicy, Policies

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager


class Plan(msgspec.Struct):
    steps: list[str]


def connecting() -> None:
    manager: AbstractAsyncContextManager[Holdfast] = connect()
    del manager


async def storing(hf: Holdfast) -> None:
    assert_type(await hf.put({"goal": "book a flight"}, kind="completion"), Ref)
    for body in ("text", b"bytes", ["list", 1, None], {"a": {"b": 1.5}}, Plan(["a"]), 5, None, True):
        assert_type(await hf.put(body), Ref)
    assert_type(await hf.put_many([{"a": 1}, "b", b"c"], expires_at=datetime.now()), list[Ref])  # noqa: DTZ005
    await hf.put(object())  # type: ignore[arg-type]
    await hf.put("x", kind=5)  # type: ignore[arg-type]


async def resolving(hf: Holdfast, ref: Ref) -> None:
    context = await hf.resolve(ref)
    assert_type(context, Context)
    assert_type(await hf.resolve("ctx_a_b"), Context)
    assert_type(context.ref, Ref)
    assert_type(context.kind, str)
    assert_type(context.body, Any)
    assert_type(context.raw, bytes)
    assert_type(context.size, int)
    assert_type(context.created_at, datetime)
    assert_type(context.expires_at, datetime | None)
    assert_type(context.tier, Tier)
    tier: Literal["cache", "hot", "lake"] = context.tier
    del tier
    many = await hf.resolve_many([ref, "ctx_a_b"])
    assert_type(many, Resolved)
    assert_type(many.found, dict[Ref, Context])
    assert_type(many.missing, list[Ref])


async def emitting(hf: Holdfast, ref: Ref) -> None:
    event = await hf.emit("agent:status", {"state": "ready"}, context=ref, session="s1", correlation="c1", parent=None)
    assert_type(event, Event)
    assert_type(event.event_id, EventId)
    assert_type(event.parent_event_id, EventId | None)
    assert_type(event.event_depth, int)
    assert_type(event.context_ref, Ref | None)
    assert_type(event.timestamp, datetime)
    assert_type(event.stored_at, datetime | None)
    assert_type(event.data, Any)
    await hf.emit("child", parent=event)
    await hf.emit("child", parent=event.event_id, context={"a": "body"})
    await hf.emit("child", parent=5)  # type: ignore[arg-type]
    event.name = "other"  # type: ignore[misc]


async def naming(hf: Holdfast) -> None:
    value = await hf.keys.put("plan", {"a": 1}, expected_version=0, tags=["t"], ttl=timedelta(hours=1), encrypt=None)
    assert_type(value, KeyValue)
    assert_type(value.body, Any)
    assert_type(value.raw, bytes)
    assert_type(value.context, Context)
    assert_type(value.version, int)
    assert_type(value.op, Literal["put", "patch", "delete", "rollback", "expire"])
    assert_type(value.tags, tuple[str, ...])
    assert_type(value.ref, Ref | None)
    assert_type(value.position, str | None)
    assert_type(value.timestamp, datetime)
    assert_type(value.stored_at, datetime | None)
    assert_type(value.expires_at, datetime | None)
    assert_type(await hf.keys.get("plan"), KeyValue)
    assert_type(await hf.keys.get("plan", 1), KeyValue)
    assert_type(await hf.keys.get("plan", as_of=value.timestamp), KeyValue)
    assert_type(await hf.keys.head("plan"), KeyVersion | None)
    assert_type(await hf.keys.get_many(["plan", "b"]), dict[str, KeyValue])
    assert_type(await hf.keys.patch("plan", {"a": None}, ttl=5), KeyValue)
    assert_type(await hf.keys.append("list", object()), KeyValue)
    assert_type(await hf.keys.update("n", lambda n: n + 1, default=0, op="put"), KeyValue)
    assert_type(await hf.keys.update("n", lambda _: UNCHANGED), KeyValue)
    assert_type(await hf.keys.delete("plan"), KeyVersion)
    assert_type(await hf.keys.rollback("plan", 1), KeyValue)
    assert_type(await hf.keys.diff("plan", 1, 2), list[dict[str, Any]])
    assert_type(await hf.keys.commit({"a": 1}, {"a": 0}, deletes=["b"]), dict[str, KeyVersion])
    assert_type(await value.load(), Context)
    await hf.keys.put("plan", object())  # type: ignore[arg-type]
    await hf.keys.put(5, 1)  # type: ignore[arg-type]
    await hf.keys.put("plan", 1, ttl="1h")  # type: ignore[arg-type]
    await hf.keys.patch("plan", ["a"])  # type: ignore[arg-type]
    await hf.keys.update("n", lambda n: n, op="paint")  # type: ignore[arg-type]
    value.version = 2  # type: ignore[misc]


async def listing_and_watching(hf: Holdfast) -> None:
    async for version in hf.keys.history("plan", before=5, limit=2):
        assert_type(version, KeyVersion)
    async for version in hf.keys.list("plan.", tags=["t"], session="s1", agent="a"):
        assert_type(version, KeyVersion)
    changes = hf.keys.watch("plan.", after="epoch:1")
    assert_type(changes, KeyWatch)
    async for version in changes:
        assert_type(version, KeyVersion)
    async with hf.keys.watch("plan.", initial=True) as opened:
        assert_type(await anext(opened), KeyVersion)
    assert_type(await hf.keys.policies(), Policies)
    assert_type(await hf.keys.set_policy("plan.", KeyPolicy(ttl_s=5, max_versions=1)), Policies)
    assert_type(await hf.keys.set_policy("plan.", None), Policies)


async def querying(hf: Holdfast) -> None:
    found = hf.query(session="s1", since=datetime.now(), limit=5)  # noqa: DTZ005  types only
    assert_type(found, AsyncIterator[Event])
    async for event in found:
        assert_type(event, Event)
    assert_type(await hf.stats(), dict[str, Any])
    assert_type(await hf.health(), dict[str, Any])
