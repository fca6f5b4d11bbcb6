"""Embedded contexts become references, in five steps.

1. *initialise*: the store answers; the source is read once (:mod:`holdfast.ops.embedded.survey`).
2. *new events* refer to their contexts already: whatever writes through Holdfast does.
3. *hot population*: the recent events are stored, first of all.
4. *cold migration*: the others, in order; the archiver takes all of them to the lake in the background.
5. *clean-up*: only after :mod:`holdfast.ops.embedded.verification` has found every event equal in the lake
   (:mod:`holdfast.ops.embedded.cleaning`).

Where a migration stands is a named context, ``migrations.<digest of the path>``.  A run that was cut short goes on
behind the last window that it noted; what it had stored beyond that is sent again, and the store knows it by its ids.
If the source has changed meanwhile, all of it is sent, and what is there already adds nothing.

Memory: two windows of events, the ids of the source (see ``survey``), and up to :data:`KNOWN_FORMS` references.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.ops.embedded.form import KIND, Parts, split
from holdfast.ops.embedded.reading import identity_of
from holdfast.ops.embedded.source import EmbeddedSource, Item
from holdfast.ops.embedded.survey import IdSet, Survey, survey
from holdfast.schemas import limits
from holdfast.schemas.errors import NotFoundError
from holdfast.schemas.failpoints import failpoint
from holdfast.streams.committer import Committer
from holdfast.streams.hot import NewContext

if TYPE_CHECKING:
    from holdfast.client import Holdfast

WINDOW_EVENTS: Final = limits.BATCH_MESSAGES
"""Events stored together: one atomic batch, so that they stand in the stream in the order of the source."""

WINDOW_BYTES: Final = 4 * limits.MIB
NOTED_EVERY: Final = 8
"""Windows between two notes of the progress: a run that was cut short sends at most so many again.  More where others
publish meanwhile: then a note lists where each window stands, and there is one for every eighth more of them."""

RECENT_S: Final = 86_400.0
KNOWN_FORMS: Final = 65_536
"""References of forms that a run remembers to have stored."""

AGENT: Final = "embedded"
"""Who signs an event that names no agent."""

STEPS: Final = ("initialise", "new events", "hot population", "cold migration", "clean-up")


class StoredRun(msgspec.Struct):
    """Events that stand one after another, both in the source and in the stream."""

    place: int
    seq: int
    count: int


class Progress(msgspec.Struct, kw_only=True):
    """What is noted of a migration.  ``done`` counts events in the order of sending: recent ones first.

    ``left_digest``: after a clean-up, the digest of the events that embed no context and so stayed as they are.
    """

    source: str
    digest: str
    events: int
    recent_from: int
    done: int = 0
    whole: int = 0
    unreadable: int = 0
    repeated: int = 0
    stored: list[StoredRun] = []
    verified: bool = False
    cleaned: bool = False
    left_digest: str | None = None
    v: int = 1


class Place(msgspec.Struct, frozen=True):
    """An event that is kept whole, where it stands and why."""

    line: int
    reason: str


class MigrationCounts(msgspec.Struct, kw_only=True):
    """What a migration did; the members of ``holdfast migrate --json``.

    ``events`` are in the source, ``sent`` were sent by this run, of which the log took ``new`` ones; ``resumed`` had
    been acknowledged to an earlier run.  ``contexts`` are the different forms of those sent.  ``whole`` events are
    stored as they are, since they cannot be put together of parts (``unreadable`` of them are no JSON object).
    ``repeated`` ids were met again in the source; those events have ids of their own.
    """

    events: int = 0
    embedded_bytes: int = 0
    resumed: int = 0
    sent: int = 0
    new: int = 0
    hot: int = 0
    cold: int = 0
    contexts: int = 0
    whole: int = 0
    unreadable: int = 0
    repeated: int = 0
    references_already: int = 0
    seconds: float = 0.0


class _Window(msgspec.Struct):
    place: int
    parts: list[Parts]
    lines: list[int]
    repeated: int
    is_recent: bool


class Migration:
    """One source into one namespace.  ``on_step`` hears of each step, ``on_progress`` of each window stored."""

    def __init__(
        self,
        hf: Holdfast,
        source: EmbeddedSource,
        *,
        recent_s: float = RECENT_S,
        on_step: Callable[[int, str], None] = lambda _number, _text: None,
        on_progress: Callable[[MigrationCounts], None] = lambda _: None,
        on_whole: Callable[[Place], None] = lambda _: None,
    ) -> None:
        self.counts = MigrationCounts()
        self.key = key_of(source)
        self._hf = hf
        self._source = source
        self._recent_s = recent_s
        self._on_step = on_step
        self._on_progress = on_progress
        self._on_whole = on_whole
        self._committer = Committer(hf.connection)
        self._forms: set[str] = set()
        self._known: set[str] = set()
        self._noted = 0

    async def run(self) -> Progress:
        """Takes the first four steps and returns what is noted of the migration; everything sent is acknowledged.

        Raises UnknownOutcomeError or another typed error when the server stops answering, InputError when the source
        cannot be read on: what was acknowledged stays, and the next run goes on there.
        """
        started = time.perf_counter()
        counts = self.counts
        found = await asyncio.to_thread(survey, self._source.items(), self._recent_s)
        counts.events, counts.embedded_bytes = found.events, found.size_bytes
        counts.references_already = found.migrated
        progress = await self._begin(found)
        counts.resumed = progress.done
        self._on_step(1, f"{found.events:,} events of {self._source.name}, {progress.done:,} of them stored before")
        self._on_step(2, "new events refer to their contexts already: emit and on the wire, context_ref")
        recent = progress.events - progress.recent_from
        self._on_step(3, f"{max(0, recent - progress.done):,} recent events to the hot tier")
        told_cold = False
        try:
            windows = self._windows(found.ids, progress)
            while (window := await asyncio.to_thread(next, windows, None)) is not None:
                if not window.is_recent and not told_cold:
                    told_cold = True
                    self._on_step(4, f"{progress.events - progress.done:,} older events, for the archiver to take on")
                await self._store(window, progress)
        finally:
            await self._committer.close()
        if not told_cold:
            self._on_step(4, "no older events")
        await self._note(progress)
        counts.whole, counts.unreadable, counts.repeated = progress.whole, progress.unreadable, progress.repeated
        counts.seconds = round(time.perf_counter() - started, 3)
        return progress

    async def _begin(self, found: Survey) -> Progress:
        known = await load_progress(self._hf, self._source)
        if known is not None and known.digest == found.digest:
            return known
        if known is not None and known.cleaned and known.left_digest == found.digest:
            # There is nothing left to migrate, and the note still tells where the events are.
            return known
        return Progress(
            source=self._source.name, digest=found.digest, events=found.events, recent_from=found.recent_from
        )

    def _windows(self, ids: IdSet, progress: Progress) -> Iterator[_Window]:
        """Yields what is left to send, recent events first; reads the source once for each of the two."""
        recent = progress.events - progress.recent_from
        spans = ((progress.recent_from, progress.events, True), (0, progress.recent_from, False))
        skipped = progress.done
        for start, end, is_recent in spans:
            size = recent if is_recent else progress.recent_from
            passed = min(skipped, size)
            skipped -= passed
            if passed < size:
                yield from self._span(ids, start + passed, end, is_recent=is_recent)

    def _span(self, ids: IdSet, start: int, end: int, *, is_recent: bool) -> Iterator[_Window]:
        window = _Window(start, [], [], 0, is_recent)
        size = 0
        for place, (item, parts, repeated) in enumerate(parts_of(self._hf.namespace, self._source, ids, start, end)):
            window.parts.append(parts)
            window.lines.append(item.line)
            window.repeated += repeated
            size += len(item.text)
            if len(window.parts) >= WINDOW_EVENTS or size >= WINDOW_BYTES:
                yield window
                window, size = _Window(start + place + 1, [], [], 0, is_recent), 0
        if window.parts:
            yield window

    async def _store(self, window: _Window, progress: Progress) -> None:
        forms = {parts.ref: parts for parts in window.parts}
        new = [parts for ref, parts in forms.items() if ref not in self._known]
        if new:
            namespace = self._hf.namespace
            await self._hf.store_many(
                [
                    NewContext(namespace=namespace, kind=KIND, body=parts.form, content_type=parts.content_type)
                    for parts in new
                ]
            )
            if len(self._known) + len(new) > KNOWN_FORMS:
                self._known.clear()
            self._known.update(parts.ref for parts in new)
        failpoint("migration.forms_stored")
        settled = await self._committer.store_many([parts.message() for parts in window.parts])
        failpoint("migration.window_stored")
        for number, outcome in enumerate(settled):
            _add_run(progress.stored, window.place + number, outcome.seq)
        counts = self.counts
        for line, parts in zip(window.lines, window.parts, strict=True):
            if parts.reason is not None:
                progress.whole += 1
                progress.unreadable += parts.is_unreadable
                self._on_whole(Place(line, parts.reason))
        progress.repeated += window.repeated
        progress.done += len(window.parts)
        counts.sent += len(window.parts)
        counts.new += sum(not outcome.existed for outcome in settled)
        if window.is_recent:
            counts.hot += len(window.parts)
        else:
            counts.cold += len(window.parts)
        self._forms.update(forms)
        counts.contexts = len(self._forms)
        self._on_progress(counts)
        self._noted += 1
        if self._noted >= max(NOTED_EVERY, len(progress.stored) // 8):
            await self._note(progress)

    async def _note(self, progress: Progress) -> None:
        self._noted = 0
        await save_progress(self._hf, self._source, progress)
        failpoint("migration.noted")


def parts_of(
    namespace: str, source: EmbeddedSource, ids: IdSet, start: int = 0, end: int | None = None
) -> Iterator[tuple[Item, Parts, bool]]:
    """Yields the events of a source with their parts and whether their id came before, from one place to another.

    Every place is asked for its id, so that repeated ids are numbered alike in every reading.
    """
    occurrences = ids.occurrences()
    place = -1
    for item in source.items():
        identity = identity_of(item.text)
        if identity.is_migrated:
            continue
        place += 1
        if end is not None and place >= end:
            return
        occurrence = occurrences.next(identity.key)
        if place < start:
            continue
        parts = split(namespace, item.text, known=ids.__contains__, agent=AGENT, occurrence=occurrence)
        yield item, parts, occurrence > 0


def key_of(source: EmbeddedSource) -> str:
    """Returns the key under which the progress of a source is noted: by its absolute path and table."""
    table = source.name.removeprefix(str(source.path))
    name = f"{source.path.absolute()}{table}"
    return f"migrations.{blake2b(name.encode('utf-8', 'surrogateescape'), digest_size=8).hexdigest()}"


async def load_progress(hf: Holdfast, source: EmbeddedSource) -> Progress | None:
    """Returns what is noted of the migration of a source; None when there is none."""
    try:
        value = await hf.keys.get(key_of(source))
    except NotFoundError:
        return None
    return msgspec.convert(value.body, Progress)


async def save_progress(hf: Holdfast, source: EmbeddedSource, progress: Progress) -> None:
    """Notes where a migration stands."""
    await hf.keys.put(key_of(source), msgspec.to_builtins(progress), kind="migration")


def _add_run(runs: list[StoredRun], place: int, seq: int) -> None:
    last = runs[-1] if runs else None
    if last is not None and last.place + last.count == place and last.seq + last.count == seq:
        last.count += 1
    else:
        runs.append(StoredRun(place, seq, 1))


def in_source_order(progress: Progress) -> Iterator[StoredRun]:
    """Yields where the events stand in the stream, in the order of the source."""
    yield from sorted(progress.stored, key=lambda run: run.place)
