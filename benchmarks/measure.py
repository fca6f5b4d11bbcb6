"""How a figure is measured: calibrate, then run ours and each raw limit in turn, several times; medians.

What it does not do: it does not keep other work off the machine.  Interleaving makes that fall on both sides alike;
the spread of the paired ratios tells how much of it there was.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Sequence
from statistics import median
from typing import Final, Literal, NamedTuple, TypeVar

import msgspec

T = TypeVar("T")

RUN_TIMEOUT_S: Final = 120.0
"""Ends a run that hangs; the slowest expected one takes some seconds."""

_FIRST_COUNT: Final = 20


class Run(msgspec.Struct, frozen=True):
    """One run: how many operations, how long together, and each one's latency where it was taken."""

    count: int
    seconds: float
    latencies_s: list[float] = []


Runner = Callable[[int], Awaitable[Run]]
"""``await runner(count)`` prepares untimed, then does and times about ``count`` operations."""


class Side(NamedTuple):
    """One of the parties of a figure.  ``label`` tells further raw limits of one figure apart; the first has none."""

    what: str
    run: Runner
    label: str = ""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the runs of one side; ``values`` are those of the single runs."""

    what: str
    value: float
    values: list[float]
    count: int
    p50_ms: float | None = None
    p99_ms: float | None = None
    label: str = ""


class Budget(msgspec.Struct, frozen=True):
    """How long a figure may take, all sides and runs together, and how many runs it is the median of."""

    seconds_per_figure: float
    runs: int
    quick: bool = False


Kind = Literal["latency", "rate"]
"""``latency``: the median of milliseconds an operation; ``rate``: operations a second."""


async def measure(
    sides: Sequence[Side],
    budget: Budget,
    *,
    kind: Kind,
    count: int | None,
    least: int,
    most: int,
    sharing: int | None = None,
) -> list[Result]:
    """Runs the sides in turn (A B A B …) and returns the result of each.

    ``count`` fixes the operations of a run; without it each side gets as many as fit its share of the budget, between
    ``least`` and ``most``.  ``sharing``: by how many the budget is divided (default: the sides); any further side has
    a share as large.
    """
    share_s = budget.seconds_per_figure / (budget.runs * (sharing or len(sides)))
    counts = [await _calibrate(side, share_s, least, most) if count is None else count for side in sides]
    runs: list[list[Run]] = [[] for _ in sides]
    for _ in range(budget.runs):
        for side, side_count, side_runs in zip(sides, counts, runs, strict=True):
            side_runs.append(await _run(side, side_count))
    return [_result(side, side_runs, kind) for side, side_runs in zip(sides, runs, strict=True)]


async def _calibrate(side: Side, share_s: float, least: int, most: int) -> int:
    count = min(_FIRST_COUNT, most)
    while True:
        run = await _run(side, count)
        fitting = int(run.count * share_s / max(run.seconds, 1e-9))
        # The first estimate is of a cold start; the next one, of a longer run, is good enough.
        if fitting <= 4 * count or count >= most:
            return max(least, min(most, fitting))
        count = min(most, max(4 * count, fitting // 4))


async def _run(side: Side, count: int) -> Run:
    async with asyncio.timeout(RUN_TIMEOUT_S):
        return await side.run(count)


def _result(side: Side, runs: Sequence[Run], kind: Kind) -> Result:
    p50s = [percentile(run.latencies_s, 0.5) * 1000 for run in runs if run.latencies_s]
    p99s = [percentile(run.latencies_s, 0.99) * 1000 for run in runs if run.latencies_s]
    values = p50s if kind == "latency" else [run.count / run.seconds for run in runs]
    return Result(
        what=side.what,
        label=side.label,
        value=median(values),
        values=values,
        count=runs[-1].count,
        p50_ms=median(p50s) if p50s else None,
        p99_ms=median(p99s) if p99s else None,
    )


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the value that ``share`` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(len(ordered) * share * 1000) // 1000) - 1)] if len(ordered) > 1 else ordered[0]


def load(
    make: Callable[[int], Sequence[T]],
    call: Callable[[T], Awaitable[object]],
    concurrency: int = 1,
    *,
    weight: int = 1,
) -> Runner:
    """Returns the runner that calls with each item of ``make(number)``; one call is ``weight`` operations."""

    async def run(count: int) -> Run:
        calls = max(concurrency, -(-count // weight))
        return await concurrent(make(calls), call, concurrency, weight=weight)

    return run


async def concurrent(
    items: Sequence[T], call: Callable[[T], Awaitable[object]], concurrency: int, *, weight: int = 1
) -> Run:
    """Calls from ``concurrency`` tasks, each taking the next item when its last call has returned; times each call."""
    latencies: list[float] = []
    source = iter(items)
    clock = time.perf_counter

    async def work() -> None:
        for item in source:
            began = clock()
            await call(item)
            latencies.append(clock() - began)

    # What was prepared is out of the collector's sight, so that its number weighs on neither side.
    gc.collect()
    gc.freeze()
    try:
        began = clock()
        if concurrency == 1:
            await work()
        else:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
        seconds = clock() - began
    finally:
        gc.unfreeze()
    return Run(len(latencies) * weight, seconds, latencies)


async def timed(count: int, call: Callable[[], Awaitable[object]]) -> Run:
    """Times one call that does ``count`` operations."""
    gc.collect()
    gc.freeze()
    try:
        began = time.perf_counter()
        await call()
        return Run(count, time.perf_counter() - began)
    finally:
        gc.unfreeze()
