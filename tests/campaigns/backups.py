"""Backups while everything runs, cut off at random; then the system is destroyed and restored elsewhere::

    python -m tests.campaigns.backups --rounds 100 --seed 7

In each round producers write contexts, events and versions of keys, workers archive and purge, and backups are begun at
times that the seed decides, some of them killed.  Then every process is killed and all data removed, and a complete
backup, the newest or an older one, is restored into an empty directory.  What was acknowledged before that backup was
begun must be there exactly once, what was written later not at all or once; nothing else.  The restored system is
written to again: no position of the old one names anything else, and what is gone is told as not found.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import shutil
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client import connect
from holdfast.ops.backup_restore import restore_backup
from holdfast.ops.torture.check import Violation, check
from holdfast.ops.torture.history import History, read_history
from holdfast.ops.torture.observe import observe
from holdfast.ops.torture.rig import TortureRig
from holdfast.ops.torture.run import versions
from holdfast.ops.verify import verify
from holdfast.schemas.errors import NotFoundError
from holdfast.streams.connection import open_connection
from holdfast.workers.backup.listing import list_backups
from holdfast.workers.backup.manifest import Manifest, read_manifest
from holdfast.workers.control import flush
from tests.campaigns.rig import tell
from tests.running import eventually

if TYPE_CHECKING:
    from holdfast.ops.torture.seen import Observation

BACKUPS: Final = 4
"""Backups begun in a round."""

KILLED: Final = 0.5
"""How many of them are killed."""

PAUSE_S: Final = (0.1, 0.8)
KILL_S: Final = (0.0, 0.6)
"""When one is killed, after it was begun."""

RATE: Final = 300.0
_ASKED: Final = 5

_BACKUP: Final = """
import asyncio, sys
from pathlib import Path
from holdfast.streams.connection import open_connection
from holdfast.workers.backup.making import make_backup

async def main():
    async with open_connection(sys.argv[1]) as connection:
        print("begun", flush=True)
        report = await make_backup(connection, Path(sys.argv[2]), Path(sys.argv[3]))
    print(report.id, flush=True)

asyncio.run(main())
"""

Prefix = dict[str, int]
"""How long each file of the history was."""


class Outcome(msgspec.Struct, kw_only=True):
    """What a campaign came to."""

    campaign: str = "backups"
    seed: int
    rounds: int = 0
    backups: int = 0
    killed: int = 0
    complete: int = 0
    restored_older: int = 0
    acknowledged: int = 0
    unknown: int = 0
    lost: int = 0
    doubled: int = 0
    violations: list[Violation] = []
    backup_s_most: float = 0.0
    restore_s_most: float = 0.0
    seconds: float = 0.0
    durability: str = "durable"
    versions: dict[str, str] = {}
    kept: str = ""


class Round:
    """One round in a directory of its own.  ``drop`` takes that many acknowledged contexts out of what is read, to show
    that it would be noticed."""

    def __init__(
        self, directory: Path, seed: int, *, load_s: float = 1.0, backups: int = BACKUPS, drop: int = 0
    ) -> None:
        self._directory = directory
        self._seed = seed
        self._choice = random.Random(f"backups {seed}")
        self._load_s = load_s
        self._drop = drop
        self._count = backups
        self._rig = TortureRig(directory / "source", seed=seed)
        self._backups = directory / "backups"
        self._begun: dict[str, Prefix] = {}
        self.made = self.killed = 0
        self.is_older = False
        self.backup_s = self.restore_s = 0.0
        self.history = History()

    async def run(self) -> list[Violation]:
        """Runs the round and returns what was found."""
        await self._load()
        complete = list_backups(self._backups, verify=True)
        wrong = [Violation("I4", listing.id, str(listing.problem)) for listing in complete if listing.problem]
        older = len(complete) > 1 and self._choice.random() < 0.4
        self.is_older = older
        chosen = self._choice.choice(complete[:-1]) if older else complete[-1]
        manifest = read_manifest(self._backups, chosen.id)
        data = self._directory / "restored"
        began = time.monotonic()
        report = await restore_backup(self._backups, data, backup_id=manifest.id)
        self.restore_s = time.monotonic() - began
        wrong += [Violation(found.invariant, found.object, found.what) for found in report.violations]
        return wrong + await self._check(manifest, data)

    async def _load(self) -> None:
        async with self._rig as rig:
            await rig.start_server()
            await rig.start_worker(name="workers")
            names = ("sdk1", "raw1")
            for name in names:
                rig.start_producer(name, "--rate", str(RATE), *(["--raw"] if name.startswith("raw") else []))
            await eventually(lambda: len([path for path in rig.histories if path.stat().st_size]) == len(names))
            await asyncio.sleep(self._load_s)
            for number in range(self._count):
                # The last one is left to end: there is something to restore.
                await self._backup(is_killed=number < self._count - 1 and self._choice.random() < KILLED)
                await asyncio.sleep(self._choice.uniform(*PAUSE_S))
            for child in list(rig.children.values()):
                await child.kill()
        for name in ("nats", "lake", "index"):
            shutil.rmtree(rig.directory / name)

    async def _backup(self, *, is_killed: bool) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _BACKUP, self._rig.url, str(self._rig.lake), str(self._backups)),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        # What is noted before the process is let go on was acknowledged before the backup began.
        prefix = {path.name: path.stat().st_size for path in self._rig.histories}
        began = time.monotonic()
        known = {listing.id for listing in list_backups(self._backups)} if self._backups.exists() else set()
        self.made += 1
        if is_killed:
            self.killed += 1
            assert await process.stdout.readline() == b"begun\n"
            await asyncio.sleep(self._choice.uniform(*KILL_S))
            if process.returncode is None:
                process.kill()
        await process.communicate()
        assert is_killed or process.returncode == 0, "a backup failed"
        self.backup_s = max(self.backup_s, time.monotonic() - began)
        # One that was killed may have been complete by then.
        if (self._backups / "manifests").exists():
            for listing in list_backups(self._backups):
                if listing.id not in known:
                    self._begun[listing.id] = prefix

    async def _check(self, manifest: Manifest, data: Path) -> list[Violation]:
        self.history = await asyncio.to_thread(self._expected, self._begun[manifest.id])
        rig = TortureRig(
            self._directory / "again",
            seed=self._seed + 1_000_003,
            nats_data=data,
            lake=data / "lake",
            hot_window_s=60.0,
        )
        async with rig:
            await rig.start_server()
            await rig.start_worker(name="workers")
            found = check(self.history, self._less(await self._observe(rig)))
            found += await self._gone(rig)
            rig.start_producer("after1", "--rate", str(RATE))
            await eventually(lambda: any(path.stat().st_size for path in rig.histories))
            await asyncio.sleep(self._load_s)
            await rig.stop("after1")
            async with open_connection(rig.url) as connection:
                await flush(connection)
                report = await verify(rig.lake, connection)
            found += [Violation(problem.invariant, problem.object, problem.what) for problem in report.violations]
            for path in rig.histories:
                shutil.copy(path, self._rig.directory / "history" / path.name)
            both = self._expected(self._begun[manifest.id] | {path.name: path.stat().st_size for path in rig.histories})
            after = await self._observe(rig)
            found += check(both, self._less(after))
            found += _reused(manifest, after)
            self.history = both
        return found

    def _expected(self, prefix: Prefix) -> History:
        """What must be there: acknowledged before the backup; of what came later, anything may."""
        before = self._directory / "before"
        shutil.rmtree(before, ignore_errors=True)
        before.mkdir(parents=True)
        for name, size in prefix.items():
            (before / name).write_bytes((self._rig.directory / "history" / name).read_bytes()[:size])
        known = read_history(before.iterdir())
        history = read_history(self._rig.histories)
        for op, event in history.events.items():
            if event.outcome == "acknowledged" and (op not in known.events or known.outcome(op) != "acknowledged"):
                event.outcome, event.ended, event.seq, event.version = "unknown", None, None, None
        return history

    async def _observe(self, rig: TortureRig) -> Observation:
        async with open_connection(rig.url) as connection:
            await flush(connection)
        return await observe(rig.url, rig.lake, namespaces=[rig.namespace])

    def _less(self, observation: Observation) -> Observation:
        kept = (
            event.attempt.id
            for event in self.history.events.values()
            if event.attempt.kind == "context" and event.outcome == "acknowledged"
        )
        gone = set(islice(kept, self._drop))
        for view in observation.views.values():
            view.contexts[:] = [seen for seen in view.contexts if seen[0] not in gone]
        return observation

    async def _gone(self, rig: TortureRig) -> list[Violation]:
        """What was acknowledged after the backup resolves, whole, or is told as not found."""
        late = [
            event.attempt.id
            for event in self.history.events.values()
            if event.attempt.kind == "context" and event.outcome == "unknown"
        ]
        found: list[Violation] = []
        async with connect(rig.url, rig.namespace, cache_bytes=0) as hf:
            for ref in late[-_ASKED:]:
                try:
                    await hf.resolve(ref)
                except NotFoundError:
                    continue
                except Exception as error:  # noqa: BLE001  whatever else it is, is the finding
                    found.append(Violation("I5", ref, f"gone, and told as {type(error).__name__}: {error}"))
        return found


def _reused(manifest: Manifest, observation: Observation) -> list[Violation]:
    """No position beyond the backup's, of the life that was backed up, names anything."""
    ends = {name: (stream.image.epoch, stream.image.state.last_seq) for name, stream in manifest.streams.items()}
    return [
        Violation(
            "I4", f"{placed.stream} {placed.epoch} {placed.seq}", f"names {placed.identity}, stored after the restore"
        )
        for placed in observation.placed
        if placed.stream in ends and placed.epoch == ends[placed.stream][0] and placed.seq > ends[placed.stream][1]
    ]


async def run(
    rounds: int, seed: int, directory: Path, *, load_s: float = 1.0, drop: int = 0, is_told: bool = False
) -> Outcome:
    """Runs rounds until one finds something; its data is kept."""
    outcome = Outcome(seed=seed, versions=versions())
    began = time.monotonic()
    for number in range(rounds):
        folder = directory / f"round{number}"
        one = Round(folder, seed * 1_000 + number, load_s=load_s, drop=drop)
        violations = await one.run()
        counts = one.history.counts()
        outcome.rounds += 1
        outcome.backups += one.made
        outcome.killed += one.killed
        outcome.restored_older += one.is_older
        outcome.acknowledged += counts["acknowledged"]
        outcome.unknown += counts["unknown"]
        outcome.violations += violations
        outcome.backup_s_most = round(max(outcome.backup_s_most, one.backup_s), 2)
        outcome.restore_s_most = round(max(outcome.restore_s_most, one.restore_s), 2)
        outcome.complete += len(list_backups(folder / "backups"))
        if is_told:
            tell(f"round {number + 1}/{rounds}: {counts['acknowledged']} acknowledged, {len(violations)} violations")
        if violations:
            outcome.kept = str(folder)
            break
        shutil.rmtree(folder)
    outcome.lost = sum("lost" in violation.what for violation in outcome.violations)
    outcome.doubled = sum("twice" in violation.what or "doubled" in violation.what for violation in outcome.violations)
    outcome.seconds = round(time.monotonic() - began, 1)
    return outcome


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, help="where; a temporary directory, if not given")
    parser.add_argument("--load-s", type=float, default=1.0, help="seconds of load before the first backup")
    parser.add_argument("--json", action="store_true", help="nothing but the last line")
    options: Any = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    directory = options.data or Path(tempfile.mkdtemp(prefix="holdfast-backups-"))
    outcome = asyncio.run(run(options.rounds, options.seed, directory, load_s=options.load_s, is_told=not options.json))
    for violation in outcome.violations[:20]:
        print(f"{violation.invariant} {violation.object}: {violation.what}", *violation.history, sep="\n    ")  # noqa: T201
    if outcome.violations:
        print(f"seed {options.seed}, kept in {outcome.kept}")  # noqa: T201
    elif options.data is None:
        shutil.rmtree(directory, ignore_errors=True)
    print(msgspec.json.encode(outcome).decode())  # noqa: T201
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
