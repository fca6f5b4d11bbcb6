"""Producers that write without end, note what they do, and do not die of anything that a server does.

What a producer writes is a function of its name, of the number of the write and of a seed: whoever checks can compute
it again.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, cast

from holdfast.client import Holdfast, connect
from holdfast.ops.torture.history import UNTYPED, Attempt, HistoryWriter, Kind, Via, read_history
from holdfast.ops.torture.plain import canonical, digest_text, ref_of
from holdfast.schemas.errors import HoldfastError, RetryError
from holdfast.schemas.refs import Ref
from holdfast.streams.events import NewEvent

KINDS: Final[tuple[Kind, ...]] = ("context", "event", "key")
CONTEXT_KIND: Final = "torture"
EVENT_NAME: Final = "torture:step"

LARGE_ONE_IN: Final = 400
"""One body in so many is stored in chunks."""

_LARGE_BYTES: Final = 540_000
"""Just over the 512 KiB of one chunk."""

_RECENT: Final = 64
_RETRIES: Final = 256
_RECONNECT_S: Final = 0.1
_PAUSE_S: Final = 0.02


def body_of(producer: str, number: int, seed: int, *, large_one_in: int = LARGE_ONE_IN) -> dict[str, Any]:
    """Returns the body that a producer puts as its ``number``-th write: JSON of 100 bytes to some hundred KiB."""
    choice = random.Random(f"body {seed} {producer} {number}")
    if large_one_in and choice.randrange(large_one_in) == 0:
        size = _LARGE_BYTES + choice.randrange(20_000)
    else:
        size = choice.choice((40, 200, 200, 600, 1_500, 9_000))
    words = [f"{choice.getrandbits(64):016x}" for _ in range(min(size // 17 + 1, 400))]
    text = " ".join(words)
    # Long ones repeat themselves, each time differently numbered: they compress, as texts do, and are made quickly.
    pieces = [f"{part} {text}" for part in range(size // (len(text) + 8) + 1)]
    return {"producer": producer, "number": number, "seed": seed, "text": "Ωφ " + " ".join(pieces)}


def data_of(producer: str, number: int, seed: int) -> dict[str, Any]:
    """Returns the data of an event that a producer emits as its ``number``-th write."""
    mark = sha256(f"data {seed} {producer} {number}".encode()).hexdigest()
    return {"producer": producer, "number": number, "seed": seed, "mark": mark[: 16 + number % 40]}


def event_id_of(producer: str, number: int, seed: int) -> str:
    """Returns the id of that event."""
    return str(uuid.UUID(bytes=sha256(f"event {seed} {producer} {number}".encode()).digest()[:16], version=4))


class Producer:
    """What producers have in common: numbers, names, the record, the pace.  Subclasses write."""

    via: Via = "sdk"

    def __init__(
        self,
        writer: HistoryWriter,
        producer: str,
        seed: int,
        *,
        namespace: str,
        kinds: Sequence[Kind] = KINDS,
        batch: int = 32,
        key_space: int = 6,
        large_one_in: int = LARGE_ONE_IN,
        first_number: int = 1,
    ) -> None:
        self.writer = writer
        self.producer = producer
        self.seed = seed
        self.namespace = namespace
        self.kinds = kinds
        self.batch = batch
        self.key_space = key_space
        self.large_one_in = large_one_in
        self.number = first_number - 1
        self.acknowledged = 0
        self.recent: deque[Attempt] = deque(maxlen=_RECENT)
        self.recent_events: deque[Callable[[], Awaitable[Any]]] = deque(maxlen=_RECENT)
        self.unsettled: deque[tuple[Attempt, Callable[[], Awaitable[Any]]]] = deque(maxlen=_RETRIES)

    def next_context(self) -> tuple[Attempt, bytes]:
        """Returns the next context and its bytes."""
        self.number += 1
        body = canonical(body_of(self.producer, self.number, self.seed, large_one_in=self.large_one_in))
        return self._attempt("context", ref_of(self.namespace, CONTEXT_KIND, body), body), body

    def next_event(self) -> tuple[Attempt, dict[str, Any]]:
        """Returns the next event, which hands on one of the contexts acknowledged last, and its data."""
        self.number += 1
        data = data_of(self.producer, self.number, self.seed)
        context = self.recent[self.number % len(self.recent)].id if self.recent else None
        identity = event_id_of(self.producer, self.number, self.seed)
        return self._attempt("event", identity, canonical(data), context=context), data

    def next_key(self, choice: random.Random) -> tuple[Attempt, bytes]:
        """Returns the next version of a key, its own or one that all producers share, and its bytes."""
        self.number += 1
        body = canonical(body_of(self.producer, self.number, self.seed, large_one_in=0))
        owner = "shared" if choice.random() < 0.4 else self.producer
        return self._attempt("key", f"{owner}.key{choice.randrange(self.key_space)}", body), body

    def note_acknowledged(self, attempt: Attempt, *, seq: int | None = None, version: int | None = None) -> None:
        """Notes an acknowledgement."""
        self.writer.acknowledged(attempt.op, seq=seq, version=version)
        self.acknowledged += 1
        if attempt.kind == "context":
            self.recent.append(attempt)

    def note_error(
        self, attempts: Sequence[Attempt], error: Exception, again: Callable[[], Awaitable[Any]] | None = None
    ) -> None:
        """Notes what an error says of attempts; ``again`` repeats them, when repeating is harmless, later."""
        is_refusal = isinstance(error, HoldfastError) and not isinstance(error, RetryError)
        prefix = "" if self._is_expected(error) else UNTYPED
        text = f"{prefix}{type(error).__name__}: {error}"
        for attempt in attempts:
            if is_refusal:
                self.writer.refused(attempt.op, text)
            else:
                self.writer.unknown(attempt.op, text)
                if again is not None:
                    self.unsettled.append((attempt, again))

    def _is_expected(self, error: Exception) -> bool:
        return isinstance(error, HoldfastError)

    async def settle(self) -> None:
        """Repeats what had no answer: the same content under the same id, which is stored once however often sent."""
        waiting, self.unsettled = list(self.unsettled), deque(maxlen=_RETRIES)
        done: set[int] = set()
        for attempt, again in waiting:
            if id(again) in done:
                continue
            done.add(id(again))
            same = [each for each, other in waiting if other is again]
            try:
                await again()
            except Exception as error:  # noqa: BLE001  whatever it is, it is noted
                self.note_error(same, error)
                continue
            for each in same:
                self.note_acknowledged(each)
            del attempt

    async def step(self, choice: random.Random) -> None:
        """Writes once, or one batch."""
        raise NotImplementedError

    async def run(
        self, stop: asyncio.Event, *, rate: float | None = None, count: int | None = None, pause: Path | None = None
    ) -> None:
        """Writes until it is stopped, or has tried ``count`` writes; at most ``rate`` a second.

        While the file ``pause`` exists nothing is written, which a file beside it tells.
        """
        started, first = time.monotonic(), self.number
        told = None if pause is None else pause.with_name(f"{pause.name}.{self.producer}")
        try:
            while not stop.is_set() and (count is None or self.number - first < count):
                if pause is not None and told is not None and pause.exists():
                    await _paused(pause, told, stop)
                before = self.number
                await self.step(random.Random(f"step {self.seed} {self.producer} {self.number}"))
                if self.unsettled:
                    await self.settle()
                if self.number == before:
                    self.number += 1  # a repetition of something old: the next step shall be another
                if rate is not None:
                    ahead_s = (self.number - first) / rate - (time.monotonic() - started)
                    if ahead_s > 0:
                        await _sleep_unless(stop, ahead_s)
                    elif ahead_s < -1.0:
                        # What an outage held up is not caught up on: the load stays what was asked for.
                        started -= ahead_s
        finally:
            if told is not None:
                _remove(told)

    def _attempt(self, kind: Kind, identity: str, body: bytes, context: str | None = None) -> Attempt:
        return Attempt(
            op=f"{self.producer}-{self.number}",
            kind=kind,
            via=self.via,
            producer=self.producer,
            number=self.number,
            id=identity,
            sha256=digest_text(body),
            size=len(body),
            context=context,
            namespace=self.namespace,
        )


class SdkProducer(Producer):
    """Writes as an agent does, through the SDK."""

    def __init__(self, hf: Holdfast, writer: HistoryWriter, producer: str, seed: int, **options: Any) -> None:
        super().__init__(writer, producer, seed, namespace=hf.namespace, **options)
        self.hf = hf

    async def step(self, choice: random.Random) -> None:
        """Puts, emits or changes a key; one or many; now and then something once more."""
        kind = choice.choice(self.kinds)
        many = choice.random() < 0.5
        if kind == "context":
            if choice.random() < 0.05 and self.recent:
                await self._put_again(choice.choice(list(self.recent)))
            else:
                await self._put(choice.randint(2, self.batch) if many and self.batch > 1 else 1)
        elif kind == "event":
            if choice.random() < 0.08 and self.recent_events:
                await self._again(choice.choice(list(self.recent_events)))
            else:
                await self._emit(choice.randint(2, self.batch) if many and self.batch > 1 else 1)
        else:
            await self._change_key(choice)

    async def _put(self, count: int) -> None:
        made = [self.next_context() for _ in range(count)]
        attempts = [attempt for attempt, _ in made]
        bodies = [body for _, body in made]

        async def put() -> list[Ref]:
            return await self.hf.put_many(bodies, kind=CONTEXT_KIND, content_type="application/json")

        self.writer.begin(*attempts)
        try:
            refs = await put()
        except Exception as error:  # noqa: BLE001  whatever it is, it is noted
            self.note_error(attempts, error, put)
            return
        for attempt, ref in zip(attempts, refs, strict=True):
            if ref != attempt.id:
                raise AssertionError(f"{attempt.op} got the reference {ref}, its content has {attempt.id}")
            self.note_acknowledged(attempt)

    async def _put_again(self, old: Attempt) -> None:
        body = canonical(body_of(self.producer, old.number, self.seed, large_one_in=self.large_one_in))
        await self._again(lambda: self.hf.put(body, kind=CONTEXT_KIND, content_type="application/json"))

    async def _again(self, send: Callable[[], Awaitable[Any]]) -> None:
        try:
            await send()
        except RetryError:
            pass  # it was acknowledged before: nothing new can come of it

    async def _emit(self, count: int) -> None:
        made = [self.next_event() for _ in range(count)]
        attempts = [attempt for attempt, _ in made]
        events = [self._event(attempt, data) for attempt, data in made]

        async def publish() -> list[bool]:
            return await self.hf.publish_many(events)

        async def emit() -> object:
            attempt, data = made[0]
            return await self.hf.emit(
                EVENT_NAME, data, context=attempt.context, event_id=attempt.id, session=events[0].session_id
            )

        send: Callable[[], Awaitable[Any]] = publish if count > 1 else emit
        self.writer.begin(*attempts)
        try:
            await send()
        except Exception as error:  # noqa: BLE001  whatever it is, it is noted
            self.note_error(attempts, error, send)
            return
        for attempt in attempts:
            self.note_acknowledged(attempt)
        self.recent_events.append(send)

    def _event(self, attempt: Attempt, data: dict[str, Any]) -> NewEvent:
        return NewEvent(
            namespace=self.namespace,
            agent_id=self.hf.agent,
            name=EVENT_NAME,
            id=attempt.id,
            # Left to the server: an event that is repeated must be the same each time.
            timestamp_ms=None,
            data=data,
            context_ref=cast("Ref | None", attempt.context),
            session_id=f"{self.producer}-{attempt.number // 200}",
        )

    async def _change_key(self, choice: random.Random) -> None:
        attempt, body = self.next_key(choice)
        expected: int | None = None
        self.writer.begin(attempt)
        try:
            if choice.random() < 0.3:
                head = await self.hf.keys.head(attempt.id)
                expected = 0 if head is None else head.version
            value = await self.hf.keys.put(
                attempt.id,
                body,
                kind=CONTEXT_KIND,
                content_type="application/json",
                expected_version=expected,
                change_type=attempt.op,
            )
        except Exception as error:  # noqa: BLE001  whatever it is, it is noted
            self.note_error([attempt], error)
            return
        self.note_acknowledged(attempt, version=value.version)


async def run_producer(
    url: str,
    history_path: Path,
    producer: str,
    seed: int,
    *,
    namespace: str = "default",
    kinds: Sequence[Kind] = KINDS,
    rate: float | None = None,
    count: int | None = None,
    stop: asyncio.Event,
    raw: bool = False,
    lanes: int = 1,
    pause: Path | None = None,
    **options: Any,
) -> int:
    """Writes until ``stop`` is set or ``count`` writes were tried; returns how many were acknowledged.

    ``lanes`` producers at once share the connection and the history, named ``<producer>.0`` and so on.  Goes on where
    an earlier process of the same name stopped.  A server that is away is waited for.
    """
    last = _last_numbers(history_path)
    names = [producer] if lanes == 1 else [f"{producer}.{lane}" for lane in range(lanes)]
    options["kinds"] = kinds
    each_rate = None if rate is None else rate / lanes
    each_count = None if count is None else max(1, count // lanes)
    with HistoryWriter(history_path) as writer:
        while not stop.is_set():
            try:
                async with _opened(url, namespace, producer, raw=raw) as client:
                    producers = [
                        _made(
                            client, writer, name, seed, namespace, **options | {"first_number": last.get(name, 0) + 1}
                        )
                        for name in names
                    ]
                    async with asyncio.TaskGroup() as group:
                        for each in producers:
                            group.create_task(each.run(stop, rate=each_rate, count=each_count, pause=pause))
                    return sum(each.acknowledged for each in producers)
            except HoldfastError:
                await _sleep_unless(stop, _RECONNECT_S)
    return 0


def _opened(url: str, namespace: str, producer: str, *, raw: bool) -> Any:
    if raw:
        from holdfast.ops.torture.raw_load import connected

        return connected(url, producer)
    return connect(url, namespace, producer, cache_bytes=0)


def _made(
    client: Any, writer: HistoryWriter, name: str, seed: int, namespace: str, first_number: int, **options: Any
) -> Producer:
    options["first_number"] = first_number
    if isinstance(client, Holdfast):
        return SdkProducer(client, writer, name, seed, **options)
    from holdfast.ops.torture.raw_load import RawProducer

    return RawProducer(client, writer, name, seed, namespace=namespace, **options)


def _last_numbers(path: Path) -> dict[str, int]:
    """The number that each producer of a history came to."""
    last: dict[str, int] = {}
    if path.exists():
        for attempt in read_history([path]).attempts:
            last[attempt.producer] = max(attempt.number, last.get(attempt.producer, 0))
    return last


async def _paused(pause: Path, told: Path, stop: asyncio.Event) -> None:
    """Tells that nothing is under way, and waits until the file is gone."""
    told.touch()
    while pause.exists() and not stop.is_set():
        await _sleep_unless(stop, _PAUSE_S)
    _remove(told)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


async def _sleep_unless(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        pass
