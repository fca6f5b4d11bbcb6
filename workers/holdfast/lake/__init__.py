"""The cold tier: archived rows in Delta tables of Parquet, an index over them, and DuckDB views.

Three tables under one directory (``contexts``, ``events``, ``key_versions``), each partitioned by the UTC day of
``stored_at``.  Nothing here imports NATS; the live tail comes in through the :class:`~holdfast.lake.snapshot.Tail`
protocol.  ``pip install holdfast[lake]`` is enough for :func:`connect`; the index is for services.

For readers::

    connect(path, nats_url=None, *, tail=None, index=None, config=None) -> Connection  # .execute .sql .cursor .pinned
    # views contexts, events, key_versions, contexts_stored, current_keys;
    # table macros contexts_of(refs), keys_as_of(moment), get_context_stats()
    query_events(connection, EventFilter(...), since_ms=, until_ms=, limit=, cursor=) -> EventPage

For the archiver, the compactor and the janitor::

    Lake.open(path, *, create=False) -> Lake
    lake.watermark(table) -> Position | None          # the Delta txn: everything up to it is in the table
    lake.durable_watermark(table) -> Position | None  # the same after an fsync: what a purge goes by
    lake.anchors(table, from_seq=0, *, most=None) -> list[Anchor]
    lake.append(table, rows, *, epoch, first_seq, last_seq, anchors=()) -> CommitReport
    lake.files(table) -> tuple[FileEntry, ...];  lake.statistics(table) -> TableStatistics
    lake.version(table) -> int;  lake.snapshot(table) -> Snapshot;  lake.refresh(table=None);  lake.close()
    lake.torn_commits() -> list[TornCommit];  lake.set_aside(torn)
    compact(lake, *, policy=None, at_ms=None, tables=TABLES) -> CompactionReport
    vacuum(lake, older_than_s=86_400, *, orphans_older_than_s=, log_older_than_s=) -> VacuumReport
    write_views_file(lake) -> Path                    # <lake>/holdfast.duckdb, for plain DuckDB
    ViewsFile(lake).update() -> bool                  # the same, at most once a second and only on change

For the resolver and for deduplication::

    LakeIndex.open(path) -> LakeIndex
    index.refresh(lake) -> IndexReport;  index.rebuild(lake);  index.count(table);  index.version(table)
    index.find_contexts(digests) / find_events([(namespace, id)]) / find_key_versions([(namespace, key, version)])
        -> dict[..., Position]
    index.last_key_version(namespace, key) -> tuple[int, Position] | None
    index.key_versions_before(namespace, key, version, limit) -> list[tuple[int, Position]]
    Lookup(lake, index).get_contexts(digests) -> dict[Digest, ContextRow]     # manifests as stored, joints as chunks
                       .get_body(digest) -> tuple[ContextRow, bytes] | None   # chunks joined and verified
                       .join(manifest_row) -> bytes
                       .get_events([(namespace, id)]) -> dict[EventKey, EventRow]
                       .get_key_versions([(namespace, key, version)]) -> dict[VersionKey, KeyVersionRow]

For ``holdfast verify``::

    verify_lake(path) -> LakeReport                   # .ok .checked .violations

Every call blocks on the disk: from an event loop, call it in a thread.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from holdfast.lake.compaction import compact, vacuum
    from holdfast.lake.duck import Connection, ViewsFile, connect, write_views_file
    from holdfast.lake.index import LakeIndex
    from holdfast.lake.lake import Lake
    from holdfast.lake.lookup import Lookup
    from holdfast.lake.scan import EventFilter, EventPage, query_events
    from holdfast.lake.snapshot import Tail
    from holdfast.lake.verify import verify_lake

__all__ = [
    "Connection",
    "EventFilter",
    "EventPage",
    "Lake",
    "LakeIndex",
    "Lookup",
    "Tail",
    "ViewsFile",
    "compact",
    "connect",
    "query_events",
    "vacuum",
    "verify_lake",
    "write_views_file",
]

# Loaded at first use: a notebook that only queries should not pay for lmdb, nor need it.
_HOME: Final[dict[str, str]] = {
    "Connection": "duck",
    "EventFilter": "scan",
    "EventPage": "scan",
    "Lake": "lake",
    "LakeIndex": "index",
    "Lookup": "lookup",
    "Tail": "snapshot",
    "ViewsFile": "duck",
    "compact": "compaction",
    "connect": "duck",
    "query_events": "scan",
    "vacuum": "compaction",
    "verify_lake": "verify",
    "write_views_file": "duck",
}


def __getattr__(name: str) -> Any:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value
