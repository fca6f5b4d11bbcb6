"""Fixtures: a real nats-server, isolation by namespace, recorded traces; the profiles of hypothesis.

``HOLDFAST_TEST_NATS_URL`` names a server to use instead of one of our own; tests that restart or damage a server start
one each, always.  ``HYPOTHESIS_PROFILE=thorough`` tries twenty times as many examples.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings

from holdfast.client import Holdfast, connect
from holdfast.lake import Lake
from holdfast.lake.index import LakeIndex
from holdfast.schemas import failpoints
from holdfast.streams.connection import Connection, open_connection
from holdfast.streams.topology import ensure_topology
from tests.support import OwnServer

if TYPE_CHECKING:
    from holdfast.client.handlers import Handlers

_QUIET = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)
settings.register_profile("dev", max_examples=50, deadline=None, suppress_health_check=_QUIET)
settings.register_profile("thorough", max_examples=1_000, deadline=None, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

StartServer = Callable[[], Awaitable[OwnServer]]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def nats_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[str]:
    """The address of a durable server with Holdfast's streams, shared by all tests: stay in your namespace."""
    external = os.environ.get("HOLDFAST_TEST_NATS_URL")
    if external:
        async with open_connection(external) as connection:
            await ensure_topology(connection)
        yield external
        return
    server = OwnServer(tmp_path_factory.mktemp("nats") / "data")
    await server.start()
    try:
        yield server.url
    finally:
        await server.stop()


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """An empty lake."""
    return Lake.open(tmp_path / "lake", create=True)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[LakeIndex]:
    """An index that has taken in nothing yet."""
    with LakeIndex.open(tmp_path / "index") as opened:
        yield opened


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test has."""
    return f"t{uuid.uuid4().hex}"


@pytest_asyncio.fixture
async def connection(nats_server: str) -> AsyncIterator[Connection]:
    """A connection to the shared server."""
    async with open_connection(nats_server, name="test") as opened:
        yield opened


@pytest_asyncio.fixture
async def hf(nats_server: str, namespace: str) -> AsyncIterator[Holdfast]:
    """A client of the test's own namespace on the shared server."""
    async with connect(nats_server, namespace=namespace, agent="tester") as client:
        yield client


@pytest_asyncio.fixture
async def handlers(hf: Holdfast) -> AsyncIterator[Handlers]:
    """The handlers of that client, closed before it."""
    yield hf.handlers
    await hf.handlers.close(0.0)


@pytest_asyncio.fixture
async def start_server(tmp_path: Path) -> AsyncIterator[StartServer]:
    """Starts a server of the test's own, with streams; stopped at the end."""
    async with AsyncExitStack() as stack:
        started = 0

        async def start() -> OwnServer:
            nonlocal started
            started += 1
            server = OwnServer(tmp_path / f"nats{started}")
            stack.push_async_callback(server.stop)
            await server.start()
            return server

        yield start


@pytest_asyncio.fixture
async def own_server(start_server: StartServer) -> OwnServer:
    """One server of the test's own, with streams."""
    return await start_server()


@pytest.fixture
def traces() -> Path:
    """The folder of recorded agent traces; skips where there is none."""
    named = os.environ.get("HOLDFAST_TEST_DATA")
    path = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no recorded traces: set HOLDFAST_TEST_DATA to their folder")
    return path


@pytest.fixture(autouse=True)
def no_failpoint_left() -> Generator[None]:
    """Disarms what a test armed."""
    yield
    failpoints.disarm_all()
