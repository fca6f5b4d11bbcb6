"""What a curve is, and the power law fitted to it."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import psutil

from benchmarks.measure import Result, Side, measure
from benchmarks.records import Conditions, Record
from benchmarks.targets import Verdict, judge_exponent

if TYPE_CHECKING:
    from benchmarks.bench import Bench


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One point: the cost of an operation at ``x``, beside its raw limit where there is one.

    ``memory_mb``: resident memory of each process after the point was measured, by what it is.
    """

    x: float
    cost: float
    values: list[float]
    p50_ms: float | None = None
    p99_ms: float | None = None
    raw: float | None = None
    memory_mb: dict[str, float] = {}


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


async def cost_at(
    bench: Bench,
    x: float,
    ours: Callable[[int], Awaitable[Any]],
    raw: Callable[[int], Awaitable[Any]] | None,
    processes: Processes,
    *,
    rate: bool = False,
    count: int | None = None,
    least: int = 20,
) -> Point:
    """Measures one point, ours and raw in turn.  Of a ``rate`` the cost is its inverse: µs an operation."""
    sides = [Side("", ours), *([Side("raw", raw)] if raw else [])]
    results = await measure(
        sides, bench.budget, kind="rate" if rate else "latency", count=count, least=least, most=20_000
    )
    own = results[0]
    return Point(
        x=x,
        cost=_cost(own, rate),
        values=[1e6 / value for value in own.values] if rate else own.values,
        p50_ms=own.p50_ms,
        p99_ms=own.p99_ms,
        raw=_cost(results[1], rate) if raw else None,
        memory_mb=processes.memory_mb(),
    )


def _cost(result: Result, rate: bool) -> float:
    return 1e6 / result.value if rate else result.value
