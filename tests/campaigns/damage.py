"""Flips single bits of the files that a system keeps, and reads everything::

    python -m tests.campaigns.damage --flips 2000 --seed 1 --json

One system is prepared.  For each flip it is copied, one bit of one file is flipped (one time in twenty the file is cut
off instead), and a process of its own reads everything in every way, goes on writing, and reads again.  Each flip is

- *harmless*: everything read is right;
- *detected*: somebody was told by a typed error, a problem or ``verify``, and everything served was right;
- *wrong*: something else than what was stored was served, or less without a word.  There must be none.

A server's files (``blk``, ``index``, ``streams``) are tried with a server that is started on them, killed before or
stopped cleanly; the others need none.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, cast

import msgspec

from holdfast.ops.server_config import ServerSettings
from tests import support
from tests.campaigns import damage_lake, damage_streams
from tests.campaigns.damage_lake import FILE_KINDS, Flip, Verdict, apply, copy
from tests.campaigns.damage_streams import ENDINGS, STREAM_KINDS, StreamKind
from tests.campaigns.rig import tell

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KINDS: Final[tuple[str, ...]] = (*FILE_KINDS, *STREAM_KINDS)
WEIGHTS: Final = {"parquet": 16, "delta": 10, "checkpoint": 6, "lmdb": 6, "meta": 2, "blk": 4, "index": 1, "streams": 1}
"""How often a flip hits a kind of file."""

START_S: Final = 8.0
"""How long a server may take to start on damaged files: one that cannot recover a stream says so until then."""

LIMIT_S: Final = 120
"""How long one flip may take: a hang is a failure."""


class Report(msgspec.Struct):
    """What a run did and found; the last line of it."""

    campaign: str = "damage"
    seed: int = 0
    flips: int = 0
    detected: int = 0
    harmless: int = 0
    wrong: int = 0
    unreadable: int = 0
    kinds: dict[str, dict[str, int]] = {}
    violations: list[str] = []
    seconds: float = 0.0


def run(
    flips: int,
    seed: int,
    kinds: Sequence[str],
    *,
    folder: Path,
    jobs: int = 1,
    unguarded: bool = False,
    told: bool = True,
) -> Report:
    """Tries so many flips, ``jobs`` at once; ``unguarded`` switches the comparison off, to see that it is noticed."""
    started = time.monotonic()
    generator = random.Random(seed)
    grounds = _prepare_all(folder, seed, kinds)
    names = [kind for kind in KINDS if kind in kinds]
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in names}
    report = Report(seed=seed)

    def finish(trial: Trial) -> None:
        verdict = trial.finish()
        counts[trial.flip.kind][verdict.outcome] += 1
        report.flips += 1
        report.unreadable += verdict.unreadable
        if verdict.outcome == "wrong":
            report.violations.append(f"flip {trial.number}, {trial.flip}: {'; '.join(verdict.wrong[:3])}")
            if told:
                tell(f"WRONG  {report.violations[-1]}")
        if told and report.flips % 50 == 0:
            tell(f"{report.flips} of {flips} flips in {time.monotonic() - started:.0f} s: {dict(_sums(counts))}")

    trials: list[Trial] = []
    for number in range(flips):
        kind = generator.choices(names, [WEIGHTS[name] for name in names])[0]
        ground = grounds["lake" if kind in FILE_KINDS else "clean" if kind == "index" else generator.choice(ENDINGS)]
        flip = _draw(ground.root, kind, generator)
        trials.append(Trial(ground, folder / f"flip-{number}", flip, number, seed, unguarded=unguarded))
        if len(trials) >= jobs:
            finish(trials.pop(0))
    for trial in trials:
        finish(trial)
    sums = _sums(counts)
    report.detected, report.harmless, report.wrong = sums["detected"], sums["harmless"], sums["wrong"]
    report.kinds = {kind: dict(count) for kind, count in counts.items()}
    report.seconds = round(time.monotonic() - started, 1)
    return report


class Ground(NamedTuple):
    """What is copied for each flip, and what must be read of it."""

    root: Path
    expected: Any


def _prepare_all(folder: Path, seed: int, kinds: Sequence[str]) -> dict[str, Ground]:
    grounds: dict[str, Ground] = {}
    if set(kinds) & set(FILE_KINDS):
        root = folder / "lake-ground"
        grounds["lake"] = Ground(root, _apart(folder, lambda: damage_lake.prepare(root, seed)))
    if set(kinds) & set(STREAM_KINDS):
        for ending in ENDINGS:
            root = folder / f"{ending}-ground"
            grounds[ending] = Ground(
                root,
                _apart(folder, partial(_prepare_streams, root, ending)),
            )
    return grounds


def _prepare_streams(root: Path, ending: str) -> Any:
    return asyncio.run(damage_streams.prepare(root, ending))


def _apart(folder: Path, prepare: Callable[[], Any]) -> Any:
    """Prepares a ground in a child: deltalake's threads would not survive the forks that follow."""
    answer = folder / "expected"
    child = os.fork()
    if not child:
        try:
            answer.write_bytes(pickle.dumps(prepare()))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    expected = pickle.loads(answer.read_bytes())  # noqa: S301  written by our own child
    answer.unlink()
    return expected


def _draw(root: Path, kind: str, generator: random.Random) -> Flip:
    if kind in FILE_KINDS:
        return damage_lake.draw(root, kind, generator)
    return damage_streams.draw(root, cast(StreamKind, kind), generator)


def _sums(counts: dict[str, Counter[str]]) -> Counter[str]:
    return sum(counts.values(), Counter())


class Trial:
    """One flip on a copy of the ground, judged in a child process: a crash of it is one of its answers."""

    def __init__(self, ground: Ground, folder: Path, flip: Flip, number: int, seed: int, *, unguarded: bool) -> None:
        self.flip = flip
        self.number = number
        self._folder = folder
        copy(ground.root, folder)
        apply(folder, flip)
        self._answer = folder / "answer"
        self._child = os.fork()
        if not self._child:
            self._judge(ground.expected, seed + number, unguarded=unguarded)

    def _judge(self, expected: Any, seed: int, *, unguarded: bool) -> NoReturn:
        try:
            signal.alarm(LIMIT_S)
            logging.disable()
            if unguarded:
                _switch_off()
            if self.flip.kind in FILE_KINDS:
                verdict = damage_lake.judge(self._folder, expected, self.flip, seed)
            else:
                setattr(support, "ServerSettings", partial(ServerSettings, start_timeout_s=START_S))  # noqa: B010  the child alone
                verdict = asyncio.run(damage_streams.judge(self._folder, expected))
        except BaseException as error:  # noqa: BLE001  whatever it is, it is told
            # No error but a typed one may come out of reading.
            verdict = Verdict()
            verdict.fail(f"{type(error).__name__}: {str(error)[:500]}")
        self._answer.write_bytes(msgspec.json.encode(verdict))
        os._exit(0)

    def finish(self) -> Verdict:
        """Waits for the verdict; the folder stays when it is a bad one."""
        _, status = os.waitpid(self._child, 0)
        if status or not self._answer.exists():
            verdict = Verdict()
            verdict.fail(f"the process ended with {os.waitstatus_to_exitcode(status)}")
        else:
            verdict = msgspec.json.decode(self._answer.read_bytes(), type=Verdict)
        if verdict.outcome != "wrong":
            shutil.rmtree(self._folder)
        return verdict


def _switch_off() -> None:
    """What a reader without the comparison would do: believe every file."""
    from holdfast.lake import checksums, duck, index, lookup

    def believe(*_arguments: object, **_options: object) -> None:
        return None

    for module in (checksums, duck, index):
        module.find_damage = believe  # type: ignore[attr-defined]
    setattr(lookup, "part_is_sound", lambda *_arguments: True)  # noqa: B010  imported there by name


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 0 when nothing wrong was served."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.damage", description=__doc__)
    parser.add_argument("--flips", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--files", default=",".join(KINDS), help=f"kinds of files: {', '.join(KINDS)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    parser.add_argument("--unguarded", action="store_true", help="switch the comparison off: wrong rows must show")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="holdfast-damage-"))
    kinds = given.files.split(",")
    report = run(given.flips, given.seed, kinds, folder=folder, jobs=given.jobs, unguarded=given.unguarded)
    if report.wrong and not given.unguarded:
        tell(f"kept in {folder}")
    elif not given.keep:
        shutil.rmtree(folder)
    tell(msgspec.json.encode(report).decode() if given.json else f"{report}")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
