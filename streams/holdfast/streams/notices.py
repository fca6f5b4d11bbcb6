"""Messages that no stream keeps: a word to whoever listens just now."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import nats.errors

from holdfast.schemas.errors import UnavailableError
from holdfast.streams.lean import closed

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection, Msg


async def listen(connection: Connection, subject: str, take: Callable[[bytes], None]) -> Callable[[], Awaitable[None]]:
    """Calls ``take`` with the payload of each message on a subject; returns what ends that.

    Nothing may hang on such a message: what is sent while the connection is down is gone.  Raises ClosedError, or
    UnavailableError when the server does not answer; then nothing is left of it.
    """

    async def receive(message: Msg) -> None:
        take(message.data)

    client = connection.client
    if client.is_closed:
        raise closed()
    subscription = await client.subscribe(subject, cb=receive)

    async def stop() -> None:
        if not client.is_closed:
            await subscription.unsubscribe()

    try:
        # Once this has returned, the server knows who listens: an answer cannot come before.
        await client.flush()
    except BaseException as error:
        await stop()
        if client.is_closed:
            raise closed() from error
        if isinstance(error, nats.errors.Error | OSError):
            raise UnavailableError(
                "the NATS server does not answer", hint="check that the server runs; the same call may be sent again"
            ) from error
        raise
    return stop
