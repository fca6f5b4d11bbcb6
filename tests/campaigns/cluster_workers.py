"""The workers beside the campaign against a cluster: one process, which nothing that is done to the cluster may end.

Holds no tests itself.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec

from holdfast.workers.settings import WORKERS
from tests.running import settings_in

WINDOW_S: Final = 60.0
_HOT_S: Final = 10.0

_WORKERS: Final = """
import asyncio, sys
import msgspec
from holdfast.ops.log_output import configure_logging
from holdfast.streams.connection_target import ConnectionTarget
from holdfast.workers.settings import WorkerSettings
from holdfast.workers.system import run_workers

async def main() -> None:
    configure_logging("info", "json")
    settings = msgspec.json.decode(sys.argv[2], type=WorkerSettings, dec_hook=lambda kind, value: kind(value))
    target = ConnectionTarget(url=sys.argv[1], origin="campaign")
    async with run_workers(target, sys.argv[3].split(","), settings) as running:
        print("ready", flush=True)
        await running.wait_failed()

asyncio.run(main())
"""


class Workers:
    """All workers as one process on the cluster; started again when it dies, which is told."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._folder = folder
        self.lake = folder / "lake"
        self.deaths: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id, while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    async def start(self) -> None:
        """Starts them; returns when they serve."""
        settings = settings_in(
            self._folder,
            "workers",
            replicas=3,
            archive_interval_s=1.0,
            purge_interval_s=3.0,
            compact_interval_s=20.0,
            hot_window_s=_HOT_S,
            duplicate_window_s=WINDOW_S,
        )
        with (self._folder / "workers.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-c", _WORKERS, self._url),
                    msgspec.json.encode(settings, enc_hook=str).decode(),
                    ",".join(WORKERS),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(self._process.stdout.readline), 60)
        if line != b"ready\n":
            raise RuntimeError(f"the workers did not start: see {self._folder / 'workers.log'}")

    async def look(self) -> None:
        """Notes it, and starts them again, when they have died: nothing that a cluster does may end them."""
        if self._process is not None and self._process.poll() is not None:
            log = (self._folder / "workers.log").read_text(errors="replace").strip().splitlines()
            self.stop()
            self.deaths.append(f"the workers ended with {self._process.returncode}: {' | '.join(log[-3:])}"[:1_000])
            await self.start()

    def stop(self) -> None:
        """Kills them."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
