"""What a point of a growth curve says of its calls, and which contexts a lake is asked for."""

from __future__ import annotations

import os
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
from benchmarks.bench import Bench
from benchmarks.curves.cold import Unread
from benchmarks.curves.curve import Point, Points, Processes, cost_at, up_to
from benchmarks.measure import Budget, Run
from benchmarks.records import Conditions
from benchmarks.synthetic_lake import (
    SESSION_STEPS,
    VERSIONS_A_KEY,
    event_rows,
    key_name,
    keys_in,
    session_name,
    sessions_in,
    version_rows,
)

from holdfast.lake.columns import to_rows
from holdfast.schemas.refs import Ref
from holdfast.schemas.rows import KeyVersionRow
from holdfast.streams.decode import decode_key_version, encode_key_version
from holdfast.streams.messages import StoredMessage
from holdfast.streams.wire import key_subject

GROUP = 10


def bench(runs: int) -> Bench:
    return Bench(Budget(1.0, runs), Conditions(versions={}, machine={}, git_commit="", started_at=""), Path(), [])


@pytest.mark.parametrize(("calls", "p99_ms"), [(33, None), (34, 3.0)])
async def test_a_percentile_is_of_the_calls_of_all_runs_and_of_a_hundred_at_least(
    calls: int, p99_ms: float | None
) -> None:
    runs = count(1)

    async def ours(number: int) -> Run:
        latency_s = next(runs) / 1000
        return Run(number, number * latency_s, [latency_s] * number)

    async def raw(number: int) -> Run:
        return Run(number, 1.0, [0.0005] * number)

    point = await cost_at(bench(3), 7, ours, raw, Processes({"client": os.getpid()}), count=calls, files=4)
    assert (point.x, point.cost, point.values) == (7, 2.0, [1.0, 2.0, 3.0])
    assert (point.raw, point.raw_values) == (0.5, [0.5, 0.5, 0.5])
    assert (point.calls, point.raw_calls, point.p99_ms, point.files) == (3 * calls, 3 * calls, p99_ms, 4)


async def test_calls_that_only_find_out_how_many_fit_are_not_counted() -> None:
    counted: list[int] = []

    async def ours(number: int) -> Run:
        counted.append(number)
        return Run(number, number / 1000, [0.001] * number)

    point = await cost_at(bench(2), 1, ours, None, Processes({}))
    assert len(counted) > 2
    assert point.calls == sum(counted[-2:])
    assert point.raw_values == []


async def test_of_a_rate_the_cost_of_every_run_is_told() -> None:
    async def ours(number: int) -> Run:
        return Run(number, next(seconds), [0.001] * number)

    seconds = iter([1.0, 4.0, 2.0])
    point = await cost_at(bench(3), 1, ours, None, Processes({}), rate=True, count=1_000)
    assert (point.cost, point.values) == (2_000, [1_000, 4_000, 2_000])


def test_every_point_is_told_as_soon_as_it_is_there() -> None:
    told: list[tuple[str, Point]] = []
    points = Points("put_body", lambda name, point: told.append((name, point)))
    point = Point(x=1, cost=2.0, values=[2.0])
    points.add(point)
    assert told == [("put_body", point)]
    assert points.measured == [point]


def test_a_part_of_the_way_has_two_points_at_least() -> None:
    assert up_to((1, 10, 100), 1.0) == [1, 10, 100]
    assert up_to((1, 10, 100), 0.99) == [1, 10]
    assert up_to((1, 10, 100), 0.0001) == [1, 10]


def test_no_context_of_a_growing_lake_is_asked_for_twice() -> None:
    unread = Unread(name_of, 1, GROUP)
    singles: list[Ref] = []
    for unread.rows in (100, 1_000):
        calls = unread.calls(500, runs=3)
        assert 0 < calls <= unread.rows // 16
        for _ in range(2 * (3 + 1)):
            singles += unread.singles(calls)
    starts = unread.groups_of_neighbours()
    neighbours = [ref for start in starts for ref in unread.neighbours(start)]
    assert len(starts) == 10
    assert len(neighbours) == 10 * GROUP
    # Neither what was asked for alone, nor anything that lies in one row group with it.
    assert len({*singles, *neighbours}) == len(singles) + len(neighbours)


def test_sessions_and_keys_that_are_asked_about_are_whole() -> None:
    rows = 23_000
    sessions = Counter(event_rows(0, rows, 1_760_000_000_000).column("session_id").to_pylist())
    assert {sessions[session_name(number)] for number in range(sessions_in(rows))} == {SESSION_STEPS}
    keys = Counter(version_rows(0, 5 * rows, 1_760_000_000_000).column("key").to_pylist())
    assert {keys[key_name(number)] for number in range(keys_in(5 * rows))} == {VERSIONS_A_KEY}
    # Of a few rows there is something to ask about too.
    assert (sessions_in(70), keys_in(70)) == (70, 70)


def test_a_version_reads_the_same_in_the_stream() -> None:
    """What has lost its stream is written back there by the archiver, which must know it again."""
    (row,) = to_rows("key_versions", version_rows(1_234_567, 1, 1_760_000_000_000))
    assert isinstance(row, KeyVersionRow)
    message = StoredMessage(
        key_subject(row.namespace, row.key), {}, encode_key_version(row), row.seq, row.stored_at_ms, row.epoch
    )
    assert decode_key_version(message) == row


def name_of(number: int) -> Ref:
    return Ref(f"ctx_context_{number}")
