"""One event loop in a thread of its own, for callers that have none: the ground of everything synchronous.

A process has one background loop, begun with the first call and closed when the interpreter exits.  On it lives one
client for each (server, namespace, agent), shared by all who ask for it and closed when the last of them has closed.
Any thread may call; so may any other event loop, by awaiting.  After ``os.fork`` the child begins a loop and
connections of its own: those of its parent are never touched, not even closed.

Tasks are created bare here, because a call's lifetime is its caller's, who is on another thread: the loop keeps them
all and ends them when it closes.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from functools import cached_property
from typing import Any, Final, TypeVar

import msgspec

from holdfast.client.store import Holdfast, connect
from holdfast.schemas.errors import ClosedError, InputError, UnavailableError, UnknownOutcomeError
from holdfast.schemas.names import check_agent, check_namespace
from holdfast.streams.connection_target import ConnectionTarget
from holdfast.streams.discovery import require_connection

logger = logging.getLogger(__name__)

T = TypeVar("T")

DRAIN_S: Final = 2.0
"""How long calls under way may take to end when the loop closes; then they are cancelled."""

CLOSE_S: Final = 10.0
"""How long closing waits for the thread: an exiting interpreter is not held up for ever by a server that is away."""


class _ClientKey(msgspec.Struct, frozen=True):
    target: ConnectionTarget
    namespace: str
    agent: str


class _SharedClient:
    """A client and those who use it; lives on the loop's thread alone."""

    def __init__(self, key: _ClientKey) -> None:
        self.users: set[ClientShare] = set()
        self.closing = asyncio.Event()
        self.ready: asyncio.Future[Holdfast] = asyncio.get_running_loop().create_future()
        # A failure is told to whoever waits; when nobody does any more, it is nobody's.
        self.ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())
        # Entered and left by one task, so that the client's resources stay lexical.
        self.owner = asyncio.get_running_loop().create_task(self._own(key), name="holdfast-shared-client")

    def is_over(self) -> bool:
        """Whether the client has lost its connection for good."""
        ready = self.ready
        if not ready.done() or ready.cancelled() or ready.exception() is not None:
            return False
        return ready.result().connection.client.is_closed

    async def _own(self, key: _ClientKey) -> None:
        try:
            async with connect(key.target, key.namespace, key.agent) as client:
                self.ready.set_result(client)
                await self.closing.wait()
        except Exception as error:
            if self.ready.done():
                raise
            self.ready.set_exception(error)


class BackgroundLoop:
    """An event loop that runs in a daemon thread until :meth:`close`.

    Ordinary code takes :func:`background_loop`, the one of this process.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()  # re-entrant: a finalizer may submit while this very thread submits
        self._is_closed = False
        self._calls: set[asyncio.Task[Any]] = set()
        self._services: set[asyncio.Task[Any]] = set()
        self._clients: dict[_ClientKey, _SharedClient] = {}
        self._loop: asyncio.AbstractEventLoop
        self._closing: asyncio.Event
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="holdfast-background", daemon=True)
        self._thread.start()
        started.wait()

    @property
    def is_usable(self) -> bool:
        """Whether it runs, in this process: after a fork the child's copy has no thread."""
        return not self._is_closed and self._pid == os.getpid()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop, blocks until it has ended, and returns its result or raises its error.

        From any thread but the loop's own, where it would wait for itself: there it raises InputError.  An interrupt
        of the waiting thread (KeyboardInterrupt) cancels the coroutine.  Raises ClosedError when the loop is closed
        already, UnknownOutcomeError when it closed meanwhile.
        """
        if threading.get_ident() == self._thread.ident:
            coroutine.close()
            raise InputError(
                "a blocking call was made on the background loop's own thread, which would wait for itself",
                hint="await the asynchronous method there, or make the call from another thread",
            )
        future = self.submit(coroutine)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise _closed_meanwhile() from error
        except BaseException:
            future.cancel()  # does nothing unless it was this thread that was interrupted
            raise

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop and awaits it on the caller's, which is not blocked; errors as of :meth:`call`.

        A cancel of the caller cancels the coroutine.
        """
        if threading.get_ident() == self._thread.ident:
            return await coroutine
        future = self.submit(coroutine)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if future.cancelled() and task is not None and not task.cancelling():
                raise _closed_meanwhile() from error
            raise

    def submit(self, coroutine: Coroutine[Any, Any, T], *, is_service: bool = False) -> concurrent.futures.Future[T]:
        """Starts a coroutine on the loop and returns the future of its end; cancelling the future cancels it.

        ``is_service``: it runs until it is cancelled, so that closing does not wait for it.  Raises ClosedError when
        the loop is closed.
        """
        if self._pid != os.getpid():  # before the lock, which may have been held when the process forked
            coroutine.close()
            raise UnavailableError("the background loop belongs to the parent process", hint="take background_loop()")
        with self._lock:  # what is submitted before the loop closes is seen by the closing
            if self._is_closed:
                coroutine.close()
                raise ClosedError("the background loop is closed", hint="make the call on a new client")
            return asyncio.run_coroutine_threadsafe(self._tracked(coroutine, is_service), self._loop)

    def close(self) -> None:
        """Ends it: no new calls, those under way get two seconds, then every client is closed.  Idempotent.

        Must not be called on the loop's own thread.  In a forked child it does nothing.
        """
        if self._pid != os.getpid():
            return
        with self._lock:
            is_first, self._is_closed = not self._is_closed, True
        if is_first:
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            logger.warning("background loop did not end in time", extra={"action": "background_abandoned"})

    async def client_for(self, share: ClientShare) -> Holdfast:
        """Returns the client of a share, connecting when it is the first of its kind.  On the loop alone."""
        if share.is_closed:
            raise _share_closed()
        shared = self._clients.get(share.key)
        if shared is not None and shared.is_over():
            # Closed for good, over credentials that are no longer good for instance: whoever comes now tries anew.
            del self._clients[share.key]
            shared.closing.set()
            shared = None
        if shared is None:
            shared = self._clients[share.key] = _SharedClient(share.key)
        shared.users.add(share)
        try:
            # Shielded: one caller's cancel is not the end of a connection that others wait for.
            return await asyncio.shield(shared.ready)
        except Exception:
            if self._clients.get(share.key) is shared:
                del self._clients[share.key]  # the next call tries again
            raise

    async def give_back(self, share: ClientShare) -> None:
        """Takes a share out; the last one closes the client and returns when it is closed.  On the loop alone."""
        shared = self._clients.get(share.key)
        if shared is None or share not in shared.users:
            return
        shared.users.discard(share)
        if not shared.users:
            del self._clients[share.key]
            shared.closing.set()
            await asyncio.shield(shared.owner)

    async def _tracked(self, coroutine: Coroutine[Any, Any, T], is_service: bool) -> T:
        tasks = self._services if is_service else self._calls
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            return await coroutine
        finally:
            tasks.discard(task)

    def _run(self, started: threading.Event) -> None:
        with asyncio.Runner() as runner:
            runner.run(self._main(started))

    async def _main(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        started.set()
        await self._closing.wait()
        await _cancel(self._services)
        if self._calls:
            await asyncio.wait(self._calls, timeout=DRAIN_S)
        await _cancel(self._calls)
        clients = list(self._clients.values())
        for shared in clients:
            shared.closing.set()
        for outcome in await asyncio.gather(*(shared.owner for shared in clients), return_exceptions=True):
            if isinstance(outcome, Exception):
                logger.warning(
                    "client did not close cleanly", exc_info=outcome, extra={"action": "client_close_failed"}
                )


class ClientShare:
    """A share in the background loop's client of one server, namespace and agent.

    Nothing is opened before the first call; the server is found as :func:`holdfast.client.connect` finds it.  A share
    that a forked child inherits works there too, on a connection of the child's own.
    """

    def __init__(
        self, url: str | ConnectionTarget | None = None, namespace: str = "default", agent: str = "agent"
    ) -> None:
        self._url = url
        self.namespace = check_namespace(namespace)
        self.agent = check_agent(agent)
        self.is_closed = False

    @cached_property
    def key(self) -> _ClientKey:
        """What the client is shared by; raises ConfigurationError when no server is to be found."""
        target = self._url if isinstance(self._url, ConnectionTarget) else require_connection(url=self._url)
        return _ClientKey(target, self.namespace, self.agent)

    def call(self, use: Callable[[Holdfast], Awaitable[T]]) -> T:
        """Blocks until ``use(client)`` has run on the background loop; see :meth:`BackgroundLoop.call`."""
        loop = self._open()
        return loop.call(self._use(loop, use))

    async def run(self, use: Callable[[Holdfast], Awaitable[T]]) -> T:
        """Awaits ``use(client)`` from any event loop; see :meth:`BackgroundLoop.run`."""
        loop = self._open()
        return await loop.run(self._use(loop, use))

    async def client(self) -> Holdfast:
        """Returns the client itself: another one once its connection is closed for good.  On the loop alone."""
        return await background_loop().client_for(self)

    def start(self, use: Callable[[Holdfast], Awaitable[T]]) -> concurrent.futures.Future[T]:
        """Starts ``use(client)`` as a service, which runs until its future is cancelled or the loop closes."""
        loop = self._open()
        return loop.submit(self._use(loop, use), is_service=True)

    def close(self) -> None:
        """Gives the share back; returns when its writes have their outcomes, if it was the last.  Idempotent."""
        if not self._is_to_be_given_back():
            return
        loop = background_loop()
        loop.call(loop.give_back(self))

    async def aclose(self) -> None:
        """The same as :meth:`close`, awaited from any event loop."""
        if not self._is_to_be_given_back():
            return
        loop = background_loop()
        await loop.run(loop.give_back(self))

    def _is_to_be_given_back(self) -> bool:
        if self.is_closed:
            return False
        self.is_closed = True
        # Never used: there may be no server to be found, and no loop to be begun.
        return "key" in self.__dict__ and _process.is_running()

    def _open(self) -> BackgroundLoop:
        if self.is_closed:
            raise _share_closed()
        _ = self.key  # found on the caller's thread: it may read files
        return background_loop()

    async def _use(self, loop: BackgroundLoop, use: Callable[[Holdfast], Awaitable[T]]) -> T:
        return await use(await loop.client_for(self))


class _Process:
    """The background loop of this process, if one is begun."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: BackgroundLoop | None = None
        self._inherited: list[BackgroundLoop | None] = []

    def is_running(self) -> bool:
        loop = self._loop
        return loop is not None and loop.is_usable

    def loop(self) -> BackgroundLoop:
        with self._lock:
            if self._loop is None or not self._loop.is_usable:
                self._loop = BackgroundLoop()
            return self._loop

    def close(self) -> None:
        loop = self._loop
        if loop is not None:
            loop.close()

    def after_fork_in_child(self) -> None:
        # The lock may have been held by a thread that is not here.  The parent's loop is kept, for ever: its
        # finalizer would take the parent's sockets out of an epoll set that both processes share.
        self._lock = threading.Lock()
        self._inherited.append(self._loop)
        self._loop = None


_process: Final = _Process()
os.register_at_fork(after_in_child=_process.after_fork_in_child)
atexit.register(_process.close)


def background_loop() -> BackgroundLoop:
    """Returns the background loop of this process; begins one when there is none, or when it was closed."""
    return _process.loop()


def close_background_loop() -> None:
    """Closes the background loop of this process and all its clients, as its exit does; a later call begins anew."""
    _process.close()


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    for task in list(tasks):
        task.cancel()
    if tasks:
        await asyncio.wait(list(tasks), timeout=DRAIN_S)


def _closed_meanwhile() -> UnknownOutcomeError:
    return UnknownOutcomeError(
        "the background loop was closed before the call had an outcome", hint="make the call again on a new client"
    )


def _share_closed() -> ClosedError:
    return ClosedError("this client is closed", hint="make a new one")


__all__ = ["BackgroundLoop", "ClientShare", "background_loop", "close_background_loop"]
