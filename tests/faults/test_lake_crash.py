"""Kills and damage: what every step of the lake's protocols leaves behind, and what the next process makes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deltalake import DeltaTable

from holdfast.lake import Lake, LakeIndex, Lookup, compact, connect, vacuum, verify_lake
from holdfast.lake.commit import CHECKPOINT_INTERVAL
from holdfast.lake.compaction import MergePolicy
from holdfast.lake.log import checkpoint_path, commit_path, list_checkpoints
from holdfast.schemas import failpoints
from holdfast.schemas.errors import IntegrityError
from holdfast.schemas.rows import Position
from tests.test_lake_samples import EPOCH, context, contexts, events

pytestmark = pytest.mark.faults

POINTS = [
    "lake.before_parquet_fsync",
    "lake.after_parquet_fsync",
    "lake.before_rename",
    "lake.after_rename",
    "lake.before_commit",
    "lake.after_commit",
    "lake.after_log_fsync",
]
COMMITTED = {"lake.after_commit", "lake.after_log_fsync"}

APPEND = """
import sys
from pathlib import Path
from holdfast.lake import Lake
from tests.test_lake_samples import EPOCH, contexts
lake = Lake.open(sys.argv[1])
place = lake.watermark("contexts")
first = place.seq + 1 if place else 1
for start in range(first, 1001, 100):
    lake.append("contexts", contexts(start, start + 99), epoch=EPOCH, first_seq=start, last_seq=start + 99)
"""

COMPACT = """
import sys
from holdfast.lake import Lake, compact
compact(Lake.open(sys.argv[1]), at_ms=2_000_000_000_000)
"""


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.disarm_all()


def run(script: str, lake: Path, armed: str = "") -> int:
    """Runs a script in a process of its own; returns its exit code."""
    environment = {**os.environ, failpoints.ENVIRONMENT: armed, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, "-c", script, str(lake)], env=environment, check=False).returncode


def shown(lake: Path) -> Counter[int]:
    with connect(lake) as connection:
        return Counter(seq for (seq,) in connection.execute("SELECT stream_seq FROM contexts_stored").fetchall())


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("hit", [1, 4])
def test_killed_archiver_leaves_a_run_whole_or_not_at_all(tmp_path: Path, point: str, hit: int) -> None:
    path = tmp_path / "lake"
    Lake.open(path, create=True)
    assert run(APPEND, path, f"{point}=kill:{hit}") == -signal.SIGKILL
    whole = 100 * (hit if point in COMMITTED else hit - 1)
    assert shown(path) == Counter(range(1, whole + 1))
    after = Lake.open(path, create=True)
    assert after.watermark("contexts") == (Position(EPOCH, whole) if whole else None)
    assert after.torn_commits() == []
    # The next process goes on from the watermark, and nothing is short or double.
    assert run(APPEND, path) == 0
    assert shown(path) == Counter(range(1, 1001))
    report = verify_lake(path)
    assert report.violations == []
    assert report.checked["contexts"] == 1000
    # What the killed one left is an orphan: vacuumed when old enough, never a file of the table.
    lake = Lake.open(path)
    vacuum(lake, orphans_older_than_s=-60)
    on_disk = {str(file.relative_to(path / "contexts")) for file in (path / "contexts").rglob("part-*.parquet")}
    assert on_disk == set(lake.snapshot("contexts").files)
    assert shown(path) == Counter(range(1, 1001))


@pytest.mark.parametrize("point", POINTS)
def test_killed_compactor_changes_no_row(tmp_path: Path, point: str) -> None:
    path = tmp_path / "lake"
    Lake.open(path, create=True)
    assert run(APPEND, path) == 0
    assert run(COMPACT, path, f"{point}=kill:1") == -signal.SIGKILL
    assert shown(path) == Counter(range(1, 1001))
    assert run(COMPACT, path) == 0
    assert shown(path) == Counter(range(1, 1001))
    lake = Lake.open(path)
    assert len(lake.files("contexts")) == 1
    assert lake.watermark("contexts") == Position(EPOCH, 1000)
    assert verify_lake(path).violations == []


@pytest.mark.slow
def test_kills_at_random_times_never_lose_or_double_a_row(tmp_path: Path) -> None:
    path = tmp_path / "lake"
    Lake.open(path, create=True)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for delay_ms in range(350, 1350, 70):
        process = subprocess.Popen([sys.executable, "-c", APPEND, str(path)], env=environment)
        try:
            process.wait(delay_ms / 1000)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        place = Lake.open(path).watermark("contexts")
        assert shown(path) == Counter(range(1, (place.seq if place else 0) + 1))
    assert run(APPEND, path) == 0
    assert shown(path) == Counter(range(1, 1001))
    assert verify_lake(path).ok


def archive(lake: Lake, first: int, last: int) -> None:
    lake.append("contexts", contexts(first, last), epoch=EPOCH, first_seq=first, last_seq=last)


def drop_copy(path: Path) -> None:
    """Of a commit torn by a power cut there is no copy: that is written after the fsync."""
    (path.parents[1] / "_log_copy" / path.name).unlink(missing_ok=True)


def empty(path: Path) -> None:
    path.write_bytes(b"")
    drop_copy(path)


def halve(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    drop_copy(path)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))
    drop_copy(path)


DAMAGE = [empty, halve, zero]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_torn_commit_is_not_seen_and_is_set_aside_on_demand(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    archive(lake, 1, 10)
    archive(lake, 11, 20)
    torn_path = commit_path(path / "contexts", 2)
    damage(torn_path)

    lake = Lake.open(path, create=True)
    assert lake.watermark("contexts") == Position(EPOCH, 10)
    assert shown(path) == Counter(range(1, 11))
    [torn] = lake.torn_commits()
    assert (torn.table, torn.version, torn.earlier) == ("contexts", 2, Position(EPOCH, 10))
    assert [violation.invariant for violation in verify_lake(path).violations] == ["I5"]
    # Until somebody who knows what the streams hold decides, the table is read-only.
    with pytest.raises(IntegrityError, match="does not parse"):
        archive(lake, 11, 20)
    assert torn_path.exists()

    lake.set_aside(torn)
    assert not torn_path.exists()
    assert "torn commit set aside" in caplog.text
    assert (path / "contexts" / "_delta_log" / "torn" / torn_path.name).exists()
    archive(lake, 11, 25)
    assert shown(path) == Counter(range(1, 26))
    assert Lake.open(path).torn_commits() == []
    assert verify_lake(path).ok
    assert DeltaTable(str(path / "contexts")).version() == 2


def test_a_table_torn_while_being_made_is_made_anew_by_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "lake"
    Lake.open(path, create=True)
    empty(commit_path(path / "contexts", 0))
    with pytest.raises(IntegrityError, match="first commit"):
        Lake.open(path)
    archive(Lake.open(path, create=True), 1, 10)
    assert shown(path) == Counter(range(1, 11))


def test_a_torn_first_commit_below_others_is_never_moved(tmp_path: Path) -> None:
    path = tmp_path / "lake"
    archive(Lake.open(path, create=True), 1, 10)
    empty(commit_path(path / "contexts", 0))
    with pytest.raises(IntegrityError, match="backup"):
        Lake.open(path, create=True)


def test_a_follower_stops_before_a_torn_commit_and_goes_on_after_it(tmp_path: Path) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    archive(lake, 1, 10)
    reader = Lake.open(path)
    archive(lake, 11, 20)
    torn_path = commit_path(path / "contexts", 2)
    halve(torn_path)
    assert reader.watermark("contexts") == Position(EPOCH, 10)
    writer = Lake.open(path, create=True)
    writer.set_aside(writer.torn_commits()[0])
    archive(writer, 11, 15)
    assert reader.watermark("contexts") == Position(EPOCH, 15)


def test_an_index_that_covers_a_commit_set_aside_is_built_anew(tmp_path: Path) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    archive(lake, 1, 10)
    archive(lake, 11, 20)
    with LakeIndex.open(tmp_path / "index") as index:
        index.refresh(lake)
        halve(commit_path(path / "contexts", 2))
        lake = Lake.open(path, create=True)
        lake.set_aside(lake.torn_commits()[0])
        other = [context(seq, b"other %d" % seq) for seq in range(11, 21)]
        lake.append("contexts", other, epoch=EPOCH, first_seq=11, last_seq=20)
        report = index.refresh(lake)
        assert report.rebuilt == ("contexts",)
        with Lookup(lake, index) as lookup:
            lost = contexts(11, 20)
            assert lookup.get_contexts([row.digest for row in lost]) == {}
            assert lookup.get_contexts([row.digest for row in other]) == {row.digest: row for row in other}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("which", ["checkpoint", "pointer", "both"])
def test_a_bad_checkpoint_costs_nothing_but_time(tmp_path: Path, damage: Callable[[Path], None], which: str) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    last = CHECKPOINT_INTERVAL + 1
    for seq in range(1, last + 1):
        lake.append("events", events(seq, seq), epoch=EPOCH, first_seq=seq, last_seq=seq)
    directory = path / "events"
    assert list_checkpoints(directory) == [CHECKPOINT_INTERVAL]
    if which in ("checkpoint", "both"):
        damage(checkpoint_path(directory, CHECKPOINT_INTERVAL))
    if which in ("pointer", "both"):
        damage(directory / "_delta_log" / "_last_checkpoint")
    # A reader passes it over, a writer mends it.
    assert Lake.open(path).statistics("events").rows == last
    lake = Lake.open(path, create=True)
    lake.append("events", events(last + 1, last + 1), epoch=EPOCH, first_seq=last + 1, last_seq=last + 1)
    assert Lake.open(path).watermark("events") == Position(EPOCH, last + 1)
    assert DeltaTable(str(directory)).to_pyarrow_table().num_rows == last + 1
    assert verify_lake(path).ok


def test_leftovers_of_a_killed_commit_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    archive(lake, 1, 10)
    log = path / "contexts" / "_delta_log"
    (log / "00000000000000000002.json#1").write_bytes(b'{"half')
    (log / ".tmp-something").write_bytes(b"")
    again = Lake.open(path, create=True)
    archive(again, 11, 20)
    assert shown(path) == Counter(range(1, 21))


def test_a_failed_append_can_be_repeated_by_the_same_handle(tmp_path: Path) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    for point in POINTS[:5]:
        failpoints.arm(point)
        with pytest.raises(failpoints.FailpointError):
            archive(lake, 1, 10)
    for point in POINTS[5:]:
        place = lake.watermark("contexts")
        start = place.seq + 1 if place else 1
        failpoints.arm(point)
        with pytest.raises(failpoints.FailpointError):
            archive(lake, start, start + 9)
        # Committed, though the caller was not told: the watermark says so.
        assert lake.watermark("contexts") == Position(EPOCH, start + 9)
    assert shown(path) == Counter(range(1, 21))
    vacuum(lake, orphans_older_than_s=-60)
    assert len(list((path / "contexts").rglob("part-*.parquet"))) == 2


def test_damaged_files_are_found_and_named(tmp_path: Path) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    archive(lake, 1, 3000)
    archive(lake, 3001, 3100)
    first, second = lake.files("contexts")
    damaged = path / "contexts" / first.path
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 3] ^= 0x40
    damaged.write_bytes(raw)
    (path / "contexts" / second.path).unlink()
    found = verify_lake(path).violations
    assert {violation.object for violation in found} == {str(damaged), str(path / "contexts" / second.path)}
    assert all(violation.next_step for violation in found)


def test_compaction_refuses_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "lake"
    lake = Lake.open(path, create=True)
    archive(lake, 1, 3000)
    archive(lake, 3001, 6000)
    damaged = path / "contexts" / lake.files("contexts")[0].path
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 3] ^= 0x40
    damaged.write_bytes(raw)
    assert compact(lake, policy=MergePolicy(min_files=2), at_ms=2_000_000_000_000).groups == 0
    [problem] = lake.problems()
    assert (problem.object, "cannot be read" in problem.what) == (str(damaged), True)
    assert len(lake.files("contexts")) == 2
    assert len(list((path / "contexts").rglob("part-*.parquet"))) == 2
