"""A conversation stored after each of many turns, archived and gone from the hot tier: every version is there."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.client import connect
from holdfast.lake import Lake, compact, verify_lake
from holdfast.lake import connect as connect_lake
from holdfast.schemas.ids import now_ms
from holdfast.streams.connection import open_connection
from holdfast.workers.control import evict, flush
from tests.running import own_server, running, settings_in, target_of
from tests.support import plain_client

if TYPE_CHECKING:
    from holdfast.schemas.refs import Ref

pytestmark = pytest.mark.asyncio

TURNS = 300
KEY = "session.long"


def step(turn: int) -> dict[str, Any]:
    return {"turn": turn, "role": ("user", "assistant")[turn % 2], "text": f"turn {turn} said: ä€ " * (turn % 60)}


def bodies_in_sql(lake: Path, url: str | None) -> list[Any]:
    with connect_lake(lake, url) as sql:
        found = sql.execute(
            "SELECT body FROM key_versions JOIN contexts USING (namespace, ref) WHERE key = ? ORDER BY version", [KEY]
        ).fetchall()
    return [json.loads(body) for (body,) in found]


async def resolve_all(url: str, refs: list[Ref | None]) -> list[Any]:
    """The bodies as a caller without the SDK gets them."""
    bodies: list[Any] = []
    async with plain_client(url) as client:
        for ref in refs:
            reply = await client.request("ctx.default.resolve", json.dumps({"ref": ref}).encode(), timeout=20)
            bodies.append(json.loads(reply.data)["body"])
    return bodies


async def test_every_version_of_a_long_session_is_read_from_the_lake_byte_for_byte(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    steps = [step(turn) for turn in range(TURNS)]
    versions = [steps[: turn + 1] for turn in range(TURNS)]
    refs: list[Ref | None] = []
    async with own_server(tmp_path) as server, running(server.url, settings):
        async with connect(server.url, agent="writer") as hf, open_connection(target_of(server.url)) as control:
            for number, said in enumerate(steps):
                refs.append((await hf.keys.append(KEY, said)).ref)
                if number % 100 == 70:
                    await flush(control)
            # Some is in the lake, some only in the streams.
            assert await asyncio.to_thread(bodies_in_sql, settings.lake, server.url) == versions
            await flush(control)
            assert (await evict(control, 0.0)).left == 0
        lake = Lake.open(settings.lake)
        for is_compacted in (False, True):
            if is_compacted:
                await asyncio.to_thread(lambda: compact(lake, at_ms=now_ms() + 2 * 86_400_000))
            async with connect(server.url, agent="reader", cache_bytes=0) as hf:
                found = [version async for version in hf.keys.history(KEY)]
                assert sorted(version.version for version in found) == list(range(1, TURNS + 1))
                for version in found:
                    assert (await version.load()).body == versions[version.version - 1]
            assert await resolve_all(server.url, refs[::10]) == versions[::10]
            assert await asyncio.to_thread(bodies_in_sql, settings.lake, None) == versions
            report = await asyncio.to_thread(verify_lake, settings.lake)
            assert report.violations == []
            assert report.checked["joints"] > 20
