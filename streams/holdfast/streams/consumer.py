"""A durable pull consumer: work shared between processes, each message settled explicitly."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.schemas import limits
from holdfast.schemas.errors import DriftError, UnavailableError
from holdfast.streams.arrivals import next_of
from holdfast.streams.messages import StoredMessage, is_delivery, message_of_delivery
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import H_STATUS

if TYPE_CHECKING:
    from nats.aio.subscription import Subscription

    from holdfast.streams.connection import Connection, Msg

logger = logging.getLogger(__name__)

ACK_WAIT_S: Final = 30.0
"""How long a delivery may stay unsettled before it is delivered again."""

MAX_ACK_PENDING: Final = 2_000
"""Deliveries that may be unsettled at once, of all processes together: four full batches."""

BATCH: Final = 500
PULL_BYTES: Final = 16 * limits.MIB
"""Most bytes asked for at once: bounds what waits in the queue; many times the largest message."""

_EXPIRES_S: Final = 20.0
_HEARTBEAT_S: Final = 5.0
_NS: Final = 1_000_000_000


class Delivery(msgspec.Struct, frozen=True):
    """One handing-over of a message; ``ack_subject`` settles it."""

    message: StoredMessage
    ack_subject: str
    attempt: int


class DurableConsumer:
    """A durable consumer of one stream, created from its declaration and compared with it.

    One pull is under way at a time.  ``fetch`` returns as soon as anything is there.
    """

    def __init__(self, connection: Connection, stream: str, name: str) -> None:
        self._connection = connection
        self._stream = stream
        self._name = name
        self._epoch = ""
        self._queue: asyncio.Queue[Msg] = asyncio.Queue()  # bounded by what a pull asks for
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._pulls = 0
        self._open_pull = ""

    async def open(self) -> None:
        """Creates the consumer if it is missing; raises DriftError when it is there with other settings."""
        declared: dict[str, Any] = {
            "durable_name": self._name,
            "name": self._name,
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "ack_wait": int(ACK_WAIT_S * _NS),
            "max_ack_pending": MAX_ACK_PENDING,
            "max_deliver": -1,
            "replay_policy": "instant",
        }
        self._epoch = (await stream_info(self._connection, self._stream)).epoch
        answer = await self._connection.api(
            f"CONSUMER.CREATE.{self._stream}.{self._name}",
            {"stream_name": self._stream, "config": declared, "action": ""},
        )
        differences = {
            setting: (value, answer["config"].get(setting))
            for setting, value in declared.items()
            if answer["config"].get(setting) != value
        }
        if differences:
            raise DriftError(
                f"consumer {self._name} of {self._stream} differs from its declaration: {differences}",
                differences=differences,
                hint=f"delete it with 'nats consumer rm {self._stream} {self._name}'; it is made anew",
            )
        self._inbox = self._connection.client.new_inbox()
        self._subscription = await self._connection.client.subscribe(
            f"{self._inbox}.*", cb=self._receive, pending_msgs_limit=0, pending_bytes_limit=0
        )

    async def fetch(self) -> list[Delivery]:
        """Waits for messages and returns what has arrived, at most ``BATCH``; an empty list after a quiet while."""
        if not self._open_pull:
            await self._pull()
        deliveries: list[Delivery] = []
        timeout_s = 2 * _HEARTBEAT_S + 1
        while len(deliveries) < BATCH:
            if deliveries and self._queue.empty():
                break
            try:
                message = await next_of(self._queue, timeout_s)
            except TimeoutError:
                # Two heartbeats missed: the pull died with its connection.  Ask again.
                self._open_pull = ""
                logger.debug("pull went silent", extra={"action": "pull_silent", "stream": self._stream})
                break
            status = message.headers.get(H_STATUS) if message.headers else None
            if is_delivery(message.reply):
                deliveries.append(self._delivery(message))
            elif status != "100" and message.subject == self._open_pull:
                self._open_pull = ""  # ended: expired, completed, or the consumer is gone
                if status not in ("404", "408", "409"):
                    raise UnavailableError(f"consumer {self._name} was refused a pull with {status}")
                break
        return deliveries

    async def ack(self, delivery: Delivery) -> None:
        """Settles a delivery as done.  Fire and forget: a lost ack means another delivery, which must be harmless."""
        await self._connection.lean.publish(delivery.ack_subject, b"")

    async def nak(self, delivery: Delivery, delay_s: float) -> None:
        """Hands a delivery back, to be delivered again after a delay."""
        payload = b'-NAK {"delay": %d}' % int(delay_s * _NS)
        await self._connection.lean.publish(delivery.ack_subject, payload)

    async def floor(self) -> int:
        """Returns the stream sequence up to which every message is settled."""
        return await ack_floor(self._connection, self._stream, self._name)

    async def close(self) -> None:
        """Ends the subscription; what was delivered and not settled is delivered again to others."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None and not self._connection.client.is_closed:
            await subscription.unsubscribe()

    async def _receive(self, message: Msg) -> None:
        self._queue.put_nowait(message)

    async def _pull(self) -> None:
        self._pulls += 1
        self._open_pull = f"{self._inbox}.{self._pulls}"
        request = {
            "batch": BATCH,
            "max_bytes": max(PULL_BYTES, 2 * self._connection.client.max_payload),
            "expires": int(_EXPIRES_S * _NS),
            "idle_heartbeat": int(_HEARTBEAT_S * _NS),
        }
        await self._connection.lean.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._name}",
            msgspec.json.encode(request),
            reply=self._open_pull,
        )

    def _delivery(self, message: Msg) -> Delivery:
        stored, attempt = message_of_delivery(
            message.subject, message.headers, message.data, message.reply, self._epoch
        )
        return Delivery(stored, message.reply, attempt)


async def ack_floor(connection: Connection, stream: str, consumer: str) -> int:
    """Returns the stream sequence up to which a consumer has settled every message."""
    answer = await connection.api(f"CONSUMER.INFO.{stream}.{consumer}")
    if answer["num_pending"] == 0 and answer["num_ack_pending"] == 0:
        # Nothing is left to it, whatever was purged unseen: the floor itself stays at the last message it settled.
        return int(answer["delivered"]["stream_seq"])
    return int(answer["ack_floor"]["stream_seq"])
