"""A whole system of processes that can each be killed: server, workers, producers, readers, in one directory.

::

    async with TortureRig(directory) as rig:
        await rig.start_server()
        await rig.start_worker("archiver")
        rig.start_producer("p1")

========================  ==================================================================
``nats/``                 the server's data, its configuration, its log
``lake/``, ``index/``     the lake, and a look-up index for each worker process
``history/``              what the producers noted, a file each
``notes/``                what the readers noted
``logs/``                 what each process said, its restarts one after the other
========================  ==================================================================
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import msgspec

from holdfast.ops.server_config import PORTS_DIRECTORY, ServerSettings, find_server_binary, render_config
from holdfast.ops.torture.clock import ENVIRONMENT as CLOCK
from holdfast.ops.torture.worker import settings_text
from holdfast.schemas.errors import UnavailableError
from holdfast.schemas.failpoints import ENVIRONMENT as FAILPOINTS
from holdfast.streams.connection import open_connection
from holdfast.streams.connection_target import Durability
from holdfast.streams.topology import ensure_topology
from holdfast.workers.settings import WORKERS, WorkerName, WorkerSettings

START_S: Final = 60.0
"""How long a process may take to serve: one that was killed reads every entry of its index first, a second for each
million on a core of its own."""

STOP_S: Final = 20.0
"""How long a process may take to end after SIGTERM; then it is killed."""

STORE_BYTES: Final = 64 * 1024**3
_POLL_S: Final = 0.002
_LAUNCHER: Final = Path(__file__).parent.parent / "server_launcher.py"


class Child:
    """One process of the rig, whichever is its incarnation."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log
        self.is_expected_to_end = False

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        """Sends a signal; harmless when the process has ended."""
        if self.is_running:
            self.process.send_signal(number)

    async def wait(self, timeout_s: float) -> int | None:
        """Returns the exit status, None when it still runs after so many seconds."""
        until = time.monotonic() + timeout_s
        pause_s = _POLL_S
        while (status := self.process.poll()) is None and time.monotonic() < until:
            await asyncio.sleep(pause_s)
            pause_s = min(0.05, pause_s * 1.5)
        return status

    async def kill(self) -> None:
        """Kills it and waits until the kernel has taken it away."""
        self.is_expected_to_end = True
        self.signal(signal.SIGKILL)
        await self.wait(STOP_S)

    async def stop(self, timeout_s: float = STOP_S) -> int | None:
        """Asks it to end, kills it when it does not; returns the exit status."""
        self.is_expected_to_end = True
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        status = await self.wait(timeout_s)
        if status is None:
            await self.kill()
        return status

    def last_words(self, lines: int = 12) -> str:
        """Returns the end of its log."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])


class TortureRig:
    """The system; leaving the block kills every process.

    ``nats_data`` puts the server's data elsewhere (an image, a small disk); ``server_prefix`` is put before the
    server's command (``strace …``); ``settings`` changes :class:`WorkerSettings`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        seed: int = 1,
        namespace: str = "torture",
        durability: Durability = "durable",
        nats_data: Path | None = None,
        lake: Path | None = None,
        server_prefix: Sequence[str] = (),
        python_prefix: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        self.directory = directory.absolute()
        self.seed = seed
        self.namespace = namespace
        self.durability: Durability = durability
        self.nats_data = (nats_data or self.directory / "nats").absolute()
        self.lake = (lake or self.directory / "lake").absolute()
        self.server_prefix = list(server_prefix)
        self.python_prefix = list(python_prefix)
        self.changed_settings = settings
        self.port = _free_port()
        self.monitor_port = _free_port()
        self.client_url: str | None = None
        """The address that workers, producers and readers are given, when it is not the server's own: a proxy."""
        self.children: dict[str, Child] = {}
        self.unexpected_ends: list[str] = []
        self.pause = self.directory / "pause"
        self._failpoints: dict[str, str] = {}
        for name in ("history", "notes", "logs"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def url(self) -> str:
        """The server's own address."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def monitor_url(self) -> str:
        """Its monitoring address."""
        return f"http://127.0.0.1:{self.monitor_port}"

    @property
    def histories(self) -> list[Path]:
        """The files of what was tried, so far."""
        return sorted((self.directory / "history").glob("*.ndjson"))

    @property
    def notes(self) -> list[Path]:
        """The files of what readers noted."""
        return sorted((self.directory / "notes").glob("*.ndjson"))

    @property
    def server(self) -> Child:
        """The server's process."""
        return self.children["server"]

    async def start_server(self, *, with_streams: bool = True) -> None:
        """Starts the server, on the port and data that it had; returns when it takes connections.

        ``with_streams`` creates the streams when they are not there; the workers do so too.
        """
        self.spawn_server()
        await self.wait_server()
        if with_streams:
            async with open_connection(self.url, connect_s=START_S) as connection:
                await ensure_topology(
                    connection, duplicate_window_s=self.worker_settings("rig").duplicate_window_s, replicas=1
                )

    def spawn_server(self) -> Child:
        """Starts the server's process and does not wait."""
        self.nats_data.mkdir(parents=True, exist_ok=True)
        for folder in ("logs", PORTS_DIRECTORY):
            (self.nats_data / folder).mkdir(exist_ok=True)
        settings = ServerSettings(
            data=self.nats_data, durability=self.durability, port=self.port, monitor_port=self.monitor_port
        )
        config = self.directory / "nats-server.conf"
        config.write_text(render_config(settings, STORE_BYTES))
        return self.spawn("server", [*self.server_prefix, str(find_server_binary()), "-c", str(config)])

    async def wait_server(self, timeout_s: float = START_S) -> None:
        """Returns when the server takes connections; raises UnavailableError when it ends or takes too long."""
        child = self.server
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if not child.is_running:
                raise UnavailableError(f"the server ended: {child.last_words()}", hint="read its log")
            if await _answers(self.port):
                return
            await asyncio.sleep(_POLL_S)
        raise UnavailableError(f"the server does not serve after {timeout_s:.0f} s", hint="read its log")

    async def kill_server(self) -> None:
        """Kills the server as a crash would."""
        await self.server.kill()

    async def restart_server(self) -> None:
        """Kills the server and starts it on the same data."""
        await self.kill_server()
        await self.start_server(with_streams=False)

    def worker_settings(self, role: str, **changes: Any) -> WorkerSettings:
        """Returns the settings of a worker process; ``role`` names its index."""
        values: dict[str, Any] = {
            "lake": self.lake,
            "index": self.directory / "index" / role,
            "archive_interval_s": 0.5,
            "archive_rows": 5_000,
            "compact_interval_s": 2.0,
            "purge_interval_s": 2.0,
            "hot_window_s": 5.0,
            "duplicate_window_s": 120.0,
            **self.changed_settings,
            **changes,
        }
        return WorkerSettings(**values)

    async def start_worker(
        self, *names: WorkerName, name: str | None = None, clock_s: float = 0.0, failpoints: str = "", **changes: Any
    ) -> Child:
        """Starts one process with these workers and returns when they serve.

        ``name`` is the process's, else the workers'; ``clock_s`` shifts its clock; ``failpoints`` arms some.
        """
        child = self.spawn_worker(*names, name=name, clock_s=clock_s, failpoints=failpoints, **changes)
        await self.wait_ready(child)
        return child

    def spawn_worker(
        self, *names: WorkerName, name: str | None = None, clock_s: float = 0.0, failpoints: str = "", **changes: Any
    ) -> Child:
        """Starts the same and does not wait until they serve."""
        chosen = name or "-".join(names)
        environment = {CLOCK: str(clock_s)} if clock_s else {}
        if failpoints:
            environment[FAILPOINTS] = failpoints
        arguments = ["--url", self.client_url or self.url, "--workers", ",".join(names or WORKERS)]
        arguments += ["--settings", settings_text(self.worker_settings(chosen, **changes))]
        return self.spawn_python(chosen, "holdfast.ops.torture.worker", *arguments, environment=environment)

    async def wait_ready(self, child: Child, timeout_s: float = START_S) -> None:
        """Returns when a worker process serves; raises UnavailableError when it ends or takes too long."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if b"ready\n" in _since_start(child):
                return
            if not child.is_running:
                raise UnavailableError(f"{child.name} ended: {child.last_words()}", hint="read its log")
            await asyncio.sleep(0.02)
        raise UnavailableError(f"{child.name} does not serve after {timeout_s:.0f} s", hint="read its log")

    def start_producer(self, name: str, *arguments: str, clock_s: float = 0.0) -> Child:
        """Starts a producer; ``arguments`` are further ones of :mod:`holdfast.ops.torture.producer`."""
        history = self.directory / "history" / f"{name}.ndjson"
        return self.spawn_python(
            name,
            "holdfast.ops.torture.producer",
            *("--url", self.client_url or self.url, "--history", str(history), "--producer", name),
            *("--seed", str(self.seed), "--namespace", self.namespace, "--pause", str(self.pause), *arguments),
            environment={CLOCK: str(clock_s)} if clock_s else {},
        )

    def start_reader(self, name: str, *, with_lake: bool = True) -> Child:
        """Starts a reader."""
        notes = self.directory / "notes" / f"{name}.ndjson"
        history = str(self.directory / "history")
        lake = ["--lake", str(self.lake)] if with_lake else []
        return self.spawn_python(
            name,
            "holdfast.ops.torture.readers",
            *("--url", self.client_url or self.url, "--history", history, "--notes", str(notes)),
            *("--seed", str(self.seed), "--namespace", self.namespace, "--pause", str(self.pause), *lake),
        )

    def spawn_python(self, name: str, module: str, *arguments: str, environment: dict[str, str] | None = None) -> Child:
        """Starts a module as a process of the rig."""
        command = [*self.python_prefix, sys.executable, "-m", module, *arguments]
        return self.spawn(name, command, environment=environment)

    def spawn(self, name: str, command: Sequence[str], *, environment: dict[str, str] | None = None) -> Child:
        """Starts a process of the rig under a name, in the place of an ended one of that name.

        The kernel kills it when this process dies, however that happens.
        """
        log = self.directory / "logs" / f"{name}.log"
        launcher = [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid())]
        program = command[0] if "/" in command[0] else _which(command[0])
        with _opened_log(log) as output:
            process = subprocess.Popen(
                [*launcher, program, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        child = Child(name, process, log)
        self.children[name] = child
        return child

    async def pause_producers(self) -> None:
        """Returns when no producer and no reader has anything under way: nothing is acknowledged from here on."""
        self.pause.touch()
        names = [name for name, child in self.children.items() if child.is_running and self._is_client(name)]
        until = time.monotonic() + START_S + STOP_S
        while time.monotonic() < until:
            waiting = [name for name in names if self.children[name].is_running]
            if all(list(self.directory.glob(f"pause.{name}*")) for name in waiting):
                return
            await asyncio.sleep(0.01)
        raise UnavailableError("a producer or a reader does not pause", hint="read their logs")

    def resume_producers(self) -> None:
        """Has producers and readers go on."""
        self.pause.unlink(missing_ok=True)

    def _is_client(self, name: str) -> bool:
        return any((self.directory / kind / f"{name}.ndjson").exists() for kind in ("history", "notes"))

    def find_unexpected_ends(self) -> list[str]:
        """Returns what has ended without being told to, with its last words; of each process once."""
        ended: list[str] = []
        for child in self.children.values():
            if not child.is_running and not child.is_expected_to_end:
                child.is_expected_to_end = True
                ended.append(child.name)
                self.unexpected_ends.append(f"{child.name} ended with {child.process.poll()}: {child.last_words()}")
        return ended

    async def stop(self, *names: str) -> None:
        """Asks processes to end, and waits."""
        await asyncio.gather(*(self.children[name].stop() for name in names if name in self.children))

    async def close(self) -> None:
        """Kills every process: what was acknowledged is on the disk."""
        for child in reversed(list(self.children.values())):
            await child.kill()


class Usage(msgspec.Struct, frozen=True):
    """What a process holds at a moment.  ``own_bytes`` is resident memory that no file backs: pages of files, of
    libraries and of the index, are a cache, which the kernel takes back when it needs them.  ``data_files`` are the
    open files that are Parquet files of the lake, which look-ups keep open; not those that are removed."""

    rss_bytes: int
    own_bytes: int
    open_files: int
    data_files: int
    threads: int


def usage_of(pid: int) -> Usage | None:
    """Returns what a process holds; None when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        # Names alone, from a directory that may vanish.
        descriptors = os.listdir(f"/proc/{pid}/fd")  # noqa: PTH208
    except OSError:
        return None
    data_files = sum(_target(f"/proc/{pid}/fd/{descriptor}").endswith(".parquet") for descriptor in descriptors)
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if "VmRSS" not in fields:
        return None
    rss, of_files = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssFile"))
    return Usage(rss, rss - of_files, len(descriptors), data_files, int(fields["Threads"]))


def _target(link: str) -> str:
    try:
        return os.readlink(link)  # noqa: PTH115  some are no paths
    except OSError:
        return ""


def _since_start(child: Child) -> bytes:
    return child.log.read_bytes().rpartition(_MARK)[2] if child.log.exists() else b""


_MARK: Final = b"--- started\n"


@contextmanager
def _opened_log(path: Path) -> Generator[IO[bytes]]:
    with path.open("ab", buffering=0) as output:
        output.write(_MARK)
        yield output


async def _answers(port: int) -> bool:
    """Whether the server says its INFO line."""
    try:
        async with asyncio.timeout(1.0):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                return (await reader.readline()).startswith(b"INFO ")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _which(program: str) -> str:
    import shutil

    found = shutil.which(program)
    if found is None:
        raise UnavailableError(f"{program} is not installed", hint="install it, or leave out what needs it")
    return found


Progress = Callable[[str], None]
"""Is told how a run goes, a line at a time."""
