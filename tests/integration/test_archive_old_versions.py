"""Old versions leave the hot tier when they are told to, and stay readable by number, by time and in the history."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.client import connect
from holdfast.streams.wire import key_filter, key_subject
from holdfast.workers import trim
from holdfast.workers.control import trim as archive_old_versions
from tests.running import own_server, running, settings_in
from tests.support import api, plain_client

if TYPE_CHECKING:
    import pytest


async def revisions(url: str, namespace: str) -> dict[str, int]:
    """What the bucket holds of each key, as any client of the server sees it."""
    async with plain_client(url) as client:
        answer = await api(client, "STREAM.INFO.KV_ctx-keys", {"subjects_filter": key_filter(namespace, "")})
    state = answer["state"]
    assert isinstance(state, dict)
    return dict(state.get("subjects") or {})


async def test_E76_all_but_the_newest_versions_leave_the_hot_tier(
    tmp_path: Path, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        own_server(tmp_path) as server,
        running(server.url, settings_in(tmp_path)),
        connect(server.url, namespace) as hf,
    ):
        for n in range(1, 6):
            await hf.keys.put("many", {"n": n})
        await hf.keys.put("one", "x")
        for n in range(4):
            await hf.keys.append("chat", {"turn": n, "text": "hello " * 100})
        many, one, chat = (key_subject(namespace, key) for key in ("many", "one", "chat"))

        # For ten minutes a writer may look for its own version: nothing that young goes.
        kept = await archive_old_versions(hf.connection, 2)
        assert (kept.keys, kept.revisions) == (0, 0)
        assert await revisions(server.url, namespace) == {many: 5, one: 1, chat: 4}

        monkeypatch.setattr(trim, "YOUNG_S", 0.0)
        report = await archive_old_versions(hf.connection, 2)
        assert (report.keys, report.revisions) == (2, 5)
        assert await revisions(server.url, namespace) == {many: 2, one: 1, chat: 2}

        async with connect(server.url, namespace, cache_bytes=0) as reader:
            history = [version async for version in reader.keys.history("many")]
            assert [version.version for version in history] == [5, 4, 3, 2, 1]
            for version in history:
                assert (await reader.keys.get("many", version.version)).body == {"n": version.version}
                assert version.stored_at is not None
                # Of two that were stored in one millisecond, the newer is what there was at that time.
                then = max(other.version for other in history if other.stored_at == version.stored_at)
                assert (await reader.keys.get("many", as_of=version.stored_at)).body == {"n": then}
            assert len((await reader.keys.get("chat", 1)).body) == 1
            # Compare-and-set goes on where it was.
            assert (await reader.keys.put("many", {"n": 6}, expected_version=5)).version == 6
        assert (await archive_old_versions(hf.connection, 2)).revisions == 1
