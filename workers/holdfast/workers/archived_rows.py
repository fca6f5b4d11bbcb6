"""What the lake holds already of the rows that the archiver is about to write.

Only what the index does not know *and covers* is taken for new: an index that was begun anew meanwhile is refreshed and
asked again.  Rows of a damaged file that cannot be told may be any, and for that file, which may never be healed,
archiving does not wait: it is noted as passed over, and compared once it is healed (:mod:`holdfast.lake.passed_over`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from holdfast.lake.lookup import Lookup
from holdfast.lake.passed_over import drop_repetitions, pass_over, read_notes
from holdfast.schemas.errors import UnavailableError
from holdfast.schemas.rows import ContextRow, EventRow, KeyVersionRow, Position, Row, Table
from holdfast.workers.archive_plan import key_of, same_content

if TYPE_CHECKING:
    from holdfast.lake.index import LakeIndex
    from holdfast.lake.lake import Lake

_ATTEMPTS: Final = 3


class ArchivedRows:
    """The rows of one table of the lake, by identity.  Every call blocks; one at a time, in the archiver's thread."""

    def __init__(self, table: Table, lake: Lake, index: LakeIndex) -> None:
        self._table: Table = table
        self._lake = lake
        self._index = index
        self._version = -1
        self._noted: set[str] = set()

    def refresh(self) -> None:
        """Takes in what was archived since, by whomever."""
        self._noted.clear()
        self._version = self._index.refresh(self._lake).versions[self._table]

    def settle(self) -> int:
        """Takes out what healed files hold a second time, and returns how many rows that are.

        Not between :meth:`positions` and the commit of what it was asked for.
        """
        table = self._lake.table(self._table)
        if not read_notes(table.directory):
            return 0
        self.refresh()
        with Lookup(self._lake, self._index) as lookup:
            return drop_repetitions(table, lookup, same_content)

    def positions(self, rows: Sequence[Row]) -> dict[Any, Position]:
        """Returns where the lake holds these rows, by their keys; of contexts by digest, those of their parts as well.

        What is missing then is new, or in a damaged file that is noted as passed over.  Raises UnavailableError when
        the index cannot tell.
        """
        keys = self._keys(rows)
        for _ in range(_ATTEMPTS):
            try:
                answer = self._index.ask(self._table, keys, version=self._version)
            except UnavailableError:
                self._version = self._index.refresh(self._lake).versions[self._table]
                continue
            unknown = [path for path in answer.skipped if path not in self._noted]
            snapshot = self._lake.snapshot(self._table)
            if all(path in snapshot.files for path in unknown):
                if unknown:
                    pass_over(snapshot, unknown)
                    self._noted.update(unknown)
                return answer.positions
            # Healed by another file meanwhile, whose rows the index has to take in.
            self._version = self._index.refresh(self._lake).versions[self._table]
        raise UnavailableError(
            f"whether {len(keys)} rows of {self._table} are archived cannot be told: the index is being made anew",
            hint="nothing: it is tried again",
        )

    def stored(self, rows: Sequence[Row]) -> dict[Any, Row]:
        """Returns the lake's own rows under the keys of these."""
        with Lookup(self._lake, self._index) as lookup:
            if self._table == "events":
                return dict(lookup.get_events([(row.namespace, row.id) for row in rows if isinstance(row, EventRow)]))
            return dict(
                lookup.get_key_versions(
                    [(row.namespace, row.key, row.version) for row in rows if isinstance(row, KeyVersionRow)]
                )
            )

    def _keys(self, rows: Sequence[Row]) -> list[Any]:
        if self._table != "contexts":
            return [key_of(row) for row in rows]
        contexts = [row for row in rows if isinstance(row, ContextRow)]
        parts = [digest for row in contexts for digest, _ in row.parts]
        return list(dict.fromkeys([*(row.digest for row in contexts), *parts]))
