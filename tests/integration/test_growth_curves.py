"""The growth curves run from end to end, on real servers and lakes, and say what they promise.  Nothing is judged."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from benchmarks.bench import Bench
from benchmarks.curves import cold, hot
from benchmarks.curves.curve import CALLS_FOR_P99, Curve, OnPoint, Point
from benchmarks.measure import Budget
from benchmarks.records import conditions
from benchmarks.targets import TARGETS

from holdfast.client import Holdfast

if TYPE_CHECKING:
    from holdfast.schemas.refs import Ref

RUNS = 2
SHARE = 0.0001
QUESTIONS = ("sql_key_history", "sql_session", "sql_tree", "sql_agent_hour")

Family = Callable[[Bench, float, OnPoint], Awaitable[list[Curve]]]
FAMILIES: tuple[tuple[Family, tuple[str, ...], tuple[str, ...]], ...] = (
    (hot.body_size, ("put_body", "resolve_body"), ()),
    (hot.concurrency, ("put_concurrency", "resolve_concurrency"), ()),
    (hot.versions, ("key_put_versions", "key_get_versions"), ()),
    (hot.subjects, ("put_subjects", "resolve_subjects", "memory_subjects"), ()),
    (cold.files, ("cold_resolve_files",), ()),
    (cold.rows, ("cold_resolve_rows",), ("cold_resolve_10m", "cold_many_1000_10m")),
    (
        cold.sql,
        QUESTIONS,
        (*(f"{name}_10m_1000_files" for name in QUESTIONS), *(f"{name}_10m" for name in QUESTIONS)),
    ),
)
"""What measures curves, the names of these curves, and those of the figures of their last points."""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(Budget(0.02, RUNS, quick=True), conditions(tmp_path), tmp_path, [])


def test_every_target_of_a_curve_or_of_its_last_point_is_measured() -> None:
    curves = {name for _, names, _ in FAMILIES for name in names}
    figures = {name for _, _, names in FAMILIES for name in names}
    assert {target.figure for target in TARGETS if target.of == "exponent"} <= curves
    assert {target.figure for target in TARGETS if target.figure.endswith("_10m")} <= figures


@pytest.mark.parametrize(("measure", "names", "figures"), FAMILIES, ids=lambda value: getattr(value, "__name__", ""))
async def test_curves_have_their_points_a_fit_and_the_figures_of_the_last_point(
    measure: Family,
    names: tuple[str, ...],
    figures: tuple[str, ...],
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = _note_what_is_resolved(monkeypatch)
    told: list[tuple[str, Point]] = []
    curves = await measure(bench, SHARE, lambda name, point: told.append((name, point)))
    assert {curve.name for curve in curves} == set(names)
    for curve in curves:
        assert [point for name, point in told if name == curve.name] == curve.points
        _check(curve)
    assert [record.name for record in bench.records] == list(figures)
    for record in bench.records:
        assert min(record.value, record.raw_limit.value) > 0
        assert record.parameters["rows"] == curves[0].points[-1].x
        assert (record.p99_ms is not None) == (record.parameters["calls"] >= CALLS_FOR_P99)
        is_compacted, files = record.parameters["compacted"], record.parameters["files"]
        if record.name.endswith("_1000_files"):
            assert (is_compacted, files) == (False, 10)
        elif record.name.startswith("sql"):
            assert is_compacted
            assert files < 10
        else:
            assert (is_compacted, files) == (False, 2)
    if measure is cold.rows:
        assert len(asked) > 100
        assert len(set(asked)) == len(asked)
    # Lakes are as large as the disk of a run may be: none is kept until its end.
    assert not list(tmp_path.rglob("*.parquet"))


def _check(curve: Curve) -> None:
    """What the reader of a curve relies on."""
    xs = [point.x for point in curve.points]
    assert len(xs) >= 2
    assert xs == sorted(set(xs))
    assert isfinite(curve.fit.exponent)
    assert curve.fit.r2 <= 1
    assert (curve.raw_fit is not None) == bool(curve.raw_what)
    for point in curve.points:
        assert point.cost > 0
        assert all(size > 0 for size in point.memory_mb.values())
        assert point.memory_mb
        assert (point.p99_ms is not None) == (point.calls >= CALLS_FOR_P99)
        if curve.name == "memory_subjects":
            continue
        assert len(point.values) == RUNS
        assert min(point.values) <= point.cost <= max(point.values)
        assert point.calls >= RUNS
        if curve.raw_what:
            assert point.raw is not None
            assert len(point.raw_values) == RUNS
            assert min(point.raw_values) <= point.raw <= max(point.raw_values)
            assert point.raw_calls >= RUNS
        assert (point.files is not None) == curve.name.startswith(("cold", "sql"))
    if curve.name == "cold_resolve_files":
        assert [point.files for point in curve.points] == xs


def _note_what_is_resolved(monkeypatch: pytest.MonkeyPatch) -> list[Ref]:
    asked: list[Ref] = []
    resolve, resolve_many = Holdfast.resolve, Holdfast.resolve_many

    async def noting(hf: Holdfast, ref: Ref, **options: Any) -> Any:
        asked.append(ref)
        return await resolve(hf, ref, **options)

    async def noting_many(hf: Holdfast, refs: Sequence[Ref], **options: Any) -> Any:
        asked.extend(refs)
        return await resolve_many(hf, refs, **options)

    monkeypatch.setattr(Holdfast, "resolve", noting)
    monkeypatch.setattr(Holdfast, "resolve_many", noting_many)
    return asked
