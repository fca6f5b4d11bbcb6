"""How workers start, share, stop and what they leave behind."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from blockbuster import BlockingError, blockbuster_ctx
from nats.errors import NoRespondersError

from holdfast.client import connect
from holdfast.lake import LakeIndex
from holdfast.schemas.errors import ClosedError, UnavailableError
from holdfast.schemas.refs import compute_digest, format_ref
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.consumer import DurableConsumer, ack_floor
from holdfast.streams.topology import StreamInfo, stream_info
from holdfast.streams.wire import EVENTS_STREAM, STREAM_OF_TABLE
from holdfast.workers.archiver import Archiver
from holdfast.workers.control import evict, flush
from holdfast.workers.ingester import CONSUMER
from holdfast.workers.settings import WORKERS, WorkerName
from tests.running import (
    Acknowledged,
    dead_letters,
    eventually,
    own_server,
    running,
    settings_in,
    target_of,
    until_ready,
    worker_process,
)
from tests.support import LIMIT_S, OwnServer, api, plain_client

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncGenerator[OwnServer]:
    async with own_server(tmp_path) as started:
        yield started


@pytest_asyncio.fixture
async def connection(server: OwnServer) -> AsyncGenerator[Connection]:
    async with open_connection(target_of(server.url)) as opened:
        yield opened


# Starting and stopping


async def test_workers_drain_in_the_stated_order(
    server: OwnServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "holdfast.workers.system"):
        async with running(server.url, settings_in(tmp_path)):
            pass
    told = [(getattr(record, "action", ""), getattr(record, "worker", "")) for record in caplog.records]
    started = [worker for action, worker in told if action == "worker_started"]
    drained = [worker for action, worker in told if action == "worker_drained"]
    assert started == ["archiver", "ingester", "compactor", "janitor", "resolver"] == list(WORKERS)
    assert drained == ["resolver", "janitor", "compactor", "ingester", "archiver"]


async def test_an_archiver_that_does_not_come_to_an_end_is_cancelled_after_its_time(
    server: OwnServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def stuck(_: Archiver) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    monkeypatch.setattr(Archiver, "run", stuck)
    async with asyncio.timeout(LIMIT_S):
        async with running(server.url, settings_in(tmp_path, drain_timeout_s=0.05), ["archiver"]):
            await begun.wait()
        assert cancelled.is_set()


@pytest.mark.parametrize("name", WORKERS)
async def test_a_worker_whose_connection_was_closed_for_good_ends(
    server: OwnServer, tmp_path: Path, name: WorkerName
) -> None:
    """As over credentials that are good no longer: it could do nothing any more, and its standby would wait."""

    async def run() -> None:
        async with running(server.url, settings_in(tmp_path), [name]) as workers:
            await workers.connection.client.close()
            await asyncio.Event().wait()

    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(ClosedError, match="for good"):
            await run()
        async with running(server.url, settings_in(tmp_path), [name]):
            pass


@pytest.mark.parametrize("name", WORKERS)
async def test_each_worker_runs_alone(server: OwnServer, tmp_path: Path, name: WorkerName) -> None:
    async with running(server.url, settings_in(tmp_path), [name]) as workers:
        assert set(workers.counters()) == {name}


async def test_nothing_is_left_on_the_server_or_in_the_process(server: OwnServer, tmp_path: Path) -> None:
    async with plain_client(server.url) as observer:
        assert await _consumers(observer) == 0
        for _ in range(2):
            tasks = asyncio.all_tasks()
            async with running(server.url, settings_in(tmp_path)), connect(server.url) as hf:
                await hf.emit("a:x", context={"n": 1})
                assert [event async for event in hf.query()]
                await flush(hf.connection)
                await evict(hf.connection, 0.0)
                assert await _consumers(observer) > 1
            # The ingester's is durable: what is unsettled waits for the next one.
            assert await _consumers(observer) == 1
            for _ in range(10):
                await asyncio.sleep(0)  # what was cancelled ends
            left = {task for task in asyncio.all_tasks() - tasks if not task.done()}
            assert left == set()
        with pytest.raises(NoRespondersError):
            await observer.request("$SRV.PING.holdfast", b"", timeout=LIMIT_S)


async def _consumers(client: Any) -> int:
    names: list[str] = []
    for stream in STREAM_OF_TABLE.values():
        answer: dict[str, Any] = await api(client, f"CONSUMER.NAMES.{stream}")
        names += answer["consumers"] or []
    return len(names)


async def test_a_cancel_in_the_middle_drains(server: OwnServer, tmp_path: Path) -> None:
    """A cancel in the middle of everything leaves nothing behind, and nothing is lost."""
    stored = Acknowledged()
    await stored.add(server.url, 200)
    settings = settings_in(tmp_path, archive_interval_s=0.01, archive_rows=20)

    async def run() -> None:
        async with running(server.url, settings):
            await asyncio.Event().wait()

    for _ in range(4):
        task = asyncio.create_task(run())
        done, _ = await asyncio.wait([task], timeout=0.15)
        assert not done
        task.cancel()
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(asyncio.CancelledError):
                await task
    async with running(server.url, settings, ["archiver", "resolver"]):
        async with open_connection(target_of(server.url)) as connection:
            await flush(connection)
            await evict(connection, 0.0)
        await stored.check(server.url, settings.lake)


async def test_a_flush_that_is_given_up_does_not_silence_the_connection(connection: Connection) -> None:
    """What a cancel in the middle of a start leaves behind: an answer that nobody waits for."""
    for _ in range(20):
        flushing = asyncio.create_task(connection.client.flush())
        while not flushing.done():
            await asyncio.sleep(0)
            if connection.client._pongs:
                flushing.cancel()
        await asyncio.gather(flushing, return_exceptions=True)
    async with asyncio.timeout(LIMIT_S):
        await stream_info(connection, EVENTS_STREAM)
        await connection.client.flush()


async def test_workers_restart_where_they_were_killed(server: OwnServer, tmp_path: Path) -> None:
    stored = Acknowledged()
    settings = settings_in(tmp_path, archive_interval_s=0.02)
    for _ in range(2):
        async with worker_process(server.url, settings, WORKERS, dict(os.environ)) as process:
            await until_ready(process)
            await stored.add(server.url, 50)
            process.send_signal(signal.SIGKILL)
            await process.wait()
    async with running(server.url, settings), open_connection(target_of(server.url)) as connection:
        await flush(connection)
        await stored.check(server.url, settings.lake)


async def test_requests_under_way_are_answered_while_the_resolver_drains(server: OwnServer, tmp_path: Path) -> None:
    async with connect(server.url) as hf, plain_client(server.url) as client:
        refs = await hf.put_many([{"n": n} for n in range(300)])
        async with running(server.url, settings_in(tmp_path), ["resolver"]):
            replies = [
                asyncio.create_task(
                    client.request("ctx.default.resolve", msgspec.json.encode({"ref": ref}), timeout=LIMIT_S)
                )
                for ref in refs
            ]
            await asyncio.wait(replies, return_when=asyncio.FIRST_COMPLETED)
        answers = await asyncio.gather(*replies, return_exceptions=True)
        bodies = [msgspec.json.decode(answer.data) for answer in answers if not isinstance(answer, BaseException)]
        # What was taken is answered in full; what was not taken is told at once that nobody is there.
        assert {body["body"]["n"] for body in bodies if "body" in body} <= set(range(300))
        assert all("error" not in body for body in bodies)
        assert len(bodies) > 0


async def test_a_worker_without_a_server_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.workers.system.START_S", 0.2)
    with pytest.raises(UnavailableError, match="no NATS server answers"):
        async with running("nats://127.0.0.1:1", settings_in(tmp_path)):
            pytest.fail("workers started without a server")


async def test_workers_that_start_while_a_cluster_has_no_majority_wait_for_it(
    server: OwnServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them: what they ask first is refused for a while."""
    refusals = Counter[str]()

    def refused_at_first(module: str) -> Callable[[Connection, str], Awaitable[StreamInfo]]:
        async def ask_or_refuse(connection: Connection, name: str) -> StreamInfo:
            refusals[module] += 1
            if refusals[module] <= 2:
                raise UnavailableError("the leader hears 0 of 2 other servers")
            return await stream_info(connection, name)

        return ask_or_refuse

    for module in ("streams.tail", "workers.resolver"):
        monkeypatch.setattr(f"holdfast.{module}.stream_info", refused_at_first(module))
    async with running(server.url, settings_in(tmp_path)), connect(server.url, cache_bytes=0) as hf:
        ref = await hf.put({"n": 1})
        answer = await hf.connection.lean.request("ctx.default.resolve", msgspec.json.encode({"ref": ref}))
        assert msgspec.json.decode(answer.data)["body"] == {"n": 1}
    assert refusals["streams.tail"] > 2
    assert refusals["workers.resolver"] > 2


async def test_the_event_loop_is_never_blocked(server: OwnServer, tmp_path: Path) -> None:
    """Everything that touches the disk, and all that takes long, runs in threads."""
    settings = settings_in(
        tmp_path, archive_interval_s=0.05, purge_interval_s=0.05, compact_interval_s=0.05, archive_rows=20
    )
    with blockbuster_ctx(["holdfast.workers", "holdfast.lake", "holdfast.streams", "holdfast.client"]):
        with pytest.raises(BlockingError):
            LakeIndex.open(settings.index).close()  # the trap is set
        async with running(server.url, settings), connect(server.url, cache_bytes=0) as hf:
            refs = await hf.put_many([{"n": n} for n in range(100)])
            large = await hf.put("x" * 2_000_000)
            for ref in refs[:50]:
                await hf.emit("a:x", {"n": 1}, context=ref)
            await hf.connection.lean.request("ctx.default.event.raw.x", b'{"context": {"raw": 1}}')
            await flush(hf.connection)
            await evict(hf.connection, 0.0)
            assert len((await hf.resolve_many([*refs, large])).found) == 101
            assert len([event async for event in hf.query()]) == 51
            assert (await hf.health())["ok"]
            await hf.stats()


async def test_several_resolvers_share_the_requests(server: OwnServer, tmp_path: Path) -> None:
    async with connect(server.url) as hf, plain_client(server.url) as client:
        refs = await hf.put_many([{"n": n} for n in range(50)])
        async with (
            running(server.url, settings_in(tmp_path, "one"), ["resolver"]) as one,
            running(server.url, settings_in(tmp_path, "one"), ["resolver"]) as two,
        ):
            for _ in range(2):  # of the first round each keeps what it answered
                replies = await asyncio.gather(
                    *(client.request("ctx.default.resolve", b'{"ref":"%b"}' % ref.encode(), timeout=20) for ref in refs)
                )
                assert [msgspec.json.decode(reply.data)["body"]["n"] for reply in replies] == list(range(50))
            counters = [workers.counters()["resolver"]["resolve"] for workers in (one, two)]
        assert sum(counted["answered"] for counted in counters) == 100
        assert min(counted["answered"] for counted in counters) > 0
        assert sum(counted["at_hand"] for counted in counters) > 0


# The ingester


async def test_several_ingesters_share_the_work_and_poison_holds_up_nothing(
    server: OwnServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.streams.consumer.ACK_WAIT_S", 1.0)
    total, in_dead_hands = 300, 60
    poison: list[int] = []
    async with plain_client(server.url) as client, connect(server.url, cache_bytes=0) as hf:
        stream = client.jetstream()
        for n in range(total):
            message = b'{"context": {"n": %d}}' % n if n % 3 else b"{poison %d" % n
            ack = await stream.publish("ctx.default.event.a.x", message)
            if not n % 3:
                poison.append(ack.seq)
        # An ingester that dies with deliveries in hand: they go to the others when their time is up.
        consumer = DurableConsumer(hf.connection, EVENTS_STREAM, CONSUMER)
        await consumer.open()
        await consumer.close()
        async with plain_client(server.url) as dying:
            subscription = await dying.subscribe("hands", max_msgs=in_dead_hands)
            await dying.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{EVENTS_STREAM}.{CONSUMER}", b"%d" % in_dead_hands, reply="hands"
            )
            for _ in range(in_dead_hands):
                await subscription.next_msg(timeout=LIMIT_S)
        async with (
            running(server.url, settings_in(tmp_path, "one"), ["ingester"]) as one,
            running(server.url, settings_in(tmp_path, "two"), ["ingester"]) as two,
        ):
            await eventually(lambda: _settled(hf.connection, total))
            counters = [workers.counters()["ingester"] for workers in (one, two)]
        assert sum(counted["stored"] for counted in counters) == total - len(poison)
        assert sum(counted["dead"] for counted in counters) == len(poison)
        refs = [
            format_ref("event", compute_digest("default", "event", b'{"n": %d}' % n)) for n in range(total) if n % 3
        ]
        async with running(server.url, settings_in(tmp_path), ["resolver"]):
            assert (await hf.resolve_many(refs)).missing == []
        assert sorted(letter.seq for letter in await dead_letters(hf)) == poison


async def _settled(connection: Connection, seq: int) -> bool:
    return await ack_floor(connection, EVENTS_STREAM, CONSUMER) >= seq


async def test_an_ingester_takes_up_what_came_before_it(server: OwnServer, tmp_path: Path) -> None:
    async with plain_client(server.url) as client, connect(server.url) as hf:
        await client.jetstream().publish("ctx.default.event.a.x", b'{"context": "early"}')
        async with running(server.url, settings_in(tmp_path), ["ingester"]) as workers:
            await eventually(lambda: workers.counters()["ingester"]["stored"] == 1)
        assert (await hf.resolve(format_ref("event", compute_digest("default", "event", b'"early"')))).body == "early"


async def test_an_ingester_makes_a_deleted_consumer_anew(server: OwnServer, tmp_path: Path) -> None:
    async with (
        running(server.url, settings_in(tmp_path), ["ingester"]) as workers,
        plain_client(server.url) as client,
    ):
        await client.jetstream().publish("ctx.default.event.a.x", b'{"context": 1}')
        await eventually(lambda: workers.counters()["ingester"]["stored"] == 1)
        await api(client, f"CONSUMER.DELETE.{EVENTS_STREAM}.{CONSUMER}")
        await client.jetstream().publish("ctx.default.event.a.x", b'{"context": 2}')
        # From the beginning again, which changes nothing.
        await eventually(lambda: workers.counters()["ingester"]["stored"] == 2)
        assert workers.counters()["ingester"]["existed"] == 1
