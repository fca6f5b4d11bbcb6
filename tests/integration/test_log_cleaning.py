"""What a vacuum leaves of a table's log: little enough to be kept for ever, and enough for every recovery."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from deltalake import DeltaTable

from holdfast.lake import Lake, vacuum, verify_lake
from holdfast.lake import log as log_module
from holdfast.lake import table as table_module
from holdfast.lake.cut import cut_table
from holdfast.lake.log import LOG_DIRECTORY, checkpoint_path, list_checkpoints, list_versions
from holdfast.lake.log_cleaning import BASE_INTERVAL, LogFiles, plan_cleaning
from holdfast.lake.log_copies import DIRECTORY as COPIES_DIRECTORY
from holdfast.lake.log_copies import checksum_path, copy_path
from holdfast.lake.log_repair import LAST_CHECKPOINT
from holdfast.schemas import failpoints
from holdfast.schemas.failpoints import FailpointError
from holdfast.schemas.rows import Position
from tests.test_lake_samples import EPOCH, events

COMMITS = 17
TWO_HOURS_S = 7_200.0
NO_AGE_S = -60.0


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
    for version in range(4, COMMITS + 1):
        assert DeltaTable(str(directory), version=version).to_pyarrow_table().num_rows == version
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
