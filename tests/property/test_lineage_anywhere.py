"""Chains, trees and queries beside a plain model: the same answer wherever the events are.

Random forests, with orphans, unknown and forged roots, circles and receipts, are published in parts; between the parts
everything is archived, evicted or purged from the streams.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import uuid
from collections.abc import Generator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.client import Holdfast, connect
from holdfast.client.cold import ResolverClient
from holdfast.client.event_reader import EventReader
from holdfast.schemas.ids import new_event_id
from holdfast.schemas.lineage import RECEIPT
from holdfast.streams.events import NewEvent
from holdfast.streams.topology import purge_below, stream_info
from holdfast.streams.wire import EVENTS_STREAM
from holdfast.workers.control import evict, flush
from tests.running import own_server, running, settings_in
from tests.support import examples

Move = Literal["stay", "archive", "evict", "purge"]
Root = Literal["right", "unknown", "forged"]

MOST = 16


class Given(msgspec.Struct, frozen=True):
    """An event as drawn: its parent is another by its number (itself, or one still to come, included), one that is
    stored nowhere, or none."""

    parent: int | Literal["none", "lost"]
    root: Root
    is_receipt: bool
    correlation: int


class Drawn(msgspec.Struct, frozen=True):
    """A forest, where it is cut into parts, and what happens after each of them."""

    events: list[Given]
    moves: list[tuple[int, Move]]


@st.composite
def forests(draw: st.DrawFn) -> Drawn:
    count = draw(st.integers(2, MOST))
    events: list[Given] = []
    roots: list[Root] = ["right", "right", "right", "right", "right", "unknown", "unknown", "forged"]
    for n in range(count):
        # Mostly an earlier event: else nothing grows deep.
        earlier = [st.integers(max(0, n - 2), n - 1)] * 4 + [st.integers(0, n - 1)] if n else []
        parents = st.one_of(*earlier, st.sampled_from(["none", "none", "lost"]), st.integers(0, count - 1))
        events.append(
            Given(
                parent=draw(parents),
                root=draw(st.sampled_from(roots)),
                is_receipt=draw(st.integers(0, 9)) == 9,
                correlation=draw(st.integers(0, 1)),
            )
        )
    cuts = sorted(draw(st.sets(st.integers(1, count - 1), max_size=2))) if count > 1 else []
    moves: list[Move] = ["stay", "archive", "evict", "purge"]
    parts: list[tuple[int, Move]] = [(cut, draw(st.sampled_from(moves))) for cut in cuts]
    return Drawn(events, [*parts, (count, "stay")])


class Row(msgspec.Struct, frozen=True):
    """An event of the model."""

    id: str
    parent: str | None
    root: str | None
    is_receipt: bool
    correlation: str


class Model:
    """What is stored, in the order of storing, and the plain answers."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def above(self, start: str) -> list[Row]:
        """An event and its ancestors, upwards."""
        found: dict[str, Row] = {}
        current: str | None = start
        while current in self.rows and current not in found:
            found[current] = self.rows[current]
            current = found[current].parent
        return list(found.values())

    def chain(self, start: str) -> list[str]:
        return [row.id for row in self.above(start)][::-1]

    def tree(self, start: str, *, receipts: bool) -> list[str]:
        root = next((row.root for row in self.above(start) if row.root is not None), None)
        found: list[str] = []

        def visit(row: Row) -> None:
            found.append(row.id)
            for child in self.rows.values():
                fits = root is None or child.root in (None, root, start)
                if child.parent == row.id and fits and child.id not in found:
                    visit(child)

        visit(self.rows[start])
        return [each for each in found if receipts or each == start or not self.rows[each].is_receipt]

    def query(self, correlation: str) -> list[str]:
        return [row.id for row in self.rows.values() if row.correlation == correlation and not row.is_receipt]


class Reader(EventReader):
    """Reads one namespace."""

    def __init__(self, hf: Holdfast, namespace: str) -> None:
        self._resolver = ResolverClient(hf.connection, namespace)
        self.namespace = namespace

    async def paged(self, endpoint: str, event_id: str, limit: int) -> list[str]:
        """All of a tree, in small pages, without data."""
        request: dict[str, Any] = {"event_id": event_id, "limit": limit, "fields": ["event_id"]}
        found: list[str] = []
        while True:
            answer = await self._resolver.call(endpoint, request)
            assert len(answer["events"]) <= limit
            found += [each["event_id"] for each in answer["events"]]
            if answer["cursor"] is None:
                return found
            request["cursor"] = answer["cursor"]


class System:
    """A server with its workers, kept through all examples."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = AsyncExitStack()
        self.runner = asyncio.Runner()

    def open(self) -> None:
        self.hf = self.runner.run(self._open())

    def close(self) -> None:
        self.runner.run(self._stack.aclose())
        self.runner.close()

    async def _open(self) -> Holdfast:
        server = await self._stack.enter_async_context(own_server(self._folder))
        await self._stack.enter_async_context(running(server.url, settings_in(self._folder)))
        return await self._stack.enter_async_context(connect(server.url))

    async def move(self, move: Move) -> None:
        connection = self.hf.connection
        if move != "stay":
            await flush(connection)
        if move in ("evict", "purge"):
            await evict(connection, 0.0)
        if move == "purge":
            await purge_below(connection, EVENTS_STREAM, (await stream_info(connection, EVENTS_STREAM)).last_seq + 1)


@pytest.fixture(scope="module")
def system() -> Generator[System]:
    folder = Path(tempfile.mkdtemp(prefix="holdfast-property-"))
    system = System(folder)
    system.open()
    try:
        yield system
    finally:
        system.close()
        shutil.rmtree(folder, ignore_errors=True)


def prepared(drawn: Drawn, namespace: str) -> list[NewEvent]:
    """The events of a forest, with ids and roots."""
    ids = [str(new_event_id()) for _ in drawn.events]
    lost = str(new_event_id())

    def parent_of(n: int) -> str | None:
        parent = drawn.events[n].parent
        return None if parent == "none" else lost if parent == "lost" else ids[parent]

    def root_of(n: int) -> str | None:
        met: set[int] = set()
        while isinstance(parent := drawn.events[n].parent, int) and n not in met:
            met.add(n)
            n = parent
        return ids[n] if drawn.events[n].parent == "none" else None

    forged = {"forged": ids[0], "unknown": None}
    return [
        NewEvent(
            namespace=namespace,
            agent_id="a",
            name=RECEIPT if given_.is_receipt else "e",
            id=ids[n],
            parent_event_id=parent_of(n),
            root_event_id=root_of(n) if given_.root == "right" else forged[given_.root],
            correlation_id=f"c{given_.correlation}",
        )
        for n, given_ in enumerate(drawn.events)
    ]


@examples(9)
@given(forests())
def test_answers_do_not_depend_on_where_the_events_are(system: System, drawn: Drawn) -> None:
    async def compare(reader: Reader, model: Model) -> None:
        picked = list(model.rows)[:: max(1, len(model.rows) // 3)]
        for start in picked:
            assert [each.event_id for each in await reader.chain(start)] == model.chain(start)
            assert await reader.paged("tree", start, 4) == model.tree(start, receipts=False)
            below = [each.event_id for each in await reader.descendants(start, receipts=True)]
            assert below == model.tree(start, receipts=True)[1:]
        assert [each.event_id async for each in reader.query(correlation="c0")] == model.query("c0")

    async def run() -> None:
        namespace = f"t{uuid.uuid4().hex}"
        reader, model = Reader(system.hf, namespace), Model()
        events = prepared(drawn, namespace)
        done = 0
        for cut, move in drawn.moves:
            part, done = events[done:cut], cut
            assert await system.hf.publish_many(part) == [True] * len(part)
            for event in part:
                # An event without a parent is its own root.
                root = event.root_event_id or (event.id if event.parent_event_id is None else None)
                model.rows[event.id] = Row(
                    event.id, event.parent_event_id, root, event.name == RECEIPT, event.correlation_id or ""
                )
            await system.move(move)
        await compare(reader, model)  # the last part is hot, what came before may be anywhere
        await system.move("archive")
        await compare(reader, model)  # in the lake and in the stream
        await system.move("purge")
        await compare(reader, model)  # in the lake alone

    system.runner.run(run())
