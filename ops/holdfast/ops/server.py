"""The embedded server: nats-server as a supervised child of this process.

::

    async with EmbeddedServer(ServerSettings(data=Path("./data"))) as server:
        nc = await nats.connect(server.info.nats_url)

It lives exactly as long as its block: it is stopped cleanly at the end, and killed by the kernel if this process dies
in any way (see ``server_launcher``).  The lock of the data directory is shared with the child, so that no second
server opens the same streams before the first is dead, however the parent ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar
from urllib.parse import urlsplit

import msgspec

from holdfast.ops.data_directory import CONFIG_FILE, DataDirectory, check_room, unusable, write_atomically
from holdfast.ops.server_config import (
    PORTS_DIRECTORY,
    STDERR_FILE,
    ServerSettings,
    find_server_binary,
    render_config,
    store_limit_bytes,
)
from holdfast.ops.server_failures import log_size, slow_start, start_failure, unexpected_end
from holdfast.ops.server_probe import check_health, check_protocol, verify_durability
from holdfast.ops.settings import Settings
from holdfast.ops.stream_files import finish_stream_files
from holdfast.schemas.errors import ConfigurationError, StorageFailedError, UnavailableError
from holdfast.streams.local_server import SERVER_FILE, LocalServer, process_start_ticks

logger = logging.getLogger(__name__)

KILL_TIMEOUT_S: Final = 5.0
"""A killed process is gone at once, unless it is stuck in the kernel on a broken disk: then it is left to its fate."""

_LAUNCHER: Final = Path(__file__).with_name("server_launcher.py")
_POLL_S: Final = (0.005, 0.1)

_T = TypeVar("_T")


class _Ports(msgspec.Struct):
    """The server's own report of where it listens."""

    nats: list[str]
    monitoring: list[str]


class EmbeddedServer:
    """Runs nats-server from ``async with`` to its end; not to be entered twice.

    Enter it on a thread that outlives the block: the kernel ties the child to the *thread* that started it, which is
    the event loop's.  Leaving the block, or :meth:`close`, stops the server; a cancel while it stops kills it.

    Entering raises ConfigurationError when nats-server is missing, too old, or cannot have its port;
    DataDirectoryError when the data directory cannot be used; DurabilityError when the server does not sync as the
    mode promises; UnavailableError when it is not ready in time.  Nothing is left running then.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = msgspec.structs.replace(settings, data=settings.data.absolute())
        self._directory = DataDirectory(self._settings.data)
        self._process: asyncio.subprocess.Process | None = None
        self._stderr_fd: int | None = None
        self._log_start = 0
        self._limit_bytes = 0
        self._info: LocalServer | None = None
        self._is_stopping = False
        self._is_distrusted = False
        # Clear while the server is being restarted, or could not be.
        self._running = asyncio.Event()
        self._closing = asyncio.Lock()

    @classmethod
    def from_settings(cls, settings: Settings, *, announce: bool = True) -> Self:
        """Returns the server that the merged settings describe."""
        return cls(
            ServerSettings(
                data=settings.data_path,
                durability=settings.durability,
                port=settings.port,
                monitor_port=settings.monitor_port,
                max_store_bytes=settings.max_store_bytes,
                start_timeout_s=settings.start_timeout_s,
                stop_timeout_s=settings.stop_timeout_s,
                announce=announce,
            )
        )

    @property
    def info(self) -> LocalServer:
        """The running server: addresses, process ids, mode.  To be read between entering and leaving."""
        assert self._info is not None, "the server is not running"
        return self._info

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def wait_failed(self) -> None:
        """Waits until the server ends: returns if :meth:`close` ended it, raises UnavailableError if nobody did.

        Run it beside the work, in the same task group, so that the process stops loudly with its server.
        """
        assert self._process is not None, "the server was not started"
        while True:
            await self._running.wait()
            process = self._process
            status = await process.wait()
            if self._is_stopping:
                return
            if self._running.is_set() and process is self._process:
                break
        raise await asyncio.to_thread(unexpected_end, self._settings, process.pid, status, self._log_start)

    @property
    def is_running(self) -> bool:
        """Whether the server runs, as far as is known: not while it is restarted, nor after a restart that failed."""
        return self._running.is_set()

    def distrust(self) -> None:
        """Has the server killed, not asked to stop, when its time comes: it failed to write to its disk.

        A clean stop would record what it remembers and could not write: sequences without a message, which look like
        a loss.  What it acknowledged is on the disk.
        """
        self._is_distrusted = True

    async def restart(self) -> None:
        """Kills the server and starts it on the same ports and data; clients connect again by themselves.

        Raises ConfigurationError or UnavailableError when it does not become ready: then none runs, and another call
        may try again.  A cancel leaves none running either.
        """
        async with self._closing:
            if self._is_stopping or self._process is None:
                return
            self._running.clear()
            await self._kill(self._process)
            if self._process.returncode is None:
                raise UnavailableError(
                    f"nats-server (process {self._process.pid}) does not die: its disk does not answer",
                    hint="mend the disk, then restart the machine",
                )
            info = self.info
            ports = {
                "port": urlsplit(info.nats_url).port or 0,
                "monitor_port": urlsplit(info.monitor_url).port or 0,
            }
            self._settings = msgspec.structs.replace(self._settings, **ports)
            await _in_thread(self._write_files)
            try:
                await self._run(_Ports(nats=[info.nats_url], monitoring=[info.monitor_url]))
            except BaseException:
                await self._kill(self._process)
                raise
            self._is_distrusted = False

    async def close(self) -> None:
        """Stops the server, removes ``server.json`` and releases the data directory.  A second call does nothing."""
        async with self._closing:
            try:
                await self._stop()
            finally:
                self._running.set()
                await _in_thread(self._release)

    async def _start(self) -> None:
        assert self._process is None, "a server object is entered once"
        await _in_thread(self._prepare)
        await self._run()

    async def _run(self, ports: _Ports | None = None) -> None:
        """Starts the process, for which all files are written, and returns when it is ready.

        ``ports`` are where it listens, if that is known; otherwise it tells.
        """
        process = self._process = await self._spawn(find_server_binary())
        ports = await self._wait_ready(process, ports)
        await verify_durability(ports.monitoring[0], self._settings.durability)
        info = await _in_thread(self._publish, process.pid, ports)
        self._info = info
        self._running.set()
        logger.info(
            "embedded server is ready",
            extra={
                "action": "server_ready",
                "nats_url": info.nats_url,
                "monitor_url": info.monitor_url,
                "server_pid": info.pid,
                "durability": info.durability,
                "data": info.data,
            },
        )
        if info.durability == "fast":
            logger.warning(
                "durability is fast: a power cut may lose up to two minutes of acknowledged data",
                extra={"action": "server_not_durable", "data": info.data},
            )

    def _prepare(self) -> None:
        settings = self._settings
        if settings.port and settings.port == settings.monitor_port:
            raise ConfigurationError(
                f"port and monitor_port are both {settings.port}", field="monitor_port", hint="use --monitor-port 0"
            )
        find_server_binary()
        self._directory.open()
        check_room(settings.data)
        self._write_files()

    def _write_files(self) -> None:
        settings = self._settings
        try:
            # What an earlier instance left: it is dead, or the lock would not be ours.
            (settings.data / SERVER_FILE).unlink(missing_ok=True)
            for stale in (settings.data / PORTS_DIRECTORY).glob("*.ports"):
                stale.unlink(missing_ok=True)
            finish_stream_files(settings.data)
            # A restart on a disk that was full a moment ago would leave the streams next to nothing.
            self._limit_bytes = max(self._limit_bytes, store_limit_bytes(settings))
            config = render_config(settings, self._limit_bytes)
            write_atomically(settings.data / CONFIG_FILE, config.encode(), durable=False)
            self._log_start = log_size(settings.data)
            # Apart from the log: what the server says before it has read its configuration, and a Go panic.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._stderr_fd = os.open(settings.data / STDERR_FILE, flags, 0o600)
        except OSError as error:
            raise unusable(settings.data, error) from error

    async def _spawn(self, binary: Path) -> asyncio.subprocess.Process:
        # On this thread, though it blocks the loop for about a millisecond: the child is killed when the thread that
        # forked it ends, and a thread of a pool ends when it pleases.
        assert self._stderr_fd is not None
        try:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid())),
                *(str(binary), "-c", str(self._settings.data / CONFIG_FILE)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=self._stderr_fd,
                stderr=self._stderr_fd,
                pass_fds=(self._directory.lock_fd,),
                # A Ctrl-C in the terminal goes to its whole group: the server must outlast the drain of the workers.
                start_new_session=True,
            )
        finally:
            os.close(self._stderr_fd)
            self._stderr_fd = None

    async def _wait_ready(self, process: asyncio.subprocess.Process, known: _Ports | None) -> _Ports:
        pause, longest = _POLL_S
        waits_for = "it shows no sign of life"
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                while not await _ends_within(process, pause):
                    try:
                        return await self._probe(process, known)
                    except UnavailableError as error:
                        waits_for = error.message
                    except StorageFailedError as error:
                        # It stays so until another start, however long this one is waited for.
                        raise UnavailableError(error.message, hint=error.hint) from error
                    pause = min(2 * pause, longest)
        except TimeoutError as error:
            raise await asyncio.to_thread(slow_start, self._settings, waits_for, self._log_start) from error
        raise await asyncio.to_thread(start_failure, self._settings, process.returncode, self._log_start)

    async def _probe(self, process: asyncio.subprocess.Process, known: _Ports | None) -> _Ports:
        # A disk that fills up while the server starts leaves none of its report, or half of it, for ever.
        ports = known or await asyncio.to_thread(self._read_ports, process.pid)
        if ports is None:
            raise UnavailableError("it does not listen yet")
        await check_protocol(ports.nats[0])
        await check_health(ports.monitoring[0])
        return ports

    def _read_ports(self, pid: int) -> _Ports | None:
        for path in (self._settings.data / PORTS_DIRECTORY).glob(f"*_{pid}.ports"):
            # Not written atomically: half a file is one that is not there yet.
            with contextlib.suppress(OSError, msgspec.DecodeError):
                ports = msgspec.json.decode(path.read_bytes(), type=_Ports)
                if ports.nats and ports.monitoring:
                    return ports
        return None

    def _publish(self, pid: int, ports: _Ports) -> LocalServer:
        data = self._settings.data
        info = LocalServer(
            pid=pid,
            start_ticks=process_start_ticks(pid) or 0,
            owner_pid=os.getpid(),
            nats_url=ports.nats[0],
            monitor_url=ports.monitoring[0],
            durability=self._settings.durability,
            started_at=datetime.now(UTC),
            data=str(data),
        )
        if not self._settings.announce:
            return info
        try:
            write_atomically(data / SERVER_FILE, msgspec.json.encode(info), durable=False)
        except OSError as error:
            raise unusable(data, error) from error
        return info

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._is_stopping = True
        # SIGTERM is the clean stop.  SIGUSR2, lame duck, would wait minutes for clients to go.
        with contextlib.suppress(ProcessLookupError):
            process.kill() if self._is_distrusted else process.terminate()
        try:
            if not await _ends_within(process, self._settings.stop_timeout_s):
                logger.warning(
                    "embedded server did not stop in time and is killed",
                    extra={"action": "server_killed", "server_pid": process.pid},
                )
        finally:
            # Reached by a cancel too: the server must not outlive its block.
            await self._kill(process)
        if process.returncode is None:
            logger.error(
                "embedded server does not die and still holds its data directory",
                extra={"action": "server_stuck", "server_pid": process.pid},
            )
        else:
            logger.info("embedded server has stopped", extra={"action": "server_stopped", "server_pid": process.pid})

    async def _kill(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await _ends_within(process, KILL_TIMEOUT_S)

    def _release(self) -> None:
        if self._stderr_fd is not None:
            os.close(self._stderr_fd)
            self._stderr_fd = None
        if self._directory.is_open:
            # An unreachable disk must not keep the lock: the file is stale by then, and is read as such.
            with contextlib.suppress(OSError):
                (self._settings.data / SERVER_FILE).unlink(missing_ok=True)
        self._directory.close()


async def _ends_within(process: asyncio.subprocess.Process, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await process.wait()
    except TimeoutError:
        return False
    return True


async def _in_thread(work: Callable[..., _T], *arguments: object) -> _T:
    """Runs ``work`` in a thread to its end: a cancel is raised only then, so that clean-up sees all it has done."""
    future = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # seen: the cancel is what the caller gets
        raise
