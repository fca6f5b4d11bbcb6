"""The campaign of backups, one short round; and that it notices when one acknowledged context is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.campaigns.backups import Round

if TYPE_CHECKING:
    from pathlib import Path


async def test_E79_a_system_restored_elsewhere_has_what_was_acknowledged_and_a_missing_context_is_noticed(
    tmp_path: Path,
) -> None:
    one = Round(tmp_path, seed=11, load_s=0.3, backups=2, drop=1)
    violations = await one.run()
    assert one.history.counts()["acknowledged"] > 100
    # The one that was taken away from each of the three readers, at both looks, and nothing else.
    assert {violation.invariant for violation in violations} == {"I1"}
    assert len({violation.object for violation in violations}) <= 6
