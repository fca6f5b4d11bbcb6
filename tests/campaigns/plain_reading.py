"""What the lake and the streams hold, read with other people's libraries alone.

The lake by deltalake's own reading of the log and pyarrow's of the files, the streams by plain nats-py: nothing of what
is being tested takes part in saying whether it was right.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

import msgspec
import nats
import pyarrow.parquet as pq
from deltalake import DeltaTable

if TYPE_CHECKING:
    from nats.aio.client import Client

STREAMS: Final = {"contexts": "KV_ctx-hot", "events": "CTX_EVENTS", "key_versions": "KV_ctx-keys"}
MAY_COME: Final = -1
"""In place of a sequence: what the archiver itself may store, and then must archive."""

_CLOCK: Final = {"stored_at", "created_at"}
"""When the server stored what the archiver itself sent it: of two runs of one cycle the only difference."""
_LIMIT_S: Final = 30


class StreamSeen(msgspec.Struct):
    """A stream: its life, its bounds, and the name of every message by sequence."""

    epoch: str
    first_seq: int
    last_seq: int
    names: dict[int, str]


class TableSeen(msgspec.Struct):
    """A table: how far it says its stream is archived; each row as (name, epoch, sequence, digest of its columns)."""

    watermark: int
    rows: list[tuple[str, str, int, str]]


class Seen(msgspec.Struct):
    """Everything, at one moment at which nobody writes."""

    tables: dict[str, TableSeen]
    streams: dict[str, StreamSeen]
    dead: int


async def see(url: str, lake: Path) -> Seen:
    """Reads everything that a server and a lake hold."""
    client = await nats.connect(url, allow_reconnect=False)
    try:
        streams = {table: await _stream(client, name) for table, name in STREAMS.items()}
        dead = (await _api(client, "STREAM.INFO.CTX_DEAD"))["state"]["messages"]
    finally:
        await client.close()
    tables = {table: read_table(lake / table, table, seen.epoch) for table, seen in streams.items()}
    return Seen(tables, streams, dead)


def read_table(directory: Path, table: str, epoch: str) -> TableSeen:
    """Reads one table: its watermark in a life of its stream (0 before the first), and all of its rows."""
    delta = DeltaTable(str(directory))
    rows: list[tuple[str, str, int, str]] = []
    for uri in delta.file_uris():
        # Not of a whole directory: a file that the log does not name is no part of the table.
        content = pq.ParquetFile(unquote(urlsplit(uri).path) if "://" in uri else uri).read()
        names = [name for name in content.column_names if name not in _CLOCK]
        rows += [
            (_name_of_row(table, row), row["epoch"], row["stream_seq"], _digest(row))
            for row in content.select(names).to_pylist()
        ]
    return TableSeen(delta.transaction_version(f"{table}/{epoch}") or 0, rows)


def problems_of(seen: Seen, wanted: dict[str, dict[str, int]]) -> list[str]:
    """Returns what is wrong with ``seen``, at any moment of a cycle.

    ``wanted`` says, by table, the name and the sequence of everything that was acknowledged and is to be archived.
    """
    found: list[str] = []
    for table, names in wanted.items():
        rows, stream = seen.tables[table], seen.streams[table]
        found += _doubled(table, rows)
        archived = Counter(name for name, *_ in rows.rows)
        if stream.first_seq > rows.watermark + 1:
            found.append(f"I3 {table}: purged up to {stream.first_seq - 1}, archived up to {rows.watermark}")
        if rows.watermark > stream.last_seq:
            found.append(f"I3 {table}: archived up to {rows.watermark}, the stream ends at {stream.last_seq}")
        for name, seq in names.items():
            if seq == MAY_COME or archived[name]:
                continue
            if seq <= rows.watermark or stream.names.get(seq) != name:
                found.append(f"I1 {table}: {name} at {seq} is lost (watermark {rows.watermark})")
        found += [f"I2 {table}: nobody stored {name}" for name in archived if name not in names]
    return found


def _doubled(table: str, seen: TableSeen) -> Iterable[str]:
    places = Counter((epoch, seq) for _, epoch, seq, _ in seen.rows)
    yield from (f"I2 {table}: {place} is there {count} times" for place, count in places.items() if count > 1)
    if table != "contexts":  # of a context, what was stored again later is a row too
        names = Counter(name for name, *_ in seen.rows)
        yield from (f"I2 {table}: {name} is there {count} times" for name, count in names.items() if count > 1)


def differences(name: str, wanted: Iterable[Any], found: Iterable[Any]) -> list[str]:
    """Returns how two multisets differ, as text; empty when they do not."""
    expected, actual = Counter(wanted), Counter(found)
    missing, surplus = expected - actual, actual - expected
    told = []
    if missing:
        told.append(f"{name}: {missing.total()} missing: {list(missing)[:3]}")
    if surplus:
        told.append(f"{name}: {surplus.total()} too many: {list(surplus)[:3]}")
    return told


async def _stream(client: Client, name: str) -> StreamSeen:
    info = await _api(client, f"STREAM.INFO.{name}")
    state, names = info["state"], {}
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox, pending_msgs_limit=0, pending_bytes_limit=0)
    start = state["first_seq"]
    while start <= state["last_seq"]:
        request = json.dumps({"seq": start, "batch": 1_000, "max_bytes": 8 << 20}).encode()
        await client.publish(f"$JS.API.DIRECT.GET.{name}", request, reply=inbox)
        count = 0
        while True:
            message = await subscription.next_msg(_LIMIT_S)
            headers = message.headers or {}
            if "Nats-Sequence" not in headers:
                break
            count += 1
            seq = int(headers["Nats-Sequence"])
            names[seq] = _name_of_message(name, headers, message.data)
            start = seq + 1
        if not count:
            break
    await subscription.unsubscribe()
    epoch = info["config"].get("metadata", {}).get("holdfast.epoch", "")
    return StreamSeen(epoch, state["first_seq"], state["last_seq"], names)


def _name_of_message(stream: str, headers: dict[str, str], payload: bytes) -> str:
    subject = headers["Nats-Subject"]
    if stream == STREAMS["contexts"]:
        return subject.rpartition(".")[2]
    if stream == STREAMS["events"]:
        return headers.get("Nats-Msg-Id", subject)
    try:
        return f"{subject.split('.', 2)[2]}/{json.loads(payload)['version']}"
    except (ValueError, KeyError, TypeError):
        return subject


def _name_of_row(table: str, row: dict[str, Any]) -> str:
    """The same name of what was archived; keys here need no encoding."""
    if table == "contexts":
        return str(row["ref"])[-32:]
    if table == "events":
        return f"{row['namespace']}.{row['event_id']}"
    return f"{row['namespace']}.{row['key']}/{row['version']}"


async def _api(client: Client, subject: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((await client.request(f"$JS.API.{subject}", timeout=_LIMIT_S)).data)
    return answer


def _digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()
