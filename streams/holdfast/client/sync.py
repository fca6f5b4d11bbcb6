"""The client for programs without an event loop: the same methods, which block::

    from holdfast.client.sync import connect

    with connect(agent="planner") as hf:
        ref = hf.put({"goal": "book a flight"}, kind="completion")
        hf.keys.patch("trip.42", {"goal": str(ref)})
        for version in hf.keys.history("trip.42"):
            print(version.version, hf.keys.load(version).body)

Every method is the twin of the one of that name in :mod:`holdfast.client`: the same arguments, results and errors.  Any
thread may use one client; threads and clients of one server, namespace and agent share one connection, which the
background loop keeps.  Where an event loop runs, these methods block it: use :func:`holdfast.client.connect` there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, Final, Generic, ParamSpec, Self, TypeVar, Unpack, overload

from holdfast.client import lineage
from holdfast.client.background import ClientShare
from holdfast.client.conversations import Conversation, ConversationTracker, Message
from holdfast.client.keys import Keys
from holdfast.client.receipts import begin_work
from holdfast.client.store import Holdfast
from holdfast.schemas.errors import ClosedError
from holdfast.schemas.limits import QUERY_LIMIT_DEFAULT

if TYPE_CHECKING:
    from types import TracebackType

    from holdfast.client.event_reader import Conditions, EventPage
    from holdfast.client.key_model import KeyVersion
    from holdfast.client.model import Context, Event
    from holdfast.client.watch import KeyWatch
    from holdfast.streams.connection_target import ConnectionTarget

A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)
P = ParamSpec("P")
T = TypeVar("T")

_PAGE: Final = 256
"""Most items that an iterator takes from the background loop at once; it begins with one and doubles."""


class _Blocking(Generic[A_co]):
    """An object that lives on the background loop, and whose coroutines are called from anywhere else."""

    def __init__(self, share: ClientShare, pick: Callable[[Holdfast], A_co]) -> None:
        self._share = share
        self._pick = pick

    def _call(self, use: Callable[[A_co], Awaitable[T]]) -> T:
        return self._share.call(lambda hf: use(self._pick(hf)))

    def _iterate(self, begin: Callable[[A_co], AsyncIterator[T]]) -> Iterator[T]:
        iterator = self._call(partial(_begun, begin))
        size = 1
        try:
            while True:
                items = self._call(partial(_take, iterator, size))
                yield from items
                if len(items) < size:
                    return
                size = min(size * 2, _PAGE)
        finally:
            try:
                # Not waited for: this may run as a finalizer, on any thread.
                self._share.start(partial(_close, iterator))
            except ClosedError:
                pass  # the client is closed, and this with it


def _blocking(method: Callable[Concatenate[A, P], Awaitable[T]]) -> Callable[Concatenate[_Blocking[A], P], T]:
    """The blocking twin of a coroutine method."""

    @wraps(method)
    def call(self: _Blocking[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._call(lambda target: method(target, *args, **kwargs))  # pyright: ignore[reportPrivateUsage]

    return call


def _iterating(
    method: Callable[Concatenate[A, P], AsyncIterator[T]],
) -> Callable[Concatenate[_Blocking[A], P], Iterator[T]]:
    """The blocking twin of a method that iterates; it reads ahead, by pages that grow as they are used."""

    @wraps(method)
    def call(self: _Blocking[A], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self._iterate(lambda target: method(target, *args, **kwargs))  # pyright: ignore[reportPrivateUsage]

    return call


class SyncKeys(_Blocking[Keys]):
    """Named contexts, as :class:`holdfast.client.keys.Keys`, by calls that block."""

    put = _blocking(Keys.put)
    get = _blocking(Keys.get)
    head = _blocking(Keys.head)
    get_many = _blocking(Keys.get_many)
    patch = _blocking(Keys.patch)
    append = _blocking(Keys.append)
    update = _blocking(Keys.update)
    delete = _blocking(Keys.delete)
    rollback = _blocking(Keys.rollback)
    diff = _blocking(Keys.diff)
    commit = _blocking(Keys.commit)
    policies = _blocking(Keys.policies)
    set_policy = _blocking(Keys.set_policy)
    history = _iterating(Keys.history)
    list = _iterating(Keys.list)

    def load(self, version: KeyVersion) -> Context:
        """Returns the context of a version: the twin of ``await version.load()``."""
        return self._call(lambda _: version.load())

    def watch(
        self, prefix: str = "", *, after: str | None = None, from_version: int | None = None, initial: bool = False
    ) -> SyncKeyWatch:
        """Returns an iterator over the changes of keys, as :meth:`holdfast.client.keys.Keys.watch`; each step blocks.

        It has begun when this returns: nothing from then on is missed.  Close it, or use it in a ``with`` block.
        """

        async def begin(keys: Keys) -> KeyWatch:
            watch = keys.watch(prefix, after=after, from_version=from_version, initial=initial)
            return await watch.__aenter__()

        return SyncKeyWatch(self._share, self._call(begin))


class SyncKeyWatch:
    """The changes of keys, as they come.  For one thread at a time, but any may close it."""

    def __init__(self, share: ClientShare, watch: KeyWatch) -> None:
        self._share = share
        self._watch = watch
        self._pending: asyncio.Future[KeyVersion] | None = None
        self._is_closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> KeyVersion:
        """Blocks until the next change, for ever if need be.  Ends when the watch is closed."""
        version = self._share.call(lambda _: self._next(None))
        if version is None:
            raise StopIteration
        return version

    def next(self, timeout_s: float) -> KeyVersion | None:
        """Returns the next change; None when none came in time (it comes with a later call), or the watch is closed."""
        return self._share.call(lambda _: self._next(timeout_s))

    def close(self) -> None:
        """Ends the watch, and the waiting of a thread for its next change.  Idempotent."""
        if not self._is_closed and not self._share.is_closed:
            self._share.call(lambda _: self._end())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _next(self, timeout_s: float | None) -> KeyVersion | None:
        if self._is_closed:
            return None
        if self._pending is None:
            # A task of its own: a caller that gives up takes nothing with it.
            self._pending = asyncio.ensure_future(anext(self._watch))
        pending = self._pending
        await asyncio.wait([pending], timeout=timeout_s)
        if not pending.done() or pending.cancelled():
            return None
        self._pending = None
        try:
            return pending.result()
        except StopAsyncIteration:  # the client was closed, or its connection
            self._is_closed = True
            return None

    async def _end(self) -> None:
        self._is_closed = True
        if self._pending is not None:
            self._pending.cancel()
            await asyncio.wait([self._pending])
        await self._watch.close()


class SyncConversationTracker(_Blocking[ConversationTracker]):
    """What is in sessions, as :class:`holdfast.client.conversations.ConversationTracker`, by calls that block."""

    add_context_to_session = _blocking(ConversationTracker.add_context_to_session)
    get_session_context_chain = _blocking(ConversationTracker.get_session_context_chain)
    get_agent_conversation_summary = _blocking(ConversationTracker.get_agent_conversation_summary)


class SyncMessage(_Blocking[Message]):
    """A message of a conversation, as :class:`holdfast.client.conversations.Message`, by calls that block."""

    def __init__(self, share: ClientShare, message: Message) -> None:
        super().__init__(share, lambda _: message)
        self.event = message.event
        self.ref = message.ref
        self.kind = message.kind

    context = _blocking(Message.context)
    body = _blocking(Message.body)
    role = _blocking(Message.role)


class SyncConversation(_Blocking[Conversation]):
    """A session as messages, as :class:`holdfast.client.conversations.Conversation`, by calls that block."""

    def __init__(self, share: ClientShare, session: str) -> None:
        super().__init__(share, lambda hf: hf.conversation(session))
        self.session_id = session

    def __iter__(self) -> Iterator[SyncMessage]:
        for message in self._iterate(aiter):
            yield SyncMessage(self._share, message)

    def messages(self) -> list[SyncMessage]:
        """Returns all messages with their contexts resolved, in batches."""
        return [SyncMessage(self._share, message) for message in self._call(lambda target: target.messages())]

    events = _iterating(Conversation.events)
    refs = _blocking(Conversation.refs)
    count = _blocking(Conversation.count)
    find = _blocking(Conversation.find)
    forked_from = _blocking(Conversation.forked_from)


class SyncHoldfast(_Blocking[Holdfast]):
    """A client of one namespace, as :class:`holdfast.client.Holdfast`, by calls that block.

    Made by :func:`connect`.
    """

    def __init__(self, share: ClientShare) -> None:
        super().__init__(share, lambda hf: hf)
        self.namespace = share.namespace
        self.agent = share.agent
        self.keys = SyncKeys(share, lambda hf: hf.keys)
        self.conversation_tracker = SyncConversationTracker(share, lambda hf: hf.conversation_tracker)

    put = _blocking(Holdfast.put)
    put_many = _blocking(Holdfast.put_many)
    resolve = _blocking(Holdfast.resolve)
    resolve_many = _blocking(Holdfast.resolve_many)
    emit = _blocking(Holdfast.emit)
    stats = _blocking(Holdfast.stats)
    health = _blocking(Holdfast.health)
    chain = _blocking(Holdfast.chain)
    tree = _blocking(Holdfast.tree)
    descendants = _blocking(Holdfast.descendants)
    used_by = _blocking(Holdfast.used_by)
    inputs_of = _blocking(Holdfast.inputs_of)
    call_resolver = _blocking(Holdfast.call_resolver)

    @overload
    def query(
        self, *, limit: int | None = None, fields: None = None, **conditions: Unpack[Conditions]
    ) -> Iterator[Event]: ...

    @overload
    def query(
        self, *, limit: int | None = None, fields: Sequence[str], **conditions: Unpack[Conditions]
    ) -> Iterator[dict[str, Any]]: ...

    def query(
        self, *, limit: int | None = None, fields: Sequence[str] | None = None, **conditions: Unpack[Conditions]
    ) -> Iterator[Event] | Iterator[dict[str, Any]]:
        """Yields the events that fit the conditions given, as :meth:`holdfast.client.Holdfast.query`."""
        if fields is None:
            return self._iterate(lambda hf: hf.query(limit=limit, **conditions))
        return self._iterate(lambda hf: hf.query(limit=limit, fields=fields, **conditions))

    @overload
    def query_page(
        self,
        *,
        limit: int = QUERY_LIMIT_DEFAULT,
        cursor: str | None = None,
        fields: None = None,
        **conditions: Unpack[Conditions],
    ) -> EventPage[Event]: ...

    @overload
    def query_page(
        self,
        *,
        limit: int = QUERY_LIMIT_DEFAULT,
        cursor: str | None = None,
        fields: Sequence[str],
        **conditions: Unpack[Conditions],
    ) -> EventPage[dict[str, Any]]: ...

    def query_page(
        self,
        *,
        limit: int = QUERY_LIMIT_DEFAULT,
        cursor: str | None = None,
        fields: Sequence[str] | None = None,
        **conditions: Unpack[Conditions],
    ) -> EventPage[Event] | EventPage[dict[str, Any]]:
        """Returns the next events after a cursor, as :meth:`holdfast.client.Holdfast.query_page`."""
        if fields is None:
            return self._call(lambda hf: hf.query_page(limit=limit, cursor=cursor, **conditions))
        return self._call(lambda hf: hf.query_page(limit=limit, cursor=cursor, fields=fields, **conditions))

    def request(self, name: str, data: Any = None, **options: Any) -> Event:
        """Emits an event and returns the result of its handler, as :meth:`holdfast.client.Holdfast.request`."""
        return self._call(lambda hf: hf.request(name, data, **options))

    def conversation(self, session: str) -> SyncConversation:
        """Returns the conversation of a session; nothing is read."""
        return SyncConversation(self._share, session)

    def fork(self, session: str, *, at: Event | str, name: str | None = None) -> SyncConversation:
        """Forks a session at an event, as :meth:`holdfast.client.Holdfast.fork`."""
        forked = self._call(lambda hf: hf.fork(session, at=at, name=name))
        return SyncConversation(self._share, forked.session_id)

    @contextmanager
    def working_on(self, event: Event | Mapping[str, Any], *, track: bool = True) -> Generator[dict[str, Any]]:
        """Works on an event while the block lasts, as :meth:`holdfast.client.Holdfast.working_on`."""
        # Calls made here run on the background loop under the lineage of the caller.
        context, recorder = begin_work(event, self.agent, track=track)
        with lineage.enter(context, reads=recorder):
            yield dict(context)
        if recorder is not None:
            record = recorder.record()
            self._call(lambda hf: hf.receipts.write(context, record))

    def close(self) -> None:
        """Gives the connection back; when this was its last user, returns when every write has its outcome."""
        self._share.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(
    url: str | ConnectionTarget | None = None, namespace: str = "default", agent: str = "agent"
) -> SyncHoldfast:
    """Connects to Holdfast, as :func:`holdfast.client.connect`, and returns the client.

    Use it in a ``with`` block, or close it, or leave it to the end of the program.  A forked child may go on with it,
    on a connection of its own.
    """
    client = SyncHoldfast(ClientShare(url, namespace, agent))
    client._call(_nothing)  # pyright: ignore[reportPrivateUsage]  # what is wrong is told here, not by the first use
    return client


async def _begun(begin: Callable[[A], AsyncIterator[T]], target: A) -> AsyncIterator[T]:
    # Begun where it is used: what belongs to the loop is made on it.
    return begin(target)


async def _nothing(_: object) -> None:
    pass


async def _take(iterator: AsyncIterator[T], count: int, _: object) -> list[T]:
    items: list[T] = []
    async for item in iterator:
        items.append(item)
        if len(items) == count:
            break
    return items


async def _close(iterator: AsyncIterator[object], _: object) -> None:
    if isinstance(iterator, AsyncGenerator):
        await iterator.aclose()


__all__ = [
    "SyncConversation",
    "SyncConversationTracker",
    "SyncHoldfast",
    "SyncKeyWatch",
    "SyncKeys",
    "SyncMessage",
    "connect",
]
