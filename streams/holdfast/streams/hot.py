"""The hot tier: immutable contexts in the KV bucket ``ctx-hot``, keyed by their digest."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.schemas import limits
from holdfast.schemas.errors import ConflictError, HoldfastError, RetryError, UnavailableError
from holdfast.schemas.refs import JSON, Digest, Ref, format_ref
from holdfast.streams.codec import StoredForm, decode_manifest, inflate, join, require_chunks, seal, unseal
from holdfast.streams.committer import Committer, Settled
from holdfast.streams.connection import Connection, Msg
from holdfast.streams.leader import last_at_leader
from holdfast.streams.messages import parse_time_ms
from holdfast.streams.publish import Outgoing
from holdfast.streams.retry import READ_DEADLINE_S, call_with_retry
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import (
    H_EXPECT_SUBJECT_SEQ,
    H_SEQUENCE,
    H_STATUS,
    H_SUBJECT,
    H_TIME,
    H_UP_TO,
    HOT_STREAM,
    hot_subject,
    parse_hot_subject,
)

if TYPE_CHECKING:
    from holdfast.schemas.rows import ContextRow

_IN_THREAD_BYTES: Final = 64 * limits.KIB
"""Bodies over this are hashed and compressed in a thread: on the event loop they would take over 0.5 ms."""

_ONLY_IF_NEW: Final = {H_EXPECT_SUBJECT_SEQ: "0"}

_MULTI_GET: Final = 1000
"""Subjects in one batched direct get; the server answers 1,024 at most."""

ColdChunks = Callable[[str, Sequence[Digest]], Awaitable["dict[Digest, ContextRow]"]]
"""Given a namespace and digests, returns the chunks that the lake holds of them."""


class NewContext(msgspec.Struct, frozen=True, kw_only=True):
    """A context to be stored; its fields have been validated."""

    namespace: str
    kind: str
    body: bytes
    content_type: str = JSON
    expires_at_ms: int | None = None


class Put(msgspec.Struct, frozen=True):
    """The outcome of storing one context: its reference, and whether an equal one was there already."""

    ref: Ref
    existed: bool


class HotTier:
    """Reads and writes of the hot tier on one connection.

    ``replicas``: with more than one, a miss is confirmed at the stream's leader, since a direct get may be answered by
    a server that has not caught up; without a leader nothing is said to be missing.  ``cold`` reads parts that have
    left the hot tier: needed to tell whether an equal body is stored already in other parts than it would be now;
    without it such a put is refused as unavailable.
    """

    def __init__(self, connection: Connection, *, replicas: int = 1, cold: ColdChunks | None = None) -> None:
        self._connection = connection
        self._replicas = replicas
        self._cold = cold
        self._committer = Committer(connection, verifier=self._verify)

    async def put(self, context: NewContext) -> Put:
        """Stores one context durably, as :meth:`put_many` does."""
        if len(context.body) > limits.CHUNK_BYTES:
            return (await self.put_many([context]))[0]
        (form,) = await self._seal(context)
        settled = await self._committer.store(_outgoing(context.namespace, form))
        return Put(format_ref(context.kind, form.digest), settled.existed)

    async def put_many(self, contexts: Sequence[NewContext]) -> list[Put]:
        """Stores contexts durably and returns their outcomes in order.

        Equal contexts are stored once.  What was there already is reported as stored only after it was read and
        re-hashed.  Chunks of a large body are acknowledged before its manifest is sent, so that no manifest is ever
        without its chunks.
        """
        puts: list[Put] = []
        # Bounded look-ahead: sealing everything first would hold every compressed body at once.
        for window in _windows(contexts):
            sealed = [await self._seal(context) for context in window]
            chunks = [
                _outgoing(context.namespace, form)
                for context, forms in zip(window, sealed, strict=True)
                for form in forms[:-1]
            ]
            if chunks:
                await self._committer.store_many(chunks)
            heads = [_outgoing(context.namespace, forms[-1]) for context, forms in zip(window, sealed, strict=True)]
            settled = await self._committer.store_many(heads)
            puts.extend(
                Put(format_ref(context.kind, forms[-1].digest), outcome.existed)
                for context, forms, outcome in zip(window, sealed, settled, strict=True)
            )
        return puts

    async def store_forms(self, namespace: str, forms: Sequence[StoredForm]) -> list[Settled]:
        """Stores prepared messages durably and returns their outcomes in order.  Chunks come before their manifest."""
        return await self._committer.store_many([_outgoing(namespace, form) for form in forms])

    async def get_at(self, namespace: str, seqs: Iterable[int]) -> dict[Digest, ContextRow]:
        """Returns what stands at these sequences, as it is stored, by digest: what is not of this namespace, or no
        context, is left out.  For readers who were told where to look, and look elsewhere for what is not there."""
        wanted = list(seqs)
        requests = [
            await self._connection.lean.send(f"$JS.API.DIRECT.GET.{HOT_STREAM}", b'{"seq":%d}' % seq) for seq in wanted
        ]
        outcomes = await asyncio.gather(*requests, return_exceptions=True)
        messages = [outcome for outcome in outcomes if isinstance(outcome, Msg) and _status(outcome) is None]
        prefix = hot_subject(namespace, "")
        own = [message for message in messages if _header(message, H_SUBJECT).startswith(prefix)]
        rows = await _rows(namespace, own)
        return {digest: row for digest, row in rows if not isinstance(row, HoldfastError)}

    async def get(self, namespace: str, digest: str) -> ContextRow | None:
        """Returns the whole context, checked against its digest, or None when the hot tier does not hold it."""
        row = await call_with_retry(lambda: self._get_stored(namespace, digest), deadline_s=READ_DEADLINE_S)
        if row is None or row.form != "manifest":
            return row
        return await self.join_chunks(row)

    async def get_stored(self, namespace: str, digest: str) -> ContextRow | None:
        """Returns what is stored under the digest as it is stored (a manifest stays one), or None."""
        return await call_with_retry(lambda: self._get_stored(namespace, digest), deadline_s=READ_DEADLINE_S)

    async def get_stored_many(
        self, namespace: str, digests: Iterable[Digest]
    ) -> tuple[dict[Digest, ContextRow], dict[Digest, HoldfastError]]:
        """Returns what is stored under the digests as it is stored, and the error of each that is damaged.

        Digests that the hot tier does not hold are in neither.
        """
        wanted = list(dict.fromkeys(digests))
        found: dict[Digest, ContextRow] = {}
        damaged: dict[Digest, HoldfastError] = {}
        for start in range(0, len(wanted), _MULTI_GET):
            subjects = [hot_subject(namespace, digest) for digest in wanted[start : start + _MULTI_GET]]
            messages = await call_with_retry(partial(self._confirmed, subjects), deadline_s=READ_DEADLINE_S)
            for digest, outcome in await _rows(namespace, messages):
                if isinstance(outcome, HoldfastError):
                    damaged[digest] = outcome
                else:
                    found[digest] = outcome
        return found, damaged

    async def join_chunks(self, row: ContextRow) -> ContextRow | None:
        """Returns the whole context of a manifest, or None when the hot tier lacks one of its chunks."""
        found, left = await self._chunks_of(row)
        return None if left else await _joined(row, found)

    async def close(self) -> None:
        """Waits until every write that was handed in has an outcome."""
        await self._committer.close()

    async def _seal(self, context: NewContext) -> list[StoredForm]:
        if len(context.body) <= _IN_THREAD_BYTES:
            return _sealed(context)
        return await asyncio.to_thread(_sealed, context)

    async def _get_stored(self, namespace: str, digest: str) -> ContextRow | None:
        subject = hot_subject(namespace, digest)
        message = await self._connection.lean.request(f"$JS.API.DIRECT.GET.{HOT_STREAM}.{subject}")
        status = _status(message)
        if status == "404":
            if self._replicas > 1 and await last_at_leader(self._connection, HOT_STREAM, [subject]):
                raise UnavailableError("a server that holds the hot tier has not caught up yet")
            return None
        if status is not None:
            raise UnavailableError(f"the hot tier answered {status!r}")
        if len(message.data) > _IN_THREAD_BYTES:
            return await asyncio.to_thread(_row, namespace, digest, message)
        return _row(namespace, digest, message)

    async def _confirmed(self, subjects: list[str]) -> list[Msg]:
        """As :meth:`_multi_last`, but what is left out is in no other copy of the stream either.

        One answer of the leader, on the way at the same time, vouches for all: an answer that knows of as late a
        sequence as the leader does lacks nothing.  Otherwise the leader is asked for each that is missing.
        """
        if self._replicas == 1:
            return (await self._multi_last(subjects))[0]
        info, (messages, up_to) = await asyncio.gather(
            stream_info(self._connection, HOT_STREAM), self._multi_last(subjects)
        )
        missing = {*subjects} - {_header(message, H_SUBJECT) for message in messages}
        if missing and up_to < info.last_seq and await last_at_leader(self._connection, HOT_STREAM, sorted(missing)):
            raise UnavailableError("a server that holds the hot tier has not caught up yet")
        return messages

    async def _multi_last(self, subjects: list[str]) -> tuple[list[Msg], int]:
        """The newest message of each subject that has one, and the sequence up to which the answer is complete."""
        request = msgspec.json.encode({"multi_last": subjects})
        try:
            messages = await self._connection.lean.collect(f"$JS.API.DIRECT.GET.{HOT_STREAM}", request, _is_closing)
        except TimeoutError as error:
            raise UnavailableError("the hot tier stopped answering a batched get") from error
        closing = messages.pop()
        status = _status(closing)
        if status not in ("204", "404"):
            raise UnavailableError(f"the hot tier answered a batched get with {status!r}")
        return messages, int(_header(closing, H_UP_TO) or 0)

    async def _verify(self, messages: Sequence[Outgoing]) -> dict[str, Settled | HoldfastError]:
        """Tells of subjects that are taken whether they hold what was to be stored (equal digest, intact)."""
        outcomes: dict[str, Settled | HoldfastError] = {}
        intended = {message.subject: message for message in messages}
        for start in range(0, len(messages), _MULTI_GET):
            subjects = [message.subject for message in messages[start : start + _MULTI_GET]]
            # What a server that has not caught up leaves out is written again, and found the next time.
            for message in (await self._multi_last(subjects))[0]:
                subject = _header(message, H_SUBJECT)
                namespace, digest = parse_hot_subject(subject)
                try:
                    row = _row(namespace, digest, message)
                    if row.form == "manifest" and row.body != inflate(
                        intended[subject].headers, intended[subject].payload
                    ):
                        await self._check_foreign_manifest(row)
                    outcomes[subject] = Settled(row.seq, existed=True)
                except RetryError:
                    raise
                except HoldfastError as error:
                    outcomes[subject] = ConflictError(
                        f"something else is stored under {subject}: {error.message}",
                        hint="a foreign or damaged message holds this key; see 'holdfast verify'",
                    )
        return outcomes

    async def _check_foreign_manifest(self, row: ContextRow) -> None:
        """Raises unless the chunks of a manifest that this release would not have written make the body it names."""
        found, left = await self._chunks_of(row)
        if left:
            # Shared parts may be older than the manifests that name them, and have left before.
            if self._cold is None:
                raise UnavailableError(f"{len(left)} parts of {row.ref} are not in the hot tier")
            found |= await self._cold(row.namespace, left)
        require_chunks(row, found)
        await _joined(row, found)

    async def _chunks_of(self, row: ContextRow) -> tuple[dict[Digest, ContextRow], list[Digest]]:
        """The chunks of a manifest that the hot tier holds, and those that it does not; raises for a damaged one."""
        chunks = decode_manifest(row.body).chunks
        found, damaged = await self.get_stored_many(row.namespace, chunks)
        for error in damaged.values():
            raise error
        return found, [digest for digest in dict.fromkeys(chunks) if digest not in found]


async def _joined(row: ContextRow, chunks: Mapping[Digest, ContextRow]) -> ContextRow:
    return await asyncio.to_thread(join, row, {digest: chunk.body for digest, chunk in chunks.items()})


def _windows(contexts: Sequence[NewContext]) -> Iterator[list[NewContext]]:
    """Runs of contexts, two full batches long by number or by bytes: one being stored while the next is sealed."""
    window: list[NewContext] = []
    size = 0
    for context in contexts:
        window.append(context)
        size += len(context.body)
        if len(window) >= 2 * limits.BATCH_MESSAGES or size >= 2 * limits.BATCH_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window


def _sealed(context: NewContext) -> list[StoredForm]:
    return seal(
        context.namespace,
        context.kind,
        context.body,
        content_type=context.content_type,
        expires_at_ms=context.expires_at_ms,
    )


def _outgoing(namespace: str, form: StoredForm) -> Outgoing:
    return Outgoing(hot_subject(namespace, form.digest), form.headers | _ONLY_IF_NEW, form.payload)


def _row(namespace: str, digest: str, message: Msg) -> ContextRow:
    return unseal(
        namespace,
        digest,
        message.headers or {},
        message.data,
        stored_at_ms=parse_time_ms(_header(message, H_TIME)),
        seq=int(_header(message, H_SEQUENCE)),
    )


_Outcomes = list[tuple[Digest, "ContextRow | HoldfastError"]]


async def _rows(namespace: str, messages: Sequence[Msg]) -> _Outcomes:
    """Returns by digest what each message holds, or what is wrong with it."""

    def read() -> _Outcomes:
        outcomes: _Outcomes = []
        for message in messages:
            digest = Digest(_header(message, H_SUBJECT).rpartition(".")[2])
            try:
                outcomes.append((digest, _row(namespace, digest, message)))
            except HoldfastError as error:
                outcomes.append((digest, error))
        return outcomes

    if sum(len(message.data) for message in messages) <= _IN_THREAD_BYTES:
        return read()
    return await asyncio.to_thread(read)


def _status(message: Msg) -> str | None:
    """The status of a direct get's answer, or None when it is a message: that may carry a header Status of its own."""
    return None if _header(message, H_SEQUENCE) else _header(message, H_STATUS)


def _is_closing(message: Msg) -> bool:
    return _status(message) is not None


def _header(message: Msg, name: str) -> str:
    return (message.headers or {}).get(name, "")
