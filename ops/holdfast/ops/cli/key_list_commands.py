"""``holdfast ls``, ``history``, ``diff`` and ``watch``: what there is of named contexts, and what changes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.ops.cli import exit_codes, output
from holdfast.ops.cli.differences import describe_changes
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.ops.cli.key_commands import Key, open_client
from holdfast.ops.cli.key_output import version_json, write_change, write_differences, write_history, write_keys
from holdfast.ops.cli.service_commands import stop_signals
from holdfast.schemas.refs import JSON

if TYPE_CHECKING:
    from holdfast.client import Holdfast
    from holdfast.client.key_model import KeyVersion

Prefix = Annotated[str, typer.Argument(metavar="[PREFIX]", help="The beginning of their names.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(
        app,
        "ls",
        examples=("holdfast ls", "holdfast ls plan. --tag travel", "holdfast ls --session s1 --json | jq -r .key"),
    )(ls)
    command(app, "history", examples=("holdfast history plan.trip", "holdfast history plan.trip --limit 5 --json"))(
        history
    )
    command(app, "diff", examples=("holdfast diff plan.trip 2 5", "holdfast diff plan.trip 2 5 --json"))(diff)
    command(
        app,
        "watch",
        examples=(
            "holdfast watch plan.",
            "holdfast watch --initial --json | jq -r .key",
            "holdfast watch plan. --after 4e1c…:1042 --count 10",
        ),
    )(watch)


async def ls(
    invocation: Invocation,
    prefix: Prefix = "",
    tag: Annotated[list[str] | None, typer.Option("--tag", "-t", help="With this tag; all that are given.")] = None,
    session: Annotated[str | None, typer.Option("--session", "-s", help="Of this session.")] = None,
    agent: Annotated[str | None, typer.Option("--agent", "-a", help="Last written by this agent.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-l", min=1, help="Most keys.")] = None,
) -> None:
    """List the named contexts that begin with a prefix and fit every condition, in order of name.

    Deleted and expired ones are left out.
    """
    rows: list[KeyVersion] = []
    count = 0
    async with open_client(invocation) as hf:
        async for version in hf.keys.list(prefix, tags=tag or (), session=session, agent=agent):
            if invocation.json:
                output.write_json(version_json(version))
            else:
                rows.append(version)
            count += 1
            if count == limit:
                break
    if not invocation.json:
        if rows:
            write_keys(rows, datetime.now(UTC))
        else:
            output.remark("no named contexts")


async def history(
    invocation: Invocation,
    key: Key,
    before: Annotated[int | None, typer.Option("--before", min=1, help="Only versions below this one.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-l", min=1, help="Most versions.")] = None,
) -> None:
    """List the versions of a named context, newest first, hot and archived alike."""
    from holdfast.schemas.errors import NotFoundError

    rows: list[KeyVersion] = []
    found_any = False
    async with open_client(invocation) as hf:
        async for version in hf.keys.history(key, before=before, limit=limit):
            found_any = True
            if invocation.json:
                output.write_json(version_json(version))
            else:
                rows.append(version)
    if not found_any:
        namespace = invocation.settings.namespace
        below = "" if before is None else f" below version {before}"
        raise NotFoundError(f"{key!r} has no versions{below} in namespace {namespace!r}", field="key")
    if not invocation.json:
        write_history(rows)


async def diff(
    invocation: Invocation,
    key: Key,
    v1: Annotated[int, typer.Argument(metavar="V1", min=1, help="The version to start from.")],
    v2: Annotated[int, typer.Argument(metavar="V2", min=1, help="The version to compare with it.")],
) -> None:
    """Show what changed between two versions of a named context.

    With --json, the operations of RFC 6902 that turn the first body into the second, one a line; both must be JSON
    then.
    """
    before: Any = None
    async with open_client(invocation) as hf:
        if invocation.json:
            operations = await hf.keys.diff(key, v1, v2)
        else:
            before, operations = await _compared(hf, key, v1, v2)
    if invocation.json:
        for operation in operations:
            output.write_json(operation)
    elif not operations:
        output.remark(f"versions {v1} and {v2} of {key} have equal bodies")
    else:
        write_differences(describe_changes(before, operations))


async def _compared(hf: Holdfast, key: str, v1: int, v2: int) -> tuple[Any, list[dict[str, Any]]]:
    """The first body, and what makes the second one of it; of text and bytes that is the whole."""
    one, other = await hf.keys.get(key, v1), await hf.keys.get(key, v2)
    if {one.context.content_type, other.context.content_type} == {JSON}:
        return one.body, await hf.keys.diff(key, v1, v2)
    same = (one.raw, one.context.content_type) == (other.raw, other.context.content_type)
    return one.body, [] if same else [{"op": "replace", "path": "", "value": other.body}]


async def watch(
    invocation: Invocation,
    prefix: Prefix = "",
    after: Annotated[
        str | None, typer.Option("--after", help="Go on behind this position, which --json tells of each change.")
    ] = None,
    from_version: Annotated[
        int | None, typer.Option("--from-version", min=1, help="Of the one key named: from this version on.")
    ] = None,
    initial: Annotated[bool, typer.Option("--initial", help="First tell the present version of each.")] = False,
    count: Annotated[int | None, typer.Option("--count", "-n", min=1, help="End after so many changes.")] = None,
) -> int:
    """Tell each change of named contexts that begin with a prefix, a line a change, until SIGTERM or Ctrl-C.

    Nothing is left out, also when the connection breaks in between; a change may be told twice.
    """
    left = count
    async with (
        stop_signals(),
        open_client(invocation) as hf,
        hf.keys.watch(prefix, after=after, from_version=from_version, initial=initial) as changes,
    ):
        async for version in changes:
            if invocation.json:
                output.write_json(version_json(version))
            else:
                write_change(version)
            output.flush()
            if left is not None:
                left -= 1
                if left == 0:
                    break
    return exit_codes.OK
