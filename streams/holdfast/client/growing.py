"""Bodies of named contexts: stored so that each version shares the parts of the one before, and read in one go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.client.near_cache import MAX_AGE_MS
from holdfast.schemas import limits
from holdfast.schemas.errors import HoldfastError, NotFoundError, RetryError
from holdfast.schemas.ids import now_ms
from holdfast.schemas.names import CHUNK_KIND
from holdfast.schemas.refs import JSON, Digest, Ref, parse_ref
from holdfast.schemas.rows import ContextRow
from holdfast.streams.codec import StoredForm, decode_manifest, join, require_chunks, seal, seal_shared
from holdfast.streams.sharing import SHARE_OVER_BYTES, Part, Shape, is_growth, plan_parts

if TYPE_CHECKING:
    from holdfast.client.model import Tier
    from holdfast.client.near_cache import NearCache
    from holdfast.client.reading import StoredReader
    from holdfast.streams.hot import HotTier, NewContext

logger = logging.getLogger(__name__)

CACHE_BYTES: Final = 32 * limits.MIB
"""Bodies kept to compare the next version with, newest first, when a client does not say."""

_ENTRY_BYTES: Final = 1_000
_IN_THREAD_BYTES: Final = 64 * limits.KIB
"""Bodies over this are compared, hashed and compressed in a thread: on the event loop they would take over 0.5 ms."""

_HINTS: Final = 96
"""Most parts that a hint names: more than a body of some megabytes has."""


NO_DIGEST: Final = Digest("")


class Grown(msgspec.Struct, frozen=True):
    """A whole body with the way it is stored: its parts, and where they stood in the hot tier (0: not known).

    Without parts it is stored as it is.
    """

    row: ContextRow
    shape: Shape = Shape()
    seqs: tuple[int, ...] = ()

    @property
    def hint(self) -> tuple[int, ...]:
        """Where the parts stand, as a version's ``at`` tells it; nothing when that is not known of all."""
        if not self.seqs or len(self.seqs) > _HINTS or 0 in self.seqs:
            return ()
        highest = max(self.seqs)
        return (highest, *(highest - seq for seq in self.seqs))


class GrowingBodies:
    """Stores and reads the bodies of one namespace's named contexts.

    ``cache_bytes`` bounds the bodies that are kept to compare the next version with; 0 keeps none.  They are kept for a
    minute by the wall clock and by the monotonic ``ticks_s``, as in the near cache.
    """

    def __init__(
        self,
        namespace: str,
        hot: HotTier,
        reader: StoredReader,
        near: NearCache,
        *,
        cache_bytes: int = CACHE_BYTES,
        ticks_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._namespace = namespace
        self._hot = hot
        self._reader = reader
        self._near = near
        self._limit_bytes = cache_bytes
        self._ticks_s = ticks_s
        self._known: OrderedDict[Ref, tuple[int, float, Grown]] = OrderedDict()
        self._places: dict[int, tuple[Ref, Digest, int, int]] = {}
        self._bytes = 0

    async def store_chain(self, contexts: Sequence[NewContext], base: Grown | None) -> list[Grown]:
        """Stores bodies durably, each as grown from the one before it, the first from ``base``; in order.

        Every chunk is acknowledged before a manifest that names it is sent.
        """
        size = sum(len(context.body) for context in contexts)
        if size <= _IN_THREAD_BYTES:
            planned = _plan_chain(contexts, base)
        else:
            planned = await asyncio.to_thread(_plan_chain, contexts, base)
        chunks = {form.digest: form for forms, _, _ in planned for form in forms}
        stored = await self._hot.store_forms(self._namespace, list(chunks.values())) if chunks else []
        at = {digest: settled.seq for digest, settled in zip(chunks, stored, strict=True)}
        if base is not None:
            at |= {part.digest: seq for part, seq in zip(base.shape.parts, base.seqs, strict=True) if seq}
        await self._hot.store_forms(self._namespace, [head for _, head, _ in planned])
        now = now_ms()
        results: list[Grown] = []
        for context, (_, head, shape) in zip(contexts, planned, strict=True):
            seqs = tuple(at.get(part.digest, 0) for part in shape.parts)
            results.append(Grown(row_of_context(context, head.digest, now), shape, seqs))
        self._remember(results[-1])
        return results

    async def load(self, ref: Ref, at: Sequence[int] = ()) -> tuple[Grown, Tier]:
        """Returns a whole body and where it came from.

        ``at``: a version's hint; with it manifest and parts are read at once, in one round trip.  Raises NotFoundError
        when it is stored nowhere, or another typed error when it cannot be served.
        """
        known = self.known(ref)
        if known is not None:
            return known, "cache"
        cached = self._near.get(ref, now_ms())
        # It does not know in which parts a body is stored; without them the next version would share nothing.
        if cached is not None and not _may_share(cached.content_type, cached.size):
            return Grown(cached), "cache"
        digest = parse_ref(ref).digest
        # A hint may come from anybody: one that is longer than ours ever are is none.
        hinted = [at[0] - below for below in at[1:]] if len(at) <= _HINTS + 1 else []
        found: dict[Digest, ContextRow] = {}
        if hinted:
            # A reader that follows a conversation has most of it: only what is new is fetched.
            held = self._held_at(hinted)
            held_seqs = {row.seq for row in held.values()}
            left = [seq for seq in hinted if seq not in held_seqs]
            parts, head = await asyncio.gather(self._at(left), self._sound(digest))
            found = held | parts if head is None else held | parts | {digest: head}
        tier: Tier = "hot"
        if digest not in found:
            rows, tiers, errors = await self._reader.load_stored([digest])
            if digest in errors:
                raise errors[digest]
            found |= rows
            tier = tiers.get(digest, tier)
        row = found.get(digest)
        if row is None or row.ref != ref:
            raise NotFoundError(f"the body {ref} is stored nowhere", field="ref", hint="run 'holdfast verify'")
        if row.form != "manifest":
            grown = Grown(row)
        else:
            try:
                grown, tier = await self._joined(row, found, tier)
            except HoldfastError:
                # A damaged hot copy: the reader passes over it for a sound cold one.
                grown, tier = await self._whole(digest)
        self._remember(grown)
        return grown, tier

    async def base_for(self, context: NewContext, ref: Ref | None, at: Sequence[int]) -> Grown | None:
        """Returns the body that a new one may share parts with, when it is large enough to make that worth reading.

        None when it cannot be read: sharing saves bytes, and is never needed.
        """
        if ref is None or not _may_share(context.content_type, len(context.body)):
            return None
        try:
            return (await self.load(ref, at))[0]
        except HoldfastError as error:
            logger.debug("no base to share with", extra={"action": "no_base", "ref": ref, "error": str(error)})
            return None

    def known(self, ref: Ref) -> Grown | None:
        """Returns a body with its shape when this process stored or read it within the last minute."""
        entry = self._known.get(ref)
        if entry is None:
            return None
        until_ms, until_s, grown = entry
        if now_ms() >= until_ms or self._ticks_s() >= until_s:
            self._forget(ref)
            return None
        self._known.move_to_end(ref)
        return grown

    def _held_at(self, seqs: Sequence[int]) -> dict[Digest, ContextRow]:
        """The parts at these places of the hot tier that bodies in memory have."""
        held: dict[Digest, ContextRow] = {}
        for seq in seqs:
            place = self._places.get(seq)
            known = None if place is None else self.known(place[0])
            if place is not None and known is not None:
                _, digest, start, end = place
                # Not hashed by itself: what is put together of it is.
                body = known.row.body[start:end]
                held[digest] = msgspec.structs.replace(
                    known.row, digest=digest, kind=CHUNK_KIND, body=body, size=len(body), seq=seq, form="chunk"
                )
        return held

    async def _at(self, seqs: Sequence[int]) -> dict[Digest, ContextRow]:
        """What stands where a hint says, as far as it can be read now."""
        try:
            return await self._hot.get_at(self._namespace, seqs)
        except RetryError:
            return {}  # looked for by digest, and as long as it takes

    async def _sound(self, digest: Digest) -> ContextRow | None:
        """What the hot tier holds under a digest, if it is not damaged."""
        try:
            return await self._hot.get_stored(self._namespace, digest)
        except RetryError:
            raise
        except HoldfastError:
            return None  # whoever looks for a cold copy meets it again

    async def _joined(self, row: ContextRow, found: dict[Digest, ContextRow], tier: Tier) -> tuple[Grown, Tier]:
        digests = decode_manifest(row.body).chunks
        left = [digest for digest in dict.fromkeys(digests) if digest not in found]
        if left:
            rows, tiers, errors = await self._reader.load_stored(left)
            found |= rows
            tier = "lake" if "lake" in tiers.values() else tier
            require_chunks(row, found, errors)
        bodies = {digest: found[digest].body for digest in digests}
        whole = join(row, bodies) if row.size <= _IN_THREAD_BYTES else await asyncio.to_thread(join, row, bodies)
        shape = Shape(tuple(Part(digest, len(bodies[digest])) for digest in digests))
        return Grown(whole, shape, tuple(found[digest].seq for digest in digests)), tier

    async def _whole(self, digest: Digest) -> tuple[Grown, Tier]:
        rows, tiers, errors = await self._reader.load([digest])
        if digest in errors:
            raise errors[digest]
        return Grown(rows[digest]), tiers[digest]

    def _remember(self, grown: Grown) -> None:
        row = grown.row
        self._near.add(row.ref, row, now_ms())
        cost = row.size + _ENTRY_BYTES
        if cost * 4 > self._limit_bytes:
            return
        self._forget(row.ref)
        # What was erased is served from here for a minute at most, as from the near cache.
        self._known[row.ref] = now_ms() + MAX_AGE_MS, self._ticks_s() + MAX_AGE_MS / 1000, grown
        self._bytes += cost
        start = 0
        for part, seq in zip(grown.shape.parts, grown.seqs, strict=False):
            if seq:
                self._places[seq] = row.ref, part.digest, start, start + part.size
            start += part.size
        while self._bytes > self._limit_bytes:
            self._forget(next(iter(self._known)))

    def _forget(self, ref: Ref) -> None:
        entry = self._known.pop(ref, None)
        if entry is not None:
            *_, grown = entry
            self._bytes -= grown.row.size + _ENTRY_BYTES
            for seq in grown.seqs:
                if self._places.get(seq, (None,))[0] == ref:
                    del self._places[seq]


_Planned = tuple[list[StoredForm], StoredForm, Shape]


def _plan_chain(contexts: Sequence[NewContext], base: Grown | None) -> list[_Planned]:
    planned: list[_Planned] = []
    body = b"" if base is None else base.row.body
    shape = Shape() if base is None else base.shape
    for context in contexts:
        plan = _shared(context, body, shape)
        if plan is None:
            *chunks, head = seal(
                context.namespace,
                context.kind,
                context.body,
                content_type=context.content_type,
                expires_at_ms=context.expires_at_ms,
            )
            plan = chunks, head, Shape()
        planned.append(plan)
        body, shape = context.body, plan[2]
    return planned


def _shared(context: NewContext, old_body: bytes, old_shape: Shape) -> _Planned | None:
    """How to store a body in parts; None when it is better stored as it is."""
    if not old_body or not _may_share(context.content_type, len(context.body)):
        return None
    body = context.body
    pieces = plan_parts(body, old_body, old_shape)
    if not any(piece.digest for piece in pieces) and not is_growth(old_body, body):
        return None
    if len(pieces) > limits.MANIFEST_CHUNKS:
        return None
    try:
        return seal_shared((context.namespace, context.kind, context.content_type, context.expires_at_ms), body, pieces)
    except UnicodeDecodeError:
        return None  # said to be text and is not


def _may_share(content_type: str, size: int) -> bool:
    return size > SHARE_OVER_BYTES and (content_type == JSON or content_type.startswith("text/"))


def row_of_context(context: NewContext, digest: Digest = NO_DIGEST, stored_at_ms: int = 0) -> ContextRow:
    """Returns the row of a context that this process has in hand; without a digest when it is not stored yet."""
    return ContextRow(
        namespace=context.namespace,
        kind=context.kind,
        digest=digest,
        content_type=context.content_type,
        body=context.body,
        size=len(context.body),
        stored_at_ms=stored_at_ms,
        epoch="",
        seq=0,
        expires_at_ms=context.expires_at_ms,
    )
