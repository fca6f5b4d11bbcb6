"""The types that callers of the SDK rely on, pinned: mypy and pyright check this file, and nothing here is run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, assert_type

import msgspec

from holdfast.client import Context, Event, EventId, Holdfast, Ref, Resolved, Tier, connect

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


async def querying(hf: Holdfast) -> None:
    found = hf.query(session="s1", since=datetime.now(), limit=5)  # noqa: DTZ005  types only
    assert_type(found, AsyncIterator[Event])
    async for event in found:
        assert_type(event, Event)
    assert_type(await hf.stats(), dict[str, Any])
    assert_type(await hf.health(), dict[str, Any])
