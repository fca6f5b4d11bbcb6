"""``holdfast demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.ops.cli import output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.schemas.errors import NotFoundError


def register(app: typer.Typer) -> None:
    """Adds the command."""
    command(
        app,
        "demo",
        examples=(
            "holdfast demo",
            "holdfast demo --traces ./traces",
            "holdfast demo --data ./demo-data    (keeps what it stores)",
        ),
        uvloop=True,
    )(demo)


async def demo(
    invocation: Invocation,
    traces: Annotated[Path | None, typer.Option("--traces", help="Show the same on recorded traces.")] = None,
) -> None:
    """See it work in half a minute: three small agents read, measure and review Python's standard library.

    They are programs, not language models, and hand each other references only. A server, workers and data of its own
    are used and removed at the end, unless --data or --nats-url names others.
    """
    import msgspec

    from holdfast.ops.demo.screen import DemoScreen
    from holdfast.ops.demo.story import demo_system, tell
    from holdfast.ops.traces import find_traces

    loaded = invocation.loaded
    files = None
    if traces is not None:
        files = find_traces([traces]).files
        if not files:
            raise NotFoundError(f"no traces under {traces}", field="traces", hint="see 'holdfast import --help'")
    # Named for this run, not for every run: a variable of the environment says where real data is.
    named = [loaded.sources[name] for name in ("data", "nats_url", "nats_context")]
    screen = DemoScreen(quiet=invocation.json)
    try:
        async with demo_system(loaded, keep=any(source.startswith("--") for source in named)) as (system, temporary):
            screen.begin(system.data, system.target.url, temporary=temporary)
            story = await tell(system, loaded.settings.namespace, screen, files)
    finally:
        screen.stop()
    if invocation.json:
        output.write_json(msgspec.to_builtins(story))
    else:
        screen.show(story, temporary=temporary, data=system.data)
