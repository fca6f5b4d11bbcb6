"""``holdfast stats``, ``health``, ``metrics`` and ``config``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import typer

from holdfast.ops.cli import exit_codes, output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.ops.cli.quantities import format_bytes


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(app, "stats", examples=("holdfast stats", "holdfast stats --json | jq .hot.contexts"))(stats)
    command(app, "health", examples=("holdfast health", "holdfast health --json || systemctl status holdfast"))(health)
    command(app, "metrics", examples=("holdfast metrics", "holdfast metrics --json | jq '.metrics[].name'"))(metrics)
    command(app, "config", examples=("holdfast config", "holdfast config --data ./data --json"))(config)


async def stats(invocation: Invocation) -> None:
    """Show what each tier holds, how far archiving is, and how many dead letters there are."""
    from holdfast.ops.system import open_system

    loaded = invocation.loaded
    async with open_system(loaded, ("resolver",)) as system, system.connect(loaded.settings.namespace) as hf:
        answer = await hf.stats()
    if invocation.json:
        output.write_json(answer)
    else:
        output.write_table(("what", "value"), _lines(answer), right=("value",))


def _lines(answer: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in answer.items():
        path = f"{prefix} {name}".strip()
        if isinstance(value, dict):
            yield from _lines(cast("dict[str, Any]", value), path)
        elif isinstance(value, list):
            # Only what works on events: one line each, how it stands.
            for item in cast("list[dict[str, Any]]", value):
                about = ", ".join(f"{count:,} {what}" for what, count in item.items() if isinstance(count, int))
                yield f"{path} {item['namespace']}/{item['name']}", about
        elif isinstance(value, int) and not isinstance(value, bool):
            yield path, format_bytes(value) if name == "bytes" else f"{value:,}"
        else:
            yield path, str(value)


async def health(invocation: Invocation) -> int:
    """Tell whether every promise is kept, and of each that is not what to do next.

    The exit status is 5 when one is broken or in danger, 3 when nobody answers.
    """
    from holdfast.ops.system import open_system
    from holdfast.workers.settings import WORKERS

    loaded = invocation.loaded
    async with open_system(loaded, WORKERS) as system, system.connect(loaded.settings.namespace) as hf:
        answer = await hf.health()
        if system.embedded:
            output.remark("nothing was running: server and workers were started for this answer alone")
    problems: list[dict[str, Any]] = answer.get("problems", [])
    if invocation.json:
        output.write_json(answer)
    elif answer["ok"]:
        output.write_line("ok")
    else:
        for problem in problems:
            output.write_line(f"{problem['invariant']}  {problem['object']}: {problem['what']}")
            output.write_line(f"    next: {problem['next_step']}")
    return exit_codes.OK if answer["ok"] else exit_codes.VIOLATION


async def metrics(invocation: Invocation) -> None:
    """Show what there is to measure, as Prometheus reads it, or as JSON.

    'holdfast up --metrics-port' serves the same over HTTP.
    """
    import msgspec

    from holdfast.ops.system import open_system
    from holdfast.workers.exposition import Metric, render_text
    from holdfast.workers.settings import WORKERS

    loaded = invocation.loaded
    async with open_system(loaded, WORKERS) as system, system.connect(loaded.settings.namespace) as hf:
        answer = await hf.call_resolver("metrics", {})
    if invocation.json:
        output.write_json(answer)
    else:
        for line in render_text(msgspec.convert(answer["metrics"], list[Metric])).splitlines():
            output.write_line(line)


def config(invocation: Invocation) -> None:
    """Show every setting with its effective value and where it comes from; secrets are masked."""
    import msgspec

    from holdfast.ops.settings import describe_settings

    lines = describe_settings(invocation.loaded)
    if invocation.json:
        for line in lines:
            output.write_json(msgspec.to_builtins(line))
    else:
        output.write_table(
            ("setting", "value", "from", "meaning"),
            [(line.name, line.value, line.source, line.description) for line in lines],
        )
