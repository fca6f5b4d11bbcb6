"""A stream's message as read from it: where it stands, when it was stored, what it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from holdfast.schemas.errors import IntegrityError, UnavailableError

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_SHORT_ACK_TOKENS: Final = 9
_ACK_PREFIX: Final = "$JS.ACK."


class StoredMessage(msgspec.Struct, frozen=True, gc=False):
    """One message at one position of one life of a stream.  ``stored_at_ms`` is the server's time, floored."""

    subject: str
    headers: Mapping[str, str]
    payload: bytes
    seq: int
    stored_at_ms: int
    epoch: str


def parse_time_ms(text: str) -> int:
    """Returns milliseconds since 1970 of the server's RFC 3339 time; raises IntegrityError when it is none."""
    try:
        # Floored, as everywhere: a row is the same whichever way it was read.
        return (datetime.fromisoformat(text) - _EPOCH) // _MILLISECOND
    except (ValueError, TypeError) as error:  # a TypeError for a time without a zone
        raise IntegrityError(f"the server gave {text[:40]!r} as a time") from error


def is_delivery(reply: str) -> bool:
    """Whether a message with this reply subject is one of the stream, not a word of the server's about a pull.

    A header ``Status`` does not tell: any publisher can write one.
    """
    return reply.startswith(_ACK_PREFIX)


def message_of_delivery(
    subject: str,
    headers: Mapping[str, str] | None,
    payload: bytes,
    ack_subject: str,
    epoch: str | Callable[[int], str],
) -> tuple[StoredMessage, int]:
    """Returns the message of a consumer's delivery, and which attempt it is.

    ``epoch`` is the stream's life, or tells that of a sequence.

    The reply subject says where it stands (ADR-15)::

        $JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<delivered>.<seq>.<consumer seq>.<time>.<pending>[.<token>]

    Nine tokens in the short form, eleven or twelve in the long one.  Raises UnavailableError for another form: the
    server writes none, but whoever knows an inbox may send anything to it.
    """
    tokens = ack_subject.split(".")
    first = 4 if len(tokens) == _SHORT_ACK_TOKENS else 6
    try:
        attempt, seq, _, stored_at_ns = map(int, tokens[first : first + 4])
    except ValueError as error:
        raise UnavailableError(
            f"a delivery has the reply subject {ack_subject[:80]!r}, which the server does not write",
            hint="see who may publish to _INBOX.> on this server; it is asked again",
        ) from error
    message = StoredMessage(
        subject=subject,
        headers={} if headers is None else headers,
        payload=payload,
        seq=seq,
        stored_at_ms=stored_at_ns // 1_000_000,
        epoch=epoch if isinstance(epoch, str) else epoch(seq),
    )
    return message, attempt
