"""The endpoints that answer with contexts: by reference, one or many, hot or cold, as JSON or as msgpack.

What was answered is kept as it was encoded (:mod:`holdfast.workers.reply_cache`), so that asking for it again costs a
look-up, and a batch a joining of bytes; such requests are answered as they are read from the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.schemas import limits
from holdfast.schemas.errors import HoldfastError, NotFoundError, TooLargeError
from holdfast.schemas.ids import now_ms
from holdfast.schemas.refs import Digest, Ref, parse_ref
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.service import Answer, AtHand, Call, ErrorBody, Handler, decode_request
from holdfast.workers.reply_cache import CachedReply, ReplyCache
from holdfast.workers.requests import (
    ResolveBatchRequest,
    ResolveRequest,
    check_fields,
    choose_fields,
    context_reply,
    packed_reply,
)

if TYPE_CHECKING:
    from holdfast.workers.contexts import ContextReader, Found

WINDOW: Final = 100
"""Contexts read at once for one answer: of the largest that are stored whole, 50 MiB."""

MSGPACK: Final = "application/msgpack"
"""The media type that asks for msgpack, and says that an answer is."""

_PACKED_HEADERS: Final = {"Content-Type": MSGPACK}
_BODY_FIELDS: Final = frozenset({"body", "body_text", "body_base64"})
_RESOLVE: Final = msgspec.json.Decoder(ResolveRequest)
_BATCH: Final = msgspec.json.Decoder(ResolveBatchRequest)


class ContextEndpoints:
    """Answers ``resolve`` and ``resolve_batch``.  ``heavy`` is held while many bodies are read for one answer.

    With the header ``Accept: application/msgpack`` an answer is msgpack instead of JSON, and ``body`` is then the exact
    bytes of any content type.  An error is JSON all the same.
    """

    def __init__(self, contexts: ContextReader, heavy: asyncio.Semaphore, cache: ReplyCache | None = None) -> None:
        self._contexts = contexts
        self._heavy = heavy
        self._cache = ReplyCache() if cache is None else cache

    def endpoints(self) -> dict[str, tuple[str, Handler]]:
        """Returns every endpoint: name → (subject, handler)."""
        handlers: dict[str, Handler] = {"resolve": self.resolve, "resolve_batch": self.resolve_batch}
        return {name: (f"ctx.*.{name}", handler) for name, handler in handlers.items()}

    def at_hand(self) -> dict[str, AtHand]:
        """Returns what answers, by endpoint, requests for what was answered before."""
        return {"resolve": self._resolved, "resolve_batch": self._resolved_batch}

    async def resolve(self, call: Call) -> None:
        """``{"ref"}`` → ``{"ref", "kind", "body", "size", "created_at", "tier"}``."""
        request: ResolveRequest = decode_request(call.data, _RESOLVE)
        check_fields(request.fields)
        packed = _wants_msgpack(call.headers)
        digest = parse_ref(request.ref).digest
        found, failed = await self._read(call.namespace, [digest], request.fields)
        if digest in failed:
            raise failed[digest]
        item = _live(found.get(digest), request.ref)
        if item is None:
            raise NotFoundError(
                f"no context {request.ref} in namespace {call.namespace!r}",
                field="ref",
                hint="it may have expired, or belong to another namespace",
            )
        encoded = self._encode(call.namespace, item, request.fields, packed)
        if len(encoded) > limits.REPLY_BYTES:
            raise _too_large(len(encoded))
        await call.reply(encoded, _PACKED_HEADERS if packed else None)

    async def resolve_batch(self, call: Call) -> None:
        """``{"refs"}`` → ``{"contexts": {ref: …}, "resolved_count", "not_found": [ref], "errors": {ref: …}, "next"}``.

        The answer ends before 900 KB; ``next`` then names the references that are left to ask for.
        """
        request: ResolveBatchRequest = decode_request(call.data, _BATCH)
        check_fields(request.fields)
        packed = _wants_msgpack(call.headers)
        refs = list(dict.fromkeys(Ref(ref) for ref in request.refs))
        digests = {ref: parse_ref(ref).digest for ref in refs}
        known = {} if request.fields is not None else self._known(call.namespace, refs, packed)
        batch = _Batch()
        found: dict[Digest, Found] = {}
        failed: dict[Digest, HoldfastError] = {}
        for position, ref in enumerate(refs):
            if position % WINDOW == 0:
                # What the answer has no room for is not read either.
                window = [digests[other] for other in refs[position : position + WINDOW] if other not in known]
                found, failed = await self._read(call.namespace, window, request.fields) if window else ({}, {})
            digest = digests[ref]
            kept = known.get(ref)
            if kept is not None:
                encoded, size = kept.encoded, kept.size
            elif digest in failed:
                batch.fail(ref, failed[digest])
                continue
            else:
                item = _live(found.get(digest), ref)
                if item is None:
                    batch.not_found.append(ref)
                    continue
                raw = self._encode(call.namespace, item, request.fields, packed)
                encoded, size = msgspec.Raw(raw), len(raw)
            if not batch.add(ref, encoded, size, is_first=position == 0):
                batch.left = list(refs[position:])
                break
        await call.reply(*batch.answer(packed))

    def _resolved(self, namespace: str, payload: bytes, headers: Mapping[str, str]) -> Answer | None:
        try:
            request = _RESOLVE.decode(payload)
        except UNDECODABLE:
            return None
        packed = bool(headers) and _wants_msgpack(headers)
        kept = None if request.fields is not None else self._cache.get(namespace, request.ref, packed, now_ms())
        if kept is None:
            return None
        return Answer(bytes(kept.encoded), _PACKED_HEADERS if packed else None)

    def _resolved_batch(self, namespace: str, payload: bytes, headers: Mapping[str, str]) -> Answer | None:
        try:
            request = _BATCH.decode(payload)
        except UNDECODABLE:
            return None
        if request.fields is not None:
            return None
        packed = bool(headers) and _wants_msgpack(headers)
        kept = self._cache.get_all(namespace, request.refs, packed, now_ms())
        if kept is None or kept[1] > limits.REPLY_BYTES:
            return None  # something has to be read, or the answer to be parted
        return _Batch(kept[0]).answer(packed)

    def _known(self, namespace: str, refs: list[Ref], packed: bool) -> dict[Ref, CachedReply]:
        now = now_ms()
        return {ref: kept for ref in refs if (kept := self._cache.get(namespace, ref, packed, now)) is not None}

    def _encode(self, namespace: str, item: Found, fields: list[str] | None, packed: bool) -> bytes:
        if packed:
            encoded = msgspec.msgpack.encode(choose_fields(packed_reply(item.row, item.tier), fields))
        else:
            encoded = msgspec.json.encode(choose_fields(context_reply(item.row, item.tier), fields))
        # What was kept since an earlier reading is not kept for another minute.
        if fields is None and item.is_fresh and len(encoded) <= limits.REPLY_BYTES:
            self._cache.add(
                namespace, item.row.ref, packed, encoded, expires_at_ms=item.row.expires_at_ms, now_ms=now_ms()
            )
        return encoded

    async def _read(
        self, namespace: str, digests: list[Digest], fields: list[str] | None
    ) -> tuple[dict[Digest, Found], dict[Digest, HoldfastError]]:
        if fields is not None and not _BODY_FIELDS.intersection(fields):
            # Kind, size and times are those of the stored form: no need to put a large body together.
            return await self._contexts.get_stored_many(namespace, digests)
        # A single context is no heavy answer: the number of requests under way bounds those.
        async with self._heavy if len(digests) > 1 else nullcontext():
            return await self._contexts.get_many(namespace, digests, max_bytes=limits.REPLY_BYTES)


class _Batch:
    """The answer to ``resolve_batch``, as far as it has got."""

    def __init__(self, contexts: dict[str, msgspec.Raw] | None = None) -> None:
        self.contexts = {} if contexts is None else contexts
        self.not_found: list[str] = []
        self.errors: dict[str, ErrorBody] = {}
        self.left: list[Ref] = []
        self.size = 0

    def fail(self, ref: str, error: HoldfastError) -> None:
        """Tells of one that cannot be served."""
        self.errors[ref] = ErrorBody.of(error)
        self.size += len(msgspec.json.encode(self.errors[ref]))

    def add(self, ref: str, encoded: msgspec.Raw, size: int, *, is_first: bool) -> bool:
        """Adds a context of so many bytes; returns False when there is no room for it."""
        if size > limits.REPLY_BYTES:
            self.errors[ref] = ErrorBody.of(_too_large(size))
            return True
        self.size += size
        # References come on top: at most 1,000 of 102 bytes, for which a payload of 1 MiB has room.  The first one
        # always goes: an answer without progress would be asked for again for ever.
        if self.size > limits.REPLY_BYTES and not is_first:
            return False
        self.contexts[ref] = encoded
        return True

    def answer(self, packed: bool) -> Answer:
        """Returns the answer, the contexts in it as they were encoded."""
        members: dict[str, Any] = {
            "contexts": self.contexts,
            "resolved_count": len(self.contexts),
            "not_found": self.not_found,
        }
        if self.errors:
            members["errors"] = self.errors
        if self.left:
            members["next"] = self.left
        if packed:
            return Answer(msgspec.msgpack.encode(members), _PACKED_HEADERS)
        return Answer(msgspec.json.encode(members))


def _wants_msgpack(headers: Mapping[str, str]) -> bool:
    accepted = headers.get("Accept", "").split(",")
    return any(each.partition(";")[0].strip() == MSGPACK for each in accepted)


def _live(item: Found | None, ref: str) -> Found | None:
    """The context, unless its reference names another kind, or it has expired."""
    if item is None or item.row.ref != ref:
        return None
    expires = item.row.expires_at_ms
    return None if expires is not None and expires <= now_ms() else item


def _too_large(size: int) -> TooLargeError:
    return TooLargeError(
        f"the answer has {size} bytes, the limit is {limits.REPLY_BYTES}",
        field="body",
        limit=limits.REPLY_BYTES,
        hint="resolve it with the SDK, which fetches a large body in parts",
    )
