"""What a curve is, and the power law fitted to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import psutil

from benchmarks.measure import Kind, Result, Run, Runner, Side, measure, percentile
from benchmarks.records import Conditions, Record
from benchmarks.targets import Verdict, judge_exponent

if TYPE_CHECKING:
    from benchmarks.bench import Bench


CALLS_FOR_P99: Final = 100
"""Of fewer calls the 99th percentile is the slowest one, which says nothing."""

PAGES: Final = "as written just before"
"""Of a lake: in the system's cache as far as memory reaches, none of them evicted on purpose."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One point: the cost of an operation at ``x``, beside its raw limit where there is one.

    ``values`` and ``raw_values`` are the costs of the single runs, of which ``cost`` and ``raw`` are the medians.
    ``calls`` and ``raw_calls``: how many calls were timed, all runs together; 0 where nothing is called.  ``p99_ms`` is
    that of all these calls; None of fewer than ``CALLS_FOR_P99``.  ``memory_mb``: resident memory of each process after
    the point was measured, by what it is.  ``files``: how many the lake had that was asked.
    """

    x: float
    cost: float
    values: list[float]
    p50_ms: float | None = None
    p99_ms: float | None = None
    raw: float | None = None
    memory_mb: dict[str, float] = {}
    raw_values: list[float] = []
    calls: int = 0
    raw_calls: int = 0
    files: int | None = None


OnPoint = Callable[[str, Point], None]
"""``on_point(curve, point)`` is called as soon as a point of the curve of that name has been measured."""


def ignore_point(curve: str, point: Point) -> None:
    """Does nothing."""


class Points:
    """The points of one curve while they are measured; each is told when it is there."""

    def __init__(self, name: str, on_point: OnPoint = ignore_point) -> None:
        self.name = name
        self.measured: list[Point] = []
        self._on_point = on_point

    def add(self, point: Point) -> None:
        """Adds the next point."""
        self.measured.append(point)
        self._on_point(self.name, point)


class Fit(msgspec.Struct, frozen=True):
    """cost = factor · x^exponent, and how much of the variance of the logarithms that explains (``r2``)."""

    exponent: float
    factor: float
    r2: float


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One curve.  ``cost_unit`` is the unit of an operation's cost, ``x_name`` what grows."""

    name: str
    what: str
    x_name: str
    cost_unit: str
    durability: str
    parameters: dict[str, Any]
    points: list[Point]
    fit: Fit
    raw_what: str = ""
    raw_fit: Fit | None = None
    verdicts: list[Verdict] = []


class CurvesFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a run leaves behind: the curves, and the figures that need as many rows."""

    conditions: Conditions
    curves: list[Curve]
    records: list[Record]
    seconds: dict[str, float] = {}
    """How long each curve took, preparation included."""


class Processes(NamedTuple):
    """Processes whose memory stands beside the points, by what they are."""

    pids: dict[str, int]

    def memory_mb(self) -> dict[str, float]:
        """Returns the resident memory of each."""
        return {name: round(psutil.Process(pid).memory_info().rss / 1e6, 1) for name, pid in self.pids.items()}


def fit_power_law(xs: Sequence[float], costs: Sequence[float]) -> Fit:
    """Fits cost = factor · x^exponent by least squares of the logarithms; needs two different xs at least."""
    logs = [(math.log(x), math.log(cost)) for x, cost in zip(xs, costs, strict=True)]
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    spread_x = sum((x - mean_x) ** 2 for x, _ in logs)
    exponent = sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread_x
    total = sum((y - mean_y) ** 2 for _, y in logs)
    left = sum((y - mean_y - exponent * (x - mean_x)) ** 2 for x, y in logs)
    # A curve without any variance is explained by every law.
    return Fit(exponent, math.exp(mean_y - exponent * mean_x), 1.0 if total < 1e-12 else 1 - left / total)


def curve(
    name: str,
    what: str,
    *,
    x_name: str,
    points: list[Point],
    cost_unit: str = "ms",
    durability: str = "durable",
    raw_what: str = "",
    **parameters: Any,
) -> Curve:
    """Makes a curve of its points, fits it and judges its exponent."""
    xs = [point.x for point in points]
    fit = fit_power_law(xs, [point.cost for point in points])
    raws = [point.raw for point in points if point.raw is not None]
    return Curve(
        name=name,
        what=what,
        x_name=x_name,
        cost_unit=cost_unit,
        durability=durability,
        parameters=parameters,
        points=points,
        fit=fit,
        raw_what=raw_what,
        raw_fit=fit_power_law(xs, raws) if len(raws) == len(points) else None,
        verdicts=judge_exponent(name, fit.exponent),
    )


def up_to(xs: Sequence[int], largest: float) -> list[int]:
    """Returns the points up to ``largest``, as a share of the last one; two at least, or there is no curve."""
    return [x for place, x in enumerate(xs) if place < 2 or x <= xs[-1] * largest]


class Measured(NamedTuple):
    """What one side came to, and how many of its calls were timed, all runs together."""

    result: Result
    calls: int


async def measure_sides(
    bench: Bench, sides: Sequence[Side], *, kind: Kind, count: int | None, least: int = 1
) -> list[Measured]:
    """Measures the sides in turn, as :func:`benchmarks.measure.measure` does; ``p99_ms`` is of the calls of all runs.

    It is None of fewer than ``CALLS_FOR_P99`` calls.
    """
    kept: list[list[Run]] = [[] for _ in sides]
    keeping = [side._replace(run=_keeping(side.run, runs)) for side, runs in zip(sides, kept, strict=True)]
    results = await measure(keeping, bench.budget, kind=kind, count=count, least=least, most=20_000)
    # The runs before these have found out how many calls fit.
    return [_pooled(result, runs[-bench.budget.runs :]) for result, runs in zip(results, kept, strict=True)]


async def cost_at(
    bench: Bench,
    x: float,
    ours: Runner,
    raw: Runner | None,
    processes: Processes,
    *,
    rate: bool = False,
    count: int | None = None,
    least: int = 20,
    files: int | None = None,
) -> Point:
    """Measures one point, ours and raw in turn.  Of a ``rate`` the cost is its inverse: µs an operation."""
    sides = [Side("", ours), *([Side("raw", raw)] if raw else [])]
    measured = await measure_sides(bench, sides, kind="rate" if rate else "latency", count=count, least=least)
    return point_of(x, measured, processes, rate=rate, files=files)


def point_of(
    x: float, measured: Sequence[Measured], processes: Processes, *, rate: bool = False, files: int | None = None
) -> Point:
    """Makes a point of what ours, and the raw limit if there is one, came to."""
    own, *others = measured
    raw = others[0] if others else None
    return Point(
        x=x,
        cost=_cost(own.result.value, rate),
        values=[_cost(value, rate) for value in own.result.values],
        p50_ms=own.result.p50_ms,
        p99_ms=own.result.p99_ms,
        raw=_cost(raw.result.value, rate) if raw else None,
        memory_mb=processes.memory_mb(),
        raw_values=[_cost(value, rate) for value in raw.result.values] if raw else [],
        calls=own.calls,
        raw_calls=raw.calls if raw else 0,
        files=files,
    )


def _keeping(run: Runner, runs: list[Run]) -> Runner:
    async def run_and_keep(count: int) -> Run:
        runs.append(await run(count))
        return runs[-1]

    return run_and_keep


def _pooled(result: Result, runs: Sequence[Run]) -> Measured:
    latencies_s = [latency_s for run in runs for latency_s in run.latencies_s]
    p99_ms = percentile(latencies_s, 0.99) * 1000 if len(latencies_s) >= CALLS_FOR_P99 else None
    return Measured(msgspec.structs.replace(result, p99_ms=p99_ms), len(latencies_s))


def _cost(value: float, rate: bool) -> float:
    return 1e6 / value if rate else value
