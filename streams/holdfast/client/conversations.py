"""Conversations: the contexts of a session in order, read lazily, forked without copying.

::

    async for message in hf.conversation("trip-42"):
        print(message.kind, await message.body())

    event = (await hf.conversation("trip-42").messages())[4].event
    other = await hf.fork("trip-42", at=event)       # all before and with that message, then its own
    await hf.emit("user:said", session=other.session_id, context={"role": "user", "text": "by train, then"})

A message is an event of the session that carries a context.  A fork is one event, :data:`FORKED`, in a session of its
own; what came before stays where it is and is read from there.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping
from copy import copy
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict, cast

import msgspec

from holdfast.client.lineage_context import of_event, with_underscores
from holdfast.client.model import Context, Event
from holdfast.schemas import limits
from holdfast.schemas.conversations import CONTEXT_ADDED, FORKED
from holdfast.schemas.errors import InvalidFieldError, NotFoundError
from holdfast.schemas.ids import normal_event_id
from holdfast.schemas.lineage import ALIASES
from holdfast.schemas.names import check_agent
from holdfast.schemas.refs import Ref, parse_ref
from holdfast.streams.events import check_id_text

if TYPE_CHECKING:
    from holdfast.client.store import Holdfast

SUMMARY_CONTEXTS: Final = 100
"""Most contexts that a summary lists unless told otherwise: the newest."""

_BATCH: Final = 100
"""Bodies resolved at once."""
_PAGE: Final = 500


class Message:
    """An event of a conversation and the context that it carries."""

    def __init__(self, hf: Holdfast, event: Event, ref: Ref) -> None:
        self._hf = hf
        self._context: Context | None = None
        self.event = event
        self.ref = ref

    @property
    def kind(self) -> str:
        """The kind of its context."""
        return parse_ref(self.ref).kind

    async def context(self) -> Context:
        """Returns its context, resolved when it is first asked for; errors as of :meth:`Holdfast.resolve`."""
        if self._context is None:
            self._context = await self._hf.resolve(self.ref)
        return self._context

    async def body(self) -> Any:
        """Returns the body of its context, decoded anew: an object of the caller's own."""
        return (await self.context()).decode()

    async def role(self) -> str | None:
        """Returns who speaks: the ``role`` that the event's data, else the body, names; None when neither does."""
        return _role_in(self.event.data) or _role_in((await self.context()).body)

    def put_context(self, context: Context) -> None:
        """Takes the context that was resolved with others; for :class:`Conversation`."""
        self._context = context

    def __repr__(self) -> str:
        return f"Message({self.event.event_id}, {self.ref})"


class Conversation:
    """A session, read as ordered messages.

    The order is that of storing.  Nothing is kept: each reading asks anew, a page at a time, hot and cold.
    """

    def __init__(self, hf: Holdfast, session_id: str) -> None:
        self._hf = hf
        self.session_id = check_id_text(session_id, "session")

    async def __aiter__(self) -> AsyncIterator[Message]:
        async for event in self._read(messages=True):
            if event.context_ref is not None:
                yield Message(self._hf, event, event.context_ref)

    def events(self) -> AsyncIterator[Event]:
        """Yields all events of the session in order, those without a context too; receipts are left out."""
        return self._read()

    async def refs(self) -> list[Ref]:
        """Returns the references of all messages in order; one that was said twice is there twice."""
        events = self._read(messages=True, data=False)
        return [event.context_ref async for event in events if event.context_ref is not None]

    async def find(self, event_id: str) -> Event | None:
        """Returns an event of the session, or of the part that it shares with others; None when it is not in it."""
        async for event in self._read(event_id=event_id):
            return event
        return None

    async def messages(self) -> list[Message]:
        """Returns all messages with their contexts resolved, in batches.

        Raises NotFoundError for a context that is stored nowhere: read lazily, the others can be had.
        """
        messages = [message async for message in self]
        for start in range(0, len(messages), _BATCH):
            batch = messages[start : start + _BATCH]
            found = (await self._hf.resolve_many([message.ref for message in batch])).found
            for message in batch:
                if message.ref in found:
                    # Not one for all that said the same: a context keeps the body that it has decoded, which its
                    # holder may change.
                    message.put_context(copy(found[message.ref]))
                else:
                    await message.context()  # says what is missing
        return messages

    async def count(self) -> int:
        """Returns the number of messages."""
        return int((await self._hf.call_resolver("conversation_count", {"session_id": self.session_id}))["messages"])

    async def forked_from(self) -> tuple[str, str] | None:
        """Returns the session that this one was forked from and the id of the event it was forked at, if it was."""
        fork = await _fork_of(self._hf, self.session_id)
        return None if fork is None else _origin(fork)

    async def _read(self, **asked: bool | str) -> AsyncIterator[Event]:
        request: dict[str, Any] = {"session_id": self.session_id, "limit": _PAGE, **asked}
        while True:
            page = await self._hf.call_resolver("conversation", request)
            for item in page["events"]:
                yield msgspec.convert(item, Event)
            # A page may be cut short by its size, so only an empty one is the end.
            if not page["events"]:
                return
            request["cursor"] = page["cursor"]

    def __repr__(self) -> str:
        return f"Conversation({self.session_id!r})"


class Conversations:
    """Opens and forks the conversations of one namespace."""

    def __init__(self, hf: Holdfast) -> None:
        self._hf = hf

    def open(self, session: str) -> Conversation:
        """Returns the conversation of a session, whether there is one yet or not; nothing is read."""
        return Conversation(self._hf, session)

    async def fork(self, session: str, *, at: Event | str, name: str | None = None) -> Conversation:
        """Forks a session at an event: the new one shares everything before it and the event itself, and no more.

        ``at`` is an event of the session, or of what that was forked from.  ``name`` names the new session; None makes
        a name.  Nothing is copied: one event is stored, a child of ``at``; the same fork to the same name only once,
        so what may run again gives a name.
        Raises NotFoundError when ``at`` is not in the session, InvalidFieldError when the name is that of another one.
        """
        wanted = (
            at.event_id if isinstance(at, Event) else normal_event_id(self._hf.namespace, check_id_text(at, "at"))[0]
        )
        found = await self.open(session).find(wanted)
        if found is None:
            raise NotFoundError(
                f"event {wanted} is not in session {session!r}",
                field="at",
                hint="give an event that hf.conversation(session) shows",
            )
        target = self.open(str(uuid.uuid4()) if name is None else name)
        if name is not None and await self._is_there(target, session, wanted):
            return target
        await self._hf.emit(FORKED, {"from": session, "at": wanted}, parent=found, session=target.session_id)
        # Two may fork to one name at once: the first that was stored is the one that counts.
        if name is not None and await target.forked_from() != (session, wanted):
            raise _taken(name)
        return target

    async def _is_there(self, target: Conversation, session: str, at: str) -> bool:
        """Whether the fork has been made already; raises InvalidFieldError when another session has its name."""
        if await target.forked_from() == (session, at):
            return True
        async for _ in self._hf.query(session=target.session_id, limit=1):
            raise _taken(target.session_id)
        return False


class ContextInSummary(TypedDict):
    """One context of a conversation: its reference, and the lineage of the event that carries it."""

    ref: Ref
    context: dict[str, Any]


class ConversationSummary(TypedDict):
    """What an agent's newest conversation holds."""

    agent_id: str
    session_id: str | None
    status: Literal["active_session", "no_active_session"]
    conversation_started: Ref | None
    context_chain_length: int
    contexts: list[ContextInSummary]


class ConversationTracker:
    """Adds contexts to sessions, and tells what is in them.  Nothing is kept in memory: any process sees the same."""

    def __init__(self, hf: Holdfast) -> None:
        self._hf = hf

    async def add_context_to_session(self, session_id: str, context_ref: str, *, agent: str | None = None) -> Event:
        """Adds a context to the end of a session, durably, and returns the event that says so.

        ``agent`` is whose conversation it is; None: as of :meth:`Holdfast.emit`.  Adding it again adds it again.
        Raises InvalidRefError for what is no reference.
        """
        parse_ref(context_ref)
        check_id_text(session_id, "session_id")
        return await self._hf.emit(CONTEXT_ADDED, context=context_ref, session=session_id, agent=agent)

    async def get_session_context_chain(self, session_id: str) -> list[Ref]:
        """Returns the references of a session in order, hot and cold, of a fork with what came before; [] for none."""
        return await Conversation(self._hf, session_id).refs()

    async def get_agent_conversation_summary(
        self,
        agent_id: str,
        *,
        include_fields: Collection[str] | None = None,
        limit: int | None = SUMMARY_CONTEXTS,
    ) -> ConversationSummary:
        """Returns what the newest conversation of an agent holds: that of its newest event with a session.

        Each context is told by the lineage of the event that carries it, under the names with an underscore, with
        ``session_id`` and ``agent_id``, and attributes under their own.  ``include_fields`` chooses among these
        members (``event_id`` and ``_event_id`` are the same); ``"body"`` among them adds the resolved body, which is
        None when it is stored no more.  ``limit``: most contexts, the newest, in order; None for all.
        ``context_chain_length`` counts all.
        """
        check_agent(agent_id)
        if limit is not None and limit < 0:
            raise InvalidFieldError(f"limit {limit} is below 0", field="limit", hint="leave it out, or None for all")
        answer = await self._hf.call_resolver("newest_session", {"agent_id": agent_id})
        session_id = answer["session_id"]
        if session_id is None:
            return ConversationSummary(
                agent_id=agent_id,
                session_id=None,
                status="no_active_session",
                conversation_started=None,
                context_chain_length=0,
                contexts=[],
            )
        started, length = None, 0
        newest: deque[Message] = deque(maxlen=limit)
        async for message in Conversation(self._hf, session_id):
            started, length = started or message.ref, length + 1
            newest.append(message)
        shown = list(newest)
        chosen = None if include_fields is None else _field_names(include_fields)
        bodies = await self._bodies(shown) if chosen is not None and "body" in chosen else None
        return ConversationSummary(
            agent_id=agent_id,
            session_id=session_id,
            status="active_session",
            conversation_started=started,
            context_chain_length=length,
            contexts=[ContextInSummary(ref=message.ref, context=_told(message, chosen, bodies)) for message in shown],
        )

    async def _bodies(self, messages: list[Message]) -> Mapping[Ref, Context]:
        refs = list(dict.fromkeys(message.ref for message in messages))
        found: dict[Ref, Context] = {}
        for start in range(0, len(refs), _BATCH):
            found |= (await self._hf.resolve_many(refs[start : start + _BATCH])).found
        return found


def _told(message: Message, chosen: frozenset[str] | None, bodies: Mapping[Ref, Context] | None) -> dict[str, Any]:
    event = message.event
    told = with_underscores(of_event(event))
    told["agent_id"] = event.agent_id
    if event.session_id is not None:
        told["session_id"] = event.session_id
    if chosen is not None:
        told = {name: value for name, value in told.items() if name in chosen}
    if bodies is not None:
        context = bodies.get(message.ref)
        told["body"] = None if context is None else context.decode()
    return told


def _field_names(fields: Collection[str]) -> frozenset[str]:
    if isinstance(fields, str):
        raise InvalidFieldError("include_fields is one text", field="include_fields", hint="give a list of names")
    names = set(fields)
    for alias, name in ALIASES.items():
        # The two members that are told under both names stand each for itself.
        if name in fields and name not in ("agent_id", "session_id"):
            names.add(alias)
    return frozenset(names)


async def _fork_of(hf: Holdfast, session_id: str) -> Event | None:
    """The event that forked a session from another one: the first, whatever is said later."""
    async for event in hf.query(session=session_id, name=FORKED, limit=1):
        return event
    return None


def _origin(fork: Event) -> tuple[str, str] | None:
    said: object = fork.data
    if isinstance(said, dict):
        data = cast("dict[str, object]", said)
        session, at = data.get("from"), data.get("at")
        if isinstance(session, str) and isinstance(at, str) and 0 < len(session) <= limits.ID_CHARS:
            return session, at
    return None


def _role_in(value: object) -> str | None:
    role = cast("dict[str, object]", value).get("role") if isinstance(value, dict) else None
    return role if isinstance(role, str) else None


def _taken(name: str) -> InvalidFieldError:
    return InvalidFieldError(
        f"session {name!r} is there already", field="name", hint="choose another name, or leave it out"
    )


__all__ = [
    "CONTEXT_ADDED",
    "FORKED",
    "Conversation",
    "ConversationSummary",
    "ConversationTracker",
    "Conversations",
    "Message",
]
