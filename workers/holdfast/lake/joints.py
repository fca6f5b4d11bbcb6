"""Chunks that were put together of others, held as a list of those: form ``joint``, which only the lake has.

In the hot tier a run of small parts is stored again as one larger chunk, so that a growing body is read in few
messages.  In the lake that would be every byte up to five times, in row groups that compression does not look across.
So a chunk whose writer says which stored chunks it begins with (``ContextRow.parts``) is archived as a manifest of
those and the text that follows them, under the same digest, kind and size.  What the writer says is believed only after
hashing: each slice of the body must have the digest that the list names.

A part is always of a smaller size class than the whole, so joints are nested at most ``len(CLASS_BYTES)`` deep: that
bounds how many rounds of look-ups a body takes, and what the view ``contexts`` has to unfold.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.lake.manifests import SHARED_VERSION, Manifest, check_size, decode_manifest, join, require_chunks
from holdfast.schemas import limits
from holdfast.schemas.bodies import BINARY
from holdfast.schemas.errors import HoldfastError, IntegrityError
from holdfast.schemas.names import CHUNK_KIND
from holdfast.schemas.refs import Digest, compute_digest

if TYPE_CHECKING:
    from holdfast.schemas.rows import ContextRow

CLASS_BYTES: Final = tuple(4**number * limits.KIB for number in range(5))
"""Where the size classes begin: 1, 4, 16, 64, 256 KiB.  Those by which clients put parts together, fixed here because
they are part of the format: a joint that names one of its own class is not read."""

DEPTH: Final = len(CLASS_BYTES)
"""How deep joints are nested at most: one of the last class over one of each class below."""

_LEAST_BYTES_A_PART: Final = 35
"""What a digest takes in a manifest, with quotes and comma: more parts than the body has room for save nothing."""

_READ: Final = 128
"""Parts read at once: 64 MiB at most, as much as the largest body."""

ReadRows = Callable[[list[Digest]], Mapping[Digest, "ContextRow"]]


def size_class(size: int) -> int:
    """Returns the size class of so many bytes, from 0 to ``DEPTH``."""
    return bisect_right(CLASS_BYTES, size)


def to_joint(row: ContextRow, held: Container[Digest]) -> ContextRow:
    """Returns a chunk as a joint of its parts if it certainly is one, and that is smaller; else the row as it is.

    ``held``: the digests that the lake holds, or will with the same commit.  Never raises for what a row claims.
    """
    if row.form != "chunk" or not 1 <= len(row.parts) <= limits.MANIFEST_CHUNKS:
        return row
    if _LEAST_BYTES_A_PART * len(row.parts) >= row.size:
        return row
    whole_class = size_class(row.size)
    at = 0
    for digest, size in row.parts:
        if size < 1 or at + size > row.size or size_class(size) >= whole_class or digest not in held:
            return row
        if compute_digest(row.namespace, CHUNK_KIND, row.body[at : at + size], content_type=BINARY) != digest:
            return row
        at += size
    try:
        tail = row.body[at:].decode()
    except UnicodeDecodeError:
        return row
    if len(tail) > limits.TAIL_CHARS:
        return row
    body = msgspec.json.encode(Manifest(row.size, [digest for digest, _ in row.parts], tail, SHARED_VERSION))
    return row if len(body) >= row.size else msgspec.structs.replace(row, form="joint", body=body)


def assemble(
    joints: Iterable[ContextRow], read: ReadRows
) -> tuple[dict[Digest, ContextRow], dict[Digest, HoldfastError]]:
    """Returns the chunks that joints stand for, hashed again, and what is wrong with those that cannot be made.

    ``read`` returns stored rows, chunks checked; it is asked once for each level of nesting, of at most 128 digests at
    a time.  No more is read than the joints promise together, level by level.
    """
    rows: dict[Digest, ContextRow] = {}
    opened: list[tuple[ContextRow, Manifest]] = []
    failed: dict[Digest, HoldfastError] = {}
    level = list(joints)
    wanted = [row.digest for row in level]
    for _ in range(DEPTH):
        rows |= {row.digest: row for row in level}
        at_level: list[tuple[ContextRow, Manifest]] = []
        for row in level:
            try:
                at_level.append((row, _open(row)))
            except HoldfastError as error:
                failed[row.digest] = error
        opened += at_level
        level = _read_level(at_level, rows, read)
    bodies = {digest: row.body for digest, row in rows.items() if row.form == "chunk"}
    made: dict[Digest, ContextRow] = {}
    # A part is smaller than what it is part of: in this order each finds its own made already.
    for row, manifest in sorted(opened, key=lambda item: item[0].size):
        try:
            bodies[row.digest] = _join(row, manifest, rows, bodies, failed)
        except HoldfastError as error:
            failed[row.digest] = error
        else:
            parts = tuple((digest, rows[digest].size) for digest in manifest.chunks)
            made[row.digest] = msgspec.structs.replace(row, form="chunk", body=bodies[row.digest], parts=parts)
    asked = set(wanted)
    return (
        {digest: row for digest, row in made.items() if digest in asked},
        {digest: error for digest, error in failed.items() if digest in asked},
    )


def _open(row: ContextRow) -> Manifest:
    manifest = decode_manifest(row)
    if manifest.size != row.size or manifest.size > limits.CHUNK_BYTES:
        raise IntegrityError(
            f"the joint {row.ref}, row {row.epoch}/{row.seq}, promises {manifest.size} bytes of {row.size}",
            hint="run holdfast verify",
        )
    return manifest


def _read_level(
    level: list[tuple[ContextRow, Manifest]], rows: dict[Digest, ContextRow], read: ReadRows
) -> list[ContextRow]:
    """Reads the parts of some joints into ``rows``; returns those that are joints themselves."""
    parts = dict.fromkeys(digest for _, manifest in level for digest in manifest.chunks)
    wanted = [digest for digest in parts if digest not in rows]
    promised = sum(row.size for row, _ in level)
    found: list[ContextRow] = []
    for start in range(0, len(wanted), _READ):
        # More bytes than all of them have: one is damaged, and it is told which when they are put together.
        if sum(row.size for row in found) > promised:
            break
        found += read(wanted[start : start + _READ]).values()
    rows |= {row.digest: row for row in found}
    return [row for row in found if row.form == "joint"]


def _join(
    row: ContextRow,
    manifest: Manifest,
    rows: Mapping[Digest, ContextRow],
    bodies: Mapping[Digest, bytes],
    failed: Mapping[Digest, HoldfastError],
) -> bytes:
    check_size(row, manifest, {digest: rows[digest].size for digest in manifest.chunks if digest in rows}, so_far=True)
    for digest in manifest.chunks:
        error = failed.get(digest)
        if error is not None:
            raise IntegrityError(
                f"{row.ref} cannot be put together: {error.message}", hint="run holdfast verify"
            ) from error
    require_chunks(row, manifest, bodies)
    whole_class = size_class(row.size)
    for digest in manifest.chunks:
        if size_class(rows[digest].size) >= whole_class:
            raise IntegrityError(
                f"{row.ref}, row {row.epoch}/{row.seq}, names {digest}, which is as large", hint="run holdfast verify"
            )
    return join(row, manifest, bodies)
