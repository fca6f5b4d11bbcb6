"""The records of a run as a table for people: a line a figure, ``met`` or ``not met`` at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rich.table import Table

from benchmarks.records import RUNS
from benchmarks.targets import PEER_NAMES, overall

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.records import Conditions, Record

_STYLES: Final = {"met": "green", "not met": "red", "open": "yellow", "not measured": "yellow"}

_SIZES: Final = ((1e6, 1e6, "M"), (1e4, 1e3, "k"), (0.0, 1.0, ""))
"""From what on a number is told in which unit."""


def print_table(records: Sequence[Record], shared: Conditions, console: Console) -> None:
    """Prints one line a figure and raw limit, under a heading that names the conditions all of them share."""
    machine, versions = shared.machine, shared.versions
    table = Table(
        title=f"Holdfast {versions['holdfast']} at {shared.git_commit}, {shared.started_at}",
        caption=(
            "ratios = ours / theirs, in brackets the extremes of neighbouring runs; ↑ higher is better, ↓ lower; peer: "
            "the best of those that ran; open: a target whose peer did not run; ±: some of the runs met the target and "
            "some did not"
        ),
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
    )
    table.add_column("figure", no_wrap=True)
    table.add_column("ours", justify="right", no_wrap=True)
    table.add_column("raw limit", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("peer", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("p50 / p99 ms", justify="right", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    table.add_column("target")
    table.add_column("", no_wrap=True)
    for record in records:
        arrow = "↑" if record.better == "higher" else "↓"
        peer = record.best_peer()
        outcome = overall(record.verdicts)
        table.add_row(
            record.name,
            number(record.value),
            number(record.raw_limit.value),
            f"{record.ratio:.2f} {arrow} ({record.ratio_low:.2f}–{record.ratio_high:.2f})",
            f"{number(peer.value)} {PEER_NAMES[peer.name]}" if peer else "",
            f"{peer.ratio:.2f} {arrow}" if peer else "",
            record.unit,
            latencies(record.p50_ms, record.p99_ms),
            record.durability,
            "; ".join(str(verdict.target) for verdict in record.verdicts),
            f"{outcome} ±" if any(verdict.within_spread for verdict in record.verdicts) else outcome,
            style=_STYLES.get(outcome, ""),
        )
    console.print(table)
    console.print(
        f"{machine['cores']} cores ({machine['cpu']}), kernel {machine['kernel']}, {machine['file_system']}, "
        f"fsync p50 {machine['fsync_p50_ms']} ms, load average at the start {machine['load_average']}; Python "
        f"{versions['python']}, {machine.get('event_loop', 'asyncio')}, nats-server {versions['nats-server']}, nats-py "
        f"{versions['nats-py']}, pyarrow {versions['pyarrow']}, deltalake {versions['deltalake']}, DuckDB "
        f"{versions['duckdb']}; clients, server, workers and peers share the cores."
    )


def number(value: float) -> str:
    """Returns a number with the digits that mean something."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """Returns the least and the most of single runs as one cell, and how many there were unless they were the usual."""
    # Runs that came to the very same number were one: what is counted once, and what older records repeat.
    if len(set(values)) < 2:
        return unusual_runs(1)
    runs = unusual_runs(len(values))
    size, letter = next((size, letter) for least, size, letter in _SIZES if max(values) >= least)
    least, most = min(values) / size, max(values) / size
    decimals = max(0, 2 - math.floor(math.log10(most))) if most > 0 else 0
    ends = dict.fromkeys(f"{end:,.{decimals}f}" for end in (least, most))
    told = f"{'–'.join(ends)} {letter}".rstrip()
    return f"{told} ({runs})" if runs else told


def unusual_runs(number_of_runs: int) -> str:
    """Returns how many runs there were, or nothing of as many as usual."""
    if number_of_runs == RUNS:
        return ""
    return "one run" if number_of_runs == 1 else f"{number_of_runs} runs"


def latencies(p50_ms: float | None, p99_ms: float | None) -> str:
    """Returns two latencies as one cell."""
    return "" if p50_ms is None or p99_ms is None else f"{number(p50_ms)} / {number(p99_ms)}"
