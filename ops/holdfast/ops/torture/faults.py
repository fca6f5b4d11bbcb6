"""The faults that a run can inject, by name.  Each strikes, and is over, before :attr:`Fault.inject` returns.

Others add theirs with :func:`register`; whatever is registered can be named in ``holdfast torture --faults``.
"""

from __future__ import annotations

import asyncio
import importlib
import random
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, cast

import msgspec

from holdfast.ops.torture.ground import Ground
from holdfast.ops.torture.proxy import Mode
from holdfast.schemas.errors import InvalidFieldError

Inject = Callable[[Ground, random.Random], Awaitable[None]]


class Fault(msgspec.Struct, frozen=True):
    """One kind of fault.

    ``needs`` names parts of a run without which it makes no sense (``workers``, ``producers``, ``proxy``).
    ``by_default``: whether a run that names no faults includes it.
    """

    name: str
    what: str
    inject: Inject
    needs: tuple[str, ...] = ()
    by_default: bool = True


FAULTS: Final[dict[str, Fault]] = {}
"""Every fault, by name."""

FAILPOINTS: Final = (
    "lake.before_parquet_fsync",
    "lake.after_parquet_fsync",
    "lake.before_rename",
    "lake.after_rename",
    "lake.before_commit",
    "lake.after_commit",
    "lake.after_log_fsync",
    "archiver.before_ack",
    "archiver.after_ack",
    "archiver.before_purge",
    "archiver.after_purge",
    "archiver.before_trim",
    "archiver.after_trim",
)
"""Where an archiver can be made to kill itself."""

HOURS_S: Final = 3_600.0
_DAYS_S: Final = 24 * HOURS_S
_DEATH_S: Final = 5.0
_MORE: Final = ("holdfast.ops.torture.data_faults", "holdfast.ops.torture.disk_faults")
"""Modules that register faults when they are imported."""

_CLOCKS_S: Final = (-10 * _DAYS_S, -HOURS_S, HOURS_S, 10 * _DAYS_S)


def register(
    name: str, what: str, *, needs: tuple[str, ...] = (), by_default: bool = True
) -> Callable[[Inject], Inject]:
    """Registers a function as the fault ``name``; for use as a decorator."""

    def add(inject: Inject) -> Inject:
        if name in FAULTS:
            raise ValueError(f"fault {name} is registered already")
        FAULTS[name] = Fault(name, what, inject, needs, by_default)
        return inject

    return add


@register("kill-server", "SIGKILL of nats-server, restarted within half a second")
async def kill_server(ground: Ground, choice: random.Random) -> None:
    """Kills the server; once in three times again while it starts."""
    rig = ground.rig
    await rig.kill_server()
    await asyncio.sleep(choice.choice((0.0, 0.0, 0.05, 0.5)))
    rig.spawn_server()
    if choice.random() < 0.33:
        await asyncio.sleep(choice.uniform(0.0, 0.2))
        await rig.kill_server()
        rig.spawn_server()
    await rig.wait_server()


@register("stop-server", "SIGSTOP of nats-server for up to three seconds")
async def stop_server(ground: Ground, choice: random.Random) -> None:
    """Stops the server and lets it go on."""
    server = ground.rig.server
    server.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(choice.uniform(0.2, 3.0))
    finally:
        server.signal(signal.SIGCONT)


@register("kill-worker", "SIGKILL of one worker process", needs=("workers",))
async def kill_worker(ground: Ground, choice: random.Random) -> None:
    """Kills a worker and starts it again."""
    name = choice.choice(ground.worker_names)
    await ground.rig.children[name].kill()
    await asyncio.sleep(choice.choice((0.0, 0.5)))
    await ground.start_worker(name)


@register("stop-worker", "SIGSTOP of one worker process for up to four seconds", needs=("workers",))
async def stop_worker(ground: Ground, choice: random.Random) -> None:
    """Stops a worker and lets it go on."""
    child = ground.rig.children[choice.choice(ground.worker_names)]
    child.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(choice.uniform(0.2, 4.0))
    finally:
        child.signal(signal.SIGCONT)


@register("kill-client", "SIGKILL of one producer", needs=("producers",))
async def kill_client(ground: Ground, choice: random.Random) -> None:
    """Kills a producer and starts it again, with the same name and the next number."""
    name = choice.choice(ground.producer_names)
    await ground.rig.children[name].kill()
    ground.start_producer(name)


@register("failpoint", "an archiver that kills itself at a named point", needs=("workers",))
async def failpoint(ground: Ground, choice: random.Random) -> None:
    """Starts the archiver armed, waits for its death, and starts it again."""
    name = ground.worker_of("archiver")
    await ground.rig.children[name].kill()
    point = choice.choice(FAILPOINTS)
    armed = await ground.start_worker(name, failpoints=f"{point}=kill:{choice.randint(1, 3)}")
    armed.is_expected_to_end = True
    ground.count(f"failpoint {point}", was_hit := await armed.wait(_DEATH_S) is not None)
    if not was_hit:
        await armed.kill()
    await ground.start_worker(name)


@register("proxy", "a connection that is slow, in pieces, reset or silent", needs=("proxy",))
async def proxy(ground: Ground, choice: random.Random) -> None:
    """Does to every connection through the proxy what its mode says, for up to three seconds."""
    between = ground.proxy
    mode = choice.choice(("delay", "split", "reset", "half-open", "refuse"))
    if mode == "reset":
        between.reset()
        return
    between.set(cast("Mode", mode), delay_s=choice.choice((0.01, 0.2)))
    if mode == "refuse":
        between.reset()
    try:
        await asyncio.sleep(choice.uniform(0.3, 3.0))
    finally:
        between.set("through")


@register("clock", "one of our processes with its clock an hour or ten days off", needs=("workers", "producers"))
async def clock(ground: Ground, choice: random.Random) -> None:
    """Runs a worker or a producer with a wrong clock for some seconds."""
    shift_s = choice.choice(_CLOCKS_S)
    if choice.random() < 0.5:
        name = choice.choice(ground.worker_names)
        await ground.rig.children[name].kill()
        await ground.start_worker(name, clock_s=shift_s)
        await asyncio.sleep(choice.uniform(0.5, 3.0))
        await ground.rig.children[name].kill()
        await ground.start_worker(name)
    else:
        name = choice.choice(ground.producer_names)
        await ground.rig.children[name].stop()
        ground.start_producer(name, clock_s=shift_s)
        await asyncio.sleep(choice.uniform(0.5, 3.0))
        await ground.rig.children[name].stop()
        ground.start_producer(name)


@register("second-archiver", "a second archiver that takes over when the first is killed", needs=("workers",))
async def second_archiver(ground: Ground, choice: random.Random) -> None:
    """Starts a second archiver, kills the first, and gives the work back."""
    name = ground.worker_of("archiver")
    async with _second(ground):
        await asyncio.sleep(choice.uniform(0.0, 0.5))
        await ground.rig.children[name].kill()
        await asyncio.sleep(choice.uniform(0.5, 2.0))
        await ground.start_worker(name)


@register("late-archiver", "an archiver that sleeps, is replaced, and wakes up", needs=("workers",))
async def late_archiver(ground: Ground, choice: random.Random) -> None:
    """Stops the archiver at any moment, has another one go on, and wakes the first, whose commits must not count."""
    first = ground.rig.children[ground.worker_of("archiver")]
    first.signal(signal.SIGSTOP)
    try:
        # As if it ran on another machine: the lock is not the first one's any more, but the second's too.
        (ground.rig.lake / ".archiver.lock").unlink(missing_ok=True)
        async with _second(ground):
            await asyncio.sleep(choice.uniform(0.2, 2.0))
            first.signal(signal.SIGCONT)
            await asyncio.sleep(choice.uniform(0.5, 2.0))
    finally:
        first.signal(signal.SIGCONT)


@asynccontextmanager
async def _second(ground: Ground) -> AsyncGenerator[None]:
    """Another archiver while the block lasts; none is left where it does not come to serve."""
    second = ground.rig.spawn_worker("archiver", name="archiver-second")
    try:
        await ground.rig.wait_ready(second)
        yield
    finally:
        await second.kill()


def chosen_faults(names: str | None) -> list[str]:
    """Returns the names of a comma-separated list, or of every fault that is injected by default.

    Raises InvalidFieldError naming those known for one that is not.
    """
    for module in _MORE:
        importlib.import_module(module)
    if names is None:
        return sorted(name for name, fault in FAULTS.items() if fault.by_default)
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in FAULTS]
    if unknown:
        raise InvalidFieldError(
            f"there is no fault {unknown[0][:40]!r}", field="faults", hint=f"known are {', '.join(sorted(FAULTS))}"
        )
    return chosen
