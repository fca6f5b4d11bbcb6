"""Waiting for an event or a time, whichever comes first."""

from __future__ import annotations

import asyncio
import random


async def wait_for_event(event: asyncio.Event, timeout_s: float) -> bool:
    """Waits until ``event`` is set, then clears it; gives up after about ``timeout_s`` (10 % jitter, so that many
    workers do not act in step).  Returns whether it was set."""
    try:
        # Not wait_for: on Python 3.11 it swallows a cancel when the event is set already.
        async with asyncio.timeout(timeout_s * random.uniform(0.95, 1.05)):  # noqa: S311  jitter, no secret
            await event.wait()
    except TimeoutError:
        return False
    event.clear()
    return True
