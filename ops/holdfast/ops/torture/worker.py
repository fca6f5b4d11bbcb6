"""Workers as a process of their own, on a server that others start::

    python -m holdfast.ops.torture.worker --url nats://127.0.0.1:4222 --workers archiver,janitor --settings '{…}'

Prints ``ready`` when they serve; runs until SIGTERM, or fails as ``holdfast worker`` does.  The settings are those of
:class:`holdfast.workers.settings.WorkerSettings`, all of them, which the command line does not offer.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, cast

import msgspec

from holdfast.ops.torture.clock import shift_clock
from holdfast.streams.connection_target import ConnectionTarget
from holdfast.workers.settings import WorkerName, WorkerSettings
from holdfast.workers.system import run_workers


async def _run(url: str, names: list[WorkerName], settings: WorkerSettings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with run_workers(ConnectionTarget(url=url, origin="torture"), names, settings) as workers:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        failed = asyncio.ensure_future(workers.wait_failed())
        stopped = asyncio.ensure_future(stop.wait())
        done, pending = await asyncio.wait({failed, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if failed in done:
            failed.result()


def _as_path(kind: type, value: Any) -> Any:
    return kind(value)


def main() -> None:
    """Runs workers; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--workers", required=True)
    parser.add_argument("--settings", required=True)
    chosen = parser.parse_args()
    logging.basicConfig(
        level=os.environ.get("HOLDFAST_TORTURE_LOG", "WARNING"),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s %(error)s",
        stream=sys.stderr,
    )
    logging.getLogger().handlers[0].setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s %(error)s", defaults={"error": ""})
    )
    shift_clock()
    settings = msgspec.json.decode(chosen.settings.encode(), type=WorkerSettings, dec_hook=_as_path)
    asyncio.run(_run(chosen.url, cast("list[WorkerName]", chosen.workers.split(",")), settings))


def settings_text(settings: WorkerSettings) -> str:
    """Returns settings as the argument of the command line."""
    return msgspec.json.encode(settings, enc_hook=_as_text).decode()


def _as_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"no text for {type(value).__name__}")


if __name__ == "__main__":
    main()
