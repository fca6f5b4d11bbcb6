"""Importing recorded agent traces, and archiving what came in: the main path of a new user.

Measures steps a second of ``import`` until everything is acknowledged, and of import and ``flush`` together until
everything is fsynced in the lake, by a process of its own that holds an embedded server and all workers.  Each run
imports into a namespace of its own, so nothing is there before, but streams and lake have grown by the runs before.
Raw limits: plain nats-py storing the same bytes (each context once, each event) in atomic batches of 500, two in
flight, ready made, on the same server; and reading and parsing the same files and storing nothing.

``import_peak_memory`` is the highest resident memory of such a process tree while it imports, beside what it has at
rest: each run has a tree of its own, since a second import would stand on what the first one left in the server.

The traces are those under ``steps`` of the folder that HOLDFAST_TEST_DATA names, or of ``../shared/data``; without
them, and in a smoke run, synthetic ones from a seed, which the parameters say: figures of the two are not comparable.

Does not measure: other formats of traces, a second import of what is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, count, zip_longest
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from benchmarks.bench import RAW_EVENTS_PREFIX, RAW_HOT_PREFIX, Bench, Figure, recorded_traces
from benchmarks.children import Child, child
from benchmarks.measure import Result, Run, Side, concurrent, measure, timed
from benchmarks.process_tree import watch_memory
from benchmarks.raw_nats import AtomicBatches, Message, plain_client
from benchmarks.synthetic_traces import write_traces
from holdfast.ops.importing import new_event
from holdfast.ops.traces import Step, TraceFile, find_traces, read_file
from holdfast.schemas.refs import format_ref
from holdfast.streams.codec import seal
from holdfast.streams.events import encode_event

if TYPE_CHECKING:
    from nats.aio.client import Client

BATCH: Final = 500
SYNTHETIC_STEPS: Final = 26_000
FIGURES: Final = ("import", "import_and_archive", "import_peak_memory")


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    if not bench.wants(*FIGURES):
        return
    path, source = _traces(bench)
    if bench.wants("import", "import_and_archive"):
        async with child("benchmarks.import_process", "--data", str(bench.directory("import") / "data")) as process:
            url = (await process.ask())["url"]
            async with plain_client(url) as client:
                await _throughput(bench, process, client, path, source)
    if bench.wants("import_peak_memory"):
        await _peak_memory(bench, path, source)


async def _throughput(bench: Bench, process: Child, client: Client, path: Path, source: str) -> None:
    imports = _Imports(process, path)
    files = find_traces([path]).files
    results = await measure(
        [
            Side("", imports.run),
            Side(f"the same bytes in atomic batches of {BATCH}", _RawStore(client, files).run),
            Side("reading and parsing alone", partial(_parse, files), "parse"),
        ],
        bench.budget,
        kind="rate",
        count=imports.fixed,
        least=1,
        most=1,
    )
    ours, *raws = results
    archived = [ours.count / seconds for seconds in imports.total_s]
    for name, what, result in (
        ("import", "steps until acknowledged", ours),
        ("import_and_archive", "steps until fsynced in the lake", _result("", archived, ours.count)),
    ):
        if bench.wants(name):
            figure = Figure(
                name=name,
                what=what,
                kind="rate",
                unit="steps/s",
                durability="durable",
                parameters=_parameters(source, len(files), imports.distinct_contexts),
            )
            for raw in raws:
                bench.add(figure, result, raw)


async def _peak_memory(bench: Bench, path: Path, source: str) -> None:
    idle_mb: list[float] = []
    peak_mb: list[float] = []
    parts_mb: list[dict[str, float]] = []
    steps, distinct_contexts = 0, 0
    for _ in range(bench.budget.runs):
        data = bench.directory("import-memory") / "data"
        async with child("benchmarks.import_process", "--data", str(data)) as process:
            await process.ask()
            async with watch_memory(process.pid) as idle:
                pass
            imports = _Imports(process, path)
            async with watch_memory(process.pid) as peak:
                steps = (await imports.run(1)).count
        distinct_contexts = imports.distinct_contexts
        idle_mb.append(idle.mb)
        peak_mb.append(peak.mb)
        parts_mb.append(peak.parts_mb)
    figure = Figure(
        name="import_peak_memory",
        what="highest resident memory of the process tree while an import is stored and archived",
        kind="latency",
        unit="MB",
        durability="durable",
        parameters={**_parameters(source, len(find_traces([path]).files), distinct_contexts), "parts_mb": parts_mb},
    )
    at_rest = _result("the same processes before the import", idle_mb, 0)
    bench.add(figure, _result("", peak_mb, steps), at_rest)


def _parameters(source: str, files: int, distinct_contexts: int) -> dict[str, Any]:
    return {"traces": source, "files": files, "distinct_contexts": distinct_contexts, "concurrency": 1}


class _Imports:
    """Runs imports in the child, each into a namespace of its own, and keeps what their answers say."""

    fixed: Final = 1
    """The operations of a run are the steps of the files, whatever is asked for."""

    def __init__(self, process: Child, path: Path) -> None:
        self._process = process
        self._path = path
        self._namespaces = (f"import{number}" for number in count(1))
        self.total_s: list[float] = []
        self.distinct_contexts = 0

    async def run(self, _: int) -> Run:
        answer = await self._process.ask({"namespace": next(self._namespaces), "path": str(self._path)})
        counts = answer["counts"]
        if counts["events"] != counts["steps"] or counts["errors"]:
            raise RuntimeError(f"the import is not whole: {counts}")
        self.total_s.append(answer["total_s"])
        self.distinct_contexts = counts["distinct_contexts"]
        return Run(counts["steps"], answer["import_s"])


class _RawStore:
    """Stores the bytes that an import stores, made beforehand, with plain nats-py."""

    def __init__(self, client: Client, files: Sequence[TraceFile]) -> None:
        self._files = files
        self._batches = AtomicBatches(client)
        self._namespaces = (f"raw{number}" for number in count(1))

    async def run(self, _: int) -> Run:
        steps = list(_steps(self._files))
        contexts, events = _messages(next(self._namespaces), steps)
        interleaved = chain.from_iterable(zip_longest(_batched(contexts), _batched(events)))
        outcome = await concurrent([batch for batch in interleaved if batch], self._batches.publish, 2)
        return Run(len(steps), outcome.seconds)


async def _parse(files: Sequence[TraceFile], _: int) -> Run:
    found = 0

    async def parse() -> None:
        nonlocal found
        for _ in _steps(files):
            found += 1

    outcome = await timed(1, parse)
    return Run(found, outcome.seconds)


def _steps(files: Sequence[TraceFile]) -> Iterator[Step]:
    return (record for file in files for record in read_file(file) if isinstance(record, Step))


def _messages(namespace: str, steps: Sequence[Step]) -> tuple[list[Message], list[Message]]:
    contexts: dict[str, Message] = {}
    events: list[Message] = []
    for step in steps:
        forms = seal(namespace, step.kind, step.body)
        for form in forms:
            headers = {**form.headers, "Nats-Expected-Last-Subject-Sequence": "0"}
            subject = f"{RAW_HOT_PREFIX}{namespace}.{form.digest}"
            contexts.setdefault(form.digest, Message(subject, headers, form.payload))
        event = encode_event(new_event(namespace, step, format_ref(step.kind, forms[-1].digest)))
        events.append(Message(f"{RAW_EVENTS_PREFIX}{event.subject}", event.headers, event.payload))
    return list(contexts.values()), events


def _batched(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    for start in range(0, len(messages), BATCH):
        yield messages[start : start + BATCH]


def _result(what: str, values: list[float], number: int) -> Result:
    return Result(what=what, value=median(values), values=values, count=number)


def _traces(bench: Bench) -> tuple[Path, str]:
    recorded = None if bench.budget.quick else recorded_traces()
    if recorded is not None:
        return recorded, "recorded"
    path = bench.directory("traces") / "synthetic.steps.jsonl"
    write_traces(path, bench.scale(SYNTHETIC_STEPS, 500))
    return path, "synthetic"
