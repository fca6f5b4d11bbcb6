"""What a restore needs of the streams that others do not: whether they are empty, all that they hold, and a mark that
one is under way.

The mark is in the metadata of the hot tier's stream, so that it is as durable as what is restored: a restore that was
cut off finds it again, and everybody else sees that the system is not whole yet.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from holdfast.schemas.names import encode_token
from holdfast.streams.pull import StreamReader
from holdfast.streams.retry import READ_DEADLINE_S, WRITE_DEADLINE_S, call_with_retry
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import DEAD_STREAM, EVENTS_STREAM, HOT_STREAM, KEYS_STREAM, hot_subject, key_filter

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection
    from holdfast.streams.messages import StoredMessage

_PAGE: Final = 1_000

RESTORING_KEY: Final = "holdfast.restoring"
"""In the metadata of the hot tier's stream: the digest of the checkpoint that is being restored."""


def namespace_filter(stream: str, namespace: str | None) -> str:
    """Returns the wildcard subject of what a stream holds of one namespace; of everything when that is None."""
    if namespace is None:
        return ">"
    token = encode_token(namespace)
    return {
        HOT_STREAM: hot_subject(namespace, ">"),
        KEYS_STREAM: key_filter(namespace, ""),
        EVENTS_STREAM: f"ctx.{token}.event.>",
        DEAD_STREAM: f"ctx.{token}.dead.>",
    }[stream]


async def is_empty(connection: Connection, stream: str, namespace: str | None) -> bool:
    """Whether a stream holds nothing, or nothing of a namespace."""
    request = {"subjects_filter": namespace_filter(stream, namespace)}
    answer = await call_with_retry(
        partial(connection.api, f"STREAM.INFO.{stream}", request), deadline_s=READ_DEADLINE_S
    )
    return not answer["state"].get("subjects")


async def pages_of(connection: Connection, stream: str, namespace: str | None) -> AsyncGenerator[list[StoredMessage]]:
    """Yields what a stream holds of a namespace, or of all, in its order, up to where it ended when this was asked."""
    info = await call_with_retry(partial(stream_info, connection, stream), deadline_s=READ_DEADLINE_S)
    reader = StreamReader(
        connection,
        stream,
        max(1, info.first_seq),
        allow_gaps=True,
        filter_subject=namespace_filter(stream, namespace),
    )
    try:
        while reader.next_seq <= info.last_seq:
            messages, _ = await call_with_retry(
                partial(reader.read, limit=_PAGE, up_to=info.last_seq), deadline_s=WRITE_DEADLINE_S
            )
            yield messages
    finally:
        await reader.close()


async def restore_under_way(connection: Connection) -> str | None:
    """Returns the digest of the checkpoint whose restore has begun and not ended, or None."""
    config = await _config(connection)
    return config.get("metadata", {}).get(RESTORING_KEY) or None


async def mark_restore(connection: Connection, digest: str | None) -> None:
    """Notes that the restore of a checkpoint begins, or with None that it has ended.  Doing it again changes nothing.

    Until then :func:`restore_under_way` tells of it, to any client and after any crash.
    """
    config = await _config(connection)
    metadata: dict[str, str] = dict(config.get("metadata", {}))
    if digest is None:
        metadata.pop(RESTORING_KEY, None)
    else:
        metadata[RESTORING_KEY] = digest
    await call_with_retry(
        partial(connection.api, f"STREAM.UPDATE.{HOT_STREAM}", config | {"metadata": metadata}),
        deadline_s=READ_DEADLINE_S,
    )


async def _config(connection: Connection) -> dict[str, Any]:
    answer = await call_with_retry(partial(connection.api, f"STREAM.INFO.{HOT_STREAM}"), deadline_s=READ_DEADLINE_S)
    config: dict[str, Any] = answer["config"]
    return config
