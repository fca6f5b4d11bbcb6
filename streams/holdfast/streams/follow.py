"""Following a stream: every message of some subjects from a sequence on, as they come.

Messages are read by sequence (``StreamReader``); a plain subscription to the same subjects only says when to look, so
that nothing hangs on its deliveries: what it misses is found at the next look, some seconds later.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

import nats.errors

from holdfast.schemas.errors import ClosedError, GapError, RetryError
from holdfast.streams.connection import ApiError
from holdfast.streams.pull import StreamReader
from holdfast.streams.retry import READ_DEADLINE_S, call_with_retry
from holdfast.streams.topology import stream_info

if TYPE_CHECKING:
    from nats.aio.subscription import Subscription

    from holdfast.streams.connection import Connection, Msg
    from holdfast.streams.messages import StoredMessage

logger = logging.getLogger(__name__)

_LOOK_S: Final = 2.0
"""How often the stream is looked at when nothing says that something came."""

_AGAIN_S: Final = 0.2


class StreamFollower:
    """Follows the subjects of one stream.  Not safe for two readers at once.

    ``filter_subject`` may hold wildcards.  ``next_seq`` counts in the stream's life ``epoch``; one that began anew is
    followed from its beginning.  A follower that is not closed ends with its connection.
    """

    def __init__(self, connection: Connection, stream: str, filter_subject: str, next_seq: int, *, epoch: str) -> None:
        self._connection = connection
        self._stream = stream
        self._filter = filter_subject
        self._reader = StreamReader(connection, stream, next_seq, allow_gaps=True, filter_subject=filter_subject)
        self._epoch = epoch
        self._is_closed = False
        self._something = asyncio.Event()
        self._subscription: Subscription | None = None

    async def open(self) -> None:
        """Begins to listen."""
        self._subscription = await self._connection.client.subscribe(self._filter, cb=self._on_message)
        self._connection.on_reconnect.append(self._something.set)
        self._connection.on_close.append(self._connection_closed)
        # Nothing is read yet, but from now on the reader knows in which life of the stream it stands.
        reader = self._reader
        _, info = await call_with_retry(
            lambda: reader.read(limit=1, up_to=reader.next_seq - 1), deadline_s=READ_DEADLINE_S
        )
        if info.epoch != self._epoch:
            await self._begin_anew()

    async def next_messages(self, *, limit: int) -> list[StoredMessage]:
        """Waits for messages and returns them, at least one, in order; none once it is closed, or its connection is.

        An unreachable server is waited for.
        """
        while not self._is_closed:
            self._something.clear()
            try:
                messages, _ = await self._reader.read(limit=limit)
            except GapError:
                await self._begin_anew()
                continue
            except ClosedError:
                break
            except (RetryError, ApiError) as error:
                if isinstance(error, ApiError) and not error.is_passing:
                    raise
                logger.debug("cannot follow now", extra={"action": "follow_retry", "error": str(error)})
                await asyncio.sleep(_AGAIN_S)
                continue
            if messages:
                return messages
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._something.wait()
            except TimeoutError:
                pass  # time to look
        return []

    async def close(self) -> None:
        """Ends the subscription and drops the consumer; who waits for messages gets none."""
        self._connection_closed()
        if self._connection_closed in self._connection.on_close:
            self._connection.on_close.remove(self._connection_closed)
        try:
            if self._subscription is not None and not self._connection.client.is_closed:
                await self._subscription.unsubscribe()
            await self._reader.close()
        except (RetryError, ClosedError, nats.errors.Error, OSError):
            # The server drops both by itself.
            logger.debug("closing a follower without a server", exc_info=True)
        self._subscription = None

    def _connection_closed(self) -> None:
        self._is_closed = True
        self._something.set()
        if self._something.set in self._connection.on_reconnect:
            self._connection.on_reconnect.remove(self._something.set)

    async def _begin_anew(self) -> None:
        """The stream was created anew, or another life of it began: nothing of the old position holds."""
        try:
            await self._reader.close()
            info = await stream_info(self._connection, self._stream)
        except ClosedError:
            return  # the next read says so
        except (RetryError, ApiError, GapError, nats.errors.Error) as error:
            if isinstance(error, ApiError) and not error.is_passing:
                raise
            await asyncio.sleep(_AGAIN_S)
            return
        self._reader = StreamReader(
            self._connection, self._stream, max(1, info.first_seq), allow_gaps=True, filter_subject=self._filter
        )

    async def _on_message(self, _message: Msg) -> None:
        self._something.set()
