"""The in-memory store of sessions: a dict of this process with a lock, its expiry, and a thread that collects."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.client.session_model import (
    TIMESTAMP,
    Change,
    SessionEvent,
    SessionEventType,
    stamped,
)
from holdfast.schemas.bodies import decode_body, encode_body
from holdfast.schemas.errors import ClosedError
from holdfast.schemas.refs import JSON

if TYPE_CHECKING:
    from holdfast.client.session_listeners import Listener
    from holdfast.client.session_settings import SessionSettings


class _Session(msgspec.Struct, frozen=True):
    """Immutable, so that no caller can hold a part of what is stored."""

    raw: bytes
    expires_at_s: float | None


class MemorySessions:
    """Sessions in a dict of this process.  Safe from any thread; every change is one step under one lock.

    What is stored is JSON, so that it behaves as the distributed store does: callers get copies, and what JSON cannot
    hold is refused.  An expired session is absent at once; its ``expired`` event comes when it is next touched, or
    when the collecting thread finds it.  A forked child has a copy of its own.
    """

    def __init__(self, settings: SessionSettings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._sessions: dict[str, _Session] = {}
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()
        self._collector: threading.Thread | None = None
        self._closing = threading.Event()
        _stores.add(self)

    def change(self, session_id: str, change: Change) -> None:
        """Applies a change, beginning with an empty session where there is none."""
        with self._lock:
            self._open()
            now_s = self._clock()
            present = self._present(session_id, now_s)
            content: dict[str, Any] = {} if present is None else decode_body(present.raw, JSON)
            raw, _ = encode_body(stamped(change(content), content.get(TIMESTAMP), now_s))
            life_s = self._settings.session_expiration_seconds if self._settings.time_based_expiration else None
            self._sessions[session_id] = _Session(raw, None if life_s is None else now_s + life_s)
            self._tell("created" if present is None else "updated", session_id, raw, now_s)

    async def change_async(self, session_id: str, change: Change) -> None:
        """The same without blocking an event loop, neither by the lock nor by a large session."""
        await asyncio.to_thread(self.change, session_id, change)

    def read(self, session_id: str) -> dict[str, Any]:
        """Returns a copy of a session's content, empty when it is absent or expired."""
        with self._lock:
            self._open()
            present = self._present(session_id, self._clock())
        content: dict[str, Any] = {} if present is None else decode_body(present.raw, JSON)
        return content

    async def read_async(self, session_id: str) -> dict[str, Any]:
        """The same without blocking an event loop."""
        return await asyncio.to_thread(self.read, session_id)

    def delete(self, session_id: str) -> None:
        """Removes a session; does nothing when there is none."""
        with self._lock:
            self._open()
            now_s = self._clock()
            if self._present(session_id, now_s) is not None:
                del self._sessions[session_id]
                self._tell("deleted", session_id, None, now_s)

    async def delete_async(self, session_id: str) -> None:
        """The same without blocking an event loop."""
        await asyncio.to_thread(self.delete, session_id)

    def listen(self, listener: Listener) -> None:
        """From now on the listener is told of every change, in order."""
        with self._lock:
            self._open()
            self._listeners.append(listener)

    async def listen_async(self, listener: Listener) -> None:
        """The same: it waits for nothing but the lock."""
        await asyncio.to_thread(self.listen, listener)

    def forget(self, listener: Listener) -> None:
        """From now on the listener is told nothing more."""
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def collect(self) -> int:
        """Removes every expired session, and tells how many there were."""
        with self._lock:
            now_s = self._clock()
            before = len(self._sessions)
            for session_id in list(self._sessions):
                self._present(session_id, now_s)
            return before - len(self._sessions)

    def close(self) -> None:
        """Ends the collecting thread and forgets everything."""
        with self._lock:
            self._closing.set()
            self._sessions.clear()
            self._listeners.clear()

    async def aclose(self) -> None:
        """The same: it waits for nothing but the lock."""
        await asyncio.to_thread(self.close)

    def _open(self) -> None:
        if self._closing.is_set():
            raise ClosedError("this session manager is closed", hint="make a new one")
        settings = self._settings
        if self._collector is None and settings.garbage_collection and settings.time_based_expiration:
            # Begun with the first use, not before: a manager that is only constructed costs no thread.
            self._collector = threading.Thread(
                target=_collect_until_closed,
                args=(weakref.ref(self), self._closing, settings.garbage_collection_interval_seconds),
                name="holdfast-session-collector",
                daemon=True,
            )
            self._collector.start()

    def _present(self, session_id: str, now_s: float) -> _Session | None:
        session = self._sessions.get(session_id)
        if session is None or session.expires_at_s is None or now_s < session.expires_at_s:
            return session
        del self._sessions[session_id]
        self._tell("expired", session_id, None, session.expires_at_s)
        return None

    def _tell(self, what: SessionEventType, session_id: str, raw: bytes | None, at_s: float) -> None:
        if not self._listeners:
            return

        def event() -> SessionEvent:  # decoded for each listener by itself, on its own thread
            return SessionEvent(
                type=what,
                session_id=session_id,
                data={} if raw is None else decode_body(raw, JSON),
                timestamp=datetime.fromtimestamp(at_s, UTC),
            )

        # Under the lock, so that every listener is told in the order of the changes; offering never blocks.
        for listener in self._listeners:
            listener.offer(event)

    def after_fork_in_child(self) -> None:
        """Makes the child's copy usable: the parent's threads are not here, and one may have held the lock."""
        self._lock = threading.Lock()
        self._listeners = []
        self._collector = None


_stores: weakref.WeakSet[MemorySessions] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for store in list(_stores):
        store.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _collect_until_closed(reference: weakref.ref[MemorySessions], closing: threading.Event, interval_s: float) -> None:
    # The reference is weak: a manager that nobody holds any more ends, and its thread with it.
    while not closing.wait(interval_s):
        store = reference()
        if store is None:
            return
        store.collect()
        del store
