"""``holdfast torture``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from holdfast.ops.cli import exit_codes, output
from holdfast.ops.cli.invocation import Invocation, command

if TYPE_CHECKING:
    from holdfast.ops.torture.run import TortureReport


def register(app: typer.Typer) -> None:
    """Adds the command."""
    command(
        app,
        "torture",
        examples=(
            "holdfast torture --seed 7 --seconds 60",
            "holdfast torture --seed 7 --seconds 20 --faults kill-server,kill-worker,evict",
            "holdfast torture --seconds 60 --json | jq .violations",
        ),
    )(torture)


async def torture(
    invocation: Invocation,
    seed: Annotated[int, typer.Option("--seed", help="Decides which fault strikes when, and what is written.")] = 1,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="How long the load lasts.")] = 30.0,
    faults: Annotated[
        str | None, typer.Option("--faults", metavar="A,B", help="The faults to inject; all of them unless given.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", min=1, help="Most writes a second of each producer (no limit).")
    ] = None,
    durability: Annotated[
        Literal["durable", "fast"], typer.Option("--durability", help="The mode of the server under test.")
    ] = "durable",
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the data and the record of a run without findings.")
    ] = False,
) -> int:
    """Prove on this machine that nothing acknowledged is lost or doubled: load, faults, and a check of everything.

    Starts a server and workers of its own in a temporary directory (or in --data), lets producers write and readers
    read while faults strike on a plan that the seed decides, and holds everything that can be read, in three ways,
    against what the producers noted. The exit status is 5 when there are violations; then the data are kept.
    """
    import logging
    import shutil
    import tempfile

    import msgspec

    from holdfast.ops.torture.faults import chosen_faults
    from holdfast.ops.torture.run import TortureOptions
    from holdfast.ops.torture.run import torture as run

    names = chosen_faults(faults)
    # That connections are lost is what this is about; the report says whether anything came of it.
    logging.getLogger("holdfast.streams").setLevel(logging.ERROR)
    given = invocation.loaded.sources["data"].startswith("--")
    if given:
        directory = invocation.loaded.settings.data_path
        directory.mkdir(parents=True, exist_ok=True)
    else:
        directory = Path(tempfile.mkdtemp(prefix="holdfast-torture-"))
    options = TortureOptions(
        seed=seed, seconds=seconds, faults=names, directory=directory, rate=rate, durability=durability
    )
    report = await run(options, output.remark)
    if report.ok and not keep and not given:
        shutil.rmtree(directory, ignore_errors=True)
        report.directory = ""
    if invocation.json:
        output.write_json(msgspec.to_builtins(report))
    else:
        _write_report(report)
    return exit_codes.OK if report.ok else exit_codes.VIOLATION


def _write_report(report: TortureReport) -> None:
    output.write_table(
        ("fault", "injected"), [(name, f"{count:,}") for name, count in report.faults.items()], right=("injected",)
    )
    output.write_line()
    counted = {
        "attempted": report.attempted,
        "acknowledged": report.acknowledged,
        "unknown": report.unknown,
        "refused": report.refused,
        **{f"read during: {name}": count for name, count in report.read_during.items()},
    }
    output.write_table(
        ("counted", "number"), [(name, f"{count:,}") for name, count in counted.items()], right=("number",)
    )
    output.write_line()
    for violation in report.violations:
        output.write_line(f"{violation.invariant}  {violation.object}: {violation.what}")
        for line in violation.history:
            output.write_line(f"      {line}")
    if report.ok:
        output.write_line(f"ok: no violation (seed {report.seed})")
    else:
        output.write_line(f"{len(report.violations)} violations, seed {report.seed}; data in {report.directory}")
