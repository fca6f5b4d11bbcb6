"""Calls to the active archiver (flush, evict, trim, status) and to a janitor (cleanup).

Request-reply, so that they work from any machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta

from holdfast.client.cold import error_of
from holdfast.schemas.errors import UnavailableError, UnknownOutcomeError
from holdfast.schemas.problems import Problem
from holdfast.schemas.rows import Table
from holdfast.streams.service import ErrorReply
from holdfast.streams.wire import H_SERVICE_ERROR

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection
    from holdfast.workers.settings import WorkerName

FLUSH_SUBJECT: Final = "hf.archiver.flush"
EVICT_SUBJECT: Final = "hf.archiver.evict"
STATUS_SUBJECT: Final = "hf.archiver.status"
ACCEPT_GAP_SUBJECT: Final = "hf.archiver.accept_gap"
COMPACT_SUBJECT: Final = "hf.compactor.compact"
TRIM_SUBJECT: Final = "hf.archiver.trim"
CLEANUP_SUBJECT: Final = "hf.janitor.cleanup"

STATUS_S: Final = 2.0
FLUSH_S: Final = 600.0


class Empty(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request without members."""


class EvictRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Purge from the hot tier what is archived and older than this."""

    older_than_s: float


class AcceptGapRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Record that the messages missing at the archiver's position in this table's stream are lost, and go on."""

    table: Table


class TrimRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Trim every named context to its newest versions; None: as the policies and the hot window say."""

    most_versions: Annotated[int, Meta(ge=1, le=1_000_000_000)] | None = None


class FlushReport(msgspec.Struct, frozen=True):
    """Everything acknowledged before the call is in the lake.  ``rows`` archived during the call, by table."""

    rows: dict[Table, int]
    watermarks: dict[Table, int]
    seconds: float


class EvictReport(msgspec.Struct, frozen=True):
    """Messages that left the hot tier, and those that stay (not archived yet, or too young)."""

    purged: int
    left: int


class TrimReport(msgspec.Struct, frozen=True):
    """Named contexts that were trimmed, revisions that left the hot tier, and revisions of all keys that stay."""

    keys: int
    revisions: int
    left: int


class CleanupReport(msgspec.Struct, frozen=True):
    """Named contexts that were expired during the call."""

    expired: int


class TableStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Where archiving of one stream stands.  ``lag`` counts messages above the watermark."""

    epoch: str
    watermark: int
    last_seq: int
    lag: int


class ArchiverStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the active archiver says of itself.  ``archive_interval_s``: how long a message may wait for it."""

    tables: dict[Table, TableStatus]
    problems: list[Problem]
    counters: dict[str, int]
    archive_interval_s: float = 0.0


_ERROR: Final = msgspec.json.Decoder(ErrorReply)


async def flush(connection: Connection, *, timeout_s: float = FLUSH_S) -> FlushReport:
    """Archives everything acknowledged so far and returns when it is fsynced in the lake."""
    return msgspec.convert(await _call(connection, FLUSH_SUBJECT, Empty(), timeout_s), FlushReport)


async def evict(connection: Connection, older_than_s: float, *, timeout_s: float = FLUSH_S) -> EvictReport:
    """Purges from the hot tier what is archived and older than ``older_than_s`` seconds."""
    return msgspec.convert(await _call(connection, EVICT_SUBJECT, EvictRequest(older_than_s), timeout_s), EvictReport)


async def trim(connection: Connection, most_versions: int | None = None, *, timeout_s: float = FLUSH_S) -> TrimReport:
    """Archives the versions of named contexts, then trims each context in the hot tier to its newest ``most_versions``.

    Without a number, by its policy and the hot window.  What is younger than 10 minutes stays, and the lake keeps every
    version.
    """
    return msgspec.convert(await _call(connection, TRIM_SUBJECT, TrimRequest(most_versions), timeout_s), TrimReport)


async def cleanup(connection: Connection, *, timeout_s: float = FLUSH_S) -> CleanupReport:
    """Has a janitor expire the named contexts that are due, now; raises UnavailableError when none runs."""
    return msgspec.convert(
        await _call(connection, CLEANUP_SUBJECT, Empty(), timeout_s, worker="janitor"), CleanupReport
    )


async def archiver_status(connection: Connection, *, timeout_s: float = STATUS_S) -> ArchiverStatus:
    """Returns the active archiver's status; raises UnavailableError when none runs."""
    return msgspec.convert(await _call(connection, STATUS_SUBJECT, Empty(), timeout_s), ArchiverStatus)


async def accept_gap(connection: Connection, table: Table, *, timeout_s: float = FLUSH_S) -> dict[str, Any]:
    """Has the archiver record the gap it stands before as lost; and its alarms as seen.

    Returns ``{"table", "from", "to", "alarms"}``: what was given up, null when nothing was missing, and how many
    alarms were ended.
    """
    return await _call(connection, ACCEPT_GAP_SUBJECT, AcceptGapRequest(table), timeout_s)


async def _call(
    connection: Connection, subject: str, request: object, timeout_s: float, *, worker: WorkerName = "archiver"
) -> dict[str, Any]:
    try:
        reply = await connection.lean.request(subject, msgspec.json.encode(request), timeout_s=timeout_s)
    except UnavailableError as error:
        raise UnavailableError(
            f"no {worker} answers on this server",
            hint=f"start one with 'holdfast up' or 'holdfast worker {worker}'",
        ) from error
    except UnknownOutcomeError as error:
        raise UnknownOutcomeError(
            f"the {worker} has not answered within {timeout_s:g} s",
            hint=f"see whether its process is stopped, hangs or is far behind, and its log; when it has ended, "
            f"'holdfast up' or 'holdfast worker {worker}' starts another",
        ) from error
    if reply.headers and H_SERVICE_ERROR in reply.headers:
        raise error_of(_ERROR.decode(reply.data).error)
    return msgspec.json.decode(reply.data, type=dict[str, Any])
