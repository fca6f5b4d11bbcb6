"""Work in threads at a start that may be cancelled.

A thread cannot be called back: cancelled, ``asyncio.to_thread`` leaves it at work, and what it opens then is nobody's.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, Final, Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

OUTLAST_S: Final = 30.0
"""How long a cancel waits for a thread: longer, and a disk that does not answer would keep a process from ending."""


async def in_thread(work: Callable[[], T]) -> T:
    """Runs blocking work in a thread and returns what it returns.

    A cancel is raised when the thread has ended, or after ``OUTLAST_S`` seconds.
    """
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _outlast(task)
        raise


async def open_in_thread(stack: AsyncExitStack, open_: Callable[[], T], close: Callable[[T], None]) -> T:
    """Opens something in a thread, has ``stack`` close it in another, and returns it.

    A cancel is raised once what was opened is closed again; after ``OUTLAST_S`` seconds without that, too: the thread
    then closes what it opens by itself.
    """
    opening = _Opening(open_, close)
    task = asyncio.ensure_future(asyncio.to_thread(opening.open))
    try:
        opened = await asyncio.shield(task)
    except asyncio.CancelledError:
        opening.give_up()
        await _outlast(task)
        await _outlast(asyncio.ensure_future(asyncio.to_thread(opening.close)))
        raise
    stack.push_async_callback(asyncio.to_thread, opening.close)
    return opened


class _Opening(Generic[T]):
    """What is opened in a thread and closed once, by whoever comes to it: that thread, if it was given up before."""

    def __init__(self, open_: Callable[[], T], close: Callable[[T], None]) -> None:
        self._open = open_
        self._close = close
        self._lock = threading.Lock()
        self._opened: list[T] = []
        self._is_given_up = False

    def open(self) -> T:
        opened = self._open()
        with self._lock:
            self._opened.append(opened)
            is_given_up = self._is_given_up
        if is_given_up:
            self.close()
        return opened

    def give_up(self) -> None:
        with self._lock:
            self._is_given_up = True

    def close(self) -> None:
        with self._lock:
            opened, self._opened = self._opened, []
        for each in opened:
            self._close(each)


async def _outlast(task: asyncio.Future[Any]) -> None:
    """Waits for a task, however often cancelled meanwhile; the caller raises that."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + OUTLAST_S
    task.add_done_callback(_note_failure)
    while not task.done() and loop.time() < deadline:
        try:
            await asyncio.wait([task], timeout=deadline - loop.time())
        except asyncio.CancelledError:
            continue


def _note_failure(task: asyncio.Future[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.warning(
            "a cancelled start failed besides", extra={"action": "cancelled_start_failed", "error": repr(error)}
        )
