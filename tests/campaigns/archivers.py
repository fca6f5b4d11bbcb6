"""Two and three archivers, or compactors, on one lake and one server; one of them is stopped at a step and wakes late.

    python -m tests.campaigns.archivers --rounds 100 --seed 1

Each round stores something, then one process is stopped (SIGSTOP, the whole process) at a named step of its cycle.
While it stands still more is stored, the others archive, purge and merge, and a vacuum goes by as it would a day later:
what the stopped process has written and not committed yet is an orphan by then.  Then it is woken up and goes on from
where it stood.  It must end well, and everything must be there exactly once, read with plain libraries.

Most rounds are of processes on several machines: the lock of the archiver, which one kernel keeps, is taken away, so
that nothing but the Delta commit is between them.  In the others the lock is held by the stopped process, and the rest
wait for it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

import holdfast.workers.archiver
from holdfast.lake import Lake
from holdfast.lake.index import LakeIndex
from holdfast.schemas import failpoints
from holdfast.streams.connection import open_connection
from holdfast.streams.hot import HotTier
from holdfast.workers.archiver import run_archiver
from holdfast.workers.index_directory import claim_index_directory
from tests.campaigns.cycles import Place, Stored, fill, merge, nothing_stored, prepare_process, purge, trim
from tests.campaigns.plain_reading import Seen, problems_of, see
from tests.campaigns.processes import PlainServer, become, call, fork
from tests.campaigns.rig import tell
from tests.running import target_of

EXIT_VIOLATION: Final = 5
LIMIT_S: Final = 60.0
COMMIT_STEPS: Final = (
    "lake.before_parquet_fsync",
    "lake.after_parquet_fsync",
    "lake.before_rename",
    "lake.after_rename",
    "lake.before_commit",
    "lake.after_commit",
    "lake.after_log_fsync",
)
STEPS: Final[dict[str, tuple[str, ...]]] = {
    "archiver": (
        *COMMIT_STEPS,
        "archiver.before_ack",
        "archiver.after_ack",
        "archiver.before_purge",
        "archiver.after_purge",
    ),
    "compactor": COMMIT_STEPS,
    "vacuum": ("vacuum.before_commit", "lake.before_commit", "vacuum.after_commit"),
    "trimmer": ("archiver.before_trim", "archiver.after_trim"),
}
_PLACES_ROUNDS: Final = 10
"""Rounds on one lake, before the next begins with an empty one."""
_RUN: Final = 4
"""Rows of one commit: several commits a round, between which the others may come."""


class Round(msgspec.Struct, frozen=True):
    """One round: who is stopped where, at the how manieth call, among how many, with or without the lock."""

    role: str
    step: str
    hit: int
    processes: int
    is_locked: bool


class Report(msgspec.Struct):
    """What a campaign came to; ``paused`` by step."""

    rounds: int = 0
    acknowledged: int = 0
    fenced: int = 0
    paused: dict[str, int] = {}
    not_reached: int = 0
    violations: list[str] = []


def plan(seed: int, rounds: int) -> list[Round]:
    """Returns the rounds of a campaign: every step of every role in turn, the rest by chance."""
    choice = random.Random(seed)
    every = [(role, step) for role, steps in STEPS.items() for step in steps]
    order: list[tuple[str, str]] = []
    while len(order) < rounds:
        choice.shuffle(every)
        order += every
    return [
        Round(
            role,
            step,
            hit=choice.choice((1, 1, 2, 3)) if role == "archiver" and step in COMMIT_STEPS else 1,
            processes=choice.choice((2, 3)),
            is_locked=role == "archiver" and choice.random() < 0.3,
        )
        for role, step in order[:rounds]
    ]


async def archive_beside_others(place: Place, number: int, is_locked: bool) -> None:
    """A cycle of one of several archivers: archives and purges everything there is, a few rows a commit.

    Its control calls are not answered over the wire here: any of the archivers might get them, one that is stopped too.
    """
    prepare_process()
    settings = place.settings(f"archiver{number}", hot_window_s=0.0, archive_rows=_RUN)
    if not is_locked:
        setattr(holdfast.workers.archiver, "take_lock", _no_lock)  # noqa: B010  in a process of its own
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(open_connection(target_of(place.url), connect_s=10.0))
        lake = await asyncio.to_thread(Lake.open, settings.lake, create=True)
        directory, claim = claim_index_directory(settings.index)
        stack.callback(os.close, claim)
        index = stack.enter_context(LakeIndex.open(directory))
        hot = HotTier(connection)
        stack.push_async_callback(hot.close)
        archiver = await stack.enter_async_context(run_archiver(connection, hot, lake, index, settings))
        loop = asyncio.create_task(archiver.run())
        await archiver.flush()
        archiver.stop()
        await loop
        (place.folder / f"fenced-{os.getpid()}").write_text(
            str(sum(count for name, count in archiver.counters().items() if name.endswith("_fenced")))
        )


async def _no_lock(lake: Path, _on_standby: object) -> int:
    return os.open(lake, os.O_RDONLY)


ROLES: Final[dict[str, Callable[[Place], Coroutine[Any, Any, None]]]] = {
    "compactor": merge,
    "vacuum": merge,
    "trimmer": trim,
}


class Campaign:
    """Rounds one after another on a server and a lake, anew every few rounds."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._server: PlainServer | None = None
        self._place = Place(folder, "")
        self._stored = nothing_stored()
        self._started = 0
        self.report = Report()

    def run(self, rounds: list[Round], *, is_told: bool = False) -> Report:
        """Runs the rounds; stops at the first violation, whose data stays."""
        began = time.perf_counter()
        try:
            for number, round_ in enumerate(rounds):
                if number % _PLACES_ROUNDS == 0:
                    self._begin(number)
                found = self._round(round_)
                self.report.rounds += 1
                if found:
                    name = f"seed {self._seed}, round {number}, {round_}"
                    self.report.violations += [f"{name}: {told}" for told in found]
                    break
                if is_told and (number + 1) % 10 == 0:
                    tell(f"{number + 1} of {len(rounds)} rounds, {time.perf_counter() - began:.0f} s")
        finally:
            self._end()
        return self.report

    def _begin(self, number: int) -> None:
        self._end()
        folder = self._folder / f"place{number}"
        self._server = PlainServer(folder / "nats")
        self._server.start()
        self._place = Place(folder, self._server.url)
        self._place.claim_temporary_files()
        self._stored = nothing_stored()

    def _end(self) -> None:
        if self._server is not None:
            self.report.acknowledged += sum(map(len, self._stored.names.values()))
            for path in self._place.folder.glob("fenced-*"):
                self.report.fenced += int(path.read_text())
            self._server.kill()
            self._server = None
            if not self.report.violations:
                shutil.rmtree(self._place.folder)

    def _round(self, round_: Round) -> list[str]:
        self._store(12, with_oddities=True)
        if round_.role != "archiver":
            self._finish([self._fork(partial(archive_beside_others, number=0, is_locked=False))])
        if round_.role == "vacuum":
            # Something to remove: what an archiver left that died before its commit.
            self._store(6)
            died = self._fork(
                partial(archive_beside_others, number=0, is_locked=False),
                {failpoints.ENVIRONMENT: "lake.before_commit=kill"},
            )
            os.waitpid(died, 0)
        stopped = self._fork(self._work(round_, 0), {failpoints.ENVIRONMENT: f"{round_.step}=pause:{round_.hit}"})
        if not _wait_stopped(stopped):
            self.report.not_reached += 1
            return self._look(is_last=True)
        self.report.paused[round_.step] = self.report.paused.get(round_.step, 0) + 1
        try:
            self._store(6)
            others = [self._fork(self._work(round_, number)) for number in range(1, round_.processes)]
            if not round_.is_locked:
                # While it stands still, the others archive, purge, merge and remove, as much as a day would bring.
                found = self._finish(others)
                found += self._finish([self._fork(partial(archive_beside_others, number=9, is_locked=False))])
                found += self._finish([self._fork(merge)])
                found += self._look(is_last=False)
                others = []
                if found:
                    return found
        finally:
            os.kill(stopped, signal.SIGCONT)
        return self._finish([stopped, *others]) + self._look(is_last=True)

    def _work(self, round_: Round, number: int) -> Callable[[Place], Coroutine[Any, Any, None]]:
        if round_.role == "archiver":
            return partial(archive_beside_others, number=number, is_locked=round_.is_locked)
        return ROLES[round_.role]

    def _fork(
        self, work: Callable[[Place], Coroutine[Any, Any, None]], environment: dict[str, str] | None = None
    ) -> int:
        place = self._place
        return fork(become(lambda: work(place)), environment=environment)

    def _store(self, count: int, *, with_oddities: bool = False) -> None:
        place, stored = self._place, self._stored
        self._stored = call(lambda: fill(place, stored, count, with_oddities=with_oddities), Stored)

    def _finish(self, pids: list[int]) -> list[str]:
        """Waits for processes to end; returns what is wrong with how they ended."""
        found = []
        for pid in pids:
            status = _wait_ended(pid)
            if status != 0:
                found.append(f"I8 a process ended with {status}")
        return found

    def _look(self, *, is_last: bool) -> list[str]:
        place, stored = self._place, self._stored
        if is_last:
            for work in (purge, merge):
                found = self._finish([self._fork(work)])
                if found:
                    return found
        seen = call(lambda: see(place.url, place.lake), Seen)
        found = problems_of(seen, stored.names)
        if is_last:
            for table, names in stored.names.items():
                archived = Counter(name for name, *_ in seen.tables[table].rows)
                found += [f"I1 {table}: {name} was not archived" for name in names if not archived[name]]
                if seen.tables[table].watermark != seen.streams[table].last_seq:
                    found.append(f"I3 {table}: archived up to {seen.tables[table].watermark} only")
        return found


def _wait_stopped(pid: int) -> bool:
    """Waits until a process has stopped itself; False when it ended without."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
        if ended == pid:
            if os.WIFSTOPPED(status):
                return True
            if os.waitstatus_to_exitcode(status) != 0:
                raise RuntimeError(f"a process ended with {os.waitstatus_to_exitcode(status)} before its step")
            return False
        time.sleep(0.002)
    raise TimeoutError(f"process {pid} neither stopped nor ended")


def _wait_ended(pid: int) -> int:
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended == pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"process {pid} did not end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--step", help="only this step")
    parser.add_argument("--json", action="store_true", help="nothing but the last line")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="holdfast-archivers-"))
    began = time.perf_counter()
    rounds = plan(chosen.seed, chosen.rounds)
    if chosen.step:
        rounds = [round_ for round_ in plan(chosen.seed, chosen.rounds * 40) if round_.step == chosen.step]
        rounds = rounds[: chosen.rounds]
    report = Campaign(folder, chosen.seed).run(rounds, is_told=not chosen.json)
    for told in report.violations[:20]:
        tell(told)
    if report.violations:
        tell(f"the data is in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    done = {"campaign": "archivers", "seed": chosen.seed, **msgspec.to_builtins(report)}
    done |= {"violations": len(report.violations), "seconds": round(time.perf_counter() - began, 1)}
    tell(json.dumps(done))
    sys.exit(EXIT_VIOLATION if report.violations else 0)


if __name__ == "__main__":
    main()
