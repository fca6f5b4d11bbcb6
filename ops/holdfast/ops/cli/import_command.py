"""``holdfast import``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from holdfast.ops.cli import exit_codes, output
from holdfast.ops.cli.export_command import STREAM, import_exports
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.schemas.errors import InvalidFieldError, NotFoundError

if TYPE_CHECKING:
    from holdfast.ops.importing import ImportCounts
    from holdfast.ops.traces import Malformed

EMBEDDED: Final = "embedded"
"""The format of events that embed their context: they are migrated, not read as traces."""

_EMBEDDED_SUFFIXES: Final = tuple(
    [f".{plain}{packed}" for plain in ("jsonl", "ndjson", "json") for packed in ("", ".gz", ".zst")]
    + [".db", ".sqlite", ".sqlite3"]
)

MOST_LISTED: Final = 20
"""Malformed places that are listed; the rest is counted."""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    command(
        app,
        "import",
        examples=(
            "holdfast import ./traces",
            "holdfast import ~/.claude/projects --format claude-code",
            "holdfast import runs/*.traj.json.gz --json",
            "holdfast import backup.jsonl.zst --overwrite",
            "holdfast import spans.jsonl --map session=trace_id,id=span_id,parent=parent_span_id,name=name",
        ),
        uvloop=True,
    )(import_traces)


async def import_traces(
    invocation: Invocation,
    paths: Annotated[list[Path], typer.Argument(metavar="PATH…", help="Files, or directories with files of traces.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="auto, steps, tau-bench, mini-swe-agent, openai-messages, claude-code, openhands or embedded.",
        ),
    ] = "auto",
    field_map: Annotated[
        str | None,
        typer.Option(
            "--map", help="Read any JSON lines or array: session=trace_id,id=span_id,parent=parent_span_id,agent==me."
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Of an export: put its newest state on top of a key that has another."),
    ] = False,
) -> int:
    """Import recorded agent traces: each step becomes a context and an event with its session, order, cause and time.

    Importing the same file again adds nothing. What cannot be read is named with file and line; the rest goes on.

    With --map any JSON lines (or array) are read: which member is the session, the record's id, its cause's id (parent,
    which may come later in the file), agent, name, kind, timestamp, correlation, body; '=' before a constant.

    Events with an embedded context (_ksi_context), in files or in a SQLite table, are migrated: see 'holdfast migrate'.

    A file of 'holdfast export' is known by its first line (- reads one from standard input): its keys get all their
    versions and bodies back, with their numbers and times. It is checked first: when it is damaged or cut short,
    nothing is written. A key that has other versions here is skipped, or with --overwrite gets the file's newest state
    as a new version.
    """
    if field_map is not None and form != "auto":
        raise InvalidFieldError("--map and --format exclude each other", field="map", hint="a map says how to read")
    embedded = [] if field_map is not None else _embedded_in(paths, form)
    if embedded:
        await _migrate(invocation, embedded)
        paths = [path for path in paths if path not in embedded]
        if form == EMBEDDED or not paths:
            return exit_codes.OK
    exports = [] if field_map is not None else _exports_in(paths, form)
    if exports:
        return await import_exports(invocation, exports, overwrite=overwrite)
    if overwrite:
        raise InvalidFieldError(
            "--overwrite is for files of 'holdfast export'", field="overwrite", hint="traces are never overwritten"
        )
    import msgspec

    from holdfast.ops.importing import TraceImport
    from holdfast.ops.system import open_system
    from holdfast.ops.traces import find_traces, parse_map

    found = find_traces(paths, "mapped" if field_map is not None else form)
    if not found.files and embedded:
        return exit_codes.OK
    files = found.files
    if field_map is not None:
        chosen = parse_map(field_map)
        files = [msgspec.structs.replace(file, map=chosen) for file in files]
    if not found.files:
        raise NotFoundError(
            f"no traces under {', '.join(map(str, paths))}",
            field="path",
            hint="give files of a known format, or name it with --format",
        )
    loaded = invocation.loaded
    reporter = _MalformedReporter(as_json=invocation.json)
    async with open_system(loaded) as system, system.connect(loaded.settings.namespace, "import") as hf:
        with progress(len(files), quiet=invocation.json) as on_progress:
            runner = TraceImport(hf, on_progress=on_progress, on_malformed=reporter.add)
            counts = await runner.run(files)
    reporter.finish()
    if invocation.json:
        output.write_json(msgspec.to_builtins(counts))
    else:
        _write_counts(counts)
    return exit_codes.OK if counts.steps else exit_codes.ERROR


def _embedded_in(paths: list[Path], form: str) -> list[Path]:
    """The files that hold events with an embedded context: told by their content, or all that there are."""
    from holdfast.ops.embedded.source import is_embedded

    if form not in ("auto", EMBEDDED):
        return []
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            names = (Path(folder, name) for folder, _, files in os.walk(path) for name in sorted(files))
            found += [name for name in names if name.name.endswith(_EMBEDDED_SUFFIXES) and is_embedded(name)]
        elif form == EMBEDDED or (path.is_file() and is_embedded(path)):
            found.append(path)
    return found


async def _migrate(invocation: Invocation, paths: list[Path]) -> None:
    from holdfast.ops.cli.migrate_command import migrate_source
    from holdfast.ops.embedded.source import open_source

    for path in paths:
        await migrate_source(invocation, open_source(path))


def _exports_in(paths: list[Path], form: str) -> list[Path]:
    """The paths when they are exports, nothing when they are traces; raises when they are some of both."""
    from holdfast.ops.export_files import is_export

    if form != "auto":
        return []
    exports = [path for path in paths if str(path) == STREAM or (path.is_file() and is_export(path))]
    if exports and len(exports) < len(paths):
        other = next(path for path in paths if path not in exports)
        raise InvalidFieldError(
            f"{exports[0]} is an export and {other} is not", field="path", hint="import them by commands of their own"
        )
    return exports


class _MalformedReporter:
    """Lists the first malformed places on stderr, after the progress bar is gone, and counts the others."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._listed: list[Malformed] = []
        self._count = 0

    def add(self, place: Malformed) -> None:
        """Notes one."""
        self._count += 1
        if len(self._listed) < MOST_LISTED:
            self._listed.append(place)

    def finish(self) -> None:
        """Writes them."""
        import msgspec

        for place in self._listed:
            if self._as_json:
                body = {"code": "malformed", "message": place.reason, "path": place.path, "line": place.line}
                output.remark(msgspec.json.encode({"error": body}).decode())
            else:
                output.remark(f"malformed: {place}")
        if self._count > len(self._listed):
            output.remark(f"and {self._count - len(self._listed)} more that could not be read")


@contextmanager
def progress(files: int, *, quiet: bool) -> Generator[Callable[[ImportCounts], None]]:
    """Yields what shows the counts so far: as a bar on stderr where that is a terminal, else not at all."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("importing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("files  {task.fields[steps]:,} steps"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("import", total=files, steps=0)
        yield lambda counts: bar.update(task, completed=counts.files, steps=counts.steps)


def _write_counts(counts: ImportCounts) -> None:
    rate = counts.steps / counts.seconds if counts.seconds else 0
    lines = (
        f"{counts.steps:,} steps of {counts.files:,} files in {counts.seconds:.2f} s ({rate:,.0f} a second)",
        f"  contexts  {counts.contexts:,} stored, {counts.distinct_contexts:,} distinct",
        f"  events    {counts.events:,} new",
        f"  errors    {counts.errors:,}",
    )
    for line in lines:
        output.write_line(line)
