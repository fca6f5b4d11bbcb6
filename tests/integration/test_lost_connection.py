"""What a connection that is lost, dead or closed does to calls under way, and to calls made meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import nats.errors
import pytest
import uvloop

from holdfast.client import Holdfast, connect
from holdfast.schemas.errors import ClosedError, RetryError, UnavailableError, UnknownOutcomeError
from holdfast.streams.connection import Connection, Msg, open_connection
from holdfast.streams.publish import Outgoing, publish, publish_batch, publish_each
from holdfast.streams.retry import NotConnectedError, call_with_retry
from holdfast.streams.tolerant_client import AwayError
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import EVENTS_STREAM, event_subject
from tests.running import eventually
from tests.support import LIMIT_S, OwnServer, plain_client

if TYPE_CHECKING:
    from tests.conftest import StartServer

SOON_S = 3.0
"""Well below every deadline and time-out of a call, and far above what a busy machine takes."""


async def ended(tasks: list[asyncio.Task[Any]], within_s: float) -> list[BaseException | None]:
    """The errors of tasks, all of which must have ended within so many seconds."""
    _, pending = await asyncio.wait(tasks, timeout=within_s)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    assert not pending
    return [task.exception() for task in tasks]


# Closed.


async def test_a_read_in_flight_ends_when_its_client_closes(nats_server: str, namespace: str) -> None:
    """It was tried again on a connection that nobody swept or listened on any more, and hung for ever."""
    async with connect(nats_server, namespace=namespace, cache_bytes=0) as hf:
        refs = await hf.put_many([{"n": n} for n in range(20)])
        await hf.keys.put("k", 1)
        reads: list[Callable[[], Awaitable[Any]]] = [lambda: history(hf, "k"), lambda: hf.resolve_many(refs)]
        reads += [partial(hf.resolve, ref) for ref in refs]
        tasks = [asyncio.create_task(_awaited(read)) for read in reads]
        await asyncio.sleep(0)
    for error in await ended(tasks, SOON_S):
        assert error is None or isinstance(error, ClosedError)


async def history(hf: Holdfast, key: str) -> list[int]:
    return [version.version async for version in hf.keys.history(key)]


async def _awaited(call: Callable[[], Awaitable[Any]]) -> Any:
    return await call()


async def test_leaving_waits_for_a_commit_that_was_handed_in(nats_server: str, namespace: str) -> None:
    async with connect(nats_server, namespace=namespace) as hf:
        committing = asyncio.create_task(hf.keys.commit({"a": 1, "b": 2}))
        abandoned = asyncio.create_task(hf.keys.commit({"c": 3, "d": 4}))
        await eventually(lambda: len(hf.keys._writer._tasks) == 2)
        abandoned.cancel()
    assert {key: version.version for key, version in (await committing).items()} == {"a": 1, "b": 1}
    async with connect(nats_server, namespace=namespace) as hf:
        assert (await hf.keys.get("c")).body == 3


async def test_what_a_closed_connection_is_asked_for_fails_at_once(nats_server: str) -> None:
    async def later(connection: Connection) -> None:
        async with connection.lean.stream("silent") as queue:
            await queue.get()

    async with plain_client(nats_server) as client:
        await client.subscribe("silent")
        await client.flush()
        async with open_connection(nats_server) as connection:
            lean = connection.lean
            under_way: list[asyncio.Task[Any]] = [
                asyncio.create_task(later(connection)),
                asyncio.create_task(lean.collect("silent", b"", lambda _: False, silence_s=60)),
                asyncio.create_task(lean.request("silent", timeout_s=60)),
            ]
            await lean.request("$JS.API.INFO")
        under_way += [
            asyncio.create_task(later(connection)),
            asyncio.create_task(lean.collect("silent", b"", lambda _: False)),
            asyncio.create_task(lean.request("silent")),
            asyncio.create_task(lean.publish("silent")),
            asyncio.create_task(connection.api("INFO")),
        ]
        for error in await ended(under_way, SOON_S):
            assert isinstance(error, ClosedError)
            assert not isinstance(error, RetryError)


async def test_calls_on_a_closed_client_fail_at_once(nats_server: str, namespace: str) -> None:
    async with connect(nats_server, namespace=namespace, cache_bytes=0) as hf:
        ref = await hf.put("x")
        await hf.keys.put("k", 1)
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: hf.put("y"),
        lambda: hf.put_many(["y", "z"]),
        lambda: hf.emit("e", context="y"),
        lambda: hf.resolve(ref),
        lambda: hf.resolve_many([ref, ref]),
        lambda: hf.keys.put("k", 2),
        lambda: hf.keys.get("k"),
        lambda: history(hf, "k"),
        hf.stats,
        lambda: anext(hf.keys.watch("k")),
        lambda: hf.handlers.request("r", timeout_s=5),
    ]
    for error in await ended([asyncio.create_task(_awaited(call)) for call in calls], SOON_S):
        assert isinstance(error, ClosedError)


async def test_a_request_to_a_silent_server_ends_in_its_time_and_leaves_nothing(own_server: OwnServer) -> None:
    async with connect(own_server.url) as hf:
        before = len(hf.connection.client._subs)
        own_server.signal(signal.SIGSTOP)
        try:
            asking = asyncio.create_task(hf.handlers.request("r", timeout_s=0.2))
            assert isinstance((await ended([asking], SOON_S))[0], UnavailableError)
            assert len(hf.connection.client._subs) == before
        finally:
            own_server.signal(signal.SIGCONT)


async def test_a_watch_that_nobody_closed_ends_with_its_client(nats_server: str, namespace: str) -> None:
    seen: list[int] = []

    async def listen(hf: Holdfast, begun: asyncio.Event) -> None:
        begun.set()
        async for change in hf.keys.watch("k", initial=True):
            seen.append(change.version)
            begun.set()

    async with connect(nats_server, namespace=namespace) as hf:
        await hf.keys.put("k", 1)
        begun = asyncio.Event()
        listening = asyncio.create_task(listen(hf, begun))
        await eventually(lambda: seen == [1])
    assert await ended([listening], SOON_S) == [None]
    assert hf.connection.on_close == []
    assert hf.connection.on_reconnect == []


# Lost.


@asynccontextmanager
async def away(server: OwnServer, connection: Connection) -> AsyncGenerator[None]:
    """While the block lasts, the server is not there; at its end the connection stands again."""
    is_back = asyncio.Event()
    connection.on_reconnect.append(is_back.set)
    await server.kill()
    await eventually(lambda: not connection.client.is_connected)
    try:
        yield
    finally:
        await server.start(with_streams=False)
        await asyncio.wait_for(is_back.wait(), LIMIT_S)
        connection.on_reconnect.remove(is_back.set)


def message(n: int) -> Outgoing:
    return Outgoing(event_subject("n", "tester", f"e:{n}"), {}, b"{}")


async def test_what_was_told_as_failed_is_not_sent_when_the_server_is_back(own_server: OwnServer) -> None:
    """nats-py keeps what is published meanwhile, and sends it when nobody asks for it any more."""
    async with open_connection(own_server.url) as connection:
        before = (await stream_info(connection, EVENTS_STREAM)).last_seq
        async with away(own_server, connection):
            for n in range(3):
                with pytest.raises(NotConnectedError):
                    await publish(connection, message(n), timeout_s=0.1)
                assert isinstance((await publish_each(connection, [message(n)]))[0], NotConnectedError)
                with pytest.raises(NotConnectedError):
                    await publish_batch(connection, [message(n), message(n + 3)])
            # Until the deadline, and then as what it is.
            with pytest.raises(UnavailableError):
                await call_with_retry(lambda: publish(connection, message(9), timeout_s=0.1), deadline_s=0.5)
            with pytest.raises(NotConnectedError):
                await connection.lean.publish(message(10).subject, b"{}")
            with pytest.raises(AwayError):  # as who answers a request does
                await connection.client.publish(message(11).subject, b"{}")
            assert connection.client.pending_data_size == 0
            assert connection.unknown_writes == 0
        await connection.client.flush()
        assert (await stream_info(connection, EVENTS_STREAM)).last_seq == before


async def test_what_was_waiting_to_be_sent_when_the_connection_was_lost_is_not_sent_on_the_next(
    own_server: OwnServer,
) -> None:
    async with open_connection(own_server.url) as connection:
        client = connection.client
        before = (await stream_info(connection, EVENTS_STREAM)).last_seq
        own_server.signal(signal.SIGSTOP)
        try:
            fill(connection)
            await eventually(lambda: not client._pending)  # the flusher waits for the server to take that
            lost = asyncio.create_task(publish(connection, message(0)))
            await eventually(lambda: client._pending)
            await client.force_reconnect()
            assert isinstance((await ended([lost], SOON_S))[0], UnknownOutcomeError)
        finally:
            own_server.signal(signal.SIGCONT)
        await call_with_retry(lambda: connection.api("INFO"), deadline_s=LIMIT_S)
        assert (await stream_info(connection, EVENTS_STREAM)).last_seq == before


async def test_a_write_that_may_have_been_sent_stays_unknown(own_server: OwnServer) -> None:
    """The attempts after it were not sent, and say so; of the first one nobody knows."""
    async with open_connection(own_server.url) as connection:
        attempts = 0

        async def call() -> None:
            nonlocal attempts
            attempts += 1
            if attempts == 1:
                raise UnknownOutcomeError("no answer came in time")
            await publish(connection, message(0), timeout_s=0.1)

        async with away(own_server, connection):
            with pytest.raises(UnknownOutcomeError):
                await call_with_retry(call, deadline_s=0.3)
        assert attempts > 1


async def test_calls_wait_for_the_connection_and_go_on_as_soon_as_it_is_back(own_server: OwnServer) -> None:
    async with connect(own_server.url, cache_bytes=0) as hf:
        ref = await hf.put("x")
        await hf.keys.put("k", 1)
        took: list[float] = []
        back_at = 0.0

        def is_back() -> None:
            nonlocal back_at
            back_at = time.monotonic()

        async def timed(call: Callable[[], Awaitable[Any]]) -> None:
            await call()
            took.append(time.monotonic() - back_at)

        hf.connection.on_reconnect.append(is_back)
        async with away(own_server, hf.connection):
            calls: list[Callable[[], Awaitable[Any]]] = [
                *(partial(hf.put, f"away {n}") for n in range(5)),
                *(lambda: hf.resolve(ref) for _ in range(5)),
                lambda: hf.resolve_many([ref, ref]),
                lambda: hf.keys.put("k", 2),
                lambda: history(hf, "k"),
                lambda: hf.emit("e"),
            ]
            tasks = [asyncio.create_task(timed(call)) for call in calls]
            _, pending = await asyncio.wait(tasks, timeout=2.0)  # a blind backoff sleeps for a second or two by now
            assert len(pending) == len(tasks)
        assert await ended(tasks, LIMIT_S) == [None] * len(tasks)
        # A stream that is being recovered may refuse a first attempt.
        assert sorted(took)[len(took) // 2] < 0.5
        assert max(took) < SOON_S
        assert await history(hf, "k") == [2, 1]


async def test_subscriptions_made_around_a_loss_are_there_on_the_next_connection(own_server: OwnServer) -> None:
    """What waits to be sent is dropped with the connection, of subscriptions too: they are made anew."""
    got: asyncio.Queue[str] = asyncio.Queue()

    async def take(message: Msg) -> None:
        got.put_nowait(message.subject)

    async with open_connection(own_server.url) as connection:
        client = connection.client
        await client.subscribe("before", cb=take)
        gone = await client.subscribe("gone", cb=take)
        client._pending.append(b"")
        await client.subscribe("just.before", cb=take)
        await gone.unsubscribe()
        async with away(own_server, connection):
            await client.subscribe("meanwhile", cb=take)
            gone_too = await client.subscribe("gone", cb=take)
            await gone_too.unsubscribe()
        for subject in ("gone", "before", "just.before", "meanwhile"):
            await client.publish(subject, b"")
        async with asyncio.timeout(LIMIT_S):
            assert [await got.get() for _ in range(3)] == ["before", "just.before", "meanwhile"]


async def test_streamed_replies_end_with_the_connection(own_server: OwnServer) -> None:
    """They waited for their time-outs of five or ten seconds, after the server was back for long."""
    async with plain_client(own_server.url) as client:

        async def answer(message: Msg) -> None:
            await message.respond(b"first")

        await client.subscribe("half", cb=answer)
        await client.flush()
        async with open_connection(own_server.url) as connection:
            seen: list[bytes] = []
            came = asyncio.Event()

            async def later() -> None:
                async with connection.lean.stream("half") as queue:
                    while True:
                        seen.append((await queue.get()).data)
                        came.set()

            under_way = [
                asyncio.create_task(later()),
                asyncio.create_task(connection.lean.collect("half", b"", lambda _: False, silence_s=60)),
            ]
            await asyncio.wait_for(came.wait(), LIMIT_S)
            await own_server.kill()
            for error in await ended(under_way, SOON_S):
                assert isinstance(error, UnknownOutcomeError)
            assert seen == [b"first"]
            assert connection.lean._streams == {}
            await own_server.start(with_streams=False)


async def test_what_had_come_whole_before_the_connection_was_lost_is_read(connection: Connection) -> None:
    """The loss is told after what had arrived, and to whoever asks again."""
    async with connection.lean.stream("$JS.API.INFO") as queue:
        while queue.empty():  # noqa: ASYNC110  its answer comes
            await asyncio.sleep(0.001)
        connection.lean.fail_in_flight(UnknownOutcomeError("lost"))
        assert (await queue.get()).data
        for _ in range(2):
            with pytest.raises(UnknownOutcomeError, match="lost"):
                await asyncio.wait_for(queue.get(), SOON_S)
        with pytest.raises(UnknownOutcomeError):
            queue.get_nowait()


# Dead.


def fill(connection: Connection) -> None:
    """Publishes more than the kernel takes for a server that does not read, to nobody."""
    for _ in range(31):
        assert connection.client.publish_now("nobody.listens", bytes(256 * 1024))


async def overfill(connection: Connection) -> None:
    """Publishes until no more may be pending; the flusher has as much again in hand, and waits for the kernel."""
    for _ in range(2):
        for size in (256 * 1024, 1024, 1):
            while connection.client.publish_now("nobody.listens", bytes(size)):
                pass
        await asyncio.sleep(0.1)


LOOPS = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


async def run_on(new_loop: Callable[[], asyncio.AbstractEventLoop], main: Callable[[], Awaitable[None]]) -> None:
    """Runs on a loop of its own, so that of the tests may be another."""

    def run() -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(_awaited(main))

    await asyncio.to_thread(run)


@LOOPS
async def test_a_dead_link_with_unsent_bytes_is_left(
    start_server: StartServer, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """nats-py closes the old connection first, and waits until the other side has taken what is on its way."""
    servers = {server.url: server for server in (await start_server(), await start_server())}

    async def main() -> None:
        async with open_connection(",".join(servers)) as connection:
            at = connection.client.connected_url
            assert at is not None
            current = servers[at.geturl()]
            current.signal(signal.SIGSTOP)
            try:
                connection.client.options["ping_interval"] = 0.1
                fill(connection)
                await asyncio.wait_for(_moved(connection), LIMIT_S / 2)
                now = connection.client.connected_url
                assert now is not None
                assert now.geturl() != at.geturl()
                await connection.api("INFO")
            finally:
                current.signal(signal.SIGCONT)

    await run_on(new_loop, main)


async def _moved(connection: Connection) -> None:
    is_back = asyncio.Event()
    connection.on_reconnect.append(is_back.set)
    await is_back.wait()


@LOOPS
async def test_a_publish_that_finds_no_room_ends_with_its_time_or_its_cancel(
    own_server: OwnServer, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """nats-py waits until the server has taken all that is pending, and takes a cancel for the end of that."""

    async def main() -> None:
        async with open_connection(own_server.url) as connection:
            own_server.signal(signal.SIGSTOP)
            await overfill(connection)
            with pytest.raises(UnknownOutcomeError, match="has taken nothing"):
                await connection.lean.publish("nobody.listens", bytes(256 * 1024), timeout_s=0.2)
            with pytest.raises(UnknownOutcomeError, match="has taken nothing"):
                await connection.lean.request("$JS.API.INFO", bytes(256 * 1024), timeout_s=0.2)
            assert connection.lean._waiting == {}
            waiting = asyncio.create_task(connection.lean.publish("nobody.listens", bytes(256 * 1024), timeout_s=60))
            await asyncio.sleep(0.1)
            waiting.cancel()
            await asyncio.wait([waiting], timeout=SOON_S)
            assert waiting.cancelled()
            own_server.signal(signal.SIGCONT)
            await connection.api("INFO")

    try:
        await run_on(new_loop, main)
    finally:
        own_server.signal(signal.SIGCONT)


async def test_a_publish_that_finds_no_room_ends_with_the_connection(own_server: OwnServer) -> None:
    async with open_connection(own_server.url) as connection:
        own_server.signal(signal.SIGSTOP)
        await overfill(connection)
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: connection.lean.publish("nobody.listens", bytes(256 * 1024), timeout_s=60),
            lambda: connection.lean.request("$JS.API.INFO", timeout_s=60),
            lambda: connection.client.flush(60),
        ]
        waiting = [asyncio.create_task(_awaited(call)) for call in calls]
        _, pending = await asyncio.wait(waiting, timeout=0.1)
        assert len(pending) == len(waiting)
        await own_server.kill()
        published, asked, flushed = await ended(waiting, SOON_S)
    assert published is None  # handed over, and dropped with the connection
    assert isinstance(asked, UnknownOutcomeError)
    assert flushed is None or isinstance(flushed, nats.errors.Error)


@LOOPS
@pytest.mark.parametrize("unsent", ["nothing", "some", "all that may be"])
async def test_leaving_a_server_that_is_dead_is_bounded_in_time(
    own_server: OwnServer, new_loop: Callable[[], asyncio.AbstractEventLoop], unsent: str
) -> None:
    async def main() -> None:
        async with open_connection(own_server.url) as connection:
            own_server.signal(signal.SIGSTOP)
            began = time.monotonic()
            if unsent == "some":
                fill(connection)
                await asyncio.sleep(0.1)
            elif unsent != "nothing":
                await overfill(connection)
        assert connection.client.is_closed
        assert time.monotonic() - began < 2 * SOON_S
        assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    running = asyncio.create_task(run_on(new_loop, main))
    try:
        await asyncio.wait([running], timeout=LIMIT_S)
    finally:
        own_server.signal(signal.SIGCONT)
        with contextlib.suppress(asyncio.CancelledError):
            await running
