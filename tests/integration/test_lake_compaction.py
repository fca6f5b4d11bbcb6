from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.lake import Lake, compact, connect, vacuum, verify_lake
from holdfast.lake.columns import to_rows
from holdfast.lake.compaction import MergePolicy, plan_merge
from holdfast.lake.log import FileEntry, list_checkpoints, list_versions
from holdfast.schemas import failpoints
from holdfast.schemas.rows import Position, Row, Table
from tests.test_lake_samples import EPOCH, T0_MS, archive, chunked, context, contexts, events, key_versions, touch

LATER_MS = 2_000_000_000_000
SMALL = MergePolicy(target_rows=1000, target_bytes=1 << 30, min_files=3)


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.disarm_all()


def all_rows(lake: Lake, table: Table) -> list[Row]:
    lake.refresh(table)
    paths = [lake.path / table / entry.path for entry in lake.files(table)]
    return [row for path in paths for row in to_rows(table, pq.ParquetFile(path).read())]


def entry(number: int, rows: int, day: str = "2026-01-31", epoch: str = EPOCH, size: int = 1000) -> FileEntry:
    return FileEntry(
        path=f"{day}/{epoch}/{number}",
        day=day,
        size_bytes=size,
        rows=rows,
        contexts=rows,
        epoch=epoch,
        min_seq=number * 1000,
        max_seq=number * 1000 + rows - 1,
    )


def merged(files: list[FileEntry], policy: MergePolicy) -> tuple[list[FileEntry], int]:
    """What files become by one run of compaction, and how many rows it writes."""
    written = 0
    for group in plan_merge(files, today="2026-01-31", policy=policy):
        total = sum(file.rows for file in group.files)
        written += total
        files = [file for file in files if file not in group.files]
        files.append(entry(group.files[0].min_seq // 1000, total))
        files.sort(key=lambda file: file.min_seq)
    return files, written


def test_neighbours_of_one_size_class_are_merged() -> None:
    files = [entry(0, 60), entry(1, 60), entry(2, 60), entry(3, 7), entry(4, 7), entry(5, 7), entry(6, 7)]
    groups = plan_merge(files, today="2026-01-31", policy=SMALL)
    assert [[file.min_seq // 1000 for file in group.files] for group in groups] == [[0, 1, 2], [3, 4, 5, 6]]


def test_too_few_files_wait_while_their_day_lasts() -> None:
    files = [entry(0, 60), entry(1, 60), entry(2, 7)]
    assert plan_merge(files, today="2026-01-31", policy=SMALL) == []
    [group] = plan_merge(files, today="2026-02-01", policy=SMALL)
    assert len(group.files) == 3


def test_an_earlier_life_of_a_stream_waits_for_nothing() -> None:
    """Nothing is added to it any more: a stream that is made anew often must not leave its files behind each time."""
    files = [entry(0, 60, epoch="e1"), entry(1, 7, epoch="e1"), entry(2, 60, epoch="e2"), entry(3, 7, epoch="e2")]
    [group] = plan_merge(files, today="2026-01-31", live_epoch="e2", policy=SMALL)
    assert group.epoch == "e1"
    assert len(group.files) == 2


def test_large_and_small_ones_that_take_turns_do_not_become_ever_more() -> None:
    policy = MergePolicy(target_rows=100_000, target_bytes=1 << 40, min_files=10, most_files=64)
    files: list[FileEntry] = []
    most = written = 0
    for cycle in range(1000):
        files.append(entry(cycle, 100 if cycle % 2 else 1_000))
        files, rows = merged(files, policy)
        most = max(most, len(files))
        written += rows
    assert most <= 64 + 12  # and the full ones
    assert written <= 1000 * 550 * 10  # each row some ten times


def test_full_files_are_left_alone_and_end_a_run() -> None:
    files = [entry(0, 60), entry(1, 900), entry(2, 60), entry(3, 60)]
    [group] = plan_merge(files, today="2027-01-01", policy=SMALL)
    assert [file.min_seq // 1000 for file in group.files] == [2, 3]


def test_days_and_epochs_are_never_mixed() -> None:
    files = [entry(i, 10, day=f"2026-01-{10 + i % 2}", epoch=f"e{i % 3}") for i in range(24)]
    groups = plan_merge(files, today="2027-01-01", policy=SMALL)
    assert len(groups) == 6
    assert all(len({(file.day, file.epoch) for file in group.files}) == 1 for group in groups)


def test_large_bodies_count_by_bytes() -> None:
    files = [entry(i, 1, size=400) for i in range(10)]
    groups = plan_merge(files, today="2027-01-01", policy=MergePolicy(target_rows=1000, target_bytes=1000))
    assert [len(group.files) for group in groups] == [2] * 5


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 1200), st.sampled_from(["2026-01-30", "2026-01-31"])), max_size=40),
    st.sampled_from(["2026-01-31", "2026-02-01"]),
)
def test_a_plan_names_each_file_once_and_stays_below_the_target(files: list[tuple[int, str]], today: str) -> None:
    entries = [entry(i, rows, day=day) for i, (rows, day) in enumerate(files)]
    groups = plan_merge(entries, today=today, policy=SMALL)
    named = [file.path for group in groups for file in group.files]
    assert len(named) == len(set(named))
    for group in groups:
        assert len(group.files) >= (2 if group.day < today else SMALL.min_files)
        assert sum(file.rows for file in group.files) <= SMALL.target_rows
        ordered = sorted((file for file in entries if file.day == group.day), key=lambda file: file.min_seq)
        start = ordered.index(group.files[0])
        assert ordered[start : start + len(group.files)] == list(group.files)


def test_repeated_merging_settles_and_rewrites_each_row_a_few_times() -> None:
    policy = MergePolicy(target_rows=100_000, target_bytes=1 << 40, min_files=10)
    files: list[FileEntry] = []
    written = 0
    for cycle in range(1000):
        files.append(entry(cycle, 100))
        files, rows = merged(files, policy)
        written += rows
    assert written <= 3 * 100_000
    assert len(files) <= 40


def test_every_row_is_preserved_as_it_is(lake: Lake) -> None:
    first = context(1)
    rows: list[Row] = [first, *contexts(2, 400), context(401, b"\xff\x00"), context(402, b""), touch(first, 403)]
    rows += chunked(404, os.urandom(5000), 700)
    # Repetitions are rows as well: compaction drops nothing.
    rows += [context(rows[-1].seq + 1, first.body)]
    for start in range(0, len(rows), 37):
        archive(lake, "contexts", rows[start : start + 37])
    for start in range(1, 200, 10):
        archive(lake, "events", [*events(start, start + 9)])
        archive(lake, "key_versions", [*key_versions(start, start + 9)])
    before: dict[Table, list[Row]] = {
        "contexts": all_rows(lake, "contexts"),
        "events": all_rows(lake, "events"),
        "key_versions": all_rows(lake, "key_versions"),
    }
    assert before["contexts"] == rows
    counted = lake.statistics("contexts").contexts
    report = compact(lake, at_ms=LATER_MS)
    assert report.groups == 3
    assert report.rows == sum(len(found) for found in before.values())
    for table, found in before.items():
        assert all_rows(lake, table) == found
        assert len(lake.files(table)) == 1
    assert lake.statistics("contexts").contexts == counted
    assert lake.watermark("contexts") == Position(EPOCH, rows[-1].seq)
    assert DeltaTable(str(lake.path / "contexts")).to_pyarrow_table().num_rows == len(rows)
    assert compact(lake, at_ms=LATER_MS).groups == 0


def test_row_groups_are_made_full_and_stay_in_bounds(lake: Lake) -> None:
    for start in range(1, 6001, 300):
        archive(lake, "contexts", [*contexts(start, start + 299)])
    big = [context(seq, b"%d" % seq + b"x" * 900_000) for seq in range(6001, 6011)]
    archive(lake, "contexts", [*big])
    compact(lake, at_ms=LATER_MS)
    [merged] = lake.files("contexts")
    metadata = pq.read_metadata(lake.path / "contexts" / merged.path)
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    # Groups of the files are put together whole: 13 of 300 fit below 4,000.
    assert counts[:2] == [3900, 2102]
    assert max(counts[2:]) <= 3
    assert sum(counts) == 6010


def test_a_compactor_that_lost_the_race_changes_nothing(lake: Lake) -> None:
    for start in range(1, 101, 10):
        archive(lake, "contexts", [*contexts(start, start + 9)])
    rival = Lake.open(lake.path)

    def overtake(_name: str) -> None:
        assert compact(rival, at_ms=LATER_MS).groups == 1

    failpoints.arm("lake.before_commit", overtake)
    assert compact(lake, at_ms=LATER_MS).groups == 0
    assert all_rows(lake, "contexts") == contexts(1, 100)
    assert len(list((lake.path / "contexts").rglob("part-*.parquet"))) == 11
    assert verify_lake(lake.path).ok


def test_compactors_readers_and_an_archiver_at_once(lake: Lake) -> None:
    stop = threading.Event()

    def merge() -> None:
        own = Lake.open(lake.path)
        while not stop.is_set():
            compact(own, policy=MergePolicy(min_files=2), at_ms=LATER_MS)
            vacuum(own, older_than_s=3600)

    def read() -> None:
        with connect(lake.path) as connection:
            last = 0
            while not stop.is_set():
                rows = connection.execute("SELECT stream_seq FROM contexts").fetchall()
                assert Counter(seq for (seq,) in rows) == Counter(range(1, len(rows) + 1))
                assert len(rows) >= last
                last = len(rows)

    with ThreadPoolExecutor() as pool:
        others = [pool.submit(work) for work in (merge, merge, read, read)]
        try:
            for start in range(1, 1201, 20):
                archive(lake, "contexts", [*contexts(start, start + 19)])
        finally:
            stop.set()
        for other in others:
            other.result()
    assert Counter(row.seq for row in all_rows(lake, "contexts")) == Counter(range(1, 1201))
    assert verify_lake(lake.path).violations == []


def test_vacuum_keeps_what_is_young_or_in_use(lake: Lake) -> None:
    for start in range(1, 101, 10):
        archive(lake, "contexts", [*contexts(start, start + 9)])
    compact(lake, at_ms=LATER_MS)
    orphan = lake.path / "contexts" / "day=2026-01-31" / "part-00000000-0000-4000-8000-000000000000.parquet"
    orphan.write_bytes(b"half a file")
    half = lake.path / "contexts" / "_tmp" / "part-00000000-0000-4000-8000-000000000001.parquet"
    half.write_bytes(b"")
    foreign = orphan.with_name("notes.txt")
    foreign.write_text("not ours")

    report = vacuum(lake)
    assert (report.replaced_files, report.orphaned_files) == (0, 0)
    report = vacuum(lake, older_than_s=-60)
    assert (report.replaced_files, report.orphaned_files) == (10, 0)
    report = vacuum(lake, orphans_older_than_s=-60)
    assert (report.replaced_files, report.orphaned_files) == (0, 2)
    assert foreign.exists()
    assert not orphan.exists()
    assert not half.exists()
    assert all_rows(lake, "contexts") == contexts(1, 100)


def test_of_the_files_that_left_the_latest_are_remembered_and_all_are_removed(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.lake.log.MOST_REMOVALS", 3)
    left: list[str] = []
    for start in range(1, 81, 20):
        archive(lake, "contexts", [*contexts(start, start + 9)])
        archive(lake, "contexts", [*contexts(start + 10, start + 19)])
        before = {file.path for file in lake.files("contexts")}
        compact(lake, at_ms=LATER_MS)
        left += sorted(before - {file.path for file in lake.files("contexts")})
    assert len(left) > 6
    assert {*lake.snapshot("contexts").removals} <= {*left[-4:]}
    assert len(lake.snapshot("contexts").removals) == 3
    vacuum(lake, older_than_s=-60, orphans_older_than_s=-60)
    assert [path for path in left if (lake.path / "contexts" / path).exists()] == []
    assert all_rows(lake, "contexts") == contexts(1, 80)


def test_vacuum_leaves_a_table_with_a_torn_commit_alone(lake: Lake) -> None:
    archive(lake, "contexts", [*contexts(1, 10)])
    archive(lake, "contexts", [*contexts(11, 20)])
    log = lake.path / "contexts" / "_delta_log" / f"{2:020d}.json"
    log.write_bytes(b"")
    (lake.path / "contexts" / "_log_copy" / log.name).unlink()
    again = Lake.open(lake.path)
    assert vacuum(again, older_than_s=-60, orphans_older_than_s=-60).orphaned_files == 0
    assert len(list((lake.path / "contexts").rglob("part-*.parquet"))) == 2


def test_the_log_is_cleaned_below_the_last_but_one_checkpoint(lake: Lake) -> None:
    reader = Lake.open(lake.path)
    for seq in range(1, 120):
        lake.append("events", events(seq, seq), epoch=EPOCH, first_seq=seq, last_seq=seq)
    directory = lake.path / "events"
    assert list_checkpoints(directory) == [50, 100]
    assert vacuum(lake).log_files == 0
    assert vacuum(lake, log_older_than_s=-60).log_files == 50
    assert list_versions(directory)[0] == 50
    assert DeltaTable(str(directory)).to_pyarrow_table().num_rows == 119
    # A handle from before the cleaning finds its way.
    assert reader.watermark("events") == Position(EPOCH, 119)
    assert len(all_rows(reader, "events")) == 119
    archive(Lake.open(lake.path, create=True), "events", [*events(120, 121)])
    assert verify_lake(lake.path).ok


def test_days_are_merged_apart(lake: Lake) -> None:
    midnight = 1_769_904_000_000
    for start in range(1, 101, 10):
        rows = [context(seq, stored_at_ms=midnight + (seq - 50) * 1000) for seq in range(start, start + 10)]
        archive(lake, "contexts", [*rows])
    compact(lake, at_ms=LATER_MS)
    assert [(file.day, file.rows) for file in lake.files("contexts")] == [("2026-01-31", 49), ("2026-02-01", 51)]
    assert midnight > T0_MS
