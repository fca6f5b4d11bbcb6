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
    from holdfast.client.key_model import KeyVersion
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


@pytest.mark.slow
async def test_readers_and_writers_do_not_see_the_hot_tier_being_emptied() -> None:
    """Conversations grow while everything archived leaves the hot tier again and again, bodies and versions."""
    rig = Rig()
    said: dict[str, int] = dict.fromkeys(NAMES, 0)
    ended = asyncio.Event()
    try:
        await rig.start(clients=4)
        async with asyncio.TaskGroup() as group:
            writers = [
                group.create_task(_converse(hf.keys, key, said))
                for hf in rig.clients[:2]
                for key in NAMES
                for _ in "ab"
            ]
            readers = [group.create_task(_look_back(hf.keys, ended)) for hf in rig.clients[2:]]
            emptier = group.create_task(_empty(rig, ended))
            await asyncio.wait(writers)
            ended.set()
        assert emptier.result() > 50, "hardly a version left the hot tier"
        assert all(task.result() for task in readers)
        async with connect(rig.server.url, agent="reader", cache_bytes=0) as fresh:
            for key in NAMES:
                newest = await fresh.keys.get(key)
                assert newest.version == len(newest.body) == said[key]
                assert {tuple(item["turn"]) for item in newest.body} == {(key, n) for n in range(said[key])}
                assert [version.version async for version in fresh.keys.history(key)] == list(range(said[key], 0, -1))
    finally:
        await rig.stop()


async def _converse(keys: Keys, key: str, said: dict[str, int]) -> None:
    for _ in range(25):
        number, said[key] = said[key], said[key] + 1
        await keys.append(key, {"turn": [key, number], "text": f"what is said in turn {number} " * 8})


async def _empty(rig: Rig, ended: asyncio.Event) -> int:
    """Archives, evicts and trims until the others have ended, and something has gone; returns how many versions."""
    gone = 0
    while not ended.is_set() or gone <= 50:
        await rig.archive()
        await rig.evict()
        gone += await rig.trim(ahead_s=3_600.0, most_versions=1)
    return gone


async def _look_back(keys: Keys, ended: asyncio.Event) -> int:
    """Reads histories and old versions, each of which must be whole; returns how many."""
    choice = random.Random(SEED)
    looks = 0
    while not ended.is_set():
        key = choice.choice(NAMES)
        history = [version async for version in keys.history(key)]
        assert [version.version for version in history] == list(range(len(history), 0, -1))
        if history:
            number = choice.randint(1, len(history))
            assert len((await keys.get(key, number)).body) == number
            assert len((await history[0].load()).body) == len(history)
            looks += 1
    return looks


async def _write(keys: Keys, name: str, written: dict[str, tuple[str, int]]) -> None:
    choice = random.Random(f"{SEED} {name}")
    for number in range(WRITES):
        key, mark = choice.choice(NAMES), f"{name}.{number}"
        version: KeyVersion
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
