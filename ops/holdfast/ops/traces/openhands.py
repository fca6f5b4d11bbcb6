"""Reads ``openhands``: the events of OpenHands, as it writes its trajectories.

An event is ``{id, timestamp, source, message?, action + args | observation + content + extras, cause?,
tool_call_metadata?}``; ``id`` is a whole number that counts the events of a session, ``cause`` on an observation is
the ``id`` of the action that it answers.  This follows what the project has published of its serialization.  Shapes:

- a JSON array of events, or an event a line: one session, named by its content;
- objects with ``history`` or ``trajectory``, as evaluations write them: a session each, named by ``instance_id``,
  ``session_id`` or ``id``.  A pair of action and observation in the place of an event is taken as the two.

The body is the event.  Its own id stays there; a step without a cause in its session follows from the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, cast

from holdfast.ops.traces.causes import Facts, Place, checked, read_causes
from holdfast.ops.traces.mapped import pieces, time_ms
from holdfast.ops.traces.model import Malformed, Record
from holdfast.ops.traces.records import JsonObject, decode_object, digest_of, encode, object_or_none
from holdfast.ops.traces.sources import Source
from holdfast.schemas.errors import InputError, InvalidFieldError

ASSISTANT: Final = "openhands"
"""Agent id of what the agent did."""

_EVENTS: Final = ("history", "trajectory")
_SESSIONS: Final = ("instance_id", "session_id", "id")


def read(source: Source) -> Iterator[Record]:
    """Yields every event as a step, in the order of the file."""
    return read_causes(source, "openhands", _Reader(source).read, follow_order=True)


class _Reader:
    def __init__(self, source: Source) -> None:
        self._source = source
        self._file_session: str | None = None

    def read(self) -> Iterator[Place]:
        for piece in pieces(self._source):
            if isinstance(piece, Malformed):
                yield piece
                continue
            line, raw = piece
            try:
                record = decode_object(raw)
            except InputError as error:
                yield self._source.malformed(line, error.message)
                continue
            events = next((record[name] for name in _EVENTS if isinstance(record.get(name), list)), None)
            if events is None:
                yield self._place(line, self._session, record)
                continue
            named = next((record[name] for name in _SESSIONS if isinstance(record.get(name), str | int)), None)
            session = str(named) if named is not None else f"openhands-{digest_of(iter([raw]))}"
            for event in _flat(events):
                yield self._place(line, partial(str, session), event)

    def _place(self, line: int, session: Callable[[], str], event: object) -> Place:
        try:
            return line, checked(_facts(session(), event))
        except InputError as error:
            return self._source.malformed(line, error.message)

    def _session(self) -> str:
        if self._file_session is None:
            lines = (piece[1] if isinstance(piece, tuple) else b"" for piece in pieces(self._source))
            self._file_session = f"openhands-{digest_of(lines)}"
        return self._file_session


def _flat(events: list[object]) -> Iterator[object]:
    for event in events:
        if isinstance(event, list):
            yield from cast("list[object]", event)
        else:
            yield event


def _facts(session: str, event: object) -> Facts:
    record = object_or_none(event)
    if record is None or not ("action" in record or "observation" in record):
        raise InvalidFieldError("neither an action nor an observation", field="action")
    kind = _kind(record)
    return Facts(
        session=session,
        id=_number(record.get("id")),
        parent=_number(record.get("cause")),
        agent=_agent(record, kind),
        kind=kind,
        timestamp_ms=time_ms(record.get("timestamp")),
        body=encode(record),
    )


def _number(value: Any) -> str | None:
    # Below zero it is not set.
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _kind(record: JsonObject) -> str:
    if "observation" in record:
        return "tool_result"
    match record["action"]:
        case "message":
            return "user" if record.get("source") == "user" else "assistant"
        case "system":
            return "system"
        case _:
            return "tool_call"


def _agent(record: JsonObject, kind: str) -> str:
    if kind in ("tool_result", "system"):
        return "tool" if kind == "tool_result" else "system"
    source = record.get("source")
    return ASSISTANT if source == "agent" or not isinstance(source, str) or not source else source
