"""``holdfast export``, and what ``holdfast import`` does with its files."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final, cast

import typer

from holdfast.ops.cli import exit_codes, output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.schemas.errors import HoldfastError, InvalidFieldError

if TYPE_CHECKING:
    from holdfast.ops.export_import import ExportImportCounts, KeyOutcome
    from holdfast.ops.exporting import ExportCounts
    from holdfast.ops.system import System

MOST_LISTED: Final = 20
"""Keys and references that are named; the rest is counted."""

STREAM: Final = "-"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    command(
        app,
        "export",
        examples=(
            "holdfast export backup.jsonl.zst",
            "holdfast export plans.jsonl --prefix store.plans.",
            "holdfast export - | ssh other holdfast import -",
        ),
        uvloop=True,
    )(export)


async def export(
    invocation: Invocation,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Where to write; .gz and .zst are compressed, - is standard output.")
    ],
    prefix: Annotated[str, typer.Option("--prefix", help="Export the keys that begin with this alone.")] = "",
) -> int:
    """Export named contexts: every version of every key, hot and cold, with bodies, as one JSON object a line.

    Each body is checked against its reference. Encrypted bodies stay encrypted. The file is replaced when the export
    is complete, not before. Contexts that no key refers to, and events, are not in it.
    """
    from holdfast.ops.export_format import ExportWriter
    from holdfast.ops.exporting import KeyExport
    from holdfast.ops.system import open_system
    from holdfast.schemas.ids import now_ms

    loaded = invocation.loaded
    namespace = loaded.settings.namespace
    reporter = _Reporter(as_json=invocation.json)
    async with open_system(loaded, ("resolver",)) as system, system.connect(namespace, "export") as hf:
        with _target(file) as opened:
            writer = ExportWriter(opened, namespace, prefix=prefix, created_at_ms=now_ms())
            archived = await _archived_keys(system, namespace, prefix)
            runner = KeyExport(hf, writer, prefix=prefix, archived_keys=archived, on_missing=reporter.missing)
            counts = await runner.run()
    reporter.finish("references whose body could not be read")
    _report_export(counts, as_json=invocation.json, to_stderr=file == STREAM)
    return exit_codes.VIOLATION if counts.missing else exit_codes.OK


class _Target:
    """A file that says what to do when it cannot be written."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path

    def write(self, raw: bytes) -> int:
        """Writes bytes; raises InvalidFieldError when the disk is full."""
        try:
            return self._file.write(raw)
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def flush(self) -> None:
        """Nothing: the file is flushed when it is complete."""


@contextmanager
def _target(file: str) -> Generator[BinaryIO]:
    """Yields what to write to; a file takes its name when the block ends well, and is on the disk by then."""
    from holdfast.ops.export_files import compressed

    if file == STREAM:
        yield sys.stdout.buffer
        sys.stdout.flush()
        return
    path = Path(file)
    # A pipe or a device is written to, never replaced.
    is_special = path.exists() and not path.is_file()
    partial = path if is_special else path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with _opened(partial, path, "wb" if is_special else "xb") as opened:
            written = compressed(cast(BinaryIO, _Target(opened, path)), path.name)
            yield written
            written.close()
            _settle(opened, partial, path)
    finally:
        if not is_special:
            partial.unlink(missing_ok=True)


@contextmanager
def _opened(partial: Path, path: Path, mode: str) -> Generator[BinaryIO]:
    try:
        file = cast(BinaryIO, partial.open(mode))
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error
    with file:
        yield file


def _settle(opened: BinaryIO, partial: Path, path: Path) -> None:
    """Sees to it that the file is on the disk, under its name."""
    try:
        opened.flush()
        if partial != path:
            os.fsync(opened.fileno())
            partial.replace(path)
            _sync_directory(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> InvalidFieldError:
    reason = error.strerror if isinstance(error, OSError) else None
    return InvalidFieldError(
        f"{str(path)!r} cannot be written: {reason or error}", field="file", hint="choose another place"
    )


def _sync_directory(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


async def _archived_keys(system: System, namespace: str, prefix: str) -> list[str]:
    """The keys that the lake knows, when it is on this machine: some were deleted so long ago that they have left the
    bucket."""
    from holdfast.ops.exporting import keys_in_lake

    if not system.lake.is_dir():
        return []
    return await asyncio.to_thread(keys_in_lake, system.lake, namespace, prefix)


def _report_export(counts: ExportCounts, *, as_json: bool, to_stderr: bool) -> None:
    import msgspec

    text = (
        f"{counts.versions:,} versions of {counts.keys:,} keys, {counts.contexts:,} contexts "
        f"in {counts.seconds:.2f} s, {counts.missing:,} missing"
    )
    if to_stderr:
        # Standard output is the export.
        output.remark(msgspec.json.encode(counts).decode() if as_json else text)
    elif as_json:
        output.write_json(msgspec.to_builtins(counts))
    else:
        output.write_line(text)


async def import_exports(invocation: Invocation, paths: Sequence[Path], *, overwrite: bool) -> int:
    """Imports exports, one after another, and reports their counts together."""
    from holdfast.ops.export_files import spooled_stdin
    from holdfast.ops.export_import import ExportImport, ExportImportCounts
    from holdfast.ops.system import open_system

    loaded = invocation.loaded
    reporter = _Reporter(as_json=invocation.json)
    total = ExportImportCounts()
    async with (
        open_system(loaded, ("resolver",)) as system,
        system.connect(loaded.settings.namespace, "import") as hf,
        AsyncExitStack() as stack,
    ):
        for path in paths:
            file = await stack.enter_async_context(spooled_stdin()) if str(path) == STREAM else path
            counts = await ExportImport(hf, overwrite=overwrite, on_key=reporter.key).run(file)
            total = total.plus(counts)
    reporter.finish("keys that were not imported")
    _report_import(total, as_json=invocation.json)
    return exit_codes.ERROR if total.failed else exit_codes.OK


def _report_import(counts: ExportImportCounts, *, as_json: bool) -> None:
    import msgspec

    if as_json:
        output.write_json(msgspec.to_builtins(counts))
        return
    lines = (
        f"{counts.versions:,} versions of {counts.keys:,} keys in {counts.seconds:.2f} s",
        f"  imported  {counts.imported:,} keys, {counts.written:,} versions",
        f"  skipped   {counts.skipped:,} keys",
        f"  failed    {counts.failed:,} keys",
    )
    for line in lines:
        output.write_line(line)


class _Reporter:
    """Names the first keys and references on stderr that something is to be said of, and counts the others."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._listed: list[dict[str, object]] = []
        self._count = 0

    def key(self, outcome: KeyOutcome) -> None:
        """Notes a key that was skipped or failed."""
        self._add({"code": outcome.outcome, "key": outcome.key, "message": outcome.reason, "line": outcome.line})

    def missing(self, ref: str, error: HoldfastError) -> None:
        """Notes a reference whose body could not be read."""
        self._add({"code": "missing", "ref": ref, "message": error.message})

    def finish(self, what: str) -> None:
        """Writes them."""
        import msgspec

        for note in self._listed:
            if self._as_json:
                output.remark(msgspec.json.encode({"error": note}).decode())
            else:
                line = f" (line {note['line']})" if "line" in note else ""
                output.remark(f"{note['code']}: {note.get('key') or note.get('ref')}: {note['message']}{line}")
        if self._count > len(self._listed):
            output.remark(f"and {self._count - len(self._listed)} more {what}")

    def _add(self, note: dict[str, object]) -> None:
        self._count += 1
        if len(self._listed) < MOST_LISTED:
            self._listed.append(note)
