"""What faults work on: the rig of a run, its workers and producers by role, and how to start each of them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.ops.torture.proxy import Proxy
from holdfast.ops.torture.rig import Child, TortureRig
from holdfast.workers.settings import WorkerName


class Ground:
    """A running system under load.

    ``workers`` says which workers a process runs, by the name of the process; ``producers`` the arguments of each.
    """

    def __init__(
        self,
        rig: TortureRig,
        proxy: Proxy,
        workers: Mapping[str, Sequence[WorkerName]],
        producers: Mapping[str, Sequence[str]],
    ) -> None:
        self.rig = rig
        self.proxy = proxy
        self.workers = dict(workers)
        self.producers = dict(producers)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        """What a fault found wrong by itself: a part that did not come back."""

    @property
    def worker_names(self) -> list[str]:
        """The worker processes."""
        return list(self.workers)

    @property
    def producer_names(self) -> list[str]:
        """The producers."""
        return list(self.producers)

    def worker_of(self, worker: WorkerName) -> str:
        """Returns the process that runs a worker."""
        return next(name for name, workers in self.workers.items() if worker in workers)

    def count(self, what: str, happened: bool = True) -> None:
        """Counts something that a fault did."""
        self.counts[what] += happened

    async def start_worker(self, name: str, **options: Any) -> Child:
        """Starts a worker process again, in the place of one that has ended."""
        return await self.rig.start_worker(*self.workers[name], name=name, **options)

    def start_producer(self, name: str, *, clock_s: float = 0.0) -> Child:
        """Starts a producer again: it goes on where it stopped."""
        return self.rig.start_producer(name, *self.producers[name], clock_s=clock_s)
