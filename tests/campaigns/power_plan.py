"""What each power cut is to hit: a pure function of the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, Literal, get_args

import msgspec

from tests.campaigns.power_worker import POINTS

PowerKind = Literal["idle", "writing", "purge", "torn", "batches", "archiving", "trimming", "changing"]

KINDS: Final[tuple[PowerKind, ...]] = get_args(PowerKind)
_TEARABLE: Final[tuple[PowerKind, ...]] = ("writing", "batches", "purge", "archiving", "trimming", "changing")

ROUNDS_PER_DISK: Final = 6
"""Cuts of one file system, each on what the one before has left; then a new one is made."""

IDLE_S: Final = 1.0
"""From the last acknowledgement to the cut, when nothing is under way."""


class RoundPlan(msgspec.Struct, frozen=True):
    """One cut.

    ``hits`` is what is under way, which of a torn one is drawn too; ``seconds`` is how long the load lasts when no
    failpoint cuts it short; ``armed`` is the failpoint and the call at which a worker pulls the plug.
    """

    number: int
    kind: PowerKind
    hits: PowerKind
    seed: int
    seconds: float
    is_torn: bool
    armed: tuple[str, int] | None

    @property
    def has_upkeep(self) -> bool:
        """Whether workers archive meanwhile."""
        return self.hits in ("purge", "archiving", "trimming")


def plan(seed: int, cuts: int, kinds: Sequence[PowerKind]) -> list[RoundPlan]:
    """Returns the rounds of a campaign: the kinds in turn, everything else by chance."""
    rounds: list[RoundPlan] = []
    for number in range(cuts):
        choice = random.Random(f"power {seed} {number}")
        kind = kinds[number % len(kinds)]
        hits = choice.choice(_TEARABLE) if kind == "torn" else kind
        points = [point for name in (hits, "archiving") for point in POINTS.get(name, ())]
        has_upkeep = hits in ("purge", "archiving", "trimming")
        armed = (choice.choice(points), choice.randint(1, 12)) if has_upkeep and choice.random() < 0.5 else None
        rounds.append(
            RoundPlan(
                number=number,
                kind=kind,
                hits=hits,
                seed=choice.getrandbits(32),
                seconds=round(choice.uniform(0.4, 1.5) if has_upkeep else choice.uniform(0.05, 0.5), 3),
                is_torn=kind == "torn",
                armed=armed,
            )
        )
    return rounds
