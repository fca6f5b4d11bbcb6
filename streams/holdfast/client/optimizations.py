"""``hf.optimizations``: the states of optimization runs, what each changed, and how runs compare."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from holdfast.client.emitting import moment_ms
from holdfast.client.optimization_records import (
    KIND,
    MAX_STATES,
    PAGE,
    PREFIX,
    Analysis,
    Introspection,
    event_data,
    new_body,
    report_of,
    states_among,
    summarize,
)
from holdfast.client.orchestration_snapshots import check_state
from holdfast.schemas.errors import HoldfastError, IntegrityError, InvalidFieldError, NotFoundError, TooLargeError
from holdfast.streams.events import check_id_text

if TYPE_CHECKING:
    from holdfast.client.model import Event
    from holdfast.client.store import Holdfast
    from holdfast.schemas.refs import Ref


class Optimizations:
    """Captures the states of an optimization run, and looks into one run or across all of them.

    A state is a context of kind ``optimization_state``, told by an event ``optimization:<state>`` that carries its
    reference, with the run's id as correlation.  "completed" ends a run, "failed" and "cancelled" end it too.  What is
    read of a body is told in :mod:`holdfast.client.optimization_records`.
    """

    def __init__(self, hf: Holdfast) -> None:
        self._hf = hf

    async def capture(
        self,
        opt_id: str,
        state: str,
        data: Any = None,
        context: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> Ref:
        """Stores a state and tells of it by an event; returns the reference of the stored body.

        ``data`` and each of ``extra`` (such as ``component_content``, ``result``) are what JSON can hold.  ``context``
        is a lineage in explicit form that the event is to be a child of, in the stead of the current event.  The event
        says what the run's performance is, as far as the body tells it: ``framework`` and ``performance`` = {score,
        member}.  Raises InvalidFieldError naming what does not fit.
        """
        check_id_text(opt_id, "opt_id")
        check_state(state)
        body = new_body(opt_id, state, data, extra)
        event = await self._hf.emit(
            PREFIX + state, event_data(body), context=body, context_kind=KIND, correlation=opt_id, lineage=context
        )
        assert event.context_ref is not None, "emitted with a context"
        return event.context_ref

    async def introspect(self, opt_id: str, *, after: int = 0, limit: int = PAGE) -> Introspection:
        """Returns the states of a run in the order they were stored: durations, bodies, and what each changed.

        ``after`` states are passed over and up to ``limit`` returned; ``next`` of the answer goes on.  A state whose
        body is stored nowhere says so in ``error``.  Raises NotFoundError when nothing was captured of it,
        TooLargeError for a run of over 10,000 states.
        """
        check_id_text(opt_id, "opt_id")
        if after < 0 or not 1 <= limit <= PAGE:
            raise InvalidFieldError(f"after {after}, limit {limit}: not from 0, not 1 to {PAGE}", field="limit")
        states = await self._states(opt_id)
        chosen = range(after, min(after + limit, len(states)))
        # The body before the first one is needed to tell what that one changed.
        wanted = [states[position].context_ref for position in range(max(0, after - 1), chosen.stop)]
        bodies, failed = await self._bodies([ref for ref in wanted if ref is not None])
        summary = summarize(states, bodies)
        reports = await asyncio.to_thread(lambda: [report_of(states, position, bodies, failed) for position in chosen])
        return Introspection(
            optimization_id=opt_id,
            **msgspec.structs.asdict(summary),
            total=len(states),
            states=reports,
            next=chosen.stop if chosen.stop < len(states) and reports else None,
        )

    async def analyze_performance(
        self,
        framework: str | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        best: Literal["highest", "lowest"] = "highest",
    ) -> Analysis:
        """Returns how the runs of each framework, or of one, went: outcomes, durations, scores, best settings.

        ``since`` (inclusive) and ``until`` (exclusive) bound the time of a run's first state.  ``best``: which score is
        the best.  Computed by the resolver over hot and cold; raises UnavailableError when none answers.
        """
        request: dict[str, Any] = {
            "framework": framework,
            "since": None if since is None else moment_ms(since, "since"),
            "until": None if until is None else moment_ms(until, "until"),
            "best": best,
        }
        given = {name: value for name, value in request.items() if value is not None}
        return msgspec.convert(await self._hf.call_resolver("optimization.analyze_performance", given), Analysis)

    async def _bodies(self, refs: list[Ref]) -> tuple[dict[Ref, Any], dict[Ref, str]]:
        """The bodies of references, and the code of the error of each that cannot be had."""
        failed: dict[Ref, str] = {}
        try:
            found = (await self._hf.resolve_many(refs)).found
        except IntegrityError:
            # One damaged body must not hide the others: singly, each tells for itself.
            found = {}
            for ref in refs:
                try:
                    found[ref] = await self._hf.resolve(ref)
                except (NotFoundError, IntegrityError) as error:
                    failed[ref] = error.code
        bodies: dict[Ref, Any] = {}

        def decode() -> None:
            for ref, context in found.items():
                try:
                    bodies[ref] = context.decode()
                except HoldfastError as error:
                    failed[ref] = error.code

        await asyncio.to_thread(decode)
        return bodies, failed

    async def _states(self, opt_id: str) -> list[Event]:
        found = self._hf.query(correlation=opt_id, kind=KIND, limit=MAX_STATES + 1)
        events = [event async for event in found]
        if len(events) > MAX_STATES:
            raise too_many_states(opt_id)
        states = states_among(events)
        if not states:
            raise nothing_captured(opt_id, self._hf.namespace)
        return states


def too_many_states(opt_id: str) -> TooLargeError:
    """Returns the error of a run with more states than are looked at together."""
    return TooLargeError(
        f"optimization {opt_id!r} has over {MAX_STATES} states",
        field="optimization_id",
        limit=MAX_STATES,
        hint="read its events with query, by correlation, page by page",
    )


def nothing_captured(opt_id: str, namespace: str) -> NotFoundError:
    """Returns the error of a run that nobody captured a state of."""
    return NotFoundError(
        f"no state of an optimization {opt_id!r} in namespace {namespace!r}",
        field="optimization_id",
        hint="list what there is with 'holdfast optimization analyze'",
    )
