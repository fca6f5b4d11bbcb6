"""The resolver's endpoints for named contexts: ``ctx.<ns>.key.get``, ``put``, ``patch`` … for any language.

They do what ``hf.keys`` of the SDK does, by the same code, with the lake at hand instead of a resolver to ask.  The
resolver has no keys of encryption: a sealed body is handed on as it is, and what has to be sealed is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client.encryption import SEALED, key_id_of
from holdfast.client.key_model import KeyVersion, is_live, is_tombstone
from holdfast.client.key_writer import absent
from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidFieldError, NotFoundError, TooLargeError
from holdfast.schemas.ids import MAX_MS
from holdfast.schemas.names import check_key
from holdfast.schemas.refs import parse_ref
from holdfast.streams.server_clock import ServerClock
from holdfast.streams.service import Call, Handler, decode_request
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import KEYS_STREAM
from holdfast.workers.key_requests import (
    KeyAppendRequest,
    KeyCommitRequest,
    KeyDeleteRequest,
    KeyDiffRequest,
    KeyGetRequest,
    KeyHistoryRequest,
    KeyListRequest,
    KeyPatchRequest,
    KeyPutRequest,
    KeyRollbackRequest,
    body_members,
    body_of_put,
    decoded,
    merge_of,
    row_members,
    ttl_of,
    version_members,
)
from holdfast.workers.key_spaces import KeySpace, KeySpaces
from holdfast.workers.requests import time_ms

if TYPE_CHECKING:
    from holdfast.client.keys import Keys
    from holdfast.schemas.bodies import Body
    from holdfast.schemas.rows import KeyVersionRow
    from holdfast.streams.connection import Connection
    from holdfast.streams.hot import HotTier
    from holdfast.streams.key_log import KeyLog
    from holdfast.workers.contexts import ContextReader
    from holdfast.workers.key_reader import ColdKeys

_UPDATES: Final = 64
"""Changes under way at once: each may hold a body and its next version.  Those of one key are written together."""

_HEAVY: Final = 4
"""Comparisons under way at once: each holds two decoded bodies."""

_PAGE: Final = 1_000
"""Keys whose heads are read at once."""

_EPOCH_S: Final = 60.0
"""How long the stream's epoch is believed to be what it was: it is told with every version."""

_GET: Final = msgspec.json.Decoder(KeyGetRequest)
_PUT: Final = msgspec.json.Decoder(KeyPutRequest)
_PATCH: Final = msgspec.json.Decoder(KeyPatchRequest)
_APPEND: Final = msgspec.json.Decoder(KeyAppendRequest)
_DELETE: Final = msgspec.json.Decoder(KeyDeleteRequest)
_ROLLBACK: Final = msgspec.json.Decoder(KeyRollbackRequest)
_HISTORY: Final = msgspec.json.Decoder(KeyHistoryRequest)
_LIST: Final = msgspec.json.Decoder(KeyListRequest)
_DIFF: Final = msgspec.json.Decoder(KeyDiffRequest)
_COMMIT: Final = msgspec.json.Decoder(KeyCommitRequest)


class KeyEndpoints:
    """The endpoints for named contexts of every namespace.  ``contexts`` and ``cold`` are the caller's to close."""

    def __init__(
        self, connection: Connection, hot: HotTier, contexts: ContextReader, cold: ColdKeys, *, replicas: int = 1
    ) -> None:
        self._connection = connection
        self._contexts = contexts
        self._cold = cold
        self._clock = ServerClock(connection)
        self._spaces = KeySpaces(connection, hot, contexts, cold, self._clock, replicas=replicas)
        self._known_epoch: tuple[float, str] | None = None
        self._updates = asyncio.Semaphore(_UPDATES)
        self._heavy = asyncio.Semaphore(_HEAVY)

    def endpoints(self) -> dict[str, tuple[str, Handler]]:
        """Returns every endpoint: name → (subject, handler)."""
        handlers: dict[str, Handler] = {
            "get": self.get,
            "put": self.put,
            "patch": self.patch,
            "append": self.append,
            "delete": self.delete,
            "rollback": self.rollback,
            "history": self.history,
            "list": self.list_keys,
            "diff": self.diff,
            "commit": self.commit,
        }
        return {f"key_{name}": (f"ctx.*.key.{name}", handler) for name, handler in handlers.items()}

    async def close(self) -> None:
        """Waits until every write that was handed in has its outcome."""
        await self._spaces.close()

    async def get(self, call: Call) -> None:
        """``{"key"}`` → the newest version and its body; ``version`` and ``as_of`` ask for another one."""
        request: KeyGetRequest = decode_request(call.data, _GET)
        check_key(request.key)
        if request.version is not None and request.as_of is not None:
            raise InvalidFieldError("version and as_of exclude each other", field="as_of", hint="give one of the two")
        at_ms = None if request.as_of is None else _time(request.as_of)
        if request.cold:
            if request.body:
                raise InvalidFieldError("cold versions come without their bodies", field="body", hint="send false")
            row = await self._cold_row(call.namespace, request, at_ms)
            return await call.reply(msgspec.json.encode(row_members(row)))
        async with self._spaces.use(call.namespace) as space:
            row = await self._row(space, call.namespace, request, at_ms)
        answer = version_members(row, await self._epoch())
        if request.body:
            answer |= await self._body(call.namespace, row)
        return await call.reply(_within(answer))

    async def put(self, call: Call) -> None:
        """``{"key", "body"}`` → the version written."""
        request: KeyPutRequest = decode_request(call.data, _PUT)
        check_key(request.key)
        context = body_of_put(call.namespace, request)
        is_sealed = context.content_type == SEALED
        if is_sealed:
            key_id_of(context.body)  # a caller that has the key may seal by itself
        await self._write(
            call,
            lambda keys: keys.put(
                request.key,
                context.body,
                expected_version=request.expected_version,
                kind=context.kind,
                content_type=context.content_type,
                tags=request.tags,
                session=request.session_id,
                ttl=ttl_of(request.ttl),
                changed_by=request.changed_by,
                change_type=request.change_type,
                agent=request.agent_id,
                encrypt=False if is_sealed else None,
            ),
        )

    async def patch(self, call: Call) -> None:
        """``{"key", "merge"}`` → the version written."""
        request: KeyPatchRequest = decode_request(call.data, _PATCH)
        merge = merge_of(request.merge)
        await self._write(call, lambda keys: keys.patch(request.key, merge, **_changes(request)))

    async def append(self, call: Call) -> None:
        """``{"key", "item"}`` → the version written."""
        request: KeyAppendRequest = decode_request(call.data, _APPEND)
        item = decoded(request.item, "item")
        await self._write(call, lambda keys: keys.append(request.key, item, **_changes(request)))

    async def delete(self, call: Call) -> None:
        """``{"key"}`` → the tombstone written."""
        request: KeyDeleteRequest = decode_request(call.data, _DELETE)
        await self._write(
            call,
            lambda keys: keys.delete(
                request.key,
                expected_version=request.expected_version,
                changed_by=request.changed_by,
                change_type=request.change_type,
                agent=request.agent_id,
            ),
        )

    async def rollback(self, call: Call) -> None:
        """``{"key", "version"}`` → the version written, equal to that one."""
        request: KeyRollbackRequest = decode_request(call.data, _ROLLBACK)
        await self._write(
            call,
            lambda keys: keys.rollback(
                request.key,
                request.version,
                expected_version=request.expected_version,
                changed_by=request.changed_by,
                change_type=request.change_type,
                agent=request.agent_id,
            ),
        )

    async def history(self, call: Call) -> None:
        """``{"key"}`` → ``{"versions": […], "next"}``, newest first; ``next``: the ``before`` to go on with."""
        request: KeyHistoryRequest = decode_request(call.data, _HISTORY)
        check_key(request.key)
        answer = _Page()
        if request.cold:
            rows = await self._cold.page(call.namespace, request.key, request.before, request.limit)
            for row in rows:
                if not answer.add(row_members(row)):
                    break
            is_end = not rows
        else:
            is_end = True
            epoch = await self._epoch()
            async with self._spaces.use(call.namespace) as space:
                async for version in space.keys.history(request.key, before=request.before, limit=request.limit + 1):
                    # One more than asked for says that there are more.
                    if len(answer.items) == request.limit or not answer.add(version_members(version.row, epoch)):
                        is_end = False
                        break
        last = answer.last("version")
        await call.reply(msgspec.json.encode({"versions": answer.items, "next": None if is_end or last == 1 else last}))

    async def list_keys(self, call: Call) -> None:
        """Conditions → ``{"keys": […], "cursor"}``, in order of key; ``cursor`` goes on, null at the end."""
        request: KeyListRequest = decode_request(call.data, _LIST)
        answer = _Page()
        cursor: str | None = None
        epoch = await self._epoch()
        async with (
            self._spaces.use(call.namespace) as space,
            aclosing(self._live_rows(space.log, call.namespace, request)) as rows,
        ):
            async for row in rows:
                # One more than asked for says that there are more.
                if len(answer.items) == request.limit or not answer.add(version_members(row, epoch)):
                    cursor = answer.last("key")
                    break
        await call.reply(msgspec.json.encode({"keys": answer.items, "cursor": cursor}))

    async def diff(self, call: Call) -> None:
        """``{"key", "v1", "v2"}`` → ``{"operations": […]}``, RFC 6902."""
        request: KeyDiffRequest = decode_request(call.data, _DIFF)
        async with self._spaces.use(call.namespace) as space, self._heavy:
            operations = await space.keys.diff(request.key, request.v1, request.v2)
        await call.reply(_within({"operations": operations}))

    async def commit(self, call: Call) -> None:
        """``{"bodies": {key: body}, "deletes": [key]}`` → ``{"versions": {key: version}}``: all are written or none."""
        request: KeyCommitRequest = decode_request(call.data, _COMMIT)
        if not request.bodies and not request.deletes:
            raise InvalidFieldError("the commit is empty", field="bodies", hint='send {"bodies": {"key": …}}')
        bodies: dict[str, Body] = {key: decoded(raw, "bodies") for key, raw in request.bodies.items()}
        async with self._spaces.use(call.namespace) as space, self._updates:
            written = await space.keys.commit(
                bodies,
                request.expected,
                deletes=request.deletes,
                tags=request.tags,
                session=request.session_id,
                ttl=ttl_of(request.ttl),
                changed_by=request.changed_by,
                change_type=request.change_type,
                agent=request.agent_id,
            )
        epoch = await self._epoch()
        versions = {key: version_members(version.row, epoch) for key, version in written.items()}
        await call.reply(_within({"versions": versions}))

    async def _write(self, call: Call, write: Callable[[Keys], Awaitable[KeyVersion]]) -> None:
        async with self._spaces.use(call.namespace) as space, self._updates:
            written = await write(space.keys)
        await call.reply(_within(version_members(written.row, await self._epoch())))

    async def _row(self, space: KeySpace, namespace: str, request: KeyGetRequest, at_ms: int | None) -> KeyVersionRow:
        """The version that is asked for, without its body: that may be larger than any answer."""
        key = request.key
        if request.version is not None:
            found = await space.history.version(key, request.version)
            if found is None or found.row is None:
                raise NotFoundError(f"the key {key!r} has no version {request.version}", field="version")
            if is_tombstone(found.row):
                raise NotFoundError(
                    f"version {request.version} of {key!r} is a tombstone ({found.row.op})", field="version"
                )
            return found.row
        if at_ms is not None:
            row = (await space.history.as_of(key, at_ms)).row
            if row is None or not is_live(row, at_ms):
                raise NotFoundError(f"there was nothing under the key {key!r} at that time", field="as_of")
            return row
        row = (await space.log.head(namespace, key)).row
        if row is None or not is_live(row, await self._clock.now_ms()):
            raise absent(key)
        return row

    async def _live_rows(self, log: KeyLog, namespace: str, request: KeyListRequest) -> AsyncGenerator[KeyVersionRow]:
        keys = await log.keys(namespace, request.prefix)
        wanted = [key for key in keys if request.cursor is None or key > request.cursor]
        tags = frozenset(request.tags)
        for start in range(0, len(wanted), _PAGE):
            page = wanted[start : start + _PAGE]
            heads = await log.heads(namespace, page)
            now = await self._clock.now_ms()
            for key in page:
                row = heads[key].row if key in heads else None
                if (
                    row is not None
                    and is_live(row, now)
                    and tags.issubset(row.tags)
                    and request.session_id in (None, row.session_id)
                    and request.agent_id in (None, row.agent_id)
                ):
                    yield row

    async def _cold_row(self, namespace: str, request: KeyGetRequest, at_ms: int | None) -> KeyVersionRow:
        if request.version is not None:
            row = await self._cold.get(namespace, request.key, request.version)
        elif at_ms is not None:
            row = await self._cold.as_of(namespace, request.key, at_ms)
        else:
            row = await self._cold.last(namespace, request.key)
        if row is None:
            raise NotFoundError(f"the lake holds no such version of {request.key!r}", field="key")
        return row

    async def _body(self, namespace: str, row: KeyVersionRow) -> dict[str, Any]:
        assert row.ref is not None, "a live version points at a body"
        digest = parse_ref(row.ref).digest
        found, failed = await self._contexts.get_many(namespace, [digest], max_bytes=limits.REPLY_BYTES)
        if digest in failed:
            raise failed[digest]
        if digest not in found or found[digest].row.ref != row.ref:
            raise NotFoundError(f"the body {row.ref} is stored nowhere", field="ref", hint="run 'holdfast verify'")
        item = found[digest]
        return body_members(item.row, item.tier)

    async def _epoch(self) -> str:
        now_s = asyncio.get_running_loop().time()
        if self._known_epoch is None or now_s - self._known_epoch[0] > _EPOCH_S:
            self._known_epoch = now_s, (await stream_info(self._connection, KEYS_STREAM)).epoch
        return self._known_epoch[1]


class _Page:
    """Items of an answer, as many as it has room for."""

    def __init__(self) -> None:
        self.items: list[msgspec.Raw] = []
        self._last: dict[str, Any] = {}
        self._size = 0

    def add(self, members: dict[str, Any]) -> bool:
        """Takes an item; returns False when there is no room for it.  The first one always goes."""
        encoded = msgspec.json.encode(members)
        self._size += len(encoded) + 1
        # The frame around the items, and a cursor, take less than 8 KiB.
        if self._size > limits.REPLY_BYTES - 8 * limits.KIB and self.items:
            return False
        self.items.append(msgspec.Raw(encoded))
        self._last = members
        return True

    def last(self, member: str) -> Any:
        """Returns a member of the last item; None when there is none."""
        return self._last.get(member)


def _changes(request: KeyPatchRequest | KeyAppendRequest) -> dict[str, Any]:
    return {
        "expected_version": request.expected_version,
        "tags": request.tags,
        "session": request.session_id,
        "ttl": ttl_of(request.ttl),
        "changed_by": request.changed_by,
        "change_type": request.change_type,
        "agent": request.agent_id,
    }


def _time(given: str | int) -> int:
    at_ms = time_ms(given, "as_of")
    if not 0 <= at_ms <= MAX_MS:
        raise InvalidFieldError(f"as_of {given} is not from 1970 to 9999", field="as_of", limit=MAX_MS)
    return at_ms


def _within(answer: object) -> bytes:
    encoded = msgspec.json.encode(answer)
    if len(encoded) > limits.REPLY_BYTES:
        raise TooLargeError(
            f"the answer has {len(encoded)} bytes, the limit is {limits.REPLY_BYTES}",
            field="body",
            limit=limits.REPLY_BYTES,
            hint="read it with the SDK, which fetches a large body in parts",
        )
    return encoded
