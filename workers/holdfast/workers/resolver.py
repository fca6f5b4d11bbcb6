"""The resolver: request-reply for every context and event, hot or cold, as the NATS service ``holdfast``.

Requests and answers are JSON; an error is told by ``Nats-Service-Error-Code`` and ``{"error": {"code", "message",
"field", "limit", "hint"}}``.  Any number of resolvers may run: the server shares requests among them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client.cold import FetchEnd, FetchRequest
from holdfast.lake.duck import Connection as DuckConnection
from holdfast.lake.duck import connect
from holdfast.lake.scan import encode_cursor
from holdfast.schemas import limits
from holdfast.schemas.errors import TooLargeError
from holdfast.schemas.refs import Digest, is_digest
from holdfast.streams.codec import reseal
from holdfast.streams.retry import call_with_retry
from holdfast.streams.service import Call, EndpointCounters, ErrorBody, Handler, decode_request, serve
from holdfast.streams.tail import open_tail
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import H_CREATED, H_DIGEST, H_END, KEYS_STREAM
from holdfast.workers.contexts import ColdReader, ContextReader, Found
from holdfast.workers.exposition import CONTENT_TYPE, render_json, render_text
from holdfast.workers.health import collect_health
from holdfast.workers.interning import InlineContexts
from holdfast.workers.key_reader import ColdKeys
from holdfast.workers.metrics import collect_metrics
from holdfast.workers.opening import open_in_thread
from holdfast.workers.picture import Observer
from holdfast.workers.requests import (
    EVENT_FIELDS,
    EventsReply,
    MetricsRequest,
    PutRequest,
    QueryRequest,
    check_fields,
    context_of_put,
    query_of,
)
from holdfast.workers.resolver_contexts import WINDOW, ContextEndpoints
from holdfast.workers.resolver_conversations import ConversationEndpoints
from holdfast.workers.resolver_keys import KeyEndpoints
from holdfast.workers.resolver_lineage import LineageEndpoints
from holdfast.workers.resolver_receipts import ReceiptEndpoints
from holdfast.workers.resolver_snapshots import SnapshotEndpoints
from holdfast.workers.resolver_warm import WarmEndpoints
from holdfast.workers.settings import START_S
from holdfast.workers.sql_runner import SqlRunner
from holdfast.workers.state import collect_stats, count_live

if TYPE_CHECKING:
    from holdfast.lake.index import LakeIndex
    from holdfast.lake.lake import Lake
    from holdfast.streams.connection import Connection
    from holdfast.streams.hot import HotTier

logger = logging.getLogger(__name__)

SERVICE: Final = "holdfast"

_HEAVY: Final = 8
"""Answers with many bodies being read at once: bounds the memory of all of them, by the window."""

_PUT: Final = msgspec.json.Decoder(PutRequest)
_QUERY: Final = msgspec.json.Decoder(QueryRequest)
_FETCH: Final = msgspec.json.Decoder(FetchRequest)
_METRICS: Final = msgspec.json.Decoder(MetricsRequest)
_EMPTY: Final = msgspec.json.Decoder(dict[str, Any])


class Resolver:
    """The endpoints of the service.  Made by :func:`run_resolver`."""

    def __init__(
        self,
        connection: Connection,
        hot: HotTier,
        lake: Lake,
        cold: ColdReader,
        sql: SqlRunner,
        inline: InlineContexts,
        observer: Observer,
    ) -> None:
        self._observer = observer
        self._connection = connection
        self._hot = hot
        self._lake = lake
        self._cold = cold
        self._sql = sql
        self._inline = inline
        self._contexts = ContextReader(hot, cold)
        self._heavy = asyncio.Semaphore(_HEAVY)
        self.contexts = ContextEndpoints(self._contexts, self._heavy)

    def endpoints(self) -> dict[str, tuple[str, Handler]]:
        """Returns every endpoint: name → (subject, handler)."""
        handlers: dict[str, Handler] = {
            "put": self.put,
            "query": self.query,
            "stats": self.stats,
            "health": self.health,
            "metrics": self.metrics,
            "fetch": self.fetch,
        }
        return {name: (f"ctx.*.{name}", handler) for name, handler in handlers.items()} | self.contexts.endpoints()

    async def put(self, call: Call) -> None:
        """``{"kind", "body"}`` → ``{"ref"}``."""
        request: PutRequest = decode_request(call.data, _PUT)
        put = (await self._hot.put_many([context_of_put(call.namespace, request)]))[0]
        await call.reply(msgspec.json.encode({"ref": put.ref}))

    async def query(self, call: Call) -> None:
        """Conditions → ``{"events": […], "cursor"}``, oldest first, hot and cold.

        Every event acknowledged before the call is seen, and every reference in the answer resolves.  ``cursor`` goes
        on after the last event; null when there was none.
        """
        request: QueryRequest = decode_request(call.data, _QUERY)
        check_fields(request.fields, EVENT_FIELDS)
        page = await self._sql.run(query_of(call.namespace, request))
        await self._inline.intern_ahead(page.events)
        reply = EventsReply(page.events, request.fields)
        # A shorter page than asked for goes on from its own end.
        cursor = page.cursor if reply.last is None else encode_cursor(reply.last)
        await call.reply(msgspec.json.encode({"events": reply.items, "cursor": cursor}))

    async def stats(self, call: Call) -> None:
        """What each tier holds, and the watermarks between them."""
        _ = decode_request(call.data, _EMPTY)
        answer = await collect_stats(self._connection, self._lake, lambda: self._sql.run(count_live))
        await call.reply(msgspec.json.encode(answer))

    async def health(self, call: Call) -> None:
        """``{"ok", "problems": [{"invariant", "object", "what", "next_step"}], "lag"}``."""
        _ = decode_request(call.data, _EMPTY)
        await call.reply(msgspec.json.encode(await collect_health(self._observer)))

    async def metrics(self, call: Call) -> None:
        """``{"format"?: "json" | "prometheus"}`` → ``{"metrics": […]}``, or the text that Prometheus reads."""
        request: MetricsRequest = decode_request(call.data, _METRICS)
        found = await collect_metrics(self._observer)
        if request.format == "prometheus":
            await call.reply(render_text(found).encode(), {"Content-Type": CONTENT_TYPE})
        else:
            await call.reply(msgspec.json.encode({"metrics": render_json(found)}))

    async def fetch(self, call: Call) -> None:
        """``{"digests"}`` → a message for each stored form that was found, then one with ``Hf-End``.

        For the SDK: the messages are those of the hot tier, so a large body comes in its chunks.
        """
        request: FetchRequest = decode_request(call.data, _FETCH)
        if len(request.digests) > limits.BATCH_REFS:
            raise TooLargeError(f"fetch of {len(request.digests)} digests", field="digests", limit=limits.BATCH_REFS)
        # In the order of the lake, so that two windows seldom read the same row group.
        digests = await self._cold.in_reading_order([digest for digest in request.digests if is_digest(digest)])
        sent = 0
        failed: dict[Digest, ErrorBody] = {}
        for start in range(0, len(digests), WINDOW):
            window = digests[start : start + WINDOW]
            async with self._heavy:
                found, errors = await self._contexts.get_stored_many(call.namespace, window, cold=request.cold)
                # One thread call for all: each costs more than compressing a small body.
                sealed = await asyncio.to_thread(_reseal_all, list(found.values()))
                for (digest, item), (headers, payload) in zip(found.items(), sealed, strict=True):
                    await call.reply(payload, {**headers, H_DIGEST: digest, H_CREATED: str(item.row.stored_at_ms)})
            sent += len(found)
            failed |= {digest: ErrorBody.of(error) for digest, error in errors.items()}
        await call.reply(msgspec.json.encode(FetchEnd(sent=sent, failed=failed)), {H_END: "1"})


@asynccontextmanager
async def run_resolver(
    connection: Connection, hot: HotTier, lake: Lake, index: LakeIndex, *, drain_timeout_s: float
) -> AsyncGenerator[dict[str, EndpointCounters]]:
    """Answers requests while the block lasts; yields the counters of the endpoints.

    At the end no new request is taken; those under way are waited for.
    """
    async with AsyncExitStack() as stack:

        def open_picture() -> DuckConnection:
            # A tail of its own for each try: one that fails closes it.
            tail = open_tail(connection.target)
            try:
                return connect(lake.path, tail=tail, index=index, live=("events", "key_versions"))
            except BaseException:
                tail.close()
                raise

        # A cluster may be without a majority in this moment.
        picture = await call_with_retry(
            lambda: open_in_thread(stack, open_picture, DuckConnection.close), deadline_s=START_S
        )
        sql = SqlRunner(picture)
        stack.push_async_callback(sql.close)
        cold = ColdReader(lake, index)
        stack.push_async_callback(cold.close)
        inline = InlineContexts(connection, hot)
        observer = Observer(connection, lake)
        stack.push_async_callback(observer.close)
        resolver = Resolver(connection, hot, lake, cold, sql, inline, observer)
        cold_keys = ColdKeys(lake, index)
        stack.push_async_callback(cold_keys.close)
        info = await call_with_retry(lambda: stream_info(connection, KEYS_STREAM), deadline_s=START_S)
        keys = KeyEndpoints(connection, hot, ContextReader(hot, cold), cold_keys, replicas=info.replicas)
        stack.push_async_callback(keys.close)
        snapshots = SnapshotEndpoints(connection, ContextReader(hot, cold), sql, inline)
        stack.push_async_callback(snapshots.close)
        counters = await stack.enter_async_context(
            serve(
                connection,
                name=SERVICE,
                version="1.0.0",
                description="Resolves contexts, keeps named ones and queries events of Holdfast",
                endpoints=resolver.endpoints()
                | keys.endpoints()
                | LineageEndpoints(sql, inline).endpoints()
                | ReceiptEndpoints(sql, inline).endpoints()
                | ConversationEndpoints(sql, inline).endpoints()
                | snapshots.endpoints()
                | WarmEndpoints(lake, index, sql).endpoints(),
                at_hand=resolver.contexts.at_hand(),
                drain_timeout_s=drain_timeout_s,
            )
        )
        yield counters


def _reseal_all(items: list[Found]) -> list[tuple[dict[str, str], bytes]]:
    return [reseal(item.row) for item in items]
