"""A durable pull consumer: work shared between processes, each message settled explicitly."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
import nats.errors

from holdfast.schemas import limits
from holdfast.schemas.errors import ClosedError, DriftError, RetryError, UnavailableError
from holdfast.streams.arrivals import next_of
from holdfast.streams.connection import ApiError, Msg
from holdfast.streams.messages import StoredMessage, is_delivery, message_of_delivery, parse_time_ms
from holdfast.streams.tolerant_client import read_headers
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import H_STATUS

if TYPE_CHECKING:
    from nats.aio.subscription import Subscription

    from holdfast.streams.connection import Connection

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
_NO_CONSUMER: Final = 10014
_NO_MESSAGE: Final = 10037
_CLOSE_S: Final = 2.0

Start = Literal["all", "new"]
"""Where a new consumer begins: with the oldest message that the stream holds, or with the next one."""


class Delivery(msgspec.Struct, frozen=True):
    """One handing-over of a message; ``ack_subject`` settles it."""

    message: StoredMessage
    ack_subject: str
    attempt: int


class ConsumerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a durable consumer is told beside its name.

    ``filter_subjects``: none stands for the whole stream; they may not overlap.  ``batch`` is asked for at once.
    ``metadata`` is for those who find the consumer on the server.
    """

    filter_subjects: tuple[str, ...] = ()
    start: Start = "all"
    ack_wait_s: float | None = None
    """None: ``ACK_WAIT_S``."""
    max_ack_pending: int = MAX_ACK_PENDING
    batch: int = BATCH
    metadata: Mapping[str, str] = {}


class DurableConsumer:
    """A durable consumer of one stream, created from its declaration and compared with it.

    One pull is under way at a time.  ``fetch`` returns as soon as anything is there.
    """

    def __init__(self, connection: Connection, stream: str, name: str, options: ConsumerOptions | None = None) -> None:
        self._connection = connection
        self._stream = stream
        self._name = name
        self._options = ConsumerOptions() if options is None else options
        self._ack_wait_s = ACK_WAIT_S if self._options.ack_wait_s is None else self._options.ack_wait_s
        self._life: str | Callable[[int], str] = ""
        # Bounded by what a pull asks for.  None: the connection was lost and is back.
        self._queue: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._pulls = 0
        self._open_pull = ""
        self._open_left = 0
        self.created_ms = 0
        """When the server made the consumer, by its clock: what was stored since has never been settled under its
        name before.  Known once it is open, as is ``duplicate_window_s``, for which the stream refuses a repeated
        message id."""
        self.duplicate_window_s = 0.0

    async def open(self) -> None:
        """Creates the consumer if it is missing; raises DriftError when it is there with other settings.

        Where it begins counts when it is created: one that is there goes on from where it stands.  Its filter, its
        times and its metadata follow the declaration.
        """
        declared = self._declared()
        self._life = (await stream_info(self._connection, self._stream)).life
        found = await self._found()
        if found is not None:
            declared |= {name: found[name] for name in ("deliver_policy", "opt_start_seq") if name in found}
        answer = await self._connection.api(
            f"CONSUMER.CREATE.{self._stream}.{self._name}",
            {"stream_name": self._stream, "config": declared, "action": ""},
        )
        differences = {
            setting: (value, answer["config"].get(setting))
            for setting, value in declared.items()
            if not _agrees(setting, value, answer["config"])
        }
        if differences:
            raise DriftError(
                f"consumer {self._name} of {self._stream} differs from its declaration: {differences}",
                differences=differences,
                hint=f"delete it with 'nats consumer rm {self._stream} {self._name}'; it is made anew",
            )
        self.created_ms = parse_time_ms(answer["created"])
        stream = await self._connection.api(f"STREAM.INFO.{self._stream}")
        self.duplicate_window_s = stream["config"].get("duplicate_window", 0) / _NS
        self._inbox = self._connection.client.new_inbox()
        self._open_pull = ""
        self._connection.on_reconnect.append(self._reconnected)
        self._subscription = await self._connection.client.subscribe(
            f"{self._inbox}.*", cb=self._receive, pending_msgs_limit=0, pending_bytes_limit=0
        )
        self._connection.client.divert(f"{self._inbox}.*", self._take)

    @property
    def asked_for(self) -> int:
        """Messages that the pull which is under way may still bring; 0 when none is."""
        return self._open_left if self._open_pull else 0

    async def fetch(self, limit: int | None = None) -> list[Delivery]:
        """Waits for messages and returns what has arrived; an empty list after a quiet while.

        At most ``limit`` are asked for, or the batch of the options; a call with a lower limit than the one before
        gets no more than that, and what had been asked for beyond waits for the next.  Raises UnavailableError when the
        consumer is not open, as after an :meth:`open` that failed.
        """
        if self._subscription is None:
            # A pull would be answered to nobody, and look like a quiet stream for ever.
            raise UnavailableError(f"consumer {self._name} of {self._stream} is not open", hint="open it first")
        most = self._options.batch if limit is None else limit
        if not self._open_pull:
            await self._pull(most)
        deliveries: list[Delivery] = []
        timeout_s = 2 * _HEARTBEAT_S + 1
        while len(deliveries) < most:
            if deliveries and self._queue.empty():
                break
            try:
                message = await next_of(self._queue, timeout_s)
            except TimeoutError:
                # Two heartbeats missed: the pull died with its connection.  Ask again.
                self._open_pull = ""
                logger.debug("pull went silent", extra={"action": "pull_silent", "stream": self._stream})
                break
            if message is None:
                self._open_pull = ""  # it may have died with the connection: ask again
                break
            status = message.headers.get(H_STATUS) if message.headers else None
            if is_delivery(message.reply):
                deliveries.append(self._delivery(message))
                self._open_left -= 1
                if self._open_left <= 0:
                    self._open_pull = ""  # everything asked for has come; the server has no closing word for that
                    break
            elif status != "100" and message.subject == self._open_pull:
                self._open_pull = ""  # ended: expired, completed, or the consumer is gone
                # With deliveries at hand it is told by the next pull: these would be lost until their ack wait is over.
                if status not in ("404", "408", "409") and not deliveries:
                    raise UnavailableError(f"consumer {self._name} was refused a pull with {status}")
                break
        return deliveries

    async def ack(self, delivery: Delivery) -> None:
        """Settles a delivery as done.  Fire and forget: a lost ack means another delivery, which must be harmless."""
        await self._connection.lean.publish(delivery.ack_subject, b"")

    async def nak(self, delivery: Delivery, delay_s: float) -> None:
        """Hands a delivery back, to be delivered again after a delay."""
        payload = b'-NAK {"delay": %d}' % int(delay_s * _NS) if delay_s > 0 else b"-NAK"
        await self._connection.lean.publish(delivery.ack_subject, payload)

    async def in_progress(self, delivery: Delivery) -> None:
        """Says that a delivery is still worked on: its ack wait begins anew."""
        await self._connection.lean.publish(delivery.ack_subject, b"+WPI")

    async def term(self, delivery: Delivery) -> None:
        """Settles a delivery as given up: it is not delivered again."""
        await self._connection.lean.publish(delivery.ack_subject, b"+TERM")

    async def floor(self) -> int:
        """Returns the stream sequence up to which every message is settled."""
        return await ack_floor(self._connection, self._stream, self._name)

    async def close(self) -> None:
        """Ends the subscription, and hands back at once what has arrived and was not fetched.

        What was fetched and not settled is delivered again to others after its ack wait.
        """
        if self._reconnected in self._connection.on_reconnect:
            self._connection.on_reconnect.remove(self._reconnected)
        subscription, self._subscription = self._subscription, None
        client = self._connection.client
        if subscription is None or client.is_closed:
            return
        if not client.is_connected:
            await subscription.unsubscribe()
            return
        try:
            async with asyncio.timeout(_CLOSE_S):
                # With a round trip: what the server has sent already arrives before it returns.
                drain: Callable[[], Awaitable[None]] = subscription.drain  # untyped in nats-py
                await drain()
            while not self._queue.empty():
                message = self._queue.get_nowait()
                if message is not None and is_delivery(message.reply):
                    await self._connection.lean.publish(message.reply, b"-NAK")
        except (TimeoutError, RetryError, ClosedError, OSError, nats.errors.Error):
            # The server notices by itself, and hands out again what is not settled.
            logger.debug("closing a consumer without a server", exc_info=True)

    def _declared(self) -> dict[str, Any]:
        options = self._options
        declared: dict[str, Any] = {
            "durable_name": self._name,
            "name": self._name,
            "deliver_policy": options.start,
            "ack_policy": "explicit",
            "ack_wait": int(self._ack_wait_s * _NS),
            "max_ack_pending": options.max_ack_pending,
            "max_deliver": -1,
            "replay_policy": "instant",
        }
        if len(options.filter_subjects) == 1:
            declared["filter_subject"] = options.filter_subjects[0]
        elif options.filter_subjects:
            declared["filter_subjects"] = list(options.filter_subjects)
        if options.metadata:
            declared["metadata"] = dict(options.metadata)
        return declared

    async def _found(self) -> dict[str, Any] | None:
        try:
            answer = await self._connection.api(f"CONSUMER.INFO.{self._stream}.{self._name}")
        except ApiError as error:
            if error.err_code != _NO_CONSUMER:
                raise
            return None
        config: dict[str, Any] = answer["config"]
        return config

    def _reconnected(self) -> None:
        self._queue.put_nowait(None)

    async def _receive(self, message: Msg) -> None:
        self._queue.put_nowait(message)

    def _take(self, subject: bytes, reply: bytes, payload: bytes, block: bytes | None) -> bool:
        """As :meth:`_receive`, from within the read loop: past a queue and a task of nats-py's for each message."""
        texts = (subject.decode("utf-8", "replace"), reply.decode("utf-8", "replace"))
        self._queue.put_nowait(Msg(self._connection.client, *texts, payload, read_headers(block)))
        return True

    async def _pull(self, batch: int) -> None:
        self._pulls += 1
        self._open_pull = f"{self._inbox}.{self._pulls}"
        self._open_left = batch
        request = {
            "batch": batch,
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
        stored, attempt = message_of_delivery(message.subject, message.headers, message.data, message.reply, self._life)
        return Delivery(stored, message.reply, attempt)


def _agrees(setting: str, declared: Any, found: Mapping[str, Any]) -> bool:
    actual = found.get(setting)
    if setting == "metadata":
        # The server adds members of its own.
        return bool(declared.items() <= (actual or {}).items())
    return bool(actual == declared)


class ConsumerState(msgspec.Struct, frozen=True, kw_only=True):
    """How a consumer stands: ``floor`` is the stream sequence up to which it has settled every message.

    ``pending``: messages that it has not delivered yet; ``unsettled``: those that are with somebody now.
    """

    name: str
    floor: int
    pending: int
    unsettled: int
    redelivered: int
    filters: tuple[str, ...]
    metadata: dict[str, str]


async def ack_floor(connection: Connection, stream: str, consumer: str) -> int:
    """Returns the stream sequence up to which a consumer has settled every message."""
    return _state(await connection.api(f"CONSUMER.INFO.{stream}.{consumer}")).floor


async def consumer_states(connection: Connection, stream: str) -> AsyncIterator[ConsumerState]:
    """Yields the durable consumers of a stream, in the order of their names, a page at a time."""
    offset = 0
    while True:
        answer = await connection.api(f"CONSUMER.LIST.{stream}", {"offset": offset})
        consumers: list[dict[str, Any]] = answer.get("consumers") or []
        for item in consumers:
            if item["config"].get("durable_name"):
                yield _state(item)
        offset += len(consumers)
        if not consumers or offset >= answer.get("total", 0):
            return


async def delete_consumer(connection: Connection, stream: str, name: str) -> bool:
    """Deletes a consumer, and where it stood with it; returns False when there was none."""
    try:
        await connection.api(f"CONSUMER.DELETE.{stream}.{name}")
    except ApiError as error:
        if error.err_code != _NO_CONSUMER:
            raise
        return False
    return True


async def next_seq(connection: Connection, stream: str, seq: int, filter_subject: str = ">") -> int | None:
    """Returns the sequence of the first message at or after ``seq`` on these subjects; None when there is none."""
    try:
        answer = await connection.api(f"STREAM.MSG.GET.{stream}", {"seq": max(1, seq), "next_by_subj": filter_subject})
    except ApiError as error:
        if error.err_code != _NO_MESSAGE:
            raise
        return None
    return int(answer["message"]["seq"])


def _state(answer: dict[str, Any]) -> ConsumerState:
    pending, unsettled = int(answer["num_pending"]), int(answer["num_ack_pending"])
    # When nothing is left to it, whatever was purged unseen, the floor itself stays at the last message it settled.
    floor = answer["delivered"] if pending == 0 and unsettled == 0 else answer["ack_floor"]
    config: dict[str, Any] = answer["config"]
    return ConsumerState(
        name=answer["name"],
        floor=int(floor["stream_seq"]),
        pending=pending,
        unsettled=unsettled,
        redelivered=int(answer.get("num_redelivered", 0)),
        filters=tuple(config.get("filter_subjects") or filter(None, [config.get("filter_subject")])),
        metadata=config.get("metadata") or {},
    )
