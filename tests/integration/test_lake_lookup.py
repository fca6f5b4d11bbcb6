from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

import holdfast.lake.index_environment as index_environment
from holdfast.lake import Lake, LakeIndex, Lookup, compact, vacuum
from holdfast.lake.compaction import MergePolicy
from holdfast.schemas.errors import DigestMismatchError, IntegrityError
from holdfast.schemas.refs import Digest
from holdfast.schemas.rows import Position
from holdfast.workers.contexts import ColdReader
from tests.test_lake_samples import (
    EPOCH,
    archive,
    chunked,
    context,
    contexts,
    event,
    events,
    key_version,
    key_versions,
    touch,
)

LATER_MS = 2_000_000_000_000
UNKNOWN = Digest("a" * 32)


def test_every_row_is_found_by_its_identity(lake: Lake, index: LakeIndex) -> None:
    bodies = contexts(1, 4100)
    happened = events(1, 2500)
    versions = key_versions(1, 300)
    for start in range(0, 4100, 700):
        archive(lake, "contexts", [*bodies[start : start + 700]])
    archive(lake, "events", [*happened])
    archive(lake, "key_versions", [*versions])
    with Lookup(lake, index) as lookup:
        assert lookup.get_contexts([row.digest for row in bodies]) == {row.digest: row for row in bodies}
        assert lookup.get_events([(row.namespace, row.id) for row in happened]) == {
            (row.namespace, row.id): row for row in happened
        }
        assert lookup.get_key_versions([("default", "plan.today", 77)]) == {("default", "plan.today", 77): versions[76]}
        assert lookup.get_contexts([UNKNOWN, bodies[5].digest]) == {bodies[5].digest: bodies[5]}
        assert lookup.get_events([("other", happened[0].id)]) == {}
        assert lookup.get_contexts([]) == {}
        assert lookup.get_body(UNKNOWN) is None


def test_a_row_archived_after_the_refresh_is_found(lake: Lake, index: LakeIndex) -> None:
    """An answer of "not here" is given only after a refresh."""
    with Lookup(lake, index) as lookup:
        archive(Lake.open(lake.path), "contexts", [context(1)])
        assert lookup.get_contexts([context(1).digest]) == {context(1).digest: context(1)}


def test_refresh_reads_only_what_is_new(lake: Lake, index: LakeIndex) -> None:
    archive(lake, "contexts", [*contexts(1, 100)])
    assert index.refresh(lake).rows_added == 100
    assert index.refresh(lake).rows_added == 0
    archive(lake, "contexts", [*contexts(101, 130)])
    report = index.refresh(lake)
    assert (report.rows_added, report.rebuilt) == (30, ())
    assert index.count("contexts") == 130
    assert index.version("contexts") == lake.version("contexts")


def test_positions_survive_compaction_and_vacuum(lake: Lake, index: LakeIndex) -> None:
    rows = contexts(1, 300)
    for start in range(0, 300, 20):
        archive(lake, "contexts", [*rows[start : start + 20]])
    with Lookup(lake, index) as lookup:
        assert len(lookup.get_contexts([row.digest for row in rows])) == 300
        other = Lake.open(lake.path)
        compact(other, at_ms=LATER_MS)
        vacuum(other, older_than_s=-60)
        assert len(list((lake.path / "contexts").rglob("part-*.parquet"))) == 1
        assert lookup.get_contexts([row.digest for row in rows]) == {row.digest: row for row in rows}
        index.refresh(lake)
        assert index.count("contexts") == 300


def test_an_index_made_after_compaction_is_the_same(lake: Lake, index: LakeIndex, tmp_path: Path) -> None:
    for start in range(1, 301, 20):
        archive(lake, "contexts", [*contexts(start, start + 19)])
    digests = [row.digest for row in contexts(1, 300)]
    index.refresh(lake)
    compact(lake, at_ms=LATER_MS)
    with LakeIndex.open(tmp_path / "second") as second:
        second.refresh(lake)
        assert second.find_contexts(digests) == index.find_contexts(digests)


def test_a_touch_does_not_move_a_context(lake: Lake, index: LakeIndex) -> None:
    first = context(1)
    archive(lake, "contexts", [first, context(2), touch(first, 3)])
    index.refresh(lake)
    assert index.find_contexts([first.digest]) == {first.digest: Position(EPOCH, 1)}
    with Lookup(lake, index) as lookup:
        assert lookup.get_contexts([first.digest])[first.digest].body == first.body


def test_several_epochs_live_side_by_side(lake: Lake, index: LakeIndex) -> None:
    old, new = contexts(1, 50), [context(seq, b"new %d" % seq, epoch="epoch-2") for seq in range(1, 51)]
    archive(lake, "contexts", [*old])
    archive(lake, "contexts", [*new])
    with Lookup(lake, index) as lookup:
        wanted = [row.digest for row in (*old, *new)]
        assert lookup.get_contexts(wanted) == {row.digest: row for row in (*old, *new)}


def test_two_days_interleaved_are_told_apart(lake: Lake, index: LakeIndex) -> None:
    midnight = 1_769_904_000_000
    rows = [context(seq, stored_at_ms=midnight + (-1000 if seq % 3 else 1000)) for seq in range(1, 400)]
    archive(lake, "contexts", [*rows])
    assert len(lake.files("contexts")) == 2
    with Lookup(lake, index) as lookup:
        assert lookup.get_contexts([row.digest for row in rows]) == {row.digest: row for row in rows}


def test_chunked_bodies_are_joined_and_verified(lake: Lake, index: LakeIndex) -> None:
    body = random.Random(1).randbytes(1_000_000)
    rows = chunked(1, body, 64 * 1024)
    archive(lake, "contexts", [*rows])
    with Lookup(lake, index) as lookup:
        found = lookup.get_body(rows[-1].digest)
        assert found is not None
        assert found == (rows[-1], body)


def test_a_missing_chunk_is_an_error(lake: Lake, index: LakeIndex) -> None:
    rows = chunked(1, bytes(range(250)), 100)
    archive(lake, "contexts", [rows[0], *rows[2:]])
    with Lookup(lake, index) as lookup, pytest.raises(IntegrityError, match="lacks 1 of 3 chunks"):
        lookup.get_body(rows[-1].digest)


def test_a_body_that_does_not_hash_to_its_reference_is_not_served(lake: Lake, index: LakeIndex) -> None:
    wrong = msgspec.structs.replace(context(2), body=b"tampered")
    archive(lake, "contexts", [context(1), wrong])
    with Lookup(lake, index) as lookup:
        assert lookup.get_contexts([context(1).digest])
        with pytest.raises(DigestMismatchError, match=rf"row {EPOCH}/2 of day=2026-01-31/part-"):
            lookup.get_contexts([wrong.digest])


def test_a_damaged_page_is_an_error_not_an_answer(lake: Lake, index: LakeIndex) -> None:
    archive(lake, "events", [*events(1, 3000)])
    index.refresh(lake)
    path = lake.path / "events" / lake.files("events")[0].path
    raw = bytearray(path.read_bytes())
    for offset in range(100, len(raw) // 2, 997):
        raw[offset] ^= 0xFF
    path.write_bytes(raw)
    with Lookup(lake, index) as lookup, pytest.raises(IntegrityError, match="damaged"):
        lookup.get_events([("default", event(5).id)])


def test_a_missing_file_is_an_error_not_not_found(lake: Lake, index: LakeIndex) -> None:
    archive(lake, "contexts", [context(1)])
    index.refresh(lake)
    (lake.path / "contexts" / lake.files("contexts")[0].path).unlink()
    with Lookup(lake, index) as lookup, pytest.raises(IntegrityError, match="missing"):
        lookup.get_contexts([context(1).digest])


def test_the_last_version_of_a_key(lake: Lake, index: LakeIndex) -> None:
    archive(lake, "key_versions", [*key_versions(1, 300)])
    archive(lake, "key_versions", [key_version(301, key="plan", version=1), key_version(302, key="zebra", version=9)])
    index.refresh(lake)
    assert index.last_key_version("default", "plan.today") == (300, Position(EPOCH, 300))
    assert index.last_key_version("default", "plan") == (1, Position(EPOCH, 301))
    assert index.last_key_version("default", "zebra") == (9, Position(EPOCH, 302))
    assert index.last_key_version("default", "unknown") is None
    assert index.last_key_version("other", "plan") is None


def test_the_first_of_two_rows_with_one_id_is_indexed(lake: Lake, index: LakeIndex) -> None:
    archive(lake, "events", [event(1), event(2, id=event(1).id)])
    index.refresh(lake)
    assert index.find_events([("default", event(1).id)]) == {("default", event(1).id): Position(EPOCH, 1)}


def test_opening_twice_in_a_process_shares_the_index(lake: Lake, index: LakeIndex, tmp_path: Path) -> None:
    archive(lake, "contexts", [context(1)])
    again = LakeIndex.open(tmp_path / "index")
    again.refresh(lake)
    assert index.count("contexts") == 1
    again.close()
    again.close()
    assert index.find_contexts([context(1).digest])
    index.close()
    with LakeIndex.open(tmp_path / "index") as third:
        assert third.count("contexts") == 1


def test_a_truncated_index_is_built_anew(lake: Lake, tmp_path: Path) -> None:
    archive(lake, "contexts", [*contexts(1, 5000)])
    with LakeIndex.open(tmp_path / "index") as index:
        index.refresh(lake)
    os.truncate(tmp_path / "index" / "data.mdb", 40_960)
    with LakeIndex.open(tmp_path / "index") as index:
        assert index.refresh(lake).rows_added == 5000


@pytest.mark.parametrize("content", [b"", b"garbage" * 5000, bytes(64 * 1024)])
def test_a_damaged_index_is_built_anew(
    lake: Lake, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    archive(lake, "contexts", [*contexts(1, 500)])
    with LakeIndex.open(tmp_path / "index") as index:
        index.refresh(lake)
    (tmp_path / "index" / "data.mdb").write_bytes(content)
    with LakeIndex.open(tmp_path / "index") as index:
        assert index.refresh(lake).rows_added == 500
        assert len(index.find_contexts([row.digest for row in contexts(1, 500)])) == 500
    assert "damaged or foreign" in caplog.text


def test_an_index_of_another_lake_is_built_anew(
    lake: Lake, index: LakeIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive(lake, "contexts", [*contexts(1, 10)])
    index.refresh(lake)
    other = Lake.open(tmp_path / "other", create=True)
    archive(other, "contexts", [context(1, b"of the other")])
    with caplog.at_level(logging.WARNING):
        assert "contexts" in index.refresh(other).rebuilt
    assert "does not match" in caplog.text
    assert index.count("contexts") == 1


def test_a_lake_restored_to_an_earlier_version_is_noticed(lake: Lake, index: LakeIndex) -> None:
    archive(lake, "contexts", [*contexts(1, 10)])
    archive(lake, "contexts", [*contexts(11, 20)])
    index.refresh(lake)
    (lake.path / "contexts" / "_delta_log" / f"{2:020d}.json").unlink()
    restored = Lake.open(lake.path)
    assert index.refresh(restored).rebuilt == ("contexts",)
    assert index.count("contexts") == 10


async def test_a_cold_reader_tells_what_it_read_now_from_what_it_kept(lake: Lake, index: LakeIndex) -> None:
    rows = contexts(1, 2)
    archive(lake, "contexts", [*rows])
    digests = [row.digest for row in rows]
    reader = ColdReader(lake, index)
    first, _ = await reader.get_many(digests[:1])
    both, _ = await reader.get_many(digests)
    await reader.close()
    assert [first[digests[0]].is_fresh, *(both[digest].is_fresh for digest in digests)] == [True, False, True]


def test_compaction_of_what_is_known_is_not_read_again(lake: Lake, index: LakeIndex) -> None:
    for start in (1, 11):
        archive(lake, "contexts", [*contexts(start, start + 9)])
    index.refresh(lake)
    policy = MergePolicy(min_files=2)
    assert compact(lake, policy=policy).groups == 1
    assert index.refresh(lake).rows_added == 0
    archive(lake, "contexts", [*contexts(21, 30)])
    compact(lake, policy=policy)
    index.refresh(lake)
    assert index.count("contexts") == 30
    with Lookup(lake, index) as lookup:
        assert len(lookup.get_contexts([row.digest for row in contexts(1, 30)])) == 30


def test_rebuild_gives_the_same_index(lake: Lake, index: LakeIndex) -> None:
    archive(lake, "contexts", [*contexts(1, 100)])
    archive(lake, "events", [*events(1, 100)])
    index.refresh(lake)
    digests = [row.digest for row in contexts(1, 100)]
    before = index.find_contexts(digests)
    assert index.rebuild(lake).rows_added == 200
    assert index.find_contexts(digests) == before


def test_a_full_map_grows(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_environment, "INITIAL_MAP_BYTES", 256 * 1024)
    rows = contexts(1, 20_000)
    archive(lake, "contexts", [*rows[:100]])
    archive(lake, "contexts", [*contexts(1, 50, epoch="second")])
    with LakeIndex.open(tmp_path / "small") as index:
        index.refresh(lake)
        lake.append("contexts", rows[100:], epoch=EPOCH, first_seq=101, last_seq=20_000)
        index.refresh(lake)
        assert len(index.find_contexts([row.digest for row in rows])) == 20_000


def test_two_processes_may_share_one_index(lake: Lake, tmp_path: Path) -> None:
    archive(lake, "contexts", [*contexts(1, 2000)])
    script = (
        "import sys; from holdfast.lake import Lake, LakeIndex\n"
        "lake = Lake.open(sys.argv[1])\n"
        "with LakeIndex.open(sys.argv[2]) as index:\n"
        "    for _ in range(5): index.rebuild(lake)\n"
        "    print(index.count('contexts'))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(lake.path), str(tmp_path / "shared")], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in processes] == ["2000"] * 3


def test_lookups_from_many_threads_while_files_change(lake: Lake, index: LakeIndex) -> None:
    rows = contexts(1, 600)
    for start in range(0, 600, 50):
        archive(lake, "contexts", [*rows[start : start + 50]])
    with Lookup(lake, index, open_files=3) as lookup, ThreadPoolExecutor() as pool:

        def read(seed: int) -> None:
            rnd = random.Random(seed)
            for _ in range(60):
                some = rnd.sample(rows, 5)
                assert lookup.get_contexts([row.digest for row in some]) == {row.digest: row for row in some}

        readers = [pool.submit(read, seed) for seed in range(6)]
        other = Lake.open(lake.path)
        compact(other, policy=MergePolicy(min_files=2), at_ms=LATER_MS)
        vacuum(other, older_than_s=-60)
        for reader in readers:
            reader.result()


def open_parquet_files() -> list[str]:
    names: list[str] = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            names.append(str(descriptor.readlink()))
        except FileNotFoundError:
            continue  # that of this very listing
    return [name for name in names if ".parquet" in name]


def test_files_that_were_merged_are_closed_and_each_open_one_takes_one_descriptor(lake: Lake, index: LakeIndex) -> None:
    """An open file keeps its space on the disk when it is removed, and its descriptor for as long as it is open."""
    before = len(open_parquet_files())
    rows = contexts(1, 40)
    with Lookup(lake, index) as lookup:
        for round_ in range(4):
            for first in range(round_ * 10, round_ * 10 + 10):
                archive(lake, "contexts", [rows[first]])
            assert len(lookup.get_contexts([row.digest for row in rows[: round_ * 10 + 10]])) == round_ * 10 + 10
            assert len(open_parquet_files()) - before == 10 + (round_ > 0)
            compact(lake, policy=MergePolicy(min_files=2), at_ms=LATER_MS)
            vacuum(lake, 0, orphans_older_than_s=0, log_older_than_s=0, at_ms=LATER_MS)
            assert lookup.get_contexts([rows[0].digest]) == {rows[0].digest: rows[0]}
            assert len(open_parquet_files()) - before == 1
    assert len(open_parquet_files()) == before
