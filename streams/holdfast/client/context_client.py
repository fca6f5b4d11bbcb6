"""A store of named contexts for agents: store, get, update, delete, subscribe::

    client = ContextClient()
    await client.initialize()
    await client.store("plan", {"goal": "book a flight"}, {"sessionId": "s1", "agentId": "planner", "ttl": 3600})
    context = await client.get("plan")
    print(context.data if context else None)

A thin layer over ``hf.keys``: a context ``plan`` is the named context ``store.plan``, with versions, tags, expiry and
everything else that named contexts have, for this client and for all others.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar, Unpack

from holdfast.client.context_connection import OwnedConnection
from holdfast.client.context_following import Callback, Change, Follower, checked_callback
from holdfast.client.context_model import (
    CHANGE_TYPES,
    Absent,
    ChangeType,
    ContextVersion,
    SearchResults,
    StoredContext,
    change_data,
)
from holdfast.client.context_options import (
    DELETE,
    SEARCH,
    STORE,
    UPDATE,
    OptionMap,
    Options,
    SearchOptions,
    StoreOptions,
    parse_options,
)
from holdfast.client.key_ring import encryption_by_default
from holdfast.schemas.bodies import encode_json
from holdfast.schemas.errors import (
    ClosedError,
    InvalidBodyError,
    InvalidFieldError,
    NotFoundError,
    VersionConflictError,
)
from holdfast.schemas.ids import iso_from_ms, ms_from_utc
from holdfast.schemas.names import check_agent, check_key, check_namespace
from holdfast.schemas.policies import STORE_PREFIX
from holdfast.schemas.refs import JSON

if TYPE_CHECKING:
    from holdfast.client.key_model import KeyValue, KeyVersion
    from holdfast.client.store import Holdfast
    from holdfast.streams.connection_target import ConnectionTarget

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_TTL_S: Final = 86_400.0
"""How long a context lives that is stored without a ttl and without a policy that says otherwise: a day."""


_AT_ONCE: Final = 64
"""Keys of one batch under way at once: what comes together is written together."""

_ATTEMPTS: Final = 100
"""How often a change is tried against other writers."""

_COARSE_S: Final = 10.0
_SHORTEST_S: Final = 0.001


class ContextClient:
    """Stores contexts under keys, for one event loop.

    ``url``, ``namespace`` and ``agent`` as of :func:`holdfast.client.connect`; ``client`` is an open one to use
    instead, which stays open.  ``prefix`` is put before every key.  ``encrypt``: whether contexts are encrypted whose
    ``store`` does not say; None asks ``CONTEXT_ENCRYPTION_ENABLED``, then the policies.

    The connection is made by :meth:`initialize`, or with the first call, and ended by :meth:`close`; ``async with``
    does both.

    Options come as a mapping (``{"sessionId": …}``) or as keywords (``session_id=…``).  ``ttl`` is in seconds;
    math.inf is for ever.  ``compress`` is taken and changes nothing: what is over 1 KiB is stored compressed when that
    is smaller, and read as it was stored; there is no way to have it kept larger.
    """

    def __init__(
        self,
        url: str | ConnectionTarget | None = None,
        namespace: str = "default",
        agent: str = "agent",
        *,
        client: Holdfast | None = None,
        prefix: str = STORE_PREFIX,
        encrypt: bool | None = None,
    ) -> None:
        self._url = url
        self._namespace = check_namespace(namespace)
        self._agent = check_agent(agent)
        self._prefix = prefix
        self._encrypt = encrypt
        self._client = client
        self._connection: OwnedConnection | None = None
        self._is_closed = False
        self._callbacks: list[Callback] = []
        self._followers: dict[str, Follower] = {}

    @property
    def is_closed(self) -> bool:
        """Whether it has been closed: every further call raises ClosedError."""
        return self._is_closed

    async def initialize(self) -> ContextClient:
        """Connects, unless that is done, and returns the client; raises UnavailableError when no server answers."""
        await self._open()
        return self

    async def close(self) -> None:
        """Ends the subscriptions and the connection; writes handed in have their outcome by then.  Idempotent."""
        self._is_closed = True
        followers, self._followers = list(self._followers.values()), {}
        for follower in followers:
            await follower.stop()
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def __aenter__(self) -> ContextClient:
        return await self.initialize()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def store(
        self, key: str, data: Any, options: OptionMap | None = None, **more: Unpack[StoreOptions]
    ) -> StoredContext:
        """Stores ``data`` as the newest version of ``key``, once that is durable.

        ``data``: what JSON can hold, text or bytes.  Without ``ttl`` it lives for a day, or as the policies say.
        ``expected_version`` makes it conditional: VersionConflictError when the newest is another, 0 for "there is
        none".  Raises InputError for what cannot be stored, EncryptionKeyError when it is to be encrypted and there
        is no key.
        """
        return await self._store(self._full(key), data, parse_options(options, more, STORE))

    async def get(self, key: str, version: int | None = None) -> StoredContext | None:
        """Returns the newest version of a context, or the one numbered; None when it is not there (any more)."""
        hf = await self._open()
        try:
            return self._context(await hf.keys.get(self._full(key), version))
        except NotFoundError:
            return None

    async def update(
        self, key: str, data: Any, options: OptionMap | None = None, **more: Unpack[StoreOptions]
    ) -> StoredContext:
        """Changes a context, creating it when it is not there; concurrent changes all take effect, one after another.

        ``change_type`` says how: ``replace`` (the default) puts ``data`` in its place; ``merge`` merges an object into
        an object (RFC 7386: null removes a member); ``append`` adds to the end of a list (a list adds its items) or of
        a text, and of an object appends member by member.  It is kept with the version, as ``changed_by`` is.

        Tags and session stay as they were unless given.  A context that was to live for some time lives for that long
        again.  Raises InvalidFieldError when the data cannot be changed so.
        """
        return await self._update(self._full(key), data, parse_options(options, more, UPDATE))

    async def delete(self, key: str, options: OptionMap | None = None, **more: Unpack[StoreOptions]) -> bool:
        """Deletes a context; whether there was one.  Its versions stay in its history."""
        return await self._delete(self._full(key), parse_options(options, more, DELETE))

    async def history(self, key: str, limit: int | None = None) -> list[ContextVersion]:
        """Returns the versions of a context, newest first, deletions included; those of years ago too."""
        hf = await self._open()
        return [self._version(version) async for version in hf.keys.history(self._full(key), limit=limit)]

    async def rollback(self, key: str, version: int, *, changed_by: str | None = None) -> StoredContext:
        """Makes a new version that equals an old one, and returns it; raises NotFoundError when that has no data."""
        hf = await self._open()
        return self._context(await hf.keys.rollback(self._full(key), version, changed_by=changed_by))

    async def store_many(
        self, contexts: Mapping[str, Any], options: OptionMap | None = None, **more: Unpack[StoreOptions]
    ) -> dict[str, StoredContext]:
        """Stores many contexts with the same options; each is stored or not by itself.

        When some fail, the first error is raised once all have ended.
        """
        parsed = parse_options(options, more, STORE - {"expected_version"})
        return await self._each(contexts, lambda key: self._store(self._full(key), contexts[key], parsed))

    async def get_many(self, keys: Iterable[str]) -> dict[str, StoredContext]:
        """Returns the newest versions of many contexts, by key; what is not there is left out."""
        hf = await self._open()
        wanted = {self._full(key): key for key in keys}
        found = await hf.keys.get_many(list(wanted))
        return {wanted[key]: self._context(value) for key, value in found.items()}

    async def update_many(
        self, contexts: Mapping[str, Any], options: OptionMap | None = None, **more: Unpack[StoreOptions]
    ) -> dict[str, StoredContext]:
        """Changes many contexts with the same options, as :meth:`update` does each; errors as of store_many."""
        parsed = parse_options(options, more, UPDATE - {"expected_version"})
        return await self._each(contexts, lambda key: self._update(self._full(key), contexts[key], parsed))

    async def delete_many(
        self, keys: Iterable[str], options: OptionMap | None = None, **more: Unpack[StoreOptions]
    ) -> dict[str, bool]:
        """Deletes many contexts; of each, whether there was one.  Errors as of store_many."""
        parsed = parse_options(options, more, DELETE - {"expected_version"})
        return await self._each(keys, lambda key: self._delete(self._full(key), parsed))

    def on(self, event: str, callback: Callback) -> None:
        """Has ``callback`` called with each change of a subscribed context, whoever made it, in order.

        ``event`` is ``contextChange`` (or ``context_change``).  The callback may be a coroutine function: it is
        awaited before the next change of that context is told.  What it raises is logged, and the next is told.
        """
        self._callbacks.append(checked_callback(event, callback))

    def off(self, event: str, callback: Callback) -> None:
        """Takes a callback out; does nothing when it is not in."""
        if checked_callback(event, callback) in self._callbacks:
            self._callbacks.remove(callback)

    def subscribe(self, key: str) -> Awaitable[None]:
        """Has changes of ``key`` told to the callbacks of :meth:`on`, from when what this returns was awaited.

        Nothing is missed through reconnects; after one a change may be told twice.  It need not be awaited, but what
        it raises is then only logged.
        """
        full = self._full(key)
        follower = self._followers.get(key)
        if follower is None or follower.has_failed:
            follower = self._followers[key] = Follower(self._open, full, self._tell)
        return asyncio.shield(follower.ready)

    async def unsubscribe(self, key: str) -> None:
        """Ends a subscription; does nothing when there is none."""
        follower = self._followers.pop(key, None)
        if follower is not None:
            await follower.stop()

    async def search(self, text: str, options: OptionMap | None = None, **more: Unpack[SearchOptions]) -> SearchResults:
        """Returns no results, and says so: there is no full-text search yet (``available`` is False)."""
        parse_options(options, more, SEARCH)
        return SearchResults(query=text)

    async def health(self) -> dict[str, Any]:
        """Returns ``ok`` and each problem with the next step to take; raises UnavailableError without a resolver."""
        return await (await self._open()).health()

    async def stats(self) -> dict[str, Any]:
        """Returns what the tiers hold; raises UnavailableError without a resolver."""
        return await (await self._open()).stats()

    async def _store(self, full: str, data: Any, options: Options) -> StoredContext:
        hf = await self._open()
        body, content_type = _body_of(data)
        value = await hf.keys.put(
            full,
            body,
            content_type=content_type,
            expected_version=options.expected_version,
            tags=options.tags or (),
            session=options.session_id,
            ttl=await self._ttl(hf, full, options),
            changed_by=options.changed_by,
            change_type=options.change_type,
            agent=options.agent_id,
            encrypt=self._encrypted(options),
        )
        return self._context(value)

    async def _update(self, full: str, data: Any, options: Options) -> StoredContext:
        hf = await self._open()
        change_type = _change_type(options.change_type)

        def change(current: Any) -> Any:
            changed = change_data(current, data, change_type)
            if isinstance(changed, str | bytes | bytearray | memoryview):
                raise _OtherThanJson
            return changed

        try:
            value = await hf.keys.update(
                full,
                change,
                default=Absent,
                expected_version=options.expected_version,
                tags=options.tags,
                session=options.session_id,
                ttl=await self._renewed(hf, full, options),
                changed_by=options.changed_by,
                change_type=change_type,
                agent=options.agent_id,
                encrypt=self._encrypted(options),
            )
        except (_OtherThanJson, InvalidBodyError):
            value = await self._update_any(hf, full, data, options, change_type)
        return self._context(value)

    async def _update_any(
        self, hf: Holdfast, full: str, data: Any, options: Options, change_type: ChangeType
    ) -> KeyValue:
        """The same for text and bytes, which ``keys.update`` does not take: read, change, write if it is the same."""
        lost = 0
        while True:
            try:
                old = await hf.keys.get(full)
            except NotFoundError:
                old = None
            body, content_type = _body_of(change_data(Absent if old is None else old.body, data, change_type))
            encrypt = self._encrypted(options)
            if encrypt is None and old is not None and old.context.encrypted:
                encrypt = True
            expected = options.expected_version
            try:
                return await hf.keys.put(
                    full,
                    body,
                    content_type=content_type,
                    expected_version=expected if expected is not None else 0 if old is None else old.version,
                    tags=options.tags if options.tags is not None else () if old is None else old.tags,
                    session=options.session_id or (None if old is None else old.session),
                    ttl=await self._renewed(hf, full, options),
                    changed_by=options.changed_by,
                    change_type=change_type,
                    agent=options.agent_id,
                    encrypt=encrypt,
                )
            except VersionConflictError:
                lost += 1
                if expected is not None or lost >= _ATTEMPTS:
                    raise

    async def _delete(self, full: str, options: Options) -> bool:
        hf = await self._open()
        try:
            await hf.keys.delete(
                full,
                expected_version=options.expected_version,
                changed_by=options.changed_by,
                change_type=options.change_type,
                agent=options.agent_id,
            )
        except NotFoundError:
            return False
        return True

    async def _each(self, keys: Iterable[str], act: Callable[[str], Awaitable[T]]) -> dict[str, T]:
        names = list(dict.fromkeys(keys))
        for name in names:
            self._full(name)
        limiter = asyncio.Semaphore(_AT_ONCE)

        async def run(name: str) -> T:
            async with limiter:
                return await act(name)

        outcomes = await asyncio.gather(*(run(name) for name in names), return_exceptions=True)
        done: dict[str, T] = {}
        for name, outcome in zip(names, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                raise outcome
            done[name] = outcome
        return done

    async def _open(self) -> Holdfast:
        if self._is_closed:
            raise ClosedError("this context client is closed", hint="make a new one")
        if self._client is not None:
            return self._client
        if self._connection is None or self._connection.has_failed:
            self._connection = OwnedConnection(self._url, self._namespace, self._agent)
        # Shielded: one caller's cancel is not the end of a connection that others wait for.
        return await asyncio.shield(self._connection.ready)

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _encrypted(self, options: Options) -> bool | None:
        if options.encrypt is not None:
            return options.encrypt
        if self._encrypt is not None:
            return self._encrypt
        return True if encryption_by_default() else None

    async def _ttl(self, hf: Holdfast, full: str, options: Options) -> float | timedelta | None:
        if options.ttl is not None:
            return options.ttl
        policies = await hf.keys.policies()
        is_set = any(full.startswith(prefix) and each.ttl_s is not None for prefix, each in policies.prefixes.items())
        return None if is_set else DEFAULT_TTL_S

    async def _renewed(self, hf: Holdfast, full: str, options: Options) -> float | timedelta | None:
        """The time to live of a change: as given, else as long as the context was to live before."""
        head = None if options.ttl is not None else await hf.keys.head(full)
        if head is None or head.deleted:
            return await self._ttl(hf, full, options)
        return math.inf if head.expires_at is None else _lifetime_s(head, head.expires_at)

    async def _tell(self, version: KeyVersion) -> None:
        change = self._change(version)
        for callback in list(self._callbacks):
            try:
                outcome = callback(dict(change))
                if inspect.isawaitable(outcome):
                    await outcome
            except Exception:
                logger.exception("a callback failed", extra={"action": "callback_failed", "key": version.key})

    def _change(self, version: KeyVersion) -> Change:
        return {
            "key": version.key.removeprefix(self._prefix),
            "version": version.version,
            "timestamp": iso_from_ms(ms_from_utc(version.timestamp)),
            "op": version.op,
            "deleted": version.deleted,
            "tags": list(version.tags),
            "session_id": version.session,
            "agent_id": version.agent,
            "changed_by": version.changed_by,
            "change_type": version.change_type,
        }

    def _context(self, value: KeyValue) -> StoredContext:
        return StoredContext(data=value.body, **self._members(value))

    def _version(self, version: KeyVersion) -> ContextVersion:
        return ContextVersion(**self._members(version))

    def _members(self, version: KeyVersion) -> dict[str, Any]:
        return {
            "key": version.key.removeprefix(self._prefix),
            "version": version.version,
            "op": version.op,
            "timestamp": version.timestamp,
            "tags": version.tags,
            "session_id": version.session,
            "agent_id": version.agent,
            "changed_by": version.changed_by,
            "change_type": version.change_type,
            "expires_at": version.expires_at,
            "ref": version.ref,
        }


class _OtherThanJson(Exception):  # noqa: N818  a turn that an update takes, not an error for users
    """A change leads to text or bytes."""


def _body_of(data: Any) -> tuple[Any, str | None]:
    """What to put: text as JSON, like all data but bytes, so that an object may become a text and back."""
    return (encode_json(data, "data"), JSON) if isinstance(data, str) else (data, None)


def _change_type(given: str | None) -> ChangeType:
    for change_type in CHANGE_TYPES:
        if given in (None, change_type):
            return "replace" if given is None else change_type
    raise InvalidFieldError(
        f"there is no change type {repr(given)[:40]}", field="change_type", hint=f"use {', '.join(CHANGE_TYPES)}"
    )


def _lifetime_s(head: KeyVersion, expires_at: datetime) -> float:
    """How long a version was to live when it was stored."""
    lifetime_s = (expires_at - (head.stored_at or head.timestamp)).total_seconds()
    # Storing takes some milliseconds: in whole seconds the time does not shrink from change to change.
    return max(_SHORTEST_S, round(lifetime_s) if lifetime_s > _COARSE_S else lifetime_s)


__all__ = ["DEFAULT_TTL_S", "ContextClient"]
