"""Faults of the disk: writes of the server, or of the archiver, that fail for a while.

Injected by strace into system calls, so they need root and strace; elsewhere they are not registered.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

from holdfast.ops.torture.faults import register
from holdfast.ops.torture.ground import Ground
from holdfast.schemas.errors import HoldfastError
from holdfast.streams.connection import open_connection
from holdfast.streams.write_probe import probe_writes

IS_POSSIBLE: Final = os.geteuid() == 0 and shutil.which("strace") is not None

_FULL: Final = ("pwrite64", "pwrite64,ftruncate,fallocate")
_BROKEN: Final = ("fsync,fdatasync", "pwrite64", "fsync,fdatasync,pwrite64")
_ATTACH_S: Final = 0.2

TRACER_S: Final = 2.0
"""How long strace may take to let go of a process."""


async def disk_full(ground: Ground, choice: random.Random) -> None:
    """Has every write of the server, or of the archiver, end with "no space left on device" for up to three seconds."""
    await _strike(ground, choice, "ENOSPC", choice.choice(_FULL))


async def eio(ground: Ground, choice: random.Random) -> None:
    """Has some writes, or syncs, of the server or of the archiver end with an input/output error."""
    await _strike(ground, choice, "EIO", choice.choice(_BROKEN))


async def _strike(ground: Ground, choice: random.Random, error: str, calls: str) -> None:
    rig = ground.rig
    lasts_s, first = choice.uniform(0.2, 3.0), choice.randint(1, 20)
    when = f"{first}+" if error == "ENOSPC" or choice.random() < 0.5 else str(first)
    if ground.worker_names and choice.random() < 0.4:
        async with _injected(rig.children[ground.worker_of("archiver")].pid, calls, error, when):
            await asyncio.sleep(lasts_s)
        return
    async with _injected(rig.server.pid, calls, error, when):
        await asyncio.sleep(lasts_s)
    if not await _stores(rig.url):
        # What the watch of an embedded server does, and the operator of another one.
        ground.count(f"servers that had stopped storing ({error})")
        await rig.kill_server()
        rig.spawn_server()
        await rig.wait_server()


async def _stores(url: str) -> bool:
    try:
        async with open_connection(url, name="holdfast-torture") as connection:
            return (await probe_writes(connection)).state == "ok"
    except HoldfastError:
        return False


@asynccontextmanager
async def _injected(pid: int, calls: str, error: str, when: str) -> AsyncGenerator[None]:
    tracer = await asyncio.create_subprocess_exec(
        *("strace", "-f", "-qq", "-o", os.devnull, "-p", str(pid)),
        *("-e", f"trace={calls}", "-e", f"inject={calls}:error={error}:when={when}"),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await asyncio.sleep(_ATTACH_S)
        yield
    finally:
        await end_tracer(tracer)


async def end_tracer(tracer: asyncio.subprocess.Process) -> None:
    """Has strace let go of what it traces.

    One that is told to stop waits for each thread of a process to stand still, beginning with the first: of a process
    that is killed in this moment it waits for ever, for that one is only told as dead after all others, and those are
    told to nobody but this tracer.  The killed process stays, dead and unburied, as long.  A killed tracer lets go of
    everything.
    """
    with contextlib.suppress(ProcessLookupError):
        tracer.terminate()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(TRACER_S):
            await tracer.wait()
            return
    with contextlib.suppress(ProcessLookupError):
        tracer.kill()
    await tracer.wait()


if IS_POSSIBLE:
    register("disk-full", "writes of server or archiver that fail for want of space", needs=("workers",))(disk_full)
    register("eio", "writes or syncs of server or archiver that fail", needs=("workers",))(eio)
