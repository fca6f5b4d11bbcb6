from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from holdfast.lake import Lake, verify_lake
from holdfast.lake.log import commit_digest, commit_path, parse_commit
from holdfast.lake.log_copies import drop_copies
from holdfast.schemas.errors import DataDirectoryError
from tests.test_lake_samples import EPOCH, chunked, context, contexts, event, events, key_versions, touch

MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from tests.test_lake_samples import EPOCH, context
from holdfast.lake import Lake
lake = Lake.open(sys.argv[1], create=True)
def rows(last):
    for seq in range(1, last + 1):
        yield context(seq, (b'{"step":%d,"text":"' % seq) + b"lorem ipsum dolor sit amet " * 37 + b'"}')
lake.append("events", [], epoch=EPOCH, first_seq=1, last_seq=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = lake.append("contexts", rows(200_000), epoch=EPOCH, first_seq=1, last_seq=200_000)
print(report.rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    made = Lake.open(tmp_path / "lake", create=True)
    first = contexts(1, 50)
    made.append("contexts", first, epoch=EPOCH, first_seq=1, last_seq=50)
    more = [touch(first[0], 51), *chunked(52, bytes(range(256)) * 8, 500)]
    made.append("contexts", more, epoch=EPOCH, first_seq=51, last_seq=60)
    made.append("events", events(1, 30), epoch=EPOCH, first_seq=1, last_seq=30)
    made.append("key_versions", key_versions(1, 20), epoch=EPOCH, first_seq=1, last_seq=20)
    return made


def test_a_sound_lake_is_counted(lake: Lake) -> None:
    report = verify_lake(lake.path)
    assert report.ok
    assert report.violations == []
    assert report.checked["contexts"] == lake.statistics("contexts").rows
    assert (report.checked["events"], report.checked["key_versions"]) == (30, 20)
    assert (report.checked["files"], report.checked["manifests"]) == (4, 1)
    assert report.checked["digests"] == lake.statistics("contexts").rows - 2
    assert msgspec.json.encode(report)


def test_no_lake_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataDirectoryError):
        verify_lake(tmp_path)


def rewrite(path: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    actions = [json.loads(line) for line in path.read_text().splitlines()]
    for action in actions:
        change(action)
    settle(path, "\n".join(json.dumps(action) for action in actions))


def settle(path: Path, text: str) -> None:
    """Writes a commit that says of itself what it says: by somebody who meant to, not by a flipped bit."""
    actions = [json.loads(line) for line in text.splitlines()]
    for action in actions:
        action.get("commitInfo", {}).get("holdfast", {}).pop("sum", None)
    raw = "\n".join(json.dumps(action) for action in actions)
    said = parse_commit(1, raw.encode())
    digest = commit_digest(said.adds, said.removals, said.transactions, said.info)
    for action in actions:
        if "commitInfo" in action:
            action["commitInfo"]["holdfast"]["sum"] = digest
    path.write_text("\n".join(json.dumps(action) for action in actions))
    drop_copies(path.parents[1], [int(path.stem)])


def test_a_watermark_that_went_back_is_found(lake: Lake) -> None:
    lake.append("events", events(31, 40), epoch=EPOCH, first_seq=31, last_seq=40)

    def rewind(action: dict[str, dict[str, object]]) -> None:
        if "commitInfo" in action:
            action["commitInfo"]["holdfast"] = {"action": "append", "epoch": EPOCH, "first_seq": 21, "last_seq": 40}

    rewrite(commit_path(lake.path / "events", 2), rewind)
    [violation] = verify_lake(lake.path).violations
    assert violation.invariant == "I3"
    assert "21 to 40 after 30" in violation.what


def test_a_row_past_the_watermark_is_found(lake: Lake) -> None:
    def lower(action: dict[str, dict[str, object]]) -> None:
        if "txn" in action:
            action["txn"]["version"] = 28

    rewrite(commit_path(lake.path / "events", 1), lower)
    found = verify_lake(lake.path).violations
    assert [violation.invariant for violation in found] == ["I3", "I3"]
    assert "row 29 is past the watermark" in found[0].what


def test_a_file_named_twice_is_found(lake: Lake) -> None:
    [entry] = lake.files("events")
    copy = entry.path.replace("part-", "part-0")
    shutil.copyfile(lake.path / "events" / entry.path, lake.path / "events" / copy)
    path = commit_path(lake.path / "events", 1)
    lines = path.read_text().splitlines()
    added = next(line for line in lines if '"add"' in line)
    settle(path, "\n".join([*lines, added.replace(entry.path, copy)]))
    [violation] = verify_lake(lake.path).violations
    assert violation.invariant == "I1"
    assert "30 rows" in violation.what


def test_a_wrong_count_in_the_log_is_found(lake: Lake) -> None:
    path = commit_path(lake.path / "events", 1)
    settle(path, path.read_text().replace('\\"numRecords\\":30', '\\"numRecords\\":31'))
    [violation] = verify_lake(lake.path).violations
    assert "has 30 rows and 30 contexts, the log says 31 and 31" in violation.what


def test_a_wrong_body_is_found(lake: Lake) -> None:
    wrong = msgspec.structs.replace(context(61), body=b"tampered")
    lake.append("contexts", [wrong], epoch=EPOCH, first_seq=61, last_seq=61)
    [violation] = verify_lake(lake.path).violations
    assert violation.invariant == "I4"
    assert wrong.ref in violation.what


def test_an_identity_stored_twice_is_found(lake: Lake) -> None:
    lake.append("events", [event(31, id=event(3).id)], epoch=EPOCH, first_seq=31, last_seq=31)
    lake.append("contexts", [context(61, context(5).body)], epoch=EPOCH, first_seq=61, last_seq=61)
    found = verify_lake(lake.path).violations
    assert {violation.object.split()[0] for violation in found} == {"contexts", "events"}
    assert all(violation.what == "is stored 2 times" for violation in found)


def test_a_manifest_without_its_chunk_is_found(lake: Lake) -> None:
    rows = chunked(61, bytes(range(250)), 100)
    lake.append("contexts", [rows[0], *rows[2:]], epoch=EPOCH, first_seq=61, last_seq=64)
    [violation] = verify_lake(lake.path).violations
    assert (violation.invariant, violation.object) == ("I4", rows[-1].ref)
    assert "lacks 1 of 3 chunks" in violation.what


def test_many_violations_are_summed_up(lake: Lake) -> None:
    wrong = [msgspec.structs.replace(row, body=b"wrong") for row in contexts(61, 400)]
    lake.append("contexts", wrong, epoch=EPOCH, first_seq=61, last_seq=400)
    found = verify_lake(lake.path).violations
    assert len(found) == 101
    assert found[-1].what == "240 more of the same kind"


def test_writing_200_000_rows_takes_bounded_memory(tmp_path: Path) -> None:
    """200 MB of bodies: what is held is a row group for each day, not the run."""
    root = Path(__file__).parents[2]
    output = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "lake"), str(root)], capture_output=True, text=True, check=True
    )
    rows, grown_kib = map(int, output.stdout.split())
    assert rows == 200_000
    assert grown_kib < 120 * 1024
