from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.ops.torture.rig import Usage, usage_of
from holdfast.ops.torture.usage import Point, UsageLog, UsageSummary, not_flat, summarize

MIB = 1024 * 1024
HOUR_S = 3_600


def life(mib_at: Callable[[float], float], files_at: Callable[[float], int], began: int, ends: int) -> list[Point]:
    """What a process holds by the time since its start."""
    return [
        Point(float(at_s), int(MIB * mib_at(at_s - began)), files_at(at_s - began)) for at_s in range(began, ends, 5)
    ]


def usual(_at_s: float) -> int:
    return 20


def judged(*lives: list[Point]) -> UsageSummary:
    return summarize(lives)


def test_a_leak_of_memory_is_told_and_what_it_came_to() -> None:
    found = judged(life(lambda at_s: 200 + at_s / 60, usual, 0, HOUR_S))  # a MiB a minute
    assert found.is_flat is False
    assert (found.mib.start, found.mib.warm, found.mib.end) == (200.0, 222.7, 252.5)
    assert not_flat({"archiver": found}) == ["archiver: 30.0 MiB from the second quarter to the last, 24.0 are allowed"]


def test_a_leak_of_open_files_is_told() -> None:
    found = judged(life(lambda _: 200, lambda at_s: 20 + int(at_s / 300), 0, HOUR_S))  # twelve an hour
    assert found.growth == ["6.0 open files from the second quarter to the last, 4.0 are allowed"]


def test_caches_that_fill_and_what_is_held_for_a_moment_are_no_leak() -> None:
    def filling(at_s: float) -> float:
        return 100 + min(at_s / 3, 250) + (300 if at_s % 200 == 0 else 0)

    found = judged(life(filling, lambda at_s: 20 + int(at_s) % 9, 0, HOUR_S))
    assert found.is_flat is True
    assert found.mib.most > 600
    assert not_flat({"archiver": found}) == []


def test_a_leak_is_not_hidden_by_a_late_restart_nor_by_many() -> None:
    """The one shows in the longest life, the other over all of them."""
    late = judged(life(lambda at_s: 100 + at_s / 20, usual, 0, 2_400), life(lambda _: 100, usual, 2_400, HOUR_S))
    assert late.is_flat is False
    assert late.starts == 2

    def returning(began: int) -> list[Point]:
        return life(lambda _: 100 + began / 20, usual, began, began + 60)

    many = [returning(began) for began in range(0, HOUR_S, 60)]
    assert judged(*many).is_flat is False


def test_nodes_that_share_their_work_are_judged_together() -> None:
    def log(of_the_second: Callable[[float], float]) -> UsageLog:
        taken = UsageLog()
        for at_s in range(0, HOUR_S, 5):
            for name, mib in (("n1", 100 + at_s / 60), ("n2", of_the_second(at_s))):
                taken.take(name, 1 if name == "n1" else 2, at_s, Usage(int(mib * MIB), int(mib * MIB), 20, 0, 0))
        return taken

    together = {"nodes": ["n1", "n2"]}
    moved = log(lambda at_s: 160 - at_s / 60).summary(together=together)
    assert not_flat(moved) == []
    assert moved["nodes"].is_flat is True
    assert moved["n1"].is_flat is None
    assert moved["n1"].mib.end - moved["n1"].mib.warm == pytest.approx(30, abs=1)
    assert not_flat(log(lambda at_s: 160 - at_s / 60).summary()) != []
    leaking = log(lambda at_s: 160 + at_s / 60).summary(together=together)
    assert [line.partition(":")[0] for line in not_flat(leaking)] == ["nodes"]


def test_what_only_a_young_process_lacks_is_no_growth() -> None:
    lives = [life(lambda at_s: 10 if at_s < 20 else 200, usual, began, began + 60) for began in range(0, HOUR_S, 60)]
    assert judged(*lives).is_flat is True


def test_lives_are_compared_at_the_same_age() -> None:
    """Caches fill for some minutes: a process that happens to live longer later on has not grown for that."""

    def filling(at_s: float) -> float:
        return 100 + min(at_s, 300) / 2

    short = [life(filling, usual, began, began + 60) for began in range(0, 1_800, 60)]
    long = [life(filling, usual, began, began + 600) for began in range(1_800, HOUR_S, 600)]
    assert judged(*short, *long).is_flat is True


def test_less_than_twenty_minutes_say_nothing_but_for_the_most() -> None:
    found = judged(life(lambda at_s: 100 + at_s, usual, 0, 900))
    assert (found.is_flat, found.growth) == (None, [])
    assert judged(life(lambda at_s: 1_000 + at_s, usual, 0, 900)).growth == ["1895 MiB at the most, 1500 are allowed"]


def test_memory_that_a_file_backs_is_not_counted() -> None:
    log = UsageLog()
    now = usage_of(os.getpid())
    assert now is not None
    assert 0 < now.own_bytes < now.rss_bytes  # the difference: the interpreter and its libraries
    log.take("x", 1, 0.0, Usage(8 * MIB, 2 * MIB, 3, 0, 1))
    log.take("x", 1, 5.0, Usage(9 * MIB, 2 * MIB, 4, 0, 1))
    found = log.summary()["x"]
    assert (found.mib.start, found.mib.last, found.files.start, found.files.last) == (2.0, 2.0, 3.0, 4.0)


def test_data_files_have_a_bound_and_removed_ones_are_none(tmp_path: Path) -> None:
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    before = usage_of(os.getpid())
    with paths[0].open("wb"), paths[1].open("wb"):
        paths[1].unlink()
        now = usage_of(os.getpid())
    assert before is not None
    assert now is not None
    assert (now.open_files - before.open_files, now.data_files - before.data_files) == (2, 1)
    found = judged([Point(float(at_s), MIB, 20 + at_s // 15, at_s // 15) for at_s in range(0, HOUR_S, 5)])
    assert found.growth == ["239 data files open at the most, 192 are allowed"]
