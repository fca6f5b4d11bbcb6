"""Tasks, threads, three processes of handlers and requests give one tree for each root, while handlers are killed."""

from __future__ import annotations

from tests.campaigns.lineage import trial


async def test_B75_B81_trees_are_as_recorded_by_hand_while_handlers_are_killed() -> None:
    await trial(20, 2, 7)
