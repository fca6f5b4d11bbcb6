"""The live view beside a model: whatever is published, archived, purged, compacted or sent again, each row once."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from holdfast.lake import Lake, LakeIndex, compact, connect, vacuum, verify_lake
from holdfast.lake.compaction import MergePolicy
from holdfast.schemas.rows import ContextRow, EventRow, Row, Table
from tests.test_lake_samples import EPOCH, MemoryStream, MemoryTail, context, event, touch


class LiveView(RuleBasedStateMachine):
    """Streams, an archiver, a purger, a compactor and two readers: one resident, with or without an index.

    The model is the set of distinct identities ever published.  Steps between the reader's picture of the lake and its
    reading of the tail are armed beforehand, so that every interleaving is reached without threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)
        self.lake = Lake.open(self.root / "lake", create=True)
        self.tail = MemoryTail()
        self.archived: dict[Table, int] = {"contexts": 0, "events": 0}
        self.in_lake: dict[Table, set[str]] = {"contexts": set(), "events": set()}
        self.model: dict[Table, set[str]] = {"contexts": set(), "events": set()}
        self.epochs = 1
        self.between: list[Any] = []
        self.tail.before_read = self._run_between

    @initialize(with_index=st.booleans())
    def attach(self, with_index: bool) -> None:
        self.index = LakeIndex.open(self.root / "index") if with_index else None
        self.connection = connect(self.lake.path, tail=self.tail, index=self.index)

    def _run_between(self, _table: Table) -> None:
        while self.between:
            self.between.pop(0)()

    # -- what happens to the streams

    @rule(count=st.integers(1, 5))
    def publish_events(self, count: int) -> None:
        for _ in range(count):
            self._publish_event(len(self.model["events"]) + 1)

    @rule(which=st.integers(1, 30))
    def publish_an_event_again(self, which: int) -> None:
        """As after the server has forgotten the id: a second message with it."""
        self._publish_event(which)

    def _publish_event(self, number: int) -> None:
        stream = self.tail.streams["events"]
        row = event(stream.last_seq + 1, id=event(number).id, epoch=stream.epoch)
        stream.publish(row)
        self.model["events"].add(row.id)

    @rule(number=st.integers(1, 40))
    def put_context(self, number: int) -> None:
        """New, or stored again after it has left the hot tier; the hot tier itself holds a digest once."""
        stream = self.tail.streams["contexts"]
        row = context(stream.last_seq + 1, b"body %d" % number, epoch=stream.epoch)
        if any(isinstance(held, ContextRow) and held.digest == row.digest for held in stream.rows):
            return
        stream.publish(row)
        self.model["contexts"].add(row.digest)

    @precondition(lambda self: self.epochs < 4)
    @rule()
    def make_a_stream_anew(self) -> None:
        """Once all of it is archived: a stream is restored empty, with a new epoch and sequences from 1."""
        self._archive("events", 1_000)
        self.epochs += 1
        self.tail.streams["events"] = MemoryStream(f"epoch-{self.epochs}")
        self.archived["events"] = 0

    # -- what the workers do

    @rule(table=st.sampled_from(["contexts", "events"]), count=st.integers(1, 8), now=st.booleans())
    def archive(self, table: Table, count: int, now: bool) -> None:
        self._sooner_or_later(now, lambda: self._archive(table, count))

    @rule(table=st.sampled_from(["contexts", "events"]), now=st.booleans())
    def archive_all_and_purge(self, table: Table, now: bool) -> None:
        def both() -> None:
            self._archive(table, 1_000)
            self.tail.streams[table].purge_up_to(self.archived[table])

        self._sooner_or_later(now, both)

    @rule(table=st.sampled_from(["contexts", "events"]), keep=st.integers(0, 5), now=st.booleans())
    def purge(self, table: Table, keep: int, now: bool) -> None:
        self._sooner_or_later(now, lambda: self.tail.streams[table].purge_up_to(self.archived[table] - keep))

    @rule(now=st.booleans())
    def merge_files(self, now: bool) -> None:
        def both() -> None:
            compact(self.lake, policy=MergePolicy(min_files=2), at_ms=2_000_000_000_000)

        self._sooner_or_later(now, both)

    @rule()
    def remove_old_files(self) -> None:
        vacuum(self.lake, older_than_s=-60)

    def _sooner_or_later(self, now: bool, step: Any) -> None:
        if now:
            step()
        else:
            self.between.append(step)

    def _archive(self, table: Table, count: int) -> None:
        """Archives as the archiver does: each identity once; a context stored again becomes a touch."""
        stream = self.tail.streams[table]
        run = [row for row in stream.rows if row.seq > self.archived[table]][:count]
        if not run:
            return
        known = self.in_lake[table]
        rows: list[Row] = []
        for row in run:
            if isinstance(row, ContextRow):
                again = row.digest in known
                rows.append(msgspec.structs.replace(touch(row, row.seq), epoch=row.epoch) if again else row)
                known.add(row.digest)
            elif isinstance(row, EventRow) and row.id not in known:
                rows.append(row)
                known.add(row.id)
        self.lake.append(table, rows, epoch=stream.epoch, first_seq=self.archived[table] + 1, last_seq=run[-1].seq)
        self.archived[table] = run[-1].seq

    # -- what every reader must see

    @invariant()
    def the_live_view_is_exact(self) -> None:
        if not hasattr(self, "connection"):
            return
        for table, column in (("events", "CAST(event_id AS VARCHAR)"), ("contexts", "right(ref, 32)")):
            shown = [value for (value,) in self.connection.execute(f"SELECT {column} FROM {table}").fetchall()]
            assert len(shown) == len(set(shown))
            assert set(shown) == self.model[table]  # type: ignore[index]  # str for Table
        both = self.connection.execute("SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM contexts)")
        assert both.fetchall() == [(len(self.model["events"]), len(self.model["contexts"]))]

    def teardown(self) -> None:
        self._run_between("events")
        if hasattr(self, "connection"):
            # A reader that attaches only now agrees.
            with connect(self.lake.path, tail=self.tail) as fresh:
                assert fresh.execute("SELECT count(*) FROM events").fetchall() == [(len(self.model["events"]),)]
            self.connection.close()
            if self.index is not None:
                self.index.close()
        assert verify_lake(self.lake.path).violations == []
        self.folder.cleanup()


assert EPOCH == "epoch-1"
TestLiveView = LiveView.TestCase
TestLiveView.settings = settings(
    max_examples=200 if settings().max_examples > 100 else 12, stateful_step_count=30, deadline=None
)
