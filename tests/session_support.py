"""Shared by the tests of sessions: a listener that keeps what it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from holdfast.client.background import close_background_loop
from tests.support import LIMIT_S

if TYPE_CHECKING:
    from holdfast.client import SessionEvent


class Recorder:
    """A listener that keeps what it is told, and waits for more."""

    def __init__(self) -> None:
        self.events: list[SessionEvent] = []
        self._changed = threading.Condition()

    def __call__(self, event: SessionEvent) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait(self, count: int) -> list[SessionEvent]:
        """The events, once there are ``count`` of them."""
        with self._changed:
            arrived = self._changed.wait_for(lambda: len(self.events) >= count, LIMIT_S)
        assert arrived, f"{len(self.events)} of {count} events: {self.events}"
        assert len(self.events) == count, self.events
        return self.events

    def told(self) -> list[tuple[str, str]]:
        return [(event.session_id, event.type) for event in self.events]


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def without_stamp(content: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(content.pop("_timestamp"), float)
    return content


def end_of_threads() -> None:
    """Closes the background loop; fails when a thread of the sessions' outlives what it was for."""
    close_background_loop()
    names = {"holdfast-background", "holdfast-listener", "holdfast-session-collector"}
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name in names])
