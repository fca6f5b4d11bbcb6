"""Reads ``steps``: JSONL of one step a line, with ``session_id`` and ``seq``.

A line holds ``session_id``, ``seq`` (the step's number, from 0), ``role``; and where there are such ``content``,
``tool_calls``, ``tool_call_id``, ``tool_name``, ``kind``, ``ts`` (ISO 8601), ``tokens_in``, ``tokens_out``,
``caused_by`` (the ``seq`` of the step that this one follows from) and ``caused_by_source``.  The body is the line
without ``session_id``, ``seq``, ``ts`` and ``caused_by*``, which go to the event.

A ``caused_by`` that names no earlier step that could be read gives way to the step before.  Sessions may be mixed;
``seq`` may have gaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from holdfast.ops.traces.chain import SessionChain
from holdfast.ops.traces.model import ParentSource, Record, Step
from holdfast.ops.traces.records import (
    JsonObject,
    decode_object,
    encode,
    integer_field,
    iso_ms,
    message_kind,
    required_text,
    text_field,
)
from holdfast.ops.traces.sources import Source, read_lines
from holdfast.schemas.errors import InputError, InvalidFieldError

_TO_EVENT: Final = ("session_id", "seq", "ts", "caused_by", "caused_by_source")


def read(source: Source) -> Iterator[Record]:
    """Yields a step for each line, in the order of the file."""
    chains: dict[str, SessionChain] = {}
    for line in read_lines(source):
        if not isinstance(line, tuple):
            yield line
            continue
        number, raw = line
        try:
            yield _step(chains, decode_object(raw))
        except InputError as error:
            yield source.malformed(number, error.message)


def _step(chains: dict[str, SessionChain], record: JsonObject) -> Step:
    session_id = required_text(record, "session_id")
    seq = integer_field(record, "seq")
    if seq is None:
        raise InvalidFieldError("seq is missing", field="seq")
    kind = text_field(record, "kind") or message_kind(record)
    role = required_text(record, "role")
    cause = integer_field(record, "caused_by")
    cause_source = text_field(record, "caused_by_source")
    timestamp_ms = iso_ms(record, "ts")
    for field in _TO_EVENT:
        record.pop(field, None)

    chain = chains.get(session_id) or SessionChain("steps", session_id)
    step = chain.add(
        # A user who only hands on what a command printed (kind tool_result) stands for the tool.
        agent_id="tool" if kind == "tool_result" else role,
        kind=kind,
        body=encode(record),
        timestamp_ms=timestamp_ms,
        ordinal=seq,
        parent=chain.index_of(cause) if cause is not None else None,
        parent_source=_parent_source(cause_source),
        # A session that begins again in the same file is the same session: its first step stays a first step.
        is_root=seq == 0 and cause is None,
    )
    # Only now, so that a session exists once it has a step.
    chains[session_id] = chain
    return step


def _parent_source(stated: str | None) -> ParentSource:
    match stated:
        case "tool_call_id" | "order" | "parentUuid":
            return stated
        case _:
            return "stated"
