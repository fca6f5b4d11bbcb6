"""The campaign against a cluster, in short: a leader killed, a node cut off, a node wiped; and that it would notice.

The campaign itself: ``python -m tests.campaigns.cluster``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from holdfast.ops.torture.history import Attempt, HistoryWriter
from tests.campaigns.cluster_campaign import Campaign
from tests.campaigns.cluster_plan import schedule_of
from tests.campaigns.cluster_rig import missing

if TYPE_CHECKING:
    from tests.campaigns.cluster_rounds import Kind


SEED = 11
"""Of this one the partition is short, and cuts off a follower."""


def planted(folder: Path) -> None:
    """Notes an acknowledgement of something that was never stored."""
    with HistoryWriter(folder / "history" / "r1.planted.ndjson") as writer:
        attempt = Attempt(
            op="r1-planted-1",
            kind="event",
            via="sdk",
            producer="r1-planted",
            number=1,
            id="00000000-0000-4000-8000-000000000001",
            sha256="0" * 64,
            size=1,
            namespace="r1",
        )
        writer.begin(attempt)
        writer.acknowledged(attempt.op)


async def test_nothing_acknowledged_by_a_cluster_is_lost_or_doubled(tmp_path: Path) -> None:
    why = missing()
    if why is not None:
        pytest.skip(why)
    rounds: dict[Kind, int] = {"leader-kill": 1, "partition": 1, "wipe": 1}
    campaign = Campaign(SEED, tmp_path, {str(kind): count for kind, count in rounds.items()}, is_short=True, quiet=True)
    planted(tmp_path)
    report = await campaign.run(schedule_of(SEED, rounds))
    found = {(violation.object, violation.what.partition(":")[0]) for violation in report.violations}
    # What was planted is missed by every reader that must show everything; nothing else is wrong.
    assert found == {("00000000-0000-4000-8000-000000000001", "lost")}
    assert report.rounds == 3
    assert report.acknowledged > 500
    assert report.worker_deaths == 0
