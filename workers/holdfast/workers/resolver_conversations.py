"""The resolver's endpoints for conversations: sessions with what they were forked from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from holdfast.lake.conversations import conversation_page, count_messages, newest_session
from holdfast.lake.receipts import first_of
from holdfast.schemas import limits
from holdfast.streams.service import Call, Handler, decode_request
from holdfast.workers.requests import event_id_of
from holdfast.workers.resolver_receipts import fitting

if TYPE_CHECKING:
    from holdfast.workers.interning import InlineContexts
    from holdfast.workers.sql_runner import SqlRunner

_Id = Annotated[str, Meta(min_length=1, max_length=limits.ID_CHARS)]


class ConversationRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for the events of a session, of a fork with what came before.

    ``messages``: only those that carry a context.  ``event_id``: only that one, if it is among them.  ``data`` false
    leaves out ``data`` and ``extra``.
    """

    session_id: _Id
    messages: bool = False
    data: bool = True
    event_id: _Id | None = None
    limit: Annotated[int, Meta(ge=1, le=limits.QUERY_LIMIT_MAX)] = limits.QUERY_LIMIT_DEFAULT
    cursor: Annotated[str, Meta(max_length=1_000)] | None = None


class CountRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for the number of messages of a session."""

    session_id: _Id


class NewestSessionRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for the session of an agent's newest event."""

    agent_id: Annotated[str, Meta(min_length=1, max_length=limits.NAME_BYTES)]


_CONVERSATION: Final = msgspec.json.Decoder(ConversationRequest)
_COUNT: Final = msgspec.json.Decoder(CountRequest)
_NEWEST_SESSION: Final = msgspec.json.Decoder(NewestSessionRequest)


class ConversationEndpoints:
    """Reads sessions from the views over hot and cold."""

    def __init__(self, sql: SqlRunner, inline: InlineContexts) -> None:
        self._sql = sql
        self._inline = inline

    def endpoints(self) -> dict[str, tuple[str, Handler]]:
        """Returns every endpoint: name → (subject, handler)."""
        handlers: dict[str, Handler] = {
            "conversation": self.conversation,
            "conversation_count": self.conversation_count,
            "newest_session": self.newest_session,
        }
        return {name: (f"ctx.*.{name}", handler) for name, handler in handlers.items()}

    async def conversation(self, call: Call) -> None:
        """``{"session_id"}`` → ``{"events": […], "cursor"}``, oldest first; every reference in it resolves.

        ``cursor`` goes on after the last event; null when there was none.
        """
        request: ConversationRequest = decode_request(call.data, _CONVERSATION)
        event_id = None if request.event_id is None else event_id_of(call.namespace, request.event_id)
        page = await self._sql.run(
            lambda sql: conversation_page(
                sql,
                call.namespace,
                request.session_id,
                messages=request.messages,
                json=request.data,
                event_id=event_id,
                limit=request.limit,
                cursor=request.cursor,
            )
        )
        encoded, _ = fitting(page.events, 0, at_least=1)
        if encoded:
            page = first_of(page, len(encoded))
        await self._inline.intern_ahead(page.events)
        await call.reply(msgspec.json.encode({"events": encoded, "cursor": page.cursor}))

    async def conversation_count(self, call: Call) -> None:
        """``{"session_id"}`` → ``{"messages"}``: how many events carry a context, of a fork with what came before."""
        request: CountRequest = decode_request(call.data, _COUNT)
        count = await self._sql.run(lambda sql: count_messages(sql, call.namespace, request.session_id))
        await call.reply(msgspec.json.encode({"messages": count}))

    async def newest_session(self, call: Call) -> None:
        """``{"agent_id"}`` → ``{"session_id", "event_id"}`` of its newest event with a session; nulls without one."""
        request: NewestSessionRequest = decode_request(call.data, _NEWEST_SESSION)
        newest = await self._sql.run(lambda sql: newest_session(sql, call.namespace, request.agent_id))
        await call.reply(msgspec.json.encode(newest))
