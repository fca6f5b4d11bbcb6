"""What the benchmarks say of their figures: verdicts, exponents, tables.  Nothing is measured here."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from benchmarks.curves.curve import CurvesFile, Point, curve, fit_power_law
from benchmarks.guard import LEAST, collapses
from benchmarks.peers.figures import open_peers
from benchmarks.records import Conditions, PeerResult, RawLimit, Record, write_records
from benchmarks.render import fill, main, read_sources
from benchmarks.targets import TARGETS, judge, overall


def record(
    name: str, value: float, *, raw: float = 1.0, better: str = "higher", peers: tuple[PeerResult, ...] = ()
) -> Record:
    whole = Record(
        name=name,
        what="",
        value=value,
        unit="ops/s",
        better="higher" if better == "higher" else "lower",
        values=[value],
        p50_ms=None,
        p99_ms=None,
        raw_limit=RawLimit(what="the bare parts", value=raw, values=[raw]),
        ratio=value / raw,
        ratio_low=value / raw,
        ratio_high=value / raw,
        parameters={},
        durability="durable",
        replicas=1,
        versions={},
        machine={},
        git_commit="abc",
        started_at="",
        peers=list(peers),
    )
    return msgspec.structs.replace(whole, verdicts=judge(whole))


def peer(name: str, value: float, ours: float) -> PeerResult:
    return PeerResult(name=name, what=name, value=value, values=[value], ratio=ours / value)


def test_a_figure_is_met_when_all_its_targets_are_and_open_without_its_peer() -> None:
    peers = (peer("postgres_redis", 3_000, 20_000), peer("redis_always", 15_000, 20_000))
    assert overall(judge(record("put_64_producers", 20_000, raw=22_000, peers=peers))) == "met"
    assert overall(judge(record("put_64_producers", 20_000, raw=22_000, peers=peers[:1]))) == "open"
    assert overall(judge(record("put_64_producers", 20_000, raw=40_000, peers=peers))) == "not met"
    assert overall(judge(record("put_sequential", 0.5, raw=0.4, better="lower"))) == "met"
    assert overall(judge(record("put_sequential", 0.6, raw=0.4, better="lower"))) == "not met"
    assert overall(judge(record("of_no_target", 1))) == ""


def test_targets_are_named_once_and_cover_every_point() -> None:
    assert len(set(TARGETS)) == len(TARGETS)
    assert {target.point for target in TARGETS} == set(range(1, 11))


def test_an_exponent_is_fitted() -> None:
    fit = fit_power_law([1, 10, 100, 1_000], [3.0, 30.0, 300.0, 3_000.0])
    assert (fit.exponent, fit.factor, fit.r2) == pytest.approx((1.0, 3.0, 1.0))
    flat = fit_power_law([1, 10, 100], [2.0, 2.1, 1.9])
    assert abs(flat.exponent) < 0.05


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
