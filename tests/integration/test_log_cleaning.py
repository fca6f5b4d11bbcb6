"""What a vacuum leaves of a table's log: little enough to be kept for ever, and enough for every recovery."""

from __future__ import annotations

import os
import random
import shutil
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import pytest
from deltalake import DeltaTable

from holdfast.lake import Lake, vacuum, verify_lake
from holdfast.lake import log as log_module
from holdfast.lake import log_repair as log_repair_module
from holdfast.lake import table as table_module
from holdfast.lake.commit import CHECKPOINT_INTERVAL
from holdfast.lake.cut import cut_table
from holdfast.lake.log import LOG_DIRECTORY, checkpoint_path, commit_path, list_checkpoints, list_versions
from holdfast.lake.log_cleaning import BASE_INTERVAL, CHECKPOINT_AGE_S, LogFiles, follow_cleaning, plan_cleaning
from holdfast.lake.log_copies import DIRECTORY as COPIES_DIRECTORY
from holdfast.lake.log_copies import checksum_path, copy_path, read_copy
from holdfast.lake.log_repair import LAST_CHECKPOINT, repair_log
from holdfast.schemas import failpoints
from holdfast.schemas.failpoints import FailpointError
from holdfast.schemas.rows import Position
from tests.test_lake_samples import EPOCH, events

COMMITS = 17
TWO_HOURS_S = 7_200.0
NO_AGE_S = -60.0
HOUR_S = 3_600.0
DAY_S = 24 * HOUR_S
WEEK_S = 7 * DAY_S


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.disarm_all()


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    """A table of 17 commits with a checkpoint after every fourth."""
    monkeypatch.setattr(table_module, "CHECKPOINT_INTERVAL", 4)
    lake = Lake.open(tmp_path / "lake", create=True)
    append(lake, 1, COMMITS)
    assert list_checkpoints(lake.path / "events") == [4, 8, 12, 16]
    return lake


def append(lake: Lake, first: int, last: int) -> None:
    for seq in range(first, last + 1):
        lake.append("events", events(seq, seq), epoch=EPOCH, first_seq=seq, last_seq=seq)


def clean(lake: Lake) -> int:
    return vacuum(lake, NO_AGE_S, orphans_older_than_s=NO_AGE_S, log_older_than_s=NO_AGE_S).log_files


def copies_of(directory: Path) -> set[Path]:
    return {*(directory / COPIES_DIRECTORY).iterdir()}


def is_whole(path: Path, rows: int = COMMITS) -> bool:
    """Whether everything that reads the table reads all of it."""
    directory = path / "events"
    assert Lake.open(path).statistics("events").rows == rows
    assert Lake.open(path).watermark("events") == Position(EPOCH, rows)
    assert DeltaTable(str(directory)).to_pyarrow_table().num_rows == rows
    return verify_lake(path, deep=True).ok


def age(directory: Path, seconds: float) -> None:
    then = time.time() - seconds
    for version in list_checkpoints(directory):
        os.utime(checkpoint_path(directory, version), (then, then))


def tells_each_of(directory: Path, versions: Iterable[int]) -> bool:
    """Whether each of these versions, of a commit with a row each, can be read."""
    return all(DeltaTable(str(directory), version=version).count() == version for version in versions)


def test_checkpoints_that_two_others_replaced_are_removed_with_all_that_belongs_to_them(lake: Lake) -> None:
    directory = lake.path / "events"
    assert clean(lake) == 2 + 12
    assert list_checkpoints(directory) == [12, 16]
    left = [12, 13, 14, 15, 16, 17]
    assert list_versions(directory) == left
    assert copies_of(directory) == {
        *(checksum_path(directory, version) for version in (12, 16)),
        *(copy_path(directory, version) for version in left),
    }
    assert is_whole(lake.path)
    append(Lake.open(lake.path, create=True), COMMITS + 1, COMMITS + 1)
    assert is_whole(lake.path, COMMITS + 1)


def test_a_week_of_commits_keeps_one_checkpoint_to_tell_its_versions_by(lake: Lake) -> None:
    directory = lake.path / "events"
    assert vacuum(lake).log_files == 0
    age(directory, TWO_HOURS_S)
    assert vacuum(lake).log_files == 1
    assert list_checkpoints(directory) == [4, 12, 16]
    assert vacuum(lake).log_files == 0
    assert tells_each_of(directory, range(4, COMMITS + 1))
    # What a backup goes back to, whose image of the stream ends here.
    cut = cut_table(lake.table("events"), epoch=EPOCH, first_seq=1, last_seq=10)
    assert (cut.snapshot.version, len(cut.snapshot.files)) == (10, 10)
    assert cut.checkpoint == checkpoint_path(Path(), 4)
    assert [int(path.stem) for path in cut.commits] == [*range(4, 11)]
    assert is_whole(lake.path)


def test_what_mends_a_destroyed_checkpoint_is_left(lake: Lake) -> None:
    directory = lake.path / "events"
    clean(lake)
    checkpoint_path(directory, 16).write_bytes(b"PAR1 and nothing else")
    assert Lake.open(lake.path).statistics("events").rows == COMMITS
    assert Lake.open(lake.path, create=True).statistics("events").rows == COMMITS
    assert list_checkpoints(directory) == [12]
    assert is_whole(lake.path)


@pytest.mark.parametrize("has_checksum", [True, False])
def test_a_destroyed_checkpoint_does_not_count_as_one_of_the_two(lake: Lake, *, has_checksum: bool) -> None:
    directory = lake.path / "events"
    checkpoint_path(directory, 16).write_bytes(b"PAR1 and nothing else")
    if not has_checksum:
        checksum_path(directory, 16).unlink()
    clean(lake)
    assert list_checkpoints(directory) == [8, 12, 16]
    assert list_versions(directory) == [*range(8, COMMITS + 1)]
    checkpoint_path(directory, 12).write_bytes(b"the other one as well")
    assert Lake.open(lake.path).statistics("events").rows == COMMITS


def test_cut_short_anywhere_it_leaves_a_whole_table_and_the_next_one_goes_on(lake: Lake) -> None:
    directory = lake.path / "events"
    cut_short = 0
    for point in ("clean.before_unlink", "clean.before_copies"):
        append(lake, lake.version("events") + 1, lake.version("events") + 12)
        rows = lake.version("events")
        while True:
            failpoints.arm(point, hit=2 if point == "clean.before_unlink" else 1)
            try:
                clean(lake)
            except FailpointError:
                cut_short += 1
                assert Lake.open(lake.path).statistics("events").rows == rows
                assert DeltaTable(str(directory)).version() == rows
                if point == "clean.before_copies":
                    break
            else:
                failpoints.disarm_all()
                break
        assert is_whole(lake.path, rows)
    assert cut_short > 10
    append(lake, lake.version("events") + 1, lake.version("events") + 4)
    clean(lake)
    left = list_versions(directory)
    assert copies_of(directory) == {
        *(checksum_path(directory, version) for version in list_checkpoints(directory)),
        *(copy_path(directory, version) for version in left),
    }
    assert is_whole(lake.path, left[-1])


def test_the_hint_never_names_a_removed_checkpoint(lake: Lake) -> None:
    directory = lake.path / "events"
    hint = directory / LOG_DIRECTORY / LAST_CHECKPOINT
    newest = hint.read_bytes()
    # Written by one who was stopped since the fourth commit.
    hint.write_bytes(msgspec.json.encode({**msgspec.json.decode(newest), "version": 4}))
    clean(lake)
    assert not hint.exists()
    assert is_whole(lake.path)
    append(lake, COMMITS + 1, COMMITS + 3)
    assert msgspec.json.decode(hint.read_bytes())["version"] == COMMITS + 3
    clean(lake)
    assert hint.exists()


def test_who_listed_the_log_before_it_was_cleaned_reads_it_all_the_same(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = lake.path / "events"
    stale = [[4, 8]]
    clean(lake)
    now = list_checkpoints
    monkeypatch.setattr(log_module, "list_checkpoints", lambda where: stale.pop() if stale else now(where))
    snapshot = log_module.load_snapshot("events", directory)
    assert snapshot is not None
    assert snapshot.version == COMMITS


def test_of_ten_thousand_commits_one_checkpoint_stays_for_as_long_as_they_do() -> None:
    checkpoints = [*range(50, 3 * BASE_INTERVAL, 50)]
    log = LogFiles(commits=[*range(3 * BASE_INTERVAL)], checkpoints=checkpoints)
    written_ms = {version: float(version) for version in checkpoints}

    def left(old_commits: int, before_ms: float) -> list[int]:
        doomed = plan_cleaning(
            log, kept=checkpoints[-2], old_commits=old_commits, written_ms=written_ms, before_ms=before_ms
        )
        assert doomed.commits == log.commits[: min(old_commits, checkpoints[-2])]
        return [version for version in checkpoints if version not in doomed.checkpoints]

    bases = [50, BASE_INTERVAL, 2 * BASE_INTERVAL]
    assert left(0, 0.0) == checkpoints
    assert left(0, 1e9) == [*bases, *checkpoints[-2:]]
    # Replaced within the hour: version 29,700 by the one of 29,800.
    assert left(0, 29_800.0) == [*bases, *checkpoints[checkpoints.index(29_750) :]]
    # Its commits are gone: so is the first, and the one after it that is left tells what is left.
    assert left(BASE_INTERVAL, 1e9) == [*bases[1:], *checkpoints[-2:]]
    assert left(3 * BASE_INTERVAL, 1e9) == checkpoints[-2:]
    # Between two bases, the one before tells what is left.
    alone = LogFiles(commits=log.commits, checkpoints=[*bases, *checkpoints[-2:]])
    doomed = plan_cleaning(
        alone, kept=checkpoints[-2], old_commits=2 * BASE_INTERVAL - 1, written_ms=written_ms, before_ms=1e9
    )
    assert (doomed.commits, doomed.checkpoints) == (log.commits[:BASE_INTERVAL], [50])
    # Nothing is left that would tell the first of these: they stay until the first checkpoint tells what is left.
    headless = LogFiles(commits=log.commits[5:], checkpoints=checkpoints)
    doomed = plan_cleaning(headless, kept=checkpoints[-2], old_commits=40, written_ms=written_ms, before_ms=0.0)
    assert not doomed


def evenly(every_s: float, days: float) -> list[float]:
    return [number * every_s for number in range(int(days * DAY_S / every_s))]


def in_bursts() -> list[float]:
    """Hours of much, days of little, and eleven days of nothing, by turns."""
    chance = random.Random(7)
    written_s, now = [0.0], 0.0
    for _ in range(60):
        every_s, lasting_s = chance.choice([(2.0, 3 * HOUR_S), (90.0, DAY_S), (1_800.0, 2 * DAY_S), (1.0, HOUR_S)])
        written_s += [now + number * every_s for number in range(1, int(lasting_s / every_s))]
        now += lasting_s + chance.choice([0.0, 0.0, 0.0, HOUR_S, 11 * DAY_S])
    return written_s


@pytest.mark.parametrize(
    ("written_s", "most_bases"),
    [
        pytest.param(evenly(5.0, 24.0), 14, id="every five seconds"),
        pytest.param(evenly(60.0, 40.0), 4, id="every minute"),
        pytest.param(evenly(600.0, 90.0), 3, id="every ten minutes"),
        pytest.param(evenly(6 * HOUR_S, 200.0), 3, id="every six hours"),
        pytest.param(in_bursts(), 14, id="in bursts"),
    ],
)
@pytest.mark.parametrize("rests_every", [0, 500], ids=["always cleaned", "not cleaned for twelve days at times"])
def test_each_version_of_the_last_week_can_be_told_at_any_time(
    written_s: list[float], most_bases: int, rests_every: int
) -> None:
    """The log of a lake whose commits were written at these times, cleaned every hour."""
    first = newest = 0
    checkpoints: list[int] = []
    hour, hours = 0, int((written_s[-1] + 10 * DAY_S) / HOUR_S)
    while hour < hours:
        hour += 300 if rests_every and hour % rests_every == rests_every - 1 else 1
        now = hour * HOUR_S
        was, newest = newest, bisect_right(written_s, now) - 1
        next_checkpoint = (was // CHECKPOINT_INTERVAL + 1) * CHECKPOINT_INTERVAL
        checkpoints += range(next_checkpoint, newest + 1, CHECKPOINT_INTERVAL)
        first_young = min(bisect_left(written_s, now - WEEK_S), newest)
        if len(checkpoints) >= 2:
            replaced = range(first, checkpoints[-2])
            doomed = plan_cleaning(
                LogFiles(commits=range(first, newest + 1), checkpoints=checkpoints),
                kept=checkpoints[-2],
                old_commits=len(range(first, min(first_young, replaced.stop))),
                written_ms={version: written_s[version] * 1000 for version in checkpoints},
                before_ms=(now - CHECKPOINT_AGE_S) * 1000,
            )
            assert [*doomed.commits] == [*range(first, first + len(doomed.commits))]
            first += len(doomed.commits)
            checkpoints = [version for version in checkpoints if version not in {*doomed.checkpoints}]
        # Every commit from here on is there, so that a checkpoint between here and the week tells each version of it.
        assert first == 0 or any(first - 1 <= version <= first_young for version in checkpoints)
        assert first_young - first < BASE_INTERVAL + CHECKPOINT_INTERVAL
        recent = bisect_left(written_s, now - CHECKPOINT_AGE_S) - 2 * CHECKPOINT_INTERVAL
        assert sum(version < recent for version in checkpoints) <= most_bases


def test_a_copy_that_lacks_the_first_checkpoint_keeps_one_that_tells_the_same(lake: Lake, tmp_path: Path) -> None:
    append(lake, COMMITS + 1, 40)
    directory, copy = lake.path / "events", tmp_path / "copy"
    shutil.copytree(directory, copy)
    checkpoint_path(copy, 20).unlink()
    age(directory, TWO_HOURS_S)
    then = time.time() - WEEK_S - HOUR_S
    for version in range(22):
        os.utime(commit_path(directory, version), (then, then))
    vacuum(lake)
    assert (list_versions(directory), list_checkpoints(directory)) == ([*range(20, 41)], [20, 36, 40])
    assert tells_each_of(directory, range(20, 41))
    follow_cleaning(directory, copy)
    assert (list_versions(copy), list_checkpoints(copy)) == ([*range(16, 41)], [16, 36, 40])
    assert tells_each_of(copy, range(16, 41))
    assert not follow_cleaning(directory, copy)


def test_a_log_is_opened_and_mended_while_another_process_cleans_it(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = lake.path / "events"

    def list_then_clean(where: Path) -> list[int]:
        listed = list_versions(where)
        if where == directory:
            clean(lake)
        return listed

    monkeypatch.setattr(log_repair_module, "list_versions", list_then_clean)
    assert Lake.open(lake.path, create=True).statistics("events").rows == COMMITS
    assert list_versions(directory) == [*range(12, COMMITS + 1)]
    assert is_whole(lake.path)


@pytest.mark.parametrize("damaged", [copy_path, commit_path], ids=["its copy is torn", "it is damaged"])
def test_a_commit_that_is_cleaned_away_while_it_is_mended_is_passed_over(
    lake: Lake, damaged: Callable[[Path, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = lake.path / "events"
    for version in (3, 14):
        damaged(directory, version).write_bytes(b"{")

    def read_then_clean(where: Path, version: int) -> bytes | None:
        copy = read_copy(where, version)
        if version == 3:
            clean(lake)
        return copy

    monkeypatch.setattr(log_repair_module, "read_copy", read_then_clean)
    assert repair_log(directory) == ([14] if damaged is commit_path else [])
    assert list_versions(directory) == [*range(12, COMMITS + 1)]
    assert is_whole(lake.path)
