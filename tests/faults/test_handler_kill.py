"""Handlers that are killed at any step: each event has its children, its result and its receipt once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from holdfast.client import Holdfast, connect
from holdfast.schemas.failpoints import ENVIRONMENT
from holdfast.schemas.lineage import RECEIPT
from holdfast.workers.handler_floors import stats_of_handlers
from tests.integration.test_events import rows_of
from tests.running import dead_letters, eventually, running, settings_in, until_ready

if TYPE_CHECKING:
    from holdfast.schemas.rows import EventRow
    from tests.support import OwnServer

ROOT: Final = Path(__file__).parents[2]

JOBS: Final = 12

STEPS: Final = (
    "handler.before_run",
    "test.between_emits",
    "handler.after_run",
    "handler.after_result",
    "handler.before_ack",
)
"""Where a process dies, each in a process of its own, over the first event that it is handed."""

_PROCESS: Final = """
import asyncio, sys
from holdfast.client import connect
from holdfast.schemas.errors import InvalidFieldError
from holdfast.schemas.failpoints import failpoint

async def main():
    async with connect(sys.argv[1], agent="worker") as hf:
        async def work(event):
            await hf.emit("step", {"of": event.data["n"], "step": 1}, context={"made of": event.data["n"]})
            failpoint("test.between_emits")
            await asyncio.gather(*(hf.emit("step", {"of": event.data["n"], "step": 2}) for _ in range(2)))
            return {"did": event.data["n"]}

        async def refuse(event):
            raise InvalidFieldError("no such job", field="n")

        options = {"idempotent": True, "concurrency": 1, "ack_wait_s": 0.4}
        if sys.argv[2] != "refuse":
            hf.on("job", name="work", **options)(work)
        if sys.argv[2] != "work":
            hf.on("bad", name="refuse", **options)(refuse)
        await hf.ready()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


@asynccontextmanager
async def handler_process(url: str, what: str, kill_at: str = "") -> AsyncGenerator[asyncio.subprocess.Process]:
    """A process with handlers, which kills itself at a failpoint; killed at the end of the block if it still runs."""
    environment = {**os.environ, ENVIRONMENT: f"{kill_at}=kill" if kill_at else ""}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _PROCESS, url, what),
        env=environment,
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_B71_a_handler_that_is_killed_at_any_step_leaves_everything_once(
    own_server: OwnServer, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running(own_server.url, settings_in(tmp_path), ["resolver"]))
        hf = await stack.enter_async_context(connect(own_server.url, agent="sender"))
        doomed = [await stack.enter_async_context(handler_process(own_server.url, "work", step)) for step in STEPS]
        doomed.append(await stack.enter_async_context(handler_process(own_server.url, "refuse", "handler.after_bury")))
        for process in doomed:
            await until_ready(process)
        await eventually(lambda: _registered(hf, 2))
        jobs = [await hf.emit("job", {"n": number}) for number in range(JOBS)]
        bad = await hf.emit("bad")
        # Each dies over an event in hand, at its step.
        for process in doomed:
            assert await asyncio.wait_for(process.wait(), 20) == -signal.SIGKILL
        await stack.enter_async_context(handler_process(own_server.url, "both"))
        await eventually(lambda: _all_settled(hf), pause_s=0.05)

        rows = await rows_of(hf.connection, "default")
        children: dict[str, list[EventRow]] = {}
        for row in rows:
            children.setdefault(row.parent_event_id or "", []).append(row)
        for number, job in enumerate(jobs):
            found = Counter((row.name, row.data) for row in children[job.event_id] if row.name != RECEIPT)
            assert found == {
                ("step", b'{"of":%d,"step":1}' % number): 1,
                ("step", b'{"of":%d,"step":2}' % number): 2,
                ("job:result", b'{"did":%d}' % number): 1,
            }
            assert [row.name for row in children[job.event_id]].count(RECEIPT) == 1
            assert {row.root_event_id for row in children[job.event_id]} == {job.event_id}
        assert [row.name for row in children[bad.event_id]] == ["bad:error"]
        [letter] = await dead_letters(hf)
        assert (letter.code, letter.handler and letter.handler.name) == ("invalid_field", "refuse")
        assert len(rows) == JOBS * 6 + 2


async def _registered(hf: Holdfast, count: int) -> bool:
    return len(await stats_of_handlers(hf.connection)) == count


async def _all_settled(hf: Holdfast) -> bool:
    return all(state["pending"] == state["unsettled"] == 0 for state in await stats_of_handlers(hf.connection))
