"""A damaged file is replaced by one that holds its rows: those that it still has, and those brought from elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pyarrow.parquet as pq

from holdfast.lake.columns import ROWS_PER_GROUP, to_rows
from holdfast.lake.commit import Change, removal_of
from holdfast.lake.salvage import salvage_group
from holdfast.lake.writer import FileWriter, remove_files
from holdfast.schemas.errors import FenceError, UnavailableError
from holdfast.schemas.ids import now_ms
from holdfast.schemas.rows import ContextRow, Row

if TYPE_CHECKING:
    from holdfast.lake.checksums import Damage
    from holdfast.lake.log import FileEntry, Snapshot
    from holdfast.lake.table import LakeTable

logger = logging.getLogger(__name__)

HEALER: Final = "healer"


def heal_file(table: LakeTable, entry: FileEntry, damage: Damage, brought: Iterable[Row]) -> bool:
    """Replaces a damaged file by one with the same rows, ``brought`` in the place of those that cannot be read.

    ``brought`` are the rows of the stream in the damaged ranges, as they are decoded, and may be more than the file
    has: what the archiver left out is left out again.  False, and nothing is changed, when it cannot be told that the
    rows are exactly those.
    """
    kept = _kept_rows(table, entry, damage)
    lost = _lost_rows(table, entry, damage, {row.seq: row for row in brought if row.epoch == entry.epoch})
    if lost is None:
        return False
    rows = sorted([*kept, *lost], key=lambda row: row.seq)
    contexts = sum(1 for row in rows if not isinstance(row, ContextRow) or row.form in ("plain", "manifest"))
    seqs = (rows[0].seq, rows[-1].seq) if rows else (0, 0)
    if (len(rows), contexts, *seqs) != (entry.rows, entry.contexts, entry.min_seq, entry.max_seq):
        return False
    with FileWriter(table.name, table.directory, entry.day, entry.epoch) as writer:
        for start in range(0, len(rows), ROWS_PER_GROUP):
            writer.write_group(rows[start : start + ROWS_PER_GROUP])
        written = writer.finish()

    def replacement(snapshot: Snapshot) -> Change:
        if entry.path not in snapshot.files:
            raise FenceError(f"{entry.path} is no longer in {snapshot.directory}", hint="nothing is left to heal")
        last = snapshot.transactions.get(HEALER)
        return Change(
            action="heal",
            app_id=HEALER,
            version=last.version + 1 if last else 1,
            expected=last.version if last else None,
            adds=[written.add_action(data_change=False)],
            removes=[removal_of(entry, now_ms())],
        )

    try:
        table.commit(replacement)
    except (FenceError, UnavailableError):
        remove_files(table.directory, [written.entry])
        raise
    table.quarantine.remove(entry.path)
    logger.warning(
        "damaged file healed from the stream",
        extra={"action": "healed", "path": str(table.directory / entry.path), "rows": len(lost)},
    )
    return True


def _kept_rows(table: LakeTable, entry: FileEntry, damage: Damage) -> list[Row]:
    if damage.groups is None or entry.checksums is None:
        return []
    rows: list[Row] = []
    with pq.ParquetFile(table.directory / entry.path) as parquet:
        for group in range(len(entry.checksums.parts) - 1):
            if group not in damage.groups:
                rows += to_rows(table.name, parquet.read_row_group(group))
    return rows


def _lost_rows(table: LakeTable, entry: FileEntry, damage: Damage, found: dict[int, Row]) -> list[Row] | None:
    """Returns the rows of the damaged ranges in the form in which they were archived; None when that is not known."""
    lost: list[Row] = []
    for number, span in enumerate(damage.ranges):
        forms: dict[int, str] | None = None
        if damage.groups is not None:
            content = salvage_group(table.name, table.directory, entry, damage.groups[number])
            forms = None if content is None else _forms(content)
        rows = [row for seq, row in found.items() if span.first_seq <= seq <= span.last_seq]
        if forms is not None:
            if not forms.keys() <= found.keys():
                return None
            lost += [_in_form(found[seq], form) for seq, form in forms.items()]
        elif len(rows) == span.rows:
            lost += rows
        else:
            return None
    return lost


def _forms(content: Any) -> dict[int, str]:
    seqs: Sequence[int] = content.column("stream_seq").to_pylist()
    has_forms = "form" in content.column_names
    return dict(zip(seqs, content.column("form").to_pylist() if has_forms else [""] * len(seqs), strict=True))


def _in_form(row: Row, form: str) -> Row:
    # A body that was known already is archived as a touch.  A joint is brought as the chunk that it stands for.
    return (
        msgspec.structs.replace(row, form="touch", body=b"") if isinstance(row, ContextRow) and form == "touch" else row
    )
