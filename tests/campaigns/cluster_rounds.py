"""What is done to a cluster in one round of the campaign, and what its nodes must agree on afterwards.

Every fault is a function of the cluster, a seeded source of choices and the load's clock; it returns what it did, in
words, once the fault is over.  Holds no tests itself.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from holdfast.ops.torture.plain import STREAMS
from holdfast.streams.topology import declarations
from tests.campaigns.cluster_rig import READY_S, Cluster, Network, Node

if TYPE_CHECKING:
    from tests.campaigns.cluster_load import Clock
    from tests.campaigns.power_images import Disk

Kind = Literal["leader-kill", "partition", "all-cut", "wipe", "rolling", "combined"]
KINDS: Final[tuple[Kind, ...]] = ("leader-kill", "partition", "all-cut", "wipe", "rolling", "combined")

RESUME_S: Final = 90.0
"""How long a fault that leaves a majority may keep writers waiting before it is cleared away, and told."""

ONE_WAY_S: Final = 12.0
"""How long a cut of one direction lasts at most: writes may have to wait for as long as it does."""

_NOT_WITHIN: Final = "not within"
_SETTLE_S: Final = 1.0
_LAME_DUCK_S: Final = 40.0


class Faults:
    """What can be done to a cluster.  ``disks`` hold the nodes' stores where power can be cut."""

    def __init__(self, cluster: Cluster, disks: Sequence[Disk] = ()) -> None:
        self.cluster = cluster
        self.disks = list(disks)

    async def run(self, kind: Kind, choice: random.Random, clock: Clock) -> str:
        """Injects one fault of a kind and clears it away; returns what was done."""
        functions: dict[Kind, Callable[[random.Random, Clock], Awaitable[str]]] = {
            "leader-kill": self.leader_kill,
            "partition": self.partition,
            "all-cut": self.all_cut,
            "wipe": self.wipe,
            "rolling": self.rolling,
            "combined": self.combined,
        }
        return await functions[kind](choice, clock)

    async def leader_kill(self, choice: random.Random, clock: Clock) -> str:
        """Kills the node that leads a stream, or the cluster's own group, and starts it again later."""
        group, node = await self._leader_of(choice.choice([*STREAMS.values(), "meta"]))
        node.kill()
        waited = await self._resumed(clock)
        await asyncio.sleep(choice.random() * _SETTLE_S)
        node.start()
        return f"killed {node.name}, leader of {group}; writes went on after {waited}"

    async def partition(self, choice: random.Random, clock: Clock) -> str:
        """Cuts nodes off from each other in one of five ways, until a majority goes on, and heals it."""
        network = self._network()
        group, leader = await self._leader_of(choice.choice([*STREAMS.values(), "meta"]))
        one, other = choice.sample([node for node in self.cluster.nodes if node is not leader], 2)
        way = choice.choice(("leader", "leader unplugged", "follower", "ring", "deaf leader", "mute leader"))
        if way == "leader":
            network.part(leader.number, one.number)
            network.part(leader.number, other.number)
        elif way == "leader unplugged":
            network.unplug(leader.number)
        elif way == "follower":
            network.part(one.number, leader.number)
            network.part(one.number, other.number)
        elif way == "ring":
            network.part(leader.number, one.number)
        elif way == "deaf leader":
            network.cut(one.number, leader.number)
            network.cut(other.number, leader.number)
        else:
            network.cut(leader.number, one.number)
            network.cut(leader.number, other.number)
        try:
            # Without a fault there is no outage: a cut must last longer than an election takes, or it is none.
            await asyncio.sleep(2 + choice.random() * 6)
            is_one_way = way in ("deaf leader", "mute leader")
            waited = await self._resumed(clock, time.monotonic(), ONE_WAY_S if is_one_way else RESUME_S)
        finally:
            network.heal()
        if is_one_way and _NOT_WITHIN in waited:
            # A leader that is heard and hears nobody keeps the others from choosing one of themselves.
            waited = f"{await self._resumed(clock)}, once it was healed"
        return f"{way} ({leader.name} leads {group}, {one.name} beside it); writes went on after {waited}"

    async def all_cut(self, choice: random.Random, clock: Clock) -> str:
        """Kills all nodes at once, where possible as a power cut does, and starts them in any order."""
        nodes = choice.sample(self.cluster.nodes, len(self.cluster.nodes))
        for node in nodes:
            node.signal(signal.SIGKILL)
        for node in nodes:
            node.kill()
        await asyncio.gather(*(asyncio.to_thread(disk.cut) for disk in self.disks))
        for node in nodes:
            node.start()
            await asyncio.sleep(choice.choice((0, 0, choice.random())))
        waited = await self._resumed(clock)
        what = "power of all three nodes cut" if self.disks else "all three nodes killed"
        return f"{what}; writes went on after {waited}"

    async def wipe(self, choice: random.Random, clock: Clock) -> str:
        """Kills a node, removes all it stored, and starts it empty; it must catch up while the load goes on."""
        node = choice.choice(self.cluster.nodes)
        is_leader = [
            stream for stream in STREAMS.values() if (leader := await self.cluster.leader(stream)) and leader is node
        ]
        node.kill()
        node.wipe()
        node.start()
        waited = await self._resumed(clock)
        whole = await self.cluster.wait_whole()
        return f"wiped {node.name} (led {', '.join(is_leader) or 'nothing'}); {waited}, caught up after {whole:.1f} s"

    async def rolling(self, choice: random.Random, clock: Clock) -> str:
        """Asks each node in turn to leave as an operator does, waits for its end and starts it again."""
        took: list[str] = []
        for node in choice.sample(self.cluster.nodes, len(self.cluster.nodes)):
            started = time.monotonic()
            node.signal(signal.SIGUSR2)
            await node.wait_ended(_LAME_DUCK_S)
            node.start()
            await self.cluster.wait_whole()
            took.append(f"{node.name} {time.monotonic() - started:.1f} s")
        waited = await self._resumed(clock)
        return f"restarted one after another: {', '.join(took)}; {waited}"

    async def combined(self, choice: random.Random, clock: Clock) -> str:
        """Cuts one node off, kills another meanwhile, and brings them back in either order: for a while no two nodes
        are left, then perhaps the two that know least."""
        network = self._network()
        group, leader = await self._leader_of(choice.choice([*STREAMS.values(), "meta"]))
        cut, killed = choice.sample(self.cluster.nodes, 2)
        for other in self.cluster.nodes:
            if other is not cut:
                network.part(cut.number, other.number)
        try:
            # Long enough, now and then, that the others go on without it and it is left behind.
            await asyncio.sleep(choice.choice((0.5, 6 + 4 * choice.random())))
            killed.kill()
            await asyncio.sleep(2 * choice.random())
            heals_first = choice.random() < 0.5
            if heals_first:
                network.heal()
                await asyncio.sleep(choice.choice((0, 6)) * choice.random())
            killed.start()
            if not heals_first:
                await asyncio.sleep(choice.choice((0, 6)) * choice.random())
        finally:
            network.heal()
        waited = await self._resumed(clock)
        return (
            f"{cut.name} cut off, then {killed.name} killed ({leader.name} led {group}), "
            f"{'healed' if heals_first else 'started'} first; writes went on after {waited}"
        )

    async def _leader_of(self, group: str) -> tuple[str, Node]:
        async with asyncio.timeout(READY_S):
            while True:
                node = await (self.cluster.meta_leader() if group == "meta" else self.cluster.leader(group))
                if node is not None and node.pid is not None:
                    return group, node
                await asyncio.sleep(0.1)

    async def _resumed(self, clock: Clock, since: float | None = None, limit_s: float = RESUME_S) -> str:
        """Waits until something of each kind was acknowledged after now; how long that took, in words."""
        began = time.monotonic() if since is None else since
        while not clock.has_resumed(began):
            if time.monotonic() - began > limit_s:
                return f"{_NOT_WITHIN} {limit_s:.0f} s"
            await asyncio.sleep(0.02)
        return f"{time.monotonic() - began:.1f} s"

    def _network(self) -> Network:
        network = self.cluster.network
        assert isinstance(network, Network), "nodes on loopback cannot be parted"
        return network


class Disagreement(msgspec.Struct, frozen=True):
    """Nodes that hold different things of one stream after everything was healed."""

    stream: str
    what: dict[str, Any]


async def disagreements(cluster: Cluster, timeout_s: float = 20.0) -> list[Disagreement]:
    """Returns the streams of which the nodes say different things, once nobody writes any more.

    A node may be a moment behind: it is asked again until it agrees or the time is up.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        states = await asyncio.gather(*(asyncio.to_thread(_states, node) for node in cluster.nodes))
        names = sorted(declarations())
        found: list[Disagreement] = []
        for name in names:
            said = {node.name: state.get(name) for node, state in zip(cluster.nodes, states, strict=True)}
            if len({str(value) for value in said.values()}) > 1:
                found.append(Disagreement(name, said))
        if not found or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.2)


def _states(node: Node) -> dict[str, Any]:
    """What a node itself holds of each stream: its first and last sequence, and how many messages and bytes."""
    reply = node.monitor("/jsz?accounts=1&streams=1&acc=$G") or {}
    return {
        detail["name"]: {name: detail["state"].get(name) for name in ("messages", "bytes", "first_seq", "last_seq")}
        for account in reply.get("account_details") or []
        for detail in account.get("stream_detail") or []
    }
