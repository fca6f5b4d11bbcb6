"""The resolver's endpoints for filling the hot tier from the lake, and for telling what the lake holds.

Both only list: what is to be stored is fetched as it is stored (``fetch``), by whoever asked, so that the resolver
holds no bodies for it, and a slow reader is nobody else's business.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta

from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.ids import MAX_MS, is_canonical_uuid, now_ms
from holdfast.schemas.names import CHUNK_KIND, check_kind
from holdfast.streams.service import Call, Handler, decode_request
from holdfast.workers.requests import time_ms

if TYPE_CHECKING:
    from holdfast.lake.duck import Connection as LakeConnection
    from holdfast.lake.index import LakeIndex
    from holdfast.lake.lake import Lake
    from holdfast.workers.sql_runner import SqlRunner


class RecentRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for the archived contexts that were stored at or after a time, newest first."""

    since: str | int
    kind: str | None = None
    limit: Annotated[int, Meta(ge=1, le=limits.QUERY_LIMIT_MAX)] = limits.QUERY_LIMIT_MAX
    cursor: Annotated[str, Meta(max_length=1_000)] | None = None


class HeldRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks which of these events, and versions of keys, the lake holds."""

    events: Annotated[list[str], Meta(max_length=limits.BATCH_REFS)] = []
    versions: Annotated[list[tuple[str, int]], Meta(max_length=limits.BATCH_REFS)] = []


class _Place(msgspec.Struct, frozen=True, array_like=True):
    stored_at_ms: Annotated[int, Meta(ge=0, le=MAX_MS)]
    epoch: str
    seq: Annotated[int, Meta(ge=0, le=2**63 - 1)]


_RECENT: Final = msgspec.json.Decoder(RecentRequest)
_HELD: Final = msgspec.json.Decoder(HeldRequest)
_PLACE: Final = msgspec.json.Decoder(_Place)
_LARGEST: Final = 2**63 - 1

# Only what stands for a context, not its parts: a touch says that one was stored again.
_SELECT: Final = """
SELECT ref, size, epoch_ms(stored_at), epoch, stream_seq FROM contexts_stored
WHERE namespace = ? AND kind <> ? AND form IN ('plain', 'manifest', 'touch') AND stored_at >= make_timestamp_ms(?)
    AND (expires_at IS NULL OR expires_at > make_timestamp_ms(?))
"""


class WarmEndpoints:
    """Lists what the lake holds.  ``sql`` runs what it is given, one at a time."""

    def __init__(self, lake: Lake, index: LakeIndex, sql: SqlRunner) -> None:
        self._lake = lake
        self._index = index
        self._sql = sql

    def endpoints(self) -> dict[str, tuple[str, Handler]]:
        """Returns every endpoint: name → (subject, handler)."""
        handlers: dict[str, Handler] = {"recent": self.recent, "held": self.held}
        return {name: (f"ctx.*.{name}", handler) for name, handler in handlers.items()}

    async def recent(self, call: Call) -> None:
        """``{"since", "kind"?, "limit"?, "cursor"?}`` → ``{"contexts": [{"ref", "size", "stored_at_ms"}], "cursor"}``.

        Of what is archived and has not expired, newest first; a context that was stored several times may come several
        times.  ``cursor`` goes on after the last one; null at the end.
        """
        request: RecentRequest = decode_request(call.data, _RECENT)
        since_ms = time_ms(request.since, "since")
        if not 0 <= since_ms <= MAX_MS:
            raise InvalidFieldError(f"since {since_ms} is not from 1970 to 9999, in milliseconds", field="since")
        values: list[object] = [call.namespace, CHUNK_KIND, since_ms, now_ms()]
        statement = _SELECT
        if request.kind is not None:
            statement += "    AND kind = ?\n"
            values.append(check_kind(request.kind))
        if request.cursor is not None:
            place = _decode_cursor(request.cursor)
            # The first condition says less than the second, but can be pushed into the files.
            statement += "    AND stored_at <= make_timestamp_ms(?)\n"
            statement += "    AND (epoch_ms(stored_at), epoch, stream_seq) < (?, ?, ?)\n"
            values += [place.stored_at_ms, place.stored_at_ms, place.epoch, place.seq]
        statement += "ORDER BY epoch_ms(stored_at) DESC, epoch DESC, stream_seq DESC LIMIT ?"
        values.append(request.limit)

        def find(sql: LakeConnection) -> list[tuple[Any, ...]]:
            rows: list[tuple[Any, ...]] = sql.execute(statement, values).fetchall()
            return rows

        rows = await self._sql.run(find)
        contexts = [{"ref": ref, "size": size, "stored_at_ms": at_ms} for ref, size, at_ms, _, _ in rows]
        # A page that is not full is the last one.
        cursor = _encode_cursor(_Place(*rows[-1][2:])) if len(rows) == request.limit else None
        await call.reply(msgspec.json.encode({"contexts": contexts, "cursor": cursor}))

    async def held(self, call: Call) -> None:
        """``{"events": [id], "versions": [[key, version]]}`` → the same members with those that the lake holds.

        Before anything is left out, the newest version of the lake has been read; while a damaged file may hold what
        is not found, the answer is DamagedError.
        """
        request: HeldRequest = decode_request(call.data, _HELD)
        namespace = call.namespace
        for event_id in request.events:
            if not is_canonical_uuid(event_id):
                raise InvalidFieldError(
                    f"{event_id[:60]!r} is not the id of an event",
                    field="events",
                    hint="give the ids that emit returned",
                )
        events = [(namespace, event_id) for event_id in request.events]
        versions = [(namespace, key, number) for key, number in request.versions if 1 <= number <= _LARGEST]

        def find(_: LakeConnection) -> dict[str, object]:
            held = self._index.require(self._lake, "events", events)
            numbered = self._index.require(self._lake, "key_versions", versions)
            return {
                "events": [event_id for _, event_id in held],
                "versions": [[key, number] for _, key, number in numbered],
            }

        await call.reply(msgspec.json.encode(await self._sql.run(find)))


def _encode_cursor(place: _Place) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode().rstrip("=")


def _decode_cursor(cursor: str) -> _Place:
    try:
        return _PLACE.decode(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    except (ValueError, msgspec.DecodeError) as error:
        raise InvalidFieldError(
            f"cursor {cursor[:80]!r} is not one of ours", field="cursor", hint="pass the cursor of the page before"
        ) from error
