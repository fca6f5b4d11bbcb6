"""What is opened in a thread is closed once, whenever the one who waits for it is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from holdfast.workers import opening
from holdfast.workers.opening import in_thread, open_in_thread


class Slow:
    """Something whose opening takes as long as the test wants."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.may_end = threading.Event()
        self.ended = threading.Event()
        self.done: list[str] = []

    def open(self) -> str:
        self.began.set()
        self.may_end.wait(10)
        self.done.append("opened")
        return "it"

    def close(self, opened: str) -> None:
        assert opened == "it"
        self.done.append("closed")
        self.ended.set()


async def _hold(stack: AsyncExitStack, slow: Slow) -> None:
    async with stack:
        assert await open_in_thread(stack, slow.open, slow.close) == "it"
        slow.done.append("used")


async def test_what_was_opened_is_closed_with_the_stack() -> None:
    slow = Slow()
    slow.may_end.set()
    await _hold(AsyncExitStack(), slow)
    assert slow.done == ["opened", "used", "closed"]


@pytest.mark.parametrize("cancels", [1, 3])
async def test_a_cancel_waits_for_the_thread_and_closes_what_it_opened(cancels: int) -> None:
    slow = Slow()
    task = asyncio.ensure_future(_hold(AsyncExitStack(), slow))
    await asyncio.to_thread(slow.began.wait)
    for _ in range(cancels):
        task.cancel()
        await asyncio.wait([task], timeout=0.05)
        assert not task.done()
    slow.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slow.done == ["opened", "closed"]
    assert task.cancelled()


async def test_a_thread_that_does_not_come_back_is_not_waited_for_and_closes_what_it_opens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening, "OUTLAST_S", 0.05)
    slow = Slow()
    task = asyncio.ensure_future(_hold(AsyncExitStack(), slow))
    await asyncio.to_thread(slow.began.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slow.done == []
    slow.may_end.set()
    await asyncio.to_thread(slow.ended.wait, 10)
    assert slow.done == ["opened", "closed"]


async def test_an_opening_that_fails_has_nothing_closed() -> None:
    def fail() -> str:
        raise ValueError("no")

    closed: list[str] = []
    stack = AsyncExitStack()
    with pytest.raises(ValueError, match="no"):
        await open_in_thread(stack, fail, closed.append)
    await stack.aclose()
    assert closed == []


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancel_waits_for_work_in_a_thread(*, fails: bool, caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow()

    def work() -> str:
        slow.open()
        if fails:
            raise ValueError("no")
        return "it"

    run: Callable[[], str] = work
    task = asyncio.ensure_future(in_thread(run))
    await asyncio.to_thread(slow.began.wait)
    task.cancel()
    await asyncio.wait([task], timeout=0.05)
    assert not task.done()
    slow.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slow.done == ["opened"]
    assert ("failed besides" in caplog.text) is fails
