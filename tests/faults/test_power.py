"""The power is cut: what was acknowledged is there, what was not is there whole or not at all.

The long form is ``python -m tests.campaigns.power``.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from holdfast.streams.messages import StoredMessage
from holdfast.streams.wire import H_BATCH_COMMIT, H_BATCH_ID, H_BATCH_SEQUENCE
from tests.campaigns.power import run
from tests.campaigns.power_check import incomplete
from tests.campaigns.power_images import MIB, Disk, missing
from tests.campaigns.power_plan import KINDS, PowerKind, RoundPlan, plan
from tests.campaigns.power_torn import tear

pytestmark = pytest.mark.faults

SEED = 11
needs_disk = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "device", size_bytes=16 * MIB)
    made.make()
    yield made
    made.close()


def rounds(*kinds: PowerKind) -> list[RoundPlan]:
    """One short round of each kind."""
    return [msgspec.structs.replace(each, seconds=0.4) for each in plan(SEED, len(kinds), kinds)]


def quiet(_: str) -> None:
    """Says nothing of how it goes."""


# The campaign


@needs_disk
def test_power_cuts_lose_nothing_in_durable() -> None:
    report = asyncio.run(run(rounds("torn", "batches", "purge", "trimming", "changing"), seed=SEED, say=quiet))
    assert report.violations == 0, report
    assert (report.lost, report.doubled) == (0, 0)
    assert report.cuts == 5
    assert report.acknowledged > 100
    assert report.done["batches"] > 0
    assert report.done["commits"] > 0


@needs_disk
def test_power_cuts_lose_something_in_fast_and_it_is_noticed() -> None:
    report = asyncio.run(run(rounds("writing"), seed=SEED, durability="fast", say=quiet))
    assert report.lost > 0
    assert report.violations > 0
    assert report.is_as_promised  # of this mode no more is promised


@needs_disk
def test_workers_that_sync_nothing_are_found_out() -> None:
    report = asyncio.run(run(rounds("purge"), seed=SEED, planted="no-sync", say=quiet))
    assert report.violations > 0
    assert report.is_as_promised


def test_the_same_seed_plans_the_same_cuts() -> None:
    planned = plan(5, 70, KINDS)
    assert planned == plan(5, 70, KINDS)
    assert planned != plan(6, 70, KINDS)
    assert {each.kind for each in planned} == set(KINDS)
    assert all(each.is_torn == (each.kind == "torn") for each in planned)
    assert any(each.armed for each in planned)


# The disk


@needs_disk
def test_what_is_synced_survives_a_cut_and_what_is_not_is_gone(disk: Disk) -> None:
    (disk.mounted_at / "unsynced").write_bytes(b"x" * 10_000)
    with (disk.mounted_at / "synced").open("wb") as file:
        file.write(b"y" * 10_000)
        file.flush()
        os.fsync(file.fileno())
        file.write(b"z" * 10_000)
    disk.cut()
    assert (disk.mounted_at / "synced").read_bytes() == b"y" * 10_000
    # Its name came along with the sync of the other, its content did not.
    assert (disk.mounted_at / "unsynced").read_bytes() == b""


@needs_disk
def test_a_torn_cut_leaves_some_of_what_was_not_synced(disk: Disk) -> None:
    lengths: set[int] = set()
    for seed in range(8):
        path = disk.mounted_at / f"file{seed}"
        with path.open("wb") as file:
            file.write(b"y" * 5_000)
            file.flush()
            os.fsync(file.fileno())
            file.write(b"z" * 50_000)
        choice = random.Random(seed)
        disk.cut(partial(_tear, choice))
        left = path.read_bytes()
        assert left[:5_000] == b"y" * 5_000
        assert set(left[5_000:]) <= set(b"z\0")
        lengths.add(len(left))
    assert len(lengths) > 2


def _tear(choice: random.Random, written: Path, survived: Path) -> None:
    tear(written, survived, choice)


# What is torn


def folders(tmp_path: Path) -> tuple[Path, Path]:
    written, survived = tmp_path / "written", tmp_path / "survived"
    written.mkdir()
    survived.mkdir()
    return written, survived


@pytest.mark.parametrize("seed", range(12))
def test_tearing_touches_nothing_that_was_synced(tmp_path: Path, seed: int) -> None:
    written, survived = folders(tmp_path)
    content = bytes(random.Random(seed).randbytes(40_000))
    for folder, length in ((written, 40_000), (survived, 13_000)):
        (folder / "log").write_bytes(content[:length])
        (folder / "same").write_bytes(b"same")
    tear(written, survived, random.Random(seed))
    left = (survived / "log").read_bytes()
    assert left[:13_000] == content[:13_000]
    for start in range(13_000, len(left)):
        assert left[start] in (0, content[start])
    assert (survived / "same").read_bytes() == b"same"
    assert (written / "log").read_bytes() == content


def test_tearing_is_the_same_for_the_same_seed_and_makes_every_kind_of_leftover(tmp_path: Path) -> None:
    seen: set[bytes] = set()
    for seed in range(40):
        left: list[bytes] = []
        for number in range(2):
            place = tmp_path / f"{seed}-{number}"
            place.mkdir()
            written, survived = folders(place)
            (written / "commit.json").write_bytes(b"c" * 6_000)
            tear(written, survived, random.Random(seed))
            path = survived / "commit.json"
            left.append(path.read_bytes() if path.exists() else b"absent")
        assert left[0] == left[1]
        seen.add(left[0])
    assert b"absent" in seen
    assert b"" in seen
    assert b"c" * 6_000 in seen
    assert bytes(6_000) in seen
    assert any(0 < len(content) < 6_000 and content.strip(b"c") == b"" for content in seen)


# Batches


def member(seq: int, number: int, *, commits: bool = False) -> StoredMessage:
    headers = {H_BATCH_ID: "b", H_BATCH_SEQUENCE: str(number)} | ({H_BATCH_COMMIT: "1"} if commits else {})
    return StoredMessage("ctx.t.event.a.x.y", headers, b"{}", seq, 0, "e")


def test_a_batch_that_is_there_in_part_is_noticed() -> None:
    whole = [member(7, 1), member(8, 2), member(9, 3, commits=True)]
    assert incomplete(whole) is None
    assert "does not commit" in str(incomplete(whole[:2]))
    assert "not consecutive" in str(incomplete(whole[1:]))
    assert "not consecutive" in str(incomplete([whole[0], whole[2]]))
    assert incomplete(whole[1:], is_cut_off=True) is None
