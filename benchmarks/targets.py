"""The targets: every number that Holdfast is to reach, in one place, as data.

A target belongs to a figure by its name, and compares one of: the figure's value (``value``), its 99th percentile in
milliseconds (``p99_ms``), its ratio to the raw limit (``raw``), its ratio to a peer (``peer``), or the exponent of a
curve (``exponent``).  Ratios are ours / theirs: of a rate more is better, of a time less.  A peer that did not run
leaves a target open, which is said, and is not the same as met.  Of a figure or a curve that went a part of the way a
target is not measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final, Literal

import msgspec

if TYPE_CHECKING:
    from benchmarks.records import Record

Of = Literal["value", "p99_ms", "raw", "peer", "exponent"]
Relation = Literal["<=", ">="]
Outcome = Literal["met", "not met", "open", "not measured"]


class Target(msgspec.Struct, frozen=True):
    """One number of the list.  ``unit`` is told where a value is compared; ``limit`` names a raw limit that is not the
    figure's first, by its label."""

    point: int
    """Its number in the list of targets in docs/performance.md."""
    figure: str
    of: Of
    relation: Relation
    number: float
    unit: str = ""
    peer: str = ""
    limit: str = ""

    def __str__(self) -> str:
        sign = "≤" if self.relation == "<=" else "≥"
        amount = f"{self.number:,g}" if self.number < 1e6 else f"{self.number:,.0f}"
        if self.of == "raw":
            return f"{sign} {amount} × raw"
        if self.of == "peer":
            return f"{sign} {amount} × {PEER_NAMES[self.peer]}"
        prefix = {"p99_ms": "p99 ", "exponent": "exponent "}.get(self.of, "")
        return f"{prefix}{sign} {amount} {self.unit}".rstrip()


class Verdict(msgspec.Struct, frozen=True):
    """A target, and how a figure stands to it; ``actual`` is None while it is open or not measured.

    ``within_spread``: of the single runs some meet it and others do not, so that the next median may say the opposite.
    """

    target: Target
    actual: float | None
    outcome: Outcome
    within_spread: bool = False

    def __str__(self) -> str:
        return f"{self.outcome}, within the spread" if self.within_spread else self.outcome


PEER_NAMES: Final[Mapping[str, str]] = {
    "postgres_redis": "PostgreSQL+Redis",
    "redis_always": "Redis always",
    "sqlite_dict": "SQLite+dict",
}

TARGETS: Final[tuple[Target, ...]] = (
    # 1: writing
    Target(1, "put_sequential", "raw", "<=", 1.25),
    Target(1, "put_64_producers", "raw", ">=", 0.85),
    Target(1, "put_256_producers", "value", ">=", 25_000, "/s"),
    Target(1, "put_many_100", "raw", ">=", 0.8),
    Target(1, "put_fast_pipelined", "raw", ">=", 0.6),
    # 2: reading what is hot
    Target(2, "near_cache", "value", ">=", 1_000_000, "/s"),
    Target(2, "resolve_hot_sequential", "raw", "<=", 1.2),
    Target(2, "resolve_hot_64", "value", ">=", 40_000, "/s"),
    Target(2, "resolver_128", "raw", ">=", 0.7),
    Target(2, "resolver_batch_100_1", "value", ">=", 150_000, "refs/s"),
    Target(2, "resolver_batch_100_16", "value", ">=", 350_000, "refs/s"),
    Target(2, "resolve_many_100", "value", "<=", 1.5, "ms"),
    # 3: the lake
    Target(3, "cold_resolve_10m", "value", "<=", 3, "ms"),
    Target(3, "cold_resolve_10m", "p99_ms", "<=", 10, "ms"),
    Target(3, "cold_many_1000_10m", "value", "<=", 1_000, "ms"),
    Target(3, "cold_resolve_rows", "exponent", "<=", 0.1),
    Target(3, "cold_resolve_files", "exponent", "<=", 0.1),
    # 4: the archiver
    Target(4, "archive", "value", ">=", 60_000, "rows/s"),
    Target(4, "archive_memory", "value", "<=", 400, "MB"),
    # 5: importing
    Target(5, "import", "value", ">=", 8_000, "steps/s"),
    # 6: events and named contexts
    Target(6, "emit_64_producers", "raw", ">=", 0.85),
    Target(6, "emit_256_producers", "value", ">=", 25_000, "/s"),
    Target(6, "handler_delivery", "value", ">=", 15_000, "events/s"),
    Target(6, "handler_latency", "value", "<=", 1, "ms"),
    Target(6, "handler_latency", "p99_ms", "<=", 5, "ms"),
    Target(6, "key_update_64", "value", ">=", 8_000, "/s"),
    Target(6, "key_patch_one_32", "value", ">=", 1_500, "wins/s"),
    # 7: analytics
    Target(7, "sql_key_history_10m", "value", "<=", 25, "ms"),
    Target(7, "sql_session_10m", "value", "<=", 25, "ms"),
    Target(7, "sql_tree_10m", "value", "<=", 25, "ms"),
    Target(7, "sql_agent_hour_10m", "value", "<=", 700, "ms"),
    Target(7, "sql_agent_hour_2m", "value", "<=", 150, "ms"),
    Target(7, "live_view_added", "value", "<=", 50, "ms"),
    # 8: memory
    Target(8, "server_bytes_per_context", "value", "<=", 400, "B"),
    Target(8, "idle_client", "value", "<=", 60, "MB"),
    Target(8, "idle_worker", "value", "<=", 200, "MB"),
    # 9: bytes at rest
    Target(9, "bytes_at_rest", "value", "<=", 7.5, "MB"),
    # 10: peers
    Target(10, "put_64_producers", "peer", ">=", 6, peer="postgres_redis"),
    Target(10, "put_64_producers", "peer", ">=", 1.1, peer="redis_always"),
    Target(10, "resolve_hot_64", "peer", ">=", 1.4, peer="redis_always"),
    # Of a time: 1 / 3.5 of PostgreSQL's.
    Target(10, "sql_agent_hour_2m", "peer", "<=", 0.286, peer="postgres_redis"),
)


def targets_of(record_name: str) -> list[Target]:
    """Returns the targets of a record; a record of a further raw limit (``figure:label``) has those that name it."""
    figure, _, label = record_name.partition(":")
    return [target for target in TARGETS if target.figure == figure and target.limit == label]


def judge(record: Record) -> list[Verdict]:
    """Returns how a figure stands to each of its targets."""
    return [
        _verdict(target, _actual(target, record), _actual_of_runs(target, record), record.share)
        for target in targets_of(record.name)
    ]


def overall(verdicts: list[Verdict]) -> str:
    """Returns the last word of a figure's line: how it stands to its targets together, or nothing without a target."""
    outcomes = {verdict.outcome for verdict in verdicts}
    for outcome in ("not met", "open", "not measured", "met"):
        if outcome in outcomes:
            return outcome
    return ""


def unmeasured(names: Iterable[str]) -> list[str]:
    """Returns the figures that have a target and are not among those measured; of each its name once."""
    measured = set(names)
    return list(dict.fromkeys(target.figure for target in TARGETS if target.figure not in measured))


def judge_exponent(curve: str, exponent: float, share: float = 1.0) -> list[Verdict]:
    """Returns how a curve's exponent stands to its targets; ``share`` is how much of the curve there is."""
    found = [target for target in TARGETS if target.figure == curve and target.of == "exponent"]
    return [_verdict(target, exponent, [], share) for target in found]


def _actual(target: Target, record: Record) -> float | None:
    match target.of:
        case "value":
            return record.value
        case "p99_ms":
            return record.p99_ms
        case "raw":
            return record.ratio
        case "peer":
            return next((peer.ratio for peer in record.peers if peer.name == target.peer), None)
        case "exponent":
            return None


def _actual_of_runs(target: Target, record: Record) -> list[float]:
    """What is compared, of each single run; nothing where the record has the median alone."""
    match target.of:
        case "value":
            return record.values
        case "raw":
            return [record.ratio_low, record.ratio_high]
        case "peer":
            runs = next((peer.values for peer in record.peers if peer.name == target.peer), [])
            # Ours and the peer's took turns: neighbours are compared.
            return [ours / theirs for ours, theirs in zip(record.values, runs, strict=False)]
        case "p99_ms" | "exponent":
            return []


def _verdict(target: Target, actual: float | None, runs: Iterable[float], share: float) -> Verdict:
    if share < 1:
        return Verdict(target, None, "not measured")
    if actual is None:
        return Verdict(target, None, "open")
    is_met = _meets(target, actual)
    within_spread = any(_meets(target, run) != is_met for run in runs)
    return Verdict(target, actual, "met" if is_met else "not met", within_spread)


def _meets(target: Target, actual: float) -> bool:
    return actual <= target.number if target.relation == "<=" else actual >= target.number
