"""``hf.orchestrations``: snapshots of an orchestration at its transitions, and recovery from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from holdfast.client.orchestration_snapshots import (
    KIND,
    PREFIX,
    RECOVERED,
    CapturedState,
    Snapshot,
    check_snapshot_ref,
    check_state,
    event_data,
    new_snapshot,
    snapshot_in,
    state_of,
    told_by,
)
from holdfast.streams.events import check_id_text

if TYPE_CHECKING:
    from holdfast.client.model import Event
    from holdfast.client.store import Holdfast
    from holdfast.schemas.refs import Ref


class Orchestrations:
    """Captures what an orchestration is made of whenever its state changes, so that it can go on after a crash.

    A snapshot is a context of kind ``orchestration_state``; the transition is an event ``orchestration:<state>`` that
    carries its reference, with the orchestration's id as correlation, so handlers may listen to one state.
    """

    def __init__(self, hf: Holdfast) -> None:
        self._hf = hf

    async def capture(
        self,
        orchestration_id: str,
        state: str,
        payload: Mapping[str, Any] | None = None,
        reason: str | None = None,
        *,
        pattern_name: str | None = None,
        agents: Mapping[str, Mapping[str, Any]] | None = None,
        routing_rules: Sequence[Any] | None = None,
        vars: Mapping[str, Any] | None = None,
    ) -> Ref:
        """Stores a snapshot and tells of it by an event, a child of the current one; returns the snapshot's reference.

        ``payload`` is any part of the shape (see :mod:`holdfast.client.orchestration_snapshots`); what is named goes
        before it, and its other members are kept.  The same content again is the same reference; the second event says
        that it happened twice.  Raises InvalidFieldError naming what does not fit (the state "recovered" is reserved).
        """
        check_id_text(orchestration_id, "orchestration_id")
        check_state(state, reserved=(RECOVERED,))
        snapshot = new_snapshot(
            orchestration_id,
            state,
            payload,
            reason=reason,
            pattern_name=pattern_name,
            agents=agents,
            routing_rules=routing_rules,
            vars=vars,
        )
        event = await self._hf.emit(
            PREFIX + state,
            event_data(snapshot),
            context=snapshot,
            context_kind=KIND,
            correlation=orchestration_id,
        )
        assert event.context_ref is not None, "emitted with a context"
        return event.context_ref

    async def recover(self, context_ref: str) -> Snapshot:
        """Returns the snapshot of a reference and tells of the recovery by an event ``orchestration:recovered``.

        The event carries the reference and is a child of the newest event that captured it, with that one's session;
        without such an event, of the current one.  Every call is a recovery of its own.  Raises InvalidRefError for a
        reference of another kind, NotFoundError when it is stored nowhere, InvalidBodyError when it holds no snapshot.
        """
        ref = check_snapshot_ref(context_ref)
        snapshot = snapshot_in(ref, (await self._hf.resolve(ref)).decode())
        captured: Event | None = None
        async for event in self._hf.query(ref=ref, name=PREFIX + snapshot["state"]):
            captured = event
        await self._hf.emit(
            PREFIX + RECOVERED,
            event_data(snapshot),
            context=ref,
            parent=captured,
            correlation=snapshot["orchestration_id"],
        )
        return snapshot

    async def history(self, orchestration_id: str) -> list[CapturedState]:
        """Returns the transitions of an orchestration in the order they were stored, recoveries among them."""
        check_id_text(orchestration_id, "orchestration_id")
        found: list[CapturedState] = []
        async for event in self._hf.query(correlation=orchestration_id, kind=KIND):
            state = state_of(event.name, PREFIX)
            if state is None or event.context_ref is None:
                continue
            reason = told_by(event.data).get("reason")
            found.append(
                CapturedState(
                    state=state,
                    context_ref=event.context_ref,
                    captured_at=event.timestamp,
                    event_id=event.event_id,
                    agent_id=event.agent_id,
                    reason=reason if isinstance(reason, str) else None,
                )
            )
        return found

    async def latest(self, orchestration_id: str) -> Ref | None:
        """Returns the reference of the snapshot captured last; None when nothing was captured."""
        captured = [item for item in await self.history(orchestration_id) if item.state != RECOVERED]
        return captured[-1].context_ref if captured else None
