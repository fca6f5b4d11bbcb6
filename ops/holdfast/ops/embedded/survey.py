"""The first reading of a source: how much there is, which ids it has, and what of it is recent."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b

import msgspec

from holdfast.ops.embedded.reading import identity_of
from holdfast.ops.embedded.source import Item


class IdSet:
    """The ids of a source: eight bytes each, whatever their length.

    It answers by 64 bits of a digest.  Two ids that share them are taken for one: the second event then gets an id of
    its own, as a repeated one does, and what refers to it is found out by the verification.
    """

    def __init__(self, hashes: Iterable[int]) -> None:
        self._sorted = array("Q", sorted(hashes))
        pairs = zip(self._sorted, self._sorted[1:], strict=False)
        self._repeated = frozenset(first for first, second in pairs if first == second)

    def __contains__(self, key: str) -> bool:
        wanted = hash_of(key)
        place = bisect_left(self._sorted, wanted)
        return place < len(self._sorted) and self._sorted[place] == wanted

    def occurrences(self) -> Occurrences:
        """Returns what numbers the occurrences of repeated ids, in the order of the source."""
        return Occurrences(self._repeated)


class Occurrences:
    """Numbers the events that carry one id: 0 for the first; each event is to be asked for once, in order."""

    def __init__(self, repeated: frozenset[int]) -> None:
        self._repeated = repeated
        self._seen: Counter[int] = Counter()

    def next(self, key: str) -> int:
        """Returns how many events with this id came before."""
        if not self._repeated:
            return 0
        wanted = hash_of(key)
        if wanted not in self._repeated:
            return 0
        self._seen[wanted] += 1
        return self._seen[wanted] - 1


class Survey(msgspec.Struct, frozen=True):
    """What a source holds.

    ``recent_from`` is the place, from 0, behind the last event that is older than the recent ones; ``digest`` is that
    of all their texts, each followed by a newline.  ``migrated`` events carry references already, and are in no other
    figure.
    """

    events: int
    migrated: int
    size_bytes: int
    recent_from: int
    newest_ms: int | None
    digest: str
    ids: IdSet


def survey(items: Iterable[Item], recent_s: float) -> Survey:
    """Reads a source once; memory grows by some fifty bytes an event while it reads, by sixteen after that."""
    hashes = array("Q")
    times = array("q")
    hasher = blake2b(digest_size=20)
    size_bytes = migrated = 0
    for item in items:
        identity = identity_of(item.text)
        if identity.is_migrated:
            migrated += 1
            continue
        hasher.update(item.text)
        hasher.update(b"\n")
        size_bytes += len(item.text) + 1
        hashes.append(hash_of(identity.key))
        times.append(-1 if identity.at_ms is None else identity.at_ms)
    newest = max(times, default=-1)
    return Survey(
        events=len(hashes),
        migrated=migrated,
        size_bytes=size_bytes,
        recent_from=_recent_from(times, newest - round(recent_s * 1000)),
        newest_ms=None if newest < 0 else newest,
        digest=hasher.hexdigest(),
        ids=IdSet(hashes),
    )


def _recent_from(times: array[int], since_ms: int) -> int:
    for place in range(len(times) - 1, -1, -1):
        # What says no time goes with its neighbours.
        if 0 <= times[place] < since_ms:
            return place + 1
    return 0


def hash_of(key: str) -> int:
    """Returns 64 bits that stand for an id."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())
