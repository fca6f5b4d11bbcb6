"""Following the changes of named contexts: at least once, in order, and without a gap after a reconnect."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from holdfast.client.key_arguments import check_prefix
from holdfast.schemas.errors import HoldfastError, InvalidFieldError, RetryError
from holdfast.streams.decode import decode_key_version
from holdfast.streams.follow import StreamFollower
from holdfast.streams.retry import READ_DEADLINE_S, call_with_retry
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
    no version (a foreign message) is passed over.  A cancel of ``anext``, such as a time-out, loses nothing.  Not for
    two tasks at once, but for :meth:`close`, which ends the iteration of another.  One that is not closed ends when the
    client is.
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
        self._prefix = check_prefix(prefix)
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
        self._given: KeyVersion | None = None
        self._is_closed = False
        self.start: str | None = None
        """The position that the watch has begun behind; known once it is entered."""

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
        """Waits for the next change, for ever if need be; a server that is away is waited for.

        The iteration stops when the watch, or the client, is closed.  One that begins on a closed client, or has not
        given everything from before its beginning when the client closes, raises ClosedError.
        """
        if self._is_closed:
            raise StopAsyncIteration
        follower = await self._start()
        before = await self._next_before()
        if before is not None:
            return before
        while not self._waiting:
            if self._is_closed:
                raise StopAsyncIteration
            messages = await follower.next_messages(limit=_READ)
            if not messages:  # it is closed, or its connection is
                self._is_closed = True
                raise StopAsyncIteration
            for message in messages:
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
        """Ends the watch: the iteration stops.  Harmless when called twice."""
        self._is_closed = True
        follower, self._follower = self._follower, None
        if follower is not None:
            await follower.close()

    async def _start(self) -> StreamFollower:
        if self._follower is None:
            info = await call_with_retry(lambda: stream_info(self._connection, KEYS_STREAM), deadline_s=READ_DEADLINE_S)
            next_seq = info.last_seq + 1
            if self._after is not None:
                epoch, seq = self._after
                # A position in another life of the stream: everything of this one may be new to the caller.
                next_seq = seq + 1 if epoch == info.epoch else max(1, info.first_seq)
            follower = StreamFollower(self._connection, KEYS_STREAM, self._subject, next_seq, epoch=info.epoch)
            try:
                await follower.open()
            except BaseException:
                await follower.close()
                raise
            # Read after the place to go on from was taken: what changes in between comes twice, not never.
            self._follower = follower
            self.start = f"{info.epoch}:{next_seq - 1}"
            self._before = self._earlier_versions()
        return self._follower

    async def _next_before(self) -> KeyVersion | None:
        """The next of the versions from before the watch began; None when all have been given."""
        if self._before is None:
            return None
        try:
            version = await anext(self._before, None)
        except BaseException:
            # The generator ends with what passes through it; what it has not given yet is read again.
            self._before = self._earlier_versions()
            raise
        if version is None:
            self._before = None
        else:
            self._given = version
        return version

    def _earlier_versions(self) -> AsyncIterator[KeyVersion] | None:
        if self._initial:
            return self._present_after(self._given)
        if self._from_version is not None:
            number = self._from_version if self._given is None else self._given.version + 1
            return self._earlier(number, self._prefix)
        return None

    async def _present_after(self, given: KeyVersion | None) -> AsyncIterator[KeyVersion]:
        async for version in self._present():
            if given is None or version.key > given.key:
                yield version


def _parse_position(text: object) -> tuple[str, int]:
    epoch, _, seq = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    if not epoch or not (seq.isascii() and seq.isdigit() and len(seq) <= 19):
        raise InvalidFieldError(
            f"{repr(text)[:60]} is not a position", field="after", hint="take it from a version's position"
        )
    return epoch, int(seq)
