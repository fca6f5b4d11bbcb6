"""Records of the benchmarks, made up for tests of what is done with them."""

from __future__ import annotations

from statistics import median

import msgspec
from benchmarks.records import PeerResult, RawLimit, Record
from benchmarks.targets import judge


def record(
    name: str,
    value: float,
    *,
    raw: float = 1.0,
    better: str = "higher",
    values: tuple[float, ...] = (),
    ratios: tuple[float, float] | None = None,
    peers: tuple[PeerResult, ...] = (),
) -> Record:
    """Makes a judged record of one run, or of the values given; ``ratios`` are the extremes of its neighbours."""
    low, high = ratios or (value / raw, value / raw)
    whole = Record(
        name=name,
        what="",
        value=value,
        unit="ops/s",
        better="higher" if better == "higher" else "lower",
        values=list(values) or [value],
        p50_ms=None,
        p99_ms=None,
        raw_limit=RawLimit(what="the bare parts", value=raw, values=[raw]),
        ratio=value / raw,
        ratio_low=low,
        ratio_high=high,
        parameters={},
        durability="durable",
        replicas=1,
        versions={},
        machine={},
        git_commit="abc",
        started_at="",
        peers=list(peers),
    )
    return msgspec.structs.replace(whole, verdicts=judge(whole))


def peer(name: str, value: float, ours: float, values: tuple[float, ...] = ()) -> PeerResult:
    """Makes what a peer reached beside ``ours``."""
    assert not values or median(values) == value
    return PeerResult(name=name, what=name, value=value, values=list(values) or [value], ratio=ours / value)
