"""What each process that runs workers says of itself, asked of all of them at once.

Every process answers ``hf.worker.report`` (a plain subscription without a queue group, so that each one does): which
workers it runs, what they have counted, and what the process takes.  Whoever does not answer does not run, or is
stopped.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.schemas.ids import now_ms
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.gather import answer_each, ask_each

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection

REPORT_SUBJECT: Final = "hf.worker.report"

GATHER_S: Final = 2.0
"""How long answers are waited for when not every kind of worker has given one: a machine may be busy."""

QUIET_S: Final = 0.1
"""How long after an answer another one is waited for once every kind has: of several processes of one kind."""


class WorkerReport(msgspec.Struct, frozen=True, kw_only=True):
    """One process: its workers with their counters, and what it takes.

    ``counters`` are those of each worker since the process started; ``unknown_writes`` what it tried to store without
    an acknowledgement.
    """

    host: str
    pid: int
    started_ms: int
    counters: dict[str, dict[str, Any]]
    rss_bytes: int
    open_files: int
    unknown_writes: int = 0
    reconnects: int = 0

    def parts(self, worker: str) -> dict[str, dict[str, Any]]:
        """What a worker says of work that it does beside its own, as its backups: by name, each with its counts and
        maybe ``problems``."""
        found = self.counters.get(worker, {}) if worker != "resolver" else {}
        return {name: part for name, part in found.items() if isinstance(part, dict)}

    @property
    def process(self) -> str:
        """A name for the process."""
        return f"{self.host}:{self.pid}"


_DECODER: Final = msgspec.json.Decoder(WorkerReport)


@asynccontextmanager
async def answer_reports(
    connection: Connection, counters: Callable[[], Mapping[Any, dict[str, Any]]]
) -> AsyncGenerator[None]:
    """Answers for the workers of this process while the block lasts; ``counters`` names those that have started."""
    started_ms = now_ms()
    host = socket.gethostname()

    async def answer() -> bytes:
        # Files of /proc are read in a thread, as all files are.
        rss_bytes, files = await asyncio.to_thread(lambda: (resident_bytes(), open_files()))
        return msgspec.json.encode(
            WorkerReport(
                host=host,
                pid=os.getpid(),
                started_ms=started_ms,
                counters={name: dict(count) for name, count in counters().items()},
                rss_bytes=rss_bytes,
                open_files=files,
                unknown_writes=connection.unknown_writes,
                reconnects=connection.reconnects,
            )
        )

    async with answer_each(connection, REPORT_SUBJECT, answer):
        yield


async def ask_reports(
    connection: Connection, wanted: Collection[str], *, timeout_s: float = GATHER_S
) -> list[WorkerReport]:
    """Returns the reports of all processes, by host and pid.

    When every worker of ``wanted`` has been named, a moment of silence ends the wait; else ``timeout_s`` does.
    """
    reports: list[WorkerReport] = []
    missing = set(wanted)

    def is_enough(answer: bytes) -> bool:
        try:
            report = _DECODER.decode(answer)
        except UNDECODABLE:
            return False  # of another release, or of somebody else
        reports.append(report)
        missing.difference_update(report.counters)
        return not missing

    await ask_each(connection, REPORT_SUBJECT, is_enough, timeout_s=timeout_s, quiet_s=QUIET_S)
    return sorted(reports, key=lambda report: (report.host, report.pid, report.started_ms))


def resident_bytes() -> int:
    """Returns the memory of this process that is in use."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


def open_files() -> int:
    """Returns how many files, sockets and pipes this process holds open."""
    try:
        return sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1  # less the one that lists them
    except OSError:
        return 0
