"""Every retry policy of Holdfast, in one place.

Retries wrap single idempotent calls, after their first failure: the happy path never enters tenacity (24 µs a call).
Redelivery of messages is the queue's business and is never combined with these.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from holdfast.schemas.errors import RetryError

T = TypeVar("T")

WRITE_DEADLINE_S: Final = 30.0
"""How long a write is tried before its outcome is reported as unknown: three times the longest leader change that
was measured on a cluster of three (5 s), with room for a restart."""

READ_DEADLINE_S: Final = 15.0
"""How long a read is tried before it is reported as unavailable."""

ATTEMPT_S: Final = 5.0
"""How long one attempt waits for its answer."""


async def call_with_retry(call: Callable[[], Awaitable[T]], *, deadline_s: float) -> T:
    """Awaits ``call()``; on a RetryError tries again with jittered backoff until ``deadline_s`` seconds have gone by,
    then raises the last error.  ``call`` must be idempotent."""
    try:
        return await call()
    except RetryError:
        policy = AsyncRetrying(
            retry=retry_if_exception_type(RetryError),
            stop=stop_after_delay(deadline_s),
            wait=wait_random_exponential(multiplier=0.05, max=2.0),
            reraise=True,
        )
        return await policy(call)
