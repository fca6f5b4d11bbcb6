"""``holdfast orchestration`` and ``holdfast optimization``: snapshots of what runs, recovery, and how it went."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from holdfast.ops.cli import output
from holdfast.ops.cli.context_commands import read_body
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.ops.cli.key_commands import open_client
from holdfast.ops.cli.key_output import write_differences
from holdfast.ops.cli.quantities import format_seconds, parse_moment
from holdfast.schemas.errors import InvalidFieldError, NotFoundError
from holdfast.schemas.ids import iso_from_ms, ms_from_utc

if TYPE_CHECKING:
    from holdfast.client.optimization_records import FrameworkAnalysis, Introspection, StateReport
    from holdfast.client.orchestration_snapshots import CapturedState, Snapshot

OrchestrationId = Annotated[str, typer.Argument(metavar="ID", help="Its id.")]
OptimizationId = Annotated[str, typer.Argument(metavar="ID", help="Its id.")]
State = Annotated[str, typer.Argument(metavar="STATE", help="Such as running, terminated; without a colon.")]
RunState = Annotated[
    str, typer.Argument(metavar="STATE", help="Such as initializing, optimizing, completed; without a colon.")
]
Agent = Annotated[str, typer.Option("--agent", "-a", help="Who tells of it.")]

_SHORTEST_CLOCK_S = 100.0


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    orchestrations, optimizations = typer.Typer(add_completion=False), typer.Typer(add_completion=False)
    command(
        orchestrations,
        "orchestration",
        examples=(
            'holdfast orchestration capture orch_123 running --payload \'{"vars": {"target": "data.csv"}}\'',
            "holdfast orchestration history orch_123",
            "holdfast orchestration recover ctx_orchestration_state_3q7… --json",
        ),
        default_of_group=True,
    )(orchestration)
    command(
        orchestrations,
        "capture",
        examples=(
            "holdfast orchestration capture orch_123 terminated --reason completed",
            "jq .state run.json | holdfast orchestration capture orch_123 running --payload -",
        ),
    )(capture_orchestration)
    command(orchestrations, "recover", examples=("holdfast orchestration recover ctx_orchestration_state_3q7…",))(
        recover
    )
    command(orchestrations, "history", examples=("holdfast orchestration history orch_123 --json",))(history)
    command(
        optimizations,
        "optimization",
        examples=(
            'holdfast optimization capture opt_123 optimizing \'{"framework": "dspy"}\'',
            "holdfast optimization introspect opt_123 --changes",
            "holdfast optimization analyze --framework dspy --since 7d",
        ),
        default_of_group=True,
    )(optimization)
    command(
        optimizations,
        "capture",
        examples=(
            'holdfast optimization capture opt_123 initializing \'{"framework": "dspy"}\'',
            'holdfast optimization capture opt_123 completed - --extra \'{"result": {"score": 0.82}}\' < run.json',
        ),
    )(capture_optimization)
    command(
        optimizations,
        "introspect",
        examples=("holdfast optimization introspect opt_123", "holdfast optimization introspect opt_123 --json"),
    )(introspect)
    command(
        optimizations,
        "analyze",
        examples=("holdfast optimization analyze", "holdfast optimization analyze --framework dspy --json"),
    )(analyze)
    app.add_typer(orchestrations, name="orchestration")
    app.add_typer(optimizations, name="optimization")


async def orchestration(invocation: Invocation) -> None:
    """Capture the state of an orchestration at its transitions, list what was captured, and recover from it."""
    invocation.show_help()


async def optimization(invocation: Invocation) -> None:
    """Capture the states of optimization runs, look into one of them, and compare them all."""
    invocation.show_help()


async def capture_orchestration(
    invocation: Invocation,
    identity: OrchestrationId,
    state: State,
    payload: Annotated[
        str | None, typer.Option("--payload", "-p", help="The snapshot, or a part of it, as JSON; - reads stdin.")
    ] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Why it came to this state.")] = None,
    agent: Agent = "cli",
) -> None:
    """Store a snapshot of an orchestration, and tell of the transition by an event; print the reference."""
    given = _object(payload, "payload")
    async with open_client(invocation, agent) as hf:
        ref = await hf.orchestrations.capture(identity, state, given, reason)
    if invocation.json:
        output.write_json({"orchestration_id": identity, "state": state, "context_ref": ref})
    else:
        output.write_line(ref)


async def recover(
    invocation: Invocation,
    ref: Annotated[str, typer.Argument(metavar="REF", help="The snapshot's reference, as 'history' shows it.")],
    agent: Agent = "cli",
) -> None:
    """Print a snapshot of an orchestration, and tell of the recovery by an event, orchestration:recovered."""
    async with open_client(invocation, agent) as hf:
        snapshot = await hf.orchestrations.recover(ref)
    if invocation.json:
        output.write_json({"context_ref": ref, "snapshot": snapshot})
    else:
        _write_snapshot(snapshot)


async def history(invocation: Invocation, identity: OrchestrationId) -> None:
    """List the transitions of an orchestration, and its recoveries, in the order they were stored."""
    async with open_client(invocation) as hf:
        found = await hf.orchestrations.history(identity)
    if not found:
        raise NotFoundError(
            f"no state of an orchestration {identity!r} in namespace {invocation.settings.namespace!r}",
            field="id",
            hint="capture one with 'holdfast orchestration capture'",
        )
    if invocation.json:
        for item in found:
            output.write_json(captured_json(item))
        return
    rows = [(_when(item.captured_at), item.state, item.reason, item.agent_id, item.context_ref) for item in found]
    output.write_table(("captured", "state", "reason", "by", "snapshot"), rows)


async def capture_optimization(
    invocation: Invocation,
    identity: OptimizationId,
    state: RunState,
    payload: Annotated[
        str | None, typer.Argument(metavar="DATA", help="What the run works with, as JSON; - reads standard input.")
    ] = None,
    extra: Annotated[
        str | None, typer.Option("--extra", "-x", help="An object of further members, such as result, as JSON.")
    ] = None,
    agent: Agent = "cli",
) -> None:
    """Store a state of an optimization run, and tell of it by an event; print the reference.

    "completed" ends a run, as do "failed" and "cancelled".
    """
    if payload == extra == "-":
        raise InvalidFieldError("both DATA and --extra read standard input", field="extra", hint="give one as text")
    value = None if payload is None else _json_of(payload, "data")
    members = _object(extra, "extra") or {}
    for name in ("data", "context"):
        if name in members:
            raise InvalidFieldError(f"{name} is no further member", field="extra", hint="give it as DATA")
    async with open_client(invocation, agent) as hf:
        ref = await hf.optimizations.capture(identity, state, value, **members)
    if invocation.json:
        output.write_json({"optimization_id": identity, "state": state, "context_ref": ref})
    else:
        output.write_line(ref)


async def introspect(
    invocation: Invocation,
    identity: OptimizationId,
    changes: Annotated[bool, typer.Option("--changes", help="Show what each state changed.")] = False,
) -> None:
    """Look into an optimization run: its states in order, how long each lasted, what it scored and changed."""
    from holdfast.client.optimization_records import introspection_members

    async with open_client(invocation) as hf:
        found = await hf.optimizations.introspect(identity)
        states = list(found.states)
        after = found.next
        while after is not None:
            page = await hf.optimizations.introspect(identity, after=after)
            states += page.states
            after = page.next
    if invocation.json:
        members = introspection_members(found)
        members.pop("next", None)
        output.write_json({**members, "states": [_state_json(state) for state in states]})
        return
    _write_run(found, states)
    if changes:
        _write_changes(states)


async def analyze(
    invocation: Invocation,
    framework: Annotated[str | None, typer.Option("--framework", "-f", help="Runs of this framework alone.")] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="Runs begun at or after: ISO 8601, or 7d for that long ago.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", help="Runs begun before.")] = None,
    best: Annotated[Literal["highest", "lowest"], typer.Option("--best", help="Which score is the best.")] = "highest",
) -> None:
    """Compare optimization runs by framework, hot and archived alike: outcomes, durations, scores, best settings."""
    now = datetime.now(UTC)
    async with open_client(invocation) as hf:
        analysis = await hf.optimizations.analyze_performance(
            framework,
            since=None if since is None else parse_moment(since, "since", now),
            until=None if until is None else parse_moment(until, "until", now),
            best=best,
        )
    if analysis.unread:
        output.remark(f"{analysis.unread} older states of other publishers were not read: their scores are left out")
    if invocation.json:
        for found in analysis.frameworks:
            output.write_json(found)
    elif analysis.frameworks:
        _write_analysis(analysis.frameworks)
    else:
        output.remark("no optimization runs")


def captured_json(item: CapturedState) -> dict[str, Any]:
    """Returns a transition as ``orchestration history --json`` prints it."""
    members = {name: getattr(item, name) for name in item.__struct_fields__}
    return {**members, "captured_at": iso_from_ms(ms_from_utc(item.captured_at))}


def _state_json(state: StateReport) -> dict[str, Any]:
    from holdfast.client.optimization_records import state_members

    return state_members(state)


def _write_snapshot(snapshot: Snapshot) -> None:
    facts = (snapshot["orchestration_id"], snapshot["state"], snapshot["pattern_name"], snapshot.get("reason"))
    output.write_line("  ".join(str(fact) for fact in facts if fact is not None))
    if snapshot["agents"]:
        rows = [
            (name, agent["profile"], "yes" if agent["spawned"] else "no", _compact(agent["vars"]))
            for name, agent in snapshot["agents"].items()
        ]
        output.write_table(("agent", "profile", "spawned", "vars"), rows)
    output.write_line(f"vars           {_compact(snapshot['vars'])}")
    output.write_line(f"routing rules  {_compact(snapshot['routing_rules'])}")


def _write_run(found: Introspection, states: list[StateReport]) -> None:
    facts = [found.optimization_id, found.framework, found.status]
    if found.duration_s is not None:
        facts.append(f"after {_lasted(found.duration_s)}")
    output.write_line("  ".join(fact for fact in facts if fact is not None))
    rows = [
        (
            _when(state.started_at),
            state.state,
            None if state.duration_s is None else _lasted(state.duration_s),
            None if state.performance is None else f"{state.performance['score']:g}",
            state.error if state.diff is None else len(state.diff),
            state.agent_id,
            state.context_ref,
        )
        for state in states
    ]
    columns = ("reached", "state", "lasted", "score", "changes", "by", "snapshot")
    output.write_table(columns, rows, right=("lasted", "score", "changes"))


def _write_changes(states: list[StateReport]) -> None:
    from holdfast.ops.cli.differences import describe_changes

    for before, state in pairwise(states):
        if state.diff:
            output.write_line(f"\n{before.state} → {state.state}")
            write_differences(describe_changes(before.body, state.diff))


def _write_analysis(frameworks: list[FrameworkAnalysis]) -> None:
    rows = [
        (
            found.framework or "(none)",
            found.runs,
            found.completed,
            found.failed,
            found.running,
            None if found.seconds is None else _lasted(found.seconds.min),
            None if found.seconds is None else _lasted(found.seconds.median),
            None if found.seconds is None else _lasted(found.seconds.p95),
            None if found.seconds is None else _lasted(found.seconds.max),
            None if found.best is None else f"{found.best.score:g}",
            None if found.best is None else found.best.optimization_id,
        )
        for found in frameworks
    ]
    columns = ("framework", "runs", "completed", "failed", "running", "min", "median", "p95", "max", "best", "by run")
    output.write_table(columns, rows, right=columns[1:-1])
    output.write_line()
    states = [
        (
            found.framework or "(none)",
            state.state,
            state.count,
            None if state.seconds is None else _lasted(state.seconds.median),
            None if state.seconds is None else _lasted(state.seconds.max),
        )
        for found in frameworks
        for state in found.states
    ]
    output.write_table(("framework", "state", "reached", "median", "max"), states, right=("reached", "median", "max"))
    for found in frameworks:
        if found.best is not None and found.best.config is not None:
            output.write_line(f"\nbest settings of {found.framework or '(none)'}: {_compact(found.best.config)}")


def _object(text: str | None, field: str) -> dict[str, Any] | None:
    value = None if text is None else _json_of(text, field)
    if value is None or isinstance(value, dict):
        return cast("dict[str, Any] | None", value)
    raise InvalidFieldError(f"{field} is not a JSON object", field=field, hint='write \'{"member": "value"}\'')


def _json_of(text: str, field: str) -> Any:
    import msgspec

    from holdfast.schemas.bodies import check_json, check_size

    raw = read_body(text, None)
    check_size(raw, field)
    check_json(raw, field)
    return msgspec.json.decode(raw)


def _compact(value: Any) -> str:
    import msgspec

    return msgspec.json.encode(value).decode()


def _lasted(seconds: float) -> str:
    return format_seconds(seconds) if seconds < _SHORTEST_CLOCK_S else str(timedelta(seconds=round(seconds)))


def _when(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
