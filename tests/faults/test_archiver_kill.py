"""``kill -9`` of the archiver at each named point of its cycle: nothing is lost, nothing is doubled (I1, I2, I3)."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from holdfast.client import connect
from holdfast.schemas import failpoints
from holdfast.schemas.errors import HoldfastError
from holdfast.streams.connection import open_connection
from holdfast.workers.control import evict, flush
from tests.running import (
    Acknowledged,
    check_watermarks,
    free_address,
    own_server,
    running,
    settings_in,
    system_process,
    target_of,
    until_ready,
    worker_process,
)
from tests.support import LIMIT_S, OwnServer

if TYPE_CHECKING:
    from holdfast.schemas.rows import Position, Table
    from holdfast.workers.settings import WorkerName, WorkerSettings

pytestmark = [pytest.mark.asyncio, pytest.mark.faults]

LAKE_POINTS = [
    "lake.before_parquet_fsync",
    "lake.after_parquet_fsync",
    "lake.before_rename",
    "lake.after_rename",
    "lake.before_commit",
    "lake.after_commit",
    "lake.after_log_fsync",
]
PURGE_POINTS = ["archiver.before_purge", "archiver.after_purge"]
ACK_POINTS = ["archiver.before_ack", "archiver.after_ack"]
WINDOW_S = 0.1
BATCH = 50
KILLS = int(os.environ.get("HOLDFAST_TEST_KILLS", "4"))
READERS: list[WorkerName] = ["resolver"]


@pytest_asyncio.fixture
async def quick_server(tmp_path: Path) -> AsyncGenerator[OwnServer]:
    """A server that forgets ids soon, so that events may be purged while the test runs."""
    async with own_server(tmp_path, duplicate_window_s=WINDOW_S) as server:
        yield server


def archiving(data: Path) -> WorkerSettings:
    """An archiver that commits small runs and purges whatever is archived, as often as it can."""
    return settings_in(
        data,
        "archiver",
        archive_interval_s=0.02,
        archive_rows=40,
        purge_interval_s=0.02,
        hot_window_s=0.0,
        duplicate_window_s=WINDOW_S,
    )


async def until_killed(url: str, settings: WorkerSettings, armed: str) -> None:
    """Runs an archiver until it is killed at the point that is armed."""
    environment = {**os.environ, failpoints.ENVIRONMENT: armed}
    async with worker_process(url, settings, ["archiver"], environment) as process:
        if any(point in armed for point in ACK_POINTS):
            await until_ready(process)
            await ask_in_vain(url, times=int(armed[-1]))
        assert await asyncio.wait_for(process.wait(), LIMIT_S) == -signal.SIGKILL


async def ask_in_vain(url: str, times: int) -> None:
    """Calls flush; the last call meets the armed point, and its answer may or may not come."""
    async with open_connection(target_of(url)) as connection:
        for _ in range(times - 1):
            await flush(connection)
        try:
            await flush(connection, timeout_s=1.0)
        except HoldfastError:
            pass


@pytest.mark.parametrize(
    ("point", "hits"),
    # The fifth commit is one of contexts: events come first, in three runs.
    [(point, (1, 2)) for point in (*LAKE_POINTS, *ACK_POINTS, *PURGE_POINTS)]
    + [(point, (1, 5)) for point in ("lake.before_commit", "lake.after_commit")],
)
@pytest.mark.slow
async def test_B05_archiver_killed_at_any_point_loses_and_doubles_nothing(
    quick_server: OwnServer, tmp_path: Path, point: str, hits: tuple[int, ...]
) -> None:
    url, settings = quick_server.url, archiving(tmp_path)
    stored = Acknowledged()
    marks: dict[Table, Position | None] = {}
    await stored.add(url, BATCH)
    for hit in hits:
        # More comes in each time, so that a later kill meets a lake that has been archived to before.
        await until_killed(url, settings, f"{point}=kill:{hit}")
        await stored.add(url, BATCH)
        # The archiver is dead: readers see everything in what it left.
        async with running(url, settings_in(tmp_path, "reader", duplicate_window_s=WINDOW_S), READERS):
            await stored.check(url, settings.lake)
        marks = await check_watermarks(url, settings.lake, marks)
    async with running(url, settings, ["archiver", *READERS]):
        async with open_connection(target_of(url)) as connection:
            assert (await flush(connection)).watermarks["events"] == BATCH * (len(hits) + 1)
            assert (await evict(connection, 0.0)).left == 0
        await stored.check_by_sdk(url)
    marks = await check_watermarks(url, settings.lake, marks)
    # With all of it archived, the lake alone holds all of it.
    await asyncio.to_thread(stored.check_by_sql, settings.lake, None)


@pytest.mark.slow
@pytest.mark.timeout(30 + 30 * KILLS)
async def test_B05_whole_system_killed_at_random_moments_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Server and workers die together while a producer goes on; it sends again what was not acknowledged.

    For a longer run: ``HOLDFAST_TEST_KILLS=100 HOLDFAST_TEST_SEED=7 pytest -k random_moments``.
    """
    seed = int(os.environ.get("HOLDFAST_TEST_SEED", "1"))
    moments = random.Random(seed)
    settings = archiving(tmp_path)
    stored = Acknowledged()
    marks: dict[Table, Position | None] = {}
    url = await free_address()
    producer: asyncio.Task[None] | None = None
    enough = asyncio.Event()
    for _ in range(KILLS):
        async with system_process(url, tmp_path / "nats", settings) as process:
            await until_ready(process)
            if producer is None:
                producer = asyncio.create_task(produce(stored, url, enough))
            # Not to wait for anything: the moment of death is what is tried out.
            done, _ = await asyncio.wait([producer], timeout=moments.uniform(0.0, 0.7))
            assert not done, producer.result()
            process.kill()
            await process.wait()
    async with system_process(url, tmp_path / "nats", settings) as process:
        await until_ready(process)
        enough.set()
        assert producer is not None
        await asyncio.wait_for(producer, LIMIT_S)
        assert len(stored.events) >= BATCH
        await stored.check(url, settings.lake)
        async with open_connection(target_of(url)) as connection:
            await flush(connection)
            assert (await evict(connection, 0.0)).left == 0
        await stored.check(url, settings.lake)
        marks = await check_watermarks(url, settings.lake, marks)
    await asyncio.to_thread(stored.check_by_sql, settings.lake, None)


async def produce(stored: Acknowledged, url: str, enough: asyncio.Event) -> None:
    """Stores small batches one after another, each until it is acknowledged, until there is enough."""
    async with connect(url, stored.namespace, "tester") as hf:
        while not (enough.is_set() and len(stored.events) >= BATCH):
            await stored.add_by(hf, 10)
