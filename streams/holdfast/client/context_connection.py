"""The connection of a context client: made with the first call, shared by all of them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from holdfast.client.store import Holdfast, connect

if TYPE_CHECKING:
    from holdfast.streams.connection_target import ConnectionTarget


class OwnedConnection:
    """A client of the SDK, entered and left by one task of its own, so that its resources stay lexical.

    A bare task: it outlives the call that happened to be first.  A loop that ends (``asyncio.run``) cancels it, which
    closes the connection.
    """

    def __init__(self, url: str | ConnectionTarget | None, namespace: str, agent: str) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Holdfast] = loop.create_future()
        # A failure is told to whoever waits; when nobody does any more, it is nobody's.
        self.ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())
        self._closing = asyncio.Event()
        self._owner = loop.create_task(self._own(url, namespace, agent), name="holdfast-context-client")

    @property
    def has_failed(self) -> bool:
        """Whether there is no connection and will be none: another attempt may have one."""
        return self.ready.done() and (self.ready.cancelled() or self.ready.exception() is not None)

    async def close(self) -> None:
        """Closes the connection and returns when it is closed."""
        self._closing.set()
        await asyncio.shield(self._owner)

    async def _own(self, url: str | ConnectionTarget | None, namespace: str, agent: str) -> None:
        try:
            async with connect(url, namespace, agent) as client:
                self.ready.set_result(client)
                await self._closing.wait()
        except Exception as error:
            if self.ready.done():
                raise
            self.ready.set_exception(error)
        finally:
            self.ready.cancel()
