"""Telling callbacks of the changes of stored contexts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from holdfast.schemas.errors import HoldfastError, InvalidFieldError

if TYPE_CHECKING:
    from holdfast.client.key_model import KeyVersion
    from holdfast.client.store import Holdfast

logger = logging.getLogger(__name__)

_EVENTS: Final = ("contextChange", "context_change")

Change = dict[str, Any]
"""What a callback is told: ``key``, ``version``, ``timestamp`` (ISO 8601), ``op``, ``deleted``, ``tags``,
``session_id``, ``agent_id``, ``changed_by``, ``change_type``."""

Callback = Callable[[Change], Any]


class Follower:
    """Follows one key and hands on its versions, in a task of its own until it is stopped."""

    def __init__(
        self,
        open_client: Callable[[], Coroutine[Any, Any, Holdfast]],
        full: str,
        tell: Callable[[KeyVersion], Awaitable[None]],
    ) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())
        self._open = open_client
        self._full = full
        self._tell = tell
        self._is_stopping = False
        self._task = asyncio.get_running_loop().create_task(self._follow(), name="holdfast-context-follower")

    @property
    def has_failed(self) -> bool:
        """Whether it follows no more."""
        return self._task.done()

    async def stop(self) -> None:
        """Ends it and returns when it has ended; a callback under way is cancelled.

        Called by a callback of its own it returns at once: that callback is the last.
        """
        self._is_stopping = True
        if asyncio.current_task() is self._task:
            return
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _follow(self) -> None:
        try:
            hf = await self._open()
            async with hf.keys.watch(self._full) as changes:
                self.ready.set_result(None)
                async for version in changes:
                    # What is watched is a prefix: "plan" has "planner" come along.
                    if version.key == self._full:
                        await self._tell(version)
                    if self._is_stopping:
                        return
        except HoldfastError as error:
            if not self.ready.done():
                self.ready.set_exception(error)
                return
            logger.exception("subscription ended", extra={"action": "subscription_ended", "key": self._full})
        finally:
            self.ready.cancel()


def checked_callback(event: object, callback: Callback) -> Callback:
    """Returns the callback; raises InvalidFieldError when it cannot be called, or there is no such event."""
    if event not in _EVENTS:
        raise InvalidFieldError(f"there is no event {repr(event)[:40]}", field="event", hint="it is 'contextChange'")
    if not callable(callback):
        raise InvalidFieldError(f"the callback is {type(callback).__name__}, not callable", field="callback")
    return callback
