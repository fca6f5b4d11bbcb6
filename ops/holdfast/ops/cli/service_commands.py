"""``holdfast up`` and ``holdfast worker``: what runs until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from importlib.abc import MetaPathFinder
from typing import Annotated, Final, Literal, cast, get_args

import typer

from holdfast.ops.cli import exit_codes, output
from holdfast.ops.cli.invocation import Invocation, command
from holdfast.schemas.errors import InvalidFieldError
from holdfast.workers.settings import WORKERS, WorkerName

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(
        app,
        "up",
        examples=(
            "holdfast up",
            "holdfast up --data ./data --port 4222 --json",
            "holdfast up --nats-url nats://host:4222   (workers here, server there)",
            "holdfast up --nats-url nats://a:4222,nats://b:4222,nats://c:4222 --replicas 3",
        ),
        quiet=False,
        uvloop=True,
    )(up)
    command(
        app,
        "worker",
        examples=(
            "holdfast worker archiver --nats-url nats://host:4222 --data /srv/holdfast",
            "HOLDFAST_NATS_URL=nats://nats:4222 holdfast worker resolver",
        ),
        quiet=False,
        uvloop=True,
    )(worker)


async def up(
    invocation: Invocation,
    port: Annotated[int | None, typer.Option("--port", help="Port of the embedded server (a free one).")] = None,
    monitor_port: Annotated[
        int | None, typer.Option("--monitor-port", help="Its monitoring port (a free one).")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", help="Serve GET /metrics on this port of 127.0.0.1 (0: a free one).")
    ] = None,
    durability: Annotated[
        Literal["durable", "fast"] | None,
        typer.Option("--durability", help="Sync to disk before each acknowledgement, or let the system decide?"),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option("--replicas", help="Copies of each stream, on nodes of a cluster (1).")
    ] = None,
    accept_lost_streams: Annotated[
        bool,
        typer.Option("--accept-lost-streams", help="Create streams anew that the lake knows and the server has lost."),
    ] = False,
) -> int:
    """Run a server on the data directory and every worker, until SIGTERM or Ctrl-C.

    With --json one line says when it serves. A first signal drains: no new work, finish what is in hand, stop the
    workers in reverse order of their start, then the server. A second one ends it at once; nothing acknowledged is
    lost.
    """
    invocation.add_flags({"port": port, "monitor_port": monitor_port, "durability": durability, "replicas": replicas})
    loaded = invocation.loaded
    from holdfast.ops.serving import serve_up

    async with AsyncExitStack() as stack:
        stack.enter_context(without_pandas())
        stop = await stack.enter_async_context(stop_signals())
        serving = await stack.enter_async_context(serve_up(loaded, accept_lost_streams=accept_lost_streams))
        metrics_url = None
        if metrics_port is not None:
            from holdfast.ops.metrics_http import HOST, serve_metrics

            port_served = await stack.enter_async_context(serve_metrics(serving.target, metrics_port))
            metrics_url = f"http://{HOST}:{port_served}/metrics"
        if invocation.json:
            ready = {"ready": True, "nats_url": serving.target.url, "data": str(serving.data)}
            output.write_json(ready if metrics_url is None else {**ready, "metrics_url": metrics_url})
        else:
            _greet(serving.target.url, str(serving.data), embedded=serving.embedded)
            if metrics_url is not None:
                output.write_line(f"  metrics  {metrics_url}")
        output.flush()
        await stop.wait()
    return exit_codes.OK


async def worker(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(WORKERS)}.")],
    replicas: Annotated[
        int | None, typer.Option("--replicas", help="Copies of each stream, on nodes of a cluster (1).")
    ] = None,
) -> int:
    """Run one worker against a running server, until SIGTERM or Ctrl-C.

    Workers of one system share the data directory, which holds the lake. Several of a kind may run: resolvers share
    the requests, of several archivers one is active.
    """
    if name not in get_args(WorkerName):
        raise InvalidFieldError(f"there is no worker {name[:40]!r}", field="name", hint=f"one of {', '.join(WORKERS)}")
    chosen = cast(WorkerName, name)
    invocation.add_flags({"replicas": replicas})
    loaded = invocation.loaded
    from holdfast.ops.serving import serve_worker

    with without_pandas():
        async with stop_signals() as stop, serve_worker(loaded, chosen) as serving:
            if invocation.json:
                output.write_json({"ready": True, "worker": name, "nats_url": serving.target.url})
            else:
                output.remark(f"{name} serves {serving.target.url}; Ctrl-C stops it")
            output.flush()
            await stop.wait()
    return exit_codes.OK


@contextmanager
def without_pandas() -> Generator[None]:
    """Keeps a process that runs workers from importing pandas while the block lasts.

    Wherever pandas is installed, pyarrow imports it with the first array that is made: some 50 MB that no worker uses.
    """
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _NoPandas(MetaPathFinder):
    # Not None in sys.modules: DuckDB takes that for the module.
    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError("pandas is left out of this process, whose work does not need it", name=fullname)


class Stop:
    """Whether this process has been told to stop."""

    def __init__(self, task: asyncio.Task[object]) -> None:
        self._task = task
        self._event = asyncio.Event()
        self._serving = False

    async def wait(self) -> None:
        """Returns when the first signal has come.  From the first call on, signals no longer cancel the task."""
        self._serving = True
        await self._event.wait()

    def request(self, number: int) -> None:
        """Notes a signal: the first one stops, a second one ends the process here and now."""
        if self._event.is_set():
            # The embedded server dies with this process; what was acknowledged is on the disk.
            os._exit(128 + number)
        self._event.set()
        if not self._serving:
            self._task.cancel()

    @property
    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self._event.is_set()


@asynccontextmanager
async def stop_signals() -> AsyncGenerator[Stop]:
    """Yields what SIGTERM and SIGINT set while the block lasts.

    A signal before the block waits for one cancels it: a start that is cut short has been cleaned up and is no error.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    stop = Stop(task)
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop.request, number)
    try:
        yield stop
    except asyncio.CancelledError:
        if not stop.is_set:
            raise
        task.uncancel()
    finally:
        for number in _STOP_SIGNALS:
            loop.remove_signal_handler(number)


def _greet(nats_url: str, data: str, *, embedded: bool) -> None:
    server = "embedded nats-server" if embedded else "workers on a server elsewhere"
    lines = (
        f"Holdfast is up: {server}, {', '.join(WORKERS)}",
        f"  NATS   {nats_url}",
        f"  data   {data}",
        "",
        "Try, in another terminal:" + ("" if _is_default(data) else f"   (export HOLDFAST_DATA={data})"),
        '  holdfast put \'{"goal": "book a flight"}\' --kind plan',
        "  holdfast stats",
        "  holdfast sql --live 'SELECT kind, count(*) FROM contexts GROUP BY ALL'",
        "",
        "Ctrl-C drains and stops; a second one stops at once.",
    )
    for line in lines:
        output.write_line(line)


def _is_default(data: str) -> bool:
    from holdfast.streams.local_server import default_data_directory

    return data == str(default_data_directory())
