"""Health tells what is broken, in time whatever is, and metrics say the same in numbers."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from holdfast.client import Holdfast, connect
from holdfast.lake import Lake
from holdfast.ops.metrics_http import serve_metrics
from holdfast.schemas.errors import UnknownOutcomeError
from holdfast.schemas.ids import now_ms
from holdfast.streams.connection import open_connection
from holdfast.streams.publish import Outgoing, publish, publish_batch
from holdfast.streams.topology import purge_below
from holdfast.streams.wire import EVENTS_STREAM
from holdfast.workers import picture
from holdfast.workers.control import accept_gap, flush
from holdfast.workers.health import collect_health
from holdfast.workers.picture import Observer
from holdfast.workers.settings import WORKERS, WorkerName, WorkerSettings
from tests.running import running, settings_in, target_of, until_ready, worker_process
from tests.support import OwnServer, plain_client
from tests.unit.test_exposition import read

ALMOST: list[WorkerName] = ["ingester", "compactor", "janitor", "resolver"]


@pytest_asyncio.fixture
async def server(own_server: OwnServer) -> AsyncIterator[OwnServer]:
    yield own_server


@pytest.fixture
def settings(tmp_path: Path) -> WorkerSettings:
    return settings_in(tmp_path)


async def objects(hf: Holdfast) -> set[str]:
    """What health names, asked as a user would, and answered in six seconds."""
    started = time.monotonic()
    answer = await hf.health()
    assert time.monotonic() - started < 6.5
    assert answer["ok"] == (not answer["problems"])
    return {problem["object"] for problem in answer["problems"]}


async def test_B30_a_stopped_archiver_is_told_in_time_and_a_missing_one_too(
    server: OwnServer, settings: WorkerSettings
) -> None:
    async with running(server.url, settings, ALMOST), connect(server.url) as hf:
        assert await objects(hf) == {"archiver"}
        async with worker_process(server.url, settings, ["archiver"], dict(os.environ)) as process:
            await until_ready(process)
            assert await objects(hf) == set()
            process.send_signal(signal.SIGSTOP)
            [problem] = (await hf.health())["problems"]
            assert (problem["object"], problem["invariant"]) == ("archiver", "I8")
            assert "has not answered" in problem["what"]
            process.send_signal(signal.SIGCONT)
            assert await objects(hf) == set()


async def test_B30_each_worker_that_does_not_run_is_named(server: OwnServer, settings: WorkerSettings) -> None:
    async with running(server.url, settings, ["archiver", "resolver"]), connect(server.url) as hf:
        assert await objects(hf) == {"ingester", "compactor", "janitor"}
        async with running(server.url, settings_in(settings.lake.parent, "two"), ["ingester", "janitor"]):
            assert await objects(hf) == {"compactor"}


async def test_an_alarm_outlives_the_archiver_until_the_loss_is_accepted(
    server: OwnServer, settings: WorkerSettings
) -> None:
    async with connect(server.url) as hf:
        for number in range(3):
            await hf.emit("a:x", {"n": number})
        await purge_below(hf.connection, EVENTS_STREAM, 3)
        for attempt in range(2):
            async with running(server.url, settings):
                if attempt == 0:
                    await flush(hf.connection)
                [problem] = (await hf.health())["problems"]
                assert (problem["invariant"], problem["object"]) == ("I1", EVENTS_STREAM)
                assert "accept-gap" in problem["next_step"]
        # Also while no archiver runs: the loss is no less.
        async with running(server.url, settings, ALMOST):
            assert await objects(hf) == {"archiver", EVENTS_STREAM}
        for _ in range(2):
            async with running(server.url, settings):
                await accept_gap(hf.connection, "events")
                assert await objects(hf) == set()


async def test_a_clock_that_is_wrong_is_told(server: OwnServer, settings: WorkerSettings) -> None:
    async with running(server.url, settings) as workers:
        lake = await asyncio.to_thread(Lake.open, settings.lake)
        observer = Observer(workers.connection, lake, clock_ms=lambda: now_ms() + 120_000)
        try:
            [problem] = (await collect_health(observer))["problems"]
        finally:
            await observer.close()
        assert problem["object"].startswith("clock of ")
        assert "behind this machine's" in problem["what"]


async def test_a_lake_that_hangs_holds_no_answer_up(
    server: OwnServer, settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "PART_S", 0.5)
    async with running(server.url, settings) as workers:
        lake = await asyncio.to_thread(Lake.open, settings.lake)
        mended = threading.Event()
        monkeypatch.setattr(lake, "watermark", lambda _: mended.wait() and None)
        observer = Observer(workers.connection, lake)
        try:
            answers: list[dict[str, Any]] = [await collect_health(observer) for _ in range(3)]
            for answer in answers:
                assert [problem["object"] for problem in answer["problems"]] == ["lake"]
                assert answer["lag"] == {}
            assert "has not come back" in answers[-1]["problems"][0]["what"]
            mended.set()
            monkeypatch.undo()
            assert (await collect_health(observer))["ok"]
        finally:
            mended.set()
            await observer.close()


async def test_metrics_are_json_and_text_and_count_what_is_there(server: OwnServer, settings: WorkerSettings) -> None:
    async with running(server.url, settings), connect(server.url) as hf, plain_client(server.url) as plain:
        await hf.put_many([{"n": n} for n in range(5)])
        await hf.emit("a:x")
        reply = await plain.request("ctx.default.metrics", b'{"format":"prometheus"}', timeout=10)
        assert reply.headers is not None
        assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        found = read(reply.data.decode())
        lag = {labels["stream"]: value for labels, value in found["holdfast_archive_lag_messages"]}
        assert lag == {"KV_ctx-hot": 5, "CTX_EVENTS": 1, "KV_ctx-keys": 0}
        ages = {labels["stream"]: value for labels, value in found["holdfast_oldest_unarchived_seconds"]}
        assert 0 <= ages["KV_ctx-hot"] < 60
        assert ages["KV_ctx-keys"] == 0
        assert {labels["worker"]: value for labels, value in found["holdfast_worker_processes"]} == dict.fromkeys(
            WORKERS, 1
        )
        [(_, resident)] = found["holdfast_process_resident_bytes"]
        assert resident > 10_000_000
        await flush(hf.connection)
        answer = await hf.call_resolver("metrics", {})
        by_name = {metric["name"]: metric for metric in answer["metrics"]}
        assert {sample["value"] for sample in by_name["holdfast_archive_lag_messages"]["samples"]} == {0}
        assert sum(sample["value"] for sample in by_name["holdfast_problems"]["samples"]) == 0
        assert {sample["labels"]["table"]: sample["value"] for sample in by_name["holdfast_lake_rows"]["samples"]} == {
            "contexts": 5,
            "events": 1,
            "key_versions": 0,
        }
        async with serve_metrics(target_of(server.url), 0) as port:
            status, body = await fetch(port, "GET /metrics HTTP/1.1")
            assert status == 200
            assert read(body).keys() >= {"holdfast_watermark_seq", "holdfast_dead_letters", "holdfast_problems"}
            assert (await fetch(port, "GET / HTTP/1.1"))[0] == 404
            assert (await fetch(port, "POST /metrics HTTP/1.1"))[0] == 405
            assert (await fetch(port, "x" * 9_000))[0] == 400


async def fetch(port: int, line: str) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{line}\r\nHost: x\r\n\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return int(head.split(" ")[1]), body


async def test_a_write_that_nobody_acknowledged_is_counted(server: OwnServer) -> None:
    async with open_connection(server.url) as connection:
        message = Outgoing("ctx.a.event.b.c", {}, b"{}")
        await publish(connection, message)
        assert connection.unknown_writes == 0
        server.signal(signal.SIGSTOP)
        try:
            with pytest.raises(UnknownOutcomeError):
                await publish(connection, message, timeout_s=0.1)
            with pytest.raises(UnknownOutcomeError):
                await publish_batch(connection, [message, message], timeout_s=0.1)
        finally:
            server.signal(signal.SIGCONT)
        assert connection.unknown_writes == 3
