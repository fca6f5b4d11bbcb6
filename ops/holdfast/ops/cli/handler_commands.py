"""``holdfast handler``: the handlers of events that the server knows, running or not."""

from __future__ import annotations

from typing import Annotated

import typer

from holdfast.ops.cli import output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.ops.cli.key_commands import open_client
from holdfast.schemas.errors import NotFoundError

HandlerName = Annotated[str, typer.Argument(metavar="NAME", help="Its name, as 'holdfast handler list' shows it.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(add_completion=False)
    command(
        group,
        "handler",
        examples=("holdfast handler list", "holdfast handler forget shop.check"),
        default_of_group=True,
    )(handler)
    command(group, "list", examples=("holdfast handler list", "holdfast handler list --json | jq .pending"))(
        list_handlers
    )
    command(group, "forget", examples=("holdfast handler forget shop.check",))(forget)
    app.add_typer(group, name="handler")


async def handler(invocation: Invocation) -> None:
    """List the handlers of events, and let go of those that are used no more."""
    await list_handlers(invocation)


async def list_handlers(invocation: Invocation) -> None:
    """List the handlers that the server knows, whether a process of theirs runs or not.

    'waiting' events have not been handed out yet, 'unsettled' ones are at work or wait for another try, 'again' counts
    those that were handed out more than once. What a handler has not settled stays in the event log, up to a bound.
    """
    import msgspec

    from holdfast.workers.handler_floors import handler_states

    async with open_client(invocation) as hf:
        states = await handler_states(hf.connection, hf.namespace)
    if invocation.json:
        for state in states:
            output.write_json(msgspec.structs.asdict(state))
    elif states:
        columns = ("handler", "pattern", "waiting", "unsettled", "again")
        rows = [(state.name, state.pattern, state.pending, state.unsettled, state.redelivered) for state in states]
        output.write_table(columns, rows, right=("waiting", "unsettled", "again"))
    else:
        output.remark("no handlers")


async def forget(invocation: Invocation, name: HandlerName) -> None:
    """Forget a handler that no process uses any more: where it stands, and its hold on the event log.

    A process that comes back under that name begins anew.
    """
    async with open_client(invocation) as hf:
        if not await hf.handlers.forget(name):
            raise NotFoundError(
                f"there is no handler {name!r} in namespace {hf.namespace!r}",
                field="name",
                hint="list them with 'holdfast handler list'",
            )
    if invocation.json:
        output.write_json({"handler": name, "forgotten": True})
    else:
        output.remark(f"{name} is forgotten")
