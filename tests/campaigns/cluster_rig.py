"""Three nodes of nats-server that can be killed, parted from each other, wiped and robbed of their power.

Each node runs in a network namespace of its own, on one bridge; clients are outside, at the bridge.  A node is cut off
from another by a route to nowhere, one direction at a time, and from everybody by taking its link down: nothing is
stopped, so nothing that was sent waits in a socket to be read later, as it would in a stopped process.  Without
namespaces the nodes listen on loopback, and can be killed and wiped but not parted.

Holds no tests itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from holdfast.ops.server_config import find_server_binary

NODES: Final = 3
CLIENT_PORT: Final = 4222
MONITOR_PORT: Final = 8222
ROUTE_PORT: Final = 6222
READY_S: Final = 180.0
"""How long three nodes may take to be whole again: an election takes up to 9 s, a split vote another, and the machine
is shared."""

_LAME_DUCK_GRACE_S: Final = 1
_LOOK_S: Final = 0.05


def missing() -> str | None:
    """Returns why nodes cannot be parted here; None when they can."""
    if os.geteuid() != 0:
        return "partitions need root, to make network namespaces"
    if shutil.which("ip", path=_path()) is None:
        return "partitions need ip (iproute2)"
    probe = f"hfprobe{os.getpid()}"
    made = _try("ip", "netns", "add", probe)
    if made is not None:
        return f"partitions need network namespaces: {made}"
    try:
        return _try("ip", "-n", probe, "link", "add", "hfv0", "type", "veth", "peer", "name", "hfv1")
    finally:
        _run("ip", "netns", "del", probe)


class Ports(Protocol):
    """Where a node listens, as (host, port)."""

    client: tuple[str, int]
    monitor: tuple[str, int]
    route: tuple[str, int]


class _Address:
    def __init__(self, host: str, client: int, monitor: int, route: int) -> None:
        self.client = (host, client)
        self.monitor = (host, monitor)
        self.route = (host, route)


class Loopback:
    """All nodes on 127.0.0.1, each on ports of its own.  Nothing can be cut."""

    can_cut = False

    def __init__(self, count: int = NODES) -> None:
        sockets = [socket.socket() for _ in range(3 * count)]
        try:
            for listener in sockets:
                listener.bind(("127.0.0.1", 0))
            ports = [int(listener.getsockname()[1]) for listener in sockets]
        finally:
            for listener in sockets:
                listener.close()
        self.addresses: list[Ports] = [_Address("127.0.0.1", *ports[3 * n : 3 * n + 3]) for n in range(count)]

    def command(self, _node: int) -> list[str]:
        """What a node's command line begins with."""
        return []

    def heal(self) -> None:
        """Nothing was cut."""

    def close(self) -> None:
        """Nothing was made."""


class Network:
    """A bridge with one namespace for each node.  Everything is taken away by :meth:`close`."""

    can_cut = True

    def __init__(self, count: int = NODES) -> None:
        self._name, self._subnet = _free_subnet()
        self._bridge = f"{self._name}b"
        self._spaces = [f"{self._name}n{number}" for number in range(count)]
        hosts = [f"{self._subnet}.{number + 1}" for number in range(count)]
        self._hosts = hosts
        self._is_down: set[int] = set()
        self._cuts: set[tuple[int, int]] = set()
        self.addresses: list[Ports] = [_Address(host, CLIENT_PORT, MONITOR_PORT, ROUTE_PORT) for host in hosts]
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def command(self, node: int) -> list[str]:
        """What a node's command line begins with: the process that follows replaces it, so its id is the node's."""
        return ["ip", "netns", "exec", self._spaces[node]]

    def cut(self, source: int, target: int) -> None:
        """Nothing that one node sends reaches another any more; the other direction stays."""
        if (source, target) not in self._cuts:
            _run("ip", "-n", self._spaces[source], "route", "add", "blackhole", f"{self._hosts[target]}/32")
            self._cuts.add((source, target))

    def part(self, one: int, other: int) -> None:
        """Two nodes do not reach each other any more."""
        self.cut(one, other)
        self.cut(other, one)

    def unplug(self, node: int) -> None:
        """Takes a node's link down: neither the others nor any client reach it."""
        _run("ip", "link", "set", f"{self._name}v{node}", "down")
        self._is_down.add(node)

    def heal(self) -> None:
        """Everybody reaches everybody again."""
        for source, target in self._cuts:
            _run("ip", "-n", self._spaces[source], "route", "del", "blackhole", f"{self._hosts[target]}/32")
        for node in self._is_down:
            _run("ip", "link", "set", f"{self._name}v{node}", "up")
        self._cuts, self._is_down = set(), set()

    def close(self) -> None:
        """Takes the namespaces and the bridge away; harmless when they are gone."""
        for space in self._spaces:
            _try("ip", "netns", "del", space)
        _try("ip", "link", "del", self._bridge)

    def _make(self) -> None:
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self._subnet}.254/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        for number, (space, host) in enumerate(zip(self._spaces, self._hosts, strict=True)):
            outside = f"{self._name}v{number}"
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", outside, "master", self._bridge, "up")
            _run("ip", "-n", space, "addr", "add", f"{host}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "eth0", "up")
            _run("ip", "-n", space, "link", "set", "lo", "up")


class Node:
    """One nats-server of the cluster; ``store`` is its directory of streams."""

    def __init__(self, number: int, ports: Ports, command: Sequence[str], folder: Path, store: Path) -> None:
        self.number = number
        self.name = f"n{number + 1}"
        self.ports = ports
        self.url = f"nats://{ports.client[0]}:{ports.client[1]}"
        self.monitor_url = f"http://{ports.monitor[0]}:{ports.monitor[1]}"
        self.store = store
        self.log = folder / f"{self.name}.log"
        self.starts = 0
        self._config = folder / f"{self.name}.conf"
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id, while it runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def configure(
        self, routes: Iterable[tuple[str, int]], *, sync: str, extra: str = "", advertise: tuple[str, int] | None = None
    ) -> None:
        """Writes the configuration."""
        lines = [
            f'server_name: "{self.name}"',
            f'listen: "{_at(self.ports.client)}"',
            f'http: "{_at(self.ports.monitor)}"',
            f'log_file: "{self.log}"',
            "max_payload: 1MB",
            'lame_duck_duration: "30s"',
            f'lame_duck_grace_period: "{_LAME_DUCK_GRACE_S}s"',
            f'jetstream {{ store_dir: "{self.store}", max_file_store: 8GB, sync_interval: {sync} }}',
            # A client knows the nodes that it was told of, so that a test can say who stays where.
            f'cluster {{ name: holdfast, listen: "{_at(self.ports.route)}", no_advertise: true,',
            *([] if advertise is None else [f'cluster_advertise: "{_at(advertise)}",']),
            "routes: [",
            *(f'  "nats://{_at(route)}"' for route in routes),
            "] }",
            extra,
        ]
        self._config.write_text("\n".join([*lines, ""]))

    def start(self) -> None:
        """Starts the server; does not wait for it."""
        assert self.pid is None, f"{self.name} runs"
        command = [*self._command, str(find_server_binary()), "-c", str(self._config)]
        self._process = subprocess.Popen(
            command, env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.starts += 1

    def kill(self) -> None:
        """Kills the server as a crash would; harmless when it is down."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def signal(self, number: int) -> None:
        """Sends a signal to the server, while it runs."""
        if self.pid is not None:
            os.kill(self.pid, number)

    async def wait_ended(self, timeout_s: float) -> None:
        """Waits for the server to end by itself."""
        assert self._process is not None, f"{self.name} was never started"
        await asyncio.to_thread(self._process.wait, timeout_s)

    def wipe(self) -> None:
        """Removes everything that the server stored."""
        assert self.pid is None, f"{self.name} runs"
        for entry in self.store.iterdir():
            if entry.name != "lost+found":
                shutil.rmtree(entry)

    def serves_direct(self, streams: Iterable[str], account: str = "$G") -> bool:
        """Whether this node answers direct gets of its copies of some streams; a follower begins to after 2 s."""
        reply = self.monitor(f"/subsz?subs=1&limit=10000&acc={account}") or {}
        subjects = {subscription.get("subject") for subscription in reply.get("subscriptions_list") or []}
        return all(f"$JS.API.DIRECT.GET.{stream}" in subjects for stream in streams)

    def monitor(self, path: str, timeout_s: float = 2.0) -> dict[str, Any] | None:
        """Returns what the monitoring address answers, whatever its status; None when it does not."""
        try:
            with urllib.request.urlopen(f"{self.monitor_url}{path}", timeout=timeout_s) as reply:  # noqa: S310  ours
                answer: dict[str, Any] = json.load(reply)
        except urllib.error.HTTPError as error:
            try:
                answer = json.load(error)
            except ValueError:
                return None
        except (OSError, ValueError):
            return None
        return answer


class Cluster:
    """The nodes, and who leads what.  Made by :func:`run_cluster`."""

    def __init__(self, network: Network | Loopback, nodes: Sequence[Node]) -> None:
        self.network = network
        self.nodes = list(nodes)

    @property
    def url(self) -> str:
        """The addresses of all nodes, as Holdfast takes them."""
        return ",".join(node.url for node in self.nodes)

    async def leader(self, stream: str) -> Node | None:
        """Returns the node that leads a stream, as the most of the nodes see it; None while there is none."""
        replies = await self._ask("/jsz?accounts=1&streams=1&acc=$G")
        votes = [
            str((detail.get("cluster") or {}).get("leader") or "")
            for reply in replies
            for account in (reply or {}).get("account_details") or []
            for detail in account.get("stream_detail") or []
            if detail.get("name") == stream
        ]
        return self._most(votes)

    async def meta_leader(self) -> Node | None:
        """Returns the node that leads the cluster's own group; None while there is none."""
        replies = await self._ask("/jsz")
        return self._most([str(((reply or {}).get("meta_cluster") or {}).get("leader") or "") for reply in replies])

    async def wait_whole(self, timeout_s: float = READY_S) -> float:
        """Returns once every node says that it and all its streams are well and caught up, and knows who leads each
        stream and its consumers, which being well does not mean; how long that took."""
        started = time.monotonic()
        while True:
            replies = await self._ask("/healthz")
            if all((reply or {}).get("status") == "ok" for reply in replies):
                replies = await self._ask("/jsz?accounts=1&streams=1&consumers=1")
                if all(reply is not None and _is_led(reply) for reply in replies):
                    return time.monotonic() - started
            if time.monotonic() - started > timeout_s:
                said = {node.name: reply for node, reply in zip(self.nodes, replies, strict=True)}
                raise TimeoutError(f"the cluster is not whole again after {timeout_s:.0f} s: {said}")
            await asyncio.sleep(_LOOK_S)

    async def wait_led(self, timeout_s: float = READY_S) -> None:
        """Returns once the cluster's own group has a leader and every node knows of the others."""
        async with asyncio.timeout(timeout_s):
            while True:
                replies = await self._ask("/jsz")
                groups = [(reply or {}).get("meta_cluster") or {} for reply in replies]
                if all(group.get("leader") and group.get("cluster_size") == len(self.nodes) for group in groups):
                    return
                await asyncio.sleep(_LOOK_S)

    async def _ask(self, path: str) -> list[dict[str, Any] | None]:
        return await asyncio.gather(*(asyncio.to_thread(node.monitor, path) for node in self.nodes))

    def _most(self, votes: Sequence[str]) -> Node | None:
        by_name = {node.name: node for node in self.nodes}
        known = [vote for vote in votes if vote in by_name]
        return by_name[max(known, key=known.count)] if known else None


@asynccontextmanager
async def run_cluster(
    folder: Path,
    *,
    network: Network | Loopback | None = None,
    stores: Sequence[Path] | None = None,
    sync: str = "always",
    extra: str = "",
    routes: Callable[[Node, Node], tuple[str, int]] | None = None,
    advertise: Mapping[tuple[str, int], tuple[str, int]] | None = None,
) -> AsyncGenerator[Cluster]:
    """Runs the nodes while the block lasts; yields when they form a cluster.

    ``stores`` are the nodes' directories of streams, else they are made in ``folder``.  ``routes`` says at which
    address the first node is told to find the second, where that is not its own; ``advertise`` what a node tells the
    others in the place of its own address.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network = Network() if network is None else network
    nodes: list[Node] = []
    try:
        for number, ports in enumerate(network.addresses):
            store = folder / f"store{number + 1}" if stores is None else stores[number]
            store.mkdir(parents=True, exist_ok=True)
            nodes.append(Node(number, ports, network.command(number), folder, store))
        for node in nodes:
            others = [other for other in nodes if other is not node]
            at = [other.ports.route if routes is None else routes(node, other) for other in others]
            node.configure(at, sync=sync, extra=extra, advertise=(advertise or {}).get(node.ports.route))
        cluster = Cluster(network, nodes)
        for node in nodes:
            node.start()
        await cluster.wait_led()
        yield cluster
    finally:
        for node in nodes:
            with contextlib.suppress(ProcessLookupError):
                node.kill()
        network.close()


def _is_led(reply: dict[str, Any]) -> bool:
    """Whether a node knows who leads everything it holds a copy of."""
    streams = [
        detail for account in reply.get("account_details") or [] for detail in account.get("stream_detail") or []
    ]
    consumers = [detail for stream in streams for detail in stream.get("consumer_detail") or []]
    return all((detail.get("cluster") or {"leader": "itself"}).get("leader") for detail in (*streams, *consumers))


def _free_subnet() -> tuple[str, str]:
    taken = subprocess.run(["ip", "-o", "addr"], env=_environment(), capture_output=True, text=True, check=True).stdout
    names = subprocess.run(["ip", "netns"], env=_environment(), capture_output=True, text=True, check=True).stdout
    while True:
        number = random.randrange(256)
        if f" 10.213.{number}." not in taken and f"hf{number}n" not in names:
            return f"hf{number}", f"10.213.{number}"


def _at(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}"


def _run(*command: str) -> None:
    failure = _try(*command)
    if failure is not None:
        raise RuntimeError(f"{' '.join(command)}: {failure}")


def _try(*command: str) -> str | None:
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    return (done.stderr.strip() or f"ended with {done.returncode}") if done.returncode else None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _path(), "LC_ALL": "C"}
