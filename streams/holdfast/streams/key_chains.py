"""The bucket ``ctx-keys`` as it is read: named contexts as chains of versions, one message each on the key's subject.

What is superseded leaves the bucket some time after it was archived, oldest first: what the bucket holds of a chain is
always its end, and the lake holds the rest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.schemas.errors import HoldfastError, RetryError, UnavailableError
from holdfast.schemas.ids import iso_from_ms
from holdfast.schemas.rows import KeyVersionRow
from holdfast.streams.arrivals import next_of
from holdfast.streams.decode import decode_key_head
from holdfast.streams.leader import last_at_leader, message_at_leader, require_end
from holdfast.streams.messages import StoredMessage, parse_time_ms
from holdfast.streams.retry import ATTEMPT_S, READ_DEADLINE_S, call_with_retry
from holdfast.streams.topology import StreamInfo, require_majority, stream_info
from holdfast.streams.wire import (
    H_SEQUENCE,
    H_STATUS,
    H_SUBJECT,
    H_TIME,
    KEYS_STREAM,
    key_filter,
    key_subject,
    parse_key_subject,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdfast.streams.connection import Connection, Msg

_DIRECT: Final = f"$JS.API.DIRECT.GET.{KEYS_STREAM}"
_MULTI_GET: Final = 1_000
"""Subjects in one batched direct get; the server answers 1,024 at most."""

_PAGE: Final = 500
"""Revisions read at once: some 150 KB."""

LOOK: Final = 32
"""Revisions read at once where one of them is looked for."""

_LATEST_MS: Final = 9_223_372_036_854
"""The server counts nanoseconds in 64 bits: a time after April 2262 would be one of long ago."""

_BACK: Final = (64, 4_096, 262_144)
"""How far below something foreign the newest version is looked for, before the whole chain is read."""


class Head(msgspec.Struct, frozen=True):
    """The end of a chain.

    ``row`` is its newest version, with the hint where the parts of its body stand; None when the bucket holds none.
    ``last_seq`` is the sequence to compare with when the next one is written: that of ``row``, unless something that
    is no version was put on the subject since.  ``losses`` tells how often the connection had been lost when it was
    read (:attr:`KeyChains.losses`): a server that comes back may have lost its end, and give sequences out again.
    """

    row: KeyVersionRow | None = None
    at: tuple[int, ...] = ()
    last_seq: int = 0
    losses: int = 0

    def is_still(self, now: Head) -> bool:
        """Whether the chain ends now as it did."""
        return self.last_seq == now.last_seq and _event_id(self) == _event_id(now)


class KeyChains:
    """Reads of the bucket on one connection.

    ``replicas``: with more than one, heads are read from the stream's leader, since a direct get may be answered by a
    server that has not caught up; and the leader confirms the end of a chain that was read otherwise.
    """

    def __init__(self, connection: Connection, *, replicas: int = 1) -> None:
        self._connection = connection
        self._replicas = replicas

    @property
    def losses(self) -> int:
        """How often the connection was lost: the stream may have lost its end since what was read before."""
        return self._connection.losses

    async def info(self) -> StreamInfo:
        """Returns the state of the bucket's stream."""
        return await call_with_retry(partial(stream_info, self._connection, KEYS_STREAM), deadline_s=READ_DEADLINE_S)

    async def head(self, namespace: str, key: str) -> Head:
        """Returns the end of a key's chain, as of now: every version acknowledged before the call is seen."""
        subject = key_subject(namespace, key)
        losses = self.losses
        if self._replicas > 1:
            return (await self.heads(namespace, [key])).get(key, Head(losses=losses))
        message = await call_with_retry(partial(self._last, subject), deadline_s=READ_DEADLINE_S)
        return Head(losses=losses) if message is None else await self._head_of(subject, message, losses)

    async def heads(self, namespace: str, keys: Iterable[str]) -> dict[str, Head]:
        """Returns the ends of many chains, by key; keys without one are left out."""
        losses = self.losses
        wanted = {key_subject(namespace, key): key for key in keys}
        heads: dict[str, Head] = {}
        subjects = list(wanted)
        if self._replicas > 1:
            found = await call_with_retry(
                partial(last_at_leader, self._connection, KEYS_STREAM, subjects), deadline_s=READ_DEADLINE_S
            )
            return {
                wanted[subject]: await self._head_of(subject, message, losses) for subject, message in found.items()
            }
        for start in range(0, len(subjects), _MULTI_GET):
            request = {"multi_last": subjects[start : start + _MULTI_GET]}
            for message in await self._batch(request):
                heads[wanted[message.subject]] = await self._head_of(message.subject, message, losses)
        return heads

    async def keys(self, namespace: str, prefix: str) -> list[str]:
        """Returns every key that begins with ``prefix`` and is in the bucket, in order, tombstones included."""
        found: list[str] = []
        offset = 0
        while True:
            request = {"subjects_filter": key_filter(namespace, prefix), "offset": offset}
            answer = await call_with_retry(partial(self._subjects, request), deadline_s=READ_DEADLINE_S)
            subjects: dict[str, int] = answer["state"].get("subjects") or {}
            for subject in subjects:
                key = _key_in(subject)
                if key is not None and key.startswith(prefix):
                    found.append(key)
            offset += len(subjects)
            if not subjects or offset >= answer.get("total", 0):
                return sorted(found)

    async def revisions(self, namespace: str, key: str, *, from_seq: int = 1, page: int = _PAGE) -> AsyncIterator[Head]:
        """Yields the versions of a key that the bucket holds, oldest first, from a sequence on, in pages."""
        subject = key_subject(namespace, key)
        seq = from_seq
        while True:
            messages = await self._run_of(subject, page, seq)
            for message in messages:
                head = version_in(message)
                if head is not None:
                    yield head
            if len(messages) < page:
                return
            seq = messages[-1].seq + 1

    async def version(self, namespace: str, key: str, number: int, newest: Head) -> Head | None:
        """Returns the version of a number, or None when the bucket does not hold it.

        ``newest`` is the end of the chain.  Numbers ascend with sequences, so a few looks find it, however long the
        chain is: in turns where it should stand if the versions were evenly spread, and in the middle of what is left.
        """
        if newest.row is None or number >= newest.row.version:
            return newest if newest.row is not None and number == newest.row.version else None
        # It stands at low_seq or above, and below high_seq; below low_seq stands low and what is older.
        low_seq, low = 1, 0
        high_seq, high = newest.row.seq, newest.row.version
        looks = 0
        while low_seq < high_seq:
            span = high_seq - low_seq
            if not looks or span <= LOOK:
                seq = low_seq
            elif looks % 2:
                seq = max(low_seq, low_seq + span * (number - low - 1) // (high - low) - LOOK // 2)
            else:
                seq = low_seq + span // 2
            looks += 1
            found = await self._look(namespace, key, seq)
            for head, row in found:
                if row.version == number:
                    return head
            if not found or number < found[0][1].version:
                if seq == low_seq:
                    return None
                high_seq, high = seq, found[0][1].version if found else high
            elif number > found[-1][1].version:
                low_seq, low = found[-1][1].seq + 1, found[-1][1].version
            else:
                return None
        return None

    async def as_of(self, namespace: str, key: str, at_ms: int) -> Head:
        """Returns the end of a key's chain as it was at a time of the server's, as far as the bucket still holds it."""
        subject = key_subject(namespace, key)
        # Up to, not including: versions of the whole millisecond count.
        request = {"multi_last": [subject], "up_to_time": iso_from_ms(min(at_ms + 1, _LATEST_MS))}
        messages = await self._batch(request, is_complete=partial(self._was_last, subject, at_ms))
        if not messages:
            return Head()
        head = version_in(messages[0])
        if head is not None:
            return head
        found = Head()
        async for revision in self.revisions(namespace, key):
            if revision.row is not None and revision.row.stored_at_ms <= at_ms:
                found = revision
        return found

    async def _head_of(self, subject: str, message: StoredMessage, losses: int) -> Head:
        head = version_in(message)
        if head is not None:
            return msgspec.structs.replace(head, losses=losses)
        # Something foreign was put on the subject: the chain goes on from the newest version before it.
        namespace, key = parse_key_subject(subject)
        newest = Head()
        for back in (*_BACK, message.seq):
            async for revision in self.revisions(namespace, key, from_seq=message.seq - back):
                newest = revision
            if newest.row is not None or back >= message.seq:
                break
        return msgspec.structs.replace(newest, last_seq=max(newest.last_seq, message.seq), losses=losses)

    async def _look(self, namespace: str, key: str, from_seq: int) -> list[tuple[Head, KeyVersionRow]]:
        """The first versions from a sequence on, a few of them; none when there are none."""
        messages = await self._run_of(key_subject(namespace, key), LOOK, from_seq)
        found = [(head, head.row) for head in map(version_in, messages) if head is not None and head.row is not None]
        if found or len(messages) < LOOK:
            return found
        # Nothing but what is foreign: the next version stands somewhere behind it.
        async for head in self.revisions(namespace, key, from_seq=messages[-1].seq + 1):
            return [] if head.row is None else [(head, head.row)]
        return []

    async def _last(self, subject: str) -> StoredMessage | None:
        message = await self._connection.lean.request(f"{_DIRECT}.{subject}")
        if H_SEQUENCE in (message.headers or {}):
            return _stored(message)
        status = (message.headers or {}).get(H_STATUS, "")
        if status == "404":
            return None
        raise UnavailableError(f"the bucket of keys answered {status!r}")

    async def _subjects(self, request: Mapping[str, object]) -> dict[str, Any]:
        answer = await self._connection.api(f"STREAM.INFO.{KEYS_STREAM}", request)
        require_majority(answer)
        return answer

    async def _run_of(self, subject: str, count: int, from_seq: int) -> list[StoredMessage]:
        """The first ``count`` messages of a subject from a sequence on; fewer only when that is its end."""

        async def is_complete(messages: list[StoredMessage]) -> None:
            if len(messages) < count:
                last_seq = messages[-1].seq if messages else max(1, from_seq) - 1
                await require_end(self._connection, KEYS_STREAM, subject, last_seq)

        request = {"next_by_subj": subject, "batch": count, "seq": max(1, from_seq)}
        return await self._batch(request, is_complete=is_complete)

    async def _was_last(self, subject: str, at_ms: int, messages: list[StoredMessage]) -> None:
        """Raises unless the one message, or none, was the last of its subject at a time."""
        request = {"seq": messages[0].seq + 1 if messages else 1, "next_by_subj": subject}
        behind = await message_at_leader(self._connection, KEYS_STREAM, request)
        if behind is not None and behind.stored_at_ms <= at_ms:
            raise UnavailableError("a server that holds the bucket of keys has not caught up yet")

    async def _batch(
        self,
        request: Mapping[str, object],
        *,
        is_complete: Callable[[list[StoredMessage]], Awaitable[None]] | None = None,
    ) -> list[StoredMessage]:
        """Asks any copy; with more than one, ``is_complete`` asks the leader whether that copy had caught up."""

        async def read() -> list[StoredMessage]:
            messages = await self._batch_once(request)
            if self._replicas > 1 and is_complete is not None:
                await is_complete(messages)
            return messages

        return await call_with_retry(read, deadline_s=READ_DEADLINE_S)

    async def _batch_once(self, request: Mapping[str, object]) -> list[StoredMessage]:
        messages: list[StoredMessage] = []
        async with self._connection.lean.stream(_DIRECT, msgspec.json.encode(request)) as queue:
            while True:
                try:
                    message = await next_of(queue, ATTEMPT_S)
                except TimeoutError as error:
                    raise UnavailableError("the bucket of keys stopped answering") from error
                if H_SEQUENCE in (message.headers or {}):
                    messages.append(_stored(message))
                    continue
                status = (message.headers or {}).get(H_STATUS, "")
                if status in ("204", "404"):
                    return messages
                raise UnavailableError(f"the bucket of keys answered {status!r}")


def _stored(message: Msg) -> StoredMessage:
    headers = message.headers or {}
    return StoredMessage(
        subject=headers.get(H_SUBJECT, ""),
        headers=headers,
        payload=message.data,
        seq=int(headers[H_SEQUENCE]),
        stored_at_ms=parse_time_ms(headers.get(H_TIME, "")),
        epoch="",
    )


def version_in(message: StoredMessage) -> Head | None:
    """The version that a message holds, or None when it holds none: the archiver makes a dead letter of that."""
    try:
        row, at = decode_key_head(message)
    except RetryError:
        raise
    except HoldfastError:
        return None
    return Head(row, at, message.seq)


def _event_id(head: Head) -> str | None:
    return None if head.row is None else head.row.event_id


def _key_in(subject: str) -> str | None:
    try:
        return parse_key_subject(subject)[1]
    except HoldfastError:
        return None
