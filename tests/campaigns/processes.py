"""Processes of the campaigns that kill: forks of a parent that has imported everything, and a server of their own.

A worker started anew spends a second on its imports; a fork is there after 10 ms.  So the parent imports all and runs
nothing: no thread, no event loop that outlives a call, no library that starts threads of its own.  Everything that
touches the lake or the server, checks as well, is done in forks.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import msgspec

from holdfast.ops.server_config import LOG_FILE, ServerSettings, find_server_binary, render_config, store_limit_bytes

T = TypeVar("T")

_READY_S: Final = 30.0
_PR_SET_PDEATHSIG: Final = 1
_libc: Any = ctypes.CDLL(None)


class ChildError(Exception):
    """A forked process failed; the message is its traceback."""


class PlainServer:
    """nats-server as a child process of a parent without an event loop; stays at one port through restarts."""

    def __init__(self, data: Path, *, is_durable: bool = False) -> None:
        self.data = data
        self.port = _free_port()
        # A server that is not killed loses nothing without syncing, and is quicker.
        self._durability: Any = "durable" if is_durable else "fast"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it; returns when it takes connections and has recovered its streams."""
        settings = ServerSettings(data=self.data, durability=self._durability, port=self.port)
        self.data.mkdir(parents=True, exist_ok=True)
        (self.data / "run").mkdir(exist_ok=True)
        (self.data / LOG_FILE).parent.mkdir(exist_ok=True)
        configuration = self.data / "nats-server.conf"
        configuration.write_text(render_config(settings, store_limit_bytes(settings)))
        for stale in (self.data / "run").iterdir():
            stale.unlink()
        command = [str(find_server_binary()), "-c", str(configuration)]
        self._process = subprocess.Popen(command, preexec_fn=die_with_parent)  # noqa: PLW1509  the parent has no threads
        deadline = time.monotonic() + _READY_S
        # The server writes its ports once it takes connections, after its streams have been recovered.
        while not any((self.data / "run").iterdir()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"nats-server did not start: see {self.data / LOG_FILE}")
            time.sleep(0.002)

    def stop(self) -> None:
        """Stops it cleanly; harmless when it is down."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it at once: for a copy of data that is thrown away."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            process.wait(_READY_S)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def die_with_parent() -> None:
    """Has this process killed when its parent dies: a campaign that is killed leaves nothing behind."""
    _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def become(work: Callable[[], Coroutine[Any, Any, object]]) -> Callable[[], None]:
    """Returns ``work`` as what a fork does from its first step to its last."""

    def run() -> None:
        asyncio.run(work())

    return run


def fork(work: Callable[[], object], *, environment: dict[str, str] | None = None) -> int:
    """Forks a process that does ``work`` and ends; returns its pid.  The caller waits for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        die_with_parent()
        os.environ.update(environment or {})
        _work_and_end(work)
    return child


def call(work: Callable[[], Coroutine[Any, Any, T]], kind: type[T]) -> T:
    """Runs ``work`` in a fork and returns what it returned; raises ChildError with its traceback when it failed."""
    with tempfile.TemporaryFile() as answer:

        def tell() -> None:
            try:
                raw = b"+" + msgspec.msgpack.encode(asyncio.run(work()))
            except BaseException:  # noqa: BLE001  whatever it is, it is told to the parent
                raw = b"-" + traceback.format_exc().encode()
            os.pwrite(answer.fileno(), raw, 0)

        _, status = os.waitpid(fork(tell), 0)
        answer.seek(0)
        raw = answer.read()
    if status != 0 or raw[:1] != b"+":
        raise ChildError(f"status {status}: {raw[1:].decode(errors='replace')}")
    return msgspec.msgpack.decode(raw[1:], type=kind)


def _work_and_end(work: Callable[[], object]) -> NoReturn:
    status = 1
    try:
        work()
        status = 0
    except BaseException:  # noqa: BLE001  a fork must not go on with what its parent was about
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
