"""Reading a stream by sequence: every message from a position on, with gaps noticed.

An ephemeral consumer that asks for no acknowledgement feeds one queue of our own; the reader keeps the position, so a
lost consumer, a reconnect or a restart only means to ask again from where it stands.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final

import msgspec

from holdfast.schemas import limits
from holdfast.schemas.errors import GapError, UnavailableError
from holdfast.streams.connection import ApiError, Connection, Msg
from holdfast.streams.messages import StoredMessage
from holdfast.streams.retry import READ_DEADLINE_S, call_with_retry
from holdfast.streams.topology import StreamInfo, stream_info
from holdfast.streams.wire import H_STATUS

PULL_BYTES: Final = 8 * limits.MIB
"""Most bytes asked for at once: bounds what waits in the queue."""

PULL_MESSAGES: Final = 5_000
_SILENCE_S: Final = 5.0
_INACTIVE_NS: Final = 60 * 1_000_000_000
_CONSUMER_GONE: Final = 10014
_MAX_BYTES_DEFAULT: Final = 64 * limits.MIB


class StreamReader:
    """Reads one stream forward.  Not safe for two readers at once.

    ``next_seq`` is the sequence that the next read begins at.  ``allow_gaps``: a stream of which interior messages are
    purged by design (superseded key versions) has gaps that mean nothing.
    """

    def __init__(self, connection: Connection, stream: str, next_seq: int, *, allow_gaps: bool = False) -> None:
        self._connection = connection
        self._stream = stream
        self.next_seq = next_seq
        self._allow_gaps = allow_gaps
        self._consumer: str | None = None
        self._reply = ""
        self._queue: asyncio.Queue[Msg] = asyncio.Queue()
        self._epoch: str = ""

    async def read(
        self, *, limit: int, up_to: int | None = None, max_bytes: int = _MAX_BYTES_DEFAULT
    ) -> tuple[list[StoredMessage], StreamInfo]:
        """Returns messages from ``next_seq`` on, contiguous, and the stream's state as of the beginning of the call.

        Ends at ``limit`` messages, at ``max_bytes``, or at the stream's last sequence of that time (at ``up_to`` when
        that is earlier), whichever comes first; ``next_seq`` then is the sequence after the last one returned.  Never
        waits for new messages.  Raises GapError when messages are missing that this reader has not been told of:
        ``next_seq`` below the stream's first sequence counts as one.
        """
        info = await stream_info(self._connection, self._stream)
        if self._epoch and info.epoch != self._epoch:
            raise GapError(f"stream {self._stream} was created anew while it was being read")
        self._epoch = info.epoch
        last = info.last_seq if up_to is None else min(up_to, info.last_seq)
        if info.messages and self.next_seq < info.first_seq:
            if not self._allow_gaps:
                raise _gap(self._stream, self.next_seq, info.first_seq)
            self.next_seq = info.first_seq
        messages: list[StoredMessage] = []
        size = 0
        while self.next_seq <= last and len(messages) < limit and size < max_bytes and info.messages:
            batch = await call_with_retry(
                partial(self._pull, min(limit - len(messages), last - self.next_seq + 1)), deadline_s=READ_DEADLINE_S
            )
            if not batch:
                # Nothing from here to the end: the tail was purged (only an allowed gap can be one).
                if not self._allow_gaps:
                    raise _gap(self._stream, self.next_seq, last + 1)
                self.next_seq = last + 1
                break
            for message in batch:
                if message.seq > last:
                    await self._drop_consumer()
                    self.next_seq = last + 1
                    break
                if message.seq != self.next_seq and not self._allow_gaps:
                    await self._drop_consumer()
                    raise _gap(self._stream, self.next_seq, message.seq)
                self.next_seq = message.seq + 1
                size += len(message.payload)
                messages.append(message)
        return messages, info

    async def close(self) -> None:
        """Deletes the consumer on the server; it would go by itself after a minute."""
        await self._drop_consumer()

    async def _pull(self, count: int) -> list[StoredMessage]:
        """Asks once; returns what came, in order, possibly nothing when the consumer is at its end."""
        if self._consumer is None:
            await self._create_consumer()
        batch = min(count, PULL_MESSAGES)
        request = {"batch": batch, "no_wait": True, "max_bytes": PULL_BYTES}
        payload = msgspec.json.encode(request)
        await self._connection.client.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}", payload, reply=self._reply
        )
        messages: list[StoredMessage] = []
        while len(messages) < batch:
            try:
                message = await asyncio.wait_for(self._queue.get(), _SILENCE_S)
            except TimeoutError as error:
                self._forget_consumer()
                raise UnavailableError(f"stream {self._stream} stopped delivering") from error
            status = message.headers.get(H_STATUS) if message.headers else None
            if status and not message.data:
                if status in ("404", "408"):
                    break
                if status == "409":  # max_bytes reached, or the consumer is gone: what came counts
                    if not messages:
                        await self._drop_consumer()
                        raise UnavailableError(f"stream {self._stream} refused a pull: 409")
                    break
                self._forget_consumer()
                raise UnavailableError(f"stream {self._stream} refused a pull: {status}")
            messages.append(self._message(message))
        if messages and messages[0].seq < self.next_seq:
            # An answer to a request from before a reconnect: the position is ours, so begin again from there.
            await self._drop_consumer()
            raise UnavailableError(f"stream {self._stream} delivered an older message again")
        return messages

    async def _create_consumer(self) -> None:
        self._forget_consumer()
        self._reply, self._queue = self._connection.lean.open_queue()
        name = f"hf-{self._connection.lean.inbox_id}-{self._reply.rpartition('.')[2]}"
        config = {
            "name": name,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": max(1, self.next_seq),
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

    async def _drop_consumer(self) -> None:
        name = self._consumer
        self._forget_consumer()
        if name is None:
            return
        try:
            await self._connection.api(f"CONSUMER.DELETE.{self._stream}.{name}")
        except ApiError as error:
            if error.err_code != _CONSUMER_GONE:
                raise

    def _forget_consumer(self) -> None:
        self._consumer = None
        if self._reply:
            self._connection.lean.close_queue(self._reply)
            self._reply = ""

    def _message(self, message: Msg) -> StoredMessage:
        # $JS.ACK[.<domain>.<account>].<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>
        tokens = message.reply.split(".")
        tail = tokens[-5:] if len(tokens) == 9 else tokens[-6:-1]
        return StoredMessage(
            subject=message.subject,
            headers=message.headers or {},
            payload=message.data,
            seq=int(tail[1]),
            stored_at_ms=int(tail[3]) // 1_000_000,
            epoch=self._epoch,
        )


def _gap(stream: str, expected: int, found: int) -> GapError:
    return GapError(
        f"stream {stream} holds nothing from sequence {expected} to {found - 1}, and nothing of ours removed it",
        hint="purging is stopped; run 'holdfast health', and 'holdfast accept-gap' to record the loss and go on",
    )
