"""The resolver's endpoint for receipts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from holdfast.lake.receipts import (
    Role,
    events_of_ids,
    first_of,
    receipts_of_event,
    receipts_of_ref,
)
from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.lineage import RECEIPT
from holdfast.schemas.refs import parse_ref
from holdfast.streams.service import Call, Handler, decode_request
from holdfast.workers.requests import event_id_of, event_reply

if TYPE_CHECKING:
    from holdfast.lake.duck import Connection as LakeConnection
    from holdfast.lake.scan import EventPage
    from holdfast.schemas.rows import EventRow
    from holdfast.workers.interning import InlineContexts
    from holdfast.workers.sql_runner import SqlRunner


class ReceiptsRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for receipts: of what was done with a context, or in working on an event; exactly one of the two."""

    ref: str | None = None
    event_id: Annotated[str, Meta(min_length=1, max_length=limits.ID_CHARS)] | None = None
    role: Role | None = None
    limit: Annotated[int, Meta(ge=1, le=limits.QUERY_LIMIT_MAX)] = limits.QUERY_LIMIT_DEFAULT
    cursor: Annotated[str, Meta(max_length=1_000)] | None = None


_RECEIPTS: Final = msgspec.json.Decoder(ReceiptsRequest)


class ReceiptEndpoints:
    """Tells what was read and made in working on events, by the views over hot and cold."""

    def __init__(self, sql: SqlRunner, inline: InlineContexts) -> None:
        self._sql = sql
        self._inline = inline

    def endpoints(self) -> dict[str, tuple[str, Handler]]:
        """Returns every endpoint: name → (subject, handler)."""
        return {"receipts": ("ctx.*.receipts", self.receipts)}

    async def receipts(self, call: Call) -> None:
        """``{"ref"}`` or ``{"event_id"}`` → ``{"events": […], "worked_on": […], "left_out": [id], "cursor"}``.

        ``events`` are receipts, oldest first; of a ref, unless with ``"role": "read"``, also the events that carry it
        as their context.  ``worked_on`` are the events that the receipts of a ref are of; ``left_out`` names those that
        the answer has no room for.  ``cursor`` goes on after the last event; null when there was none.
        """
        request: ReceiptsRequest = decode_request(call.data, _RECEIPTS)
        namespace, ref = call.namespace, request.ref
        if (ref is None) == (request.event_id is None):
            raise InvalidFieldError(
                "receipts are asked for by ref or by event_id, exactly one",
                field="ref",
                hint='such as {"ref": "ctx_…"}',
            )
        if ref is not None:
            parse_ref(ref)
        elif request.role is not None:
            raise InvalidFieldError("role goes with ref alone", field="role", hint="leave it out")

        def find(sql: LakeConnection) -> tuple[EventPage, list[EventRow]]:
            if ref is None:
                event_id = event_id_of(namespace, request.event_id or "")
                page = receipts_of_event(sql, namespace, event_id, limit=request.limit, cursor=request.cursor)
                return page, []
            page = receipts_of_ref(sql, namespace, ref, role=request.role, limit=request.limit, cursor=request.cursor)
            above = {row.parent_event_id for row in page.events if row.name == RECEIPT and row.parent_event_id}
            return page, events_of_ids(sql, namespace, sorted(above)) if above else []

        page, worked_on = await self._sql.run(find)
        encoded, size = fitting(page.events, 0, at_least=1)
        # What the answer has no room for is asked for next time.
        page = first_of(page, len(encoded)) if page.events else page
        kept = {row.parent_event_id for row in page.events}
        worked_on = [row for row in worked_on if row.id in kept]
        beside, _ = fitting(worked_on, size, at_least=0)
        await self._inline.intern_ahead([*page.events, *worked_on])
        answer = {
            "events": encoded,
            "worked_on": beside,
            "left_out": [row.id for row in worked_on[len(beside) :]],
            "cursor": page.cursor,
        }
        await call.reply(msgspec.json.encode(answer))


def fitting(rows: list[EventRow], size: int, *, at_least: int) -> tuple[list[msgspec.Raw], int]:
    """Returns the first events that an answer of ``size`` bytes has room for, encoded, and its size then.

    ``at_least`` so many go in any case: an answer without progress would be asked for again for ever.
    """
    encoded: list[msgspec.Raw] = []
    for row in rows:
        raw = msgspec.json.encode(event_reply(row))
        if size + len(raw) + 1 > limits.REPLY_BYTES and len(encoded) >= at_least:
            break
        encoded.append(msgspec.Raw(raw))
        size += len(raw) + 1
    return encoded, size
