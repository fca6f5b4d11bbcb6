"""One run of the campaign against a cluster: rounds or chaos, and again and again a look for all that was acknowledged.

Holds no tests itself.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import nats.errors

from holdfast.ops.torture.check import Violation, check
from holdfast.ops.torture.history import History, read_history
from holdfast.ops.torture.observe import observe
from holdfast.schemas.errors import HoldfastError, UnavailableError
from holdfast.streams.connection import open_connection
from holdfast.streams.consumer import ack_floor
from holdfast.streams.retry import call_with_retry
from holdfast.streams.topology import ensure_topology, stream_info
from holdfast.streams.wire import EVENTS_STREAM
from holdfast.workers.control import flush
from holdfast.workers.ingester import CONSUMER as INGESTER
from tests.campaigns.cluster_load import GROUP, Load
from tests.campaigns.cluster_meter import Meter
from tests.campaigns.cluster_plan import CHAPTER, CHAPTER_S, PAUSE_S, PEAK_RATE, RATE, SEGMENT_S, WEIGHTS
from tests.campaigns.cluster_report import Report, server_version, spread
from tests.campaigns.cluster_rig import Cluster, Network, Node, run_cluster
from tests.campaigns.cluster_rounds import Faults, Kind, disagreements
from tests.campaigns.cluster_workers import WINDOW_S, Workers
from tests.campaigns.power_images import Disk
from tests.campaigns.power_images import missing as missing_power

if TYPE_CHECKING:
    from holdfast.ops.torture.seen import Observation
    from holdfast.streams.connection_target import Durability

CATCH_UP_S: Final = 90.0
"""How long the workers may take, once the cluster is whole, to have done with everything: an acknowledgement of theirs
that was lost means another delivery, after 30 s."""

_BEFORE_S: Final = 0.7
_AFTER_S: Final = 0.5
OBSERVED_TIMES: Final = 10


class Campaign:
    """One run of the campaign."""

    def __init__(
        self,
        seed: int,
        folder: Path,
        kinds: dict[str, int],
        *,
        durability: Durability = "durable",
        is_short: bool = False,
        quiet: bool = False,
    ) -> None:
        self.report = Report(seed=seed, kinds=kinds, durability=durability)
        self._is_short = is_short
        self._folder = folder
        self._quiet = quiet
        self._history = History()
        self._outages: defaultdict[str, list[float]] = defaultdict(list)
        self._client_outages: defaultdict[str, list[float]] = defaultdict(list)
        self._wholes: defaultdict[str, list[float]] = defaultdict(list)
        self._told: list[str] = []
        self._notes: list[str] = []
        self._deaths = 0

    async def run(self, schedule: Sequence[Kind], *, minutes: float | None = None, load: float = 0.3) -> Report:
        """Runs the rounds of a schedule, or faults at random for some minutes."""
        started = time.monotonic()
        async with AsyncExitStack() as stack:
            disks = self._disks(stack)
            stores = [disk.mounted_at for disk in disks] or None
            sync = "always" if self.report.durability == "durable" else '"2m"'
            cluster = await stack.enter_async_context(
                run_cluster(self._folder / "nodes", network=Network(), stores=stores, sync=sync)
            )
            async with open_connection(cluster.url, connect_s=20) as connection:
                await ensure_topology(connection, replicas=3, duplicate_window_s=WINDOW_S)
            await cluster.wait_whole()
            workers = Workers(cluster.url, self._folder)
            stack.callback(workers.stop)
            await workers.start()
            self._told.append(f"{len(cluster.nodes)} nodes up after {time.monotonic() - started:.1f} s")
            faults = Faults(cluster, disks)
            try:
                if minutes is None:
                    await self._rounds(schedule, faults, workers)
                else:
                    await self._chaos(faults, workers, minutes, load)
            except (TimeoutError, RuntimeError, OSError, HoldfastError, nats.errors.Error) as error:
                # A cluster that does not come back, or workers that cannot start on it: the run ends here.
                self._violate("I8", "cluster", f"{type(error).__name__}: {error}")
                self._keep(disks)
        self.report.seconds = round(time.monotonic() - started, 1)
        self._summarise(workers)
        return self.report

    async def _rounds(self, schedule: Sequence[Kind], faults: Faults, workers: Workers) -> None:
        chapter: list[Load] = []
        for number, kind in enumerate(schedule, start=1):
            load = self._load_of(faults.cluster, number, RATE)
            what = await self._round(kind, load, faults, workers, random.Random(f"{self.report.seed} {number} {kind}"))
            chapter.append(load)
            self._tell(f"{number}/{len(schedule)} {kind}: {what}")
            if len(chapter) == CHAPTER or number == len(schedule):
                await self._check(faults.cluster, workers, chapter)
                chapter = []
        if self._is_short:
            self._history = self._read_history([f"r{number}" for number in range(1, len(schedule) + 1)])
            for note in self._notes:
                self._violate("I5", "reader during the run", note)
        else:
            await self._check_all(faults.cluster, workers, [f"r{number}" for number in range(1, len(schedule) + 1)])

    async def _round(self, kind: Kind, load: Load, faults: Faults, workers: Workers, choice: random.Random) -> str:
        await load.start()
        await asyncio.sleep(_BEFORE_S)
        began = time.monotonic()
        what = await faults.run(kind, choice, load.clock)
        healed = time.monotonic()
        await faults.cluster.wait_whole()
        whole_s = time.monotonic() - healed
        await asyncio.sleep(_AFTER_S)
        ended = time.monotonic()
        await load.stop()
        await workers.look()
        self._notes.extend(load.notes)
        self.report.reads += load.reads
        self.report.rounds += 1
        self._outages[kind].append(load.clock.outage_s(began, ended))
        self._client_outages[kind].append(load.clock.client_outage_s(began, ended))
        self._wholes[kind].append(whole_s)
        if "not within" in what:
            self._violate("I8", kind, what)
        for different in await disagreements(faults.cluster):
            self._violate("I4", different.stream, f"the nodes disagree: {different.what}")
        return (
            f"{what}; outage {self._outages[kind][-1]:.1f} s, of one writer {self._client_outages[kind][-1]:.1f} s, "
            f"whole again after {whole_s:.1f} s, {len(load.clock.acknowledged)} acknowledged"
        )

    async def _check(self, cluster: Cluster, workers: Workers, loads: Sequence[Load]) -> None:
        """Looks for everything that some rounds acknowledged."""
        if not self._is_short:
            await self._catch_up(cluster)
        for load in loads:
            history = self._read_history([load.namespace])
            observation = await _observe(cluster.url, workers.lake, namespaces=[load.namespace], refs=_refs(history))
            self._judge(history, check(history, observation))
        self._tell(f"  checked: {len(self.report.violations)} violations so far")

    async def _catch_up(self, cluster: Cluster) -> None:
        """Waits until the workers have done with everything that was acknowledged; they must, once all is whole."""
        started = time.monotonic()
        async with open_connection(cluster.url, connect_s=20) as connection:
            try:
                await call_with_retry(partial(flush, connection, timeout_s=CATCH_UP_S), deadline_s=CATCH_UP_S)
                last_seq = (await stream_info(connection, EVENTS_STREAM)).last_seq
                # A second time: what the ingester stored of inline contexts meanwhile belongs to it.
                while await ack_floor(connection, EVENTS_STREAM, INGESTER) < last_seq:
                    if time.monotonic() - started > CATCH_UP_S:
                        raise UnavailableError(f"the ingester has not come to {last_seq}")
                    await asyncio.sleep(0.05)
            except HoldfastError as error:
                self._violate("I8", "workers", f"not caught up after {CATCH_UP_S:.0f} s: {error}")
        self._tell(f"  workers had done with everything after {time.monotonic() - started:.1f} s")

    async def _check_all(self, cluster: Cluster, workers: Workers, namespaces: list[str]) -> None:
        history = self._read_history(namespaces)
        observation = await _observe(
            cluster.url, workers.lake, namespaces=namespaces, refs=_refs(history), readers=("raw", "live")
        )
        found = check(history, observation, notes=self._notes)
        known = {(violation.invariant, violation.object, violation.what) for violation in self.report.violations}
        self._judge(history, [item for item in found if (item.invariant, item.object, item.what) not in known])
        self._history = history

    def _read_history(self, namespaces: Sequence[str]) -> History:
        return read_history(
            path for name in namespaces for path in sorted((self._folder / "history").glob(f"{name}.*.ndjson"))
        )

    def _judge(self, history: History, violations: Sequence[Violation]) -> None:
        self.report.violations.extend(violations)
        for violation in violations[:6]:
            self._tell(f"VIOLATION {violation.invariant} {violation.object}: {violation.what}")
            for line in violation.history[:4]:
                self._tell(f"    {line}")
        self._check_groups(history)

    def _check_groups(self, history: History) -> None:
        """An atomic batch that was sent once is acknowledged as a whole or not at all; the rest is the checker's."""
        by_writer: defaultdict[str, list[str]] = defaultdict(list)
        for attempt in history.attempts:
            if attempt.producer.endswith("-grouped"):
                by_writer[attempt.producer].append(history.outcome(attempt.op))
        for writer, outcomes in by_writer.items():
            for start in range(0, len(outcomes), GROUP):
                if len(set(outcomes[start : start + GROUP])) > 1:
                    self._violate(
                        "I2", writer, f"batch {start // GROUP} ended as {Counter(outcomes[start : start + GROUP])}"
                    )

    def _violate(self, invariant: str, at: str, what: str) -> None:
        self.report.violations.append(Violation(invariant, at, what))
        self._tell(f"VIOLATION {invariant} {at}: {what}")

    async def _chaos(self, faults: Faults, workers: Workers, minutes: float, share: float) -> None:
        """Faults of every kind at random times, while writers write; what was written is looked for every some minutes,
        in a pause of the faults."""
        choice = random.Random(f"chaos {self.report.seed}")
        cluster = faults.cluster
        meter = Meter(
            {node.name: partial(_pid_of, node) for node in cluster.nodes} | {"workers": lambda: workers.pid},
            together={"nodes": [node.name for node in cluster.nodes]},
        )
        metering = asyncio.create_task(meter.run())
        namespaces: list[str] = []
        ends = time.monotonic() + minutes * 60
        counts: Counter[str] = Counter()
        try:
            while time.monotonic() < ends:
                loads: list[Load] = []
                chapter_ends = min(ends, time.monotonic() + CHAPTER_S)
                while time.monotonic() < chapter_ends:
                    load = self._load_of(cluster, len(namespaces) + 1, share * PEAK_RATE)
                    namespaces.append(load.namespace)
                    loads.append(load)
                    await self._segment(
                        load, faults, workers, choice, min(chapter_ends, time.monotonic() + SEGMENT_S), counts
                    )
                await self._check(cluster, workers, loads)
                for different in await disagreements(cluster):
                    self._violate("I4", different.stream, f"the nodes disagree: {different.what}")
            await self._check_all(cluster, workers, namespaces)
        finally:
            metering.cancel()
            await asyncio.gather(metering, return_exceptions=True)
        self.report.kinds = dict(counts)
        self.report.memory = meter.summary()
        for grown in meter.not_flat():
            self._violate("I7", "memory and files", grown)

    async def _segment(
        self,
        load: Load,
        faults: Faults,
        workers: Workers,
        choice: random.Random,
        ends: float,
        counts: Counter[str],
    ) -> None:
        """Some faults under one load."""
        await load.start()
        while True:
            await asyncio.sleep(choice.expovariate(1 / PAUSE_S))
            if time.monotonic() >= ends:
                break
            kind = choice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            counts[kind] += 1
            began = time.monotonic()
            if kind == "workers":
                workers.stop()
                await workers.start()
                what = "workers killed and started"
            else:
                what = await faults.run(kind, choice, load.clock)
            healed = time.monotonic()
            await faults.cluster.wait_whole()
            await workers.look()
            self._outages[kind].append(load.clock.outage_s(began, time.monotonic()))
            self._client_outages[kind].append(load.clock.client_outage_s(began, time.monotonic()))
            self._wholes[kind].append(time.monotonic() - healed)
            if "not within" in what:
                self._violate("I8", kind, what)
            self.report.rounds += 1
            self._tell(f"{self.report.rounds} {kind}: {what}; outage {self._outages[kind][-1]:.1f} s")
        await asyncio.sleep(_AFTER_S)
        await load.stop()
        self._notes.extend(load.notes)
        self.report.reads += load.reads

    def _load_of(self, cluster: Cluster, number: int, rate: float) -> Load:
        return Load(
            [node.url for node in cluster.nodes],
            f"r{number}",
            self._folder / "history" / "x",
            self.report.seed * 1_000 + number,
            rate=rate,
            has_inline=not self._is_short,
        )

    def _disks(self, stack: AsyncExitStack) -> list[Disk]:
        why = missing_power() if "all-cut" in self.report.kinds or "chaos" in self.report.kinds else "no kind needs it"
        self.report.power = "SIGKILL of all nodes and a copy of each disk's image" if why is None else f"SIGKILL: {why}"
        disks: list[Disk] = []
        if why is None:
            for number in range(3):
                disk = Disk(self._folder / f"disk{number + 1}", size_bytes=1024 * 1024 * 1024)
                stack.callback(disk.close)
                disk.make()
                disks.append(disk)
        return disks

    def _keep(self, disks: Sequence[Disk]) -> None:
        """Copies the nodes' disks for whoever looks into what went wrong."""
        for number, disk in enumerate(disks, start=1):
            disk.keep(self._folder / f"kept{number}")

    def _summarise(self, workers: Workers) -> None:
        report = self.report
        for death in workers.deaths:
            report.violations.append(Violation("I8", "workers", death))
        report.worker_deaths = len(workers.deaths)
        counts = self._history.counts()
        report.attempted = len(self._history.attempts)
        report.acknowledged, report.unknown, report.refused = (
            counts[outcome] for outcome in ("acknowledged", "unknown", "refused")
        )
        report.lost = sum("lost" in item.what or "missing" in item.what for item in report.violations)
        report.doubled = sum("twice" in item.what or "times" in item.what for item in report.violations)
        report.outage_s = {kind: spread(values) for kind, values in self._outages.items()}
        report.client_outage_s = {kind: spread(values) for kind, values in self._client_outages.items()}
        report.whole_s = {kind: spread(values) for kind, values in self._wholes.items()}
        report.versions = {
            "nats-server": server_version(),
            "nats-py": version("nats-py"),
            "python": sys.version.split()[0],
        }
        if report.violations:
            report.kept = str(self._folder)

    def _tell(self, line: str) -> None:
        self._told.append(line)
        with (self._folder / "campaign.log").open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {line}\n")
        if not self._quiet:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


async def _observe(url: str, lake: Path, **options: Any) -> Observation:
    """As ``observe``; the plain client in it is not patient with a consumer that has just been made on a cluster."""
    for attempt in range(OBSERVED_TIMES):
        try:
            return await observe(url, lake, **options)
        except (nats.errors.Error, TimeoutError):
            if attempt == OBSERVED_TIMES - 1:
                raise
            await asyncio.sleep(1)
    raise AssertionError("unreachable")


def _pid_of(node: Node) -> int | None:
    return node.pid


def _refs(history: History) -> list[str]:
    return [attempt.id for attempt in history.acknowledged("context")]
