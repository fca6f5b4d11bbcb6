"""The records of a run as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.records import Conditions, Record


def print_table(records: Sequence[Record], shared: Conditions, console: Console) -> None:
    """Prints one line a figure and raw limit, under a heading that names the conditions all of them share."""
    machine, versions = shared.machine, shared.versions
    table = Table(
        title=f"Holdfast {versions['holdfast']} at {shared.git_commit}, {shared.started_at}",
        caption="ratio = ours / raw limit, in brackets the extremes of neighbouring runs; ↑ higher is better, ↓ lower",
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
    )
    table.add_column("figure", no_wrap=True)
    table.add_column("ours", justify="right", no_wrap=True)
    table.add_column("raw limit", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("p50 / p99 ms", justify="right", no_wrap=True)
    table.add_column("raw p50 / p99", justify="right", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    table.add_column("raw limit is; conditions")
    for record in records:
        arrow = "↑" if record.better == "higher" else "↓"
        raw = record.raw_limit
        table.add_row(
            record.name,
            number(record.value),
            number(raw.value),
            f"{record.ratio:.2f} {arrow} ({record.ratio_low:.2f}–{record.ratio_high:.2f})",
            record.unit,
            _latencies(record.p50_ms, record.p99_ms),
            _latencies(raw.p50_ms, raw.p99_ms),
            record.durability,
            f"{raw.what}; " + ", ".join(f"{name} {value}" for name, value in record.parameters.items()),
        )
    console.print(table)
    console.print(
        f"{machine['cores']} cores ({machine['cpu']}), kernel {machine['kernel']}, {machine['file_system']}, "
        f"fsync p50 {machine['fsync_p50_ms']} ms, load average at the start {machine['load_average']}; Python "
        f"{versions['python']}, nats-server {versions['nats-server']}, nats-py {versions['nats-py']}, pyarrow "
        f"{versions['pyarrow']}, deltalake {versions['deltalake']}; clients, server and workers share the cores."
    )


def number(value: float) -> str:
    """Returns a number with the digits that mean something."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _latencies(p50_ms: float | None, p99_ms: float | None) -> str:
    return "" if p50_ms is None or p99_ms is None else f"{p50_ms:.2f} / {p99_ms:.2f}"
