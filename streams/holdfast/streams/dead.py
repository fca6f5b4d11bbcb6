"""Dead letters: what could not be processed, with the reason and where it came from.  Nothing is thrown away."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.schemas.errors import UnavailableError
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.leader import last_at_leader
from holdfast.streams.publish import SUBJECT_FULL, WRONG_LAST_SEQUENCE, Outgoing, Refused, publish
from holdfast.streams.pull import StreamReader
from holdfast.streams.storing import store_with_retry
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import (
    DEAD_STREAM,
    H_CODE,
    H_EXPECT_SUBJECT_SEQ,
    H_HANDLER,
    H_ORIGIN_HEADERS,
    H_ORIGIN_SUBJECT,
    H_ORIGIN_TIME,
    H_REASON,
    dead_subject,
    namespace_token,
)

if TYPE_CHECKING:
    from holdfast.schemas.errors import HoldfastError
    from holdfast.streams.connection import Connection
    from holdfast.streams.messages import StoredMessage

_PAGE: Final = 1_000
_REST: Final = "rest"
_HEADER_CHARS: Final = 1_000
"""Longest reason kept: headers count against the payload limit."""


class FailedHandler(msgspec.Struct, frozen=True):
    """The handler that gave an event up: its name, and the consumer by which it can be told to take it again."""

    name: str
    consumer: str


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message that could not be processed.  ``payload`` is the message as it came.

    ``handler``: the one that gave it up; None when it could not be taken for what its stream holds.
    """

    stream: str
    epoch: str
    seq: int
    subject: str
    code: str
    reason: str
    stored_at_ms: int
    died_at_ms: int
    headers: dict[str, str]
    payload: bytes
    handler: FailedHandler | None = None


async def bury(
    connection: Connection,
    stream: str,
    message: StoredMessage,
    error: HoldfastError,
    *,
    handler: FailedHandler | None = None,
) -> bool:
    """Stores a message as a dead letter, durably; returns False when it was there already.

    One origin has one subject, created once: however often it is met again, there is one letter.  One that handlers
    gave up has one for each of them.
    """
    headers = {
        H_EXPECT_SUBJECT_SEQ: "0",
        H_REASON: _escaped(str(error)[:_HEADER_CHARS]),
        H_CODE: error.code,
        H_ORIGIN_SUBJECT: _escaped(message.subject),
        H_ORIGIN_TIME: str(message.stored_at_ms),
        H_ORIGIN_HEADERS: _headers_json(message.headers),
    }
    if handler is not None:
        headers[H_HANDLER] = _escaped(handler.name[:_HEADER_CHARS])
    token = namespace_token(message.subject)
    consumer = None if handler is None else handler.consumer
    subject = dead_subject(token, stream, message.epoch, message.seq, consumer)
    letter = Outgoing(subject, headers, message.payload)
    if letter.size > connection.client.max_payload:
        # A message at the server's limit leaves no room for the reason: its second half goes before it.
        half = len(message.payload) // 2
        await _create(connection, Outgoing(f"{subject}.{_REST}", {H_EXPECT_SUBJECT_SEQ: "0"}, message.payload[half:]))
        letter = Outgoing(subject, headers, message.payload[:half])
    return await _create(connection, letter)


async def _create(connection: Connection, letter: Outgoing) -> bool:
    async def attempt() -> bool:
        try:
            await publish(connection, letter)
        except Refused as refusal:
            if refusal.err_code not in (WRONG_LAST_SEQUENCE, SUBJECT_FULL):
                raise
            # Taken, the server says; but a full stream answers alike, and so does a leader that was deposed and has an
            # attempt in flight that nobody will store.  The letter itself is the proof.
            if await last_at_leader(connection, DEAD_STREAM, [letter.subject]):
                return False
            raise _not_stored(refusal) from refusal
        return True

    try:
        return await store_with_retry(connection, DEAD_STREAM, attempt)
    except Refused as refusal:
        raise _not_stored(refusal) from refusal


def _not_stored(refusal: Refused) -> UnavailableError:
    return UnavailableError(
        f"a dead letter could not be stored: {refusal}",
        hint="see the server's log and its limits of storage; the message stays where it is meanwhile",
    )


async def read_dead_letters(connection: Connection, *, after_seq: int = 0) -> AsyncGenerator[tuple[int, DeadLetter]]:
    """Yields (sequence in CTX_DEAD, letter), oldest first, as of the time of the call."""
    info = await stream_info(connection, DEAD_STREAM)
    reader = StreamReader(connection, DEAD_STREAM, max(after_seq + 1, info.first_seq), allow_gaps=True)
    rests: dict[str, bytes] = {}
    try:
        while True:
            messages, _ = await reader.read(limit=_PAGE, up_to=info.last_seq)
            for message in messages:
                if message.subject.endswith(f".{_REST}"):
                    rests[message.subject] = message.payload
                    continue
                letter = _letter(message, rests.pop(f"{message.subject}.{_REST}", b""))
                if letter is not None:
                    yield message.seq, letter
            if reader.next_seq > info.last_seq or not messages:
                return
    finally:
        await reader.close()


def _letter(message: StoredMessage, rest: bytes) -> DeadLetter | None:
    # ctx.<ns>.dead.<stream>.<epoch>.<seq>[.<handler>]: anybody may publish there, so what is no letter of ours is
    # passed over.
    tokens = message.subject.split(".")
    headers = message.headers
    handler = None
    if len(tokens) == 7 and H_HANDLER in headers:
        handler = FailedHandler(_unescaped(headers[H_HANDLER]), tokens.pop())
    seq = _number(tokens[5]) if len(tokens) == 6 else None
    if seq is None:
        return None
    try:
        origin_headers = msgspec.json.decode(headers.get(H_ORIGIN_HEADERS, "{}"), type=dict[str, str])
    except UNDECODABLE:
        origin_headers = {}
    return DeadLetter(
        stream=tokens[3],
        epoch=tokens[4],
        seq=seq,
        subject=_unescaped(headers.get(H_ORIGIN_SUBJECT, "")),
        code=headers.get(H_CODE, ""),
        reason=_unescaped(headers.get(H_REASON, "")),
        stored_at_ms=_number(headers.get(H_ORIGIN_TIME, "")) or 0,
        died_at_ms=message.stored_at_ms,
        headers=origin_headers,
        payload=message.payload + rest,
        handler=handler,
    )


def _headers_json(headers: Mapping[str, str]) -> str:
    """The origin's headers as JSON in ASCII, as many as there is room for."""
    kept: dict[str, str] = {}
    room = 8 * _HEADER_CHARS
    for name, value in headers.items():
        room -= len(json.dumps(name)) + len(json.dumps(value)) + 4
        if room < 0:
            break
        kept[name] = value
    return json.dumps(kept)


def _escaped(text: str) -> str:
    """Text that may stand in a header: anything but printable ASCII is written as an escape."""
    return text.encode("unicode_escape").decode("ascii")


def _unescaped(text: str) -> str:
    try:
        return text.encode("ascii").decode("unicode_escape")
    except UnicodeError:
        return text  # not written by us


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None
