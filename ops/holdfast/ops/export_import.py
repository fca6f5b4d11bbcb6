"""The import of an export: contexts under their own digests, versions with their own numbers, nothing twice.

The file is read twice: first to see that all of it is there and undamaged, writing nothing, then to import it.  Of
each key the file's versions are compared with what the store holds:

==============================  ====================================  ===============================================
the store holds                 the key is                            with ``overwrite``
==============================  ====================================  ===============================================
nothing of the key              imported: every version               the same
the file's chain, up to some    imported: the versions that are       the same
version (a broken-off import)   missing
the file's chain, all of it     skipped: nothing is to be done        the same
anything else (other versions,  skipped                               imported: the file's newest state becomes a new
or newer ones)                                                        version on top, unless the newest state equals it
==============================  ====================================  ===============================================

So a second run changes nothing, and a run after one that broke off completes it.  A version keeps its number,
operation, reference, tags, ids and times; only the time at which the server stored it is new.  Bodies are stored before
the versions that refer to them, also those of keys that turn out to be skipped: a body without a version is harmless.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Literal

import msgspec

from holdfast.client.cold import ResolverClient, cold_chunks
from holdfast.client.reading import BodyReader
from holdfast.ops.export_files import open_export
from holdfast.ops.export_format import End, Header, Numbered, read_export
from holdfast.ops.exporting import PartReader, SeenDigests
from holdfast.ops.system import first_cause
from holdfast.schemas import limits
from holdfast.schemas.errors import InputError, IntegrityError, InvalidFieldError, NotFoundError
from holdfast.schemas.ids import new_event_id, now_ms
from holdfast.schemas.refs import parse_ref
from holdfast.schemas.rows import ContextRow, KeyVersionRow
from holdfast.streams.codec import StoredForm, reseal
from holdfast.streams.hot import HotTier

if TYPE_CHECKING:
    from holdfast.client import Holdfast
    from holdfast.schemas.refs import Ref

WINDOW_LINES: Final = 1_000
WINDOW_BYTES: Final = 8 * limits.MIB
"""Lines taken together, and most bytes of bodies in them (one body may be larger): bounds memory."""

_KEYS_AT_ONCE: Final = 32
"""Keys whose versions are written at once; those of one key follow one another."""

_ABSENT: Final = ("delete", "expire")

_SAFE_MS: Final = 60_000
"""What expires within this counts as expired already: the batch after it may take a while."""


class ExportImportCounts(msgspec.Struct, kw_only=True):
    """What an import of an export did; the members of ``import --json``.

    ``keys``, ``versions`` and ``contexts`` are those of the file.  Every key is one of ``imported``, ``skipped`` and
    ``failed``; ``written`` counts the versions that were written.
    """

    keys: int = 0
    versions: int = 0
    contexts: int = 0
    imported: int = 0
    skipped: int = 0
    failed: int = 0
    written: int = 0
    seconds: float = 0.0

    def plus(self, other: ExportImportCounts) -> ExportImportCounts:
        """Returns the counts of both imports together."""
        return ExportImportCounts(
            **{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__}
        )


class KeyOutcome(msgspec.Struct, frozen=True):
    """Of one key, why it was not imported; ``line`` is where the file says what could not be done."""

    key: str
    outcome: Literal["skipped", "failed"]
    reason: str
    line: int


class ExportImport:
    """One import into one namespace.

    ``on_key`` is called with each key that was skipped or failed, ``on_progress`` with the counts after each window.
    """

    def __init__(
        self,
        hf: Holdfast,
        *,
        overwrite: bool = False,
        on_key: Callable[[KeyOutcome], None] = lambda _: None,
        on_progress: Callable[[ExportImportCounts], None] = lambda _: None,
    ) -> None:
        self.counts = ExportImportCounts()
        self._hf = hf
        self._overwrite = overwrite
        self._on_key = on_key
        self._on_progress = on_progress
        self._hot = HotTier(hf.connection, cold=cold_chunks(hf.connection))
        self._reader = BodyReader(self._hot, ResolverClient(hf.connection, hf.namespace), hf.namespace)
        self._parts = PartReader(self._reader)
        self._stored = SeenDigests()
        self._missing: set[str] = set()
        self._open_key: _KeyImport | None = None

    async def run(self, path: Path) -> ExportImportCounts:
        """Imports a file and returns the counts; everything is acknowledged by then.

        Raises InvalidFieldError when the file is no export or one of another namespace, IntegrityError naming the line
        when it is damaged or cut short: then nothing was written.  Raises UnknownOutcomeError or another typed error
        when the server stops answering: the same import again completes it.
        """
        started = time.perf_counter()
        with await asyncio.to_thread(open_export, path) as file:
            header = await asyncio.to_thread(check_export, file, str(path))
        if header.namespace != self._hf.namespace:
            raise InvalidFieldError(
                f"{path} is an export of namespace {header.namespace!r}, not of {self._hf.namespace!r}",
                field="namespace",
                hint=f"import it with --namespace {header.namespace!r}: references are good in their own alone",
            )
        with await asyncio.to_thread(open_export, path) as file:
            windows = _windows(read_export(file, str(path)))
            while (window := await asyncio.to_thread(next, windows, None)) is not None:
                await self._take(window)
                self._on_progress(self.counts)
        await self._hot.close()
        self.counts.seconds = round(time.perf_counter() - started, 3)
        return self.counts

    async def _take(self, window: Sequence[Numbered]) -> None:
        """Imports some lines: their contexts first, all of them, then the versions, whose bodies are stored by then."""
        contexts: list[tuple[int, ContextRow]] = []
        runs: list[_Run] = []
        ended = False
        for line in window:
            match line.record:
                case ContextRow() as row:
                    contexts.append((line.number, row))
                case KeyVersionRow() as row:
                    if not runs or runs[-1].key != row.key:
                        runs.append(_Run(row.key, []))
                    runs[-1].versions.append((line.number, row))
                case End():
                    ended = True
                case Header():
                    pass
                case missing:
                    self._missing.add(missing.ref)
        await self._store(contexts)
        await self._import_runs(runs, ended=ended)

    async def _store(self, contexts: Sequence[tuple[int, ContextRow]]) -> None:
        whole = [row for _, row in contexts if row.form != "manifest"]
        await self._put(whole)
        self._parts.remember(row for row in whole if row.form == "chunk")
        manifests: list[ContextRow] = []
        for number, row in contexts:
            if row.form != "manifest":
                continue
            try:
                await self._parts.check(row)
            except (IntegrityError, NotFoundError) as error:
                raise IntegrityError(
                    f"line {number} describes {row.ref} wrongly: {error.message}",
                    field=f"line {number}",
                    hint="export it anew; what stands before that line was imported",
                ) from error
            manifests.append(row)
        await self._put(manifests)
        self.counts.contexts += len(contexts)

    async def _put(self, rows: Sequence[ContextRow]) -> None:
        if not rows:
            return
        forms = await asyncio.to_thread(lambda: [StoredForm(row.digest, *reseal(row)) for row in rows])
        await self._hot.store_forms(self._hf.namespace, forms)
        for row in rows:
            self._stored.add(row.digest)

    async def _import_runs(self, runs: Sequence[_Run], *, ended: bool) -> None:
        """Takes versions in: each run continues the key at hand or begins one; the last stays open for the next."""
        absent = await self._absent(runs)
        # Those of one key follow one another; keys are independent.
        limiter = asyncio.Semaphore(_KEYS_AT_ONCE)

        async def take(key: _KeyImport, versions: list[tuple[int, KeyVersionRow]], *, is_whole: bool) -> None:
            async with limiter:
                for number, row in versions:
                    await key.take(number, row, lost=row.ref is not None and row.ref in absent)
                await key.write(now_ms(), is_whole=is_whole)
                if is_whole:
                    self._close(key, await key.finish(overwrite=self._overwrite))

        planned: list[tuple[_KeyImport, list[tuple[int, KeyVersionRow]], bool]] = []
        for run in runs:
            key = self._open_key
            if key is None or key.key != run.key:
                if key is not None and run is runs[0]:
                    planned.append((key, [], True))
                key = _KeyImport(self._hf, run.key)
            self._open_key = key
            planned.append((key, run.versions, ended or run is not runs[-1]))
            self.counts.versions += len(run.versions)
        if ended and not runs and self._open_key is not None:
            planned.append((self._open_key, [], True))
        try:
            async with asyncio.TaskGroup() as tasks:
                for key, versions, is_whole in planned:
                    tasks.create_task(take(key, versions, is_whole=is_whole))
        except BaseExceptionGroup as failures:
            raise first_cause(failures) from failures

    def _close(self, key: _KeyImport, outcome: KeyOutcome | None) -> None:
        counts = self.counts
        counts.keys += 1
        counts.written += key.written
        if outcome is None:
            counts.imported += 1
        elif outcome.outcome == "skipped":
            counts.skipped += 1
            self._on_key(outcome)
        else:
            counts.failed += 1
            self._on_key(outcome)

    async def _absent(self, runs: Sequence[_Run]) -> set[Ref]:
        """The references of these versions whose body is nowhere, though the file does not say that it is missing."""
        refs = {row.ref for run in runs for _, row in run.versions if row.ref is not None} - self._missing
        unknown = {ref: digest for ref in refs if (digest := parse_ref(ref).digest) not in self._stored}
        if not unknown:
            return set()
        found: set[Ref] = set()
        digests = list(unknown.values())
        for start in range(0, len(digests), 16):
            rows, _, _ = await self._reader.load_stored(digests[start : start + 16])
            found |= {row.ref for row in rows.values()}
        return unknown.keys() - found


class _Run(msgspec.Struct):
    """Versions of one key that stand together, with their lines."""

    key: str
    versions: list[tuple[int, KeyVersionRow]]


class _KeyImport:
    """The import of one key, version by version."""

    def __init__(self, hf: Holdfast, key: str) -> None:
        self.key = key
        self.written = 0
        self._hf = hf
        self._head: KeyVersionRow | None = None
        self._state: Literal["begin", "compare", "continue", "foreign", "failed"] = "begin"
        self._pending: list[tuple[int, KeyVersionRow]] = []
        self._last: tuple[int, KeyVersionRow] | None = None
        self._failure: KeyOutcome | None = None

    async def take(self, line: int, row: KeyVersionRow, *, lost: bool) -> None:
        """Takes the next version of the file: it is to be written when it continues what the store holds."""
        self._last = line, row
        if self._state == "begin":
            head = await self._hf.keys.head(self.key)
            self._head = None if head is None else head.row
            self._state = "continue" if head is None else "compare"
        if self._state == "compare" and self._head is not None:
            if row.version >= self._head.version:
                self._state = "continue" if is_same_version(self._head, row) else "foreign"
            return
        if self._state != "continue":
            return
        if lost:
            reason = f"version {row.version} refers to {row.ref}, which neither the file nor the store holds"
            self._fail(line, reason)
        else:
            self._pending.append((line, row))

    async def write(self, at_ms: int, *, is_whole: bool) -> None:
        """Writes what was taken, as far as it makes full batches; all of it when the key is whole."""
        while self._pending and self._state == "continue":
            count = plan_batch([row for _, row in self._pending], at_ms, is_whole=is_whole)
            if not count:
                return
            batch, self._pending = self._pending[:count], self._pending[count:]
            try:
                await self._hf.keys.import_versions([row for _, row in batch])
            except InputError as error:
                self._fail(batch[0][0], error.message)
                return
            self.written += count

    async def finish(self, *, overwrite: bool) -> KeyOutcome | None:
        """Ends the key, all of which is written; None when something was, else why not."""
        if self._failure is not None or self._last is None:
            return self._failure
        if self.written:
            return None
        line, newest = self._last
        head = self._head
        assert head is not None, "a key that the store does not hold has been written"
        if self._state == "continue":
            return KeyOutcome(self.key, "skipped", "all its versions are there", line)
        if not overwrite:
            reason = f"the store has another version {head.version}; --overwrite puts the file's newest state on top"
            return KeyOutcome(self.key, "skipped", reason, line)
        if is_same_state(head, newest):
            return KeyOutcome(self.key, "skipped", "its newest state is the same", line)
        try:
            await self._hf.keys.import_version(on_top(newest, head))
        except InputError as error:
            return KeyOutcome(self.key, "failed", error.message, line)
        self.written += 1
        return None

    def _fail(self, line: int, reason: str) -> None:
        self._state = "failed"
        self._failure = KeyOutcome(self.key, "failed", reason, line)


def plan_batch(rows: Sequence[KeyVersionRow], at_ms: int, *, is_whole: bool) -> int:
    """Returns how many of these versions of one key are to be written as one batch now; 0: more are to come first.

    Between two batches the key is as it was in the past: had it an expiry that has passed, the janitor might expire it
    just then, and the versions after it could not be written.  So a batch ends, if it can, where there was none.
    """
    if is_whole and len(rows) <= limits.COMMIT_KEYS:
        return len(rows)
    if len(rows) < limits.COMMIT_KEYS:
        return 0
    for count in range(limits.COMMIT_KEYS, 0, -1):
        row = rows[count - 1]
        if row.op in _ABSENT or row.expires_at_ms is None or row.expires_at_ms > at_ms + _SAFE_MS:
            return count
    return limits.COMMIT_KEYS


def on_top(newest: KeyVersionRow, head: KeyVersionRow) -> KeyVersionRow:
    """Returns the version that puts the state of ``newest`` behind ``head``: a change of now, of its own."""
    event_id = new_event_id()
    return msgspec.structs.replace(
        newest,
        version=head.version + 1,
        op="delete" if newest.op in _ABSENT else "put",
        event_id=event_id,
        timestamp_ms=now_ms(),
        change_type="import",
    )


def check_export(file: BinaryIO, name: str) -> Header:
    """Reads an export to its end and returns its header; blocks.  Raises as ``read_export`` does."""
    header: Header | None = None
    for line in read_export(file, name):
        if isinstance(line.record, Header):
            header = line.record
    assert header is not None, "read_export yields the header first"
    return header


def is_same_version(stored: KeyVersionRow, given: KeyVersionRow) -> bool:
    """Whether a stored version is the one that a file tells of: by its event id, or without one by what it says."""
    if stored.version != given.version or stored.op != given.op or stored.ref != given.ref:
        return False
    if stored.event_id is not None or given.event_id is not None:
        return stored.event_id == given.event_id
    return stored.timestamp_ms == given.timestamp_ms and stored.tags == given.tags


def is_same_state(head: KeyVersionRow, newest: KeyVersionRow) -> bool:
    """Whether two versions leave a key in the same state."""
    if head.op in _ABSENT or newest.op in _ABSENT:
        return head.op in _ABSENT and newest.op in _ABSENT
    return (head.ref, head.tags, head.session_id, head.expires_at_ms) == (
        newest.ref,
        newest.tags,
        newest.session_id,
        newest.expires_at_ms,
    )


def _windows(lines: Iterator[Numbered]) -> Iterator[list[Numbered]]:
    """Lines in windows bounded by number and bytes; blocks on the disk."""
    window: list[Numbered] = []
    size = 0
    for line in lines:
        window.append(line)
        size += len(line.record.body) if isinstance(line.record, ContextRow) else 0
        if len(window) >= WINDOW_LINES or size >= WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window


__all__ = [
    "ExportImport",
    "ExportImportCounts",
    "KeyOutcome",
    "check_export",
    "is_same_state",
    "is_same_version",
    "on_top",
    "plan_batch",
]
