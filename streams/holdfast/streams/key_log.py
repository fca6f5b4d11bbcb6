"""The bucket ``ctx-keys`` as it is written: a version is stored by compare-and-set on its subject's last sequence.

So versions are numbered without gaps however many write at once.  :mod:`holdfast.streams.key_chains` reads them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import msgspec

from holdfast.schemas.errors import RetryError, UnavailableError, UnknownOutcomeError
from holdfast.schemas.rows import KeyVersionRow
from holdfast.streams.committer import Committer, OutlivedError
from holdfast.streams.connection import ApiError, Connection
from holdfast.streams.decode import encode_key_version
from holdfast.streams.key_chains import LOOK, Head, KeyChains, version_in
from holdfast.streams.publish import WRONG_LAST_SEQUENCE, Outgoing, Refused, publish_batch
from holdfast.streams.retry import WRITE_DEADLINE_S, call_with_retry
from holdfast.streams.storing import store_with_retry
from holdfast.streams.wire import H_EXPECT_SUBJECT_SEQ, KEYS_STREAM, key_subject

T = TypeVar("T")

UNSEEN_S: Final = 20.0
"""How long a write that is refused for something that nobody sees is sent again: a leader that lost its majority
gives up after ten seconds."""


class NewVersion(msgspec.Struct, frozen=True):
    """A version to be written; ``row.epoch``, ``row.seq`` and ``row.stored_at_ms`` are the server's to give."""

    row: KeyVersionRow
    at: tuple[int, ...] = ()


Following = tuple[NewVersion, Head | None]
"""A version to be written, and the end of the chain that it follows."""


class LostRaceError(Exception):
    """Another writer was faster: nothing was written.  Read the head again and decide anew."""


class _RefusedUnseenError(UnavailableError):
    """A version was refused as if another stood there, and none is to be seen: the same may be sent again."""


class KeyLog(KeyChains):
    """Reads and writes of the bucket on one connection; ``replicas`` as of :class:`KeyChains`."""

    def __init__(self, connection: Connection, *, replicas: int = 1) -> None:
        super().__init__(connection, replicas=replicas)
        self._committer = Committer(connection)

    async def write(self, version: NewVersion, *, after: Head) -> KeyVersionRow:
        """Writes a version behind the end of its chain as it was read, and returns it as it was stored.

        Raises LostRaceError when the chain does not end there any more; UnknownOutcomeError, or another RetryError,
        when no acknowledgement came: sending the same version (same ``event_id``) again is safe.
        """
        message = _message(version, after)

        async def send(losses: int) -> list[int]:
            return [(await self._committer.store(message, losses=losses)).seq]

        return (await self._write([(version, after)], send))[0]

    async def write_all(self, versions: Sequence[Following]) -> list[KeyVersionRow]:
        """Writes all versions or none, as one atomic batch, and returns them as they were stored.

        With each comes the end of the chain that it must follow; None for one that follows another of the same key in
        this batch.  Errors as of :meth:`write`.
        """
        if len(versions) == 1 and versions[0][1] is not None:
            return [await self.write(versions[0][0], after=versions[0][1])]
        messages = [_message(version, after) for version, after in versions]

        async def send(losses: int) -> list[int]:
            async def attempt() -> list[int]:
                if losses != self.losses:
                    raise OutlivedError
                return await publish_batch(self._connection, messages)

            return await store_with_retry(self._connection, KEYS_STREAM, attempt)

        return await self._write(versions, send)

    async def close(self) -> None:
        """Waits until every write that was handed in has an outcome."""
        await self._committer.close()

    async def _write(
        self, versions: Sequence[Following], send: Callable[[int], Awaitable[list[int]]]
    ) -> list[KeyVersionRow]:
        """Sends versions, and looks whether the chains still end where they did before they are sent over another
        connection than the one over which that was read."""
        losses = min(after.losses for _, after in versions if after is not None)
        until_s = asyncio.get_running_loop().time() + WRITE_DEADLINE_S

        async def attempt() -> list[KeyVersionRow]:
            nonlocal losses
            while True:
                now = self.losses
                if losses != now:
                    found = await self._look_for(self._found_since(versions))
                    if len(found) == len(versions):
                        return found
                    if found:
                        raise UnknownOutcomeError(
                            f"{len(found)} of {len(versions)} versions that were written together are there after the"
                            " connection was lost: the server lost its end",
                            hint="read the keys, then decide whether to make the change again",
                        )
                    losses = now
                try:
                    seqs = await send(losses)
                except OutlivedError as error:
                    if asyncio.get_running_loop().time() >= until_s:
                        raise UnknownOutcomeError(
                            "the connection was lost again and again before an acknowledgement came",
                            hint="the same call may be sent again",
                        ) from error
                except (ApiError, Refused) as refusal:
                    if refusal.err_code == WRONG_LAST_SEQUENCE:
                        return await self._look_for(self._found(versions))
                    if isinstance(refusal, ApiError):
                        raise
                    raise UnavailableError(f"the versions cannot be stored: {refusal.description}") from refusal
                else:
                    return [
                        msgspec.structs.replace(version.row, seq=seq)
                        for (version, _), seq in zip(versions, seqs, strict=True)
                    ]

        return await self._until_seen(attempt)

    async def _until_seen(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Makes an attempt, and makes it again while it was refused for something that nobody sees.

        In a cluster a leader that was deposed, and does not know it yet, hears what is published as the new one does.
        It refuses by what it has in flight itself, at once, and its word comes before that of the new leader, who
        stores the message.  So a refusal proves nothing: only a message that stands behind the expected one does.
        With the same expectation, what is sent again is stored once at most.
        """
        try:
            return await attempt()
        except _RefusedUnseenError:
            if self._replicas == 1:
                raise LostRaceError from None  # the stream was made anew since the head was read
        try:
            return await call_with_retry(attempt, deadline_s=UNSEEN_S)
        except _RefusedUnseenError:
            raise LostRaceError from None

    async def _look_for(self, looking: Awaitable[T]) -> T:
        """Looks for what may have been stored; raises UnknownOutcomeError when that cannot be read."""
        try:
            return await looking
        except _RefusedUnseenError:
            raise
        except RetryError as error:
            # An earlier attempt may have been stored: it may be what this one was refused over.
            raise UnknownOutcomeError(
                f"the write may have been stored, and that cannot be read: {error.message}",
                hint="the same call may be sent again",
            ) from error

    async def _found_since(self, versions: Sequence[Following]) -> list[KeyVersionRow]:
        """Those versions of a write that stand in the bucket after the connection was lost; none when every chain still
        ends where it did, so that they may be sent again.

        A server that lost its end may have given the expected sequence to another version, or have got this one back
        from the lake under another sequence.  Raises LostRaceError when none is there, and a chain ends elsewhere.
        """
        found: list[KeyVersionRow] = []
        ends: dict[str, Head | None] = {}
        for version, after in versions:
            row = version.row
            if after is not None:
                now = await self.head(row.namespace, row.key)
                ends[row.key] = None if after.is_still(now) else now
            end = ends[row.key]
            own = None if end is None else await self.version(row.namespace, row.key, row.version, end)
            if own is not None and own.row is not None and own.row.event_id == row.event_id:
                found.append(own.row)
        if not found and any(ends.values()):
            raise LostRaceError
        return found

    async def _found(self, versions: Sequence[Following]) -> list[KeyVersionRow]:
        """The versions of a write that was refused, as they stand in the bucket: an attempt without an answer, or with
        a wrong one, may have written them.  Each is told by its event id.

        Raises LostRaceError when something else stands where the first of a key should, and _RefusedUnseenError when
        nothing stands behind any of what was expected.
        """
        floors: dict[str, int] = {}
        found: list[KeyVersionRow] = []
        for version, after in versions:
            row = version.row
            floor = floors.setdefault(row.key, 0 if after is None else after.last_seq)
            own, is_last = await self._found_behind(row, floor)
            if own is not None:
                found.append(own)
            elif not is_last:
                raise LostRaceError  # all or none: the others need not be looked for
        if len(found) == len(versions):
            return found
        raise _RefusedUnseenError("a write was refused, and nothing is to be seen that was in its way")

    async def _found_behind(self, row: KeyVersionRow, floor_seq: int) -> tuple[KeyVersionRow | None, bool]:
        """A version that stands behind a sequence, by its event id, and whether nothing of its key stands there."""
        seq = floor_seq + 1
        while True:
            messages = await self._run_of(key_subject(row.namespace, row.key), LOOK, seq)
            for message in messages:
                head = version_in(message)
                if head is not None and head.row is not None and head.row.event_id == row.event_id:
                    return head.row, False
            if len(messages) < LOOK:
                return None, seq == floor_seq + 1 and not messages
            seq = messages[-1].seq + 1


def _message(version: NewVersion, after: Head | None) -> Outgoing:
    headers = {} if after is None else {H_EXPECT_SUBJECT_SEQ: str(after.last_seq)}
    row = version.row
    return Outgoing(key_subject(row.namespace, row.key), headers, encode_key_version(row, version.at))
