"""Sessions that many agents share: what each knows of a conversation, kept between the steps of a process::

    from holdfast.client import ContextManager

    sessions = ContextManager()
    sessions.create_session("booking-42")
    sessions.set_context("booking-42", "user_query", "How do I book a flight?")
    sessions.update_partial_context("booking-42", {"details": {"class": "economy"}})
    sessions.get_context("booking-42")["details"]  # {"class": "economy"}

No event loop is needed; on one, use the ``async_`` twins, which do not block it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

from holdfast.client.background import ClientShare
from holdfast.client.session_listeners import Callback, Listener
from holdfast.client.session_memory import MemorySessions
from holdfast.client.session_model import (
    SessionEvent,
    assigned,
    check_session_id,
    field_of,
    fields_of,
    merged,
    session_key,
    unchanged,
)
from holdfast.client.session_settings import SessionSettings
from holdfast.client.session_store import KeySessions, SessionStore
from holdfast.schemas.errors import ConfigurationError

if TYPE_CHECKING:
    from types import TracebackType

    from holdfast.streams.connection_target import ConnectionTarget

logger = logging.getLogger(__name__)


class ContextManager:
    """Keeps sessions: dicts by session id, shared by every agent of a namespace, in this process or another.

    ``settings``: a :class:`SessionSettings`, or a settings object or mapping to take them from; what it does not name
    comes from the environment, then from the defaults.  ``url``, ``namespace`` and ``agent`` are those of
    :func:`holdfast.client.connect`.  ``clock`` tells the time of changes, in seconds since 1970; when a session of the
    distributed store expires is up to the server's clock.  The constructor connects to nothing; the first call does.

    Every method may be called from any thread.  Every change is one step: two at a time are never lost, whichever
    threads, processes or machines make them, and a call returns when its change is durable.  A session begins with its
    first change, holds what JSON can hold, and carries the time of its last change as ``_timestamp`` (seconds since
    1970, always increasing).

    Errors are typed: InvalidNameError for a session id that is not 1 to 256 characters of text, InvalidBodyError for a
    value that JSON has no form for, UnavailableError when no server answers, UnknownOutcomeError when a change may or
    may not have been stored.
    """

    def __init__(
        self,
        settings: object = None,
        *,
        url: str | ConnectionTarget | None = None,
        namespace: str = "default",
        agent: str = "agent",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings = SessionSettings.load(settings)
        self._store: SessionStore
        if self.settings.use_redis_caching:
            self._store = KeySessions(ClientShare(url, namespace, agent), self.settings, clock)
        else:
            self._store = MemorySessions(self.settings, clock)
        self._begin_listening()

    @property
    def async_enabled(self) -> bool:
        """Whether the ``async_`` methods may be used: the setting ``ASYNC_OPERATIONS``."""
        return self.settings.async_operations

    def create_session(self, session_id: str) -> None:
        """Begins a session: its content is its ``_timestamp`` alone.

        Where there is one already it is joined: its data stay as they are, since they may be another agent's, and
        only its time stamp (and with it its expiry) is renewed.  To begin afresh, delete it first.
        """
        self._store.change(check_session_id(session_id), unchanged)

    def set_context(self, session_id: str, key: str, value: Any) -> None:
        """Sets one field of a session, as a whole."""
        self._store.change(check_session_id(session_id), assigned(field_of(key, value)))

    def update_partial_context(self, session_id: str, partial_context: Mapping[str, Any]) -> None:
        """Merges fields into a session: dicts recursively, anything else as a whole; None is stored as None."""
        self._store.change(check_session_id(session_id), merged(fields_of(partial_context)))

    def get_context(self, session_id: str) -> dict[str, Any]:
        """Returns a copy of a session's content; ``{}`` when there is none, or when it has expired."""
        return self._store.read(check_session_id(session_id))

    def delete_context(self, session_id: str) -> None:
        """Ends a session; does nothing when there is none.  In the distributed store its history stays."""
        self._store.delete(check_session_id(session_id))

    async def async_create_session(self, session_id: str) -> None:
        """The twin of :meth:`create_session` for event loops."""
        self._require_async()
        await self._store.change_async(check_session_id(session_id), unchanged)

    async def async_set_context(self, session_id: str, key: str, value: Any) -> None:
        """The twin of :meth:`set_context` for event loops."""
        self._require_async()
        await self._store.change_async(check_session_id(session_id), assigned(field_of(key, value)))

    async def async_update_partial_context(self, session_id: str, partial_context: Mapping[str, Any]) -> None:
        """The twin of :meth:`update_partial_context` for event loops."""
        self._require_async()
        await self._store.change_async(check_session_id(session_id), merged(fields_of(partial_context)))

    async def async_get_context(self, session_id: str) -> dict[str, Any]:
        """The twin of :meth:`get_context` for event loops."""
        self._require_async()
        return await self._store.read_async(check_session_id(session_id))

    async def async_delete_context(self, session_id: str) -> None:
        """The twin of :meth:`delete_context` for event loops."""
        self._require_async()
        await self._store.delete_async(check_session_id(session_id))

    def register_listener(self, callback: Callback) -> None:
        """Calls ``callback(event)`` for every change of any session from now on; returns when nothing can be missed.

        The events are :class:`SessionEvent`, of the changes of every agent and process that share the store, each
        listener's in the order of the changes.  A listener runs in a thread of its own, so it may be slow and may use
        the manager; an ``async def`` runs on the event loop it was registered on.  One that raises is logged, and is
        called with the next event.  An event comes once, and none is missed, also where the connection was lost.
        Registering a callback again changes nothing.  While ``EVENT_EMISSION`` is off it is not called, and the log
        says so.  A forked child has no listeners.
        """
        listener = self._new_listener(callback)
        if listener is not None:
            try:
                self._store.listen(listener)
            except BaseException:
                self._drop(listener)
                raise

    async def async_register_listener(self, callback: Callback) -> None:
        """The twin of :meth:`register_listener` for event loops."""
        self._require_async()
        listener = self._new_listener(callback)
        if listener is not None:
            try:
                await self._store.listen_async(listener)
            except BaseException:
                self._drop(listener)
                raise

    def unregister_listener(self, callback: Callback) -> bool:
        """No call of ``callback`` begins any more; one under way may still be ending.  Tells whether it was there.

        Waits for nothing, so event loops may use it too.
        """
        with self._lock:
            listener = next((each for each in self._listeners if each.callback == callback), None)
        if listener is None:
            return False
        self._drop(listener)
        return True

    def close(self) -> None:
        """Ends the listeners and gives the connection back; what was written stays.  Idempotent.

        A program that ends need not call it: the connection is closed at its exit.  The sessions of the in-memory
        store are gone.
        """
        self._drop_all()
        self._store.close()

    async def aclose(self) -> None:
        """The twin of :meth:`close` for event loops."""
        self._drop_all()
        await self._store.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _begin_listening(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []

    def _require_async(self) -> None:
        if not self.settings.async_operations:
            raise ConfigurationError(
                "asynchronous operations are off (ASYNC_OPERATIONS is false)",
                field="async_operations",
                hint="set ASYNC_OPERATIONS=true, or ask async_enabled and use the blocking methods",
            )

    def _new_listener(self, callback: Callback) -> Listener | None:
        if not self.settings.event_emission:
            logger.warning(
                "listener will not be called: EVENT_EMISSION is off",
                extra={"action": "session_listener_idle", "listener": repr(callback)},
            )
            return None
        if self._pid != os.getpid():
            self._begin_listening()  # forked: the parent's listeners have no threads here, and its lock may be held
        with self._lock:
            if any(each.callback == callback for each in self._listeners):
                return None
            listener = Listener(callback)
            self._listeners.append(listener)
            return listener

    def _drop(self, listener: Listener) -> None:
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)
        self._store.forget(listener)
        listener.close()

    def _drop_all(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            self._drop(listener)


__all__ = ["ContextManager", "SessionEvent", "SessionSettings", "session_key"]
