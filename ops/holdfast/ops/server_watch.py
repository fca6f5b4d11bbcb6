"""The watch over an embedded server: says when it has stopped storing, and restarts it once it can store again.

A server that failed once to write a stream's file (disk full, input/output error) stores nothing in that stream any
more: publishes get no answer, purges are refused, and freeing space changes nothing until it is restarted.  What it had
acknowledged is on the disk.  So this looks each second at ``/healthz``, which names the streams that refused a message,
asks each stream for an error that only a purge has met so far (:mod:`holdfast.streams.write_probe`), and

* says so, once, with cause, file and free bytes;
* waits until the file system has room again, and takes a file that is written and synced;
* kills the server and starts it on the same ports and data: workers and clients connect again by themselves.

A purge that meets a full disk may lock up JetStream as a whole: nothing of it answers any more, reads included, while
the server still answers a PING.  After some seconds of that it is restarted likewise.  A server that answers nothing at
all is reported, and left alone: somebody may have stopped it.

It is killed, not asked to stop: in its memory stand messages that it could not write, and a clean stop would record
their sequences as if they had been there.  A restart that did not help is repeated at growing intervals.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from holdfast.ops.server_probe import check_protocol
from holdfast.schemas.errors import ConfigurationError, HoldfastError, UnavailableError
from holdfast.schemas.limits import MIB
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.connection_target import ConnectionTarget
from holdfast.streams.monitoring import get_health
from holdfast.streams.write_probe import STREAMS, WriteError, in_words, write_error_of, write_errors_in

if TYPE_CHECKING:
    from holdfast.ops.server import EmbeddedServer

logger = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""How often a server is looked at, well or not."""

ANSWER_S: Final = 2.0
CONNECT_S: Final = 30.0
SPARE_BYTES: Final = 64 * MIB
"""What must be free before a restart, or a twentieth of a small file system: a restart on the last free block would
fail again at once."""

STEADY_S: Final = 60.0
"""A restart after which the server stored for so long has helped."""

FAILED_STARTS: Final = 8
"""After so many restarts in a row that did not bring a server up, whoever runs this process is to decide."""

_SPARE_SHARE: Final = 20
_LONGEST_PAUSE_S: Final = 60.0
_OFF_LOOKS: Final = 3
"""How often a server must say that JetStream as a whole is not well: it also says so for a moment when it is busy."""
_TRIAL_BYTES: Final = 64 * 1024
_TRIAL_FILE: Final = "write-trial.tmp"

HANGS_S: Final = 6.0
"""How long JetStream may not answer, of a server that does, before it is taken to be locked up."""

Answers = Literal["all", "core", "nothing"]
"""What answers: JetStream too, the server without it, or nothing."""

Decision = Literal["nothing", "wait", "restart"]


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What one look at a server and its disk has shown; ``at_s`` is a monotonic time."""

    at_s: float
    errors: tuple[WriteError, ...] = ()
    answers: Answers = "all"
    free_bytes: int = 0
    total_bytes: int = 0
    trial_error: str = ""
    """Why a file could not be written and synced where the server writes; empty when it could, or was not tried."""

    @property
    def has_room(self) -> bool:
        """Whether enough is free for a server to start, and to go on."""
        return self.free_bytes >= spare_bytes(self.total_bytes)


class Judge:
    """Decides, look by look, what to do about a server.  Pure: time is in what was seen."""

    def __init__(self) -> None:
        self._restarts = 0
        self._restarted_at_s: float | None = None
        self._hanging_since_s: float | None = None
        self.reason = ""
        """Why the server is not restarted yet, for a person; empty when nothing is the matter."""

    def decide(self, seen: Seen) -> Decision:
        """Returns what to do now; to be told of a restart by :meth:`restarted`."""
        if not seen.errors and not self._hangs(seen):
            self.reason = "" if seen.answers == "all" else "the server does not answer"
            steady_since = self._restarted_at_s
            if seen.answers == "all" and steady_since is not None and seen.at_s - steady_since >= STEADY_S:
                self._restarts = 0
            return "nothing"
        if not seen.has_room:
            # The cause is in sight, and its end will be: earlier restarts say nothing about the next one.
            self._restarts = 0
            spare = spare_bytes(seen.total_bytes)
            self.reason = f"{seen.free_bytes:,} bytes are free, {spare:,} are needed"
            return "wait"
        if seen.trial_error:
            self.reason = f"a file written beside the server's fails too: {seen.trial_error}"
            return "wait"
        pause_s = pause_before(self._restarts)
        if self._restarted_at_s is not None and seen.at_s - self._restarted_at_s < pause_s:
            self.reason = f"{self._restarts} restarts did not help; the next one comes after {pause_s:g} s"
            return "wait"
        self.reason = ""
        return "restart"

    def _hangs(self, seen: Seen) -> bool:
        if seen.answers != "core":
            self._hanging_since_s = None
            return False
        if self._hanging_since_s is None:
            self._hanging_since_s = seen.at_s
        return seen.at_s - self._hanging_since_s >= HANGS_S

    def restarted(self, at_s: float) -> None:
        """Notes that the server was restarted, or that it was tried, at a time."""
        self._restarts += 1
        self._hanging_since_s = None
        self._restarted_at_s = at_s


def pause_before(restarts: int) -> float:
    """Returns how long to wait for the next restart after so many that did not help: 0, 1, 2, 4 … 60 seconds."""
    return 0.0 if restarts == 0 else min(_LONGEST_PAUSE_S, 2.0 ** (restarts - 1))


def spare_bytes(total_bytes: int) -> int:
    """Returns how much must be free on a file system of this size."""
    return min(SPARE_BYTES, total_bytes // _SPARE_SHARE)


async def watch_server(server: EmbeddedServer) -> None:
    """Watches a running server for as long as it is awaited; returns never.

    Raises ConfigurationError or UnavailableError when the server was killed and did not start again in eight attempts,
    three minutes or so, though its disk can be written.
    """
    info = server.info
    target = ConnectionTarget(url=info.nats_url, origin=f"embedded server of {info.data}")
    async with open_connection(target, name="holdfast-watch", connect_s=CONNECT_S) as connection:
        watch = Watch(server, connection)
        while True:
            await asyncio.sleep(LOOK_S)
            await watch.look()


class Watch:
    """What :func:`watch_server` does, look by look."""

    def __init__(self, server: EmbeddedServer, connection: Connection) -> None:
        self._server = server
        self._connection = connection
        self._judge = Judge()
        self._off_looks = 0
        self._failed_starts = 0
        self._told = ""
        self._failing_since_s: float | None = None
        self._silent: Answers = "all"

    async def look(self) -> None:
        """Looks once, and restarts the server if it is time; raises as :func:`watch_server` does."""
        errors, answers = await self._ask()
        seen = Seen(at_s=time.monotonic(), errors=errors, answers=answers)
        if errors or answers == "core":
            # From here on a clean stop would be a wrong one, whoever asks for it.
            self._server.distrust()
            seen = await asyncio.to_thread(_with_disk, seen, self._server.info.data)
        decision = self._judge.decide(seen)
        if not seen.has_room:
            # Why it did not start is in sight, and says nothing of the next time.
            self._failed_starts = 0
        self._tell(seen)
        if decision == "restart":
            await self._restart()

    async def _ask(self) -> tuple[tuple[WriteError, ...], Answers]:
        if not self._server.is_running:
            # A restart that failed: what kept it from running was told then.
            return (WriteError(stream="all streams", cause="the server could not be started again"),), "nothing"
        try:
            health = await get_health(self._server.info.monitor_url, ANSWER_S)
        except HoldfastError:
            return (), "core" if await self._answers_ping() else "nothing"
        if health is None:
            self._off_looks = 0
            return await self._ask_streams(), "all"
        errors = write_errors_in(health)
        general = [item.error for item in health.errors if item.type == "JETSTREAM"]
        self._off_looks = self._off_looks + 1 if general else 0
        if not errors and self._off_looks >= _OFF_LOOKS:
            errors = (WriteError(stream="all streams", cause=general[0]),)
        return errors, "all"

    async def _answers_ping(self) -> bool:
        try:
            await check_protocol(self._server.info.nats_url, ANSWER_S)
        except HoldfastError:
            return False
        return True

    async def _ask_streams(self) -> tuple[WriteError, ...]:
        if not self._connection.client.is_connected:
            return ()
        asked = [write_error_of(self._connection, stream, timeout_s=ANSWER_S) for stream in STREAMS]
        return tuple(error for error in await asyncio.gather(*asked) if error is not None)

    def _tell(self, seen: Seen) -> None:
        if seen.answers != self._silent and seen.answers != "all" and not seen.errors:
            what = "JetStream of the server" if seen.answers == "core" else "the server"
            logger.error("%s does not answer", what, extra={"action": "server_silent"})
        self._silent = seen.answers
        if not seen.errors:
            if seen.answers == "core" and self._failing_since_s is None:
                self._failing_since_s = seen.at_s
            elif seen.answers == "all":
                self._failing_since_s = None
            return
        if self._failing_since_s is None:
            self._failing_since_s = seen.at_s
            logger.error(
                "the server cannot write and acknowledges nothing any more; what it acknowledged is safe",
                extra={
                    "action": "server_refuses",
                    "cause": in_words(seen.errors),
                    "path": next((error.path for error in seen.errors if error.path), ""),
                    "free_bytes": seen.free_bytes,
                },
            )
        kind = self._judge.reason.partition(" ")[2] if seen.has_room else "no room"
        if self._judge.reason and kind != self._told:
            self._told = kind
            logger.warning(
                "the server is restarted once it can write again",
                extra={"action": "server_waits", "reason": self._judge.reason, "free_bytes": seen.free_bytes},
            )

    async def _restart(self) -> None:
        began_s = time.monotonic()
        logger.warning("restarting the server: its disk can be written", extra={"action": "server_restarting"})
        try:
            await self._server.restart()
        except (ConfigurationError, UnavailableError) as error:
            self._judge.restarted(time.monotonic())
            self._failed_starts += 1
            if self._failed_starts >= FAILED_STARTS:
                raise
            logger.warning(
                "the server could not be restarted, and is tried again",
                extra={"action": "server_restart_failed", "error": str(error)},
            )
            return
        self._judge.restarted(time.monotonic())
        self._failed_starts = 0
        failing_s = time.monotonic() - (self._failing_since_s or began_s)
        self._failing_since_s = None
        self._told = ""
        logger.warning(
            "the server stores again",
            extra={"action": "server_restarted", "failing_s": round(failing_s, 1)},
        )


def _with_disk(seen: Seen, data: str) -> Seen:
    try:
        disk = os.statvfs(data)
    except OSError as error:
        return msgspec.structs.replace(seen, trial_error=_words(error))
    seen = msgspec.structs.replace(
        seen, free_bytes=disk.f_bavail * disk.f_frsize, total_bytes=disk.f_blocks * disk.f_frsize
    )
    if not seen.has_room:
        return seen
    return msgspec.structs.replace(seen, trial_error=try_writing(_trial_directory(Path(data))))


def try_writing(directory: Path) -> str:
    """Writes and syncs a file of some blocks in a directory, and removes it; returns why that failed, or nothing."""
    path = directory / _TRIAL_FILE
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            if os.write(fd, bytes(_TRIAL_BYTES)) < _TRIAL_BYTES:
                return os.strerror(errno.ENOSPC).lower()
            os.fsync(fd)
        finally:
            os.close(fd)
            with contextlib.suppress(OSError):
                path.unlink()
    except OSError as error:
        return _words(error)
    return ""


def _trial_directory(data: Path) -> Path:
    # Beside the streams, where these are a file system of their own.
    streams = data / "jetstream"
    with contextlib.suppress(OSError):
        if streams.stat().st_dev != data.stat().st_dev:
            return streams
    return data / "run"


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
