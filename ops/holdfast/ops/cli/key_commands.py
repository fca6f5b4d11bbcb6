"""``holdfast get``, ``set``, ``patch``, ``append``, ``rollback`` and ``rm``: one named context."""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from holdfast.ops.cli import output
from holdfast.ops.cli.context_commands import guess_content_type, read_body
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.ops.cli.key_output import tell_version, value_json, write_value
from holdfast.ops.cli.quantities import parse_duration_s, parse_moment
from holdfast.schemas import limits
from holdfast.schemas.errors import InvalidFieldError

if TYPE_CHECKING:
    from holdfast.client import Holdfast

Key = Annotated[str, typer.Argument(metavar="KEY", help="Its name; dots part the segments.")]
ExpectedVersion = Annotated[
    int | None,
    typer.Option("--expected-version", min=0, help="Write only if this is its newest version; 0: if there is none."),
]
Agent = Annotated[str, typer.Option("--agent", "-a", help="Who writes it.")]
ChangedBy = Annotated[str | None, typer.Option("--by", help="In whose name.")]
ChangeType = Annotated[str | None, typer.Option("--change-type", help="What sort of change it is.")]
NewTags = Annotated[list[str] | None, typer.Option("--tag", "-t", help="A tag; may be repeated.")]
Session = Annotated[str | None, typer.Option("--session", "-s", help="The session it belongs to.")]
TimeToLive = Annotated[
    str | None, typer.Option("--ttl", help="Expires after this long: 15m, 24h, 7d; never, whatever the policy says.")
]

NEVER = "never"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(
        app,
        "get",
        examples=(
            "holdfast get plan.trip",
            "holdfast get plan.trip --version 3 --json",
            "holdfast get plan.trip --as-of 2h --raw",
        ),
    )(get)
    command(
        app,
        "set",
        examples=(
            'holdfast set plan.trip \'{"goal": "fly", "budget": 300}\' --tag travel',
            "holdfast set notes.today --file notes.md --ttl 24h",
            "some-agent | holdfast set plan.trip - --expected-version 3",
        ),
    )(set_key)
    command(
        app,
        "patch",
        examples=(
            'holdfast patch plan.trip \'{"budget": 400, "draft": null}\'',
            "jq '{state}' state.json | holdfast patch plan.trip -",
        ),
    )(patch)
    command(app, "append", examples=('holdfast append chat.s1 \'{"role": "user", "content": "hello"}\'',))(append)
    command(app, "rollback", examples=("holdfast history plan.trip", "holdfast rollback plan.trip 2"))(rollback)
    command(app, "rm", examples=("holdfast rm plan.trip", "holdfast rm plan.trip --expected-version 4"))(rm)


@asynccontextmanager
async def open_client(invocation: Invocation, agent: str = "cli") -> AsyncGenerator[Holdfast]:
    """Yields a client in the namespace of the settings, with a resolver: old versions and bodies are in the lake."""
    from holdfast.ops.system import open_system

    loaded = invocation.loaded
    async with open_system(loaded, ("resolver",)) as system, system.connect(loaded.settings.namespace, agent) as hf:
        yield hf


async def get(
    invocation: Invocation,
    key: Key,
    version: Annotated[int | None, typer.Option("--version", min=1, help="This version instead of the newest.")] = None,
    as_of: Annotated[
        str | None, typer.Option("--as-of", help="The version of that time: ISO 8601, or 15m for that long ago.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Write the exact bytes of the body and nothing else.")] = False,
) -> None:
    """Print a named context: its newest version, one by its number, or the one that was newest at a time."""
    if version is not None and as_of is not None:
        raise InvalidFieldError("both --version and --as-of are given", field="version", hint="give one of them")
    moment = None if as_of is None else parse_moment(as_of, "as-of", datetime.now(UTC))
    async with open_client(invocation) as hf:
        value = await hf.keys.get(key, version, as_of=moment)
    if raw:
        output.write_bytes(value.raw)
    elif invocation.json:
        output.write_json(value_json(value))
    else:
        write_value(value)


async def set_key(
    invocation: Invocation,
    key: Key,
    body: Annotated[str | None, typer.Argument(help="The body; - reads it from standard input.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the body from a file.")] = None,
    expected_version: ExpectedVersion = None,
    ttl: TimeToLive = None,
    tag: NewTags = None,
    session: Session = None,
    encrypt: Annotated[
        bool | None, typer.Option("--encrypt/--plain", help="Encrypt the body, or not, whatever the policy says.")
    ] = None,
    kind: Annotated[str, typer.Option("--kind", "-k", help="What sort of thing it is; part of the reference.")] = (
        "context"
    ),
    content_type: Annotated[
        str | None,
        typer.Option("--content-type", help="Its type (JSON for an object or array, else text or bytes)."),
    ] = None,
    by: ChangedBy = None,
    change_type: ChangeType = None,
    agent: Agent = "cli",
) -> None:
    """Write a new version of a named context; older ones stay.

    Tags, session and time to live are those given here: a version does not inherit them.
    """
    raw = read_body(body, file)
    chosen = content_type or guess_content_type(raw)
    ttl_s = parse_ttl(ttl)
    async with open_client(invocation, agent) as hf:
        written = await hf.keys.put(
            key,
            raw,
            expected_version=expected_version,
            kind=kind,
            content_type=chosen,
            tags=tag or (),
            session=session,
            ttl=ttl_s,
            changed_by=by,
            change_type=change_type,
            encrypt=encrypt,
        )
    tell_version(written, as_json=invocation.json)


async def patch(
    invocation: Invocation,
    key: Key,
    merge: Annotated[str, typer.Argument(help="A JSON object; null removes a member. - reads standard input.")],
    expected_version: ExpectedVersion = None,
    ttl: TimeToLive = None,
    tag: NewTags = None,
    session: Session = None,
    by: ChangedBy = None,
    change_type: ChangeType = None,
    agent: Agent = "cli",
) -> None:
    """Merge an object into a named context (RFC 7386); one that there is none of begins as {}.

    Others may change it at the same moment: what they write to other members stays. Tags, session and expiry stay too,
    unless given.
    """
    change = _parse_json(merge, "merge")
    if not isinstance(change, dict):
        raise InvalidFieldError("merge is not a JSON object", field="merge", hint='write \'{"member": "value"}\'')
    ttl_s = parse_ttl(ttl)
    async with open_client(invocation, agent) as hf:
        written = await hf.keys.patch(
            key,
            cast("dict[str, Any]", change),
            expected_version=expected_version,
            tags=tag,
            session=session,
            ttl=ttl_s,
            changed_by=by,
            change_type=change_type,
        )
    tell_version(written, as_json=invocation.json)


async def append(
    invocation: Invocation,
    key: Key,
    item: Annotated[str, typer.Argument(help="Any JSON. - reads standard input.")],
    expected_version: ExpectedVersion = None,
    ttl: TimeToLive = None,
    tag: NewTags = None,
    session: Session = None,
    by: ChangedBy = None,
    change_type: ChangeType = None,
    agent: Agent = "cli",
) -> None:
    """Append an item to the list that a named context holds; one that there is none of begins as []."""
    value = _parse_json(item, "item")
    ttl_s = parse_ttl(ttl)
    async with open_client(invocation, agent) as hf:
        written = await hf.keys.append(
            key,
            value,
            expected_version=expected_version,
            tags=tag,
            session=session,
            ttl=ttl_s,
            changed_by=by,
            change_type=change_type,
        )
    tell_version(written, as_json=invocation.json)


async def rollback(
    invocation: Invocation,
    key: Key,
    version: Annotated[int, typer.Argument(min=1, help="The version to go back to.")],
    expected_version: ExpectedVersion = None,
    by: ChangedBy = None,
    change_type: ChangeType = None,
    agent: Agent = "cli",
) -> None:
    """Write a new version that equals an old one; what came between stays in the history."""
    async with open_client(invocation, agent) as hf:
        written = await hf.keys.rollback(
            key, version, expected_version=expected_version, changed_by=by, change_type=change_type
        )
    tell_version(written, as_json=invocation.json)


async def rm(
    invocation: Invocation,
    key: Key,
    expected_version: ExpectedVersion = None,
    by: ChangedBy = None,
    change_type: ChangeType = None,
    agent: Agent = "cli",
) -> None:
    """Delete a named context: it reads as absent, its history stays, and 'rollback' brings it back."""
    async with open_client(invocation, agent) as hf:
        written = await hf.keys.delete(key, expected_version=expected_version, changed_by=by, change_type=change_type)
    tell_version(written, as_json=invocation.json)


def parse_ttl(text: str | None) -> float | None:
    """Returns a time to live as the SDK takes it: seconds, or for ever."""
    if text is None:
        return None
    if text == NEVER:
        return math.inf
    seconds = parse_duration_s(text, "ttl")
    if seconds <= 0:
        raise InvalidFieldError("a ttl of 0 would expire at once", field="ttl", hint=f"write {NEVER} for no expiry")
    return seconds


def _parse_json(text: str, field: str) -> Any:
    import msgspec

    from holdfast.schemas.bodies import check_json, check_size

    raw = sys.stdin.buffer.read(limits.BODY_BYTES + 1) if text == "-" else text.encode("utf-8", "surrogateescape")
    check_size(raw, field)
    try:
        check_json(raw, field)
    except InvalidFieldError as error:
        raise InvalidFieldError(error.message, field=field, hint="write text in double quotes: '\"ready\"'") from error
    return msgspec.json.decode(raw)
