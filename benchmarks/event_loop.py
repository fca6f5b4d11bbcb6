"""The event loop that every side of a figure runs on: uvloop where it is installed, as in workers and command line."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Coroutine
from typing import Any, Literal

Loop = Literal["uvloop", "asyncio"]


def default_loop() -> Loop:
    """Returns uvloop if it is installed."""
    return "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"


def run_on_loop(loop: Loop, main: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine to its end on a new loop of this kind."""
    if loop == "uvloop":
        import uvloop

        uvloop.run(main)
    else:
        asyncio.run(main)
