"""What is left of a run of the benchmarks that fails, is stopped or has no room.  Nothing is measured here."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from benchmarks import __main__ as suite
from benchmarks.bench import Bench, Figure
from benchmarks.curves import run as full
from benchmarks.curves.curve import Curve, CurvesFile, OnPoint, Point, curve
from benchmarks.measure import Result, Run, Side
from benchmarks.outcome import STOPPED
from benchmarks.records import ResultsFile, read_records, write_records

from tests.benchmark_support import record

Measure = Callable[[Bench], Awaitable[None]]


def result(value: float) -> Result:
    return Result(what="", value=value, values=[value], count=1)


def figure(name: str) -> Figure:
    return Figure(name=name, what=name, kind="rate", durability="durable", count=1)


def adds(*names: str) -> Measure:
    async def run(bench: Bench) -> None:
        for name in names:
            if bench.wants(name):
                bench.add(figure(name), result(2.0), result(1.0))

    return run


def raises(error: Exception) -> Measure:
    async def run(_: Bench) -> None:
        raise error

    return run


@pytest.fixture
def run_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the suite of the files given, each its figures and what measures them; records go to records.json."""

    def run(*files: tuple[tuple[str, ...], Measure], names: tuple[str, ...] = ()) -> int:
        monkeypatch.setattr(suite, "FILES", files)
        options = ["--no-peers", "--data", str(tmp_path), "--json", str(tmp_path / "records.json")]
        return suite.run_figures([*names, *options])

    return run


def names_in(path: Path) -> list[str]:
    return [found.name for found in read_records(path)]


def test_a_figure_that_fails_is_told_and_the_others_are_kept(
    run_suite: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def second_fails(bench: Bench) -> None:
        async def ours(count: int) -> Run:
            return Run(count, 1.0)

        async def fails(_: int) -> Run:
            raise RuntimeError("no answer came")

        await bench.figure(figure("one"), Side("", ours), Side("", ours))
        await bench.figure(figure("two"), Side("", fails), Side("", ours))
        await bench.figure_beside(figure("three"), [Side("", fails), Side("", ours)], [])
        await bench.figure(figure("four"), Side("", ours), Side("", ours))

    code = run_suite(
        (("one", "two", "three", "four"), second_fails),
        (("five", "six"), raises(OSError("no server came up"))),
        (("seven",), adds("seven")),
    )
    assert code == 1
    assert names_in(tmp_path / "records.json") == ["one", "four", "seven"]
    told = capsys.readouterr().err.splitlines()
    assert told[-3:] == [
        "failed: two: RuntimeError('no answer came')",
        "failed: three: RuntimeError('no answer came')",
        "failed: five, six: OSError('no server came up')",
    ]


def test_every_record_is_in_the_file_before_the_next_figure_begins(
    run_suite: Callable[..., int], tmp_path: Path
) -> None:
    seen: list[list[str]] = []

    async def look(_: Bench) -> None:
        seen.append(names_in(tmp_path / "records.json"))

    assert run_suite((("one",), adds("one")), ((), look), (("two", "three"), adds("two", "three")), ((), look)) == 0
    assert seen == [["one"], ["one", "two", "three"]]


def test_a_figure_whose_tasks_fail_leaves_the_others_alone(run_suite: Callable[..., int], tmp_path: Path) -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise RuntimeError("no answer came")

    async def tasks_fail(_: int) -> Run:
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(fails())
        raise AssertionError("the group has failed")

    async def one_of_two(bench: Bench) -> None:
        await bench.figure(figure("one"), Side("", tasks_fail), Side("", tasks_fail))
        bench.add(figure("two"), result(2.0), result(1.0))

    assert run_suite((("one", "two"), one_of_two), (("three",), adds("three"))) == 1
    assert names_in(tmp_path / "records.json") == ["two", "three"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("fails_then", [False, True])
def test_an_interrupted_run_keeps_what_it_has_measured(
    number: signal.Signals,
    fails_then: bool,
    run_suite: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def interrupted(_: Bench) -> None:
        signal.raise_signal(number)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            # As what is closed then may, which must not keep the run going.
            if fails_then:
                raise RuntimeError("the server did not stop") from None
            raise

    before = signal.getsignal(number)
    code = run_suite((("one",), adds("one")), (("two",), interrupted), (("three",), adds("three")))
    assert code == STOPPED
    assert names_in(tmp_path / "records.json") == ["one"]
    assert str(tmp_path / "records.json") in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["records.json"]
    assert signal.getsignal(number) is before


def test_a_later_run_of_a_part_leaves_the_first_file_alone(run_suite: Callable[..., int], tmp_path: Path) -> None:
    files = ((("one", "two"), adds("one", "two")),)
    assert run_suite(*files) == 0
    before = (tmp_path / "records.json").read_bytes()
    assert run_suite(*files, names=("two",)) == 0
    assert run_suite(*files, names=("one",)) == 0
    assert (tmp_path / "records.json").read_bytes() == before
    assert names_in(tmp_path / "records-2.json") == ["two"]
    assert names_in(tmp_path / "records-3.json") == ["one"]


def test_a_run_without_a_record_makes_no_file(run_suite: Callable[..., int], tmp_path: Path) -> None:
    assert run_suite((("one",), raises(RuntimeError("at once")))) == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Fills the disk when it is called; what was written before stays."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr("benchmarks.records.os.fsync", fsync)


def test_a_full_disk_leaves_the_records_before_it(
    run_suite: Callable[..., int], no_room: Callable[[], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fill_disk(_: Bench) -> None:
        no_room()

    assert run_suite((("one",), adds("one")), ((), fill_disk), (("two",), adds("two"))) == 1
    assert names_in(tmp_path / "records.json") == ["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["records.json"]
    said = capsys.readouterr()
    assert "No space left on device" in said.err
    # The table has them all.
    assert "two" in said.out


def test_two_runs_at_once_never_write_the_same_file(tmp_path: Path) -> None:
    one, other = ResultsFile(tmp_path / "r.json"), ResultsFile(tmp_path / "r.json")
    one.write([1])
    other.write([2])
    one.write([1, 1])
    assert (one.path.name, other.path.name) == ("r.json", "r-2.json")
    assert msgspec.json.decode(one.path.read_bytes()) == [1, 1]
    assert msgspec.json.decode(other.path.read_bytes()) == [2]


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    records = [record("near_cache", 1_000.0, values=(900.0, 1_000.0, 1_100.0))]
    assert read_records(write_records(tmp_path / "below" / "r.json", records)) == records


Along = Callable[[Bench, float, OnPoint], Awaitable[list[Curve]]]


def along(name: str, fails_after: int | None = None) -> full.Family:
    """Two curves of three points; a target of the last one is met by any cost."""

    async def measure(bench: Bench, _: float, on_point: OnPoint) -> list[Curve]:
        points: list[Point] = []
        for x in (1, 10, 100):
            if len(points) == fails_after:
                raise RuntimeError("the resolver is gone")
            points.append(Point(x=x, cost=1.0, values=[1.0]))
            on_point(name, points[-1])
        bench.add(figure("cold_many_1000_10m"), result(2.0), result(1.0))
        return [curve(name, name, x_name="rows", points=points)]

    return full.Family(measure, (1, 10, 100))


@pytest.fixture
def run_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(share: float = 1.0, **families: full.Family) -> int:
        monkeypatch.setattr(full, "CURVES", families)
        monkeypatch.setattr(full, "BYTES_A_ROW", 0)
        return full.main(["--share", str(share), "--data", str(tmp_path), "--json", str(tmp_path / "curves.json")])

    return run


def curves_in(path: Path) -> full.CurvesRun:
    # As render reads it, too.
    msgspec.json.decode(path.read_bytes(), type=CurvesFile)
    return msgspec.json.decode(path.read_bytes(), type=full.CurvesRun)


def test_a_curve_that_fails_leaves_its_points_and_the_other_curves(
    run_full: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_full(one=along("one"), two=along("two", fails_after=2), three=along("three"))
    assert code == 1
    found = curves_in(tmp_path / "curves.json")
    assert [curve.name for curve in found.curves] == ["one", "three"]
    assert {name: [point.x for point in points] for name, points in found.unfinished.items()} == {"two": [1, 10]}
    told = capsys.readouterr().err
    assert told.splitlines()[-1] == "failed: two: RuntimeError('the resolver is gone')"
    assert "two: point 2 of 3, cost 1 at 10; " in told
    assert " s so far" in told


def test_an_interrupted_curve_keeps_its_points(run_full: Callable[..., int], tmp_path: Path) -> None:
    async def stopped(_: Bench, __: float, on_point: OnPoint) -> list[Curve]:
        on_point("two", Point(x=1, cost=1.0, values=[1.0]))
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(60)
        raise AssertionError("not reached")

    assert run_full(one=along("one"), two=full.Family(stopped, (1, 10))) == STOPPED
    found = curves_in(tmp_path / "curves.json")
    assert [curve.name for curve in found.curves] == ["one"]
    assert list(found.unfinished) == ["two"]
    assert list(found.seconds) == ["one"]


def test_a_second_run_of_curves_leaves_the_first_file_alone(run_full: Callable[..., int], tmp_path: Path) -> None:
    assert run_full(one=along("one")) == 0
    before = (tmp_path / "curves.json").read_bytes()
    assert run_full(two=along("two")) == 0
    assert (tmp_path / "curves.json").read_bytes() == before
    assert [curve.name for curve in curves_in(tmp_path / "curves-2.json").curves] == ["two"]


@pytest.mark.parametrize(("share", "outcome"), [(1.0, "met"), (0.5, "not measured")])
def test_the_file_says_how_far_along_the_curves_a_run_went(
    run_full: Callable[..., int], tmp_path: Path, share: float, outcome: str
) -> None:
    assert run_full(share, rows=along("cold_resolve_rows")) == 0
    found = curves_in(tmp_path / "curves.json")
    assert (found.conditions.share, found.records[0].share) == (share, share)
    assert [verdict.outcome for verdict in found.records[0].verdicts] == [outcome]
    assert [verdict.outcome for verdict in found.curves[0].verdicts] == [outcome]
