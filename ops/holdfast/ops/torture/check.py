"""The judge: what was noted against what can be read.  Pure: everything is given, nothing is fetched.

=====  ==========================================================================================================
I1     everything acknowledged is shown by each reader that must show all, exactly once, with its exact bytes
I2     nothing is shown that nobody attempted; what was refused is shown never, what is unknown once at most
I3     what one process stored after it knew of another stands behind it; watermarks only advance, nothing is purged
       above them
I4     one place of a stream, and one id, has one content, in the stream and in the lake
I5     a reader that cannot read says so with an error; during the run it shows what was acknowledged before
I7     no producer met an error that is none of the product's own
=====  ==========================================================================================================

Versions of a key are numbered from 1 without gaps (I1), and each is exactly what its writer was told (I4).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from holdfast.ops.torture.history import UNTYPED, Event, History
from holdfast.ops.torture.seen import MISSING, Mark, Observation, Reader, SeenVersion, View

MOST_OF_A_KIND: Final = 20
"""Most violations listed of one kind and reader; the rest is counted."""


class Violation(msgspec.Struct, frozen=True):
    """A broken invariant: where, what, and the few lines of the history that say what should be there."""

    invariant: str
    object: str
    what: str
    history: list[str] = []


class Sample(msgspec.Struct, frozen=True):
    """What was seen in the middle of a run: where archiving stood at a moment."""

    at_s: float
    marks: list[Mark] = []


class _Findings:
    def __init__(self, history: History) -> None:
        self.found: list[Violation] = []
        self._history = history
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, invariant: str, kind: str, at: str, what: str, events: Iterable[Event] = ()) -> None:
        self._counts[invariant, kind] += 1
        if self._counts[invariant, kind] <= MOST_OF_A_KIND:
            lines = self._history.lines_of(event.attempt.op for event in events)
            self.found.append(Violation(invariant, at, what, lines))

    def all(self) -> list[Violation]:
        more = [
            Violation(invariant, kind, f"{count - MOST_OF_A_KIND} more of the same kind")
            for (invariant, kind), count in self._counts.items()
            if count > MOST_OF_A_KIND
        ]
        return [*self.found, *more]


def check(
    history: History, observation: Observation, samples: Sequence[Sample] = (), *, notes: Sequence[str] = ()
) -> list[Violation]:
    """Returns every violation, the worst first; ``notes`` are what readers found wrong during the run."""
    findings = _Findings(history)
    by_id = _by_id(history)
    for reader, view in observation.views.items():
        _check_contexts(findings, by_id, reader, view)
        _check_events(findings, by_id, reader, view)
        _check_versions(findings, history, by_id, reader, view)
        for error in view.errors:
            findings.add("I5", f"{reader} error", reader, f"could not read: {error}")
    _check_places(findings, observation)
    _check_marks(findings, observation, samples)
    for note in notes:
        findings.add("I5", "reader", "reader during the run", note)
    for event in history.events.values():
        if event.error is not None and event.error.startswith(UNTYPED):
            findings.add("I7", "untyped", event.attempt.id, event.error.removeprefix(UNTYPED), [event])
    return sorted(findings.all(), key=lambda violation: violation.invariant)


def _by_id(history: History) -> dict[tuple[str, str], list[Event]]:
    found: defaultdict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in history.events.values():
        found[event.attempt.kind, event.attempt.id].append(event)
        if event.attempt.kind == "event" and event.attempt.via == "raw" and event.attempt.context is not None:
            # A context that came inline is known by its event alone; the check of contexts lets it be there.
            found["inline", event.attempt.context].append(event)
        if event.attempt.kind == "key":
            found["body", event.attempt.sha256].append(event)
    return dict(found)


def _check_contexts(findings: _Findings, by_id: dict[tuple[str, str], list[Event]], reader: Reader, view: View) -> None:
    seen: defaultdict[str, list[str]] = defaultdict(list)
    for ref, found in view.contexts:
        if found != MISSING:
            seen[ref].append(found)
    for ref, bodies in seen.items():
        tried = by_id.get(("context", ref), [])
        if len(bodies) > 1:
            findings.add("I1", f"{reader} doubled context", ref, f"{reader} shows it {len(bodies)} times", tried)
        wanted = {event.attempt.sha256 for event in tried}
        if not tried:
            # The body of a key, or what came inline with an event: neither has an attempt of its own.
            if not by_id.get(("body", bodies[0])) and not by_id.get(("inline", ref)):
                findings.add("I2", f"{reader} invented context", ref, f"{reader} shows it, nobody put it")
        elif not set(bodies) <= wanted:
            what = f"{reader} shows bytes {bodies[0][:12]}, put were {min(wanted)[:12]}"
            findings.add("I4", f"{reader} altered context", ref, what, tried)
        elif all(event.outcome == "refused" for event in tried):
            findings.add("I2", f"{reader} refused context", ref, f"{reader} shows it, though it was refused", tried)
    if not view.is_whole:
        return
    for (kind, identity), tried in by_id.items():
        if kind == "context" and identity not in seen and any(event.outcome == "acknowledged" for event in tried):
            findings.add("I1", f"{reader} lost context", identity, f"lost: acknowledged, {reader} has it not", tried)
        elif kind == "inline" and identity not in seen and any(event.outcome == "acknowledged" for event in tried):
            what = f"lost: came with an acknowledged event or is named by it, {reader} has it not"
            findings.add("I1", f"{reader} lost inline context", identity, what, tried)


def _check_events(findings: _Findings, by_id: dict[tuple[str, str], list[Event]], reader: Reader, view: View) -> None:
    counts = Counter(event.id for event in view.events)
    for seen in view.events:
        tried = by_id.get(("event", seen.id), [])
        if counts[seen.id] > 1 and view.is_whole:
            findings.add("I1", f"{reader} doubled event", seen.id, f"{reader} shows it {counts[seen.id]} times", tried)
            counts[seen.id] = 1
        if not tried:
            findings.add("I2", f"{reader} invented event", seen.id, f"{reader} shows it, nobody published it")
        elif all(event.attempt.sha256 != seen.sha256 for event in tried):
            what = f"{reader} shows data {seen.sha256[:12]}, published was {tried[0].attempt.sha256[:12]}"
            findings.add("I4", f"{reader} altered event", seen.id, what, tried)
        elif all(event.attempt.context != seen.context for event in tried):
            what = f"{reader} shows context {seen.context}, published was {tried[0].attempt.context}"
            findings.add("I4", f"{reader} altered event", seen.id, what, tried)
        elif all(event.outcome == "refused" for event in tried):
            findings.add("I2", f"{reader} refused event", seen.id, f"{reader} shows it, though it was refused", tried)
    if view.is_whole:
        for (kind, identity), tried in by_id.items():
            if kind == "event" and not counts[identity] and any(event.outcome == "acknowledged" for event in tried):
                findings.add("I1", f"{reader} lost event", identity, f"lost: acknowledged, {reader} has it not", tried)
        # What need not show all may show a repetition, whose first is elsewhere.
        _check_order(findings, by_id, reader, view)


def _check_order(findings: _Findings, by_id: dict[tuple[str, str], list[Event]], reader: Reader, view: View) -> None:
    """I3: of two events of one process, the one that was known to be stored before the other began stands first."""
    latest: dict[int, Event] = {}
    for seen in sorted(view.events, key=lambda event: event.order):
        for event in by_id.get(("event", seen.id), ()):
            before = latest.get(event.file)
            if (
                before is not None
                and event.outcome == "acknowledged"
                and event.ended is not None
                and event.ended < before.began
            ):
                what = f"reordered: {reader} shows it behind {before.attempt.id}, which began after it was acknowledged"
                findings.add("I3", f"{reader} reordered event", seen.id, what, [event, before])
            if before is None or event.began > before.began:
                latest[event.file] = event


def _check_versions(
    findings: _Findings, history: History, by_id: dict[tuple[str, str], list[Event]], reader: Reader, view: View
) -> None:
    chains: defaultdict[str, list[SeenVersion]] = defaultdict(list)
    for seen in view.versions:
        chains[seen.key].append(seen)
    keys = {identity for kind, identity in by_id if kind == "key"}
    for key in sorted(keys.union(chains)):
        tried = by_id.get(("key", key), [])
        chain = sorted(chains.get(key, []), key=lambda seen: seen.version)
        if view.is_whole:
            _check_numbers(findings, tried, reader, key, chain)
        _check_writers(findings, history, tried, reader, key, chain, is_whole=view.is_whole)


def _check_numbers(
    findings: _Findings, tried: list[Event], reader: Reader, key: str, chain: Sequence[SeenVersion]
) -> None:
    """Versions are 1, 2, 3 … each once."""
    for wanted, seen in enumerate(chain, start=1):
        if seen.version != wanted:
            near = [event for event in tried if event.version is not None and abs(event.version - wanted) <= 1]
            what = f"{reader} shows version {seen.version} in the place of {wanted}: a gap or a version twice"
            findings.add("I1", f"{reader} gap in versions", key, what, near)
            return


def _check_writers(
    findings: _Findings,
    history: History,
    tried: list[Event],
    reader: Reader,
    key: str,
    chain: Sequence[SeenVersion],
    *,
    is_whole: bool,
) -> None:
    """Each version is one attempt's, each acknowledged attempt is the version that its writer was told."""
    by_version = {seen.version: seen for seen in chain}
    by_op = Counter(seen.change_type for seen in chain)
    for seen in chain:
        writer = None if seen.change_type is None else history.events.get(seen.change_type)
        if writer is None or writer.attempt.kind != "key" or writer.attempt.id != key:
            findings.add("I2", f"{reader} invented version", key, f"{reader} shows {_named(seen)}, nobody wrote it")
            continue
        if seen.sha256 == MISSING:
            if is_whole:
                what = f"{reader} shows {_named(seen)}, its body {seen.ref} is missing"
                findings.add("I1", f"{reader} lost body", key, what, [writer])
        elif seen.sha256 != writer.attempt.sha256:
            what = f"{reader} shows {_named(seen)} with other bytes than were put"
            findings.add("I4", f"{reader} altered version", key, what, [writer])
        if writer.outcome == "refused":
            what = f"{reader} shows {_named(seen)}, though it was refused"
            findings.add("I2", f"{reader} refused version", key, what, [writer])
        if by_op[seen.change_type] > 1:
            what = f"{reader} shows one change as {by_op[seen.change_type]} versions, {seen.version} is one of them"
            findings.add("I2", f"{reader} doubled version", key, what, [writer])
    for event in tried:
        if event.outcome != "acknowledged" or event.version is None:
            continue
        seen_there = by_version.get(event.version)
        if seen_there is None:
            if is_whole:
                what = f"lost: version {event.version} was acknowledged, {reader} has it not"
                findings.add("I1", f"{reader} lost version", key, what, [event])
        elif seen_there.change_type != event.attempt.op:
            what = (
                f"version {event.version} was acknowledged to {event.attempt.op}, {reader} shows {_named(seen_there)}"
            )
            others = [event, *([history.events[op]] if (op := seen_there.change_type or "") in history.events else [])]
            findings.add("I4", f"{reader} other version", key, what, others)


def _named(seen: SeenVersion) -> str:
    return f"version {seen.version} of {seen.change_type or 'nobody'} ({seen.ref or 'a tombstone'})"


def _check_places(findings: _Findings, observation: Observation) -> None:
    """I4: one place of a stream has one content, in the stream and in the lake, and is in the lake once."""
    contents: defaultdict[tuple[str, str, int], set[str]] = defaultdict(set)
    archived: Counter[tuple[str, str, int]] = Counter()
    for placed in observation.placed:
        place = (placed.stream, placed.epoch, placed.seq)
        contents[place].add(placed.identity)
        if placed.where == "lake":
            archived[place] += 1
    for (stream, epoch, seq), identities in contents.items():
        if len(identities) > 1:
            what = f"sequence {seq} of epoch {epoch} has {len(identities)} contents: {', '.join(sorted(identities))}"
            findings.add("I4", "place", stream, what)
    for (stream, epoch, seq), count in archived.items():
        if count > 1:
            findings.add("I1", "doubled place", stream, f"sequence {seq} of epoch {epoch} is in the lake {count} times")


def _check_marks(findings: _Findings, observation: Observation, samples: Sequence[Sample]) -> None:
    """I3: watermarks only advance, and nothing above one was purged."""
    before: dict[str, dict[str, tuple[int, float]]] = defaultdict(dict)
    last = samples[-1].at_s if samples else 0.0
    for at_s, marks in [*((sample.at_s, sample.marks) for sample in samples), (last, observation.marks)]:
        for mark in marks:
            if mark.messages and mark.first_seq > mark.watermark + 1 and mark.watermark_epoch in (mark.epoch, None):
                what = f"purged above the watermark: begins at {mark.first_seq}, archived up to {mark.watermark}"
                findings.add("I3", "purged", mark.stream, f"{what} ({at_s:.1f} s)")
            if mark.watermark_epoch is None:
                continue
            # By the watermark's own epoch: the stream was looked at before it, and may have been made anew in between.
            epochs = before[mark.stream]
            earlier, then_s = epochs.get(mark.watermark_epoch, (0, 0.0))
            if mark.watermark < earlier:
                what = f"the watermark went back from {earlier} ({then_s:.1f} s) to {mark.watermark} ({at_s:.1f} s)"
                findings.add("I3", "watermark", mark.stream, what)
            elif mark.watermark_epoch in epochs and mark.watermark_epoch != next(reversed(epochs)):
                what = f"the watermark went back to epoch {mark.watermark_epoch} ({at_s:.1f} s)"
                findings.add("I3", "watermark", mark.stream, what)
            epochs[mark.watermark_epoch] = (mark.watermark, at_s)
