"""A start of the workers that is cancelled leaves nothing behind: no thread, lock, open file, task or connection."""

from __future__ import annotations

import asyncio
import os
import threading
import types
from collections import Counter
from collections.abc import Coroutine, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.lake.index import LakeIndex
from holdfast.streams.tail import StreamTail
from holdfast.workers import resolver as resolver_module
from holdfast.workers import system as system_module
from holdfast.workers.archiver_lock import take_lock
from holdfast.workers.index_directory import claim_index_directory
from holdfast.workers.settings import WORKERS, WorkerSettings
from holdfast.workers.system import run_workers
from tests.running import Acknowledged, eventually, own_server, running, settings_in, target_of
from tests.support import LIMIT_S

if TYPE_CHECKING:
    from tests.support import OwnServer


class Before:
    """What there was before a start, which is all that there may be after it was cancelled."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._sockets = _sockets()
        self._threads = _threads()
        self._tasks = asyncio.all_tasks()

    async def is_all(self) -> None:
        async def is_gone() -> bool:
            return _sockets() <= self._sockets and _threads() <= self._threads

        try:
            await eventually(is_gone)
        except TimeoutError:
            pytest.fail(f"there are {_sockets()} sockets and {_threads()}, of {self._sockets} and {self._threads}")
        assert asyncio.all_tasks() == self._tasks
        for folder in (self._settings.lake, self._settings.index.parent):
            assert [path for path in _open_paths() if path.startswith(str(folder))] == []
        directory, claim = claim_index_directory(self._settings.index)
        os.close(claim)
        assert directory == self._settings.index
        if self._settings.lake.is_dir():
            async with asyncio.timeout(LIMIT_S):
                os.close(await take_lock(self._settings.lake, None))


def _open_paths() -> list[str]:
    found: list[str] = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(link.readlink()))
        except FileNotFoundError:
            continue  # the one that lists them
    return found


def _sockets() -> int:
    return sum(path.startswith("socket:") for path in _open_paths())


def _threads() -> Counter[str]:
    # Threads of the loop's own executor stay for its next work.
    return Counter(thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_"))


@types.coroutine
def cancelled_at(start: Coroutine[Any, Any, Any], number: int) -> Generator[Any, Any, int]:
    """Runs ``start`` and cancels this task where it waits for the ``number``-th time; returns how often it waited."""
    waits = 0
    error: BaseException | None = None
    while True:
        try:
            waited_for = start.send(None) if error is None else start.throw(error)
        except StopIteration:
            return waits
        error = None
        waits += 1
        if waits == number:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        try:
            yield waited_for
        except BaseException as raised:  # noqa: BLE001  handed on to whom it belongs
            error = raised


async def _start_once(server: OwnServer, folder: Path) -> None:
    """Has the libraries open what they keep for as long as the process lives, as deltalake's runtime does."""
    async with running(server.url, settings_in(folder / "other")):
        pass


async def _start(server: OwnServer, settings: WorkerSettings, number: int) -> bool:
    """Starts all workers, cancelled at one wait; returns whether there was such a one."""
    workers = run_workers(target_of(server.url), WORKERS, settings)
    before = Before(settings)
    try:
        waits = await cancelled_at(workers.__aenter__(), number)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        await before.is_all()
        return True
    await workers.__aexit__(None, None, None)
    await before.is_all()
    # Before Python 3.12 a wait_for that ends in that moment swallows a cancel: then the start goes on.
    return waits >= number


@pytest.mark.timeout(600)
async def test_a_start_cancelled_where_it_waits_leaves_nothing_behind(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    async with own_server(tmp_path) as server:
        await _start_once(server, tmp_path)
        number = 1
        while await _start(server, settings, number):
            number += 1
        assert number > 15
        acknowledged = Acknowledged()
        async with running(server.url, settings):
            await acknowledged.add(server.url, 5)
            await acknowledged.check_by_sdk(server.url)


async def test_a_start_cancelled_while_the_index_is_opened_gives_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_in(tmp_path)
    at_work, may_end, has_ended = threading.Event(), threading.Event(), threading.Event()

    class SlowIndex(LakeIndex):
        @classmethod
        def open(cls, path: str | Path) -> SlowIndex:
            at_work.set()
            may_end.wait(20)
            try:
                return super().open(path)
            finally:
                has_ended.set()

    async with own_server(tmp_path) as server:
        await _start_once(server, tmp_path)
        monkeypatch.setattr(system_module, "LakeIndex", SlowIndex)
        before = Before(settings)
        await _cancel_in_thread(_run_until_cancelled(server, settings), at_work, may_end)
        await asyncio.to_thread(has_ended.wait)
        await before.is_all()
        async with running(server.url, settings, ["resolver"]):
            assert [path.name for path in settings.index.parent.iterdir() if path.is_dir()] == [settings.index.name]


async def test_a_start_cancelled_while_the_live_tail_is_opened_closes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_in(tmp_path)
    at_work, may_end, has_ended = threading.Event(), threading.Event(), threading.Event()

    def open_slowly(target: Any) -> StreamTail:
        tail = StreamTail(target)
        at_work.set()
        may_end.wait(20)
        has_ended.set()
        return tail

    async with own_server(tmp_path) as server:
        await _start_once(server, tmp_path)
        monkeypatch.setattr(resolver_module, "open_tail", open_slowly)
        before = Before(settings)
        await _cancel_in_thread(_run_until_cancelled(server, settings), at_work, may_end)
        await asyncio.to_thread(has_ended.wait)
        await before.is_all()


async def _cancel_in_thread(
    start: Coroutine[Any, Any, None], at_work: threading.Event, may_end: threading.Event
) -> None:
    """Cancels a start while a thread of it is at work, which may end only after that."""
    starting = asyncio.ensure_future(start)
    await asyncio.to_thread(at_work.wait)
    starting.cancel()
    asyncio.get_running_loop().call_later(0.2, may_end.set)
    with pytest.raises(asyncio.CancelledError):
        await starting


async def _run_until_cancelled(server: OwnServer, settings: WorkerSettings) -> None:
    async with run_workers(target_of(server.url), WORKERS, settings) as workers:
        await workers.wait_failed()
