"""nats-py's client, made to outlive what any publisher can send, and to close without a server.

The server passes on a subject that is not UTF-8 and a header block without an end; nats-py 2.16 ends its read loop
over either, so that one such message would silence every connection that it is delivered to, again after each
reconnect.  Here it arrives, with U+FFFD in place of what is not text, and is judged like any other message.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from nats.aio.client import Client

if TYPE_CHECKING:
    from nats.aio.msg import Msg


class TolerantClient(Client):
    """A client whose read loop survives malformed subjects and headers.

    Overrides methods that nats-py does not document; tests send such messages, and so guard an upgrade.
    """

    async def flush(self, timeout: int = 10) -> None:  # noqa: ASYNC109  the signature is nats-py's
        """Returns once the server has seen everything that was published and subscribed before the call."""
        # nats-py writes its PING at once, past the commands that still wait for its flusher: the answer would say
        # nothing about them.
        await self._flush_pending(force_flush=True)
        await super().flush(timeout)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        if not self.is_connected:
            # nats-py would write what is pending to a connection that is gone, and stop half-way over the error.
            self._pending = []
            self._pending_data_size = 0
        await super()._close(status, do_cbs)

    async def _process_pong(self) -> None:
        # The answer to a flush that was given up, by a cancel or for its time: nats-py would set a result that nobody
        # waits for any more, and end its read loop over the error.
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (IndexError, ValueError):
            return None

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg:
        message: Msg = super()._build_message(sid, _as_utf8(subject), _as_utf8(reply), data, headers)
        return message


def _as_utf8(raw: bytes) -> bytes:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return raw.decode("utf-8", "replace").encode()
    return raw
