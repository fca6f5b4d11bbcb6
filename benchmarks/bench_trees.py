"""Trees and chains of archived events: how long it takes to learn where an event came from, and what it led to.

Measures ``hf.tree`` of a line of 291 events (the longest recorded session has so many steps) and of a root with 1,000
children, and ``hf.chain`` of the last of 291: from the SDK through the server to the resolver, a process of its own,
and back as Event objects, over 60,000 events that have left the stream.  The raw limit is DuckDB in this process over
the same Parquet files: a recursion over the links of that root, and all columns of what it finds as tuples; no live
tail, no order, no service.

Does not measure: events that are hot, millions of events, roots that are not known, several callers at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import duckdb
import msgspec

from benchmarks.archived import archive_connection, archive_stream
from benchmarks.bench import NAMESPACE, Bench, Figure
from benchmarks.children import child
from benchmarks.measure import Runner, Side, load
from holdfast.schemas.ids import new_event_id
from holdfast.streams.events import NewEvent
from holdfast.streams.topology import purge_below, stream_info
from holdfast.streams.wire import EVENTS_STREAM

if TYPE_CHECKING:
    from holdfast.client import Holdfast

LINES: Final = 160
DEPTH: Final = 291
BUSHES: Final = 12
WIDTH: Final = 1_000
ROWS_PER_COMMIT: Final = 20_000
_WINDOW: Final = 2_000

FIGURES: Final = ("tree_291_deep", "tree_1000_wide", "chain_291_deep")

_TREE: Final = """
WITH RECURSIVE links AS MATERIALIZED (
    SELECT event_id, parent_event_id FROM {files} WHERE root_event_id = CAST($1 AS UUID)
), below AS (
    SELECT CAST($2 AS UUID) AS event_id
    UNION SELECT links.event_id FROM below JOIN links ON links.parent_event_id = below.event_id
)
SELECT * FROM {files} SEMI JOIN below USING (event_id) WHERE root_event_id = CAST($1 AS UUID)
"""
_CHAIN: Final = """
WITH RECURSIVE links AS MATERIALIZED (
    SELECT event_id, parent_event_id FROM {files} WHERE root_event_id = CAST($1 AS UUID)
), above AS (
    SELECT CAST($2 AS UUID) AS event_id
    UNION SELECT links.parent_event_id FROM above JOIN links USING (event_id) WHERE links.parent_event_id IS NOT NULL
)
SELECT * FROM {files} SEMI JOIN above USING (event_id) WHERE root_event_id = CAST($1 AS UUID)
"""


async def run(bench: Bench) -> None:
    """Measures every figure of this file that is asked for."""
    if not bench.wants(*FIGURES):
        return
    directory = bench.directory("trees")
    lines = [_line(bench.scale(DEPTH, 20)) for _ in range(bench.scale(LINES, 4))]
    bushes = [_bush(bench.scale(WIDTH, 40)) for _ in range(bench.scale(BUSHES, 2))]
    async with bench.server() as server:
        async with server.connect() as hf:
            # Grown side by side, as sessions do: neighbours in the lake are of different trees.
            await _publish(hf, [event for step in zip(*lines, strict=True) for event in step])
            await _publish(hf, [event for bush in bushes for event in bush])
        async with archive_connection(server) as connection:
            await archive_stream(connection, directory, rows_per_commit=ROWS_PER_COMMIT, table="events")
            await purge_below(connection, EVENTS_STREAM, (await stream_info(connection, EVENTS_STREAM)).last_seq + 1)
        arguments = ("--url", server.url, "--lake", str(directory / "lake"))
        async with (
            child("benchmarks.responder", *arguments, "--index", str(directory / "index")) as responder,
            server.connect() as hf,
        ):
            await responder.ask()
            await _figures(bench, hf, lines, bushes, directory / "lake" / "events")


async def _figures(
    bench: Bench, hf: Holdfast, lines: Sequence[list[NewEvent]], bushes: Sequence[list[NewEvent]], table: Path
) -> None:
    files = f"read_parquet({sorted(map(str, table.glob('day=*/*.parquet')))}, hive_partitioning = false)"
    with duckdb.connect() as duck:
        duck.execute("SET parquet_metadata_cache = true")

        def raw(query: str) -> Callable[[tuple[str, str, int]], Awaitable[None]]:
            async def ask(asked: tuple[str, str, int]) -> None:
                root, start, count = asked
                if len(duck.execute(query.format(files=files), [root, start]).fetchall()) != count:
                    raise RuntimeError("DuckDB found another number of events")

            return ask

        async def tree(asked: tuple[str, str, int]) -> None:
            if len(await hf.tree(asked[0])) != asked[2]:
                raise RuntimeError("the tree has another number of events")

        async def chain(asked: tuple[str, str, int]) -> None:
            if len(await hf.chain(asked[1])) != asked[2]:
                raise RuntimeError("the chain has another number of events")

        whole_lines = [(line[0].id, line[0].id, len(line)) for line in lines]
        whole_bushes = [(bush[0].id, bush[0].id, len(bush)) for bush in bushes]
        last_of_lines = [(line[0].id, line[-1].id, len(line)) for line in lines]
        rows = sum(map(len, lines)) + sum(map(len, bushes))
        for name, what, asked, ours, query in (
            (FIGURES[0], "hf.tree of a line of events", whole_lines, tree, _TREE),
            (FIGURES[1], "hf.tree of a root with many children", whole_bushes, tree, _TREE),
            (FIGURES[2], "hf.chain of the last event of a line", last_of_lines, chain, _CHAIN),
        ):
            await bench.figure(
                Figure(
                    name=name,
                    what=what,
                    kind="latency",
                    durability="durable",
                    parameters={
                        "payload_bytes": len(msgspec.json.encode(lines[0][0].data)),
                        "concurrency": 1,
                        "rows": rows,
                        "events": asked[0][2],
                    },
                    least=20,
                ),
                Side("", _each(asked, ours)),
                Side("the recursion in DuckDB alone, over the same files", _each(asked, raw(query))),
            )


def _each(asked: Sequence[tuple[str, str, int]], call: Callable[[tuple[str, str, int]], Awaitable[object]]) -> Runner:
    source: Iterator[tuple[str, str, int]] = cycle(asked)
    return load(lambda number: list(islice(source, number)), call)


async def _publish(hf: Holdfast, events: Sequence[NewEvent]) -> None:
    for start in range(0, len(events), _WINDOW):
        await hf.publish_many(events[start : start + _WINDOW])


def _line(depth: int) -> list[NewEvent]:
    ids = [new_event_id() for _ in range(depth)]
    return [_event(ids[n], ids[0], ids[n - 1] if n else None, n) for n in range(depth)]


def _bush(width: int) -> list[NewEvent]:
    root = new_event_id()
    return [_event(root, root, None, 0), *(_event(new_event_id(), root, root, 1) for _ in range(width - 1))]


def _event(event_id: str, root: str, parent: str | None, depth: int) -> NewEvent:
    data: dict[str, Any] = {"step": depth, "note": f"of {root[-12:]}"}
    return NewEvent(
        namespace=NAMESPACE,
        agent_id="bench",
        name="plan:step",
        id=event_id,
        data=data,
        session_id=root,
        parent_event_id=parent,
        root_event_id=root,
        event_depth=depth,
    )
