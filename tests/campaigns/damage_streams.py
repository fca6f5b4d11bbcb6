"""A server's own files under flips: its stream files, state files and declarations, with archiver and resolver on top.

Half of what is stored is archived, half is not.  The server is killed, or stopped cleanly, before the flip: after a
kill it reads its blocks anew and drops what follows damage, after a clean stop it believes its state file.  Then
everything starts again.  What was archived must be readable whatever was hit; what was not and is gone must be named by
its sequences, in an alarm or by ``verify``; nothing else than what was stored may be served.  Holds no tests itself.
"""

from __future__ import annotations

import asyncio
import random
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from holdfast.client import connect
from holdfast.lake import Lake
from holdfast.lake import connect as connect_lake
from holdfast.ops.verify import verify
from holdfast.schemas.errors import HoldfastError
from holdfast.schemas.rows import TABLES, Table
from holdfast.streams.connection import open_connection
from holdfast.streams.decode import decode_row
from holdfast.streams.pull import StreamReader
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import STREAM_OF_TABLE
from holdfast.workers.archive_plan import identity_of
from holdfast.workers.control import archiver_status, flush
from holdfast.workers.stream_marks import StreamMarks
from tests.campaigns.damage_lake import Flip, Verdict
from tests.running import Acknowledged, eventually, running, settings_in, target_of
from tests.support import OwnServer

if TYPE_CHECKING:
    from holdfast.schemas.problems import Problem
    from holdfast.workers.settings import WorkerName, WorkerSettings

StreamKind = Literal["blk", "index", "streams"]
STREAM_KINDS: Final[tuple[StreamKind, ...]] = ("blk", "index", "streams")
ENDINGS: Final = ("killed", "clean")

COUNT: Final = 30
"""Contexts, events and versions that are archived, and as many that are not."""

_BOTH: Final[tuple[WorkerName, ...]] = ("archiver", "resolver")
_PURGED: Final = re.compile(r"begins at (\d+), the lake ends at (\d+)")
_RANGE: Final = re.compile(r"(\d+) to (\d+)|(?:message|sequence|at) (\d+)")


class Stored(msgspec.Struct):
    """What was acknowledged: where each thing stood, by table, and up to where it was archived."""

    bodies: dict[str, Any]
    events: dict[str, str | None]
    versions: list[tuple[str, int]]
    places: dict[str, dict[str, int]]
    archived: dict[str, int]


def _settings(root: Path) -> WorkerSettings:
    # Nothing is archived but on demand, nothing scrubbed.
    return settings_in(root, archive_interval_s=3_600.0, purge_interval_s=3_600.0)


async def prepare(root: Path, ending: str) -> Stored:
    """Makes a system in a folder, ends its server in one of the ways, and returns what it holds."""
    server = OwnServer(root / "nats")
    await server.start()
    settings = _settings(root)
    acknowledged = Acknowledged()
    places: dict[str, dict[str, int]] = {}
    archived: dict[str, int] = {}
    async with running(server.url, settings, list(_BOTH)), connect(server.url) as hf:
        await acknowledged.add(server.url, COUNT)
        await flush(hf.connection)
        lake = Lake.open(settings.lake)
        for table in TABLES:
            mark = lake.watermark(table)
            archived[table] = 0 if mark is None else mark.seq
        await acknowledged.add(server.url, COUNT)
        marks = StreamMarks(settings.lake)
        for table in TABLES:
            places[table] = await _places(hf.connection, table)
            last = (await stream_info(hf.connection, STREAM_OF_TABLE[table])).last_seq
            await eventually(partial(_has_seen, marks, table, last))
    await (server.kill() if ending == "killed" else server.stop())
    return Stored(
        bodies={str(ref): body for ref, body in acknowledged.bodies.items()},
        events={str(event): ref for event, ref in acknowledged.events.items()},
        versions=sorted(acknowledged.versions),
        places=places,
        archived=archived,
    )


def _has_seen(marks: StreamMarks, table: Table, last: int) -> bool:
    mark = marks.get(STREAM_OF_TABLE[table])
    return mark is not None and mark.seq == last


async def _places(connection: Any, table: Table) -> dict[str, int]:
    info = await stream_info(connection, STREAM_OF_TABLE[table])
    reader = StreamReader(connection, info.name, 1, allow_gaps=True)
    found: dict[str, int] = {}
    try:
        while reader.next_seq <= info.last_seq:
            messages, _ = await reader.read(limit=1_000, up_to=info.last_seq)
            found |= {identity_of(decode_row(table, message)): message.seq for message in messages}
    finally:
        await reader.close()
    return found


def files_of(root: Path, kind: StreamKind) -> list[Path]:
    """Returns the files of a kind of the three streams, relative to the folder."""
    pattern = {"blk": "msgs/*.blk", "index": "msgs/index.db", "streams": "meta.*"}[kind]
    streams = set(STREAM_OF_TABLE.values())
    folders = [path for path in root.glob("nats/jetstream/*/streams/*") if path.name in streams]
    return sorted(path.relative_to(root) for folder in folders for path in folder.glob(pattern))


def draw(root: Path, kind: StreamKind, generator: random.Random) -> Flip:
    """Draws a flip of a file of a kind; each of the streams is as likely."""
    files = [path for path in files_of(root, kind) if (root / path).stat().st_size]
    path = generator.choice(files)
    size = (root / path).stat().st_size
    return Flip(
        kind, str(path), generator.randrange(size), None if generator.random() < 0.05 else generator.randrange(8)
    )


async def judge(root: Path, stored: Stored) -> Verdict:
    """Starts everything on a damaged folder, reads everything, and returns what came of it."""
    verdict = Verdict()
    server = OwnServer(root / "nats")
    settings = _settings(root)
    told: list[Problem] = []
    try:
        await server.start(with_streams=False)
        async with running(server.url, settings, list(_BOTH)), connect(server.url, cache_bytes=0) as hf:
            await _archive(hf, verdict)
            missing = await _read(hf, settings, stored, verdict)
            status = await archiver_status(hf.connection)
            told += status.problems
        async with open_connection(target_of(server.url)) as connection:
            told += (await verify(settings.lake, connection)).violations
    except HoldfastError as error:
        # Nothing is served: that is told, and the lake can still be read.
        verdict.tell("start", error.message)
        missing = await asyncio.to_thread(_read_lake, settings, stored, verdict)
    finally:
        await server.stop()
    for problem in told:
        verdict.tell(problem.object, problem.what)
    _judge_missing(missing, stored, told, verdict)
    return verdict


async def _archive(hf: Any, verdict: Verdict) -> None:
    try:
        await flush(hf.connection)
    except HoldfastError as error:
        verdict.tell("flush", error.message)


async def _read(hf: Any, settings: WorkerSettings, stored: Stored, verdict: Verdict) -> dict[Table, set[str]]:
    missing: dict[Table, set[str]] = {table: set() for table in TABLES}
    for ref, body in stored.bodies.items():
        try:
            found = (await hf.resolve(ref)).body
        except HoldfastError as error:
            verdict.tell(f"resolve {ref}", error.message)
            missing["contexts"].add(ref)
            continue
        if found != body:
            verdict.fail(f"{ref} is {str(found)[:200]}")
    try:
        events = {str(event.event_id): event.context_ref async for event in hf.query()}
    except HoldfastError as error:
        verdict.tell("query", error.message)
        events = dict(stored.events)
    for event, ref in events.items():
        if stored.events.get(event, "") != ref:
            verdict.fail(f"event {event} with {ref} was never stored")
    missing["events"] = set(stored.events) - set(events)
    try:
        versions = await asyncio.to_thread(_versions, settings, hf.connection.target.url)
    except HoldfastError as error:
        verdict.tell("versions", error.message)
        versions = set(map(tuple, stored.versions))
    missing["key_versions"] = {f"{key}@{version}" for key, version in stored.versions if (key, version) not in versions}
    for version in versions - set(map(tuple, stored.versions)):
        verdict.fail(f"version {version} was never stored")
    return missing


def _versions(settings: WorkerSettings, url: str | None) -> set[tuple[Any, ...]]:
    with connect_lake(settings.lake, url) as sql:
        return set(sql.execute("SELECT key, version FROM key_versions").fetchall())


def _read_lake(settings: WorkerSettings, stored: Stored, verdict: Verdict) -> dict[Table, set[str]]:
    """Without the server: what is archived is there."""
    with connect_lake(settings.lake) as sql:
        for table, query in (
            ("contexts", "SELECT count(*) FROM contexts_stored"),
            ("events", "SELECT count(*) FROM events"),
        ):
            [(count,)] = sql.execute(query).fetchall()
            if count < stored.archived[table]:
                verdict.fail(f"the lake holds {count} of {stored.archived[table]} archived {table}")
    return {table: set() for table in TABLES}


def _judge_missing(missing: dict[Table, set[str]], stored: Stored, told: list[Problem], verdict: Verdict) -> None:
    for table, things in missing.items():
        stream = STREAM_OF_TABLE[table]
        ranges = [span for problem in told if problem.object == stream for span in _ranges(problem.what)]
        for thing in sorted(things):
            verdict.unreadable += 1
            seq = _place(stored, table, thing)
            if seq is not None and seq <= stored.archived[table]:
                verdict.fail(f"{table} {thing} at {seq} is archived and cannot be read")
            elif seq is not None and not any(first <= seq <= last for first, last in ranges):
                verdict.fail(f"{table} {thing} at {seq} is gone, and nobody names it")


def _ranges(text: str) -> list[tuple[int, int]]:
    if (purged := _PURGED.search(text)) is not None:
        return [(int(purged[2]) + 1, int(purged[1]) - 1)]
    found = [match.groups() for match in _RANGE.finditer(text)]
    return [(int(first), int(last)) if first else (int(single), int(single)) for first, last, single in found]


def _place(stored: Stored, table: Table, thing: str) -> int | None:
    places = stored.places[table]
    if table == "contexts":
        return places.get(thing[-32:])
    return next((seq for identity, seq in places.items() if thing in identity or identity in thing), None)
