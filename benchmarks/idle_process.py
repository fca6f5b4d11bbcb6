"""A process of its own that does nothing, for the memory that it takes: an SDK, all workers, or what they stand on.

``client``: connected by the SDK; ``plain``: connected by nats-py; ``worker``: all workers of one system; ``libraries``:
connected by nats-py, with the libraries of the lake imported.
"""

from __future__ import annotations

import argparse
import importlib
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from benchmarks.children import serve
from benchmarks.event_loop import default_loop, run_on_loop

WHATS: Final = ("client", "plain", "worker", "libraries")
LIBRARIES: Final = ("pyarrow.parquet", "deltalake", "duckdb", "lmdb")


async def main() -> None:
    """Serves until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", choices=WHATS, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()

    async def nothing(_: dict[str, Any]) -> dict[str, Any]:
        return {}

    async with AsyncExitStack() as stack:
        # Imported here, each what it needs and nothing else.
        if arguments.what == "client":
            from holdfast.client import connect

            hf = await stack.enter_async_context(connect(arguments.url, "bench"))
            await hf.resolve(await hf.put({"once": "so that what is loaded late is loaded"}))
        elif arguments.what == "worker":
            from holdfast.ops.cli.service_commands import without_pandas
            from holdfast.streams.connection_target import ConnectionTarget
            from holdfast.workers.settings import WORKERS, WorkerSettings
            from holdfast.workers.system import run_workers

            stack.enter_context(without_pandas())  # as 'holdfast up' and 'holdfast worker' do
            settings = WorkerSettings(lake=arguments.data / "lake", index=arguments.data / "index")
            target = ConnectionTarget(url=arguments.url, origin="benchmark")
            await stack.enter_async_context(run_workers(target, WORKERS, settings))
        else:
            import nats

            client = await nats.connect(arguments.url)
            stack.push_async_callback(client.close)
            if arguments.what == "libraries":
                for library in LIBRARIES:
                    importlib.import_module(library)
        await serve({"ready": True}, nothing)


if __name__ == "__main__":
    run_on_loop(default_loop(), main())
