"""What an archiver does before it archives: become the only one of its lake, and clear away what a power cut left.

The lock is on a file in the lake's directory; the kernel frees it when the process ends, however it ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from holdfast.schemas.errors import GapError
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import STREAM_OF_TABLE

if TYPE_CHECKING:
    from holdfast.lake.lake import Lake
    from holdfast.streams.connection import Connection

logger = logging.getLogger(__name__)

_LOCK_FILE: Final = ".archiver.lock"
_STANDBY_S: Final = 0.5
"""How often a waiting archiver tries the lock: its share of the outage when the active one dies."""


async def set_torn_commits_aside(connection: Connection, lake: Lake) -> None:
    """Moves a torn last commit of each table out of the way, if its stream still holds what the commit was of.

    Such a commit was never acknowledged: a power cut ended it.  Raises GapError when the stream no longer holds
    everything after the commit before it; the lake then stays readable up to that commit, and nothing is archived.
    """
    for torn in await asyncio.to_thread(lake.torn_commits):
        info = await stream_info(connection, STREAM_OF_TABLE[torn.table])
        # What stands before the beginning of an epoch is archived as part of an earlier one, and may be purged.
        archived = info.epoch_start - 1
        if torn.earlier is not None and torn.earlier.epoch == info.epoch:
            archived = torn.earlier.seq
        if info.first_seq > archived + 1:
            raise GapError(
                f"the last commit of {torn.table} is torn, and {info.name} no longer holds what it was of "
                f"(archived up to {archived}, first message {info.first_seq})",
                hint="restore the lake's last commit file from a backup; nothing was moved",
            )
        await asyncio.to_thread(lake.set_aside, torn)
        logger.warning(
            "a torn commit was set aside; its rows are archived again",
            extra={"action": "torn_commit", "table": torn.table, "archived": archived},
        )


async def take_lock(lake: Path, on_standby: Callable[[], None] | None) -> int:
    """Returns an open, locked file once no other archiver of this lake directory holds it.

    ``on_standby`` is called when another one does and this one begins to wait.
    """
    descriptor = os.open(lake / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    waiting = False
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if not waiting:
                    waiting = True
                    logger.info("another archiver is active: waiting", extra={"action": "archiver_standby"})
                    if on_standby is not None:
                        on_standby()
                await asyncio.sleep(_STANDBY_S)
    except BaseException:
        os.close(descriptor)
        raise
