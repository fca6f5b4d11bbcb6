"""A damaged file is replaced by one that holds its rows: those that it still has, and those brought from elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from holdfast.lake.checksums import find_damage, readable
from holdfast.lake.columns import ROWS_PER_GROUP, to_rows
from holdfast.lake.commit import Change, removal_of
from holdfast.lake.memory import moved
from holdfast.lake.parquet_reading import open_parquet, read_batches, read_group
from holdfast.lake.salvage import salvage_group
from holdfast.lake.writer import FileWriter, remove_files
from holdfast.schemas.errors import FenceError, IntegrityError, UnavailableError
from holdfast.schemas.ids import now_ms
from holdfast.schemas.rows import ContextRow, Row

if TYPE_CHECKING:
    from pathlib import Path

    from holdfast.lake.checksums import Damage
    from holdfast.lake.log import FileEntry, Snapshot
    from holdfast.lake.table import LakeTable
    from holdfast.schemas.refs import Ref

logger = logging.getLogger(__name__)

HEALER: Final = "healer"


def heal_file(table: LakeTable, entry: FileEntry, damage: Damage, brought: Iterable[Row]) -> bool:
    """Replaces a damaged file by one with the same rows, ``brought`` in the place of those that cannot be read.

    ``brought`` are the rows of the stream in the damaged ranges, as they are decoded, and may be more than the file
    has: what the archiver left out is left out again.  False, and nothing is changed, when it cannot be told that the
    rows are exactly those.  Raises UnavailableError when the disk does not answer.
    """
    kept = _kept_rows(table, entry, damage)
    lost = _lost_rows(table, entry, damage, {row.seq: row for row in brought if row.epoch == entry.epoch})
    if lost is None:
        return False
    beside = [*kept, *lost.told]
    rows: list[Row] = []
    for told in _in_forms_of_their_own(table, entry, beside, lost.untold):
        rows = sorted([*beside, *told], key=lambda row: row.seq)
        if _are_as_logged(entry, rows):
            break
    else:
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
        extra={"action": "healed", "path": str(table.directory / entry.path), "rows": len(rows) - len(kept)},
    )
    return True


def _are_as_logged(entry: FileEntry, rows: Sequence[Row]) -> bool:
    contexts = sum(1 for row in rows if not isinstance(row, ContextRow) or row.form in ("plain", "manifest"))
    seqs = (rows[0].seq, rows[-1].seq) if rows else (0, 0)
    return (len(rows), contexts, *seqs) == (entry.rows, entry.contexts, entry.min_seq, entry.max_seq)


def _kept_rows(table: LakeTable, entry: FileEntry, damage: Damage) -> list[Row]:
    if damage.groups is None or entry.checksums is None:
        return []
    rows: list[Row] = []
    with open_parquet(table.directory / entry.path, checks_pages=False) as parquet:
        for group in range(len(entry.checksums.parts) - 1):
            if group not in damage.groups:
                rows += to_rows(table.name, read_group(parquet, group))
    return rows


class _Lost(NamedTuple):
    """Rows of the damaged ranges: in the form in which they were archived, and those whose form is not known."""

    told: list[Row]
    untold: list[Row]


def _lost_rows(table: LakeTable, entry: FileEntry, damage: Damage, found: dict[int, Row]) -> _Lost | None:
    """Returns the rows of the damaged ranges; None when it is not known which these are."""
    lost = _Lost([], [])
    for number, span in enumerate(damage.ranges):
        forms: dict[int, str] | None = None
        if damage.groups is not None:
            content = salvage_group(table.name, table.directory, entry, damage.groups[number])
            forms = None if content is None else _forms(content)
        rows = [row for seq, row in found.items() if span.first_seq <= seq <= span.last_seq]
        if forms is not None:
            if not forms.keys() <= found.keys():
                return None
            lost.told.extend(_in_form(found[seq], form) for seq, form in forms.items())
        elif len(rows) == span.rows:
            lost.untold.extend(rows)
        else:
            return None
    return lost


def _in_forms_of_their_own(
    table: LakeTable, entry: FileEntry, beside: Sequence[Row], untold: Sequence[Row]
) -> Iterator[list[Row]]:
    """Yields rows whose form is not known in the forms in which they may be in the file, the likeliest first.

    ``beside`` are the file's other rows.  The count of contexts, which the log has, tells which it was.  It leaves out
    chunks, and one that is in the lake twice may be put twice into a body that names it: nothing is yielded when damage
    of another file hides whether that has the body of a chunk.
    """
    contexts = [row for row in untold if isinstance(row, ContextRow)]
    held = _held_elsewhere(table, entry, {row.ref for row in contexts}) if contexts else {}
    chunks = {row.seq for row in contexts if row.form == "chunk"}
    if not contexts or held is None:
        if not chunks:
            yield list(untold)
        return
    _note_first(held, beside)
    first = dict(held)
    _note_first(first, contexts)
    # The archiver makes a touch of what the lake holds already.  Past a damaged file it does not know what that holds,
    # and archives the body once more; when it finds that out, the earlier row becomes a touch and the later stays.
    repeated = {row.seq for row in contexts if first[row.ref] < row.seq}
    held_later = {row.seq for row in contexts if row.ref in held} - chunks
    for touches in (repeated, repeated | held_later, repeated & chunks):
        yield [_in_form(row, "touch" if row.seq in touches else row.form) for row in contexts]


def _note_first(first: dict[Ref, int], rows: Iterable[Row]) -> None:
    for row in rows:
        if isinstance(row, ContextRow) and row.form != "touch":
            first[row.ref] = min(row.seq, first.get(row.ref, row.seq))


def _held_elsewhere(table: LakeTable, entry: FileEntry, refs: set[Ref]) -> dict[Ref, int] | None:
    """Returns the first sequences at which other files have the bodies of some references.

    Files that are later as a whole are left out; one that was merged around ``entry`` has rows of before and of after.
    None when damage hides whether a file has one.
    """
    held: dict[Ref, int] = {}
    wanted = pc.SetLookupOptions(value_set=pa.array(sorted(refs), pa.string()))
    for path, other in table.refresh().files.items():
        if path == entry.path or (other.epoch == entry.epoch and other.min_seq > entry.max_seq):
            continue
        identities = _identities(table, other)
        if identities is None:
            return None
        try:
            with readable(table.directory / path):
                for content in identities:
                    moved(content.nbytes)
                    some = content.filter(pc.call_function("is_in", [content.column("ref")], wanted))
                    columns = [some.column(name).to_pylist() for name in ("ref", "form", "stream_seq")]
                    for ref, form, seq in zip(*columns, strict=True):
                        if form != "touch":
                            # Of another life of the stream nothing tells which was first.
                            place = seq if other.epoch == entry.epoch else 0
                            held[ref] = min(place, held.get(ref, place))
        except (FileNotFoundError, IntegrityError):
            return None  # merged away meanwhile, or damaged since it was compared
    return held


def _identities(table: LakeTable, entry: FileEntry) -> Iterator[Any] | None:
    """Returns references, forms and sequences of all rows of a file; None when damage hides one."""
    record = table.quarantine.files().get(entry.path)
    damage = record.damage() if record else find_damage(table.directory, entry)
    if damage is None:
        return _read_identities(table.directory / entry.path)
    if damage.groups is None or entry.checksums is None:
        return None
    groups = range(len(entry.checksums.parts) - 1)
    found = [salvage_group(table.name, table.directory, entry, group) for group in groups]
    return None if any(content is None for content in found) else iter(found)


def _read_identities(path: Path) -> Iterator[Any]:
    with open_parquet(path) as parquet:
        yield from read_batches(parquet, ["ref", "form", "stream_seq"])


def _forms(content: Any) -> dict[int, str]:
    seqs: Sequence[int] = content.column("stream_seq").to_pylist()
    has_forms = "form" in content.column_names
    return dict(zip(seqs, content.column("form").to_pylist() if has_forms else [""] * len(seqs), strict=True))


def _in_form(row: Row, form: str) -> Row:
    # A body that was known already is archived as a touch.  A joint is brought as the chunk that it stands for.
    return (
        msgspec.structs.replace(row, form="touch", body=b"") if isinstance(row, ContextRow) and form == "touch" else row
    )
