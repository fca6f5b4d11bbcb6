"""The index while it grows, and while it is damaged under its users."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import pytest

import holdfast.lake.index as index_module
import holdfast.lake.index_environment as index_environment
from holdfast.lake import Lake, LakeIndex
from holdfast.schemas.errors import UnavailableError
from tests.support import LIMIT_S
from tests.test_lake_samples import EPOCH, contexts, events

SMALL_MAP_BYTES = 128 * 1024


def archive(lake: Lake, first: int, last: int) -> None:
    lake.append("events", events(first, last), epoch=EPOCH, first_seq=first, last_seq=last)


def test_readers_go_on_while_the_map_grows(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the map ends every transaction of the process that is under way."""
    monkeypatch.setattr(index_environment, "INITIAL_MAP_BYTES", SMALL_MAP_BYTES)
    archive(lake, 1, 1_000)
    keys = [("default", row.id) for row in events(1, 1_000)]
    reads = 0
    ended = threading.Event()
    with LakeIndex.open(tmp_path / "index") as index:
        index.refresh(lake)

        def read() -> None:
            nonlocal reads
            while not ended.is_set():
                assert len(index.find_events(keys)) == 1_000
                reads += 1

        def fill() -> None:
            for first in range(1_001, 13_000, 3_000):
                archive(lake, first, first + 2_999)
                index.refresh(lake)

        with ThreadPoolExecutor(4) as pool:
            readers = [pool.submit(read) for _ in range(4)]
            try:
                fill()
            finally:
                ended.set()
        for reader in readers:
            reader.result()
        assert reads
        assert index.count("events") == 13_000
        with index._shared.in_use():
            assert index._shared.env.info()["map_size"] > 4 * SMALL_MAP_BYTES


def test_readers_go_on_while_the_index_is_opened_anew_after_much_was_written(
    lake: Lake, index: LakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMDB keeps the memory of the pages of its greatest transaction until it is opened anew."""
    monkeypatch.setattr(index_module, "RENEW_PAGES", 10)
    opened: list[Path] = []
    open_environment = index_environment._environment

    def counted(root: Path) -> lmdb.Environment:
        opened.append(root)
        return open_environment(root)

    monkeypatch.setattr(index_environment, "_environment", counted)
    archive(lake, 1, 1_000)
    index.refresh(lake)
    keys = [("default", row.id) for row in events(1, 1_000)]
    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(lambda: [len(index.find_events(keys)) for _ in range(20)]) for _ in range(3)]
        for first in range(1_001, 6_001, 1_000):
            archive(lake, first, first + 999)
            index.refresh(lake)
        assert {found for reader in readers for found in reader.result(LIMIT_S)} == {1_000}
    assert index.count("events") == 6_000
    assert len(opened) >= 3
    before = len(opened)
    archive(lake, 6_001, 6_005)
    index.refresh(lake)
    assert len(index.find_events([("default", row.id) for row in events(6_001, 6_005)])) == 5
    assert len(opened) == before  # little was written


def test_several_threads_that_fill_the_map_at_once_each_get_their_rows_in(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_environment, "INITIAL_MAP_BYTES", SMALL_MAP_BYTES)
    archive(lake, 1, 5_000)
    lake.append("contexts", contexts(1, 3_000), epoch=EPOCH, first_seq=1, last_seq=3_000)
    with LakeIndex.open(tmp_path / "index") as index:
        threads = [threading.Thread(target=lambda: index.refresh(Lake.open(lake.path))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
        assert not any(thread.is_alive() for thread in threads)
        assert (index.count("events"), index.count("contexts")) == (5_000, 3_000)


def test_a_map_that_another_process_has_grown_is_taken_over(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive(lake, 1, 8_000)
    monkeypatch.setattr(index_environment, "INITIAL_MAP_BYTES", SMALL_MAP_BYTES)
    fill = (
        "import sys; from holdfast.lake import Lake, LakeIndex\n"
        "with LakeIndex.open(sys.argv[2]) as index: index.refresh(Lake.open(sys.argv[1]))\n"
    )
    with LakeIndex.open(tmp_path / "index") as index:
        subprocess.run([sys.executable, "-c", fill, str(lake.path), str(tmp_path / "index")], check=True)
        assert len(index.find_events([("default", events(7, 7)[0].id)])) == 1


def test_what_lmdb_refuses_is_told_as_unavailable(
    lake: Lake, index: LakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive(lake, 1, 10)
    index.refresh(lake)

    def refuse(*_: object) -> None:
        raise lmdb.ReadersFullError("no slot is free")

    monkeypatch.setattr(LakeIndex, "_position", refuse)
    with pytest.raises(UnavailableError, match="no slot is free"):
        index.find_events([("default", events(7, 7)[0].id)])


def overwrite(path: Path, place: int, content: bytes) -> None:
    """In place, since the file is mapped."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, content, place)
    finally:
        os.close(descriptor)


def flip_stamp(data: Path) -> None:
    """Every copy of it: LMDB keeps old pages."""
    raw = data.read_bytes()
    key = b"table:events"
    place = raw.find(key)
    while place >= 0:
        overwrite(data, place + len(key), b"\xc1")
        place = raw.find(key, place + 1)


def wreck_branches(data: Path) -> None:
    """Makes every page that leads to others one that does not."""
    page, branch, overflow = os.sysconf("SC_PAGESIZE"), 0x01, 0x04
    raw = data.read_bytes()
    for start in range(2 * page, len(raw), page):
        if int.from_bytes(raw[start + 10 : start + 12], "little") == branch:
            overwrite(data, start + 10, overflow.to_bytes(2, "little"))


@pytest.mark.parametrize("damage", [flip_stamp, wreck_branches])
def test_a_refresh_that_meets_damage_makes_the_index_anew(
    lake: Lake, index: LakeIndex, tmp_path: Path, damage: object
) -> None:
    archive(lake, 1, 5_000)
    index.refresh(lake)
    assert callable(damage)
    damage(tmp_path / "index" / "data.mdb")
    archive(lake, 5_001, 5_010)
    assert index.refresh(lake).rows_added == 5_010
    assert len(index.find_events([("default", row.id) for row in events(1, 5_010)])) == 5_010


def test_asking_for_the_version_has_a_damaged_index_made_anew(lake: Lake, index: LakeIndex, tmp_path: Path) -> None:
    archive(lake, 1, 10)
    index.refresh(lake)
    flip_stamp(tmp_path / "index" / "data.mdb")
    with pytest.raises(UnavailableError, match="stamp of events"):
        index.version("events")
    assert (index.version("events"), index.count("events")) == (-1, 0)
    index.refresh(lake)
    assert (index.version("events"), index.count("events")) == (lake.version("events"), 10)
