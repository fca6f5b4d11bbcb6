"""What the benchmarks say of their figures: verdicts, exponents, tables.  Nothing is measured here."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from benchmarks.curves.curve import CurvesFile, Point, curve, fit_power_law
from benchmarks.guard import LEAST, USUAL, collapses
from benchmarks.peers.figures import open_peers
from benchmarks.records import RESULTS, Conditions, write_records
from benchmarks.render import fill, main, read_sources
from benchmarks.table import spread
from benchmarks.targets import TARGETS, judge, overall

from tests.benchmark_support import peer, record


def test_a_figure_is_met_when_all_its_targets_are_and_open_without_its_peer() -> None:
    peers = (peer("postgres_redis", 3_000, 20_000), peer("redis_always", 15_000, 20_000))
    assert overall(judge(record("put_64_producers", 20_000, raw=22_000, peers=peers))) == "met"
    assert overall(judge(record("put_64_producers", 20_000, raw=22_000, peers=peers[:1]))) == "open"
    assert overall(judge(record("put_64_producers", 20_000, raw=40_000, peers=peers))) == "not met"
    assert overall(judge(record("put_sequential", 0.5, raw=0.4, better="lower"))) == "met"
    assert overall(judge(record("put_sequential", 0.6, raw=0.4, better="lower"))) == "not met"
    assert overall(judge(record("of_no_target", 1))) == ""


def test_a_target_that_only_some_of_the_runs_meet_is_within_the_spread() -> None:
    def told(*values: float) -> list[str]:
        return [str(verdict) for verdict in judge(record("near_cache", sorted(values)[1], values=values))]

    assert told(1_390_000, 1_050_000, 880_000) == ["met, within the spread"]
    assert told(1_390_000, 950_000, 880_000) == ["not met, within the spread"]
    assert told(1_390_000, 1_050_000, 1_010_000) == ["met"]
    assert told(990_000, 950_000, 880_000) == ["not met"]
    # Of a ratio the runs that were neighbours count, and of a peer's too.
    puts = record("put_sequential", 0.5, raw=0.4, better="lower", ratios=(1.1, 1.3))
    assert [str(verdict) for verdict in judge(puts)] == ["met, within the spread"]
    redis = peer("redis_always", 10.0, 14.2, values=(10.0, 10.0, 10.0))
    reads = record("resolve_hot_64", 14.2, values=(14.2, 13.0, 15.0), peers=(redis,))
    assert [str(verdict) for verdict in judge(reads)] == ["not met", "met, within the spread"]


def test_a_part_of_the_way_says_nothing_about_targets() -> None:
    part = msgspec.structs.replace(record("cold_resolve_10m", 1.0, better="lower"), share=0.1)
    assert [str(verdict) for verdict in judge(part)] == ["not measured", "not measured"]
    assert overall(judge(part)) == "not measured"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((1_390_000.0, 1_050_000.0, 884_000.0), "0.88–1.39 M"),
        ((14_929.0, 14_288.0, 14_759.0), "14.3–14.9 k"),
        ((4_611.0, 4_477.0, 4_937.0), "4,477–4,937"),
        ((0.333, 0.331, 0.338), "0.331–0.338"),
        ((0.00043, 0.00041, 0.0005), "0.000410–0.000500"),
        ((193.4, 193.5, 193.45), "193–194"),
        ((38.51, 38.52, 38.53), "38.5"),
        ((38.51, 39.6), "38.5–39.6 (2 runs)"),
        ((597.4,), "one run"),
        # As records had a single measurement once.
        ((597.4, 597.4, 597.4), "one run"),
    ],
)
def test_the_spread_of_the_runs_is_one_cell(values: tuple[float, ...], told: str) -> None:
    assert spread(values) == told


def test_targets_are_named_once_and_cover_every_point() -> None:
    assert len(set(TARGETS)) == len(TARGETS)
    assert {target.point for target in TARGETS} == set(range(1, 11))


def test_an_exponent_is_fitted() -> None:
    fit = fit_power_law([1, 10, 100, 1_000], [3.0, 30.0, 300.0, 3_000.0])
    assert (fit.exponent, fit.factor, fit.r2) == pytest.approx((1.0, 3.0, 1.0))
    flat = fit_power_law([1, 10, 100], [2.0, 2.1, 1.9])
    assert abs(flat.exponent) < 0.05


def test_the_guard_has_a_fifth_of_the_usual_ratio_as_its_bound() -> None:
    assert {name: usual / 5 for name, usual in USUAL.items()} == pytest.approx(LEAST)
    # The ratios of docs/performance.md.
    assert (LEAST["put_64_producers"], LEAST["resolve_hot_64"]) == (0.16, 0.19)
    assert (LEAST["resolver_batch_100_16"], LEAST["archive"]) == (0.12, 0.035)


def test_the_guard_notices_a_collapse_and_nothing_less() -> None:
    usual = [record(name, 5 * least) for name, least in LEAST.items()]
    assert collapses(usual) == []
    # Half as fast is noise to it; six times slower is not.
    assert collapses([record(name, 5 * least / 2) for name, least in LEAST.items()]) == []
    slower = [record(name, 5 * least / 6) for name, least in LEAST.items()]
    assert [collapse.name for collapse in collapses(slower)] == list(LEAST)


async def test_a_peer_that_is_not_installed_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said: list[str] = []
    async with open_peers(tmp_path, ["redis_always", "sqlite_dict"], said.append) as peers:
        assert peers.names == ["sqlite_dict"]
        [side] = await peers.sides("put_64_producers")
        assert (await side.run(64)).count == 64
    [line] = said
    assert "apt-get install -y redis-server" in line


def test_tables_and_plots_are_written_between_the_marks_alone(tmp_path: Path) -> None:
    points = [
        Point(x=x, cost=2.0 * x**0.05, values=[2.0], raw=1.0, memory_mb={"server": 20.0}) for x in (1e4, 1e5, 1e6)
    ]
    curves = CurvesFile(
        conditions=Conditions(versions={}, machine={}, git_commit="abc", started_at=""),
        curves=[curve("cold_resolve_rows", "a cold resolve", x_name="contexts", points=points)],
        records=[],
    )
    (tmp_path / "curves.json").write_bytes(msgspec.json.encode(curves))
    put = record("put_64_producers", 20_000, raw=22_000, peers=(peer("redis_always", 15_000, 20_000),))
    write_records(tmp_path / "records.json", [put, record("resolve_hot_64", 30_000, raw=50_000)])
    page = tmp_path / "performance.md"
    page.write_text(
        "By hand.\n<!-- figures put_* -->\nstale\n<!-- end -->\nBetween.\n<!-- peers -->\n<!-- end -->\n"
        "<!-- targets -->\n<!-- end -->\n<!-- curves -->\n<!-- end -->\nThe end.\n"
    )
    files = [str(tmp_path / "records.json"), str(tmp_path / "curves.json")]
    assert main([*files, "--page", str(page)]) == 0
    written = page.read_text()
    parts = [
        "By hand.",
        "`put_64_producers` | 20,000 ops/s",
        "Between.",
        "15,000 (1.33)",
        "| 1 | `put_sequential`",
        "+0.050",
        "The end.",
    ]
    places = [written.index(part) for part in parts]
    assert all(first < second for first, second in pairwise(places))
    assert "stale" not in written
    assert "resolve_hot_64` | 30,000" not in written.partition("Between.")[0]
    assert "![a cold context, by the contexts in the lake](performance-cold-rows.svg)" in written
    assert (tmp_path / "performance-cold-rows.svg").read_text().count("<polyline") == 2
    # Once more changes nothing.
    assert fill(written, read_sources([Path(file) for file in files])) == written


def rendered(tmp_path: Path, page: str, *files: Path) -> str:
    path = tmp_path / "page.md"
    path.write_text(page)
    assert main([*map(str, files), "--page", str(path)]) == 0
    return path.read_text()


def test_a_run_along_a_part_of_the_curves_is_rendered_as_not_measured(tmp_path: Path) -> None:
    conditions = Conditions(versions={"python": "3.11.7"}, machine={"cores": 2}, git_commit="abc", started_at="")
    points = [Point(x=x, cost=2.0, values=[2.0, 2.0, 2.1]) for x in (1e4, 1e5)]
    whole = CurvesFile(
        conditions=conditions,
        curves=[curve("cold_resolve_rows", "a cold resolve", x_name="contexts", points=points)],
        records=[record("cold_resolve_10m", 2.0, better="lower")],
    )
    part = msgspec.structs.replace(
        whole,
        conditions=msgspec.structs.replace(conditions, share=0.1),
        records=[msgspec.structs.replace(whole.records[0], share=0.1)],
    )
    page = "<!-- targets -->\n<!-- end -->\n<!-- figures cold_* -->\n<!-- end -->\n"
    outcomes: dict[str, list[str]] = {}
    for name, file in (("whole", whole), ("part", part)):
        path = tmp_path / f"{name}.json"
        path.write_bytes(msgspec.json.encode(file))
        lines = rendered(tmp_path, page, path).splitlines()
        outcomes[name] = [line for line in lines if "cold_resolve_10m" in line or "cold_resolve_rows" in line]
    assert [line.count("| met |") for line in outcomes["whole"]] == [1, 0, 1, 0]
    assert "≤ 3 ms: met" in outcomes["whole"][-1]
    assert [line.count("|  | not measured |") for line in outcomes["part"]] == [1, 1, 1, 0]
    assert "≤ 3 ms: not measured; p99 ≤ 10 ms: not measured" in outcomes["part"][-1]


def test_tables_show_the_spread_and_how_many_runs_there_were(tmp_path: Path) -> None:
    near = record("near_cache", 1_050_000, values=(1_390_000, 1_050_000, 880_000))
    path = write_records(tmp_path / "records.json", [near, record("idle_client", 38.5, better="lower")])
    page = "<!-- targets -->\n<!-- end -->\n<!-- figures near_cache idle_* -->\n<!-- end -->\n"
    written = rendered(tmp_path, page, path)
    assert "| 2 | `near_cache` | ≥ 1,000,000 /s | 1,050,000 | met, within the spread |" in written
    assert "| `near_cache` | 1,050,000 ops/s | 0.88–1.39 M |" in written
    assert "≥ 1,000,000 /s: met, within the spread |" in written
    assert "| `idle_client` | 38.5 ops/s | one run |" in written


@pytest.mark.parametrize("path", sorted(RESULTS.glob("2*.json")), ids=lambda path: path.stem)
def test_records_of_earlier_versions_are_rendered(path: Path, tmp_path: Path) -> None:
    found = read_sources([path])
    assert found.records
    assert all(found.records[name].share == 1.0 for name in found.records)
    page = "<!-- conditions -->\n<!-- end -->\n<!-- targets -->\n<!-- end -->\n<!-- figures * -->\n<!-- end -->\n"
    written = rendered(tmp_path, f"{page}<!-- peers -->\n<!-- end -->\n", path)
    assert all(f"| `{name}` |" in written for name in found.records)


def test_conditions_are_known_of_curves_alone(tmp_path: Path) -> None:
    conditions = Conditions(versions={"python": "3.11.7"}, machine={"cores": 2}, git_commit="abc", started_at="")
    path = tmp_path / "curves.json"
    path.write_bytes(msgspec.json.encode(CurvesFile(conditions=conditions, curves=[], records=[])))
    written = rendered(tmp_path, "<!-- conditions -->\n<!-- end -->\n", path)
    assert "Commit `abc`; 2 cores" in written
    assert "Python 3.11.7" in written
