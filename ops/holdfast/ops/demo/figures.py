"""What the demo measures: bytes embedded against referenced against archived, times hot against cold, lineage."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from holdfast.client import Context, Holdfast
from holdfast.lake import connect

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ZSTD_LEVEL: Final = 3
_FETCH: Final = 500


class Bytes(msgspec.Struct, frozen=True, kw_only=True):
    """The same work told in four ways, in bytes.

    ``lineage_embedded``: each event carries its context and those of all events it followed from.  ``embedded``: each
    event carries its own context.  ``referenced``: each distinct context once, and the events, as the server stores
    them.  ``archived``: the same in the lake's files.  ``compressed``: ``embedded`` as one zstd stream.
    """

    lineage_embedded: int
    embedded: int
    referenced: int
    archived: int
    compressed: int


class Deduplication(msgspec.Struct, frozen=True, kw_only=True):
    """Of one kind: how many events refer to such contexts, how many distinct ones there are, and their bytes."""

    kind: str
    mentions: int
    distinct: int
    bytes: int


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """One context resolved from the hot tier, then from the lake; ``same``: byte for byte."""

    ref: str
    kind: str
    size: int
    hot_s: float
    lake_s: float
    tiers: tuple[str, str]
    same: bool


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A question in SQL and its answer."""

    question: str
    sql: str
    columns: list[str]
    rows: list[list[Any]]
    seconds: float


def measure_bytes(lake: Path, namespace: str, *, referenced: int, archived: int) -> Bytes:
    """Returns the byte figures of all events of a namespace that are archived; blocks, in bounded memory."""
    own: dict[str, int] = {}
    chain: dict[str, int] = {}
    compressor = zstd.ZstdCompressor(level=ZSTD_LEVEL)
    compressed = 0
    with connect(lake) as duck:
        duck.execute(
            """
            SELECT CAST(e.event_id AS VARCHAR), CAST(e.parent_event_id AS VARCHAR), c.body_bytes
            FROM events e LEFT JOIN contexts c ON c.ref = e.context_ref AND c.namespace = e.namespace
            WHERE e.namespace = ? ORDER BY e.epoch, e.stream_seq
            """,
            [namespace],
        )
        while page := duck.fetchmany(_FETCH):
            for event_id, parent, body in page:
                size = 0 if body is None else len(body)
                own[event_id] = size
                chain[event_id] = size + chain.get(parent, 0)
                if body is not None:
                    compressed += len(compressor.compress(body))
    compressed += len(compressor.flush())
    return Bytes(
        lineage_embedded=sum(chain.values()),
        embedded=sum(own.values()),
        referenced=referenced,
        archived=archived,
        compressed=compressed,
    )


def measure_deduplication(lake: Path, namespace: str) -> list[Deduplication]:
    """Returns, by kind, how often contexts are referred to and how many there are; blocks."""
    with connect(lake) as duck:
        duck.execute(
            """
            WITH mentions AS (
                SELECT context_ref AS ref FROM events WHERE namespace = ? AND context_ref IS NOT NULL
                UNION ALL
                SELECT data ->> '$.rules' FROM events WHERE namespace = ? AND data ->> '$.rules' IS NOT NULL
            ), counted AS (SELECT ref, count(*) AS mentions FROM mentions GROUP BY ref)
            SELECT c.kind, CAST(sum(n.mentions) AS BIGINT), count(*), CAST(sum(c.size) AS BIGINT)
            FROM counted n JOIN contexts c ON c.ref = n.ref AND c.namespace = ?
            GROUP BY c.kind ORDER BY sum(c.size) DESC
            """,
            [namespace, namespace, namespace],
        )
        return [
            Deduplication(kind=kind, mentions=mentions, distinct=distinct, bytes=size)
            for kind, mentions, distinct, size in duck.fetchall()
        ]


def ask(lake: Path, question: str, sql: str) -> Answer:
    """Returns the answer of DuckDB to a question; blocks."""
    with connect(lake) as duck:
        started = time.perf_counter()
        rows = [list(row) for row in duck.execute(sql).fetchall()]
        seconds = time.perf_counter() - started
        return Answer(
            question=question, sql=sql, columns=[name[0] for name in duck.description], rows=rows, seconds=seconds
        )


async def time_resolving(hf: Holdfast, refs: Sequence[str]) -> list[tuple[Context, float]]:
    """Resolves references one after another and returns the contexts with their times; ``hf`` has no cache."""
    timed: list[tuple[Context, float]] = []
    for ref in refs:
        started = time.perf_counter()
        context = await hf.resolve(ref)
        timed.append((context, time.perf_counter() - started))
    return timed


def compare(hot: Sequence[tuple[Context, float]], cold: Sequence[tuple[Context, float]]) -> list[Resolved]:
    """Returns the two readings of each context side by side."""
    return [
        Resolved(
            ref=before.ref,
            kind=before.kind,
            size=before.size,
            hot_s=hot_s,
            lake_s=lake_s,
            tiers=(before.tier, after.tier),
            same=before.raw == after.raw,
        )
        for (before, hot_s), (after, lake_s) in zip(hot, cold, strict=True)
    ]
