"""An event with an embedded context, taken apart and put together again: pure functions.

The embedded form is ``{"event": …, "data": …, "_ksi_context": {"_event_id": …, "_parent_event_id": …, …}}``.  Its
lineage becomes columns of the event; all the rest, spacing, order, spellings and members of other names among it, is
its *form*: the original text with a hole ``{"$":"<column>"}`` in the place of each value that a column holds.  The form
is the event's context, of kind :data:`KIND`, so all events of one shape share one context; it is JSON itself, and
other members can be read in it.

====================  ===========================================================================================
hole                  what is put there
====================  ===========================================================================================
name, agent_id, …     the column as text; ``"as":"utf8"`` with its characters as they are
event_id              the producer's own id: ``source_id`` where it was no UUID, else the event's id
parent, root          the column where the original was a UUID; ``"as":"source"`` what the column's id holds, else the
                      ``source_id`` of that event; ``"as":"self"`` the event's own id
timestamp             the milliseconds of the column and the digits that the message's member :data:`DIGITS` holds
event_depth           the column
data                  the exact JSON text
====================  ===========================================================================================

A text that is not JSON, is no object, or cannot be put together from its parts, is kept whole as its own context, of
content type :data:`WHOLE_TEXT` (or :data:`WHOLE_BYTES`, when it is not UTF-8).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import msgspec

from holdfast.ops.embedded import holes
from holdfast.ops.embedded.holes import Time
from holdfast.ops.embedded.reading import CONTEXT, FIELDS, NAMES, Fields, digest_key, label, read_fields, stated_id
from holdfast.ops.embedded.scanning import Member
from holdfast.schemas import limits
from holdfast.schemas.bodies import BINARY
from holdfast.schemas.errors import HoldfastError, IntegrityError, TooLargeError
from holdfast.schemas.ids import derived_event_id, iso_from_ms, normal_event_id, unpacked_source_id
from holdfast.schemas.names import check_agent, check_event_name
from holdfast.schemas.refs import JSON, Ref, compute_digest, format_ref
from holdfast.schemas.rows import EventRow
from holdfast.streams.decode import MAX_DEPTH, decode_event, timestamps_agree
from holdfast.streams.events import NewEvent
from holdfast.streams.messages import StoredMessage
from holdfast.streams.publish import Outgoing
from holdfast.streams.wire import H_MSG_ID, event_subject, message_id

KIND: Final = "embedded"
"""The kind of the contexts that hold forms."""

DIGITS: Final = "digits"
"""Member of an event's message: the digits of its time behind the milliseconds."""

UNNAMED: Final = "embedded:event"
UNREADABLE: Final = "embedded:unreadable"
WHOLE_TEXT: Final = "text/plain; charset=utf-8"
WHOLE_BYTES: Final = BINARY

_LABELS: Final = ("correlation_id", "session_id", "client_id", "originator")
_HOLE: Final = re.compile(rb'\{"\$":"([a-z_]+)"(?:,"as":"([a-zA-Z0-9:+-]+)")?\}')

_PLAIN: Final = re.compile(r"[A-Za-z0-9_:-]{1,128}")
_LEAST_MS: Final = 10**11
"""A smaller number of milliseconds would be read as seconds."""

Known = Callable[[str], bool]
"""Whether an id is that of another event of the same source."""
Originals = Callable[[str], str | None]
"""The ``source_id`` of the event with an id; None when it has none or is not there."""


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """An embedded event taken apart; ``reason`` says why it is kept whole, None when it is not.

    ``parent`` and ``root`` are the ids as they were; ``is_repeated``: another event with its id came before it.
    ``event`` lacks its data, which goes as the exact text ``data``, and its reference, which is that of ``form``.
    """

    event: NewEvent
    parent: str | None
    root: str | None
    is_repeated: bool
    data: bytes | None
    digits: str
    form: bytes
    content_type: str
    reason: str | None

    @property
    def is_unreadable(self) -> bool:
        """Whether the text was no JSON object, so that nothing of it is known."""
        return self.event.name == UNREADABLE

    @property
    def ref(self) -> Ref:
        """The reference of the form."""
        digest = compute_digest(self.event.namespace, KIND, self.form, content_type=self.content_type)
        return format_ref(KIND, digest)

    def message(self) -> Outgoing:
        """Returns the message of the event; raises InputError for what may not be sent.

        Ids go as the producer wrote them where that is shorter: readers turn them into UUIDs.
        """
        event = self.event
        body: dict[str, Any] = {}
        # The header takes any id that is plain; the first event of an id is known by it.
        by_source = event.source_id is not None and not self.is_repeated and _PLAIN.fullmatch(event.source_id)
        if event.source_id is not None and not by_source and event.source_id != unpacked_source_id(event.id):
            body["source_id"] = event.source_id
        if event.timestamp_ms is not None and not timestamps_agree(event.id, event.timestamp_ms):
            is_plain = event.timestamp_ms > _LEAST_MS
            body["timestamp"] = event.timestamp_ms if is_plain else iso_from_ms(event.timestamp_ms)
        body |= {field: value for field in _LABELS if (value := getattr(event, field)) is not None}
        if event.parent_event_id is not None:
            body["parent_event_id"] = _shorter(self.parent, event.parent_event_id)
        if event.root_event_id not in (None, event.id):
            body["root_event_id"] = _shorter(self.root, event.root_event_id)
        if event.event_depth != (0 if event.parent_event_id is None else 1):
            body["event_depth"] = event.event_depth
        body["context_ref"] = self.ref
        if self.digits:
            body[DIGITS] = self.digits
        if self.data is not None:
            body["data"] = msgspec.Raw(self.data)
        identity = event.source_id if by_source and event.source_id is not None else event.id
        headers = {H_MSG_ID: message_id(event.namespace, identity)}
        payload = msgspec.json.encode(body)
        if len(payload) > limits.EVENT_BYTES:
            raise TooLargeError(f"event has {len(payload)} bytes, the limit is {limits.EVENT_BYTES}", field="event")
        return Outgoing(event_subject(event.namespace, event.agent_id, event.name), headers, payload)


def event_id_of(namespace: str, key: str, occurrence: int = 0) -> tuple[str, str | None]:
    """Returns the event id for an :class:`Identity` key, and the original where that is not it.

    ``occurrence`` tells apart the events of a source that carry one id: the first has it, the others ids of their own.
    """
    if occurrence:
        return derived_event_id(namespace, "embedded", key, str(occurrence)), key
    return normal_event_id(namespace, key)


def split(namespace: str, text: bytes, *, known: Known, agent: str, occurrence: int = 0) -> Parts:
    """Takes an embedded event apart; whatever the text is, :func:`rebuild` gives it back.

    ``agent`` signs an event that names no agent.
    """
    fields = read_fields(text)
    if isinstance(fields, str):
        return _whole(namespace, text, None, agent, occurrence, fields)
    parts = _taken_apart(namespace, text, fields, known, agent, occurrence)
    try:
        if rebuild(_as_stored(parts), parts.form, parts.content_type, _ExpectedOriginals(namespace, fields)) == text:
            return parts
        reason = "it is spelled in a way that its parts do not give back"
    except HoldfastError as error:
        reason = error.message
    return _whole(namespace, text, parts, agent, occurrence, reason)


def rebuild(row: EventRow, form: bytes, content_type: str, originals: Originals) -> bytes:
    """Returns the original bytes of an event from its row and its form; raises IntegrityError when they do not fit."""
    if content_type != JSON:
        return form
    pieces: list[bytes] = []
    end = 0
    for hole in _HOLE.finditer(form):
        pieces.append(form[end : hole.start()])
        pieces.append(_fill(row, hole[1].decode(), (hole[2] or b"").decode(), originals))
        end = hole.end()
    pieces.append(form[end:])
    return b"".join(pieces)


def referring(text: bytes, event_id: str, ref: Ref) -> bytes:
    """Returns an event with a reference in the place of its embedded context; as it is when it embeds none."""
    fields = read_fields(text)
    if isinstance(fields, str) or not fields.context or fields.is_migrated:
        return text
    member = next(found for found in fields.members if found.name == CONTEXT.encode())
    stated = any(FIELDS.get(found.name) == "event_id" for found in fields.members)
    added = b"" if stated else b', "_event_id": ' + holes.spell_text(event_id, holes.TEXT)
    return b"".join((text[: member.start], b'"', ref.encode(), b'"', added, text[member.end :]))


def _taken_apart(namespace: str, text: bytes, fields: Fields, known: Known, agent: str, occurrence: int) -> Parts:
    values = fields.values
    stated = stated_id(fields)
    event_id, source_id = _event_id(namespace, text, stated, occurrence)
    parent, root = (label(values.get(field)) for field in ("parent_event_id", "root_event_id"))
    depth = values.get("event_depth", 0 if parent is None else 1)
    event = NewEvent(
        namespace=namespace,
        agent_id=_valid(check_agent, values.get("agent_id")) or agent,
        name=_valid(check_event_name, values.get("name")) or UNNAMED,
        id=event_id,
        timestamp_ms=None if fields.time is None else fields.time.at_ms,
        parent_event_id=None if parent is None else normal_event_id(namespace, parent)[0],
        # Of a repeated event, its own id is not the one that its text says.
        root_event_id=event_id if root == stated else None if root is None else normal_event_id(namespace, root)[0],
        event_depth=depth if depth <= MAX_DEPTH else 0,
        source_id=source_id,
        correlation_id=label(values.get("correlation_id")),
        session_id=label(values.get("session_id")),
        client_id=label(values.get("client_id")),
        originator=label(values.get("originator")),
    )
    cutter = _Cutter(text, event, fields, known)
    form = cutter.form()
    return Parts(
        event=event,
        parent=parent,
        root=root,
        is_repeated=occurrence > 0,
        data=cutter.data,
        digits=fields.time.digits if fields.time is not None and cutter.has_time else "",
        form=form,
        content_type=JSON,
        reason=None,
    )


class _Cutter:
    """Puts holes into a text, each only where it will be filled with what stood there."""

    def __init__(self, text: bytes, event: NewEvent, fields: Fields, known: Known) -> None:
        self._text = text
        self._event = event
        self._fields = fields
        self._known = known
        self.data: bytes | None = None
        self.has_time = False

    def form(self) -> bytes:
        """Returns the text with its holes."""
        cuts: list[tuple[int, int, bytes]] = []
        for members, is_context in ((self._fields.members, False), (self._fields.context, True)):
            for member in members:
                hole = self._hole(member, is_context=is_context)
                if hole is not None:
                    cuts.append((member.start, member.end, hole))
        pieces: list[bytes] = []
        end = 0
        for start, after, hole in sorted(cuts):
            pieces += self._text[end:start], hole
            end = after
        return b"".join([*pieces, self._text[end:]])

    def _hole(self, member: Member, *, is_context: bool) -> bytes | None:
        raw = self._text[member.start : member.end]
        if member is self._fields.data and not is_context:
            if raw == b"null":
                return None
            self.data = raw
            return _hole("data")
        field = "name" if not is_context and member.name.decode(errors="replace") in NAMES else None
        field = field or FIELDS.get(member.name)
        if field is None:
            return None
        if field == "timestamp":
            if self._fields.time is None or holes.time_in(raw) != self._fields.time:
                return None
            self.has_time = True
            return _hole(field, self._fields.time.spelling)
        if field == "event_depth":
            return _hole(field) if holes.whole_in(raw) == self._event.event_depth else None
        text = holes.text_in(raw)
        spelling = None if text is None else holes.spelling_of(raw, text)
        if text is None or spelling is None:
            return None
        if field in ("parent_event_id", "root_event_id"):
            return self._of_other(field, text, spelling)
        own = _own_id(self._event) if field == "event_id" else getattr(self._event, field)
        return _hole(field, spelling) if text == own else None

    def _of_other(self, field: str, text: str, spelling: str) -> bytes | None:
        """The hole for a parent or root: by what its id can be found again."""
        name = "parent" if field == "parent_event_id" else "root"
        expected = getattr(self._event, field)
        if expected is None or spelling != holes.TEXT:
            return None
        if expected == self._event.id:
            return _hole(name, "self") if text == _own_id(self._event) else None
        if text == expected:
            return _hole(name)
        if normal_event_id(self._event.namespace, text)[0] != expected:
            return None
        if unpacked_source_id(expected) == text or self._known(text):
            return _hole(name, "source")
        return None


class _ExpectedOriginals:
    """What a look-up of parent and root will give once the whole source is stored."""

    def __init__(self, namespace: str, fields: Fields) -> None:
        texts = (fields.values.get("parent_event_id"), fields.values.get("root_event_id"))
        self._sources: dict[str, str] = {normal_event_id(namespace, text)[0]: text for text in texts if text}

    def __call__(self, event_id: str) -> str | None:
        return self._sources.get(event_id)


def _fill(row: EventRow, name: str, spelling: str, originals: Originals) -> bytes:
    text: str | None
    match name:
        case "data":
            return b"null" if row.data is None else row.data
        case "event_depth":
            return b"%d" % row.event_depth
        case "timestamp":
            return holes.spell_time(Time(row.timestamp_ms, _digits_in(row.extra), spelling))
        case "event_id":
            text = row.source_id or row.id
        case "parent" | "root":
            other = row.parent_event_id if name == "parent" else row.root_event_id
            if spelling == "self":
                text = row.source_id or row.id
            elif spelling == "source" and other is not None:
                text = unpacked_source_id(other) or originals(other)
            else:
                text = other
            spelling = holes.TEXT
        case "name" | "agent_id" | "correlation_id" | "session_id" | "client_id" | "originator":
            text = getattr(row, name)
        case _:
            raise IntegrityError(f"a form has a hole {name[:40]!r}, which this release does not fill")
    if text is None:
        raise IntegrityError(
            f"event {row.id} has no {name} to fill its form with",
            hint="the event that it names must be in the same namespace",
        )
    return holes.spell_text(text, spelling)


def _as_stored(parts: Parts) -> EventRow:
    """The row that readers will see, by the same way that they take."""
    message = parts.message()
    if len(parts.form) > limits.BODY_BYTES:
        raise IntegrityError("its form is over the limit of a context")
    stored = StoredMessage(message.subject, message.headers, message.payload, 1, 0, "")
    return decode_event(stored).row


def _whole(namespace: str, text: bytes, parts: Parts | None, agent: str, occurrence: int, reason: str) -> Parts:
    """The parts of a text that is kept as it is; its lineage as far as it can be read."""
    try:
        text.decode()
        content_type = WHOLE_TEXT
    except UnicodeDecodeError:
        content_type = WHOLE_BYTES
    if parts is None:
        event_id, _ = _event_id(namespace, text, None, occurrence)
        parts = Parts(
            event=NewEvent(namespace=namespace, agent_id=agent, name=UNREADABLE, id=event_id, timestamp_ms=None),
            parent=None,
            root=None,
            is_repeated=occurrence > 0,
            data=None,
            digits="",
            form=b"",
            content_type="",
            reason=None,
        )
    return msgspec.structs.replace(parts, data=None, digits="", form=text, content_type=content_type, reason=reason)


def _hole(name: str, spelling: str = "") -> bytes:
    return (f'{{"$":"{name}","as":"{spelling}"}}' if spelling else f'{{"$":"{name}"}}').encode()


def _shorter(original: str | None, event_id: str) -> str:
    return original if original is not None and len(original) < len(event_id) else event_id


def _own_id(event: NewEvent) -> str:
    return event.source_id or event.id


def _event_id(namespace: str, text: bytes, stated: str | None, occurrence: int) -> tuple[str, str | None]:
    event_id, source_id = event_id_of(namespace, stated or digest_key(text), occurrence)
    return event_id, source_id if stated is not None else None


def _digits_in(extra: bytes | None) -> str:
    if extra is None:
        return ""
    found = msgspec.json.decode(extra, type=dict[str, msgspec.Raw]).get(DIGITS)
    return "" if found is None else msgspec.json.decode(found, type=str)


def _valid(check: Callable[[object], str], value: Any) -> str | None:
    try:
        return check(value)
    except HoldfastError:
        return None


__all__ = [
    "DIGITS",
    "KIND",
    "UNNAMED",
    "UNREADABLE",
    "Known",
    "Originals",
    "Parts",
    "event_id_of",
    "rebuild",
    "referring",
    "split",
]
