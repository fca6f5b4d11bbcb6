"""What the whole system holds, collected for ``stats``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.lake.scrub import scrub_progress
from holdfast.schemas.ids import iso_from_ms
from holdfast.schemas.rows import TABLES, Table
from holdfast.streams.topology import StreamInfo, stream_info
from holdfast.streams.wire import DEAD_STREAM, STREAM_OF_TABLE
from holdfast.workers.handler_floors import stats_of_handlers
from holdfast.workers.picture import archived_seq, lag_of

if TYPE_CHECKING:
    from holdfast.lake.duck import Connection as LakeConnection
    from holdfast.lake.lake import Lake
    from holdfast.streams.connection import Connection


class LiveCounts(msgspec.Struct, frozen=True):
    """What hot and archived rows together say, each counted once.  Times are of storing; None without events."""

    live_keys: int
    events: int
    agents: int
    correlations: int
    sessions: int
    trees: int
    oldest_event_ms: int | None
    newest_event_ms: int | None


def count_live(lake: LakeConnection) -> LiveCounts:
    """Returns the counts over the views: a scan of the columns that are counted, none of bodies or data."""
    row = lake.execute(
        """SELECT (
            SELECT count(*) FROM (SELECT arg_max(op, version) AS op FROM key_versions GROUP BY namespace, key)
            WHERE op NOT IN ('delete', 'expire')
        ), count(*), count(DISTINCT agent_id), count(DISTINCT correlation_id), count(DISTINCT session_id),
            count(DISTINCT coalesce(root_event_id, event_id)),
            epoch_ms(min(stored_at)), epoch_ms(max(stored_at))
        FROM events"""
    ).fetchone()
    return LiveCounts(*row)


async def collect_stats(
    connection: Connection, lake: Lake, counts: Callable[[], Awaitable[LiveCounts]]
) -> dict[str, Any]:
    """Returns ``{"hot", "contexts", "events", "keys", "lake", "watermarks", "handlers", "dead", "scrub"}``.

    Each count is exact when asked for, of all namespaces.  ``hot`` and ``lake`` say what each tier holds, and much is
    in both; ``contexts`` counts once: ``archived``, and ``unarchived`` messages, of which a large body has several.
    """
    infos: dict[Table, StreamInfo] = {
        table: await stream_info(connection, stream) for table, stream in STREAM_OF_TABLE.items()
    }
    dead = await stream_info(connection, DEAD_STREAM)
    await asyncio.to_thread(lake.refresh)
    marks = await asyncio.to_thread(lambda: {table: lake.watermark(table) for table in TABLES})
    tables = await asyncio.to_thread(lambda: {table: lake.statistics(table) for table in TABLES})
    live = await counts()
    unarchived = lag_of(infos["contexts"], marks["contexts"])
    return {
        "hot": {"contexts": infos["contexts"].messages, "bytes": infos["contexts"].bytes},
        "contexts": {
            "total": tables["contexts"].contexts + unarchived,
            "archived": tables["contexts"].contexts,
            "unarchived": unarchived,
        },
        "events": {
            "total": live.events,
            "unarchived": lag_of(infos["events"], marks["events"]),
            "agents": live.agents,
            "correlations": live.correlations,
            "sessions": live.sessions,
            "trees": live.trees,
            "oldest_event": None if live.oldest_event_ms is None else iso_from_ms(live.oldest_event_ms),
            "newest_event": None if live.newest_event_ms is None else iso_from_ms(live.newest_event_ms),
        },
        "keys": {"live": live.live_keys},
        "lake": {
            "contexts": tables["contexts"].contexts,
            "events": tables["events"].rows,
            "key_versions": tables["key_versions"].rows,
            "bytes": sum(table.bytes for table in tables.values()),
            "files": sum(table.files for table in tables.values()),
        },
        "watermarks": {
            table: {
                "epoch": infos[table].epoch,
                "seq": archived_seq(infos[table], marks[table]),
                "last_seq": infos[table].last_seq,
                "lag": lag_of(infos[table], marks[table]),
            }
            for table in TABLES
        },
        "handlers": await stats_of_handlers(connection),
        "dead": dead.messages,
        "scrub": await asyncio.to_thread(scrub_progress, lake),
    }
