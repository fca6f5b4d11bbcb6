"""The resolver's DuckDB: one connection over lake and live tail, one function at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from holdfast.lake.duck import Connection as LakeConnection

T = TypeVar("T")


class SqlRunner:
    """Runs functions over the lake and its live tail, on a thread of its own, in the order they are handed in.

    DuckDB uses threads of its own for one statement; one function at a time keeps its memory bounded.  What waits is
    bounded by the number of requests that the service lets in.  ``connection`` is the caller's to close, after
    :meth:`close`.
    """

    def __init__(self, connection: LakeConnection) -> None:
        self._connection = connection
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="holdfast-query")

    async def run(self, function: Callable[[LakeConnection], T]) -> T:
        """Returns what ``function`` makes of the connection, or raises what it raises.

        Each statement sees every row acknowledged before the call; several that must see the same rows belong into
        ``with connection.pinned():``.  Results are to be fetched inside the function.  A cancelled call leaves the
        function running to its end, unless it had not begun.
        """
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, self._connection)

    async def close(self) -> None:
        """Waits for the functions handed in."""
        await asyncio.to_thread(self._executor.shutdown)
