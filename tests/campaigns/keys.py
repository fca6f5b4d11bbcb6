"""Named contexts beside their model, for as many steps as are wanted::

    python -m tests.campaigns.keys --steps 100000 --seed 7

Ends with 0 only when no read differed from the model.  A failure is told with its seed, its round and a minimal
history; the same seed goes through the same steps, and ``--first-round`` begins with the round that failed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.campaigns.key_machine import KeysMachine, System
from tests.campaigns.rig import tell

EXAMPLES = 40
STEPS = 50
"""Of one example."""


def run(steps: int, first_seed: int, first_round: int) -> bool:
    """Runs rounds, each on a new system, until there were so many steps; returns whether none diverged."""
    done, number = 0, first_round
    began = time.perf_counter()
    while done < steps:
        system = System()
        try:
            go_round(system, first_seed * 1_000_003 + number)
        except Exception:  # noqa: BLE001  whatever it is, it is a divergence
            traceback.print_exc()
            tell(f"diverged: seed {first_seed}, round {number}, after {done + system.steps} steps")
            tell(f"again: python -m tests.campaigns.keys --seed {first_seed} --first-round {number} --steps 1")
            return False
        finally:
            KeysMachine.system = None
            system.close()
        done += system.steps
        elapsed_s = time.perf_counter() - began
        tell(f"{done} of {steps} steps, round {number}, {elapsed_s:.0f} s, {elapsed_s / done * 1000:.1f} ms a step")
        number += 1
    tell(f"no divergence in {done} steps, seed {first_seed}")
    return True


def go_round(system: System, round_seed: int) -> None:
    """Goes through the steps that a seed stands for."""
    KeysMachine.system = system
    run_state_machine_as_test(
        seed(round_seed)(KeysMachine),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            database=None,
            deadline=None,
            print_blob=False,
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first-round", type=int, default=0)
    chosen = parser.parse_args()
    logging.getLogger("holdfast").setLevel(logging.CRITICAL)  # of a server that is killed there is much to tell
    sys.exit(0 if run(chosen.steps, chosen.seed, chosen.first_round) else 1)


if __name__ == "__main__":
    main()
