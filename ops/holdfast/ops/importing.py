"""The import runner: steps of recorded traces become contexts and events.

Three stages run at once, joined by queues of two windows: a thread reads and parses, then contexts are stored, then
their events are published; so a context is acknowledged before an event refers to it, and memory holds a few windows
whatever the size of the files::

    files ──read──▶ [2] ──store contexts──▶ [2] ──publish events──▶ report

Event ids follow from the steps (see :mod:`holdfast.ops.traces.model`), bodies are named by their content: importing the
same file again adds nothing.  As long as the event log remembers an id it refuses it; after that the archiver does,
for ever.  A step without a time of its own takes the server's time of storing, so that a repetition says the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import msgspec

from holdfast.client import Holdfast
from holdfast.ops.traces import Malformed, Step, TraceFile, read_file, step_event
from holdfast.schemas import limits
from holdfast.schemas.errors import InputError
from holdfast.schemas.refs import Ref
from holdfast.streams.events import NewEvent
from holdfast.streams.hot import NewContext

WINDOW_STEPS: Final = 1_000
"""Steps that go from stage to stage together: two atomic batches, so that the next is under way while one is synced."""

WINDOW_BYTES: Final = 8 * limits.MIB
"""Most bytes of bodies in a window (one body may be larger): with five windows under way it bounds memory."""

_QUEUED_WINDOWS: Final = 2
"""One being worked on, one waiting: a stage is never idle for want of the one before it."""


class ImportCounts(msgspec.Struct, kw_only=True):
    """What an import did; the members of ``import --json``.

    ``steps`` were read; for each, one context was stored (``contexts``), many of them equal to an earlier one or to
    what was there already: ``distinct_contexts`` is how many different ones.  ``events`` are those that the event log
    took as new: all of the steps the first time, none when the same files are imported again.  ``errors`` are places
    in files that could not be read as a step.  ``seconds`` ends when everything is acknowledged as durable.
    """

    files: int = 0
    steps: int = 0
    contexts: int = 0
    distinct_contexts: int = 0
    events: int = 0
    errors: int = 0
    seconds: float = 0.0


class _Window(msgspec.Struct):
    """Steps on their way; ``refs`` are known once their contexts are stored."""

    steps: list[Step]
    malformed: list[Malformed]
    files: int
    refs: list[Ref] = []


class TraceImport:
    """One import into one namespace.

    ``on_progress`` is called with the counts so far after each window, ``on_malformed`` with each place that could not
    be read.
    """

    def __init__(
        self,
        hf: Holdfast,
        *,
        on_progress: Callable[[ImportCounts], None] = lambda _: None,
        on_malformed: Callable[[Malformed], None] = lambda _: None,
    ) -> None:
        self.counts = ImportCounts()
        self._hf = hf
        self._on_progress = on_progress
        self._on_malformed = on_malformed
        # 64 bits of each reference: a fraction of the memory of the references, and as good for counting.
        self._distinct: set[int] = set()

    async def run(self, files: Sequence[TraceFile]) -> ImportCounts:
        """Imports files in order and returns the counts; everything is acknowledged by then.

        Raises UnknownOutcomeError or another typed error when the server stops answering: what was imported by then
        stays, and the same import again completes it.
        """
        started = time.perf_counter()
        read: asyncio.Queue[_Window | None] = asyncio.Queue(_QUEUED_WINDOWS)
        stored: asyncio.Queue[_Window | None] = asyncio.Queue(_QUEUED_WINDOWS)
        async with asyncio.TaskGroup() as stages:
            stages.create_task(self._read(files, read))
            stages.create_task(self._store(read, stored))
            stages.create_task(self._publish(stored))
        self.counts.seconds = round(time.perf_counter() - started, 3)
        return self.counts

    async def _read(self, files: Sequence[TraceFile], read: asyncio.Queue[_Window | None]) -> None:
        windows = read_windows(files)
        while (window := await asyncio.to_thread(next, windows, None)) is not None:
            await read.put(window)
        await read.put(None)

    async def _store(self, read: asyncio.Queue[_Window | None], stored: asyncio.Queue[_Window | None]) -> None:
        while (window := await read.get()) is not None:
            contexts = [
                NewContext(namespace=self._hf.namespace, kind=step.kind, body=step.body) for step in window.steps
            ]
            window.refs = await self._hf.store_many(contexts)
            self._distinct.update(map(hash, window.refs))
            await stored.put(window)
        await stored.put(None)

    async def _publish(self, stored: asyncio.Queue[_Window | None]) -> None:
        while (window := await stored.get()) is not None:
            events = [
                new_event(self._hf.namespace, step, ref) for step, ref in zip(window.steps, window.refs, strict=True)
            ]
            new = await self._publish_window(events)
            counts = self.counts
            counts.files += window.files
            counts.steps += len(window.steps)
            counts.contexts += len(window.refs)
            counts.distinct_contexts = len(self._distinct)
            counts.events += new
            for place in window.malformed:
                counts.errors += 1
                self._on_malformed(place)
            self._on_progress(counts)

    async def _publish_window(self, events: list[NewEvent]) -> int:
        try:
            return sum(await self._hf.publish_many(events))
        except InputError as error:
            # One of them is refused before any is sent; the others are not to suffer for it.
            if len(events) == 1:
                self.counts.errors += 1
                self._on_malformed(Malformed(f"session {events[0].session_id}", 0, error.message))
                return 0
            half = len(events) // 2
            return await self._publish_window(events[:half]) + await self._publish_window(events[half:])


def read_windows(files: Iterable[TraceFile]) -> Iterator[_Window]:
    """Yields the steps of files in windows bounded by number and bytes; blocks on the disk."""
    window = _Window([], [], 0)
    size = 0
    for file in files:
        for record in read_file(file):
            if isinstance(record, Malformed):
                window.malformed.append(record)
            else:
                window.steps.append(record)
                size += len(record.body)
            if len(window.steps) + len(window.malformed) >= WINDOW_STEPS or size >= WINDOW_BYTES:
                yield window
                window, size = _Window([], [], 0), 0
        window.files += 1
    if window.steps or window.malformed or window.files:
        yield window


def new_event(namespace: str, step: Step, ref: Ref) -> NewEvent:
    """Returns the event of a step, referring to its context."""
    event = step_event(namespace, step)
    return NewEvent(
        namespace=namespace,
        agent_id=event.agent_id,
        name=event.name,
        id=event.id,
        timestamp_ms=event.timestamp_ms,
        data=event.data,
        context_ref=ref,
        session_id=event.session_id,
        correlation_id=event.correlation_id,
        parent_event_id=event.parent_event_id,
        root_event_id=event.root_event_id,
        event_depth=event.event_depth,
        source_id=event.source_id,
    )
