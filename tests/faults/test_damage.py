"""Flipped bits: what is served is right or refused by name, and what can be mended is."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from holdfast.lake import Lake, LakeIndex, Lookup, compact, connect, healing, verify_lake
from holdfast.lake.commit import write_checkpoint
from holdfast.lake.copies import Copies
from holdfast.lake.healing import heal_file
from holdfast.lake.log import checkpoint_path, commit_path
from holdfast.lake.scrub import Scrub, scrub_progress
from holdfast.schemas.errors import DamagedError, IntegrityError, UnavailableError
from holdfast.schemas.rows import TABLES, Position
from holdfast.workers.control import archiver_status, flush
from holdfast.workers.scrubber import Scrubber
from holdfast.workers.stream_marks import StreamMarks
from tests.running import Acknowledged, eventually, running, settings_in
from tests.support import OwnServer
from tests.test_lake_samples import EPOCH, T0_MS, chunked, context, contexts, events, key_versions, touch

if TYPE_CHECKING:
    from holdfast.lake.log import FileEntry
    from holdfast.schemas.rows import ContextRow

pytestmark = pytest.mark.faults


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """6,000 contexts in four row groups, and a few events and versions."""
    made = Lake.open(tmp_path / "lake", create=True)
    made.append("contexts", contexts(1, 6000), epoch=EPOCH, first_seq=1, last_seq=6000)
    made.append("events", events(1, 30), epoch=EPOCH, first_seq=1, last_seq=30)
    made.append("key_versions", key_versions(1, 20), epoch=EPOCH, first_seq=1, last_seq=20)
    return made


def flip(path: Path, place: int) -> None:
    """Flips a bit, and leaves the times as they were: what rots has no new ones."""
    stat = path.stat()
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x10
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def damage_group(lake: Lake, group: int) -> Path:
    """Flips a bit in the middle of a row group of the file of contexts."""
    [entry] = lake.files("contexts")
    assert entry.checksums is not None
    ends = [0, *(end for end, _ in entry.checksums.parts)]
    path = lake.path / "contexts" / entry.path
    flip(path, (ends[group] + ends[group + 1]) // 2)
    return path


def test_of_a_damaged_file_the_sound_rows_are_served_and_the_others_are_named(lake: Lake, tmp_path: Path) -> None:
    with LakeIndex.open(tmp_path / "index") as index, Lookup(lake, index) as lookup:
        index.refresh(lake)
        path = damage_group(lake, 1)
        digests = [context(seq).digest for seq in (1, 2000, 4001, 6000)]
        assert len(lookup.get_contexts(digests)) == 4
        with pytest.raises(DamagedError) as raised:
            lookup.get_contexts([context(3000).digest])
    error = raised.value
    assert (error.file, error.rows, error.first_seq, error.last_seq) == (str(path), 2000, 2001, 4000)
    [problem] = Lake.open(lake.path).problems()
    assert problem.object == str(path)
    assert "2000 rows of epoch-1, 2001 to 4000" in problem.what
    [violation] = verify_lake(lake.path).violations
    assert set(re.findall(r"ctx_completion_\w+", violation.what)) == {row.ref for row in contexts(2001, 4000)}


def test_sql_never_shows_a_damaged_file_nor_a_result_without_it(lake: Lake) -> None:
    path = damage_group(lake, 2)
    with connect(lake.path) as duck:
        for query in ("SELECT count(*) FROM contexts", "SELECT body FROM contexts WHERE stream_seq = 1"):
            with pytest.raises(DamagedError) as raised:
                duck.execute(query).fetchall()
            assert (raised.value.file, raised.value.rows) == (str(path), 2000)
        assert duck.execute("SELECT count(*) FROM events").fetchone() == (30,)
        assert duck.execute("SELECT count(*) FROM contexts_stored WHERE day = '2020-01-01'").fetchone() == (0,)


@pytest.mark.parametrize("rotten", ["the new index", "the index of before"])
def test_not_there_is_not_said_of_what_may_be_in_a_damaged_file(lake: Lake, tmp_path: Path, rotten: str) -> None:
    [entry] = lake.files("events")
    with LakeIndex.open(tmp_path / "index") as index, Lookup(lake, index) as lookup:
        if rotten == "the index of before":
            index.refresh(lake)
        (lake.path / "events" / entry.path).unlink()
        wanted = ("default", events(7, 7)[0].id)
        with pytest.raises(DamagedError, match="missing"):
            lookup.get_events([wanted])


def test_a_damaged_file_is_never_compacted_into_a_sound_one(lake: Lake) -> None:
    lake.append("contexts", contexts(6001, 6100), epoch=EPOCH, first_seq=6001, last_seq=6100)
    flip(lake.path / "contexts" / lake.files("contexts")[0].path, 5000)
    before = lake.files("contexts")
    assert compact(lake, at_ms=2_000_000_000_000, tables=["contexts"]).groups == 0
    assert lake.files("contexts") == before


@pytest.mark.parametrize("place", [120, 400, -60])
def test_a_damaged_commit_is_read_from_its_copy_and_mended(lake: Lake, place: int) -> None:
    lake.append("events", events(31, 40), epoch=EPOCH, first_seq=31, last_seq=40)
    sound = commit_path(lake.path / "events", 1).read_bytes()
    flip(commit_path(lake.path / "events", 1), place)
    reader = Lake.open(lake.path)
    assert reader.watermark("events") == Position(EPOCH, 40)
    assert reader.statistics("events").rows == 40
    assert [violation.invariant for violation in verify_lake(lake.path).violations] == ["I5"]
    Lake.open(lake.path, create=True)
    assert commit_path(lake.path / "events", 1).read_bytes() == sound
    assert verify_lake(lake.path).ok


def test_a_damaged_commit_without_a_copy_is_never_passed_over(lake: Lake) -> None:
    lake.append("events", events(31, 40), epoch=EPOCH, first_seq=31, last_seq=40)
    path = commit_path(lake.path / "events", 1)
    flip(path, path.read_bytes().index(b'"size":') + 8)
    shutil.rmtree(lake.path / "events" / "_log_copy")
    for create in (False, True):
        with pytest.raises(IntegrityError, match="damaged or missing"):
            Lake.open(lake.path, create=create)
    assert verify_lake(lake.path).violations[0].invariant == "I5"


def test_a_damaged_checkpoint_is_not_believed(lake: Lake) -> None:
    write_checkpoint(lake.snapshot("events"))
    path = checkpoint_path(lake.path / "events", 1)
    raw = path.read_bytes()
    flip(path, len(raw) // 3)
    assert Lake.open(lake.path).statistics("events").rows == 30
    assert verify_lake(lake.path).violations[0].object == str(path)
    writer = Lake.open(lake.path, create=True)
    assert not path.exists()
    writer.append("events", events(31, 40), epoch=EPOCH, first_seq=31, last_seq=40)
    assert verify_lake(lake.path).ok


def killed_in_check(root: Path) -> None:
    """Opens an index in another process, which is killed by what it reads first."""
    code = (
        "import os, signal, sys\n"
        "from holdfast.lake import LakeIndex, index_environment\n"
        "index_environment.is_sound = lambda key, value: os.kill(os.getpid(), signal.SIGKILL)\n"
        "LakeIndex.open(sys.argv[1])\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(root)], check=False).returncode == -signal.SIGKILL


def test_a_kill_during_the_check_of_an_index_has_it_checked_again_and_a_second_begins_it_anew(
    lake: Lake, tmp_path: Path
) -> None:
    """A damaged page kills its reader each time, an operator hardly does."""
    root = tmp_path / "index"
    with LakeIndex.open(root) as index:
        index.refresh(lake)
    for kills, kept in ((1, 6_000), (2, 0), (1, 6_000)):
        (root / "seal").unlink()
        for _ in range(kills):
            killed_in_check(root)
        with LakeIndex.open(root) as index:
            assert index.count("contexts") == kept
            index.refresh(lake)
            assert index.count("contexts") == 6_000


def test_an_index_with_a_flipped_bit_is_made_anew_after_a_close_and_after_a_crash(lake: Lake, tmp_path: Path) -> None:
    root = tmp_path / "index"
    with LakeIndex.open(root) as index:
        index.refresh(lake)
    data = (root / "data.mdb").read_bytes()
    position = data.index(bytes.fromhex("0100") + (4321).to_bytes(8, "little"))
    for crashed in (False, True):
        flip(root / "data.mdb", position + 3)
        if crashed:
            (root / "seal").unlink()
        with LakeIndex.open(root) as index:
            assert sum(index.refresh(lake).versions.values()) == 3
            assert index.find_contexts([context(4321).digest]) == {context(4321).digest: Position(EPOCH, 4321)}
            assert index.count("contexts") == 6000


def test_the_scrub_goes_on_where_it_was_and_heals_from_the_copy(lake: Lake, tmp_path: Path) -> None:
    copies = Copies(lake.path, tmp_path / "copy")
    for table in TABLES:
        copies.catch_up(lake.table(table))
    damage_group(lake, 1)
    lake.copies = copies
    assert Scrub(lake).step(1, at_ms=1_000) == 1
    assert scrub_progress(lake)["files"] == 1
    again = Scrub(lake)
    assert again.is_due(2_000, interval_s=3_600)
    while again.step(1, at_ms=2_000):
        pass
    assert scrub_progress(lake) | {"bytes": 0} == {
        "files": 3,
        "files_total": 3,
        "bytes": 0,
        "last_full_pass": "1970-01-01T00:00:02.000Z",
        "damaged": 0,
    }
    assert not Scrub(lake).is_due(3_000, interval_s=3_600)
    # It was begun under a clock that was ahead: nobody waits until then.
    assert Scrub(lake).is_due(500, interval_s=3_600)
    assert verify_lake(lake.path, deep=True).ok


def test_the_scrub_without_a_copy_names_the_rows_and_forgets_a_file_that_was_restored(lake: Lake) -> None:
    path = lake.path / "contexts" / lake.files("contexts")[0].path
    sound = path.read_bytes()
    damage_group(lake, 2)
    scrub = Scrub(lake)
    while scrub.step(1 << 30, at_ms=1_000):
        pass
    [record] = lake.table("contexts").quarantine.files().values()
    assert set(record.rows) <= {row.ref for row in contexts(4001, 6000)}
    assert len(record.rows) == min(1_000, record.damage().rows)
    assert scrub_progress(lake)["damaged"] == 1
    path.write_bytes(sound)
    assert scrub.recheck_quarantine() == 0
    assert lake.problems() == []


async def test_a_damaged_file_is_healed_from_the_stream(tmp_path: Path) -> None:
    server = OwnServer(tmp_path / "nats")
    await server.start()
    settings = settings_in(tmp_path)
    stored = Acknowledged()
    try:
        async with running(server.url, settings, ["archiver", "resolver"]) as workers:
            await stored.add(server.url, 60)
            await flush(workers.connection)
            lake = Lake.open(settings.lake)
            for table in TABLES:
                [entry] = lake.files(table)
                flip(lake.path / table / entry.path, entry.size_bytes // 3)
            scrub = Scrub(lake)
            while scrub.step(1 << 30, at_ms=1_000):
                pass
            assert len(lake.problems()) == 3
            assert await Scrubber(workers.connection, settings).heal() == 3
            lake.refresh()
            assert lake.problems() == []
            await stored.check(server.url, settings.lake)
        assert verify_lake(settings.lake, deep=True).ok
        await asyncio.to_thread(stored.check_by_sql, settings.lake, None)
    finally:
        await server.stop()


def damage_footer(lake: Lake, entry: FileEntry) -> None:
    """Flips a bit in a file's footer: nothing of it can be believed."""
    flip(lake.path / "contexts" / entry.path, entry.size_bytes - 20)


def stored_again(lake: Lake) -> tuple[list[ContextRow], bytes]:
    """Stores a body in two chunks, then one of these and a small context again; returns the rows as the stream has
    them, and the body.  Each storing is a file."""
    body = b"a" * 3_000 + b"b" * 3_000
    first = [*chunked(1, body, 3_000), context(4)]
    again = [msgspec.structs.replace(row, seq=row.seq + 4, stored_at_ms=T0_MS + row.seq + 4) for row in first]
    lake.append("contexts", first, epoch=EPOCH, first_seq=1, last_seq=4)
    stored = [touch(row, row.seq) for row in (again[0], again[3])]
    lake.append("contexts", [*stored, context(9)], epoch=EPOCH, first_seq=5, last_seq=9)
    return [*first, again[0], again[3], context(9)], body


def forms_in(lake: Lake) -> dict[int, str]:
    with connect(lake.path) as sql:
        return dict(sql.execute("SELECT stream_seq, form FROM contexts_stored").fetchall())


def heal(lake: Lake, entry: FileEntry, rows: Sequence[ContextRow]) -> bool:
    """Heals a damaged file from what its stream holds of it, once the scrub has found it."""
    damage = Scrub(lake).check(lake.table("contexts"), entry)
    assert damage is not None
    within = [row for row in rows if entry.min_seq <= row.seq <= entry.max_seq]
    return heal_file(lake.table("contexts"), entry, damage, within)


@pytest.fixture
def empty_lake(tmp_path: Path) -> Lake:
    return Lake.open(tmp_path / "lake", create=True)


def test_a_body_that_was_stored_again_is_in_the_lake_once_after_healing(empty_lake: Lake) -> None:
    """Where the footer is damaged nothing tells which rows held bodies; a chunk twice would be read twice."""
    rows, body = stored_again(empty_lake)
    forms = forms_in(empty_lake)
    for entry in empty_lake.files("contexts"):
        damage_footer(empty_lake, entry)
        assert heal(empty_lake, entry, rows)
        assert forms_in(empty_lake) == forms
    with connect(empty_lake.path) as sql:
        assert sql.execute("SELECT body_bytes FROM contexts ORDER BY stream_seq").fetchall()[0] == (body,)
    assert verify_lake(empty_lake.path, deep=True).ok


def test_of_two_damaged_files_the_earlier_is_healed_before_the_later(empty_lake: Lake) -> None:
    """Whether the later one has bodies or touches of them, the earlier one tells."""
    rows, _ = stored_again(empty_lake)
    forms = forms_in(empty_lake)
    earlier, later = sorted(empty_lake.files("contexts"), key=lambda entry: entry.min_seq)
    damage_footer(empty_lake, earlier)
    damage_footer(empty_lake, later)
    Scrub(empty_lake).check(empty_lake.table("contexts"), earlier)
    assert not heal(empty_lake, later, rows)
    assert heal(empty_lake, earlier, rows)
    assert heal(empty_lake, later, rows)
    assert forms_in(empty_lake) == forms


def test_a_row_group_that_tells_nothing_is_healed_with_each_body_once(
    empty_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "salvage_group", lambda *_: None)
    rows, body = stored_again(empty_lake)
    forms = forms_in(empty_lake)
    for entry in empty_lake.files("contexts"):
        assert entry.checksums is not None
        flip(empty_lake.path / "contexts" / entry.path, entry.checksums.parts[0][0] // 2)
        assert heal(empty_lake, entry, rows)
        assert forms_in(empty_lake) == forms
    with connect(empty_lake.path) as sql:
        assert sql.execute("SELECT body_bytes FROM contexts ORDER BY stream_seq").fetchall()[0] == (body,)


@pytest.mark.parametrize("ending", ["killed", "stopped"])
async def test_what_the_server_dropped_before_it_was_archived_is_named(tmp_path: Path, ending: str) -> None:
    """After a kill the stream ends earlier; after a clean stop the server believes its account of a cut block."""
    server = OwnServer(tmp_path / "nats")
    await server.start()
    settings = settings_in(tmp_path)
    stored = Acknowledged()
    async with running(server.url, settings, ["archiver"]):
        await stored.add(server.url, 30)
        marks = StreamMarks(settings.lake)

        def is_seen() -> bool:
            mark = marks.get("CTX_EVENTS")
            return mark is not None and mark.seq == 30

        await eventually(is_seen)
    await (server.kill() if ending == "killed" else server.stop())
    [block] = (tmp_path / "nats").rglob("CTX_EVENTS/msgs/1.blk")
    if ending == "killed":
        flip(block, block.stat().st_size // 2)
    else:
        os.truncate(block, block.stat().st_size // 2)
    await server.start(with_streams=False)
    try:
        async with running(server.url, settings, ["archiver"]) as workers:
            if ending == "killed":
                await flush(workers.connection)
            else:
                # What is missing is in the middle now: nothing is passed over before somebody accepts it.
                with pytest.raises(UnavailableError, match="nothing of ours removed it"):
                    await flush(workers.connection)
            problems = (await archiver_status(workers.connection)).problems
        told = " ".join(problem.what for problem in problems)
        lost = re.search(r"(\d+) to 30,? were stored and not archived", told)
        assert lost is not None, told
        first = int(lost[1])
        # What is before the loss is archived all the same.
        assert Lake.open(settings.lake).statistics("events").rows == first - 1
    finally:
        await server.stop()


def campaign(*arguments: str) -> dict[str, Any]:
    """Runs the campaign in a process of its own, since it forks, and returns its report."""
    command = [sys.executable, "-m", "tests.campaigns.damage", "--json", "--jobs", "1", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-2_000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == (1 if report["wrong"] else 0)
    return report


def test_flips_over_all_kinds_of_files() -> None:
    report = campaign("--flips", "10", "--seed", "11", "--files", "parquet,delta,checkpoint,lmdb,meta")
    assert report["violations"] == []
    assert report["detected"] + report["harmless"] == 10


def test_flips_of_stream_files() -> None:
    report = campaign("--flips", "2", "--seed", "11", "--files", "blk,index")
    assert report["violations"] == []
    assert report["flips"] == 2


def test_the_campaign_notices_wrong_bytes() -> None:
    """With the comparison switched off, wrong rows are served, and seen."""
    assert campaign("--flips", "8", "--seed", "3", "--files", "parquet", "--unguarded")["wrong"] > 0
