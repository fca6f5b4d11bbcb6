"""The lake: three tables in one directory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from holdfast.lake.quarantine import problem_of
from holdfast.lake.table import Append, CommitReport, LakeTable, TableStatistics
from holdfast.schemas.rows import TABLES, Anchor, Position, Row, Table

if TYPE_CHECKING:
    from holdfast.lake.commit import TornCommit
    from holdfast.lake.copies import Copies
    from holdfast.lake.log import FileEntry, Snapshot
    from holdfast.schemas.problems import Problem


class Lake:
    """The tables of one lake directory.

    Holds no open files: closing is forgetting.  Every method reads or writes files and may be called from any thread;
    tables do not wait for each other.  A lake with a torn commit opens at the version before it and refuses to append
    to that table until the commit is set aside.
    """

    def __init__(self, path: Path, tables: dict[Table, LakeTable]) -> None:
        self.path = path
        self.copies: Copies | None = None
        """The copy of the lake, where there is one: set by whoever commits or purges."""
        self._tables = tables

    @classmethod
    def open(cls, path: str | Path, *, create: bool = False) -> Self:
        """Opens the lake in a directory; raises DataDirectoryError when there is none.

        ``create`` makes missing tables and repairs what a power cut may have left; only processes that write set it.
        """
        root = Path(path).absolute()
        return cls(root, {name: LakeTable.open(name, root / name, create=create) for name in TABLES})

    def table(self, name: Table) -> LakeTable:
        """Returns one table."""
        return self._tables[name]

    def refresh(self, table: Table | None = None) -> None:
        """Reads what other processes have committed since."""
        for name in (table,) if table else TABLES:
            self._tables[name].refresh()

    def snapshot(self, table: Table) -> Snapshot:
        """Returns the version of a table last seen."""
        return self._tables[table].snapshot

    def version(self, table: Table) -> int:
        """Returns the number of the version last seen."""
        return self._tables[table].snapshot.version

    def watermark(self, table: Table) -> Position | None:
        """Returns the newest watermark: everything up to it is in the table.  None before the first append.

        It is not yet known to be durable: a purge goes by :meth:`durable_watermark`.
        """
        return self._tables[table].refresh().watermark

    def durable_watermark(self, table: Table) -> Position | None:
        """Returns the newest watermark after an fsync of the commit that carries it, and once the copy has it too."""
        watermark = self._tables[table].durable_watermark()
        if self.copies is not None:
            self.copies.require(self._tables[table], self._tables[table].snapshot.version)
        return watermark

    def anchors(self, table: Table, from_seq: int = 0, *, most: int | None = None) -> list[Anchor]:
        """Returns the anchors of the current epoch at or after a sequence, ascending."""
        return self._tables[table].anchors(from_seq, most=most)

    def append(
        self,
        table: Table,
        rows: Iterable[Row],
        *,
        epoch: str,
        first_seq: int,
        last_seq: int,
        anchors: Sequence[Anchor] = (),
    ) -> CommitReport:
        """Makes one run of a stream part of its table; the contract is that of :meth:`LakeTable.append`."""
        return self._tables[table].append(rows, epoch=epoch, first_seq=first_seq, last_seq=last_seq, anchors=anchors)

    def begin_append(self, table: Table, *, epoch: str, first_seq: int) -> Append:
        """Begins a run of a stream into its table; the contract is that of :meth:`LakeTable.begin_append`."""
        return self._tables[table].begin_append(epoch=epoch, first_seq=first_seq)

    def files(self, table: Table) -> tuple[FileEntry, ...]:
        """Returns the files of a table, by epoch and sequence."""
        return self._tables[table].files()

    def statistics(self, table: Table) -> TableStatistics:
        """Returns rows, files and bytes of a table, without opening a file."""
        return self._tables[table].statistics()

    def torn_commits(self) -> list[TornCommit]:
        """Returns the torn last commits; empty unless the machine lost power."""
        found = (table.torn_commit() for table in self._tables.values())
        return [torn for torn in found if torn is not None]

    def set_aside(self, torn: TornCommit) -> None:
        """Moves a torn commit out of the way.

        The caller knows that the stream still holds everything after ``torn.earlier``; if it does not, leave the
        commit where it is, raise the alarm and stay read-only.
        """
        self._tables[torn.table].set_aside(torn)

    def problems(self) -> list[Problem]:
        """Returns what is known to be damaged: cheap, since it reads records, and no data."""
        return [
            problem_of(table.directory, record)
            for table in self._tables.values()
            for record in table.quarantine.of(table.snapshot).values()
        ]

    def close(self) -> None:
        """Forgets the tables."""
        self._tables.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
