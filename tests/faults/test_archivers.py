"""Several archivers and compactors on one lake, one of them stopped at a step and woken up late."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from holdfast.client import connect
from holdfast.lake import Lake, compact, vacuum
from holdfast.lake import connect as connect_lake
from holdfast.lake.commit import CHECKPOINT_INTERVAL
from holdfast.lake.compaction import MergePolicy
from holdfast.lake.index import LakeIndex
from holdfast.lake.litter import VIEWS_WORKSHOP, remove_litter
from holdfast.lake.log import list_checkpoints
from holdfast.schemas import failpoints
from holdfast.schemas.errors import FenceError
from holdfast.schemas.rows import Position
from holdfast.streams.connection import open_connection
from holdfast.streams.hot import HotTier
from holdfast.workers.archiver import Archiver
from tests.campaigns.archivers import STEPS, plan
from tests.running import own_server, settings_in, target_of
from tests.test_lake_samples import EPOCH, contexts

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]
TWO = MergePolicy(min_files=2)


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.disarm_all()


def append(lake: Lake, first: int, last: int) -> None:
    lake.append("contexts", contexts(first, last), epoch=EPOCH, first_seq=first, last_seq=last)


def shown(lake: Path) -> Counter[int]:
    with connect_lake(lake) as connection:
        return Counter(seq for (seq,) in connection.execute("SELECT stream_seq FROM contexts_stored").fetchall())


# One who is stopped for a day between writing a file and committing it


@pytest.mark.parametrize("point", ["lake.before_rename", "lake.after_rename", "lake.before_commit"])
def test_a_vacuum_never_takes_a_file_that_is_committed_after_it(tmp_path: Path, point: str) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    append(lake, 1, 100)
    failpoints.arm(point, lambda _: _vacuum_of_tomorrow(path))
    with pytest.raises(FenceError, match="before it was"):
        append(lake, 101, 200)
    assert lake.watermark("contexts") is not None
    assert shown(path) == Counter(range(1, 101))
    # The next cycle writes the rows again.
    append(lake, 101, 200)
    assert shown(path) == Counter(range(1, 201))


def test_a_vacuum_leaves_a_file_that_is_committed_before_it(tmp_path: Path) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    append(lake, 1, 100)

    def commit_of_the_other(_: str) -> None:
        failpoints.arm("lake.before_commit", lambda _: _vacuum_of_tomorrow(path))
        with pytest.raises(FenceError):
            append(Lake.open(path), 101, 200)
        append(Lake.open(path), 101, 200)

    # The vacuum has chosen what to remove, and somebody commits meanwhile.
    (path / "contexts" / "day=2026-01-01").mkdir(exist_ok=True)
    orphan = path / "contexts" / "day=2026-01-01" / f"part-{'0' * 8}-0000-0000-0000-{'0' * 12}.parquet"
    orphan.write_bytes(b"left by a crash")
    failpoints.arm("vacuum.before_commit", commit_of_the_other)
    _vacuum_of_tomorrow(path)
    assert not orphan.exists()
    assert shown(path) == Counter(range(1, 201))


def test_a_compactor_that_wakes_late_keeps_every_row_and_tells_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    for first in (1, 101, 201):
        append(lake, first, first + 99)

    def a_day_passes(_: str) -> None:
        other = Lake.open(path)
        compact(other, policy=TWO, at_ms=2_000_000_000_000)
        vacuum(other, 0, orphans_older_than_s=-60)

    failpoints.arm("lake.before_parquet_fsync", a_day_passes)
    late = Lake.open(path)
    report = compact(late, policy=TWO, at_ms=2_000_000_000_000)
    assert report.groups == 0
    assert shown(path) == Counter(range(1, 301))
    assert not list(path.glob("*/_quarantine*"))


def _vacuum_of_tomorrow(path: Path) -> None:
    vacuum(Lake.open(path), 0, orphans_older_than_s=-60)


@pytest.mark.parametrize("point", ["lake.after_parquet_fsync", "lake.before_commit", "lake.after_commit"])
def test_a_commit_into_a_log_that_was_cleaned_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Stopped until the commits after its own place had been summarised and removed: their numbers were free again."""
    monkeypatch.setattr("holdfast.lake.table.CHECKPOINT_INTERVAL", 3)
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    append(lake, 1, 10)

    def weeks_pass(_: str) -> None:
        other = Lake.open(path)
        place = other.watermark("contexts")
        first = place.seq + 1 if place else 1
        for start in range(first, 101, 10):
            append(other, start, start + 9)
        vacuum(other, log_older_than_s=-60)

    failpoints.arm(point, weeks_pass)
    with pytest.raises(FenceError):
        append(lake, 11, 20)
    for opened in (lake, Lake.open(path)):
        opened.refresh()
        assert opened.watermark("contexts") == Position(EPOCH, 100)
    assert shown(path) == Counter(range(1, 101))
    append(lake, 101, 110)
    assert shown(path) == Counter(range(1, 111))


# What is left behind


def test_a_vacuum_takes_what_killed_processes_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    path = tmp_path / "lake"
    append(Lake.open(path, create=True), 1, 10)
    log = path / "contexts" / "_delta_log"
    left = [log / f"{9:020d}.json#1", path / f".holdfast.duckdb.{'a' * 32}"]
    for file in left:
        file.write_bytes(b"half")
    old, young = temporary / f"{VIEWS_WORKSHOP}old", temporary / f"{VIEWS_WORKSHOP}young"
    for workshop in (old, young):
        workshop.mkdir()
        (workshop / "holdfast.duckdb").write_bytes(b"half")
    os.utime(old, (0, 0))
    before = {file.name for file in log.iterdir()}
    count, size = remove_litter(path, 0.0)
    assert (count, size) == (1, 4), "what is young was taken, or what is old was not"
    vacuum(Lake.open(path), orphans_older_than_s=-60)
    assert not any(file.exists() for file in left)
    # Another process of another lake may be at work on it: it is left alone for a day, whatever the caller says.
    assert young.exists()
    assert {file.name for file in log.iterdir()} == before - {left[0].name}
    assert shown(path) == Counter(range(1, 11))


def test_a_checkpoint_that_was_missed_is_made_with_the_next_commit(tmp_path: Path) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    for seq in range(1, CHECKPOINT_INTERVAL - 1):
        append(lake, seq, seq)
    # The commit that would write it is a merge, which writes none.
    append(lake, CHECKPOINT_INTERVAL - 1, CHECKPOINT_INTERVAL - 1)
    compact(lake, policy=TWO, at_ms=2_000_000_000_000)
    assert list_checkpoints(path / "contexts") == []
    append(lake, CHECKPOINT_INTERVAL, CHECKPOINT_INTERVAL)
    assert list_checkpoints(path / "contexts") == [CHECKPOINT_INTERVAL + 1]


# Archivers on machines that share no lock


@pytest.mark.asyncio
async def test_an_archiver_overtaken_by_another_one_raises_no_alarm(tmp_path: Path) -> None:
    """The other one archives and purges what this one was about to read: that is no gap, and nothing is lost."""
    async with own_server(tmp_path, duplicate_window_s=0.1) as server, AsyncExitStack() as stack:
        hf = await stack.enter_async_context(connect(server.url))
        settings = [
            settings_in(tmp_path, role, hot_window_s=0.0, purge_interval_s=0.0, duplicate_window_s=0.1, archive_rows=5)
            for role in ("late", "other")
        ]
        late, other = [await _archiver(stack, server.url, chosen) for chosen in settings]
        refs = await hf.put_many([{"n": n} for n in range(20)])
        await late.flush()
        refs += await hf.put_many([{"n": n} for n in range(20, 60)])
        await other.flush()
        await other.evict(0.0)
        # This one stands at the 21st message, which is gone.
        await late.flush()
        assert late.problems() == []
        assert late.counters()["contexts_fenced"] >= 1
        refs += await hf.put_many([{"n": n} for n in range(60, 70)])
        await late.flush()
        seen = await asyncio.to_thread(shown, settings[0].lake)
        assert seen == Counter(range(1, len(refs) + 1))


async def _archiver(stack: AsyncExitStack, url: str, settings: object) -> Archiver:
    connection = await stack.enter_async_context(open_connection(target_of(url)))
    lake = Lake.open(settings.lake, create=True)  # type: ignore[attr-defined]
    index = stack.enter_context(LakeIndex.open(settings.index))  # type: ignore[attr-defined]
    hot = HotTier(connection)
    stack.push_async_callback(hot.close)
    archiver = Archiver(connection, hot, lake, index, settings)  # type: ignore[arg-type]
    stack.push_async_callback(archiver.close)
    return archiver


def test_a_plan_has_every_step_of_every_role_and_is_the_same_for_a_seed() -> None:
    rounds = plan(3, 60)
    assert {(round_.role, round_.step) for round_ in rounds} == {
        (role, step) for role, steps in STEPS.items() for step in steps
    }
    assert rounds == plan(3, 60)
    assert rounds != plan(4, 60)


def test_archivers_stopped_at_a_step_and_woken_late_lose_and_double_nothing() -> None:
    command = [sys.executable, "-m", "tests.campaigns.archivers", "--rounds", "1", "--seed", "5", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["rounds"], told["violations"]) == (1, 0)
    assert sum(told["paused"].values()) == 1
