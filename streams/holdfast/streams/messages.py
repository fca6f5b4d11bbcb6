"""A stream's message as read from it: where it stands, when it was stored, what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from holdfast.schemas.errors import IntegrityError

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SHORT_ACK_TOKENS: Final = 9
_ACK_PREFIX: Final = "$JS.ACK."


class StoredMessage(msgspec.Struct, frozen=True):
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
        return (datetime.fromisoformat(text) - _EPOCH) // timedelta(milliseconds=1)
    except ValueError as error:
        raise IntegrityError(f"the server gave {text[:40]!r} as a time") from error


def is_delivery(reply: str) -> bool:
    """Whether a message with this reply subject is one of the stream, not a word of the server's about a pull.

    A header ``Status`` does not tell: any publisher can write one.
    """
    return reply.startswith(_ACK_PREFIX)


def message_of_delivery(
    subject: str, headers: Mapping[str, str] | None, payload: bytes, ack_subject: str, epoch: str
) -> tuple[StoredMessage, int]:
    """Returns the message of a consumer's delivery, and which attempt it is.

    The reply subject says where it stands (ADR-15)::

        $JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<delivered>.<seq>.<consumer seq>.<time>.<pending>[.<token>]

    Nine tokens in the short form, eleven or twelve in the long one.
    """
    tokens = ack_subject.split(".")
    first = 4 if len(tokens) == _SHORT_ACK_TOKENS else 6
    message = StoredMessage(
        subject=subject,
        headers=headers or {},
        payload=payload,
        seq=int(tokens[first + 1]),
        stored_at_ms=int(tokens[first + 3]) // 1_000_000,
        epoch=epoch,
    )
    return message, int(tokens[first])
