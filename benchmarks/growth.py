"""``python -m benchmarks.growth``: what a conversation costs that is stored after every turn.

Takes the longest recorded sessions, stores each as one named context that grows by a step a turn (``hf.keys.append``),
and writes down after every turn what the server's streams hold (bodies and versions, as the server counts its own
bytes), and at the end what the lake holds, as archived and after compaction.  Beside it:

* A: each step once, as compact JSON; plain, each step compressed by itself (zstd 3), and as one zstd stream;
* B: after each turn the whole conversation so far (what embedding it in each record costs), the same three ways.

Every version is read again at the end by another client and compared.  The figures are bytes, not times: the same on
any machine but for ids and times that compress a little differently.  Writes JSON, and the table and the plot of
``docs/growing-bodies.md``.  Without recorded traces it says so and ends.

Does not measure: speed (``bench_keys``), several sessions written at the same time (``--interleaved`` does).
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.bench import recorded_traces, target_of
from benchmarks.growth_report import markdown_table, plot
from benchmarks.records import ROOT, conditions
from holdfast.client import Holdfast, connect
from holdfast.lake.compaction import compact
from holdfast.lake.lake import Lake
from holdfast.ops.server import EmbeddedServer
from holdfast.ops.server_config import ServerSettings
from holdfast.schemas.ids import now_ms
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import HOT_STREAM, KEYS_STREAM
from holdfast.workers.control import flush
from holdfast.workers.settings import WorkerSettings
from holdfast.workers.system import run_workers

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SESSIONS: Final = 20
TURNS_A_COMMIT: Final = 15
"""Turns of interleaved sessions between two commits of the archiver, about as many commits as there are sessions."""

LEVEL: Final = 3
_BEGIN: Final = "<!-- figures -->"
_END: Final = "<!-- end of figures -->"
_LINE: Final = msgspec.json.Decoder(dict[str, Any])
_ENCODER: Final = msgspec.json.Encoder(order="sorted")


class Session(msgspec.Struct, frozen=True):
    """A recorded session: its steps as they are in the file."""

    name: str
    steps: list[dict[str, Any]]


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """What had been stored after a turn, in bytes; cumulative."""

    a: int
    a_zstd: int
    b: int
    b_zstd: int
    hot_bodies: int
    hot_versions: int


class SessionFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One session, after its last turn; streams are compressed as a whole."""

    name: str
    turns: int
    last: Turn
    a_zstd_stream: int
    b_zstd_stream: int


class GrowthFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run."""

    sessions: list[SessionFigures]
    first_session_turns: list[Turn]
    lake_archived: int
    lake_compacted: int
    interleaved: bool
    versions: dict[str, str]
    git_commit: str


def longest_sessions(folder: Path, count: int) -> list[Session]:
    """Returns the ``count`` sessions with most steps, longest first."""
    steps: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.steps.jsonl.gz")):
        with gzip.open(path, "rb") as lines:
            for line in lines:
                step = _LINE.decode(line)
                steps.setdefault(step["session_id"], []).append(step)
    chosen = sorted(steps.items(), key=lambda item: (-len(item[1]), item[0]))[:count]
    return [Session(name, found) for name, found in chosen]


async def measure(sessions: Sequence[Session], scratch: Path, *, interleaved: bool) -> GrowthFigures:
    """Stores the sessions on an empty system and returns the figures; raises when a version does not come back."""
    shared = conditions(scratch)
    settings = WorkerSettings(
        lake=scratch / "lake", index=scratch / "index", archive_interval_s=3600, compact_interval_s=3600
    )
    async with EmbeddedServer(ServerSettings(data=scratch)) as server:
        target = target_of(server.info.nats_url)
        async with (
            run_workers(target, ("archiver", "resolver"), settings) as workers,
            connect(target, agent="growth") as hf,
        ):
            turns: dict[str, list[Turn]] = {}
            if interleaved:
                await _store_interleaved(hf, sessions, workers.connection)
                turns[sessions[0].name] = []
            else:
                for session in sessions:
                    turns[session.name] = await _store(hf, session)
                    # A commit for each, as a running archiver would make: compaction has something to merge.
                    await flush(workers.connection)
                    _say(f"{session.name}: {len(session.steps)} turns")
            await flush(workers.connection)
            archived = _parquet_bytes(scratch / "lake")
            await _check(target, sessions)
        lake = Lake.open(scratch / "lake")
        # As of the day after tomorrow: then what is today's is compacted too.
        await asyncio.to_thread(lambda: compact(lake, at_ms=now_ms() + 2 * 86_400_000))
        lake.refresh()
        compacted = sum(lake.statistics(table).bytes for table in ("contexts", "key_versions"))
    figures = [] if interleaved else [_figures(session, turns[session.name]) for session in sessions]
    return GrowthFigures(
        sessions=figures,
        first_session_turns=turns[sessions[0].name],
        lake_archived=archived,
        lake_compacted=compacted,
        interleaved=interleaved,
        versions=shared.versions,
        git_commit=shared.git_commit,
    )


async def _store(hf: Holdfast, session: Session) -> list[Turn]:
    bodies, versions = await _stream_bytes(hf.connection)
    turns: list[Turn] = []
    encoded: list[bytes] = []
    a = a_zstd = b = b_zstd = 0
    for step in session.steps:
        await hf.keys.append(_key(session), step)
        line = _ENCODER.encode(step)
        encoded.append(line)
        whole = b"[" + b",".join(encoded) + b"]"
        a += len(line)
        a_zstd += len(zstd.compress(line, LEVEL))
        b += len(whole)
        b_zstd += len(zstd.compress(whole, LEVEL))
        bodies_now, versions_now = await _stream_bytes(hf.connection)
        turns.append(
            Turn(
                a=a,
                a_zstd=a_zstd,
                b=b,
                b_zstd=b_zstd,
                hot_bodies=bodies_now - bodies,
                hot_versions=versions_now - versions,
            )
        )
    return turns


async def _store_interleaved(hf: Holdfast, sessions: Sequence[Session], connection: Connection) -> None:
    for turn in range(max(len(session.steps) for session in sessions)):
        if turn % TURNS_A_COMMIT == 0:
            await flush(connection)
        for session in sessions:
            if turn < len(session.steps):
                await hf.keys.append(_key(session), session.steps[turn])


async def _check(target: Any, sessions: Sequence[Session]) -> None:
    """Another client reads the newest version of each session, and every version of the first."""
    async with connect(target, agent="reader", cache_bytes=0) as reader:
        for session in sessions:
            value = await reader.keys.get(_key(session))
            if value.body != session.steps or value.version != len(session.steps):
                raise RuntimeError(f"{session.name} did not come back as it was stored")
        first = sessions[0]
        async for version in reader.keys.history(_key(first)):
            if (await version.load()).body != first.steps[: version.version]:
                raise RuntimeError(f"version {version.version} of {first.name} is not what it was")


def _figures(session: Session, turns: list[Turn]) -> SessionFigures:
    encoded = [_ENCODER.encode(step) for step in session.steps]
    a_stream = len(zstd.compress(b"\n".join(encoded), LEVEL))
    compressor = zstd.ZstdCompressor(level=LEVEL)
    b_stream = 0
    for end in range(1, len(encoded) + 1):
        b_stream += len(compressor.compress(b"[" + b",".join(encoded[:end]) + b"]\n"))
    b_stream += len(compressor.flush())
    return SessionFigures(
        name=session.name, turns=len(turns), last=turns[-1], a_zstd_stream=a_stream, b_zstd_stream=b_stream
    )


def _key(session: Session) -> str:
    return f"session.{session.name}"


async def _stream_bytes(connection: Connection) -> tuple[int, int]:
    return (await stream_info(connection, HOT_STREAM)).bytes, (await stream_info(connection, KEYS_STREAM)).bytes


def _parquet_bytes(lake: Path) -> int:
    return sum(file.stat().st_size for file in lake.rglob("*.parquet"))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measures, prints the table, writes the records and the plots."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description="what a conversation costs that is stored after every turn"
    )
    parser.add_argument("--sessions", type=int, default=SESSIONS, help="how many of the longest")
    parser.add_argument("--interleaved", action="store_true", help="all sessions at once, a turn of each in turn")
    parser.add_argument("--write", action="store_true", help="write JSON, table and plots into the project")
    options = parser.parse_args()
    folder = recorded_traces()
    if folder is None:
        _say("no recorded traces: set HOLDFAST_TEST_DATA to their folder")
        return
    sessions = longest_sessions(folder, options.sessions)
    with tempfile.TemporaryDirectory(prefix="holdfast-growth-") as scratch:
        figures = asyncio.run(measure(sessions, Path(scratch), interleaved=options.interleaved))
    print(markdown_table(figures))
    if options.write:
        name = "growth-interleaved.json" if options.interleaved else "growth.json"
        (ROOT / "benchmarks" / "results" / name).write_bytes(
            msgspec.json.format(msgspec.json.encode(figures), indent=1) + b"\n"
        )
        if not options.interleaved:
            (ROOT / "docs" / "growing-session.svg").write_text(plot(figures))
            page = ROOT / "docs" / "growing-bodies.md"
            before, _, rest = page.read_text().partition(_BEGIN)
            _, _, after = rest.partition(_END)
            page.write_text(f"{before}{_BEGIN}\n{markdown_table(figures)}\n{_END}{after}")


if __name__ == "__main__":
    main()
