"""What there is to measure, from a picture of the system: one function for each group of metrics.

Names are ``holdfast_<thing>_<unit>``, counters end in ``_total``.  Labels are closed sets (streams, tables, workers,
endpoints), handlers by their name, and processes by host and pid: counters begin anew with their process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from holdfast.schemas.rows import TABLES
from holdfast.streams.wire import DEAD_STREAM, STREAM_OF_TABLE
from holdfast.workers.exposition import Kind, Metric, Sample
from holdfast.workers.handler_floors import handler_of
from holdfast.workers.health import judge
from holdfast.workers.ingester import CONSUMER as INGESTER
from holdfast.workers.picture import archived_seq
from holdfast.workers.settings import WORKERS

if TYPE_CHECKING:
    from holdfast.streams.consumer import ConsumerState
    from holdfast.streams.topology import StreamInfo
    from holdfast.workers.picture import Observer, Picture
    from holdfast.workers.reports import WorkerReport

_INVARIANTS: Final = tuple(f"I{number}" for number in range(1, 11))


async def collect_metrics(observer: Observer) -> list[Metric]:
    """Returns every metric of the system as it is now; takes six seconds at most and stores nothing."""
    return measure(await observer.picture(probe=False))


def measure(picture: Picture) -> list[Metric]:
    """Returns the metrics that a picture shows; what could not be looked at has no value."""
    return [
        *_archiving(picture),
        *_streams(picture),
        *_lake(picture),
        *_consumers(picture),
        *_processes(picture),
        *_work(picture),
        *_upkeep(picture),
        *_overall(picture),
    ]


def _archiving(picture: Picture) -> Iterator[Metric]:
    lags: list[Sample] = []
    ages: list[Sample] = []
    marks: list[Sample] = []
    for table in TABLES:
        labels = {"stream": STREAM_OF_TABLE[table]}
        lag = picture.lag(table)
        if lag is None or picture.lake is None:
            continue
        lags.append(Sample(lag, labels))
        if lag == 0:
            ages.append(Sample(0, labels))
        elif table in picture.oldest_ms:
            ages.append(Sample(max(0, picture.at_ms - picture.oldest_ms[table]) / 1000, labels))
        info = picture.streams[STREAM_OF_TABLE[table]]
        marks.append(Sample(archived_seq(info, picture.lake.marks[table]), labels))
    yield Metric("holdfast_archive_lag_messages", "gauge", "Messages of a stream that are not archived yet.", lags)
    yield Metric(
        "holdfast_oldest_unarchived_seconds",
        "gauge",
        "Age of the oldest message of a stream that is not archived yet; 0 when all are.",
        ages,
    )
    yield Metric("holdfast_watermark_seq", "gauge", "Sequence of a stream up to which everything is archived.", marks)


def _streams(picture: Picture) -> Iterator[Metric]:
    infos = list(picture.streams.values())

    def each(name: str, about: str, value: Callable[[StreamInfo], float]) -> Metric:
        return Metric(name, "gauge", about, [Sample(value(info), {"stream": info.name}) for info in infos])

    yield each("holdfast_stream_messages", "Messages that a stream holds.", lambda info: info.messages)
    yield each("holdfast_stream_bytes", "Bytes that a stream holds.", lambda info: info.bytes)
    yield each("holdfast_stream_first_seq", "Sequence of the first message of a stream.", lambda info: info.first_seq)
    yield each("holdfast_stream_last_seq", "Sequence of the last message of a stream.", lambda info: info.last_seq)
    yield Metric(
        "holdfast_stream_epoch_info",
        "gauge",
        "The life of a stream, as a label: another epoch means that it lost messages or was created anew.",
        [Sample(1, {"stream": info.name, "epoch": info.epoch}) for info in infos],
    )
    dead = picture.streams.get(DEAD_STREAM)
    yield Metric(
        "holdfast_dead_letters",
        "gauge",
        "Messages that were set aside because they cannot be processed.",
        [] if dead is None else [Sample(dead.messages)],
    )
    yield Metric(
        "holdfast_recent_dead_letters",
        "gauge",
        "Messages that were set aside within the last ten minutes.",
        [] if picture.recent_dead is None else [Sample(picture.recent_dead)],
    )


def _lake(picture: Picture) -> Iterator[Metric]:
    statistics = {} if picture.lake is None else picture.lake.statistics
    for name, about in (("files", "Parquet files"), ("rows", "Rows"), ("bytes", "Bytes of the Parquet files")):
        yield Metric(
            f"holdfast_lake_{name}",
            "gauge",
            f"{about} of a table of the lake.",
            [Sample(getattr(found, name), {"table": table}) for table, found in statistics.items()],
        )
    yield Metric(
        "holdfast_quarantined_files",
        "gauge",
        "Damaged files of the lake that are set aside and not read.",
        [] if picture.lake is None else [Sample(len(picture.lake.problems))],
    )


def _consumers(picture: Picture) -> Iterator[Metric]:
    known: list[tuple[dict[str, str], ConsumerState]] = []
    for state in picture.consumers or ():
        handler = handler_of(state)
        if handler is not None:
            known.append(({"namespace": handler.namespace, "consumer": handler.name}, state))
        elif state.name == INGESTER:
            known.append(({"namespace": "", "consumer": "ingester"}, state))
    for name, about, field in (
        ("holdfast_pending_events", "Events that a handler, or the ingester, has not been handed yet.", "pending"),
        ("holdfast_unsettled_events", "Events that are with a handler, or the ingester, now.", "unsettled"),
        (
            "holdfast_redelivered_events",
            "Events that were handed to a handler, or the ingester, more than once and are not settled.",
            "redelivered",
        ),
    ):
        yield Metric(name, "gauge", about, [Sample(getattr(state, field), labels) for labels, state in known])


def _processes(picture: Picture) -> Iterator[Metric]:
    reports = picture.reports
    if reports is None:
        return
    running = Counter(name for report in reports for name in report.counters)
    yield Metric(
        "holdfast_worker_processes",
        "gauge",
        "Processes that run a worker and answer.",
        [Sample(running[name], {"worker": name}) for name in WORKERS],
    )

    def each(name: str, kind: Kind, about: str, value: Callable[[WorkerReport], float]) -> Metric:
        return Metric(name, kind, about, [Sample(value(report), {"process": report.process}) for report in reports])

    yield each(
        "holdfast_unknown_writes_total",
        "counter",
        "Attempts of a process to store something that no acknowledgement came of.",
        lambda report: report.unknown_writes,
    )
    yield each(
        "holdfast_reconnects_total",
        "counter",
        "Times that a process has connected to the server again.",
        lambda report: report.reconnects,
    )
    yield each(
        "holdfast_process_resident_bytes",
        "gauge",
        "Memory of a process that is in use.",
        lambda report: report.rss_bytes,
    )
    yield each(
        "holdfast_process_open_files",
        "gauge",
        "Files, sockets and pipes that a process holds open.",
        lambda report: report.open_files,
    )
    yield each(
        "holdfast_process_start_time_seconds",
        "gauge",
        "When the workers of a process started, in seconds since 1970.",
        lambda report: report.started_ms / 1000,
    )


def _work(picture: Picture) -> Iterator[Metric]:
    """The counters of workers: ``holdfast_<worker>_<count>_total``, of the archiver by table, of endpoints by name."""
    found: dict[str, list[Sample]] = {}
    for report in picture.reports or ():
        process = {"process": report.process}
        for worker, counters in report.counters.items():
            if worker == "resolver":
                _add_endpoints(found, counters, process)
                continue
            for name, value in counters.items():
                labels = process
                if isinstance(value, bool):
                    continue
                if worker == "archiver":
                    table = next((table for table in TABLES if name.startswith(f"{table}_")), None)
                    if table is None:
                        continue
                    name = name.removeprefix(f"{table}_")  # noqa: PLW2901
                    labels = {"table": table, **process}
                if isinstance(value, int | float):
                    found.setdefault(f"holdfast_{worker}_{name}_total", []).append(Sample(value, labels))
    for name, samples in sorted(found.items()):
        yield Metric(name, "counter", _ABOUT.get(name, "Counted by a worker since its process started."), samples)


def _upkeep(picture: Picture) -> Iterator[Metric]:
    """Backups, as the janitor's process reports them, and the scrub, as the lake remembers it."""
    parts: dict[str, dict[str, Any]] = {"scrub": {} if picture.lake is None else picture.lake.scrub}
    for report in picture.reports or ():
        for worker in report.counters:
            parts = report.parts(worker) | parts
    for part, member, name, kind, about in _UPKEEP:
        value = parts.get(part, {}).get(member)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        yield Metric(name, kind, about, [Sample(value)] if is_number and value is not None else [])


def _add_endpoints(found: dict[str, list[Sample]], counters: dict[str, Any], process: dict[str, str]) -> None:
    for endpoint, counts in counters.items():
        labels = {"endpoint": endpoint, **process}
        for result in ("answered", "refused", "failed"):
            samples = found.setdefault("holdfast_resolver_requests_total", [])
            samples.append(Sample(counts.get(result, 0), {**labels, "result": result}))
        seconds = found.setdefault("holdfast_resolver_request_seconds_total", [])
        seconds.append(Sample(counts.get("seconds", 0.0), labels))


def _overall(picture: Picture) -> Iterator[Metric]:
    counted = Counter(problem.invariant for problem in judge(picture, server="the server"))
    yield Metric(
        "holdfast_problems",
        "gauge",
        "What 'holdfast health' would tell now, by the invariant that is broken or in danger; without its test write.",
        [Sample(counted[invariant], {"invariant": invariant}) for invariant in _INVARIANTS],
    )
    apart_ms = picture.clock_apart_ms
    yield Metric(
        "holdfast_clock_apart_seconds",
        "gauge",
        "How far the server's clock is ahead of the resolver's.",
        [] if apart_ms is None else [Sample(apart_ms / 1000)],
    )


_UPKEEP: Final[tuple[tuple[str, str, str, Kind, str], ...]] = (
    ("backup", "age_s", "holdfast_backup_age_seconds", "gauge", "Age of the newest complete backup."),
    ("backup", "made", "holdfast_backups_made_total", "counter", "Backups that were made."),
    ("backup", "failed", "holdfast_backups_failed_total", "counter", "Backups that failed; each is tried again."),
    ("scrub", "files", "holdfast_scrub_checked_files", "gauge", "Files that this pass of the scrub has read."),
    ("scrub", "files_total", "holdfast_scrub_files", "gauge", "Files that a pass of the scrub has to read."),
    ("scrub", "bytes", "holdfast_scrub_checked_bytes", "gauge", "Bytes that this pass of the scrub has read."),
    ("scrub", "damaged", "holdfast_scrub_damaged_files", "gauge", "Files that the scrub has found damaged."),
)
"""Part, member, and the metric that it becomes."""

_ABOUT: Final = {
    "holdfast_archiver_cycles_total": "Runs of messages that were archived, each one commit.",
    "holdfast_archiver_rows_total": "Rows that were archived.",
    "holdfast_archiver_repeated_total": "Messages that the lake held already under the same id.",
    "holdfast_archiver_interned_total": "Contexts that came inline in events and were stored by the archiver.",
    "holdfast_archiver_dead_total": "Messages that the archiver set aside as dead letters.",
    "holdfast_archiver_fenced_total": "Runs that another archiver had committed first.",
    "holdfast_archiver_failed_total": "Runs that failed; each is tried again.",
    "holdfast_archiver_purged_total": "Archived messages that were taken out of the hot tier.",
    "holdfast_ingester_events_total": "Events that the ingester looked at.",
    "holdfast_ingester_stored_total": "Inline contexts that the ingester stored.",
    "holdfast_ingester_existed_total": "Inline contexts that were stored already.",
    "holdfast_ingester_dead_total": "Events that the ingester set aside as dead letters.",
    "holdfast_ingester_handed_back_total": "Events that the ingester gave back to be delivered again.",
    "holdfast_compactor_rounds_total": "Rounds of the compactor.",
    "holdfast_compactor_merged_total": "Files that were merged away.",
    "holdfast_compactor_written_total": "Files that were written by merging.",
    "holdfast_compactor_removed_total": "Replaced files that were removed for good.",
    "holdfast_compactor_fenced_total": "Rounds that were lost to another compactor.",
    "holdfast_compactor_failed_total": "Rounds that failed; each is tried again.",
    "holdfast_resolver_requests_total": "Requests to an endpoint, by what became of them.",
    "holdfast_resolver_request_seconds_total": "Time that requests to an endpoint took, in all.",
}
