"""The server's clock: what decides whether a named context has expired, whatever the clock of this machine says.

The offset comes from the ``ts`` member of a ``STREAM.INFO`` answer (the server's time when it answered) and the middle
of the local times before and after: it is wrong by half a round trip at most.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.schemas.errors import RetryError, UnavailableError
from holdfast.schemas.ids import now_ms
from holdfast.streams.connection import ApiError
from holdfast.streams.messages import parse_time_ms
from holdfast.streams.retry import ATTEMPT_S, READ_DEADLINE_S, call_with_retry
from holdfast.streams.wire import KEYS_STREAM

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection

logger = logging.getLogger(__name__)

REFRESH_S: Final = 60.0
"""How long an offset is good: clocks drift by some milliseconds an hour."""

STEP_MS: Final = 250
"""A local clock that moved by more than this against the monotonic one was set, or the machine slept."""

_RENEW_S: Final = 1.0
"""How long a reader is held up by a renewal that gets no answer."""

_AGAIN_S: Final = 5.0
"""How long an old offset is used after a failed attempt to renew it."""


class _Offset(msgspec.Struct, frozen=True):
    """Server time less local time, and what the local clocks and the connection were when it was measured."""

    ms: int
    local_ms: int
    ticks_s: float
    reconnects: int


class ServerClock:
    """Tells the server's time.  One for each connection; any number of tasks may ask at once.

    ``local_ms`` and ``ticks_s`` are the wall clock and the monotonic clock of this machine.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        local_ms: Callable[[], int] = now_ms,
        ticks_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._local_ms = local_ms
        self._ticks_s = ticks_s
        self._offset: _Offset | None = None
        self._try_again_s = 0.0
        self._lock = asyncio.Lock()

    async def now_ms(self) -> int:
        """Returns the server's time as integer milliseconds since 1970 UTC.

        Asks the server at most once a minute, after a reconnect, and when the local clock was set.  When it does not
        answer, the last known offset holds; raises UnavailableError when there is none.
        """
        offset = self._offset
        if offset is None or not self._holds(offset):
            async with self._lock:
                offset = self._offset
                if offset is None or not self._holds(offset):
                    offset = await self._renew(offset)
        return self._local_ms() + offset.ms

    def _holds(self, offset: _Offset) -> bool:
        ticks_s = self._ticks_s()
        age_s = ticks_s - offset.ticks_s
        stepped_ms = abs(self._local_ms() - offset.local_ms - age_s * 1000)
        is_good = age_s < REFRESH_S and stepped_ms <= STEP_MS and offset.reconnects == self._connection.reconnects
        return is_good or ticks_s < self._try_again_s

    async def _renew(self, old: _Offset | None) -> _Offset:
        try:
            if old is None:
                self._offset = await call_with_retry(self._measure, deadline_s=READ_DEADLINE_S)
            else:
                self._offset = await self._measure(timeout_s=_RENEW_S)
        except RetryError as error:
            if old is None:
                raise
            logger.debug("the server's clock was not read", extra={"action": "clock_failed", "error": str(error)})
            self._try_again_s = self._ticks_s() + _AGAIN_S
            return old
        return self._offset

    async def _measure(self, timeout_s: float = ATTEMPT_S) -> _Offset:
        reconnects = self._connection.reconnects
        before_ms, before_s = self._local_ms(), self._ticks_s()
        try:
            answer = await self._connection.api(f"STREAM.INFO.{KEYS_STREAM}", timeout_s=timeout_s)
        except ApiError as error:
            raise UnavailableError(
                f"the server's clock cannot be read: {error.message}", hint="run 'holdfast up' or a worker once"
            ) from error
        taken_s = self._ticks_s() - before_s
        middle_ms = before_ms + round(taken_s * 500)
        return _Offset(parse_time_ms(answer["ts"]) - middle_ms, middle_ms, before_s + taken_s / 2, reconnects)
