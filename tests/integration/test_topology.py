"""The four streams: created once, compared ever after, never papered over."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, cast

import pytest
import pytest_asyncio

from holdfast.schemas.errors import DriftError, GapError
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.topology import declarations, ensure_topology, stream_info
from holdfast.streams.wire import DEAD_STREAM, EVENTS_STREAM, HOT_STREAM, KEYS_STREAM
from tests.support import LIMIT_S, OwnServer, create_stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NAMES = {HOT_STREAM, KEYS_STREAM, EVENTS_STREAM, DEAD_STREAM}

# Creates the streams when its standard input says so; prints their epochs.
CHILD = """
import asyncio, sys
from holdfast.streams.connection import open_connection
from holdfast.streams.topology import ensure_topology

async def main() -> None:
    async with open_connection(sys.argv[1]) as connection:
        print("ready", flush=True)
        sys.stdin.readline()
        infos = await ensure_topology(connection)
        print(*(infos[name].epoch for name in sorted(infos)), flush=True)

asyncio.run(main())
"""


@pytest_asyncio.fixture
async def bare(start_server: Any) -> AsyncIterator[Connection]:
    """A connection to a server without streams."""
    server: OwnServer = await start_server()
    async with open_connection(server.url) as connection:
        for name in NAMES:
            await connection.api(f"STREAM.DELETE.{name}")
        yield connection


async def config_of(connection: Connection, name: str) -> dict[str, Any]:
    return cast("dict[str, Any]", (await connection.api(f"STREAM.INFO.{name}"))["config"])


async def test_missing_streams_are_created_as_declared(bare: Connection) -> None:
    infos = await ensure_topology(bare)
    assert set(infos) == NAMES
    assert len({info.epoch for info in infos.values()}) == 4
    for name, declared in declarations().items():
        config = await config_of(bare, name)
        assert {key: config.get(key, type(value)()) for key, value in declared.items()} == declared


async def test_a_second_time_changes_nothing_and_keeps_the_epochs(bare: Connection) -> None:
    first = await ensure_topology(bare)
    await bare.lean.request("ctx.n.event.a.b", b"{}")
    second = await ensure_topology(bare)
    assert {name: info.epoch for name, info in first.items()} == {name: info.epoch for name, info in second.items()}
    assert second[EVENTS_STREAM].messages == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (HOT_STREAM, {"deny_delete": False}),
        (HOT_STREAM, {"discard_new_per_subject": False}),
        (HOT_STREAM, {"allow_rollup_hdrs": True}),
        (KEYS_STREAM, {"max_msgs_per_subject": 64}),
        (EVENTS_STREAM, {"max_age": 3_600_000_000_000}),
        (EVENTS_STREAM, {"max_bytes": 1_000_000}),
        (EVENTS_STREAM, {"subjects": ["ctx.*.event.>", "other.>"]}),
        (DEAD_STREAM, {"duplicate_window": 120_000_000_000}),
        (DEAD_STREAM, {"allow_atomic": False}),
    ],
    ids=str,
)
async def test_a_changed_setting_is_reported_with_both_values(
    bare: Connection, name: str, change: dict[str, Any]
) -> None:
    (setting, value) = next(iter(change.items()))
    declared = declarations()[name] | change
    metadata = {"holdfast.epoch": "e", "holdfast.version": "1"}
    await create_stream(bare, {"name": name, "metadata": metadata, **declared})
    with pytest.raises(DriftError) as caught:
        await ensure_topology(bare)
    assert caught.value.differences == {setting: (declarations()[name][setting], value)}
    assert name in str(caught.value)
    assert setting in str(caught.value)
    assert (await config_of(bare, name)).get(setting, type(value)()) == value  # nothing was mended unasked


async def test_a_stream_without_an_epoch_is_drift(bare: Connection) -> None:
    await create_stream(bare, {"name": HOT_STREAM, **declarations()[HOT_STREAM]})
    with pytest.raises(DriftError) as caught:
        await ensure_topology(bare)
    assert set(caught.value.differences) == {"metadata.holdfast.epoch", "metadata.holdfast.version"}


async def test_a_layout_of_another_version_is_drift(bare: Connection) -> None:
    await ensure_topology(bare)
    metadata = {"holdfast.epoch": "e", "holdfast.version": "2"}
    await bare.api(
        f"STREAM.UPDATE.{HOT_STREAM}", {"name": HOT_STREAM, "metadata": metadata, **declarations()[HOT_STREAM]}
    )
    with pytest.raises(DriftError) as caught:
        await ensure_topology(bare)
    assert caught.value.differences == {"metadata.holdfast.version": ("1", "2")}


async def test_a_missing_stream_that_was_archived_is_a_loss_and_is_not_created(bare: Connection) -> None:
    await ensure_topology(bare, archived=())
    await bare.api(f"STREAM.DELETE.{EVENTS_STREAM}")
    with pytest.raises(GapError, match=EVENTS_STREAM):
        await ensure_topology(bare, archived=[EVENTS_STREAM, HOT_STREAM])
    with pytest.raises(GapError):
        await stream_info(bare, EVENTS_STREAM)
    assert set(await ensure_topology(bare, archived=[HOT_STREAM])) == NAMES


async def test_a_stream_created_anew_has_another_epoch(bare: Connection) -> None:
    first = await ensure_topology(bare)
    await bare.api(f"STREAM.DELETE.{HOT_STREAM}")
    second = await ensure_topology(bare)
    assert second[HOT_STREAM].epoch != first[HOT_STREAM].epoch
    assert second[KEYS_STREAM].epoch == first[KEYS_STREAM].epoch


async def test_two_tasks_at_once_agree(bare: Connection) -> None:
    outcomes = await asyncio.gather(*(ensure_topology(bare) for _ in range(4)))
    assert len({tuple(sorted((name, info.epoch) for name, info in each.items())) for each in outcomes}) == 1


async def test_two_processes_at_once_agree(bare: Connection) -> None:
    children = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CHILD, bare.target.url),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(2)
    ]
    async with asyncio.timeout(LIMIT_S):
        for child in children:
            assert child.stdout is not None
            assert await child.stdout.readline() == b"ready\n"
        epochs = await asyncio.gather(*(child.communicate(b"\n") for child in children))
    assert [child.returncode for child in children] == [0, 0]
    assert epochs[0] == epochs[1]
    infos = await ensure_topology(bare)
    assert epochs[0][0].decode().split() == [infos[name].epoch for name in sorted(infos)]
