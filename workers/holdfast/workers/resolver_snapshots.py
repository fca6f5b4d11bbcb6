"""The resolver's endpoints for snapshots: ``ctx.<ns>.orchestration.recover``, ``optimization.introspect`` and
``optimization.analyze_performance``, for any language.

They answer what ``hf.orchestrations`` and ``hf.optimizations`` of the SDK do, by the same decisions, with the lake at
hand.  The resolver has no keys of encryption: a sealed body is none that it can look into.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from holdfast.client.emitting import Named, place_event
from holdfast.client.encryption import SEALED
from holdfast.client.model import Event
from holdfast.client.optimization_records import (
    COMPLETED,
    FAILED,
    KIND,
    MAX_STATES,
    PAGE,
    StateReport,
    config_in,
    framework_in,
    introspection_members,
    performance_in,
    report_of,
    state_members,
    states_among,
    summarize,
)
from holdfast.client.optimization_records import Introspection as IntrospectionPage
from holdfast.client.optimizations import nothing_captured, too_many_states
from holdfast.client.orchestration_snapshots import (
    PREFIX,
    RECOVERED,
    check_snapshot_ref,
    event_data,
    snapshot_in,
)
from holdfast.lake.optimizations import Outcome, Runs, analyze, refs_of_runs, untold_refs
from holdfast.lake.scan import EventFilter, query_events
from holdfast.schemas import limits
from holdfast.schemas.bodies import decode_body
from holdfast.schemas.errors import EncryptionKeyError, HoldfastError, InvalidFieldError, NotFoundError, TooLargeError
from holdfast.schemas.ids import MAX_MS, now_ms
from holdfast.schemas.refs import Ref, parse_ref
from holdfast.streams.events import EventLog
from holdfast.streams.service import Call, Handler, decode_request
from holdfast.workers.requests import event_reply, time_ms

if TYPE_CHECKING:
    from holdfast.lake.duck import Connection as LakeConnection
    from holdfast.schemas.rows import EventRow
    from holdfast.streams.connection import Connection
    from holdfast.workers.contexts import ContextReader
    from holdfast.workers.interning import InlineContexts
    from holdfast.workers.sql_runner import SqlRunner

_HEAVY: Final = 4
"""Answers with many bodies being made at once."""

_WINDOW: Final = 16
"""Bodies held at once for one answer: of the largest that an answer may hold, 14 MiB."""

_FRAME_BYTES: Final = 8 * limits.KIB
"""What an answer has around its states."""

CONFIG_BYTES: Final = 256 * limits.KIB
"""Longest configuration, as JSON, that an analysis repeats; a longer one is to be read from its state."""

AGENT: Final = "resolver"
"""Who signs the event of a recovery when the caller does not say."""

_Id = Annotated[str, Meta(min_length=1, max_length=limits.ID_CHARS)]


class RecoverRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks to recover a snapshot; ``agent_id`` signs the event that tells of it."""

    context_ref: str
    agent_id: Annotated[str, Meta(min_length=1, max_length=limits.NAME_BYTES)] = AGENT


class IntrospectRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks for the states of an optimization, after the first ``after`` ones."""

    optimization_id: _Id
    after: Annotated[int, Meta(ge=0, le=MAX_STATES)] = 0
    limit: Annotated[int, Meta(ge=1, le=PAGE)] = PAGE


class AnalyzeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Asks how runs went; times are of a run's first state: ISO 8601 or milliseconds since 1970."""

    framework: _Id | None = None
    since: str | int | None = None
    until: str | int | None = None
    best: Literal["highest", "lowest"] = "highest"


_RECOVER: Final = msgspec.json.Decoder(RecoverRequest)
_INTROSPECT: Final = msgspec.json.Decoder(IntrospectRequest)
_ANALYZE: Final = msgspec.json.Decoder(AnalyzeRequest)


class SnapshotEndpoints:
    """The endpoints for snapshots of every namespace.  ``contexts``, ``sql`` and ``inline`` are the caller's."""

    def __init__(self, connection: Connection, contexts: ContextReader, sql: SqlRunner, inline: InlineContexts) -> None:
        self._contexts = contexts
        self._sql = sql
        self._inline = inline
        self._events = EventLog(connection)
        self._heavy = asyncio.Semaphore(_HEAVY)

    def endpoints(self) -> dict[str, tuple[str, Handler]]:
        """Returns every endpoint: name → (subject, handler)."""
        handlers: dict[str, Handler] = {
            "orchestration.recover": self.recover,
            "optimization.introspect": self.introspect,
            "optimization.analyze_performance": self.analyze_performance,
        }
        # The name of an endpoint has no dots; its subject does.
        return {name.replace(".", "_"): (f"ctx.*.{name}", handler) for name, handler in handlers.items()}

    async def close(self) -> None:
        """Waits until every event that was handed in has its outcome."""
        await self._events.close()

    async def recover(self, call: Call) -> None:
        """``{"context_ref"}`` → ``{"context_ref", "snapshot", "event_id", "captured_event_id"}``.

        ``event_id`` is the event ``orchestration:recovered``, a child of ``captured_event_id``: the newest event that
        captured the snapshot, null when there is none.  Every call is a recovery of its own.
        """
        request: RecoverRequest = decode_request(call.data, _RECOVER)
        ref = check_snapshot_ref(request.context_ref)
        bodies, failed = await self._bodies(call.namespace, [ref])
        if ref not in bodies:
            raise failed.get(ref) or _not_stored(ref, call.namespace)
        snapshot = snapshot_in(ref, bodies[ref])
        where = EventFilter(namespace=call.namespace, context_ref=ref, name=PREFIX + snapshot["state"])
        captured = _event_of((await self._rows(where))[-1:])
        placed = place_event(
            call.namespace,
            request.agent_id,
            PREFIX + RECOVERED,
            event_data(snapshot),
            Named(parent=captured, correlation_id=snapshot["orchestration_id"]),
            lineage=None,
            scope=None,
        )
        answer = {
            "context_ref": ref,
            "snapshot": snapshot,
            "event_id": placed.event.id,
            "captured_event_id": None if captured is None else captured.event_id,
        }
        # Before the event: what is not handed out was not recovered.
        encoded = _within(answer, "resolve the reference with the SDK, which fetches a large body in parts")
        await self._events.publish_many([msgspec.structs.replace(placed.event, context_ref=ref)])
        await call.reply(encoded)

    async def introspect(self, call: Call) -> None:
        """``{"optimization_id"}`` → ``{"status", "states": [{"state", "duration_s", "body", "diff", …}], "next"}``.

        The states are in the order they were stored.  The answer ends before 900 KB; ``next`` is then the ``after`` to
        go on with, and absent at the end.  A state that no answer has room for says ``"error": "too_large"``.
        """
        request: IntrospectRequest = decode_request(call.data, _INTROSPECT)
        where = EventFilter(namespace=call.namespace, correlation_id=request.optimization_id, kind=KIND)
        rows = await self._rows(where)
        if len(rows) > MAX_STATES:
            raise too_many_states(request.optimization_id)
        states = states_among([_event(row) for row in rows])
        if not states:
            raise nothing_captured(request.optimization_id, call.namespace)
        end = min(request.after + request.limit, len(states))
        wanted = {state.event_id for state in states[max(0, request.after - 1) : end]}
        await self._inline.intern_ahead([row for row in rows if row.id in wanted])
        encoded: list[msgspec.Raw] = []
        bodies: dict[Ref, Any] = {}
        size = _FRAME_BYTES
        position = request.after
        async with self._heavy:
            while position < end:
                window = range(position, min(position + _WINDOW, end))
                bodies, reports = await self._reports(call.namespace, states, window, bodies)
                taken = _fitting(reports, size, at_least=0 if encoded else 1)
                encoded += taken
                size += sum(len(bytes(item)) + 1 for item in taken)
                position += len(taken)
                if len(taken) < len(reports):
                    break
        found = IntrospectionPage(
            optimization_id=request.optimization_id,
            **msgspec.structs.asdict(summarize(states, bodies)),
            total=len(states),
            states=[],
            next=position if encoded and position < len(states) else None,
        )
        await call.reply(msgspec.json.encode({**introspection_members(found), "states": encoded}))

    async def analyze_performance(self, call: Call) -> None:
        """Conditions → ``{"frameworks": [{"framework", "runs", "seconds", "scores", "best", "states", …}], "unread"}``.

        Every state acknowledged before the call is taken into account, hot and cold.
        """
        request: AnalyzeRequest = decode_request(call.data, _ANALYZE)
        runs = Runs(
            namespace=call.namespace,
            framework=request.framework,
            since_ms=_moment(request.since, "since"),
            until_ms=_moment(request.until, "until"),
        )
        async with self._heavy:
            refs, unread = await self._sql.run(lambda lake: untold_refs(lake, call.namespace))
            outcomes = await self._outcomes(call.namespace, [Ref(ref) for ref in refs])
            frameworks = await self._sql.run(
                lambda lake: analyze(lake, runs, outcomes, completed=COMPLETED, failed=FAILED, best=request.best)
            )
            await self._add_configs(call.namespace, frameworks)
        answer = {"frameworks": frameworks, "unread": unread}
        await call.reply(_within(answer, "ask for one framework"))

    async def _rows(self, where: EventFilter) -> list[EventRow]:
        """The events that match, oldest first; of too many, the first ones up to over the limit."""

        def read(lake: LakeConnection) -> list[EventRow]:
            rows: list[EventRow] = []
            cursor: str | None = None
            with lake.pinned():
                while len(rows) <= MAX_STATES:
                    page = query_events(lake, where, limit=limits.QUERY_LIMIT_MAX, cursor=cursor)
                    rows += page.events
                    cursor = page.cursor
                    if len(page.events) < limits.QUERY_LIMIT_MAX:
                        break
            return rows

        return await self._sql.run(read)

    async def _reports(
        self, namespace: str, states: list[Event], window: range, known: dict[Ref, Any]
    ) -> tuple[dict[Ref, Any], list[StateReport]]:
        """The reports of some states, and their bodies; ``known`` are those of the window before."""
        refs = [_ref_of(states[position]) for position in range(max(0, window.start - 1), window.stop)]
        bodies, failed = await self._bodies(namespace, [ref for ref in dict.fromkeys(refs) if ref not in known])
        bodies |= {ref: known[ref] for ref in refs if ref in known}
        codes = {ref: error.code for ref, error in failed.items()}
        reports = await asyncio.to_thread(lambda: [report_of(states, position, bodies, codes) for position in window])
        return bodies, reports

    async def _outcomes(self, namespace: str, refs: Sequence[Ref]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for start in range(0, len(refs), _WINDOW):
            bodies, _ = await self._bodies(namespace, refs[start : start + _WINDOW])
            for ref, body in bodies.items():
                performance = performance_in(body)
                outcomes.append(Outcome(ref, framework_in(body), None if performance is None else performance["score"]))
        return outcomes

    async def _add_configs(self, namespace: str, frameworks: list[dict[str, Any]]) -> None:
        """Adds the configuration of each best run: that of its newest state that holds one."""
        best = [framework["best"] for framework in frameworks if framework["best"] is not None]
        run_ids = [run["optimization_id"] for run in best]
        refs = await self._sql.run(lambda lake: refs_of_runs(lake, namespace, run_ids))
        for run in best:
            run["config"] = await self._config(namespace, [Ref(ref) for ref in refs.get(run["optimization_id"], [])])

    async def _config(self, namespace: str, refs: Sequence[Ref]) -> dict[str, Any] | None:
        for start in range(0, len(refs), _WINDOW):
            window = refs[start : start + _WINDOW]
            bodies, _ = await self._bodies(namespace, window)
            for ref in window:
                config = config_in(bodies.get(ref))
                if config is not None:
                    return config if len(msgspec.json.encode(config)) <= CONFIG_BYTES else None
        return None

    async def _bodies(self, namespace: str, refs: Sequence[Ref]) -> tuple[dict[Ref, Any], dict[Ref, HoldfastError]]:
        """The bodies of references, decoded, and the error of each that cannot be had; the rest is stored nowhere."""
        digests = {ref: parse_ref(ref).digest for ref in refs}
        found, errors = await self._contexts.get_many(namespace, digests.values(), max_bytes=limits.REPLY_BYTES)
        failed = {ref: errors[digest] for ref, digest in digests.items() if digest in errors}
        bodies: dict[Ref, Any] = {}
        now = now_ms()
        for ref, digest in digests.items():
            row = found[digest].row if digest in found else None
            # The kind is under the digest too: a reference that names another kind names nothing.
            if row is None or row.ref != ref or (row.expires_at_ms is not None and row.expires_at_ms <= now):
                continue
            try:
                if row.content_type == SEALED:
                    raise EncryptionKeyError(f"{ref} is encrypted", hint="use the SDK, with the key ring at hand")
                bodies[ref] = decode_body(row.body, row.content_type)
            except HoldfastError as error:
                failed[ref] = error
        return bodies, failed


def _fitting(reports: Sequence[StateReport], size: int, *, at_least: int) -> list[msgspec.Raw]:
    """The first reports that an answer of so many bytes has room for, encoded; ``at_least`` so many go in any case."""
    encoded: list[msgspec.Raw] = []
    for report in reports:
        raw = msgspec.json.encode(state_members(report))
        if _FRAME_BYTES + len(raw) > limits.REPLY_BYTES:
            # No answer has room for it: what is left of it says so.
            without = msgspec.structs.replace(report, body=None, diff=None, error=TooLargeError.code)
            raw = msgspec.json.encode(state_members(without))
        size += len(raw) + 1
        if size > limits.REPLY_BYTES and len(encoded) >= at_least:
            break
        encoded.append(msgspec.Raw(raw))
    return encoded


def _moment(given: str | int | None, field: str) -> int | None:
    at_ms = None if given is None else time_ms(given, field)
    if at_ms is not None and not 0 <= at_ms <= MAX_MS:
        raise InvalidFieldError(f"{field} {given} is not from 1970 to 9999", field=field, limit=MAX_MS)
    return at_ms


def _event_of(rows: Sequence[EventRow]) -> Event | None:
    return _event(rows[0]) if rows else None


def _event(row: EventRow) -> Event:
    # As the SDK sees it on the other side.
    return msgspec.json.decode(msgspec.json.encode(event_reply(row)), type=Event)


def _ref_of(event: Event) -> Ref:
    assert event.context_ref is not None, "a state has a body"
    return event.context_ref


def _not_stored(ref: str, namespace: str) -> NotFoundError:
    return NotFoundError(
        f"no context {ref} in namespace {namespace!r}",
        field="context_ref",
        hint="it may have expired, or belong to another namespace",
    )


def _within(answer: object, hint: str) -> bytes:
    encoded = msgspec.json.encode(answer)
    if len(encoded) > limits.REPLY_BYTES:
        raise TooLargeError(
            f"the answer has {len(encoded)} bytes, the limit is {limits.REPLY_BYTES}",
            field="answer",
            limit=limits.REPLY_BYTES,
            hint=hint,
        )
    return encoded
