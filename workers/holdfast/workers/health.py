"""What is wrong with a system, judged by a picture of it: each broken invariant, and the next step to take.

The thresholds say when something that is usual becomes something that an operator should know of; none of them means
that anything was lost.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.schemas.problems import Problem
from holdfast.schemas.rows import TABLES, Table
from holdfast.streams.connection_target import mask_url
from holdfast.streams.wire import DEAD_STREAM, STREAM_OF_TABLE
from holdfast.streams.write_probe import problem_of
from holdfast.workers.handler_floors import handler_of
from holdfast.workers.ingester import CONSUMER as INGESTER
from holdfast.workers.settings import WORKERS, WorkerName

if TYPE_CHECKING:
    from holdfast.workers.picture import Observer, Picture

LAG_MESSAGES: Final = 200_000
"""A backlog over this is a problem to be told: four full commits."""

OLDEST_S: Final = 600.0
"""A message that has waited for longer to be archived: the interval is five seconds, a full commit takes two."""

PENDING_EVENTS: Final = 100_000
"""Events that wait for a handler, or for the ingester: an hour of a busy one."""

REDELIVERED: Final = 100
"""Events that one consumer has been handed more than once and has not settled: its work fails, or takes too long."""

RECENT_DEAD: Final = 1_000
"""Dead letters of ten minutes: a publisher that sends bad messages all the time, not a mistake."""

CLOCK_APART_MS: Final = 60_000

_WITHOUT: Final[dict[WorkerName, str]] = {
    "ingester": "contexts that raw publishers send inline resolve only once their events are archived",
    "compactor": "small files of the lake are not merged, and replaced ones not removed",
    "janitor": "named contexts that are due are not expired, and no backup is made",
}
"""What does not happen while a worker is missing."""


async def collect_health(observer: Observer) -> dict[str, Any]:
    """Returns ``{"ok", "problems", "lag"}``: each problem with the invariant it breaks and the next step to take.

    It answers within six seconds, whatever is broken.  ``lag`` has the tables whose stream and watermark could be read.
    """
    picture = await observer.picture()
    target = observer.connection.target
    problems = judge(picture, server=mask_url(target.url))
    lag = {table: waiting for table in TABLES if (waiting := picture.lag(table)) is not None}
    return {"ok": not problems, "problems": [msgspec.structs.asdict(problem) for problem in problems], "lag": lag}


def judge(picture: Picture, *, server: str) -> list[Problem]:
    """Returns every problem that a picture shows, each once, what concerns acknowledged data first."""
    found = [
        *_lost(picture),
        *_server(picture, server),
        *_archiver(picture),
        *(problem for table in TABLES for problem in _table(picture, table)),
        *_lake(picture),
        *_workers(picture),
        *_consumers(picture),
        *_dead(picture),
        *_clock(picture),
        *_unseen(picture),
    ]
    return list(dict.fromkeys(found))


def _lost(picture: Picture) -> Iterator[Problem]:
    """Alarms: of the file beside the lake, so that they are told also while no archiver runs."""
    if picture.lake is not None:
        yield from picture.lake.alarms


def _server(picture: Picture, server: str) -> Iterator[Problem]:
    problem = None if picture.writes is None else problem_of(picture.writes, server)
    if problem is not None:
        yield problem


def _archiver(picture: Picture) -> Iterator[Problem]:
    if picture.archiver is not None:
        yield from picture.archiver.problems
    elif (failure := picture.failures.get("archiver")) is not None:
        yield Problem(invariant="I8", object="archiver", what=failure.what, next_step=failure.next_step)


def _table(picture: Picture, table: Table) -> Iterator[Problem]:
    stream = STREAM_OF_TABLE[table]
    failure = picture.failures.get(stream)
    if failure is not None:
        yield Problem(invariant="I1", object=stream, what=failure.what, next_step=failure.next_step)
    lag = picture.lag(table)
    if lag is None:
        return
    if lag > LAG_MESSAGES:
        yield Problem(
            invariant="I8",
            object=stream,
            what=f"{lag} messages are not archived yet",
            next_step="is the archiver running, and does its disk keep up? Nothing is lost meanwhile",
        )
    interval_s = 0.0 if picture.archiver is None else picture.archiver.archive_interval_s
    age_s = (picture.at_ms - picture.oldest_ms.get(table, picture.at_ms)) / 1000
    if age_s > OLDEST_S + interval_s:
        yield Problem(
            invariant="I8",
            object=stream,
            what=f"a message has waited for {age_s:.0f} s to be archived ({lag} wait in all)",
            next_step="see the archiver's log: what stops it is told there. Nothing is lost meanwhile",
        )


def _lake(picture: Picture) -> Iterator[Problem]:
    failure = picture.failures.get("lake")
    if failure is not None:
        yield Problem(invariant="I1", object="lake", what=failure.what, next_step=failure.next_step)
    if picture.lake is None:
        return
    yield from picture.lake.problems
    for table in picture.lake.torn:
        yield Problem(
            invariant="I5",
            object=f"lake/{table}",
            what="the last commit file is torn",
            next_step="restart the archiver: it sets the commit aside and archives its rows again",
        )


def _workers(picture: Picture) -> Iterator[Problem]:
    if picture.reports is None:
        return
    running = {name for report in picture.reports for name in report.counters}
    for report in picture.reports:
        for name in report.counters:
            for part in report.parts(name).values():
                yield from _problems_in(part)
    for name in WORKERS:
        # The active archiver has been asked by itself, and a resolver is who answers here.
        if name in _WITHOUT and name not in running:
            yield Problem(
                invariant="I8",
                object=name,
                what=f"no {name} answers on this server: {_WITHOUT[name]}",
                next_step=f"start one with 'holdfast up' or 'holdfast worker {name}'; of one that runs, see whether "
                "its process is stopped or hangs",
            )


def _problems_in(part: dict[str, Any]) -> list[Problem]:
    try:
        return msgspec.convert(part.get("problems", []), list[Problem])
    except msgspec.ValidationError:
        return []  # of another release


def _consumers(picture: Picture) -> Iterator[Problem]:
    for state in picture.consumers or ():
        handler = handler_of(state)
        if handler is not None:
            what, object_ = f"handler {handler.name!r}", f"handler {handler.namespace}/{handler.name}"
            step = (
                f"see whether its process runs and what it logs; 'holdfast handler forget {handler.name}' lets go of it"
            )
        elif state.name == INGESTER:
            what, object_ = "the ingester", "ingester"
            step = "see whether it runs and what it logs; more ingesters share the work"
        else:
            continue
        if state.pending > PENDING_EVENTS:
            yield Problem(
                invariant="I8",
                object=object_,
                what=f"{state.pending} events wait for {what}, {state.unsettled} are with it",
                next_step=f"{step}. The event log is kept for it up to handler_bytes",
            )
        if state.redelivered > REDELIVERED:
            yield Problem(
                invariant="I8",
                object=object_,
                what=f"{state.redelivered} events have been handed to {what} more than once and are not settled",
                next_step=f"its work fails or takes longer than its ack wait: {step}",
            )


def _dead(picture: Picture) -> Iterator[Problem]:
    recent = picture.recent_dead or 0
    if recent > RECENT_DEAD:
        yield Problem(
            invariant="I7",
            object=DEAD_STREAM,
            what=f"{recent} messages were set aside as dead letters within ten minutes",
            next_step="'holdfast dead' shows their reasons and where they came from: mend what sends them",
        )


def _clock(picture: Picture) -> Iterator[Problem]:
    apart_ms = picture.clock_apart_ms
    if apart_ms is None or abs(apart_ms) <= CLOCK_APART_MS:
        return
    direction = "ahead of" if apart_ms > 0 else "behind"
    yield Problem(
        invariant="I8",
        object=f"clock of {socket.gethostname()}",
        what=f"the server's clock is {abs(apart_ms) / 1000:.0f} s {direction} this machine's",
        next_step="set both by NTP ('timedatectl set-ntp true'): expiry and eviction go by the server's clock, the "
        "times that events carry by their publisher's",
    )


def _unseen(picture: Picture) -> Iterator[Problem]:
    """Parts that could not be looked at and that nothing above tells of."""
    told = {"archiver", "lake", *STREAM_OF_TABLE.values()}
    said = {failure.what for part, failure in picture.failures.items() if part in told}
    for part, failure in picture.failures.items():
        if part not in told and failure.what not in said and not part.endswith(" oldest"):
            yield Problem(invariant="I8", object=part, what=failure.what, next_step=failure.next_step)
