"""Images of streams: a whole stream as the server itself copies it, with sequences, times and headers, and back.

The JetStream snapshot API streams the blocks of one stream, compressed, in chunks that are acknowledged one by one.  An
image is of one moment: what was acknowledged before it was asked for is in it, and its ``state`` says exactly what it
holds, also while the stream is written and purged (200,000 messages: 0.3 s, during which writers go on).

Consumers are not in the image, since their positions move on while the blocks are copied, and a consumer that stands
beyond the end of its restored stream would skip what is published next.  They are noted before the image is taken, and
made anew behind what they had settled by then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.schemas.errors import ConfigurationError, GapError, IntegrityError, UnavailableError
from holdfast.streams.arrivals import next_of
from holdfast.streams.connection import ApiError
from holdfast.streams.retry import READ_DEADLINE_S, call_with_retry
from holdfast.streams.topology import (
    EPOCH_KEY,
    LAYOUT_VERSION,
    VERSION_KEY,
    declarations,
)
from holdfast.streams.wire import DEAD_STREAM, EVENTS_STREAM, H_STATUS, HOT_STREAM, KEYS_STREAM

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection, Msg

logger = logging.getLogger(__name__)

RESTORING_BACKUP_KEY: Final = "holdfast.restoring-backup"
"""In the metadata of a stream: the backup that is being restored into it.  Until that has ended the stream carries no
version of the layout, so that no worker takes it for one of a system that is whole."""

CHUNK_BYTES: Final = 512 * 1024
"""Half of the largest message."""

_CHUNK_S: Final = 30.0
"""How long a chunk is waited for, or its taking: a server that syncs each piece of it takes seconds."""

_FINISH_S: Final = 300.0
_STREAM_NOT_FOUND: Final = 10059
_DONE: Final = ("204", "")
"""How an image ends well: one of a single piece ends without a status."""
_FROM_SEQUENCE: Final = "by_start_sequence"

Write = Callable[[bytes], Awaitable[None]]


class StreamState(msgspec.Struct, frozen=True):
    """What an image holds."""

    messages: int
    bytes: int
    first_seq: int
    last_seq: int
    num_deleted: int = 0


class ConsumerNote(msgspec.Struct, frozen=True):
    """A durable consumer as it was declared, and the sequence up to which everything was settled."""

    config: dict[str, Any]
    settled_seq: int


class StreamImage(msgspec.Struct, frozen=True, kw_only=True):
    """What an image is of; its bytes are kept apart.  ``raw_state`` is the server's own word, for the restore."""

    name: str
    config: dict[str, Any]
    state: StreamState
    raw_state: dict[str, Any]
    consumers: list[ConsumerNote]

    @property
    def epoch(self) -> str:
        """The life of the stream that the image is of."""
        return str(self.config.get("metadata", {}).get(EPOCH_KEY, ""))


def image_names() -> tuple[str, ...]:
    """Returns the streams of which a backup takes images, in that order.

    Events and versions before contexts: what they refer to was stored before them.  Dead letters last: the archiver
    buries a message before it moves past it.
    """
    names = (EVENTS_STREAM, KEYS_STREAM, HOT_STREAM, DEAD_STREAM)
    assert set(names) == set(declarations()), "every declared stream is part of a backup"
    return names


async def take_image(connection: Connection, name: str, write: Write) -> StreamImage:
    """Takes an image of a stream, handing its bytes to ``write`` piece by piece; returns what it is of.

    Everything acknowledged before the call is in it.  After any error what was written is of no use.  Raises GapError
    when there is no such stream, UnavailableError when the server stops in the middle.
    """
    consumers = await _note_consumers(connection, name)
    queue: asyncio.Queue[Msg] = asyncio.Queue()  # bounded by the server's window, 8 MiB beyond what is acknowledged
    inbox = connection.client.new_inbox()

    async def receive(message: Msg) -> None:
        queue.put_nowait(message)

    subscription = await connection.client.subscribe(inbox, cb=receive, pending_msgs_limit=0, pending_bytes_limit=0)
    try:
        # With "jsck" the server checks the sum of each message first.
        request = {"deliver_subject": inbox, "no_consumers": True, "chunk_size": CHUNK_BYTES, "jsck": True}
        try:
            answer = await connection.api(f"STREAM.SNAPSHOT.{name}", request, timeout_s=_FINISH_S)
        except ApiError as error:
            if error.err_code == _STREAM_NOT_FOUND:
                raise GapError(f"stream {name} does not exist on this server") from error
            raise IntegrityError(
                f"the server gives no image of stream {name}: {error.message}",
                hint="'holdfast verify' tells what is damaged; restart the server",
            ) from error
        await _receive_chunks(connection, name, queue, write)
    finally:
        if not connection.client.is_closed:
            await subscription.unsubscribe()
    return StreamImage(
        name=name,
        config=answer["config"],
        state=msgspec.convert(answer["state"], StreamState),
        raw_state=answer["state"],
        consumers=consumers,
    )


async def _receive_chunks(connection: Connection, name: str, queue: asyncio.Queue[Msg], write: Write) -> None:
    received = 0
    while True:
        try:
            message = await next_of(queue, _CHUNK_S)
        except TimeoutError:
            raise UnavailableError(
                f"the image of stream {name} stopped in the middle", hint="see the server's log, then try again"
            ) from None
        if message.data:
            received += 1
            await write(message.data)
            # The last piece, when it is a short one, asks for no answer; the others end with their number.
            if message.reply:
                if message.reply.rpartition(".")[2] != str(received):
                    raise UnavailableError(f"pieces of the image of stream {name} were lost", hint="try again")
                await connection.lean.publish(message.reply, b"")
            continue
        status = (message.headers or {}).get(H_STATUS, "")
        if status not in _DONE:
            description = (message.headers or {}).get("Description", "no reason given")
            raise UnavailableError(
                f"the server broke off the image of stream {name}: {status} {description}", hint="try again"
            )
        return


async def _note_consumers(connection: Connection, name: str) -> list[ConsumerNote]:
    noted: list[ConsumerNote] = []
    offset = 0
    while True:
        try:
            answer = await call_with_retry(
                partial(connection.api, f"CONSUMER.LIST.{name}", {"offset": offset}), deadline_s=READ_DEADLINE_S
            )
        except ApiError as error:
            if error.err_code == _STREAM_NOT_FOUND:
                raise GapError(f"stream {name} does not exist on this server") from error
            raise
        found: list[dict[str, Any]] = answer.get("consumers") or []
        noted.extend(
            ConsumerNote(consumer["config"], consumer["ack_floor"].get("stream_seq", 0))
            for consumer in found
            if consumer["config"].get("durable_name")
        )
        offset += len(found)
        if not found or offset >= answer.get("total", 0):
            return noted


async def clear_for_restore(connection: Connection, backup_id: str) -> None:
    """Takes away empty streams and what a restore that was cut off has left; raises ConfigurationError, having taken
    nothing away, when any stream holds messages of somebody else's.
    """
    removable: list[str] = []
    for name in image_names():
        try:
            answer = await connection.api(f"STREAM.INFO.{name}")
        except ApiError as error:
            if error.err_code == _STREAM_NOT_FOUND:
                continue
            raise
        if answer["state"]["last_seq"] and RESTORING_BACKUP_KEY not in answer["config"].get("metadata", {}):
            raise ConfigurationError(
                f"stream {name} on this server is not empty: it has come to sequence {answer['state']['last_seq']}",
                hint="a backup is restored into an empty system: name another server or data directory",
            )
        removable.append(name)
    for name in removable:
        logger.info("stream makes room", extra={"action": "restore_cleared", "stream": name, "backup": backup_id})
        await connection.api(f"STREAM.DELETE.{name}", timeout_s=_CHUNK_S)


async def restore_image(
    connection: Connection, image: StreamImage, chunks: AsyncIterator[bytes], backup_id: str, *, replicas: int = 1
) -> None:
    """Makes a stream from its image; it holds exactly what the image's state says, or IntegrityError is raised.

    The stream is marked as being restored until :func:`finish_restore`.
    """
    metadata: dict[str, str] = {
        key: value for key, value in image.config.get("metadata", {}).items() if not key.startswith("_nats.")
    }
    metadata.pop(VERSION_KEY, None)
    metadata[RESTORING_BACKUP_KEY] = backup_id
    config = image.config | {"metadata": metadata, "num_replicas": replicas}
    answer = await connection.api(f"STREAM.RESTORE.{image.name}", {"config": config, "state": image.raw_state})
    subject: str = answer["deliver_subject"]
    async for chunk in chunks:
        for start in range(0, len(chunk), CHUNK_BYTES):
            reply = await connection.lean.request(subject, chunk[start : start + CHUNK_BYTES], timeout_s=_CHUNK_S)
            _check_reply(image.name, reply)
    done = await connection.lean.request(subject, b"", timeout_s=_FINISH_S)
    _check_reply(image.name, done)
    state = msgspec.convert((await connection.api(f"STREAM.INFO.{image.name}"))["state"], StreamState)
    # A stream that never held a message says that it begins at 0, or at 1.
    if state != image.state and (state.last_seq or image.state.last_seq):
        raise IntegrityError(
            f"stream {image.name} came back as {state}, its image holds {image.state}",
            hint="the image is damaged: 'holdfast backups DIR --verify', then restore another backup",
        )


def _check_reply(name: str, reply: Msg) -> None:
    if not reply.data:
        return
    error = msgspec.json.decode(reply.data, type=dict[str, Any]).get("error")
    if error:
        raise IntegrityError(
            f"the server does not take the image of stream {name}: {error.get('description')}",
            hint="see the server's log; 'holdfast backups DIR --verify' checks the backup",
        )


async def restore_consumers(connection: Connection, image: StreamImage) -> int:
    """Makes the durable consumers of an image anew, each behind what it had settled; returns how many.

    What it had settled beyond a message that it had not is delivered once more.
    """
    for note in image.consumers:
        config = {key: value for key, value in note.config.items() if key not in ("opt_start_seq", "opt_start_time")}
        config |= {"deliver_policy": _FROM_SEQUENCE, "opt_start_seq": max(1, note.settled_seq + 1)}
        config.pop("num_replicas", None)
        name = config["durable_name"]
        await connection.api(
            f"CONSUMER.CREATE.{image.name}.{name}", {"stream_name": image.name, "config": config, "action": "create"}
        )
    return len(image.consumers)


async def finish_restore(connection: Connection, name: str) -> None:
    """Ends the mark of a restored stream: from now on it is one of a whole system."""
    config: dict[str, Any] = (await connection.api(f"STREAM.INFO.{name}"))["config"]
    metadata: dict[str, str] = dict(config.get("metadata", {}))
    metadata.pop(RESTORING_BACKUP_KEY, None)
    metadata[VERSION_KEY] = LAYOUT_VERSION
    await connection.api(f"STREAM.UPDATE.{name}", config | {"metadata": metadata})
    logger.info("stream restored", extra={"action": "stream_restored", "stream": name})
