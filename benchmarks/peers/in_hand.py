"""How reading from what a process has in hand is timed: by one loop, for Holdfast and for its peers alike.

Such a read takes a microsecond or less; two readings of the clock and an append around each would be a good part of
it.  So the clock is read around all of them, and there are no latencies of single reads.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from benchmarks.measure import Run, Runner, timed


def in_hand(keys: Sequence[str], read: Callable[[str], Awaitable[object]]) -> Runner:
    """Returns the runner that reads one key after the other, in turn, each time by a text that is new."""

    async def read_all(texts: list[str]) -> None:
        for text in texts:
            await read(text)

    async def run(count: int) -> Run:
        return await timed(count, partial(read_all, new_texts(keys, count)))

    return run


def new_texts(keys: Sequence[str], count: int) -> list[str]:
    """Returns keys in turn, as new objects: a text remembers its own hash, and one that has just been decoded from a
    message has none yet."""
    raw = [key.encode() for key in keys]
    return [raw[i % len(raw)].decode() for i in range(count)]
