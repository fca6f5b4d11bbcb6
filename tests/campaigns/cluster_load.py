"""The load of the campaign against a cluster: writers whose every acknowledgement is timed, and readers that watch.

Holds no tests itself.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec

from holdfast.client import Holdfast, NotFoundError, connect
from holdfast.ops.torture.history import Attempt, HistoryWriter, Kind
from holdfast.ops.torture.load import CONTEXT_KIND, EVENT_NAME, KINDS, Producer, SdkProducer
from holdfast.ops.torture.plain import canonical, digest_text
from holdfast.ops.torture.raw_load import RawProducer, connected
from holdfast.schemas.errors import HoldfastError, RetryError
from holdfast.schemas.refs import Ref
from holdfast.streams.publish import Outgoing, Refused, publish_batch
from holdfast.streams.wire import H_MSG_ID, event_subject

SDK_CLIENTS: Final = 2
GROUP: Final = 20
"""Events in one atomic batch that is sent once, whatever comes of it: it must be there whole, or not at all."""

PINNED_RATE: Final = 5.0
"""Writes a second of each writer that stays with its node."""

_PINNED: Final = "pinned"
_REMEMBERED: Final = 4_000
_WATCH_S: Final = 0.02
_CONNECT_S: Final = 20.0


class Clock:
    """When what was acknowledged, by kind and by writer."""

    def __init__(self) -> None:
        self.acknowledged: list[tuple[float, Kind, str]] = []
        self.refs: list[Attempt] = []
        self.versions: dict[str, int] = {}

    def note(self, attempt: Attempt, version: int | None) -> None:
        """Notes an acknowledgement that has just come."""
        self.acknowledged.append((time.monotonic(), attempt.kind, attempt.producer))
        if attempt.kind == "context" and len(self.refs) < _REMEMBERED:
            self.refs.append(attempt)
        if attempt.kind == "key" and version is not None and ".shared." not in attempt.id:
            self.versions[attempt.id] = max(version, self.versions.get(attempt.id, 0))

    def has_resumed(self, since: float) -> bool:
        """Whether something of each kind was acknowledged after a moment."""
        kinds = {kind for at, kind, _ in reversed(self.acknowledged[-2_000:]) if at > since}
        return len(kinds) == len(KINDS)

    def outage_s(self, began: float, ended: float) -> float:
        """The longest time within which nothing of some kind was acknowledged to anybody."""
        return max(
            _longest([at for at, kind, _ in self.acknowledged if kind == wanted], began, ended) for wanted in KINDS
        )

    def client_outage_s(self, began: float, ended: float) -> float:
        """The longest time within which one writer, the unluckiest of those that know all nodes, had no
        acknowledgement."""
        writers = {writer for _, _, writer in self.acknowledged if _PINNED not in writer}
        return max(
            (_longest([at for at, _, by in self.acknowledged if by == writer], began, ended) for writer in writers),
            default=ended - began,
        )


def _longest(times: Sequence[float], began: float, ended: float) -> float:
    inside = [began, *sorted(at for at in times if began <= at <= ended), ended]
    return max(later - earlier for earlier, later in pairwise(inside))


def _own(attempt: Attempt) -> Attempt:
    """Keys are named after their round: rounds are checked together, too."""
    return msgspec.structs.replace(attempt, id=f"{attempt.namespace}.{attempt.id}")


class _TimedSdk(SdkProducer):
    clock: Clock

    def next_key(self, choice: random.Random) -> tuple[Attempt, bytes]:
        attempt, body = super().next_key(choice)
        return _own(attempt), body

    def note_acknowledged(self, attempt: Attempt, *, seq: int | None = None, version: int | None = None) -> None:
        super().note_acknowledged(attempt, seq=seq, version=version)
        self.clock.note(attempt, version)


class _TimedRaw(RawProducer):
    clock: Clock

    def next_key(self, choice: random.Random) -> tuple[Attempt, bytes]:
        attempt, body = super().next_key(choice)
        return _own(attempt), body

    def note_acknowledged(self, attempt: Attempt, *, seq: int | None = None, version: int | None = None) -> None:
        super().note_acknowledged(attempt, seq=seq, version=version)
        self.clock.note(attempt, version)


class _Grouped(SdkProducer):
    """Sends atomic batches of events, each once."""

    clock: Clock

    async def step(self, choice: random.Random) -> None:
        made = [self.next_event() for _ in range(GROUP)]
        attempts = [attempt for attempt, _ in made]
        messages = [
            Outgoing(
                event_subject(self.namespace, self.producer, EVENT_NAME),
                {H_MSG_ID: f"{self.namespace}.{attempt.id}"},
                canonical({"id": attempt.id, "data": data}),
            )
            for attempt, data in made
        ]
        self.writer.begin(*attempts)
        try:
            await publish_batch(self.hf.connection, messages)
        except Refused as refusal:
            for attempt in attempts:
                self.writer.refused(attempt.op, refusal)
        except HoldfastError as error:
            self.note_error(attempts, error)
        else:
            for attempt in attempts:
                self.note_acknowledged(attempt)
                self.clock.note(attempt, None)


class Load:
    """Writers and readers of one namespace.  ``notes`` are what the readers found wrong.

    ``has_inline``: events that bring their context along, which is there for readers once the ingester has stored it.
    """

    def __init__(
        self, urls: Sequence[str], namespace: str, history: Path, seed: int, *, rate: float, has_inline: bool = True
    ) -> None:
        self.namespace = namespace
        self.history = history
        self.clock = Clock()
        self.notes: list[str] = []
        self.reads = 0
        self._urls = list(urls)
        self._seed = seed
        self._rate = rate
        self._has_inline = has_inline
        self._stop = asyncio.Event()
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Connects everybody and begins."""
        url = ",".join(self._urls)
        async with asyncio.timeout(_CONNECT_S):
            for number in range(SDK_CLIENTS):
                hf = await self._client(url, f"sdk{number}")
                for kind in KINDS:
                    self._write(_TimedSdk, hf, f"sdk{number}-{kind}", kinds=(kind,), batch=8)
            raw = await self._stack.enter_async_context(connected(url, "raw"))
            for kind in KINDS if self._has_inline else ("context", "key"):
                self._write(_TimedRaw, raw, f"raw-{kind}", kinds=(kind,), namespace=self.namespace)
            self._write(_Grouped, await self._client(url, "grouped"), "grouped", kinds=("event",), rate=4 * GROUP)
            for number, one in enumerate(self._urls):
                # Each knows one node and stays there, cut off from the others or not: whichever nodes a fault leaves in
                # the majority, somebody writes everything there.
                hf = await self._client(one, f"{_PINNED}{number}")
                self._write(_TimedSdk, hf, f"{_PINNED}{number}", kinds=KINDS, rate=PINNED_RATE)
                hf = await self._client(one, f"reader{number}")
                self._tasks.append(asyncio.create_task(self._watch(hf, random.Random(self._seed + number))))

    async def stop(self) -> None:
        """Ends when every write has its outcome."""
        self._stop.set()
        done = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()
        for outcome in done:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _client(self, url: str, name: str) -> Holdfast:
        return await self._stack.enter_async_context(connect(url, self.namespace, name, cache_bytes=0))

    def _write(
        self, make: type[Producer], client: object, name: str, *, rate: float | None = None, **options: object
    ) -> None:
        writer = self._stack.enter_context(HistoryWriter(self.history.with_name(f"{self.namespace}.{name}.ndjson")))
        producer = make(client, writer, f"{self.namespace}-{name}", self._seed, **options)  # type: ignore[call-arg,arg-type]
        producer.clock = self.clock  # type: ignore[attr-defined]
        run = producer.run(self._stop, rate=self._rate if rate is None else rate)
        self._tasks.append(asyncio.create_task(run, name=name))

    async def _watch(self, hf: Holdfast, choice: random.Random) -> None:
        """Reads what was acknowledged before: it must be there, whatever happens to the cluster, or be unavailable."""
        while not self._stop.is_set():
            try:
                async with asyncio.timeout(_CONNECT_S):
                    if choice.random() < 0.5 and self.clock.refs:
                        await self._read_context(hf, choice)
                    elif self.clock.versions:
                        await self._read_head(hf, choice)
            except (RetryError, TimeoutError):
                pass  # it said so
            except HoldfastError as error:
                self.notes.append(f"{hf.agent}: {type(error).__name__}: {error}")
            await asyncio.sleep(_WATCH_S)

    async def _read_context(self, hf: Holdfast, choice: random.Random) -> None:
        attempt = choice.choice(self.clock.refs[-200:])
        try:
            context = await hf.resolve(Ref(attempt.id))
        except NotFoundError as error:
            self.notes.append(f"{hf.agent}: {attempt.id} was acknowledged and is not found: {error}")
            return
        self.reads += 1
        if digest_text(context.raw) != attempt.sha256:
            self.notes.append(f"{hf.agent}: {attempt.id} has other bytes than were acknowledged")

    async def _read_head(self, hf: Holdfast, choice: random.Random) -> None:
        key = choice.choice(list(self.clock.versions))
        least = self.clock.versions[key]
        head = await hf.keys.head(key)
        self.reads += 1
        found = 0 if head is None else head.version
        if found < least:
            self.notes.append(f"{hf.agent}: {key} has version {found}, {least} was acknowledged before")


__all__ = ["CONTEXT_KIND", "Clock", "Load"]
