"""Requests over one inbox of our own, with many in flight.

nats-py's ``request`` and ``publish_async`` spend most of their time on a random token, a ``wait_for`` and a task for
each message.  Here one subscription serves every request of a connection: reply subjects are counter tokens under a
private inbox, and one sweeper enforces all deadlines.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import nats.errors

from holdfast.schemas.errors import UnavailableError, UnknownOutcomeError
from holdfast.streams.retry import ATTEMPT_S
from holdfast.streams.wire import H_STATUS

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

logger = logging.getLogger(__name__)

_SWEEP_S: Final = 0.05
"""How late a deadline may be noticed."""

_NO_RESPONDERS: Final = "503"


class Lean:
    """Requests, acknowledged publishes and streamed replies on one connection.

    Use as ``async with Lean(client) as lean``.  Leaving the block fails what is still in flight with
    UnavailableError.  A cancelled waiter leaves nothing behind: its reply, if it comes, is dropped.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._inbox = client.new_inbox()
        self._prefix = f"{self._inbox}."
        self._skip = len(self._prefix)
        self._next_token = 0
        self._waiting: dict[str, asyncio.Future[Msg]] = {}
        self._streams: dict[str, asyncio.Queue[Msg]] = {}
        self._deadlines: deque[tuple[float, str]] = deque()
        self._sweeper: asyncio.Task[None] | None = None
        self._subscription: Any = None

    @property
    def inbox_id(self) -> str:
        """A name that no other connection has: the random part of the inbox."""
        return self._inbox.rpartition(".")[2]

    async def __aenter__(self) -> Lean:
        # No limit on pending bytes or messages: what can arrive is bounded by what was asked for.
        self._subscription = await self._client.subscribe(
            f"{self._inbox}.*", cb=self._on_reply, pending_msgs_limit=0, pending_bytes_limit=0
        )
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep(), name="holdfast-lean-sweeper")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(UnavailableError("the connection is closing"))
                future.exception()  # the waiter may be gone: mark as retrieved
        if not self._client.is_closed:
            await self._subscription.unsubscribe()

    async def send(
        self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None, *, timeout_s: float = ATTEMPT_S
    ) -> asyncio.Future[Msg]:
        """Publishes a request and returns the future of its reply.

        The future ends with the reply whatever it says, or with UnknownOutcomeError after ``timeout_s`` (ATTEMPT_S by
        default), or with UnavailableError when nobody listens on ``subject``.
        """
        token = self.new_token()
        future = self.expect(token, timeout_s=timeout_s)
        try:
            await self.publish(subject, payload, headers, reply_token=token)
        except BaseException:
            self._waiting.pop(token, None)
            raise
        return future

    async def request(
        self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None, *, timeout_s: float = ATTEMPT_S
    ) -> Msg:
        """Publishes a request and awaits its reply; errors as of :meth:`send`."""
        return await (await self.send(subject, payload, headers, timeout_s=timeout_s))

    def new_token(self) -> str:
        """Returns a reply token that this connection has not used before."""
        self._next_token += 1
        return str(self._next_token)

    def expect(self, token: str, *, timeout_s: float) -> asyncio.Future[Msg]:
        """Returns the future of the next non-empty reply to ``token``; see :meth:`send` for how it ends."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Msg] = loop.create_future()
        self._waiting[token] = future
        deadline = loop.time() + timeout_s
        # Nearly all waits share one time-out, so appending keeps the queue sorted; a shorter one is inserted.
        if self._deadlines and deadline < self._deadlines[-1][0]:
            entries = [*self._deadlines, (deadline, token)]
            entries.sort()
            self._deadlines = deque(entries)
        else:
            self._deadlines.append((deadline, token))
        return future

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        headers: dict[str, str] | None = None,
        *,
        reply_token: str | None = None,
    ) -> None:
        """Hands a message to the connection; with ``reply_token`` answers come back under that token."""
        reply = f"{self._prefix}{reply_token}" if reply_token else ""
        try:
            await self._client.publish(subject, payload, reply=reply, headers=headers)
        except (nats.errors.Error, OSError) as error:
            raise UnavailableError(
                f"cannot send to the NATS server: {type(error).__name__}", hint="check that the server runs"
            ) from error

    @asynccontextmanager
    async def stream(
        self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None
    ) -> AsyncGenerator[asyncio.Queue[Msg]]:
        """Publishes a request that is answered by many messages; yields the queue on which they arrive."""
        token = self.new_token()
        queue: asyncio.Queue[Msg] = asyncio.Queue()  # bounded by what the request asks for
        self._streams[token] = queue
        try:
            await self.publish(subject, payload, headers, reply_token=token)
            yield queue
        finally:
            del self._streams[token]

    def open_queue(self) -> tuple[str, asyncio.Queue[Msg]]:
        """Returns a reply subject and the queue of what arrives on it, until :meth:`close_queue`."""
        token = self.new_token()
        queue: asyncio.Queue[Msg] = asyncio.Queue()  # bounded by what its owner asks for
        self._streams[token] = queue
        return f"{self._prefix}{token}", queue

    def close_queue(self, reply: str) -> None:
        """Drops a queue of :meth:`open_queue` and what is still in it."""
        self._streams.pop(reply[self._skip :], None)

    async def _on_reply(self, message: Msg) -> None:
        token = message.subject[self._skip :]
        future = self._waiting.get(token)
        if future is None:
            queue = self._streams.get(token)
            if queue is not None:
                queue.put_nowait(message)
            return
        if not message.data and not message.headers:
            return  # the server's word that an atomic batch was begun; its outcome comes later
        del self._waiting[token]
        if future.done():
            return
        if message.headers is not None and message.headers.get(H_STATUS) == _NO_RESPONDERS and not message.data:
            future.set_exception(UnavailableError("nobody answers this subject", field="subject"))
        else:
            future.set_result(message)

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = loop.time()
            while self._deadlines and self._deadlines[0][0] <= now:
                _, token = self._deadlines.popleft()
                future = self._waiting.pop(token, None)
                if future is not None and not future.done():
                    future.set_exception(
                        UnknownOutcomeError("no answer came in time", hint="the same call may be sent again")
                    )
