"""Named contexts under many writers, killed clients and killed servers: nothing is lost, doubled, or there in part.

The same for longer: ``python -m tests.campaigns.key_writers``, ``make torture-commits``.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from holdfast.client import connect
from tests.campaigns import commits, key_writers
from tests.campaigns.rig import Rig

if TYPE_CHECKING:
    from holdfast.client.keys import Keys
    from tests.support import OwnServer

pytestmark = [pytest.mark.asyncio, pytest.mark.faults]

SEED: Final = int(os.environ.get("HOLDFAST_TEST_SEED", "1"))
KILLS: Final = int(os.environ.get("HOLDFAST_TEST_KILLS", "30"))
NAMES: Final = ("one", "two", "three")
WRITES: Final = 60
"""Of each task; a server that is killed four times meanwhile is away for half of it."""


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_D04_64_writers_from_4_processes_lose_no_field_of_a_key() -> None:
    """1,000 fields: each is a version of its own, hot, archived, and when the hot tier has let go of them."""
    rig = Rig()
    try:
        await rig.start()
        await key_writers.trial(rig, SEED)
    finally:
        await rig.stop()


@pytest.mark.slow
@pytest.mark.timeout(60 + 2 * KILLS)
async def test_E08_commits_of_a_client_that_is_killed_are_on_all_keys_or_on_none(tmp_path: Path) -> None:
    outcome = await commits.campaign(tmp_path, KILLS, SEED)
    assert outcome.kills == KILLS
    assert outcome.commits >= outcome.acknowledged > 0
    assert outcome.singles > 0


@pytest.mark.slow
async def test_E08_versions_written_while_the_server_is_killed_are_there_once(own_server: OwnServer) -> None:
    """A client that lost its answer looks for its own version before it writes another."""
    written: dict[str, tuple[str, int]] = {}
    ended = asyncio.Event()
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(connect(own_server.url, "default", f"agent{number}")) for number in range(3)
        ]
        async with asyncio.TaskGroup() as group:
            writers = [
                group.create_task(_write(hf.keys, f"{number}.{task}", written))
                for number, hf in enumerate(clients)
                for task in range(6)
            ]
            killer = group.create_task(_kill(own_server, ended))
            await asyncio.wait(writers)
            ended.set()
            await killer
        assert killer.result() >= 2, "the server was hardly killed"
        assert len(written) == 18 * WRITES
        fresh = await stack.enter_async_context(connect(own_server.url, "default", "reader", cache_bytes=0))
        found: Counter[tuple[str | None, str, int]] = Counter()
        for key in NAMES:
            history = [version async for version in fresh.keys.history(key)]
            assert [version.version for version in history] == list(range(len(history), 0, -1))
            found.update((version.change_type, key, version.version) for version in history)
        assert found == Counter((mark, *place) for mark, place in written.items())


async def _write(keys: Keys, name: str, written: dict[str, tuple[str, int]]) -> None:
    choice = random.Random(f"{SEED} {name}")
    for number in range(WRITES):
        key, mark = choice.choice(NAMES), f"{name}.{number}"
        match choice.choice(("put", "patch", "commit")):
            case "put":
                version = await keys.put(key, {"mark": mark}, change_type=mark)
            case "patch":
                version = await keys.patch(key, {name: number}, change_type=mark)
            case _:
                version = (await keys.commit({key: {"mark": mark}}, change_type=mark))[key]
        assert mark not in written
        written[mark] = key, version.version


async def _kill(server: OwnServer, ended: asyncio.Event) -> int:
    """Kills the server at moments of its own until there is nothing to disturb; returns how often."""
    choice = random.Random(SEED)
    kills = 0
    while not ended.is_set():
        try:
            async with asyncio.timeout(choice.uniform(0.02, 0.3)):
                await ended.wait()
        except TimeoutError:
            if kills < 6:
                kills += 1
                await server.restart()
    return kills
