"""Trimming: superseded revisions of named contexts leave the hot tier once they are archived and old.

The archiver's last step, like purging, and never needed for correctness: the hot tier may hold more of a key's chain
than it must, always a suffix of it, and the lake holds all.  Three cursors follow the stream at a distance, each as old
as what it takes away:

============  ==================================================================================================
the hot       below the newest revision of each subject that has grown this old, everything goes
window
10 minutes    of keys with a limit of versions: what stands below the newest so many goes
30 days       a deleted or expired key goes with its tombstone; first the stream's metadata says so, for 10 minutes,
              so that every client knows that a key without a head must be asked of the lake
============  ==================================================================================================

Cursors are in memory: after a restart the stream is read from its beginning, and purges that find nothing are made
again.  A process killed between two purges has made some of them; each stands for itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import msgspec

from holdfast.schemas.errors import HoldfastError, UnavailableError
from holdfast.schemas.failpoints import failpoint
from holdfast.schemas.rows import Position
from holdfast.streams.decode import decode_key_version
from holdfast.streams.key_log import KeyLog
from holdfast.streams.messages import parse_time_ms
from holdfast.streams.pull import StreamReader, read_one
from holdfast.streams.server_clock import ServerClock
from holdfast.streams.topology import (
    StreamInfo,
    first_seq_since,
    mark_heads_archived,
    purge_subject,
    stream_info,
    subject_counts,
)
from holdfast.streams.wire import KEYS_STREAM, parse_key_subject
from holdfast.workers.policy_reader import PolicyReader
from holdfast.workers.purge import ANCHORS_READ, check_anchors
from holdfast.workers.trim_plan import (
    HEAD_AGE_S,
    YOUNG_S,
    Revision,
    SubjectPurge,
    newest_of_each,
    oldest_kept,
    plan_heads,
    plan_limited,
    plan_superseded,
)

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from holdfast.lake.index import LakeIndex
    from holdfast.lake.lake import Lake
    from holdfast.schemas.rows import Anchor
    from holdfast.streams.connection import Connection
    from holdfast.streams.hot import HotTier

logger = logging.getLogger(__name__)

T = TypeVar("T")

BATCH: Final = 2_000
"""Revisions looked at together: some 600 KB."""

ROUND_S: Final = 1.0
"""How long a round of the background may take: archiving waits meanwhile."""

IN_FLIGHT: Final = 64
"""Purges under way at once; the server makes some 10,000 a second however many there are."""

CursorName = Literal["superseded", "limited", "heads"]

Plan = Callable[[list[Revision], "_Snapshot"], Awaitable[list[SubjectPurge] | None]]
"""Returns what revisions that have grown old let go; None when the cursor must not pass them yet."""


class Trimmed(msgspec.Struct):
    """What was taken away: revisions, and of how many keys.  ``is_done``: nothing more was due."""

    keys: int = 0
    revisions: int = 0
    is_done: bool = True


class _Snapshot(msgspec.Struct, frozen=True):
    """What a round goes by: a durable watermark, and a stream that is what was archived."""

    info: StreamInfo
    watermark: Position
    at_ms: int


class Trimmer:
    """Trims the keys stream.  One call at a time; the archiver sees to that.

    ``clock_ms`` stands in for the server's clock.
    """

    def __init__(
        self,
        connection: Connection,
        hot: HotTier,
        lake: Lake,
        index: LakeIndex,
        executor: ThreadPoolExecutor,
        *,
        hot_window_s: float,
        clock_ms: Callable[[], int] | None = None,
    ) -> None:
        self._connection = connection
        self._lake = lake
        self._index = index
        self._executor = executor
        self._log = KeyLog(connection)
        self._policies = PolicyReader(connection, hot, lake, index)
        self._clock = ServerClock(connection)
        self._clock_ms = clock_ms
        self._ages_s: dict[CursorName, float] = {
            "superseded": max(YOUNG_S, hot_window_s),
            "limited": YOUNG_S,
            "heads": max(YOUNG_S, HEAD_AGE_S),
        }
        self._cursors: dict[CursorName, int] = {}
        self._epoch = ""
        self._marked_at_ms: int | None = None

    async def round(self, *, budget_s: float | None = ROUND_S) -> Trimmed:
        """Trims what has grown old since the last round, for about ``budget_s`` seconds (None: until all is done).

        Raises DivergedError, taking nothing away, when the stream is not what was archived.
        """
        done = Trimmed()
        now = await self._snapshot()
        if now is None:
            return done
        ends_at = None if budget_s is None else time.monotonic() + budget_s
        plans: dict[CursorName, Plan] = {
            "superseded": self._superseded,
            "limited": self._limited,
            "heads": self._heads,
        }
        for name, plan in plans.items():
            await self._advance(name, plan, now, ends_at, done)
        self._tell(done)
        return done

    async def trim_to(self, most_versions: int) -> Trimmed:
        """Trims every key to its newest ``most_versions``; what is younger than 10 minutes stays all the same."""
        done = Trimmed()
        now = await self._snapshot()
        if now is None:
            return done
        young = await self._first_younger(now, YOUNG_S)
        async for counts in subject_counts(self._connection, KEYS_STREAM):
            crowded = [subject for subject, count in counts.items() if count > most_versions]
            for start in range(0, len(crowded), IN_FLIGHT):
                some = crowded[start : start + IN_FLIGHT]
                seqs = await asyncio.gather(
                    *(self._place_of_oldest_kept(subject, most_versions, now) for subject in some)
                )
                places = {subject: seq for subject, seq in zip(some, seqs, strict=True) if seq is not None}
                await self._purge(plan_limited(places, young), done)
        self._tell(done)
        return done

    async def close(self) -> None:
        """Waits for what is under way and closes the files of the lake."""
        await self._policies.close()
        await self._log.close()

    async def _snapshot(self) -> _Snapshot | None:
        """What may be gone by now; None when nothing is archived of this life of the stream."""

        def read() -> tuple[Position | None, list[Anchor]]:
            # Whoever purges first makes durable what it relies on: the commit may be another process's.
            watermark = self._lake.durable_watermark("key_versions")
            anchors = [] if watermark is None else self._lake.anchors("key_versions", most=ANCHORS_READ)
            self._index.refresh(self._lake)
            return watermark, anchors

        watermark, anchors = await self._in_thread(read)
        info = await stream_info(self._connection, KEYS_STREAM)
        if watermark is None or info.epoch != watermark.epoch or not info.messages:
            return None
        await check_anchors(self._connection, "key_versions", info, anchors)
        if self._epoch != info.epoch:
            self._epoch = info.epoch
            self._cursors.clear()
            self._marked_at_ms = None
        at_ms = await self._clock.now_ms() if self._clock_ms is None else self._clock_ms()
        return _Snapshot(info, watermark, at_ms)

    async def _first_younger(self, now: _Snapshot, age_s: float) -> int | None:
        """The sequence of the first message younger than this; None when there is none, as the leader knows."""
        since_ms = now.at_ms - int(age_s * 1000)
        first = await first_seq_since(self._connection, KEYS_STREAM, since_ms)
        if first is None:
            # Any replica may have answered that.  To one that is behind, nothing is young.
            # Not of the last message there is: that may be a tombstone that has left.
            state = (await self._connection.api(f"STREAM.INFO.{KEYS_STREAM}"))["state"]
            if parse_time_ms(state["last_ts"]) >= since_ms:
                raise UnavailableError("a replica of the keys stream has not caught up yet")
        return first

    async def _advance(
        self,
        name: CursorName,
        plan: Plan,
        now: _Snapshot,
        ends_at: float | None,
        done: Trimmed,
    ) -> None:
        """Moves a cursor over what is archived and old enough, as far as the time goes."""
        young = await self._first_younger(now, self._ages_s[name])
        last = now.watermark.seq if young is None else min(now.watermark.seq, young - 1)
        start = max(self._cursors.get(name, 0), now.info.first_seq)
        async with _reading(self._connection, start) as reader:
            while reader.next_seq <= last:
                if ends_at is not None and time.monotonic() >= ends_at:
                    done.is_done = False
                    return
                messages, _ = await reader.read(limit=BATCH, up_to=last)
                revisions: list[Revision] = []
                for message in messages:
                    try:
                        revisions.append(Revision(message.subject, decode_key_version(message)))
                    except HoldfastError:
                        continue  # a dead letter: it goes with what supersedes it
                purges = await plan(await self._archived(revisions, now.info), now)
                if purges is None:
                    return
                await self._purge(purges, done)
                # Only now: what a failed round has not taken, the next one takes.
                self._cursors[name] = reader.next_seq

    async def _archived(self, revisions: list[Revision], info: StreamInfo) -> list[Revision]:
        """Those that the lake holds as they stand here; another of the same number and key is a dead letter."""
        keys = [(revision.row.namespace, revision.row.key, revision.row.version) for revision in revisions]
        places = await self._in_thread(lambda: self._index.find_key_versions(keys))
        return [
            revision
            for revision, key in zip(revisions, keys, strict=True)
            if (place := places.get(key)) is not None
            and place.seq == revision.row.seq
            and (place.epoch == info.epoch or place.seq < info.epoch_start)
        ]

    async def _superseded(self, revisions: list[Revision], _: _Snapshot) -> list[SubjectPurge]:
        return plan_superseded(revisions)

    async def _heads(self, revisions: list[Revision], now: _Snapshot) -> list[SubjectPurge] | None:
        purges = plan_heads(revisions)
        if not purges:
            return purges
        if self._marked_at_ms is None:
            if not now.info.heads_archived:
                await mark_heads_archived(self._connection)
            # Since when it has been marked is not known after a restart: the time is given once more.
            self._marked_at_ms = now.at_ms
        return purges if now.at_ms - self._marked_at_ms >= YOUNG_S * 1000 else None

    async def _limited(self, revisions: list[Revision], now: _Snapshot) -> list[SubjectPurge]:
        oldest: dict[str, int] = {}
        for revision in newest_of_each(revisions):
            most = await self._policies.max_versions(revision.row.namespace, revision.row.key)
            version = oldest_kept(revision, most)
            if version is not None:
                seq = await self._place(revision.subject, revision.row.namespace, revision.row.key, version, now)
                if seq is not None:
                    oldest[revision.subject] = seq
        return plan_limited(oldest)

    async def _place_of_oldest_kept(self, subject: str, most_versions: int, now: _Snapshot) -> int | None:
        try:
            namespace, key = parse_key_subject(subject)
        except HoldfastError:
            return None  # none of ours: its messages are dead letters
        head = (await self._log.head(namespace, key)).row
        if head is None:
            return None
        version = oldest_kept(Revision(subject, head), most_versions)
        if version is None:
            return None
        seq = await self._place(subject, namespace, key, version, now)
        return seq if seq is not None and seq <= now.watermark.seq else None

    async def _place(self, subject: str, namespace: str, key: str, version: int, now: _Snapshot) -> int | None:
        """The sequence at which an archived version stands in the stream as it is now."""
        wanted = (namespace, key, version)
        places = await self._in_thread(lambda: self._index.find_key_versions([wanted]))
        place = places.get(wanted)
        if place is None or place.epoch == now.info.epoch:
            return None if place is None else place.seq
        # Archived in an earlier life of the stream: it may stand there still, or something else may.
        if place.seq >= now.info.epoch_start:
            return None
        message = await read_one(self._connection, now.info, place.seq)
        if message is None or message.subject != subject:
            return None
        try:
            return place.seq if decode_key_version(message).version == version else None
        except HoldfastError:
            return None

    async def _purge(self, purges: Sequence[SubjectPurge], done: Trimmed) -> None:
        for start in range(0, len(purges), IN_FLIGHT):
            failpoint("archiver.before_trim")
            taken = await asyncio.gather(
                *(
                    purge_subject(self._connection, KEYS_STREAM, purge.subject, purge.below_seq)
                    for purge in purges[start : start + IN_FLIGHT]
                )
            )
            failpoint("archiver.after_trim")
            done.keys += sum(count > 0 for count in taken)
            done.revisions += sum(taken)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def _tell(self, done: Trimmed) -> None:
        if done.revisions:
            logger.info(
                "superseded revisions trimmed",
                extra={"action": "trimmed", "keys": done.keys, "revisions": done.revisions},
            )


@asynccontextmanager
async def _reading(connection: Connection, start: int) -> AsyncGenerator[StreamReader]:
    reader = StreamReader(connection, KEYS_STREAM, max(1, start), allow_gaps=True)
    try:
        yield reader
    finally:
        await reader.close()
