"""Where an event came from, carried along by itself or by hand.

*Implicit*: a context variable holds the current event.  Whatever is emitted while it is set is a child of that event,
through awaits, tasks, task groups, callbacks and ``asyncio.to_thread``; :class:`ThreadPool` and :func:`bind` carry it
into other threads::

    with lineage.within(event):
        await hf.emit("plan:step")              # a child of event

*Explicit*: the same as a plain dict, to be changed, merged, sent over any transport and given to any call::

    context = lineage.merge(lineage.of(event), {"agent_id": "reviewer"})
    await hf.emit("plan:step", lineage=context)  # a child of event, signed by reviewer

What is given explicitly replaces the implicit lineage as a whole; each works without the other.  The members of the
dict are told in :mod:`holdfast.schemas.lineage`.
"""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, ParamSpec, Protocol, TypeVar

import msgspec

from holdfast.client.lineage_context import (
    HEADER,
    IdMint,
    Lineage,
    from_dict,
    from_headers,
    from_traceparent,
    merge,
    of_event,
    to_headers,
    to_traceparent,
    with_underscores,
)
from holdfast.client.model import Event
from holdfast.schemas.names import check_agent

if TYPE_CHECKING:
    from holdfast.client.model import Context
    from holdfast.schemas.refs import Ref
    from holdfast.schemas.rows import ContextRow

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

Path = Literal["implicit", "explicit", "parent", "none"]
"""How an event got its place: from the context variable, from ``lineage=``, from ``parent=``, or it is a root."""


class Recorder(Protocol):
    """Takes note of the contexts that are read and made in working on an event."""

    def read(self, ref: Ref, size: int) -> None:
        """A context was resolved."""

    def produced(self, ref: Ref, size: int, event_id: str | None = None) -> None:
        """A context was stored; ``event_id`` is the event that carries it, when there is one."""

    def referred(self, ref: Ref, event_id: str) -> None:
        """An event was emitted with a reference that was at hand."""


class Scope:
    """The implicit lineage: immutable, so that tasks cannot change each other's."""

    __slots__ = ("context", "mint", "reads")

    def __init__(self, context: Lineage, reads: Recorder | None = None, mint: IdMint | None = None) -> None:
        self.context: Final = context
        self.reads: Final = reads
        self.mint: Final = mint


class Emission(msgspec.Struct, frozen=True):
    """An event as :func:`capture` saw it: its own lineage, that of the event it came from, and by which path."""

    name: str
    data: Any
    lineage: Lineage
    parent: Lineage | None
    path: Path


class Counters(msgspec.Struct):
    """Events emitted in this process, by path; ``overridden``: the explicit ones for which an implicit lineage stood
    by."""

    implicit: int = 0
    explicit: int = 0
    parent: int = 0
    none: int = 0
    overridden: int = 0


_current: Final[contextvars.ContextVar[Scope | None]] = contextvars.ContextVar("holdfast_lineage", default=None)
_lock: Final = threading.Lock()
_counters = Counters()
_captures: list[list[Emission]] = []


def current() -> Lineage | None:
    """Returns the implicit lineage as a dict of the caller's own; None outside any event."""
    scope = _current.get()
    return None if scope is None else dict(scope.context)


get = current
"""The same as :func:`current`, under the name that context variables use."""


def of(event: Event) -> Lineage:
    """Returns the lineage of an event, in explicit form."""
    return of_event(event)


@contextmanager
def within(event: Event | Mapping[str, Any] | None) -> Generator[Lineage | None]:
    """Makes an event, or a lineage in explicit form, the current one while the block lasts; None: no event at all.

    Yields the lineage.  Raises InvalidFieldError for a dict that is none.
    """
    if event is None:
        with _entered(None):
            yield None
        return
    lineage = of_event(event) if isinstance(event, Event) else from_dict(event)
    before = _current.get()
    # What a handler emits keeps its ids, whatever it is emitted under; what it reads belongs to the event worked on.
    is_same = before is not None and before.context.get("event_id") == lineage.get("event_id")
    reads = before.reads if before is not None and is_same else None
    with enter(lineage, reads=reads, mint=None if before is None else before.mint):
        yield dict(lineage)


@contextmanager
def enter(context: Mapping[str, Any], *, reads: Recorder | None = None, mint: IdMint | None = None) -> Generator[Scope]:
    """Makes a lineage in normal form the current one, with what takes note of reads and what makes ids.

    For those who run handlers; others use :func:`within`.
    """
    scope = Scope(dict(context), reads, mint)
    token = _current.set(scope)
    try:
        yield scope
    finally:
        _current.reset(token)


def scope() -> Scope | None:
    """Returns the implicit lineage itself; for the client."""
    return _current.get()


@contextmanager
def iteration(index: int, item: Any = None) -> Generator[Lineage]:
    """Marks one turn of a loop: whatever is emitted within carries ``iteration`` = {``index``, ``item``}.

    In a loop within a loop, the turn of the outer one is its member ``outer``.  ``item`` is what JSON can hold.
    """
    turn: dict[str, Any] = {"index": index} if item is None else {"index": index, "item": item}
    before = _current.get()
    outer = None if before is None else before.context.get("iteration")
    if outer is not None:
        turn["outer"] = outer
    with _changed({"iteration": turn}) as lineage:
        yield lineage


@contextmanager
def spawn(agent_id: str, *, by: str | None = None) -> Generator[Lineage]:
    """Emits as another agent within the block; the agent that spawned it is its ``originator``: results go there.

    ``by`` names the spawning agent; None takes that of the current lineage, if it has one.
    """
    changes: Lineage = {"agent_id": check_agent(agent_id)}
    before = _current.get()
    spawner = by if by is not None else None if before is None else before.context.get("agent_id")
    if spawner is not None:
        changes["originator"] = check_agent(spawner)
    with _changed(changes) as lineage:
        yield lineage


def bind(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Returns a function that runs under the lineage of this moment, in whatever thread it is called."""
    context = contextvars.copy_context()

    @functools.wraps(function)
    def bound(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        # A copy each time: one context cannot be entered by two threads at once.
        return context.copy().run(function, *arguments, **options)

    return bound


class ThreadPool(ThreadPoolExecutor):
    """A ThreadPoolExecutor whose calls run under the lineage of whoever submitted them.

    ``asyncio.to_thread`` does that by itself; ``loop.run_in_executor`` does it with this one.
    """

    def submit(
        self, fn: Callable[Parameters, Result], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Future[Result]:
        """Submits a call; see :class:`concurrent.futures.Executor`."""
        return super().submit(contextvars.copy_context().run, functools.partial(fn, *args, **kwargs))


def copy_current_context() -> Scope | None:
    """Returns the implicit lineage of this moment, for :func:`restore_context` somewhere else."""
    return _current.get()


def restore_context(saved: Scope | Mapping[str, Any] | None) -> None:
    """Makes a lineage that was saved, or one in explicit form, the current one, until the end of the running task."""
    _current.set(saved if saved is None or isinstance(saved, Scope) else Scope(from_dict(saved)))


@contextmanager
def capture() -> Generator[list[Emission]]:
    """Yields a list that every event emitted by this process, from whatever task, is added to while the block lasts.

    For tests and for looking on; what is emitted is sent all the same.
    """
    seen: list[Emission] = []
    with _lock:
        _captures.append(seen)
    try:
        yield seen
    finally:
        with _lock:
            # By identity: two empty lists are equal.
            _captures[:] = [other for other in _captures if other is not seen]


def counters() -> Counters:
    """Returns how many events this process has emitted by each path."""
    with _lock:
        return msgspec.structs.replace(_counters)


def note_emission(event: Event, parent: Mapping[str, Any] | None, path: Path, *, overridden: bool) -> None:
    """Counts an event, and shows it to those who capture; for the client."""
    with _lock:
        setattr(_counters, path, getattr(_counters, path) + 1)
        _counters.overridden += overridden
        if not _captures:
            return
        seen = Emission(event.name, event.data, of_event(event), None if parent is None else dict(parent), path)
        for captured in _captures:
            captured.append(seen)


def note_read(row: ContextRow) -> None:
    """Notes for the receipt of the current event, if one is kept, that it read a context; for the client."""
    inner = _current.get()
    if inner is not None and inner.reads is not None:
        inner.reads.read(row.ref, row.size)


def note_stored(context: Context) -> None:
    """Notes for the receipt of the current event, if one is kept, that it made a context; for the client."""
    inner = _current.get()
    if inner is not None and inner.reads is not None:
        inner.reads.produced(context.ref, context.stored_size)


@contextmanager
def _changed(changes: Lineage) -> Generator[Lineage]:
    before = _current.get()
    context = {**({} if before is None else before.context), **changes}
    inner = Scope(context) if before is None else Scope(context, before.reads, before.mint)
    with _entered(inner):
        yield dict(context)


@contextmanager
def _entered(inner: Scope | None) -> Generator[None]:
    token = _current.set(inner)
    try:
        yield
    finally:
        _current.reset(token)


__all__ = [
    "HEADER",
    "Counters",
    "Emission",
    "IdMint",
    "Lineage",
    "Path",
    "Recorder",
    "Scope",
    "ThreadPool",
    "bind",
    "capture",
    "copy_current_context",
    "counters",
    "current",
    "enter",
    "from_dict",
    "from_headers",
    "from_traceparent",
    "get",
    "iteration",
    "merge",
    "note_emission",
    "of",
    "restore_context",
    "scope",
    "spawn",
    "to_headers",
    "to_traceparent",
    "with_underscores",
    "within",
]
