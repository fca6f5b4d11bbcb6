"""Handlers: functions that are run for each event of some name, in as many processes as there are::

    @hf.on("order:*", idempotent=True)
    async def check(event, context):
        order = await hf.resolve(event.context_ref)
        await hf.emit("stock:reserved", {"order": order.body["id"]})   # a child of the event
        return {"ok": True}                                            # told as "order:placed:result"

    answer = await hf.request("order:placed", {"id": 7})

Delivery is at least once: a handler whose process dies, or that fails, is handed the event again.  What is *not*
guaranteed: the order of events, and that a handler without ``idempotent`` emits only once for each.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from holdfast.client.handler_policy import (
    BACKOFF_S,
    CONCURRENCY,
    MAX_DELIVER,
    HandlerOptions,
    check_options,
    consumer_name,
)
from holdfast.client.handler_requests import Requests
from holdfast.client.handler_runner import HandlerRunner
from holdfast.client.handler_writes import GroupedWrites
from holdfast.schemas.errors import ClosedError, InvalidNameError
from holdfast.streams.consumer import ACK_WAIT_S, Start, delete_consumer
from holdfast.streams.wire import EVENTS_STREAM

if TYPE_CHECKING:
    from holdfast.client.handler_intake import HandlerCounters
    from holdfast.client.model import Event
    from holdfast.client.store import Holdfast

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

CLOSE_S: Final = 10.0
"""How long running handlers are waited for when the client closes."""

REQUEST_S: Final = 30.0


class Handlers:
    """The handlers of one client, and its requests."""

    def __init__(self, hf: Holdfast) -> None:
        self._hf = hf
        self._requests = Requests(hf)
        self._writes = GroupedWrites(hf)
        self._runners: dict[str, HandlerRunner] = {}
        self._opened: dict[str, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: BaseException | None = None

    @property
    def pending(self) -> bool:
        """Whether a handler is registered whose consumer is not there yet."""
        return any(not opened.done() for opened in self._opened.values())

    @property
    def counters(self) -> dict[str, HandlerCounters]:
        """What each handler has done in this process, by name."""
        return {name: runner.counters for name, runner in self._runners.items()}

    def on(
        self,
        pattern: str,
        *,
        name: str | None = None,
        idempotent: bool = False,
        max_deliver: int = MAX_DELIVER,
        backoff_s: Sequence[float] = BACKOFF_S,
        concurrency: int = CONCURRENCY,
        agent: str | None = None,
        track: bool = True,
        start: Start = "new",
        for_me: bool = False,
        timeout_s: float | None = None,
        ack_wait_s: float = ACK_WAIT_S,
    ) -> Callable[[Function], Function]:
        """Registers the decorated function for the events whose name fits ``pattern``; it is returned as it is.

        ``pattern``: an inner ``*`` stands for one segment between colons, a trailing one for one or more, ``*`` alone
        for all.  Names that end in ``:result`` or ``:error`` fit only a pattern that ends so itself, and those that
        begin with ``holdfast:`` one that begins so: a handler is not handed what it brought about.

        The function is called as ``(event)`` or ``(event, context)``, the context being the lineage as a dict of its
        own; one that is no coroutine function runs in a thread.  Within it the event is the current one.  What it
        returns, if not None, is emitted as ``<event's name>:result``.

        ``name`` (default: that of the function with its module or script) stands for the handler across processes and
        restarts: those that share it share the events, and it goes on where it was.  ``start``: a name that is new
        begins with the next event, or with the oldest that is still hot (``"all"``).  ``idempotent``: what is emitted
        when an event is handed out again has the ids of the first time, and an event that was done is passed over;
        needs a resolver.  An attempt that fails is repeated after ``backoff_s`` (the last one for all further) until
        ``max_deliver``; InputError is final at once.  What is given up becomes a dead letter and
        ``<event's name>:error``.  ``concurrency``: functions at work at once in this process.  ``agent`` signs what is
        emitted (default: this client's).  ``track`` writes receipts.  ``for_me``: only events whose originator is
        that agent.  ``timeout_s`` bounds one attempt.  ``ack_wait_s``: how soon another process takes over from one
        that died; a living one says in time that it is still at work.

        Raises InvalidFieldError naming the option that cannot be kept.
        """
        chosen_agent = self._hf.agent if agent is None else agent

        def register(function: Function) -> Function:
            options = HandlerOptions(
                pattern=pattern,
                name=_name_of(function) if name is None else name,
                agent=chosen_agent,
                idempotent=idempotent,
                max_deliver=max_deliver,
                backoff_s=tuple(backoff_s),
                concurrency=concurrency,
                track=track,
                start=start,
                for_me=for_me,
                timeout_s=timeout_s,
                ack_wait_s=ack_wait_s,
            )
            self._register(check_options(options), function)
            return function

        return register

    async def ready(self) -> None:
        """Returns when every handler registered so far is handed what is emitted from now on.

        Raises what kept one from that, GapError when one has missed events that cannot be taken up now, ClosedError
        when the client was closed meanwhile.
        """
        for opened in list(self._opened.values()):
            # Shielded: who gives up waiting does not take it from the others.
            await asyncio.shield(opened)
        if self._failed is not None:
            raise self._failed
        for runner in self._runners.values():
            if runner.gap is not None:
                raise runner.gap

    async def begun(self) -> None:
        """Returns when no registration is under way any more, whatever came of it: :meth:`ready` tells that."""
        # Not gather: who is cancelled while waiting would cancel what the others wait for.
        if self._opened:
            await asyncio.wait(self._opened.values())

    async def request(
        self,
        name: str,
        data: Any = None,
        *,
        timeout_s: float = REQUEST_S,
        lineage: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Event:
        """Emits an event and returns the result of the first handler that has one: the event ``<name>:result``.

        ``options`` are those of ``emit``; the originator is this client's agent unless given.  Raises HandlerError
        when a handler gave the event up first, UnavailableError when nothing came in time, ClosedError when the client
        was closed meanwhile: then, too, the event is stored, and its result may still come.
        """
        return await self._requests.request(name, data, timeout_s=timeout_s, options={**options, "lineage": lineage})

    async def forget(self, name: str) -> bool:
        """Deletes what the server keeps for a handler name: where it stands, and its claim on events.

        For a name that no process uses any more.  Returns False when there was nothing.
        """
        if name in self._runners:
            raise InvalidNameError(
                f"handler {name!r} runs in this client", field="name", hint="forget it from a client without it"
            )
        return await delete_consumer(self._hf.connection, EVENTS_STREAM, consumer_name(self._hf.namespace, name))

    async def close(self, timeout_s: float = CLOSE_S) -> None:
        """Takes no more events and waits for running handlers; after ``timeout_s`` the rest goes to others at once."""
        runners = list(self._runners.values())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(runner.stop_taking() for runner in runners))
        await asyncio.gather(*(runner.finish(timeout_s) for runner in runners))
        # After the handlers, which may wait for results themselves.
        await self._requests.close()
        await self._writes.close()
        for name, opened in self._opened.items():
            if not opened.done():
                opened.set_exception(
                    ClosedError(f"the client was closed before handler {name!r} was ready", hint="make a new client")
                )
                opened.exception()  # nobody may be waiting: mark as retrieved

    def _register(self, options: HandlerOptions, function: Callable[..., Any]) -> None:
        if options.name in self._runners:
            raise InvalidNameError(
                f"a handler of the name {options.name!r} is registered already",
                field="name",
                hint="give each a name of its own, with name=",
            )
        runner = HandlerRunner(self._hf, options, function, self._writes)
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = loop.create_future()
        self._runners[options.name] = runner
        self._opened[options.name] = opened
        # A bare task: it lives as long as the client, whose close() ends it.
        task = loop.create_task(self._serve(runner, opened), name=f"holdfast-{runner.consumer}")
        self._tasks.add(task)

    async def _serve(self, runner: HandlerRunner, opened: asyncio.Future[None]) -> None:
        try:
            await runner.open()
            if not opened.done():
                opened.set_result(None)
            await runner.run()
        except Exception as error:
            logger.exception(
                "handler ended", extra={"action": "handler_ended", "handler": runner.options.name, "error": repr(error)}
            )
            self._failed = error
            if not opened.done():
                opened.set_exception(error)
                opened.exception()  # ready() may never be called: mark as retrieved


def _name_of(function: Callable[..., Any]) -> str:
    module = getattr(function, "__module__", None)
    qualified = getattr(function, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(qualified, str)):
        raise InvalidNameError(
            f"handler {type(function).__name__} has no name", field="name", hint="give it one with name="
        )
    return f"{_script_name() if module == '__main__' else module}.{qualified}"


def _script_name() -> str:
    """What stands for the module of a script: two scripts of one name would take each other's events."""
    script = sys.modules["__main__"]
    spec, file = getattr(script, "__spec__", None), getattr(script, "__file__", None)
    if spec is not None:
        return str(spec.name)  # of python -m: what an import of it is called
    return "__main__" if file is None else Path(file).stem


__all__ = ["Handlers"]
