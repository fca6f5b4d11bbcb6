"""Connecting: what a user reads who forgot something, and how soon."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from holdfast.client import Holdfast, connect
from holdfast.schemas.errors import (
    ClosedError,
    ConfigurationError,
    GapError,
    InvalidNameError,
    NotFoundError,
    RetryError,
    UnavailableError,
    UnknownOutcomeError,
)
from holdfast.schemas.refs import Ref
from holdfast.streams.connection import Connection, Msg, open_connection
from holdfast.streams.lean import Lean
from holdfast.streams.retry import NoResponderError, call_with_retry
from holdfast.streams.wire import HOT_STREAM
from tests.support import LIMIT_S, OwnServer, plain_client

if TYPE_CHECKING:
    from pathlib import Path


async def enter(url: str | None, **settings: str) -> None:
    async with connect(url, **settings):  # type: ignore[arg-type]
        raise AssertionError("connected")


async def test_no_server_is_told_in_about_a_second_with_what_to_do() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(UnavailableError, match="holdfast up") as caught:
        await enter("nats://127.0.0.1:1")
    assert "127.0.0.1:1" in str(caught.value)
    assert loop.time() - began < 4


async def test_one_of_several_servers_is_enough(own_server: OwnServer) -> None:
    async with connect(f"nats://127.0.0.1:1,{own_server.url}") as hf:
        assert await hf.put("x")


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies until the end, which it passes on."""
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
    writer.close()


@asynccontextmanager
async def between(
    server: OwnServer, first: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> AsyncGenerator[tuple[str, list[int]]]:
    """A relay before a server, that does ``first`` with the first connection; yields its address, and its connections.

    ``first`` is called when the server has answered the client's first PING, with the server's side.
    """
    host, port = server.url.removeprefix("nats://").split(":")
    connections: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(len(connections))
        their_reader, their_writer = await asyncio.open_connection(host, int(port))
        if connections == [0]:
            writer.write(await their_reader.readuntil(b"\r\n"))
            their_writer.write(await reader.readuntil(b"PING\r\n"))
            writer.write(await their_reader.readuntil(b"PONG\r\n"))
            await first(reader, writer)
            their_writer.close()
        else:
            await asyncio.gather(relay(reader, their_writer), relay(their_reader, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        yield f"nats://127.0.0.1:{listener.sockets[0].getsockname()[1]}", connections


async def test_a_server_that_goes_away_at_the_very_moment_is_connected_to_again(own_server: OwnServer) -> None:
    async def leave(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with between(own_server, leave) as (url, connections), connect(url) as hf:
        assert await hf.put("x")
        assert len(connections) == 2


async def test_whoever_is_sent_away_by_the_server_comes_back(own_server: OwnServer) -> None:
    async def send_away(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Connected for good: what comes now is no answer to its connecting.
        await reader.readuntil(b"SUB ")
        writer.write(b"-ERR 'maximum connections exceeded'\r\n")
        writer.close()

    async with between(own_server, send_away) as (url, connections), connect(url) as hf:
        assert await hf.put("x")
        assert len(connections) == 2


async def test_what_was_begun_on_a_lost_connection_is_not_continued_on_the_next(connection: Connection) -> None:
    """The read loop may still take in half a message between the loss and its own end."""
    is_back = asyncio.Event()
    connection.on_reconnect.append(is_back.set)
    await connection.client.force_reconnect()
    await connection.client._ps.parse(b"MSG half.a.message 99 100\r\nbegun")
    await asyncio.wait_for(is_back.wait(), LIMIT_S)
    await connection.api("INFO")
    assert connection.reconnects == 1


async def test_a_client_closed_in_the_middle_of_a_reconnect_does_not_go_on(
    own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cancel may be lost where an attempt fails at the same moment; then nothing else told it to end."""
    trying = asyncio.Event()

    async def fail_when_cancelled(*_: object) -> None:
        trying.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ConnectionRefusedError from None

    async with open_connection(own_server.url) as connection:
        client = connection.client
        monkeypatch.setattr("nats.aio.client.Client._connect_to_server", fail_when_cancelled)
        await own_server.stop()
        await asyncio.wait_for(trying.wait(), LIMIT_S)
        task = client._reconnection_task
    assert task is not None
    _, going_on = await asyncio.wait({task}, timeout=2.0)
    task.cancel()
    assert not going_on
    assert client.is_closed


async def test_a_client_whose_end_is_cancelled_does_not_go_on(own_server: OwnServer) -> None:
    held: asyncio.Queue[Connection] = asyncio.Queue()

    async def hold() -> None:
        async with open_connection(own_server.url) as connection:
            held.put_nowait(connection)
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    client = (await held.get()).client
    own_server.signal(signal.SIGSTOP)
    try:
        task.cancel()
        while not client._pongs:  # noqa: ASYNC110  it flushes, and the server is silent
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.is_closed
    finally:
        own_server.signal(signal.SIGCONT)


async def test_an_attempt_that_ended_in_the_greeting_leaves_no_open_file(own_server: OwnServer) -> None:
    """As when the server goes away once more while it starts: the attempt's connection is closed, not forgotten."""
    host, port = own_server.url.removeprefix("nats://").split(":")
    connections: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        if 1 < len(connections) < 5:
            writer.write(b"+OK\r\n")  # no greeting: the attempt fails, and this side keeps the connection open
            await relay(reader, writer)
            return
        their_reader, their_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(relay(reader, their_writer), relay(their_reader, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", ResourceWarning)
            async with connect(f"nats://127.0.0.1:{listener.sockets[0].getsockname()[1]}") as hf:
                connections[0].close()
                assert await hf.put("x")
            gc.collect()
    assert len(connections) == 5
    assert [str(each.message) for each in told] == []


async def test_a_server_that_never_speaks_is_told() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(UnavailableError):
                await enter(f"nats://127.0.0.1:{silent.getsockname()[1]}")


async def test_a_server_of_another_kind_is_told() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, asyncio.timeout(LIMIT_S):
        with pytest.raises(UnavailableError):
            await enter(f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}")


@pytest.mark.parametrize("url", ["http://127.0.0.1:4222", "nats://", "nats://a:notaport", "", "nats://u:secret@x:0"])
async def test_a_wrong_address_is_a_configuration_error_without_secrets(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOLDFAST_NATS_URL", "NATS_URL", "HOLDFAST_NATS_CONTEXT", "NATS_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path))
    with pytest.raises(ConfigurationError) as caught:
        await enter(url)
    assert "secret" not in str(caught.value)


async def test_nothing_named_and_nothing_running_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOLDFAST_NATS_URL", "NATS_URL", "HOLDFAST_NATS_CONTEXT", "NATS_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path))
    with pytest.raises(ConfigurationError, match="holdfast up"):
        await enter(None)


async def test_a_server_without_streams_is_told(own_server: OwnServer) -> None:
    async with plain_client(own_server.url) as client:
        await client.jetstream().delete_stream(HOT_STREAM)
    with pytest.raises(GapError, match="holdfast up"):
        await enter(own_server.url)


@pytest.mark.parametrize("name", ["", "x" * 65, "\ud800", 5, None])
async def test_a_bad_namespace_is_refused_before_connecting(name: str) -> None:
    with pytest.raises(InvalidNameError) as caught:
        await enter("nats://127.0.0.1:1", namespace=name)
    assert caught.value.field == "namespace"


@pytest.mark.parametrize("name", ["", "x" * 257, "\ud800", 5, None])
async def test_a_bad_agent_is_refused_before_connecting(name: str) -> None:
    with pytest.raises(InvalidNameError) as caught:
        await enter("nats://127.0.0.1:1", agent=name)
    assert caught.value.field == "agent_id"


@pytest.mark.parametrize("namespace", ["a.b", "*", ">", "a b", "$KV", "ü" * 32, "\x00", "x--y", "x" * 64])
async def test_any_legal_namespace_keeps_to_itself(nats_server: str, namespace: str) -> None:
    async with connect(nats_server, namespace=namespace, agent="ünï code\x00") as hf:
        ref = await hf.put({"ns": namespace})
        event = await hf.emit("e", context=ref)
        hf.cache.forget(ref)
        context = await hf.resolve(ref)
    assert (context.namespace, context.body) == (namespace, {"ns": namespace})
    assert (event.namespace, event.agent_id) == (namespace, "ünï code\x00")


async def test_a_missing_reference_without_a_resolver_is_unavailable_in_two_seconds(
    hf: Holdfast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not "not found": the lake was not asked."""
    missing = Ref("ctx_context_" + "a" * 32)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(UnavailableError, match="no resolver"):
        await hf.resolve(missing)
    assert loop.time() - began < 4
    monkeypatch.setattr("holdfast.client.cold.NOBODY_S", 0.1)
    with pytest.raises(UnavailableError, match="no resolver"):
        await hf.resolve_many([missing, await hf.put("x")])
    with pytest.raises(UnavailableError, match="no resolver"):
        await anext(hf.query())


async def test_leaving_the_block_waits_for_what_was_handed_in(nats_server: str, namespace: str) -> None:
    async with connect(nats_server, namespace=namespace) as hf:
        tasks = [asyncio.ensure_future(hf.put({"i": i})) for i in range(200)]
        await asyncio.sleep(0)
    refs = [task.result() for task in tasks]
    async with connect(nats_server, namespace=namespace) as other:
        assert len((await other.resolve_many(refs)).found) == 200


async def test_an_orderly_end_logs_no_warning(nats_server: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with connect(nats_server) as hf:
            await hf.put("x")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_an_outage_is_logged_once_each_way(own_server: OwnServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="holdfast.streams"):
        async with connect(own_server.url) as hf:
            await own_server.kill()
            waiting = asyncio.ensure_future(hf.put("x"))
            await asyncio.sleep(0.5)  # several attempts to reconnect
            await own_server.start(with_streams=False)
            await asyncio.wait_for(waiting, LIMIT_S)
    actions = [record.__dict__["action"] for record in caplog.records if "action" in record.__dict__]
    assert actions.count("nats_disconnected") == 1
    assert actions.count("nats_reconnected") == 1
    assert actions.count("nats_error") <= 2


class TestLean:
    async def test_a_request_that_nobody_answers_is_told_at_once(self, connection: Connection) -> None:
        with pytest.raises(NoResponderError):
            await asyncio.wait_for(connection.lean.request("nobody.here"), LIMIT_S)
        assert connection.lean._waiting == {}

    async def test_a_silent_service_is_an_unknown_outcome(self, connection: Connection, nats_server: str) -> None:
        async with plain_client(nats_server) as client:
            await client.subscribe("silent")
            await client.flush()
            await client.request("$JS.API.INFO", b"")  # a round trip: the subscription is known
            with pytest.raises(UnknownOutcomeError):
                await connection.lean.request("silent", timeout_s=0.05)
            # A short time-out is kept beside longer ones that were asked for before it.
            long = asyncio.ensure_future(connection.lean.request("silent", timeout_s=60))
            await asyncio.sleep(0)
            with pytest.raises(UnknownOutcomeError):
                await asyncio.wait_for(connection.lean.request("silent", timeout_s=0.05), LIMIT_S)
            long.cancel()
            await asyncio.gather(long, return_exceptions=True)

    async def test_an_empty_answer_is_an_answer(self, connection: Connection, nats_server: str) -> None:
        async with plain_client(nats_server) as client:
            subscription = await client.subscribe("empty")
            await client.request("$JS.API.INFO", b"")
            asking = asyncio.ensure_future(connection.lean.request("empty"))
            await client.publish((await subscription.next_msg()).reply, b"")
            assert (await asyncio.wait_for(asking, 3)).data == b""

    async def test_a_cancelled_request_leaves_nothing_behind(self, connection: Connection, nats_server: str) -> None:
        async with plain_client(nats_server) as client:
            await client.subscribe("silent")
            await client.request("$JS.API.INFO", b"")
            asking = [asyncio.ensure_future(connection.lean.request("silent")) for _ in range(100)]
            await asyncio.sleep(0)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            async with asyncio.timeout(LIMIT_S):
                while connection.lean._waiting:  # noqa: ASYNC110  emptied by a sweep: there is no event
                    await asyncio.sleep(0.02)

    async def test_what_cannot_be_sent_leaves_nothing_behind(self, connection: Connection) -> None:
        for subject in ("", "two words", "\ud800"):
            with pytest.raises((UnavailableError, UnicodeEncodeError)):
                await connection.lean.request(subject)
        assert connection.lean._waiting == {}

    async def test_a_failure_that_nobody_waits_for_is_not_complained_of(
        self, connection: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As when one of many was cancelled: the others fail without a word."""
        _ = await connection.lean.send("nobody.here")
        with pytest.raises(NoResponderError):
            await connection.lean.request("nobody.here")
        gc.collect()
        assert caplog.records == []

    async def test_closing_ends_what_is_under_way(self, nats_server: str) -> None:
        async with plain_client(nats_server) as client:
            await client.subscribe("silent")
            await client.request("$JS.API.INFO", b"")
            async with open_connection(nats_server) as connection:
                asking = asyncio.ensure_future(connection.lean.request("silent"))
                await asyncio.sleep(0)
            with pytest.raises(ClosedError):
                await asyncio.wait_for(asking, 1)

    async def test_a_lost_connection_ends_what_is_under_way(self, own_server: OwnServer) -> None:
        async with plain_client(own_server.url) as client:
            await client.subscribe("silent")
            await client.request("$JS.API.INFO", b"")
            async with open_connection(own_server.url) as connection:
                asking = asyncio.ensure_future(connection.lean.request("silent", timeout_s=60))
                await connection.lean.request("$JS.API.INFO")
                await own_server.restart()
                with pytest.raises(UnknownOutcomeError):
                    await asyncio.wait_for(asking, LIMIT_S)
                await asyncio.wait_for(
                    call_with_retry(lambda: connection.lean.request("$JS.API.INFO"), deadline_s=15), LIMIT_S
                )

    async def test_after_a_flush_the_server_knows_a_subscription(self, own_server: OwnServer) -> None:
        """nats-py's own flush may overtake what it is meant to push out."""
        async with plain_client(own_server.url) as client, open_connection(own_server.url) as connection:

            async def answer(message: Msg) -> None:
                await message.respond(b"here")

            for i in range(300):
                await connection.client.subscribe(f"service.{i}", cb=answer)
                await connection.client.flush()
                assert (await client.request(f"service.{i}", timeout=LIMIT_S)).data == b"here"

    async def test_two_layers_on_one_connection_do_not_mix(self, connection: Connection) -> None:
        async with Lean(connection.client) as second:
            answers = await asyncio.gather(
                *(lean.request("$JS.API.INFO") for _ in range(50) for lean in (connection.lean, second))
            )
        assert len(answers) == 100


class TestRetry:
    async def test_a_call_is_repeated_until_it_succeeds(self) -> None:
        calls = 0

        async def call() -> int:
            nonlocal calls
            calls += 1
            if calls < 4:
                raise UnavailableError("not yet")
            return calls

        assert await call_with_retry(call, deadline_s=10) == 4
        calls = 0
        # Whatever kind of callable it is.
        assert await call_with_retry(lambda: call(), deadline_s=10) == 4  # noqa: PLW0108  the lambda is the point

    async def test_other_errors_are_raised_at_once(self) -> None:
        calls = 0

        async def call() -> None:
            nonlocal calls
            calls += 1
            raise NotFoundError("x") if calls > 1 else UnavailableError("x")

        with pytest.raises(NotFoundError):
            await call_with_retry(call, deadline_s=10)
        assert calls == 2

    async def test_the_last_error_is_raised_at_the_deadline(self) -> None:
        async def call() -> None:
            raise RetryError("x")

        async with asyncio.timeout(LIMIT_S):  # without a deadline it would be for ever
            with pytest.raises(RetryError):
                await call_with_retry(call, deadline_s=0.2)

    async def test_nobody_there_has_a_deadline_of_its_own(self) -> None:
        calls = 0

        async def call() -> None:
            nonlocal calls
            calls += 1
            raise NoResponderError("x")

        with pytest.raises(NoResponderError):
            await asyncio.wait_for(call_with_retry(call, deadline_s=60, nobody_s=0.1), LIMIT_S)
        assert calls > 1
