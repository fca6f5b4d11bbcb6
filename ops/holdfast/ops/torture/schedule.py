"""When which fault strikes: a function of a seed, of nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import msgspec

MEAN_GAP_S: Final = 1.2
"""Mean time between two faults."""

CALM_S: Final = 1.0
"""No fault strikes in the first and the last of a run: load must be there, and the last fault must be seen to end."""


class Step(msgspec.Struct, frozen=True):
    """One fault: when it begins, counted from the beginning of the load, which, and the seed of its own choices."""

    at_s: float
    fault: str
    seed: int


def plan(seed: int, seconds: float, faults: Sequence[str], *, mean_gap_s: float = MEAN_GAP_S) -> list[Step]:
    """Returns the faults of a run in order of time; the same arguments give the same plan.

    Each fault comes at least once when there is time for as many: first each of them in turn, shuffled, then any.
    ``faults`` count as a set.  Steps are points in time to begin at: a fault that takes longer holds up the next.
    """
    names = sorted(set(faults))
    choice = random.Random(f"schedule {seed} {seconds:g} {','.join(names)}")
    if not names:
        return []
    steps: list[Step] = []
    pending: list[str] = []
    at_s = CALM_S
    while True:
        at_s += choice.uniform(0.3, 1.7) * mean_gap_s
        if at_s > seconds - CALM_S:
            return steps
        if not pending:
            pending = choice.sample(names, len(names))
        steps.append(Step(round(at_s, 3), pending.pop(), choice.randrange(2**31)))
