"""Versions of named contexts that have left the hot tier: asked of the resolver."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from holdfast.schemas.errors import NotFoundError, UnavailableError
from holdfast.schemas.ids import ms_from_utc
from holdfast.schemas.refs import Ref
from holdfast.schemas.rows import KeyVersionRow, Op

if TYPE_CHECKING:
    from holdfast.client.cold import ResolverClient

PAGE: Final = 200
"""Versions asked for at once."""


class ColdKeySource(Protocol):
    """Reads archived versions of one namespace's keys.  Rows come with the position at which they were archived."""

    async def last(self, key: str) -> KeyVersionRow | None:
        """Returns the newest archived version; None when there is none."""
        ...

    async def get(self, key: str, version: int) -> KeyVersionRow | None:
        """Returns one archived version; None when there is no such."""
        ...

    async def page(self, key: str, before: int | None, limit: int) -> list[KeyVersionRow]:
        """Returns archived versions below ``before`` (None: all), newest first, at most ``limit``.

        An answer may be shorter than that; only an empty one is the end.
        """
        ...

    async def as_of(self, key: str, at_ms: int) -> KeyVersionRow | None:
        """Returns the newest version that was archived and had been stored by a time; None when there is none."""
        ...


class VersionReply(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A version of a named context as the resolver tells it, without its body.  Times are ISO 8601 in UTC."""

    key: str
    version: int
    op: Op
    timestamp: datetime
    stored_at: datetime
    ref: str | None = None
    event_id: str | None = None
    tags: tuple[str, ...] = ()
    session_id: str | None = None
    agent_id: str | None = None
    changed_by: str | None = None
    change_type: str | None = None
    expires_at: datetime | None = None
    source: str | None = None
    confidence: float | None = None
    proposed_by: str | None = None
    approved_by: str | None = None
    approved_at: datetime | None = None
    epoch: str = ""
    seq: int = 0


class RemoteColdKeys:
    """Asks the resolver, which reads the lake.  Raises UnavailableError when none answers."""

    def __init__(self, resolver: ResolverClient, namespace: str) -> None:
        self._resolver = resolver
        self._namespace = namespace

    async def last(self, key: str) -> KeyVersionRow | None:
        """Returns the newest archived version; None when there is none."""
        rows = await self.page(key, None, 1)
        return rows[0] if rows else None

    async def get(self, key: str, version: int) -> KeyVersionRow | None:
        """Returns one archived version; None when there is no such."""
        return await self._get({"key": key, "version": version})

    async def page(self, key: str, before: int | None, limit: int) -> list[KeyVersionRow]:
        """Returns archived versions below ``before``, newest first."""
        request: dict[str, Any] = {"key": key, "limit": min(limit, PAGE), "cold": True}
        if before is not None:
            request["before"] = before
        answer = await self._resolver.call("key.history", request)
        return [self._row(item) for item in answer["versions"]]

    async def as_of(self, key: str, at_ms: int) -> KeyVersionRow | None:
        """Returns the newest version that was archived and had been stored by a time; None when there is none."""
        return await self._get({"key": key, "as_of": at_ms})

    async def _get(self, request: dict[str, Any]) -> KeyVersionRow | None:
        try:
            answer = await self._resolver.call("key.get", request | {"body": False, "cold": True})
        except NotFoundError:
            return None
        return self._row(answer)

    def _row(self, item: object) -> KeyVersionRow:
        try:
            reply = msgspec.convert(item, VersionReply)
        except msgspec.ValidationError as error:
            raise UnavailableError(
                f"the resolver's answer is no version of a key: {error}",
                hint="does another service answer on this subject? see 'nats micro ls'",
            ) from error
        return row_of(self._namespace, reply)


def row_of(namespace: str, reply: VersionReply) -> KeyVersionRow:
    """Returns the row that an answer tells of."""
    return KeyVersionRow(
        namespace=namespace,
        key=reply.key,
        version=reply.version,
        op=reply.op,
        timestamp_ms=ms_from_utc(reply.timestamp),
        stored_at_ms=ms_from_utc(reply.stored_at),
        epoch=reply.epoch,
        seq=reply.seq,
        ref=None if reply.ref is None else Ref(reply.ref),
        event_id=reply.event_id,
        changed_by=reply.changed_by,
        change_type=reply.change_type,
        tags=reply.tags,
        session_id=reply.session_id,
        agent_id=reply.agent_id,
        expires_at_ms=None if reply.expires_at is None else ms_from_utc(reply.expires_at),
        source=reply.source,
        confidence=reply.confidence,
        proposed_by=reply.proposed_by,
        approved_by=reply.approved_by,
        approved_at_ms=None if reply.approved_at is None else ms_from_utc(reply.approved_at),
    )
