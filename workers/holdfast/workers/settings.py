"""What the workers are told: one frozen value, read once at the edge and passed down."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import msgspec

WorkerName = Literal["ingester", "archiver", "compactor", "janitor", "resolver"]

WORKERS: Final[tuple[WorkerName, ...]] = ("archiver", "ingester", "compactor", "janitor", "resolver")
"""Every worker, in the order in which they are started; they are drained in the reverse order."""

START_S: Final = 30.0
"""How long a worker that starts waits for its server: in a compose file both start together, and a cluster may be
without a majority in this moment."""


class WorkerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of all workers.  Durations are in seconds."""

    lake: Path
    """The lake's directory, holding its three tables."""

    index: Path
    """The directory of this process's look-up index, a cache that is made anew when it is lost.  When another process
    uses it, a directory beside it is taken."""

    hot_window_s: float = 24 * 3600.0
    """Messages older than this, and archived, leave the hot tier and the event log."""

    hot_messages: int = 1_000_000
    """Most messages kept in the hot tier, the oldest archived ones leave first: a live subject costs some 600 B of
    server memory."""

    archive_interval_s: float = 5.0
    """How long an acknowledged message waits at most before it is archived."""

    archive_rows: int = 50_000
    """Most rows of one commit; that many waiting start a commit at once."""

    compact_interval_s: float = 300.0
    """How often small files are looked for."""

    purge_interval_s: float = 60.0
    """How often messages that may leave are looked for."""

    duplicate_window_s: float = 600.0
    """For how long the server refuses a repeated event id; nothing younger is purged from the event log."""

    handler_bytes: int = 1024**3
    """Most bytes of the event log kept beyond their time for handlers, and ingesters, that have not come to them: a
    day or so of a busy system.  A handler left behind further reads what it missed from the lake."""

    drain_timeout_s: float = 10.0
    """How long a worker that stops may take to finish what is in hand, and to answer who has asked, before that is
    cancelled; nothing is lost then, only done again."""

    replicas: int = 1
    """Copies of each stream, each on another node of a cluster.  Streams that have fewer get the rest; none is taken
    away."""

    accept_lost_streams: bool = False
    """Whether a stream that the lake holds a cursor for, and that is gone, may be created anew: for an operator who
    knows that what it held beyond the lake is lost."""

    scrub_interval_s: float = 86_400.0
    """How often the janitor reads every file of the lake again and compares it with its checksums."""

    scrub_bytes_per_s: int = 32 * 1024 * 1024
    """How much of it is read in a second: a quarter of a slow disk."""

    copy_directory: Path | None = None
    """Where a second copy of the lake is kept, on another disk; None keeps none.  Nothing is purged from the streams
    before the copy has it."""

    backup_directory: Path | None = None
    """Where the janitor makes backups; None makes none."""

    backup_interval_s: float = 21_600.0
    """How often a backup is begun: every six hours."""

    backup_retention_s: float = 2_592_000.0
    """How long backups are kept: thirty days, and the newest one always."""
