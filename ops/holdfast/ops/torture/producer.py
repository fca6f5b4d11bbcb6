"""A producer as a process of its own::

    python -m holdfast.ops.torture.producer --url nats://127.0.0.1:4222 --history h/p1.ndjson --producer p1 --seed 7

Writes until SIGTERM, or until ``--count`` writes were tried; what it did is in the history alone.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
from pathlib import Path
from typing import cast

from holdfast.ops.torture.clock import shift_clock
from holdfast.ops.torture.history import Kind
from holdfast.ops.torture.load import KINDS, run_producer


async def _run(chosen: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await run_producer(
        chosen.url,
        chosen.history,
        chosen.producer,
        chosen.seed,
        namespace=chosen.namespace,
        kinds=cast("list[Kind]", chosen.kinds.split(",")),
        rate=chosen.rate,
        count=chosen.count,
        stop=stop,
        raw=chosen.raw,
        lanes=chosen.lanes,
        pause=chosen.pause,
        batch=chosen.batch,
        key_space=chosen.key_space,
        large_one_in=chosen.large_one_in,
    )


def main() -> None:
    """Runs a producer; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--history", required=True, type=Path)
    parser.add_argument("--producer", required=True)
    parser.add_argument("--seed", required=True, type=int)
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rate", type=float, help="most writes a second; without it as many as go through")
    parser.add_argument("--count", type=int, help="how many writes; without it until SIGTERM")
    parser.add_argument("--lanes", type=int, default=1, help="so many writers at once, on one connection")
    parser.add_argument("--batch", type=int, default=32, help="most contexts or events written together")
    parser.add_argument("--key-space", type=int, default=6)
    parser.add_argument("--large-one-in", type=int, default=400, help="how often a body is stored in chunks; 0: never")
    parser.add_argument("--pause", type=Path, help="a file; while it exists, nothing is written")
    parser.add_argument("--raw", action="store_true", help="by plain nats-py instead of the SDK")
    chosen = parser.parse_args()
    logging.basicConfig(level=os.environ.get("HOLDFAST_TORTURE_LOG", "CRITICAL"))
    shift_clock()
    asyncio.run(_run(chosen))


if __name__ == "__main__":
    main()
