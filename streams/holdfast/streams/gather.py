"""A question that every process answers for itself, and the collecting of the answers.

Unlike the endpoints of a service, which share requests among them, each subscription here gets each question.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import nats.errors

from holdfast.streams.arrivals import next_of
from holdfast.streams.notices import listen

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from holdfast.streams.connection import Connection

logger = logging.getLogger(__name__)

MOST: Final = 1_000
"""Answers listened to."""


@asynccontextmanager
async def answer_each(
    connection: Connection, subject: str, answer: Callable[[], Awaitable[bytes]]
) -> AsyncGenerator[None]:
    """Answers every question on a subject with what ``answer`` returns, while the block lasts.

    Raises as :func:`holdfast.streams.notices.listen` does, before the block.
    """

    async def receive(message: Msg) -> None:
        if not message.reply:
            return
        try:
            await connection.client.publish(message.reply, await answer())
        except (nats.errors.Error, OSError):
            logger.debug("a question was not answered", exc_info=True, extra={"action": "unanswered"})

    stop = await listen(connection, subject, receive)
    try:
        yield
    finally:
        await stop()


async def ask_each(
    connection: Connection, subject: str, is_enough: Callable[[bytes], bool], *, timeout_s: float, quiet_s: float
) -> list[bytes]:
    """Returns the answers to a question, as they came.

    ``is_enough`` is shown each of them: once it has said yes, ``quiet_s`` of silence ends the wait; else ``timeout_s``
    does.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + timeout_s
    answers: list[bytes] = []
    enough = False
    async with connection.lean.stream(subject) as queue:
        while len(answers) < MOST:
            left_s = min(until - loop.time(), quiet_s if enough else timeout_s)
            try:
                message = await next_of(queue, max(0.0, left_s))
            except TimeoutError:
                break
            if not message.data:
                break  # the server's word that nobody listens
            answers.append(message.data)
            enough = is_enough(message.data) or enough
    return answers
