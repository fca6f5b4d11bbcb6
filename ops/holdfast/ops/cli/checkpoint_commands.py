"""``holdfast checkpoint save | restore | verify | show``, and ``holdfast warm``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from holdfast.ops.cli import exit_codes, output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.ops.cli.quantities import format_bytes, parse_moment

if TYPE_CHECKING:
    from holdfast.client.checkpoints import CheckpointData
    from holdfast.client.warming import WarmReport

File = Annotated[
    Path | None,
    typer.Argument(
        metavar="FILE",
        help="A checkpoint; without one, the newest in $HOLDFAST_CHECKPOINTS or ./holdfast-checkpoints.",
        show_default=False,
    ),
]

_WIDTH: Final = 10


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(add_completion=False)
    command(
        group,
        "checkpoint",
        examples=(
            "holdfast checkpoint save before.checkpoint",
            "holdfast checkpoint show before.checkpoint --json",
            "holdfast checkpoint restore before.checkpoint --data ./elsewhere",
            "holdfast checkpoint verify before.checkpoint --data ./elsewhere",
        ),
        default_of_group=True,
    )(checkpoint)
    command(
        group,
        "save",
        examples=("holdfast checkpoint save before.checkpoint", "holdfast checkpoint save --namespace shop"),
        uvloop=True,
    )(save)
    command(
        group,
        "restore",
        examples=(
            "holdfast checkpoint restore before.checkpoint --data ./elsewhere",
            "holdfast checkpoint restore --merge",
        ),
        uvloop=True,
    )(restore)
    command(
        group,
        "verify",
        examples=("holdfast checkpoint verify before.checkpoint", "holdfast checkpoint verify --json | jq .missing"),
        uvloop=True,
    )(verify)
    command(group, "show", examples=("holdfast checkpoint show before.checkpoint",))(show)
    app.add_typer(group, name="checkpoint")
    command(
        app,
        "warm",
        examples=("holdfast warm --since 24h", "holdfast warm --since 7d --kind plan --limit 100000000"),
        uvloop=True,
    )(warm)


async def checkpoint(invocation: Invocation) -> None:
    """Capture the hot state in one file while the system runs, restore it elsewhere, and compare the two."""
    invocation.show_help()


async def save(
    invocation: Invocation,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="Where to write; without one, a new file in $HOLDFAST_CHECKPOINTS or ./holdfast-checkpoints.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Id of the checkpoint (the time).")] = None,
) -> int:
    """Capture what is hot, of all namespaces unless one is named, into one consistent file, while the system runs.

    Contexts, versions of named contexts, events and dead letters that are in the streams. Everything acknowledged
    before is in it. What only the lake holds is not: keep the lake, too.
    """
    from holdfast.client.checkpoints import SUFFIX, capture_to, default_directory, make_directory, new_checkpoint_id
    from holdfast.ops.system import open_system
    from holdfast.schemas.ids import now_ms

    loaded = invocation.loaded
    chosen = name or new_checkpoint_id(now_ms())
    if file is None:
        make_directory(default_directory())
        file = default_directory() / f"{chosen}{SUFFIX}"
    namespace = None if loaded.sources["namespace"] == "default" else loaded.settings.namespace
    async with (
        open_system(loaded, None) as system,
        system.connect(loaded.settings.namespace, "checkpoint") as hf,
    ):
        with _progress("capturing", quiet=invocation.json) as told:
            data = await capture_to(hf, file, chosen, namespace=namespace, on_progress=told)
    _write_info(data, as_json=invocation.json)
    return exit_codes.OK


async def restore(
    invocation: Invocation,
    file: File = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Into a system that is not empty: what is there stays as it is.")
    ] = False,
) -> int:
    """Restore a checkpoint into an empty system: contexts, named contexts with their numbers, events with their ids.

    The file is checked to its end before anything is written. A restore that was cut off is completed by the same
    command; nothing is doubled. Producers' times stay, the server's are new.
    """
    from holdfast.client.checkpoints import Checkpoints
    from holdfast.ops.system import open_system

    loaded = invocation.loaded
    async with open_system(loaded, ()) as system, system.connect(loaded.settings.namespace, "checkpoint") as hf:
        checkpoints = Checkpoints(hf)
        data = await checkpoints.load_context_checkpoint(path=file)
        with _progress("restoring", quiet=invocation.json) as told:
            report = await checkpoints.restore_context_state(data, merge=merge, on_progress=told)
    if invocation.json:
        output.write_json(
            {
                "checkpoint_id": report.checkpoint_id,
                "stored": _named(report.stored),
                "present": _named(report.present),
                "repeated": report.repeated,
                "buried": report.buried,
                "skipped": report.skipped,
                "skipped_keys": report.skipped_keys,
            }
        )
    else:
        _write_counts(("stored", "there already"), (report.stored, report.present))
        if report.buried:
            output.write_line(f"{report.buried:,} that are none of ours are dead letters now: see 'holdfast dead'")
    for key in report.keys:
        output.remark(f"skipped: {key}: the system has another chain of versions")
    if report.skipped_keys > len(report.keys):
        output.remark(f"and {report.skipped_keys - len(report.keys):,} more keys that were skipped")
    return exit_codes.OK


async def verify(invocation: Invocation, file: File = None) -> int:
    """Compare a checkpoint with a system, item by item, hot and cold; the exit status is 5 when something is missing.

    Contexts by their digests, named contexts by version and content, events by id and content. Changes nothing.
    """
    import msgspec

    from holdfast.client.checkpoints import Checkpoints
    from holdfast.ops.system import open_system

    loaded = invocation.loaded
    async with (
        open_system(loaded, ("resolver",)) as system,
        system.connect(loaded.settings.namespace, "checkpoint") as hf,
    ):
        checkpoints = Checkpoints(hf)
        data = await checkpoints.load_context_checkpoint(path=file)
        with _progress("comparing", quiet=invocation.json) as told:
            report = await checkpoints.verify_context_checkpoint(data, on_progress=told)
    if invocation.json:
        output.write_json(
            {
                "ok": report.ok,
                "checkpoint_id": report.checkpoint_id,
                **{part: _named(getattr(report, part)) for part in ("checked", "hot", "cold", "missing", "different")},
                "findings": msgspec.to_builtins(report.findings),
            }
        )
    else:
        _write_counts(
            ("checked", "hot", "cold", "missing", "different"),
            (report.checked, report.hot, report.cold, report.missing, report.different),
        )
        for finding in report.findings:
            output.write_line(f"{finding.what} {finding.name}: {finding.reason}")
        output.write_line("ok: everything is there" if report.ok else "not ok: see 'missing' and 'different'")
    return exit_codes.OK if report.ok else exit_codes.VIOLATION


async def show(invocation: Invocation, file: File = None) -> int:
    """Check a checkpoint to its end and say what it holds; touches no system."""
    from functools import partial

    from holdfast.client.checkpoint_file import check_file
    from holdfast.client.checkpoint_scratch import in_thread
    from holdfast.client.checkpoints import CheckpointData, default_directory, find_checkpoint

    chosen = file if file is not None else await in_thread(partial(find_checkpoint, default_directory()))
    data = CheckpointData(chosen, await in_thread(partial(check_file, chosen)), is_spooled=False)
    _write_info(data, as_json=invocation.json)
    return exit_codes.OK


async def warm(
    invocation: Invocation,
    since: Annotated[str, typer.Option("--since", help="How far back: 24h, 7d, or a time in ISO 8601.")] = "24h",
    kind: Annotated[str | None, typer.Option("--kind", help="Contexts of this kind alone.")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="BYTES", help="Most bytes to bring back (1 GiB).")
    ] = None,
) -> int:
    """Bring contexts back from the lake into the hot tier: those stored since then, newest first.

    What is hot stays as it is; a second run finds nothing to do. They count as stored again now, so they stay hot for
    another window.
    """
    from datetime import UTC, datetime

    import msgspec

    from holdfast.client.warming import LIMIT_BYTES, Warming
    from holdfast.ops.system import open_system
    from holdfast.schemas.ids import ms_from_utc
    from holdfast.schemas.names import check_kind

    moment = parse_moment(since, "since", datetime.now(UTC))
    if kind is not None:
        check_kind(kind)
    loaded = invocation.loaded
    async with (
        open_system(loaded, ("resolver",)) as system,
        system.connect(loaded.settings.namespace, "warm") as hf,
    ):
        runner = Warming(hf, kind=kind, limit_bytes=LIMIT_BYTES if limit is None else limit)
        report: WarmReport = await runner.run(ms_from_utc(moment))
    if invocation.json:
        output.write_json(msgspec.to_builtins(report))
    else:
        output.write_line(
            f"{report.stored:,} contexts are hot again ({report.parts:,} parts, {format_bytes(report.bytes)}) "
            f"in {report.seconds:.2f} s, {report.hot:,} were hot already"
        )
        if not report.is_whole:
            output.write_line("stopped at the limit of bytes: there are older ones")
    if report.failed:
        output.remark(f"{report.failed:,} contexts could not be read whole; see 'holdfast verify'")
    return exit_codes.VIOLATION if report.failed else exit_codes.OK


@contextmanager
def _progress(what: str, *, quiet: bool) -> Generator[Callable[[int, int], None]]:
    """Yields what shows how far it is: as a bar on stderr where that is a terminal, else not at all."""
    if quiet or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _named(counts: Sequence[int]) -> dict[str, int]:
    from holdfast.client.checkpoint_file import ITEM_NAMES

    return dict(zip(ITEM_NAMES, counts, strict=True))


def _write_counts(columns: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    from holdfast.client.checkpoint_file import ITEM_NAMES

    rows = [(name.replace("_", " "), *(f"{some[place]:,}" for some in counts)) for place, name in enumerate(ITEM_NAMES)]
    output.write_table(("", *columns), rows, right=columns)


def _write_info(data: CheckpointData, *, as_json: bool) -> None:
    from holdfast.schemas.ids import iso_from_ms

    header, summary = data.info.header, data.info.summary
    told: dict[str, Any] = {
        "path": str(data.path),
        "checkpoint_id": header.checkpoint_id,
        "created_at": iso_from_ms(header.created_at_ms),
        "namespace": header.namespace,
        **data.counts,
        "purged": summary.purged,
        "elsewhere": summary.elsewhere,
        "unreadable": summary.unreadable,
        "size": data.info.size,
        "digest": data.info.digest,
    }
    if as_json:
        points = {
            point.stream: {"epoch": point.epoch, "first_seq": point.first_seq, "last_seq": point.last_seq}
            for point in header.points
        }
        output.write_json(told | {"points": points})
        return
    whose = "all namespaces" if header.namespace is None else f"namespace {header.namespace}"
    output.write_line(f"checkpoint {header.checkpoint_id} of {told['created_at']}, {whose}")
    for name, count in data.counts.items():
        output.write_line(f"  {count:>{_WIDTH},} {name.replace('_', ' ')}")
    output.write_line(f"  {format_bytes(data.info.size)} in {data.path}")
    if summary.elsewhere:
        output.write_line(f"{summary.elsewhere:,} contexts that these refer to are in the lake alone")
    if summary.purged:
        output.write_line(f"{summary.purged:,} messages left the hot tier while it was captured: they are in the lake")
