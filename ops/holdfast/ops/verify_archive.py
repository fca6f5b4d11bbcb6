"""What ``holdfast verify`` holds the streams against: the lake by identity.  And what it finds."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from holdfast.lake import connect
from holdfast.lake.index import LakeIndex
from holdfast.lake.lake import Lake
from holdfast.schemas.problems import Problem
from holdfast.schemas.refs import Ref, parse_ref
from holdfast.schemas.rows import TABLES, ContextRow, EventRow, KeyVersionRow, Position, Row, Table

MOST_OF_A_KIND: Final = 100
"""Most violations listed of one kind; the rest is counted in one line."""

_PAGE: Final = 2_000

NamedRef = tuple[str, Ref]
"""A namespace and a reference in it."""


class Findings:
    """Violations, a bounded number of each kind."""

    def __init__(self) -> None:
        self._listed: list[Problem] = []
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, invariant: str, kind: str, what: str, *, at: str, next_step: str) -> None:
        """Notes that ``invariant`` is broken at an object; ``kind`` groups what is cut beyond a number."""
        self._counts[invariant, kind] += 1
        if self._counts[invariant, kind] <= MOST_OF_A_KIND:
            self._listed.append(Problem(invariant=invariant, object=at, what=what, next_step=next_step))

    def all(self) -> list[Problem]:
        """Returns the violations, and of a kind that was cut how many more there are."""
        further = [
            Problem(
                invariant=invariant,
                object=kind,
                what=f"{count - MOST_OF_A_KIND} more of the same kind",
                next_step="see those listed",
            )
            for (invariant, kind), count in self._counts.items()
            if count > MOST_OF_A_KIND
        ]
        return [*self._listed, *further]


class Archive:
    """The lake by identity: an index of its own, made for one check and thrown away.  Every call blocks.

    ``path`` None stands for an empty lake: nothing has been archived yet.
    """

    def __init__(self, path: Path | None) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="holdfast-verify-")
        own = Path(self._directory.name)
        self.path = own / "lake" if path is None else path
        self.lake = Lake.open(self.path, create=path is None)
        self._index = LakeIndex.open(own / "index")
        # As of before any stream is read: whatever is at or below is in the lake, and stays there.
        self.watermarks: dict[Table, Position | None] = {table: self.lake.watermark(table) for table in TABLES}
        self.refresh()

    def refresh(self) -> None:
        """Takes in what has been archived since."""
        self.lake.refresh()
        self._index.refresh(self.lake)

    def missing_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Returns the rows whose identity the lake does not hold."""
        contexts = self._index.find_contexts([row.digest for row in rows if isinstance(row, ContextRow)])
        events = self._index.find_events([(row.namespace, row.id) for row in rows if isinstance(row, EventRow)])
        versions = self._index.find_key_versions(
            [(row.namespace, row.key, row.version) for row in rows if isinstance(row, KeyVersionRow)]
        )

        def is_held(row: Row) -> bool:
            if isinstance(row, ContextRow):
                return row.digest in contexts
            if isinstance(row, EventRow):
                return (row.namespace, row.id) in events
            return (row.namespace, row.key, row.version) in versions

        return [row for row in rows if not is_held(row)]

    def missing_refs(self, refs: Iterable[NamedRef]) -> list[NamedRef]:
        """Returns the references whose context the lake does not hold."""
        wanted = list(refs)
        held = self._index.find_contexts([parse_ref(ref).digest for _, ref in wanted])
        return [(namespace, ref) for namespace, ref in wanted if parse_ref(ref).digest not in held]

    def event_refs(self) -> Iterator[list[NamedRef]]:
        """Yields the references that archived events carry, each once, a page at a time."""
        with connect(self.path) as duck:
            duck.execute("SELECT DISTINCT namespace, context_ref FROM events WHERE context_ref IS NOT NULL")
            while page := duck.fetchmany(_PAGE):
                yield [(namespace, Ref(ref)) for namespace, ref in page]

    def close(self) -> None:
        """Removes the index."""
        self._index.close()
        self.lake.close()
        self._directory.cleanup()
