"""A process of its own that answers requests: Holdfast's resolver, and beside it a bare ``nats.micro`` echo.

The echo answers ``bench.echo`` with as many bytes as the header ``Bytes`` asks for.  Both run on the loop that
``holdfast worker`` runs on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import nats.micro
import uvloop
from nats.micro.service import EndpointConfig, ServiceConfig

from benchmarks.bench import target_of
from benchmarks.children import serve
from benchmarks.raw_nats import plain_client
from holdfast.workers.settings import WorkerSettings
from holdfast.workers.system import run_workers

if TYPE_CHECKING:
    from nats.micro.request import Request

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

    async def echo(request: Request) -> None:
        await request.respond(filler[: int((request.headers or {})[H_BYTES])])

    async def nothing(_: dict[str, Any]) -> dict[str, Any]:
        return {}

    settings = WorkerSettings(lake=arguments.lake, index=arguments.index)
    async with (
        plain_client(arguments.url) as client,
        run_workers(target_of(arguments.url), ["resolver"], settings),
        await nats.micro.add_service(client, ServiceConfig(name="echo", version="1.0.0")) as service,
    ):
        await service.add_endpoint(EndpointConfig(name="echo", subject=ECHO, handler=echo))
        await client.flush()
        await serve({"ready": True}, nothing)


if __name__ == "__main__":
    uvloop.run(main())
