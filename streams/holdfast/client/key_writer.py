"""Writing named contexts: changes of one key queue up, and what has come together is written as one batch.

Every change is a version of its own, made from the one before it by compare-and-set.  When several tasks change one
key at once, its head is read once; their changes are applied one on the other, in order, and all the new versions go
out in one atomic batch that names the head they stand on.  When another process was faster, nothing was written: the
head is read again and the changes are applied anew.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from holdfast.client.encryption import seal_contexts
from holdfast.client.growing import row_of_context
from holdfast.client.key_model import is_live
from holdfast.client.model import Context
from holdfast.schemas import limits
from holdfast.schemas.errors import (
    HoldfastError,
    InvalidFieldError,
    NotFoundError,
    TooLargeError,
    UnavailableError,
    UnknownOutcomeError,
    VersionConflictError,
)
from holdfast.schemas.ids import new_event_id
from holdfast.schemas.refs import Ref
from holdfast.schemas.rows import KeyVersionRow, Op
from holdfast.streams.hot import NewContext
from holdfast.streams.key_chains import Head
from holdfast.streams.key_log import Following, KeyLog, LostRaceError, NewVersion

if TYPE_CHECKING:
    from holdfast.client.growing import GrowingBodies, Grown
    from holdfast.client.key_cold import ColdKeySource
    from holdfast.client.key_ring import KeyRing
    from holdfast.streams.server_clock import ServerClock
    from holdfast.streams.topology import StreamInfo

T = TypeVar("T")

logger = logging.getLogger(__name__)

ATTEMPTS: Final = 100
"""How often a change is tried against other processes.  Each lost race means that another one's change was written."""

_BATCH_CHANGES: Final = 64
_BATCH_BYTES: Final = 8 * 1024 * 1024
"""Bodies of one batch: bounds what is in memory twice."""

_HEADS: Final = 10_000
NO_HINT: Final[tuple[int, ...]] = ()
_PAUSE_S: Final = 0.002
_LONGEST_PAUSE_S: Final = 0.1
_INFO_S: Final = 60.0
"""How long the stream is believed to be what it said: whether heads have left it changes ten minutes ahead."""


class State(msgspec.Struct, frozen=True):
    """What a change is made from: the newest version, and whether it is alive (not deleted, not expired).

    ``context`` is its body, for a change that asked for it; ``at_ms`` is the server's time.
    """

    row: KeyVersionRow | None
    is_live: bool
    at_ms: int
    context: Context | None = None

    @property
    def version(self) -> int:
        """The version that a caller sees: 0 when there is none, or none that is alive."""
        return self.row.version if self.row is not None and self.is_live else 0


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """A version to be: what it points at is ``body``, still to be stored, or ``ref``, or nothing (a tombstone)."""

    op: Op
    body: NewContext | None = None
    ref: Ref | None = None
    encrypt: bool = False
    tags: tuple[str, ...] = ()
    session_id: str | None = None
    agent_id: str | None = None
    changed_by: str | None = None
    change_type: str | None = None
    expires_at_ms: int | None = None


Decide = Callable[[State], "Draft | None"]
"""Makes a version from the present state; None leaves everything as it is.  Raises a typed error to refuse.

Pure: it may be called several times, each time with another state.
"""


class Written(msgspec.Struct, frozen=True):
    """The outcome of a change: the version, and its body when it was at hand."""

    row: KeyVersionRow
    context: Context | None


class _Change:
    __slots__ = ("decide", "future", "needs_body")

    def __init__(self, decide: Decide, needs_body: bool) -> None:
        self.decide = decide
        self.needs_body = needs_body
        self.future: asyncio.Future[Written] = asyncio.get_running_loop().create_future()
        # A failure that no caller waits for any more must not be reported as unhandled.
        self.future.add_done_callback(lambda done: done.cancelled() or done.exception())


class _Step(msgspec.Struct, frozen=True):
    """A change with its draft, and the version that it makes: that lacks its reference until the body is stored."""

    change: _Change
    draft: Draft
    row: KeyVersionRow


class KeyWriter:
    """Writes the named contexts of one namespace.  Any number of tasks may write at once."""

    def __init__(
        self,
        namespace: str,
        log: KeyLog,
        bodies: GrowingBodies,
        cold: ColdKeySource,
        clock: ServerClock,
        ring: KeyRing,
    ) -> None:
        self._namespace = namespace
        self._log = log
        self._bodies = bodies
        self._cold = cold
        self._clock = clock
        self._ring = ring
        self._queues: dict[str, deque[_Change]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._heads: OrderedDict[str, Head] = OrderedDict()
        self._info: tuple[float, StreamInfo] | None = None

    async def change(self, key: str, decide: Decide, *, needs_body: bool = False) -> Written:
        """Makes and writes a version of ``key``, and returns it once it is stored durably.

        ``needs_body``: ``decide`` looks at the body.  Raises what ``decide`` raises, VersionConflictError when other
        processes were faster a hundred times, UnknownOutcomeError without an acknowledgement.  A cancel does not
        recall the change.
        """
        change = _Change(decide, needs_body)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = deque()
            # A bare task: it outlives the caller that happened to be first; close() waits for it.
            task = asyncio.get_running_loop().create_task(self._drain(key, queue), name="holdfast-key-writer")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        queue.append(change)
        return await asyncio.shield(change.future)

    async def commit(self, decisions: Mapping[str, Decide]) -> dict[str, KeyVersionRow]:
        """Makes and writes a version of every key, all or none, and returns them.

        Errors, and what a cancel does, as of :meth:`change`.
        """
        return await self._run(self._commit_keys(decisions))

    async def _commit_keys(self, decisions: Mapping[str, Decide]) -> dict[str, KeyVersionRow]:
        lost = 0
        while decisions:
            none = Head(losses=self._log.losses)
            found = await self._log.heads(self._namespace, decisions)
            try:
                return await self._commit_all(decisions, {key: found.get(key, none) for key in decisions})
            except LostRaceError:
                lost += 1
                if lost >= ATTEMPTS:
                    raise _contended(next(iter(decisions)), lost) from None
                await _pause(lost)
            finally:
                for key in decisions:
                    self.forget(key)
        return {}

    async def import_versions(self, rows: Sequence[KeyVersionRow]) -> list[KeyVersionRow]:
        """Writes consecutive versions of one key as they are told, all or none; a cancel does not recall them."""
        return await self._run(self._import(rows))

    async def _import(self, rows: Sequence[KeyVersionRow]) -> list[KeyVersionRow]:
        if not rows:
            return []
        key = rows[0].key
        numbers = range(rows[0].version, rows[0].version + len(rows))
        if any(row.key != key for row in rows) or [row.version for row in rows] != list(numbers):
            raise InvalidFieldError("these are not consecutive versions of one key", field="version")
        if len(rows) > limits.COMMIT_KEYS:
            raise TooLargeError(f"{len(rows)} versions at once", field="versions", limit=limits.COMMIT_KEYS)
        head = await self._log.head(self._namespace, key)
        last = await self.last_row(key, head)
        if last is not None and last.version + 1 != rows[0].version:
            raise VersionConflictError(
                f"the key {key!r} has version {last.version}: {rows[0].version} does not follow it",
                key=key,
                expected=rows[0].version - 1,
                actual=last.version,
            )
        own = [msgspec.structs.replace(row, namespace=self._namespace) for row in rows]
        versions = [(NewVersion(row), head if place == 0 else None) for place, row in enumerate(own)]
        self.forget(key)
        try:
            return await self._log.write_all(versions)
        except LostRaceError:
            raise VersionConflictError(
                f"the key {key!r} was written by another", key=key, expected=rows[0].version - 1, actual=0
            ) from None

    async def _run(self, writing: Coroutine[Any, Any, T]) -> T:
        # A bare task: close() waits for it, whatever becomes of the caller.
        task = asyncio.get_running_loop().create_task(writing, name="holdfast-key-commit")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the caller may be gone: mark as retrieved

    async def info(self) -> StreamInfo:
        """Returns the bucket's stream as it was at most a minute ago."""
        now_s = asyncio.get_running_loop().time()
        if self._info is None or now_s - self._info[0] > _INFO_S:
            self._info = now_s, await self._log.info()
        return self._info[1]

    async def last_row(self, key: str, head: Head) -> KeyVersionRow | None:
        """Returns the newest version of a key whose head was read: versions go on from the lake where it has left."""
        if head.row is not None or not (await self.info()).heads_archived:
            return head.row
        return await self._cold.last(key)

    def forget(self, key: str) -> None:
        """Has the next change of a key read its head."""
        self._heads.pop(key, None)

    async def close(self) -> None:
        """Waits until every change that was handed in has an outcome."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _drain(self, key: str, queue: deque[_Change]) -> None:
        try:
            while queue:
                # This is a later turn of the loop than the first change came in: what was handed in with it is here.
                batch = [queue.popleft() for _ in range(min(len(queue), _BATCH_CHANGES))]
                try:
                    await self._write(key, batch)
                except HoldfastError as error:
                    _fail(batch, error)
                except Exception as error:
                    logger.exception("a key was not written", extra={"action": "key_write_failed", "key": key})
                    _fail(batch, UnknownOutcomeError(f"the write failed unexpectedly: {error!r}"))
                finally:
                    _fail(
                        batch,
                        UnknownOutcomeError(
                            "the write was abandoned while closing, before its acknowledgement came",
                            hint="read the key, then decide whether to make the change again",
                        ),
                    )
                if queue:
                    # One turn, so that who was just answered and comes back is in the next batch.
                    await asyncio.sleep(0)
        finally:
            del self._queues[key]
            _fail(queue, UnavailableError("the write was abandoned while closing, and never sent"))

    async def _write(self, key: str, batch: list[_Change]) -> None:
        """Gives every change of a batch its outcome."""
        lost = 0
        while True:
            pending = [change for change in batch if not change.future.done()]
            if not pending:
                return
            try:
                if not await self._attempt(key, pending):
                    self.forget(key)
            except LostRaceError:
                self.forget(key)
                lost += 1
                if lost >= ATTEMPTS:
                    raise _contended(key, lost) from None
                await _pause(lost)
            except HoldfastError:
                self.forget(key)
                raise

    async def _attempt(self, key: str, pending: list[_Change]) -> bool:
        """Writes what can be written in one batch; returns False when the remembered head is not good enough."""
        remembered = self._remembered(key)
        head = remembered if remembered is not None else await self._log.head(self._namespace, key)
        last = await self.last_row(key, head)
        at_ms = await self._clock.now_ms()
        live = is_live(last, at_ms)
        try:
            base, context = await self._base(last if live else None, head, pending[0])
        except HoldfastError as error:
            # Those that begin with the body cannot be made; a change behind them may not need it.
            self.forget(key)
            _fail(takewhile(lambda change: change.needs_body, pending), error)
            return True
        state = State(last, live, at_ms, context)
        is_unread = live and not pending[0].needs_body
        steps: list[_Step] = []
        size = 0
        for change in pending:
            if change.needs_body and is_unread and not steps:
                break  # its turn comes with the body
            try:
                draft = change.decide(state)
                if draft is not None and draft.body is not None and draft.encrypt:
                    sealed = await asyncio.to_thread(seal_contexts, self._ring, [draft.body])
                    draft = msgspec.structs.replace(draft, body=sealed[0])
            except Exception as error:  # noqa: BLE001  whatever the caller's function raises is its caller's
                # Refused, or a failure of the caller's own function: told only of what is certain to be the newest.
                if steps:
                    break
                if remembered is not None:
                    return False
                # A future does not take a StopIteration.
                is_stop = isinstance(error, StopIteration)
                change.future.set_exception(RuntimeError("a change raised StopIteration") if is_stop else error)
                continue
            if draft is None:
                if steps:
                    break
                if remembered is not None:
                    return False
                if live and last is not None:
                    change.future.set_result(Written(last, context))
                else:
                    change.future.set_exception(absent(key))
                continue
            row = _row_of(self._namespace, key, draft, 1 if state.row is None else state.row.version + 1)
            steps.append(_Step(change, draft, row))
            if draft.body is None or draft.encrypt:
                break  # what comes next would have to be made from a body that is not at hand
            size += len(draft.body.body)
            if size >= _BATCH_BYTES:
                break
            state = State(row, True, at_ms, Context(row_of_context(draft.body), "cache"))
        if steps:
            await self._commit(key, head, base, last if live else None, steps)
        return True

    async def _commit(
        self, key: str, head: Head, base: Grown | None, last: KeyVersionRow | None, steps: list[_Step]
    ) -> None:
        contexts = [step.draft.body for step in steps if step.draft.body is not None]
        if base is None and last is not None and contexts:
            base = await self._bodies.base_for(contexts[0], last.ref, head.at)
        stored = await self._bodies.store_chain(contexts, base) if contexts else []
        bodies = iter(stored)
        versions: list[Following] = []
        outcomes: list[tuple[Context | None, tuple[int, ...]]] = []
        for step in steps:
            if step.draft.body is None:
                row, at, context = msgspec.structs.replace(step.row, ref=step.draft.ref), NO_HINT, None
            else:
                grown = next(bodies)
                row, at = msgspec.structs.replace(step.row, ref=grown.row.ref), grown.hint
                context = Context(grown.row, "cache", self._ring)
            outcomes.append((context, at))
            versions.append((NewVersion(row, at), None if versions else head))
        rows = await self._log.write_all(versions)
        self._remember(key, Head(rows[-1], outcomes[-1][1], rows[-1].seq, head.losses))
        for step, row, (context, _) in zip(steps, rows, outcomes, strict=True):
            if not step.change.future.done():
                step.change.future.set_result(Written(row, context))

    async def _commit_all(self, decisions: Mapping[str, Decide], heads: Mapping[str, Head]) -> dict[str, KeyVersionRow]:
        at_ms = await self._clock.now_ms()
        drafts: dict[str, tuple[Head, KeyVersionRow | None, Draft, int]] = {}
        for key, decide in decisions.items():
            head = heads[key]
            last = await self.last_row(key, head)
            live = is_live(last, at_ms)
            draft = decide(State(last, live, at_ms))
            if draft is not None:
                drafts[key] = head, last if live else None, draft, 1 if last is None else last.version + 1
        stored = await asyncio.gather(*(self._store(draft, head, last) for head, last, draft, _ in drafts.values()))
        versions: list[Following] = []
        for (key, (head, _, draft, number)), grown in zip(drafts.items(), stored, strict=True):
            row = _row_of(self._namespace, key, draft, number)
            ref = draft.ref if grown is None else grown.row.ref
            at: tuple[int, ...] = () if grown is None else grown.hint
            versions.append((NewVersion(msgspec.structs.replace(row, ref=ref), at), head))
        rows = await self._log.write_all(versions) if versions else []
        return {row.key: row for row in rows}

    async def _store(self, draft: Draft, head: Head, last: KeyVersionRow | None) -> Grown | None:
        if draft.body is None:
            return None
        context = draft.body
        if draft.encrypt:
            context = (await asyncio.to_thread(seal_contexts, self._ring, [context]))[0]
        base = None if last is None else await self._bodies.base_for(context, last.ref, head.at)
        return (await self._bodies.store_chain([context], base))[0]

    async def _base(
        self, last: KeyVersionRow | None, head: Head, change: _Change
    ) -> tuple[Grown | None, Context | None]:
        """The body of the newest version: for a change that looks at it, and for bodies that may share its parts."""
        if last is None or last.ref is None:
            return None, None
        if change.needs_body:
            grown, tier = await self._bodies.load(last.ref, head.at)
            return grown, Context(grown.row, tier, self._ring)
        return self._bodies.known(last.ref), None

    def _remembered(self, key: str) -> Head | None:
        # Of before the connection was lost, the sequence that a head is known by may be another version's by now.
        head = self._heads.get(key)
        return head if head is not None and head.losses == self._log.losses else None

    def _remember(self, key: str, head: Head) -> None:
        self._heads[key] = head
        self._heads.move_to_end(key)
        if len(self._heads) > _HEADS:
            self._heads.popitem(last=False)


async def _pause(lost: int) -> None:
    # Jittered, so that processes that change one key do not meet again and again.
    await asyncio.sleep(random.uniform(0, min(_LONGEST_PAUSE_S, _PAUSE_S * lost)))  # noqa: S311


def _row_of(namespace: str, key: str, draft: Draft, version: int) -> KeyVersionRow:
    event_id = new_event_id()
    return KeyVersionRow(
        namespace=namespace,
        key=key,
        version=version,
        op=draft.op,
        timestamp_ms=int(event_id.replace("-", "")[:12], 16),
        stored_at_ms=0,
        epoch="",
        seq=0,
        event_id=event_id,
        changed_by=draft.changed_by,
        change_type=draft.change_type,
        tags=draft.tags,
        session_id=draft.session_id,
        agent_id=draft.agent_id,
        expires_at_ms=draft.expires_at_ms,
    )


def absent(key: str) -> NotFoundError:
    """The error of a key that has no body: never written, deleted or expired."""
    return NotFoundError(f"there is nothing under the key {key!r}", field="key", hint="it may have expired")


def _contended(key: str, lost: int) -> UnavailableError:
    return UnavailableError(
        f"other writers of {key!r} were faster {lost} times",
        hint="spread the writes over several keys, or write it from fewer processes",
    )


def _fail(batch: Iterable[_Change], error: HoldfastError) -> None:
    for change in batch:
        if not change.future.done():
            change.future.set_exception(error)
