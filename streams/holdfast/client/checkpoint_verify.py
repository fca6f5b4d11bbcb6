"""Compares a checkpoint with a system, item by item: is everything there, hot or cold, and does it say the same?

The streams are read once, and remembered by what each message is and says; then the file is gone through.  What is not
in the streams any more is asked of the resolver, which knows the lake: a context by its bytes, an event or version by
its identity.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
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
    CheckpointReader,
    Header,
    Item,
    check_file,
)
from holdfast.client.checkpoint_items import Decoded, content, decode_items, identity, item_of
from holdfast.client.checkpoint_scratch import Scratch, fingerprint, in_thread
from holdfast.client.cold import ResolverClient
from holdfast.client.reading import BodyReader
from holdfast.schemas import limits
from holdfast.schemas.errors import HoldfastError
from holdfast.schemas.rows import ContextRow, EventRow, KeyVersionRow
from holdfast.streams.hot import HotTier
from holdfast.streams.restoring import pages_of
from holdfast.streams.wire import H_SEQUENCE, dead_subject, namespace_token

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection
    from holdfast.streams.messages import StoredMessage

MOST_TOLD: Final = 20
"""Items that are named because something is wrong with them; the rest is counted."""

_CONTEXTS_AT_ONCE: Final = 100
"""Contexts read at once: of the largest, 50 MiB."""

_NAMES: Final = ("context", "version", "event", "dead letter")


class Finding(msgspec.Struct, frozen=True):
    """An item of the file that the system does not hold, or not as the file says."""

    what: str
    name: str
    reason: str


class VerifyReport(msgspec.Struct, kw_only=True):
    """What a comparison found, by stream in the order contexts, versions, events, dead letters.

    ``checked`` items were compared; ``hot`` and ``cold`` are where they were found, ``missing`` are stored nowhere,
    ``different`` say something else than the file.
    """

    checkpoint_id: str = ""
    checked: list[int] = msgspec.field(default_factory=lambda: [0, 0, 0, 0])
    hot: list[int] = msgspec.field(default_factory=lambda: [0, 0, 0, 0])
    cold: list[int] = msgspec.field(default_factory=lambda: [0, 0, 0, 0])
    missing: list[int] = msgspec.field(default_factory=lambda: [0, 0, 0, 0])
    different: list[int] = msgspec.field(default_factory=lambda: [0, 0, 0, 0])
    findings: list[Finding] = []

    @property
    def ok(self) -> bool:
        """Whether everything is there as the file says."""
        return not (any(self.missing) or any(self.different))


class Verification:
    """One comparison.  Changes nothing."""

    def __init__(self, connection: Connection, *, on_progress: Progress = no_progress) -> None:
        self.report = VerifyReport()
        self._connection = connection
        self._on_progress = on_progress
        self._hot = HotTier(connection)
        self._resolvers: dict[str, ResolverClient] = {}

    async def run(self, path: Path) -> VerifyReport:
        """Compares everything and returns what was found.

        Raises IntegrityError when the file is damaged, UnavailableError when something is not hot and no resolver
        answers.
        """
        info = await in_thread(partial(check_file, path))
        self.report.checkpoint_id = info.header.checkpoint_id
        total = sum(info.summary.items)
        with Scratch() as scratch:
            for stream in (KEYS, EVENTS, DEAD):
                await self._remember(stream, info.header.namespace, scratch)
            reader = await in_thread(lambda: CheckpointReader(path))
            try:
                pages = reader.pages()
                while (page := await in_thread(lambda: next(pages, None))) is not None:
                    await self._compare(reader.header, page, scratch)
                    self.report.checked[page[0].stream] += len(page)
                    self._on_progress(sum(self.report.checked), total)
            finally:
                reader.close()
        return self.report

    async def _remember(self, stream: int, namespace: str | None, scratch: Scratch) -> None:
        async for messages in pages_of(self._connection, STREAMS[stream], namespace):
            await in_thread(partial(_note, stream, messages, scratch))

    async def _compare(self, header: Header, page: Sequence[Item], scratch: Scratch) -> None:
        stream = page[0].stream
        if stream == DEAD:
            keys = [_letter_key(item.subject) for item in page]
            wanted = [fingerprint(item.payload) for item in page]
            await self._look_up(stream, keys, wanted, [item.subject for item in page], scratch)
            return
        for start in range(0, len(page), _CONTEXTS_AT_ONCE if stream == CONTEXTS else len(page)):
            some = page[start : start + _CONTEXTS_AT_ONCE] if stream == CONTEXTS else page
            decoded = await in_thread(partial(decode_items, header, some))
            await self._unreadable(header, decoded, scratch)
            if stream == CONTEXTS:
                await self._contexts(decoded)
            else:
                await self._rows(stream, decoded, scratch)

    async def _contexts(self, decoded: Iterable[Decoded]) -> None:
        rows: defaultdict[str, dict[str, ContextRow]] = defaultdict(dict)
        for item in decoded:
            if isinstance(item.row, ContextRow):
                rows[item.row.namespace][item.row.digest] = item.row
        for namespace, wanted in rows.items():
            reader = BodyReader(self._hot, self._resolver(namespace), namespace)
            # Every body is hashed again by whoever reads it, and so is the same as the file's.
            found, tiers, failed = await reader.load_stored([row.digest for row in wanted.values()])
            for row in wanted.values():
                if row.digest in found:
                    (self.report.hot if tiers[row.digest] == "hot" else self.report.cold)[CONTEXTS] += 1
                elif row.digest in failed:
                    self._add(self.report.different, CONTEXTS, row.ref, failed[row.digest].message)
                else:
                    self._add(self.report.missing, CONTEXTS, row.ref, "stored nowhere")

    async def _rows(self, stream: int, decoded: Sequence[Decoded], scratch: Scratch) -> None:
        rows = [item.row for item in decoded if isinstance(item.row, EventRow | KeyVersionRow)]
        found = await in_thread(partial(scratch.find, [identity(row) for row in rows]))
        absent: defaultdict[str, list[EventRow | KeyVersionRow]] = defaultdict(list)
        for row in rows:
            told = found.get(identity(row))
            if told is None:
                absent[row.namespace].append(row)
            elif _says(told, content(row)):
                self.report.hot[stream] += 1
            else:
                self._add(self.report.different, stream, _name(row), "it says something else")
        for namespace, some in absent.items():
            held = await self._held(namespace, some)
            for row in some:
                if _key(row) in held:
                    self.report.cold[stream] += 1
                else:
                    self._add(self.report.missing, stream, _name(row), "stored nowhere")

    async def _held(self, namespace: str, rows: Sequence[EventRow | KeyVersionRow]) -> set[object]:
        """Which of these the lake holds."""
        held: set[object] = set()
        for start in range(0, len(rows), limits.BATCH_REFS):
            some = rows[start : start + limits.BATCH_REFS]
            request = {
                "events": [row.id for row in some if isinstance(row, EventRow)],
                "versions": [[row.key, row.version] for row in some if isinstance(row, KeyVersionRow)],
            }
            answer = await self._resolver(namespace).call("held", request)
            held |= set(answer["events"]) | {(key, version) for key, version in answer["versions"]}
        return held

    async def _unreadable(self, header: Header, decoded: Sequence[Decoded], scratch: Scratch) -> None:
        """What does not decode is a dead letter by now, or still stands where it stood."""
        items = [item.item for item in decoded if isinstance(item.row, HoldfastError)]
        if not items:
            return
        stream = items[0].stream
        point = header.points[stream]
        subjects = [dead_subject(namespace_token(item.subject), point.stream, point.epoch, item.seq) for item in items]
        letters = await in_thread(partial(scratch.find, [_letter_key(subject) for subject in subjects]))
        places = await in_thread(partial(scratch.find, [_place_key(point.stream, item) for item in items]))
        for item, subject in zip(items, subjects, strict=True):
            is_there = _letter_key(subject) in letters or _place_key(point.stream, item) in places
            if is_there or (stream == CONTEXTS and await self._still_hot(item)):
                self.report.hot[stream] += 1
            else:
                self._add(self.report.missing, stream, item.subject, "neither in its stream nor a dead letter")

    async def _still_hot(self, item: Item) -> bool:
        """Whether the message at the subject of what is no context is the same one."""
        reply = await self._connection.lean.request(f"$JS.API.DIRECT.GET.{STREAMS[CONTEXTS]}.{item.subject}")
        return H_SEQUENCE in (reply.headers or {}) and reply.data == item.payload

    async def _look_up(
        self, stream: int, keys: Sequence[bytes], wanted: Sequence[bytes], names: Sequence[str], scratch: Scratch
    ) -> None:
        found = await in_thread(partial(scratch.find, keys))
        for key, expected, name in zip(keys, wanted, names, strict=True):
            if key not in found:
                self._add(self.report.missing, stream, name, "stored nowhere")
            elif found[key] == expected:
                self.report.hot[stream] += 1
            else:
                self._add(self.report.different, stream, name, "it says something else")

    def _resolver(self, namespace: str) -> ResolverClient:
        return self._resolvers.setdefault(namespace, ResolverClient(self._connection, namespace))

    def _add(self, counts: list[int], stream: int, name: str, reason: str) -> None:
        counts[stream] += 1
        if len(self.report.findings) < MOST_TOLD:
            self.report.findings.append(Finding(_NAMES[stream], name, reason))


def _note(stream: int, messages: Sequence[StoredMessage], scratch: Scratch) -> None:
    entries: list[tuple[bytes, bytes]] = []
    for message in messages:
        if stream == DEAD:
            entries.append((_letter_key(message.subject), fingerprint(message.payload)))
            continue
        decoded = item_of(stream, message)
        if isinstance(decoded.row, EventRow | KeyVersionRow):
            entries.append((identity(decoded.row), content(decoded.row)))
        else:
            entries.append((_place_key(STREAMS[stream], decoded.item), b""))
    if stream == DEAD:
        scratch.add(entries)
        return
    # One id may have two contents: the archiver keeps the first, and the other is a dead letter.
    known = scratch.find([key for key, _ in entries])
    for key, value in entries:
        told = known.get(key, b"")
        if not _says(told, value):
            known[key] = told + value
    scratch.put(known.items())
    scratch.add(entries)


def _says(told: bytes, value: bytes) -> bool:
    """Whether one of the contents that were met is this one."""
    return any(told[start : start + 16] == value for start in range(0, len(told), 16))


def _letter_key(subject: str) -> bytes:
    return b"d" + fingerprint(subject)


def _place_key(stream: str, item: Item) -> bytes:
    return b"p" + fingerprint(stream, item.subject, str(item.seq), item.payload)


def _key(row: EventRow | KeyVersionRow) -> object:
    return row.id if isinstance(row, EventRow) else (row.key, row.version)


def _name(row: EventRow | KeyVersionRow) -> str:
    return row.id if isinstance(row, EventRow) else f"{row.key} version {row.version}"


__all__ = ["Finding", "Verification", "VerifyReport"]
