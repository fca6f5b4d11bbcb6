"""What a reader of traces yields: a :class:`Step`, or a :class:`Malformed` place in a file; and a step's event.

**Identity.**  A step is known by its ``source_id``, from which the event id follows (``ids.normal_event_id``).  A
canonical UUID of the source stays as it is.  Every other ``source_id`` is a digest over all that the event will say:
format, session, ordinal, author, kind, time, body, and the ``source_id`` of the step it follows from, which by
induction fixes its root and its depth.  Hence

- a second import of a file adds nothing, wherever the file lies and whether it is compressed;
- a file that has grown adds its new steps only;
- two files that give one session id and one ordinal to different content (trials of one task by two models, say) give
  different ids: nothing is dropped silently, and no id ever names two contents.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from holdfast.schemas.ids import EventId, normal_event_id

Format = Literal["steps", "tau-bench", "mini-swe-agent", "openai-messages", "claude-code", "openhands", "mapped"]
"""A trace format that can be read."""

FORMATS: Final[tuple[Format, ...]] = (
    "steps",
    "tau-bench",
    "mini-swe-agent",
    "openai-messages",
    "claude-code",
    "openhands",
)
"""Those that are known by name; ``mapped`` needs a map."""

ParentSource = Literal["none", "tool_call_id", "parentUuid", "logicalParentUuid", "stated", "order"]
"""How a step's cause is known: ``none`` for a first step, ``order`` when it is only the step before, ``stated`` when
the source names the step without saying how it knows, else the field of the source that names it."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a session, to be stored as a context (``kind``, ``body``) and an event (all the rest).

    ``ordinal`` is the source's own number of the step where it has one, else the place among the readable steps of
    the session, from 0.  ``parent_ordinal`` always names a step that is yielded, an earlier one but in the formats
    that state causes by id (``mapped``, ``openhands``); so do ``parent_source_id`` and ``root_source_id``, which of a
    first step are None and its own.  ``timestamp_ms`` is the
    original time, None where the source has none.
    """

    format: Format
    session_id: str
    correlation_id: str
    agent_id: str
    ordinal: int
    kind: str
    name: str
    body: bytes
    timestamp_ms: int | None
    source_id: str
    parent_ordinal: int | None
    parent_source_id: str | None
    parent_source: ParentSource
    root_source_id: str
    depth: int


class Malformed(msgspec.Struct, frozen=True):
    """A place in a file that could not be read as a step; reading went on behind it where that was possible.

    ``line`` counts from 1; of a document that is not made of lines it is the line where the broken element begins.
    0 stands for the file as a whole.
    """

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


Record = Step | Malformed
"""What every reader yields."""


class StepEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a step's event but for the reference to its context.

    ``source_id`` is the original of an id that was no UUID.  ``timestamp_ms`` None: take the time of the import.
    """

    id: EventId
    name: str
    agent_id: str
    session_id: str
    correlation_id: str
    parent_event_id: EventId | None
    root_event_id: EventId
    event_depth: int
    timestamp_ms: int | None
    source_id: str | None
    data: dict[str, Any]


def step_event(namespace: str, step: Step) -> StepEvent:
    """Returns the event of a step: a pure function, equal for equal steps, in whatever order they are asked for.

    The root of a first step is itself.
    """
    event_id, original = normal_event_id(namespace, step.source_id)
    parent = None if step.parent_source_id is None else normal_event_id(namespace, step.parent_source_id)[0]
    return StepEvent(
        id=event_id,
        name=step.name,
        agent_id=step.agent_id,
        session_id=step.session_id,
        correlation_id=step.correlation_id,
        parent_event_id=parent,
        root_event_id=normal_event_id(namespace, step.root_source_id)[0],
        event_depth=step.depth,
        timestamp_ms=step.timestamp_ms,
        source_id=original,
        data={"format": step.format, "ordinal": step.ordinal, "parent_source": step.parent_source},
    )
