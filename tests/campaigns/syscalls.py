"""Kills every cycle before each of its system calls: what is left must be right, and the next cycle must mend it.

    python -m tests.campaigns.syscalls --cycle archive --seed 1
    python -m tests.campaigns.syscalls --cycle all --stride 10

A cycle is a process from its first step to its last: of the archiver (pull, Parquet, fsync, rename, commit, checkpoint,
index, watermark, views), of the compactor (merge, commit, removal of files, clean-up of the log), of the archiver's
purge, of the trimming of keys, of the janitor's expiry.  Each point begins with the same copy of a server's data, a
lake and an index.  The process is killed before its Nth call that changes the world, counted over all of its threads
(:mod:`tests.campaigns.tracer` says which calls those are and how they are counted).  Then

1. what is left is read with plain libraries: each acknowledged thing is in the lake once, or in its stream; nothing is
   purged above the watermark; nothing is there that nobody stored;
2. the cycle is run again, undisturbed;
3. all is as if nobody had been killed: the rows of the lake, column by column, the messages in the streams, the
   watermarks, the dead letters; and no file is left over that is not there without a kill, once a vacuum came by.

N goes from 1 to the end of the cycle: until it has ended undisturbed three times in a row.  So nothing of it is left
out, also when one run makes a call or two more than another.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from holdfast.lake import Lake, vacuum
from holdfast.schemas.errors import HoldfastError
from holdfast.streams.topology import purge_below
from holdfast.workers.archive_table import TableArchiver
from tests.campaigns.cycles import (
    CYCLES,
    DAY_S,
    Cycle,
    Place,
    Stored,
    copy_place,
    fill,
    fill_and_archive,
    nothing_stored,
)
from tests.campaigns.plain_reading import Seen, differences, problems_of, see
from tests.campaigns.processes import PlainServer, become, call, fork
from tests.campaigns.rig import tell
from tests.campaigns.tracer import Traced, run_traced, why_not

EXIT_VIOLATION: Final = 5
_ENDED_IN_A_ROW: Final = 3
_MOST_CALLS: Final = 20_000
_UNIQUE: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{32}|(?<=views-)\w+")
COMMITS: Final = 7
PLANTED: Final = "planted"
"""Not a cycle of ours: it purges before it archives, so that a sweep has something to find."""
_FRESH: Final = frozenset({"archive", PLANTED})
"""Cycles that find something that is not archived yet."""


class Base(msgspec.Struct):
    """What every point of a cycle begins with: a folder to copy, and what is acknowledged in it."""

    folder: Path
    stored: Stored


class Outcome(msgspec.Struct):
    """How a point, or an undisturbed run, came out."""

    as_left: list[str]
    """What was wrong right after the kill."""
    seen: Seen
    files: dict[str, int]


class Chosen(msgspec.Struct, frozen=True):
    """Which points of a cycle, or which of its calls of one name; shared out to how many processes."""

    points: Sequence[int]
    before: str | None
    stride: int
    lanes: int
    is_told: bool


class Report(msgspec.Struct):
    """What a sweep came to.  ``calls``: those of undisturbed runs, at least and at most; ``points``: kills."""

    cycle: str
    seed: int
    calls: tuple[int, int] = (0, 0)
    points: int = 0
    acknowledged: int = 0
    violations: list[str] = []
    kinds: dict[str, int] = {}
    seconds: float = 0.0


def make_bases(folder: Path, seed: int) -> tuple[Base, Base]:
    """Makes what cycles begin with: a lake of several commits and two checkpoints, all of it archived; and the same
    with something more to archive, of which the commit is one that writes a checkpoint."""
    (folder / "archived" / "tmp").mkdir(parents=True)
    stored = nothing_stored()
    # Other numbers make other references, so another order in the index.
    stored.next_number = 21 * seed
    archived = _grow(folder / "archived", stored, commits=COMMITS)
    copy_place(folder / "archived", folder / "fresh")
    fresh = _grow(folder / "fresh", archived, commits=1, is_left=True)
    return Base(folder / "archived", archived), Base(folder / "fresh", fresh)


def _grow(folder: Path, stored: Stored, *, commits: int, is_left: bool = False) -> Stored:
    server = PlainServer(folder / "nats")
    place = Place(folder, server.url)
    place.claim_temporary_files()
    server.start()
    try:
        stored = call(lambda: fill(place, stored, 0), Stored)
        stored = call(lambda: fill_and_archive(place, stored, commits=commits, count=3), Stored)
        if is_left:
            stored = call(lambda: fill(place, stored, 3, with_oddities=True), Stored)
    finally:
        server.stop()
    return stored


async def _planted(place: Place) -> None:
    prepare = TableArchiver._prepare

    async def purge_first(archiver: Any, piece: Any, decided: Any) -> Any:
        await purge_below(archiver._connection, archiver.stream, piece.last_seq + 1)
        return await prepare(archiver, piece, decided)

    setattr(TableArchiver, "_prepare", purge_first)  # noqa: B010
    await CYCLES["archive"](place)


_CYCLES: Final[dict[str, Cycle]] = {**CYCLES, PLANTED: _planted}


async def look_and_mend(place: Place, cycle: str, stored: Stored) -> Outcome:
    """Looks at what is left, runs the cycle undisturbed and a vacuum after it, and looks again."""
    as_left = problems_of(await see(place.url, place.lake), stored.names)
    try:
        await _CYCLES["archive" if cycle == PLANTED else cycle](place)
    except HoldfastError as error:
        as_left.append(f"I8 the next cycle failed: {error}")
    with Lake.open(place.lake) as lake:
        # As it will be done in two days; of merged files also those are removed that stay as long.
        place.age_temporary_files(2 * DAY_S)
        vacuum(lake, 0, orphans_older_than_s=-1)
    return Outcome(
        as_left, await see(place.url, place.lake), Counter(_UNIQUE.sub("*", name) for name in place.listing())
    )


class Sweep:
    """The points of one cycle, one after another, each in the same folder."""

    def __init__(self, folder: Path, cycle: str, base: Base, before: str | None = None) -> None:
        self._work = folder
        self._cycle = cycle
        self._base = base
        self.before = before

    def point(self, kill_at: int | None) -> tuple[Traced, Outcome]:
        """Runs the cycle, killed before its ``kill_at``-th call (of the name, if there is one) unless None, and looks
        at what came of it."""
        copy_place(self._base.folder, self._work)
        server = PlainServer(self._work / "nats")
        place = Place(self._work, server.url)
        place.claim_temporary_files()
        server.start()
        try:
            traced = run_traced(become(lambda: _CYCLES[self._cycle](place)), kill_at=kill_at, of=self.before)
            if traced.status not in (0, -signal.SIGKILL):
                raise RuntimeError(f"{self._cycle}, call {kill_at}: the cycle ended with {traced.status}")
            outcome = call(lambda: look_and_mend(place, self._cycle, self._base.stored), Outcome)
        finally:
            server.kill()
        return traced, outcome


def compare(wanted: Outcome, found: Outcome) -> list[str]:
    """Returns in what a mended place differs from an undisturbed one, and what was wrong before it was mended."""
    told = [f"as left: {problem}" for problem in found.as_left]
    for table, expected in wanted.seen.tables.items():
        actual = found.seen.tables[table]
        told += differences(f"rows of {table}", expected.rows, actual.rows)
        if actual.watermark != expected.watermark:
            told.append(f"watermark of {table}: {actual.watermark}, not {expected.watermark}")
        streams = wanted.seen.streams[table], found.seen.streams[table]
        told += differences(f"stream of {table}", *(stream.names.items() for stream in streams))
    if found.seen.dead != wanted.seen.dead:
        told.append(f"{found.seen.dead} dead letters, not {wanted.seen.dead}")
    # A vacuum that finds an orphan says so in a commit of its own.
    litter = {
        name: count for name, count in (Counter(found.files) - Counter(wanted.files)).items() if not _is_commit(name)
    }
    told += [f"left over: {count} x {name}" for name, count in litter.items()]
    return told


def _is_commit(name: str) -> bool:
    return re.search(r"/\d{20}\.json\Z", name) is not None


def sweep(runs: Sweep, wanted: Outcome, report: Report, points: Iterable[int], *, is_told: bool = False) -> Report:
    """Kills a cycle at ``points``, as long as they are within it."""
    began = time.perf_counter()
    undisturbed: list[int] = list(report.calls)
    ended = 0
    for number in points:
        traced, outcome = runs.point(number)
        where = f"seed {report.seed}, {report.cycle}, {runs.before or 'call'} {number}"
        report.violations += [f"{where}: {told}" for told in compare(wanted, outcome)]
        if traced.status == 0:
            undisturbed.append(len(traced.calls))
            ended += 1
            if ended == _ENDED_IN_A_ROW:
                break
            continue
        ended = 0
        report.points += 1
        if is_told and report.points % 50 == 0:
            rate = report.points / (time.perf_counter() - began)
            tell(f"{where}, {report.points} points, {rate:.1f}/s, {len(report.violations)} violations")
    report.calls = min(undisturbed), max(undisturbed)
    return report


def run(folder: Path, cycles: list[str], seed: int, chosen: Chosen) -> list[Report]:
    """Sweeps some cycles."""
    archived, fresh = make_bases(folder / "bases", seed)
    return [
        _sweep_cycle(folder / cycle, cycle, fresh if cycle in _FRESH else archived, seed, chosen) for cycle in cycles
    ]


def _sweep_cycle(folder: Path, cycle: str, base: Base, seed: int, chosen: Chosen) -> Report:
    began = time.perf_counter()
    first, wanted = Sweep(folder / "undisturbed", cycle, base).point(None)
    whole = Report(cycle, seed, kinds=Counter(first.calls), calls=(len(first.calls), len(first.calls)))
    whole.acknowledged = sum(map(len, base.stored.names.values()))
    whole.violations = [f"undisturbed: {told}" for told in compare(wanted, wanted)]

    points = chosen.points
    if chosen.before:
        points = range(1, whole.kinds.get(chosen.before, 0) + 1, chosen.stride)

    def lane(number: int) -> None:
        report = Report(cycle, seed, calls=whole.calls)
        own = points[number :: chosen.lanes]
        sweep(Sweep(folder / f"lane{number}", cycle, base, chosen.before), wanted, report, own, is_told=chosen.is_told)
        (folder / f"report{number}").write_bytes(msgspec.json.encode(report))

    pids = [fork(partial(lane, number)) for number in range(chosen.lanes)]
    for number, pid in enumerate(pids):
        _, status = os.waitpid(pid, 0)
        if status:
            raise RuntimeError(f"{cycle}: a lane ended with {os.waitstatus_to_exitcode(status)}")
        part = msgspec.json.decode((folder / f"report{number}").read_bytes(), type=Report)
        whole.calls = min(whole.calls[0], part.calls[0]), max(whole.calls[1], part.calls[1])
        whole.points += part.points
        whole.violations += part.violations
    whole.seconds = round(time.perf_counter() - began, 1)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycle", action="append", choices=[*_CYCLES, "all"], help="may be repeated")
    parser.add_argument("--from", dest="first", type=int, default=1, help="the first call to be killed before")
    parser.add_argument("--to", dest="last", type=int, default=_MOST_CALLS)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--before", help="only before each call of this name, such as linkat or 'fsync file'")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="share the points out to so many")
    parser.add_argument("--json", action="store_true", help="nothing but the last line")
    parser.add_argument("--data", type=Path, help="a folder that does not exist yet; kept")
    chosen = parser.parse_args()
    reason = why_not()
    if reason is not None:
        sys.exit(f"cannot sweep: {reason}")
    folder = chosen.data or Path(tempfile.mkdtemp(prefix="holdfast-syscalls-"))
    cycles = list(CYCLES) if chosen.cycle in (None, ["all"]) else chosen.cycle
    points = range(chosen.first, chosen.last + 1, chosen.stride)
    reports = run(
        folder, cycles, chosen.seed, Chosen(points, chosen.before, chosen.stride, chosen.processes, not chosen.json)
    )
    violations = [told for report in reports for told in report.violations]
    for told in violations[:20]:
        tell(told)
    if violations:
        tell(f"the data is in {folder}")
    elif chosen.data is None:
        shutil.rmtree(folder)
    done = {
        "campaign": "syscalls",
        "seed": chosen.seed,
        "stride": chosen.stride,
        "points": sum(report.points for report in reports),
        "violations": len(violations),
        "seconds": round(sum(report.seconds for report in reports), 1),
        "cycles": {
            report.cycle: {
                "calls": report.calls,
                "points": report.points,
                "acknowledged": report.acknowledged,
                "violations": len(report.violations),
                "seconds": report.seconds,
            }
            for report in reports
        },
    }
    tell(json.dumps(done))
    sys.exit(EXIT_VIOLATION if violations else 0)


if __name__ == "__main__":
    main()
