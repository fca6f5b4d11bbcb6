"""Seeded agent traces in the ``steps`` format, for machines without recorded ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.payloads import Bodies

_STEPS_PER_SESSION: Final = 55
_SHORT_BYTES: Final = 200
_MEDIAN_BYTES: Final = 1_000
_MOST_BYTES: Final = 60_000
_ROLES: Final = ("user", "assistant", "tool")


def write_traces(path: Path, steps: int, *, seed: int = 10) -> None:
    """Writes one file of ``steps`` steps: contents around a median of 1 kB with a long tail, the first ones equal."""
    source = random.Random(seed)
    bodies = Bodies(seed)
    with path.open("wb") as file:
        for number in range(steps):
            session, seq = divmod(number, _STEPS_PER_SESSION)
            record: dict[str, Any] = {"session_id": f"synthetic-{session}", "seq": seq}
            if seq == 0:
                record |= {"role": "system", "content": "You are a careful agent. " * 40}
            else:
                size = int(source.lognormvariate(0, 1.1) * _MEDIAN_BYTES)
                content = bodies.take(1, max(_SHORT_BYTES, min(_MOST_BYTES, size)))[0]
                record |= {"role": _ROLES[seq % len(_ROLES)], "content": content["text"], "caused_by": seq - 1}
            file.write(msgspec.json.encode(record) + b"\n")
