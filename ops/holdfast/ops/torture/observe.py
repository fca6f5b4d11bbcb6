"""Everything that can be read, read in three ways.

``sdk``   as an agent reads: ``query``, ``keys.history``, ``resolve_many``.
``raw``   the streams by plain nats-py, by sequence, above the lake's watermark; below it the lake's own rows.
``live``  DuckDB over hot tier and lake, as one view.

``lake`` is DuckDB over the lake alone, which need not be whole.  ``streams`` is everything that the streams hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from holdfast.client import Holdfast, connect
from holdfast.ops.torture.plain import canonical, digest_text
from holdfast.ops.torture.raw_read import RawStreams, read_streams
from holdfast.ops.torture.seen import MISSING, Mark, Observation, Placed, Reader, SeenEvent, SeenVersion, View
from holdfast.schemas.errors import HoldfastError

_PAGE: Final = 1_000
_AGAIN: Final = 5


async def observe(
    url: str,
    lake_path: Path | None,
    *,
    namespaces: Sequence[str],
    readers: Iterable[Reader] = ("sdk", "raw", "live"),
    refs: Iterable[str] = (),
) -> Observation:
    """Reads everything of some namespaces by each of the readers; ``sdk`` and ``live`` need a running system.

    The load must have ended.  ``lake_path`` None: nothing has ever been archived, and the streams hold it all.
    ``refs`` are asked of the SDK in addition to those that the streams and the lake name.
    """
    wanted = set(readers)
    views: dict[Reader, View] = {}
    attempt = 0
    while True:
        attempt += 1
        # The lake first: what leaves the streams meanwhile is in it, or the next round sees it there.
        lake = await asyncio.to_thread(_read_lake, lake_path, namespaces)
        streams = await read_streams(url, namespaces, chunks=lake.chunks)
        marks = [_mark(streams, lake, stream) for stream in streams.infos]
        overtaken = any(mark.messages and mark.first_seq > mark.archived + 1 for mark in marks)
        if not overtaken or attempt == _AGAIN:
            break
    views["lake"], views["streams"] = lake.view, streams.view(is_whole=False)
    if "raw" in wanted:
        views["raw"] = _merged(streams, lake)
    if "live" in wanted and lake_path is not None:
        views["live"] = await asyncio.to_thread(_read_sql, lake_path, url, namespaces)
    if "sdk" in wanted:
        named = {ref for view in (lake.view, views["streams"]) for ref, _ in view.contexts}.union(refs)
        keys = _keys_of(lake.view, views["streams"])
        views["sdk"] = await _read_sdk(url, namespaces, _by_place(named, lake.placed), keys)
    placed = [*lake.placed, *streams.placed]
    return Observation(list(namespaces), views, placed, marks)


def _mark(streams: RawStreams, lake: _Lake, stream: str) -> Mark:
    info = streams.infos[stream]
    epoch, seq = lake.watermarks.get(stream, (None, 0))
    return Mark(stream, info.epoch, epoch, seq, info.first_seq, info.last_seq, info.messages)


class _Lake:
    """What the lake alone shows, with the place of each row."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.placed: list[Placed] = []
        self.chunks: dict[str, bytes] = {}
        self.watermarks: dict[str, tuple[str, int]] = {}


def _read_lake(path: Path | None, namespaces: Sequence[str]) -> _Lake:
    lake = _Lake(View(is_whole=False))
    if path is None:
        return lake
    from holdfast.lake import Lake
    from holdfast.lake import connect as connect_lake
    from holdfast.ops.torture.plain import STREAMS

    opened = Lake.open(path)
    for table, stream in STREAMS.items():
        mark = opened.watermark(table)  # type: ignore[arg-type]  # the three names are those of the tables
        if mark is not None:
            lake.watermarks[stream] = (mark.epoch, mark.seq)
    with connect_lake(path) as sql:
        _fill_from_sql(lake.view, sql, namespaces)
        try:
            lake.placed = _placed_in(sql, namespaces)
            rows = sql.execute(
                "SELECT ref, body_binary FROM contexts_stored WHERE form = 'chunk' AND list_contains($1, namespace)",
                [list(namespaces)],
            ).fetchall()
            lake.chunks = {ref.rpartition("_")[2]: bytes(body) for ref, body in rows}
        except Exception as error:  # noqa: BLE001  a reader that cannot read is a finding, not an end
            lake.view.errors.append(_said(error))
    return lake


def read_lake_rows(path: Path, namespaces: Sequence[str]) -> list[Placed]:
    """Returns every row of the lake, by its place; of what is stored again, each time."""
    from holdfast.lake import connect as connect_lake

    with connect_lake(path) as sql, sql.pinned():
        return _placed_in(sql, namespaces)


def _placed_in(sql: Any, namespaces: Sequence[str]) -> list[Placed]:
    placed: list[Placed] = []
    for stream, query in (
        ("KV_ctx-hot", "SELECT epoch, stream_seq, ref FROM contexts_stored WHERE form NOT IN ('joint', 'touch')"),
        ("CTX_EVENTS", "SELECT epoch, stream_seq, CAST(event_id AS VARCHAR) FROM events WHERE true"),
        (
            "KV_ctx-keys",
            "SELECT epoch, stream_seq, key || '@' || version || ':' || coalesce(ref, op) FROM key_versions WHERE true",
        ),
    ):
        rows = sql.execute(f"{query} AND list_contains($1, namespace)", [list(namespaces)]).fetchall()
        placed.extend(Placed(stream, epoch, seq, identity, "lake") for epoch, seq, identity in rows)
    return placed


def _read_sql(path: Path, url: str, namespaces: Sequence[str]) -> View:
    from holdfast.lake import connect as connect_lake

    view = View(is_whole=True)
    try:
        with connect_lake(path, url) as sql:
            _fill_from_sql(view, sql, namespaces)
    except Exception as error:  # noqa: BLE001  a reader that cannot read is a finding, not an end
        view.errors.append(_said(error))
    return view


def _fill_from_sql(view: View, sql: Any, namespaces: Sequence[str]) -> None:
    names = [list(namespaces)]
    try:
        with sql.pinned():
            rows = sql.execute(
                "SELECT ref, coalesce(sha256(body_bytes), 'null') FROM contexts WHERE list_contains($1, namespace)",
                names,
            ).fetchall()
            view.contexts = [(ref, found) for ref, found in rows]
            rows = sql.execute(
                "SELECT CAST(event_id AS VARCHAR), sha256(coalesce(data, '')), context_ref FROM events"
                " WHERE list_contains($1, namespace) ORDER BY stored_at, stream_seq",
                names,
            ).fetchall()
            view.events = [
                SeenEvent(identity, found, context, order) for order, (identity, found, context) in enumerate(rows)
            ]
            bodies = dict(view.contexts)
            rows = sql.execute(
                "SELECT key, version, ref, change_type FROM key_versions WHERE list_contains($1, namespace)", names
            ).fetchall()
            view.versions = [
                SeenVersion(key, version, ref, _body_hash(bodies, ref), change) for key, version, ref, change in rows
            ]
    except Exception as error:  # noqa: BLE001  a reader that cannot read is a finding, not an end
        view.errors.append(_said(error))


def _body_hash(bodies: dict[str, str], ref: str | None) -> str:
    return "" if ref is None else bodies.get(ref, MISSING)


def _merged(streams: RawStreams, lake: _Lake) -> View:
    """The lake up to its watermarks, the streams above them: each thing from where it is to be.

    A context that is in both counts once: the lake writes each body once, however often it is stored.
    """
    above = streams.view(is_whole=True, above={stream: mark[1] for stream, mark in _same_epoch(streams, lake).items()})
    known = {ref for ref, _ in lake.view.contexts}
    merged = View(is_whole=True, errors=[*lake.view.errors, *above.errors])
    merged.contexts = [*lake.view.contexts, *((ref, body) for ref, body in above.contexts if ref not in known)]
    bodies = dict(merged.contexts)
    # The same event twice above the watermark, or once more, is one: the archiver takes it once.  Two contents are two.
    once = {(event.id, event.sha256, event.context): event for event in (*above.events[::-1], *lake.view.events[::-1])}
    merged.events = [
        SeenEvent(event.id, event.sha256, event.context, order) for order, event in enumerate(reversed(once.values()))
    ]
    merged.versions = [
        SeenVersion(seen.key, seen.version, seen.ref, _body_hash(bodies, seen.ref), seen.change_type)
        for seen in (*lake.view.versions, *above.versions)
    ]
    return merged


def _same_epoch(streams: RawStreams, lake: _Lake) -> dict[str, tuple[str, int]]:
    """The watermarks that count in the streams as they are now."""
    return {
        stream: mark
        for stream, mark in lake.watermarks.items()
        if stream in streams.infos and streams.infos[stream].epoch == mark[0]
    }


def _keys_of(*views: View) -> list[str]:
    return sorted({seen.key for view in views for seen in view.versions})


async def _read_sdk(url: str, namespaces: Sequence[str], refs: Sequence[str], keys: Sequence[str]) -> View:
    view = View(is_whole=True)
    for namespace in namespaces:
        try:
            async with connect(url, namespace, "observer", cache_bytes=0) as hf:
                await _fill_from_sdk(view, hf, refs, keys)
        except (HoldfastError, OSError) as error:
            view.errors.append(_said(error))
    # Of several namespaces each is asked for every reference: what one of them has is there.
    found = {ref for ref, body in view.contexts if body != MISSING}
    view.contexts = [(ref, body) for ref, body in view.contexts if body != MISSING or ref not in found]
    if len(namespaces) > 1:
        missing = {ref for ref, body in view.contexts if body == MISSING}
        view.contexts = [pair for pair in view.contexts if pair[1] != MISSING] + [(ref, MISSING) for ref in missing]
    return view


async def _fill_from_sdk(view: View, hf: Holdfast, refs: Sequence[str], keys: Sequence[str]) -> None:
    first = len(view.events)
    order = first
    async for event in hf.query():
        view.events.append(SeenEvent(str(event.event_id), digest_text(canonical(event.data)), event.context_ref, order))
        order += 1
    versions: list[tuple[str, int, str | None, str | None]] = []
    for key in keys:
        try:
            async for seen in hf.keys.history(key):
                versions.append((key, seen.version, seen.ref, seen.change_type))  # noqa: PERF401  those read are kept
        except HoldfastError as error:
            view.errors.append(f"history of {key}: {_said(error)}")
    wanted = list(dict.fromkeys([*refs, *(ref for _, _, ref, _ in versions if ref is not None)]))
    bodies: dict[str, str] = {}
    for start in range(0, len(wanted), _PAGE):
        page = wanted[start : start + _PAGE]
        try:
            resolved = await hf.resolve_many(page)
        except HoldfastError as error:
            view.errors.append(f"contexts {page[0]} and following: {_said(error)}")
            continue
        bodies |= dict.fromkeys(resolved.missing, MISSING)
        bodies |= {ref: digest_text(context.raw) for ref, context in resolved.found.items()}
    view.contexts.extend(bodies.items())
    view.versions.extend(
        SeenVersion(key, version, ref, _body_hash(bodies, ref), change) for key, version, ref, change in versions
    )


def _by_place(refs: set[str], placed: Iterable[Placed]) -> list[str]:
    """Contexts in the order of their rows in the lake, the others behind them: neighbours are read from few files."""
    rows = sorted((row.epoch, row.seq, row.identity) for row in placed if row.stream == "KV_ctx-hot")
    archived = dict.fromkeys(ref for _, _, ref in rows if ref in refs)
    return [*archived, *sorted(refs.difference(archived))]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:400]
