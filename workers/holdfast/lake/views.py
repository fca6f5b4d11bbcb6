"""The SQL of the views: what a reader sees of the tables, over an explicit list of files.

Never a glob: a Delta directory also holds files that were compacted away, and files not yet committed.

``contexts`` shows each context once, with its whole body: rows of form ``touch`` (stored again) and ``chunk`` (parts
of a larger body) do not appear, a chunked body is put together from its parts.  ``body`` is text where the bytes are
valid UTF-8 and null otherwise; ``body_bytes`` is always there.  ``contexts_stored`` shows every row as it is stored.
Times are TIMESTAMP in UTC, ids are UUID.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from holdfast.lake.columns import COLUMNS

if TYPE_CHECKING:
    from holdfast.lake.log import Snapshot
    from holdfast.schemas.rows import Table

STORED: Final[dict[Table, str]] = {"contexts": "contexts_stored", "events": "events", "key_versions": "key_versions"}
"""The view that shows a table's rows as they are."""

_CONTEXTS: Final = """
WITH parts AS (
    SELECT namespace, ref, unnest(digests) AS digest, generate_subscripts(digests, 1) AS position
    FROM (
        SELECT namespace, ref, from_json(body, '{"chunks": ["VARCHAR"]}').chunks AS digests
        FROM contexts_stored WHERE form = 'manifest'
    )
), pieces AS (
    SELECT parts.namespace, parts.ref, position, any_value(chunk.body_binary) AS bytes
    FROM parts LEFT JOIN contexts_stored AS chunk
        ON chunk.form = 'chunk' AND chunk.ref = 'ctx_chunk_' || parts.digest AND chunk.namespace = parts.namespace
    GROUP BY parts.namespace, parts.ref, position
), joined AS (
    SELECT namespace, ref,
        CASE WHEN count(*) = count(bytes) THEN from_hex(string_agg(hex(bytes), '' ORDER BY position)) END AS bytes
    FROM pieces GROUP BY namespace, ref
)
SELECT ref, namespace, kind, content_type, body, coalesce(body_binary, encode(body)) AS body_bytes, size,
    created_at, expires_at, epoch, stream_seq, day
FROM contexts_stored WHERE form = 'plain'
UNION ALL
SELECT whole.ref, whole.namespace, kind, content_type, try(decode(bytes)), bytes, size,
    created_at, expires_at, epoch, stream_seq, day
FROM contexts_stored AS whole LEFT JOIN joined ON joined.ref = whole.ref AND joined.namespace = whole.namespace
WHERE whole.form = 'manifest'
"""


def quote(text: str) -> str:
    """Returns a SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def view_statements(
    snapshots: Iterable[Snapshot], *, temporary: bool, tails: dict[Table, str] | None = None
) -> Iterator[str]:
    """Yields the statements that make, or replace, all views over some snapshots.

    ``tails`` names, for each table, a relation of the same columns whose rows are shown as well.
    """
    create = "CREATE OR REPLACE TEMP VIEW" if temporary else "CREATE OR REPLACE VIEW"
    for snapshot in snapshots:
        tail = (tails or {}).get(snapshot.table)
        yield f"{create} {STORED[snapshot.table]} AS {_stored_rows(snapshot, tail)}"
        if snapshot.table == "contexts":
            yield f"{create} contexts AS {_CONTEXTS}"


def _stored_rows(snapshot: Snapshot, tail: str | None) -> str:
    # The empty first branch gives every column its name, place and type, whatever the files are: none at all, or
    # files of an earlier release that lack a column.
    branches = [f"SELECT {_typed_nulls(snapshot.table)} WHERE false"]
    if snapshot.files:
        branches.append(f"SELECT * FROM {file_scan(snapshot)}")  # noqa: S608  quoted paths
    if tail is not None:
        branches.append(f"SELECT *, CAST(stored_at AS DATE) AS day FROM {tail}")  # noqa: S608  our own name
    return "\nUNION ALL BY NAME ".join(branches)


def file_scan(snapshot: Snapshot) -> str:
    """Returns a table function call that reads exactly the files of a snapshot; there is at least one."""
    paths = sorted(snapshot.files)
    listed = ", ".join(quote(escape_glob(f"{snapshot.directory}/{path}")) for path in paths)
    return f"read_parquet([{listed}], hive_partitioning = true, hive_types = {{'day': DATE}}, union_by_name = true)"


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
