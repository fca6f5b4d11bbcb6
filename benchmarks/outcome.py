"""How a run ends: what fails does not stop what comes after it, and is told at the end and by the exit code."""

from __future__ import annotations

import asyncio
import signal
import textwrap
import traceback
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.event_loop import Loop, run_on_loop

if TYPE_CHECKING:
    from rich.console import Console

FAILED: Final = 1
STOPPED: Final = 130
"""The exit code of what was interrupted, as shells have it."""
TOLD_CHARACTERS: Final = 200
"""Of an error, whose trace has been printed."""
_STOPS: Final = (signal.SIGINT, signal.SIGTERM)


class Outcome:
    """What came in between while a run measured; its figures and curves are in their file by then."""

    def __init__(self) -> None:
        self.failures: dict[str, Exception] = {}
        self.is_stopped = False

    def run(self, loop: Loop, main: Coroutine[Any, Any, None]) -> None:
        """Runs a coroutine to its end, or until it fails or SIGINT or SIGTERM comes; what it holds is then closed.

        A second signal does not wait for that.
        """
        before = {number: signal.getsignal(number) for number in _STOPS}
        try:
            run_on_loop(loop, self._until_stopped(main))
        except (KeyboardInterrupt, asyncio.CancelledError):
            self.is_stopped = True
        except Exception as error:  # noqa: BLE001 - what has been measured is told all the same
            self._note("the run", error)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def _until_stopped(self, main: Coroutine[Any, Any, None]) -> None:
        task = asyncio.current_task()
        assert task is not None

        def stop() -> None:
            if self.is_stopped:
                raise KeyboardInterrupt
            self.is_stopped = True
            task.cancel()

        for number in _STOPS:
            asyncio.get_running_loop().add_signal_handler(number, stop)
        await main

    def fail(self, name: str, error: Exception) -> None:
        """Notes what failed, with its trace at once; raises it again in a run that is being stopped."""
        # What a cancellation has turned into on its way out must not keep the run going.  Task.cancelling() cannot
        # tell: a task group whose tasks fail while it ends leaves it above zero (Python 3.11).
        if self.is_stopped:
            raise error
        self._note(name, error)

    def tell(self, what: str, path: Path | None, console: Console, progress: Console) -> int:
        """Says where the outcome is (None: it could not be written) and what failed; returns the exit code."""
        console.print(f"{what}: {path or 'nothing was written'}", markup=False, soft_wrap=True)
        for name, error in self.failures.items():
            told = textwrap.shorten(repr(error), TOLD_CHARACTERS, placeholder=" …")
            progress.print(f"failed: {name}: {told}", markup=False, soft_wrap=True)
        if self.is_stopped:
            progress.print("stopped before the end")
            return STOPPED
        return FAILED if self.failures or path is None else 0

    def _note(self, name: str, error: Exception) -> None:
        self.failures[name] = error
        traceback.print_exception(error)
