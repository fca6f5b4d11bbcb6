"""``python -m benchmarks render RECORDS…``: writes the tables and plots of ``docs/performance.md`` from records.

The text of the page is written by hand; what lies between two marks is replaced:

* ``<!-- conditions -->``: versions and machine of the records;
* ``<!-- figures NAME… -->``: a row a figure, whose name is given or fits a pattern (``put_*``);
* ``<!-- peers -->``: every figure that has one, beside all of them;
* ``<!-- targets -->``: every target, met or not;
* ``<!-- curves -->``: a row a curve, and the pictures;
* ``<!-- memory -->``: the processes beside the curves;

each up to ``<!-- end -->``.  Files are records of ``make bench`` or of ``make bench-full``; of a figure in several, the
last one counts.  Figures and curves are judged by the targets as they are now; those that went a part of the way (a
``share`` below 1) are not.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.curves.curve import Curve, CurvesFile
from benchmarks.plots import plot
from benchmarks.records import ROOT, Conditions, Record, read_records
from benchmarks.table import latencies, number, spread, unusual_runs
from benchmarks.targets import PEER_NAMES, TARGETS, Target, Verdict, judge, judge_exponent

PAGE: Final = ROOT / "docs" / "performance.md"
_SECTION: Final = re.compile(
    r"(<!-- (conditions|figures|peers|targets|curves|memory)((?: [\w*:]+)*) -->\n).*?(<!-- end -->)", re.DOTALL
)

PICTURES: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "cold-rows": ("a cold context, by the contexts in the lake", ("cold_resolve_rows",)),
    "cold-files": ("a cold context, by the files of the lake", ("cold_resolve_files",)),
    "bodies": ("one context after the other, by its size", ("put_body", "resolve_body")),
    "concurrency": ("time an operation, by tasks of one process", ("put_concurrency", "resolve_concurrency")),
    "versions": ("a named context, by its versions", ("key_put_versions", "key_get_versions")),
    "subjects": ("one context after the other, by hot contexts", ("put_subjects", "resolve_subjects")),
    "sql": ("questions in SQL, by rows", ("sql_key_history", "sql_session", "sql_tree", "sql_agent_hour")),
}
"""Pictures: title and curves of each."""


class Sources(msgspec.Struct, frozen=True):
    """What is rendered: records and curves by name, and of each curve how much of it there is."""

    records: dict[str, Record]
    curves: dict[str, Curve]
    shares: dict[str, float]
    machine: dict[str, object]
    versions: dict[str, str]
    commits: list[str]


def main(arguments: Sequence[str]) -> int:
    """Renders into the page; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks render", description="Writes the tables and plots of docs/performance.md."
    )
    parser.add_argument("records", metavar="RECORDS", nargs="+", type=Path, help="JSON of make bench, make bench-full")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the marks are (default docs/performance.md)")
    options = parser.parse_args(arguments)
    try:
        sources = read_sources(options.records)
    except (OSError, msgspec.DecodeError) as error:
        print(f"not to be read: {error}", file=sys.stderr)
        return 2
    page: Path = options.page
    page.write_text(fill(page.read_text("utf-8"), sources), "utf-8")
    for name, picture in pictures(sources.curves).items():
        (page.parent / name).write_text(picture, "utf-8")
    return 0


def read_sources(paths: Sequence[Path]) -> Sources:
    """Reads records and curves; of a name that is in several files, the last one counts."""
    records: dict[str, Record] = {}
    curves: dict[str, Curve] = {}
    shares: dict[str, float] = {}
    runs: list[Conditions] = []
    for path in paths:
        raw = path.read_bytes()
        if raw.lstrip().startswith(b"{"):
            found = msgspec.json.decode(raw, type=CurvesFile)
            curves.update({curve.name: curve for curve in found.curves})
            shares.update({curve.name: found.conditions.share for curve in found.curves})
            records.update({record.name: record for record in found.records})
            runs.append(found.conditions)
        else:
            records.update({record.name: record for record in read_records(path)})
    # Of curves alone there are no records to take it from.
    sources: list[Conditions | Record] = [*runs, *records.values()]
    last = sources[-1] if sources else None
    return Sources(
        records=records,
        curves=curves,
        shares=shares,
        machine=dict(last.machine) if last else {},
        versions=last.versions if last else {},
        commits=sorted({source.git_commit for source in sources}),
    )


def fill(page: str, sources: Sources) -> str:
    """Returns the page with every marked part written anew; what stands outside the marks is left as it is."""
    writers: dict[str, Callable[[list[str]], str]] = {
        "conditions": lambda _: _conditions(sources),
        "figures": lambda names: figures_table(sources.records, names),
        "peers": lambda _: peers_table(sources.records),
        "targets": lambda _: targets_table(sources),
        "curves": lambda _: curves_table(sources.curves),
        "memory": lambda _: memory_table(sources.curves),
    }

    def write(match: re.Match[str]) -> str:
        return f"{match[1]}{writers[match[2]](match[3].split())}\n{match[4]}"

    return _SECTION.sub(write, page)


def figures_table(records: Mapping[str, Record], names: Sequence[str]) -> str:
    """Returns a row a figure, in the order of the names; a further raw limit is a row of its own.

    The spread is that of our single runs, from the least to the most.
    """
    chosen = {
        record.name: record
        for name in names
        for record in records.values()
        if fnmatch(record.name, name) or record.name.startswith(f"{name}:")
    }
    rows = [
        [
            f"`{record.name}`",
            f"{number(record.value)} {record.unit}",
            spread(record.values),
            number(record.raw_limit.value),
            f"{record.ratio:.2f} {_arrow(record)}",
            latencies(record.p50_ms, record.p99_ms),
            record.durability,
            "; ".join(f"{verdict.target}: {verdict}" for verdict in judge(record)),
            record.raw_limit.what,
        ]
        for record in chosen.values()
    ]
    heading = ("figure", "ours", "spread", "raw limit", "ratio", "p50 / p99, ms", "mode", "target", "the raw limit is")
    return _markdown(heading, rows, ":---,---:,---:,---:,---:,---:,:---,:---,:---")


def peers_table(records: Mapping[str, Record]) -> str:
    """Returns every figure that was measured beside a peer: each one's value, and ours in multiples of it."""
    rows = [
        [f"`{record.name}`", f"{number(record.value)} {record.unit} {_arrow(record)}", *_peer_cells(record)]
        for record in records.values()
        if record.peers
    ]
    return _markdown(("figure", "ours", *PEER_NAMES.values()), rows, ":---,---:" + ",---:" * len(PEER_NAMES))


def _peer_cells(record: Record) -> list[str]:
    found = {peer.name: peer for peer in record.peers}
    return [f"{number(found[name].value)} ({found[name].ratio:.2f})" if name in found else "" for name in PEER_NAMES]


def targets_table(sources: Sources) -> str:
    """Returns every target with what was reached; one whose figure was not measured says so."""
    rows = [[str(target.point), f"`{target.figure}`", str(target), *_reached(target, sources)] for target in TARGETS]
    return _markdown(("", "figure", "target", "reached", ""), rows, "---:,:---,:---,---:,:---")


def _reached(target: Target, sources: Sources) -> list[str]:
    verdicts: list[Verdict] = []
    if target.of == "exponent":
        curve = sources.curves.get(target.figure)
        verdicts = judge_exponent(curve.name, curve.fit.exponent, sources.shares[curve.name]) if curve else []
    else:
        record = sources.records.get(f"{target.figure}:{target.limit}" if target.limit else target.figure)
        verdicts = judge(record) if record else []
    for verdict in verdicts:
        if verdict.target == target:
            actual = "" if verdict.actual is None else number(verdict.actual)
            return [actual, f"**{verdict}**" if verdict.outcome == "not met" else str(verdict)]
    return ["", "not measured"]


def curves_table(curves: Mapping[str, Curve]) -> str:
    """Returns a row a curve, then the pictures there are."""
    rows = [
        [
            f"`{curve.name}`",
            curve.what,
            f"{number(curve.points[0].x)} … {number(curve.points[-1].x)} {curve.x_name}",
            f"{number(curve.points[0].cost)} → {number(curve.points[-1].cost)} {curve.cost_unit}{_runs(curve)}",
            f"{curve.fit.exponent:+.3f}",
            f"{curve.fit.r2:.2f}",
            f"{curve.raw_fit.exponent:+.3f}" if curve.raw_fit else "",
        ]
        for curve in curves.values()
    ]
    heading = ("curve", "an operation is", "what grows", "its cost", "exponent", "r²", "of the raw limit")
    table = _markdown(heading, rows, ":---,:---,:---,---:,---:,---:,---:")
    shown = [
        f"![{title}](performance-{name}.svg)" for name, (title, names) in PICTURES.items() if set(names) & set(curves)
    ]
    return "\n\n".join([table, *shown])


def _runs(curve: Curve) -> str:
    told = unusual_runs(min(len(point.values) for point in curve.points))
    return f" ({told})" if told else ""


def memory_table(curves: Mapping[str, Curve]) -> str:
    """Returns the resident memory of every process at the first and the last point of each curve."""
    rows: list[list[str]] = []
    for curve in curves.values():
        first, last = curve.points[0], curve.points[-1]
        told = [
            f"{name} {first.memory_mb[name]:g} → {size:g}"
            for name, size in last.memory_mb.items()
            if name in first.memory_mb
        ]
        rows.append([f"`{curve.name}`", f"{number(first.x)} → {number(last.x)} {curve.x_name}", ", ".join(told)])
    return _markdown(("curve", "from → to", "resident memory, MB"), rows, ":---,:---,:---")


def pictures(curves: Mapping[str, Curve]) -> dict[str, str]:
    """Returns the plots by the names of their files."""
    found = {name: [curves[curve] for curve in names if curve in curves] for name, (_, names) in PICTURES.items()}
    return {f"performance-{name}.svg": plot(PICTURES[name][0], chosen) for name, chosen in found.items() if chosen}


def _conditions(sources: Sources) -> str:
    machine, versions = sources.machine, sources.versions
    return (
        f"Commit {', '.join(f'`{commit}`' for commit in sources.commits)}; {machine.get('cores')} cores "
        f"({machine.get('cpu')}) that server, workers, clients and peers share, {machine.get('file_system')} with an "
        f"fsync of {machine.get('fsync_p50_ms')} ms, kernel {machine.get('kernel')}; Python {versions.get('python')} "
        f"on {machine.get('event_loop', 'asyncio')}, nats-server {versions.get('nats-server')}, nats-py "
        f"{versions.get('nats-py')}, pyarrow {versions.get('pyarrow')}, deltalake {versions.get('deltalake')}, DuckDB "
        f"{versions.get('duckdb')}; one server, one replica."
    )


def _arrow(record: Record) -> str:
    return "↑" if record.better == "higher" else "↓"


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]], alignment: str) -> str:
    lines = [heading, alignment.split(","), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
