"""Waiting for the result of an event that some handler works on.

The handler tells of the result on a subject of this client's own; nothing hangs on that message: what is lost with it
is found in what is stored, which is asked now and then.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client.cold import ResolverClient
from holdfast.client.handler_policy import ERROR, RESULT, error_of_data
from holdfast.client.model import Event
from holdfast.schemas.errors import ClosedError, InvalidFieldError, RetryError, UnavailableError
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.notices import listen
from holdfast.streams.wire import reply_subject

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from holdfast.client.store import Holdfast
    from holdfast.streams.connection import Msg

logger = logging.getLogger(__name__)

_FIRST_LOOK_S: Final = 1.0
_LOOK_S: Final = 5.0
"""How often the store is asked for a result, at first and at the longest."""

_EARLY: Final = 256
"""Results kept that came before the answer to the event they belong to."""

_EVENT: Final = msgspec.json.Decoder(Event)


class Requests:
    """The requests of one client that are under way."""

    def __init__(self, hf: Holdfast) -> None:
        self._hf = hf
        self._client_id = uuid.uuid4().hex
        self._resolver = ResolverClient(hf.connection, hf.namespace)
        self._stop: Callable[[], Awaitable[None]] | None = None
        self._opening = asyncio.Lock()
        self._waiting: dict[str, asyncio.Future[Event]] = {}
        self._asking = 0
        self._is_closed = False
        self._early: dict[str, Event] = {}

    async def request(self, name: str, data: Any, *, timeout_s: float, options: dict[str, Any]) -> Event:
        """Emits an event and returns the result event of the first handler that has one."""
        if options.get("client") is not None:
            raise InvalidFieldError(
                "a request names its own client", field="client", hint="use emit, and wait for the result yourself"
            )
        if self._is_closed:
            raise ClosedError("the client is closed, and nothing was emitted", hint="make the request on a new client")
        await self._listen(timeout_s)
        named: dict[str, Any] = {"originator": self._hf.agent, **options, "client": self._client_id}
        future: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._asking += 1
        try:
            asked = await self._hf.emit(name, data, **named)
            early = self._early.pop(asked.event_id, None)
        finally:
            self._asking -= 1
            if not self._asking:
                self._early.clear()
        if self._is_closed:
            raise _closed_meanwhile(asked.event_id)
        self._waiting[asked.event_id] = future
        if early is not None:
            self._arrived(early)
        looking: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        # A timer, not a task: most results are here before it is time to look.
        first_look = loop.call_later(_FIRST_LOOK_S, lambda: looking.append(loop.create_task(self._look(asked, future))))
        try:
            async with asyncio.timeout(timeout_s):
                outcome = await future
        except TimeoutError as error:
            raise UnavailableError(
                f"no result of {name!r} came within {timeout_s} s; its event is {asked.event_id}",
                hint=f"is a handler for it running? the result may still come: query events with the parent "
                f"{asked.event_id}",
            ) from error
        finally:
            self._waiting.pop(asked.event_id, None)
            first_look.cancel()
            for look in looking:
                look.cancel()
            await asyncio.gather(*looking, return_exceptions=True)
        if outcome.name.endswith(f":{ERROR}"):
            raise error_of_data(outcome.data, event=asked.event_id)
        return outcome

    async def _listen(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s), self._opening:
                if self._stop is None:
                    subject = reply_subject(self._hf.namespace, self._client_id)
                    self._stop = await listen(self._hf.connection, subject, self._receive)
        except TimeoutError as error:
            raise UnavailableError(
                f"the NATS server does not answer within {timeout_s} s; nothing was emitted",
                hint="check that the server runs; the same call may be sent again",
            ) from error

    async def close(self) -> None:
        """Ends the subscription, and what still waits, with ClosedError."""
        self._is_closed = True
        stop, self._stop = self._stop, None
        for asked, future in self._waiting.items():
            if not future.done():
                future.set_exception(_closed_meanwhile(asked))
        if stop is not None:
            await stop()

    async def _receive(self, message: Msg) -> None:
        try:
            self._arrived(_EVENT.decode(message.data))
        except UNDECODABLE:
            logger.debug("a reply that is no event", extra={"action": "reply_ignored"})

    def _arrived(self, outcome: Event) -> None:
        # Children inherit the client: what a handler of a handler has to say comes here, too, and is no answer.
        asked = outcome.parent_event_id
        if asked is None:
            return
        future = self._waiting.get(asked)
        if future is None:
            if not self._asking:
                return
            self._early[asked] = outcome
            if len(self._early) > _EARLY:
                del self._early[next(iter(self._early))]
        elif not future.done():
            future.set_result(outcome)

    async def _look(self, asked: Event, future: asyncio.Future[Event]) -> None:
        """Asks now and then what is stored, until the future is done."""
        pause_s = _FIRST_LOOK_S
        while not future.done():
            for outcome in (RESULT, ERROR):
                try:
                    answer = await self._resolver.call(
                        "query", {"parent_event_id": asked.event_id, "name": f"{asked.name}:{outcome}", "limit": 1}
                    )
                except RetryError as error:
                    logger.debug("a result cannot be asked for", extra={"action": "look_retry", "error": str(error)})
                    continue
                if answer["events"] and not future.done():
                    future.set_result(msgspec.convert(answer["events"][0], Event))
                    return
            pause_s = min(2 * pause_s, _LOOK_S)
            await asyncio.wait([future], timeout=pause_s)


def _closed_meanwhile(asked: str) -> ClosedError:
    return ClosedError(
        f"the client was closed before a result of event {asked} came",
        hint="the event is stored and will be worked on: query events with this parent on a new client",
    )
