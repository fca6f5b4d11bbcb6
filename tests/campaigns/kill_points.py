"""SIGKILL at any moment of the cycles of archiver, compactor, purge and trimming, thousands of times.

    python -m tests.campaigns.kill_points --kills 5000 --seed 1

A parent that has imported everything forks a worker, which runs one cycle after another until it is killed, after a
random number of microseconds; then the next one, on what it left.  Contexts, events and versions of keys are stored in
between, enough for every worker to find something to do.  After each batch of kills all is read with plain libraries:
as it was left, and after an undisturbed cycle.  The same seed gives the same kinds of workers and the same lives.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from tests.campaigns.cycles import (
    DAY_S,
    WINDOW_S,
    Cycle,
    Place,
    Stored,
    archive,
    archiver_round,
    fill,
    merge,
    nothing_stored,
    prepare_process,
    purge,
    trim,
)
from tests.campaigns.plain_reading import Seen, problems_of, see
from tests.campaigns.processes import PlainServer, become, call, fork
from tests.campaigns.rig import tell

EXIT_VIOLATION: Final = 5
KILLS_A_BATCH: Final = 25
ROWS_A_BATCH: Final = 60
BATCHES_A_PLACE: Final = 12
"""Batches on one lake; then the next begins with an empty one, so that reading all of it stays quick."""

LONGEST_US: Final = 250_000
"""The longest life of a worker: a cycle and a half."""

_RUN: Final = 5
"""Rows of one commit: a batch is many commits."""


async def archive_in_runs(place: Place) -> None:
    """Archives in many small commits, and purges what is archived."""
    await archiver_round(place, place.settings(hot_window_s=0.0, archive_rows=_RUN, duplicate_window_s=WINDOW_S))


WORKERS: Final[dict[str, tuple[int, tuple[Cycle, ...]]]] = {
    "archiver": (5, (archive_in_runs,)),
    "compactor": (2, (merge,)),
    "trimmer": (1, (trim,)),
    "all": (2, (archive_in_runs, merge, trim)),
}
"""What a worker does, over and over, and how often there is one of its kind."""


class Report(msgspec.Struct):
    """What a campaign came to.  ``kills``: workers that were alive when they were killed, by kind."""

    kills: dict[str, int] = {}
    batches: int = 0
    acknowledged: int = 0
    commits: int = 0
    violations: list[str] = []


async def work_for_ever(place: Place, kind: str) -> None:
    """Runs the cycles of one kind of worker until the process is killed."""
    prepare_process()
    while True:
        for cycle in WORKERS[kind][1]:
            await cycle(place)


class Campaign:
    """Batches of kills, each on what the one before it left."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._choice = random.Random(seed)
        self._server: PlainServer | None = None
        self._place = Place(folder, "")
        self._stored = nothing_stored()
        self.report = Report()

    def run(self, kills: int, *, is_told: bool = False) -> Report:
        """Kills that many workers; stops at the first violation, whose data stays."""
        began = time.perf_counter()
        report = self.report
        try:
            while (killed := sum(report.kills.values())) < kills and not report.violations:
                if report.batches % BATCHES_A_PLACE == 0:
                    self._begin()
                self._batch(min(KILLS_A_BATCH, kills - killed))
                report.batches += 1
                if is_told and report.batches % 4 == 0:
                    killed, seconds = sum(report.kills.values()), time.perf_counter() - began
                    tell(f"{killed} of {kills} kills, {killed / seconds:.1f}/s, {report.acknowledged} acknowledged")
        finally:
            self._end()
        return report

    def _begin(self) -> None:
        self._end()
        folder = self._folder / f"place{self.report.batches}"
        self._server = PlainServer(folder / "nats")
        self._server.start()
        self._place = Place(folder, self._server.url)
        self._place.claim_temporary_files()
        self._stored = nothing_stored()

    def _end(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server = None
            self.report.commits += len(list(self._place.lake.glob("*/_delta_log/*.json")))
            if not self.report.violations:
                shutil.rmtree(self._place.folder)

    def _batch(self, kills: int) -> None:
        place, stored = self._place, self._stored
        before = sum(map(len, stored.names.values()))
        stored = self._stored = call(lambda: fill(place, stored, ROWS_A_BATCH, with_oddities=True), Stored)
        self.report.acknowledged += sum(map(len, stored.names.values())) - before
        kinds = [kind for kind, (share, _) in WORKERS.items() for _ in range(share)]
        for number in range(kills):
            kind, life_us = self._choice.choice(kinds), self._choice.randrange(LONGEST_US)
            status = self._kill_one(kind, life_us)
            if status == -signal.SIGKILL:
                self.report.kills[kind] = self.report.kills.get(kind, 0) + 1
            else:
                self._tell(f"kill {number}", [f"I8 a {kind} ended by itself with {status}"])
        self._tell("as left", problems_of(call(lambda: see(place.url, place.lake), Seen), stored.names))
        self._tell("after a clean cycle", call(lambda: mend_and_look(place, stored), list[str]))

    def _kill_one(self, kind: str, life_us: int) -> int:
        place = self._place
        pid = fork(become(partial(work_for_ever, place, kind)))
        time.sleep(life_us / 1e6)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)

    def _tell(self, when: str, found: list[str]) -> None:
        self.report.violations += [f"seed {self._seed}, batch {self.report.batches}, {when}: {told}" for told in found]


async def mend_and_look(place: Place, stored: Stored) -> list[str]:
    """Runs undisturbed cycles, and returns what is wrong then: everything must be archived, once."""
    await archive(place)
    await purge(place)
    place.age_temporary_files(2 * DAY_S)
    await merge(place)
    seen = await see(place.url, place.lake)
    found = problems_of(seen, stored.names)
    for table, names in stored.names.items():
        archived = Counter(name for name, *_ in seen.tables[table].rows)
        found += [f"I1 {table}: {name} was not archived" for name in names if not archived[name]]
        if seen.tables[table].watermark != seen.streams[table].last_seq:
            found.append(f"I3 {table}: archived up to {seen.tables[table].watermark} only")
    # The cycle has removed what killed workers left: nothing of it grows.
    wanted = sum(len(list((place.lake / table).glob("day=*/*"))) for table in names_of_tables(stored))
    if wanted > _MOST_FILES:
        found.append(f"litter: {wanted} files of rows after a merge")
    return found + [f"litter: {name}" for name in place.listing() if "#" in name or "holdfast-views-" in name]


def names_of_tables(stored: Stored) -> list[str]:
    """Returns the tables of a lake."""
    return list(stored.names)


_MOST_FILES: Final = 30
"""Files of rows after a merge of everything: one for each table and day, and some that were just written."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="share the kills out to so many, each with a server")
    parser.add_argument("--json", action="store_true", help="nothing but the last line")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="holdfast-kill-points-"))
    began = time.perf_counter()
    report = run(folder, chosen.kills, chosen.seed, chosen.processes, is_told=not chosen.json)
    for told in report.violations[:20]:
        tell(told)
    if report.violations:
        tell(f"the data is in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.perf_counter() - began
    killed = sum(report.kills.values())
    done = {"campaign": "kill_points", "seed": chosen.seed, "killed": killed, **msgspec.to_builtins(report)}
    done |= {
        "violations": len(report.violations),
        "seconds": round(seconds, 1),
        "kills_per_s": round(killed / seconds, 1),
    }
    tell(json.dumps(done))
    sys.exit(EXIT_VIOLATION if report.violations else 0)


def run(folder: Path, kills: int, seed: int, lanes: int, *, is_told: bool = False) -> Report:
    """Kills that many workers, shared out to ``lanes`` processes, each with a seed and a server of its own."""
    pids = []
    for lane in range(lanes):
        share = kills // lanes + (lane < kills % lanes)
        pids.append(fork(partial(_lane, folder / f"lane{lane}", share, seed * 1_000 + lane, is_told)))
    whole = Report()
    for lane, pid in enumerate(pids):
        _, status = os.waitpid(pid, 0)
        if status:
            raise RuntimeError(f"a lane ended with {os.waitstatus_to_exitcode(status)}")
        part = msgspec.json.decode((folder / f"lane{lane}.json").read_bytes(), type=Report)
        whole.kills = dict(Counter(whole.kills) + Counter(part.kills))
        whole.batches += part.batches
        whole.acknowledged += part.acknowledged
        whole.commits += part.commits
        whole.violations += part.violations
    return whole


def _lane(folder: Path, kills: int, seed: int, is_told: bool) -> None:
    folder.mkdir(parents=True)
    report = Campaign(folder, seed).run(kills, is_told=is_told)
    folder.with_suffix(".json").write_bytes(msgspec.json.encode(report))


if __name__ == "__main__":
    main()
