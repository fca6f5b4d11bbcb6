"""A disk that is full or fails: it is said within seconds, nothing is lost, and service comes back by itself."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import asynccontextmanager
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
from holdfast.ops.server_probe import check_health
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
from holdfast.ops.torture import disk_faults
from holdfast.schemas.errors import (
    DataDirectoryError,
    HoldfastError,
    RetryError,
    StorageFailedError,
    UnavailableError,
    UnknownOutcomeError,
)
from holdfast.schemas.limits import MIB
from holdfast.streams import storing
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
from tests.campaigns.disk_rig import DiskRig, Injection, SmallDisk, Watcher, ends_within, what_is_missing
from tests.campaigns.disk_waits import STACKS_SIGNAL, StalledError, Waits, supervised
from tests.running import eventually
from tests.support import LIMIT_S, OwnServer, create_stream, stop_process

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from holdfast.schemas.refs import Ref
    from holdfast.streams.connection import Connection

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
async def test_a_writer_learns_the_cause_and_goes_on_when_space_is_back(
    disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
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
            with pytest.raises(StorageFailedError) as raised:
                await _put_many(hf)
            assert raised.value.cause == "no space left on device"
            # Whoever writes next learns it at once: not as the first one, who waited before it asked why.
            with monkeypatch.context() as never:
                never.setattr(storing, "SUSPECT_S", 3_600.0)
                with pytest.raises(StorageFailedError):
                    await hf.put({"n": -1, "text": os.urandom(2_000).hex()})
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


class FilledUpAtStart(EmbeddedServer):
    """A server whose disk fills up in the moment of its start, each time that is asked for."""

    def __init__(self, settings: ServerSettings, disk: SmallDisk) -> None:
        super().__init__(settings)
        self._disk = disk
        self.times = 0

    async def _spawn(self, binary: Path) -> asyncio.subprocess.Process:
        if self.times:
            self.times -= 1
            await asyncio.to_thread(self._disk.fill)
        return await super()._spawn(binary)


@needs_disks
@pytest.mark.asyncio
async def test_a_disk_that_fills_up_while_the_server_restarts_holds_nothing_up(disk: SmallDisk) -> None:
    """The server cannot even say where it listens then, nor will it ever: that is not waited for."""
    async with FilledUpAtStart(ServerSettings(data=disk.path / "data"), disk) as server:
        url = server.info.nats_url
        async with open_connection(url) as connection:
            await ensure_topology(connection)
            await publish(connection, Outgoing("$KV.ctx-hot.default.a", {}, b"a"))
            server.times = 1
            async with asyncio.timeout(10):
                with pytest.raises(DataDirectoryError, match="no space left on device"):
                    await server.restart()
                assert not server.is_running
                disk.free()
                await server.restart()
                assert server.info.nats_url == url
                await eventually(partial(_stores, connection))
            assert (await stream_info(connection, HOT_STREAM)).messages == 1


@needs_disks
@pytest.mark.asyncio
async def test_starts_that_a_full_disk_has_spoiled_are_not_held_against_the_server(
    disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_watch, "FAILED_STARTS", 2)
    async with (
        FilledUpAtStart(ServerSettings(data=disk.path / "data"), disk) as server,
        open_connection(server.info.nats_url) as connection,
    ):
        await ensure_topology(connection)
        watch = server_watch.Watch(server, connection)
        await asyncio.to_thread(disk.fill)
        with pytest.raises(HoldfastError):
            await publish(connection, Outgoing("$KV.ctx-hot.default.a", {}, os.urandom(60_000)), timeout_s=0.5)
        for _ in range(3):
            await watch.look()
            disk.free()
            server.times = 1
            await watch.look()
            assert server.times == 0
            assert not server.is_running
        await watch.look()
        disk.free()
        await watch.look()
        assert server.is_running
        await eventually(partial(_stores, connection))


@needs_disks
@pytest.mark.asyncio
async def test_a_server_that_has_failed_to_write_is_not_waited_for(disk: SmallDisk) -> None:
    async with EmbeddedServer(ServerSettings(data=disk.path / "data")) as server:
        async with open_connection(server.info.nats_url) as connection:
            await ensure_topology(connection)
            await asyncio.to_thread(disk.fill)
            with pytest.raises(UnknownOutcomeError):
                await publish(connection, Outgoing("$KV.ctx-hot.default.a", {}, os.urandom(60_000)), timeout_s=0.5)
        with pytest.raises(StorageFailedError) as raised:
            await check_health(server.info.monitor_url)
        assert raised.value.cause == "no space left on device"
        disk.free()


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
@pytest.mark.timeout(200)
@pytest.mark.asyncio
async def test_short_campaign(tmp_path: Path) -> None:
    # Less than a test may take: what does not happen is told by the campaign, which knows what it waits for.
    outcome = await campaign(tmp_path, 2, seed=1669, rounds=2, told=False, waits=Waits(total_s=150))
    assert outcome.violations == []
    assert outcome.runs == 2
    assert outcome.acknowledged > 50
    assert (outcome.lost, outcome.doubled) == (0, 0)


class StandingStill:
    """A system that acknowledges nothing any more, whatever is done to its disk."""

    disk = SmallDisk.__new__(SmallDisk)
    log = Path("/dev/null")

    complaint = ""

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


@pytest.mark.asyncio
async def test_a_campaign_that_stands_still_says_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def system(_folder: Path) -> AsyncGenerator[StandingStill]:
        yield StandingStill()

    async def rounds(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(disk_campaign, "disk_rig", system)
    monkeypatch.setattr(disk_campaign, "_rounds", rounds)
    async with asyncio.timeout(10):
        outcome = await campaign(tmp_path, 4, seed=1, rounds=2, told=False, waits=Waits(total_s=0.1))
    assert len(outcome.violations) == 1
    assert "runs 0 to 1: the start of the system did not happen within 0 s" in outcome.violations[0]
    assert "rounds (test_disk.py" in outcome.violations[0]
    assert str(tmp_path) in outcome.violations[0]


@pytest.mark.asyncio
async def test_work_that_stands_still_ends_though_a_cancel_is_lost() -> None:
    cancelled: list[float] = []

    async def work() -> None:
        waits.begin("nothing at all", 0.05)
        while len(cancelled) < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(time.monotonic())

    waits = Waits()
    with pytest.raises(StalledError, match="nothing at all did not happen within"):
        await supervised(work(), waits, cleanup_s=0.3)
    assert len(cancelled) == 2
    assert await supervised(asyncio.sleep(0, "done"), Waits()) == "done"


TOLD_WHEN_ASKED = """
import asyncio
from functools import partial
from tests.campaigns.disk_waits import tell_stacks_when_asked

async def outer() -> None:
    await inner()

async def inner() -> None:
    asyncio.get_running_loop().call_soon(partial(print, "ready", flush=True))
    await asyncio.Event().wait()

tell_stacks_when_asked()
asyncio.run(outer())
"""


@pytest.mark.asyncio
async def test_a_process_tells_where_its_tasks_stand_when_it_is_asked() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", TOLD_WHEN_ASKED),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(LIMIT_S):
            assert await process.stdout.readline() == b"ready\n"
            process.send_signal(STACKS_SIGNAL)
            told = await process.stderr.readuntil(b"end of stacks")
        assert b"outer (<string>:7) > inner (<string>:11) > wait" in told
    finally:
        process.kill()
        await process.wait()


MANY_THREADS = """
import os, sys, threading, time

def write() -> None:
    while True:
        try:
            os.fsync(file)
        except OSError:
            pass
        time.sleep(0.001)

file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
for _ in range(4):
    threading.Thread(target=write).start()
print("ready", flush=True)
"""


@needs_disks
@pytest.mark.asyncio
async def test_a_fault_ends_though_its_tracer_does_not_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracer that is told to stop while what it traces is killed waits for ever; so does a stopped one."""
    monkeypatch.setattr(disk_faults, "TRACER_S", 0.1)
    disk = SmallDisk()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", MANY_THREADS, str(tmp_path / "file")), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        rig = DiskRig(tmp_path, disk, process)
        async with asyncio.timeout(LIMIT_S):
            async with rig.failing(Injection("up", "fsync", "EIO", "1+")):
                await eventually(lambda: 0 not in tracers_of(process.pid))
                (tracer,) = tracers_of(process.pid)
                stop_process(tracer)
                # Its dead threads are told to the tracer alone, so this process cannot be buried.
                process.kill()
            assert await ends_within(process, LIMIT_S)
        assert not Path(f"/proc/{tracer}").exists()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        disk.remove()


def tracers_of(pid: int) -> set[int]:
    """Who traces the threads of a process, 0 for nobody."""
    statuses = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    return {int(status.partition("TracerPid:")[2].split()[0]) for status in statuses}


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
