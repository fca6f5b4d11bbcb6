"""What must hold after a power cut, beyond what every torture checks: batches whole or absent, keys that have left the
hot tier, nothing of a broken commit left in the lake."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.client import Holdfast
from holdfast.lake import Lake
from holdfast.lake.commit import TORN_DIRECTORY
from holdfast.lake.compaction import COMPACTOR, vacuum
from holdfast.lake.log import LOG_DIRECTORY
from holdfast.lake.verify import verify_lake
from holdfast.lake.writer import TEMPORARY
from holdfast.ops.torture.seen import MISSING, View
from holdfast.schemas.errors import HoldfastError
from holdfast.schemas.rows import TABLES, Position, Table
from holdfast.streams.key_log import KeyLog
from holdfast.streams.pull import StreamReader
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import H_BATCH_COMMIT, H_BATCH_ID, H_BATCH_SEQUENCE, STREAM_OF_TABLE
from tests.campaigns.power_load import GRAVES, Burial
from tests.campaigns.power_worker import CHECKPOINT_EVERY

if TYPE_CHECKING:
    from holdfast.ops.torture.history import History
    from holdfast.streams.connection import Connection
    from holdfast.streams.messages import StoredMessage

_ASKED: Final = 6
"""Deleted keys that are read, and written again, after a cut."""


class Batches:
    """The atomic batches that stand in the streams, checked once each, before anything takes some of them away."""

    def __init__(self) -> None:
        self._checked: dict[Table, int] = {}
        self.seen = 0

    async def check(self, connection: Connection, lake: Lake | None) -> list[str]:
        """Returns what is wrong with the batches that have come since the last call."""
        found: list[str] = []
        for table in TABLES:
            # What is archived may have been purged or trimmed, a batch's first messages before its last.
            mark = None if lake is None else lake.watermark(table)
            first = 1 + max(self._checked.get(table, 0), 0 if mark is None else mark.seq)
            messages = [message async for message in _read(connection, STREAM_OF_TABLE[table], first)]
            if messages:
                self._checked[table] = messages[-1].seq
            groups: dict[str, list[StoredMessage]] = defaultdict(list)
            for message in messages:
                if H_BATCH_ID in message.headers:
                    groups[message.headers[H_BATCH_ID]].append(message)
            self.seen += len(groups)
            for name, members in groups.items():
                wrong = incomplete(members, is_cut_off=members[0].seq == first and first > 1)
                if wrong:
                    found.append(f"batch {name} of {STREAM_OF_TABLE[table]} at {members[0].seq}: {wrong}")
        return found


def incomplete(members: Sequence[StoredMessage], *, is_cut_off: bool = False) -> str | None:
    """Returns what a batch lacks; ``is_cut_off``: its beginning has been looked at before."""
    numbers = [int(member.headers[H_BATCH_SEQUENCE]) for member in members]
    start = numbers[0] if is_cut_off else 1
    if numbers != list(range(start, start + len(numbers))):
        return f"members {numbers[:5]} to {numbers[-1]} are not consecutive"
    if H_BATCH_COMMIT not in members[-1].headers:
        return f"it ends at member {numbers[-1]}, which does not commit it"
    return None


async def _read(connection: Connection, stream: str, first: int) -> AsyncIterator[StoredMessage]:
    last = (await stream_info(connection, stream)).last_seq
    reader = StreamReader(connection, stream, max(1, first), allow_gaps=True)
    try:
        while reader.next_seq <= last:
            messages, _ = await reader.read(limit=5_000, up_to=last)
            for message in messages:
                yield message
    finally:
        await reader.close()


def lost_in(history: History, view: View) -> int:
    """Returns how much of what was acknowledged a reader does not show: contexts, events, versions of keys."""
    contexts = {ref for ref, found in view.contexts if found != MISSING}
    events = {event.id for event in view.events}
    versions = {(seen.key, seen.version, seen.change_type) for seen in view.versions}
    return (
        len({attempt.id for attempt in history.acknowledged("context")} - contexts)
        + len({attempt.id for attempt in history.acknowledged("event")} - events)
        + sum(
            (attempt.id, history.version_of(attempt.op), attempt.op) not in versions
            for attempt in history.acknowledged("key")
        )
    )


async def check_graves(hf: Holdfast, record: Path, round_number: int) -> tuple[list[str], int]:
    """Writes some deleted keys again; returns what is wrong with their chains, and how many had left the hot tier."""
    if not record.exists():
        return [], 0
    burials = [msgspec.json.decode(line, type=Burial) for line in record.read_bytes().splitlines()]
    mine = [burial for burial in burials if burial.op == "delete" and burial.key.startswith(f"grave{round_number}.")]
    graves = Holdfast(hf.connection, GRAVES, "sexton")
    found: list[str] = []
    gone = 0
    log = KeyLog(hf.connection)
    step = max(1, len(mine) // _ASKED)
    for burial in mine[::step][:_ASKED]:
        gone += (await log.head(GRAVES, burial.key)).row is None
        try:
            again = await graves.keys.put(burial.key, {"again": round_number})
            versions = [seen.version async for seen in graves.keys.history(burial.key)]
        except HoldfastError as error:
            found.append(f"{GRAVES}/{burial.key} cannot be written again: {error}")
            continue
        if again.version != burial.version + 1 or versions != [3, 2, 1]:
            found.append(
                f"{GRAVES}/{burial.key} was deleted as version {burial.version}; written again it is version "
                f"{again.version}, its history {versions}"
            )
    await graves.close()
    await log.close()
    return found, gone


async def work_done(connection: Connection, path: Path) -> Counter[str]:
    """Returns what the workers have done since the disk was made: a campaign that hit nothing would find nothing."""
    done: Counter[str] = Counter()
    lake = await asyncio.to_thread(Lake.open, path)
    for table in TABLES:
        log = path / table / LOG_DIRECTORY
        snapshot = lake.snapshot(table)
        done["commits"] += snapshot.version
        merged = snapshot.transactions.get(COMPACTOR)
        done["merges"] += 0 if merged is None else merged.version
        done["checkpoints"] += snapshot.version // CHECKPOINT_EVERY
        done["torn commits set aside"] += sum(1 for _ in log.glob(f"{TORN_DIRECTORY}/*.json*"))
        done["torn checkpoints set aside"] += sum(1 for _ in log.glob(f"{TORN_DIRECTORY}/*.parquet*"))
        state = (await connection.api(f"STREAM.INFO.{STREAM_OF_TABLE[table]}"))["state"]
        done["messages trimmed" if table == "key_versions" else "messages purged"] += (
            state["last_seq"] - state["messages"] if state["last_seq"] else 0
        )
    return done


async def check_lake(lake: Path, before: dict[Table, Position | None]) -> list[str]:
    """Returns what is wrong with the lake after a flush: violations, watermarks gone back, leftovers that stay.

    Nobody may be writing.  ``before`` is brought up to date.
    """
    return await asyncio.to_thread(_check_lake, lake, before)


def _check_lake(path: Path, before: dict[Table, Position | None]) -> list[str]:
    found: list[str] = []
    lake = Lake.open(path)
    for table in TABLES:
        mark, earlier = lake.watermark(table), before.get(table)
        if earlier is not None and (mark is None or mark.seq < earlier.seq):
            found.append(f"the watermark of {table} went back from {earlier} to {mark}")
        before[table] = mark
    vacuum(lake, older_than_s=0.0, orphans_older_than_s=-60.0, log_older_than_s=0.0)
    for table in TABLES:
        directory = path / table
        there = {str(file.relative_to(directory)) for file in directory.glob("day=*/*.parquet")}
        stray = there.symmetric_difference(lake.snapshot(table).files)
        stray.update(str(file) for file in directory.glob(f"{TEMPORARY}/*"))
        if stray:
            found.append(f"files of {table} that no commit names, or that are not there: {sorted(stray)[:3]}")
    report = verify_lake(path)
    return found + [f"{problem.invariant} {problem.object}: {problem.what}" for problem in report.violations]
