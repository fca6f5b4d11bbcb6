"""Chunked bodies in the lake: what a manifest says, and putting its body together without trusting it.

A manifest is stored as the hot tier stores it, JSON ``{"v", "size", "chunks": [digest, …], "tail"}``.  Version 1 cuts a
body every 512 KiB; in version 2 chunks are of any size up to that and shared with other manifests, and ``tail`` is text
behind the last one.  A growing conversation is thousands of manifests over few chunks: whoever reads many of them keeps
chunks, within a bound, from one to the next.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import msgspec

from holdfast.schemas import limits
from holdfast.schemas.errors import DigestMismatchError, HoldfastError, IntegrityError
from holdfast.schemas.refs import Digest, compute_digest, is_digest
from holdfast.schemas.undecodable import UNDECODABLE

if TYPE_CHECKING:
    from holdfast.schemas.rows import ContextRow

K = TypeVar("K")

SHARED_VERSION: Final = 2

CACHE_BYTES: Final = 128 * limits.MIB
"""Most bytes of chunks kept from one manifest to the next: two of the largest bodies."""

_WINDOW: Final = 50_000
"""Most chunks named by the manifests that are looked at together."""


class Manifest(msgspec.Struct, frozen=True):
    """What a chunked body consists of, in order: the bytes of its chunks, then ``tail`` in UTF-8."""

    size: int
    chunks: list[Digest]
    tail: str = ""
    v: int = 1


_MANIFEST: Final = msgspec.json.Decoder(Manifest)


def decode_manifest(row: ContextRow) -> Manifest:
    """Returns the manifest that a row holds; raises IntegrityError when it is none of ours."""
    try:
        manifest = _MANIFEST.decode(row.body)
    except UNDECODABLE as error:
        raise _damaged(row, f"cannot be read: {error}") from error
    if not 0 <= manifest.size <= limits.BODY_BYTES:
        raise _damaged(row, f"promises {manifest.size} bytes, the limit is {limits.BODY_BYTES}")
    if manifest.v not in (1, SHARED_VERSION):
        raise _damaged(row, f"has version {manifest.v}, this release reads up to {SHARED_VERSION}")
    if len(manifest.chunks) > limits.MANIFEST_CHUNKS or not all(map(is_digest, manifest.chunks)):
        raise _damaged(row, "does not name chunks")
    return manifest


def check_size(row: ContextRow, manifest: Manifest, sizes: Mapping[Digest, int], *, so_far: bool = False) -> None:
    """Raises DigestMismatchError unless chunks of these sizes make as many bytes as promised.

    Before they are joined, or even read: a forged manifest may name one chunk four thousand times.  ``so_far``: more
    sizes are to come, only too many bytes are wrong.
    """
    total = len(manifest.tail.encode())
    for digest, count in Counter(manifest.chunks).items():
        total += sizes.get(digest, 0) * count
    if total > manifest.size or (total != manifest.size and not so_far):
        raise _unlike(row, f"are {total} bytes{' or more' if so_far else ''}, not {manifest.size}")


def join(row: ContextRow, manifest: Manifest, chunks: Mapping[Digest, bytes]) -> bytes:
    """Returns the whole body, verified: raises DigestMismatchError when it is not what the digest names."""
    check_size(row, manifest, {digest: len(chunks[digest]) for digest in manifest.chunks})
    body = b"".join([*(chunks[digest] for digest in manifest.chunks), manifest.tail.encode()])
    actual = compute_digest(
        row.namespace, row.kind, body, content_type=row.content_type, expires_at_ms=row.expires_at_ms
    )
    if actual != row.digest:
        raise _unlike(row, f"hash to {actual}")
    return body


SizesOf = Callable[[Sequence[Digest]], Mapping[Digest, int]]
BodiesOf = Callable[[Sequence[Digest]], Mapping[Digest, bytes]]


class ChunkCache(Generic[K]):
    """Bodies of chunks, those used last, up to a number of bytes; under keys of the user's choosing."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bodies: OrderedDict[K, bytes] = OrderedDict()
        self._bytes = 0

    def __contains__(self, key: K) -> bool:
        return key in self._bodies

    def add(self, key: K, body: bytes) -> None:
        """Keeps a body; nothing leaves before :meth:`shrink`."""
        if key not in self._bodies:
            self._bodies[key] = body
            self._bytes += len(body)

    def get(self, key: K) -> bytes | None:
        """Returns a body that is kept, and marks it as used."""
        body = self._bodies.get(key)
        if body is not None:
            self._bodies.move_to_end(key)
        return body

    def get_many(self, keys: Iterable[K]) -> dict[K, bytes]:
        """Returns those bodies that are kept, and marks them as used."""
        return {key: body for key in keys if (body := self.get(key)) is not None}

    def shrink(self) -> None:
        """Lets go of what was used longest ago, down to the limit."""
        while self._bytes > self._limit_bytes:
            _, body = self._bodies.popitem(last=False)
            self._bytes -= len(body)


def check_manifests(
    rows: Iterable[ContextRow], sizes_of: SizesOf, bodies_of: BodiesOf
) -> Iterator[tuple[ContextRow, HoldfastError | None]]:
    """Yields each manifest with what is wrong with it, None when its chunks make the body that its digest names.

    Each chunk is read once when the manifests that share it are neighbours.  Holds ``CACHE_BYTES`` of chunks, and at
    most one body besides.
    """
    cache: ChunkCache[Digest] = ChunkCache(CACHE_BYTES)
    waiting = iter(rows)
    while window := _window(waiting):
        wanted = list(
            {digest for _, manifest in window if isinstance(manifest, Manifest) for digest in manifest.chunks}
        )
        sizes = sizes_of(wanted)
        for number, (row, manifest) in enumerate(window):
            if not isinstance(manifest, Manifest):
                yield row, manifest
                continue
            try:
                require_chunks(row, manifest, sizes)
                check_size(row, manifest, sizes)
                if any(digest not in cache for digest in manifest.chunks):
                    _read_ahead(window[number:], sizes, cache, bodies_of)
                _check_body(row, manifest, cache)
            except HoldfastError as error:
                yield row, error
            else:
                yield row, None


def _window(rows: Iterator[ContextRow]) -> list[tuple[ContextRow, Manifest | HoldfastError]]:
    window: list[tuple[ContextRow, Manifest | HoldfastError]] = []
    named = 0
    while named < _WINDOW and (batch := list(islice(rows, 1))):
        try:
            manifest: Manifest | HoldfastError = decode_manifest(batch[0])
        except HoldfastError as error:
            manifest = error
        window.append((batch[0], manifest))
        named += 1 + (len(manifest.chunks) if isinstance(manifest, Manifest) else 0)
    return window


def require_chunks(row: ContextRow, manifest: Manifest, known: Container[Digest]) -> None:
    """Raises IntegrityError unless every chunk of a manifest is among the known ones."""
    lost = [digest for digest in manifest.chunks if digest not in known]
    if lost:
        raise IntegrityError(
            f"{row.ref} lacks {len(lost)} of {len(manifest.chunks)} chunks, first {lost[0]}", hint="run holdfast verify"
        )


def _read_ahead(
    window: Sequence[tuple[ContextRow, Manifest | HoldfastError]],
    sizes: Mapping[Digest, int],
    cache: ChunkCache[Digest],
    bodies_of: BodiesOf,
) -> None:
    """Reads the chunks of the first manifest, and of as many more as fit in half the cache."""
    missing: dict[Digest, None] = {}
    size = 0
    for row, manifest in window:
        if not isinstance(manifest, Manifest) or sum(sizes.get(d, 0) for d in manifest.chunks) > manifest.size:
            continue  # it will be told of, unread
        more = [digest for digest in dict.fromkeys(manifest.chunks) if digest in sizes and digest not in cache]
        more = [digest for digest in more if digest not in missing]
        size += sum(sizes[digest] for digest in more)
        if row is not window[0][0] and size > CACHE_BYTES // 2:
            break
        missing.update(dict.fromkeys(more))
    for digest, body in bodies_of(list(missing)).items():
        cache.add(digest, body)


def _check_body(row: ContextRow, manifest: Manifest, cache: ChunkCache[Digest]) -> None:
    chunks = cache.get_many(manifest.chunks)
    cache.shrink()
    require_chunks(row, manifest, chunks)
    join(row, manifest, chunks)


def _damaged(row: ContextRow, what: str) -> IntegrityError:
    return IntegrityError(f"the manifest of {row.ref}, row {row.epoch}/{row.seq}, {what}", hint="run holdfast verify")


def _unlike(row: ContextRow, what: str) -> DigestMismatchError:
    return DigestMismatchError(
        f"the chunks of {row.ref}, row {row.epoch}/{row.seq}, {what}", hint="run holdfast verify"
    )
