"""``hf.keys``: named contexts, whose content changes and whose every version stays."""

from __future__ import annotations

import asyncio
import builtins
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import jsonpatch

from holdfast.client import key_arguments, key_changes
from holdfast.client.key_arguments import Ttl
from holdfast.client.key_changes import UNCHANGED
from holdfast.client.key_history import KeyHistory
from holdfast.client.key_model import KeyValue, KeyVersion, is_live, is_tombstone
from holdfast.client.key_policies import PrefixPolicies
from holdfast.client.key_writer import Decide, KeyWriter, Written, absent
from holdfast.client.lineage import note_read, note_stored
from holdfast.client.model import Context
from holdfast.client.watch import KeyWatch
from holdfast.schemas.bodies import Body, encode_body
from holdfast.schemas.errors import InvalidBodyError, InvalidFieldError, NotFoundError, RetryError
from holdfast.schemas.names import check_key, check_kind
from holdfast.schemas.policies import POLICIES_KEY, KeyPolicy, Policies
from holdfast.streams.hot import NewContext

if TYPE_CHECKING:
    from holdfast.client.growing import GrowingBodies
    from holdfast.client.key_cold import ColdKeySource
    from holdfast.client.key_ring import KeyRing
    from holdfast.schemas.rows import KeyVersionRow, Op
    from holdfast.streams.connection import Connection
    from holdfast.streams.key_chains import Head
    from holdfast.streams.key_log import KeyLog
    from holdfast.streams.server_clock import ServerClock

DEFAULT_KIND: Final = "context"
_PAGE: Final = 1_000


class Keys:
    """The named contexts of one namespace.  ``hf.keys`` of a client; safe to use from many tasks of one event loop.

    A key is text of 1 to 768 UTF-8 bytes; dots part its segments.  Every write is a version, numbered from 1 without
    gaps, written by compare-and-set, durable when the call returns, and seen by every read that begins after.  A
    deleted or expired key reads as absent; its history stays.
    """

    def __init__(
        self,
        connection: Connection,
        namespace: str,
        agent: str,
        *,
        log: KeyLog,
        bodies: GrowingBodies,
        cold: ColdKeySource,
        clock: ServerClock,
        ring: KeyRing,
    ) -> None:
        self._connection = connection
        self._namespace = namespace
        self._agent = agent
        self._log = log
        self._bodies = bodies
        self._clock = clock
        self._ring = ring
        self._writer = KeyWriter(namespace, log, bodies, cold, clock, ring)
        self._history = KeyHistory(namespace, log, cold)
        self._policies = PrefixPolicies(self)

    async def put(
        self,
        key: str,
        body: Body,
        *,
        expected_version: int | None = None,
        kind: str = DEFAULT_KIND,
        content_type: str | None = None,
        tags: Iterable[str] = (),
        session: str | None = None,
        ttl: Ttl = None,
        changed_by: str | None = None,
        change_type: str | None = None,
        agent: str | None = None,
        lineage: Mapping[str, Any] | None = None,
        encrypt: bool | None = None,
    ) -> KeyValue:
        """Writes ``body`` as the newest version and returns it.

        ``expected_version``: only if that is the newest version now, 0 standing for "there is none" (never written,
        deleted or expired); else VersionConflictError, which carries both.  Tags, session and expiry are those given
        here, not those of the version before; session and agent not given are those of ``lineage``, else of the
        current event.  ``encrypt`` seals the body (None: as the prefix's policy says).
        Raises InputError naming what cannot be stored, UnknownOutcomeError without an acknowledgement.
        """
        raw, chosen_type = encode_body(body, content_type)
        policy = await self._policy(check_key(key))
        context = NewContext(namespace=self._namespace, kind=check_kind(kind), body=raw, content_type=chosen_type)
        meta = key_changes.meta_of(
            self._agent, tags, session, ttl, changed_by, change_type, agent, lineage, is_whole=True
        )
        decide = key_changes.put(
            key, context, meta, expected_version, policy, encrypt=bool(policy.encrypt) if encrypt is None else encrypt
        )
        return await self._value(await self._change(key, decide))

    async def get(self, key: str, version: int | None = None, *, as_of: datetime | None = None) -> KeyValue:
        """Returns the newest version with its body; or that of a number; or the newest one at a time.

        ``as_of`` is a time of the server's: of storing.  Raises NotFoundError when the key has no body then: never
        written, deleted or expired; UnavailableError when what is asked for has left the hot tier and no resolver
        answers.
        """
        check_key(key)
        if version is not None and as_of is not None:
            raise InvalidFieldError("version and as_of exclude each other", field="as_of", hint="give one of the two")
        if version is not None:
            found = await self._history.version(key, key_arguments.check_version(version))
            if found is None or found.row is None:
                raise NotFoundError(f"the key {key!r} has no version {version}", field="version")
            if is_tombstone(found.row):
                raise NotFoundError(f"version {version} of {key!r} is a tombstone ({found.row.op})", field="version")
            return await self._loaded(found)
        if as_of is not None:
            at_ms = key_arguments.check_moment_ms(as_of, "as_of")
            found = await self._history.as_of(key, at_ms)
            if found.row is None or not is_live(found.row, at_ms):
                raise NotFoundError(f"there was nothing under the key {key!r} at {as_of.isoformat()}", field="as_of")
            return await self._loaded(found)
        head = await self._log.head(self._namespace, key)
        if head.row is None or not is_live(head.row, await self._clock.now_ms()):
            raise absent(key)
        return await self._loaded(head)

    async def head(self, key: str) -> KeyVersion | None:
        """Returns the newest version whatever it is, a tombstone too; None when there never was one."""
        head = await self._log.head(self._namespace, check_key(key))
        row = await self._writer.last_row(key, head)
        return None if row is None else await self._version(row)

    async def get_many(self, keys: Iterable[str]) -> dict[str, KeyValue]:
        """Returns the newest versions of many keys; those that have no body are left out.  Errors as of :meth:`get`."""
        wanted = [check_key(key) for key in dict.fromkeys(keys)]
        now = await self._clock.now_ms()
        heads = await self._log.heads(self._namespace, wanted)
        live = [key for key in wanted if key in heads and is_live(heads[key].row, now)]
        await self._epoch()  # once, not by each of them
        values = await asyncio.gather(*(self._loaded(heads[key]) for key in live))
        return dict(zip(live, values, strict=True))

    async def patch(
        self,
        key: str,
        merge: Mapping[str, Any],
        *,
        expected_version: int | None = None,
        tags: Iterable[str] | None = None,
        session: str | None = None,
        ttl: Ttl = None,
        changed_by: str | None = None,
        change_type: str | None = None,
        agent: str | None = None,
        lineage: Mapping[str, Any] | None = None,
    ) -> KeyValue:
        """Merges an object into a JSON body (RFC 7386: a null removes a member) and returns the new version.

        Patches of different members by any number of writers all survive.  An absent key begins as ``{}``.  Tags,
        session and expiry stay as they are unless given.  Raises InvalidBodyError when the body is not JSON.
        """
        if not isinstance(merge, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers without types
            raise InvalidBodyError(
                f"a patch is an object, not {type(merge).__name__}", field="merge", hint="use put to replace a body"
            )
        return await self.update(
            key,
            key_changes.merged(merge),
            default={},
            expected_version=expected_version,
            tags=tags,
            session=session,
            ttl=ttl,
            changed_by=changed_by,
            change_type=change_type,
            agent=agent,
            lineage=lineage,
        )

    async def append(
        self,
        key: str,
        item: Any,
        *,
        expected_version: int | None = None,
        tags: Iterable[str] | None = None,
        session: str | None = None,
        ttl: Ttl = None,
        changed_by: str | None = None,
        change_type: str | None = None,
        agent: str | None = None,
        lineage: Mapping[str, Any] | None = None,
    ) -> KeyValue:
        """Appends an item to a list and returns the new version; an absent key begins as ``[]``.

        Raises InvalidBodyError when the body is no list.  The rest as of :meth:`patch`.
        """

        return await self.update(
            key,
            key_changes.appended(key, item),
            default=[],
            expected_version=expected_version,
            tags=tags,
            session=session,
            ttl=ttl,
            changed_by=changed_by,
            change_type=change_type,
            agent=agent,
            lineage=lineage,
        )

    async def update(
        self,
        key: str,
        change: Callable[[Any], Any],
        *,
        op: Op = "patch",
        default: Any = None,
        expected_version: int | None = None,
        kind: str = DEFAULT_KIND,
        tags: Iterable[str] | None = None,
        session: str | None = None,
        ttl: Ttl = None,
        changed_by: str | None = None,
        change_type: str | None = None,
        agent: str | None = None,
        lineage: Mapping[str, Any] | None = None,
        encrypt: bool | None = None,
    ) -> KeyValue:
        """Writes ``change(body)`` as the newest version and returns it: read, modify and write that loses no update.

        ``change`` gets the decoded body, a copy of its own, or a copy of ``default`` when there is none; it is called
        again when another process was faster, so it must not do anything else.  Returning ``UNCHANGED`` writes
        nothing: the present version is returned, or NotFoundError raised.  ``op`` is what the version says.  ``kind``
        and ``encrypt`` are those of a key that begins here; else they stay as they are.  What ``change`` raises is
        raised; the rest as of :meth:`patch`.
        """
        policy = await self._policy(check_key(key))
        meta = key_changes.meta_of(self._agent, tags, session, ttl, changed_by, change_type, agent, lineage)
        decide = key_changes.update(
            key,
            change,
            meta,
            expected_version,
            policy,
            namespace=self._namespace,
            op=op,
            default=default,
            kind=check_kind(kind),
            encrypt=encrypt,
        )
        return await self._value(await self._change(key, decide, needs_body=True))

    async def delete(
        self,
        key: str,
        *,
        expected_version: int | None = None,
        changed_by: str | None = None,
        change_type: str | None = None,
        agent: str | None = None,
        lineage: Mapping[str, Any] | None = None,
    ) -> KeyVersion:
        """Writes a tombstone and returns it: the key reads as absent, its history stays.

        Raises NotFoundError when there is nothing to delete, VersionConflictError as :meth:`put`.
        """
        meta = key_changes.meta_of(self._agent, None, None, None, changed_by, change_type, agent, lineage)
        written = await self._change(check_key(key), key_changes.delete(key, meta, expected_version))
        return await self._version(written.row)

    async def rollback(
        self,
        key: str,
        version: int,
        *,
        expected_version: int | None = None,
        ttl: Ttl = None,
        changed_by: str | None = None,
        change_type: str | None = None,
        agent: str | None = None,
        lineage: Mapping[str, Any] | None = None,
    ) -> KeyValue:
        """Writes a new version that is equal to an old one: the same body, tags and session.  Also of a deleted key.

        The newest version's expiry stays, unless ``ttl`` is given.  Raises NotFoundError when there is no such version,
        or when it is a tombstone.
        """
        old = await self.get(key, version)
        meta = key_changes.meta_of(self._agent, None, None, ttl, changed_by, change_type, agent, lineage)
        policy = await self._policy(key)
        decide = key_changes.rollback(key, old.row, meta, expected_version, policy)
        written = await self._change(key, decide)
        return KeyValue(written.row, self._load, old.context, epoch=await self._epoch())

    async def history(
        self, key: str, *, before: int | None = None, limit: int | None = None
    ) -> AsyncGenerator[KeyVersion]:
        """Yields the versions of a key, hot and cold, newest first, each read when it is asked for.

        ``before``: only versions below that number.  Nothing for a key that was never written.  Raises
        UnavailableError when the older ones have left the hot tier and no resolver answers.
        """
        check_key(key)
        left = math.inf if limit is None else limit
        if left <= 0:
            return
        async for row in self._history.newest_first(
            key, None if before is None else key_arguments.check_version(before, "before")
        ):
            yield await self._version(row)
            left -= 1
            if left <= 0:
                return

    async def diff(self, key: str, v1: int, v2: int) -> builtins.list[dict[str, Any]]:
        """Returns the operations (RFC 6902) that make version ``v2`` of version ``v1``.

        Raises InvalidBodyError when one of them is not JSON, NotFoundError when one has no body.
        """
        one, other = await self.get(key, v1), await self.get(key, v2)
        bodies = [key_changes.json_body(key, value.context) for value in (one, other)]
        patch = await asyncio.to_thread(jsonpatch.make_patch, *bodies)
        operations: builtins.list[dict[str, Any]] = list(patch)
        return operations

    async def list(
        self,
        prefix: str = "",
        *,
        tags: Iterable[str] = (),
        session: str | None = None,
        agent: str | None = None,
    ) -> AsyncGenerator[KeyVersion]:
        """Yields the newest version of every key that begins with ``prefix`` and has a body, in order of key.

        ``tags``: of those that have all of these; ``session``, ``agent``: of those written so last.
        """
        wanted = frozenset(key_arguments.check_tags(tags))
        keys = await self._log.keys(self._namespace, key_arguments.check_prefix(prefix))
        for start in range(0, len(keys), _PAGE):
            page = keys[start : start + _PAGE]
            heads = await self._log.heads(self._namespace, page)
            now = await self._clock.now_ms()
            for key in page:
                row = heads[key].row if key in heads else None
                if row is None or not is_live(row, now) or not wanted.issubset(row.tags):
                    continue
                if session not in (None, row.session_id) or agent not in (None, row.agent_id):
                    continue
                yield await self._version(row)

    def watch(
        self,
        prefix: str = "",
        *,
        after: str | None = None,
        from_version: int | None = None,
        initial: bool = False,
    ) -> KeyWatch:
        """Returns an iterator over the changes of all keys that begin with ``prefix``, each at least once, in order.

        Use it as ``async for version in hf.keys.watch("a.")``, or ``async with`` it first: then nothing after the entry
        is missed.  ``after``: the ``position`` of a version, to go on behind it.  ``from_version``: of the one key that
        is named exactly ``prefix``, from that version on, also what is in the lake.  ``initial``: the present versions
        first.  After a reconnect it goes on where it was; what was superseded and trimmed meanwhile is left out.
        """
        return KeyWatch(
            self._connection,
            self._namespace,
            prefix,
            version_of=lambda row: KeyVersion(row, self._load),
            earlier=self._earlier,
            present=lambda: self.list(prefix),
            after=after,
            from_version=from_version,
            initial=initial,
        )

    async def commit(
        self,
        bodies: Mapping[str, Body],
        expected: Mapping[str, int] | None = None,
        *,
        deletes: Iterable[str] = (),
        kind: str = DEFAULT_KIND,
        tags: Iterable[str] = (),
        session: str | None = None,
        ttl: Ttl = None,
        changed_by: str | None = None,
        change_type: str | None = None,
        agent: str | None = None,
        lineage: Mapping[str, Any] | None = None,
        encrypt: bool | None = None,
    ) -> dict[str, KeyVersion]:
        """Writes all keys or none, in one atomic batch, and returns the new versions by key.

        ``expected`` names versions as :meth:`put` does; a key that is not in it is written whatever its version is,
        but still all or none.  ``deletes`` are keys that get a tombstone; one that has no body is an error.  At most
        500 keys.  Raises VersionConflictError naming the first key that differs; nothing was written then.
        """
        meta = key_changes.meta_of(
            self._agent, tags, session, ttl, changed_by, change_type, agent, lineage, is_whole=True
        )
        decisions = key_changes.commit(
            self._namespace,
            bodies,
            deletes,
            expected or {},
            meta,
            await self.policies(),
            kind=check_kind(kind),
            encrypt=encrypt,
        )
        written = await self._writer.commit(decisions)
        return {key: await self._version(row) for key, row in written.items()}

    async def import_version(self, row: KeyVersionRow) -> KeyVersionRow:
        """Writes a version as it is told, with its number; its body must be stored already.  For importers.

        Raises VersionConflictError unless it follows the newest version, or the key was never written.
        """
        return (await self.import_versions([row]))[0]

    async def import_versions(self, rows: Sequence[KeyVersionRow]) -> builtins.list[KeyVersionRow]:
        """As :meth:`import_version`, of consecutive versions of one key, at most 500: all or none."""
        return await self._writer.import_versions(rows)

    async def policies(self) -> Policies:
        """Returns what holds for the prefixes of this namespace, as it was at most ten seconds ago."""
        return await self._policies.get()

    async def set_policy(self, prefix: str, policy: KeyPolicy | None) -> Policies:
        """Sets, or with None takes away, what holds for the keys that begin with ``prefix``; returns all policies.

        Other clients and the workers see it within some ten seconds.
        """
        return await self._policies.set(prefix, policy)

    async def close(self) -> None:
        """Waits until every write that was handed in has its outcome."""
        await self._writer.close()
        await self._log.close()

    async def _policy(self, key: str) -> KeyPolicy:
        # The policies themselves are under none: they would be read before they are written.
        return KeyPolicy() if key == POLICIES_KEY else (await self.policies()).policy_for(key)

    async def _change(self, key: str, decide: Decide, *, needs_body: bool = False) -> Written:
        return await self._writer.change(key, decide, needs_body=needs_body)

    async def _earlier(self, from_version: int, key: str) -> AsyncIterator[KeyVersion]:
        async for row in self._history.from_version(key, from_version):
            yield await self._version(row)

    async def _loaded(self, head: Head) -> KeyValue:
        row = head.row
        if row is None or row.ref is None:
            raise NotFoundError("the version points at nothing", field="version")
        grown, tier = await self._bodies.load(row.ref, head.at)
        note_read(grown.row)
        return KeyValue(row, self._load, Context(grown.row, tier, self._ring), epoch=await self._epoch())

    async def _load(self, row: KeyVersionRow) -> Context:
        if row.ref is None:
            raise NotFoundError(f"version {row.version} of {row.key!r} is a tombstone ({row.op})", field="version")
        grown, tier = await self._bodies.load(row.ref)
        note_read(grown.row)
        return Context(grown.row, tier, self._ring)

    async def _value(self, written: Written) -> KeyValue:
        assert written.context is not None
        note_stored(written.context)
        return KeyValue(written.row, self._load, written.context, epoch=await self._epoch())

    async def _version(self, row: KeyVersionRow) -> KeyVersion:
        return KeyVersion(row, self._load, epoch=await self._epoch())

    async def _epoch(self) -> str:
        try:
            return (await self._writer.info()).epoch
        except RetryError:
            return ""  # a position is told where it is known: what was read or written stands without it


__all__ = ["UNCHANGED", "Keys", "Ttl"]
