"""Acknowledged publishes, singly or as one atomic batch, and what each acknowledgement means."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec

from holdfast.schemas.errors import HoldfastError, TooLargeError, UnavailableError, UnknownOutcomeError
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.connection import ApiFailure, Connection, Msg
from holdfast.streams.retry import ATTEMPT_S
from holdfast.streams.wire import H_BATCH_COMMIT, H_BATCH_ID, H_BATCH_SEQUENCE

# Error codes of the server (errors.json of nats-server); its words are never looked at.
WRONG_LAST_SEQUENCE: Final = 10071
"""The subject holds a message already, or another than the one expected."""
WRONG_LAST_SEQUENCE_UNKNOWN: Final = 10164
"""The same in a cluster, where the other message may itself still be in flight: unknown."""
SUBJECT_FULL: Final = 10077
"""Maximum bytes or messages reached; with discard-new-per-subject also an occupied subject."""
BATCH_DUPLICATE: Final = 10201
"""A member of an atomic batch carries a message id that was seen before."""
BATCH_BROKEN: Final = 10176
"""Only a part of an atomic batch has come to the stream's leader, as when another one was chosen on its way: nothing of
it was stored."""
DUPLICATE_UNDER_WAY: Final = 10158
"""In a cluster, another attempt with this message id has not been decided yet: it may still be stored, or not."""
_BATCH_HEADERS_BYTES: Final = 150
"""What the headers of a batch add to a message."""
_RETRYABLE: Final = frozenset(
    {
        WRONG_LAST_SEQUENCE_UNKNOWN,
        BATCH_BROKEN,
        DUPLICATE_UNDER_WAY,
        10167,
        10008,
        10009,
        10076,
        10118,
        10174,
        10199,
        10210,
        10211,
    }
)


_HEADER_FRAME_BYTES: Final = len("NATS/1.0\r\n\r\n")


class Outgoing(msgspec.Struct, frozen=True):
    """One message to be stored."""

    subject: str
    headers: dict[str, str]
    payload: bytes

    @property
    def size(self) -> int:
        """Bytes on the wire, closely; headers are ASCII and count against the server's ``max_payload``."""
        headers = self.headers
        names_and_values = sum(map(len, headers)) + sum(map(len, headers.values())) + 4 * len(headers)
        return len(self.payload) + len(self.subject) + _HEADER_FRAME_BYTES + names_and_values


class Refused(Exception):  # noqa: N818  an outcome that the caller handles, not an error for users
    """The server stored nothing of this publish and said why; ``err_code`` tells."""

    def __init__(self, failure: ApiFailure) -> None:
        super().__init__(f"{failure.description} ({failure.err_code})")
        self.err_code = failure.err_code
        self.description = failure.description


class PubAck(msgspec.Struct, frozen=True):
    """The server's acknowledgement: stored (``seq``), or known already (``duplicate``)."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    count: int = 0
    error: ApiFailure | None = None


_ACK: Final = msgspec.json.Decoder(PubAck)


async def publish(connection: Connection, message: Outgoing, *, timeout_s: float = ATTEMPT_S) -> PubAck:
    """Stores one message and returns its acknowledgement.

    Raises Refused when the server stored nothing, UnknownOutcomeError when no answer came, UnavailableError when there
    is no such stream or the server asks to try later.
    """
    check_payload(connection, message)
    try:
        reply = await connection.lean.request(message.subject, message.payload, message.headers, timeout_s=timeout_s)
        return _acknowledged(reply)
    except UnknownOutcomeError:
        connection.unknown_writes += 1
        raise


async def publish_each(
    connection: Connection, messages: Sequence[Outgoing], *, timeout_s: float = ATTEMPT_S
) -> list[PubAck | Exception]:
    """Stores messages singly, all of them under way at once, and returns what :func:`publish` returns or raises."""
    lean = connection.lean
    clock = asyncio.get_running_loop().time
    until_s = clock() + timeout_s
    replies: list[asyncio.Future[Msg] | Exception] = []
    outcomes: list[PubAck | Exception] = []
    try:
        for message in messages:
            try:
                check_payload(connection, message)
                left_s = max(0.0, until_s - clock())
                replies.append(await lean.send(message.subject, message.payload, message.headers, timeout_s=left_s))
            except Exception as error:  # noqa: BLE001  told as the outcome of the message that cannot be sent
                replies.append(error)
        for reply in replies:
            if isinstance(reply, Exception):
                outcomes.append(reply)
                continue
            try:
                outcomes.append(_acknowledged(await reply))
            except UnknownOutcomeError as error:
                connection.unknown_writes += 1
                outcomes.append(error)
            except (HoldfastError, Refused) as error:
                outcomes.append(error)
    finally:
        # After a cancel nobody waits for the others: their answers are dropped.
        for reply in replies[len(outcomes) :]:
            if isinstance(reply, asyncio.Future):
                reply.cancel()
    return outcomes


async def publish_batch(
    connection: Connection, messages: Sequence[Outgoing], *, timeout_s: float = ATTEMPT_S
) -> list[int]:
    """Stores all messages or none, as one atomic batch on one stream (ADR-50), and returns their sequences.

    Errors as of :func:`publish`.  A cancel leaves the batch unknown: whole or absent, never in part.
    """
    if len(messages) == 1:
        return [(await publish(connection, messages[0], timeout_s=timeout_s)).seq]
    lean = connection.lean
    token = lean.new_token()
    batch_id = f"{lean.inbox_id}-{token}"
    outcome = lean.expect(token, timeout_s=timeout_s, is_batch=True)
    last = len(messages)
    try:
        for number, message in enumerate(messages, start=1):
            headers = {**message.headers, H_BATCH_ID: batch_id, H_BATCH_SEQUENCE: str(number)}
            if number == last:
                headers[H_BATCH_COMMIT] = "1"
            check_payload(connection, message, room=_BATCH_HEADERS_BYTES)
            # The first and the last ask for an answer: a refused beginning is known at once, not after a time-out.
            wants_reply = number in (1, last)
            await lean.publish(message.subject, message.payload, headers, reply_token=token if wants_reply else None)
        ack = _acknowledged(await outcome)
    except UnknownOutcomeError:
        connection.unknown_writes += last
        raise
    except BaseException:
        outcome.cancel()
        raise
    if ack.count != last:
        raise UnknownOutcomeError(f"the server acknowledged {ack.count} of {last} messages of an atomic batch")
    return list(range(ack.seq - last + 1, ack.seq + 1))


def check_payload(connection: Connection, message: Outgoing, *, room: int = 0) -> int:
    """Returns a message's size; raises TooLargeError when that and ``room`` are over what the server takes.

    The server answers such a message by closing the connection.
    """
    limit = connection.client.max_payload
    size = message.size
    if size + room > limit:
        raise TooLargeError(
            f"message of about {size} bytes is over the server's max_payload of {limit}",
            field="payload",
            limit=limit,
        )
    return size


def _acknowledged(reply: Msg) -> PubAck:
    try:
        ack = _ACK.decode(reply.data)
    except UNDECODABLE as error:
        raise UnknownOutcomeError("the answer to a publish is not an acknowledgement") from error
    if ack.error is None:
        return ack
    if ack.error.err_code in _RETRYABLE or (ack.error.code == 503 and ack.error.err_code != SUBJECT_FULL):
        raise UnavailableError(f"the server cannot store now: {ack.error.description} ({ack.error.err_code})")
    raise Refused(ack.error)
