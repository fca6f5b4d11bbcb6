"""Questions in SQL over archived events and versions of keys: by ``holdfast.lake.connect``, and of DuckDB alone.

Each is asked of both sides about other sessions and keys, none twice while there are enough.  Both are compared once:
a limit counts for nothing if it answers another question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import duckdb

from benchmarks.bench import Figure
from benchmarks.bench_analytics import AGENT_HOUR, asked
from benchmarks.curves.curve import PAGES, Measured, measure_sides
from benchmarks.measure import Side
from benchmarks.synthetic_lake import key_name, keys_in, root_of, session_name, sessions_in
from holdfast.lake import connect as connect_lake

if TYPE_CHECKING:
    from benchmarks.bench import Bench
    from holdfast.lake.lake import Lake
    from holdfast.schemas.rows import Table

RAW: Final = "DuckDB alone over the same files"
_SAMPLE: Final = 10_000


class Question(NamedTuple):
    """One question; ``calls`` are those of a run."""

    name: str
    what: str
    table: Table
    statement: str
    calls: int


QUESTIONS: Final = (
    Question(
        "sql_key_history",
        "the versions of a key",
        "key_versions",
        "SELECT version, ref, stored_at FROM {source} WHERE key = ? ORDER BY version",
        40,
    ),
    Question(
        "sql_session",
        "the events of a session, in order",
        "events",
        "SELECT event_id, name, data FROM {source} WHERE session_id = ? ORDER BY stream_seq",
        40,
    ),
    Question(
        "sql_tree",
        "the tree below an event, by recursion",
        "events",
        """
WITH RECURSIVE links AS MATERIALIZED (
    SELECT event_id, parent_event_id FROM {source} WHERE correlation_id = ?
), below AS (
    SELECT CAST(? AS UUID) AS event_id
    UNION ALL SELECT links.event_id FROM below JOIN links ON links.parent_event_id = below.event_id
) SELECT count(*) FROM below
""",
        40,
    ),
    Question("sql_agent_hour", "events of each agent in each hour", "events", AGENT_HOUR, 5),
)


class Answer(NamedTuple):
    """What a question cost, and how many files its table had."""

    question: Question
    files: int
    ours: Measured
    raw: Measured

    def figure(self, name: str, rows: int, *, is_compacted: bool) -> Figure:
        """Returns what the figure of this answer says of itself."""
        return Figure(
            name=name,
            what=self.question.what,
            kind="latency",
            durability="durable",
            parameters={
                "payload_bytes": 30,
                "concurrency": 1,
                "rows": rows,
                "files": self.files,
                "compacted": is_compacted,
                "pages": PAGES,
                "calls": self.ours.calls,
            },
        )


async def ask(bench: Bench, lake: Lake, rows: int, *, share_of_calls: float = 1.0) -> list[Answer]:
    """Asks every question of a lake with so many events and versions of keys."""
    with connect_lake(lake.path, compare=False) as ours, duckdb.connect() as bare:
        bare.execute("SET parquet_metadata_cache = true")
        return [
            await _ask_one(
                bench, question, (ours, bare), lake, rows, bench.scale(max(1, int(question.calls * share_of_calls)), 2)
            )
            for question in QUESTIONS
        ]


async def _ask_one(
    bench: Bench, question: Question, connections: tuple[Any, Any], lake: Lake, rows: int, calls: int
) -> Answer:
    files = [str(lake.path / question.table / entry.path) for entry in lake.files(question.table)]
    sources = (question.table, f"read_parquet({files}, hive_partitioning = false)")
    subjects = _subjects(question, rows)

    def asking(connection: Any, source: str) -> Callable[[list[str]], Any]:
        statement = question.statement.format(source=source)
        return lambda subject: connection.execute(statement, subject).fetchall()

    ask_ours, ask_bare = map(asking, connections, sources)
    subject = next(subjects)
    found = ask_ours(subject)
    if not found or found != ask_bare(subject):
        raise RuntimeError(f"{question.name} of {subject} is not answered as DuckDB alone answers it")
    sides = [
        Side("", asked(lambda: ask_ours(next(subjects)))),
        Side(RAW, asked(lambda: ask_bare(next(subjects)))),
    ]
    ours, raw = await measure_sides(bench, sides, kind="latency", count=calls)
    return Answer(question, len(files), ours, raw)


def _subjects(question: Question, rows: int) -> Iterator[list[str]]:
    """Yields the arguments of a question without end."""
    source = random.Random(f"{question.name} {rows}")

    def some(number: int) -> Iterator[int]:
        return cycle(source.sample(range(number), min(number, _SAMPLE)))

    match question.name:
        case "sql_key_history":
            return ([key_name(key)] for key in some(keys_in(rows)))
        case "sql_session":
            return ([session_name(session)] for session in some(sessions_in(rows)))
        case "sql_tree":
            return ([session_name(session), root_of(session)] for session in some(sessions_in(rows)))
        case _:
            return cycle([[]])
