"""Sharing of parts between the versions of a body that grows: which bytes are kept, which are stored anew.

A conversation that is stored after every turn repeats all that was said before.  So a large body is stored as a list of
parts (a manifest of version 2), and its next version names the parts that are still in it, wherever they stand, and
stores only what lies between them.  The parts are found by their bytes alone: it works for a list that grows, for an
object whose list grows and whose counters change, for text, and after an edit in the middle.

Many small parts would make reading slow and manifests long.  So runs of small parts are put together, as in a
log-structured merge tree: ``FAN_OUT`` neighbours of one size class become one part of the next.  Each byte is stored
again once for each class, compressed the better the larger the part is; a body of N bytes has
O(FAN_OUT x log(N) + N / PART_BYTES) parts.  ADR 8 has the measurements.

Everything here is pure: bytes and lists in, lists out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from holdfast.schemas import limits
from holdfast.schemas.refs import Digest

SHARE_OVER_BYTES: Final = 2 * limits.KIB
"""Bodies up to this are stored whole: a part and a manifest of their own would cost more than they save."""

FAN_OUT: Final = 8
"""Neighbouring parts of one size class that are put together."""

FIRST_CLASS_BYTES: Final = 512
"""Parts below this are of the first class; each further class is ``FAN_OUT`` times as large."""

PART_BYTES: Final = 256 * limits.KIB
"""A part of this size is not put together with others any more; what is new is cut into parts of it."""

_TAIL_BYTES: Final = 512
"""Longest end of a body that its manifest holds itself: the closing brackets, and the small members behind a list."""

_FOUND_BYTES: Final = 64
"""Parts below this are not looked for elsewhere than in the common beginning and end."""

_MISSES: Final = 16
"""How many parts in a row may be looked for in vain: each search may read the whole body."""

_LONGEST_RUN: Final = 32
"""A run of so many parts is put together however small they are."""

_CLOSING: Final = b']}" \n\r\t'


class Part(msgspec.Struct, frozen=True):
    """A stored part of a body: the digest of its chunk, and its size in bytes."""

    digest: Digest
    size: int


class Shape(msgspec.Struct, frozen=True):
    """How a body is stored: its parts in order; what follows them is its tail."""

    parts: tuple[Part, ...] = ()

    @property
    def tail_at(self) -> int:
        """Where the tail begins."""
        return sum(part.size for part in self.parts)


class Piece(msgspec.Struct, frozen=True):
    """A range of the new body: a part that is stored already (``digest``), or one to be stored."""

    start: int
    end: int
    digest: Digest | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


def plan_parts(body: bytes, old_body: bytes = b"", old_shape: Shape | None = None) -> list[Piece]:
    """Returns the pieces of ``body`` in order, without gaps, from its beginning to where its tail begins.

    ``old_body``, stored in ``old_shape``, is what it grew from; without it everything is new.  The tail is at most 512
    bytes, and text whenever the body is.
    """
    prefix = common_prefix(old_body, body)
    suffix = common_suffix(old_body, body, at_most=min(len(old_body), len(body)) - prefix)
    kept, cuts = _kept(body, old_body, old_shape or Shape(), prefix, suffix)
    end = _tail_start(body, kept, suffix)
    return _merged(_filled(kept, end, cuts), grown_at=kept[-1].end if kept else 0)


def is_growth(old_body: bytes, body: bytes) -> bool:
    """Whether half of an old body is still in the new one, so that a third is likely to share much with it."""
    prefix = common_prefix(old_body, body)
    suffix = common_suffix(old_body, body, at_most=min(len(old_body), len(body)) - prefix)
    if 2 * (prefix + suffix) >= len(old_body):
        return True
    ends = _match_within(body, 0, old_body, 0, len(old_body))
    return bool(ends) and 2 * (max(ends) - min(ends)) >= len(old_body)


def common_prefix(one: bytes, other: bytes) -> int:
    """Returns how many bytes two bodies begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        # Only the half that is not known to be equal yet is compared: linear in all.
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def common_suffix(one: bytes, other: bytes, *, at_most: int) -> int:
    """Returns how many bytes two bodies end with in common, ``at_most`` that many."""
    low, high = 0, at_most
    while low < high:
        middle = (low + high + 1) // 2
        if one[len(one) - middle : len(one) - low] == other[len(other) - middle : len(other) - low]:
            low = middle
        else:
            high = middle - 1
    return low


def _kept(body: bytes, old_body: bytes, shape: Shape, prefix: int, suffix: int) -> tuple[list[Piece], set[int]]:
    """The old parts that the new body holds too, in order, and the places where old and new part."""
    kept: list[Piece] = []
    cuts = {prefix, len(body) - suffix}
    shift = len(body) - len(old_body)
    cursor = start = misses = 0
    for part in shape.parts:
        end = start + part.size
        if end <= prefix:
            found = start
        elif start >= len(old_body) - suffix:
            found = start + shift
        elif part.size >= _FOUND_BYTES and misses < _MISSES:
            found = body.find(old_body[start:end], cursor)
            if found < 0:
                misses += 1
                cuts |= _match_within(body, cursor, old_body, start, end)
            else:
                misses = 0
        else:
            found = -1
        if found >= cursor:
            kept.append(Piece(found, found + part.size, part.digest))
            cursor = found + part.size
        start = end
    return kept, cuts


def _match_within(body: bytes, cursor: int, old_body: bytes, start: int, end: int) -> set[int]:
    """The ends of the stretch around an old part's middle that the new body holds too.

    The part is lost, since it has changed somewhere; cut there, what has not changed is a part that is found next time.
    """
    middle = (start + end) // 2
    anchor = old_body[middle : middle + _FOUND_BYTES // 2]
    found = body.find(anchor, cursor)
    if found < 0:
        return set()
    before = common_suffix(old_body[start:middle], body[cursor:found], at_most=min(middle - start, found - cursor))
    after = common_prefix(old_body[middle:end], body[found : found + end - middle])
    return {found - before, found + after}


def _tail_start(body: bytes, kept: Sequence[Piece], suffix: int) -> int:
    """Where the tail begins: with the common end when that is short, else with the closing brackets."""
    floor = max(kept[-1].end if kept else 0, len(body) - _TAIL_BYTES)
    start = len(body) - suffix
    if not suffix or start < floor:
        start = len(body)
        while start > floor and body[start - 1] in _CLOSING:
            start -= 1
    # Not within a character of UTF-8.
    while start < len(body) and body[start] & 0xC0 == 0x80:
        start += 1
    return start


def _filled(kept: Sequence[Piece], end: int, cuts: set[int]) -> list[Piece]:
    """The kept pieces, and new ones in the gaps between them, cut where the old and the new body part."""
    pieces: list[Piece] = []
    at = 0
    for piece in [*kept, None]:
        gap_end = end if piece is None else piece.start
        for cut in sorted({cut for cut in cuts if at < cut < gap_end} | {gap_end}):
            while at < cut:
                stop = min(cut, at + PART_BYTES)
                pieces.append(Piece(at, stop))
                at = stop
        if piece is not None:
            pieces.append(piece)
            at = piece.end
    return pieces


def _merged(pieces: list[Piece], *, grown_at: int) -> list[Piece]:
    """Puts runs of small neighbours together, smallest class first.

    What is new before ``grown_at`` has changed, not grown, and is likely to change again: it stays by itself.
    """
    ceiling = FIRST_CLASS_BYTES
    while ceiling <= PART_BYTES:
        merged: list[Piece] = []
        run: list[Piece] = []
        for piece in pieces:
            if piece.size < ceiling and (piece.digest is not None or piece.start >= grown_at):
                run.append(piece)
                continue
            merged += [*_joined(run, ceiling), piece]
            run = []
        pieces = merged + _joined(run, ceiling)
        ceiling *= FAN_OUT
    return pieces


def _joined(run: list[Piece], ceiling: int) -> list[Piece]:
    """The run in pieces of the next class, if it is long enough to make one; else as it is.

    Were a run put together before it makes one, its bytes would be stored again with each of its next neighbours.
    """
    if len(run) < FAN_OUT or (run[-1].end - run[0].start < ceiling and len(run) < _LONGEST_RUN):
        return run
    joined: list[Piece] = []
    start = run[0].start
    for piece, following in zip(run, [*run[1:], None], strict=True):
        if following is None or following.end - start > PART_BYTES:
            joined.append(Piece(start, piece.end))
            start = piece.end
    return joined
