"""A process of its own that answers requests: Holdfast's resolver, and beside it a bare echo.

The echo is a subscription of plain nats-py to ``bench.echo``, which answers with as many bytes as the header ``Bytes``
asks for.  Both run on the loop that ``holdfast worker`` runs on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvloop

from benchmarks.bench import target_of
from benchmarks.children import serve
from benchmarks.raw_nats import plain_client
from holdfast.workers.settings import WorkerSettings
from holdfast.workers.system import run_workers

if TYPE_CHECKING:
    from nats.aio.msg import Msg

ECHO: Final = "bench.echo"
H_BYTES: Final = "Bytes"


async def main() -> None:
    """Serves until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--lake", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True)
    arguments = parser.parse_args()
    filler = b"x" * (1 << 20)

    async def echo(request: Msg) -> None:
        await request.respond(filler[: int((request.headers or {})[H_BYTES])])

    async def nothing(_: dict[str, Any]) -> dict[str, Any]:
        return {}

    settings = WorkerSettings(lake=arguments.lake, index=arguments.index)
    async with (
        plain_client(arguments.url) as client,
        run_workers(target_of(arguments.url), ["resolver"], settings),
    ):
        await client.subscribe(ECHO, cb=echo)
        await client.flush()
        await serve({"ready": True}, nothing)


if __name__ == "__main__":
    uvloop.run(main())
