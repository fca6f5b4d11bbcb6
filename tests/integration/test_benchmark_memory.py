"""Figures of memory are as many measurements as they say, each of a process of its own.  No figure is judged here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import pytest
from benchmarks import bench_memory, bench_traces
from benchmarks.bench import Bench, BenchServer
from benchmarks.children import Child, child
from benchmarks.measure import Budget
from benchmarks.records import conditions

if TYPE_CHECKING:
    from holdfast.streams.connection_target import Durability

RUNS = 2


class CountingBench(Bench):
    """Counts the servers that are started."""

    servers = 0

    @asynccontextmanager
    async def server(self, durability: Durability = "durable") -> AsyncGenerator[BenchServer]:
        self.servers += 1
        async with super().server(durability) as server:
            yield server


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "figure", "servers", "processes"),
    [
        # Ours and the bare stream, a server each.
        (bench_memory.run, "server_bytes_per_context", 2 * RUNS, 0),
        (bench_memory.run, "archive_memory", 1, RUNS),
        (bench_memory.run, "idle_client", 1, 2 * RUNS),
        # Each is a system of its own, server included.
        (bench_traces.run, "import_peak_memory", 0, RUNS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_figure_of_memory_is_the_median_of_so_many_measurements(
    measure: Callable[[Bench], Awaitable[None]],
    figure: str,
    servers: int,
    processes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []

    def counted(module: str, *arguments: str) -> AbstractAsyncContextManager[Child]:
        started.append(module)
        return child(module, *arguments)

    for module in (bench_memory, bench_traces):
        monkeypatch.setattr(module, "child", counted)
    bench = CountingBench(Budget(0.05, RUNS, quick=True), conditions(tmp_path), tmp_path, [figure])
    await measure(bench)
    [record] = bench.records
    assert record.name == figure
    assert (bench.servers, len(started)) == (servers, processes)
    assert (len(record.values), len(record.raw_limit.values)) == (RUNS, RUNS)
    assert record.value == median(record.values)
    assert record.raw_limit.value == median(record.raw_limit.values)
    assert min(*record.values, *record.raw_limit.values) > 0
