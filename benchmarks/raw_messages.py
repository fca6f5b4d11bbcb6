"""The messages of the raw limits: the bytes that Holdfast would send, made beforehand, for streams configured alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from benchmarks.bench import NAMESPACE, RAW_EVENTS_PREFIX, RAW_HOT_PREFIX
from benchmarks.measure import Side, load
from benchmarks.payloads import encoded
from benchmarks.raw_nats import AtomicBatches, Message, OwnInbox
from holdfast.streams.codec import seal
from holdfast.streams.events import NewEvent, encode_event

if TYPE_CHECKING:
    from nats.aio.client import Client

BATCH: Final = 64
"""Messages of an atomic batch, where many are stored at once."""

ONCE: Final = {"Nats-Expected-Last-Subject-Sequence": "0"}
"""Stored only where nothing is."""


def context_message(body: dict[str, Any]) -> Message:
    """Returns a context of :class:`Bodies` as ``put`` stores it."""
    form = seal(NAMESPACE, "context", encoded(body))[-1]
    return Message(f"{RAW_HOT_PREFIX}{NAMESPACE}.{form.digest}", {**form.headers, **ONCE}, form.payload)


def event_message(data: dict[str, Any]) -> Message:
    """Returns an event as ``emit`` stores it, once by its message id."""
    event = NewEvent(
        namespace=NAMESPACE,
        agent_id="bench",
        name="agent:status",
        data=data,
        session_id="bench-session",
        correlation_id="bench-correlation",
    )
    outgoing = encode_event(event)
    return Message(f"{RAW_EVENTS_PREFIX}bench.agent.status", dict(outgoing.headers), outgoing.payload)


def singly(inbox: OwnInbox, make: Callable[[int], list[Message]], in_flight: int) -> Side:
    """The raw limit of plain publishes over one own inbox."""

    async def publish(message: Message) -> None:
        ack = await inbox.request(message.subject, message.payload, message.headers)
        if b'"error"' in ack.data:
            raise RuntimeError(ack.data.decode())

    return Side(f"plain publishes over one own inbox, {in_flight:,} in flight", load(make, publish, in_flight))


def in_batches(client: Client, make: Callable[[int], list[Message]], size: int, in_flight: int = 1) -> Side:
    """The raw limit of atomic batches."""

    def groups(number: int) -> list[list[Message]]:
        return [make(size) for _ in range(number)]

    return Side(
        f"atomic batches of {size}, {in_flight} in flight",
        load(groups, AtomicBatches(client).publish, in_flight, weight=size),
    )


def at_once(client: Client, inbox: OwnInbox, make: Callable[[int], list[Message]], producers: int) -> list[Side]:
    """The raw limits of as many messages at once as there are producers, in every shape that may be the fastest."""
    shapes = [in_batches(client, make, BATCH, producers // BATCH), singly(inbox, make, producers)]
    return shapes if producers == BATCH else [*shapes, in_batches(client, make, producers)]
