"""Processes of their own for parties that would have one in production: asked and answered by JSON lines.

A child ends when its standard input does, so it cannot outlive the benchmark.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec

from benchmarks.records import ROOT

ANSWER_S: Final = 120.0
_STOP_S: Final = 30.0
_LINE_BYTES: Final = 1 << 20

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class Child:
    """A running child."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """Sends a request (none: only waits) and returns the child's next answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if request is not None:
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            await self._process.stdin.drain()
        async with asyncio.timeout(ANSWER_S):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the child process ended; its error is above")
        return msgspec.json.decode(line, type=dict[str, Any])


@asynccontextmanager
async def child(module: str, *arguments: str) -> AsyncGenerator[Child]:
    """Runs ``python -m module`` while the block lasts."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE_BYTES,
    )
    try:
        yield Child(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def serve(first: dict[str, Any], handler: Handler) -> None:
    """In the child: says ``first``, then answers each request by ``handler`` until standard input ends."""
    reader = asyncio.StreamReader(limit=_LINE_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    _say(first)
    while line := await reader.readline():
        _say(await handler(msgspec.json.decode(line, type=dict[str, Any])))


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()
