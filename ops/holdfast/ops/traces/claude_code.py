"""Reads ``claude-code``: the JSONL transcripts that Claude Code keeps under ``~/.claude/projects``.

The format is not documented by its maker; this follows what users have published of versions 1 and 2.  A line is an
object with a ``type``.  Lines with a ``uuid`` form the conversation, linked by ``parentUuid``: ``user`` (also results
of tools, as ``tool_result`` blocks), ``assistant`` (one content block of a reply a line, ``tool_use`` among them),
``system``, ``attachment``, ``progress``.  They are the steps, as are ``user`` and ``assistant`` lines that lack a
``uuid``.  All other lines are bookkeeping of the program (titles in ``summary`` and ``ai-title``,
``file-history-snapshot``, ``queue-operation``, ``mode``, …) and are passed over.

- **Session**: ``sessionId``.  Subagents write their own files, which carry the ``sessionId`` of the session that
  started them; a line with ``isSidechain`` and ``agentId`` therefore belongs to the session ``<sessionId>/<agentId>``,
  whose correlation id is the ``sessionId``.  Older versions kept sidechains within the session; there they stay.
- **Id**: the ``uuid``.  Forking copies lines with their ``uuid`` into a new session (``forkedFrom`` says so): a copy,
  like a ``uuid`` that a file repeats or that is not canonical, gets a derived id and keeps its ``uuid`` in the body.
- **Cause**: for a tool's result the line that made the call, else ``parentUuid``, else ``logicalParentUuid`` (across
  a compaction), else the line before.  A cause that is not in the file, as after a resumption, counts as none.
- **Body**: the whole line less what the event says: ``sessionId``, ``uuid``, ``timestamp``, and of ``parentUuid`` and
  ``logicalParentUuid`` what named the cause.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from holdfast.ops.traces.chain import SessionChain
from holdfast.ops.traces.model import ParentSource, Record, Step
from holdfast.ops.traces.records import (
    JsonObject,
    decode_object,
    encode,
    iso_ms,
    object_or_none,
    objects_in,
    required_text,
    text_field,
)
from holdfast.ops.traces.sources import Source, read_lines
from holdfast.schemas.errors import InputError, InvalidFieldError, InvalidNameError
from holdfast.schemas.ids import is_canonical_uuid
from holdfast.schemas.names import check_kind

ASSISTANT: Final = "claude-code"
"""Agent id of the main conversation's own steps; of a subagent's it is followed by ``-`` and its ``agentId``."""

_CONVERSATION: Final = frozenset({"user", "assistant"})


class _Cause(NamedTuple):
    step: int | None
    source: ParentSource
    uuid: str | None


_CAUSE_FIELDS: Final[tuple[ParentSource, ...]] = ("parentUuid", "logicalParentUuid")
_NO_CAUSE: Final = _Cause(None, "order", None)


def read(source: Source) -> Iterator[Record]:
    """Yields a step for each line of the conversation, in the order of the file."""
    transcript = _Transcript()
    for line in read_lines(source):
        if not isinstance(line, tuple):
            yield line
            continue
        number, raw = line
        try:
            step = transcript.read_line(decode_object(raw))
        except InputError as error:
            yield source.malformed(number, error.message)
        else:
            if step is not None:
                yield step


class _Transcript:
    """The sessions of one file, and which step each ``uuid`` is."""

    def __init__(self) -> None:
        self._chains: dict[str, SessionChain] = {}
        self._indexes: dict[str, tuple[SessionChain, int]] = {}

    def read_line(self, record: JsonObject) -> Step | None:
        """Returns the step of a line, None for bookkeeping; raises an InputError and then has changed nothing."""
        line_type = required_text(record, "type")
        uuid = text_field(record, "uuid")
        if uuid is None and (line_type not in _CONVERSATION or "message" not in record):
            return None
        blocks = _blocks(record) if line_type in _CONVERSATION else []
        chain = self._chain(record)
        cause = self._cause(chain, record, blocks)
        is_id = uuid is not None and self._is_id(uuid, record)
        index = len(chain)
        kind = _kind(line_type, record, blocks)
        step = chain.add(
            agent_id=_agent(kind, record),
            kind=kind,
            timestamp_ms=iso_ms(record, "timestamp"),
            body=encode(_body(record, cause, drop_uuid=is_id)),
            parent=cause.step,
            parent_source=cause.source,
            stated_id=uuid if is_id else None,
        )
        self._chains[chain.session_id] = chain
        if uuid is not None:
            self._indexes.setdefault(uuid, (chain, index))
        for block in blocks:
            call_id = block.get("id")
            if block.get("type") == "tool_use" and isinstance(call_id, str):
                chain.calls[call_id] = index
        return step

    def _chain(self, record: JsonObject) -> SessionChain:
        session = required_text(record, "sessionId")
        agent = text_field(record, "agentId")
        thread = f"{session}/{agent}" if agent and record.get("isSidechain") is True else session
        return self._chains.get(thread) or SessionChain("claude-code", thread, correlation_id=session)

    def _cause(self, chain: SessionChain, record: JsonObject, blocks: list[JsonObject]) -> _Cause:
        named: list[tuple[ParentSource, str | None]] = [(field, text_field(record, field)) for field in _CAUSE_FIELDS]
        for block in blocks:
            call_id = block.get("tool_use_id")
            if block.get("type") == "tool_result" and isinstance(call_id, str) and call_id in chain.calls:
                caller = chain.calls[call_id]
                uuid = next((uuid for _, uuid in named if uuid and self._indexes.get(uuid) == (chain, caller)), None)
                return _Cause(caller, "tool_call_id", uuid)
        for field, uuid in named:
            found, index = self._indexes.get(uuid or "", (None, 0))
            if found is chain:
                return _Cause(index, field, uuid)
        return _NO_CAUSE

    def _is_id(self, uuid: str, record: JsonObject) -> bool:
        return is_canonical_uuid(uuid) and uuid not in self._indexes and record.get("forkedFrom") is None


def _blocks(record: JsonObject) -> list[JsonObject]:
    message = object_or_none(record.get("message"))
    if message is None:
        raise InvalidFieldError("message is not an object", field="message")
    return list(objects_in(message.get("content")))


def _kind(line_type: str, record: JsonObject, blocks: list[JsonObject]) -> str:
    types = {block.get("type") for block in blocks if isinstance(block.get("type"), str)}
    if line_type == "user":
        if "tool_result" in types:
            return "tool_result"
        return "summary" if record.get("isCompactSummary") is True else "user"
    if line_type == "assistant":
        return "tool_call" if "tool_use" in types else "assistant"
    try:
        return check_kind(line_type)
    except InvalidNameError:
        return "record"


def _agent(kind: str, record: JsonObject) -> str:
    # In a sidechain it is not a person who prompts but the agent that started it.
    is_sidechain = record.get("isSidechain") is True
    if kind == "tool_result":
        return "tool"
    if kind == "user":
        return ASSISTANT if is_sidechain else "user"
    if kind == "system":
        return "system"
    agent = text_field(record, "agentId") if is_sidechain else None
    return f"{ASSISTANT}-{agent}" if agent else ASSISTANT


def _body(record: JsonObject, cause: _Cause, *, drop_uuid: bool) -> JsonObject:
    dropped = {"sessionId", "timestamp"}
    if drop_uuid:
        dropped.add("uuid")
    dropped.update(field for field in _CAUSE_FIELDS if record.get(field) in {None, cause.uuid})
    return {field: value for field, value in record.items() if field not in dropped}
