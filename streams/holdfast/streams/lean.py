"""Requests over one inbox of our own, with many in flight.

nats-py's ``request`` and ``publish_async`` spend most of their time on a random token, a ``wait_for`` and a task for
each message.  Here one subscription serves every request of a connection: reply subjects are counter tokens under a
private inbox, one sweeper enforces all deadlines, and an answer goes from the read loop to whoever waits for it, past
nats-py's queue and task.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import nats.errors
from nats.aio.msg import Msg

from holdfast.schemas.errors import ClosedError, HoldfastError, UnavailableError, UnknownOutcomeError
from holdfast.streams.retry import ATTEMPT_S, NoResponderError, NotConnectedError
from holdfast.streams.tolerant_client import TolerantClient, read_headers
from holdfast.streams.wire import H_SEQUENCE, H_STATUS

logger = logging.getLogger(__name__)

_SWEEP_S: Final = 0.1
"""How late a deadline may be noticed.  Each sweep looks at every request in flight: some thousand, 0.1 µs each."""

_NO_RESPONDERS: Final = "503"


class Lean:
    """Requests, acknowledged publishes and streamed replies on one connection.

    Use as ``async with Lean(client) as lean``.  Leaving the block fails what is still in flight with ClosedError, and
    so does every call from then on.  While the connection is lost, nothing is kept to be sent later: what can wait for
    it does, and everything else raises NotConnectedError.  A cancelled waiter leaves nothing behind: its reply, if it
    comes, is dropped.
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
        self._streams: dict[str, _Replies | _Collection] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._subscription: Any = None
        self._is_closed = False
        self._back: asyncio.Future[None] | None = None

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
        self.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        if not self._client.is_closed:
            await self._subscription.unsubscribe()  # waits for nothing

    def close(self) -> None:
        """Fails what is in flight, and every call from now on, with ClosedError.  Harmless when called twice."""
        # First: what fails may be tried again at once, and nobody would sweep or listen for it any more.
        self._is_closed = True
        self.fail_in_flight(closed())
        self.reconnected()

    def fail_in_flight(self, error: HoldfastError) -> None:
        """Ends every request under way with ``error``; an answer that still comes is dropped.

        What has come of a streamed answer is read before the error.
        """
        waiting, self._waiting = self._waiting, {}
        self._batches.clear()
        for future, _ in waiting.values():
            _fail(future, error)
        for replies in self._streams.values():
            replies.fail(error)

    def reconnected(self) -> None:
        """Wakes who waits for the connection; to be called when it stands again."""
        back, self._back = self._back, None
        if back is not None and not back.done():
            back.set_result(None)

    async def send(
        self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None, *, timeout_s: float = ATTEMPT_S
    ) -> asyncio.Future[Msg]:
        """Publishes a request and returns the future of its reply.

        The future ends with the reply whatever it says, or with UnknownOutcomeError after ``timeout_s`` (ATTEMPT_S by
        default) or when the connection is lost, or with NoResponderError when nobody listens on ``subject``.  Raises
        NotConnectedError, with nothing sent, while there is no connection.
        """
        token = self.new_token()
        future = self.expect(token, timeout_s=timeout_s)
        try:
            # The usual case without a call that could wait: one request is some 10 us in all.
            if not self._client.publish_now(subject, payload, self._prefix + token, headers):
                await self.publish(subject, payload, headers, reply_token=token, timeout_s=timeout_s)
        except BaseException:
            self._take(token)
            raise
        return future

    async def request(
        self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None, *, timeout_s: float = ATTEMPT_S
    ) -> Msg:
        """Publishes a request and awaits its reply; errors as of :meth:`send`.

        A lost connection is waited for first, for as long as the reply may take: a caller that tries only once outlives
        a restart of the server by that.
        """
        try:
            future = await self.send(subject, payload, headers, timeout_s=timeout_s)
        except NotConnectedError as error:
            future = await self._send_when_back(error, subject, payload, headers, timeout_s)
        return await future

    async def _send_when_back(
        self, error: NotConnectedError, subject: str, payload: bytes, headers: dict[str, str] | None, timeout_s: float
    ) -> asyncio.Future[Msg]:
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while True:
            # Shared by all who wait for the connection: neither a time-out nor a cancel of one may end it.
            await asyncio.wait((error.back,), timeout=until - loop.time())
            left_s = until - loop.time()
            if left_s <= 0:
                raise error
            try:
                return await self.send(subject, payload, headers, timeout_s=left_s)
            except NotConnectedError as again:
                error = again

    def new_token(self) -> str:
        """Returns a reply token that this connection has not used before."""
        self._next_token += 1
        return str(self._next_token)

    def expect(self, token: str, *, timeout_s: float, is_batch: bool = False) -> asyncio.Future[Msg]:
        """Returns the future of the reply to ``token``; see :meth:`send` for how it ends.

        ``is_batch``: an empty reply only says that an atomic batch was begun, and is passed over.
        """
        if self._is_closed:
            raise closed()
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
        timeout_s: float = ATTEMPT_S,
    ) -> None:
        """Hands a message to the connection; with ``reply_token`` answers come back under that token.

        Raises NotConnectedError, with nothing sent, while there is no connection, and UnknownOutcomeError when the
        server has taken nothing for ``timeout_s``: the message waits, and is sent if the server goes on.
        """
        if self._is_closed:
            raise closed()
        if reply_token:
            reply = f"{self._prefix}{reply_token}"
        if self._client.publish_now(subject, payload, reply, headers):
            return
        if not self._client.is_connected:
            raise self._not_connected()
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.publish(subject, payload, reply=reply, headers=headers)
        except TimeoutError as error:
            raise UnknownOutcomeError(
                f"the NATS server has taken nothing for {timeout_s:.3g} s", hint="the same call may be sent again"
            ) from error
        except (nats.errors.Error, OSError) as error:
            raise UnavailableError(
                f"cannot send to the NATS server: {type(error).__name__}", hint="check that the server runs"
            ) from error

    def _not_connected(self) -> HoldfastError:
        if self._client.is_closed:
            return closed()
        if self._back is None:
            self._back = asyncio.get_running_loop().create_future()
        return NotConnectedError(
            "there is no connection to the NATS server", hint="check that the server runs", back=self._back
        )

    @asynccontextmanager
    async def stream(
        self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None
    ) -> AsyncGenerator[asyncio.Queue[Msg]]:
        """Publishes a request that is answered by many messages; yields the queue on which they arrive.

        When the connection is lost, what has arrived is followed by UnknownOutcomeError, raised by the queue itself.
        """
        token = self.new_token()
        queue = self._streams[token] = _Replies()
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
        says so; raises TimeoutError when none came for ``silence_s`` seconds or a little more, UnknownOutcomeError when
        the connection is lost."""
        token = self.new_token()
        collection = self._streams[token] = _Collection(is_last)
        seen = -1
        try:
            await self.publish(subject, payload, reply_token=token)
            while seen < len(collection.messages):
                seen = len(collection.messages)
                await asyncio.wait((collection.done,), timeout=silence_s)
                if collection.done.done():
                    collection.done.result()
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


class _Replies(asyncio.Queue[Msg]):
    """The messages that answer one request, as they come; bounded by what the request asks for."""

    _queue: deque[Msg | HoldfastError]

    def fail(self, error: HoldfastError) -> None:
        """Has ``error`` raised to whoever asks for more than what has come."""
        self.put_nowait(error)  # type: ignore[arg-type]  # never handed out

    def _get(self) -> Msg:
        item = self._queue.popleft()
        if isinstance(item, HoldfastError):
            self._queue.appendleft(item)
            raise item
        return item


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

    def fail(self, error: HoldfastError) -> None:
        """Ends the collection with ``error``, unless it is complete."""
        _fail(self.done, error)


def closed() -> ClosedError:
    """Returns what a call on a connection that is closed raises."""
    return ClosedError("the connection to the NATS server is closed", hint="make the call on a new client")


def _fail(future: asyncio.Future[Any], error: HoldfastError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # the waiter may be gone: mark as retrieved


def is_no_responder(message: Msg) -> bool:
    """Whether a reply is the server's word that nobody listens, and not a stored message with such a header."""
    headers = message.headers
    if not headers:
        return False
    return headers.get(H_STATUS) == _NO_RESPONDERS and not message.data and H_SEQUENCE not in headers
