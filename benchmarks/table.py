"""The records of a run as a table for people: a line a figure, ``met`` or ``not met`` at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rich.table import Table

from benchmarks.targets import PEER_NAMES, overall

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.records import Conditions, Record

_STYLES: Final = {"met": "green", "not met": "red", "open": "yellow"}


def print_table(records: Sequence[Record], shared: Conditions, console: Console) -> None:
    """Prints one line a figure and raw limit, under a heading that names the conditions all of them share."""
    machine, versions = shared.machine, shared.versions
    table = Table(
        title=f"Holdfast {versions['holdfast']} at {shared.git_commit}, {shared.started_at}",
        caption=(
            "ratios = ours / theirs, in brackets the extremes of neighbouring runs; ↑ higher is better, ↓ lower; peer: "
            "the best of those that ran; open: a target whose peer did not run"
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
            outcome,
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


def latencies(p50_ms: float | None, p99_ms: float | None) -> str:
    """Returns two latencies as one cell."""
    return "" if p50_ms is None or p99_ms is None else f"{number(p50_ms)} / {number(p99_ms)}"
