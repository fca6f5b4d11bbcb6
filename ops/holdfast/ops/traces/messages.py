"""Chat messages of one conversation as steps: what the formats that hold OpenAI messages share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec

from holdfast.ops.traces.chain import SessionChain
from holdfast.ops.traces.model import Record, Step
from holdfast.ops.traces.records import JsonObject, author, call_ids, decode_object, encode, message_kind
from holdfast.ops.traces.sources import Source
from holdfast.schemas.errors import InputError


def read_messages(
    source: Source,
    line: int,
    chain: SessionChain,
    messages: Iterable[msgspec.Raw],
    *,
    assistant: str,
    kind_of: Callable[[JsonObject], str] = message_kind,
    time_of: Callable[[JsonObject], int | None] | None = None,
) -> Iterator[Record]:
    """Yields each message as a step; one that cannot be read is named by its place among the messages.

    ``line`` is where the conversation begins.  ``kind_of`` is asked about the messages in their order.
    """
    for place, raw in enumerate(messages):
        try:
            message = decode_object(raw)
            timestamp_ms = time_of(message) if time_of else None
            yield add_message(chain, message, kind=kind_of(message), assistant=assistant, timestamp_ms=timestamp_ms)
        except InputError as error:
            yield source.malformed(line, f"message {place}: {error.message}")


def add_message(
    chain: SessionChain, message: JsonObject, *, kind: str, assistant: str, timestamp_ms: int | None
) -> Step:
    """Adds a message to its session: a tool's answer follows from the message that made the call.

    Raises an InputError, and then has added nothing.
    """
    answered = message.get("tool_call_id")
    caller = chain.calls.get(answered) if isinstance(answered, str) else None
    index = len(chain)
    step = chain.add(
        agent_id=author(kind, assistant),
        kind=kind,
        body=encode(message),
        timestamp_ms=timestamp_ms,
        parent=caller,
        parent_source="tool_call_id",
    )
    for call_id in call_ids(message):
        chain.calls[call_id] = index
    return step
