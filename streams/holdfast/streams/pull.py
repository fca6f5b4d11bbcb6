"""Reading a stream by sequence: every message from a position on, with gaps noticed.

An ephemeral consumer that asks for no acknowledgement feeds one queue of our own; the reader keeps the position, so a
lost consumer, a reconnect or a restart only means to ask again from where it stands.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.schemas import limits
from holdfast.schemas.errors import GapError, UnavailableError
from holdfast.streams.arrivals import Frame, FrameQueue
from holdfast.streams.connection import ApiError, Connection, Msg
from holdfast.streams.consumer import next_seq
from holdfast.streams.header_block import HeaderBlock, size_of
from holdfast.streams.leader import message_at_leader
from holdfast.streams.messages import StoredMessage, is_delivery, message_of_delivery, parse_time_ms
from holdfast.streams.retry import READ_DEADLINE_S, call_with_retry
from holdfast.streams.topology import StreamInfo, stream_info
from holdfast.streams.wire import H_SEQUENCE, H_STATUS, H_SUBJECT, H_TIME

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.subscription import Subscription

PULL_BYTES: Final = 8 * limits.MIB
"""Most bytes asked for at once: bounds what waits in the queue."""

PULL_MESSAGES: Final = 5_000
_SILENCE_S: Final = 5.0
_AT_ONCE: Final = 250
"""Messages that are made of what arrived before the loop has its turn again: half a millisecond."""

_INACTIVE_NS: Final = 60 * 1_000_000_000
_CONSUMER_GONE: Final = 10014
_MAX_BYTES_DEFAULT: Final = 64 * limits.MIB


class StreamReader:
    """Reads one stream forward.  Not safe for two readers at once.

    ``next_seq`` is the sequence that the next read begins at.  ``allow_gaps``: a stream of which interior messages are
    purged by design (superseded key versions) has gaps that mean nothing.  ``passed_over`` counts the sequences without
    a message that were passed over so.  ``filter_subject``: only messages of these subjects are read; what lies between
    them are gaps, which must be allowed.
    """

    def __init__(
        self,
        connection: Connection,
        stream: str,
        next_seq: int,
        *,
        allow_gaps: bool = False,
        filter_subject: str = ">",
    ) -> None:
        self._filter = filter_subject
        self._connection = connection
        self._stream = stream
        self.next_seq = next_seq
        self._allow_gaps = allow_gaps
        self.passed_over = 0
        self._consumer: str | None = None
        self._delivered_up_to = -1
        self._epoch: str = ""
        self._life: str | Callable[[int], str] = ""
        self._arrived = FrameQueue()
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._pulls = 0

    async def read(
        self, *, limit: int, up_to: int | None = None, max_bytes: int = _MAX_BYTES_DEFAULT
    ) -> tuple[list[StoredMessage], StreamInfo]:
        """Returns messages from ``next_seq`` on, contiguous, and the stream's state as of the beginning of the call.

        Ends at ``limit`` messages, at ``max_bytes`` of payloads and headers, or at the stream's last sequence of that
        time (at ``up_to`` when that is earlier), whichever comes first; ``next_seq`` then is the sequence after the
        last one returned.  Never waits for new messages.  Raises GapError when messages are missing that this reader
        has not been told of, once everything before them has been returned: ``next_seq`` below the stream's first
        sequence counts as one.  After any error, and after a cancel, the next read begins where this one began.
        """
        began = self.next_seq
        try:
            return await self._read(limit, up_to, max_bytes)
        except BaseException:
            # What had arrived is lost with this call: the consumer stands behind it and is of no use any more.
            self.next_seq = began
            self._consumer = None
            raise

    async def _read(self, limit: int, up_to: int | None, max_bytes: int) -> tuple[list[StoredMessage], StreamInfo]:
        info = await stream_info(self._connection, self._stream)
        if self._epoch and info.epoch != self._epoch:
            raise GapError(f"stream {self._stream} was created anew while it was being read")
        self._epoch = info.epoch
        self._life = info.life
        last = info.last_seq if up_to is None else min(up_to, info.last_seq)
        if self.next_seq < info.first_seq and self.next_seq <= info.last_seq:
            if not self._allow_gaps:
                raise _gap(self._stream, self.next_seq, info.first_seq)
            self._pass_over(info.first_seq)
        messages: list[StoredMessage] = []
        size = 0
        while self.next_seq <= last and len(messages) < limit and size < max_bytes:
            count = min(limit - len(messages), last - self.next_seq + 1)
            batch = await call_with_retry(partial(self._pull_or_confirm, count, last), deadline_s=READ_DEADLINE_S)
            if not batch:
                # Nothing from here to the end: the tail was purged (only an allowed gap can be one).
                if self._allow_gaps:
                    self._pass_over(last + 1)
                elif not messages:
                    raise _gap(self._stream, self.next_seq, last + 1)
                break
            for message in batch:
                if message.seq != self.next_seq and not self._allow_gaps:
                    await self._drop_consumer()
                    if messages:
                        return messages, info  # what stands before the gap; the next read meets the gap itself
                    raise _gap(self._stream, self.next_seq, message.seq)
                if message.seq > last:
                    await self._drop_consumer()
                    self._pass_over(last + 1)
                    break
                self._pass_over(message.seq)
                self.next_seq = message.seq + 1
                size += len(message.payload) + size_of(message.headers)
                messages.append(message)
        return messages, info

    def _pass_over(self, seq: int) -> None:
        self.passed_over += seq - self.next_seq
        self.next_seq = seq

    async def close(self) -> None:
        """Deletes the consumer on the server; it would go by itself after a minute."""
        subscription, self._subscription = self._subscription, None
        if self._connection.client.is_connected:
            if subscription is not None:
                await subscription.unsubscribe()
            await self._drop_consumer()

    async def _pull_or_confirm(self, count: int, last: int) -> list[StoredMessage]:
        """As :meth:`_pull`, but nothing is returned only when the stream itself says that up to ``last`` nothing is
        there."""
        messages = await self._pull(count)
        if messages:
            return messages
        found = await next_seq(self._connection, self._stream, self.next_seq, self._filter)
        if found is not None and found <= last:
            # A consumer on a replica that has not caught up yet.
            await self._drop_consumer()
            raise UnavailableError(f"stream {self._stream} does not deliver sequence {found}")
        return []

    async def _pull(self, count: int) -> list[StoredMessage]:
        """Asks once; returns what came, in order, possibly nothing when the consumer is at its end."""
        if self._delivered_up_to != self.next_seq - 1:
            await self._drop_consumer()  # it stands elsewhere: the position was set from outside
        if self._consumer is None:
            await self._create_consumer()
        batch = min(count, PULL_MESSAGES)
        # One message of the largest size must fit, or it would be refused for ever.
        max_bytes = max(PULL_BYTES, 2 * self._connection.client.max_payload)
        request = msgspec.json.encode({"batch": batch, "no_wait": True, "max_bytes": max_bytes})
        # Messages arrive under their own subject, so they cannot share the inbox of requests.  The closing word of a
        # pull does arrive under the reply's: a number of its own keeps it from ending the next.
        self._pulls += 1
        reply = f"{self._inbox}.{self._pulls}"
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}"
        await self._connection.lean.publish(subject, request, reply=reply)
        messages = await self._collect(reply, batch)
        if messages and messages[0].seq < self.next_seq:
            # An answer to a request from before a reconnect: the position is ours, so begin again from there.
            await self._drop_consumer()
            raise UnavailableError(f"stream {self._stream} delivered an older message again")
        return messages

    async def _collect(self, reply: str, batch: int) -> list[StoredMessage]:
        messages: list[StoredMessage] = []
        while len(messages) < batch:
            try:
                frames = await self._arrived.next(batch - len(messages), _SILENCE_S)
            except TimeoutError as error:
                self._consumer = None
                raise UnavailableError(f"stream {self._stream} stopped delivering") from error
            for start in range(0, len(frames), _AT_ONCE):
                if self._sort(frames[start : start + _AT_ONCE], reply, messages):
                    return messages
                await asyncio.sleep(0)  # others of this process have their turn
        return messages

    def _sort(self, frames: list[Frame], reply: str, messages: list[StoredMessage]) -> bool:
        """Adds the messages of a pull to ``messages``; returns whether it has ended."""
        own = f".{self._consumer}."
        for raw_subject, raw_reply, payload, block in frames:
            subject, ack_subject = raw_subject.decode("utf-8", "replace"), raw_reply.decode("utf-8", "replace")
            if is_delivery(ack_subject):
                # A consumer that was given up may still deliver what it was asked for.
                if own in ack_subject:
                    headers = None if block is None else HeaderBlock(block)
                    message, _ = message_of_delivery(subject, headers, payload, ack_subject, self._life)
                    messages.append(message)
                    self._delivered_up_to = message.seq
                continue
            if subject != reply:
                continue
            status = HeaderBlock(block or b"").get(H_STATUS)
            if status in ("404", "408") or (status == "409" and messages):
                return True  # the end of the stream, or of the bytes asked for: what came counts
            self._consumer = None
            raise UnavailableError(f"stream {self._stream} refused a pull with {status}")
        return False

    async def _receive(self, message: Msg) -> None:
        """What the queue of frames takes never comes here."""

    async def _create_consumer(self) -> None:
        if self._subscription is None:
            self._inbox = self._connection.client.new_inbox()
            self._subscription = await self._connection.client.subscribe(
                f"{self._inbox}.*", cb=self._receive, pending_msgs_limit=0, pending_bytes_limit=0
            )
            self._connection.client.divert(f"{self._inbox}.*", self._arrived.take)
        self._arrived.clear()
        name = f"hf-{self._connection.lean.inbox_id}-{self._connection.lean.new_token()}"
        config = {
            "name": name,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": max(1, self.next_seq),
            "filter_subject": self._filter,
            "ack_policy": "none",
            "replay_policy": "instant",
            "inactive_threshold": _INACTIVE_NS,
            "mem_storage": True,
            "num_replicas": 1,
        }
        await self._connection.api(
            f"CONSUMER.CREATE.{self._stream}.{name}",
            {"stream_name": self._stream, "config": config, "action": "create"},
        )
        self._consumer = name
        self._delivered_up_to = self.next_seq - 1

    async def _drop_consumer(self) -> None:
        name, self._consumer = self._consumer, None
        if name is None:
            return
        try:
            await self._connection.api(f"CONSUMER.DELETE.{self._stream}.{name}")
        except ApiError as error:
            if error.err_code != _CONSUMER_GONE:
                raise


async def read_one(connection: Connection, info: StreamInfo, seq: int) -> StoredMessage | None:
    """Returns the message at one sequence of a stream, or None when it holds none there."""
    if info.replicas > 1:
        # A server that has not caught up holds nothing yet where something stands.
        return await message_at_leader(connection, info.name, {"seq": seq}, epoch=info.epoch_at(seq))
    request = msgspec.json.encode({"seq": seq})
    message = await connection.lean.request(f"$JS.API.DIRECT.GET.{info.name}", request)
    headers = message.headers or {}
    # A message has a sequence; it may have a header Status too, from whoever published it.
    if H_SEQUENCE not in headers:
        status = headers.get(H_STATUS, "")
        if status == "404":
            return None
        raise UnavailableError(f"stream {info.name} answered {status} to a look-up by sequence")
    return StoredMessage(
        subject=headers[H_SUBJECT],
        headers=headers,
        payload=message.data,
        seq=int(headers[H_SEQUENCE]),
        stored_at_ms=parse_time_ms(headers[H_TIME]),
        epoch=info.epoch_at(seq),
    )


def _gap(stream: str, expected: int, found: int) -> GapError:
    return GapError(
        f"stream {stream} holds nothing from sequence {expected} to {found - 1}, and nothing of ours removed it",
        hint="purging is stopped; run 'holdfast health', and 'holdfast accept-gap' to record the loss and go on",
    )
