"""``holdfast session``: the sessions that agents keep with the context manager."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.ops.cli import output
from holdfast.ops.cli.context_commands import write_body
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.ops.cli.key_commands import open_client
from holdfast.ops.cli.key_output import age, tell_version, value_json, version_json
from holdfast.schemas.errors import NotFoundError

if TYPE_CHECKING:
    from holdfast.client.key_model import KeyVersion

SessionId = Annotated[str, typer.Argument(metavar="ID", help="Its id, as 'holdfast session list' shows it.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(add_completion=False)
    command(
        group,
        "session",
        examples=("holdfast session list", "holdfast session show user-42 --json", "holdfast session rm user-42"),
        default_of_group=True,
    )(session)
    command(group, "list", examples=("holdfast session list", "holdfast session list --json | jq -r .session"))(
        list_sessions
    )
    command(group, "show", examples=("holdfast session show user-42", "holdfast session show user-42 --json"))(show)
    command(group, "rm", examples=("holdfast session rm user-42",))(rm)
    app.add_typer(group, name="session")


async def session(invocation: Invocation) -> None:
    """List, show and delete the sessions that agents keep with the context manager."""
    await list_sessions(invocation)


async def list_sessions(invocation: Invocation) -> None:
    """List the sessions that live."""
    from holdfast.client.session_model import SESSION_PREFIX, session_of

    rows: list[tuple[object, ...]] = []
    now = datetime.now(UTC)
    async with open_client(invocation) as hf:
        async for version in hf.keys.list(SESSION_PREFIX):
            identity = session_of(version.key, version.session)
            if identity is None:
                continue
            if invocation.json:
                output.write_json(_session_json(identity, version))
            else:
                rows.append(
                    (
                        identity,
                        version.version,
                        age(version.stored_at or version.timestamp, now),
                        None if version.expires_at is None else age(now, version.expires_at),
                        version.changed_by,
                    )
                )
    if invocation.json:
        return
    if rows:
        columns = ("session", "version", "changed", "expires in", "by")
        output.write_table(columns, rows, right=("version", "changed", "expires in"))
    else:
        output.remark("no sessions")


async def show(invocation: Invocation, identity: SessionId) -> None:
    """Show what a session holds."""
    from holdfast.client.session_model import session_key

    async with open_client(invocation) as hf:
        try:
            value = await hf.keys.get(session_key(identity))
        except NotFoundError as error:
            raise _unknown(identity, hf.namespace) from error
    if invocation.json:
        output.write_json({"session": identity, **value_json(value)})
    else:
        write_body(value.context)


async def rm(invocation: Invocation, identity: SessionId) -> None:
    """Delete a session: it reads as absent from now on, and its history stays."""
    from holdfast.client.session_model import session_key

    async with open_client(invocation) as hf:
        try:
            written = await hf.keys.delete(session_key(identity))
        except NotFoundError as error:
            raise _unknown(identity, hf.namespace) from error
    tell_version(written, as_json=invocation.json)


def _session_json(identity: str, version: KeyVersion) -> dict[str, Any]:
    return {"session": identity, **version_json(version)}


def _unknown(identity: str, namespace: str) -> NotFoundError:
    return NotFoundError(
        f"there is no session {identity!r} in namespace {namespace!r}",
        field="id",
        hint="list them with 'holdfast session list'; it may have expired",
    )
