"""What the tests of handlers share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from holdfast.client import Event, Holdfast, connect
from holdfast.streams.dead import DeadLetter, read_dead_letters
from tests.integration.test_events import rows_of
from tests.support import LIMIT_S

if TYPE_CHECKING:
    from holdfast.client.handlers import Handlers
    from holdfast.schemas.rows import EventRow
    from holdfast.streams.connection import Connection


QUICK: dict[str, Any] = {"backoff_s": (0.01,), "ack_wait_s": 1.0}


class Seen:
    """What handlers were handed, waited for by its number."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._more = asyncio.Event()

    def add(self, event: Event) -> int:
        self.events.append(event)
        self._more.set()
        return len(self.events)

    async def wait(self, count: int = 1) -> list[Event]:
        async with asyncio.timeout(LIMIT_S):
            while len(self.events) < count:
                self._more.clear()
                await self._more.wait()
        return self.events

    async def wait_for(self, event_id: str) -> None:
        """Waits for one event, however often others come."""
        async with asyncio.timeout(LIMIT_S):
            while all(event.event_id != event_id for event in self.events):
                self._more.clear()
                await self._more.wait()


@asynccontextmanager
async def other(url: str, namespace: str, agent: str = "other") -> AsyncGenerator[tuple[Holdfast, Handlers]]:
    """Another client, as in another process, with its handlers."""
    async with connect(url, namespace, agent) as hf:
        try:
            yield hf, hf.handlers
        finally:
            await hf.handlers.close(0.0)


async def letters_of(hf: Holdfast) -> list[DeadLetter]:
    prefix = f"ctx.{hf.namespace}."
    return [letter async for _, letter in read_dead_letters(hf.connection) if letter.subject.startswith(prefix)]


async def named(connection: Connection, namespace: str, name: str) -> list[EventRow]:
    return [row for row in await rows_of(connection, namespace) if row.name == name]


def settled(handlers: Handlers, name: str, count: int) -> bool:
    counters = handlers.counters[name]
    return counters.done + counters.dead >= count
