"""``holdfast policy``, ``cleanup`` and ``archive-old-versions``: how long named contexts and their versions stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.ops.cli import output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.ops.cli.key_commands import NEVER, open_client
from holdfast.ops.cli.quantities import parse_duration_s
from holdfast.schemas.errors import InvalidFieldError, NotFoundError

if TYPE_CHECKING:
    from holdfast.schemas.policies import KeyPolicy
    from holdfast.workers.control import CleanupReport, TrimReport

Prefix = Annotated[str, typer.Argument(metavar="PREFIX", help="The beginning of their names; '' is that of all.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(add_completion=False)
    command(
        group,
        "policy",
        examples=(
            "holdfast policy list",
            "holdfast policy set session. --ttl 24h",
            "holdfast policy set store. --max-versions 10 --encrypt",
        ),
        default_of_group=True,
    )(policy)
    command(group, "list", examples=("holdfast policy list", "holdfast policy list --json"))(list_policies)
    command(
        group,
        "set",
        examples=(
            "holdfast policy set session. --ttl 24h",
            "holdfast policy set session.keep. --ttl never",
            "holdfast policy set '' --max-versions 100",
        ),
    )(set_policy)
    command(group, "rm", examples=("holdfast policy rm session.",))(rm)
    app.add_typer(group, name="policy")
    command(app, "cleanup", examples=("holdfast cleanup", "holdfast cleanup --json"))(cleanup)
    command(
        app,
        "archive-old-versions",
        examples=("holdfast archive-old-versions 10", "holdfast archive-old-versions 1 --json"),
    )(archive_old_versions)


async def policy(invocation: Invocation) -> None:
    """Say how long named contexts live, how many versions stay hot and which bodies are encrypted, by prefix."""
    await list_policies(invocation)


async def list_policies(invocation: Invocation) -> None:
    """List the policies of the namespace, by prefix. Each member is taken from the longest prefix that sets it."""
    async with open_client(invocation) as hf:
        policies = await hf.keys.policies()
    prefixes = sorted(policies.prefixes.items())
    if invocation.json:
        for prefix, held in prefixes:
            output.write_json(_policy_json(prefix, held))
    elif not prefixes:
        output.remark("no policies: the built-in ones hold")
    else:
        rows = [
            (prefix or "(every key)", _ttl_text(held.ttl_s), _count_text(held.max_versions), _yes_no(held.encrypt))
            for prefix, held in prefixes
        ]
        output.write_table(("prefix", "ttl", "max versions", "encrypt"), rows, right=("max versions",))


async def set_policy(
    invocation: Invocation,
    prefix: Prefix,
    ttl: Annotated[
        str | None, typer.Option("--ttl", help="Written without a ttl, they expire after 15m, 24h, 7d; or never.")
    ] = None,
    max_versions: Annotated[
        int | None,
        typer.Option("--max-versions", min=0, help="So many versions stay hot once archived; 0: no limit."),
    ] = None,
    encrypt: Annotated[bool | None, typer.Option("--encrypt/--plain", help="Encrypt their bodies, or not.")] = None,
) -> None:
    """Set what holds for the named contexts under a prefix, from their next writing on.

    What is not given is taken from a shorter prefix, else from the built-in defaults.
    """
    from holdfast.schemas.policies import KeyPolicy

    if ttl is None and max_versions is None and encrypt is None:
        raise InvalidFieldError(
            "the policy says nothing", field="policy", hint="give --ttl, --max-versions, --encrypt or --plain"
        )
    ttl_s = None if ttl is None else 0.0 if ttl == NEVER else parse_duration_s(ttl, "ttl")
    held = KeyPolicy(ttl_s=ttl_s, max_versions=max_versions, encrypt=encrypt)
    async with open_client(invocation) as hf:
        await hf.keys.set_policy(prefix, held)
    if invocation.json:
        output.write_json(_policy_json(prefix, held))
    else:
        output.write_line(f"set for {prefix or 'every key'}")


async def rm(invocation: Invocation, prefix: Prefix) -> None:
    """Remove the policy of a prefix: what a shorter prefix says holds again."""
    async with open_client(invocation) as hf:
        if prefix not in (await hf.keys.policies()).prefixes:
            raise NotFoundError(
                f"there is no policy for the prefix {prefix!r} in namespace {hf.namespace!r}",
                field="prefix",
                hint="list them with 'holdfast policy list'",
            )
        await hf.keys.set_policy(prefix, None)
    if invocation.json:
        output.write_json({"prefix": prefix})
    else:
        output.write_line(f"removed for {prefix or 'every key'}")


async def cleanup(invocation: Invocation) -> None:
    """Write the expiry of every named context that is due, now instead of within the janitor's interval.

    They read as absent from the moment they expire, with or without it.
    """
    import msgspec

    from holdfast.ops.system import open_system
    from holdfast.workers import control

    async with open_system(invocation.loaded, ("janitor",)) as system, system.open_connection() as connection:
        report: CleanupReport = await control.cleanup(connection)
    if invocation.json:
        output.write_json(msgspec.to_builtins(report))
    else:
        output.write_line(f"expired {report.expired:,} named contexts")


async def archive_old_versions(
    invocation: Invocation,
    most_versions: Annotated[int, typer.Argument(metavar="N", min=1, help="How many versions of each stay hot.")],
) -> None:
    """Archive the versions of all named contexts, and let all but the newest N of each leave the hot tier.

    The history stays whole: older versions are read from the lake. What is younger than ten minutes stays hot too.
    """
    import msgspec

    from holdfast.ops.system import open_system
    from holdfast.workers import control

    async with open_system(invocation.loaded, ("archiver",)) as system, system.open_connection() as connection:
        report: TrimReport = await control.trim(connection, most_versions)
    if invocation.json:
        output.write_json(msgspec.to_builtins(report))
        return
    output.write_line(
        f"{report.revisions:,} versions of {report.keys:,} named contexts left the hot tier, {report.left:,} stay there"
    )


def _policy_json(prefix: str, held: KeyPolicy) -> dict[str, Any]:
    import msgspec

    return {"prefix": prefix, **msgspec.to_builtins(held)}


def _ttl_text(ttl_s: float | None) -> str | None:
    if ttl_s is None:
        return None
    return f"{ttl_s:,.0f} s" if ttl_s else NEVER


def _count_text(count: int | None) -> str | None:
    if count is None:
        return None
    return f"{count:,}" if count else "no limit"


def _yes_no(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"
