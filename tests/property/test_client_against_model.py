"""The client beside a dict: whatever is stored, asked for and emitted, through crashes of the server.

Everything acknowledged must be there, once and unchanged, whichever way it is read.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from holdfast.client import Event, Holdfast, Ref, connect
from holdfast.client.near_cache import NearCache
from holdfast.schemas.ids import new_event_id
from holdfast.schemas.refs import compute_digest, format_ref, parse_ref
from holdfast.streams.decode import decode_event
from holdfast.streams.hot import HotTier
from holdfast.streams.pull import StreamReader
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import EVENTS_STREAM, HOT_STREAM
from tests.support import OwnServer

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")

# Few different bodies, so that equal ones meet; some over the thresholds of compression and of chunks.  They are drawn
# by number, so that a failing example can be printed.
ALL_BODIES: list[Any] = [
    *({"i": i} for i in range(10)),
    *("", "text", "ü\x00", b"", b"\x00\xff", [], {}, 0, False, [1, [2, {"z": None}]]),
    *("x" * 2_000, "y" * 600_000, bytes(range(256)) * 5_000),
]
BODIES = st.integers(0, len(ALL_BODIES) - 1)
KINDS = st.sampled_from(["context", "note"])
FEW_IDS = [str(new_event_id(i)) for i in range(4)]


class ClientMachine(RuleBasedStateMachine):
    refs = Bundle("refs")
    events = Bundle("events")

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._folder = Path(tempfile.mkdtemp(prefix="holdfast-property-"))
        self._server = OwnServer(self._folder / "data")
        self._stack = AsyncExitStack()
        self._hf: Holdfast | None = None
        self.contexts: dict[Ref, Any] = {}
        self.emitted: dict[str, Event] = {}

    @property
    def hf(self) -> Holdfast:
        assert self._hf is not None
        return self._hf

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    @initialize()
    def open(self) -> None:
        async def start() -> None:
            await self._server.start()
            self._hf = await self._stack.enter_async_context(connect(self._server.url, agent="a"))

        self.run(start())

    def teardown(self) -> None:
        async def stop() -> None:
            await self._stack.aclose()
            await self._server.stop()

        try:
            self.run(stop())
        finally:
            self._runner.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    @rule(target=refs, number=BODIES, kind=KINDS)
    def put(self, number: int, kind: str) -> Ref:
        body = ALL_BODIES[number]
        ref = self.run(self.hf.put(body, kind=kind))
        assert self.contexts.setdefault(ref, body) == body
        return ref

    @rule(target=refs, numbers=st.lists(BODIES, min_size=1, max_size=40), kind=KINDS)
    def put_many(self, numbers: list[int], kind: str) -> Any:
        bodies = [ALL_BODIES[number] for number in numbers]
        stored = self.run(self.hf.put_many(bodies, kind=kind))
        for ref, body in zip(stored, bodies, strict=True):
            assert self.contexts.setdefault(ref, body) == body
        return multiple(*dict.fromkeys(stored))

    @rule(target=refs, numbers=st.lists(BODIES, min_size=1, max_size=30))
    def put_many_at_once_in_a_crash(self, numbers: list[int]) -> Any:
        bodies = [ALL_BODIES[number] for number in numbers]

        async def both() -> list[Ref]:
            tasks = [asyncio.ensure_future(self.hf.put(body)) for body in bodies]
            await asyncio.sleep(0)
            await self._server.restart()
            return await asyncio.gather(*tasks)

        stored = self.run(both())
        for ref, body in zip(stored, bodies, strict=True):
            assert self.contexts.setdefault(ref, body) == body
        return multiple(*dict.fromkeys(stored))

    @rule(ref=refs, is_cached=st.booleans())
    def resolve(self, ref: Ref, is_cached: bool) -> None:
        if not is_cached:
            self.hf.cache.forget(ref)
        context = self.run(self.hf.resolve(ref))
        assert context.body == self.contexts[ref]
        assert context.ref == ref
        assert is_cached or context.tier == "hot"

    @rule(wanted=st.lists(refs, max_size=30))
    def resolve_many(self, wanted: list[Ref]) -> None:
        self.hf.cache = NearCache()
        outcome = self.run(self.hf.resolve_many(wanted))
        assert {ref: context.body for ref, context in outcome.found.items()} == {
            ref: self.contexts[ref] for ref in wanted
        }
        assert list(outcome.found) == list(dict.fromkeys(wanted))
        assert outcome.missing == []

    @rule(number=st.integers(0, 1_000))
    def resolve_what_was_never_stored(self, number: int) -> None:
        digest = compute_digest("default", "never", b"%d" % number)

        async def look() -> None:
            assert await HotTier(self.hf.connection).get("default", digest) is None

        self.run(look())
        assert format_ref("never", digest) not in self.contexts

    @rule(
        target=events,
        name=st.sampled_from(["a", "a:b", "ü.*"]),
        data=st.none() | st.integers(0, 5),
        session=st.none() | st.sampled_from(["s1", "s2"]),
    )
    def emit(self, name: str, data: Any, session: str | None) -> Event:
        event = self.run(self.hf.emit(name, data, session=session))
        self.emitted[event.event_id] = event
        return event

    @rule(target=events, parent=events, number=BODIES)
    def emit_a_child_with_a_body(self, parent: Event, number: int) -> Event:
        body = ALL_BODIES[number]
        event = self.run(self.hf.emit("child", parent=parent, context=body))
        self.emitted[event.event_id] = event
        assert event.context_ref is not None
        assert self.contexts.setdefault(event.context_ref, body) == body
        return event

    @rule(event_id=st.sampled_from(FEW_IDS))
    def emit_an_id_again(self, event_id: str) -> None:
        event = self.run(self.hf.emit("again", event_id=event_id))
        self.emitted.setdefault(event.event_id, event)

    @rule()
    def crash(self) -> None:
        self.run(self._server.restart())

    @rule()
    def reconnect(self) -> None:
        async def again() -> None:
            await self._stack.aclose()
            self._hf = await self._stack.enter_async_context(connect(self._server.url, agent="a"))

        self.run(again())

    @invariant()
    def nothing_is_left_under_way(self) -> None:
        if self._hf is not None:
            committer = self._hf._hot._committer
            assert (committer._queued_bytes, len(committer._queue), committer._by_subject) == (0, 0, {})

    @rule()
    def the_log_holds_each_event_once(self) -> None:
        async def read() -> list[Any]:
            info = await stream_info(self.hf.connection, EVENTS_STREAM)
            reader = StreamReader(self.hf.connection, EVENTS_STREAM, 1)
            messages, _ = await reader.read(limit=100_000)
            await reader.close()
            assert len(messages) == info.messages
            return [decode_event(message).row for message in messages]

        rows = self.run(read())
        assert len(rows) == len({row.id for row in rows})
        stored = {row.id: row for row in rows}
        assert set(stored) == set(self.emitted)
        for event_id, event in self.emitted.items():
            row = stored[event_id]
            assert (row.name, row.session_id, row.context_ref) == (event.name, event.session_id, event.context_ref)
            assert (row.parent_event_id, row.root_event_id, row.event_depth) == (
                event.parent_event_id,
                event.root_event_id,
                event.event_depth,
            )
            assert (None if row.data is None else msgspec.json.decode(row.data)) == event.data

    @rule()
    def the_bucket_holds_each_context_once(self) -> None:
        async def count() -> int:
            answer = await self.hf.connection.api(f"STREAM.INFO.{HOT_STREAM}", {"subjects_filter": ">"})
            subjects = answer["state"].get("subjects") or {}
            assert set(subjects.values()) <= {1}
            return len(subjects)

        digests = {parse_ref(ref).digest for ref in self.contexts}
        assert self.run(count()) >= len(digests)


TestClient = ClientMachine.TestCase
TestClient.settings = settings(
    max_examples=200 if settings().max_examples > 100 else 8, stateful_step_count=30, deadline=None
)
TestClient = pytest.mark.faults(pytest.mark.slow(TestClient))
