"""Holds the streams of a server against the lake.

- **I1** what the lake says is archived is in the lake, or is a dead letter; every reference in an event leads to a
  context in the hot tier or in the lake; no message is missing above a watermark; the stream still holds what the
  archiver remembers of it (anchors).
- **I3** a watermark names this life of its stream, is not beyond its end, and nothing above it was purged.
- **I4** every context in the hot tier hashes to the reference that names it.

Everything is read page by page, so memory stays bounded.  The system may go on meanwhile: the lake is read first, then
each stream up to its end of that moment, and what seems to be missing is looked for once more in the newest lake before
it is called a violation.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Final

from holdfast.ops.verify_archive import Archive, Findings, NamedRef
from holdfast.schemas.errors import DamagedError, GapError, HoldfastError, IntegrityError
from holdfast.schemas.refs import Digest, Ref, parse_ref
from holdfast.schemas.rows import Anchor, EventRow, KeyVersionRow, Row, Table
from holdfast.streams.connection import Connection
from holdfast.streams.dead import read_dead_letters
from holdfast.streams.decode import decode_event, decode_row
from holdfast.streams.hot import HotTier
from holdfast.streams.messages import StoredMessage
from holdfast.streams.pull import StreamReader
from holdfast.streams.topology import StreamInfo, stream_info
from holdfast.streams.wire import STREAM_OF_TABLE
from holdfast.workers.archive_plan import identity_of
from holdfast.workers.stream_marks import StreamMarks, lost_since

_PAGE: Final = 2_000

# Events first: a context is stored before the event that names it, so it is in what is read later.
_ORDER: Final[tuple[Table, ...]] = ("events", "contexts", "key_versions")


class StreamCheck:
    """One check of all streams; ``archive`` None when the lake is not at hand: then only I4 is told."""

    def __init__(
        self, connection: Connection, archive: Archive | None, checked: Counter[str], findings: Findings
    ) -> None:
        self._connection = connection
        self._archive = archive
        self._checked = checked
        self._findings = findings
        self._hot = HotTier(connection)
        self._undecodable: list[tuple[Table, StoredMessage, HoldfastError]] = []

    async def run(self) -> None:
        """Checks everything; findings and counts are in what this was made with."""
        for table in _ORDER:
            info = await self._checked_info(table)
            if info is not None:
                await self._check_stream(table, info)
        if self._archive is not None:
            await self._check_archived_refs(self._archive)
        await self._check_undecodable()

    async def _checked_info(self, table: Table) -> StreamInfo | None:
        """I3: returns the state of a stream, held against the watermarks of before and after; None if it is gone."""
        stream = STREAM_OF_TABLE[table]
        before = None if self._archive is None else self._archive.watermarks[table]
        try:
            info = await stream_info(self._connection, stream)
        except GapError:
            if before is not None:
                self._add(
                    "I1", "stream", f"the stream is gone, though {before.seq} messages of it are archived", stream
                )
            elif self._archive is None:
                raise
            return None
        if self._archive is None:
            return info
        self._checked["watermarks"] += 1
        after = await asyncio.to_thread(self._archive.lake.watermark, table)
        mark = await asyncio.to_thread(StreamMarks(self._archive.path).get, stream)
        lost = await lost_since(self._connection, info, mark, after, may_be_trimmed=table == "key_versions")
        if lost is not None:
            self._add("I1", "tail", lost.what, stream)
        if before is not None and before.epoch != info.epoch:
            self._add(
                "I3", "watermark", f"the watermark is of epoch {before.epoch}, the stream of {info.epoch}", stream
            )
        elif before is not None and before.seq > info.last_seq:
            self._add("I3", "watermark", f"the watermark {before.seq} is beyond the end, {info.last_seq}", stream)
        archived = 0 if after is None or after.epoch != info.epoch else after.seq
        # An untouched stream says 0, a stream's first message is 1.
        if info.last_seq and info.first_seq > archived + 1:
            self._add("I3", "purged", f"begins at {info.first_seq}, the lake ends at {archived}", stream)
        return info

    async def _check_stream(self, table: Table, info: StreamInfo) -> None:
        mark = None if self._archive is None else self._archive.watermarks[table]
        archived_to = mark.seq if mark is not None and mark.epoch == info.epoch else 0
        anchors = await self._anchors(table, info)
        reader = StreamReader(self._connection, info.name, max(1, info.first_seq), allow_gaps=True)
        expected = reader.next_seq
        try:
            while reader.next_seq <= info.last_seq:
                messages, now = await reader.read(limit=_PAGE, up_to=info.last_seq)
                # What was purged since is in the lake: only what is missing above the watermark, or inside, is a loss.
                expected = max(expected, now.first_seq, archived_to + 1)
                for message in messages:
                    if message.seq > expected and await self._is_lost(table, message.seq - 1):
                        lost = f"{expected} to {message.seq - 1} are missing, and nothing of ours removed them"
                        self._add("I1", "gap", lost, info.name)
                    expected = max(expected, message.seq + 1)
                await self._check_page(table, messages, archived_to, anchors)
                if not messages:
                    return
        finally:
            await reader.close()

    async def _is_lost(self, table: Table, seq: int) -> bool:
        """Whether a message that is not in its stream is not archived either; superseded key versions are trimmed."""
        if self._archive is None or table == "key_versions":
            return False
        mark = await asyncio.to_thread(self._archive.lake.watermark, table)
        return mark is None or mark.seq < seq

    async def _anchors(self, table: Table, info: StreamInfo) -> dict[int, Anchor]:
        if self._archive is None:
            return {}
        known = await asyncio.to_thread(self._archive.lake.anchors, table, info.first_seq)
        return {anchor.seq: anchor for anchor in known}

    async def _check_page(
        self, table: Table, messages: Sequence[StoredMessage], archived_to: int, anchors: dict[int, Anchor]
    ) -> None:
        stream = STREAM_OF_TABLE[table]
        self._checked[f"hot_{table}" if table == "contexts" else f"stream_{table}"] += len(messages)
        archived: list[Row] = []
        refs: dict[NamedRef, None] = {}
        for message, row in await asyncio.to_thread(_decode, table, messages):
            if isinstance(row, HoldfastError):
                self._note_undecodable(table, message, row, archived_to)
                continue
            anchor = anchors.get(row.seq)
            if anchor is not None:
                self._checked["anchors"] += 1
                if (anchor.identity, anchor.stored_at_ms) != (identity_of(row), row.stored_at_ms):
                    what = f"holds {identity_of(row)} at {row.seq}, where {anchor.identity} was archived"
                    self._add("I1", "anchor", what, stream)
            if row.seq <= archived_to:
                archived.append(row)
            ref = _ref_of(row)
            # An inline context above the watermark is still in its message, and may not have been stored yet.
            if ref is not None and (row.seq <= archived_to or not _is_inline(table, message)):
                refs[row.namespace, ref] = None
        if self._archive is not None:
            self._checked["archived_positions"] += len(archived)
            for row in await asyncio.to_thread(self._archive.missing_rows, archived):
                what = f"{identity_of(row)} at {row.seq} is below the watermark and not in the lake"
                self._add("I1", "archived", what, stream)
            await self._check_refs(list(refs), stream)

    async def _check_archived_refs(self, archive: Archive) -> None:
        pages = archive.event_refs()
        try:
            while (page := await asyncio.to_thread(next, pages, None)) is not None:
                await self._check_refs(page, "lake/events")
        except DamagedError:
            return  # the check of the lake has told which rows; what is damaged names nothing

    async def _check_refs(self, refs: Sequence[NamedRef], where: str) -> None:
        """I1: each reference leads to a context: in the lake, in the hot tier, or by now in the lake."""
        archive = self._archive
        if archive is None:
            return
        self._checked["refs"] += len(refs)
        missing = await asyncio.to_thread(archive.missing_refs, refs)
        if missing:
            missing = await self._not_hot(missing)
        if missing:
            await asyncio.to_thread(archive.refresh)
            missing = await asyncio.to_thread(archive.missing_refs, missing)
        for namespace, ref in missing:
            self._findings.add(
                "I1",
                "ref",
                f"an event of namespace {namespace!r} refers to {ref}, which is in no tier",
                at=where,
                next_step="if it was acknowledged once, restore the lake from a backup; else its publisher made it up",
            )

    async def _not_hot(self, refs: Sequence[NamedRef]) -> list[NamedRef]:
        by_namespace: defaultdict[str, list[Digest]] = defaultdict(list)
        for namespace, ref in refs:
            by_namespace[namespace].append(parse_ref(ref).digest)
        held: set[NamedRef] = set()
        for namespace, digests in by_namespace.items():
            found, _ = await self._hot.get_stored_many(namespace, digests)
            held.update((namespace, row.ref) for row in found.values())
        return [ref for ref in refs if ref not in held]

    def _note_undecodable(self, table: Table, message: StoredMessage, error: HoldfastError, archived_to: int) -> None:
        if isinstance(error, IntegrityError):
            self._add("I4", "digest", f"{message.subject} at {message.seq}: {error.message}", STREAM_OF_TABLE[table])
        elif message.seq <= archived_to:
            self._undecodable.append((table, message, error))

    async def _check_undecodable(self) -> None:
        """I1: what was passed over by the archiver is a dead letter."""
        if not self._undecodable:
            return
        buried = {(letter.stream, letter.epoch, letter.seq) async for _, letter in read_dead_letters(self._connection)}
        for table, message, error in self._undecodable:
            stream = STREAM_OF_TABLE[table]
            self._checked["dead_letters"] += 1
            if (stream, message.epoch, message.seq) not in buried:
                what = f"{message.seq} was not archived ({error.message}) and is no dead letter"
                self._add("I1", "undecodable", what, stream)

    def _add(self, invariant: str, kind: str, what: str, at: str) -> None:
        self._findings.add(
            invariant, kind, what, at=at, next_step="stop purging (stop the archiver), then compare with a backup"
        )


def _decode(table: Table, messages: Sequence[StoredMessage]) -> list[tuple[StoredMessage, Row | HoldfastError]]:
    decoded: list[tuple[StoredMessage, Row | HoldfastError]] = []
    for message in messages:
        try:
            decoded.append((message, decode_row(table, message)))
        except HoldfastError as error:
            decoded.append((message, error))
    return decoded


def _ref_of(row: Row) -> Ref | None:
    if isinstance(row, EventRow):
        return row.context_ref
    return row.ref if isinstance(row, KeyVersionRow) else None


def _is_inline(table: Table, message: StoredMessage) -> bool:
    return table == "events" and b'"context"' in message.payload and decode_event(message).inline is not None
