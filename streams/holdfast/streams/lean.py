"""Requests over one inbox of our own, with many in flight.

nats-py's ``request`` and ``publish_async`` spend most of their time on a random token, a ``wait_for`` and a task for
each message.  Here one subscription serves every request of a connection: reply subjects are counter tokens under a
private inbox, one sweeper enforces all deadlines, and an answer goes from the read loop to whoever waits for it, past
nats-py's queue and task.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import nats.errors
from nats.aio.msg import Msg

from holdfast.schemas.errors import HoldfastError, UnavailableError, UnknownOutcomeError
from holdfast.streams.retry import ATTEMPT_S, NoResponderError
from holdfast.streams.tolerant_client import TolerantClient, read_headers
from holdfast.streams.wire import H_SEQUENCE, H_STATUS

logger = logging.getLogger(__name__)

_SWEEP_S: Final = 0.1
"""How late a deadline may be noticed.  Each sweep looks at every request in flight: some thousand, 0.1 µs each."""

_NO_RESPONDERS: Final = "503"


class Lean:
    """Requests, acknowledged publishes and streamed replies on one connection.

    Use as ``async with Lean(client) as lean``.  Leaving the block fails what is still in flight with
    UnavailableError.  A cancelled waiter leaves nothing behind: its reply, if it comes, is dropped.
    """

    def __init__(self, client: TolerantClient) -> None:
        self._client = client
        self._inbox = client.new_inbox()
        self._prefix = f"{self._inbox}."
        self._prefix_bytes = self._prefix.encode()
        self._skip = len(self._prefix)
        self._next_token = 0
        self._waiting: dict[str, tuple[asyncio.Future[Msg], float]] = {}
        self._batches: set[str] = set()
        self._streams: dict[str, asyncio.Queue[Msg] | _Collection] = {}
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
        self._client.divert(f"{self._inbox}.*", self._take_reply)
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep(), name="holdfast-lean-sweeper")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        self.fail_in_flight(UnavailableError("the connection is closing"))
        if not self._client.is_closed:
            await self._subscription.unsubscribe()

    def fail_in_flight(self, error: HoldfastError) -> None:
        """Ends every request under way with ``error``; an answer that still comes is dropped."""
        waiting, self._waiting = self._waiting, {}
        self._batches.clear()
        for future, _ in waiting.values():
            _fail(future, error)

    async def send(
        self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None, *, timeout_s: float = ATTEMPT_S
    ) -> asyncio.Future[Msg]:
        """Publishes a request and returns the future of its reply.

        The future ends with the reply whatever it says, or with UnknownOutcomeError after ``timeout_s`` (ATTEMPT_S by
        default), or with NoResponderError when nobody listens on ``subject``.
        """
        token = self.new_token()
        future = self.expect(token, timeout_s=timeout_s)
        try:
            # The usual case without a call that could wait: one request is some 10 us in all.
            if not self._client.publish_now(subject, payload, self._prefix + token, headers):
                await self.publish(subject, payload, headers, reply_token=token)
        except BaseException:
            self._take(token)
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

    def expect(self, token: str, *, timeout_s: float, is_batch: bool = False) -> asyncio.Future[Msg]:
        """Returns the future of the reply to ``token``; see :meth:`send` for how it ends.

        ``is_batch``: an empty reply only says that an atomic batch was begun, and is passed over.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Msg] = loop.create_future()
        self._waiting[token] = (future, loop.time() + timeout_s)
        if is_batch:
            self._batches.add(token)
        return future

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        headers: dict[str, str] | None = None,
        *,
        reply_token: str | None = None,
        reply: str = "",
    ) -> None:
        """Hands a message to the connection; with ``reply_token`` answers come back under that token."""
        if reply_token:
            reply = f"{self._prefix}{reply_token}"
        if self._client.publish_now(subject, payload, reply, headers):
            return
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

    def _take_reply(self, subject: bytes, reply: bytes, payload: bytes, block: bytes | None) -> bool:
        if not subject.startswith(self._prefix_bytes):
            return False
        text = subject.decode("utf-8", "replace")
        self._settle(
            text[self._skip :], Msg(self._client, text, reply.decode("utf-8", "replace"), payload, read_headers(block))
        )
        return True

    async def collect(
        self, subject: str, payload: bytes, is_last: Callable[[Msg], bool], *, silence_s: float = ATTEMPT_S
    ) -> list[Msg]:
        """Publishes a request that is answered by many messages and returns them, up to the first for which ``is_last``
        says so; raises TimeoutError when none came for ``silence_s`` seconds or a little more."""
        token = self.new_token()
        collection = self._streams[token] = _Collection(is_last)
        seen = -1
        try:
            await self.publish(subject, payload, reply_token=token)
            while seen < len(collection.messages):
                seen = len(collection.messages)
                await asyncio.wait((collection.done,), timeout=silence_s)
                if collection.done.done():
                    return collection.messages
            raise TimeoutError
        finally:
            del self._streams[token]

    async def _on_reply(self, message: Msg) -> None:
        if message.subject.startswith(self._prefix):  # else nothing that was asked for here
            self._settle(message.subject[self._skip :], message)

    def _settle(self, token: str, message: Msg) -> None:
        if token not in self._waiting:
            queue = self._streams.get(token)
            if queue is not None:
                queue.put_nowait(message)
            return
        if token in self._batches and not message.data and not message.headers:
            return  # the server's word that an atomic batch was begun; its outcome comes later
        future = self._take(token)
        if future is None or future.done():
            return
        if is_no_responder(message):
            _fail(future, NoResponderError("nobody answers this subject", field="subject"))
        else:
            future.set_result(message)

    def _take(self, token: str) -> asyncio.Future[Msg] | None:
        self._batches.discard(token)
        entry = self._waiting.pop(token, None)
        return None if entry is None else entry[0]

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = loop.time()
            # A waiter that was cancelled has left its entry behind: it goes here too.
            over = [token for token, (future, until) in self._waiting.items() if until <= now or future.done()]
            for token in over:
                future = self._take(token)
                if future is not None:
                    _fail(future, UnknownOutcomeError("no answer came in time", hint="the same call may be sent again"))


class _Collection:
    """The messages that answer one request."""

    def __init__(self, is_last: Callable[[Msg], bool]) -> None:
        self.messages: list[Msg] = []  # bounded by what the request asks for
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_last = is_last

    def put_nowait(self, message: Msg) -> None:
        if self.done.done():
            return  # nothing that was asked for
        self.messages.append(message)
        if self._is_last(message):
            self.done.set_result(None)


def _fail(future: asyncio.Future[Msg], error: HoldfastError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # the waiter may be gone: mark as retrieved


def is_no_responder(message: Msg) -> bool:
    """Whether a reply is the server's word that nobody listens, and not a stored message with such a header."""
    headers = message.headers
    if not headers:
        return False
    return headers.get(H_STATUS) == _NO_RESPONDERS and not message.data and H_SEQUENCE not in headers
