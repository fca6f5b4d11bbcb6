"""Reads ``mini-swe-agent``: ``*.traj.json``, one object ``{instance_id, trajectory_format, info, messages}`` a file.

The body is the message with its ``extra``, which on an assistant's message holds the provider's whole reply.  The
first user message is the task; an assistant's message is a command, so its kind is ``tool_call``, and the user
message behind it is the command's output, of kind ``tool_result``.  The time is the reply's ``created`` (or
``extra.timestamp``, where a later version of the agent wrote it).  The session id is ``instance_id``, else a digest.
Two runs on one instance are told apart, from their first step on, by a digest of the whole run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from holdfast.ops.traces.chain import SessionChain
from holdfast.ops.traces.elements import read_elements
from holdfast.ops.traces.messages import read_messages
from holdfast.ops.traces.model import Record
from holdfast.ops.traces.records import JsonObject, decode_as, digest_of, message_kind, object_or_none, unix_ms
from holdfast.ops.traces.sources import Source
from holdfast.schemas.errors import InputError

ASSISTANT: Final = "mini-swe-agent"
"""Agent id of the assistant's steps."""


class _Trajectory(msgspec.Struct):
    messages: list[msgspec.Raw]
    instance_id: str | None = None


_DECODER: Final = msgspec.json.Decoder(_Trajectory)


def read(source: Source) -> Iterator[Record]:
    """Yields the messages of the run as steps; a list of runs is read too."""
    for element in read_elements(source):
        if not isinstance(element, tuple):
            yield element
            continue
        line, raw = element
        try:
            run = decode_as(_DECODER, raw)
            digest = digest_of(bytes(message) for message in run.messages)
            chain = SessionChain("mini-swe-agent", run.instance_id or f"mini-swe-agent-{digest}", salt=digest)
        except InputError as error:
            yield source.malformed(line, error.message)
            continue
        yield from read_messages(
            source, line, chain, run.messages, assistant=ASSISTANT, kind_of=_Kinds(), time_of=_time
        )


class _Kinds:
    """The kinds of one run's messages, asked for in their order: a user's depends on whether the agent has spoken."""

    def __init__(self) -> None:
        self._agent_spoke = False

    def __call__(self, message: JsonObject) -> str:
        kind = message_kind(message)
        if kind in {"assistant", "tool_call"}:
            self._agent_spoke = True
            return "tool_call"
        return "tool_result" if kind == "user" and self._agent_spoke else kind


def _time(message: JsonObject) -> int | None:
    extra = object_or_none(message.get("extra")) or {}
    response = object_or_none(extra.get("response")) or {}
    return unix_ms(response.get("created")) or unix_ms(extra.get("timestamp"))
