"""Every wait of the campaign against disks has an end, and a name: a system that stands still is told of, with stacks.

A bound around each call would not do: on Python 3.11 ``asyncio.wait_for`` may lose the cancel that is to end it, and a
wait that somebody forgot has none.  So one task does the work and says what it waits for, and another one, that waits
for nothing else, looks at the clock.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeVar

T = TypeVar("T")

STACKS_SIGNAL: Final = signal.SIGUSR1
"""What a process that has called :func:`tell_stacks_when_asked` answers."""

_MARK: Final = "-- end of stacks --"
_LOOK_S: Final = 0.25
_CANCELS: Final = 3
"""How often work that stands still is cancelled: a cancel may be lost."""

_TOLD_S: Final = 3.0
_WAIT_S: Final = 30.0


class StalledError(Exception):
    """Something did not happen in time; the message says what, and where every task and thread stood."""


class Waits:
    """What is waited for now, and until when; ``total_s`` bounds all waits together.

    ``on_look`` is called several times a second for as long as the event loop is not blocked.
    """

    def __init__(self, total_s: float | None = None, on_look: Callable[[], object] | None = None) -> None:
        self.on_look = on_look or (lambda: None)
        self._last_s = None if total_s is None else time.monotonic() + total_s
        self._begun_s = time.monotonic()
        self._until_s = self._begun_s + _WAIT_S
        self.what = "a beginning"

    def begin(self, what: str, limit_s: float) -> None:
        """What is waited for from here on must have happened ``limit_s`` seconds from now."""
        self.what = what
        self._begun_s = time.monotonic()
        self._until_s = self._begun_s + limit_s

    @property
    def left_s(self) -> float:
        """How long it may still take."""
        until_s = self._until_s if self._last_s is None else min(self._until_s, self._last_s)
        return until_s - time.monotonic()

    @property
    def waited_s(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self._begun_s


async def supervised(work: Awaitable[T], waits: Waits, *, cleanup_s: float = _WAIT_S) -> T:
    """Returns what ``work`` returns, which tells ``waits`` what it waits for.

    Raises StalledError when that takes too long: then the work is cancelled, and has ``cleanup_s`` to end; after that
    it is left to itself.
    """
    task = asyncio.ensure_future(work)
    try:
        while waits.left_s > 0 and not task.done():
            waits.on_look()
            await asyncio.wait({task}, timeout=min(_LOOK_S, waits.left_s))
        if task.done():
            return task.result()
        told = f"{waits.what} did not happen within {waits.waited_s:.0f} s\n{stacks()}"
        # At once: what comes after may stand still as well.
        sys.stderr.write(f"{told}\n")
        sys.stderr.flush()
        raise StalledError(told)
    finally:
        for _ in range(_CANCELS):
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=cleanup_s / _CANCELS)
        if task.done() and not task.cancelled():
            task.exception()  # seen: what is raised says more


def stacks() -> str:
    """Where every task of this thread's event loop, and every thread, stands."""
    try:
        tasks: Iterable[asyncio.Task[Any]] = asyncio.all_tasks()
    except RuntimeError:
        tasks = ()
    lines = [f"task {task.get_name()}: {' > '.join(_frames_of(task.get_coro()))}" for task in tasks]
    for number, frame in sys._current_frames().items():
        lines.append(f"thread {number}:\n{''.join(traceback.format_stack(frame)).rstrip()}")
    return "\n".join(lines)


def _frames_of(awaited: Any) -> list[str]:
    """From a task's coroutine to what it awaits in the end: ``Task.get_stack`` shows the first one alone."""
    told = []
    while awaited is not None:
        frame = next((found for name in _FRAMES if (found := getattr(awaited, name, None)) is not None), None)
        if frame is None:
            told.append(repr(awaited)[:200])
            break
        told.append(f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})")
        awaited = next((found for name in _AWAITED if (found := getattr(awaited, name, None)) is not None), None)
    return told


_FRAMES: Final = ("cr_frame", "gi_frame", "ag_frame")
_AWAITED: Final = ("cr_await", "gi_yieldfrom", "ag_await")


def tell_stacks_when_asked() -> None:
    """Has this process write its stacks to standard error whenever it gets :data:`STACKS_SIGNAL`."""

    def tell(_number: int, _frame: FrameType | None) -> None:
        sys.stderr.write(f"{stacks()}\n{_MARK}\n")
        sys.stderr.flush()

    signal.signal(STACKS_SIGNAL, tell)


async def until_told(log: Path) -> None:
    """Returns when a process has written its stacks to its log, or does not; it was asked a moment ago."""
    limit_s = time.monotonic() + _TOLD_S
    while time.monotonic() < limit_s and _MARK not in log.read_text(errors="replace"):  # noqa: ASYNC110  another process
        await asyncio.sleep(0.05)
