"""What a run of the campaign against a cluster tells at its end.  Holds no tests itself."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import msgspec

from holdfast.ops.server_config import find_server_binary
from holdfast.ops.torture.check import Violation
from holdfast.ops.torture.usage import UsageSummary


class Report(msgspec.Struct):
    """What was done and found; printed as one line of JSON."""

    seed: int
    kinds: dict[str, int]
    rounds: int = 0
    attempted: int = 0
    acknowledged: int = 0
    unknown: int = 0
    refused: int = 0
    reads: int = 0
    lost: int = 0
    doubled: int = 0
    violations: list[Violation] = []
    outage_s: dict[str, dict[str, float]] = {}
    client_outage_s: dict[str, dict[str, float]] = {}
    whole_s: dict[str, dict[str, float]] = {}
    worker_deaths: int = 0
    memory: dict[str, UsageSummary] = {}
    power: str = ""
    replicas: int = 3
    durability: str = "durable"
    versions: dict[str, str] = {}
    seconds: float = 0.0
    kept: str | None = None


def spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"p50": round(ordered[(len(ordered) - 1) // 2], 2), "max": round(ordered[-1], 2), "rounds": len(ordered)}


def server_version() -> str:
    done = subprocess.run([str(find_server_binary()), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip().rpartition(" ")[2]
