"""The distributed store of sessions: each session is a named context, changed by compare-and-set on ``hf.keys``."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import random
from collections.abc import Callable
from datetime import UTC
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from holdfast.client.keys import UNCHANGED
from holdfast.client.session_model import (
    SESSION_PREFIX,
    TIMESTAMP,
    Change,
    SessionEvent,
    SessionEventType,
    content_of,
    session_key,
    session_of,
    stamped,
)
from holdfast.schemas.errors import HoldfastError, NotFoundError, VersionConflictError

if TYPE_CHECKING:
    from holdfast.client.background import ClientShare
    from holdfast.client.key_model import KeyVersion
    from holdfast.client.session_listeners import Listener
    from holdfast.client.session_settings import SessionSettings
    from holdfast.client.store import Holdfast

logger = logging.getLogger(__name__)

CREATED: Final = "created"
UPDATED: Final = "updated"

_CREATE_ATTEMPTS: Final = 100
"""Each failed attempt means that others created and deleted the session in between: more is no use but a storm."""

_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0


class SessionStore(Protocol):
    """What a session manager needs of a store; the two there are pass one test suite.

    Methods without ``_async`` block the calling thread; their twins may be awaited on any event loop.
    """

    def change(self, session_id: str, change: Change) -> None:
        """Applies a change as one step, beginning with an empty session where there is none."""

    async def change_async(self, session_id: str, change: Change) -> None:
        """The twin of change."""

    def read(self, session_id: str) -> dict[str, Any]:
        """Returns a session's content, the caller's own; empty when it is absent or expired."""
        ...

    async def read_async(self, session_id: str) -> dict[str, Any]:
        """The twin of read."""
        ...

    def delete(self, session_id: str) -> None:
        """Removes a session; does nothing when there is none."""

    async def delete_async(self, session_id: str) -> None:
        """The twin of delete."""

    def listen(self, listener: Listener) -> None:
        """Tells a listener of every change from now on, in order."""

    async def listen_async(self, listener: Listener) -> None:
        """The twin of listen."""

    def forget(self, listener: Listener) -> None:
        """Tells a listener nothing more; never waits."""

    def close(self) -> None:
        """Ends it."""

    async def aclose(self) -> None:
        """The twin of close."""


class KeySessions:
    """Sessions in the store that all agents and processes of a namespace share.

    A change is a version of the session's key: nothing is ever overwritten, and two changes at a time both count.
    """

    def __init__(self, share: ClientShare, settings: SessionSettings, clock: Callable[[], float]) -> None:
        self._share = share
        self._ttl_s = settings.session_expiration_seconds if settings.time_based_expiration else math.inf
        self._clock = clock
        self._following: dict[Listener, concurrent.futures.Future[None]] = {}

    def change(self, session_id: str, change: Change) -> None:
        """Blocks until the change is stored durably."""
        self._share.call(lambda hf: self._change(hf, session_id, change))

    async def change_async(self, session_id: str, change: Change) -> None:
        """Returns when the change is stored durably."""
        await self._share.run(lambda hf: self._change(hf, session_id, change))

    def read(self, session_id: str) -> dict[str, Any]:
        """Blocks until the newest content is there."""
        return self._share.call(lambda hf: self._read(hf, session_id))

    async def read_async(self, session_id: str) -> dict[str, Any]:
        """Returns the newest content."""
        return await self._share.run(lambda hf: self._read(hf, session_id))

    def delete(self, session_id: str) -> None:
        """Blocks until the tombstone is stored; the history stays."""
        self._share.call(lambda hf: self._delete(hf, session_id))

    async def delete_async(self, session_id: str) -> None:
        """Returns when the tombstone is stored; the history stays."""
        await self._share.run(lambda hf: self._delete(hf, session_id))

    def listen(self, listener: Listener) -> None:
        """Blocks until the watch is set up."""
        self._share.call(lambda _: self._listen(listener))

    async def listen_async(self, listener: Listener) -> None:
        """Returns when the watch is set up."""
        await self._share.run(lambda _: self._listen(listener))

    def forget(self, listener: Listener) -> None:
        """Ends the listener's watch, without waiting for its end."""
        following = self._following.pop(listener, None)
        if following is not None:
            following.cancel()

    def close(self) -> None:
        """Ends every watch and gives the connection back."""
        self._forget_all()
        self._share.close()

    async def aclose(self) -> None:
        """The same, awaited."""
        self._forget_all()
        await self._share.aclose()

    def _forget_all(self) -> None:
        for listener in list(self._following):
            self.forget(listener)

    async def _change(self, hf: Holdfast, session_id: str, change: Change) -> None:
        key = session_key(session_id)

        def present(body: Any) -> Any:
            return UNCHANGED if body is None else self._next(content_of(body, session_id), change)

        # Whether it creates the session is told to listeners, so it must not be left to chance: an update changes
        # only what is there, a put only what is not.
        for attempt in range(_CREATE_ATTEMPTS):
            try:
                await hf.keys.update(key, present, session=session_id, ttl=self._ttl_s, change_type=UPDATED)
                return
            except NotFoundError as error:
                _require_absence(error)  # there is none yet
            try:
                content = self._next({}, change)
                await hf.keys.put(
                    key, content, expected_version=0, session=session_id, ttl=self._ttl_s, change_type=CREATED
                )
                return
            except VersionConflictError:
                if attempt == _CREATE_ATTEMPTS - 1:
                    raise

    def _next(self, content: dict[str, Any], change: Change) -> dict[str, Any]:
        return stamped(change(content), content.get(TIMESTAMP), self._clock())

    async def _read(self, hf: Holdfast, session_id: str) -> dict[str, Any]:
        try:
            value = await hf.keys.get(session_key(session_id))
        except NotFoundError as error:
            _require_absence(error)
            return {}
        return content_of(value.body, session_id)

    async def _delete(self, hf: Holdfast, session_id: str) -> None:
        try:
            await hf.keys.delete(session_key(session_id), change_type="deleted")
        except NotFoundError as error:
            _require_absence(error)  # nothing to delete is what the caller wants

    async def _listen(self, listener: Listener) -> None:
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        following = self._share.start(partial(self._follow, listener=listener, started=started))
        self._following[listener] = following
        try:
            ended = asyncio.wrap_future(following)
            ended.add_done_callback(lambda future: future.cancelled() or future.exception())  # told in the log
            await asyncio.wait([started, ended], return_when=asyncio.FIRST_COMPLETED)
            if not started.done():
                await ended  # it failed: raises its error
        except BaseException:
            self.forget(listener)
            raise

    async def _follow(self, hf: Holdfast, listener: Listener, started: asyncio.Future[None]) -> None:
        """Tells a listener of every change until it is cancelled; an outage is waited out, and nothing is missed."""
        position: str | None = None
        pause_s = _PAUSE_S
        while True:
            try:
                if hf.connection.client.is_closed:
                    hf = await self._share.client()  # for good, over credentials for instance: another one takes over
                async with hf.keys.watch(SESSION_PREFIX, after=position) as changes:
                    # From here on nothing is to be missed, also when the first change finds this interrupted.
                    position = position or changes.start
                    if not started.done():
                        started.set_result(None)
                    async for version in changes:
                        pause_s = _PAUSE_S
                        if not is_after(version.position, position):
                            continue  # delivered again
                        event = await self._event(hf, version)
                        if event is not None:
                            await listener.deliver(event)
                        position = version.position or position
            except Exception:
                if not started.done():
                    raise
                # The watch waits out what it can.  Whatever this is: listeners are not to go deaf over it.
                logger.exception("watching sessions was interrupted", extra={"action": "session_watch_interrupted"})
            await asyncio.sleep(random.uniform(pause_s / 2, pause_s))  # noqa: S311  spreads the retries, no secret
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _event(self, hf: Holdfast, version: KeyVersion) -> SessionEvent | None:
        session_id = session_of(version.key, version.session)
        if session_id is None:
            return None  # a key of someone else's making below the same prefix
        what = await self._type_of(hf, version)
        return SessionEvent(
            type=what,
            session_id=session_id,
            data={} if what in ("deleted", "expired") else await _content(version, session_id),
            timestamp=version.timestamp.astimezone(UTC),
            agent=None if what == "expired" else version.changed_by,
            version=version.version,
        )

    @staticmethod
    async def _type_of(hf: Holdfast, version: KeyVersion) -> SessionEventType:
        if version.op == "delete":
            return "deleted"
        if version.op == "expire":
            return "expired"
        if version.change_type == UPDATED:
            return "updated"
        if version.change_type == CREATED or version.version == 1:
            return "created"
        # Written past the session manager: whether there was a session before is in the history.
        try:
            async for earlier in hf.keys.history(version.key, before=version.version, limit=1):
                is_over = earlier.expires_at is not None and earlier.expires_at <= version.timestamp
                return "created" if earlier.deleted or is_over else "updated"
        except HoldfastError as error:
            # It may lie in a lake that does not answer now: the listener is not to wait for that.
            logger.debug("history not read", extra={"action": "session_event_type_guessed", "error": str(error)})
        return "updated"


def _require_absence(error: NotFoundError) -> None:
    """Raises an error that does not say that there is no such session: a lost body is no empty session."""
    if error.field != "key":
        raise error


async def _content(version: KeyVersion, session_id: str) -> dict[str, Any] | None:
    try:
        return content_of((await version.load()).body, session_id)
    except HoldfastError as error:
        logger.warning(
            "content of a session could not be read for its listeners",
            exc_info=error,
            extra={"action": "session_event_without_data", "key": version.key, "version": version.version},
        )
        return None


def is_after(position: str | None, last: str | None) -> bool:
    """Whether a position is news to one who stands at ``last``: a later one of the same epoch, or another epoch's."""
    if position is None or last is None:
        return True
    epoch, _, seq = position.rpartition(":")
    last_epoch, _, last_seq = last.rpartition(":")
    return epoch != last_epoch or int(seq) > int(last_seq)
