"""``holdfast migrate``: events that embed their context become events that refer to it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from holdfast.ops.cli import exit_codes, output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.ops.cli.quantities import parse_duration_s
from holdfast.schemas.errors import ConfigurationError, InvalidFieldError, NotFoundError

if TYPE_CHECKING:
    from holdfast.ops.embedded.migration import MigrationCounts, Place, Progress
    from holdfast.ops.embedded.source import EmbeddedSource
    from holdfast.ops.embedded.verification import Verification
    from holdfast.ops.system import System

MOST_LISTED: Final = 20


def register(app: typer.Typer) -> None:
    """Adds the command."""
    command(
        app,
        "migrate",
        examples=(
            "holdfast migrate events.ndjson.gz",
            "holdfast migrate events.ndjson --verify",
            "holdfast migrate ksi.db --table events --clean-up",
            "holdfast migrate events.ndjson --rebuild original.ndjson",
        ),
        uvloop=True,
    )(migrate)


async def migrate(
    invocation: Invocation,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="NDJSON (.gz, .zst) or a SQLite database.")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare every event with what the store gives back, and write the new form."),
    ] = False,
    clean_up: Annotated[
        bool, typer.Option("--clean-up", help="Verify, then replace the embedded contexts in FILE by references.")
    ] = False,
    no_backup: Annotated[bool, typer.Option("--no-backup", help="Of a clean-up: keep no FILE.embedded.")] = False,
    rebuild: Annotated[
        Path | None, typer.Option("--rebuild", metavar="OUT", help="Only write the original events back, as NDJSON.")
    ] = None,
    flush: Annotated[bool, typer.Option("--flush", help="Wait until all of it is on disk in the lake.")] = False,
    table: Annotated[str | None, typer.Option("--table", help="Of a database: the table.")] = None,
    columns: Annotated[
        str | None,
        typer.Option("--columns", help="Of a table: json=COLUMN, or name=…,data=…,context=…,id=…"),
    ] = None,
    recent: Annotated[str, typer.Option("--recent", help="What counts as recent, and comes first: 1h, 24h.")] = "24h",
) -> int:
    """Turn events with an embedded context (_ksi_context) into events that refer to it.

    The lineage becomes fields of the event, everything else a context that all events of its shape share; every event
    can be put together again byte for byte. The steps: look at the source; new events (nothing to do); recent events;
    all others; and with --clean-up, after every event was compared, the embedded contexts are replaced.

    Run again after an interruption it goes on where it was, and stores nothing twice.
    """
    recent_s = parse_duration_s(recent, "recent")
    if rebuild is not None:
        return await _rebuild(invocation, path, table, rebuild)
    from holdfast.ops.embedded.source import open_source

    source = open_source(path, table, columns)
    report = await migrate_source(
        invocation,
        source,
        recent_s=recent_s,
        check=verify or clean_up,
        clean=clean_up,
        backup=not no_backup,
        wait=flush,
    )
    return exit_codes.OK if report else exit_codes.VIOLATION


async def migrate_source(
    invocation: Invocation,
    source: EmbeddedSource,
    *,
    recent_s: float | None = None,
    check: bool = False,
    clean: bool = False,
    backup: bool = True,
    wait: bool = False,
) -> bool:
    """Migrates a source, tells of it, and returns whether what was to be verified is equal."""
    import msgspec

    from holdfast.ops.embedded.migration import RECENT_S, Migration, save_progress
    from holdfast.ops.system import open_system
    from holdfast.workers import control

    loaded = invocation.loaded
    wholes = _Wholes(source, as_json=invocation.json)
    results: dict[str, Any] = {}
    ok = True
    async with (
        open_system(loaded, ("archiver", "resolver")) as system,
        system.connect(loaded.settings.namespace, "migrate") as hf,
    ):
        with _progress(quiet=invocation.json) as (on_step, on_progress):
            migration = Migration(
                hf,
                source,
                recent_s=RECENT_S if recent_s is None else recent_s,
                on_step=on_step,
                on_progress=on_progress,
                on_whole=wholes.add,
            )
            noted = await migration.run()
        wholes.finish()
        counts = migration.counts
        if not invocation.json:
            _write_counts(source, counts)
        if check or wait:
            async with system.open_connection() as connection:
                await control.flush(connection)
        if check:
            verification, files = await asyncio.to_thread(_check, system, hf.namespace, source, clean, backup)
            ok = verification.ok
            noted.verified = ok
            if "cleaned" in files:
                noted.cleaned, noted.left_digest = True, files.pop("left")
            await save_progress(hf, source, noted)
            results = {"verification": msgspec.to_builtins(verification), **files}
            if not invocation.json:
                _write_verification(verification, files, clean=clean)
    if invocation.json:
        output.write_json({**msgspec.to_builtins(counts), **results})
    return ok


def _check(
    system: System, namespace: str, source: EmbeddedSource, clean: bool, backup: bool
) -> tuple[Verification, dict[str, str]]:
    """Verifies a source; writes its new form, or replaces the old one, when every event is equal."""
    from holdfast.lake import connect as connect_lake
    from holdfast.ops.embedded.cleaning import clean_up, write_references
    from holdfast.ops.embedded.migration import RECENT_S
    from holdfast.ops.embedded.source import LinesSource
    from holdfast.ops.embedded.survey import survey
    from holdfast.ops.embedded.verification import EmbeddedStore, verify
    from holdfast.streams.tail import open_tail

    found = survey(source.items(), RECENT_S)
    with connect_lake(system.lake, tail=open_tail(system.target), live=("events", "contexts")) as sql, sql.pinned():
        verification = verify(EmbeddedStore(sql, namespace), namespace, source, found.ids)
    files: dict[str, str] = {}
    if verification.ok and clean and found.events:
        kept = clean_up(namespace, source, found.ids, keep_backup=backup)
        left = survey(source.items(), RECENT_S)
        files = {"cleaned": str(source.path), "left": left.digest} | ({} if kept is None else {"backup": str(kept)})
    elif verification.ok and isinstance(source, LinesSource) and found.events:
        files = {"references": str(write_references(namespace, source, found.ids))}
    return verification, files


async def _rebuild(invocation: Invocation, path: Path, table: str | None, out: Path) -> int:
    from holdfast.ops.embedded.migration import load_progress
    from holdfast.ops.system import open_system

    source = _named_source(path, table)
    loaded = invocation.loaded
    async with (
        open_system(loaded, ("archiver", "resolver")) as system,
        system.connect(loaded.settings.namespace, "migrate") as hf,
    ):
        noted = await load_progress(hf, source)
        if noted is None:
            raise NotFoundError(
                f"no migration of {source.name} is noted in namespace {hf.namespace!r}",
                field="path",
                hint="name the file as it was when it was migrated",
            )
        if noted.done < noted.events:
            raise InvalidFieldError(
                f"{noted.done:,} of {noted.events:,} events of {source.name} are migrated",
                field="path",
                hint=f"run 'holdfast migrate {path}' to its end first",
            )
        count = await asyncio.to_thread(_write_back, system, hf.namespace, noted, out)
    if invocation.json:
        output.write_json({"events": count, "path": str(out)})
    else:
        output.write_line(f"{count:,} events written to {out}, equal to the original byte for byte")
    return exit_codes.OK


def _named_source(path: Path, table: str | None) -> EmbeddedSource:
    """The source that a path named when it was migrated; it need not be there any more."""
    from holdfast.ops.embedded.source import Columns, LinesSource, TableSource, is_database, open_source

    if table is not None:
        return TableSource(path, Columns(table=table))
    return open_source(path) if path.is_file() and is_database(path) else LinesSource(path)


def _write_back(system: System, namespace: str, noted: Progress, out: Path) -> int:
    from holdfast.lake import connect as connect_lake
    from holdfast.ops.embedded.verification import EmbeddedStore, write_back
    from holdfast.ops.export_files import compressed
    from holdfast.streams.tail import open_tail

    temporary = out.with_name(f".{out.name}.tmp")
    try:
        with (
            connect_lake(system.lake, tail=open_tail(system.target), live=("events", "contexts")) as sql,
            sql.pinned(),
            temporary.open("wb") as file,
            closing(compressed(file, out.name)) as target,
        ):
            count = write_back(EmbeddedStore(sql, namespace), noted, target)
        temporary.replace(out)
    except OSError as error:
        raise ConfigurationError(f"{str(out)!r} cannot be written: {error}", hint="choose another file") from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


class _Wholes:
    """Lists the first events that are kept whole, after the progress bar is gone, and counts the others."""

    def __init__(self, source: EmbeddedSource, *, as_json: bool) -> None:
        self._name = source.name
        self._as_json = as_json
        self._listed: list[Place] = []
        self._count = 0

    def add(self, place: Place) -> None:
        """Notes one."""
        self._count += 1
        if len(self._listed) < MOST_LISTED:
            self._listed.append(place)

    def finish(self) -> None:
        """Writes them; in JSON they are only counted."""
        if self._as_json:
            return
        for place in self._listed:
            output.remark(f"kept whole: {self._name}:{place.line}: {place.reason}")
        if self._count > len(self._listed):
            output.remark(f"and {self._count - len(self._listed)} more that are kept whole")


def _no_step(number: int, text: str) -> None:
    """Tells nothing."""


Reporters = tuple[Callable[[int, str], None], Callable[["MigrationCounts"], None]]


@contextmanager
def _progress(*, quiet: bool) -> Generator[Reporters]:
    """Yields what shows the steps, and the counts of the step under way where there is a terminal."""
    if quiet:
        yield _no_step, lambda _: None
        return
    from holdfast.ops.embedded.migration import STEPS

    def on_step(number: int, text: str) -> None:
        output.remark(f"{number}/{len(STEPS)} {STEPS[number - 1]}: {text}")

    if not sys.stderr.isatty():
        yield on_step, lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("migrating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("migrate", total=None)
        yield (
            on_step,
            lambda counts: bar.update(task, completed=counts.resumed + counts.sent, total=counts.events),
        )


def _write_counts(source: EmbeddedSource, counts: MigrationCounts) -> None:
    rate = counts.sent / counts.seconds if counts.seconds else 0
    sent = f"{counts.sent:,} sent in {counts.seconds:.2f} s ({rate:,.0f} a second)"
    lines = (
        f"{counts.events:,} events of {source.name}; {sent}",
        f"  new       {counts.new:,}, recent {counts.hot:,}, older {counts.cold:,}, stored before {counts.resumed:,}",
        f"  contexts  {counts.contexts:,} distinct",
        f"  whole     {counts.whole:,}, of them unreadable {counts.unreadable:,}; repeated ids {counts.repeated:,}",
    )
    for line in lines:
        output.write_line(line)
    if counts.references_already:
        output.write_line(f"  already   {counts.references_already:,} carry references")


def _write_verification(verification: Verification, files: dict[str, str], *, clean: bool) -> None:
    output.write_line(
        f"{verification.equal:,} of {verification.events:,} events come back byte for byte, with their lineage"
    )
    for place in verification.places:
        output.remark(f"not equal: line {place.line}: {place.reason}")
    if clean and not verification.ok:
        output.remark("nothing was cleaned up")
    for what, path in files.items():
        output.write_line(f"  {what:<10} {path}")


__all__ = ["migrate_source", "register"]
