"""nats-py's client, made to outlive what any publisher can send, and to close without a server.

The server passes on a subject that is not UTF-8 and a header block without an end; nats-py 2.16 ends its read loop
over either, so that one such message would silence every connection that it is delivered to, again after each
reconnect.  Here it arrives, with U+FFFD in place of what is not text, and is judged like any other message.  Frames
are taken apart by :mod:`holdfast.streams.frame_parser`, for the same reason.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from nats import errors
from nats.aio.client import Client
from nats.protocol.parser import AUTHORIZATION_VIOLATION, PERMISSIONS_ERR

from holdfast.schemas.errors import UnavailableError
from holdfast.streams.frame_parser import FrameParser
from holdfast.streams.wire import H_STATUS

if TYPE_CHECKING:
    from nats.aio.client import Srv
    from nats.aio.msg import Msg

logger = logging.getLogger(__name__)

Sink = Callable[[bytes, bytes, bytes, "bytes | None"], bool]
"""Takes a message at once, or leaves it to the subscription's callback; see :meth:`TolerantClient.divert`."""


class AwayError(UnavailableError, errors.ConnectionReconnectingError):
    """There is no connection just now, so that nothing was sent.

    Also an error of nats-py's, for what knows no others: whoever answers a request there does.
    """


class TolerantClient(Client):
    """A client whose read loop survives malformed subjects and headers.

    Overrides methods that nats-py does not document; tests send such messages, and so guard an upgrade.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sinks: dict[int, Sink] = {}
        """Who takes the messages of a subscription at once; see :meth:`divert`."""
        self._ps = FrameParser(self)
        self._has_ended = False
        self._flushed: asyncio.Future[None] | None = None

    def divert(self, subject: str, sink: Sink) -> None:
        """Has ``sink`` called with each message of the subscriptions to ``subject``, until they end.

        It is called with subject, reply subject, payload and header block as the server sent them, from within the
        read loop: it must neither wait nor raise; a message that it raises over is lost.  What it returns False for
        goes to the subscription's callback.
        """
        for sid, subscription in self._subs.items():
            if subscription.subject == subject:
                self.sinks[sid] = sink

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self.sinks.pop(sid, None)
        super()._remove_sub(sid, max_msgs)

    def publish_now(
        self, subject: str, payload: bytes, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> bool:
        """Publishes a message if that can be done at once; returns False, with nothing done, if :meth:`publish` must.

        That waits while the server takes nothing, and says what is wrong with a message that may not be sent.  Both
        keep one order.  This costs less: no check of a name that has passed it, no copy of the payload.
        """
        queue = self._flush_queue
        flusher = cast("asyncio.Task[None] | None", self._flusher_task)
        size = len(payload)
        if (
            self._status != Client.CONNECTED
            or queue is None
            or flusher is None
            or flusher.done()
            or size > self._max_payload
            or self._pending_data_size + size > self._max_pending_size
            or not subject
            or _NOT_IN_SUBJECT.search(subject)
            or (reply and _NOT_IN_SUBJECT.search(reply))
        ):
            return False
        if headers is None:
            command = f"PUB {subject} {reply} {size}\r\n".encode()
        else:
            block = _header_block(headers)
            if block is None:
                return False
            command = b"HPUB %b %b %d %d\r\n%b" % (
                subject.encode(),
                reply.encode(),
                len(block),
                len(block) + size,
                block,
            )
        self._pending += (command, payload, _LINE_END)
        self._pending_data_size += len(command) + size + 2
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += size
        if queue.empty():
            queue.put_nowait(self._settled())
        return True

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Publishes a message, as nats-py does, but for that nothing is kept for the next connection.

        Waits while more is pending than ``pending_size``; a cancel meanwhile does not recall the message, the end of
        the connection drops it.  Raises AwayError, with nothing sent, while there is no connection.
        """
        if not self.publish_now(subject, payload, reply, headers):
            if not self.is_connected and not self.is_closed:
                raise AwayError("there is no connection to the NATS server", hint="check that the server runs")
            await super().publish(subject, payload, reply, headers)
            if self._pending_data_size > self._max_pending_size:
                await self._flush_pending(force_flush=True)

    async def _send_command(self, cmd: bytes, priority: bool = False) -> None:
        # nats-py waits here when much is pending, also in the unsubscribing of who wants to leave.  Only who publishes
        # has much to send.
        if priority:
            self._pending.insert(0, cmd)
        else:
            self._pending.append(cmd)
        self._pending_data_size += len(cmd)

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        """Has the flusher send what is pending; with ``force_flush``, waits until it has, or the connection ends.

        nats-py's takes a cancel for the end of its wait and goes on, and waits for a connection that is gone.
        """
        queue = self._flush_queue
        flusher = cast("asyncio.Task[None] | None", self._flusher_task)
        if not self.is_connected or queue is None or flusher is None or flusher.done():
            return await super()._flush_pending()
        if not force_flush:
            # Whoever is in the queue already has all of it sent.
            if queue.empty():
                queue.put_nowait(self._settled())
            return None
        flushed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await queue.put(flushed)
        if self.is_connected:
            await flushed
        return None

    def _settled(self) -> asyncio.Future[None]:
        if self._flushed is None:
            self._flushed = asyncio.get_running_loop().create_future()
            self._flushed.set_result(None)
        return self._flushed

    async def flush(self, timeout: int = 10) -> None:  # noqa: ASYNC109  the signature is nats-py's
        """Returns once the server has seen everything that was published and subscribed before the call."""
        # nats-py writes its PING at once, past the commands that still wait for its flusher: the answer would say
        # nothing about them.
        until = asyncio.get_running_loop().time() + timeout
        try:
            async with asyncio.timeout_at(until):
                await self._flush_pending(force_flush=True)
        except TimeoutError as error:
            raise errors.FlushTimeoutError from error
        await super().flush(max(0.001, until - asyncio.get_running_loop().time()))  # type: ignore[arg-type]  # seconds

    def abort(self) -> None:
        """Cuts the connection off at once; what has not been sent is dropped."""
        self._forget_pending()
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    # A cancel that meets a reconnect just as its attempt ends is lost in ``asyncio.wait_for`` up to Python 3.11, and
    # nats-py looks at nothing else: the closed client would go on for ever, and become connected again.

    async def _connect_to_server(self, s: Srv) -> None:
        self._require_open()
        # An attempt may fail after the connection stood: the server went while it greeted.  nats-py leaves that
        # connection to the garbage collector, an open file each time.
        transport: Any = self._transport
        if transport is not None:
            self.abort()
            transport.close()
        await super()._connect_to_server(s)

    async def _process_connect_init(self) -> None:
        self._require_open()
        # What the read loop of the connection before still took in, between its loss and its own end.
        self._ps.reset()
        await super()._process_connect_init()
        self._require_open()
        # Written to no connection so far, and meant for none but the one before.  Subscriptions are made anew from
        # nats-py's list of them, right after this.
        self._forget_pending()
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            # uvloop holds back what is less than this until all that is ready to run has run.
            writer.transport.set_write_buffer_limits(high=_WRITE_AT_ONCE_BYTES)

    def _require_open(self) -> None:
        if self._has_ended:
            self._status = Client.CLOSED
            transport: Any = self._transport
            if transport is not None:
                self.abort()
                transport.close()
            raise asyncio.CancelledError

    def _forget_pending(self) -> None:
        self._pending = []
        self._pending_data_size = 0
        self._end_flushes()

    def _end_flushes(self) -> None:
        """Ends the wait of who waits for the flusher, which comes to it no more."""
        queue = self._flush_queue
        while queue is not None and not queue.empty():
            flushed = queue.get_nowait()
            if not flushed.done():
                flushed.set_result(None)

    async def _process_err(self, err_msg: str) -> None:
        # Whoever was connected and is sent away, since there are too many for instance, comes back later: nats-py would
        # close the client for good, and its process would live on in silence.
        is_final = any(word in err_msg for word in (PERMISSIONS_ERR, AUTHORIZATION_VIOLATION))
        if self.is_connected and self.options["allow_reconnect"] and not is_final:
            await self._process_op_err(errors.Error(f"nats: {err_msg}"))
        else:
            await super()._process_err(err_msg)

    async def _attempt_reconnect(self) -> None:
        # Before it looks for another server, nats-py closes the connection and waits until what was written to it has
        # been taken: by a server that has stopped, or is cut off, never.  And what was not written yet it would send on
        # the next connection, when whoever published it has long been told that it failed.
        self.abort()
        try:
            await super()._attempt_reconnect()
        except asyncio.InvalidStateError:
            # The attempt that this one took the place of has told whoever waits for the end of both.
            logger.debug("a second reconnect was under way", exc_info=True)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        self._has_ended = status == Client.CLOSED
        if not self.is_connected:
            # nats-py would write what is pending to a connection that is gone, and stop half-way over the error.
            self._forget_pending()
        try:
            await super()._close(status, do_cbs)
        finally:
            self._end_flushes()

    async def _process_pong(self) -> None:
        # The answer to a flush that was given up, by a cancel or for its time: nats-py would set a result that nobody
        # waits for any more, and end its read loop over the error.
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        """As nats-py's, in half of the time or less: that looks at every character of every name, 5.6 us a message."""
        return header_lines(raw)

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


def read_headers(block: bytes | None) -> dict[str, str] | None:
    """Returns the headers of a message, for who takes it at once; a status of the server's has the name ``Status``."""
    if block is None:
        return None
    status, _, lines = block.partition(_LINE_END)
    headers = header_lines(lines)
    if len(status) > len(_HEADERS_BEGIN):
        code = status[len(_HEADERS_BEGIN) :].split(maxsplit=1)[:1]
        if code and code[0].isdigit():
            headers.setdefault(H_STATUS, code[0].decode())
    return headers or None


def header_lines(raw: bytes) -> dict[str, str]:
    """Returns what the lines of a header block say; what is no header is left out, the last of a name holds."""
    if raw.endswith(_HEADERS_END) and b"\t" not in raw and b"  " not in raw and b" \r\n" not in raw:
        try:
            # Headers as everybody writes them, with nothing to trim: taken apart in one go, in half the time.
            lines = raw[: -len(_HEADERS_END)].decode().split("\r\n")
            headers: dict[str, str] = dict([line.split(": ", 1) for line in lines])
        except ValueError:  # not UTF-8, or a line without a value
            pass
        else:
            if headers.keys() <= _KNOWN and raw.count(b"\r") == raw.count(b"\n") == len(lines) + 1:
                return headers
    headers = {}
    for line in raw.split(_LINE_END):
        name, colon, value = line.partition(b":")
        if colon:
            key = _NAMES.get(name) or _header_name(name)
            if key is not None:
                headers[key] = value.strip(_BLANKS).decode("utf-8", "replace")
    return headers


_NAMES: Final[dict[bytes, str]] = {}
"""Header names seen before, by their bytes: a dozen, unless somebody makes them up."""

_KNOWN: Final[set[str]] = set()
"""The texts of those names."""

_MOST_NAMES: Final = 256
_LONGEST_NAME: Final = 256

_HEADERS_BEGIN: Final = b"NATS/1.0"
_HEADERS_END: Final = b"\r\n\r\n"
_LINE_END: Final = b"\r\n"
_NOT_IN_SUBJECT: Final = re.compile(r"[ \t\r\n]")
"""What would part a frame of ours: nats-py refuses the same."""

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+\Z")

_SENT_NAMES: Final[dict[str, str]] = {}
"""Header names sent before, with what stands between them and their values."""

_WRITE_AT_ONCE_BYTES: Final = 4 * 1024
"""Also how much may wait in the transport before the flusher does."""

_BLANKS: Final = b" \t\r\n"
"""What a value is trimmed of.  nats-py's ``strip`` takes a vertical tab away too, which in Nats-Subject is a character
of the subject like another."""


def _header_block(headers: Mapping[str, str]) -> bytes | None:
    """The headers as they are sent; None for what has to be looked at more closely."""
    block = "NATS/1.0\r\n"
    for name, value in headers.items():
        start = _SENT_NAMES.get(name) or _sent_name(name)
        text = value.strip()
        if start is None or "\n" in text or "\r" in text:
            return None
        block += f"{start}{text}\r\n"
    try:
        return f"{block}\r\n".encode()
    except UnicodeEncodeError:
        return None


def _sent_name(name: str) -> str | None:
    if _HEADER_NAME.match(name) is None:
        return None
    start = f"{name}: "
    if len(_SENT_NAMES) < _MOST_NAMES:
        _SENT_NAMES[name] = start
    return start


def _header_name(raw: bytes) -> str | None:
    """The text of a header's name, or None for what is none: not ASCII, or with white space in it."""
    try:
        name = raw.strip().decode("ascii")
    except UnicodeDecodeError:
        return None
    if name and name.split() != [name]:
        return None
    if name and len(_NAMES) < _MOST_NAMES and len(raw) <= _LONGEST_NAME:
        _NAMES[raw] = name
        _KNOWN.add(name)
    return name


def _as_utf8(raw: bytes) -> bytes:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return raw.decode("utf-8", "replace").encode()
    return raw
