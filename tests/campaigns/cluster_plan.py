"""How the campaign against a cluster is laid out: how much load, what is checked together, how often each fault comes.

Holds no tests itself.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from tests.campaigns.cluster_rounds import Kind

RATE: Final = 25.0
"""Writes a second of each of nine writers: an outage shows, and two cores have room for three nodes."""

CHAPTER: Final = 10
"""Rounds that are checked together: reading all streams costs seconds."""

PEAK_RATE: Final = 80.0
"""Writes a second of each writer that load this machine fully, with three nodes and the workers on two cores."""

CHAPTER_S: Final = 240.0
"""How long chaos goes on before what was written is looked for."""

WEIGHTS: Final[dict[Kind | Literal["workers"], int]] = {
    "leader-kill": 6,
    "partition": 6,
    "all-cut": 3,
    "wipe": 2,
    "combined": 3,
    "rolling": 1,
    "workers": 3,
}
"""How often each fault of chaos comes; ``workers``: the process of all workers is killed and started again."""

SEGMENT_S: Final = 60.0
PAUSE_S: Final = 4.0
"""Between two faults of chaos, on average."""


def schedule_of(seed: int, rounds: dict[Kind, int]) -> list[Kind]:
    """Returns the rounds in an order of the seed's."""
    kinds: list[Kind] = [kind for kind, count in rounds.items() for _ in range(count)]
    random.Random(f"schedule {seed}").shuffle(kinds)
    return kinds
