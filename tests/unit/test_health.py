"""What is judged a problem: each broken part alone, its threshold, and what an operator is told to do."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from holdfast.client.handler_policy import HANDLER_KEY, NAMESPACE_KEY, PATTERN_KEY
from holdfast.schemas.problems import Problem
from holdfast.schemas.rows import Position
from holdfast.streams.consumer import ConsumerState
from holdfast.streams.topology import StreamInfo
from holdfast.streams.wire import DEAD_STREAM, STREAM_OF_TABLE
from holdfast.streams.write_probe import WriteError, WriteState
from holdfast.workers import health
from holdfast.workers.control import ArchiverStatus
from holdfast.workers.health import judge
from holdfast.workers.metrics import measure
from holdfast.workers.picture import Failure, LakeState, Picture
from holdfast.workers.reports import WorkerReport
from holdfast.workers.settings import WORKERS

NOW_MS = 1_769_851_800_000


def stream(name: str, last: int = 10, epoch: str = "e1") -> StreamInfo:
    return StreamInfo(name, epoch, 1, last, last, 100 * last, 1)


def consumer(**changes: Any) -> ConsumerState:
    values: dict[str, Any] = {
        "name": "hf-on-check",
        "floor": 1,
        "pending": 0,
        "unsettled": 0,
        "redelivered": 0,
        "filters": (),
        "metadata": {NAMESPACE_KEY: "shop", HANDLER_KEY: "check", PATTERN_KEY: "a"},
    }
    return ConsumerState(**{**values, **changes})


def well(**changes: Any) -> Picture:
    """A picture of a system that is well, with these changes."""
    values: dict[str, Any] = {
        "at_ms": NOW_MS,
        "streams": {name: stream(name) for name in (*STREAM_OF_TABLE.values(), DEAD_STREAM)},
        "lake": LakeState(marks={table: Position("e1", 10) for table in STREAM_OF_TABLE}),
        "clock_apart_ms": 5,
        "writes": WriteState(state="ok"),
        "archiver": ArchiverStatus(tables={}, problems=[], counters={}, archive_interval_s=5.0),
        "reports": [
            WorkerReport(
                host="h", pid=1, started_ms=1, counters={name: {} for name in WORKERS}, rss_bytes=1, open_files=1
            )
        ],
        "consumers": [consumer()],
        "recent_dead": 3,
    }
    return Picture(**{**values, **changes})


def told(picture: Picture) -> list[tuple[str, str]]:
    problems = judge(picture, server="nats://h:1")
    for problem in problems:
        assert problem.what
        assert len(problem.next_step) > 20
    return [(problem.invariant, problem.object) for problem in problems]


def lake(**changes: Any) -> LakeState:
    values: dict[str, Any] = {"marks": {table: Position("e1", 10) for table in STREAM_OF_TABLE}, **changes}
    return LakeState(**values)


ALARM = Problem(
    invariant="I1", object="CTX_EVENTS", what="it lost messages", next_step="see the server's disk, then say so"
)


def test_a_system_that_is_well_has_no_problem() -> None:
    assert told(well()) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lake": lake(alarms=[ALARM])}, [("I1", "CTX_EVENTS")]),
        ({"lake": lake(torn=["events"])}, [("I5", "lake/events")]),
        ({"lake": lake(problems=[ALARM])}, [("I1", "CTX_EVENTS")]),
        (
            {"writes": WriteState(state="refusing", reason="full", errors=(WriteError(stream="a", cause="full"),))},
            [("I8", "nats://h:1")],
        ),
        ({"writes": WriteState(state="silent", reason="x")}, [("I8", "nats://h:1")]),
        (
            {"archiver": None, "failures": {"archiver": Failure("nobody", "start one with holdfast up")}},
            [("I8", "archiver")],
        ),
        ({"lake": None, "failures": {"lake": Failure("no such disk", "see whether it is mounted")}}, [("I1", "lake")]),
        (
            {"failures": {"CTX_EVENTS": Failure("it is gone", "run holdfast up once to make it")}},
            [("I1", "CTX_EVENTS")],
        ),
        ({"failures": {"consumers": Failure("no answer", "see whether it is stuck")}}, [("I8", "consumers")]),
        ({"clock_apart_ms": -61_000}, [("I8", "clock")]),
        ({"clock_apart_ms": 60_000}, []),
        ({"recent_dead": health.RECENT_DEAD + 1}, [("I7", DEAD_STREAM)]),
        ({"consumers": [consumer(pending=health.PENDING_EVENTS + 1)]}, [("I8", "handler shop/check")]),
        ({"consumers": [consumer(redelivered=health.REDELIVERED + 1)]}, [("I8", "handler shop/check")]),
        ({"consumers": [consumer(name="hf-ingester", metadata={}, pending=10**9)]}, [("I8", "ingester")]),
        ({"consumers": [consumer(name="somebody's", metadata={}, pending=10**9)]}, []),
        ({"reports": []}, [("I8", "ingester"), ("I8", "compactor"), ("I8", "janitor")]),
        (
            {"reports": None, "failures": {"workers": Failure("no answer", "see whether it is stuck")}},
            [("I8", "workers")],
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_each_broken_part_is_told_with_its_invariant(changes: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    found = [(invariant, "clock" if of.startswith("clock of ") else of) for invariant, of in told(well(**changes))]
    assert sorted(found) == sorted(expected)


def test_what_a_worker_says_of_its_other_work_is_told() -> None:
    report = well().reports or []
    counters = {**report[0].counters, "janitor": {"backup": {"problems": [msgspec.structs.asdict(ALARM)]}}}
    late = [msgspec.structs.replace(report[0], counters=counters)]
    assert told(well(reports=late)) == [("I1", "CTX_EVENTS")]
    strange = [msgspec.structs.replace(report[0], counters={**counters, "janitor": {"backup": {"problems": [1]}}})]
    assert told(well(reports=strange)) == []


def test_one_cause_is_told_once() -> None:
    """The archiver tells its alarms itself, and a stream that is gone fails whatever asks it."""
    status = ArchiverStatus(tables={}, problems=[ALARM], counters={})
    assert told(well(lake=lake(alarms=[ALARM]), archiver=status)) == [("I1", "CTX_EVENTS")]
    gone = Failure("it is gone", "run holdfast up once to make it")
    assert told(well(failures={"CTX_EVENTS": gone, "consumers": gone, "clock": gone})) == [("I1", "CTX_EVENTS")]


def test_a_backlog_and_an_old_message_are_told_apart() -> None:
    behind = {"contexts": Position("e1", 10), "events": Position("e1", 10), "key_versions": Position("e1", 10)}
    streams = well().streams | {"CTX_EVENTS": stream("CTX_EVENTS", last=10 + health.LAG_MESSAGES + 1)}
    assert told(well(streams=streams, lake=lake(marks=behind))) == [("I8", "CTX_EVENTS")]
    streams["CTX_EVENTS"] = stream("CTX_EVENTS", last=11)
    for age_s, expected in ((health.OLDEST_S, []), (health.OLDEST_S + 6, [("I8", "CTX_EVENTS")])):
        picture = well(streams=streams, lake=lake(marks=behind), oldest_ms={"events": NOW_MS - int(age_s * 1000)})
        assert told(picture) == expected
    # An archiver that was told to wait for an hour is not late after eleven minutes.
    patient = msgspec.structs.replace(
        well().archiver or ArchiverStatus(tables={}, problems=[], counters={}), archive_interval_s=3_600.0
    )
    late = {"events": NOW_MS - 700_000}
    assert told(well(streams=streams, lake=lake(marks=behind), oldest_ms=late, archiver=patient)) == []


def values(picture: Picture) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in measure(picture):
        assert metric.name.startswith("holdfast_")
        assert metric.help.endswith(".")
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        for sample in metric.samples:
            found[metric.name + "".join(f",{name}={value}" for name, value in sample.labels.items())] = sample.value
    return found


def test_metrics_say_what_the_picture_shows() -> None:
    report = WorkerReport(
        host="h",
        pid=1,
        started_ms=2_000,
        counters={
            "archiver": {"events_rows": 7, "contexts_failed": 1},
            "resolver": {"put": {"answered": 3, "refused": 2, "failed": 0, "seconds": 0.5}},
            "janitor": {"expired": 4, "backup": {"age_s": 60.0, "made": 2, "failed": 0, "problems": []}},
        },
        rss_bytes=1_000,
        open_files=12,
        unknown_writes=5,
    )
    streams = well().streams | {"CTX_EVENTS": stream("CTX_EVENTS", last=13)}
    found = values(well(streams=streams, oldest_ms={"events": NOW_MS - 1_500}, reports=[report], recent_dead=2))
    expected = {
        "holdfast_archive_lag_messages,stream=CTX_EVENTS": 3,
        "holdfast_archive_lag_messages,stream=KV_ctx-hot": 0,
        "holdfast_oldest_unarchived_seconds,stream=CTX_EVENTS": 1.5,
        "holdfast_oldest_unarchived_seconds,stream=KV_ctx-hot": 0,
        "holdfast_watermark_seq,stream=CTX_EVENTS": 10,
        "holdfast_stream_last_seq,stream=CTX_EVENTS": 13,
        "holdfast_stream_epoch_info,stream=CTX_EVENTS,epoch=e1": 1,
        "holdfast_dead_letters": 10,
        "holdfast_recent_dead_letters": 2,
        "holdfast_pending_events,namespace=shop,consumer=check": 0,
        "holdfast_worker_processes,worker=archiver": 1,
        "holdfast_worker_processes,worker=compactor": 0,
        "holdfast_unknown_writes_total,process=h:1": 5,
        "holdfast_process_open_files,process=h:1": 12,
        "holdfast_archiver_rows_total,table=events,process=h:1": 7,
        "holdfast_archiver_failed_total,table=contexts,process=h:1": 1,
        "holdfast_janitor_expired_total,process=h:1": 4,
        "holdfast_backup_age_seconds": 60,
        "holdfast_backups_made_total": 2,
        "holdfast_quarantined_files": 0,
        "holdfast_resolver_requests_total,endpoint=put,process=h:1,result=refused": 2,
        "holdfast_resolver_request_seconds_total,endpoint=put,process=h:1": 0.5,
        "holdfast_problems,invariant=I8": 2,
        "holdfast_clock_apart_seconds": 0.005,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_a_picture_of_nothing_has_no_values_but_its_problems() -> None:
    picture = Picture(at_ms=NOW_MS, failures={"lake": Failure("gone", "see whether it is mounted")})
    assert {name.split(",")[0] for name in values(picture)} == {"holdfast_problems"}
