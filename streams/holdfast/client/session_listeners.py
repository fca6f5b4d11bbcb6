"""Calling listeners: each in a thread of its own, in order, so that none can block the manager or another listener."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import logging
import queue
import threading
from collections.abc import Awaitable, Callable
from typing import Final, cast

from holdfast.client.session_model import SessionEvent

logger = logging.getLogger(__name__)

Callback = Callable[[SessionEvent], object]
"""A listener: a function, or a coroutine function.  What it returns is passed over."""

PENDING_EVENTS: Final = 10_000
"""Most events that wait for one listener in memory; at the bound new ones are dropped, and the log says so."""

_LOOP_CHECK_S: Final = 1.0


class Listener:
    """One callback, its thread and what waits for it.

    An asynchronous callback runs on the event loop that was running where the listener was made, while that runs;
    else on one of the listener's thread.  A callback that raises is logged, and goes on with the next event.
    """

    def __init__(self, callback: Callback) -> None:
        self.callback = callback
        self.dropped = 0
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._pending: queue.SimpleQueue[
            tuple[Callable[[], SessionEvent], concurrent.futures.Future[None] | None] | None
        ]
        self._pending = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="holdfast-listener", daemon=True)
        self._thread.start()

    def offer(self, event: Callable[[], SessionEvent]) -> None:
        """Queues an event, made when its turn comes; never blocks.  At the bound it is dropped."""
        if self._pending.qsize() < PENDING_EVENTS:
            self._pending.put((event, None))
            return
        self.dropped += 1
        if self.dropped & (self.dropped - 1) == 0:  # the 1st, 2nd, 4th, 8th …: an overrun must not flood the log
            logger.warning(
                "listener is too slow, events were dropped",
                extra={"action": "session_events_dropped", "dropped": self.dropped, "listener": repr(self.callback)},
            )

    async def deliver(self, event: SessionEvent) -> None:
        """Returns when the callback has returned (or the listener was closed): the source waits, nothing is dropped."""
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._pending.put((lambda: event, done))
        await asyncio.wrap_future(done)

    def close(self) -> None:
        """Ends it: from now on no call of the callback begins.  One under way is not waited for."""
        with self._lock:
            self._is_closed = True
        self._pending.put(None)

    def join(self, timeout_s: float) -> None:
        """Waits until a closed listener's thread has ended; returns at once on that thread itself."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        runner = asyncio.Runner()  # makes its loop when it is first needed: most listeners are plain functions
        try:
            while (item := self._pending.get()) is not None:
                event, done = item
                with self._lock:
                    is_closed = self._is_closed
                if is_closed:
                    if done is not None:
                        done.cancel()
                    continue
                self._call(event, runner)
                if done is not None and done.set_running_or_notify_cancel():
                    done.set_result(None)
        finally:
            runner.close()

    def _call(self, event: Callable[[], SessionEvent], runner: asyncio.Runner) -> None:
        try:
            outcome = self.callback(event())
            if inspect.isawaitable(outcome):
                self._await(cast("Awaitable[object]", outcome), runner)
        except BaseException:  # whatever a listener does, its thread and the other listeners go on
            logger.exception(
                "session listener failed",
                extra={"action": "session_listener_failed", "listener": repr(self.callback)},
            )

    def _await(self, outcome: Awaitable[object], runner: asyncio.Runner) -> None:
        loop = self._loop
        if loop is None or not loop.is_running():
            runner.run(_awaited(outcome))
            return
        future = asyncio.run_coroutine_threadsafe(_awaited(outcome), loop)
        while not future.done():
            concurrent.futures.wait([future], _LOOP_CHECK_S)
            if not future.done() and not loop.is_running():
                return  # it stopped half-way, and took the callback with it
        future.result()


async def _awaited(outcome: Awaitable[object]) -> None:
    await outcome
