"""Reads ``openai-messages``: chat messages as the OpenAI chat API takes them, in any of these shapes:

- a JSON array of messages: one session;
- JSONL of one message a line: one session, or as many as the lines name;
- ``{"messages": […]}``, one object, one a line (as in fine-tuning files) or an array of such: one session each.

The session id is ``session_id``, ``conversation_id`` or ``thread_id`` of the message or of the object around the
messages (of that object also ``id``); without one it is a digest of the content, so that the same file gives the same
session wherever it lies.  Hence a conversation without an id that has grown is another session, and two that are
equal are one.  The body is the message, without the field that named its session.  Of the object around the messages
nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from holdfast.ops.traces.chain import SessionChain
from holdfast.ops.traces.elements import read_elements
from holdfast.ops.traces.messages import add_message, read_messages
from holdfast.ops.traces.model import Malformed, Record, Step
from holdfast.ops.traces.records import JsonObject, decode_as, decode_object, digest_of, iso_ms, message_kind, unix_ms
from holdfast.ops.traces.sources import BLANK, Numbered, Source, read_lines
from holdfast.schemas.errors import InputError, InvalidFieldError
from holdfast.schemas.names import check_agent

ASSISTANT: Final = "assistant"
"""Agent id of an assistant's steps that carry no ``name``."""

_SESSION_FIELDS: Final = ("session_id", "conversation_id", "thread_id")
_HEAD_BYTES: Final = 1 << 16
_BROKEN_LINES: Final = 2
_NULL: Final = msgspec.Raw(b"null")


class _Conversation(msgspec.Struct):
    messages: list[msgspec.Raw]
    session_id: str | int | None = None
    conversation_id: str | int | None = None
    thread_id: str | int | None = None
    id: str | int | None = None


class _Envelope(msgspec.Struct):
    """Only whether there are messages: neither they nor the rest of the object are decoded for that."""

    messages: msgspec.Raw = _NULL


_CONVERSATION: Final = msgspec.json.Decoder(_Conversation)
_ENVELOPE: Final = msgspec.json.Decoder(_Envelope)


def read(source: Source) -> Iterator[Record]:
    """Yields every message as a step, in the order of the file."""
    reader = _Reader(source)
    for piece in read_elements(source) if _is_document(source) else read_lines(source):
        if isinstance(piece, tuple):
            yield from reader.read_piece(piece)
        else:
            yield piece


class _Reader:
    """What is known of one file: its sessions, and the digest that stands for a session without a name."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._chains: dict[str, SessionChain] = {}
        self._digest: str | None = None

    def read_piece(self, piece: Numbered) -> Iterator[Record]:
        line, raw = piece
        try:
            if decode_as(_ENVELOPE, raw).messages == _NULL:
                yield self._message(decode_object(raw))
                return
            conversation = decode_as(_CONVERSATION, raw)
            chain = SessionChain("openai-messages", _conversation_id(conversation))
        except InputError as error:
            yield self._source.malformed(line, error.message)
            return
        yield from read_messages(self._source, line, chain, conversation.messages, assistant=ASSISTANT, time_of=_time)

    def _message(self, message: JsonObject) -> Step:
        if "role" not in message:
            raise InvalidFieldError('neither a chat message with a role nor {"messages": […]}', field="role")
        session_id = _stated_session(message) or self._file_session()
        chain = self._chains.get(session_id) or SessionChain("openai-messages", session_id)
        step = add_message(
            chain, message, kind=message_kind(message), assistant=_name(message), timestamp_ms=_time(message)
        )
        self._chains[session_id] = chain
        return step

    def _file_session(self) -> str:
        # A second pass over the file, once: to hold all of it back until its digest is known is not bounded.
        if self._digest is None:
            self._digest = digest_of(_content(self._source))
        return f"openai-{self._digest}"


def _content(source: Source) -> Iterator[bytes]:
    # By line, not by piece: how the file is cut into pieces depends on its compression.
    for line in read_lines(source):
        yield line[1] if isinstance(line, tuple) else b""


def _stated_session(message: JsonObject) -> str | None:
    for field in _SESSION_FIELDS:
        value = message.get(field)
        if isinstance(value, str) and value:
            del message[field]
            return value
    return None


def _conversation_id(conversation: _Conversation) -> str:
    for value in (conversation.session_id, conversation.conversation_id, conversation.thread_id, conversation.id):
        if value not in {None, ""}:
            return str(value)
    return f"openai-{digest_of(bytes(message) for message in conversation.messages)}"


def _name(message: JsonObject) -> str:
    name = message.get("name")
    if not isinstance(name, str):
        return ASSISTANT
    try:
        return check_agent(name)
    except InvalidFieldError:
        return ASSISTANT


def _time(message: JsonObject) -> int | None:
    # None of these fields belongs to the chat API: what is no time is left alone, in the body.
    for field in ("timestamp", "created_at", "created"):
        value = message.get(field)
        if isinstance(value, str):
            try:
                return iso_ms(message, field)
            except InvalidFieldError:
                continue
        found = unix_ms(value)
        if found is not None:
            return found
    return None


def _is_document(source: Source) -> bool:
    """Whether the file is one JSON document and not JSONL: it is an array, or neither of its first lines is whole."""
    if source.head(_HEAD_BYTES).lstrip(BLANK).startswith(b"["):
        return True
    broken = 0
    for line in read_lines(source):
        if isinstance(line, Malformed) or broken == _BROKEN_LINES:
            break
        try:
            decode_object(line[1])
        except InputError:
            broken += 1
        else:
            return False
    return broken > 0
