"""What nats-server makes of a replicated stream that was emptied before the power of all nodes failed::

    python -m tests.campaigns.cluster_emptied --kept 0     (2.15.1: the stream has no leader ever again)
    python -m tests.campaigns.cluster_emptied --kept 1     (it has)

Writes, takes a snapshot of each node's group (a clean restart does), purges all but the newest ``--kept`` messages,
writes to another stream, so that the removal of files reaches the disks, and cuts the power of all three.  Exit 0 when
the stream is led again.  This is why :data:`holdfast.workers.purge.SETTLED_S` exists; run it with every new server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from holdfast.client import connect
from holdfast.streams.connection import open_connection
from holdfast.streams.retry import call_with_retry
from holdfast.streams.topology import ensure_topology, purge_below, stream_info
from holdfast.streams.wire import HOT_STREAM
from tests.campaigns.cluster_rig import NODES, Cluster, Loopback, run_cluster
from tests.campaigns.power_images import Disk, missing

WRITTEN: Final = 400
LED_S: Final = 45.0
"""Five elections' time."""

_END_S: Final = 30.0


async def emptied(folder: Path, kept: int) -> float | None:
    """Returns after how many seconds the stream was led again, or None when it was not within ``LED_S``."""
    with ExitStack() as stack:
        disks = [Disk(folder / f"disk{number}") for number in range(NODES)]
        for disk in disks:
            stack.callback(disk.close)
            disk.make()
        stores = [disk.mounted_at for disk in disks]
        async with run_cluster(folder / "nodes", network=Loopback(), stores=stores) as cluster:
            await _prepare(cluster, kept)
            for node in cluster.nodes:
                node.signal(signal.SIGKILL)
            for node in cluster.nodes:
                node.kill()
            for disk in disks:
                disk.cut()
            started = time.monotonic()
            for node in cluster.nodes:
                node.start()
            try:
                await cluster.wait_whole(LED_S)
            except TimeoutError:
                return None
            return time.monotonic() - started


async def _prepare(cluster: Cluster, kept: int) -> None:
    async with open_connection(cluster.url, connect_s=20) as connection:
        await ensure_topology(connection, replicas=3)
    await cluster.wait_whole()
    async with connect(cluster.url) as hf:
        await hf.put_many([{"number": number} for number in range(WRITTEN)])
    for node in cluster.nodes:
        node.signal(signal.SIGTERM)
        await node.wait_ended(_END_S)
        node.start()
        await cluster.wait_whole()
    async with connect(cluster.url) as hf:
        info = await call_with_retry(lambda: stream_info(hf.connection, HOT_STREAM), deadline_s=_END_S)
        await purge_below(hf.connection, HOT_STREAM, info.last_seq + 1 - kept)
        for number in range(5):
            await hf.emit("campaign:elsewhere", {"number": number})


def main() -> None:
    """Runs it; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=int, default=0, help="newest messages that are not purged")
    chosen = parser.parse_args()
    why = missing()
    if why is not None:
        sys.exit(why)
    with tempfile.TemporaryDirectory(prefix="holdfast-emptied-") as folder:
        led_s = asyncio.run(emptied(Path(folder), chosen.kept))
    line = {"kept": chosen.kept, "led_again": led_s is not None, "seconds": led_s and round(led_s, 1)}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.exit(0 if led_s is not None else 1)


if __name__ == "__main__":
    main()
