"""The background loop: blocking calls from any thread, one client for all, forks, interrupts and the end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import pytest

from holdfast.client import background
from holdfast.client.background import BackgroundLoop, ClientShare, background_loop, close_background_loop
from holdfast.schemas.errors import (
    ClosedError,
    InputError,
    InvalidNameError,
    InvalidRefError,
    UnavailableError,
    UnknownOutcomeError,
)
from tests.running import eventually, free_address
from tests.support import LIMIT_S

if TYPE_CHECKING:
    from holdfast.client import Holdfast
    from tests.conftest import StartServer


@pytest.fixture(autouse=True)
def no_loop_left() -> Generator[None]:
    yield
    close_background_loop()
    assert not [thread for thread in threading.enumerate() if thread.name == "holdfast-background"]


@pytest.fixture
def share(nats_server: str, namespace: str) -> Generator[ClientShare]:
    opened = ClientShare(nats_server, namespace, "tester")
    yield opened
    opened.close()


async def itself(hf: Holdfast) -> Holdfast:
    return hf


def run_script(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that has no event loop, as a user would."""
    return subprocess.run(
        # Python 3.12 warns of every fork beside threads: that it works is what is tested.
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_a_call_blocks_for_its_result_and_raises_its_error(share: ClientShare) -> None:
    ref = share.call(lambda hf: hf.put({"goal": "book"}))
    assert share.call(lambda hf: hf.resolve(ref)).body == {"goal": "book"}
    with pytest.raises(InvalidRefError) as caught:
        share.call(lambda hf: hf.resolve("no reference"))
    assert caught.value.field == "ref"


def test_threads_and_shares_use_one_client(share: ClientShare, nats_server: str, namespace: str) -> None:
    shares = [ClientShare(nats_server, namespace, "tester") for _ in range(16)]
    together = threading.Barrier(16)

    def first_call(mine: ClientShare) -> Holdfast:
        together.wait(LIMIT_S)
        return mine.call(itself)

    with ThreadPoolExecutor(16) as threads:
        clients = set(threads.map(first_call, shares))
    assert clients == {share.call(itself)}
    other = ClientShare(nats_server, namespace, "another agent")
    assert other.call(itself) not in clients
    for each in (*shares, other):
        each.close()


def test_the_last_share_to_close_closes_the_connection(nats_server: str, namespace: str) -> None:
    first, second = (ClientShare(nats_server, namespace) for _ in range(2))
    client = first.call(itself)
    assert second.call(itself) is client
    first.close()
    first.close()
    assert second.call(lambda hf: hf.put("still open")).startswith("ctx_")
    with pytest.raises(ClosedError, match="closed"):
        first.call(itself)
    second.close()
    assert client.connection.client.is_closed
    third = ClientShare(nats_server, namespace)
    assert third.call(itself) is not client
    third.close()


def test_a_connection_that_was_closed_for_good_is_not_handed_out_again(nats_server: str, namespace: str) -> None:
    first, second = (ClientShare(nats_server, namespace) for _ in range(2))
    dead = first.call(itself)
    first.call(lambda hf: hf.connection.client.close())
    with pytest.raises(ClosedError):
        background_loop().call(dead.put("lost"))
    assert second.call(lambda hf: hf.put("still open")).startswith("ctx_")
    assert first.call(itself) is second.call(itself) is not dead
    first.close()
    second.close()


def test_a_share_that_was_never_used_opens_nothing() -> None:
    ClientShare("nats://127.0.0.1:1").close()
    assert not [thread for thread in threading.enumerate() if thread.name == "holdfast-background"]
    with pytest.raises(InvalidNameError):
        ClientShare(namespace="")


def test_a_call_on_the_loops_own_thread_is_refused_instead_of_waiting_for_itself(share: ClientShare) -> None:
    async def call_again(hf: Holdfast) -> Holdfast:
        return share.call(itself)

    with pytest.raises(InputError, match="own thread") as caught:
        share.call(call_again)
    assert "await" in str(caught.value)

    async def await_again(hf: Holdfast) -> Holdfast:
        return await share.run(itself)

    assert share.call(await_again) is share.call(itself)


def test_an_interrupt_cancels_the_coroutine(share: ClientShare) -> None:
    # Whoever runs the tests in the background of a shell has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended: list[str] = []

    async def wait_for_ever(_: Holdfast) -> None:
        os.kill(os.getpid(), signal.SIGINT)  # as a user who presses Ctrl-C while the call waits
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    try:
        with pytest.raises(KeyboardInterrupt):
            share.call(wait_for_ever)
    finally:
        signal.signal(signal.SIGINT, before)
    share.call(itself)  # one turn of the loop
    assert ended == ["cancelled"]


async def test_awaiting_from_another_loop_does_not_block_it(share: ClientShare) -> None:
    released = threading.Event()

    async def until_released(hf: Holdfast) -> str:
        await asyncio.to_thread(released.wait, LIMIT_S)
        return hf.agent

    waiting = asyncio.create_task(share.run(until_released))
    await share.run(itself)  # this loop goes on while the other call waits
    assert not waiting.done()
    released.set()
    assert await waiting == "tester"
    await share.aclose()


async def test_a_cancel_of_the_awaiting_task_reaches_the_coroutine(share: ClientShare) -> None:
    begun, ended = threading.Event(), threading.Event()

    async def wait_for_ever(_: Holdfast) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(share.run(wait_for_ever))
    assert await asyncio.to_thread(begun.wait, LIMIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(ended.wait, LIMIT_S)
    await share.aclose()


async def test_closing_the_loop_tells_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "DRAIN_S", 0.05)
    loop = BackgroundLoop()
    begun = threading.Semaphore(0)

    async def wait_for_ever() -> None:
        begun.release()
        await asyncio.Event().wait()

    blocked = asyncio.create_task(asyncio.to_thread(loop.call, wait_for_ever()))
    awaiting = asyncio.create_task(loop.run(wait_for_ever()))
    for _ in range(2):
        assert await asyncio.to_thread(begun.acquire, timeout=LIMIT_S)
    await asyncio.to_thread(loop.close)
    for task in (blocked, awaiting):
        with pytest.raises(UnknownOutcomeError, match="closed before"):
            await task
    with pytest.raises(ClosedError, match="is closed"):
        loop.call(wait_for_ever())


def test_a_call_under_way_may_end_while_the_loop_closes() -> None:
    loop = BackgroundLoop()
    begun, closing = threading.Event(), threading.Event()

    async def last_words() -> str:
        begun.set()
        await asyncio.to_thread(closing.wait, LIMIT_S)
        return "said"

    with ThreadPoolExecutor(1) as thread:
        said = thread.submit(loop.call, last_words())
        assert begun.wait(LIMIT_S)
        threading.Timer(0.01, closing.set).start()
        loop.close()
        assert said.result(LIMIT_S) == "said"


def test_after_the_loop_was_closed_the_next_call_begins_another(share: ClientShare) -> None:
    before = share.call(itself)
    first = background_loop()
    close_background_loop()
    assert before.connection.client.is_closed
    assert share.call(itself) is not before
    assert background_loop() is not first


async def test_a_server_that_comes_later_is_found_by_the_next_call(start_server: StartServer, namespace: str) -> None:
    nobody = ClientShare(await free_address(), namespace)
    with pytest.raises(UnavailableError, match="no NATS server answers"):
        await nobody.run(itself)
    with pytest.raises(UnavailableError, match="no NATS server answers"):
        await nobody.run(itself)
    await nobody.aclose()

    server = await start_server()
    url = server.url
    await server.stop()
    share = ClientShare(url, namespace)
    with pytest.raises(UnavailableError):
        await share.run(itself)
    await server.start(with_streams=False)
    assert (await share.run(lambda hf: hf.put("here"))).startswith("ctx_")
    await share.aclose()


async def test_closing_waits_for_what_was_written(nats_server: str, namespace: str, hf: Holdfast) -> None:
    share = ClientShare(nats_server, namespace)
    write = share.start(lambda client: client.put({"n": 1}))
    await eventually(write.done)
    await share.aclose()
    assert (await hf.resolve(write.result())).body == {"n": 1}


FORK: Final = """
import os, sys, time
from holdfast.client.background import ClientShare, background_loop

share = ClientShare(sys.argv[1], sys.argv[2])
async def itself(hf): return hf
parents = share.call(itself)
ref = share.call(lambda hf: hf.put({"by": "parent"}))
pid = os.fork()
if pid == 0:
    childs = share.call(itself)
    assert childs is not parents
    assert childs.connection.client.client_id != parents.connection.client.client_id
    assert share.call(lambda hf: hf.resolve(ref)).body == {"by": "parent"}
    share.call(lambda hf: hf.put({"by": "child"}))
    share.close()
    sys.exit(0)  # as an ordinary program ends, with its exit handlers
_, status = os.waitpid(pid, 0)
assert status == 0, status
# The parent's connection is as it was: same client, still answering.
assert share.call(itself) is parents
assert share.call(lambda hf: hf.put({"by": "child"})).startswith("ctx_")
assert parents.connection.reconnects == 0
assert parents.connection.client.is_connected
print("both worked")
"""


def test_a_forked_child_has_a_loop_and_a_connection_of_its_own(nats_server: str, namespace: str) -> None:
    done = run_script(FORK, nats_server, namespace)
    assert (done.returncode, done.stdout, done.stderr) == (0, "both worked\n", "")


EXIT: Final = """
import sys, threading
from holdfast.client.background import ClientShare

share = ClientShare(sys.argv[1], sys.argv[2])
print(share.call(lambda hf: hf.put({"by": "a program that just ends"})))
threading.Thread(target=lambda: share.call(lambda hf: hf.put({"by": "its last thread"}))).start()
"""


def test_a_program_may_simply_end(nats_server: str, namespace: str) -> None:
    started = time.monotonic()
    done = run_script(EXIT, nats_server, namespace)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ctx_context_")
    assert time.monotonic() - started < background.CLOSE_S
