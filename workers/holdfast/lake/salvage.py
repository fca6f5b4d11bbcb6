"""What can still be read of a damaged row group: the columns that tell which rows are in it.

A flipped bit damages one page of one column.  The others have page checksums of their own; since these leave page
headers uncovered, what is read is believed only when it also agrees with the footer, which is known to be sound.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from holdfast.lake.checksums import Damage, RowRange, seq_ranges
from holdfast.lake.parquet_reading import open_parquet, read_group
from holdfast.schemas.errors import HoldfastError
from holdfast.schemas.refs import parse_ref

if TYPE_CHECKING:
    from holdfast.lake.log import FileEntry
    from holdfast.schemas.rows import Table

IDENTITY_COLUMNS: Final[dict[Table, list[str]]] = {
    "contexts": ["ref", "form", "epoch", "stream_seq"],
    "events": ["event_id", "namespace", "epoch", "stream_seq"],
    "key_versions": ["namespace", "key", "version", "epoch", "stream_seq"],
}
"""What says of a row which it is, and where it stood in its stream."""


def salvage_group(table: Table, directory: Path, entry: FileEntry, group: int) -> Any | None:
    """Returns the identity columns of a damaged row group as an Arrow table; None when they cannot be believed."""
    try:
        with open_parquet(directory / entry.path) as parquet:
            span = seq_ranges(parquet.metadata)[group]
            content = read_group(parquet, group, IDENTITY_COLUMNS[table])
        return content if _agrees(table, content, entry, span) else None
    except (OSError, pa.ArrowException, HoldfastError, ValueError, IndexError):
        return None


def _agrees(table: Table, content: Any, entry: FileEntry, span: RowRange) -> bool:
    seqs: list[int] = content.column("stream_seq").to_pylist()
    ascending = all(first < second for first, second in itertools.pairwise(seqs))
    if len(seqs) != span.rows or not seqs or not ascending or (seqs[0], seqs[-1]) != (span.first_seq, span.last_seq):
        return False
    if content.column("epoch").unique().to_pylist() != [entry.epoch]:
        return False
    if table == "contexts":
        for ref in content.column("ref").to_pylist():
            parse_ref(ref)
    return all(content.column(name).null_count == 0 for name in IDENTITY_COLUMNS[table])


def name_rows(table: Table, directory: Path, entry: FileEntry, damage: Damage) -> tuple[str, ...]:
    """Returns the identities of the rows that cannot be read, of those that can be made out."""
    named: list[str] = []
    for group in damage.groups or ():
        content = salvage_group(table, directory, entry, group)
        if content is not None:
            named += _names(table, content)
    return tuple(named)


def _names(table: Table, content: Any) -> list[str]:
    if table == "contexts":
        refs: list[str] = content.column("ref").to_pylist()
        return refs
    if table == "events":
        column = content.column("event_id")
        return [str(value) for value in column.to_pylist()]
    keys, versions = content.column("key").to_pylist(), content.column("version").to_pylist()
    return [f"{key}@{version}" for key, version in zip(keys, versions, strict=True)]
