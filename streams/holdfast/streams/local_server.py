"""The embedded server that runs on this machine, as others find it: ``<data>/server.json``.

The file is written atomically once the server is ready and removed when it stops.  A crash leaves it behind, so a
reader believes it only while the very process it names is alive: pids are re-used, start times are not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec

from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.connection_target import Durability

logger = logging.getLogger(__name__)

SERVER_FILE: Final = "server.json"
SERVER_FILE_VERSION: Final = 1

_DEAD_STATES: Final = (b"Z", b"X", b"x")


class LocalServer(msgspec.Struct, frozen=True, kw_only=True):
    """What ``server.json`` holds.  Unknown fields are ignored, so that an older reader understands a newer server."""

    v: int = SERVER_FILE_VERSION
    pid: int
    """The process id of nats-server."""
    start_ticks: int
    """When that process started, in clock ticks since boot: field 22 of ``/proc/<pid>/stat``."""
    owner_pid: int
    """The process id of the Holdfast process that supervises it."""
    nats_url: str
    monitor_url: str
    durability: Durability
    started_at: datetime
    data: str
    """The data directory, absolute."""

    def is_alive(self) -> bool:
        """Whether the process named here still runs, and is not another one under the same pid."""
        return process_start_ticks(self.pid) == self.start_ticks


_decoder: Final = msgspec.json.Decoder(LocalServer)


def read_local_server(data: Path) -> LocalServer | None:
    """Returns the running server of the data directory ``data``, or None: none there, a stale or a foreign file."""
    path = data / SERVER_FILE
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    try:
        server = _decoder.decode(raw)
    except UNDECODABLE as error:
        logger.warning("server file is not readable", extra={"action": "server_file_ignored", "error": str(error)})
        return None
    if server.v != SERVER_FILE_VERSION or not server.is_alive():
        logger.debug("server file is stale", extra={"action": "server_file_ignored", "server_pid": server.pid})
        return None
    return server


def process_start_ticks(pid: int) -> int | None:
    """Returns when process ``pid`` started, in clock ticks since boot; None when it does not run (or is a zombie).

    Reads ``/proc``, see proc(5): the second field may hold spaces and brackets, so fields count from its last ``)``.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()
    if len(fields) < 20 or fields[0] in _DEAD_STATES:
        return None
    return int(fields[19])


def default_data_directory(environ: Mapping[str, str] | None = None) -> Path:
    """Returns ``$HOLDFAST_DATA``, else ``$XDG_DATA_HOME/holdfast``, else ``~/.local/share/holdfast``; absolute."""
    env = os.environ if environ is None else environ
    if chosen := env.get("HOLDFAST_DATA"):
        return Path(chosen).expanduser().absolute()
    xdg = env.get("XDG_DATA_HOME", "")
    # The XDG base directory specification: a relative path is invalid and to be ignored.
    base = Path(xdg) if xdg.startswith("/") else _home(env) / ".local" / "share"
    return base / "holdfast"


def _home(env: Mapping[str, str]) -> Path:
    home = env.get("HOME")
    return Path(home) if home else Path.home()
