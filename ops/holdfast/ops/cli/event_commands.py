"""``holdfast emit`` and ``holdfast query``."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.ops.cli import exit_codes, output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.ops.cli.quantities import parse_moment
from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidFieldError, NotFoundError
from holdfast.schemas.ids import iso_from_ms, ms_from_utc
from holdfast.schemas.refs import parse_ref
from holdfast.workers.settings import WorkerName

if TYPE_CHECKING:
    from holdfast.client import Event, Holdfast
    from holdfast.client.event_reader import Conditions


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(
        app,
        "emit",
        examples=(
            'holdfast emit agent:status \'{"state": "ready"}\' --agent planner --session s1',
            "holdfast emit plan:made --context ctx_plan_3q7… --parent 0198c3a1-…",
            "holdfast emit report:written --file report.json --kind report",
        ),
    )(emit)
    command(
        app,
        "query",
        examples=(
            "holdfast query --session s1",
            "holdfast query --agent planner --since 15m --limit 100 --json",
            "holdfast query --kind plan --since 2026-01-31T09:30:00Z",
            "holdfast query --correlation c-17 --limit 10 --fields name,timestamp,context_ref",
            "holdfast query --root 0198c3a1-… --limit 100 --cursor WzE3…",
        ),
    )(query)


async def emit(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(help="What happened, such as agent:status; colons divide segments.")],
    payload: Annotated[str | None, typer.Argument(metavar="DATA", help="Small JSON that goes with it.")] = None,
    context: Annotated[str | None, typer.Option("--context", "-c", help="Reference of a stored context.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Store this file as the context first.")] = None,
    kind: Annotated[str, typer.Option("--kind", "-k", help="Kind of the context stored from --file.")] = "event",
    agent: Annotated[str, typer.Option("--agent", "-a", help="Who says so.")] = "cli",
    session: Annotated[str | None, typer.Option("--session", "-s", help="The session it belongs to.")] = None,
    correlation: Annotated[str | None, typer.Option("--correlation", help="The request it belongs to.")] = None,
    parent: Annotated[str | None, typer.Option("--parent", help="Id of the event that it follows from.")] = None,
    client: Annotated[str | None, typer.Option("--client", help="The client it came through.")] = None,
    originator: Annotated[str | None, typer.Option("--originator", help="Who caused it.")] = None,
    event_id: Annotated[str | None, typer.Option("--id", help="Its own id; the same id is stored once.")] = None,
    timestamp: Annotated[str | None, typer.Option("--timestamp", help="When it happened (now).")] = None,
) -> None:
    """Publish an event and print its id, once it is stored durably.

    With --parent the parent is looked up, so that session, correlation, root and depth follow from it.
    """
    from holdfast.ops.cli.context_commands import guess_content_type, read_file
    from holdfast.ops.system import open_system

    if context is not None and file is not None:
        raise InvalidFieldError("both --context and --file are given", field="context", hint="give one of them")
    if context is not None:
        parse_ref(context)
    data = None if payload is None else _parse_data(payload)
    moment = None if timestamp is None else parse_moment(timestamp, "timestamp", datetime.now(UTC))
    raw = None if file is None else read_file(file)
    loaded = invocation.loaded
    workers: tuple[WorkerName, ...] = () if parent is None else ("resolver",)
    async with open_system(loaded, workers) as system, system.connect(loaded.settings.namespace, agent) as hf:
        ref = context
        if raw is not None:
            ref = await hf.put(raw, kind=kind, content_type=guess_content_type(raw))
        event = await hf.emit(
            name,
            data,
            context=ref,
            session=session,
            correlation=correlation,
            parent=None if parent is None else await _find_parent(hf, parent),
            client=client,
            originator=originator,
            event_id=event_id,
            timestamp=moment,
        )
    if invocation.json:
        output.write_json(event_json(event))
    else:
        output.write_line(event.event_id)


def _parse_data(text: str) -> Any:
    import msgspec

    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidFieldError(
            f"data is not JSON: {error}", field="data", hint="write text in double quotes: '\"ready\"'"
        ) from error


async def _find_parent(hf: Holdfast, parent: str) -> Event:
    async for event in hf.query(event_id=parent, limit=1):
        return event
    raise NotFoundError(
        f"no event {parent} in namespace {hf.namespace!r}", field="parent", hint="give the id of a published event"
    )


async def query(
    invocation: Invocation,
    session: Annotated[str | None, typer.Option("--session", "-s", help="Of this session.")] = None,
    agent: Annotated[str | None, typer.Option("--agent", "-a", help="By this agent.")] = None,
    correlation: Annotated[str | None, typer.Option("--correlation", help="Of this request.")] = None,
    event: Annotated[str | None, typer.Option("--event", help="With this id.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", "-k", help="With a context of this kind.")] = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="With this name.")] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="Stored at or after: ISO 8601, or 15m for that long ago.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", help="Stored before.")] = None,
    root: Annotated[str | None, typer.Option("--root", help="Of the tree that this event begins.")] = None,
    parent: Annotated[str | None, typer.Option("--parent", help="Directly below this event.")] = None,
    ref: Annotated[str | None, typer.Option("--ref", help="With this context.")] = None,
    originator: Annotated[
        str | None, typer.Option("--originator", help="Whose results are meant for this one.")
    ] = None,
    receipts: Annotated[bool, typer.Option("--receipts", help="Lineage receipts too.")] = False,
    fields: Annotated[str | None, typer.Option("--fields", help="These members alone, divided by commas.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-l", min=1, help="Most events.")] = limits.QUERY_LIMIT_DEFAULT,
    cursor: Annotated[str | None, typer.Option("--cursor", help="Go on after the page that ended with it.")] = None,
) -> int:
    """List events that fit every condition given, hot and archived alike, in the order they were stored.

    When the limit ends the list, the cursor that goes on is told on stderr.
    """
    from holdfast.ops.system import open_system

    now = datetime.now(UTC)
    conditions: Conditions = {
        "session": session,
        "agent": agent,
        "correlation": correlation,
        "event_id": event,
        "kind": kind,
        "name": name,
        "since": None if since is None else parse_moment(since, "since", now),
        "until": None if until is None else parse_moment(until, "until", now),
        "root": root,
        "parent": parent,
        "ref": ref,
        "originator": originator,
        "receipts": receipts,
    }
    chosen = None if fields is None else [field.strip() for field in fields.split(",")]
    loaded = invocation.loaded
    rows: list[tuple[object, ...]] = []
    left, asked_from = limit, cursor
    async with open_system(loaded, ("resolver",)) as system, system.connect(loaded.settings.namespace) as hf:
        while left:
            asked = min(left, limits.QUERY_LIMIT_MAX)
            if chosen is not None:
                # A list of some members is for programs and for people alike: JSON, or a table of these columns.
                some = await hf.query_page(limit=asked, cursor=cursor, fields=chosen, **conditions)
                if invocation.json:
                    for members in some.events:
                        output.write_json(members)
                else:
                    rows += [tuple(members.get(field) for field in chosen) for members in some.events]
                found, cursor = len(some.events), some.cursor
            else:
                page = await hf.query_page(limit=asked, cursor=cursor, **conditions)
                if invocation.json:
                    for each in page.events:
                        output.write_json(event_json(each))
                else:
                    rows += [_table_row(each) for each in page.events]
                found, cursor = len(page.events), page.cursor
            left -= found
            if not found:
                break
    if not invocation.json and rows:
        output.write_table(chosen or ("time", "event", "agent", "session", "context", "id"), rows)
    elif not invocation.json:
        output.remark("no events" if asked_from is None else "no events after that cursor")
    if not left and cursor is not None:
        output.remark(f"there may be more: --cursor {cursor}")
    return exit_codes.OK


def event_json(event: Event) -> dict[str, Any]:
    """Returns an event as ``--json`` prints it: the fields that are set, times in ISO 8601."""
    import msgspec

    return {
        name: iso_from_ms(ms_from_utc(value)) if isinstance(value, datetime) else value
        for name, value in msgspec.structs.asdict(event).items()
        if value is not None
    }


def _table_row(event: Event) -> tuple[object, ...]:
    return (
        f"{event.timestamp:%Y-%m-%d %H:%M:%S}",
        "  " * min(event.event_depth, 8) + event.name,
        event.agent_id,
        event.session_id,
        event.context_ref,
        event.event_id,
    )
