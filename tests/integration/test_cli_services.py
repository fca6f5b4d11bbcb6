"""``holdfast up`` and ``holdfast worker`` as processes: ready, drained, killed, refused."""

from __future__ import annotations

import json
import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.command_line import CommandLine, Service
from tests.support import LIMIT_S


@pytest.fixture
def holdfast(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "data")


def drained(service: Service) -> list[str]:
    """The workers in the order in which the log says they were drained."""
    entries = [json.loads(line) for line in service.err.splitlines()]
    return [entry["worker"] for entry in entries if entry.get("action") == "worker_drained"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_in_the_stated_order(tmp_path: Path, number: signal.Signals) -> None:
    line = CommandLine(tmp_path / "data", HOLDFAST_LOG_FORMAT="json")
    with line.up() as service:
        line("put", "before the end")
        server = int(json.loads((line.data / "server.json").read_text())["pid"])
        service.stop(number)
        assert drained(service) == ["resolver", "janitor", "compactor", "ingester", "archiver"]
    assert not psutil.pid_exists(server)
    assert not (line.data / "server.json").exists()


def test_no_memory_goes_to_pandas(holdfast: CommandLine) -> None:
    assert find_spec("pandas") is not None, "installed here, so that pyarrow would import it"
    with holdfast.up() as service:
        holdfast("put", "to be archived")
        holdfast("flush")  # makes Arrow arrays
        mapped = Path(f"/proc/{service.process.pid}/maps").read_text()
    assert "pyarrow" in mapped
    assert "/pandas/" not in mapped


def test_a_second_signal_ends_it_at_once_and_nothing_is_lost(holdfast: CommandLine) -> None:
    service = holdfast.start("up", "--json")
    try:
        service.read_line()
        ref = holdfast("put", "acknowledged").out.strip()
        # Stopped, it takes both signals at the same moment when it goes on.
        service.process.send_signal(signal.SIGSTOP)
        service.process.send_signal(signal.SIGTERM)
        service.process.send_signal(signal.SIGINT)
        service.process.send_signal(signal.SIGCONT)
        status = service.wait()
    finally:
        service.kill()
    assert status in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert holdfast("resolve", ref, "--raw").raw == b"acknowledged"


def test_a_signal_during_the_start_ends_it_cleanly(holdfast: CommandLine) -> None:
    service = holdfast.start("up", "--json")
    try:
        deadline = time.monotonic() + LIMIT_S
        while not (holdfast.data / "nats-server.conf").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        service.process.send_signal(signal.SIGTERM)
        assert service.wait() == 0
        assert "Traceback" not in service.err
    finally:
        service.kill()
    assert not (holdfast.data / "server.json").exists()


def test_the_death_of_the_server_ends_up_with_an_error(holdfast: CommandLine) -> None:
    service = holdfast.start("up", "--json")
    try:
        service.read_line()
        os.kill(int(json.loads((holdfast.data / "server.json").read_text())["pid"]), signal.SIGKILL)
        assert service.wait() == 3
        last = json.loads(service.err.splitlines()[-1])["error"]
        assert last["code"] == "unavailable"
        assert "nats-server" in last["message"]
    finally:
        service.kill()


def test_workers_run_apart_from_the_server(holdfast: CommandLine) -> None:
    with holdfast.up() as server:
        elsewhere = CommandLine(holdfast.data.parent / "elsewhere", HOLDFAST_NATS_URL=server.ready["nats_url"])
        worker = elsewhere.start("worker", "resolver", "--json")
        try:
            ready = worker.read_line()
            assert ready == {"ready": True, "worker": "resolver", "nats_url": server.ready["nats_url"]}
            assert elsewhere("health", "--json").json["ok"] is True
            worker.stop()
        finally:
            worker.kill()


def test_up_serves_a_server_that_is_named(holdfast: CommandLine) -> None:
    with holdfast.up() as server:
        # Another data directory, so another lake: its archiver archives the same streams there.
        elsewhere = CommandLine(holdfast.data.parent / "elsewhere")
        with elsewhere.up("--nats-url", server.ready["nats_url"]) as second:
            assert second.ready["nats_url"] == server.ready["nats_url"]
            assert not (elsewhere.data / "server.json").exists()
            assert "not verified" in second.err


def test_up_greets_a_person(holdfast: CommandLine) -> None:
    service = holdfast.start("up")
    try:
        assert service.process.stdout is not None
        first = service.process.stdout.readline().decode()
        assert first.startswith("Holdfast is up")
        service.stop(signal.SIGINT)
    finally:
        service.kill()
