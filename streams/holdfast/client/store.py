"""The client: store and resolve contexts, publish and query events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client.cold import ResolverClient, cold_chunks
from holdfast.client.conversations import Conversation, Conversations, ConversationTracker
from holdfast.client.emitting import Named, event_of, is_under, minted, moment_ms, place_event
from holdfast.client.encryption import seal_contexts
from holdfast.client.event_reader import EventReader
from holdfast.client.growing import GrowingBodies, row_of_context
from holdfast.client.handlers import Handlers
from holdfast.client.key_cold import RemoteColdKeys
from holdfast.client.key_ring import KeyRing
from holdfast.client.keys import Keys
from holdfast.client.lineage import note_emission
from holdfast.client.lineage import scope as current_scope
from holdfast.client.model import Context, Event, Resolved
from holdfast.client.near_cache import DEFAULT_BYTES, NearCache
from holdfast.client.optimizations import Optimizations
from holdfast.client.orchestrations import Orchestrations
from holdfast.client.reading import BodyReader
from holdfast.client.receipts import Inputs, Receipts, Use
from holdfast.schemas.bodies import Body, encode_body
from holdfast.schemas.errors import HoldfastError, InvalidRefError, NotFoundError
from holdfast.schemas.ids import now_ms
from holdfast.schemas.names import check_agent, check_kind, check_namespace
from holdfast.schemas.refs import Digest, Ref, parse_ref
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.connection_target import ConnectionTarget
from holdfast.streams.discovery import require_connection
from holdfast.streams.events import EventLog, NewEvent
from holdfast.streams.hot import HotTier, NewContext
from holdfast.streams.key_log import KeyLog
from holdfast.streams.retry import NOBODY_S, READ_DEADLINE_S, call_with_retry
from holdfast.streams.server_clock import ServerClock
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import HOT_STREAM

if TYPE_CHECKING:
    from holdfast.schemas.rows import ContextRow

DEFAULT_KIND: Final = "context"


@asynccontextmanager
async def connect(
    url: str | ConnectionTarget | None = None,
    namespace: str = "default",
    agent: str = "agent",
    *,
    cache_bytes: int = DEFAULT_BYTES,
    key_ring: KeyRing | None = None,
) -> AsyncGenerator[Holdfast]:
    """Connects to Holdfast and yields the client while the block lasts.

    ``url``: the NATS server; None takes ``HOLDFAST_NATS_URL``, ``NATS_URL`` or a NATS context from the environment,
    else the local server that ``holdfast up`` runs.  ``namespace`` keeps apart what belongs apart; ``agent`` signs
    the events.  ``cache_bytes`` bounds the near cache; 0 turns it off.  ``key_ring`` encrypts and opens bodies; None
    takes that of the environment when it is first needed.

    Leaving the block waits until every write handed in has its outcome.  Raises UnavailableError when no server
    answers, GapError when it has no Holdfast streams yet, InvalidNameError for a bad name.
    """
    check_namespace(namespace)
    check_agent(agent)
    target = url if isinstance(url, ConnectionTarget) else require_connection(url=url)
    async with open_connection(target, name=f"holdfast-{agent.encode('ascii', 'replace').decode()[:40]}") as connection:
        info = await call_with_retry(
            partial(stream_info, connection, HOT_STREAM), deadline_s=READ_DEADLINE_S, nobody_s=NOBODY_S
        )
        client = Holdfast(
            connection, namespace, agent, replicas=info.replicas, cache_bytes=cache_bytes, key_ring=key_ring
        )
        try:
            yield client
        finally:
            await client.close()


class Holdfast(EventReader):
    """A client of one namespace.  Made by :func:`connect`; safe to use from many tasks of one event loop.

    Writes return once the server has acknowledged them as durable.  A write that raises UnknownOutcomeError may have
    been stored; the same call again is safe, since a context is named by its content and an event by its id: an event
    that was emitted without an ``event_id`` gets another one the second time, and may then be stored twice.
    """

    def __init__(
        self,
        connection: Connection,
        namespace: str,
        agent: str,
        *,
        replicas: int = 1,
        cache_bytes: int = DEFAULT_BYTES,
        key_ring: KeyRing | None = None,
    ) -> None:
        self.connection = connection
        self.namespace = namespace
        self.agent = agent
        self.cache = NearCache(cache_bytes)
        self.key_ring = KeyRing.from_environment() if key_ring is None else key_ring
        self._hot = HotTier(connection, replicas=replicas, cold=cold_chunks(connection))
        self._events = EventLog(connection)
        self._resolver = ResolverClient(connection, namespace)
        self._reader = BodyReader(self._hot, self._resolver, namespace)
        self.keys = Keys(
            connection,
            namespace,
            agent,
            log=KeyLog(connection, replicas=replicas),
            bodies=GrowingBodies(namespace, self._hot, self._reader, self.cache, cache_bytes=cache_bytes),
            cold=RemoteColdKeys(self._resolver, namespace),
            clock=ServerClock(connection),
            ring=self.key_ring,
        )
        self.handlers = Handlers(self)
        # With their own signatures, which a type checker then knows.
        self.on = self.handlers.on
        self.ready = self.handlers.ready
        self.request = self.handlers.request
        self.receipts = Receipts(self)
        self.conversations = Conversations(self)
        self.conversation_tracker = ConversationTracker(self)
        self.orchestrations = Orchestrations(self)
        self.optimizations = Optimizations(self)

    async def put(
        self,
        body: Body,
        *,
        kind: str = DEFAULT_KIND,
        content_type: str | None = None,
        expires_at: datetime | None = None,
        encrypt: bool = False,
        lineage: Mapping[str, Any] | None = None,
    ) -> Ref:
        """Stores a context and returns its reference; an equal context is stored once, with one reference.

        ``body``: text, bytes, or what JSON can hold; ``content_type`` is chosen by its type unless given.
        ``expires_at`` is part of the context's identity: after it the reference resolves to nothing.  ``encrypt``
        seals the body before it leaves this process, each time anew: equal bodies get different references.
        ``lineage`` notes, in a receipt, that it was made in working on that event; handlers note it by themselves.
        Raises InputError for a body, kind or time that cannot be stored, UnknownOutcomeError when no acknowledgement
        came, EncryptionKeyError when there is no key.
        """
        context = self._new_context(body, kind, content_type, expires_at)
        if encrypt or lineage is not None or current_scope() is not None:
            return (await self._put([context], encrypt, lineage))[0]
        # Most contexts are made outside any event, and nothing is noted of them.
        ref = (await self._hot.put(context)).ref
        now = now_ms()
        self.cache.add(ref, row_of_context(context, _digest_of(ref), now), now)
        return ref

    async def put_many(
        self,
        bodies: Iterable[Body],
        *,
        kind: str = DEFAULT_KIND,
        content_type: str | None = None,
        expires_at: datetime | None = None,
        encrypt: bool = False,
        lineage: Mapping[str, Any] | None = None,
    ) -> list[Ref]:
        """Stores many contexts of one kind and returns their references in order.

        They are sent in atomic batches; each context is stored or not by itself, and all of them before this returns.
        Errors as of :meth:`put`; a body that cannot be encoded raises before anything is sent.
        """
        return await self._put(
            [self._new_context(body, kind, content_type, expires_at) for body in bodies], encrypt, lineage
        )

    async def resolve(
        self, ref: str, *, track: bool | None = None, lineage: Mapping[str, Any] | None = None
    ) -> Context:
        """Returns the context of a reference, from this process, the hot tier or the lake, whichever has it first.

        ``track`` notes for the receipt of the current event, or of that of ``lineage``, that it read this context;
        None: as is the way where it runs (handlers note it).  The bytes have been checked against the reference.
        Raises InvalidRefError for what is no reference, NotFoundError when it is stored nowhere or has expired,
        DigestMismatchError when the only copy is damaged, UnavailableError when it is not hot and no resolver answers.
        """
        # What the near cache holds was looked up under a well-formed reference: no need to take it apart again.
        row = self.cache.get(ref, now_ms())
        if row is not None:
            context = Context(row, "cache", self.key_ring)
            return await self._tracked(context, track, lineage) if _may_track(track) else context
        row, tier = await self._reader.load_one(parse_ref(ref).digest)
        now = now_ms()
        # The kind is under the digest too: a reference that names another kind names nothing.
        if row is None or row.ref != ref or _is_expired(row, now):
            raise NotFoundError(
                f"no context {ref} in namespace {self.namespace!r}",
                field="ref",
                hint="it may have expired, or belong to another namespace",
            )
        self.cache.add(ref, row, now)
        context = Context(row, tier, self.key_ring)
        return await self._tracked(context, track, lineage) if _may_track(track) else context

    async def resolve_many(
        self, refs: Iterable[str], *, track: bool | None = None, lineage: Mapping[str, Any] | None = None
    ) -> Resolved:
        """Returns the contexts of many references, and those that are stored nowhere, in order of first mention.

        Two round trips for everything that is hot, whatever their number up to 1,000.  Errors as of :meth:`resolve`.
        """
        wanted = {Ref(ref): parse_ref(ref).digest for ref in refs}
        contexts, errors = await self._resolve(wanted)
        for error in errors.values():
            raise error
        if _may_track(track):
            for context in contexts.values():
                await self._tracked(context, track, lineage)
        return Resolved(
            found={ref: contexts[ref] for ref in wanted if ref in contexts},
            missing=[ref for ref in wanted if ref not in contexts],
        )

    async def emit(
        self,
        name: str,
        data: Any = None,
        *,
        context: Ref | Body = None,
        context_kind: str = "event",
        session: str | None = None,
        correlation: str | None = None,
        parent: Event | str | None = None,
        lineage: Mapping[str, Any] | None = None,
        agent: str | None = None,
        client: str | None = None,
        originator: str | None = None,
        event_id: str | None = None,
        timestamp: datetime | None = None,
        traceparent: str | None = None,
    ) -> Event:
        """Publishes an event and returns it, once it is stored durably.

        ``context`` is a reference, or a body, which is stored first.  The event is a child of the current one (see
        :mod:`holdfast.client.lineage`), of ``lineage`` in its stead (empty: of none), or of ``parent``, and takes over
        session, correlation, agent, client, originator and attributes where they are not given (of a ``parent`` that
        is an Event, its session and correlation).  ``event_id`` makes a repetition harmless: the same id is stored
        once (an id that is no UUID is turned into one, and kept as ``source_id``).  Raises InputError naming the field
        that cannot be sent, DepthLimitError for a lineage without end, UnknownOutcomeError without an acknowledgement.
        """
        named = Named(
            session_id=session,
            correlation_id=correlation,
            agent_id=agent,
            client_id=client,
            originator=originator,
            parent=parent,
            event_id=event_id,
            timestamp=timestamp,
            traceparent=traceparent,
        )
        scope = current_scope()
        placed = place_event(self.namespace, self.agent, name, data, named, lineage=lineage, scope=scope)
        event = placed.event
        ref, size = None, None
        if context is not None:
            ref, size = await self._context_ref(context, context_kind)
            event = msgspec.structs.replace(event, context_ref=ref)
        if event_id is None:
            event = minted(event, scope, is_timed=timestamp is not None)
        if self.handlers.pending:
            await self.handlers.begun()  # what this client emits is not to be missed by its own handlers
        await self._events.publish_many([event])
        if ref is not None and scope is not None and scope.reads is not None:
            if size is None:
                scope.reads.referred(ref, event.id)
            else:
                scope.reads.produced(ref, size, event.id)
        emitted = event_of(event)
        note_emission(emitted, placed.parent, placed.path, overridden=placed.overridden)
        return emitted

    async def publish_many(self, events: Sequence[NewEvent]) -> list[bool]:
        """Publishes prepared events in order; tells of each whether it was new.  For importers and replays."""
        return [not outcome.existed for outcome in await self._events.publish_many(events)]

    async def store_many(self, contexts: Sequence[NewContext]) -> list[Ref]:
        """Stores prepared contexts, which may differ in kind; the near cache is passed by.  For importers."""
        return [put.ref for put in await self._hot.put_many(contexts)]

    def conversation(self, session: str) -> Conversation:
        """Returns the conversation of a session: its messages in order, read when they are asked for."""
        return self.conversations.open(session)

    async def fork(self, session: str, *, at: Event | str, name: str | None = None) -> Conversation:
        """Makes a session that shares everything up to an event of another one, and goes its own way from there.

        Nothing is copied.  ``name``: that of the new session; None makes one.  Errors as of :class:`Conversations`.
        """
        return await self.conversations.fork(session, at=at, name=name)

    def working_on(
        self, event: Event | Mapping[str, Any], *, track: bool = True
    ) -> AbstractAsyncContextManager[dict[str, Any]]:
        """Works on an event while the block lasts, as a handler does: its receipt is written at the end.

        See :meth:`holdfast.client.receipts.Receipts.working_on`.
        """
        return self.receipts.working_on(event, track=track)

    async def used_by(self, ref: str) -> list[Use]:
        """Returns in which events a context was read, and what was made of it, oldest first."""
        return await self.receipts.used_by(ref)

    async def inputs_of(self, event_or_ref: Event | str) -> Inputs:
        """Returns what was read in working on an event, or before a context was made."""
        return await self.receipts.inputs_of(event_or_ref)

    async def call_resolver(self, endpoint: str, request: object) -> dict[str, Any]:
        """Calls an endpoint of the resolver with a JSON request and returns its answer.

        Raises what the resolver refused with, UnavailableError when none answers.
        """
        return await self._resolver.call(endpoint, request)

    async def stats(self) -> dict[str, Any]:
        """Returns what the tiers hold, as the resolver's ``stats`` endpoint says it."""
        return await self._resolver.call("stats", {})

    async def health(self) -> dict[str, Any]:
        """Returns the resolver's ``health`` answer: ``ok``, and each problem with the next step to take."""
        return await self._resolver.call("health", {})

    async def close(self) -> None:
        """Ends the handlers, then waits until every write that was handed in has its outcome."""
        await self.handlers.close()
        await self.keys.close()
        await self._hot.close()
        await self._events.close()

    async def _put(self, contexts: list[NewContext], encrypt: bool, lineage: Mapping[str, Any] | None) -> list[Ref]:
        if encrypt:
            contexts = await asyncio.to_thread(seal_contexts, self.key_ring, contexts)
        refs = await self._store(contexts)
        scope = current_scope()
        for ref, context in zip(refs, contexts, strict=True):
            if scope is not None and scope.reads is not None and is_under(lineage, scope):
                scope.reads.produced(ref, len(context.body))
            elif lineage is not None:
                await self.receipts.record_made(lineage, ref, len(context.body))
        return refs

    async def _store(self, contexts: list[NewContext]) -> list[Ref]:
        puts = await self._hot.put_many(contexts)
        now = now_ms()
        for context, put in zip(contexts, puts, strict=True):
            self.cache.add(put.ref, row_of_context(context, _digest_of(put.ref), now), now)
        return [put.ref for put in puts]

    async def _resolve(self, refs: Mapping[Ref, Digest]) -> tuple[dict[Ref, Context], dict[Ref, HoldfastError]]:
        now = now_ms()
        contexts: dict[Ref, Context] = {}
        left: dict[Ref, Digest] = {}
        for ref, digest in refs.items():
            row = self.cache.get(ref, now)
            if row is not None:
                contexts[ref] = Context(row, "cache", self.key_ring)
            else:
                left[ref] = digest
        rows, tiers, failed = await self._reader.load(list(dict.fromkeys(left.values())))
        errors: dict[Ref, HoldfastError] = {}
        for ref, digest in left.items():
            if digest in failed:
                errors[ref] = failed[digest]
                continue
            row = rows.get(digest)
            # As in resolve: a reference that names another kind names nothing.
            if row is None or row.ref != ref or _is_expired(row, now):
                continue
            contexts[ref] = Context(row, tiers[digest], self.key_ring)
            self.cache.add(ref, row, now)
        return contexts, errors

    async def _tracked(self, context: Context, track: bool | None, lineage: Mapping[str, Any] | None) -> Context:
        if track is False:
            return context
        scope = current_scope()
        if scope is not None and scope.reads is not None and is_under(lineage, scope):
            scope.reads.read(context.ref, context.stored_size)
        elif track:
            given = lineage if lineage is not None else None if scope is None else scope.context
            await self.receipts.record_read(given, context.ref, context.stored_size)
        return context

    async def _context_ref(self, context: object, kind: str) -> tuple[Ref, int | None]:
        """The reference of what is given as an event's context, and its size when it was stored just now."""
        if isinstance(context, str):
            try:
                parse_ref(context)
                return Ref(context), None
            except InvalidRefError:
                pass  # text is a body unless it reads as a reference
        new = self._new_context(context, kind, None, None)  # type: ignore[arg-type]  # checked there, with a typed error
        return (await self._store([new]))[0], len(new.body)

    def _new_context(self, body: Body, kind: str, content_type: str | None, expires_at: datetime | None) -> NewContext:
        raw, chosen_type = encode_body(body, content_type)
        return NewContext(
            namespace=self.namespace,
            kind=check_kind(kind),
            body=raw,
            content_type=chosen_type,
            expires_at_ms=None if expires_at is None else moment_ms(expires_at, "expires_at"),
        )


def _digest_of(ref: Ref) -> Digest:
    """The digest of a reference that was made here, and needs no check: a put would pay a microsecond for it."""
    return Digest(ref.rpartition("_")[2])


def _may_track(track: bool | None) -> bool:
    """Whether a reading may have to be noted: seldom, and then it costs an await."""
    if track is None:
        scope = current_scope()
        return scope is not None and scope.reads is not None
    return track


def _is_expired(row: ContextRow, at_ms: int) -> bool:
    return row.expires_at_ms is not None and row.expires_at_ms <= at_ms


__all__ = ["DEFAULT_KIND", "Holdfast", "connect"]
