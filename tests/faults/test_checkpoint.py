"""A checkpoint under load, everything killed, a restore elsewhere that is cut off and completed.

The same for longer: ``python -m tests.campaigns.checkpoint``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

from tests.campaigns import checkpoint

pytestmark = [pytest.mark.asyncio, pytest.mark.faults]

SEED: Final = int(os.environ.get("HOLDFAST_TEST_SEED", "1"))
ROUNDS: Final = int(os.environ.get("HOLDFAST_TEST_ROUNDS", "1"))


@pytest.mark.slow
@pytest.mark.timeout(60 + 60 * ROUNDS)
async def test_B05_B34_what_was_acknowledged_before_a_capture_outlives_the_death_of_everything(tmp_path: Path) -> None:
    outcome = await checkpoint.campaign(tmp_path, ROUNDS, SEED)
    assert outcome.rounds == ROUNDS
    assert outcome.before_capture >= 50 * ROUNDS
    assert outcome.captured > 0
