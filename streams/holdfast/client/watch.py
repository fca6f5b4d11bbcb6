"""Following the changes of named contexts: at least once, in order, and without a gap after a reconnect."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from holdfast.schemas.errors import HoldfastError, InvalidFieldError, RetryError
from holdfast.streams.decode import decode_key_version
from holdfast.streams.follow import StreamFollower
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import KEYS_STREAM, key_filter, key_subject

if TYPE_CHECKING:
    from holdfast.client.key_model import KeyVersion
    from holdfast.schemas.rows import KeyVersionRow
    from holdfast.streams.connection import Connection

_READ: Final = 500


class KeyWatch:
    """An iterator over changes; made by ``hf.keys.watch``.

    Changes come in the order of the stream.  A change may come twice (after ``initial`` or ``from_version``, and when
    the stream began anew), none is left out but those that were superseded and trimmed while nobody looked.  What is
    no version (a foreign message) is passed over.  Not for two tasks at once.
    """

    def __init__(
        self,
        connection: Connection,
        namespace: str,
        prefix: str,
        *,
        version_of: Callable[[KeyVersionRow], KeyVersion],
        earlier: Callable[[int, str], AsyncIterator[KeyVersion]],
        present: Callable[[], AsyncIterator[KeyVersion]],
        after: str | None,
        from_version: int | None,
        initial: bool,
    ) -> None:
        if sum((after is not None, from_version is not None, initial)) > 1:
            raise InvalidFieldError("give one of after, from_version and initial", field="after")
        self._connection = connection
        self._prefix = prefix
        self._after = None if after is None else _parse_position(after)
        self._from_version = from_version
        self._initial = initial
        self._version_of = version_of
        self._earlier = earlier
        self._present = present
        # From a version on: of that one key, which then is a whole subject.
        self._subject = key_filter(namespace, prefix) if from_version is None else key_subject(namespace, prefix)
        self._follower: StreamFollower | None = None
        self._waiting: deque[KeyVersion] = deque()
        self._before: AsyncIterator[KeyVersion] | None = None

    async def __aenter__(self) -> Self:
        await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> KeyVersion:
        """Waits for the next change, for ever if need be; a server that is away is waited for."""
        follower = await self._start()
        if self._before is not None:
            async for version in self._before:
                return version
            self._before = None
        while not self._waiting:
            for message in await follower.next_messages(limit=_READ):
                try:
                    row = decode_key_version(message)
                except RetryError:
                    raise
                except HoldfastError:
                    continue  # the archiver makes it a dead letter
                if row.key.startswith(self._prefix) and (
                    self._from_version is None or row.version >= self._from_version
                ):
                    self._waiting.append(self._version_of(row))
        return self._waiting.popleft()

    async def close(self) -> None:
        """Ends the watch; harmless when called twice."""
        follower, self._follower = self._follower, None
        if follower is not None:
            await follower.close()

    async def _start(self) -> StreamFollower:
        if self._follower is None:
            info = await stream_info(self._connection, KEYS_STREAM)
            next_seq = info.last_seq + 1
            if self._after is not None:
                epoch, seq = self._after
                # A position in another life of the stream: everything of this one may be new to the caller.
                next_seq = seq + 1 if epoch == info.epoch else max(1, info.first_seq)
            self._follower = StreamFollower(self._connection, KEYS_STREAM, self._subject, next_seq)
            await self._follower.open()
            # Read after the place to go on from was taken: what changes in between comes twice, not never.
            if self._initial:
                self._before = self._present()
            elif self._from_version is not None:
                self._before = self._earlier(self._from_version, self._prefix)
        return self._follower


def _parse_position(text: str) -> tuple[str, int]:
    epoch, _, seq = text.rpartition(":")
    if not epoch or not (seq.isascii() and seq.isdigit() and len(seq) <= 19):
        raise InvalidFieldError(
            f"{text[:60]!r} is not a position", field="after", hint="take it from a version's position"
        )
    return epoch, int(seq)
