"""One cycle of each worker that moves or removes data, each in a process of its own, and a place to do it in.

Holds no tests itself.  Every cycle begins with the process and ends with it: connecting, opening lake and index, the
work, the drain.  Workers are the product's own, put together as the product does it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgspec

import holdfast.lake.table
import holdfast.workers.trim
from holdfast.client import Holdfast, connect
from holdfast.lake import Lake, compact, vacuum
from holdfast.lake.index import LakeIndex
from holdfast.schemas.ids import derived_event_id, now_ms
from holdfast.schemas.refs import compute_digest
from holdfast.streams.connection import open_connection
from holdfast.streams.events import NewEvent
from holdfast.streams.hot import HotTier
from holdfast.streams.publish import Outgoing, publish
from holdfast.streams.topology import ensure_topology
from holdfast.streams.wire import H_MSG_ID, KEYS_PREFIX
from holdfast.workers.control import flush
from holdfast.workers.janitor import Janitor
from holdfast.workers.settings import WorkerSettings
from holdfast.workers.system import run_workers
from holdfast.workers.trim import Trimmer
from tests.campaigns.plain_reading import MAY_COME, STREAMS, Seen, see
from tests.running import put_version, target_of

NAMESPACE: Final = "swept"
KEY_COUNT: Final = 3
DAY_S: Final = 86_400.0
MONTH_S: Final = 31 * DAY_S
COMMITS_PER_CHECKPOINT: Final = 3
"""In the forks of these campaigns, instead of 50: so that checkpoints, and the clean-up of the log behind them, are met
within a few commits."""

WINDOW_S: Final = 0.1
"""For how long the server refuses a repeated id: what is younger is not purged from the event log."""

_ROUND_S: Final = 30.0
"""A round is due at the start of the archiver, and no second one within the cycle."""


class Place(msgspec.Struct, frozen=True):
    """A folder with the data of a server, a lake and the indices of its workers; and where that server listens."""

    folder: Path
    url: str

    @property
    def lake(self) -> Path:
        """The lake's directory."""
        return self.folder / "lake"

    @property
    def temporary(self) -> Path:
        """What the processes of this place take for the system's folder for temporary files."""
        return self.folder / "tmp"

    def settings(self, role: str = "archiver", **changes: Any) -> WorkerSettings:
        """Settings of workers here; nothing is purged by them unless changed."""
        values: dict[str, Any] = {
            "lake": self.lake,
            "index": self.folder / "index" / role,
            "archive_interval_s": _ROUND_S,
            "hot_window_s": DAY_S,
            "duplicate_window_s": WINDOW_S,
            **changes,
        }
        return WorkerSettings(**values)

    def claim_temporary_files(self) -> None:
        """Has this process, and its forks, keep temporary files in this place."""
        self.temporary.mkdir(parents=True, exist_ok=True)
        # Set, not left to be found: the standard library tries a folder by a file, which a kill would leave there.
        tempfile.tempdir = str(self.temporary)

    def age_temporary_files(self, by_s: float) -> None:
        """Makes the temporary files of this place older."""
        for path in self.temporary.iterdir():
            moment = path.stat().st_mtime - by_s
            os.utime(path, (moment, moment))

    def listing(self) -> list[str]:
        """Returns the name of every file outside of the server's data."""
        wanted = [self.lake, self.folder / "index", self.temporary]
        return [str(path.relative_to(self.folder)) for top in wanted for path in top.rglob("*") if path.is_file()]


def copy_place(source: Path, target: Path) -> None:
    """Makes ``target`` what ``source`` is; the server of neither may run."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def prepare_process() -> None:
    """Has checkpoints come often in this process."""
    setattr(holdfast.lake.table, "CHECKPOINT_INTERVAL", COMMITS_PER_CHECKPOINT)  # noqa: B010  it is final elsewhere


# -- the cycles


async def archive(place: Place) -> None:
    """Pull, Parquet, fsync, rename, commit, index, watermark, views; what is archived stays in the streams."""
    await archiver_round(place, place.settings())


async def purge(place: Place) -> None:
    """The same, and what is archived leaves the hot tier and the event log at once."""
    # Superseded versions would go as soon as the data that a sweep began with is ten minutes old: a later point would
    # find more to do than the first.  They are the cycle ``trim``.
    setattr(holdfast.workers.trim, "YOUNG_S", MONTH_S)  # noqa: B010  it is final elsewhere
    await archiver_round(place, place.settings(hot_window_s=0.0))


async def archiver_round(place: Place, settings: WorkerSettings) -> None:
    """A round of an archiver, in a process that begins and ends with it."""
    prepare_process()
    async with run_workers(target_of(place.url), ["archiver"], settings) as workers:
        # The first round is under way: this waits for its end, then archives what came since.
        await flush(workers.connection)


async def merge(place: Place) -> None:
    """Merges all files of each day, removes those that were merged and what nobody needs, and cleans the log."""
    prepare_process()

    def work() -> None:
        with Lake.open(place.lake) as lake:
            tomorrow_ms = now_ms() + int(DAY_S * 1000)
            compact(lake, at_ms=tomorrow_ms)
            vacuum(lake, 0, orphans_older_than_s=0, log_older_than_s=0, at_ms=tomorrow_ms)

    await asyncio.to_thread(work)


async def trim(place: Place) -> None:
    """Takes superseded versions, then tombstones, out of the hot tier, as will be done in a month."""
    prepare_process()
    settings = place.settings()
    later_ms = now_ms() + int(MONTH_S * 1000)
    moments = iter((later_ms, later_ms + 601_000))
    async with open_connection(target_of(place.url), connect_s=10.0) as connection:
        lake = await asyncio.to_thread(Lake.open, settings.lake)
        with ThreadPoolExecutor(1) as executor, LakeIndex.open(settings.index) as index:
            hot = HotTier(connection)
            trimmer = Trimmer(
                connection, hot, lake, index, executor, hot_window_s=DAY_S, clock_ms=lambda: next(moments)
            )
            try:
                # The second, ten minutes later, takes the heads: until then clients learn that they may be gone.
                await trimmer.round(budget_s=None)
                await trimmer.round(budget_s=None)
            finally:
                await trimmer.close()
                await hot.close()


async def expire(place: Place) -> None:
    """Writes the expire versions of keys whose time has come."""
    async with open_connection(target_of(place.url), connect_s=10.0) as connection:
        janitor = Janitor(connection, clock_ms=lambda: now_ms() + int(DAY_S * 1000))
        try:
            await janitor.round()
        finally:
            await janitor.close()


Cycle = Callable[["Place"], Coroutine[Any, Any, None]]

CYCLES: Final[dict[str, Cycle]] = {
    "archive": archive,
    "compact": merge,
    "purge": purge,
    "trim": trim,
    "expire": expire,
}


# -- what is archived


class Stored(msgspec.Struct):
    """What was acknowledged: by table, the name of each row that will be archived, and its sequence."""

    names: dict[str, dict[str, int]]
    next_number: int = 0


def nothing_stored() -> Stored:
    """Returns what a new place holds."""
    return Stored({table: {} for table in STREAMS})


async def store(hf: Holdfast, stored: Stored, count: int) -> None:
    """Stores ``count`` contexts, as many events that refer to them, and as many versions of keys, by number."""
    numbers = range(stored.next_number, stored.next_number + count)
    stored.next_number += count
    refs = await hf.put_many([{"n": n, "text": f"step {n} " * 8} for n in numbers])
    events = [
        NewEvent(
            namespace=NAMESPACE,
            agent_id="tester",
            name="step:done",
            id=derived_event_id(NAMESPACE, str(n)),
            data={"n": n},
            context_ref=ref,
            session_id=f"s{n % 3}",
        )
        for n, ref in zip(numbers, refs, strict=True)
    ]
    await hf.publish_many(events)
    for n, ref in zip(numbers, refs, strict=True):
        # One of three keys is deleted by every seventh of its versions, one may expire.
        number, key = n // KEY_COUNT + 1, ("a", "d", "x")[n % KEY_COUNT] + "0"
        is_deleted = key == "d0" and number % 7 == 0
        await put_version(
            hf.connection,
            NAMESPACE,
            key,
            number,
            op="delete" if is_deleted else "put",
            ref=None if is_deleted else ref,
            event_id=derived_event_id(NAMESPACE, key, str(number)),
            expires_at_ms=now_ms() + 3_600_000 if key == "x0" else None,
        )
        stored.names["key_versions"][f"{NAMESPACE}.{key}/{number}"] = 0
    stored.names["contexts"] |= {ref[-32:]: 0 for ref in refs}
    stored.names["events"] |= {f"{NAMESPACE}.{event.id}": 0 for event in events}


async def store_oddities(hf: Holdfast, stored: Stored) -> None:
    """Stores an inline context, which the archiver has to store, and messages that become dead letters."""
    n = stored.next_number
    stored.next_number += 1
    body = b'{"inline":%d}' % n
    identifier = derived_event_id(NAMESPACE, "inline", str(n))
    subject, own = f"ctx.{NAMESPACE}.event.tester.odd", {H_MSG_ID: f"{NAMESPACE}.{identifier}"}
    await publish(hf.connection, Outgoing(subject, own, b'{"context":%b}' % body))
    await publish(hf.connection, Outgoing(subject, {}, b"not JSON"))
    await publish(hf.connection, Outgoing(f"{KEYS_PREFIX}{NAMESPACE}.a0", {}, b"[]"))
    stored.names["events"][f"{NAMESPACE}.{identifier}"] = 0
    stored.names["contexts"][compute_digest(NAMESPACE, "event", body)] = MAY_COME


def note_places(stored: Stored, seen: Seen) -> None:
    """Notes at which sequence what was stored stands; it was stored just now, and nothing was purged meanwhile."""
    for table, names in stored.names.items():
        for seq, name in seen.streams[table].names.items():
            if names.get(name) == 0:
                names[name] = seq
        missing = [name for name, seq in names.items() if seq == 0]
        assert not missing, f"{table}: {missing[:3]} were stored, and are not in the stream"


async def fill(place: Place, stored: Stored, count: int, *, with_oddities: bool = False) -> Stored:
    """Makes the streams where they are missing, stores, and returns what is stored now."""
    async with open_connection(place.url, connect_s=10.0) as connection:
        await ensure_topology(connection, duplicate_window_s=WINDOW_S)
        await asyncio.to_thread(Lake.open, place.lake, create=True)
    async with connect(place.url, NAMESPACE, "tester") as hf:
        await store(hf, stored, count)
        if with_oddities:
            await store_oddities(hf, stored)
    note_places(stored, await see(place.url, place.lake))
    return stored


async def fill_and_archive(place: Place, stored: Stored, *, commits: int, count: int) -> Stored:
    """Stores and archives, ``commits`` times, by one archiver."""
    prepare_process()
    async with (
        run_workers(target_of(place.url), ["archiver"], place.settings()),
        connect(place.url, NAMESPACE, "tester") as hf,
    ):
        for _ in range(commits):
            await store(hf, stored, count)
            await flush(hf.connection)
    note_places(stored, await see(place.url, place.lake))
    return stored
