"""``holdfast flush``, ``evict`` and ``accept-gap``: calls to the archiver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.ops.cli import output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.ops.cli.quantities import format_seconds, parse_duration_s
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.rows import TABLES

if TYPE_CHECKING:
    from holdfast.workers.control import EvictReport, FlushReport


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(app, "flush", examples=("holdfast flush", "holdfast flush --json"))(flush)
    command(
        app,
        "evict",
        examples=(
            "holdfast evict --older-than 24h",
            "holdfast flush && holdfast evict --older-than 0s",
        ),
    )(evict)
    command(app, "accept-gap", examples=("holdfast health", "holdfast accept-gap events"))(accept_gap)


async def flush(invocation: Invocation) -> None:
    """Archive everything that is acknowledged so far, and wait until it is on disk in the lake."""
    import msgspec

    from holdfast.ops.system import open_system
    from holdfast.workers import control

    async with open_system(invocation.loaded, ("archiver",)) as system, system.open_connection() as connection:
        report: FlushReport = await control.flush(connection)
    if invocation.json:
        output.write_json(msgspec.to_builtins(report))
        return
    marks = ", ".join(f"{table} {seq:,}" for table, seq in report.watermarks.items())
    rows = sum(report.rows.values())
    output.write_line(f"archived {rows:,} rows in {format_seconds(report.seconds)}; now all up to: {marks}")


async def evict(
    invocation: Invocation,
    older_than: Annotated[
        str, typer.Option("--older-than", help="Of what is archived, purge what is older: 0s, 15m, 24h, 7d.")
    ],
) -> None:
    """Purge archived contexts from the hot tier; they resolve from the lake from then on.

    What is not archived yet stays, whatever its age.
    """
    import msgspec

    from holdfast.ops.system import open_system
    from holdfast.workers import control

    older_than_s = parse_duration_s(older_than, "older-than")
    async with open_system(invocation.loaded, ("archiver",)) as system, system.open_connection() as connection:
        report: EvictReport = await control.evict(connection, older_than_s)
    if invocation.json:
        output.write_json(msgspec.to_builtins(report))
        return
    output.write_line(f"purged {report.purged:,} messages from the hot tier, {report.left:,} are left")


async def accept_gap(
    invocation: Invocation,
    table: Annotated[str, typer.Argument(metavar="TABLE", help=f"One of {', '.join(TABLES)}.")],
) -> None:
    """Give up messages that are missing from a stream, for good, so that archiving goes on behind them.

    For an operator who knows why they are gone: 'holdfast health' names them.
    """
    from holdfast.ops.system import open_system
    from holdfast.workers import control

    if table not in TABLES:
        raise InvalidFieldError(f"there is no table {table[:40]!r}", field="table", hint=f"one of {', '.join(TABLES)}")
    async with open_system(invocation.loaded, ("archiver",)) as system, system.open_connection() as connection:
        report = await control.accept_gap(connection, table)
    if invocation.json:
        output.write_json(report)
        return
    alarms = report.get("alarms", 0)
    if report.get("from") is not None:
        output.write_line(f"given up: {table} {report['from']} to {report['to']}")
    elif not alarms:
        output.write_line(f"no gap: {table} is archived without one")
    if alarms:
        output.write_line(f"ended: {alarms} alarm{'s' if alarms > 1 else ''} of {table}")
