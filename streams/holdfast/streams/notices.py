"""Messages that no stream keeps: a word to whoever listens just now."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection, Msg


async def listen(connection: Connection, subject: str, take: Callable[[bytes], None]) -> Callable[[], Awaitable[None]]:
    """Calls ``take`` with the payload of each message on a subject; returns what ends that.

    Nothing may hang on such a message: what is sent while the connection is down is gone.
    """

    async def receive(message: Msg) -> None:
        take(message.data)

    subscription = await connection.client.subscribe(subject, cb=receive)
    # Once this has returned, the server knows who listens: an answer cannot come before.
    await connection.client.flush()

    async def stop() -> None:
        if not connection.client.is_closed:
            await subscription.unsubscribe()

    return stop
