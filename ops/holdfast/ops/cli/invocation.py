"""What every command shares: the global options, the merged settings, and how a command is declared and run.

A global option may stand before the command's name or after it; after it is stronger.
"""

from __future__ import annotations

import asyncio
import inspect
import signal
import sys
from collections.abc import Callable, Coroutine
from functools import cached_property, wraps
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import typer

from holdfast.ops.cli import exit_codes
from holdfast.ops.settings import LoadedSettings, LogLevel, Settings, load_settings

_PANEL: Final = "Global options (before or after the command)"

# The parameters of typer that every command takes beside its own.
_SHARED: Final[tuple[tuple[str, Any], ...]] = (
    (
        "data",
        Annotated[
            Path | None, typer.Option("--data", help="The data directory.", show_default=False, rich_help_panel=_PANEL)
        ],
    ),
    (
        "nats_url",
        Annotated[
            str | None,
            typer.Option("--nats-url", help="NATS server to use.", rich_help_panel=_PANEL),
        ],
    ),
    (
        "nats_creds",
        Annotated[Path | None, typer.Option("--nats-creds", help="Credentials file for it.", rich_help_panel=_PANEL)],
    ),
    (
        "nats_context",
        Annotated[
            str | None,
            typer.Option("--nats-context", help="A context of the NATS CLI, or @selected.", rich_help_panel=_PANEL),
        ],
    ),
    (
        "namespace",
        Annotated[
            str | None, typer.Option("--namespace", help="Namespace to work in (default).", rich_help_panel=_PANEL)
        ],
    ),
    (
        "config",
        Annotated[
            Path | None,
            typer.Option("--config", help="Settings file (holdfast.toml, if any).", rich_help_panel=_PANEL),
        ],
    ),
    (
        "log_level",
        Annotated[
            Literal["debug", "info", "warning", "error"] | None,
            typer.Option("--log-level", help="Least severe log lines on stderr.", rich_help_panel=_PANEL),
        ],
    ),
    (
        "json",
        Annotated[
            bool,
            typer.Option("--json", help="One JSON object a line.", rich_help_panel=_PANEL),
        ],
    ),
)

Result = TypeVar("Result")
CommandFunction = Callable[..., Any]


class Invocation:
    """One run of a command: its global options, and the settings merged from them when first asked for."""

    def __init__(self, options: dict[str, Any], context: typer.Context, *, quiet: bool = True) -> None:
        self._context = context
        self.json: bool = bool(options.get("json"))
        self._config: Path | None = options.get("config")
        self._flags = {name: value for name, value in options.items() if name not in ("json", "config")}
        self._quiet = quiet

    def add_flags(self, flags: dict[str, object]) -> None:
        """Adds flags of the command itself that are settings; to be called before the settings are read."""
        self._flags |= flags

    def show_help(self) -> None:
        """Prints the help of this command to stdout."""
        text = self._context.get_help()
        if text:  # with rich, it has been printed by then
            sys.stdout.write(text + "\n")

    @cached_property
    def loaded(self) -> LoadedSettings:
        """The settings and their sources; reading them sets up the log.  Raises ConfigurationError."""
        loaded = load_settings(self._flags, config=self._config)
        # Imported here: what only prints help needs no log.
        from holdfast.ops.log_output import configure_logging

        level: LogLevel = loaded.settings.log_level
        if self._quiet and loaded.sources["log_level"] == "default":
            # A short command says what it did by its output; a service, by its log.
            level = "warning"
        configure_logging(level, loaded.settings.log_format)
        return loaded

    @property
    def settings(self) -> Settings:
        """The merged settings."""
        return self.loaded.settings


def shared_signature(function: CommandFunction) -> list[inspect.Parameter]:
    """Returns the parameters of a command function with the global options behind its own."""
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    clashes = {name for name, _ in _SHARED}.intersection(parameter.name for parameter in parameters)
    if clashes:
        raise TypeError(f"{function.__name__} names parameters like global options: {', '.join(clashes)}")
    extra = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if name == "json" else None,
            annotation=annotation,
        )
        for name, annotation in _SHARED
    ]
    return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters] + extra


def command(
    app: typer.Typer,
    name: str,
    *,
    examples: tuple[str, ...],
    quiet: bool = True,
    default_of_group: bool = False,
    uvloop: bool = False,
) -> Callable[[CommandFunction], CommandFunction]:
    """Registers a function as a command; its first parameter is the Invocation, the others are options and arguments.

    The docstring's first paragraph is the help, ``examples`` follow it.  A coroutine function is run in an event loop
    of its own, of uvloop when that is asked for and installed.  What the function returns, if it is a number, is the
    exit status.  ``default_of_group`` makes it what a group of commands does when none of them is named.
    """

    def register(function: CommandFunction) -> CommandFunction:
        parameters = shared_signature(function)[1:]
        shared = {option for option, _ in _SHARED}

        @wraps(function)
        def run(typer_context: typer.Context, **values: Any) -> None:
            options = _merged(typer_context, values, shared)
            if default_of_group and typer_context.invoked_subcommand is not None:
                typer_context.obj = options
                return
            own = {key: value for key, value in values.items() if key not in shared}
            result = function(Invocation(options, typer_context, quiet=quiet), **own)
            if inspect.iscoroutine(result):
                result = run_async(result, uvloop=uvloop)
            if isinstance(result, int) and result != exit_codes.OK:
                raise typer.Exit(result)

        context_parameter = inspect.Parameter(
            "typer_context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
        )
        signature = inspect.Signature([context_parameter, *parameters])
        run.__signature__ = signature  # type: ignore[attr-defined]  # what inspect.signature looks for first
        run.__annotations__ = {key: parameter.annotation for key, parameter in signature.parameters.items()}
        help_text = _help(inspect.getdoc(function) or "", examples)
        if default_of_group:
            app.callback(invoke_without_command=True, help=help_text)(run)
        else:
            app.command(name, help=help_text)(run)
        return function

    return register


def _merged(context: typer.Context, values: dict[str, Any], shared: set[str]) -> dict[str, Any]:
    """Global options of this command over those of the commands before it."""
    inherited: dict[str, Any] = dict(context.obj or {})
    given = {key: value for key, value in values.items() if key in shared and value not in (None, False)}
    return inherited | given


def _help(doc: str, examples: tuple[str, ...]) -> str:
    # \b keeps the line breaks of a paragraph; elsewhere a line break of the source is none of the text.
    paragraphs = [" ".join(paragraph.split("\n")) for paragraph in doc.split("\n\n")]
    listed = "\n\n\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)
    return "\n\n".join(paragraphs) + (listed if examples else "")


def run_async(main: Coroutine[Any, Any, Result], *, uvloop: bool = False) -> Result:
    """Runs a coroutine to its end.  SIGTERM cancels it, as Ctrl-C does; both raise only when it has cleaned up."""

    async def guarded() -> Result:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        terminated = False

        def terminate() -> None:
            nonlocal terminated
            terminated = True
            task.cancel()

        loop.add_signal_handler(signal.SIGTERM, terminate)
        try:
            return await main
        except asyncio.CancelledError:
            if terminated:
                raise typer.Exit(exit_codes.TERMINATED) from None
            raise
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    with asyncio.Runner(loop_factory=_uvloop_factory() if uvloop else None) as runner:
        return runner.run(guarded())


def _uvloop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
