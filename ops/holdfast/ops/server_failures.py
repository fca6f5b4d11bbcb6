"""Why an embedded server failed, in words for the person who has to mend it.  Reads its logs; blocks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final

from holdfast.ops.listeners import find_listener, listen_error
from holdfast.ops.server_config import HOST, LOG_FILE, STDERR_FILE, ServerSettings
from holdfast.schemas.errors import ConfigurationError, UnavailableError

_LAST_LINES: Final = 12
_LAST_BYTES: Final = 8192


def start_failure(settings: ServerSettings, status: int | None, log_start: int) -> ConfigurationError:
    """Returns the error for a server that ended with ``status`` before it was ready."""
    for port, flag in ((settings.port, "--port"), (settings.monitor_port, "--monitor-port")):
        # Asked of the system, not read from the log: its words may change.
        if port and (reason := listen_error(HOST, port)) is not None:
            return _port_error(port, flag, reason)
    return ConfigurationError(
        f"nats-server {_ending(status)} while it started{_last_lines(settings.data, log_start)}",
        hint=f"read {settings.data / LOG_FILE}",
    )


def slow_start(settings: ServerSettings, waits_for: str, log_start: int) -> UnavailableError:
    """Returns the error for a server that was not ready in time; ``waits_for`` is what it had not done yet."""
    return UnavailableError(
        f"nats-server was not ready after {settings.start_timeout_s:g} s: {waits_for}"
        f"{_last_lines(settings.data, log_start)}",
        hint="allow it more with --start-timeout-s",
    )


def unexpected_end(settings: ServerSettings, pid: int, status: int, log_start: int) -> UnavailableError:
    """Returns the error for a server that ended while it was in use."""
    return UnavailableError(
        f"nats-server (process {pid}) {_ending(status)} unexpectedly{_last_lines(settings.data, log_start)}",
        hint=f"read {settings.data / LOG_FILE} and start again",
    )


def log_size(data: Path) -> int:
    """Returns where the server's log ends: what comes later is of the next run."""
    try:
        return (data / LOG_FILE).stat().st_size
    except FileNotFoundError:
        return 0


def _port_error(port: int, flag: str, reason: OSError) -> ConfigurationError:
    field = flag[2:].replace("-", "_")
    if isinstance(reason, PermissionError):
        return ConfigurationError(
            f"port {port} needs rights that this user does not have",
            field=field,
            hint=f"use {flag} 0 for a free port, or one above 1023",
        )
    holder = find_listener(port)
    who = f"process {holder.pid} ({holder.name})" if holder else "another process"
    hint = f"use {flag} 0 for a free port, or another one"
    if flag == "--port":
        hint += f", or use the server that is there with --nats-url nats://{HOST}:{port}"
    return ConfigurationError(f"port {port} on {HOST} is in use by {who}", field=field, hint=hint)


def _ending(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"


def _last_lines(data: Path, log_start: int) -> str:
    lines = [*_tail(data / LOG_FILE, log_start), *_tail(data / STDERR_FILE, 0)][-_LAST_LINES:]
    return "; its last log lines:\n  " + "\n  ".join(lines) + "\n" if lines else ""


def _tail(path: Path, start: int) -> list[str]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # After a rotation the file is younger, and shorter, than its start.
            file.seek(max(start if start <= size else 0, size - _LAST_BYTES))
            return file.read(_LAST_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return []
