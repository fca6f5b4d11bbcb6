"""The SQL of the views: what a reader sees of the tables, over an explicit list of files.

Never a glob: a Delta directory also holds files that were compacted away, and files not yet committed.

``contexts`` shows each context once, with its whole body: rows of form ``touch`` (stored again), ``chunk`` and
``joint`` (parts of a larger body) do not appear, a chunked body is put together from its parts.  ``body`` is text
where the bytes are valid UTF-8 and null otherwise; ``body_bytes`` is always there.  ``contexts_stored`` shows every row
as it is stored; of a joint, ``body`` lists its parts and ``body_binary`` is what follows them.

``contexts_of(refs)`` shows the contexts of a list of references.  It is for joins: a join with ``contexts`` may put
every body together before it finds that it needs a few, since DuckDB does not promise to narrow one side by the other::

    SELECT key, body FROM current_keys JOIN contexts_of((SELECT list(ref) FROM current_keys WHERE key LIKE 'plan.%'))
    USING (namespace, ref)

``current_keys`` shows the newest version of each named context, ``keys_as_of(moment)`` the newest that the server had
stored by then (a timestamp; without a zone, or as text, it is UTC); both have the columns of ``key_versions`` and
``live``: neither deleted nor expired, now or at that moment.  ``get_context_stats()`` is one row of totals.  Times are
TIMESTAMP in UTC, ids are UUID.

``source_id`` of ``events`` is read out of ``event_id`` where that holds it, half a microsecond a row that is asked for.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from holdfast.lake.columns import COLUMNS
from holdfast.lake.joints import DEPTH
from holdfast.schemas import limits
from holdfast.schemas.ids import PACKED_DIGITS, PACKED_MARK, PACKED_TAIL

if TYPE_CHECKING:
    from holdfast.lake.log import Snapshot
    from holdfast.schemas.rows import Table

STORED: Final[dict[Table, str]] = {"contexts": "contexts_stored", "events": "events", "key_versions": "key_versions"}
"""The view that shows a table's rows as they are, ids of producers included."""

# Put together above one chain of scan, unnest and joins, grouped by every column of the row: so a filter on any of them
# reaches the scan, and a query that does not ask for a body reads none.  Joints are unfolded on the way: each level
# puts a joint's parts in its place, and the joint itself, closed, behind them, for the bytes that follow its parts.
# Tried instead: unfolding each distinct chunk once, below the join with the manifests, counts in a third of the time,
# but puts every chunk of the lake together to show one body, and so did correlated subqueries.  The pieces are gathered
# as they are and turned to hex late: DuckDB joins blobs only as text, and gathering that would take three times the
# memory.  A piece's place is a number with a digit for each level, which sorts faster than a list of them.  Of several
# pieces at one place the first counts, the joint's if one unfolded there: a chunk may be in the lake twice when damaged
# files were healed, and leaving out the second here costs what the numbers save, counting rows of a chunk below the
# join another pass over all of them.
_MANIFESTS: Final = """
WITH manifests AS (
    SELECT ref, namespace, kind, content_type, size, created_at, expires_at, epoch, stream_seq, day,
        from_json(body, '{{"chunks": ["VARCHAR"], "tail": "VARCHAR"}}') AS manifest
    FROM contexts_stored WHERE form = 'manifest' {and_wanted}
), parts_0 AS (
    SELECT * EXCLUDE manifest, manifest.tail AS tail,
        'ctx_chunk_' || unnest(CASE WHEN len(manifest.chunks) > 0 THEN manifest.chunks ELSE [NULL] END) AS chunk,
        generate_subscripts(CASE WHEN len(manifest.chunks) > 0 THEN manifest.chunks ELSE [NULL] END, 1)::HUGEINT
            AS place,
        true AS is_open
    FROM manifests
)"""
_UNFOLDED: Final = """, found_{level} AS (
    SELECT part.*, coalesce(joint.chunks, [part.chunk]) AS chunks
    FROM parts_{above} AS part LEFT JOIN (
        SELECT namespace, ref, list_append(list_transform(
            from_json(body, '{{"chunks": ["VARCHAR"]}}').chunks, lambda digest: 'ctx_chunk_' || digest), ref) AS chunks
        FROM contexts_stored WHERE form = 'joint'
    ) AS joint ON joint.ref = CASE WHEN part.is_open THEN part.chunk END AND joint.namespace = part.namespace
), parts_{level} AS (
    SELECT * EXCLUDE (chunk, chunks, place, is_open), unnest(chunks) AS chunk,
        place * {places} + generate_subscripts(chunks, 1) AS place,
        generate_subscripts(chunks, 1) < len(chunks) AS is_open
    FROM found_{level}
)"""
_BODIES: Final = """, gathered AS (
    SELECT part.ref, part.namespace, part.kind, part.content_type, part.size, part.created_at, part.expires_at,
        part.epoch, part.stream_seq, part.day,
        count(*) = count(chunk.body_binary) FILTER (chunk.form = 'chunk' OR NOT part.is_open) AS is_whole,
        list(chunk.body_binary ORDER BY part.place, chunk.form DESC) AS pieces,
        list(part.place ORDER BY part.place) AS places,
        any_value(part.tail) AS tail
    FROM parts_{depth} AS part LEFT JOIN contexts_stored AS chunk
        ON chunk.form IN ('chunk', 'joint') AND chunk.ref = part.chunk AND chunk.namespace = part.namespace
    GROUP BY part.ref, part.namespace, part.kind, part.content_type, part.size, part.created_at, part.expires_at,
        part.epoch, part.stream_seq, part.day
), joined AS (
    SELECT * EXCLUDE (is_whole, pieces, places, tail),
        CASE WHEN is_whole THEN from_hex(
            list_aggregate(
                list_transform(
                    list_filter(pieces, lambda piece, i: i = 1 OR places[i] <> places[i - 1]), lambda piece: hex(piece)
                ), 'string_agg', ''
            ) || hex(coalesce(tail, ''))
        ) END AS bytes
    FROM gathered
), whole AS (
    SELECT * REPLACE (CASE WHEN octet_length(bytes) = size THEN bytes END AS bytes) FROM joined
)
SELECT ref, namespace, kind, content_type, body, coalesce(body_binary, encode(body)) AS body_bytes, size,
    created_at, expires_at, epoch, stream_seq, day
FROM contexts_stored WHERE form = 'plain' {and_wanted}
UNION ALL
SELECT ref, namespace, kind, content_type, try(decode(bytes)), bytes, size,
    created_at, expires_at, epoch, stream_seq, day
FROM whole
"""
_PLACES: Final = 2 * limits.MANIFEST_CHUNKS
"""More than a manifest or a joint has parts, itself counted; six levels of it are within a HUGEINT."""
_CONTEXTS: Final = "".join(
    [
        _MANIFESTS,
        *(
            _UNFOLDED.replace("{level}", str(n)).replace("{above}", str(n - 1)).replace("{places}", str(_PLACES))
            for n in range(1, DEPTH + 1)
        ),
        _BODIES.replace("{depth}", str(DEPTH)),
    ]
)


# What ``holdfast.schemas.ids.unpacked_source_id`` does, in layers that cost nothing to who does not ask for source_id.
# The mark is looked for as a range of UUIDs, so that no other id is turned into text.
_EVENTS: Final = f"""
SELECT * EXCLUDE (id_text_, held_) REPLACE (coalesce(source_id, CASE
    WHEN held_.size + held_.tail NOT BETWEEN 1 AND {PACKED_DIGITS} OR held_.tail > {PACKED_TAIL} THEN NULL
    WHEN held_.room[held_.size + 1:{PACKED_DIGITS} - held_.tail]
        <> repeat('0', {PACKED_DIGITS} - held_.size - held_.tail) THEN NULL
    WHEN NOT regexp_full_match(held_.room[1:held_.size], '(2[1-9a-f]|[3-6][0-9a-f]|7[0-9a-e])*') THEN NULL
    WHEN held_.tail < {PACKED_TAIL} AND regexp_matches(held_.room[1:held_.size], '(3[0-9]|6[1-6])$') THEN NULL
    ELSE decode(from_hex(held_.room[1:held_.size])) || right(held_.room, held_.tail)
END) AS source_id)
FROM (
    SELECT *, CASE WHEN id_text_[15] = '8' AND id_text_[20] = '8' THEN {{{{
        'size': 2 * (instr('0123456789abcdef', id_text_[5]) - 1),
        'tail': instr('0123456789abcdef', id_text_[6]) - 1,
        'room': id_text_[7:8] || id_text_[10:13] || id_text_[16:18] || id_text_[21:23] || id_text_[25:36]
    }}}} END AS held_
    FROM (
        SELECT *, CASE WHEN event_id BETWEEN CAST('{PACKED_MARK}0000-0000-8000-8000-000000000000' AS UUID)
            AND CAST('{PACKED_MARK}ffff-ffff-8fff-8fff-ffffffffffff' AS UUID)
            THEN CAST(event_id AS VARCHAR) END AS id_text_
        FROM ({{rows}})
    )
)
"""  # noqa: S608  our own constants

# Not CAST(now() AS TIMESTAMP): that would be local time where the session has a time zone.
_NOW: Final = "make_timestamp(epoch_us(now()))"
# With the coalesce it takes a timestamp with a zone, one without and a literal alike.
_MOMENT: Final = "make_timestamp(epoch_us(coalesce(moment, CAST(NULL AS TIMESTAMP))))"

_NEWEST: Final = """
SELECT *, op NOT IN ('delete', 'expire') AND (expires_at IS NULL OR expires_at > {moment}) AS live
FROM key_versions {where}
QUALIFY row_number() OVER (PARTITION BY namespace, key ORDER BY version DESC) = 1
"""

_STATS: Final = """
WITH stored AS (
    SELECT count(*) FILTER (form IN ('plain', 'manifest')) AS total_contexts,
        count(*) FILTER (form IN ('plain', 'manifest') AND expires_at <= {now}) AS expired_contexts,
        coalesce(sum(size) FILTER (form IN ('plain', 'manifest')), 0)::BIGINT AS context_bytes,
        coalesce(sum(size) FILTER (form IN ('plain', 'chunk', 'joint')), 0)::BIGINT AS stored_bytes
    FROM contexts_stored
), keys AS (
    SELECT count(*) AS total_keys,
        count(*) FILTER (live) AS live_keys,
        count(*) FILTER (NOT live AND op <> 'delete') AS expired_keys,
        count(*) FILTER (op = 'delete') AS deleted_keys
    FROM current_keys
), versions AS (
    SELECT count(*) AS total_versions, min(stored_at) AS oldest, max(stored_at) AS newest FROM key_versions
), happened AS (
    SELECT count(*) AS total_events, min(stored_at) AS oldest, max(stored_at) AS newest FROM events
), people AS (
    SELECT count(DISTINCT session_id) AS unique_sessions, count(DISTINCT agent_id) AS unique_agents
    FROM (SELECT session_id, agent_id FROM events UNION ALL SELECT session_id, agent_id FROM key_versions)
)
SELECT total_contexts, expired_contexts, total_keys, live_keys, expired_keys, deleted_keys, total_versions,
    total_events, unique_sessions, unique_agents, context_bytes, stored_bytes,
    least(versions.oldest, happened.oldest) AS oldest_stored_at,
    greatest(versions.newest, happened.newest) AS newest_stored_at
FROM stored, keys, versions, happened, people
"""


def quote(text: str) -> str:
    """Returns a SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def view_statements(
    snapshots: Iterable[Snapshot],
    *,
    temporary: bool,
    tails: dict[Table, str] | None = None,
    damaged: Mapping[Table, Mapping[str, str]] | None = None,
    alike: Container[Table] = (),
) -> Iterator[str]:
    """Yields the statements that make, or replace, all views over some snapshots; the first time over all of them.

    ``tails`` names, for each table, a relation of the same columns whose rows are shown as well.  ``damaged`` says, of
    files that must not be read, what is wrong with them: a statement that may concern their rows fails with those
    words, one that is narrowed to other days does not.  ``alike`` names the tables whose files are known to have the
    same columns: statements over them are planned faster.
    """
    create = "CREATE OR REPLACE TEMP VIEW" if temporary else "CREATE OR REPLACE VIEW"
    macro = "CREATE OR REPLACE TEMP MACRO" if temporary else "CREATE OR REPLACE MACRO"
    is_any = False
    for snapshot in snapshots:
        tail = (tails or {}).get(snapshot.table)
        rows = _stored_rows(snapshot, tail, (damaged or {}).get(snapshot.table, {}), snapshot.table in alike)
        if snapshot.table == "events":
            rows = _EVENTS.format(rows=rows)
        yield f"{create} {STORED[snapshot.table]} AS {rows}"
        if snapshot.table == "contexts":
            yield f"{create} contexts AS {_CONTEXTS.format(and_wanted='')}"
            of_refs = _CONTEXTS.format(and_wanted="AND ref IN (SELECT unnest(refs))")
            yield f"{macro} contexts_of(refs) AS TABLE {of_refs}"
        elif snapshot.table == "key_versions":
            yield f"{create} current_keys AS {_NEWEST.format(moment=_NOW, where='')}"
            at_moment = _NEWEST.format(moment=_MOMENT, where=f"WHERE stored_at <= {_MOMENT}")
            yield f"{macro} keys_as_of(moment) AS TABLE {at_moment}"
        is_any = True
    if is_any:
        yield f"{macro} get_context_stats() AS TABLE {_STATS.format(now=_NOW)}"


def _stored_rows(snapshot: Snapshot, tail: str | None, damaged: Mapping[str, str], are_alike: bool) -> str:
    # The empty first branch gives every column its name, place and type, whatever the files are: none at all, or
    # files of an earlier release that lack a column.
    branches = [f"SELECT {_typed_nulls(snapshot.table)} WHERE false"]
    if len(snapshot.files) > len(damaged):
        branches.append(f"SELECT * FROM {file_scan(snapshot, damaged, are_alike=are_alike)}")  # noqa: S608  quoted paths
    branches += [_failing_branch(snapshot, path, what) for path, what in sorted(damaged.items())]
    if tail is not None:
        branches.append(f"SELECT *, CAST(stored_at AS DATE) AS day FROM {tail}")  # noqa: S608  our own name
    return "\nUNION ALL BY NAME ".join(branches)


def _failing_branch(snapshot: Snapshot, path: str, what: str) -> str:
    """A row of a file that must not be read: whoever comes to it is told so.  Its day is known, and is narrowed by."""
    failing = f"error({quote(what)})"
    columns = [f'CAST({failing} AS {_sql_type(column.type)}) AS "{column.name}"' for column in COLUMNS[snapshot.table]]
    day = snapshot.files[path].day
    columns.append(f"CAST({quote(day)} AS DATE) AS day")
    # From a range, or it would be worked out, and fail, while the statement is planned.
    return f"SELECT {', '.join(columns)} FROM range(1) WHERE {failing} IS NULL"  # noqa: S608  quoted values


def file_scan(snapshot: Snapshot, without: Container[str] = (), *, are_alike: bool = False) -> str:
    """Returns a table function call that reads exactly the files of a snapshot but some; there is at least one.

    ``are_alike``: they are known to have the same columns.
    """
    listed = quoted_paths(f"{snapshot.directory}/{path}" for path in sorted(snapshot.files) if path not in without)
    unite = "" if are_alike else ", union_by_name = true"
    return f"read_parquet([{listed}], hive_partitioning = true, hive_types = {{'day': DATE}}{unite})"


def quoted_paths(paths: Iterable[str]) -> str:
    """Returns paths as the items of a list in SQL."""
    return ", ".join(quote(escape_glob(path)) for path in paths)


def escape_glob(path: str) -> str:
    """Returns a path that DuckDB's pattern matching takes literally."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)


def _typed_nulls(table: Table) -> str:
    columns = [f'CAST(NULL AS {_sql_type(column.type)}) AS "{column.name}"' for column in COLUMNS[table]]
    return ", ".join([*columns, "CAST(NULL AS DATE) AS day"])


_SQL_TYPES: Final = (
    (pa.string(), "VARCHAR"),
    (pa.binary(), "BLOB"),
    (pa.int64(), "BIGINT"),
    (pa.int32(), "INTEGER"),
    (pa.float64(), "DOUBLE"),
    (pa.timestamp("us"), "TIMESTAMP"),
    (pa.uuid(), "UUID"),
    (pa.list_(pa.string()), "VARCHAR[]"),
)


def _sql_type(arrow_type: Any) -> str:
    return next(name for known, name in _SQL_TYPES if known == arrow_type)
