"""What a writer is told when no acknowledgement came: unknown where something was sent, unavailable where nothing was,
and within its own deadline, whatever waits before it."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.client import connect
from holdfast.schemas.errors import RetryError, UnavailableError, UnknownOutcomeError
from holdfast.streams import committer as committer_module
from holdfast.streams.committer import Committer
from holdfast.streams.connection import open_connection
from holdfast.streams.key_chains import Head
from holdfast.streams.key_log import KeyLog, NewVersion
from holdfast.streams.publish import Outgoing, PubAck, publish_each
from holdfast.streams.storing import store_with_retry
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import EVENTS_STREAM, H_MSG_ID
from tests.support import LIMIT_S, OwnServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from holdfast.client import Holdfast
    from holdfast.streams.committer import Settled
    from holdfast.streams.connection import Connection

WAITED_S = 0.02
"""What a write waits behind others at least, in the test of how long it waits."""


def event(namespace: str, number: int) -> Outgoing:
    return Outgoing(f"ctx.{namespace}.event.agent.name", {H_MSG_ID: f"{namespace}.{number}"}, b"{}")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110  what is waited for takes some turns of the loop, and has no event
            await asyncio.sleep(0)


async def two_under_way_and_one_behind(committer: Committer) -> list[asyncio.Task[Settled]]:
    """Writes that nobody answers: the committer has two under way at once, so the third is not sent."""
    writes: list[asyncio.Task[Settled]] = []
    for number in range(3):
        writes.append(asyncio.create_task(committer.store(event("n", number))))
        under_way = min(number + 1, 2)
        behind = number + 1 - under_way
        await until(lambda: (committer._in_flight, len(committer._queue)) == (under_way, behind))  # noqa: B023
    return writes


def kinds(outcomes: Sequence[object]) -> list[type]:
    return [type(outcome) for outcome in outcomes]


class TestAbandoned:
    async def test_what_was_sent_is_unknown_and_what_was_not_is_unavailable(self, own_server: OwnServer) -> None:
        """As when the block of a client is ended by a timeout of its caller's."""
        async with open_connection(own_server.url) as connection:
            committer = Committer(connection)
            await committer.store(event("n", 99))
            own_server.signal(signal.SIGSTOP)
            writes = await two_under_way_and_one_behind(committer)
            closing = asyncio.create_task(committer.close())
            await asyncio.sleep(0)
            closing.cancel()
            outcomes = await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), LIMIT_S)
            assert kinds(outcomes) == [UnknownOutcomeError, UnknownOutcomeError, UnavailableError]
            own_server.signal(signal.SIGCONT)
            await asyncio.gather(closing, return_exceptions=True)
            # They had been sent indeed, and the other one had not: what comes behind them is the fourth.
            assert (await Committer(connection).store(event("n", 98))).seq == 4

    async def test_a_change_of_a_key_that_was_begun_is_unknown(self, own_server: OwnServer) -> None:
        async with connect(own_server.url) as hf:
            await hf.keys.put("k", 0)
            own_server.signal(signal.SIGSTOP)
            sent = hf.connection.client.stats["out_msgs"]
            begun = asyncio.create_task(hf.keys.put("k", 1))
            await until(lambda: hf.connection.client.stats["out_msgs"] > sent)
            waiting = asyncio.create_task(hf.keys.put("k", 2))
            await until(lambda: bool(hf.keys._writer._queues["k"]))
            closing = asyncio.create_task(hf.keys.close())
            await asyncio.sleep(0)
            closing.cancel()
            outcomes = await asyncio.wait_for(asyncio.gather(begun, waiting, return_exceptions=True), LIMIT_S)
            assert kinds(outcomes) == [UnknownOutcomeError, UnavailableError]
            own_server.signal(signal.SIGCONT)
            await asyncio.gather(closing, return_exceptions=True)


class Failing:
    """A write that fails with one error after the other, then with the last one for ever."""

    def __init__(self, *errors: RetryError) -> None:
        self._errors = list(errors)

    async def __call__(self) -> None:
        raise self._errors.pop(0) if len(self._errors) > 1 else self._errors[0]


class TestSeveralAttempts:
    async def test_one_unknown_attempt_makes_the_whole_unknown(self, connection: Connection) -> None:
        call = Failing(UnknownOutcomeError("no answer"), UnavailableError("no leader"))
        with pytest.raises(UnknownOutcomeError, match="no leader"):
            await store_with_retry(connection, EVENTS_STREAM, call, deadline_s=0.1)

    async def test_a_write_that_was_refused_each_time_is_unavailable(self, connection: Connection) -> None:
        with pytest.raises(UnavailableError, match="no leader"):
            await store_with_retry(connection, EVENTS_STREAM, Failing(UnavailableError("no leader")), deadline_s=0.1)

    async def test_of_writes_that_are_tried_again_together_one_unknown_counts(
        self, connection: Connection, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def first_is_lost(*_: object) -> list[PubAck | Exception]:
            return [UnknownOutcomeError("no answer"), UnavailableError("no leader")]

        monkeypatch.setattr(committer_module, "publish_each", first_is_lost)
        committer = Committer(connection, deadline_s=0.0)
        with pytest.raises(UnknownOutcomeError):
            await committer.store_many([event(namespace, number) for number in range(2)])
        await committer.close()


class TestKeys:
    async def test_a_refusal_that_cannot_be_looked_into_is_unknown(
        self, hf: Holdfast, connection: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may be over an earlier attempt of its own: whoever is told that nothing was stored writes it twice."""
        await hf.keys.put("k", 1)
        log = KeyLog(connection)
        head = await log.head(hf.namespace, "k")
        assert head.row is not None
        again = NewVersion(head.row)

        async def away(*_: object) -> list[object]:
            raise UnavailableError("the server is away")

        monkeypatch.setattr(log, "_run_of", away)
        with pytest.raises(UnknownOutcomeError, match="the server is away"):
            await log.write(again, after=Head())
        with pytest.raises(UnknownOutcomeError, match="the server is away"):
            await log.write_all([(again, Head()), (again, None)])
        monkeypatch.undo()
        assert (await log.write(again, after=Head())).seq == head.row.seq
        await log.close()


class TestDeadline:
    async def test_the_time_that_a_write_waits_for_its_turn_is_part_of_its_own(
        self, connection: Connection, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        release = asyncio.Event()
        begun: list[float] = []

        async def held(_: object, __: str, call: Callable[[], Awaitable[None]], *, deadline_s: float) -> None:
            begun.append(deadline_s)
            if len(begun) <= 2:
                await release.wait()
                raise UnavailableError("no leader")
            await call()

        monkeypatch.setattr(committer_module, "store_with_retry", held)
        committer = Committer(connection, deadline_s=30.0)
        writes = await two_under_way_and_one_behind(committer)
        await asyncio.sleep(WAITED_S)
        release.set()
        await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), LIMIT_S)
        assert WAITED_S / 2 < 30.0 - begun[2] <= LIMIT_S
        await committer.close()

    @pytest.mark.faults
    async def test_in_an_outage_each_write_has_its_own_time(self, own_server: OwnServer) -> None:
        """Those that are sent together end together: the later ones would have what is left to the first."""
        deadline_s = 2.0
        clock = asyncio.get_running_loop().time
        async with open_connection(own_server.url) as connection:
            committer = Committer(connection, deadline_s=deadline_s)
            await own_server.kill()
            began: list[float] = []
            ended: dict[int, float] = {}
            writes: list[asyncio.Task[Settled]] = []

            def note_end(number: int, _: object) -> None:
                ended[number] = clock()

            for number, pause_s in enumerate((0.1, 0.1, 0.7, 0.0)):
                began.append(clock())
                write = asyncio.create_task(committer.store(event("n", number)))
                write.add_done_callback(partial(note_end, number))
                writes.append(write)
                await asyncio.sleep(pause_s)
            outcomes = await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), LIMIT_S)
            assert [isinstance(outcome, UnavailableError) for outcome in outcomes] == [True] * 4
            took_s = [ended[number] - began[number] for number in range(4)]
            assert min(took_s) > 0.9 * deadline_s
            await committer.close()

    async def test_what_is_overdue_has_one_attempt(
        self, connection: Connection, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server that is merely slow loses nobody's write."""
        committer = Committer(connection, deadline_s=0.0)
        attempts = 0

        async def counted(*arguments: Any) -> list[PubAck | Exception]:
            nonlocal attempts
            attempts += 1
            return await publish_each(*arguments)

        monkeypatch.setattr(committer_module, "publish_each", counted)
        assert (await committer.store(event(namespace, 1))).seq > 0
        assert attempts == 1
        await committer.close()

    @pytest.mark.faults
    async def test_what_is_overdue_behind_a_silent_server_is_not_sent_any_more(self, own_server: OwnServer) -> None:
        """An attempt is given five seconds: one for each batch that waits would go on for a minute and more."""
        async with open_connection(own_server.url) as connection:
            committer = Committer(connection, deadline_s=1.0)
            await committer.store(event("n", 99))
            own_server.signal(signal.SIGSTOP)
            writes = await two_under_way_and_one_behind(committer)
            outcomes = await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), LIMIT_S)
            assert [isinstance(outcome, UnknownOutcomeError) for outcome in outcomes] == [True, True, False]
            assert isinstance(outcomes[2], UnavailableError)
            assert "never sent" in outcomes[2].message
            assert (len(committer._queue), committer._queued_bytes) == (0, 0)
            own_server.signal(signal.SIGCONT)
            # The committer goes on, and what it gave up is stored nowhere.
            await committer.store(event("n", 4))
            await committer.close()
            assert (await stream_info(connection, EVENTS_STREAM)).messages == 4


class TestReading:
    @pytest.mark.parametrize("count", [1, 2])
    async def test_a_hot_tier_that_does_not_answer_is_told_as_such(
        self, hf: Holdfast, monkeypatch: pytest.MonkeyPatch, count: int
    ) -> None:
        """It is no damaged copy, for which the resolver would be asked."""
        refs = await hf.put_many([{"n": n} for n in range(count)])

        async def away(*_: object) -> None:
            raise UnavailableError("the hot tier is away")

        async def ask(*_: object, **__: object) -> None:
            pytest.fail("the resolver was asked")

        for method in ("get_stored", "get_stored_many"):
            monkeypatch.setattr(hf._hot, method, away)
        monkeypatch.setattr(hf._resolver, "fetch", ask)
        for ref in refs:
            hf.cache.forget(ref)
        with pytest.raises(UnavailableError, match="the hot tier is away"):
            await hf.resolve_many(refs)
        with pytest.raises(UnavailableError, match="the hot tier is away"):
            await hf.resolve(refs[0])

    @pytest.mark.faults
    async def test_a_single_reading_without_a_server_ends_with_the_hot_tiers_error(
        self, own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("holdfast.streams.hot.READ_DEADLINE_S", 0.1)
        async with connect(own_server.url) as hf:
            ref = await hf.put({"a": 1})
            hf.cache.forget(ref)
            await own_server.kill()
            with pytest.raises(RetryError) as caught:
                await asyncio.wait_for(hf.resolve(ref), LIMIT_S)
            assert "resolver" not in caught.value.message
