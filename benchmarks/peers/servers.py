"""Starts PostgreSQL and Redis of the distribution on loopback, in temporary directories, while a block lasts."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

POSTGRES_MAJOR: Final = 15
POSTGRES_DATABASE: Final = "postgres"
_POSTGRES_HOME: Final = Path(f"/usr/lib/postgresql/{POSTGRES_MAJOR}/bin")
_START_S: Final = 30.0
_STOP_S: Final = 20.0
_POLL_S: Final = 0.05

_POSTGRES_OPTIONS: Final[Mapping[str, str]] = {
    # Durable as it comes: an acknowledged commit is in the log, and the log on the disk.
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    # Tuned as for a small server of its own: no checkpoint and no needless copying while something is measured.  A
    # scan of a table over a quarter of these buffers keeps nothing in them, and two million events take 280 MB.
    "shared_buffers": "2GB",
    # Sorts and groups of analytics stay in memory.
    "work_mem": "64MB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "wal_compression": "on",
    "max_connections": "100",
    "max_parallel_workers_per_gather": "2",
    "jit": "off",
    "logging_collector": "off",
    "unix_socket_directories": "",
    "listen_addresses": "127.0.0.1",
}

_INITDB_OPTIONS: Final = ("-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
"""Texts are compared by their bytes, as the others do, whatever the locale of the machine is."""


class PeerMissingError(Exception):
    """A peer cannot be run on this machine; the message says what to install."""


def require_postgres() -> Path:
    """Returns the directory of PostgreSQL's programs; raises PeerMissingError when they are not installed."""
    if (_POSTGRES_HOME / "postgres").exists():
        return _POSTGRES_HOME
    found = shutil.which("initdb")
    if found is None:
        raise PeerMissingError(f"PostgreSQL is not installed: apt-get install -y postgresql-{POSTGRES_MAJOR}")
    return Path(found).parent


def require_redis() -> str:
    """Returns the path of redis-server; raises PeerMissingError when it is not installed."""
    found = shutil.which("redis-server")
    if found is None:
        raise PeerMissingError("Redis is not installed: apt-get install -y redis-server")
    return found


@asynccontextmanager
async def postgres(parent: Path) -> AsyncGenerator[str]:
    """Runs PostgreSQL on a new database below ``parent``; yields the address to connect to."""
    programs = require_postgres()
    # It refuses to run as root, and its data must be its user's own.
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    with tempfile.TemporaryDirectory(prefix="holdfast-postgres-", dir=parent) as directory:
        data = Path(directory) / "data"
        if os.geteuid() == 0:
            shutil.chown(directory, user)
        initdb = await _run(
            [str(programs / "initdb"), "-D", str(data), "-U", user, *_INITDB_OPTIONS],
            Path(directory),
            user,
        )
        if initdb:
            raise PeerMissingError(
                f"PostgreSQL could not make a database in {directory} as user {user}: give another disk with --data "
                f"({initdb.strip().splitlines()[-1]})"
            )
        port = _free_port()
        options = [part for name, value in _POSTGRES_OPTIONS.items() for part in ("-c", f"{name}={value}")]
        command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), *options]
        # SIGINT is its fast shutdown: it does not wait for clients.
        async with _running(command, Path(directory), user, port, signal.SIGINT):
            yield f"postgresql://{user}@127.0.0.1:{port}/{POSTGRES_DATABASE}"


@asynccontextmanager
async def redis(parent: Path, *, durable: bool) -> AsyncGenerator[tuple[int, int]]:
    """Runs Redis below ``parent``; yields its port and the id of its process.

    ``durable`` appends every write to a file and flushes it before it answers; otherwise it is a cache: nothing on the
    disk, and the least recently used leave.
    """
    program = require_redis()
    with tempfile.TemporaryDirectory(prefix="holdfast-redis-", dir=parent) as directory:
        port = _free_port()
        options = [
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--dir",
            directory,
            "--save",
            "",
            "--loglevel",
            "warning",
        ]
        if durable:
            # No rewriting of the file in the middle of a measurement.
            options += ["--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0"]
        else:
            options += ["--appendonly", "no", "--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lru"]
        user = pwd.getpwuid(os.geteuid()).pw_name
        async with _running([program, *options], Path(directory), user, port, signal.SIGTERM) as pid:
            yield port, pid


@asynccontextmanager
async def _running(
    command: Sequence[str], directory: Path, user: str, port: int, stop: signal.Signals
) -> AsyncGenerator[int]:
    log = directory / "server.log"
    with log.open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            *_as(user, stop), *command, cwd=directory, stdout=sink, stderr=sink
        )
    try:
        await _wait_for(process, port, log)
        yield process.pid
    finally:
        if process.returncode is None:
            process.send_signal(stop)
            try:
                await asyncio.wait_for(process.wait(), _STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _wait_for(process: asyncio.subprocess.Process, port: int, log: Path) -> None:
    """Returns once the port accepts connections."""
    async with asyncio.timeout(_START_S):
        while True:
            if process.returncode is not None:
                raise PeerMissingError(f"a peer did not start: {log.read_text(errors='replace')[-500:]}")
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(_POLL_S)
                continue
            writer.close()
            return


async def _run(command: Sequence[str], directory: Path, user: str) -> str:
    """Runs a command to its end; returns what it complained about, nothing if it did not fail."""
    process = await asyncio.create_subprocess_exec(
        *_as(user, signal.SIGTERM),
        *command,
        cwd=directory,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    return (errors.decode(errors="replace") or "no message") if process.returncode else ""


def _as(user: str, stop: signal.Signals) -> list[str]:
    """Returns what runs a command as a user, and stops it when this process is killed."""
    wrapper = ["setpriv", f"--pdeathsig={stop.name.removeprefix('SIG')}"]
    if os.geteuid() == 0 and user != "root":
        wrapper += [f"--reuid={user}", f"--regid={user}", "--init-groups"]
    return wrapper if shutil.which("setpriv") else []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
