"""The resolver's endpoints for lineage: ``chain``, ``tree`` and ``descendants`` of an event, hot and cold as one."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from holdfast.lake import lineage
from holdfast.schemas.errors import NotFoundError
from holdfast.streams.service import Call, Handler, decode_request
from holdfast.workers.requests import (
    EVENT_FIELDS,
    ChainRequest,
    EventsReply,
    TreeRequest,
    check_fields,
    event_id_of,
    needs_json,
)

if TYPE_CHECKING:
    from holdfast.lake.duck import Connection as LakeConnection
    from holdfast.lake.lineage import ChainPage, TreePage
    from holdfast.workers.interning import InlineContexts
    from holdfast.workers.sql_runner import SqlRunner

_CHAIN: Final = msgspec.json.Decoder(ChainRequest)
_TREE: Final = msgspec.json.Decoder(TreeRequest)


class LineageEndpoints:
    """Answers from the views over hot and cold.

    Every event acknowledged before a call is seen, and every reference in an answer resolves.  An event that is not
    stored is refused with ``not_found``; its id may be a producer's own.
    """

    def __init__(self, sql: SqlRunner, inline: InlineContexts) -> None:
        self._sql = sql
        self._inline = inline

    def endpoints(self) -> dict[str, tuple[str, Handler]]:
        """Returns every endpoint: name → (subject, handler)."""
        handlers: dict[str, Handler] = {"chain": self.chain, "tree": self.tree, "descendants": self.descendants}
        return {name: (f"ctx.*.{name}", handler) for name, handler in handlers.items()}

    async def chain(self, call: Call) -> None:
        """``{"event_id"}`` → ``{"events": [first ancestor … event], "complete", "cursor"}``.

        ``complete`` is false when the first one has a parent that is not stored, or that is one of its descendants.
        ``cursor`` goes on after the last one, with the same request; null when that is the event itself.
        """
        request: ChainRequest = decode_request(call.data, _CHAIN)
        check_fields(request.fields, EVENT_FIELDS)
        event_id = event_id_of(call.namespace, request.event_id)

        def find(lake: LakeConnection) -> ChainPage:
            return lineage.chain(
                lake,
                call.namespace,
                event_id,
                limit=request.limit,
                cursor=request.cursor,
                json=needs_json(request.fields),
            )

        with _by_its_given_name(call.namespace, request.event_id):
            page = await self._sql.run(find)
        events, cursor = await self._reply(page, request.fields)
        await call.reply(msgspec.json.encode({"events": events, "complete": page.complete, "cursor": cursor}))

    async def tree(self, call: Call) -> None:
        """``{"event_id"}`` → ``{"events": [pre-order], "cursor"}``; ``cursor`` goes on, null at the end of the tree."""
        await self._below(call, lineage.tree)

    async def descendants(self, call: Call) -> None:
        """The same as ``tree`` without the event itself."""
        await self._below(call, lineage.descendants)

    async def _below(self, call: Call, find: lineage.FindBelow) -> None:
        request: TreeRequest = decode_request(call.data, _TREE)
        check_fields(request.fields, EVENT_FIELDS)
        event_id = event_id_of(call.namespace, request.event_id)
        with _by_its_given_name(call.namespace, request.event_id):
            page = await self._sql.run(
                lambda lake: find(
                    lake,
                    call.namespace,
                    event_id,
                    limit=request.limit,
                    cursor=request.cursor,
                    receipts=request.receipts,
                    json=needs_json(request.fields),
                )
            )
        events, cursor = await self._reply(page, request.fields)
        await call.reply(msgspec.json.encode({"events": events, "cursor": cursor}))

    async def _reply(
        self, page: ChainPage | TreePage, fields: list[str] | None
    ) -> tuple[list[msgspec.Raw], str | None]:
        await self._inline.intern_ahead(page.events)
        reply = EventsReply(page.events, fields)
        # A shorter page than asked for goes on from its own end.
        cursor = page.cursor if reply.is_whole or reply.last is None else reply.last.id
        return reply.items, cursor


@contextmanager
def _by_its_given_name(namespace: str, given: str) -> Generator[None]:
    # The id that is derived from a producer's own says nothing to whoever asked.
    try:
        yield
    except NotFoundError as error:
        raise NotFoundError(
            f"no event {given} in namespace {namespace!r}", field=error.field, hint=error.hint
        ) from error
