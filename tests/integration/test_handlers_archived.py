"""Handlers beside a resolver and an archiver: what was done, what is handed out again, what was missed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from holdfast.client import Event, Holdfast, connect
from holdfast.client.handler_policy import consumer_name, control_name
from holdfast.client.handlers import Handlers
from holdfast.schemas import failpoints
from holdfast.schemas.errors import GapError, HandlerError
from holdfast.schemas.lineage import RECEIPT
from holdfast.streams.topology import StreamInfo, stream_info
from holdfast.streams.wire import EVENTS_STREAM
from holdfast.workers.control import flush
from holdfast.workers.handler_floors import stats_of_handlers
from tests.command_line import CommandLine
from tests.handler_support import Seen, named, settled
from tests.integration.test_events import rows_of
from tests.running import eventually, own_server, running, settings_in
from tests.support import LIMIT_S

if TYPE_CHECKING:
    from holdfast.workers.settings import WorkerName, WorkerSettings
    from tests.support import OwnServer

WINDOW_S = 0.1


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[OwnServer]:
    async with own_server(tmp_path, duplicate_window_s=WINDOW_S) as started:
        yield started


@pytest_asyncio.fixture
async def hf(server: OwnServer) -> AsyncIterator[Holdfast]:
    async with connect(server.url, agent="tester") as client:
        yield client


def still(tmp_path: Path) -> WorkerSettings:
    """Settings of workers that do nothing by the clock."""
    return settings_in(tmp_path, duplicate_window_s=WINDOW_S)


def purging(tmp_path: Path, **changes: Any) -> WorkerSettings:
    """Settings of an archiver that purges everything archived at once, as far as handlers allow."""
    values: dict[str, Any] = {"archive_interval_s": 0.02, "purge_interval_s": 0.02, "hot_window_s": 0.0, **changes}
    return settings_in(tmp_path, duplicate_window_s=WINDOW_S, **values)


async def log_of(hf: Holdfast) -> StreamInfo:
    return await stream_info(hf.connection, EVENTS_STREAM)


async def register(hf: Holdfast, name: str, pattern: str) -> None:
    """Makes the consumer of a handler that then is away."""
    handlers = Handlers(hf)

    async def never(event: Event) -> None:
        raise AssertionError(event)

    handlers.on(pattern, name=name)(never)
    await handlers.ready()
    await handlers.close()


async def test_an_idempotent_handler_is_run_once_for_an_event(server: OwnServer, tmp_path: Path, hf: Holdfast) -> None:
    runs, first_is_done = Seen(), asyncio.Event()

    async def work(event: Event) -> dict[str, int]:
        runs.add(event)
        await hf.emit("step", {"n": 1})
        await hf.emit("step", {"n": 1})
        return {"done": 1}

    def end(failpoint: str) -> None:
        first_is_done.set()
        raise failpoints.FailpointError(failpoint)

    options: dict[str, Any] = {"name": "h", "idempotent": True, "ack_wait_s": 0.3, "start": "all"}
    async with running(server.url, still(tmp_path), ["resolver"]):
        first = Handlers(hf)
        # Stored with its receipt, and not acknowledged: the event is handed out again.
        failpoints.arm("handler.before_ack", end)
        first.on("job", **options)(work)
        await first.ready()
        event = await hf.emit("job")
        await asyncio.wait_for(first_is_done.wait(), 10)
        await first.close(0.0)
        # Another process knows nothing of it but what is stored.
        second = Handlers(hf)
        second.on("job", **options)(work)
        await eventually(lambda: second.counters["h"].skipped == 1)
        # Nor does a consumer that begins anew run it again.
        await second.close()
        third = Handlers(hf)
        await third.forget("h")
        third.on("job", **options)(work)
        await eventually(lambda: third.counters["h"].skipped == 1)
        await third.close()
    assert [seen.event_id for seen in runs.events] == [event.event_id]
    rows = [row for row in await rows_of(hf.connection, "default") if row.id != event.event_id]
    assert sorted(row.name for row in rows) == [RECEIPT, "job:result", "step", "step"]
    assert {row.parent_event_id for row in rows} == {event.event_id}


async def test_an_idempotent_handler_waits_for_a_resolver(
    server: OwnServer, tmp_path: Path, hf: Holdfast, handlers: Handlers
) -> None:
    seen = Seen()

    @handlers.on("job", name="h", idempotent=True)
    async def work(event: Event) -> None:
        seen.add(event)

    await handlers.ready()
    # With an id that does not say how old it is: it may have been done long ago.
    await hf.emit("job", event_id="job 7")
    await eventually(lambda: _unsettled(hf, 1))
    assert seen.events == []
    async with running(server.url, still(tmp_path), ["resolver"]):
        await seen.wait()
        await eventually(lambda: handlers.counters["h"].done == 1)


async def _unsettled(hf: Holdfast, count: int) -> bool:
    [state] = await stats_of_handlers(hf.connection)
    return bool(state["unsettled"] == count)


async def test_a_dead_letter_is_handed_to_its_handler_again(
    server: OwnServer, tmp_path: Path, hf: Holdfast, handlers: Handlers
) -> None:
    is_mended = False
    seen = {"one": Seen(), "two": Seen()}

    def register_both(name: str) -> None:
        @handlers.on("job", name=name, max_deliver=1)
        async def work(event: Event) -> None:
            if not is_mended:
                raise ValueError("not yet")
            seen[name].add(event)

    register_both("one")
    register_both("two")
    holdfast = CommandLine(tmp_path / "cli", HOLDFAST_NATS_URL=server.url, HOLDFAST_DURABILITY="fast")
    async with running(server.url, still(tmp_path), ["resolver"]):
        await handlers.ready()
        event = await hf.emit("job", {"n": 1})
        await eventually(lambda: settled(handlers, "one", 1) and settled(handlers, "two", 1))
        letters = (await asyncio.to_thread(holdfast, "dead", "--json")).lines
        assert sorted(letter["handler"] for letter in letters) == ["one", "two"]
        letter = next(letter for letter in letters if letter["handler"] == "one")
        # Still broken: it dies again, as a letter of its own, which can be handed out like the first.
        await asyncio.to_thread(holdfast, "dead", "replay", str(letter["seq"]))
        await eventually(lambda: settled(handlers, "one", 2))
        is_mended = True
        letters = (await asyncio.to_thread(holdfast, "dead", "--json")).lines
        assert [again["handler"] for again in letters[2:]] == ["one"]
        await asyncio.to_thread(holdfast, "dead", "replay", str(letters[2]["seq"]))
        [again] = await seen["one"].wait()
    assert (again.event_id, again.data) == (event.event_id, {"n": 1})
    assert seen["two"].events == []


async def test_a_letter_that_is_no_handlers_says_what_to_do(server: OwnServer, tmp_path: Path, hf: Holdfast) -> None:
    await hf.connection.client.jetstream().publish("ctx.default.event.a.x", b"{no event")
    async with running(server.url, still(tmp_path), ["archiver"]):
        await flush(hf.connection)
    holdfast = CommandLine(tmp_path / "cli", HOLDFAST_NATS_URL=server.url, HOLDFAST_DURABILITY="fast")
    refused = await asyncio.to_thread(lambda: holdfast("dead", "replay", "1", "--json", status=2))
    assert "--raw" in refused.error["hint"]


async def test_the_log_is_kept_for_a_handler_that_is_away(server: OwnServer, tmp_path: Path, hf: Holdfast) -> None:
    await register(hf, "away", "job:*")
    await register(hf, "elsewhere", "nothing:*")
    before = [(await hf.emit("noise")).event_id for _ in range(5)]
    jobs = [(await hf.emit(f"job:{number}")).event_id for number in range(5)]
    async with running(server.url, purging(tmp_path), ["archiver"]):
        # What comes before its first event goes; the rest stays, though it is archived and old.
        await eventually(lambda: _first_is(hf, len(before) + 1))
        await flush(hf.connection)
        stats = {state["name"]: state for state in await stats_of_handlers(hf.connection, "default")}
        assert (stats["away"]["pending"], stats["away"]["pattern"]) == (5, "job:*")
        assert (stats["elsewhere"]["pending"], await stats_of_handlers(hf.connection, "other")) == (0, [])
        seen, handlers = Seen(), Handlers(hf)

        @handlers.on("job:*", name="away")
        async def work(event: Event) -> None:
            seen.add(event)

        await seen.wait(5)
        assert [event.event_id for event in seen.events] == jobs
        await eventually(lambda: _is_empty(hf))
        await handlers.close()


async def _first_is(hf: Holdfast, seq: int) -> bool:
    return (await log_of(hf)).first_seq == seq


async def _is_empty(hf: Holdfast) -> bool:
    return (await log_of(hf)).messages == 0


async def test_a_handler_left_behind_takes_up_from_the_lake_what_it_missed(
    server: OwnServer, tmp_path: Path, hf: Holdfast, caplog: pytest.LogCaptureFixture
) -> None:
    await register(hf, "away", "job:*")
    jobs = [(await hf.emit(f"job:{number}", number)).event_id for number in range(250)]
    await hf.emit("noise")
    settings = purging(tmp_path, handler_bytes=0)
    told = control_name(consumer_name("default", "away"))
    workers: list[WorkerName] = ["archiver"]
    async with running(server.url, settings, workers):
        await eventually(lambda: _all_gone(hf, len(jobs)))
    seen, handlers = Seen(), Handlers(hf)

    @handlers.on("job:*", name="away", backoff_s=(0.05,))
    async def work(event: Event) -> None:
        seen.add(event)

    await handlers.ready()
    # Nobody can tell it what it missed: it says so, and waits.
    await eventually(lambda: "has missed events" in caplog.text)
    with pytest.raises(GapError, match="away"):
        await handlers.ready()
    async with running(server.url, still(tmp_path), ["resolver"]):
        await seen.wait(len(jobs))
        await eventually(lambda: handlers.counters["away"].done == len(jobs))
        await handlers.ready()
        assert sorted(event.event_id for event in seen.events) == sorted(jobs)
        assert sorted(event.data for event in seen.events) == list(range(250))
        later = await hf.emit("job:later")
        await seen.wait(len(jobs) + 1)
        assert seen.events[-1].event_id == later.event_id
    await handlers.close()
    assert await named(hf.connection, "default", told)


async def _all_gone(hf: Holdfast, seq: int) -> bool:
    return (await log_of(hf)).first_seq > seq


async def test_a_handler_goes_on_soon_after_the_server_was_killed(
    server: OwnServer, hf: Holdfast, handlers: Handlers
) -> None:
    seen = Seen()

    @handlers.on("job", name="h")
    async def work(event: Event) -> None:
        seen.add(event)

    first = await hf.emit("job")
    await seen.wait_for(first.event_id)
    await server.restart()
    # The first may come again: its acknowledgement may have died with the server.
    second = await hf.emit("job")
    async with asyncio.timeout(5):  # well below the silence after which a pull counts as lost
        await seen.wait_for(second.event_id)


async def test_a_result_is_found_when_nobody_tells_of_it(
    server: OwnServer, tmp_path: Path, hf: Holdfast, handlers: Handlers
) -> None:
    async with running(server.url, still(tmp_path), ["resolver"]):
        asking = asyncio.create_task(hf.request("ask", 1, timeout_s=LIMIT_S))
        failing = asyncio.create_task(hf.request("fail", 2, timeout_s=LIMIT_S))
        await eventually(lambda: _asked(hf, 2))
        questions = {event.name: event async for event in hf.query()}
        await hf.emit("ask:result", "another's", parent=await hf.emit("ask"))
        answer = await hf.emit("ask:result", "mine", parent=questions["ask"])
        await hf.emit("fail:error", {"code": "x", "message": "cannot", "handler": "h"}, parent=questions["fail"])
        assert (await asking).event_id == answer.event_id
        with pytest.raises(HandlerError, match="cannot"):
            await failing


async def _asked(hf: Holdfast, count: int) -> bool:
    return (await log_of(hf)).messages == count


async def test_what_is_told_to_a_handler_and_makes_no_sense_is_passed_over(
    server: OwnServer, tmp_path: Path, hf: Holdfast, handlers: Handlers
) -> None:
    seen = Seen()

    @handlers.on("job", name="h")
    async def work(event: Event) -> None:
        seen.add(event)

    async with running(server.url, still(tmp_path), ["resolver"]):
        await handlers.ready()
        foreign = await hf.emit("other")
        told = control_name(consumer_name("default", "h"))
        for data in (
            None,
            {"do": "dance"},
            {"do": "redeliver", "event_id": foreign.event_id},
            {"do": "redeliver", "event_id": "nowhere"},
        ):
            await hf.emit(told, data)
        await hf.emit("job")
        await seen.wait()
        await eventually(lambda: handlers.counters["h"].skipped == 4)
    assert len(seen.events) == 1
