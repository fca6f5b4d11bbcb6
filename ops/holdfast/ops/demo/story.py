"""The demo from its first line to its last: data comes in, is looked at hot, archived, looked at cold."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol, cast

import msgspec

from holdfast.client import Context, Event, Holdfast, connect
from holdfast.ops.demo import figures
from holdfast.ops.demo.agents import REVIEWED, AgentName, run_agents
from holdfast.ops.demo.figures import Answer, Bytes, Deduplication, Resolved
from holdfast.ops.importing import ImportCounts, TraceImport
from holdfast.ops.settings import LoadedSettings
from holdfast.ops.system import System, open_own_system, open_system
from holdfast.ops.traces import TraceFile
from holdfast.schemas.errors import NotFoundError
from holdfast.schemas.ids import new_event_id
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import EVENTS_STREAM, HOT_STREAM
from holdfast.workers import control
from holdfast.workers.settings import WORKERS

_SAMPLES: Final = 6
"""Contexts resolved hot, then cold."""

_SHOWN_MODULE: Final = "asyncio.tasks"
"""The module whose way through the agents is shown; there in every CPython since 3.4."""

_GIST_CHARS: Final = 70

_MOST_SHOWN: Final = 12
"""Events shown of one lineage."""

AGENTS_SQL: Final = """
SELECT body ->> '$.module' AS module, CAST(body ->> '$.findings' AS INTEGER) AS findings,
       CAST(body ->> '$.by_rule.undocumented' AS INTEGER) AS undocumented,
       CAST(body ->> '$.by_rule."long-function"' AS INTEGER) AS long_functions,
       CAST(body ->> '$.by_rule."note-to-self"' AS INTEGER) AS notes
FROM contexts WHERE kind = 'review' ORDER BY findings DESC, module LIMIT 8
"""

TRACES_SQL: Final = """
SELECT e.name, count(*) AS events, count(DISTINCT e.session_id) AS sessions, count(DISTINCT c.ref) AS contexts,
       CAST(sum(c.size) / 1024 AS BIGINT) AS kib, max(e.event_depth) AS deepest
FROM events e JOIN contexts c ON c.ref = e.context_ref AND c.namespace = e.namespace
GROUP BY e.name ORDER BY events DESC LIMIT 8
"""


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """How much was stored: messages and bytes of hot tier and event log, bytes and files of the lake."""

    contexts: int
    hot_bytes: int
    events: int
    event_bytes: int
    lake_bytes: int
    lake_files: int


class Archived(msgspec.Struct, frozen=True, kw_only=True):
    """What flushing and evicting did; the hot tier holds ``left`` messages afterwards."""

    flush_s: float
    purged: int
    left: int


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the demo shows; ``demo --json`` prints it."""

    modules: int | None
    imported: ImportCounts | None
    work_s: float
    storage: Storage
    deduplication: list[Deduplication]
    bytes: Bytes
    archived: Archived
    resolved: list[Resolved]
    answer: Answer
    lineage: list[LineageStep]
    durability: str
    seconds: float


class LineageStep(msgspec.Struct, frozen=True):
    """An event of a lineage, and what its context is about, in a few words."""

    event: Event
    gist: str


class Screen(Protocol):
    """Where the demo shows what happens."""

    def begin(self, data: Path, nats_url: str, *, temporary: bool) -> None:
        """The system runs."""
        ...

    def agent_done(self, name: AgentName, modules: int) -> None:
        """An agent has done so many modules."""
        ...

    def imported(self, counts: ImportCounts) -> None:
        """So much has been imported."""
        ...

    def step(self, text: str) -> None:
        """Something that takes a moment has begun."""
        ...

    def end_of_work(self) -> None:
        """Agents or import are done."""
        ...


@asynccontextmanager
async def demo_system(loaded: LoadedSettings, *, keep: bool) -> AsyncGenerator[tuple[System, bool]]:
    """Yields the system to show it on, and whether it is temporary: a server, workers and data of its own.

    ``keep``: the caller has named a data directory or a server, which is used, and left as it is then.
    """
    if keep:
        async with open_system(loaded, WORKERS) as system:
            yield system, False
        return
    with tempfile.TemporaryDirectory(prefix="holdfast-demo-", ignore_cleanup_errors=True) as directory:
        settings = msgspec.structs.replace(loaded.settings, data=directory, port=0, monitor_port=0)
        async with open_own_system(settings, WORKERS) as system:
            yield system, True


async def tell(system: System, namespace: str, screen: Screen, traces: list[TraceFile] | None) -> Story:
    """Runs the demo on a system and returns what is to be shown."""
    started = time.perf_counter()
    session = f"demo-{new_event_id()[-12:]}"
    counts: ImportCounts | None = None
    modules: int | None = None
    if traces is None:
        modules = await run_agents(system.target, namespace, session, screen.agent_done)
    else:
        async with system.connect(namespace, "import") as hf:
            counts = await TraceImport(hf, on_progress=screen.imported).run(traces)
        if not counts.steps:
            raise NotFoundError("no step could be read from the traces", field="traces", hint="see 'holdfast import'")
    work_s = time.perf_counter() - started
    screen.end_of_work()

    # Without a cache: each time is one of the tier that answers.
    async with connect(system.target, namespace, "demo", cache_bytes=0) as hf:
        events = await _shown_events(hf, session if traces is None else None)
        samples = list(dict.fromkeys(event.context_ref for event in events if event.context_ref))[:_SAMPLES]
        screen.step("resolving from the hot tier")
        hot = await figures.time_resolving(hf, samples)
        hot_info = await stream_info(hf.connection, HOT_STREAM)
        log_info = await stream_info(hf.connection, EVENTS_STREAM)
        screen.step("archiving to the lake")
        flushed = await control.flush(hf.connection)
        evicted = await control.evict(hf.connection, 0.0)
        screen.step("resolving from the lake")
        cold = await figures.time_resolving(hf, samples)
        lake = (await hf.stats())["lake"]
        lineage = await _lineage(hf, events)

    screen.step("asking DuckDB")
    storage = Storage(
        contexts=hot_info.messages,
        hot_bytes=hot_info.bytes,
        events=log_info.messages,
        event_bytes=log_info.bytes,
        lake_bytes=lake["bytes"],
        lake_files=lake["files"],
    )
    question, sql = (
        ("Which modules have the most findings?", AGENTS_SQL)
        if traces is None
        else ("What do the traces consist of?", TRACES_SQL)
    )
    return Story(
        modules=modules,
        imported=counts,
        work_s=round(work_s, 3),
        storage=storage,
        deduplication=await asyncio.to_thread(figures.measure_deduplication, system.lake, namespace),
        bytes=await asyncio.to_thread(
            figures.measure_bytes,
            system.lake,
            namespace,
            referenced=hot_info.bytes + log_info.bytes,
            archived=storage.lake_bytes,
        ),
        archived=Archived(flush_s=flushed.seconds, purged=evicted.purged, left=evicted.left),
        resolved=figures.compare(hot, cold),
        answer=await asyncio.to_thread(figures.ask, system.lake, question, sql),
        lineage=lineage,
        durability=system.target.durability or "unknown",
        seconds=round(time.perf_counter() - started, 3),
    )


async def _shown_events(hf: Holdfast, session: str | None) -> list[Event]:
    """Some events whose contexts differ in kind: those of one module, or the first of the deepest early session."""
    if session is not None:
        related = [event async for event in hf.query(session=session, correlation=_SHOWN_MODULE)]
        others = [event async for event in hf.query(session=session, name=REVIEWED, limit=_SAMPLES)]
        return [*related, *others]
    deepest: Event | None = None
    async for event in hf.query(limit=20 * _MOST_SHOWN):
        if deepest is None or event.event_depth > deepest.event_depth:
            deepest = event
    assert deepest is not None, "an import with steps has events"
    return [event async for event in hf.query(session=deepest.session_id, limit=_MOST_SHOWN)]


async def _lineage(hf: Holdfast, events: list[Event]) -> list[LineageStep]:
    """The last events on the way from a root to the deepest of what was shown: a branch of a large tree."""
    last = max(events, key=lambda event: event.event_depth)
    chain = (await hf.chain(last))[-_MOST_SHOWN:]
    contexts = (await hf.resolve_many(step.context_ref for step in chain if step.context_ref)).found
    return [LineageStep(step, gist_of(contexts[step.context_ref]) if step.context_ref else "") for step in chain]


def gist_of(context: Context) -> str:
    """Returns what a context is about, in a few words: by its kind, or by how it begins."""
    body = context.body
    match context.kind:
        case "source":
            return f"{str(body).count(chr(10)):,} lines of Python"
        case "measures":
            return f"{body['functions']} functions, {body['coverage']:.0%} of what is public documented"
        case "review":
            return f"{body['findings']} findings" + "".join(f", {n} {rule}" for rule, n in body["by_rule"].items())
        case _:
            text = cast("dict[str, Any]", body).get("content") if isinstance(body, dict) else None
            return " ".join(str(text or context.raw[:500].decode(errors="replace")).split())[:_GIST_CHARS]
