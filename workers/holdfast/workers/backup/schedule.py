"""Backups by the clock, in the janitor's process: one when the newest is older than the interval.

What is due is read from the directory of backups, so that a restart neither forgets nor repeats one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.schemas.errors import HoldfastError
from holdfast.schemas.ids import now_ms
from holdfast.schemas.problems import Problem
from holdfast.workers.backup.listing import late_backup, newest_backup_ms
from holdfast.workers.backup.making import BackupReport, make_backup

if TYPE_CHECKING:
    from holdfast.streams.connection import Connection
    from holdfast.workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

LOOK_S: Final = 30.0
"""How often it is looked whether a backup is due."""

RETRY_S: Final = 600.0
"""How long after a backup that failed another one is tried, at most."""


class BackupStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What health and metrics tell: how old the newest complete backup is (None: there is none), and what is wrong."""

    directory: str
    age_s: float | None
    made: int
    failed: int
    problems: list[Problem]


class BackupSchedule:
    """Makes backups as the settings say; ``clock_ms`` stands in for the clock.

    A backup that fails is a problem until one succeeds, and stops nothing else.
    """

    def __init__(
        self, connection: Connection, settings: WorkerSettings, *, clock_ms: Callable[[], int] = now_ms
    ) -> None:
        assert settings.backup_directory is not None, "without a directory there is no schedule"
        self._connection = connection
        self._settings = settings
        self._directory = settings.backup_directory
        self._clock_ms = clock_ms
        self._started_ms = clock_ms()
        self._newest_ms: int | None = None
        self._failed_ms: int | None = None
        self._failure: Problem | None = None
        self._made = 0
        self._failed = 0

    async def run(self) -> None:
        """Looks again and again whether a backup is due.  Never returns, and never raises but for a cancel."""
        while True:
            await self.round()
            await asyncio.sleep(min(LOOK_S, self._settings.backup_interval_s / 10))

    async def round(self) -> BackupReport | None:
        """Makes a backup if one is due, and returns what it says; None when none is due, or it failed."""
        try:
            # Before the directory is made: a disk that is not mounted yet has no backups.
            self._newest_ms = await asyncio.to_thread(newest_backup_ms, self._directory, self._clock_ms())
            if not self._is_due():
                return None
            report = await make_backup(
                self._connection,
                self._settings.lake,
                self._directory,
                retention_s=self._settings.backup_retention_s,
                copies=self._settings.copy_directory,
                clock_ms=self._clock_ms,
            )
            self._newest_ms = await asyncio.to_thread(newest_backup_ms, self._directory, self._clock_ms())
        except (HoldfastError, OSError) as error:
            self._note(error)
            return None
        self._made += 1
        self._failure = self._failed_ms = None
        if report.damaged:
            self._failure = self._problem(
                "I4",
                f"{len(report.damaged)} files of the lake are damaged, the first {report.damaged[0]}",
                "'holdfast verify' tells what they held; an earlier backup may hold them whole",
            )
        return report

    def status(self) -> BackupStatus:
        """Returns how old the newest backup is, and what is wrong."""
        now = self._clock_ms()
        age_s = None if self._newest_ms is None else max(0.0, (now - self._newest_ms) / 1000)
        late = late_backup(
            age_s,
            running_s=(now - self._started_ms) / 1000,
            interval_s=self._settings.backup_interval_s,
            directory=str(self._directory),
        )
        return BackupStatus(
            directory=str(self._directory),
            age_s=age_s,
            made=self._made,
            failed=self._failed,
            problems=[problem for problem in (self._failure, late) if problem is not None],
        )

    def counters(self) -> dict[str, Any]:
        """Returns the status as plain values, for the janitor's counters."""
        return {"backup": msgspec.to_builtins(self.status())}

    def _is_due(self) -> bool:
        now, interval_s = self._clock_ms(), self._settings.backup_interval_s
        if self._failed_ms is not None and now - self._failed_ms < min(RETRY_S, interval_s) * 1000:
            return False
        return self._newest_ms is None or now - self._newest_ms >= interval_s * 1000

    def _note(self, error: HoldfastError | OSError) -> None:
        self._failed += 1
        self._failed_ms = self._clock_ms()
        message, hint = (error.message, error.hint) if isinstance(error, HoldfastError) else (str(error), None)
        logger.error("no backup was made", extra={"action": "backup_failed", "error": str(error)})
        self._failure = self._problem("I8", message, hint or "see the janitor's log; it is tried again")

    def _problem(self, invariant: str, what: str, next_step: str) -> Problem:
        return Problem(invariant=invariant, object=f"backups in {self._directory}", what=what, next_step=next_step)
