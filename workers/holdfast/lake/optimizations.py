"""How optimization runs went: SQL over the views, hot and cold as one.

The states of a run are the events ``optimization:<state>`` that carry a context of kind ``optimization_state``, with
the run's id as correlation, in the order they were stored.  The score and the framework of a state are what its event
says (``data.performance.score``, ``data.framework``); for states of publishers that do not say it they are handed in,
read from the bodies.  Durations are by the producers' times, and never below 0: clocks of two machines may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, Protocol

import msgspec

MAX_UNTOLD: Final = 10_000
"""Most states whose bodies are to be read, the newest of them, since their events do not say how they performed."""

_REFS_OF_BEST: Final = 50
"""States of the best run, the newest of them, that are told so as to look for its configuration."""

_FRAMEWORKS: Final = 1_000
_STATES: Final = 100
"""Most frameworks, and states of each, that are told of."""


class Outcome(msgspec.Struct, frozen=True):
    """What the body of a state says."""

    ref: str
    framework: str | None = None
    score: float | None = None


class Runs(msgspec.Struct, frozen=True, kw_only=True):
    """Which runs: of one framework, begun from ``since_ms`` (inclusive) to ``until_ms`` (exclusive)."""

    namespace: str
    framework: str | None = None
    since_ms: int | None = None
    until_ms: int | None = None


class _Sql(Protocol):
    def execute(self, query: Any, parameters: Any = ..., /) -> Any: ...


# The data of an event is looked into only where DuckDB takes it for JSON: a lone surrogate, which our JSON allows,
# would end the query.  The reference says the kind: a digest has no underscore and a fixed length.
_STATES_OF_RUNS: Final = """
WITH told AS (
    SELECT correlation_id AS run, substr(name, 14) AS state, "timestamp" AS moment, context_ref AS ref,
        stored_at, epoch, stream_seq, CASE WHEN json_valid(data) THEN data END AS data
    FROM events
    WHERE namespace = $namespace AND starts_with(name, 'optimization:') AND NOT contains(substr(name, 14), ':')
        AND starts_with(context_ref, 'ctx_optimization_state_') AND length(context_ref) = 55
        AND correlation_id IS NOT NULL
)"""

_UNTOLD: Final = (
    _STATES_OF_RUNS  # noqa: S608  our own text
    + """
SELECT ref, count(*) OVER () FROM (SELECT ref, max(stored_at) AS stored_at FROM told
    WHERE data IS NULL OR json_extract_string(data, '$.optimization_id') IS NULL GROUP BY ref)
ORDER BY stored_at DESC, ref LIMIT $limit
"""
)

_CHOSEN: Final = (
    _STATES_OF_RUNS  # noqa: S608  our own text
    + """, outcomes AS (
    SELECT unnest($refs::VARCHAR[]) AS ref, unnest($frameworks::VARCHAR[]) AS framework,
        unnest($scores::DOUBLE[]) AS score
), states AS (
    SELECT told.run, told.state, told.moment, told.ref,
        coalesce(CASE WHEN json_type(told.data, '$.framework') = 'VARCHAR'
            THEN nullif(json_extract_string(told.data, '$.framework'), '') END, outcomes.framework) AS framework,
        coalesce(CASE WHEN json_type(told.data, '$.performance.score') IN ('DOUBLE', 'BIGINT', 'UBIGINT', 'HUGEINT')
            THEN try_cast(json_extract_string(told.data, '$.performance.score') AS DOUBLE) END,
            outcomes.score) AS score,
        row_number() OVER stored AS place,
        epoch_us(lead(told.moment) OVER stored) - epoch_us(told.moment) AS lasted_us
    FROM told LEFT JOIN outcomes ON outcomes.ref = told.ref
    WINDOW stored AS (PARTITION BY told.run ORDER BY told.stored_at, told.epoch, told.stream_seq)
), timed AS (
    -- Not greatest(0, …): that takes null, as after the last state, for 0.
    SELECT *, CASE WHEN lasted_us < 0 THEN 0 ELSE lasted_us / 1e6 END AS seconds FROM states
), runs AS (
    SELECT run, arg_min(moment, place) AS started, arg_max(state, place) AS last_state,
        greatest(0, epoch_us(arg_max(moment, place)) - epoch_us(arg_min(moment, place))) / 1e6 AS seconds,
        arg_max(framework, place) FILTER (framework IS NOT NULL) AS framework,
        arg_max(score, place) FILTER (isfinite(score)) AS score,
        arg_max(ref, place) FILTER (isfinite(score)) AS scored_ref
    FROM states GROUP BY run
), chosen AS (
    SELECT *, last_state IN $completed AS is_completed, last_state IN $failed AS is_failed
    FROM runs
    WHERE ($framework IS NULL OR framework = $framework)
        AND ($since_ms IS NULL OR started >= make_timestamp_ms($since_ms))
        AND ($until_ms IS NULL OR started < make_timestamp_ms($until_ms))
)"""
)

_SPREAD: Final = """CASE WHEN count({value}){where} > 0 THEN {{
    'count': count({value}){where}, 'min': min({value}){where}, 'median': quantile_cont({value}, 0.5){where},
    'p95': quantile_cont({value}, 0.95){where}, 'max': max({value}){where}}} END"""

# Of two runs with one score the one that began first is the better one, so that the answer is always the same.
_BY_FRAMEWORK: Final = (
    _CHOSEN
    + f"""
SELECT framework, count(*) AS runs, count(*) FILTER (is_completed), count(*) FILTER (is_failed),
    count(*) FILTER (NOT is_completed AND NOT is_failed),
    {_SPREAD.format(value="seconds", where=" FILTER (is_completed OR is_failed)")},
    {_SPREAD.format(value="score", where="")},
    arg_max({{'optimization_id': run, 'score': score, 'context_ref': scored_ref}},
        (score * $sign, -epoch_us(started), run)) FILTER (score IS NOT NULL)
FROM chosen GROUP BY framework ORDER BY runs DESC, framework NULLS LAST LIMIT {_FRAMEWORKS}
"""  # noqa: S608  our own text
)

_BY_STATE: Final = (
    _CHOSEN
    + f"""
SELECT chosen.framework, timed.state, count(*), {_SPREAD.format(value="timed.seconds", where="")}
FROM timed JOIN chosen ON chosen.run = timed.run
GROUP BY chosen.framework, timed.state
QUALIFY row_number() OVER (PARTITION BY chosen.framework ORDER BY min(place), timed.state) <= {_STATES}
ORDER BY chosen.framework, min(place), timed.state
"""  # noqa: S608  our own text
)

_REFS: Final = (
    _STATES_OF_RUNS
    + f"""
SELECT run, list(ref ORDER BY stored_at DESC, epoch DESC, stream_seq DESC)[1:{_REFS_OF_BEST}]
FROM told WHERE run IN $runs GROUP BY run
"""  # noqa: S608  our own text
)


def untold_refs(connection: _Sql, namespace: str, *, limit: int = MAX_UNTOLD) -> tuple[list[str], int]:
    """Returns the references of states whose events do not say how they performed, and how many more there are.

    The newest ones, each once, up to ``limit``.
    """
    rows = connection.execute(_UNTOLD, {"namespace": namespace, "limit": limit}).fetchall()
    return [ref for ref, _ in rows], (rows[0][1] - len(rows) if rows else 0)


def analyze(
    connection: _Sql,
    runs: Runs,
    outcomes: Iterable[Outcome],
    *,
    completed: Sequence[str],
    failed: Sequence[str],
    best: Literal["highest", "lowest"] = "highest",
) -> list[dict[str, Any]]:
    """Returns how the runs of each framework went, most runs first.

    Each is ``{"framework", "runs", "completed", "failed", "running", "seconds", "scores", "best", "states"}``: spreads
    are ``{"count", "min", "median", "p95", "max"}`` or None, ``best`` is ``{"optimization_id", "score",
    "context_ref"}`` or None, ``states`` are ``{"state", "count", "seconds"}`` in the order in which runs come to them.
    ``completed`` and ``failed`` are the states that end a run; the score of a run is the last that its states tell.
    """
    read = list(outcomes)
    values: dict[str, Any] = {
        "namespace": runs.namespace,
        "framework": runs.framework,
        "since_ms": runs.since_ms,
        "until_ms": runs.until_ms,
        "completed": list(completed),
        "failed": list(failed),
        "refs": [outcome.ref for outcome in read],
        "frameworks": [outcome.framework for outcome in read],
        "scores": [outcome.score for outcome in read],
    }
    states: dict[str | None, list[dict[str, Any]]] = {}
    for framework, state, count, seconds in connection.execute(_BY_STATE, values).fetchall():
        states.setdefault(framework, []).append({"state": state, "count": count, "seconds": seconds})
    sign = 1 if best == "highest" else -1
    found = connection.execute(_BY_FRAMEWORK, {**values, "sign": sign}).fetchall()
    columns = ("framework", "runs", "completed", "failed", "running", "seconds", "scores", "best")
    return [{**dict(zip(columns, row, strict=True)), "states": states.get(row[0], [])} for row in found]


def refs_of_runs(connection: _Sql, namespace: str, run_ids: Sequence[str]) -> dict[str, list[str]]:
    """Returns the references of some runs' states by run, newest first, up to 50 of each."""
    if not run_ids:
        return {}
    values = {"namespace": namespace, "runs": list(run_ids)}
    return dict(connection.execute(_REFS, values).fetchall())
