"""``python -m benchmarks.embedded``: what events with an embedded context cost, and what the same events cost as
references.

Generates events of the earlier system's shape from a seed (``benchmarks.embedded_events``), with ids of two forms, and
stores them on an empty system in two ways:

* *embedded*: each event as it is, as the data of an event: nothing is taken out of it;
* *references*: by ``holdfast migrate``: lineage in columns, the form of the context stored once.

Writes down the bytes on the wire (payloads, headers and subjects of all messages that are published), in the hot tier
(as the server counts its streams), and in the lake, as archived and after compaction; how many contexts there are; the
same NDJSON under zstd; the columns of the compacted events; and how much information there is in the events, which no
form can go below.  The migrated events are verified, and written back and compared with what was generated.

The figures are bytes, not times: the same on any machine but for ids and times of storing.

Does not measure: speed, growth of the streams' indexes, real events (none are at hand).
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import msgspec
import pyarrow.parquet as pq

from benchmarks.bench import target_of
from benchmarks.embedded_events import ID_FORMS, Generated, IdForm, generate
from benchmarks.records import ROOT, conditions
from holdfast.client import Holdfast, connect
from holdfast.lake import connect as connect_lake
from holdfast.lake.compaction import compact
from holdfast.lake.lake import Lake
from holdfast.ops.embedded.form import KIND, split
from holdfast.ops.embedded.migration import AGENT, Migration
from holdfast.ops.embedded.source import LinesSource
from holdfast.ops.embedded.survey import IdSet, survey
from holdfast.ops.embedded.verification import EmbeddedStore, verify, write_back
from holdfast.ops.server import EmbeddedServer
from holdfast.ops.server_config import ServerSettings
from holdfast.schemas.ids import now_ms
from holdfast.streams.codec import seal
from holdfast.streams.events import NewEvent, encode_event
from holdfast.streams.publish import Outgoing
from holdfast.streams.tail import open_tail
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import EVENTS_STREAM, HOT_STREAM, hot_subject
from holdfast.workers.control import flush
from holdfast.workers.settings import WorkerSettings
from holdfast.workers.system import run_workers

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

EVENTS: Final = 100_000
SEED: Final = 7
RESULT: Final = ROOT / "benchmarks" / "results" / "embedded.json"
PAGE: Final = ROOT / "docs" / "migration.md"
LEVELS: Final = (3, 19)
_COMMITS: Final = 4
"""Commits of the archiver over a run, so that compaction has something to merge."""
_BEGIN: Final = "<!-- figures -->"
_END: Final = "<!-- end of figures -->"


class FormFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What one way of storing costs, in bytes."""

    wire: int
    hot: int
    lake_archived: int
    lake_compacted: int
    contexts: int
    columns: dict[str, int]


class IdFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One form of ids.  ``least_ids`` and ``least_other`` are the information content, in bytes."""

    ids: IdForm
    embedded_bytes: int
    zstd: dict[str, int]
    least_ids: int
    least_other: int
    trees: int
    embedded: FormFigures
    references: FormFigures
    verified: int
    written_back: int


class EmbeddedFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run."""

    events: int
    seed: int
    ids: list[IdFigures]
    versions: dict[str, str]
    git_commit: str


async def measure(count: int, seed: int, scratch: Path) -> EmbeddedFigures:
    """Stores the events in each way on systems of their own; raises when one does not come back as it was."""
    shared = conditions(scratch)
    figures: list[IdFigures] = []
    for ids in ID_FORMS:
        generated = generate(count, seed, ids)
        ndjson = b"".join(line + b"\n" for line in generated.lines)
        path = scratch / f"{ids}.ndjson"
        await asyncio.to_thread(path.write_bytes, ndjson)
        _say(f"{ids}: {len(ndjson):,} bytes of {count:,} events")
        embedded = await _embedded(generated, scratch / f"{ids}-embedded")
        _say(f"{ids}: embedded {embedded.lake_compacted:,} bytes in the lake")
        references, verified, written = await _references(path, ndjson, scratch / f"{ids}-references")
        _say(f"{ids}: references {references.lake_compacted:,} bytes in the lake")
        packed = {str(level): len(await asyncio.to_thread(zstd.compress, ndjson, level)) for level in LEVELS}
        figures.append(
            IdFigures(
                ids=ids,
                embedded_bytes=len(ndjson),
                zstd=packed,
                least_ids=round(generated.id_bits / 8),
                least_other=round(generated.other_bits / 8),
                trees=generated.trees,
                embedded=embedded,
                references=references,
                verified=verified,
                written_back=written,
            )
        )
    return EmbeddedFigures(events=count, seed=seed, ids=figures, versions=shared.versions, git_commit=shared.git_commit)


class _Stage:
    """An empty system with an archiver that archives when it is told to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.settings = WorkerSettings(
            lake=directory / "lake", index=directory / "index", archive_interval_s=3600, compact_interval_s=3600
        )


async def _embedded(generated: Generated, directory: Path) -> FormFigures:
    stage = _Stage(directory)
    wire = 0
    async with EmbeddedServer(ServerSettings(data=directory)) as server:
        target = target_of(server.info.nats_url)
        async with run_workers(target, ("archiver",), stage.settings) as workers, connect(target, agent=AGENT) as hf:
            lines = generated.lines
            step = -(-len(lines) // _COMMITS)
            for start in range(0, len(lines), step):
                events = [_as_data(hf.namespace, line) for line in lines[start : start + step]]
                wire += sum(encode_event(event).size for event in events)
                await hf.publish_many(events)
                await flush(workers.connection)
            hot = await _hot_bytes(hf)
    return await _figures(directory, wire=wire, hot=hot, contexts=0)


def _as_data(namespace: str, line: bytes) -> NewEvent:
    event: dict[str, Any] = msgspec.json.decode(line)
    context = event["_ksi_context"]
    # What any event has is not said twice; the context and the data stay as they are.
    data = {"data": event["data"], "_ksi_context": context}
    return NewEvent(
        namespace=namespace,
        agent_id=context["_agent_id"],
        name=event["event"],
        timestamp_ms=None,
        data=data,
    )


async def _references(path: Path, ndjson: bytes, directory: Path) -> tuple[FormFigures, int, int]:
    stage = _Stage(directory)
    source = LinesSource(path)
    found = survey(source.items(), 3600.0)
    async with EmbeddedServer(ServerSettings(data=directory)) as server:
        target = target_of(server.info.nats_url)
        async with (
            run_workers(target, ("archiver", "resolver"), stage.settings) as workers,
            connect(target, agent=AGENT) as hf,
        ):
            migration = Migration(hf, source)
            progress = await migration.run()
            wire = _wire(hf.namespace, source, found.ids)
            hot = await _hot_bytes(hf)
            await flush(workers.connection)
            with connect_lake(stage.settings.lake, tail=open_tail(target), live=("events", "contexts")) as sql:
                store = EmbeddedStore(sql, hf.namespace)
                report = await asyncio.to_thread(verify, store, hf.namespace, source, found.ids)
                back = io.BytesIO()
                written = await asyncio.to_thread(write_back, store, progress, back)
    if not report.ok or back.getvalue() != ndjson:
        raise RuntimeError(f"{path} did not come back as it was: {report}")
    figures = await _figures(directory, wire=wire, hot=hot, contexts=migration.counts.contexts)
    return figures, report.equal, written


def _wire(namespace: str, source: LinesSource, ids: IdSet) -> int:
    size = 0
    forms: set[str] = set()
    for item in source.items():
        parts = split(namespace, item.text, known=ids.__contains__, agent=AGENT)
        size += parts.message().size
        if parts.ref not in forms:
            forms.add(parts.ref)
            for stored in seal(namespace, KIND, parts.form, content_type=parts.content_type):
                size += Outgoing(hot_subject(namespace, stored.digest), stored.headers, stored.payload).size
    return size


async def _hot_bytes(hf: Holdfast) -> int:
    return sum([(await stream_info(hf.connection, stream)).bytes for stream in (EVENTS_STREAM, HOT_STREAM)])


async def _figures(directory: Path, *, wire: int, hot: int, contexts: int) -> FormFigures:
    lake = Lake.open(directory / "lake")
    archived = _lake_bytes(lake)
    # As of the day after tomorrow: then what is today's is compacted too.
    await asyncio.to_thread(lambda: compact(lake, at_ms=now_ms() + 2 * 86_400_000))
    lake.refresh()
    return FormFigures(
        wire=wire,
        hot=hot,
        lake_archived=archived,
        lake_compacted=_lake_bytes(lake),
        contexts=contexts,
        columns=column_bytes(lake),
    )


def _lake_bytes(lake: Lake) -> int:
    return sum(lake.statistics(table).bytes for table in ("events", "contexts"))


def column_bytes(lake: Lake) -> dict[str, int]:
    """Returns the bytes of each column of the events, and those that belong to none: footers and Bloom filters."""
    snapshot = lake.snapshot("events")
    sizes: dict[str, int] = {}
    total = 0
    for name in snapshot.files:
        path = snapshot.directory / name
        total += path.stat().st_size
        metadata: Any = pq.ParquetFile(path).metadata
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                sizes[column.path_in_schema] = sizes.get(column.path_in_schema, 0) + column.total_compressed_size
    sizes["(footer, Bloom filters)"] = total - sum(sizes.values())
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def markdown_table(figures: EmbeddedFigures) -> str:
    """Returns the figures as tables: bytes an event, and the share of the embedded NDJSON."""
    lines: list[str] = []
    count = figures.events
    for row in figures.ids:
        whole = row.embedded_bytes

        def cell(value: int, whole: int = whole) -> str:
            return f"{value / count:.1f} ({value / whole:.1%})"

        title = "`evt_` and 8 hexadecimal digits" if row.ids == "evt" else "UUIDv7"
        lines += [
            f"Ids: {title}. {count:,} events in {row.trees:,} trees, {whole / count:.1f} bytes each as NDJSON.",
            "",
            "| bytes an event (share of the NDJSON) | embedded | references |",
            "| --- | ---: | ---: |",
        ]
        for label, field in (
            ("on the wire", "wire"),
            ("hot tier", "hot"),
            ("lake, as archived", "lake_archived"),
            ("lake, compacted", "lake_compacted"),
        ):
            pair = (getattr(row.embedded, field), getattr(row.references, field))
            lines.append(f"| {label} | {cell(pair[0])} | {cell(pair[1])} |")
        lines.append(f"| contexts | {row.embedded.contexts:,} | {row.references.contexts:,} |")
        packed = ", ".join(f"zstd {level}: {cell(size)}" for level, size in row.zstd.items())
        least = f"ids {cell(row.least_ids)}, all else {cell(row.least_other)}"
        top = ", ".join(
            f"`{name}` {size / count:.1f}" for name, size in row.references.columns.items() if size / count >= 0.1
        )
        lines += [
            "",
            f"The NDJSON as one stream, which can only be read from its beginning: {packed}.",
            f"What there is to know, which no form goes below: {least}.",
            f"Columns of the compacted events, bytes an event: {top}.",
            "",
        ]
    return "\n".join(lines).rstrip()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measures, prints the table or JSON, writes the record and the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.embedded", description="what embedded contexts cost, and what references cost"
    )
    parser.add_argument("--events", type=int, default=EVENTS, help="how many")
    parser.add_argument("--seed", type=int, default=SEED, help="which")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--write", action="store_true", help="write JSON and table into the project")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="holdfast-embedded-") as scratch:
        figures = asyncio.run(measure(options.events, options.seed, Path(scratch)))
    formatted = msgspec.json.format(msgspec.json.encode(figures), indent=1)
    print(formatted.decode() if options.json else markdown_table(figures))
    if options.write:
        RESULT.write_bytes(formatted + b"\n")
        before, _, rest = PAGE.read_text().partition(_BEGIN)
        _, _, after = rest.partition(_END)
        PAGE.write_text(f"{before}{_BEGIN}\n{markdown_table(figures)}\n{_END}{after}")


if __name__ == "__main__":
    main()
