"""Checkpoints: captured while others write, restored into an empty system, compared item by item."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import pytest_asyncio

from holdfast.client import Holdfast, checkpoint_capture, checkpoints, connect
from holdfast.client.checkpoints import Checkpoints, find_checkpoint
from holdfast.ops.verify import verify
from holdfast.schemas.errors import (
    ConfigurationError,
    IntegrityError,
    InvalidFieldError,
    NotFoundError,
    UnavailableError,
)
from holdfast.streams.decode import decode_event
from holdfast.streams.pull import StreamReader
from holdfast.streams.restoring import restore_under_way
from holdfast.streams.topology import purge_below, purge_subject, stream_info
from holdfast.streams.wire import EVENTS_STREAM, HOT_STREAM, KEYS_STREAM, key_subject
from holdfast.workers.control import evict, flush
from tests.running import dead_letters, put_version, running, settings_in
from tests.running import own_server as forgetful_server
from tests.support import OwnServer, plain_client

if TYPE_CHECKING:
    from holdfast.schemas.rows import EventRow
    from tests.conftest import StartServer

pytestmark = pytest.mark.asyncio


class Pair:
    """A system with something in it, and an empty one elsewhere."""

    def __init__(self, servers: tuple[OwnServer, OwnServer], clients: tuple[Holdfast, Holdfast], folder: Path) -> None:
        self.source, self.target = servers
        self.here, self.there = clients
        self.folder = folder
        self.save = Checkpoints(self.here, directory=folder / "checkpoints")
        self.load = Checkpoints(self.there, directory=folder / "checkpoints")

    async def copy(self, **options: Any) -> checkpoints.RestoreReport:
        """Captures here and restores there."""
        data = await self.save.capture_context_state(**options)
        await self.save.save_context_checkpoint(data)
        return await self.load.restore_context_state(await self.load.load_context_checkpoint(data.checkpoint_id))


@pytest_asyncio.fixture
async def pair(start_server: StartServer, tmp_path: Path) -> AsyncIterator[Pair]:
    servers = (await start_server(), await start_server())
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(connect(servers[0].url, agent="source", cache_bytes=0))
        there = await stack.enter_async_context(connect(servers[1].url, agent="target", cache_bytes=0))
        yield Pair(servers, (here, there), tmp_path)


async def rows_of(hf: Holdfast) -> dict[str, EventRow]:
    """The events of a system by id, each there once, without where they stand."""
    info = await stream_info(hf.connection, EVENTS_STREAM)
    reader = StreamReader(hf.connection, EVENTS_STREAM, max(1, info.first_seq), allow_gaps=True)
    rows: dict[str, EventRow] = {}
    while reader.next_seq <= info.last_seq:
        for message in (await reader.read(limit=1_000))[0]:
            row = decode_event(message).row
            assert row.id not in rows, "an event is there twice"
            rows[row.id] = msgspec.structs.replace(row, seq=0, epoch="", stored_at_ms=0)
    await reader.close()
    return rows


async def history_of(hf: Holdfast, key: str) -> list[tuple[Any, ...]]:
    return [
        (version.version, version.op, version.ref, version.tags, version.timestamp)
        async for version in hf.keys.history(key)
    ]


async def fill(hf: Holdfast) -> dict[str, Any]:
    """Something of everything; returns bodies by reference."""
    bodies: dict[str, Any] = {}
    for body in ({"goal": "fly"}, "text", b"\x00\xff", {"large": "x" * 1_500_000}):
        bodies[await hf.put(body, kind="plan")] = body
    turns: list[str] = []
    for number in range(40):
        turns.append(f"what was said in turn {number} " * 20)
        version = await hf.keys.put("conversation.one", turns[:], tags=[f"turn {number}"])
        assert version.ref is not None
        bodies[version.ref] = turns[:]
    await hf.keys.put("gone", 1)
    await hf.keys.delete("gone")
    first = await hf.emit("task:begin", {"n": 0}, context=next(iter(bodies)), session="s1")
    await hf.emit("task:step", {"n": 1}, parent=first, agent="another")
    return bodies


async def test_B34_B37_B38_B39_B40_what_is_hot_is_captured_saved_loaded_and_restored_elsewhere(pair: Pair) -> None:
    bodies = await fill(pair.here)
    data = await pair.save.capture_context_state("before-the-move")
    assert data.counts["events"] == 2
    assert data.counts["versions"] == 42
    assert data.info.summary.elsewhere == 0
    path = await pair.save.save_context_checkpoint(data)
    assert path.name == "before-the-move.checkpoint"
    await pair.source.stop()

    loaded = await pair.load.load_context_checkpoint()
    assert loaded.checkpoint_id == "before-the-move"
    report = await pair.load.restore_context_state(loaded)
    assert report.stored == list(loaded.info.summary.items)
    assert report.present == [0, 0, 0, 0]
    for ref, body in bodies.items():
        assert (await pair.there.resolve(ref)).body == body
    assert (await pair.there.keys.get("conversation.one")).version == 40
    assert (await pair.load.verify_context_checkpoint(loaded)).ok


async def test_B36_the_functions_use_the_connection_of_the_environment(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_CHECKPOINTS", str(tmp_path / "kept"))
    monkeypatch.setenv("HOLDFAST_NATS_URL", pair.source.url)
    ref = await pair.here.put({"goal": "fly"})
    data = await checkpoints.capture_context_state()
    path = await checkpoints.save_context_checkpoint(data)
    assert path.parent == tmp_path / "kept"
    await checkpoints.close_shared_connection()
    monkeypatch.setenv("HOLDFAST_NATS_URL", pair.target.url)
    report = await checkpoints.restore_context_state(await checkpoints.load_context_checkpoint())
    await checkpoints.close_shared_connection()
    assert report.stored == [1, 0, 0, 0]
    assert (await pair.there.resolve(ref)).body == {"goal": "fly"}


async def test_B05_B35_a_restart_keeps_the_hot_tier_and_a_checkpoint_brings_it_elsewhere(
    own_server: OwnServer, start_server: StartServer, tmp_path: Path
) -> None:
    async with connect(own_server.url) as hf:
        ref = await hf.put({"goal": "fly"})
        await hf.keys.put("plan", {"step": 1})
        await hf.emit("agent:status", context=ref)
    await own_server.restart()
    async with connect(own_server.url) as hf:
        assert (await hf.resolve(ref)).tier == "hot"
        assert (await hf.keys.get("plan")).body == {"step": 1}
        data = await Checkpoints(hf, directory=tmp_path).capture_context_state()
    elsewhere = await start_server()
    async with connect(elsewhere.url) as hf:
        await Checkpoints(hf).restore_context_state(data)
        assert (await hf.resolve(ref)).tier == "hot"
        assert (await hf.keys.get("plan")).body == {"step": 1}
        assert len(await rows_of(hf)) == 1


async def test_versions_go_on_from_their_numbers_and_say_what_they_said(pair: Pair) -> None:
    await fill(pair.here)
    # By hand, without a time or an id of its own.
    await put_version(pair.here.connection, "default", "by_hand", 1, event_id=None, timestamp_ms=None)
    await pair.copy()
    for key in ("conversation.one", "gone", "by_hand"):
        assert await history_of(pair.there, key) == await history_of(pair.here, key)
    assert (await pair.there.keys.put("conversation.one", [])).version == 41
    assert (await pair.there.keys.put("gone", 2)).version == 3


async def test_events_keep_their_ids_times_and_lineage_whoever_published_them(pair: Pair) -> None:
    await fill(pair.here)
    subject = "ctx.default.event.raw.note"
    async with plain_client(pair.source.url) as client:
        stream = client.jetstream()
        for payload, headers in (
            (b'{"data": 1}', None),
            (b'{"data": 1}', None),
            (b'{"data": 1.10, "context": {"b" : 1, "a": 2}, "attributes": {"x": 1}}', {"Nats-Msg-Id": "order-7"}),
            (b'{"id": "order-8", "timestamp": 1700000000.5}', {"Nats-Msg-Id": "another"}),
        ):
            await stream.publish(subject, payload, headers=headers)
    before = await rows_of(pair.here)
    assert len(before) == 6
    await pair.copy()
    assert await rows_of(pair.there) == before


async def test_the_archived_restore_passes_verify_and_answers_queries(pair: Pair, tmp_path: Path) -> None:
    await fill(pair.here)
    async with plain_client(pair.source.url) as client:
        await client.jetstream().publish("ctx.default.event.raw.note", b'{"context": {"inline": true}}')
        await client.jetstream().publish("ctx.default.event.raw.note", b"not json")
    report = await pair.copy()
    assert report.buried == 1
    async with running(pair.target.url, settings_in(tmp_path)):
        await flush(pair.there.connection)
        found = await verify(tmp_path / "lake", pair.there.connection)
        assert found.violations == []
        events = [event async for event in pair.there.query()]
        assert {str(event.event_id) for event in events} == set(await rows_of(pair.there))
        (inline,) = [event for event in events if event.agent_id == "raw"]
        assert inline.context_ref is not None
        assert (await pair.there.resolve(inline.context_ref)).body == {"inline": True}


async def test_what_was_no_event_is_one_dead_letter_however_often_it_is_restored(pair: Pair, tmp_path: Path) -> None:
    async with plain_client(pair.source.url) as client:
        await client.jetstream().publish("ctx.default.event.raw.note", b"not json")
    async with running(pair.source.url, settings_in(tmp_path / "source")):
        await flush(pair.here.connection)
    data = await pair.save.capture_context_state()
    assert data.counts == {"contexts": 0, "versions": 0, "events": 1, "dead_letters": 1}
    await pair.load.restore_context_state(data)
    await pair.load.restore_context_state(data, merge=True)
    (here,), (there,) = await dead_letters(pair.here), await dead_letters(pair.there)
    assert there.payload == here.payload == b"not json"
    assert (there.seq, there.code, there.reason) == (here.seq, here.code, here.reason)


async def test_everything_acknowledged_before_a_capture_is_in_it_and_all_that_it_refers_to(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four writers go on while it is captured; what they wrote meanwhile is in it or not, but never in part."""
    acknowledged: set[str] = set()
    many, ended = asyncio.Event(), asyncio.Event()

    async def look_slowly(*arguments: Any) -> Any:
        # Some events and versions are written between the looks at two streams.
        info = await stream_info(*arguments)
        for _ in range(20):
            await stream_info(*arguments)
        return info

    monkeypatch.setattr(checkpoint_capture, "stream_info", look_slowly)

    async def write(number: int) -> None:
        turn = 0
        while not ended.is_set():
            turn += 1
            event = await pair.here.emit("step:done", {"n": turn}, context={"writer": number, "turn": turn})
            await pair.here.keys.append(f"log.{number}", {"turn": turn, "text": "word " * 60})
            acknowledged.add(str(event.event_id))
            if len(acknowledged) == 150:
                many.set()

    async with asyncio.TaskGroup() as tasks:
        for number in range(4):
            tasks.create_task(write(number))
        await many.wait()
        before = set(acknowledged)
        data = await pair.save.capture_context_state()
        ended.set()
    assert data.info.summary.elsewhere == 0
    await pair.load.restore_context_state(data)
    rows = await rows_of(pair.there)
    assert before <= rows.keys()
    refs = {row.context_ref for row in rows.values() if row.context_ref is not None}
    assert (await pair.there.resolve_many(refs)).missing == []
    for number in range(4):
        newest = await pair.there.keys.get(f"log.{number}")
        assert [item["turn"] for item in newest.body] == list(range(1, newest.version + 1))


@pytest.mark.parametrize("cut_at", [1, 900, 1_400])
async def test_a_restore_that_was_cut_off_is_completed_and_doubles_nothing(pair: Pair, cut_at: int) -> None:
    refs = await pair.here.put_many([{"n": number} for number in range(600)])
    await asyncio.gather(*(pair.here.keys.put(f"key.{number % 50}", number) for number in range(600)))
    await asyncio.gather(*(pair.here.emit("step:done", {"n": n}, context=ref) for n, ref in enumerate(refs)))
    data = await pair.save.capture_context_state()

    def cut(done: int, _total: int) -> None:
        if done >= cut_at:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        await pair.load.restore_context_state(data, on_progress=cut)
    assert await restore_under_way(pair.there.connection) == data.info.digest
    report = await pair.load.restore_context_state(data)
    assert report.present[0] > 0
    assert [sum(pair) for pair in zip(report.stored, report.present, strict=True)] == list(data.info.summary.items)
    assert await restore_under_way(pair.there.connection) is None
    assert await rows_of(pair.there) == await rows_of(pair.here)
    for key in ("key.0", "key.49"):
        assert await history_of(pair.there, key) == await history_of(pair.here, key)
    assert (await pair.load.verify_context_checkpoint(data)).ok


async def test_a_restore_that_goes_on_much_later_doubles_no_event(pair: Pair, tmp_path: Path) -> None:
    """The server has forgotten by then which ids it has seen: what is in the stream tells."""
    for number in range(600):
        await pair.here.emit("step:done", {"n": number})
    data = await pair.save.capture_context_state()

    def cut(_done: int, _total: int) -> None:
        raise InterruptedError

    async with (
        forgetful_server(tmp_path / "forgetful", duplicate_window_s=0.1) as server,
        connect(server.url, cache_bytes=0) as hf,
    ):
        store = Checkpoints(hf)
        with pytest.raises(InterruptedError):
            await store.restore_context_state(data, on_progress=cut)
        await asyncio.sleep(0.2)  # the window of the server: there is no event to wait for
        report = await store.restore_context_state(data)
        assert (report.present[2], report.stored[2]) == (500, 100)
        assert await rows_of(hf) == await rows_of(pair.here)


async def test_a_system_that_holds_something_is_not_restored_into_unless_it_is_told(pair: Pair) -> None:
    await fill(pair.here)
    await pair.here.keys.put("shared", "of the source")
    ref = await pair.there.put({"own": True})
    await pair.there.keys.put("shared", "of the target")
    event = await pair.there.emit("own:event")
    data = await pair.save.capture_context_state()
    with pytest.raises(ConfigurationError, match="not empty") as caught:
        await pair.load.restore_context_state(data)
    assert "--merge" in str(caught.value)
    assert len(await rows_of(pair.there)) == 1

    report = await pair.load.restore_context_state(data, merge=True)
    assert (report.skipped, report.skipped_keys, report.keys) == (1, 1, ["shared"])
    assert (await pair.there.keys.get("shared")).body == "of the target"
    assert (await pair.there.keys.get("conversation.one")).version == 40
    assert (await pair.there.resolve(ref)).body == {"own": True}
    assert set(await rows_of(pair.there)) == {str(event.event_id), *await rows_of(pair.here)}
    again = await pair.load.restore_context_state(data, merge=True)
    assert again.stored == [0, 0, 0, 0]
    assert again.present[0] == data.counts["contexts"]
    found = await pair.load.verify_context_checkpoint(data)
    assert (found.ok, found.different) == (False, [0, 1, 0, 0])


async def test_another_restore_does_not_go_on_where_one_was_cut_off(pair: Pair) -> None:
    await pair.here.put(1)
    first = await pair.save.capture_context_state()
    await pair.here.put(2)
    second = await pair.save.capture_context_state()

    def cut(_done: int, _total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        await pair.load.restore_context_state(first, on_progress=cut)
    with pytest.raises(ConfigurationError, match="another checkpoint"):
        await pair.load.restore_context_state(second)


async def test_a_damaged_file_writes_nothing(pair: Pair) -> None:
    await fill(pair.here)
    data = await pair.save.capture_context_state()
    whole = data.path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], whole[:-20] + bytes([whole[-20] ^ 4]) + whole[-19:]):
        data.path.write_bytes(damaged)
        with pytest.raises(IntegrityError):
            await pair.load.restore_context_state(data)
        with pytest.raises(IntegrityError):
            await pair.load.load_context_checkpoint(path=data.path)
    assert (await stream_info(pair.there.connection, HOT_STREAM)).messages == 0
    assert await restore_under_way(pair.there.connection) is None


async def test_a_key_whose_older_versions_are_in_the_lake_goes_on_from_its_number(pair: Pair) -> None:
    for number in range(1, 6):
        await pair.here.keys.put("plan", number)
    head = await stream_info(pair.here.connection, KEYS_STREAM)
    await purge_subject(pair.here.connection, KEYS_STREAM, key_subject("default", "plan"), head.last_seq)
    await pair.copy()
    assert (await pair.there.keys.get("plan")).version == 5
    assert (await pair.there.keys.put("plan", 6)).version == 6


async def test_a_chain_is_restored_from_behind_its_last_gap_and_a_number_once(pair: Pair) -> None:
    """Versions trimmed between two pages of the capture leave a gap; by hand, a number may be written twice."""
    for version in (1, 2, 5, 5, 6):
        await put_version(pair.here.connection, "default", "plan", version)
    data = await pair.save.capture_context_state()
    report = await pair.load.restore_context_state(data)
    assert (report.stored[1], report.skipped, report.buried) == (2, 2, 1)
    head = await pair.there.keys.head("plan")
    assert head is not None
    assert head.row.version == 6
    assert (await stream_info(pair.there.connection, KEYS_STREAM)).messages == 2
    (letter,) = await dead_letters(pair.there)
    assert letter.code == "conflict"


async def test_what_leaves_the_hot_tier_during_the_capture_is_counted(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A purge overtakes the reading of the second page: what was read stays in the file, the rest is in the lake."""
    refs = await pair.here.put_many([{"n": number} for number in range(1_200)])
    await pair.here.emit("step:done", context=refs[0])
    await pair.here.emit("step:done", context=refs[700])

    class Overtaken(StreamReader):
        async def read(self, **options: Any) -> Any:
            if self._stream == HOT_STREAM and self.next_seq > 1:
                await purge_below(self._connection, HOT_STREAM, 1_001)
            return await super().read(**options)

    monkeypatch.setattr(checkpoint_capture, "StreamReader", Overtaken)
    data = await pair.save.capture_context_state()
    assert data.counts["contexts"] == 700
    assert data.info.summary.purged == 500
    assert data.info.summary.elsewhere == 1
    await pair.load.restore_context_state(data)
    assert (await pair.there.resolve(refs[0])).body == {"n": 0}


async def test_a_stream_that_begins_anew_during_the_capture_leaves_no_file(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.schemas.errors import GapError
    from holdfast.streams.topology import begin_epoch

    await pair.here.put_many([{"n": number} for number in range(10)])

    class Renewed(StreamReader):
        async def read(self, **options: Any) -> Any:
            await begin_epoch(self._connection, HOT_STREAM, 5)
            return await super().read(**options)

    monkeypatch.setattr(checkpoint_capture, "StreamReader", Renewed)
    with pytest.raises(GapError, match="anew"):
        await pair.save.capture_context_state()
    assert list((pair.folder / "checkpoints").iterdir()) == []


async def test_a_capture_that_is_cancelled_or_given_up_leaves_no_file(pair: Pair) -> None:
    await pair.here.put_many([{"n": number} for number in range(1_200)])
    task: asyncio.Task[Any] | None = None

    def cancel(_done: int, _total: int) -> None:
        assert task is not None
        task.cancel()

    task = asyncio.create_task(pair.save.capture_context_state(on_progress=cancel))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list((pair.folder / "checkpoints").iterdir()) == []
    data = await pair.save.capture_context_state()
    assert [path.name for path in (pair.folder / "checkpoints").iterdir()] == [data.path.name]
    del data
    assert list((pair.folder / "checkpoints").iterdir()) == []


async def test_a_capture_is_of_one_namespace_or_of_all(pair: Pair) -> None:
    async with connect(pair.source.url, "other") as other:
        theirs = await other.put({"theirs": True})
        await other.keys.put("plan", 1)
        await other.emit("their:event")
    own = await pair.here.put({"own": True})
    one = await pair.save.capture_context_state()
    assert one.counts == {"contexts": 1, "versions": 0, "events": 0, "dead_letters": 0}
    every = await pair.save.capture_context_state(all_namespaces=True)
    assert every.counts == {"contexts": 3, "versions": 1, "events": 1, "dead_letters": 0}
    await pair.load.restore_context_state(one)
    async with connect(pair.target.url, "other") as other:
        with pytest.raises((NotFoundError, UnavailableError)):
            await other.resolve(theirs)
        await pair.load.restore_context_state(every, merge=True)
        assert (await other.resolve(theirs)).body == {"theirs": True}
        assert (await other.keys.get("plan")).version == 1
    assert (await pair.there.resolve(own)).body == {"own": True}


async def test_a_restore_beside_the_same_lake_archives_nothing_twice(pair: Pair, tmp_path: Path) -> None:
    """The streams were lost, the lake was not: the archiver knows what comes again."""
    await fill(pair.here)
    async with plain_client(pair.source.url) as client:
        await client.jetstream().publish("ctx.default.event.raw.note", b'{"data": "without id and time"}')
    async with running(pair.source.url, settings_in(tmp_path)):
        await flush(pair.here.connection)
        before = [event async for event in pair.here.query()]
    await pair.copy()
    async with running(pair.target.url, settings_in(tmp_path, "new", accept_lost_streams=True)):
        await flush(pair.there.connection)
        after = [event async for event in pair.there.query()]
        assert await dead_letters(pair.there) == []
        assert [event.event_id for event in after] == [event.event_id for event in before]
        assert [event.timestamp for event in after] == [event.timestamp for event in before]
        report = await verify(tmp_path / "lake", pair.there.connection)
        assert report.violations == []


async def test_comparing_tells_what_is_hot_cold_missing_and_different(pair: Pair, tmp_path: Path) -> None:
    await fill(pair.here)
    data = await pair.save.capture_context_state()
    counts = list(data.info.summary.items)
    async with running(pair.source.url, settings_in(tmp_path / "source")):
        await flush(pair.here.connection)
        await evict(pair.here.connection, 0.0)
        info = await stream_info(pair.here.connection, EVENTS_STREAM)
        await purge_below(pair.here.connection, EVENTS_STREAM, info.last_seq)
        found = await pair.save.verify_context_checkpoint(data)
        assert found.ok
        assert found.checked == counts
        assert found.cold == [counts[0], 0, counts[2] - 1, 0]
        assert found.hot == [0, counts[1], 1, 0]
    async with running(pair.target.url, settings_in(tmp_path / "target")):
        found = await pair.load.verify_context_checkpoint(data)
        assert not found.ok
        assert found.missing == counts
        assert len(found.findings) == 20


async def test_the_newest_checkpoint_is_loaded_and_what_cannot_be_read_is_passed_over(
    pair: Pair, tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError, match="no checkpoint"):
        await pair.save.load_context_checkpoint()
    for name in ("b", "a"):
        await pair.save.save_context_checkpoint(await pair.save.capture_context_state(name))
    (tmp_path / "checkpoints" / "z.checkpoint").write_bytes(b"junk")
    assert (await pair.save.load_context_checkpoint()).checkpoint_id == "a"
    assert (await pair.save.load_context_checkpoint("b")).checkpoint_id == "b"
    with pytest.raises(NotFoundError, match="'c'"):
        await pair.save.load_context_checkpoint("c")
    for name in ("", "../a", ".a", "a/b", "x" * 101):
        with pytest.raises(InvalidFieldError):
            await pair.save.capture_context_state(name)
        with pytest.raises(InvalidFieldError):
            find_checkpoint(tmp_path, name)


async def test_a_checkpoint_is_saved_under_several_names(pair: Pair, tmp_path: Path) -> None:
    await pair.here.put(1)
    data = await pair.save.capture_context_state()
    one = await pair.save.save_context_checkpoint(data, tmp_path / "one")
    two = await pair.save.save_context_checkpoint(data, tmp_path / "deeper" / "two")
    assert await pair.save.save_context_checkpoint(data, two) == two
    assert one.read_bytes() == two.read_bytes()
    assert (await pair.save.load_context_checkpoint(path=one)).info == data.info
