"""Every retry policy of Holdfast, in one place.

Retries wrap single idempotent calls, after their first failure: the happy path never enters tenacity (24 µs a call).
Redelivery of messages is the queue's business and is never combined with these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    wait_random_exponential,
)

from holdfast.schemas.errors import RetryError, UnavailableError, UnknownOutcomeError

T = TypeVar("T")

WRITE_DEADLINE_S: Final = 30.0
"""How long a write is tried before its outcome is reported as unknown: three times the longest leader change that
was measured on a cluster of three (5 s), with room for a restart."""

READ_DEADLINE_S: Final = 15.0
"""How long a read is tried before it is reported as unavailable."""

ATTEMPT_S: Final = 5.0
"""How long one attempt waits for its answer."""

NOBODY_S: Final = 1.5
"""How long a service that nobody runs is waited for: a restart takes about a second, and a user who forgot to start it
should read so soon."""


class NoResponderError(UnavailableError):
    """Nobody listens on the subject of a request."""


class NotConnectedError(UnavailableError):
    """There is no connection to the server just now, so that nothing was sent.

    ``back`` is done once the connection stands again, or is closed: then the call is worth trying.
    """

    def __init__(self, message: str, *, back: asyncio.Future[None], hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.back = back


async def call_with_retry(call: Callable[[], Awaitable[T]], *, deadline_s: float, nobody_s: float | None = None) -> T:
    """Awaits ``call()``; on a RetryError tries again with jittered backoff until ``deadline_s`` seconds have gone by,
    then raises the last error.  ``call`` must be idempotent.

    While there is no connection it is waited for, and the call made as soon as it is back.  When there is none at the
    deadline, and an earlier attempt may have been stored, the error is UnknownOutcomeError: the last attempt alone is
    known not to have been sent.

    ``nobody_s`` is a shorter deadline for NoResponderError, which comes at once: for a service it means that none
    runs; of a stream it may only mean that it has no leader just now.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    try:
        return await call()
    except RetryError as first_error:
        unknown = first_error if isinstance(first_error, UnknownOutcomeError) else None
        back: asyncio.Future[None] | None = None

        def left_s(error: BaseException | None) -> float:
            is_nobody = nobody_s is not None and isinstance(error, NoResponderError)
            limit_s = nobody_s if is_nobody and nobody_s is not None else deadline_s
            return started + limit_s - loop.time()

        if left_s(first_error) <= 0:
            raise
        backoff = wait_random_exponential(multiplier=0.05, max=2.0)

        def wait_s(state: RetryCallState) -> float:
            nonlocal back
            error = _error(state)
            back = error.back if isinstance(error, NotConnectedError) else None
            # The last attempt is made at the deadline, not at some time after it.
            left = left_s(error)
            return max(0.0, left if back is not None else min(backoff(state), left))

        async def pause(delay_s: float) -> None:
            if back is None:
                await asyncio.sleep(delay_s)
            else:
                # Shared by all who wait for the connection: neither a time-out nor a cancel of one may end it.
                await asyncio.wait((back,), timeout=delay_s)

        policy = AsyncRetrying(
            retry=retry_if_exception_type(RetryError),
            stop=lambda state: left_s(_error(state)) <= 0,
            wait=wait_s,
            sleep=pause,
            reraise=True,
        )

        # tenacity awaits only what is a coroutine function itself; of a lambda it would return the coroutine.
        async def attempt() -> T:
            nonlocal unknown
            try:
                return await call()
            except UnknownOutcomeError as error:
                unknown = error
                raise

        try:
            return await policy(attempt)
        except NotConnectedError as error:
            if unknown is None:
                raise
            raise unknown from error


def _error(state: RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()
