"""Writes that are tried until a deadline, and that end early, with the cause, when the server cannot store at all.

A server whose disk is full or failing answers no publish: a writer would wait out its deadline and learn nothing.  So
a write that has waited for ``SUSPECT_S`` has the stream asked for a write error (:mod:`holdfast.streams.write_probe`),
once a second; by then an embedded server that could go on has been restarted, and the write went through.  While a
stream is known to refuse, the next write asks first, which takes a millisecond, and fails at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

import nats.errors

from holdfast.schemas.errors import HoldfastError, StorageFailedError, UnavailableError, UnknownOutcomeError
from holdfast.streams.retry import WRITE_DEADLINE_S, call_with_retry
from holdfast.streams.wire import (
    DEAD_STREAM,
    EVENTS_STREAM,
    HOT_PREFIX,
    HOT_STREAM,
    KEYS_PREFIX,
    KEYS_STREAM,
)
from holdfast.streams.write_probe import WriteError, write_error_of

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection

T = TypeVar("T")

SUSPECT_S: Final = 2.0
"""How long a write waits before its stream is asked why.  An embedded server has mostly been restarted by then."""

_LOOK_S: Final = 1.0
_PONG_S: Final = 2


async def store_with_retry(
    connection: Connection, stream: str, call: Callable[[], Awaitable[T]], *, deadline_s: float = WRITE_DEADLINE_S
) -> T:
    """As :func:`holdfast.streams.retry.call_with_retry`, for a ``call`` that stores something in ``stream``.

    Raises StorageFailedError, naming the cause, as soon as the server is known to store nothing there.  Once the
    outcome of one attempt was unknown, so is that of all: UnavailableError says that nothing was stored.
    """
    if stream in connection.refusing:
        error = await _look(connection, stream)
        if error is not None:
            raise storage_failed(error)
        connection.refusing.discard(stream)
    found: list[WriteError] = []
    loop = asyncio.get_running_loop()
    looking: list[asyncio.Task[None]] = []
    is_unknown = False

    async def attempt() -> T:
        nonlocal is_unknown
        try:
            return await call()
        except UnknownOutcomeError:
            is_unknown = True
            raise

    try:
        async with asyncio.timeout(None) as scope:

            async def look() -> None:
                while not found:
                    error = await _look(connection, stream)
                    if error is not None:
                        found.append(error)
                        scope.reschedule(loop.time())
                    else:
                        await asyncio.sleep(_LOOK_S)

            # A timer, not a task: the happy path pays a microsecond for it.
            suspicion = loop.call_later(SUSPECT_S, lambda: looking.append(loop.create_task(look())))
            try:
                return await call_with_retry(attempt, deadline_s=deadline_s)
            finally:
                suspicion.cancel()
                for task in looking:
                    task.cancel()
    except UnknownOutcomeError as error:
        if await _hangs(connection, stream):
            raise storage_failed(WriteError(stream=stream, cause="JetStream does not answer")) from error
        raise
    except UnavailableError as error:
        if not is_unknown:
            raise
        raise UnknownOutcomeError(
            f"an attempt was not acknowledged, and in the end {error.message}",
            hint="the same call may be sent again",
        ) from error
    except TimeoutError as error:
        if not found:
            raise
        connection.refusing.add(stream)
        raise storage_failed(found[0]) from error


def storage_failed(error: WriteError) -> StorageFailedError:
    """Returns what a writer is told of a stream that stores nothing."""
    where = f": {error.path}" if error.path else ""
    return StorageFailedError(
        f"the server cannot write to its disk ({error.cause}), so stream {error.stream} stores nothing{where}",
        cause=error.cause,
        hint="free space on that disk, or mend it; a server that 'holdfast up' runs then goes on by itself, another "
        "one must be restarted. Then the same call may be sent again",
    )


def stream_of(subject: str) -> str:
    """Returns the stream of ours that keeps the messages of a subject."""
    if subject.startswith(HOT_PREFIX):
        return HOT_STREAM
    if subject.startswith(KEYS_PREFIX):
        return KEYS_STREAM
    return DEAD_STREAM if subject.split(".", 3)[2:3] == ["dead"] else EVENTS_STREAM


async def _hangs(connection: Connection, stream: str) -> bool:
    """Whether the server answers a PING, and JetStream does not say a word of the stream."""
    if not connection.client.is_connected:
        return False
    try:
        await connection.client.flush(timeout=_PONG_S)
        await connection.api(f"STREAM.INFO.{stream}", timeout_s=_PONG_S)
    except UnknownOutcomeError:
        return True
    except (HoldfastError, nats.errors.Error, OSError):
        return False
    return False


async def _look(connection: Connection, stream: str) -> WriteError | None:
    if not connection.client.is_connected:
        return None  # it is being restarted, or is gone: that tells itself
    try:
        return await write_error_of(connection, stream)
    except HoldfastError:
        return None
