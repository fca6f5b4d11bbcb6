"""How far the handlers of events have come, and what that means for the purge of the event log.

What a handler has not settled stays in the log, up to a number of bytes.  Beyond that the log goes on without it: the
handler is told, by an event for it alone, in which time it has missed events, and reads them from the lake.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client.handler_control import CatchUp, instruct
from holdfast.client.handler_policy import HANDLER_KEY, NAMESPACE_KEY, PATTERN_KEY
from holdfast.schemas.errors import InvalidNameError
from holdfast.schemas.failpoints import failpoint
from holdfast.schemas.ids import now_ms
from holdfast.schemas.names import decode_token
from holdfast.streams.consumer import ConsumerState, consumer_states, next_seq
from holdfast.streams.events import encode_event
from holdfast.streams.publish import publish
from holdfast.streams.pull import read_one
from holdfast.streams.retry import WRITE_DEADLINE_S, call_with_retry
from holdfast.streams.wire import EVENTS_STREAM
from holdfast.workers.ingester import CONSUMER as INGESTER

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection
    from holdfast.streams.topology import StreamInfo

logger = logging.getLogger(__name__)

AGENT: Final = "holdfast"
"""Signs what handlers are told."""


class Handler(msgspec.Struct, frozen=True):
    """Which handler a consumer belongs to."""

    namespace: str
    name: str
    pattern: str


class Floor(msgspec.Struct, frozen=True):
    """The sequence up to which a consumer has settled everything that it is for; ``handler`` None: the ingester."""

    consumer: str
    seq: int
    handler: Handler | None = None


class HandlerState(msgspec.Struct, frozen=True):
    """How a handler stands: events it has not been handed yet, those at work or waiting for another try, and how many
    have been handed out again."""

    namespace: str
    name: str
    pattern: str
    consumer: str
    pending: int
    unsettled: int
    redelivered: int


class Plan(msgspec.Struct, frozen=True):
    """Below which sequence to purge, and which floors that passes by."""

    below: int
    left_behind: tuple[Floor, ...] = ()


async def handler_states(connection: Connection, namespace: str | None = None) -> list[HandlerState]:
    """Returns every handler that the server knows, running or not, or those of one namespace; for ``stats``."""
    states: list[HandlerState] = []
    async for state in consumer_states(connection, EVENTS_STREAM):
        handler = handler_of(state)
        if handler is not None and namespace in (None, handler.namespace):
            states.append(
                HandlerState(
                    namespace=handler.namespace,
                    name=handler.name,
                    pattern=handler.pattern,
                    consumer=state.name,
                    pending=state.pending,
                    unsettled=state.unsettled,
                    redelivered=state.redelivered,
                )
            )
    return states


async def stats_of_handlers(connection: Connection, namespace: str | None = None) -> list[dict[str, Any]]:
    """Returns the states of handlers as JSON can hold them."""
    return [msgspec.structs.asdict(state) for state in await handler_states(connection, namespace)]


def handler_of(state: ConsumerState) -> Handler | None:
    """Returns the handler that a consumer belongs to; None for any other consumer."""
    try:
        namespace, name, pattern = (
            decode_token(state.metadata[key]) for key in (NAMESPACE_KEY, HANDLER_KEY, PATTERN_KEY)
        )
    except (KeyError, InvalidNameError):
        return None
    return Handler(namespace, name, pattern)


async def read_floors(connection: Connection, info: StreamInfo) -> list[Floor]:
    """Returns the floors of the handlers and of the ingester; ``info`` is the event log's, taken before."""
    floors: list[Floor] = []
    async for state in consumer_states(connection, EVENTS_STREAM):
        handler = handler_of(state)
        if handler is not None or state.name == INGESTER:
            floors.append(Floor(state.name, await _settled_up_to(connection, state, info), handler))
    return floors


def plan_floors(below: int, floors: Sequence[Floor], info: StreamInfo, *, most_bytes: int) -> Plan:
    """Returns below which sequence the log may be purged when nothing but floors speaks against ``below``.

    For all floors together, ``most_bytes`` are kept at most; what a message takes is the log's average.
    """
    lowest = min((floor.seq for floor in floors), default=below) + 1
    if lowest >= below:
        return Plan(below)
    kept = below - max(lowest, info.first_seq)
    message_bytes = max(1.0, info.bytes / max(1, info.messages))
    if kept * message_bytes <= most_bytes:
        return Plan(lowest)
    reached = max(lowest, below - int(most_bytes / message_bytes))
    return Plan(reached, tuple(floor for floor in floors if floor.seq + 1 < reached))


async def hold_back(connection: Connection, info: StreamInfo, below: int, *, most_bytes: int) -> int:
    """Returns below which sequence to purge the event log, which is at most ``below``.

    Handlers that this leaves behind have been told, durably, when it returns.
    """
    plan = plan_floors(below, await read_floors(connection, info), info, most_bytes=most_bytes)
    for floor in plan.left_behind:
        if floor.handler is not None:
            await _tell(connection, info, floor, floor.handler, plan.below)
    return plan.below


async def _settled_up_to(connection: Connection, state: ConsumerState, info: StreamInfo) -> int:
    if state.pending == 0 and state.unsettled == 0:
        return info.last_seq
    # The consumer's own floor stands at the last message that was for it: what it has not settled comes after, maybe
    # long after.
    filters = state.filters or (">",)
    found = [await next_seq(connection, EVENTS_STREAM, state.floor + 1, subject) for subject in filters]
    return min((seq for seq in found if seq is not None), default=info.last_seq + 1) - 1


async def _tell(connection: Connection, info: StreamInfo, floor: Floor, handler: Handler, below: int) -> None:
    first = max(floor.seq + 1, info.first_seq)
    oldest, newest = await read_one(connection, info, first), await read_one(connection, info, below - 1)
    missed = CatchUp(
        since=0 if oldest is None else oldest.stored_at_ms,
        # Exclusive.  Events of the same millisecond that are still in the log are handed out twice.
        until=(now_ms() if newest is None else newest.stored_at_ms) + 1,
    )
    event = instruct(handler.namespace, floor.consumer, AGENT, missed, info.epoch, str(first), str(below))
    failpoint("archiver.before_handler_told")
    await call_with_retry(partial(publish, connection, encode_event(event)), deadline_s=WRITE_DEADLINE_S)
    logger.warning(
        "a handler is left behind, and reads from the lake what it missed",
        extra={
            "action": "handler_left_behind",
            "handler": handler.name,
            "namespace": handler.namespace,
            "from": first,
            "to": below - 1,
        },
    )
