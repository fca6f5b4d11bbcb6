"""A disk that is full or fails: it is said within seconds, nothing is lost, and service comes back by itself."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from holdfast.client import Holdfast, connect
from holdfast.ops import server_watch
from holdfast.ops.data_directory import LEAST_FREE_BYTES
from holdfast.ops.server import EmbeddedServer
from holdfast.ops.server_config import ServerSettings
from holdfast.ops.server_watch import (
    STEADY_S,
    Answers,
    Judge,
    Seen,
    pause_before,
    spare_bytes,
    try_writing,
    watch_server,
)
from holdfast.ops.system import watched
from holdfast.schemas.errors import DataDirectoryError, HoldfastError, RetryError, StorageFailedError, UnavailableError
from holdfast.schemas.limits import MIB
from holdfast.streams.connection import open_connection
from holdfast.streams.connection_target import ConnectionTarget
from holdfast.streams.publish import Outgoing, publish
from holdfast.streams.pull import read_one
from holdfast.streams.storing import storage_failed, stream_of
from holdfast.streams.topology import ensure_topology, stream_info
from holdfast.streams.wire import H_MSG_ID, HOT_STREAM
from holdfast.streams.write_probe import (
    PROBE_STREAM,
    WriteError,
    WriteState,
    parse_write_error,
    probe_writes,
    problem_of,
    require_writing,
    write_error_of,
)
from tests.campaigns import disk as disk_campaign
from tests.campaigns.disk import Outcome, Run, campaign, plan, run_once
from tests.campaigns.disk_rig import SmallDisk, Watcher, what_is_missing
from tests.running import eventually
from tests.support import OwnServer, create_stream, stop_process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.schemas.refs import Ref
    from holdfast.streams.connection import Connection
    from tests.campaigns.disk_rig import DiskRig

needs_disks = pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing() or "-")

FULL = WriteError(stream="CTX_EVENTS", cause="no space left on device", path="/d/jetstream/1.blk")
BROKEN = WriteError(stream="CTX_EVENTS", cause="input/output error")
DISK = 10_000 * MIB


def seen(
    at_s: float, *errors: WriteError, free: int = DISK // 2, trial_error: str = "", answers: Answers = "all"
) -> Seen:
    return Seen(at_s=at_s, errors=errors, answers=answers, free_bytes=free, total_bytes=DISK, trial_error=trial_error)


# -- when to call it sticky, when to restart


def test_a_server_that_is_well_or_silent_is_left_alone() -> None:
    judge = Judge()
    assert judge.decide(seen(0)) == "nothing"
    assert judge.reason == ""
    assert judge.decide(seen(1, answers="nothing")) == "nothing"
    assert judge.reason == "the server does not answer"
    # Somebody may have stopped it: that is told, and no more.
    assert {judge.decide(seen(at_s, answers="nothing")) for at_s in range(2, 100)} == {"nothing"}


def test_a_server_whose_jetstream_is_locked_up_is_restarted() -> None:
    judge = Judge()
    assert judge.decide(seen(0, answers="core")) == "nothing"
    assert judge.decide(seen(5, answers="core")) == "nothing"
    assert judge.decide(seen(7, answers="core", free=0)) == "wait"
    assert judge.decide(seen(8, answers="core")) == "restart"
    judge.restarted(8)
    assert judge.decide(seen(9, answers="core")) == "nothing"
    judge.decide(seen(10))
    # An answer in between, and the time is taken anew.
    assert judge.decide(seen(11, answers="core")) == "nothing"
    assert judge.decide(seen(16, answers="core")) == "nothing"


def test_a_full_disk_is_waited_for_and_then_the_server_restarted_at_once() -> None:
    judge = Judge()
    for at_s in range(30):
        assert judge.decide(seen(at_s, FULL, free=MIB)) == "wait"
    assert judge.reason == f"{MIB:,} bytes are free, {64 * MIB:,} are needed"
    assert judge.decide(seen(30, FULL, free=65 * MIB)) == "restart"


def test_a_disk_that_refuses_a_trial_is_waited_for() -> None:
    judge = Judge()
    assert judge.decide(seen(0, BROKEN, trial_error="input/output error")) == "wait"
    assert "input/output error" in judge.reason
    assert judge.decide(seen(1, BROKEN)) == "restart"


def test_restarts_that_do_not_help_come_at_growing_intervals() -> None:
    judge = Judge()
    at_s, restarts = 0.0, []
    while at_s < 400:
        if judge.decide(seen(at_s, BROKEN)) == "restart":
            judge.restarted(at_s)
            restarts.append(at_s)
        at_s += 1.0
    gaps = [later - earlier for earlier, later in pairwise(restarts)]
    assert restarts[0] == 0
    assert gaps[:6] == [1, 2, 4, 8, 16, 32]
    assert set(gaps[6:]) == {60}


def test_a_restart_that_helped_for_a_minute_is_forgotten() -> None:
    judge = Judge()
    for at_s in range(5):
        if judge.decide(seen(at_s, BROKEN)) == "restart":
            judge.restarted(at_s)
    judge.decide(seen(5))
    assert judge.decide(seen(6, BROKEN)) == "wait"
    judge.decide(seen(4 + STEADY_S))
    assert judge.decide(seen(5 + STEADY_S, BROKEN)) == "restart"


def test_a_disk_that_fills_up_again_and_again_is_no_restart_that_did_not_help() -> None:
    judge = Judge()
    for at_s in range(0, 40, 2):
        assert judge.decide(seen(at_s, FULL, free=0)) == "wait"
        assert judge.decide(seen(at_s + 1, FULL)) == "restart"
        judge.restarted(at_s + 1)


def test_pauses_and_room_are_bounded() -> None:
    assert [pause_before(count) for count in (0, 1, 2, 7, 50)] == [0, 1, 2, 60, 60]
    assert spare_bytes(100 * MIB) == 5 * MIB
    assert spare_bytes(10**13) == 64 * MIB


def test_trying_to_write_leaves_nothing_behind(tmp_path: Path) -> None:
    assert try_writing(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
    assert try_writing(tmp_path / "gone") == "no such file or directory"


# -- what is said


@pytest.mark.parametrize(
    ("text", "cause", "path"),
    [
        (
            "stream '$G > CTX_EVENTS' write error: write /d/$G/streams/CTX_EVENTS/msgs/1.blk: no space left on device",
            "no space left on device",
            "/d/$G/streams/CTX_EVENTS/msgs/1.blk",
        ),
        ("sync /d/a b/2.blk: input/output error", "input/output error", "/d/a b/2.blk"),
        ("JetStream stream '$G > X' write error: something else", "something else", ""),
        ("", "unknown", ""),
    ],
    ids=["full", "broken", "no-path", "nothing"],
)
def test_the_servers_words_become_a_cause_and_a_file(text: str, cause: str, path: str) -> None:
    assert parse_write_error("S", text) == WriteError(stream="S", cause=cause, path=path)


def test_an_operator_is_told_the_cause_the_file_and_what_to_do(tmp_path: Path) -> None:
    error = WriteError(stream="CTX_EVENTS", cause="no space left on device", path=str(tmp_path / "1.blk"))
    problem = problem_of(WriteState(state="refusing", reason="no space left on device", errors=(error,)), "nats")
    assert problem is not None
    assert "no space left on device" in problem.what
    assert f"{tmp_path}/1.blk" in problem.what
    assert "bytes are free" in problem.what
    assert "free space" in problem.next_step
    silent = problem_of(WriteState(state="silent"), "nats")
    assert silent is not None
    assert silent.what == "the server does not answer"
    assert problem_of(WriteState(state="ok"), "nats") is None


def test_a_writer_is_told_the_cause() -> None:
    error = storage_failed(FULL)
    assert error.cause == "no space left on device"
    assert "CTX_EVENTS" in error.message
    assert "may be sent again" in str(error)


def test_the_stream_of_a_subject() -> None:
    assert stream_of("$KV.ctx-hot.default.abc") == "KV_ctx-hot"
    assert stream_of("$KV.ctx-keys.default.a.b") == "KV_ctx-keys"
    assert stream_of("ctx.default.event.dead.dead") == "CTX_EVENTS"
    assert stream_of("ctx.default.dead.CTX_EVENTS.e.1") == "CTX_DEAD"


# -- the probe


@pytest.mark.asyncio
async def test_a_healthy_server_stores(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection:
        for _ in range(2):
            assert await probe_writes(connection) == WriteState(state="ok")
        # It stays what it is made for: one message, however often it is asked.
        assert (await stream_info(connection, PROBE_STREAM)).messages == 1
        assert await write_error_of(connection, "CTX_EVENTS") is None
        assert await write_error_of(connection, "KV_no-such-stream") is None


@pytest.mark.asyncio
async def test_a_server_at_its_limit_of_storage_refuses(tmp_path: Path) -> None:
    settings = ServerSettings(data=tmp_path / "data", max_store_bytes=4096)
    async with EmbeddedServer(settings) as server, open_connection(server.info.nats_url) as connection:
        await ensure_topology(connection)
        with pytest.raises(UnavailableError):
            await _fill_stream(connection)
        state = await probe_writes(connection)
        assert state.state == "refusing"
        assert "storage limit" in state.reason


async def _fill_stream(connection: Connection) -> None:
    for n in range(100):
        await publish(connection, Outgoing("ctx.default.event.a.b", {H_MSG_ID: str(n)}, bytes(1_000)))


@pytest.mark.asyncio
async def test_a_probe_that_may_not_be_stored_says_nothing_of_the_others(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection:
        # Somebody else has the subject: the stream of the probe cannot be made.
        await create_stream(connection, {"name": "OTHER", "subjects": ["holdfast.>"], "max_bytes": 1, "discard": "new"})
        assert (await probe_writes(connection)).state == "ok"


@pytest.mark.asyncio
async def test_a_stopped_server_is_silent_within_five_seconds(tmp_path: Path) -> None:
    async with EmbeddedServer(ServerSettings(data=tmp_path / "data")) as server:
        target = ConnectionTarget(url=server.info.nats_url, origin="test", monitor_url=server.info.monitor_url)
        async with open_connection(target) as connection:
            await ensure_topology(connection)
            stop_process(server.info.pid)
            try:
                async with asyncio.timeout(5):
                    state = await probe_writes(connection)
            finally:
                os.kill(server.info.pid, signal.SIGCONT)
            assert state.state == "silent"


# -- the real thing


@pytest.fixture
def disk() -> Iterator[SmallDisk]:
    """A disk of 48 MiB."""
    small = SmallDisk(48 * MIB)
    try:
        small.mount()
        yield small
    finally:
        small.free()
        small.remove()


@needs_disks
@pytest.mark.asyncio
async def test_a_writer_learns_the_cause_and_goes_on_when_space_is_back(disk: SmallDisk) -> None:
    loop = asyncio.get_running_loop()
    async with EmbeddedServer(ServerSettings(data=disk.path / "data")) as server:
        url, pid = server.info.nats_url, server.info.pid
        async with open_connection(url) as first:
            await ensure_topology(first)
        async with (
            watched(partial(watch_server, server), server.wait_failed),
            open_connection(ConnectionTarget(url=url, origin="test", monitor_url=server.info.monitor_url)) as plain,
            connect(url) as hf,
        ):
            before = await hf.put({"n": 0})
            await asyncio.to_thread(disk.fill)
            began_s = loop.time()
            with pytest.raises(StorageFailedError) as raised:
                await _put_many(hf)
            assert raised.value.cause == "no space left on device"
            assert loop.time() - began_s < 6
            # Whoever writes next learns it at once.
            began_s = loop.time()
            with pytest.raises(StorageFailedError):
                await hf.put({"n": -1, "text": os.urandom(2_000).hex()})
            assert loop.time() - began_s < 1
            state = await probe_writes(plain)
            assert state.state == "refusing"
            assert "no space left on device" in state.reason
            assert "KV_ctx-hot" in {error.stream for error in state.errors}
            # Nothing is purged meanwhile: a purge on a full disk may lock up the server.
            with pytest.raises(StorageFailedError):
                await require_writing(plain)
            disk.free()
            async with asyncio.timeout(10):
                after = await _put_until_stored(hf, {"n": -1})
            await eventually(lambda: server.info.pid != pid)
            assert server.info.nats_url == url
            assert (await hf.resolve(before)).body == {"n": 0}
            assert (await hf.resolve(after)).body == {"n": -1}
            assert (await probe_writes(plain)).state == "ok"


async def _put_many(hf: Holdfast) -> None:
    for n in range(1, 1_000):
        await hf.put({"n": n, "text": os.urandom(2_000).hex()})


async def _put_until_stored(hf: Holdfast, body: dict[str, int]) -> Ref:
    while True:
        try:
            return await hf.put(body)
        except RetryError:
            await asyncio.sleep(0.05)


@needs_disks
@pytest.mark.asyncio
async def test_a_server_that_a_purge_has_locked_up_is_brought_back(
    disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_watch, "HANGS_S", 1.0)
    monkeypatch.setattr(server_watch, "ANSWER_S", 0.5)
    async with (
        EmbeddedServer(ServerSettings(data=disk.path / "data")) as server,
        watched(partial(watch_server, server), server.wait_failed),
        open_connection(server.info.nats_url) as connection,
    ):
        await ensure_topology(connection)
        for n in range(60):
            await publish(connection, Outgoing(f"$KV.ctx-hot.default.a{n}", {}, os.urandom(60_000)))
        await asyncio.to_thread(disk.fill)
        with pytest.raises(HoldfastError):
            await _purge_then_store(connection)
        disk.free()
        await eventually(partial(_stores, connection))
        info = await stream_info(connection, HOT_STREAM)
        for n in range(30, 60):
            message = await read_one(connection, info, n + 1)
            assert message is not None
            assert message.subject == f"$KV.ctx-hot.default.a{n}"


async def _stores(connection: Connection) -> bool:
    return (await probe_writes(connection)).state == "ok"


async def _purge_then_store(connection: Connection) -> None:
    """What a release of the server that survives the purge meets is the write."""
    await connection.api(f"STREAM.PURGE.{HOT_STREAM}", {"filter": "$KV.ctx-hot.default.a1", "seq": 3}, timeout_s=1)
    await connection.api(f"STREAM.PURGE.{HOT_STREAM}", {"seq": 30}, timeout_s=1)
    await publish(connection, Outgoing("$KV.ctx-hot.default.b", {}, os.urandom(60_000)), timeout_s=1)


@needs_disks
@pytest.mark.asyncio
async def test_a_server_is_not_started_on_a_full_disk(disk: SmallDisk) -> None:
    await asyncio.to_thread(disk.fill, LEAST_FREE_BYTES // 2)
    with pytest.raises(DataDirectoryError, match="is full") as raised:
        async with EmbeddedServer(ServerSettings(data=disk.path / "data")):
            pass
    assert "free some space" in str(raised.value)
    disk.free()
    async with EmbeddedServer(ServerSettings(data=disk.path / "data")) as server:
        assert server.info.pid


@needs_disks
@pytest.mark.asyncio
async def test_short_campaign(tmp_path: Path) -> None:
    outcome = await campaign(tmp_path, 2, seed=1669, rounds=2, told=False)
    assert outcome.violations == []
    assert outcome.runs == 2
    assert outcome.acknowledged > 50
    assert (outcome.lost, outcome.doubled) == (0, 0)


class StandingStill:
    """A system that acknowledges nothing any more, whatever is done to its disk."""

    disk = SmallDisk.__new__(SmallDisk)
    log = Path("/dev/null")

    @staticmethod
    def ended() -> None:
        """It still runs."""


@pytest.mark.asyncio
async def test_a_campaign_notices_that_service_does_not_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_campaign, "RESUMES_WITHIN_S", 0.1)
    monkeypatch.setattr(SmallDisk, "free", lambda _: None)
    monkeypatch.setattr(SmallDisk, "fill", lambda *_: None)
    outcome = Outcome()
    run = Run(number=0, kind="enospc", before_s=0.0, lasts_s=0.0)
    await run_once(cast("DiskRig", StandingStill()), run, Watcher(), outcome, tmp_path / "pause")
    assert len(outcome.violations) == 1
    assert "service resumed after" in outcome.violations[0]


INDEX_WRITER = """
import sys
from pathlib import Path
import lmdb
from holdfast.lake.index_environment import Environment

environment = Environment(Path(sys.argv[1]))
failed = []
for number in range(3):
    try:
        with environment.in_use(), environment.env.begin(write=True, db=environment.databases["events"]) as change:
            change.put(b"%d" % number, b"x")
    except lmdb.Error as error:
        failed.append(type(error).__name__)
print(",".join(failed))
"""


@needs_disks
@pytest.mark.asyncio
async def test_an_index_goes_on_after_its_disk_failed_in_a_commit(tmp_path: Path) -> None:
    """LMDB refuses every transaction after that, until its environment is opened again."""
    failures = await asyncio.gather(*(_index_with_a_failed_write(tmp_path / str(at), at) for at in range(10, 16)))
    assert set(failures) == {"Error"}, "each meets the error once, in the commit, and goes on"


async def _index_with_a_failed_write(index: Path, at: int) -> str:
    process = await asyncio.create_subprocess_exec(
        *("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64"),
        *("-e", f"inject=pwrite64:error=EIO:when={at}", sys.executable, "-c", INDEX_WRITER, str(index)),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    return output.decode().strip()


def test_the_same_seed_gives_the_same_runs() -> None:
    assert [plan(7, number, ("enospc", "eio")) for number in range(20)] == [
        plan(7, number, ("enospc", "eio")) for number in range(20)
    ]
    assert {plan(7, number, ("eio",)).kind for number in range(20)} == {"eio"}
