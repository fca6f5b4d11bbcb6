"""``holdfast sql``."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, cast

import typer

from holdfast.ops.cli import output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.schemas.errors import InvalidFieldError

if TYPE_CHECKING:
    from holdfast.streams.connection_target import ConnectionTarget

_FETCH: Final = 2_000
"""Rows taken from DuckDB at a time."""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    command(
        app,
        "sql",
        examples=(
            "holdfast sql 'SELECT kind, count(*) AS n, sum(size) FROM contexts GROUP BY 1'",
            "holdfast sql --live 'SELECT count(*) FROM events' --json",
            "holdfast sql --format csv - < question.sql > answer.csv",
        ),
    )(sql)


async def sql(
    invocation: Invocation,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="SQL for DuckDB; - reads it from standard input.")],
    live: Annotated[bool, typer.Option("--live", help="Include what is acknowledged and not archived yet.")] = False,
    form: Annotated[
        Literal["table", "json", "csv"] | None, typer.Option("--format", help="Form of the rows (table).")
    ] = None,
) -> None:
    """Run SQL over the lake: views contexts, events, key_versions.

    Without --live no server is needed: what is archived is read from the files of the data directory. JSON is one
    object a row.
    """
    chosen = form or ("json" if invocation.json else "table")
    text = sys.stdin.read() if query == "-" else query
    loaded = invocation.loaded
    from holdfast.ops.system import LAKE_DIRECTORY, open_system

    async with AsyncExitStack() as stack:
        target = None
        if live:
            target = (await stack.enter_async_context(open_system(loaded))).target
        lake = loaded.settings.data_path / LAKE_DIRECTORY
        # In a thread: DuckDB blocks, and the embedded server's watchers must go on.
        await asyncio.to_thread(_run, lake, target, text, chosen)


def _run(lake: Path, target: ConnectionTarget | None, query: str, form: Literal["table", "json", "csv"]) -> None:
    import duckdb

    from holdfast.lake import connect
    from holdfast.streams.tail import open_tail

    with connect(lake, tail=None if target is None else open_tail(target)) as connection:
        try:
            connection.execute(query)
            columns: list[str] = [column[0] for column in connection.description or ()]
            rows = _rows(connection)
            match form:
                case "json":
                    for row in rows:
                        output.write_json({name: plain(value) for name, value in zip(columns, row, strict=True)})
                case "csv":
                    _write_csv(columns, rows)
                case "table":
                    _write_table(columns, rows)
        except duckdb.Error as error:
            message = str(error).strip()
            raise InvalidFieldError(
                f"the query fails: {message}", field="query", hint="the views are contexts, events and key_versions"
            ) from error


def _rows(connection: Any) -> Iterator[Sequence[Any]]:
    while batch := connection.fetchmany(_FETCH):
        yield from batch


def _write_csv(columns: list[str], rows: Iterator[Sequence[Any]]) -> None:
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_text(value) for value in row] for row in rows)


def _write_table(columns: list[str], rows: Iterator[Sequence[Any]]) -> None:
    # A table is as wide as its widest cell, so all of it is read first; csv and json are written as they come.
    listed = list(rows)
    numbers = [
        name
        for position, name in enumerate(columns)
        if listed and isinstance(listed[0][position], int | float) and not isinstance(listed[0][position], bool)
    ]
    output.write_table(columns, [[_text(value) for value in row] for row in listed], right=numbers)


def plain(value: Any) -> Any:
    """Returns a value of DuckDB as what JSON can hold: times in ISO 8601, bytes in base64, no NaN."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case datetime() | date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case dict():
            return {str(key): plain(item) for key, item in cast("dict[object, Any]", value).items()}
        case list() | tuple():
            return [plain(item) for item in cast("list[Any]", value)]
        case _:
            return value


def _text(value: Any) -> str:
    match value:
        case None:
            return ""
        case bytes():
            return value.hex()
        case dict() | list() | tuple():
            import msgspec

            return msgspec.json.encode(plain(value), enc_hook=str).decode()
        case _:
            return str(value)
