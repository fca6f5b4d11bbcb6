"""``holdfast verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.ops.cli import exit_codes, output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.schemas.errors import DataDirectoryError

if TYPE_CHECKING:
    from holdfast.ops.verify import VerifyReport


def register(app: typer.Typer) -> None:
    """Adds the command."""
    command(
        app,
        "verify",
        examples=(
            "holdfast verify",
            "holdfast verify --deep",
            "holdfast verify --data ./backup --offline",
            "holdfast verify --json | jq .ok",
        ),
    )(verify)


async def verify(
    invocation: Invocation,
    offline: Annotated[bool, typer.Option("--offline", help="Check the lake's files only; start nothing.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Hash every file of the lake, and of its copy, whole.")] = False,
) -> int:
    """Check the promises of a data directory or a running system, and print what was counted.

    I1: everything acknowledged is readable, once. I3: watermarks are in order, nothing above one was purged. I4: every
    file has its checksums, every body hashes to its reference; of a damaged file the rows are named. I5: every file of
    the logs is what was written. Reads everything, changes nothing. The exit status is 5 when there are violations.
    """
    import msgspec

    from holdfast.ops.discovery import resolve_connection
    from holdfast.ops.system import EMBEDDED_ROLE, LAKE_DIRECTORY, open_system, worker_settings
    from holdfast.ops.verify import verify as verify_all

    loaded = invocation.loaded
    data = loaded.settings.data_path
    lake = data / LAKE_DIRECTORY
    copy = worker_settings(loaded.settings, EMBEDDED_ROLE).copy_directory
    has_lake = lake.is_dir()
    # What runs somewhere is checked as it is; a server is started only where there is something for it to serve.
    has_server = not offline and (resolve_connection(loaded, local=True) is not None or (data / "jetstream").is_dir())
    if not has_lake and not has_server:
        raise DataDirectoryError(
            f"{data} holds nothing to verify", field="data", hint="give the data directory with --data, or a --nats-url"
        )
    if has_server:
        async with open_system(loaded, None) as system, system.open_connection() as connection:
            # Of a server on this data directory the lake is here, or there is none yet; another's may be anywhere.
            is_ours = system.target.durability is not None
            if not has_lake and not is_ours:
                output.remark(f"no lake at {lake}: only the digests of the hot tier can be checked")
            report = await verify_all(
                lake if has_lake else None, connection, nothing_archived=is_ours, deep=deep, copy=copy
            )
    else:
        report = await verify_all(lake, None, deep=deep, copy=copy)
    if invocation.json:
        output.write_json(msgspec.to_builtins(report))
    else:
        _write_report(report)
    return exit_codes.OK if report.ok else exit_codes.VIOLATION


def _write_report(report: VerifyReport) -> None:
    output.write_table(
        ("checked", "count"), [(name, f"{count:,}") for name, count in report.checked.items()], right=("count",)
    )
    output.write_line()
    for violation in report.violations:
        output.write_line(f"{violation.invariant}  {violation.object}: {violation.what}")
        output.write_line(f"    next: {violation.next_step}")
    output.write_line("ok: no violation" if report.ok else f"{len(report.violations)} violations")
