"""Shared by the tests of workers: what was acknowledged, and whether it is all there, once, whatever happened since.

Holds no tests itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from holdfast.client import Holdfast, connect
from holdfast.lake import Lake
from holdfast.lake import connect as connect_lake
from holdfast.lake.verify import verify_lake
from holdfast.ops.system import watched
from holdfast.schemas.ids import new_event_id, now_ms
from holdfast.schemas.rows import TABLES, Position, Table
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.connection_target import ConnectionTarget
from holdfast.streams.dead import DeadLetter, read_dead_letters
from holdfast.streams.decode import KeyVersionBody
from holdfast.streams.events import NewEvent
from holdfast.streams.publish import Outgoing, publish
from holdfast.streams.retry import call_with_retry
from holdfast.streams.topology import ensure_topology, stream_info
from holdfast.streams.wire import KEYS_PREFIX, STREAM_OF_TABLE
from holdfast.workers.settings import WORKERS, WorkerName, WorkerSettings
from holdfast.workers.system import RunningWorkers, run_workers
from tests.support import LIMIT_S, OwnServer

if TYPE_CHECKING:
    from holdfast.schemas.refs import Ref

NEVER_S: Final = 3_600.0
"""An interval that no test lives through: the test itself says when."""

_PROCESS: Final = """
import asyncio, os, sys
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit
import msgspec
from holdfast.ops.server import EmbeddedServer
from holdfast.ops.server_config import ServerSettings
from holdfast.streams.connection_target import ConnectionTarget
from holdfast.workers.settings import WorkerSettings
from holdfast.workers.system import run_workers

async def main() -> None:
    target = ConnectionTarget(url=sys.argv[1], origin="test")
    settings = msgspec.json.decode(sys.argv[2], type=WorkerSettings, dec_hook=lambda kind, value: kind(value))
    async with AsyncExitStack() as stack:
        data = os.environ.get("HOLDFAST_TEST_NATS_DATA")
        if data:
            server = ServerSettings(data=Path(data), port=urlsplit(target.url).port)
            await stack.enter_async_context(EmbeddedServer(server))
        workers = await stack.enter_async_context(run_workers(target, sys.argv[3].split(","), settings))
        print("ready", flush=True)
        await workers.wait_failed()

asyncio.run(main())
"""


@asynccontextmanager
async def own_server(data: Path, *, duplicate_window_s: float = 600.0) -> AsyncGenerator[OwnServer]:
    """A server whose streams remember ids for a time of the test's choosing; stopped at the end of the block."""
    server = OwnServer(data / "nats")
    try:
        await server.start(with_streams=False)
        async with open_connection(target_of(server.url)) as connection:
            await ensure_topology(connection, duplicate_window_s=duplicate_window_s)
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def rolled_back(server: OwnServer, tmp_path: Path) -> AsyncGenerator[None]:
    """What is stored within the block is lost by the server, as in a power cut without syncing."""
    store, kept = tmp_path / "nats", tmp_path / "kept"
    await server.stop()
    shutil.copytree(store, kept)
    await server.start(with_streams=False)
    yield
    await server.kill()
    shutil.rmtree(store)
    shutil.move(kept, store)
    await server.start(with_streams=False)


def target_of(url: str) -> ConnectionTarget:
    """The server at an address."""
    return ConnectionTarget(url=url, origin="test")


def settings_in(data: Path, role: str = "test", **changes: Any) -> WorkerSettings:
    """Settings of workers that do nothing by the clock, unless changed; ``role`` names the process's index."""
    values: dict[str, Any] = {
        "lake": data / "lake",
        "index": data / "index" / role,
        "archive_interval_s": NEVER_S,
        "purge_interval_s": NEVER_S,
        "compact_interval_s": NEVER_S,
        **changes,
    }
    return WorkerSettings(**values)


@asynccontextmanager
async def running(
    url: str, settings: WorkerSettings, names: Sequence[WorkerName] = WORKERS
) -> AsyncGenerator[RunningWorkers]:
    """Runs workers while the block lasts; a worker that fails fails the block."""
    async with run_workers(target_of(url), names, settings) as workers, watched(workers.wait_failed):
        yield workers


@asynccontextmanager
async def worker_process(
    url: str, settings: WorkerSettings, names: Sequence[WorkerName], environment: dict[str, str]
) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Runs workers in a process of their own; killed at the end of the block if they still run."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _PROCESS, url, msgspec.json.encode(settings, enc_hook=str).decode(), ",".join(names)),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def system_process(
    url: str, data: Path, settings: WorkerSettings, names: Sequence[WorkerName] = WORKERS
) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Runs a server at a fixed address, and workers, in one process that can be killed as a whole."""
    environment = {**os.environ, "HOLDFAST_TEST_NATS_DATA": str(data)}
    async with worker_process(url, settings, names, environment) as process:
        yield process


async def free_address() -> str:
    """An address on which nobody listens now."""
    listener = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    listener.close()
    await listener.wait_closed()
    return f"nats://127.0.0.1:{port}"


async def until_ready(process: asyncio.subprocess.Process) -> None:
    """Waits until the workers of a process serve."""
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), LIMIT_S)
    assert line == b"ready\n", line


async def eventually(holds: Callable[[], Any], pause_s: float = 0.01) -> None:
    """Waits until ``holds()``, which may be a coroutine function, is true; fails after the limit."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            outcome = holds()
            if asyncio.iscoroutine(outcome):
                outcome = await outcome
            if outcome:
                return
            await asyncio.sleep(pause_s)


async def put_version(connection: Connection, namespace: str, key: str, version: int, **changes: Any) -> int:
    """Publishes a version of a named context, as the SDK will; returns its sequence."""
    values: dict[str, Any] = {"op": "put", "event_id": new_event_id(), "timestamp_ms": now_ms(), **changes}
    body = KeyVersionBody(version=version, **values)
    subject = f"{KEYS_PREFIX}{namespace}.{key}"
    return (await publish(connection, Outgoing(subject, {}, msgspec.json.encode(body)))).seq


class Acknowledged:
    """What a test has stored and the server has acknowledged."""

    def __init__(self, namespace: str = "default") -> None:
        self.namespace = namespace
        self.bodies: dict[Ref, Any] = {}
        self.events: dict[str, Ref | None] = {}
        self.versions: set[tuple[str, int]] = set()
        self._next = 0

    async def add(self, url: str, count: int) -> None:
        """Stores ``count`` each of contexts, events that refer to them and key versions; one body in fifty is
        chunked."""
        async with connect(url, self.namespace, "tester") as hf:
            await self.add_by(hf, count)

    async def add_by(self, hf: Holdfast, count: int) -> None:
        """The same by a client of the caller's."""
        first, self._next = self._next, self._next + count
        bodies: list[Any] = [{"n": n, "text": f"step {n} " * 8} for n in range(first, self._next)]
        if first % 50 == 0:
            bodies[0] = [f"{first} {n}" for n in range(60_000)]
        refs = await hf.put_many(bodies)
        events = [
            NewEvent(
                namespace=self.namespace,
                agent_id="tester",
                name="step:done",
                data={"n": n},
                context_ref=ref,
                session_id=f"s{n % 7}",
            )
            for n, ref in zip(range(first, self._next), refs, strict=True)
        ]
        await hf.publish_many(events)
        self.bodies |= dict(zip(refs, bodies, strict=True))
        self.events |= {event.id: event.context_ref for event in events}
        for n in range(first, self._next):
            key, version, ref = f"plan{n % 5}", n // 5 + 1, refs[n - first]
            values = {"ref": ref, "event_id": new_event_id(), "timestamp_ms": now_ms()}
            await call_with_retry(
                partial(put_version, hf.connection, self.namespace, key, version, **values), deadline_s=LIMIT_S
            )
            self.versions.add((f"plan{n % 5}", n // 5 + 1))

    async def check(self, url: str, lake: Path) -> None:
        """I1 and I2: everything is there exactly once, by the SDK and by SQL; needs a resolver."""
        await self.check_by_sdk(url)
        await asyncio.to_thread(self.check_by_sql, lake, url)

    async def check_by_sdk(self, url: str) -> None:
        async with connect(url, self.namespace, "reader", cache_bytes=0) as hf:
            for start in range(0, len(self.bodies), 500):
                found = await hf.resolve_many(list(self.bodies)[start : start + 500])
                assert found.missing == []
                for ref, context in found.found.items():
                    assert context.body == self.bodies[ref]
            events = [event async for event in hf.query()]
        _same(((str(event.event_id), event.context_ref) for event in events), self.events.items())

    def check_by_sql(self, lake: Path, url: str | None) -> None:
        with connect_lake(lake, url) as sql:
            where = f"WHERE namespace = '{self.namespace}'"
            refs = sql.execute(f"SELECT ref FROM contexts {where}").fetchall()
            _same((ref for (ref,) in refs), self.bodies)
            bodies = dict(sql.execute(f"SELECT ref, body FROM contexts {where}").fetchall())
            assert {ref: json.loads(body) for ref, body in bodies.items()} == self.bodies
            events = sql.execute(f"SELECT event_id, context_ref FROM events {where}").fetchall()
            _same(((str(event_id), ref) for event_id, ref in events), self.events.items())
            versions = sql.execute(f"SELECT key, version FROM key_versions {where}").fetchall()
            _same(versions, self.versions)


def _same(found: Iterable[Any], stored: Iterable[Any]) -> None:
    """Each thing stored was found once, and nothing else."""
    seen, wanted = Counter(iter(found)), Counter(iter(stored))
    missing, surplus = list((wanted - seen).items()), list((seen - wanted).items())
    assert not missing + surplus, f"{len(missing)} missing: {missing[:3]}; {len(surplus)} too many: {surplus[:3]}"


async def check_watermarks(url: str, lake: Path, before: dict[Table, Position | None]) -> dict[Table, Position | None]:
    """I3: watermarks have only advanced, and nothing above them was purged; returns them.  The lake is sound."""
    opened = await asyncio.to_thread(Lake.open, lake)
    now: dict[Table, Position | None] = {table: await asyncio.to_thread(opened.watermark, table) for table in TABLES}
    async with open_connection(target_of(url)) as connection:
        for table in TABLES:
            info = await stream_info(connection, STREAM_OF_TABLE[table])
            earlier, mark = before.get(table), now[table]
            if earlier is not None:
                assert mark is not None
                assert mark.seq >= earlier.seq
            archived = 0 if mark is None else mark.seq
            assert info.first_seq <= archived + 1, f"{table}: purged above the watermark"
            assert archived <= info.last_seq
    report = await asyncio.to_thread(verify_lake, lake)
    assert report.violations == []
    return now


async def dead_letters(hf: Holdfast | Connection) -> list[DeadLetter]:
    """Every dead letter on the server, oldest first."""
    connection = hf if isinstance(hf, Connection) else hf.connection
    return [letter async for _, letter in read_dead_letters(connection)]
