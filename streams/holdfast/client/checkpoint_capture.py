"""Capturing the hot state into a file, while the system runs and is written to.

The point of the capture is fixed first: the last sequences of the dead letters, events, keys and contexts, in this
order.  A context is acknowledged before whatever refers to it is sent, so every reference of a captured event or
version is to a context below the point of the contexts, or to one that had left the hot tier.  Then each stream is read
up to its point, contexts first, since what is oldest leaves first.  What is archived and leaves the hot tier before it
was read is not in the file and is counted: it is in the lake.

::

    streams ──▶ page (500 messages, 4 MiB) ──▶ decoded, checked ──▶ file
                                                   │ digests, references
                                                   ▼
                                            scratch (on the disk)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from holdfast.client.checkpoint_file import (
    CONTEXTS,
    DEAD,
    EVENTS,
    KEYS,
    PAGE_BYTES,
    PAGE_ITEMS,
    STREAMS,
    CheckpointInfo,
    CheckpointWriter,
    Item,
    Point,
    new_header,
)
from holdfast.client.checkpoint_items import digest_key, item_of, refs_of
from holdfast.client.checkpoint_scratch import Scratch, in_thread
from holdfast.schemas.errors import GapError, HoldfastError
from holdfast.schemas.rows import ContextRow
from holdfast.streams.pull import StreamReader
from holdfast.streams.restoring import namespace_filter
from holdfast.streams.retry import WRITE_DEADLINE_S, call_with_retry
from holdfast.streams.topology import StreamInfo, stream_info

if TYPE_CHECKING:
    from holdfast.schemas.refs import Digest
    from holdfast.streams.connection import Connection
    from holdfast.streams.messages import StoredMessage

_POINT_ORDER: Final = (DEAD, EVENTS, KEYS, CONTEXTS)
"""What refers comes before what it refers to."""

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much: of a stream that is purged meanwhile it is less in the end."""


def no_progress(_done: int, _total: int) -> None:
    """Tells nobody."""


class Capture:
    """One capture.  ``namespace`` None takes all of them."""

    def __init__(
        self, connection: Connection, *, namespace: str | None = None, on_progress: Progress = no_progress
    ) -> None:
        self._connection = connection
        self._namespace = namespace
        self._on_progress = on_progress
        self._infos: dict[int, StreamInfo] = {}
        self._done = 0
        self._purged = 0
        self._elsewhere = 0
        self._unreadable = 0

    async def run(self, path: Path, checkpoint_id: str, created_at_ms: int) -> CheckpointInfo:
        """Writes the whole checkpoint and returns what it says of itself.

        Everything acknowledged before the call and still hot is in it.  ``path`` is replaced when it is complete, and
        untouched when this is cancelled or fails.  Raises GapError when a stream is not there or begins anew meanwhile,
        ConfigurationError when the file cannot be written, UnavailableError when the server stops answering.
        """
        for stream in _POINT_ORDER:
            self._infos[stream] = await call_with_retry(
                partial(stream_info, self._connection, STREAMS[stream]), deadline_s=WRITE_DEADLINE_S
            )
        points = [_point(self._infos[stream]) for stream in range(len(STREAMS))]
        header = new_header(checkpoint_id, created_at_ms, self._namespace, (points[0], points[1], points[2], points[3]))
        opened: list[CheckpointWriter] = []
        with Scratch() as scratch:
            try:
                await in_thread(lambda: opened.append(CheckpointWriter(path, header)))
                for stream in range(len(STREAMS)):
                    await self._copy(stream, opened[0], scratch)
                return await in_thread(partial(self._finish, opened[0]))
            finally:
                for writer in opened:
                    writer.abort()

    def _finish(self, writer: CheckpointWriter) -> CheckpointInfo:
        return writer.finish(purged=self._purged, elsewhere=self._elsewhere, unreadable=self._unreadable)

    async def _copy(self, stream: int, writer: CheckpointWriter, scratch: Scratch) -> None:
        begun = self._infos[stream]
        total = sum(info.messages for info in self._infos.values())
        reader = StreamReader(
            self._connection,
            begun.name,
            max(1, begun.first_seq),
            allow_gaps=True,
            filter_subject=namespace_filter(begun.name, self._namespace),
        )
        try:
            while reader.next_seq <= begun.last_seq:
                before = reader.next_seq
                messages, now = await call_with_retry(
                    partial(reader.read, limit=PAGE_ITEMS, up_to=begun.last_seq, max_bytes=PAGE_BYTES),
                    deadline_s=WRITE_DEADLINE_S,
                )
                if now.epoch != begun.epoch:
                    raise GapError(f"stream {begun.name} began anew while it was captured", hint="capture again")
                if stream in (CONTEXTS, EVENTS):
                    # These two are purged from their beginning alone, and only what is archived.
                    self._purged += max(0, min(now.first_seq, begun.last_seq + 1) - before)
                if messages:
                    await in_thread(partial(self._take, stream, messages, writer, scratch))
                self._done += len(messages)
                self._on_progress(self._done, total)
        finally:
            await reader.close()

    def _take(self, stream: int, messages: Sequence[StoredMessage], writer: CheckpointWriter, scratch: Scratch) -> None:
        items: list[Item] = []
        held: list[tuple[bytes, bytes]] = []
        refs: dict[Digest, None] = {}
        for message in messages:
            decoded = item_of(stream, message)
            items.append(decoded.item)
            if isinstance(decoded.row, HoldfastError):
                self._unreadable += 1
                continue
            if isinstance(decoded.row, ContextRow):
                held.append((digest_key(decoded.row.digest), b""))
            refs |= dict.fromkeys(refs_of(decoded))
        writer.write(items)
        scratch.add(held)
        # Chunks stand before their manifests, contexts before all else: what is not there by now does not come.
        keys = [digest_key(digest) for digest in refs]
        found = scratch.find(keys)
        lacking = [key for key in keys if key not in found]
        self._elsewhere += len(lacking)
        scratch.add((key, b"elsewhere") for key in lacking)


def _point(info: StreamInfo) -> Point:
    return Point(info.name, info.epoch, info.first_seq, info.last_seq)
