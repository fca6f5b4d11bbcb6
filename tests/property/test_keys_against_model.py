"""Named contexts beside a dict of lists, through archiving, trimming, expiry, and crashes of server and workers.

The same for longer: ``make torture-keys SEED=7 STEPS=100000``, or ``python -m tests.campaigns.keys``.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

from tests.campaigns.key_machine import KeysMachine, System
from tests.campaigns.keys import EXAMPLES, STEPS, go_round

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SEED = int(os.environ.get("HOLDFAST_TEST_SEED", "1"))
ROUNDS = 20 if settings().max_examples > 100 else 1


@pytest.fixture
def system() -> Generator[System]:
    system = System()
    yield system
    KeysMachine.system = None
    system.close()


@pytest.mark.timeout(120 + 60 * ROUNDS)
def test_E03_every_read_of_a_key_is_what_the_model_says(system: System) -> None:
    for number in range(ROUNDS):
        go_round(system, SEED * 1_000_003 + number)
    # Hypothesis ends an example early now and then.
    assert system.steps >= 0.8 * ROUNDS * EXAMPLES * STEPS
