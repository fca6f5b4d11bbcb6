"""What the bench files share: the budget, the figures asked for, servers to measure on, and the records they make."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.measure import Budget, Kind, Result, Side, measure
from benchmarks.raw_nats import api, plain_client
from benchmarks.records import ROOT, Conditions, PeerResult, RawLimit, Record
from benchmarks.targets import judge
from holdfast.client import Holdfast, connect
from holdfast.client.near_cache import DEFAULT_BYTES
from holdfast.ops.server import EmbeddedServer
from holdfast.ops.server_config import ServerSettings
from holdfast.streams.connection import open_connection
from holdfast.streams.connection_target import ConnectionTarget, Durability
from holdfast.streams.topology import declarations, ensure_topology
from holdfast.streams.wire import EVENTS_STREAM, HOT_STREAM

if TYPE_CHECKING:
    from nats.aio.client import Client

    from benchmarks.peers.figures import Peers

NAMESPACE: Final = "bench"

RAW_HOT: Final = "RAW_HOT"
RAW_EVENTS: Final = "RAW_EVENTS"
RAW_HOT_PREFIX: Final = "$KV.raw-hot."
RAW_EVENTS_PREFIX: Final = "raw.bench.event."

_TEST_DATA: Final = "HOLDFAST_TEST_DATA"


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure: its name, what is measured, and how.  ``count`` fixes the operations of a run."""

    name: str
    what: str
    kind: Kind
    durability: Durability
    parameters: dict[str, Any] = {}
    unit: str = ""
    count: int | None = None
    least: int = 20
    most: int = 20_000


class BenchServer(msgspec.Struct, frozen=True):
    """An embedded server with Holdfast's streams, and raw streams of the same configuration beside them."""

    url: str
    durability: Durability
    client: Any
    """A plain nats-py client."""
    pid: int

    def connect(
        self, *, namespace: str = NAMESPACE, cache_bytes: int | None = None
    ) -> AbstractAsyncContextManager[Holdfast]:
        """Opens the SDK on this server; ``cache_bytes`` 0 turns the near cache off."""
        return connect(
            target_of(self.url), namespace, "bench", cache_bytes=DEFAULT_BYTES if cache_bytes is None else cache_bytes
        )


class Bench:
    """One run of the suite."""

    def __init__(
        self,
        budget: Budget,
        shared: Conditions,
        scratch: Path,
        names: list[str],
        on_record: Callable[[Record], None] = lambda _: None,
    ) -> None:
        self.budget = budget
        self.records: list[Record] = []
        self.peers: Peers | None = None
        """The stores to compare with that run on this machine, while they run."""
        self._shared = shared
        self._scratch = scratch
        self._names = names
        self._on_record = on_record

    def wants(self, *figures: str) -> bool:
        """Whether any of these figures is asked for: all are without names; a name may be a prefix or a pattern."""
        return not self._names or any(
            figure.startswith(name) or fnmatch(figure, name) for figure in figures for name in self._names
        )

    def scale(self, full: int, quick: int) -> int:
        """Returns a count that is not calibrated: ``full``, or ``quick`` in a smoke run."""
        return quick if self.budget.quick else full

    @property
    def is_partial(self) -> bool:
        """Whether some figures only are asked for."""
        return bool(self._names)

    @property
    def peer_parent(self) -> Path:
        """Where peers make their directories: the same disk, and not inside a directory that is this user's alone."""
        return self._scratch.parent

    def directory(self, name: str) -> Path:
        """Makes an empty directory on the disk that is measured."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._scratch))

    async def figure(self, figure: Figure, ours: Side, *raws: Side) -> None:
        """Measures a figure beside its raw limits and its peers, unless it is not asked for; one record for each limit.

        Of several limits with one label the fastest counts.  A label is added to the record's name, as in
        ``archive:pull``; the peers are with the first.
        """
        if not self.wants(figure.name):
            return
        peers = await self.peers.sides(figure.name, stored=self.scale(10_000, 200)) if self.peers else []
        await self.figure_beside(figure, [ours, *raws], peers)

    async def figure_beside(self, figure: Figure, sides: Sequence[Side], peers: Sequence[Side]) -> None:
        """The same, of ours and raw limits, with the peers given."""
        own = len(sides)
        results = await measure(
            [*sides, *peers],
            self.budget,
            kind=figure.kind,
            count=figure.count,
            least=self.scale(figure.least, min(figure.least, 20)),
            most=figure.most,
            sharing=own,
        )
        raws = results[1:own]
        for place, label in enumerate(dict.fromkeys(raw.label for raw in raws)):
            same = [raw for raw in raws if raw.label == label]
            self.add(figure, results[0], _fastest(same, figure.kind), [] if place else results[own:])

    def add(self, figure: Figure, ours: Result, raw: Result, peers: Sequence[Result] = ()) -> None:
        """Adds the record of a figure that has been measured."""
        ratios = [one / other for one, other in zip(ours.values, raw.values, strict=True)]
        record = Record(
            name=f"{figure.name}:{raw.label}" if raw.label else figure.name,
            what=f"{figure.what}: {ours.what}" if ours.what else figure.what,
            value=ours.value,
            unit=figure.unit or ("ms" if figure.kind == "latency" else "ops/s"),
            better="lower" if figure.kind == "latency" else "higher",
            values=ours.values,
            p50_ms=ours.p50_ms,
            p99_ms=ours.p99_ms,
            raw_limit=RawLimit(
                what=raw.what,
                value=raw.value,
                values=raw.values,
                p50_ms=raw.p50_ms,
                p99_ms=raw.p99_ms,
                count=raw.count,
            ),
            ratio=ours.value / raw.value,
            ratio_low=min(ratios),
            ratio_high=max(ratios),
            parameters={**figure.parameters, "count": ours.count, "runs": len(ours.values)},
            durability=figure.durability,
            replicas=1,
            versions=self._shared.versions,
            machine=self._shared.machine,
            git_commit=self._shared.git_commit,
            started_at=self._shared.started_at,
            peers=[
                PeerResult(
                    name=peer.label,
                    what=peer.what,
                    value=peer.value,
                    values=peer.values,
                    ratio=ours.value / peer.value,
                    p50_ms=peer.p50_ms,
                    p99_ms=peer.p99_ms,
                    count=peer.count,
                )
                for peer in peers
            ],
        )
        record = msgspec.structs.replace(record, verdicts=judge(record))
        self.records.append(record)
        self._on_record(record)

    @asynccontextmanager
    async def server(self, durability: Durability = "durable") -> AsyncGenerator[BenchServer]:
        """Runs an embedded server on an empty data directory while the block lasts."""
        async with AsyncExitStack() as stack:
            settings = ServerSettings(data=self.directory(durability), durability=durability)
            info = (await stack.enter_async_context(EmbeddedServer(settings))).info
            async with open_connection(target_of(info.nats_url)) as connection:
                await ensure_topology(connection)
            client = await stack.enter_async_context(plain_client(info.nats_url))
            await create_raw_streams(client)
            yield BenchServer(info.nats_url, durability, client, info.pid)


def _fastest(limits: Sequence[Result], kind: Kind) -> Result:
    fastest = (min if kind == "latency" else max)(limits, key=lambda limit: limit.value)
    if len(limits) == 1:
        return fastest
    return msgspec.structs.replace(fastest, what=f"{fastest.what}, the fastest of {len(limits)}")


def target_of(url: str) -> ConnectionTarget:
    """Returns a server of ours by its address, whatever the environment names."""
    return ConnectionTarget(url=url, origin="benchmark")


async def create_raw_streams(client: Client) -> None:
    """Makes the streams that raw limits write to: configured as Holdfast's own, under other subjects."""
    declared = declarations()
    for name, prefix, like in (
        (RAW_HOT, RAW_HOT_PREFIX, HOT_STREAM),
        (RAW_EVENTS, RAW_EVENTS_PREFIX, EVENTS_STREAM),
    ):
        await api(client, f"STREAM.CREATE.{name}", {**declared[like], "name": name, "subjects": [f"{prefix}>"]})


def recorded_traces() -> Path | None:
    """Returns the folder of recorded traces, if there is one on this machine."""
    named = os.environ.get(_TEST_DATA)
    path = Path(named) if named else ROOT.parent / "shared" / "data"
    return path / "steps" if (path / "steps").is_dir() else None


__all__ = ["Bench", "BenchServer", "Figure", "Holdfast", "create_raw_streams", "recorded_traces", "target_of"]
