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

from bisect import bisect_left, bisect_right
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

_SLACK_BYTES: Final = 1 * limits.KIB
"""A part is looked for so far around the place where it is expected, and only then elsewhere."""

_SEARCHES: Final = 6
"""How often in all the body may be read for parts that are elsewhere: a body of many lost parts is planned in linear
time too."""

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
    of: tuple[Part, ...] = ()
    """Of a piece that was put together: the stored parts that it begins with, in order; the rest of it is new."""

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
    kept, cuts, old_end = _kept(body, old_body, old_shape or Shape(), prefix, suffix)
    kept_end = kept[-1].end if kept else 0
    changed = len(old_body) - old_end - common_prefix(old_body[old_end:], body[kept_end:])
    end = _tail_start(body, kept_end, suffix, changed)
    return _merged(_filled(kept, end, cuts), grown_at=kept_end)


def is_growth(old_body: bytes, body: bytes) -> bool:
    """Whether half of an old body is still in the new one, so that a third is likely to share much with it."""
    prefix = common_prefix(old_body, body)
    suffix = common_suffix(old_body, body, at_most=min(len(old_body), len(body)) - prefix)
    if 2 * (prefix + suffix) >= len(old_body):
        return True
    ends = _match_within(_Finder(body), 0, 0, old_body, 0, len(old_body))
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


def _kept(body: bytes, old_body: bytes, shape: Shape, prefix: int, suffix: int) -> tuple[list[Piece], set[int], int]:
    """The old parts that the new body holds too, in order; the places where old and new part; and where in the old body
    the last of these parts ended."""
    kept: list[Piece] = []
    cuts = {prefix, len(body) - suffix}
    finder = _Finder(body)
    cursor = start = shift = old_end = 0
    for part in shape.parts:
        end = start + part.size
        if end <= prefix:
            found = start
        elif start >= len(old_body) - suffix:
            found = start + len(body) - len(old_body)
        elif part.size >= _FOUND_BYTES:
            found = finder.find(old_body[start:end], cursor, start + shift)
            if found < 0:
                cuts |= _match_within(finder, cursor, shift, old_body, start, end)
        else:
            found = -1
        if found >= cursor:
            kept.append(Piece(found, found + part.size, part.digest))
            cursor = found + part.size
            shift, old_end = found - start, end
        start = end
    return kept, cuts, old_end


class _Finder:
    """Looks for what an old body held in the new one, first where it is expected; what it reads is bounded."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self._left = _SEARCHES * len(body)

    def find(self, wanted: bytes, cursor: int, expected: int) -> int:
        """Returns where ``wanted`` stands at or after ``cursor``, or -1 when it was not found."""
        near = max(cursor, expected - _SLACK_BYTES)
        found = self.body.find(wanted, near, near + len(wanted) + 2 * _SLACK_BYTES)
        if found < 0 and self._left > 0:
            found = self.body.find(wanted, cursor)
            self._left -= (len(self.body) if found < 0 else found) - cursor
        return found


def _match_within(finder: _Finder, cursor: int, shift: int, old_body: bytes, start: int, end: int) -> set[int]:
    """The ends of the stretch around an old part's middle that the new body holds too.

    The part is lost, since it has changed somewhere; cut there, what has not changed is a part that is found next time.
    """
    middle = (start + end) // 2
    anchor = old_body[middle : middle + _FOUND_BYTES // 2]
    found = finder.find(anchor, cursor, middle + shift)
    if found < 0:
        return set()
    body = finder.body
    before = common_suffix(old_body[start:middle], body[cursor:found], at_most=min(middle - start, found - cursor))
    after = common_prefix(old_body[middle:end], body[found : found + end - middle])
    return {found - before, found + after}


def _tail_start(body: bytes, kept_end: int, suffix: int, changed: int) -> int:
    """Where the tail begins: what stands behind a list that grows is not to be in the part before it.

    So it is as long as the end that the old body had and this one has not (``changed``); when that says nothing, as
    long as the common end; else it is the closing brackets.
    """
    floor = max(kept_end, len(body) - _TAIL_BYTES)
    start = len(body) - (changed or suffix)
    if start < floor:
        start = len(body)
    # A counter behind the list may have become a digit longer: its brackets go with it.
    while start > floor and body[start - 1] in _CLOSING:
        start -= 1
    # Not within a character of UTF-8.
    while start < len(body) and body[start] & 0xC0 == 0x80:
        start += 1
    return start


def _filled(kept: Sequence[Piece], end: int, cuts: set[int]) -> list[Piece]:
    """The kept pieces, and new ones in the gaps between them, cut where the old and the new body part."""
    pieces: list[Piece] = []
    ordered = sorted(cuts)
    at = 0
    for piece in [*kept, None]:
        gap_end = end if piece is None else piece.start
        # What little of the old tail stands before what has grown goes with it.
        first_cut = at if piece is not None else at + _FOUND_BYTES
        for cut in [*ordered[bisect_right(ordered, first_cut) : bisect_left(ordered, gap_end)], gap_end]:
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
        # Two of half a part and more would not make one.
        below = min(ceiling, PART_BYTES // 2)
        merged: list[Piece] = []
        run: list[Piece] = []
        for piece in pieces:
            if piece.size < below and (piece.digest is not None or piece.start >= grown_at):
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
    group: list[Piece] = []
    for piece in run:
        if group and piece.end - group[0].start > PART_BYTES:
            joined.append(_whole(group))
            group = []
        group.append(piece)
    # What is left over waits for its next neighbours, for the same reason.
    return [*joined, *group] if joined else [_whole(group)]


def _whole(group: list[Piece]) -> Piece:
    return group[0] if len(group) == 1 else Piece(group[0].start, group[-1].end, of=_stored_in(group))


def _stored_in(group: list[Piece]) -> tuple[Part, ...]:
    """The stored parts that neighbours begin with, up to the first bytes that are new."""
    parts: list[Part] = []
    for piece in group:
        if piece.digest is not None:
            parts.append(Part(piece.digest, piece.size))
            continue
        parts += piece.of
        if sum(part.size for part in piece.of) != piece.size:
            break
    return tuple(parts)
