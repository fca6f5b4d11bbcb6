"""The record of what was tried and what was answered, kept apart from everything that is tested.

A history is one file or several, each of one process, a line of JSON for each thing that happened: an attempt *before*
it leaves the process, its outcome *after* it is known.  Lines are written by one ``write(2)`` each, so that a process
that is killed has told a line or has not; what was begun and never answered counts as unknown.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import msgspec

Kind = Literal["context", "event", "key"]
Via = Literal["sdk", "raw"]
Outcome = Literal["acknowledged", "refused", "unknown"]

UNTYPED: Final = "untyped: "
"""What the error of an outcome begins with when the product raised something that is none of its own errors."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Something that a producer is about to store.

    ``op`` is unique in the history.  ``id`` is the reference, the event's id or the key; several attempts may have the
    same one when a producer repeats itself.  ``sha256`` is over the exact bytes: of a body, or of an event's data as
    JSON with sorted keys.  ``context`` is the reference that an event hands on.
    """

    op: str
    kind: Kind
    via: Via
    producer: str
    number: int
    id: str
    version: int | None = None
    sha256: str
    size: int
    context: str | None = None
    namespace: str = "default"


class _Line(msgspec.Struct, omit_defaults=True):
    """One line: ``a`` an attempt, or the outcome ``o`` of the attempt ``op``."""

    a: Attempt | None = None
    op: str | None = None
    o: Outcome | None = None
    seq: int | None = None
    version: int | None = None
    error: str | None = None


class Event(msgspec.Struct, gc=False):
    """What is known of one attempt.

    ``began`` and ``ended`` are places in the file of its process, ``file`` says which: whatever ended before another
    began was over when that one started.
    """

    attempt: Attempt
    file: int
    began: int
    ended: int | None = None
    outcome: Outcome = "unknown"
    seq: int | None = None
    version: int | None = None
    error: str | None = None


class HistoryWriter:
    """Appends to the history of one process.  Not for two processes at once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._encoder = msgspec.json.Encoder()
        # What a killed predecessor wrote last may lack its end: the next line must not be glued to it.
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")

    def begin(self, *attempts: Attempt) -> None:
        """Notes attempts that are about to be made; they are in the file when this returns."""
        self._write(*(_Line(a=attempt) for attempt in attempts))

    def acknowledged(self, op: str, *, seq: int | None = None, version: int | None = None) -> None:
        """Notes that an attempt was acknowledged; ``version`` of a key."""
        self._write(_Line(op=op, o="acknowledged", seq=seq, version=version))

    def refused(self, op: str, error: object) -> None:
        """Notes that an attempt was refused: it has not been stored, and will not be."""
        self._write(_Line(op=op, o="refused", error=str(error)[:300]))

    def unknown(self, op: str, error: object) -> None:
        """Notes that nobody knows whether an attempt was, or will yet be, stored."""
        self._write(_Line(op=op, o="unknown", error=str(error)[:300]))

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, *lines: _Line) -> None:
        data = b"".join(self._encoder.encode(line) + b"\n" for line in lines)
        while data:
            data = data[os.write(self._fd, data) :]


class History:
    """Everything that some processes tried.  Made by :func:`read_history`, or by hand with :meth:`add`."""

    def __init__(self) -> None:
        self.events: dict[str, Event] = {}
        self.torn_lines = 0

    @property
    def attempts(self) -> list[Attempt]:
        """Every attempt, in the order of the files and of the lines in them."""
        return [event.attempt for event in self.events.values()]

    def outcome(self, op: str) -> Outcome:
        """Returns how an attempt ended; ``unknown`` too when nothing more was heard of it."""
        return self.events[op].outcome

    def acknowledged(self, kind: Kind | None = None) -> list[Attempt]:
        """Returns the attempts that were acknowledged, of one kind or all."""
        return [
            event.attempt
            for event in self.events.values()
            if event.outcome == "acknowledged" and kind in (None, event.attempt.kind)
        ]

    def version_of(self, op: str) -> int | None:
        """Returns the version that the acknowledgement of a key named."""
        return self.events[op].version

    def counts(self) -> Counter[str]:
        """Returns how many attempts there are of each outcome, and of each kind (``event acknowledged``)."""
        counted: Counter[str] = Counter()
        for event in self.events.values():
            counted[event.outcome] += 1
            counted[f"{event.attempt.kind} {event.outcome}"] += 1
        return counted

    def lines_of(self, ops: Iterable[str], most: int = 12) -> list[str]:
        """Returns a minimal history: for each of some attempts what was tried, and what came of it."""
        lines: list[str] = []
        for op in list(ops)[:most]:
            event = self.events[op]
            tried = event.attempt
            lines.append(
                f"{tried.op} {tried.kind} {tried.id} via {tried.via}, {tried.size} bytes {tried.sha256[:12]}"
                f" (file {event.file} line {event.began}): {event.outcome}"
                + (f" as version {event.version}" if event.version is not None else "")
                + (f" at sequence {event.seq}" if event.seq is not None else "")
                + (f" at line {event.ended}" if event.ended is not None else ", no answer noted")
                + (f" ({event.error})" if event.error else "")
            )
        return lines

    def add(self, line: bytes, file: int, number: int) -> str | None:
        """Takes in one line and returns the attempt that it is about; None when it is no whole line."""
        try:
            entry = _LINES.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.torn_lines += 1
            return None
        if entry.a is not None:
            if entry.a.op in self.events:
                raise ValueError(f"history file {file} line {number}: attempt {entry.a.op} was begun before")
            self.events[entry.a.op] = Event(entry.a, file, number)
            return entry.a.op
        if entry.op is not None and entry.o is not None and entry.op in self.events:
            event = self.events[entry.op]
            # An attempt that is tried again after it was unknown is acknowledged in the end; never the other way.
            if event.outcome != "acknowledged":
                event.outcome, event.ended, event.error = entry.o, number, entry.error
                event.seq, event.version = entry.seq, entry.version
            return entry.op
        return None


_LINES: Final = msgspec.json.Decoder(_Line)


def read_history(paths: Iterable[Path]) -> History:
    """Reads the files of some processes; what a killed process left half written is passed over.

    Raises ValueError when an attempt was begun twice: then the history is no record.
    """
    history = History()
    for file, path in enumerate(sorted(paths)):
        for number, line in enumerate(_lines(path), start=1):
            if line:
                history.add(line, file, number)
    return history


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as opened:
        for line in opened:
            yield line.rstrip(b"\n")
