"""nats-py's client, made to outlive what any publisher can send, and to close without a server.

The server passes on a subject that is not UTF-8 and a header block without an end; nats-py 2.16 ends its read loop
over either, so that one such message would silence every connection that it is delivered to, again after each
reconnect.  Here it arrives, with U+FFFD in place of what is not text, and is judged like any other message.  Frames
are taken apart by :mod:`holdfast.streams.frame_parser`, for the same reason.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from nats import errors
from nats.aio.client import Client
from nats.protocol.parser import AUTHORIZATION_VIOLATION, PERMISSIONS_ERR

from holdfast.streams.frame_parser import FrameParser

if TYPE_CHECKING:
    from nats.aio.client import Srv
    from nats.aio.msg import Msg

logger = logging.getLogger(__name__)


class TolerantClient(Client):
    """A client whose read loop survives malformed subjects and headers.

    Overrides methods that nats-py does not document; tests send such messages, and so guard an upgrade.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ps = FrameParser(self)
        self._has_ended = False

    async def flush(self, timeout: int = 10) -> None:  # noqa: ASYNC109  the signature is nats-py's
        """Returns once the server has seen everything that was published and subscribed before the call."""
        # nats-py writes its PING at once, past the commands that still wait for its flusher: the answer would say
        # nothing about them.
        await self._flush_pending(force_flush=True)
        await super().flush(timeout)

    # A cancel that meets a reconnect just as its attempt ends is lost in ``asyncio.wait_for`` up to Python 3.11, and
    # nats-py looks at nothing else: the closed client would go on for ever, and become connected again.

    async def _connect_to_server(self, s: Srv) -> None:
        self._require_open()
        # An attempt may fail after the connection stood: the server went while it greeted.  nats-py leaves that
        # connection to the garbage collector, an open file each time.
        transport: Any = self._transport
        if transport is not None:
            transport.close()
        await super()._connect_to_server(s)

    async def _process_connect_init(self) -> None:
        self._require_open()
        await super()._process_connect_init()
        self._require_open()

    def _require_open(self) -> None:
        if self._has_ended:
            self._status = Client.CLOSED
            transport: Any = self._transport
            if transport is not None:
                transport.close()
            raise asyncio.CancelledError

    async def _process_err(self, err_msg: str) -> None:
        # Whoever was connected and is sent away, since there are too many for instance, comes back later: nats-py would
        # close the client for good, and its process would live on in silence.
        is_final = any(word in err_msg for word in (PERMISSIONS_ERR, AUTHORIZATION_VIOLATION))
        if self.is_connected and self.options["allow_reconnect"] and not is_final:
            await self._process_op_err(errors.Error(f"nats: {err_msg}"))
        else:
            await super()._process_err(err_msg)

    async def _attempt_reconnect(self) -> None:
        try:
            await super()._attempt_reconnect()
        except asyncio.InvalidStateError:
            # The attempt that this one took the place of has told whoever waits for the end of both.
            logger.debug("a second reconnect was under way", exc_info=True)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        self._has_ended = status == Client.CLOSED
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

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        """As nats-py's, in a third of the time: that looks at every character of every name, 5.6 us a message."""
        headers: dict[str, str] = {}
        for line in raw.split(b"\r\n"):
            name, colon, value = line.partition(b":")
            if colon:
                key = _NAMES.get(name) or _header_name(name)
                if key is not None:
                    headers[key] = value.strip(_BLANKS).decode("utf-8", "replace")
        return headers

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


_NAMES: Final[dict[bytes, str]] = {}
"""Header names seen before, by their bytes: a dozen, unless somebody makes them up."""

_MOST_NAMES: Final = 256

_BLANKS: Final = b" \t\r\n"
"""What a value is trimmed of.  nats-py's ``strip`` takes a vertical tab away too, which in Nats-Subject is a character
of the subject like another."""


def _header_name(raw: bytes) -> str | None:
    """The text of a header's name, or None for what is none: not ASCII, or with white space in it."""
    try:
        name = raw.strip().decode("ascii")
    except UnicodeDecodeError:
        return None
    if name and name.split() != [name]:
        return None
    if name and len(_NAMES) < _MOST_NAMES:
        _NAMES[raw] = name
    return name


def _as_utf8(raw: bytes) -> bytes:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return raw.decode("utf-8", "replace").encode()
    return raw
