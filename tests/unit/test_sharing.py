"""Plans of shared parts: they tile the body, keep what is still there, and cost what is new."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.schemas import limits
from holdfast.schemas.refs import Digest
from holdfast.streams.sharing import (
    FAN_OUT,
    PART_BYTES,
    Part,
    Piece,
    Shape,
    common_prefix,
    common_suffix,
    is_growth,
    plan_parts,
)
from tests.support import examples

TAIL_BYTES = 512
MOST_PARTS_SMALL = 64
"""Most parts of a body below a full part: some runs of small ones, of each class."""

LARGE_BYTES = 5_000_000
LIMIT_S = 10.0
"""Processor time for a plan of 5 MB, many times what it takes on a slow machine; what is quadratic takes minutes."""


class Stored:
    """A body as it is stored, with the bytes of every part that was ever stored; grows by plans."""

    def __init__(self) -> None:
        self.body = b""
        self.shape = Shape()
        self.chunks: dict[Digest, bytes] = {}
        self.bytes_stored = 0

    def store(self, body: bytes) -> list[Piece]:
        """Plans and stores the next body; fails unless the plan makes exactly that body."""
        pieces = plan_parts(body, self.body, self.shape)
        parts: list[Part] = []
        at = 0
        for piece in pieces:
            assert piece.start == at < piece.end
            at = piece.end
            chunk = body[piece.start : piece.end]
            digest = piece.digest
            if digest is None:
                digest = Digest(hashlib.md5(chunk, usedforsecurity=False).hexdigest())
                self.chunks[digest] = chunk
                self.bytes_stored += len(chunk)
                assert len(chunk) <= PART_BYTES
            assert self.chunks[digest] == chunk
            begins_with = b"".join(self.chunks[part.digest] for part in piece.of)
            assert chunk.startswith(begins_with)
            assert [len(self.chunks[part.digest]) for part in piece.of] == [part.size for part in piece.of]
            parts.append(Part(digest, piece.size))
        assert at <= len(body) <= at + TAIL_BYTES
        self.body, self.shape = body, Shape(tuple(parts))
        assert self.shape.tail_at == at
        return pieces


def encoded(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def message(rnd: random.Random, size: int) -> dict[str, str]:
    return {"role": rnd.choice(("user", "tool")), "content": "".join(rnd.choices("abcdefgh \n", k=size))}


# Bodies that share something: stretches out of a few, so that they repeat, mixed with others.
STRETCHES = st.sampled_from([bytes([65 + n]) * (7**n % 5_000) + b"%d|" % n for n in range(12)])
BODIES = st.lists(st.one_of(STRETCHES, st.binary(max_size=80)), max_size=14).map(b"".join)
TEXTS = st.lists(st.sampled_from(["a", "ü", "𝄞", "é", "]", '"}', " ", "word " * 40, "ü" * 300]), max_size=30).map(
    "".join
)


@examples(150)
@given(st.lists(BODIES, min_size=1, max_size=6))
def test_any_plan_makes_exactly_the_body_out_of_parts_that_are_there(bodies: list[bytes]) -> None:
    stored = Stored()
    for body in bodies:
        stored.store(body)


@examples(100)
@given(st.lists(TEXTS, min_size=2, max_size=5))
def test_the_tail_of_text_is_text(texts: list[str]) -> None:
    stored = Stored()
    for text in texts:
        stored.store(text.encode())
        assert text.endswith(stored.body[stored.shape.tail_at :].decode())


@examples(100)
@given(BODIES, BODIES, BODIES, BODIES)
def test_what_is_edited_costs_what_was_changed_and_not_the_whole(
    before: bytes, old: bytes, new: bytes, after: bytes
) -> None:
    """Once it is stored in parts: an edit costs no more than its own bytes and the part on either side."""
    stored = Stored()
    stored.store(before + old + after)
    largest = max((part.size for part in stored.shape.parts), default=0)
    already = stored.bytes_stored
    stored.store(before + new + after)
    assert stored.bytes_stored - already <= len(new) + 2 * largest + 2 * TAIL_BYTES


@examples(200)
@given(BODIES, BODIES, BODIES)
def test_common_ends_are_as_long_as_can_be(begin: bytes, one: bytes, other: bytes) -> None:
    first, second = begin + one, begin + other
    prefix = common_prefix(first, second)
    assert first[:prefix] == second[:prefix]
    assert prefix >= len(begin)
    assert prefix == min(len(first), len(second)) or first[prefix] != second[prefix]
    first, second = one + begin, other + begin
    shortest = min(len(first), len(second))
    suffix = common_suffix(first, second, at_most=shortest)
    assert first[len(first) - suffix :] == second[len(second) - suffix :]
    assert suffix == shortest or first[-suffix - 1] != second[-suffix - 1]
    assert common_suffix(first, second, at_most=suffix // 2) == suffix // 2


def test_what_has_not_changed_is_not_stored_again() -> None:
    rnd = random.Random(1)
    stored = Stored()
    body = encoded([message(rnd, 300) for _ in range(100)])
    stored.store(body)
    already = stored.bytes_stored
    stored.store(body)
    assert stored.bytes_stored == already


Wrap = Callable[[Sequence[Any], int], Any]

GROWTHS: dict[str, Wrap] = {
    "a list": lambda items, _: items,
    "newest first": lambda items, _: list(items[::-1]),
    "a list in an object": lambda items, _: {"id": "s1", "messages": items},
    "with a counter behind": lambda items, turn: {"messages": items, "turns": turn, "updated": f"2026-01-01T{turn}Z"},
    "with a time in front": lambda items, turn: {"_timestamp": 1_767_225_600_000 + 977 * turn, "messages": items},
    "with counters on both sides": lambda items, turn: {"_n": turn, "messages": items, "turns": turn, "z": "end"},
    "behind a large constant": lambda items, turn: {"a": "system prompt " * 9_000, "b": turn, "messages": items},
    "with a constant behind": lambda items, _: {"messages": items, "tools": "search fetch " * 2_000},
    "text": lambda items, _: "\n\n".join(item["content"] for item in items),
}


@pytest.mark.parametrize("wrap", GROWTHS.values(), ids=GROWTHS)
@pytest.mark.parametrize(("turns", "size"), [(300, 60), (200, 700), (120, 8_000)])
def test_a_body_that_grows_costs_a_few_times_its_end_not_the_sum_of_its_versions(
    wrap: Wrap, turns: int, size: int
) -> None:
    rnd = random.Random(turns)
    items = [message(rnd, rnd.randrange(size // 2, 2 * size)) for _ in range(turns)]
    stored = Stored()
    whole = 0
    most_parts = 0
    for turn in range(1, turns + 1):
        body = encoded(wrap(items[:turn], turn))
        most_parts = max(most_parts, len(stored.store(body)))
        whole += len(body)
    # Each byte once for each size class it has gone through; the rest is room.
    classes = max(1.0, math.log(len(stored.body) / size, FAN_OUT))
    assert stored.bytes_stored <= (classes + 3) * len(stored.body)
    assert stored.bytes_stored < whole / 4
    assert most_parts <= MOST_PARTS_SMALL + 3 * len(stored.body) / PART_BYTES


def test_a_part_of_full_size_is_never_stored_again() -> None:
    """A megabyte that grew is done with: only its end is put together with what comes."""
    rnd = random.Random(2)
    items: list[Any] = []
    stored = Stored()
    while len(stored.body) < limits.MIB:
        items.append(message(rnd, 9_000))
        stored.store(encoded(items))
    grown = len(stored.body)
    first = stored.shape.parts[0]
    already = stored.bytes_stored
    for _ in range(70):
        items.append(message(rnd, 9_000))
        stored.store(encoded(items))
    assert stored.shape.parts[0] == first
    assert stored.bytes_stored - already <= 6 * (len(stored.body) - grown) + PART_BYTES


Edit = Callable[[list[Any], int], list[Any]]

EDITS: dict[str, Edit] = {
    "changed in the middle": lambda items, n: [*items[:100], {"role": "user", "content": "x" * n}, *items[101:]],
    "inserted in front": lambda items, n: [{"role": "user", "content": "x" * n}, *items],
    "inserted in the middle": lambda items, n: [*items[:77], {"role": "user", "content": "x" * n}, *items[77:]],
    "cut off": lambda items, _: items[:-3],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_costs_the_part_it_is_in_once_and_the_next_one_beside_it_little(edit: Edit) -> None:
    rnd = random.Random(3)
    items = [message(rnd, 300) for _ in range(200)]
    stored = Stored()
    for turn in range(1, 201):
        stored.store(encoded(items[:turn]))
    largest = max(part.size for part in stored.shape.parts)
    costs: list[int] = []
    for n in (10, 2_000, 300):
        already = stored.bytes_stored
        items = edit(items, n)
        stored.store(encoded(items))
        costs.append(stored.bytes_stored - already)
    assert costs[0] <= largest + 2_000
    assert max(costs[1:]) <= len(stored.body) / 8
    # And it goes on growing as cheaply as before.
    already, edited = stored.bytes_stored, len(stored.body)
    for _ in range(200):
        items = [*items, message(rnd, 300)]
        stored.store(encoded(items))
    assert stored.bytes_stored - already <= 6 * (len(stored.body) - edited) + edited


def test_what_is_deleted_costs_the_parts_it_was_in() -> None:
    rnd = random.Random(9)
    items = [message(rnd, 300) for _ in range(200)]
    stored = Stored()
    for turn in range(1, 201):
        stored.store(encoded(items[:turn]))
    already = stored.bytes_stored
    for place in (190, 150, 100, 50, 0, 1, 2, 3):
        del items[place]
        stored.store(encoded(items))
    assert stored.bytes_stored - already <= 4 * len(stored.body)


def test_a_body_that_is_replaced_shares_nothing_and_is_told_as_such() -> None:
    rnd = random.Random(4)
    one, other = rnd.randbytes(50_000), rnd.randbytes(60_000)
    stored = Stored()
    stored.store(one)
    assert all(piece.digest is None for piece in stored.store(other))
    assert not is_growth(one, other)


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (lambda old: old + b"more", True),
        (lambda old: b"more" + old, True),
        (lambda old: old[:7_000] + b"in between" + old[7_000:], True),
        (lambda old: old[2_000:8_000], True),
        (lambda old: old[:3_000], False),
        (lambda _: b"", False),
    ],
)
def test_growth_is_when_half_of_it_is_still_there(new: Callable[[bytes], bytes], expected: bool) -> None:
    old = random.Random(5).randbytes(10_000)
    assert is_growth(old, new(old)) is expected


def test_every_cut_through_a_character_leaves_text() -> None:
    """Multi-byte text that grows by one character at a time: the tail begins at every place there is."""
    stored = Stored()
    text = "ü𝄞" * 400
    for end in range(1_000, 1_800):
        body = (text[: end - 1_000] + "é" * 1_500).encode() if end % 2 else ("é" * 1_500 + text[: end - 1_000]).encode()
        stored.store(body)
        stored.body[stored.shape.tail_at :].decode()


def equal_parts(body: bytes, count: int) -> Shape:
    size = len(body) // count
    return Shape(tuple(Part(Digest(str(n)), size) for n in range(count)))


def changed_parts(body: bytes, count: int, which: Iterable[int]) -> bytes:
    """The body with a byte changed in the middle of some of its equal parts."""
    size = len(body) // count
    changed = bytearray(body)
    for n in which:
        changed[n * size + size // 2] ^= 0xFF
    return bytes(changed)


HARD_BODIES: dict[str, bytes] = {
    "one letter": b"a" * LARGE_BYTES,
    "two letters": b"ab" * (LARGE_BYTES // 2),
    "one record": b'{"role":"user","content":"hello there"},' * (LARGE_BYTES // 40),
    "noise": random.Random(6).randbytes(LARGE_BYTES),
}
HARD_CHANGES: dict[str, Callable[[bytes, int], bytes]] = {
    "appended": lambda body, _: body + b"x",
    "in front": lambda body, _: b"x" + body,
    "in the middle": lambda body, _: body[: LARGE_BYTES // 2] + b"XYZ" + body[LARGE_BYTES // 2 :],
    "both ends": lambda body, _: b"b" + body[1:-1] + b"c",
    "a third deleted": lambda body, _: body[: LARGE_BYTES // 3] + body[2 * LARGE_BYTES // 3 :],
    "replaced by noise": lambda _, __: random.Random(7).randbytes(LARGE_BYTES),
    "a letter in another place": lambda _, __: b"a" * (LARGE_BYTES // 2) + b"b" + b"a" * (LARGE_BYTES // 2),
    "every third part": lambda body, count: changed_parts(body, count, range(0, count, 3)),
    "all but every sixteenth part": lambda body, count: changed_parts(body, count, [n for n in range(count) if n % 16]),
}


@pytest.mark.parametrize("count", [1, 19, 4_000])
@pytest.mark.parametrize("change", HARD_CHANGES)
@pytest.mark.parametrize("kind", HARD_BODIES)
def test_no_body_makes_planning_slow(kind: str, change: str, count: int) -> None:
    old = HARD_BODIES[kind]
    new = HARD_CHANGES[change](old, count)
    shape = equal_parts(old, count)
    began_s = time.process_time()
    pieces = plan_parts(new, old, shape)
    is_growth(old, new)
    assert time.process_time() - began_s < LIMIT_S
    assert pieces[0].start == 0
    assert all(one.end == other.start for one, other in pairwise(pieces))
    for piece in pieces:
        if piece.digest is not None:
            start = int(piece.digest) * (len(old) // count)
            assert new[piece.start : piece.end] == old[start : start + len(old) // count]


def test_parts_that_moved_a_little_are_found_however_many_were_changed() -> None:
    """Each change drops a byte, so that everything behind it stands a byte earlier."""
    old = random.Random(8).randbytes(1_000_000)
    parts = [old[start : start + 1_000] for start in range(0, len(old), 1_000)]
    new = b"".join(part[:500] + part[501:] if n % 2 else part for n, part in enumerate(parts))
    kept = [piece for piece in plan_parts(new, old, equal_parts(old, 1_000)) if piece.digest is not None]
    assert len(kept) == 500
