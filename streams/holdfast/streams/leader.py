"""What only the leader of a replicated stream may answer.

A direct get is answered by any server that holds a copy, also by one that has not caught up: it may return an older
message than the newest one, or none.  ``STREAM.MSG.GET`` is answered by the leader alone.  A leader that was cut off
from the others goes on answering for some seconds, so its word counts only while it hears a majority of them
(``topology.stream_info`` says so, and is asked at the same time: no answer waits for another).

What remains: for at most the second between two heartbeats, a leader that is cut off from one server, while the third
has just elected that one, may not know it.  A reader that was told something old then cannot write on it: every
compare-and-set is decided by a majority.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.schemas.errors import UnavailableError
from holdfast.streams.connection import ApiError, Connection
from holdfast.streams.messages import StoredMessage, parse_time_ms
from holdfast.streams.tolerant_client import read_headers
from holdfast.streams.topology import stream_info

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NO_MESSAGE: Final = 10037
_IN_FLIGHT: Final = 256
"""Look-ups under way at once: the server queues some thousand calls of its API, and refuses those beyond."""


class _LeaderMessage(msgspec.Struct):
    """A message as ``STREAM.MSG.GET`` tells it; headers and data come in base64."""

    subject: str
    seq: int
    time: str
    hdrs: bytes = b""
    data: bytes = b""


async def message_at_leader(
    connection: Connection, stream: str, request: Mapping[str, object], *, epoch: str = ""
) -> StoredMessage | None:
    """Returns the message that ``STREAM.MSG.GET`` finds at the leader, or None when there is none, as of now.

    Everything that was acknowledged before the call is seen.  Raises UnavailableError while the stream has no leader,
    or one that does not hear a majority.
    """
    message, _ = await asyncio.gather(_get(connection, stream, request, epoch), stream_info(connection, stream))
    return message


async def last_at_leader(connection: Connection, stream: str, subjects: Sequence[str]) -> dict[str, StoredMessage]:
    """Returns the newest message of each subject that has one, by subject; as of :func:`message_at_leader`."""
    found: dict[str, StoredMessage] = {}
    for start in range(0, len(subjects), _IN_FLIGHT):
        wanted = subjects[start : start + _IN_FLIGHT]
        reads = (_get(connection, stream, {"last_by_subj": subject}, "") for subject in wanted)
        *messages, _ = await asyncio.gather(*reads, stream_info(connection, stream))
        found |= {
            subject: message
            for subject, message in zip(wanted, messages, strict=True)
            if isinstance(message, StoredMessage)
        }
    return found


async def require_end(connection: Connection, stream: str, subject: str, last_seq: int) -> None:
    """Raises UnavailableError when the subject has a message behind ``last_seq``: whoever said that it is the last
    one has not caught up."""
    message = await message_at_leader(connection, stream, {"seq": last_seq + 1, "next_by_subj": subject})
    if message is not None:
        raise UnavailableError(f"a server that holds {stream} has not caught up yet")


async def _get(connection: Connection, stream: str, request: Mapping[str, object], epoch: str) -> StoredMessage | None:
    try:
        answer: dict[str, Any] = (await connection.api(f"STREAM.MSG.GET.{stream}", request))["message"]
    except ApiError as error:
        if error.err_code == _NO_MESSAGE:
            return None
        raise
    message = msgspec.convert(answer, _LeaderMessage, strict=False)
    return StoredMessage(
        subject=message.subject,
        headers=read_headers(message.hdrs) or {},
        payload=message.data,
        seq=message.seq,
        stored_at_ms=parse_time_ms(message.time),
        epoch=epoch,
    )


__all__ = ["last_at_leader", "message_at_leader", "require_end"]
