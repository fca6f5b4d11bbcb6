"""The entry point of ``holdfast``: its commands, and the one place where an error becomes an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from holdfast.ops.cli import (
    archive_commands,
    backup_commands,
    checkpoint_commands,
    context_commands,
    dead_commands,
    demo_command,
    encryption_commands,
    event_commands,
    exit_codes,
    export_command,
    handler_commands,
    import_command,
    job_commands,
    key_commands,
    key_list_commands,
    lineage_command,
    migrate_command,
    output,
    policy_commands,
    service_commands,
    session_commands,
    snapshot_commands,
    sql_command,
    status_commands,
    torture_command,
    verify_command,
)
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.schemas.errors import InputError

_EXIT_STATUS = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in exit_codes.MEANINGS)

app = typer.Typer(
    name="holdfast",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog=f"\b\nExit status:\n{_EXIT_STATUS}",
)


class UsageError(InputError):
    """The command line cannot be understood."""

    code = "usage"


@command(
    app,
    "holdfast",
    examples=(
        "holdfast demo                       see it work, in half a minute",
        "holdfast up                         run a server and all workers here",
        'holdfast put \'{"goal": "book a flight"}\' --kind plan',
        "holdfast import ./traces && holdfast flush",
        "holdfast sql 'SELECT name, count(*) FROM events GROUP BY ALL'",
    ),
    default_of_group=True,
)
def holdfast(
    invocation: Invocation,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Holdfast keeps the contexts of AI agents: publish once, hand on references, resolve hot or cold.

    Commands use the server that --nats-url or the environment names, else the one that 'holdfast up' runs on the data
    directory, else they start one on it for as long as they run.
    """
    if version:
        output.write_line(f"holdfast {_version()}")
        return
    invocation.show_help()


for _module in (
    service_commands,
    demo_command,
    import_command,
    migrate_command,
    export_command,
    context_commands,
    event_commands,
    handler_commands,
    lineage_command,
    key_commands,
    key_list_commands,
    session_commands,
    snapshot_commands,
    job_commands,
    policy_commands,
    sql_command,
    archive_commands,
    status_commands,
    dead_commands,
    encryption_commands,
    checkpoint_commands,
    backup_commands,
    verify_command,
    torture_command,
):
    _module.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command line and exits with its status; shows no traceback unless ``HOLDFAST_DEBUG`` is set."""
    status = run(list(sys.argv[1:] if arguments is None else arguments))
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = _abandon_stdout()
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit status; what went wrong has been told on stderr."""
    as_json = "--json" in arguments
    try:
        result = app(args=arguments, prog_name="holdfast", standalone_mode=False)
        return result if isinstance(result, int) else exit_codes.OK
    except typer.Exit as finished:
        return finished.exit_code
    except typer.Abort:
        return exit_codes.INTERRUPTED
    except typer.TyperException as error:
        hint = "see 'holdfast --help'"
        output.report_error(UsageError(_sentence(error.format_message()), hint=hint), as_json=as_json)
        return exit_codes.USAGE
    except (BrokenPipeError, SystemExit):
        # Typer and rich turn a closed pipe into an exit of their own.
        return _abandon_stdout()
    except KeyboardInterrupt:
        output.remark("interrupted")
        return exit_codes.INTERRUPTED
    except BaseExceptionGroup as failures:
        return _fail(_first_cause(failures), as_json=as_json)
    except Exception as error:  # noqa: BLE001  the boundary: nothing is above it but the interpreter
        return _fail(error, as_json=as_json)


def _fail(error: BaseException, *, as_json: bool) -> int:
    output.report_error(error, as_json=as_json)
    return exit_codes.exit_code_of(error)


def _version() -> str:
    from importlib.metadata import version

    return version("holdfast")


def _sentence(message: str) -> str:
    text = message.strip().rstrip(".")
    return text[:1].lower() + text[1:]


def _first_cause(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    from holdfast.ops.system import first_cause

    return first_cause(failures)


def _abandon_stdout() -> int:
    # The interpreter flushes once more at its end, and would complain there.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exit_codes.PIPE_CLOSED
