"""Messages that no stream keeps: a word to whoever listens just now."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import nats.errors

from holdfast.schemas.errors import UnavailableError
from holdfast.streams.lean import closed

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection, Msg

logger = logging.getLogger(__name__)


async def listen(
    connection: Connection, subject: str, receive: Callable[[Msg], Awaitable[None]]
) -> Callable[[], Awaitable[None]]:
    """Calls ``receive`` with each message on a subject, one after the other; returns what ends that, and never raises.

    Nothing may hang on such a message: what is sent while the connection is down is gone.  Raises ClosedError, or
    UnavailableError when the server does not answer; then nothing is left of it.
    """
    client = connection.client
    if client.is_closed:
        raise closed()
    subscription = await client.subscribe(subject, cb=receive)

    async def stop() -> None:
        try:
            if not client.is_closed:
                await subscription.unsubscribe()
        except (nats.errors.Error, OSError):
            logger.debug("unsubscribing without a connection", exc_info=True)

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
