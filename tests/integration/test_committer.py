"""Group commit on a real server: every write has an outcome, and every acknowledged one is there."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import pytest

from holdfast.client import connect
from holdfast.schemas import limits
from holdfast.schemas.errors import HoldfastError, RetryError, TooLargeError
from holdfast.schemas.refs import parse_ref
from holdfast.streams import committer as committer_module
from holdfast.streams.committer import Committer, Settled
from holdfast.streams.connection import Connection, Msg, open_connection
from holdfast.streams.hot import HotTier, NewContext
from holdfast.streams.publish import Outgoing, PubAck, Refused, publish, publish_batch
from holdfast.streams.pull import StreamReader
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import EVENTS_STREAM, H_BATCH_ID, H_EXPECT_SUBJECT_SEQ, H_MSG_ID, HOT_STREAM
from tests.support import LIMIT_S, OwnServer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.conftest import StartServer


def event(namespace: str, number: int | str, payload: bytes = b"{}") -> Outgoing:
    return Outgoing(f"ctx.{namespace}.event.agent.name", {H_MSG_ID: f"{namespace}.{number}"}, payload)


def contexts(namespace: str, count: int, size: int = 20) -> list[NewContext]:
    return [NewContext(namespace=namespace, kind="k", body=b"%0*d" % (size, i)) for i in range(count)]


async def headers_of(connection: Connection, namespace: str) -> list[Mapping[str, str]]:
    """The headers of a namespace's events, in stream order."""
    info = await stream_info(connection, EVENTS_STREAM)
    reader = StreamReader(connection, EVENTS_STREAM, max(1, info.first_seq), allow_gaps=True)
    headers: list[Mapping[str, str]] = []
    while reader.next_seq <= info.last_seq:
        messages, _ = await reader.read(limit=10_000)
        headers += [m.headers for m in messages if m.subject.startswith(f"ctx.{namespace}.")]
    await reader.close()
    return headers


async def messages_of(connection: Connection, namespace: str) -> list[str]:
    """The ids of a namespace's events, in stream order."""
    return [headers[H_MSG_ID] for headers in await headers_of(connection, namespace)]


class TestOutcomes:
    async def test_few_and_many_writes_are_all_stored_in_order(self, connection: Connection, namespace: str) -> None:
        committer = Committer(connection)
        for start, count in ((0, 1), (1, 16), (17, 17), (34, 1_200)):
            outcomes = await committer.store_many([event(namespace, i) for i in range(start, start + count)])
            seqs = [outcome.seq for outcome in outcomes]
            assert seqs == sorted(set(seqs))
            assert not any(outcome.existed for outcome in outcomes)
        await committer.close()
        assert await messages_of(connection, namespace) == [f"{namespace}.{i}" for i in range(1_234)]

    async def test_events_stay_in_order_while_a_batch_before_them_is_acknowledged(
        self, connection: Connection, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        committer = Committer(connection)
        expect, is_acknowledged = connection.lean.expect, asyncio.Event()

        def expect_once(token: str, *, timeout_s: float, is_batch: bool = False) -> asyncio.Future[Msg]:
            """The reply as it comes, but for this: who waits for the event is woken just before the committer."""
            monkeypatch.undo()
            reply, passed_on = expect(token, timeout_s=timeout_s, is_batch=is_batch), asyncio.Future[Msg]()

            def pass_on(done: asyncio.Future[Msg]) -> None:
                is_acknowledged.set()
                passed_on.set_result(done.result())

            reply.add_done_callback(pass_on)
            return passed_on

        async def hand_in_later() -> list[Settled]:
            await is_acknowledged.wait()
            return await committer.store_many([event(namespace, i) for i in range(20, 120)])

        later = asyncio.ensure_future(hand_in_later())
        await asyncio.sleep(0)
        monkeypatch.setattr(connection.lean, "expect", expect_once)
        first = await committer.store_many([event(namespace, i) for i in range(20)])
        seqs = [outcome.seq for outcome in (*first, *await asyncio.wait_for(later, LIMIT_S))]
        await committer.close()
        assert seqs == sorted(seqs)
        assert await messages_of(connection, namespace) == [f"{namespace}.{i}" for i in range(120)]

    async def test_many_events_go_as_one_batch_however_fast_the_server_takes_single_ones(
        self, connection: Connection, namespace: str
    ) -> None:
        """Sent singly, one that is lost on its way would be stored after those behind it."""
        committer = Committer(connection)
        committer._pace.stored_singly(1_000, 0.001)
        await committer.store(event(namespace, "first"))
        await committer.store_many([event(namespace, i) for i in range(100)])
        await committer.close()
        _, *many = await headers_of(connection, namespace)
        assert len({headers[H_BATCH_ID] for headers in many}) == 1

    async def test_a_repeated_id_is_stored_once_and_told_as_known(self, connection: Connection, namespace: str) -> None:
        committer = Committer(connection)
        first = await committer.store_many([event(namespace, i) for i in range(100)])
        again = await committer.store_many([event(namespace, i) for i in range(50, 150)])
        await committer.close()
        assert [outcome.existed for outcome in again] == [True] * 50 + [False] * 50
        assert [outcome.seq for outcome in again[:50]] == [outcome.seq for outcome in first[50:]]
        assert len(await messages_of(connection, namespace)) == 150

    async def test_an_id_twice_in_one_batch_is_stored_once(self, connection: Connection, namespace: str) -> None:
        """The server refuses such a batch as a whole (10201): its members are then sent singly."""
        committer = Committer(connection)
        outcomes = await committer.store_many([event(namespace, i % 50) for i in range(100)])
        await committer.close()
        assert [outcome.existed for outcome in outcomes] == [False] * 50 + [True] * 50
        assert [outcome.seq for outcome in outcomes[:50]] == [outcome.seq for outcome in outcomes[50:]]
        assert len(await messages_of(connection, namespace)) == 50

    async def test_a_message_over_the_servers_limit_is_refused_before_anything_is_sent(
        self, connection: Connection, namespace: str
    ) -> None:
        committer = Committer(connection)
        too_large = event(namespace, "large", b"x" * connection.client.max_payload)
        with pytest.raises(TooLargeError):
            await committer.store_many([*(event(namespace, i) for i in range(30)), too_large])
        await committer.close()
        assert await messages_of(connection, namespace) == []
        assert connection.reconnects == 0

    async def test_a_message_that_fits_alone_is_stored_though_no_batch_takes_it(
        self, connection: Connection, namespace: str
    ) -> None:
        room = connection.client.max_payload - event(namespace, "large").size + len(b"{}")
        largest = event(namespace, "large", b"x" * room)
        committer = Committer(connection)
        outcomes = await committer.store_many([largest, *(event(namespace, i) for i in range(30))])
        await committer.close()
        assert len({outcome.seq for outcome in outcomes}) == 31

    @pytest.mark.parametrize("count", [3, 60])
    async def test_a_member_that_cannot_be_sent_does_not_fail_the_others(
        self, connection: Connection, namespace: str, count: int
    ) -> None:
        committer = Committer(connection)
        broken = Outgoing(f"ctx.{namespace}.event.a.b", {"Traceparent": "\ud800"}, b"{}")
        stored = [asyncio.ensure_future(committer.store(event(namespace, i))) for i in range(count)]
        refused = asyncio.ensure_future(committer.store(broken))
        outcomes = await asyncio.wait_for(asyncio.gather(*stored), LIMIT_S)
        with pytest.raises(HoldfastError):
            await refused
        await committer.close()
        assert len({outcome.seq for outcome in outcomes}) == count

    async def test_a_stream_that_does_not_exist_is_unavailable_after_the_deadline(self, connection: Connection) -> None:
        committer = Committer(connection, deadline_s=0.2)
        with pytest.raises(RetryError):
            await committer.store(Outgoing("nobody.listens.here", {}, b""))
        await committer.close()

    async def test_a_refusal_of_a_single_publish_names_its_code(self, connection: Connection, namespace: str) -> None:
        message = event(namespace, 1)
        stale = Outgoing(message.subject, {H_EXPECT_SUBJECT_SEQ: "7"}, b"{}")
        with pytest.raises(Refused) as caught:
            await publish(connection, stale)
        assert caught.value.err_code == 10071
        assert isinstance(await publish(connection, message), PubAck)

    async def test_a_refused_batch_stores_none_of_its_members(self, connection: Connection, namespace: str) -> None:
        taken = Outgoing(f"ctx.{namespace}.event.a.taken", {H_EXPECT_SUBJECT_SEQ: "7"}, b"{}")
        with pytest.raises(Refused):
            await publish_batch(connection, [*(event(namespace, i) for i in range(20)), taken])
        assert await messages_of(connection, namespace) == []


class TestCancelling:
    async def test_a_cancelled_caller_does_not_lose_the_writes_of_others(
        self, connection: Connection, namespace: str
    ) -> None:
        hot = HotTier(connection)
        shared = contexts(namespace, 200)
        callers = [asyncio.ensure_future(hot.put_many(shared)) for _ in range(4)]
        await asyncio.sleep(0)
        callers[0].cancel()
        callers[2].cancel()
        outcomes = await asyncio.wait_for(asyncio.gather(*callers, return_exceptions=True), LIMIT_S)
        assert [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes] == [True, False, True, False]
        await hot.close()
        found, damaged = await hot.get_stored_many(
            namespace, [parse_ref(put.ref).digest for put in callers[1].result()]
        )
        assert (len(found), damaged) == (200, {})

    async def test_what_was_handed_in_before_a_cancel_is_still_stored(
        self, connection: Connection, namespace: str
    ) -> None:
        committer = Committer(connection)
        caller = asyncio.ensure_future(committer.store_many([event(namespace, i) for i in range(40)]))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        await asyncio.wait_for(committer.close(), LIMIT_S)
        assert len(await messages_of(connection, namespace)) == 40

    async def test_cancels_leave_nothing_behind(self, connection: Connection, namespace: str) -> None:
        hot = HotTier(connection)
        callers = [asyncio.ensure_future(hot.put_many(contexts(namespace, 300))) for _ in range(20)]
        for caller in callers:
            await asyncio.sleep(0)
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        await hot.close()
        committer = hot._committer
        assert (len(committer._queue), committer._by_subject, committer._tasks) == (0, {}, set())
        assert (committer._queued_bytes, committer._in_flight) == (0, 0)
        assert connection.lean._waiting == {}
        assert connection.lean._batches == set()


class TestBackPressure:
    async def test_writers_wait_when_too_much_is_queued(
        self, connection: Connection, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(committer_module, "QUEUED_BYTES", 64 * limits.KIB)
        committer = Committer(connection)
        largest = 0

        async def write(start: int) -> list[Settled]:
            nonlocal largest
            messages = [event(namespace, i, b"x" * limits.KIB) for i in range(start, start + 100)]
            task = asyncio.ensure_future(committer.store_many(messages))
            while not task.done():
                await asyncio.sleep(0)
                largest = max(largest, committer._queued_bytes)
            return task.result()

        outcomes = await asyncio.wait_for(asyncio.gather(*(write(100 * i) for i in range(20))), LIMIT_S)
        assert sum(len(outcome) for outcome in outcomes) == 2_000
        # At the bound one message more is let in, whoever brings it.
        assert largest <= 64 * limits.KIB + 2 * limits.KIB
        assert len(await messages_of(connection, namespace)) == 2_000


class TestFaults:
    @pytest.mark.faults
    @pytest.mark.parametrize("kind", ["contexts", "events"])
    async def test_a_killed_server_loses_no_acknowledged_write(self, own_server: OwnServer, kind: str) -> None:
        """5,000 writes under way while the server is killed and started again: all end, all acknowledged are there."""
        async with connect(own_server.url) as hf:
            some = asyncio.Event()
            acknowledged = 0

            async def write(i: int) -> str:
                nonlocal acknowledged
                if kind == "contexts":
                    name: str = await hf.put({"i": i, "pad": "x" * 500})
                else:
                    name = (await hf.emit("a:b", {"i": i})).event_id
                acknowledged += 1
                if acknowledged >= 1_000:
                    some.set()
                return name

            writes = [asyncio.ensure_future(write(i)) for i in range(5_000)]
            await asyncio.wait_for(some.wait(), LIMIT_S)
            before = acknowledged
            await own_server.restart()
            outcomes = await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), 60)
            assert before < 5_000
            assert [outcome for outcome in outcomes if isinstance(outcome, BaseException)] == []
            stream = HOT_STREAM if kind == "contexts" else EVENTS_STREAM
            assert (await stream_info(hf.connection, stream)).messages == 5_000
        async with connect(own_server.url) as other:
            if kind == "contexts":
                resolved = await other.resolve_many([str(outcome) for outcome in outcomes])
                assert [context.body["i"] for context in resolved.found.values()] == list(range(5_000))
            else:
                ids = await messages_of(other.connection, "default")
                assert set(ids) == {f"default.{outcome}" for outcome in outcomes}

    @pytest.mark.faults
    async def test_writes_end_when_the_server_stays_away(self, start_server: StartServer) -> None:
        server = await start_server()
        async with open_connection(server.url) as connection:
            committer = Committer(connection, deadline_s=0.5)
            await committer.store_many([event("n", i) for i in range(100)])
            await server.kill()
            writes = [asyncio.ensure_future(committer.store(event("n", i))) for i in range(1_000)]
            outcomes = await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), LIMIT_S)
            assert {isinstance(outcome, RetryError) for outcome in outcomes} == {True}
            await asyncio.wait_for(committer.close(), LIMIT_S)

    @pytest.mark.faults
    async def test_writes_go_on_soon_after_a_restart(self, own_server: OwnServer) -> None:
        """A writer whose acknowledgement died with the server does not wait for a time-out first."""
        async with connect(own_server.url) as hf:
            loop = asyncio.get_running_loop()
            longest = 0.0
            down = asyncio.Event()
            is_over = False

            async def produce(worker: int) -> None:
                nonlocal longest
                i = 0
                while not is_over:
                    began = loop.time()
                    await hf.put({"worker": worker, "i": i})
                    longest = max(longest, loop.time() - began)
                    i += 1
                    if i == 20:
                        down.set()

            producers = [asyncio.ensure_future(produce(worker)) for worker in range(8)]
            await asyncio.wait_for(down.wait(), LIMIT_S)
            await own_server.restart()
            await hf.put({"after": True})
            is_over = True
            await asyncio.wait_for(asyncio.gather(*producers), LIMIT_S)
            assert longest < 5  # one time-out of an attempt

    async def test_nothing_is_left_of_a_closed_connection(self, own_server: OwnServer) -> None:
        async with open_connection(own_server.url) as connection:
            await HotTier(connection).put_many(contexts("n", 50))
        gc.collect()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.done()]
        assert [task for task in left if "holdfast" in task.get_name()] == []
