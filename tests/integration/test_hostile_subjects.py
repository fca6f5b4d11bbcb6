"""Subjects that the server takes and no name of ours has: set aside as dead letters, and what follows is archived."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.client import connect
from holdfast.streams.wire import EVENTS_STREAM, KEYS_PREFIX, KEYS_STREAM
from holdfast.workers.control import flush
from tests.running import dead_letters, put_version, running, settings_in
from tests.support import OwnServer, raw_publish


@pytest.mark.parametrize("character", [b"\x0b", b"\x0c"], ids=["vertical tab", "form feed"])
async def test_a_subject_with_other_white_space_holds_up_nobody(
    own_server: OwnServer, tmp_path: Path, character: bytes
) -> None:
    """nats-py takes it for the end of the subject: one such message would cut every reader off, again and again."""
    subject = b"ctx.default.event.raw.x%s1.y" % character
    async with running(own_server.url, settings_in(tmp_path)), connect(own_server.url, cache_bytes=0) as hf:
        await raw_publish(own_server.url, b"PUB %b 2\r\n{}\r\n" % subject)
        event = await hf.emit("a:good", {"n": 1})
        await flush(hf.connection)
        assert [found.event_id async for found in hf.query()] == [event.event_id]
        [letter] = await dead_letters(hf)
        assert (letter.stream, letter.subject) == (EVENTS_STREAM, subject.decode())
        assert hf.connection.reconnects == 0


async def test_a_key_has_one_subject(own_server: OwnServer, tmp_path: Path) -> None:
    """A segment with a dot in it would be a second chain of versions of the same key."""
    async with running(own_server.url, settings_in(tmp_path)), connect(own_server.url, cache_bytes=0) as hf:
        await hf.keys.put("plan.a", {"true": 1})
        await put_version(hf.connection, "default", "x--plan_2ea", 1, ref="ctx_note_" + "a" * 32)
        await raw_publish(own_server.url, f"PUB {KEYS_PREFIX}default.plan.a\x0b 2\r\n{{}}\r\n".encode())
        await flush(hf.connection)
        assert {letter.stream for letter in await dead_letters(hf)} == {KEYS_STREAM}
        assert len(await dead_letters(hf)) == 2
        assert [item.key async for item in hf.keys.list()] == ["plan.a"]
        assert (await hf.keys.get("plan.a")).body == {"true": 1}
