"""Chunks that were put together of others, held as a list of those: form ``joint``, which only the lake has.

In the hot tier a run of small parts is stored again as one larger chunk, so that a growing body is read in few
messages.  In the lake that would be every byte up to six times, in row groups that compression does not look across.
So a chunk whose writer says which stored chunks it begins with (``ContextRow.parts``) is archived as a list of those
and the bytes that follow them, under the same digest, kind and size.  What the writer says is believed only after
hashing: each slice of the body must have the digest that the list names.

A joint's body is a line of JSON ``{"size": bytes, "chunks": [digest, …], "v": 1}``, a newline, and the bytes that
follow the last chunk; in a file the line is in ``body``, those bytes are in ``body_binary`` beside those of chunks, so
that they are compressed together.

A part is always of a smaller size class than the whole, so joints are nested at most ``DEPTH`` deep: that bounds how
many rounds of look-ups a body takes, and what the view ``contexts`` has to unfold.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.schemas import limits
from holdfast.schemas.bodies import BINARY
from holdfast.schemas.errors import DigestMismatchError, HoldfastError, IntegrityError
from holdfast.schemas.names import CHUNK_KIND
from holdfast.schemas.refs import Digest, compute_digest, is_digest
from holdfast.schemas.undecodable import UNDECODABLE

if TYPE_CHECKING:
    from holdfast.schemas.rows import ContextRow

CLASS_BYTES: Final = tuple(number * limits.KIB for number in (1, 4, 16, 64, 128))
"""Where the size classes begin.  Clients put parts below 1, 4, 16 and 64 KiB together to one of at least that, and
those below 128 KiB to one of more.  Fixed here, since readers go by it: a joint of its own class is not read."""

DEPTH: Final = len(CLASS_BYTES)
"""How deep joints are nested at most: one of the last class over one of each class down to the second."""

VERSION: Final = 1

_LEAST_BYTES_A_PART: Final = 35
"""What a digest takes in the list, with quotes and comma: more parts than the body has room for save nothing."""

READ: Final = 128
"""Parts read at once: 64 MiB at most, as much as the largest body."""

ReadRows = Callable[[list[Digest]], Mapping[Digest, "ContextRow"]]


class Joint(msgspec.Struct, frozen=True):
    """The line that a joint's body begins with."""

    size: int
    chunks: list[Digest]
    v: int = VERSION


_JOINT: Final = msgspec.json.Decoder(Joint)


def size_class(size: int) -> int:
    """Returns the size class of so many bytes, from 0 to ``DEPTH``."""
    return bisect_right(CLASS_BYTES, size)


def to_joint(row: ContextRow, held: Container[Digest]) -> ContextRow:
    """Returns a chunk as a joint of its parts if it certainly is one, and that is smaller; else the row as it is.

    ``held``: the digests that the lake holds, or will with the same commit.  Never raises for what a row claims.
    """
    if row.form != "chunk" or not 1 <= len(row.parts) <= _most_parts(row.size):
        return row
    whole_class = size_class(row.size)
    at = 0
    for digest, size in row.parts:
        if size < 1 or at + size > row.size or size_class(size) >= whole_class or digest not in held:
            return row
        if compute_digest(row.namespace, CHUNK_KIND, row.body[at : at + size], content_type=BINARY) != digest:
            return row
        at += size
    body = msgspec.json.encode(Joint(row.size, [digest for digest, _ in row.parts])) + b"\n" + row.body[at:]
    return row if len(body) >= row.size else msgspec.structs.replace(row, form="joint", body=body)


def decode_joint(row: ContextRow) -> tuple[Joint, bytes]:
    """Returns what a joint's row names, and the bytes that follow; raises IntegrityError when it is none of ours."""
    line, _, rest = row.body.partition(b"\n")
    try:
        joint = _JOINT.decode(line)
    except UNDECODABLE as error:
        raise _damaged(row, f"cannot be read: {error}") from error
    if joint.v != VERSION:
        raise _damaged(row, f"has version {joint.v}, this release reads {VERSION}")
    if joint.size != row.size or joint.size > limits.CHUNK_BYTES:
        raise _damaged(row, f"promises {joint.size} bytes of {row.size}")
    if len(joint.chunks) > _most_parts(joint.size) or not all(map(is_digest, joint.chunks)):
        raise _damaged(row, "does not name chunks")
    return joint, rest


def assemble(
    joints: Iterable[ContextRow], read: ReadRows, *, at_once: int = READ
) -> tuple[dict[Digest, ContextRow], dict[Digest, HoldfastError]]:
    """Returns the chunks that joints stand for, hashed again, and what is wrong with those that cannot be made.

    ``read`` returns stored rows, chunks checked; it is asked once for each level of nesting, or more often, for
    ``at_once`` digests at a time.  Hardly more is read than the joints promise together, level by level.
    """
    level = list(joints)
    asked = {row.digest for row in level}
    rows: dict[Digest, ContextRow] = {}
    opened: list[tuple[ContextRow, Joint, bytes]] = []
    failed: dict[Digest, HoldfastError] = {}
    for _ in range(DEPTH):
        rows |= {row.digest: row for row in level}
        at_level: list[tuple[ContextRow, Joint, bytes]] = []
        for row in level:
            try:
                at_level.append((row, *decode_joint(row)))
            except HoldfastError as error:
                failed[row.digest] = error
        opened += at_level
        level = _read_parts(at_level, rows, read, at_once)
    made: dict[Digest, ContextRow] = {}
    # A part is smaller than what it is part of: in this order each finds its own made already.
    for row, joint, rest in sorted(opened, key=lambda item: item[0].size):
        try:
            body = _join(row, joint, rest, rows, failed)
        except HoldfastError as error:
            failed[row.digest] = error
        else:
            parts = tuple((digest, rows[digest].size) for digest in joint.chunks)
            rows[row.digest] = made[row.digest] = msgspec.structs.replace(row, form="chunk", body=body, parts=parts)
    return (
        {digest: row for digest, row in made.items() if digest in asked},
        {digest: error for digest, error in failed.items() if digest in asked},
    )


def _read_parts(
    level: list[tuple[ContextRow, Joint, bytes]], rows: dict[Digest, ContextRow], read: ReadRows, at_once: int
) -> list[ContextRow]:
    """Reads the parts of some joints into ``rows``; returns those that are joints themselves."""
    parts = dict.fromkeys(digest for _, joint, _ in level for digest in joint.chunks)
    wanted = [digest for digest in parts if digest not in rows]
    promised = sum(row.size for row, _, _ in level)
    found: list[ContextRow] = []
    for start in range(0, len(wanted), at_once):
        # More bytes than all of them have: one is damaged, which shows when they are put together.
        if sum(row.size for row in found) > promised:
            break
        found += read(wanted[start : start + at_once]).values()
    rows |= {row.digest: row for row in found}
    return [row for row in found if row.form == "joint"]


def _join(
    row: ContextRow,
    joint: Joint,
    rest: bytes,
    rows: Mapping[Digest, ContextRow],
    failed: Mapping[Digest, HoldfastError],
) -> bytes:
    counts = Counter(joint.chunks)
    # Before they are joined: a damaged list may name one chunk a thousand times.
    size = len(rest) + sum(rows[digest].size * count for digest, count in counts.items() if digest in rows)
    if size > row.size:
        raise _unlike(row, f"has parts of {size} bytes or more, not {row.size}")
    for digest in counts:
        if digest in failed:
            raise _damaged(row, f"cannot be put together: {failed[digest].message}") from failed[digest]
    lost = [digest for digest in counts if digest not in rows or rows[digest].form != "chunk"]
    if lost:
        raise _damaged(row, f"lacks {len(lost)} of {len(counts)} chunks, first {lost[0]}")
    body = b"".join([*(rows[digest].body for digest in joint.chunks), rest])
    actual = compute_digest(
        row.namespace, row.kind, body, content_type=row.content_type, expires_at_ms=row.expires_at_ms
    )
    if actual != row.digest:
        raise _unlike(row, f"has parts that hash to {actual}")
    return body


def _most_parts(size: int) -> int:
    return min(limits.MANIFEST_CHUNKS, size // _LEAST_BYTES_A_PART)


def _damaged(row: ContextRow, what: str) -> IntegrityError:
    return IntegrityError(f"the joint {row.ref}, row {row.epoch}/{row.seq}, {what}", hint="run holdfast verify")


def _unlike(row: ContextRow, what: str) -> DigestMismatchError:
    return DigestMismatchError(f"the joint {row.ref}, row {row.epoch}/{row.seq}, {what}", hint="run holdfast verify")
