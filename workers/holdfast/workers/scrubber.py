"""The scrub in the janitor's process: a pass in a while, so many bytes a second; and healing what it finds.

A damaged file is healed from the second copy by the scrub itself (:mod:`holdfast.lake.scrub`), or here from the
stream, as long as that still holds its rows.  What can be healed from neither stays in quarantine, and in ``health``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from holdfast.lake.healing import heal_file
from holdfast.lake.lake import Lake
from holdfast.lake.scrub import Scrub
from holdfast.schemas.errors import DataDirectoryError, FenceError, GapError, HoldfastError
from holdfast.schemas.ids import now_ms
from holdfast.schemas.rows import TABLES, Row, Table
from holdfast.streams.pull import StreamReader
from holdfast.streams.topology import stream_info
from holdfast.streams.wire import STREAM_OF_TABLE
from holdfast.workers.archive_plan import decode_run

if TYPE_CHECKING:
    from holdfast.lake.checksums import Damage
    from holdfast.lake.copies import Copies
    from holdfast.streams.connection import Connection
    from holdfast.workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

TURN_S: Final = 1.0
"""How often the next bytes are read."""

HEAL_S: Final = 10.0
"""How often it is looked for files in quarantine, which a look-up may have put there."""

AGAIN_S: Final = 600.0
"""How long until what could not be healed is tried again."""

_READ: Final = 2_000
_MOST_ROWS: Final = 300_000
"""Rows of one file that are brought from a stream: as many as a compacted one has."""


class Scrubber:
    """Scrubs and heals one lake.  ``clock_ms`` stands in for the clock."""

    def __init__(
        self,
        connection: Connection,
        settings: WorkerSettings,
        copies: Copies | None = None,
        *,
        clock_ms: Callable[[], int] = now_ms,
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._copies = copies
        self._clock_ms = clock_ms
        self._scrub: Scrub | None = None
        self._lake: Lake | None = None
        self._progress: dict[str, Any] = {}
        self._tried: tuple[frozenset[str], int] = (frozenset(), 0)
        self.healed = 0

    async def run(self) -> None:
        """Reads on and heals, turn by turn.  Never returns; what fails is told, and tried again."""
        next_heal_ms = 0
        while True:
            pause_s = HEAL_S
            try:
                if await self._open():
                    if self._clock_ms() >= next_heal_ms:
                        next_heal_ms = self._clock_ms() + int(HEAL_S * 1000)
                        await self.heal()
                    if await self.turn():
                        pause_s = TURN_S
            except (HoldfastError, OSError) as error:
                logger.warning("scrub cannot go on now", extra={"action": "scrub_failed", "error": str(error)})
            await asyncio.sleep(pause_s)

    async def _open(self) -> bool:
        if self._lake is None:
            try:
                lake = await asyncio.to_thread(Lake.open, self._settings.lake)
            except DataDirectoryError:
                return False  # no lake on this machine, or none yet
            lake.copies = self._copies
            self._lake, self._scrub = lake, Scrub(lake)
        return True

    async def turn(self) -> bool:
        """Compares the files of one turn if a pass is due; returns whether there is more to do at once."""
        if not await self._open() or self._scrub is None:
            return False
        scrub, at_ms = self._scrub, self._clock_ms()
        more = False
        if scrub.is_due(at_ms, self._settings.scrub_interval_s):
            most = max(1, int(self._settings.scrub_bytes_per_s * TURN_S))
            more = bool(await asyncio.to_thread(lambda: scrub.step(most, at_ms=at_ms)))
        self._progress = await asyncio.to_thread(scrub.progress)
        return more

    async def heal(self) -> int:
        """Heals what is in quarantine and can be; returns how many files."""
        if not await self._open() or self._lake is None or self._scrub is None:
            return 0
        lake, at_ms = self._lake, self._clock_ms()
        known = frozenset(
            [path for table in TABLES for path in await asyncio.to_thread(lake.table(table).quarantine.files)]
        )
        tried, tried_ms = self._tried
        if not known or (known == tried and at_ms < tried_ms + AGAIN_S * 1000):
            return 0
        self._tried = (known, at_ms)
        if not await asyncio.to_thread(self._scrub.recheck_quarantine):
            return 0
        healed = 0
        for table in TABLES:
            of_table = lake.table(table)
            snapshot = await asyncio.to_thread(of_table.refresh)
            for path, record in of_table.quarantine.of(snapshot).items():
                entry = snapshot.files[path]
                damage = record.damage()
                brought = await self._rows_of(table, damage)
                if brought:
                    try:
                        healed += await asyncio.to_thread(heal_file, of_table, entry, damage, brought)
                    except FenceError:
                        continue  # compacted or healed by another meanwhile
        self.healed += healed
        return healed

    async def _rows_of(self, table: Table, damage: Damage) -> list[Row]:
        """Returns what the stream still holds of the damaged ranges; nothing when it has lost a part of them."""
        info = await stream_info(self._connection, STREAM_OF_TABLE[table])
        first = min(span.first_seq for span in damage.ranges)
        last = max(span.last_seq for span in damage.ranges)
        if info.epoch != damage.epoch or info.first_seq > first or info.last_seq < last or last - first > _MOST_ROWS:
            return []
        rows: list[Row] = []
        reader = StreamReader(self._connection, info.name, first, allow_gaps=True)
        try:
            while reader.next_seq <= last:
                messages, _ = await reader.read(limit=_READ, up_to=last)
                if not messages:
                    break
                start = 0
                while start < len(messages):
                    run = await asyncio.to_thread(decode_run, table, messages[start:])
                    rows += run.rows
                    start += run.taken
        except GapError:
            return []
        finally:
            await reader.close()
        return rows

    def counters(self) -> dict[str, Any]:
        """Returns how far the scrub is, for the janitor's counters and ``stats``."""
        return {"scrub": self._progress, "files_healed": self.healed}
