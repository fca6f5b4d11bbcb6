"""Readers that read during the run what the history says is acknowledged, and note what is wrong::

    python -m holdfast.ops.torture.readers --url … --history DIR --notes r1.ndjson --seed 7 [--lake DIR]

A server or a resolver that does not answer just then, or a stream that is gone, is no finding: errors of the product's
that say so are counted.  While the file ``--pause`` exists nothing is read, which a file beside it tells.
A context that is not found although it was acknowledged before it was asked for, other bytes, or a count outside of
"acknowledged before <= seen <= attempted after" is one.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import signal
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from holdfast.client import Holdfast, connect
from holdfast.ops.torture.clock import shift_clock
from holdfast.ops.torture.history import Event, History
from holdfast.ops.torture.plain import digest_text
from holdfast.schemas.errors import GapError, HoldfastError, NotFoundError, RetryError

_REMEMBERED: Final = 10_000
"""Acknowledged writes of each kind that are looked at again: the newest, which are on their way to the lake."""

_UNSETTLED: Final = 20_000
"""The newest attempts, of which an acknowledgement may still come."""

_PAGE: Final = 50
_PAUSE_S: Final = 0.05
_COUNT_S: Final = 2.0


class Note(msgspec.Struct, omit_defaults=True):
    """One line of a reader's notes: a finding when ``wrong`` says what, else how often it read and was put off."""

    wrong: str | None = None
    counts: dict[str, int] = {}


_NOTES: Final = msgspec.json.Decoder(Note)


class Tail:
    """Reads a directory of histories as it grows."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._offsets: dict[Path, int] = {}
        self._lines: Counter[Path] = Counter()
        self._files: dict[Path, int] = {}
        self.history = History()
        self.acknowledged: dict[str, deque[Event]] = {}
        self.attempted: Counter[str] = Counter()
        self.known: Counter[str] = Counter()
        self._newest: deque[str] = deque()

    def read(self) -> None:
        """Takes in what was written since; a line that is not whole yet is left for later."""
        for path in sorted(self._directory.glob("*.ndjson")):
            with path.open("rb") as opened:
                opened.seek(self._offsets.get(path, 0))
                data = opened.read()
            end = data.rfind(b"\n") + 1
            self._offsets[path] = self._offsets.get(path, 0) + end
            file = self._files.setdefault(path, len(self._files))
            for line in data[:end].split(b"\n"):
                if line:
                    self._lines[path] += 1
                    self._take(line, file, self._lines[path])

    def _take(self, line: bytes, file: int, number: int) -> None:
        op = self.history.add(line, file, number)
        if op is None:
            return
        event = self.history.events[op]
        kind = event.attempt.kind
        if event.ended is None:
            self.attempted[kind] += 1
            self._newest.append(op)
            if len(self._newest) > _UNSETTLED:
                self._forget(self._newest.popleft())
        elif event.outcome == "acknowledged" and event.ended == number:
            self.known[kind] += 1
            self.acknowledged.setdefault(kind, deque()).append(event)
            if len(self.acknowledged[kind]) > _REMEMBERED:
                gone = self.acknowledged[kind].popleft()
                self.history.events.pop(gone.attempt.op)

    def _forget(self, op: str) -> None:
        """Drops an attempt that was not acknowledged; those that were are dropped in their own order."""
        event = self.history.events.get(op)
        if event is not None and event.outcome != "acknowledged":
            del self.history.events[op]


class Reader:
    """Reads through the SDK, and counts through DuckDB where there is a lake."""

    def __init__(self, tail: Tail, notes: Path, seed: int, namespace: str, pause: Path | None = None) -> None:
        self._tail = tail
        self._pause = pause
        self._name = notes.stem
        self._busy = 0
        self._choice = random.Random(f"reader {seed}")
        self._namespace = namespace
        self._fd = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.counts: Counter[str] = Counter()

    def note(self, wrong: str) -> None:
        """Notes a finding."""
        os.write(self._fd, msgspec.json.encode(Note(wrong=wrong)) + b"\n")

    def close(self) -> None:
        """Notes what was counted, and closes the notes."""
        os.write(self._fd, msgspec.json.encode(Note(counts=dict(self.counts))) + b"\n")
        os.close(self._fd)

    async def run(self, url: str, stop: asyncio.Event) -> None:
        """Reads until it is stopped."""
        while not stop.is_set():
            try:
                async with connect(url, self._namespace, "reader", cache_bytes=0) as hf:
                    while not stop.is_set():
                        if not self._is_paused():
                            async with self._reading():
                                self._tail.read()
                                await self._read_contexts(hf)
                                await self._read_versions(hf)
                        await _sleep_unless(stop, _PAUSE_S)
            except HoldfastError:
                await _sleep_unless(stop, _PAUSE_S)

    @asynccontextmanager
    async def _reading(self) -> AsyncGenerator[None]:
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    def _is_paused(self) -> bool:
        """Whether nothing is to be read now; tells so once nothing is under way."""
        if self._pause is None:
            return False
        told = self._pause.with_name(f"{self._pause.name}.{self._name}")
        if not self._pause.exists():
            told.unlink(missing_ok=True)
            return False
        if not self._busy:
            told.touch()
        return True

    async def _read_contexts(self, hf: Holdfast) -> None:
        page = [event.attempt for event in self._chosen("context")]
        if not page:
            return
        try:
            resolved = await hf.resolve_many([attempt.id for attempt in page])
        except HoldfastError as error:
            self._put_off(error, f"contexts {page[0].id} and {len(page) - 1} more")
            return
        for attempt in page:
            self.counts["contexts"] += 1
            found = {str(ref): context for ref, context in resolved.found.items()}.get(attempt.id)
            if found is None:
                self.note(f"context {attempt.id} ({attempt.op}) was acknowledged and is not found")
            elif digest_text(found.raw) != attempt.sha256:
                self.note(f"context {attempt.id} ({attempt.op}) has other bytes than were put")

    async def _read_versions(self, hf: Holdfast) -> None:
        for event in self._chosen("key", most=4):
            attempt = event.attempt
            try:
                value = await hf.keys.get(attempt.id, event.version)
            except NotFoundError as error:
                self.note(f"version {event.version} of {attempt.id} ({attempt.op}) was acknowledged: {error}")
                continue
            except HoldfastError as error:
                self._put_off(error, f"version {event.version} of {attempt.id}")
                continue
            self.counts["versions"] += 1
            if digest_text(value.raw) != attempt.sha256:
                self.note(f"version {event.version} of {attempt.id} ({attempt.op}) has other bytes than were put")

    def _chosen(self, kind: str, most: int = _PAGE) -> list[Event]:
        """Some acknowledged writes, the newest more often than others."""
        known = self._tail.acknowledged.get(kind)
        if not known:
            return []
        places = {int(len(known) * self._choice.random() ** 0.5) for _ in range(most)}
        return [known[place] for place in places]

    def _put_off(self, error: HoldfastError, what: str) -> None:
        self.counts["put off"] += 1
        if not isinstance(error, RetryError | GapError):
            self.note(f"{what}: {type(error).__name__}: {error}")

    async def count(self, lake: Path, url: str, stop: asyncio.Event) -> None:
        """Counts events through the live view, again and again; a view that is not to be had now is put off."""
        sql: Any = None
        while not stop.is_set():
            if self._is_paused():
                await _sleep_unless(stop, _PAUSE_S)
                continue
            async with self._reading():
                try:
                    if sql is None:
                        sql = await asyncio.to_thread(_open_sql, lake, url)
                    await self._count_once(sql)
                except HoldfastError as error:
                    self._put_off(error, "the live view")
                    if sql is not None:
                        # It has a connection and a thread of its own.
                        await asyncio.to_thread(_close_sql, sql)
                    sql = None
            await _sleep_unless(stop, _COUNT_S)

    async def _count_once(self, sql: Any) -> None:
        self._tail.read()
        before = self._tail.known["event"]
        seen = await asyncio.to_thread(_count_events, sql, self._namespace)
        self._tail.read()
        self.counts["counted"] += 1
        after = self._tail.attempted["event"]
        if not before <= seen <= after:
            self.note(f"{seen} events seen, {before} were acknowledged before, {after} attempted by then")


def _open_sql(lake: Path, url: str) -> Any:
    from holdfast.lake import connect as connect_lake

    return connect_lake(lake, url, live=["events"])


def _close_sql(sql: Any) -> None:
    with suppress(HoldfastError):
        sql.close()


def _count_events(sql: Any, namespace: str) -> int:
    row = sql.execute("SELECT count(*) FROM events WHERE namespace = $1", [namespace]).fetchone()
    return int(row[0])


def read_notes(paths: Iterable[Path]) -> tuple[list[str], Counter[str]]:
    """Returns what readers found wrong, and what they counted."""
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    for path in sorted(paths):
        for line in path.read_bytes().split(b"\n"):
            try:
                note = _NOTES.decode(line)
            except msgspec.DecodeError:
                continue  # the last line of a reader that was killed
            if note.wrong is not None:
                wrong.append(note.wrong)
            counts.update(note.counts)
    return wrong, counts


async def _sleep_unless(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        pass


async def _run(chosen: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    reader = Reader(Tail(chosen.history), chosen.notes, chosen.seed, chosen.namespace, chosen.pause)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(reader.run(chosen.url, stop))
            if chosen.lake is not None:
                group.create_task(reader.count(chosen.lake, chosen.url, stop))
    finally:
        reader.close()


def main() -> None:
    """Runs a reader; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--history", required=True, type=Path, help="the directory of the producers' histories")
    parser.add_argument("--notes", required=True, type=Path)
    parser.add_argument("--seed", required=True, type=int)
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--pause", type=Path, help="a file; while it exists, nothing is read")
    parser.add_argument("--lake", type=Path, help="count events through the live view, too")
    chosen = parser.parse_args()
    logging.basicConfig(level=os.environ.get("HOLDFAST_TORTURE_LOG", "CRITICAL"))
    shift_clock()
    asyncio.run(_run(chosen))


if __name__ == "__main__":
    main()
