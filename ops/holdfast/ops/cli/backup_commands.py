"""``holdfast backup``, ``restore`` and ``backups``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.ops.cli import exit_codes, output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.ops.cli.quantities import format_bytes, format_seconds, parse_moment
from holdfast.schemas.errors import InvalidFieldError

if TYPE_CHECKING:
    from holdfast.ops.backup_restore import RestoreReport
    from holdfast.workers.backup.manifest import BackupListing


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(
        app,
        "backup",
        examples=("holdfast backup /mnt/other-disk/holdfast", "holdfast backup --json | jq .new_bytes"),
    )(backup)
    command(
        app,
        "restore",
        examples=(
            "holdfast restore /mnt/other-disk/holdfast --data ./restored",
            "holdfast restore /mnt/other-disk/holdfast --before 2026-01-31T09:30:00Z --data ./restored",
        ),
    )(restore)
    command(
        app,
        "backups",
        examples=("holdfast backups /mnt/other-disk/holdfast", "holdfast backups DIR --verify --json"),
    )(backups)


async def backup(
    invocation: Invocation,
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Directory of backups; the setting backup_directory, if none.")
    ] = None,
) -> int:
    """Back up the whole system while it runs: everything acknowledged so far is in it.

    Files of the lake that an earlier backup in DIR holds are not copied again. Backups older than backup_retention_s
    are taken away, the newest one never. The exit status is 5 when files of the lake were found damaged.
    """
    import msgspec

    from holdfast.ops.system import open_system
    from holdfast.workers.backup.making import make_backup

    settings = invocation.settings
    async with open_system(invocation.loaded, ()) as system, system.open_connection() as connection:
        report = await make_backup(
            connection,
            system.lake,
            _directory(invocation, directory),
            retention_s=settings.backup_retention_s,
            copies=None if settings.copy_directory is None else Path(settings.copy_directory),
        )
    if invocation.json:
        output.write_json(msgspec.to_builtins(report))
    else:
        output.write_line(
            f"backup {report.id}: {report.messages:,} messages, {report.rows:,} rows of the lake, "
            f"{format_bytes(report.bytes)}, of which {format_bytes(report.new_bytes)} are new; "
            f"{format_seconds(report.seconds)}"
        )
        for path in report.damaged:
            output.remark(f"damaged, and stored as it is: {path}; 'holdfast verify' tells what it held")
        if report.removed:
            output.write_line(f"{len(report.removed)} older backups removed")
    return exit_codes.VIOLATION if report.damaged else exit_codes.OK


async def restore(
    invocation: Invocation,
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Directory of backups; the setting backup_directory, if none.")
    ] = None,
    backup: Annotated[str | None, typer.Option("--backup", metavar="ID", help="This backup, not the newest.")] = None,
    before: Annotated[
        str | None, typer.Option("--before", metavar="TIME", help="The newest from before a time: ISO 8601, or 2d ago.")
    ] = None,
) -> int:
    """Restore a backup into an empty system, and verify it.

    The data directory must be new or empty; with --nats-url the streams are restored on that server, which must hold
    none of them. Nothing is in place before all of it is verified. The exit status is 5 when the backup is damaged, or
    when what was backed up was not whole.
    """
    from datetime import UTC, datetime

    import msgspec

    from holdfast.ops.backup_restore import restore_backup
    from holdfast.ops.discovery import resolve_connection

    loaded = invocation.loaded
    if backup is not None and before is not None:
        raise InvalidFieldError("--backup and --before both choose a backup", field="before", hint="give one of them")
    report = await restore_backup(
        _directory(invocation, directory),
        loaded.settings.data_path,
        backup_id=backup,
        before=None if before is None else parse_moment(before, "before", datetime.now(UTC)),
        target=resolve_connection(loaded, local=False),
        replicas=getattr(loaded.settings, "replicas", 1),
    )
    if invocation.json:
        output.write_json(msgspec.to_builtins(report))
    else:
        _write_restored(report, loaded.settings.data_path)
    return exit_codes.VIOLATION if report.violations else exit_codes.OK


def backups(
    invocation: Invocation,
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Directory of backups; the setting backup_directory, if none.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every object and compare its sha256.")] = False,
) -> int:
    """List the complete backups of a directory, oldest first: time, size, and what each brought.

    A backup that was cut off is not listed. The exit status is 5 when one is damaged.
    """
    import msgspec

    from holdfast.workers.backup.listing import list_backups

    found = list_backups(_directory(invocation, directory), verify=verify)
    if invocation.json:
        for listing in found:
            output.write_json(msgspec.to_builtins(listing))
    else:
        _write_list(found)
    return exit_codes.VIOLATION if any(listing.state == "damaged" for listing in found) else exit_codes.OK


def _directory(invocation: Invocation, given: Path | None) -> Path:
    if given is not None:
        return given.absolute()
    configured = invocation.settings.backup_directory
    if configured is None:
        raise InvalidFieldError(
            "no directory of backups is named", field="directory", hint="give DIR, or set backup_directory"
        )
    return Path(configured)


def _write_restored(report: RestoreReport, data: Path) -> None:
    output.write_line(
        f"backup {report.id} restored into {data}: {report.messages:,} messages, {report.rows:,} rows of the lake, "
        f"{report.archived:,} more archived; {format_seconds(report.seconds)}"
    )
    for violation in report.violations:
        output.write_line(f"{violation.invariant}  {violation.object}: {violation.what}")
        output.write_line(f"    next: {violation.next_step}")
    if not report.violations:
        checked = sum(report.checked.values())
        output.write_line(f"ok: {checked:,} checks, no violation")


def _write_list(found: list[BackupListing]) -> None:
    columns = ("backup", "time", "size", "new", "messages", "rows", "state")
    rows = [
        (
            listing.id,
            listing.time,
            format_bytes(listing.bytes),
            format_bytes(listing.new_bytes),
            f"{listing.messages:,}",
            f"{listing.rows:,}",
            listing.state if listing.problem is None else f"{listing.state}: {listing.problem}",
        )
        for listing in found
    ]
    output.write_table(columns, rows, right=("size", "new", "messages", "rows"))
