from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest
from deltalake import DeltaTable

from holdfast.lake import Lake
from holdfast.lake.commit import CHECKPOINT_INTERVAL
from holdfast.lake.log import commit_path, list_checkpoints, load_snapshot
from holdfast.schemas import failpoints
from holdfast.schemas.errors import DataDirectoryError, FenceError, InvalidFieldError, UnavailableError
from holdfast.schemas.rows import TABLES, Anchor, Position
from tests.test_lake_samples import (
    EPOCH,
    T0_MS,
    archive,
    context,
    contexts,
    event,
    events,
    key_versions,
    touch,
)


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.disarm_all()


def parquet_files(lake: Lake) -> list[Path]:
    return sorted(lake.path.rglob("*.parquet"))


def test_a_new_lake_is_empty_and_opens_again(lake: Lake) -> None:
    again = Lake.open(lake.path)
    for table in TABLES:
        assert again.watermark(table) is None
        assert again.version(table) == 0
        assert again.files(table) == ()
        assert again.anchors(table) == []
    assert again.torn_commits() == []


def test_a_missing_lake_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataDirectoryError, match="holds no table"):
        Lake.open(tmp_path)


def test_append_moves_the_watermark_with_the_rows(lake: Lake) -> None:
    report = lake.append(
        "contexts", contexts(1, 100), epoch=EPOCH, first_seq=1, last_seq=120, anchors=[Anchor(120, T0_MS, "d")]
    )
    assert report.position == Position(EPOCH, 120)
    assert (report.rows, report.files, report.version) == (100, 1, 1)
    again = Lake.open(lake.path)
    assert again.watermark("contexts") == Position(EPOCH, 120)
    assert again.durable_watermark("contexts") == Position(EPOCH, 120)
    assert again.anchors("contexts") == [Anchor(120, T0_MS, "d")]
    statistics = again.statistics("contexts")
    assert (statistics.rows, statistics.contexts, statistics.files) == (100, 100, 1)
    assert statistics.bytes == parquet_files(lake)[0].stat().st_size
    [entry] = again.files("contexts")
    assert (entry.epoch, entry.min_seq, entry.max_seq, entry.day) == (EPOCH, 1, 100, "2026-01-31")


def test_touches_and_chunks_are_rows_but_no_contexts(lake: Lake) -> None:
    first = context(1)
    archive(lake, "contexts", [first, context(2), touch(first, 3)])
    statistics = lake.statistics("contexts")
    assert (statistics.rows, statistics.contexts) == (3, 2)


def test_an_empty_run_moves_the_watermark_alone(lake: Lake) -> None:
    lake.append("events", [], epoch=EPOCH, first_seq=1, last_seq=7)
    lake.append("events", events(8, 9), epoch=EPOCH, first_seq=8, last_seq=9)
    assert lake.watermark("events") == Position(EPOCH, 9)
    assert lake.statistics("events").rows == 2


def test_deltalake_reads_what_we_committed(lake: Lake) -> None:
    archive(lake, "key_versions", [*key_versions(1, 10)])
    table = DeltaTable(str(lake.path / "key_versions"))
    assert table.to_pyarrow_table().num_rows == 10
    assert table.transaction_version(f"key_versions/{EPOCH}") == 10


@pytest.mark.parametrize("first_seq", [1, 100, 102])
def test_a_run_that_does_not_continue_the_watermark_is_fenced(lake: Lake, first_seq: int) -> None:
    archive(lake, "contexts", [*contexts(1, 100)])
    before = parquet_files(lake)
    with pytest.raises(FenceError, match="archived up to"):
        lake.append("contexts", contexts(first_seq, 200), epoch=EPOCH, first_seq=first_seq, last_seq=200)
    assert parquet_files(lake) == before


def test_a_fresh_handle_repeating_a_run_is_fenced(lake: Lake) -> None:
    """deltalake accepts a fresh handle that repeats a txn version: the check is ours."""
    archive(lake, "contexts", [*contexts(1, 100)])
    with pytest.raises(FenceError):
        archive(Lake.open(lake.path), "contexts", [*contexts(1, 100)])
    assert Lake.open(lake.path).statistics("contexts").rows == 100


def test_of_two_archivers_at_the_same_place_one_wins(lake: Lake) -> None:
    archive(lake, "contexts", [*contexts(1, 10)])
    rival = Lake.open(lake.path)

    def overtake(_name: str) -> None:
        archive(rival, "contexts", [*contexts(11, 30)])

    failpoints.arm("lake.before_commit", overtake)
    with pytest.raises(FenceError):
        archive(lake, "contexts", [*contexts(11, 20)])
    again = Lake.open(lake.path)
    assert again.watermark("contexts") == Position(EPOCH, 30)
    assert again.statistics("contexts").rows == 30
    # The loser's file is gone.
    assert len(parquet_files(lake)) == 2


def test_the_first_cycle_of_an_epoch_is_fenced_too(lake: Lake) -> None:
    rival = Lake.open(lake.path)
    failpoints.arm("lake.before_commit", lambda _name: archive(rival, "events", [*events(1, 5)]))
    with pytest.raises(FenceError):
        archive(lake, "events", [*events(1, 5)])
    assert Lake.open(lake.path).statistics("events").rows == 5


def test_a_lost_race_against_another_application_is_run_again(lake: Lake) -> None:
    """The compactor's commits do not fence an archiver: the commit is made anew on top of them."""
    rival = Lake.open(lake.path)
    failpoints.arm(
        "lake.before_commit", lambda _name: archive(rival, "contexts", [*contexts(1, 5, epoch="other-epoch")])
    )
    archive(lake, "contexts", [*contexts(1, 7)])
    again = Lake.open(lake.path)
    assert again.watermark("contexts") == Position(EPOCH, 7)
    assert again.statistics("contexts").rows == 12


def test_many_threads_of_one_handle_take_turns(lake: Lake) -> None:
    outcomes: list[str] = []

    def work() -> None:
        try:
            archive(lake, "contexts", [*contexts(1, 50)])
            outcomes.append("won")
        except FenceError:
            outcomes.append("fenced")

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["fenced"] * 5 + ["won"]
    assert lake.statistics("contexts").rows == 50


def test_a_new_epoch_starts_where_the_caller_says(lake: Lake) -> None:
    archive(lake, "contexts", [*contexts(1, 10)])
    archive(lake, "contexts", [*contexts(8, 12, epoch="epoch-2")])
    again = Lake.open(lake.path)
    assert again.watermark("contexts") == Position("epoch-2", 12)
    assert [entry.epoch for entry in again.files("contexts")] == [EPOCH, "epoch-2"]


def test_watermark_and_epochs_survive_checkpoints(lake: Lake) -> None:
    archive(lake, "events", [*events(1, 2)])
    for seq in range(3, CHECKPOINT_INTERVAL + 5):
        lake.append(
            "events", [event(seq, epoch="z-1")], epoch="z-1", first_seq=seq, last_seq=seq,
            anchors=[Anchor(seq, T0_MS + seq, f"id-{seq}")],
        )  # fmt: skip
    directory = lake.path / "events"
    assert list_checkpoints(directory) == [CHECKPOINT_INTERVAL]
    last = CHECKPOINT_INTERVAL + 4
    assert Lake.open(lake.path).watermark("events") == Position("z-1", last)
    # Without the commits before the checkpoint, the checkpoint alone tells.
    for version in range(CHECKPOINT_INTERVAL):
        commit_path(directory, version).unlink()
    again = Lake.open(lake.path)
    assert again.watermark("events") == Position("z-1", last)
    assert again.statistics("events").rows == last
    assert [anchor.seq for anchor in again.anchors("events", last - 2)] == [last - 2, last - 1, last]
    archive(again, "events", [event(last + 1, epoch="z-1")])
    assert DeltaTable(str(directory)).version() == again.version("events")


def test_anchors_are_of_the_current_epoch_and_in_order(lake: Lake) -> None:
    for epoch, first in (("old", 1), (EPOCH, 1), (EPOCH, 11), (EPOCH, 21)):
        anchors = [Anchor(first + 4, T0_MS, "x"), Anchor(first + 9, T0_MS, "y")]
        lake.append("events", [], epoch=epoch, first_seq=first, last_seq=first + 9, anchors=anchors)
    assert [anchor.seq for anchor in lake.anchors("events")] == [5, 10, 15, 20, 25, 30]
    assert [anchor.seq for anchor in lake.anchors("events", 15)] == [15, 20, 25, 30]


@pytest.mark.parametrize(("first_seq", "last_seq"), [(0, 5), (5, 4), (2, 9), (1, 8)])
def test_rows_outside_their_run_are_refused(lake: Lake, first_seq: int, last_seq: int) -> None:
    with pytest.raises(ValueError, match="run"):
        lake.append("events", events(1, 9), epoch=EPOCH, first_seq=first_seq, last_seq=last_seq)
    assert parquet_files(lake) == []
    assert lake.watermark("events") is None


def test_a_poison_row_leaves_no_trace(lake: Lake) -> None:
    with pytest.raises(InvalidFieldError):
        archive(lake, "events", [*events(1, 9), event(10, root_event_id="nonsense")])
    assert parquet_files(lake) == []


def test_a_log_that_cannot_be_written_is_unavailable(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltalake.exceptions import DeltaError

    def refuse(*_args: object, **_options: object) -> None:
        raise DeltaError("no space left on device")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", refuse)
    with pytest.raises(UnavailableError, match="no space left"):
        archive(lake, "events", [*events(1, 9)])
    monkeypatch.undo()
    assert parquet_files(lake) == []
    archive(lake, "events", [*events(1, 9)])


def test_a_commit_that_landed_despite_an_error_counts(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltalake.exceptions import DeltaError

    original = DeltaTable.create_write_transaction

    def commit_then_fail(self: DeltaTable, *args: object, **options: object) -> None:
        original(self, *args, **options)  # type: ignore[arg-type]  # passed through
        raise DeltaError("connection reset")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", commit_then_fail)
    archive(lake, "events", [*events(1, 9)])
    monkeypatch.undo()
    assert Lake.open(lake.path).statistics("events").rows == 9


def test_a_reader_follows_without_reopening(lake: Lake) -> None:
    reader = Lake.open(lake.path)
    for seq in range(1, 6):
        archive(lake, "contexts", [context(seq)])
        assert reader.watermark("contexts") == Position(EPOCH, seq)
    unchanged = reader.snapshot("contexts")
    reader.refresh()
    assert reader.snapshot("contexts") is unchanged


def test_the_log_is_plain_delta(lake: Lake) -> None:
    archive(lake, "contexts", [context(1)])
    lines = commit_path(lake.path / "contexts", 1).read_text().splitlines()
    actions = [json.loads(line) for line in lines]
    txn = next(action["txn"] for action in actions if "txn" in action)
    assert (txn["appId"], txn["version"]) == (f"contexts/{EPOCH}", 1)
    assert duckdb.execute(
        "SELECT count(*) FROM read_parquet(?)", [str(lake.path / "contexts" / "*" / "*.parquet")]
    ).fetchone() == (1,)


def test_no_table_is_no_snapshot(tmp_path: Path) -> None:
    assert load_snapshot("events", tmp_path) is None
