"""The janitor: what it expires, by whose clock, and what may happen meanwhile; and the server's clock itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import pytest_asyncio

from holdfast.schemas import failpoints
from holdfast.schemas.errors import UnavailableError
from holdfast.schemas.failpoints import FailpointError
from holdfast.schemas.ids import now_ms
from holdfast.streams.connection import ApiError, ApiFailure, Connection, open_connection
from holdfast.streams.decode import KeyVersionBody
from holdfast.streams.key_log import KeyLog
from holdfast.streams.publish import WRONG_LAST_SEQUENCE, Outgoing, Refused
from holdfast.streams.pull import StreamReader
from holdfast.streams.server_clock import ServerClock
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import KEYS_STREAM
from holdfast.workers import janitor as janitor_module
from holdfast.workers.control import cleanup
from holdfast.workers.janitor import ExpiringVersion, Janitor
from tests.running import eventually, own_server, put_version, running, settings_in, target_of
from tests.support import OwnServer, create_stream

pytestmark = pytest.mark.asyncio

HOUR_MS = 3_600_000


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncGenerator[OwnServer]:
    async with own_server(tmp_path) as started:
        yield started


@pytest_asyncio.fixture
async def connection(server: OwnServer) -> AsyncGenerator[Connection]:
    async with open_connection(target_of(server.url)) as opened:
        yield opened


async def _versions(connection: Connection, key: str) -> list[KeyVersionBody]:
    info = await stream_info(connection, KEYS_STREAM)
    found: list[KeyVersionBody] = []
    for seq in range(info.first_seq, info.last_seq + 1):
        answer = await connection.api(f"STREAM.MSG.GET.{KEYS_STREAM}", {"seq": seq})
        if answer["message"]["subject"].endswith(f".{key}"):
            raw = msgspec.json.decode(f'"{answer["message"]["data"]}"'.encode(), type=bytes)
            found.append(msgspec.json.decode(raw, type=KeyVersionBody))
    return found


async def test_E13_the_janitor_expires_what_is_due_by_its_clock(connection: Connection) -> None:
    clock = now_ms()
    janitor = Janitor(connection, clock_ms=lambda: clock)
    await put_version(connection, "default", "short", 1, expires_at_ms=clock + 1_000, session_id="s")
    await put_version(connection, "default", "long", 1, expires_at_ms=clock + 100_000)
    await put_version(connection, "default", "never", 1)
    await put_version(connection, "default", "deleted", 1, expires_at_ms=clock + 1_000)
    await put_version(connection, "default", "deleted", 2, op="delete")
    assert await janitor.round() == 0
    clock += 1_000
    assert await janitor.round() == 1
    assert await janitor.round() == 0
    expired = (await _versions(connection, "short"))[-1]
    assert (expired.version, expired.op, expired.changed_by, expired.session_id) == (2, "expire", "janitor", "s")
    assert expired.timestamp_ms == clock
    assert [len(await _versions(connection, key)) for key in ("long", "never", "deleted")] == [1, 1, 2]
    # A second janitor, or the same after a restart, finds it done.
    again = Janitor(connection, clock_ms=lambda: clock)
    assert await again.round() == 0
    clock += 100_000
    assert await again.round() == 1
    # And one that is late by that reads what the other wrote.
    assert await janitor.round() == 0
    await janitor.close()
    await again.close()


async def test_a_newer_version_wins_over_the_janitor(connection: Connection) -> None:
    clock = now_ms()

    class Racing(Janitor):
        """Writes a newer version between the janitor's look and its write."""

        async def _expire(self, subject: str, version: ExpiringVersion, now: int, after_seq: int | None = None) -> int:
            await put_version(connection, "default", "k", 2)
            return await super()._expire(subject, version, now, after_seq)

    janitor = Racing(connection, clock_ms=lambda: clock)
    await put_version(connection, "default", "k", 1, expires_at_ms=clock)
    assert await janitor.round() == 0
    assert janitor.counters.overtaken == 1
    assert [version.op for version in await _versions(connection, "k")] == ["put", "put"]
    assert await janitor.round() == 0
    await janitor.close()


async def test_many_keys_that_are_due_together_expire_in_one_round(connection: Connection) -> None:
    clock = now_ms()
    janitor = Janitor(connection, clock_ms=lambda: clock)
    for n in range(150):
        await put_version(connection, "default", f"k{n}", 1, expires_at_ms=clock + n % 7)
    clock += 10
    assert await janitor.round() == 150
    assert [version.op for version in await _versions(connection, "k149")] == ["put", "expire"]
    await janitor.close()


@pytest.mark.parametrize("point", ["janitor.before_expire", "janitor.after_expire"])
async def test_an_expiry_cut_short_is_done_once_by_the_next(connection: Connection, point: str) -> None:
    clock = now_ms()
    await put_version(connection, "default", "k", 1, expires_at_ms=clock)
    janitor = Janitor(connection, clock_ms=lambda: clock)
    failpoints.arm(point)
    with pytest.raises(FailpointError):
        await janitor.round()
    await janitor.close()
    again = Janitor(connection, clock_ms=lambda: clock)
    await again.round()
    await again.close()
    assert [(version.version, version.op) for version in await _versions(connection, "k")] == [
        (1, "put"),
        (2, "expire"),
    ]


async def test_garbage_among_versions_does_not_stop_the_janitor(connection: Connection) -> None:
    clock = now_ms()
    await connection.lean.request("$KV.ctx-keys.default.k", b"garbage")
    await put_version(connection, "default", "j", 1, expires_at_ms=clock)
    janitor = Janitor(connection, clock_ms=lambda: clock)
    assert await janitor.round() == 1
    await janitor.close()


async def test_what_is_no_version_on_top_of_a_key_does_not_keep_it_from_expiring(connection: Connection) -> None:
    await put_version(connection, "default", "a", 1, expires_at_ms=1_000)
    await connection.lean.request("$KV.ctx-keys.default.a", b"garbage")
    janitor = Janitor(connection, clock_ms=lambda: 2_000)
    assert await janitor.round() == 1
    head = await KeyLog(connection).head("default", "a")
    assert head.row is not None
    assert (head.row.op, head.row.version) == ("expire", 2)
    assert await janitor.round() == 0
    await janitor.close()


async def test_the_janitor_waits_for_a_server_that_has_jetstream_switched_off(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one has that stops, and still answers for a while."""
    monkeypatch.setattr(janitor_module, "INTERVAL_S", 0.01)
    refusals = [ApiError(ApiFailure(503, 10039, "JetStream not enabled for account"), "STREAM.INFO")] * 3
    read = StreamReader.read

    async def stopping(reader: StreamReader, **limits: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return await read(reader, **limits)

    monkeypatch.setattr(StreamReader, "read", stopping)
    await put_version(connection, "default", "k", 1, expires_at_ms=1_000)
    janitor = Janitor(connection, clock_ms=lambda: 2_000)
    at_work = asyncio.create_task(janitor.run())
    try:
        await eventually(lambda: janitor.counters.expired == 1)
        assert not at_work.done()
    finally:
        at_work.cancel()
        await asyncio.gather(at_work, return_exceptions=True)
        await janitor.close()


async def test_an_expiry_that_was_refused_by_nobody_knows_what_stays_due(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = [Refused(ApiFailure(400, WRONG_LAST_SEQUENCE, "wrong last sequence"))]
    publish, head = Janitor._publish, KeyLog.head

    async def refuse(janitor: Janitor, message: Outgoing, losses: int) -> None:
        if refused:
            raise refused.pop()
        await publish(janitor, message, losses)

    async def away(*_: object) -> Any:
        monkeypatch.setattr(KeyLog, "head", head)
        raise UnavailableError("nobody answers")

    monkeypatch.setattr(Janitor, "_publish", refuse)
    monkeypatch.setattr(KeyLog, "head", away)
    await put_version(connection, "default", "k", 1, expires_at_ms=1_000)
    janitor = Janitor(connection, clock_ms=lambda: 2_000)
    with pytest.raises(UnavailableError):
        await janitor.round()
    assert await janitor.round() == 1
    await janitor.close()


async def test_a_key_written_over_and_over_takes_no_more_memory(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(janitor_module, "_STALE", 10)
    clock = now_ms()
    janitor = Janitor(connection, clock_ms=lambda: clock)
    for version in range(1, 101):
        await put_version(connection, "default", "busy", version, expires_at_ms=clock + 1_000 + version)
        await janitor.round()
        assert len(janitor._due) <= 13
    await put_version(connection, "default", "quiet", 1, expires_at_ms=clock + 500)
    clock += 1_100
    assert await janitor.round() == 2
    await janitor.close()


async def test_the_janitor_goes_on_when_the_stream_is_made_anew(server: OwnServer, tmp_path: Path) -> None:
    async with (
        running(server.url, settings_in(tmp_path), ["janitor"]) as workers,
        open_connection(target_of(server.url)) as connection,
    ):
        await put_version(connection, "default", "old", 1, expires_at_ms=now_ms() + 10**9)
        await eventually(lambda: workers.counters()["janitor"]["read"] == 1)
        config = (await connection.api(f"STREAM.INFO.{KEYS_STREAM}"))["config"]
        await connection.api(f"STREAM.DELETE.{KEYS_STREAM}")
        config["metadata"]["holdfast.epoch"] = "another"
        await create_stream(connection, config)
        await put_version(connection, "default", "new", 1, expires_at_ms=now_ms())
        await eventually(lambda: workers.counters()["janitor"]["expired"] == 1)


async def test_E75_cleanup_expires_what_is_due_now_and_counts_it(server: OwnServer, tmp_path: Path) -> None:
    async with open_connection(target_of(server.url)) as connection:
        with pytest.raises(UnavailableError, match="no janitor answers"):
            await cleanup(connection, timeout_s=1.0)
        async with running(server.url, settings_in(tmp_path), ["janitor"]) as workers:
            await put_version(connection, "default", "later", 1, expires_at_ms=now_ms() + HOUR_MS)
            for n in range(5):
                await put_version(connection, "default", f"k{n}", 1, expires_at_ms=now_ms() - 1)
            # The janitor's own round may come first: between them, each is expired once.
            report = await cleanup(connection)
            assert workers.counters()["janitor"]["expired"] == 5
            assert report.expired <= 5
            assert (await cleanup(connection)).expired == 0
            assert [version.op for version in await _versions(connection, "k3")] == ["put", "expire"]
            assert len(await _versions(connection, "later")) == 1


# The server's clock


class Machine:
    """The clocks of a machine that may be wrong, jump or sleep."""

    def __init__(self, skew_ms: int = 0) -> None:
        self.skew_ms = skew_ms
        self.slept_s = 0.0

    def wall_ms(self) -> int:
        return now_ms() + self.skew_ms

    def ticks_s(self) -> float:
        return now_ms() / 1000 + self.slept_s


_SOON_MS: Final = 5_000
"""What a slow answer may cost, far below what the clocks here are off by."""


async def _error_ms(clock: ServerClock) -> int:
    return abs(await clock.now_ms() - now_ms())


@pytest.mark.parametrize("skew_ms", [-3 * HOUR_MS, 0, 3 * HOUR_MS])
async def test_a_wrong_local_clock_does_not_matter(connection: Connection, skew_ms: int) -> None:
    machine = Machine(skew_ms)
    clock = ServerClock(connection, local_ms=machine.wall_ms, ticks_s=machine.ticks_s)
    assert await _error_ms(clock) < _SOON_MS


async def test_a_local_clock_that_is_set_is_noticed_at_once(connection: Connection) -> None:
    machine = Machine()
    clock = ServerClock(connection, local_ms=machine.wall_ms, ticks_s=machine.ticks_s)
    assert await _error_ms(clock) < _SOON_MS
    machine.skew_ms = HOUR_MS
    assert await _error_ms(clock) < _SOON_MS


async def test_the_server_is_asked_once_a_minute_and_after_a_reconnect(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    asked = 0
    call = connection.api

    async def counted(subject: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return await call(subject, *arguments, **options)

    monkeypatch.setattr(connection, "api", counted)
    clock = ServerClock(connection, local_ms=machine.wall_ms, ticks_s=machine.ticks_s)
    for _ in range(100):
        await clock.now_ms()
    assert asked == 1
    machine.slept_s += 61
    machine.skew_ms += 61_000
    await clock.now_ms()
    assert asked == 2
    connection.reconnects += 1
    await clock.now_ms()
    await clock.now_ms()
    assert asked == 3


async def test_the_last_known_offset_holds_while_the_server_is_away(server: OwnServer) -> None:
    machine = Machine(2 * HOUR_MS)
    async with open_connection(target_of(server.url)) as connection:
        clock = ServerClock(connection, local_ms=machine.wall_ms, ticks_s=machine.ticks_s)
        await clock.now_ms()
        await server.kill()
        await eventually(lambda: not connection.client.is_connected)
        machine.slept_s += 61
        machine.skew_ms += 61_000
        # A minute has gone by on this machine's clocks alone.
        assert abs(await clock.now_ms() - now_ms() - 61_000) < _SOON_MS


async def test_a_clock_that_was_never_read_is_unavailable(server: OwnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.streams.server_clock.READ_DEADLINE_S", 0.1)
    async with open_connection(target_of(server.url)) as connection:
        await connection.api(f"STREAM.DELETE.{KEYS_STREAM}")
        with pytest.raises(UnavailableError, match="clock cannot be read"):
            await ServerClock(connection).now_ms()
