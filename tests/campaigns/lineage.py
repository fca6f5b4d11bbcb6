"""Trees of events over tasks, threads, processes and requests, while handlers are killed::

    python -m tests.campaigns.lineage --tasks 200 --seed 7 --kills 10

A program of many concurrent tasks and handlers in three processes emit under the implicit lineage.  Beside it each
writes an explicit record of where the event stands, put together from what it was handed in the event's data and not
from the lineage.  At the end what is stored is compared with the record: the same events, each once, every parent, root
and depth as recorded, one tree for each root.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client import Event, Holdfast, connect, lineage
from holdfast.schemas.ids import new_event_id
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import EVENTS_STREAM
from holdfast.workers.handler_floors import stats_of_handlers
from tests.campaigns.rig import Rig, tell
from tests.running import eventually, until_ready

if TYPE_CHECKING:
    from collections.abc import Callable

MODULE: Final = "tests.campaigns.lineage"
ROOT: Final = Path(__file__).parents[2]
PROCESSES: Final = 3
PER_TASK: Final = 18
"""Events of one task, receipts aside."""

STORED_PER_TASK: Final = PER_TASK + 6
"""With the receipts of its handlers."""

_LONG_S: Final = 300.0
_ACK_WAIT_S: Final = 1.0


class Emitted(msgspec.Struct, frozen=True, kw_only=True):
    """An event as its emitter knows it, without asking the lineage.  ``id`` None: made by Holdfast, as a result."""

    id: str | None
    name: str
    parent: str | None
    root: str
    depth: int
    session: str
    agent: str


class Record:
    """The explicit record of one process: a file, a line for each event, written once it is stored."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def add(self, emitted: Emitted) -> None:
        """Writes a line, whole or not at all."""
        os.write(self._file, msgspec.json.encode(emitted) + b"\n")


class Place(msgspec.Struct, frozen=True):
    """Where a piece of code stands, carried along by hand: in arguments, and over the wire in the event's data."""

    event: str
    root: str
    depth: int
    session: str
    agent: str

    def told(self) -> dict[str, Any]:
        """What an event's data carries, so that its handler knows where it stands."""
        return {"root": self.root, "depth": self.depth + 1, "session": self.session}


class Emitter:
    """Emits under the implicit lineage, and records by hand where each event should stand."""

    def __init__(self, hf: Holdfast, record: Record) -> None:
        self.hf = hf
        self._record = record

    async def emit(self, name: str, at: Place, **options: Any) -> Place:
        """Emits a child of the event at a place, which should be the current one; returns the child's place."""
        event = await self.hf.emit(name, at.told(), **options)
        return self.note(name, event.event_id, at, options.get("agent", at.agent))

    def note(self, name: str, event_id: str | None, at: Place, agent: str) -> Place:
        """Records a child of the event at a place."""
        self._record.add(
            Emitted(
                id=event_id,
                name=name,
                parent=at.event,
                root=at.root,
                depth=at.depth + 1,
                session=at.session,
                agent=agent,
            )
        )
        return Place(event_id or "", at.root, at.depth + 1, at.session, agent)

    async def root(self, session: str) -> tuple[Event, Place]:
        """Emits the root of a tree."""
        event_id = new_event_id()
        agent = self.hf.agent
        event = await self.hf.emit("task:begin", session=session, correlation=session, event_id=event_id)
        self._record.add(
            Emitted(id=event_id, name="task:begin", parent=None, root=event_id, depth=0, session=session, agent=agent)
        )
        return event, Place(event_id, event_id, 0, session, agent)


# The handlers, in processes of their own.


async def handle(url: str, namespace: str, record: Path) -> None:
    """Runs the handlers until its input ends."""
    async with connect(url, namespace, "handlers") as hf:
        register(hf, Emitter(hf, Record(record)))
        await hf.ready()
        os.write(1, b"ready\n")
        await asyncio.to_thread(sys.stdin.read)


def register(hf: Holdfast, emitter: Emitter) -> None:
    """Registers what is done with each event: chains over tasks and threads, and an answer."""
    options: dict[str, Any] = {"idempotent": True, "ack_wait_s": _ACK_WAIT_S, "concurrency": 8}
    loop = asyncio.get_running_loop()
    pool = lineage.ThreadPool(4)

    def place(event: Event, agent: str) -> Place:
        told = event.data
        return Place(event.event_id, told["root"], told["depth"], told["session"], agent)

    @hf.on("work:a", agent="first", **options)
    async def first(event: Event) -> None:
        at = place(event, "first")
        async with asyncio.TaskGroup() as group:
            for number in range(2):
                group.create_task(emitter.emit("work:b", at, correlation=f"{at.session}.{number}"))

    @hf.on("work:b", agent="second", **options)
    async def second(event: Event) -> None:
        at = place(event, "second")

        def hop() -> None:
            asyncio.run_coroutine_threadsafe(emitter.emit("work:c", at), loop).result()

        await loop.run_in_executor(pool, hop)

    @hf.on("work:c", agent="third", **options)
    def third(event: Event) -> None:
        # In a thread of its own already.
        at = place(event, "third")
        asyncio.run_coroutine_threadsafe(emitter.emit("leaf", at), loop).result()

    @hf.on("ask", agent="oracle", **options)
    async def oracle(event: Event) -> dict[str, Any]:
        at = place(event, "oracle")
        await emitter.emit("ask:note", at)
        emitter.note("ask:result", None, at, "oracle")
        return at.told()


@asynccontextmanager
async def handler_process(url: str, namespace: str, record: Path) -> AsyncGenerator[asyncio.subprocess.Process]:
    """A process of handlers; killed at the end of the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", MODULE, "--handle", url, namespace, str(record)),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


# The program.


async def task(emitter: Emitter, number: int, pool: lineage.ThreadPool) -> None:
    """One of the program's tasks: a tree that grows in this process and in those of the handlers."""
    loop = asyncio.get_running_loop()
    root, at = await emitter.root(f"s{number}")

    def hop(name: str) -> Callable[[], Place]:
        return lambda: asyncio.run_coroutine_threadsafe(emitter.emit(name, at), loop).result()

    with lineage.within(root):
        plan = await emitter.emit("task:plan", at)
        await asyncio.to_thread(hop("task:thread"))
        await loop.run_in_executor(pool, hop("task:pool"))
        await loop.run_in_executor(None, lineage.bind(hop("task:bound")))
        async with asyncio.TaskGroup() as group:
            group.create_task(emitter.emit("work:a", at))
            asking = group.create_task(ask(emitter, at))
        result = asking.result()
        answered = Place(result.event_id, at.root, at.depth + 2, at.session, "oracle")
        with lineage.within(result):
            await emitter.emit("task:after", answered)
        # By hand: under another event than the current one.
        explicit = {"event_id": plan.event, "parent_event_id": at.event, "root_event_id": at.root, "event_depth": 1}
        below = {"session_id": at.session, "correlation_id": at.session, "agent_id": emitter.hf.agent}
        await emitter.emit("task:step", plan, lineage=lineage.merge(explicit, below))
    await emitter.emit("task:end", at, lineage=root.lineage)


async def ask(emitter: Emitter, at: Place) -> Event:
    """Waits for an answer of whatever process of handlers has it."""
    result = await emitter.hf.request("ask", at.told(), timeout_s=_LONG_S)
    assert result.parent_event_id is not None
    emitter.note("ask", result.parent_event_id, at, at.agent)
    return result


async def trial(tasks: int, kills: int, seed: int, *, is_told: bool = False) -> None:
    """Runs everything, and checks that what is stored is what was recorded."""
    began = time.perf_counter()
    choice = random.Random(seed)
    namespace = f"l{uuid.uuid4().hex}"
    rig = Rig()
    await rig.start(clients=1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            records = Path(folder)
            handled = Handling(rig.server.url, namespace, records)
            async with connect(rig.server.url, namespace, "program") as hf, handled:
                async with asyncio.TaskGroup() as group:
                    killing = group.create_task(kill(hf, handled, choice, tasks, kills, rig))
                    emitter = Emitter(hf, Record(records / "program"))
                    with lineage.ThreadPool(8) as pool:
                        async with asyncio.TaskGroup() as program:
                            for number in range(tasks):
                                program.create_task(task(emitter, number, pool))
                    assert await killing == kills
                await eventually(lambda: _are_idle(hf), pause_s=0.1)
                stored = [event async for event in hf.query()]
                record = recorded(records)
                check(stored, record, tasks)
                for root in choice.sample([emitted for emitted in record if emitted.parent is None], min(tasks, 20)):
                    check_tree(await hf.tree(root.root), stored)
        if is_told:
            took_s = time.perf_counter() - began
            tell(f"  {len(stored)} events in {tasks} trees, {kills} kills, {took_s:.1f} s")
    finally:
        await rig.stop()


class Handling:
    """The processes of handlers, which can be killed and started again."""

    def __init__(self, url: str, namespace: str, records: Path) -> None:
        self._place = (url, namespace)
        self._records = records
        self._stack = AsyncExitStack()
        self._processes: list[asyncio.subprocess.Process] = []
        self._started = 0

    async def __aenter__(self) -> Handling:
        self._processes = list(await asyncio.gather(*(self._start() for _ in range(PROCESSES))))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def kill_one(self, choice: random.Random) -> None:
        """Kills one process as a crash would, and starts another in its place."""
        number = choice.randrange(PROCESSES)
        process = self._processes[number]
        process.kill()
        assert await process.wait() == -signal.SIGKILL
        self._processes[number] = await self._start()

    async def _start(self) -> asyncio.subprocess.Process:
        self._started += 1
        record = self._records / f"handlers{self._started}"
        process = await self._stack.enter_async_context(handler_process(*self._place, record))
        await until_ready(process)
        return process


async def kill(hf: Holdfast, handled: Handling, choice: random.Random, tasks: int, kills: int, rig: Rig) -> int:
    """Kills handler processes at moments spread over the run, told by how much is stored; archives in between."""
    first = (await stream_info(hf.connection, EVENTS_STREAM)).last_seq
    moments = sorted(choice.uniform(0.1, 0.7) for _ in range(kills))
    for done, moment in enumerate(moments):
        target = first + int(moment * tasks * STORED_PER_TASK)
        await eventually(partial(_holds, hf, target))
        await handled.kill_one(choice)
        if done == kills // 2:
            await rig.archive()
    return len(moments)


async def _holds(hf: Holdfast, seq: int) -> bool:
    return (await stream_info(hf.connection, EVENTS_STREAM)).last_seq >= seq


async def _are_idle(hf: Holdfast) -> bool:
    states = await stats_of_handlers(hf.connection, hf.namespace)
    return all(state["pending"] == state["unsettled"] == 0 for state in states)


# The comparison.


def recorded(folder: Path) -> list[Emitted]:
    """Returns the record of all processes, each event once; a handler that was run again has written it again."""
    lines = [line for path in sorted(folder.iterdir()) for line in path.read_bytes().splitlines()]
    return list(dict.fromkeys(msgspec.json.decode(line, type=Emitted) for line in lines))


def check(stored: Sequence[Event], record: Sequence[Emitted], tasks: int) -> None:
    """Every event of the record is stored once, where it says; nothing else is."""
    events = {event.event_id: event for event in stored}
    assert len(stored) == len(events) == tasks * PER_TASK
    known = {emitted.id: emitted for emitted in record if emitted.id is not None}
    results = {emitted.parent: emitted for emitted in record if emitted.id is None}
    assert len(known) + len(results) == len(record) == len(events)
    for event in events.values():
        emitted = results[event.parent_event_id] if event.name.endswith(":result") else known[event.event_id]
        found = Emitted(
            id=emitted.id,
            name=event.name,
            parent=event.parent_event_id,
            root=event.root_event_id or "",
            depth=event.event_depth,
            session=event.session_id or "",
            agent=event.agent_id,
        )
        assert found == emitted, f"stored {found}, recorded {emitted}"
    trees: dict[str, list[Event]] = {}
    for event in events.values():
        # By the links alone: up to the root, which must be the one that the event names.
        top = event
        while top.parent_event_id is not None:
            top = events[top.parent_event_id]
        assert top.event_id == event.root_event_id
        trees.setdefault(top.event_id, []).append(event)
    assert len(trees) == tasks
    assert {len(tree) for tree in trees.values()} == {PER_TASK}


def check_tree(tree: Sequence[Event], stored: Sequence[Event]) -> None:
    """The tree of a root is what is stored of it, each event once and behind its parent."""
    root = tree[0]
    wanted = {event.event_id for event in stored if event.root_event_id == root.event_id}
    assert len(tree) == len(wanted)
    assert {event.event_id for event in tree} == wanted
    place = {event.event_id: number for number, event in enumerate(tree)}
    for event in tree[1:]:
        assert event.parent_event_id is not None
        assert place[event.parent_event_id] < place[event.event_id]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--handle", nargs=3, metavar=("URL", "NAMESPACE", "RECORD"), help=argparse.SUPPRESS)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    chosen = parser.parse_args()
    if chosen.handle:
        await handle(chosen.handle[0], chosen.handle[1], Path(chosen.handle[2]))
        return
    for number in range(chosen.rounds):
        tell(f"round {number + 1} of {chosen.rounds}, seed {chosen.seed + number}")
        await trial(chosen.tasks, chosen.kills, chosen.seed + number, is_told=True)
    tell("one tree for each root; every parent, root and depth as recorded; nothing lost, nothing doubled")


if __name__ == "__main__":
    asyncio.run(main())
