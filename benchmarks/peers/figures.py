"""Which figures have a peer beside them, and what a peer does there: the same bodies, as many tasks, as many in a call.

A figure is known by its name alone, so that the file that measures it need not know of peers.  Peers measured:

* writing new contexts one after the other, from many tasks, in calls of many;
* reading hot ones one after the other, from 64 tasks, 100 in a call, and from what the process has in hand;
* versions of named contexts: new keys, the next version of 512 keys in turn, 32 tasks that each merge a member into
  one key, which every store does by itself: no writer has to come again.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.measure import Runner, Side, load
from benchmarks.payloads import Bodies, encoded
from benchmarks.peers.in_hand import in_hand
from benchmarks.peers.postgres_redis import PostgresRedis, open_postgres_redis
from benchmarks.peers.redis_always import open_redis_always
from benchmarks.peers.servers import PeerMissingError
from benchmarks.peers.sqlite_dict import open_sqlite_dict

if TYPE_CHECKING:
    from benchmarks.peers.peer import Peer

BODY_BYTES: Final = 600
READ: Final = 10_000
"""Contexts that are there to be read, as in the figures of Holdfast."""
UPDATED_KEYS: Final = 512
MEMBERS: Final = 100
"""Keys that are updated, and members of the one that all change, as in the figures of Holdfast."""
_IN_A_CALL: Final = 500

PEERS: Final[dict[str, Callable[[Path], Any]]] = {
    "postgres_redis": open_postgres_redis,
    "redis_always": open_redis_always,
    "sqlite_dict": open_sqlite_dict,
}
IN_PROCESS: Final = frozenset({"sqlite_dict"})
"""Peers that serve one process: no other one can read what is in their memory."""

PUTS: Final = {"put_sequential": 1, "put_64_producers": 64, "put_256_producers": 256}
PUTS_OF_MANY: Final = {"put_many_100": 100, "put_many_500": 500}
READS: Final = {"resolve_hot_sequential": 1, "resolve_hot_64": 64, "key_get_small": 1}
READS_OF_MANY: Final = {"resolve_many_100": 100}
NEW_KEYS: Final = {"key_put_sequential": 1, "key_put_64": 64}
UPDATES: Final = {"key_update_64": 64}
ONE_KEY: Final = {"key_patch_one_32": 32}

_NEAR: Final = "near_cache"


class Peers:
    """The peers that run on this machine.  Made by :func:`open_peers`."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        self._peers = {peer.name: peer for peer in peers}
        self._bodies = Bodies(21)
        self._numbers = count()
        self._random = random.Random(22)
        self._read_keys: dict[str, list[str]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._peers)

    @property
    def postgres(self) -> PostgresRedis | None:
        """The one that answers SQL, if it runs."""
        found = self._peers.get("postgres_redis")
        return found if isinstance(found, PostgresRedis) else None

    def of(self, name: str) -> Peer | None:
        """Returns a peer by name, if it runs."""
        return self._peers.get(name)

    async def sides(self, figure: str, *, stored: int = READ) -> list[Side]:
        """Returns what to measure beside a figure: one side for each peer that does this kind of work."""
        sides: list[Side] = []
        for peer in self._peers.values():
            # What a process has in hand: a cache across the network is none.
            if figure == _NEAR and peer.name not in IN_PROCESS:
                continue
            runner = await self._runner(peer, figure, stored)
            if runner is not None:
                sides.append(Side(peer.what, runner, peer.name))
        return sides

    async def _runner(self, peer: Peer, figure: str, stored: int) -> Runner | None:
        if figure in PUTS:
            return load(self._new, lambda item: peer.put(*item), PUTS[figure])
        if figure in PUTS_OF_MANY:
            size = PUTS_OF_MANY[figure]
            return load(lambda number: [self._new(size) for _ in range(number)], peer.put_many, 1, weight=size)
        if figure == _NEAR:
            return in_hand(await self._keys_to_read(peer, stored), peer.get)
        if figure in READS or figure in READS_OF_MANY:
            return self._reads(peer, figure, await self._keys_to_read(peer, stored))
        if figure in NEW_KEYS:
            return load(self._new, partial(_first_version, peer), NEW_KEYS[figure])
        if figure in UPDATES:
            return await self._updates(peer, UPDATES[figure])
        if figure in ONE_KEY:
            return await self._one_key(peer, ONE_KEY[figure])
        return None

    def _new(self, number: int) -> list[tuple[str, bytes]]:
        return [(f"c{next(self._numbers)}", encoded(body)) for body in self._bodies.take(number, BODY_BYTES)]

    async def _keys_to_read(self, peer: Peer, stored: int) -> list[str]:
        keys = self._read_keys.setdefault(peer.name, [])
        while len(keys) < stored:
            items = self._new(min(_IN_A_CALL, stored - len(keys)))
            await peer.put_many(items)
            keys += [key for key, _ in items]
        return keys

    def _reads(self, peer: Peer, figure: str, keys: list[str]) -> Runner:
        if figure in READS_OF_MANY:
            size = min(READS_OF_MANY[figure], len(keys))
            return load(lambda number: [self._random.sample(keys, size) for _ in range(number)], peer.get_many)
        return load(lambda number: self._random.choices(keys, k=number), peer.get, READS[figure])

    async def _updates(self, peer: Peer, tasks: int) -> Runner:
        """Keys in turn get their next version from whoever knows the newest one."""
        known: deque[tuple[str, int]] = deque((f"k{next(self._numbers)}", 0) for _ in range(UPDATED_KEYS))

        async def update(item: tuple[str, bytes]) -> None:
            key, version = known.popleft()
            await next_version(peer, key, item[1], version)
            known.append((key, version + 1))

        return load(self._new, update, tasks)

    async def _one_key(self, peer: Peer, tasks: int) -> Runner:
        """All tasks change the same key, each a member of it."""
        key = f"k{next(self._numbers)}"
        await next_version(peer, key, encoded({f"f{field}": 0 for field in range(MEMBERS)}), 0)

        def patches(number: int) -> list[bytes]:
            return [encoded({f"f{n % MEMBERS}": n}) for n in (next(self._numbers) for _ in range(number))]

        return load(patches, partial(peer.patch, key), tasks)


async def _first_version(peer: Peer, item: tuple[str, bytes]) -> None:
    await next_version(peer, *item, 0)


async def next_version(peer: Peer, key: str, body: bytes, expected: int) -> None:
    """Writes the version of a key after ``expected``, 0 for a new key."""
    # A script of Redis creates what is not there; a table needs an insert for it.
    if expected == 0 and peer.name != "redis_always":
        await peer.put(key, body)
    else:
        await peer.update(key, body, expected)


@asynccontextmanager
async def open_peers(parent: Path, names: Sequence[str], say: Callable[[str], object]) -> AsyncGenerator[Peers]:
    """Runs the peers that are installed while the block lasts; of the others, ``say`` is told what to install."""
    async with AsyncExitStack() as stack:
        peers: list[Peer] = []
        for name in names:
            try:
                peers.append(await stack.enter_async_context(PEERS[name](parent)))
            except PeerMissingError as error:
                say(f"peer {name} is left out: {error}")
        yield Peers(peers)
