"""Waiting for the next message of a queue."""

from __future__ import annotations

import asyncio
from typing import TypeVar

T = TypeVar("T")


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
