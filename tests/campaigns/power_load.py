"""Agents that write until the power goes: what every torture writes, and batches, commits of many keys, deletions."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client import Holdfast, connect, key_changes
from holdfast.ops.torture.history import Attempt, HistoryWriter
from holdfast.ops.torture.load import CONTEXT_KIND, Producer, SdkProducer, body_of
from holdfast.ops.torture.plain import canonical
from holdfast.ops.torture.raw_load import RawProducer, connected
from holdfast.schemas.errors import HoldfastError
from holdfast.streams.wire import STREAM_OF_TABLE

if TYPE_CHECKING:
    from holdfast.client.key_writer import Decide

NAMESPACE: Final = "default"
GRAVES: Final = "graves"
"""A namespace of keys that are written once, deleted, and never touched again before the cut."""

_BATCHES: Final = (17, 60, 200, 400)
"""Members of an atomic batch; fewer go singly."""

_COMMIT_KEYS: Final = 80
_ROUND_NUMBERS: Final = 100_000


class LoadTask(msgspec.Struct, tag="load"):
    """What to write.  ``rate``: how much a second and lane; ``seconds``: for how long; None is until the power goes."""

    url: str
    history: str
    graves: str
    seed: int
    round: int
    lanes: int = 3
    rate: float | None = None
    seconds: float | None = None
    batches: bool = False
    buries: bool = False
    changes: bool = False


class Burial(msgspec.Struct):
    """A line of the record of :data:`GRAVES`: an acknowledged version."""

    key: str
    op: str
    version: int


class BatchProducer(SdkProducer):
    """Writes nothing but large batches: of contexts, of events, and of keys all or none."""

    async def step(self, choice: random.Random) -> None:
        """Writes one batch."""
        size = choice.choice(_BATCHES)
        match choice.randrange(3):
            case 0:
                await self._put(size)
            case 1:
                await self._emit(size)
            case _:
                await self._commit(choice, min(size, _COMMIT_KEYS))

    async def _commit(self, choice: random.Random, size: int) -> None:
        attempts: list[Attempt] = []
        decisions: dict[str, Decide] = {}
        policies = await self.hf.keys.policies()
        for number in choice.sample(range(_COMMIT_KEYS), size):
            self.number += 1
            body = canonical(body_of(self.producer, self.number, self.seed, large_one_in=0))
            key = f"{self.producer}.batch{number}"
            attempts.append(self._attempt("key", key, body))
            # As ``keys.commit`` does, but each key tells its own attempt.
            meta = key_changes.meta_of(self.hf.agent, (), None, None, None, attempts[-1].op, None, None, is_whole=True)
            decisions |= key_changes.commit(
                self.namespace, {key: body}, (), {}, meta, policies, kind=CONTEXT_KIND, encrypt=None
            )
        self.writer.begin(*attempts)
        try:
            written = await self.hf.keys._writer.commit(decisions)
        except Exception as error:  # noqa: BLE001  whatever it is, it is noted
            self.note_error(attempts, error)
            return
        for attempt in attempts:
            self.note_acknowledged(attempt, version=written[attempt.id].version)


async def run_load(task: LoadTask) -> None:
    """Writes as the task says; tells ``ready`` when it begins, ``idle`` when its time is over."""
    with HistoryWriter(Path(task.history)) as writer:
        async with connect(task.url, NAMESPACE, "agent", cache_bytes=0) as hf, connected(task.url, "raw") as client:
            stop = asyncio.Event()
            producers = [*_producers(hf, writer, task), _raw(client, writer, task)]
            async with asyncio.TaskGroup() as group:
                for producer in producers:
                    group.create_task(producer.run(stop, rate=task.rate))
                if task.buries:
                    group.create_task(_bury(hf, task, stop))
                for name in STREAM_OF_TABLE.values() if task.changes else ():
                    group.create_task(_change(hf, name, stop))
                _tell("ready")
                if task.seconds is not None:
                    await asyncio.sleep(task.seconds)
                    stop.set()
        _tell("idle")


def _producers(hf: Holdfast, writer: HistoryWriter, task: LoadTask) -> Sequence[Producer]:
    made = BatchProducer if task.batches else SdkProducer
    first = task.round * _ROUND_NUMBERS + 1
    producers = [made(hf, writer, f"p{lane}", task.seed, first_number=first) for lane in range(task.lanes)]
    for producer in producers:
        # None of an event that was acknowledged is sent once more: here the server remembers ids for a second only.
        producer.recent_events = deque(maxlen=0)
    return producers


def _raw(client: Any, writer: HistoryWriter, task: LoadTask) -> Producer:
    first = task.round * _ROUND_NUMBERS + 1
    return RawProducer(client, writer, "raw", task.seed, namespace=NAMESPACE, first_number=first)


async def _bury(hf: Holdfast, task: LoadTask, stop: asyncio.Event) -> None:
    """Writes keys and deletes them; notes each version when it is acknowledged."""
    descriptor = os.open(task.graves, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    graves = Holdfast(hf.connection, GRAVES, "sexton")
    number = 0
    while not stop.is_set():
        number += 1
        key = f"grave{task.round}.{number}"
        try:
            put = await graves.keys.put(key, {"round": task.round, "number": number})
            os.write(descriptor, _line(Burial(key, "put", put.version)))
            gone = await graves.keys.delete(key)
            os.write(descriptor, _line(Burial(key, "delete", gone.version)))
        except HoldfastError:
            await asyncio.sleep(0.01)


async def _change(hf: Holdfast, name: str, stop: asyncio.Event) -> None:
    """Changes how a stream is described, as a new epoch does, and a mark that heads have left."""
    config = (await hf.connection.api(f"STREAM.INFO.{name}"))["config"]
    number = 0
    while not stop.is_set():
        number += 1
        metadata = config["metadata"] | {"campaign.change": str(number)}
        with contextlib.suppress(HoldfastError):
            await hf.connection.api(f"STREAM.UPDATE.{name}", config | {"metadata": metadata})
        await asyncio.sleep(0)


def _line(burial: Burial) -> bytes:
    return msgspec.json.encode(burial) + b"\n"


def _tell(line: str) -> None:
    # One write: a process that is killed has told the line or has not.
    os.write(1, f"{line}\n".encode())
