"""Memory that look-ups, merges and SQL needed goes back to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.lake import Lake, connect
from holdfast.lake.compaction import compact
from tests.campaigns.chaos import make_past

ROWS = 60_000
MIB = 1024 * 1024

LOOK_UP = """
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import sys
import pyarrow.parquet as pq
import holdfast.lake.memory as memory
from holdfast.lake import Lake, LakeIndex, Lookup
from holdfast.ops.torture.rig import usage_of
from holdfast.schemas.refs import parse_ref

memory.KEPT_BYTES = int(sys.argv[2])
with Lake.open(Path(sys.argv[1]) / "lake") as lake, LakeIndex.open(Path(sys.argv[1]) / "index") as index:
    with Lookup(lake, index) as lookup, ThreadPoolExecutor(6) as threads:
        index.refresh(lake)
        table = lake.table("contexts")
        refs = []
        for entry in table.refresh().files.values():
            refs += pq.read_table(table.directory / entry.path, columns=["ref"]).column(0).to_pylist()[::200]
        digests = [parse_ref(ref).digest for ref in refs]
        memory.give_back()
        before = usage_of(os.getpid()).own_bytes
        calls = [digests[start : start + 20] for start in range(0, len(digests), 20)] * 6
        found = sum(len(rows) for rows in threads.map(lookup.get_contexts, calls))
        assert found == len(digests) * 6, found
        print(usage_of(os.getpid()).own_bytes - before)
"""


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("memory")
    make_past(directory / "lake", ROWS)
    with Lake.open(directory / "lake") as past:
        assert compact(past).groups  # merged files have large row groups
    return directory


def bytes_grown(lake: Path, kept_bytes: int) -> int:
    done = subprocess.run([sys.executable, "-c", LOOK_UP, str(lake), str(kept_bytes)], capture_output=True, check=True)
    return int(done.stdout)


def test_threads_that_look_up_contexts_give_back_what_they_freed(lake: Path) -> None:
    kept, given_back = bytes_grown(lake, 1 << 60), bytes_grown(lake, MIB)
    assert given_back < 0.6 * kept, f"{given_back / MIB:.0f} of {kept / MIB:.0f} MiB"


@pytest.mark.parametrize("wanted", [None, False])
def test_duckdb_gives_back_what_a_statement_needed_unless_told_otherwise(lake: Path, wanted: bool | None) -> None:
    config: dict[str, str | bool | int | float | list[str]] = (
        {} if wanted is None else {"allocator_background_threads": wanted}
    )
    with connect(lake / "lake", config=config) as connection:
        row = connection.execute("SELECT current_setting('allocator_background_threads')").fetchone()
    assert row == (wanted is None,)
