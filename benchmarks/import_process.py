"""A process of its own that is a whole Holdfast: an embedded server, all workers, and imports on demand.

Each request names a namespace and a path; the answer says how long the import and then the archiving took.  It runs on
the loop that ``holdfast up`` runs on.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from benchmarks.bench import create_raw_streams, target_of
from benchmarks.children import serve
from benchmarks.raw_nats import plain_client
from holdfast.client import connect
from holdfast.ops.importing import TraceImport
from holdfast.ops.server import EmbeddedServer
from holdfast.ops.server_config import ServerSettings
from holdfast.ops.traces import find_traces
from holdfast.workers.control import flush
from holdfast.workers.settings import WORKERS, WorkerSettings
from holdfast.workers.system import run_workers


async def main() -> None:
    """Serves until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    data: Path = parser.parse_args().data
    settings = WorkerSettings(lake=data / "lake", index=data / "index")
    async with EmbeddedServer(ServerSettings(data=data)) as server:
        url = server.info.nats_url
        async with run_workers(target_of(url), WORKERS, settings):
            async with plain_client(url) as client:
                await create_raw_streams(client)

            async def import_and_flush(request: dict[str, Any]) -> dict[str, Any]:
                began = time.perf_counter()
                async with connect(target_of(url), request["namespace"], "import") as hf:
                    counts = await TraceImport(hf).run(find_traces([request["path"]]).files)
                    imported = time.perf_counter()
                    await flush(hf.connection)
                return {
                    "counts": msgspec.to_builtins(counts),
                    "import_s": imported - began,
                    "total_s": time.perf_counter() - began,
                }

            await serve({"url": url}, import_and_flush)


if __name__ == "__main__":
    uvloop.run(main())
