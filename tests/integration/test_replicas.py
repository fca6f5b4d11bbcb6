"""Three copies of each stream: what a copy that has not caught up may say, and what nobody may say without a majority.

Three nodes on loopback.  One is made to lag by holding back the traffic of its account's streams on its routes, while
calls to the leader still pass: what a busy or far-away node does, for as long as the test wants it.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from holdfast.client import Holdfast, connect
from holdfast.ops.server_probe import verify_durability_of_all
from holdfast.schemas.errors import ConfigurationError, DurabilityError, UnavailableError, UnknownOutcomeError
from holdfast.schemas.ids import now_ms
from holdfast.schemas.refs import Digest
from holdfast.schemas.rows import Position
from holdfast.streams import topology
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.hot import HotTier, NewContext
from holdfast.streams.key_chains import Head
from holdfast.streams.key_log import KeyLog, NewVersion
from holdfast.streams.pull import read_one
from holdfast.streams.topology import ensure_topology, first_seq_since, stream_info
from holdfast.streams.wire import EVENTS_STREAM, H_SEQUENCE, HOT_STREAM, KEYS_STREAM, hot_subject, key_subject
from holdfast.workers import purge
from holdfast.workers.purge import purge_archived
from tests.campaigns.cluster_rig import Cluster, Loopback, Node, run_cluster
from tests.key_support import a_version
from tests.running import eventually
from tests.support import LIMIT_S, OwnServer

_CONNECT_S = 20.0
_NOT_YET_S = 0.4
"""How long a reader of a lagging copy is watched not to answer."""
_MANY = 24
NOWHERE = Digest("a" * 32)
_NOBODY = ("127.0.0.1", 1)
"""Where nobody listens."""


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """Three nodes without streams."""
    async with run_cluster(tmp_path, network=Loopback()) as running:
        yield running


class HeldRoutes:
    """Proxies of a node's routes, which hold back everything but the calls of the system account when told to."""

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()

    async def proxy(self, target: tuple[str, int]) -> tuple[str, int]:
        """Returns the address of a new proxy of ``target``."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            far_writer = writer
            of_system = asyncio.Event()
            try:
                far_reader, far_writer = await asyncio.open_connection(*target)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, far_writer, of_system))
                    group.create_task(self._pump(far_reader, writer, of_system))
            except* (OSError, asyncio.CancelledError):
                pass  # a node that is not there yet, or the end of the test
            finally:
                self._tasks.discard(task)
                writer.close()
                far_writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self._servers.append(server)
        host, port = server.sockets[0].getsockname()[:2]
        return str(host), int(port)

    def hold(self) -> None:
        """From now on nothing of the streams passes, in either direction."""
        self._open.clear()

    def release(self) -> None:
        """Everything that was held back passes, in order, and all that follows."""
        self._open.set()

    async def close(self) -> None:
        """Ends the proxies."""
        self.release()
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, of_system: asyncio.Event) -> None:
        while data := await reader.read(65_536):
            # The nodes tell each other at the beginning of which account's traffic a route is.
            if b'"route_account":"$SYS"' in data:
                of_system.set()
            if not of_system.is_set():
                await self._open.wait()
            writer.write(data)
            await writer.drain()
        writer.close()


class Lagging:
    """A cluster of which one node can be made to lag; ``ahead`` is connected to another node."""

    def __init__(self, node: Node, routes: HeldRoutes, behind: Holdfast, ahead: Holdfast) -> None:
        self.node = node
        self.routes = routes
        self.behind = behind
        self.ahead = ahead


# The streams of this account are replicated over its own routes, not over those of the system's account.
_ACCOUNT = """
accounts { APP { jetstream: { cluster_traffic: owner }, users: [ { user: app, password: app } ] } }
no_auth_user: app
"""


@asynccontextmanager
async def one_lagging(folder: Path) -> AsyncGenerator[Lagging]:
    """A cluster whose third node is reached by the others over proxies alone, and leads no stream."""
    routes = HeldRoutes()
    network = Loopback()
    own, *_ = [address.route for address in reversed(network.addresses)]
    proxies = {address.route: await routes.proxy(address.route) for address in network.addresses}

    def between(node: Node, other: Node) -> tuple[str, int]:
        return proxies[other.ports.route] if own in (node.ports.route, other.ports.route) else other.ports.route

    # Nodes tell each other of third ones: by an address that is nobody's, or a way around the proxies would be found.
    advertise = {address.route: _NOBODY for address in network.addresses} | {own: proxies[own]}
    try:
        async with run_cluster(folder, network=network, routes=between, extra=_ACCOUNT, advertise=advertise) as running:
            lagging = running.nodes[-1]
            async with open_connection(running.nodes[0].url, connect_s=_CONNECT_S) as connection:
                await ensure_topology(connection, replicas=3)
                for stream in topology.declarations():
                    await _led_elsewhere(connection, stream, lagging)
            await running.wait_whole()
            # A node that does not answer itself hands a direct get on, to the one behind the held routes perhaps.
            for node in (lagging, running.nodes[0]):

                async def serves(node: Node = node) -> bool:
                    return await asyncio.to_thread(node.serves_direct, topology.declarations(), "APP")

                await eventually(serves)
            async with connect(lagging.url, cache_bytes=0) as behind, connect(running.nodes[0].url) as ahead:
                yield Lagging(lagging, routes, behind, ahead)
                routes.release()
    finally:
        await routes.close()


async def _led_elsewhere(connection: Connection, stream: str, node: Node) -> None:
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                leader = (await connection.api(f"STREAM.INFO.{stream}"))["cluster"].get("leader")
                if leader and leader != node.name:
                    return
                if leader:
                    await connection.api(f"STREAM.LEADER.STEPDOWN.{stream}")
            except UnavailableError:
                pass  # it chooses
            await asyncio.sleep(0.05)


async def direct(connection: Connection, stream: str, subject: str) -> int | None:
    """The sequence that a direct get of a subject finds; None for a 404.

    Any copy may be asked: what goes to one behind the held routes gets no answer, and is asked again.
    """
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                message = await connection.lean.request(f"$JS.API.DIRECT.GET.{stream}.{subject}", timeout_s=0.1)
            except UnknownOutcomeError:
                continue
            found = (message.headers or {}).get(H_SEQUENCE)
            return None if found is None else int(found)


class Unanswered:
    """Calls that must get no answer, neither a wrong one nor an error, until the node has caught up.

    Each is made many times at once: a third of them asks the node that lags, the others wait behind the held routes.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, list[asyncio.Task[Any]]] = {}

    def call(self, name: str, call: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Makes a call many times."""
        self._tasks[name] = [asyncio.create_task(call()) for _ in range(_MANY)]

    async def check(self) -> None:
        """Asserts that none has ended after a while."""
        done, _ = await asyncio.wait([task for tasks in self._tasks.values() for task in tasks], timeout=_NOT_YET_S)
        ended = [(name, task) for name, tasks in self._tasks.items() for task in tasks if task in done]
        assert not ended, [(name, task.exception() or task.result()) for name, task in ended[:3]]

    async def results(self, name: str) -> list[Any]:
        """Returns what the calls return, once they may."""
        return await asyncio.wait_for(asyncio.gather(*self._tasks[name]), LIMIT_S)


async def test_a_copy_that_lags_answers_nothing_wrong(tmp_path: Path) -> None:
    async with one_lagging(tmp_path) as lagging:
        behind, ahead = lagging.behind, lagging.ahead
        await ahead.keys.put("plan", {"n": 1})
        await _caught_up(behind, "plan", 1)
        before_ms = now_ms()
        lagging.routes.hold()

        ref = await ahead.put({"said": "while it lagged"})
        await ahead.keys.put("plan", {"n": 2})
        await ahead.emit("step:done", {"n": 1})
        digest = Digest(ref.rpartition("_")[2])
        # The node itself knows of none of it, and says so to whoever asks it alone.
        assert await direct(behind.connection, HOT_STREAM, hot_subject("default", digest)) is None
        assert await direct(ahead.connection, HOT_STREAM, hot_subject("default", digest)) is not None
        assert await direct(behind.connection, KEYS_STREAM, key_subject("default", "plan")) == 1

        # Heads come from the leader, at once.
        head = await behind.keys.head("plan")
        assert head is not None
        assert head.version == 2
        log = KeyLog(behind.connection, replicas=3)
        assert {key: found.last_seq for key, found in (await log.heads("default", ["plan", "none"])).items()} == {
            "plan": 2
        }
        # A message that an archiver compares with the lake is not gone, and is not called old.
        info = await stream_info(behind.connection, KEYS_STREAM)
        assert info.last_seq == 2
        found = await read_one(behind.connection, info, 2)
        assert found is not None
        assert found.subject == key_subject("default", "plan")
        assert await first_seq_since(behind.connection, EVENTS_STREAM, before_ms) == 1

        # What was acknowledged is not missing, a chain does not end early, an old version was not the newest later, and
        # a version that a writer sends again is not another's: there is no answer as long as there is no right one.
        hot = HotTier(behind.connection, replicas=3)
        own = a_version(3)
        stored = await KeyLog(ahead.connection, replicas=3).write(NewVersion(own), after=Head(last_seq=2))
        newest = Head(msgspec.structs.replace(own, seq=stored.seq), last_seq=stored.seq)
        calls = Unanswered()
        calls.call("get", lambda: hot.get("default", digest))
        calls.call("get many", lambda: hot.get_stored_many("default", [digest, NOWHERE]))
        calls.call("revisions", lambda: _versions(log))
        calls.call("as of", lambda: log.as_of("default", "plan", now_ms()))
        calls.call("version", lambda: log.version("default", "plan", 2, newest))
        calls.call(
            "again", lambda: KeyLog(behind.connection, replicas=3).write(NewVersion(own), after=Head(last_seq=2))
        )
        await calls.check()

        lagging.routes.release()
        assert {row.body for row in await calls.results("get")} == {b'{"said":"while it lagged"}'}
        assert {tuple(rows) for rows, _ in await calls.results("get many")} == {(digest,)}
        assert set(await calls.results("revisions")) == {(1, 2, 3)}
        assert {head.row.version for head in await calls.results("as of")} == {3}
        assert {head.row.version for head in await calls.results("version")} == {2}
        assert {row.seq for row in await calls.results("again")} == {stored.seq}
        await hot.close()


async def test_a_leader_without_a_majority_is_not_believed(cluster: Cluster) -> None:
    async with open_connection(cluster.url, connect_s=_CONNECT_S) as connection:
        await ensure_topology(connection, replicas=3)
        await cluster.wait_whole()
    leader = await cluster.leader(HOT_STREAM)
    assert leader is not None
    async with connect(leader.url, cache_bytes=0) as hf:
        ref = await hf.put({"n": 1})
        stopped = [node for node in cluster.nodes if node is not leader]
        for node in stopped:
            node.signal(signal.SIGSTOP)
        try:
            await eventually(lambda: is_refused(hf.connection))
            # It still answers who asks it alone, for some seconds: what it holds, and of the rest that it is missing.
            subject = hot_subject("default", ref.rpartition("_")[2])
            assert await direct(hf.connection, HOT_STREAM, subject) == 1
            assert (await hf.resolve(ref)).body == {"n": 1}
            calls = Unanswered()
            calls.call("get", lambda: HotTier(hf.connection, replicas=3).get("default", NOWHERE))
            await calls.check()
        finally:
            for node in stopped:
                node.signal(signal.SIGCONT)


async def test_copies_are_added_never_taken_away_and_too_many_are_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_connection(cluster.url, connect_s=_CONNECT_S) as connection:
        assert {info.replicas for info in (await ensure_topology(connection)).values()} == {1}
        assert {info.replicas for info in (await ensure_topology(connection, replicas=3)).values()} == {3}
        await cluster.wait_whole()
        assert {info.replicas for info in (await ensure_topology(connection)).values()} == {3}
        monkeypatch.setattr(topology, "_CREATE_S", 0.3)
        with pytest.raises(ConfigurationError, match="5 copies") as refused:
            await ensure_topology(connection, replicas=5)
        assert refused.value.field == "replicas"
        assert "start 5 nodes" in str(refused.value)
        hot = HotTier(connection, replicas=3)
        await hot.put_many([NewContext(namespace="default", kind="plan", body=b"%d" % number) for number in range(5)])
        await hot.close()


async def test_a_replicated_stream_is_never_emptied(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a node's last snapshot covers must not all be gone from its files when the power of all nodes fails."""
    async with open_connection(cluster.url, connect_s=_CONNECT_S) as connection:
        await ensure_topology(connection, replicas=3)
        hot = HotTier(connection, replicas=3)
        await hot.put_many([NewContext(namespace="default", kind="plan", body=b"%d" % n) for n in range(5)])
        await hot.close()
        info = await stream_info(connection, HOT_STREAM)
        archived = Position(info.epoch, info.last_seq)
        purged, info = await purge_archived(connection, "contexts", watermark=archived, anchors=[], older_than_s=0.0)
        assert (purged, info.messages) == (0, 5)  # none of them is settled
        monkeypatch.setattr(purge, "SETTLED_S", 0.0)
        purged, info = await purge_archived(connection, "contexts", watermark=archived, anchors=[], older_than_s=0.0)
        assert (purged, info.messages, info.first_seq) == (4, 1, info.last_seq)


async def test_a_single_server_refuses_copies(start_server: Callable[[], Awaitable[OwnServer]]) -> None:
    server = await start_server()
    async with open_connection(server.url) as connection:
        with pytest.raises(ConfigurationError, match="the server is in no cluster"):
            await ensure_topology(connection, replicas=3)


async def test_every_node_must_sync(tmp_path: Path) -> None:
    async with run_cluster(tmp_path, network=Loopback()) as running:
        urls = [node.monitor_url for node in running.nodes]
        assert await verify_durability_of_all(urls, "durable") == 0
        assert await verify_durability_of_all(urls[:1], "durable") == 2
        running.nodes[1].kill()
        assert await verify_durability_of_all(urls, "durable") == 1
        running.nodes[1].configure([node.ports.route for node in running.nodes], sync='"2m"')
        running.nodes[1].start()
        await eventually(lambda: running.nodes[1].monitor("/jsz") is not None)
        with pytest.raises(DurabilityError, match="before it syncs"):
            await verify_durability_of_all(urls, "durable")
        assert await verify_durability_of_all(urls, "fast") == 0


async def _versions(log: KeyLog) -> tuple[int, ...]:
    return tuple([head.row.version async for head in log.revisions("default", "plan") if head.row is not None])


async def _caught_up(hf: Holdfast, key: str, seq: int) -> None:
    """Waits until the node that the client is connected to holds what was written."""

    async def holds() -> bool:
        return (await direct(hf.connection, KEYS_STREAM, key_subject("default", key)) or 0) >= seq

    await eventually(holds)


async def is_refused(connection: Connection) -> bool:
    """Whether what the leader says of its stream is not believed any more."""
    try:
        await stream_info(connection, HOT_STREAM)
    except UnavailableError as error:
        return "of 2 other servers" in error.message or "cannot answer" in error.message
    return False
