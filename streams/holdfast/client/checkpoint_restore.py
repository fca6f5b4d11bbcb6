"""Restoring a checkpoint: contexts, then the versions of keys, then events, then dead letters, each in its order.

The file is read twice: first to see that it is whole and what stands in it twice, writing nothing, then to restore it.
What is written is guarded so that a restore that was cut off may be run again: contexts and dead letters are created
once by their subject, a version is written behind the sequence of the one before it, and an event's id is looked for
among those that are there.  That a restore is under way is marked in the streams; see
:mod:`holdfast.streams.restoring`.

====================  ==================================================================================================
of a key, the store   the versions of the file
====================  ==================================================================================================
has nothing           are written, from the oldest that the file has
has the same chain,   those that are missing are written: a restore that was cut off
up to some version
has another chain     are passed over, and the key is told of
====================  ==================================================================================================
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.client.checkpoint_capture import Progress, no_progress
from holdfast.client.checkpoint_file import (
    CONTEXTS,
    DEAD,
    EVENTS,
    KEYS,
    STREAMS,
    CheckpointInfo,
    CheckpointReader,
    Header,
    Item,
)
from holdfast.client.checkpoint_items import (
    Decoded,
    content,
    decode_items,
    event_message,
    form_of,
    letter_message,
    message_of,
    version_message,
)
from holdfast.client.checkpoint_plan import note_page, note_target, plan_events, plan_versions
from holdfast.client.checkpoint_scratch import Scratch, in_thread
from holdfast.client.cold import cold_chunks
from holdfast.schemas.errors import (
    ConfigurationError,
    ConflictError,
    HoldfastError,
    TooLargeError,
    UnavailableError,
)
from holdfast.schemas.rows import ContextRow, KeyVersionRow
from holdfast.streams.dead import bury
from holdfast.streams.hot import HotTier
from holdfast.streams.key_chains import Head
from holdfast.streams.key_log import KeyLog
from holdfast.streams.publish import (
    SUBJECT_FULL,
    WRONG_LAST_SEQUENCE,
    Outgoing,
    Refused,
    publish,
    publish_batch,
)
from holdfast.streams.restoring import is_empty, mark_restore, pages_of, restore_under_way
from holdfast.streams.retry import READ_DEADLINE_S, WRITE_DEADLINE_S, call_with_retry
from holdfast.streams.topology import stream_info

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection

MOST_TOLD: Final = 20
"""Keys that are named because they were passed over; the rest is counted."""

_ATTEMPTS: Final = 5
"""How often a batch of versions is planned anew because another writer was faster."""


class RestoreReport(msgspec.Struct, kw_only=True):
    """What a restore did, by stream in the order contexts, versions, events, dead letters.

    ``stored`` was written now, ``present`` was there.  ``repeated`` items say again what another one of the file says.
    ``buried`` items are none of ours, damaged or contradict another one: they are dead letters now, as they would have
    become.  ``skipped`` versions are those of ``skipped_keys`` keys whose chain is another one; some are in ``keys``.
    """

    checkpoint_id: str = ""
    stored: list[int] = msgspec.field(default_factory=lambda: [0, 0, 0, 0])
    present: list[int] = msgspec.field(default_factory=lambda: [0, 0, 0, 0])
    repeated: int = 0
    buried: int = 0
    skipped: int = 0
    skipped_keys: int = 0
    keys: list[str] = []


class Restore:
    """One restore.  ``merge``: into a system that is not empty; what is there stays as it is."""

    def __init__(self, connection: Connection, *, merge: bool = False, on_progress: Progress = no_progress) -> None:
        self.report = RestoreReport()
        self._connection = connection
        self._merge = merge
        self._on_progress = on_progress
        self._done = 0
        self._total = 0

    async def run(self, path: Path) -> RestoreReport:
        """Restores a checkpoint; everything is acknowledged when this returns.

        Raises IntegrityError when the file is damaged or cut short, InvalidFieldError when it is none,
        ConfigurationError when the system holds something and this is no merge: then nothing was written.  After any
        other error, and after a cancel, the same restore again completes it and doubles nothing.
        """
        with Scratch() as scratch:
            info = await self._check(path, scratch)
            self.report.checkpoint_id = info.header.checkpoint_id
            hot_info = await call_with_retry(
                partial(stream_info, self._connection, STREAMS[CONTEXTS]), deadline_s=READ_DEADLINE_S
            )
            await self._claim(info)
            hot = HotTier(self._connection, replicas=hot_info.replicas, cold=cold_chunks(self._connection))
            log = KeyLog(self._connection, replicas=hot_info.replicas)
            try:
                await self._survey(info.header.namespace, scratch)
                await self._write(path, scratch, hot, log)
            finally:
                await hot.close()
                await log.close()
            if not self._merge:
                await mark_restore(self._connection, None)
        return self.report

    async def _check(self, path: Path, scratch: Scratch) -> CheckpointInfo:
        """Reads the whole file, and remembers what stands in it twice and where the chains of keys begin."""
        reader = await in_thread(lambda: CheckpointReader(path))
        try:
            pages = reader.pages()
            while (page := await in_thread(lambda: next(pages, None))) is not None:
                await in_thread(partial(note_page, reader.header, page, scratch))
            self._total = sum(reader.info.summary.items)
            return reader.info
        finally:
            reader.close()

    async def _claim(self, info: CheckpointInfo) -> None:
        """Sees to it that the system is this restore's to fill."""
        under_way = await restore_under_way(self._connection)
        if under_way == info.digest or self._merge:
            return
        if under_way is not None:
            raise ConfigurationError(
                "the restore of another checkpoint has begun here and not ended",
                hint="run that one again to complete it, or restore this one into a new data directory",
            )
        for stream in STREAMS:
            if not await is_empty(self._connection, stream, info.header.namespace):
                raise ConfigurationError(
                    f"the system is not empty: stream {stream} holds messages",
                    field="merge",
                    hint="restore into a new data directory, or add --merge: what is there stays as it is",
                )
        await mark_restore(self._connection, info.digest)

    async def _survey(self, namespace: str | None, scratch: Scratch) -> None:
        """Remembers the events and the heads of keys that the store holds before anything is written."""
        for stream in (KEYS, EVENTS):
            async for messages in pages_of(self._connection, STREAMS[stream], namespace):
                await in_thread(partial(note_target, stream, messages, scratch))

    async def _write(self, path: Path, scratch: Scratch, hot: HotTier, log: KeyLog) -> None:
        reader = await in_thread(lambda: CheckpointReader(path))
        try:
            pages = reader.pages()
            while (page := await in_thread(lambda: next(pages, None))) is not None:
                decoded = await in_thread(partial(decode_items, reader.header, page))
                stream = page[0].stream
                if stream == CONTEXTS:
                    await self._contexts(reader.header, decoded, hot)
                elif stream == KEYS:
                    await self._versions(reader.header, decoded, scratch, log)
                elif stream == EVENTS:
                    await self._events(reader.header, decoded, scratch)
                else:
                    await self._letters(page)
                self._done += len(page)
                self._on_progress(self._done, self._total)
        finally:
            reader.close()

    async def _contexts(self, header: Header, decoded: Sequence[Decoded], hot: HotTier) -> None:
        # A manifest comes after its parts are acknowledged: it is never without them.
        for has_parts in (False, True):
            forms: defaultdict[str, list[Decoded]] = defaultdict(list)
            for item in decoded:
                if isinstance(item.row, ContextRow) and (item.row.form == "manifest") == has_parts:
                    forms[item.row.namespace].append(item)
            for namespace, items in forms.items():
                settled = await hot.store_forms(namespace, [form_of(item) for item in items])
                existed = sum(outcome.existed for outcome in settled)
                self.report.present[CONTEXTS] += existed
                self.report.stored[CONTEXTS] += len(settled) - existed
        await self._bury(header, decoded)

    async def _versions(self, header: Header, decoded: Sequence[Decoded], scratch: Scratch, log: KeyLog) -> None:
        plan = await in_thread(partial(plan_versions, decoded, scratch))
        self.report.present[KEYS] += plan.present
        self.report.repeated += plan.repeated
        self.report.skipped += plan.skipped
        self.report.skipped_keys += len(plan.foreign)
        self.report.keys += plan.foreign[: MOST_TOLD - len(self.report.keys)]
        await self._append(plan.rows, log)
        await self._bury(header, [*decoded, *plan.contradicting])

    async def _append(self, rows: Sequence[KeyVersionRow], log: KeyLog) -> None:
        pending = list(rows)
        for _ in range(_ATTEMPTS):
            if not pending:
                return
            heads = await _heads(pending, log)
            pending = self._unwritten(pending, heads)
            messages: list[Outgoing] = []
            begun: set[tuple[str, str]] = set()
            for row in pending:
                key = (row.namespace, row.key)
                head = heads.get(key, Head())
                # Of a key that is in the batch twice, only the first follows something that is there.
                messages.append(version_message(row, None if key in begun else head.last_seq))
                begun.add(key)
            if not messages:
                return
            try:
                await call_with_retry(partial(publish_batch, self._connection, messages), deadline_s=WRITE_DEADLINE_S)
            except Refused as refusal:
                if refusal.err_code != WRONG_LAST_SEQUENCE:
                    raise _refused(refusal, STREAMS[KEYS]) from refusal
                continue  # our own, written by an attempt that got no answer; or another writer's: the heads tell
            self.report.stored[KEYS] += len(pending)
            return
        raise UnavailableError(
            "another writer changes the keys that are being restored", hint="stop it, and run the restore again"
        )

    def _unwritten(self, rows: Sequence[KeyVersionRow], heads: Mapping[tuple[str, str], Head]) -> list[KeyVersionRow]:
        """Those that are not there.  Others were written by this restore, but for what it raises ConflictError of."""
        pending: list[KeyVersionRow] = []
        for row in rows:
            head = heads.get((row.namespace, row.key), Head()).row
            if head is None or row.version > head.version:
                pending.append(row)
                continue
            if row.version == head.version and content(head) != content(row):
                raise ConflictError(
                    f"another writer has written version {row.version} of key {row.key!r} meanwhile",
                    field="key",
                    hint="restore into a system that nobody writes to",
                )
            self.report.stored[KEYS] += 1
        return pending

    async def _events(self, header: Header, decoded: Sequence[Decoded], scratch: Scratch) -> None:
        plan = await in_thread(partial(plan_events, decoded, scratch))
        self.report.present[EVENTS] += plan.present
        self.report.repeated += plan.repeated
        messages = await in_thread(lambda: [event_message(item) for item in plan.new])
        if messages:
            await self._publish(messages)
        await self._bury(header, [*decoded, *plan.contradicting])

    async def _publish(self, messages: Sequence[Outgoing]) -> None:
        """Publishes events in their order: one batch at a time, and where it is refused, one event at a time."""
        try:
            await call_with_retry(partial(publish_batch, self._connection, messages), deadline_s=WRITE_DEADLINE_S)
            self.report.stored[EVENTS] += len(messages)
            return
        except (Refused, TooLargeError):
            pass  # one is known, or does not fit with the headers of a batch: singly, each tells for itself
        for message in messages:
            try:
                ack = await call_with_retry(partial(publish, self._connection, message), deadline_s=WRITE_DEADLINE_S)
            except Refused as refusal:
                raise _refused(refusal, STREAMS[EVENTS]) from refusal
            if ack.duplicate:
                self.report.present[EVENTS] += 1
            else:
                self.report.stored[EVENTS] += 1

    async def _letters(self, page: Sequence[Item]) -> None:
        for item in page:
            try:
                await call_with_retry(
                    partial(publish, self._connection, letter_message(item)), deadline_s=WRITE_DEADLINE_S
                )
            except Refused as refusal:
                if refusal.err_code not in (WRONG_LAST_SEQUENCE, SUBJECT_FULL):
                    raise _refused(refusal, STREAMS[DEAD]) from refusal
                self.report.present[DEAD] += 1
            else:
                self.report.stored[DEAD] += 1

    async def _bury(self, header: Header, decoded: Iterable[Decoded]) -> None:
        """Makes dead letters of what does not decode: what the archiver does with it, under the same name."""
        for item in decoded:
            if isinstance(item.row, HoldfastError):
                stream = item.item.stream
                if await bury(self._connection, STREAMS[stream], message_of(header, item.item), item.row):
                    self.report.buried += 1
                else:
                    self.report.present[stream] += 1


async def _heads(rows: Iterable[KeyVersionRow], log: KeyLog) -> dict[tuple[str, str], Head]:
    keys: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        keys[row.namespace][row.key] = None
    heads: dict[tuple[str, str], Head] = {}
    for namespace, names in keys.items():
        heads |= {(namespace, key): head for key, head in (await log.heads(namespace, names)).items()}
    return heads


def _refused(refusal: Refused, stream: str) -> UnavailableError:
    return UnavailableError(
        f"stream {stream} cannot store what is restored: {refusal.description} ({refusal.err_code})",
        hint="see the server's limits of storage, and run the restore again",
    )


__all__ = ["MOST_TOLD", "Restore", "RestoreReport"]
