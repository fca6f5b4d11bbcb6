"""What a handler is told beside its events: to take one again, or to make up for those it has missed.

These are events themselves, named ``holdfast:handler:<consumer>``, which that handler's consumer alone delivers: as
durable as any, shared by its processes, tried again until they have succeeded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client.handler_policy import control_name
from holdfast.schemas.errors import HoldfastError
from holdfast.schemas.ids import derived_event_id, new_event_id
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.decode import decode_event
from holdfast.streams.events import NewEvent
from holdfast.streams.messages import StoredMessage

if TYPE_CHECKING:
    from holdfast.schemas.ids import EventId
    from holdfast.streams.dead import DeadLetter


class Redeliver(msgspec.Struct, frozen=True, tag_field="do", tag="redeliver"):
    """Take this event again, as if it had just been delivered for the first time."""

    event_id: str


class CatchUp(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="do", tag="catch_up"):
    """Take the events stored in this time, in milliseconds from 1970, which left the log before they were delivered.

    ``cursor`` goes on after a page that was done.
    """

    since: int
    until: int
    cursor: str | None = None


Instruction = Redeliver | CatchUp

_INSTRUCTION: Final = msgspec.json.Decoder(Instruction)


def decode_instruction(data: bytes | None) -> Instruction | None:
    """Returns what an event tells its handler; None when that is nothing: any client may have sent it."""
    try:
        instruction: Instruction = _INSTRUCTION.decode(data or b"null")
    except UNDECODABLE:
        return None
    return instruction


def instruct(namespace: str, consumer: str, agent: str, instruction: Instruction, *source: str) -> NewEvent:
    """Returns the event that tells a handler something; of one ``source``, if any is named, there is one."""
    identity = derived_event_id(namespace, "instruction", consumer, *source) if source else new_event_id()
    data: Any = msgspec.to_builtins(instruction)
    return NewEvent(
        namespace=namespace,
        agent_id=agent,
        name=control_name(consumer),
        id=identity,
        timestamp_ms=None,
        data=data,
        root_event_id=identity,
    )


def redelivery_of(letter: DeadLetter) -> NewEvent | None:
    """Returns the event that has a handler take again what it gave up; None for a letter that is not a handler's."""
    if letter.handler is None:
        return None
    message = StoredMessage(
        letter.subject, letter.headers, letter.payload, letter.seq, letter.stored_at_ms, letter.epoch
    )
    try:
        row = decode_event(message).row
    except HoldfastError:
        return None
    again: Instruction | None = Redeliver(row.id)
    if row.name == control_name(letter.handler.consumer):
        again = decode_instruction(row.data)  # given up when it was taken again: what it names is meant
    return None if again is None else instruct(row.namespace, letter.handler.consumer, row.agent_id, again)


def receipt_mark(namespace: str, handler: str, event_id: str) -> EventId:
    """Returns the id of the receipt by which an idempotent handler knows an event that it has worked on."""
    return derived_event_id(namespace, "receipt", handler, event_id)
