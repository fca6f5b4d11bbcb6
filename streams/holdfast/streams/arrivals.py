"""Waiting for the next message of a queue, or for many at once."""

from __future__ import annotations

import asyncio
from typing import Final, TypeVar

T = TypeVar("T")

_DELIVERY: Final = b"$JS.ACK."


Frame = tuple[bytes, bytes, bytes, "bytes | None"]
"""A message as it arrived: subject, reply subject, payload, block of headers."""


class FrameQueue:
    """Messages of one inbox on their way from the read loop to one reader, who is woken once for many.

    Bounded by what the reader asks the server for.
    """

    def __init__(self) -> None:
        self._frames: list[Frame] = []
        self._has_word = False
        self._wanted = 1
        self._waiter: asyncio.Future[None] | None = None

    def take(self, subject: bytes, reply: bytes, payload: bytes, block: bytes | None) -> bool:
        """Takes a message in; to be called in the read loop, with every message of the inbox."""
        self._frames.append((subject, reply, payload, block))
        if not reply.startswith(_DELIVERY):
            self._has_word = True
        if self._waiter is not None and self._is_enough and not self._waiter.done():
            self._waiter.set_result(None)
        return True

    async def next(self, wanted: int, silence_s: float) -> list[Frame]:
        """Returns what has arrived once that is ``wanted`` messages, or there is a word of the server's among them.

        Raises TimeoutError when nothing has arrived for ``silence_s`` seconds.  A cancel loses nothing.
        """
        self._wanted = wanted
        while not self._is_enough:
            before = len(self._frames)
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(silence_s):
                    await self._waiter
            except TimeoutError:
                if len(self._frames) == before:
                    raise
            finally:
                self._waiter = None
        frames, self._frames, self._has_word = self._frames, [], False
        return frames

    def clear(self) -> None:
        """Forgets what has arrived."""
        self._frames, self._has_word = [], False

    @property
    def _is_enough(self) -> bool:
        return self._has_word or len(self._frames) >= self._wanted


async def next_of(queue: asyncio.Queue[T], timeout_s: float) -> T:
    """Returns the next item, waiting for it up to ``timeout_s`` seconds; raises TimeoutError after that.

    Not ``wait_for(queue.get(), …)``: on Python 3.11 that swallows a cancel when an item is there already, so that a
    busy reader could not be ended; and it makes a task for every message.
    """
    try:
        return queue.get_nowait()
    except asyncio.QueueEmpty:
        async with asyncio.timeout(timeout_s):
            return await queue.get()
