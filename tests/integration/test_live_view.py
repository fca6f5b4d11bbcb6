"""The live SQL view while everything moves: never short, never double, at any moment (I1, I5)."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from holdfast.client import Holdfast, connect
from holdfast.lake import connect as connect_lake
from holdfast.streams.connection import open_connection
from holdfast.streams.events import NewEvent
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import EVENTS_STREAM, HOT_STREAM
from holdfast.workers.control import archiver_status, evict, flush
from tests.running import eventually, own_server, settings_in, target_of, until_ready, worker_process

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

EVENTS: Final = 20_000
CONTEXTS: Final = 10_000
PUBLISHERS: Final = 4
BATCH: Final = 125
WINDOW_S: Final = 0.1


class Tally(msgspec.Struct):
    """How much was handed to the server, and how much of it is acknowledged."""

    sent: int = 0
    acknowledged: int = 0


class Observation(msgspec.Struct, frozen=True):
    """One count, and what bounds it: acknowledged before it began, sent by the time it ended."""

    acknowledged_before: int
    count: int
    distinct: int
    sent_after: int


class Reader(threading.Thread):
    """Counts through the live view as fast as it can, until told to stop."""

    def __init__(self, lake: Path, url: str, query: str, tally: Tally, looks: int) -> None:
        super().__init__(name=f"reader of {query}")
        self.observations: list[Observation] = []
        self.error: BaseException | None = None
        self.stopping = threading.Event()
        self._arguments: tuple[Any, ...] = (lake, url)
        self._query = query
        self._tally = tally
        self._looks = looks

    def run(self) -> None:
        try:
            with connect_lake(*self._arguments) as sql:
                while not self.stopping.is_set():
                    before = self._tally.acknowledged
                    [(count, distinct)] = sql.execute(self._query).fetchall()
                    self.observations.append(Observation(before, count, distinct, self._tally.sent))
        except BaseException as error:
            self.error = error
            raise

    async def stop(self) -> None:
        """Ends the thread and tells its failure."""
        self.stopping.set()
        await asyncio.to_thread(self.join)
        if self.error is not None:
            raise self.error

    async def keep_pace(self, batches: int, publisher: int) -> None:
        """Waits while the reader has looked less often than it should between so many batches of each publisher, who
        take turns: so it sees them come."""
        share = batches * self._looks + publisher * self._looks // PUBLISHERS
        await eventually(lambda: len(self.observations) >= share or not self.is_alive(), 0.001)


async def publish_events(hf: Holdfast, publisher: int, tally: Tally, reader: Reader) -> None:
    for start in range(0, EVENTS // PUBLISHERS, BATCH):
        await reader.keep_pace(start // BATCH, publisher)
        events = [
            NewEvent(namespace=hf.namespace, agent_id=f"agent{publisher}", name="count:up", data={"n": start + n})
            for n in range(BATCH)
        ]
        tally.sent += BATCH
        assert all(await hf.publish_many(events))
        tally.acknowledged += BATCH


async def put_contexts(hf: Holdfast, publisher: int, tally: Tally, reader: Reader) -> None:
    for start in range(0, CONTEXTS // PUBLISHERS, BATCH):
        await reader.keep_pace(start // BATCH, publisher)
        bodies = [{"publisher": publisher, "n": start + n} for n in range(BATCH)]
        tally.sent += BATCH
        await hf.put_many(bodies)
        tally.acknowledged += BATCH


@pytest.mark.parametrize(
    ("table", "identity", "total", "looks", "publish"),
    [("events", "event_id", EVENTS, 2, publish_events), ("contexts", "ref", CONTEXTS, 4, put_contexts)],
)
async def test_count_is_exact_at_every_moment_while_rows_are_published_archived_and_purged(
    tmp_path: Path, table: str, identity: str, total: int, looks: int, publish: Any
) -> None:
    settings = settings_in(
        tmp_path,
        archive_interval_s=0.05,
        archive_rows=1_000,
        purge_interval_s=0.05,
        compact_interval_s=0.5,
        hot_window_s=0.0,
        duplicate_window_s=WINDOW_S,
    )
    stream = EVENTS_STREAM if table == "events" else HOT_STREAM
    tally = Tally()
    async with own_server(tmp_path, duplicate_window_s=WINDOW_S) as server:
        # In a process of its own, as in life: readers and writers here do not wait for its interpreter lock.
        async with worker_process(server.url, settings, ["archiver", "compactor"], dict(os.environ)) as workers:
            await until_ready(workers)
            query = f"SELECT count(*), count(DISTINCT {identity}) FROM {table}"
            reader = Reader(settings.lake, server.url, query, tally, looks)
            reader.start()
            try:
                async with connect(server.url, agent="counter") as hf:
                    await asyncio.gather(*(publish(hf, number, tally, reader) for number in range(PUBLISHERS)))
            finally:
                await reader.stop()
            async with open_connection(target_of(server.url)) as connection:
                # It was no still life: rows were archived in many commits and purged meanwhile.
                counters = (await archiver_status(connection)).counters
                assert counters[f"{table}_cycles"] >= 5
                assert counters[f"{table}_purged"] > 0
                await flush(connection)
                if table == "contexts":
                    await evict(connection, 0.0)
                    assert (await stream_info(connection, stream)).messages == 0
        wrong = [
            seen
            for seen in reader.observations
            if not seen.acknowledged_before <= seen.count <= seen.sent_after or seen.count != seen.distinct
        ]
        assert wrong == []
        assert len(reader.observations) >= 50
        assert len({seen.count for seen in reader.observations}) >= 25
        with connect_lake(settings.lake, server.url) as sql:
            assert sql.execute(query).fetchall() == [(total, total)]
    with connect_lake(settings.lake) as sql:
        assert sql.execute(query).fetchall() == [(total, total)]
