"""Tells whether a loopback port can be listened on and, if not, who has it.  Linux: reads ``/proc``; blocks."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final, NamedTuple

_LISTEN: Final = "0A"  # a state in /proc/net/tcp, see proc_net_tcp(5)


class Listener(NamedTuple):
    """A process that listens."""

    pid: int
    name: str


def listen_error(host: str, port: int) -> OSError | None:
    """Returns why ``port`` cannot be listened on now, or None if it can (or could, this moment)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the server does: connections of a former holder that wait to time out do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            return error
    return None


def find_listener(port: int) -> Listener | None:
    """Returns a process that listens on ``port``; None when there is none that this user may see."""
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    links = {f"socket:[{inode}]" for inode in inodes}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and _holds(entry / "fd", links):
            return Listener(int(entry.name), _name(entry))
    return None


def _listening_inodes(port: int) -> set[str]:
    inodes: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(fields[9])
    return inodes


def _holds(directory: Path, links: set[str]) -> bool:
    try:
        return any(_link(fd) in links for fd in directory.iterdir())
    except OSError:  # another user's process, or one that has just ended
        return False


def _link(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:
        return ""


def _name(entry: Path) -> str:
    try:
        return (entry / "comm").read_text(errors="replace").strip()
    except OSError:
        return "?"
