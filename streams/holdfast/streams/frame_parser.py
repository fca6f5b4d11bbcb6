"""The frames that a server sends to a client, taken apart by their bytes alone.

nats-py 2.16 finds the parts of a frame with patterns in which a vertical tab or a form feed is white space.  To the
server they are characters of a subject like others: one publisher could so have a message delivered under a part of
its subject, or to another subscription, or end the connection of everybody whom that message is delivered to, again
after each reconnect.  Here nothing but a space parts a frame, and what is no frame ends the connection with an error
that the client recovers from by connecting anew.
"""

from __future__ import annotations

import json
import logging
from typing import Any, Final, cast

from nats.errors import ProtocolError
from nats.protocol.parser import Parser

logger = logging.getLogger(__name__)

MAX_LINE_BYTES: Final = 1024 * 1024
"""Longest control line waited for: an INFO of a large cluster is some kilobytes."""

MAX_MESSAGE_BYTES: Final = 128 * 1024 * 1024
"""Largest message waited for: twice the most that a server can be set to pass on."""

_END: Final = b"\r\n"
_MESSAGES: Final = (b"MSG ", b"HMSG ")

_Frame = tuple[bytes, int, bytes, int, int]
"""A message's subject, subscription, reply subject, bytes of headers, bytes of headers and payload."""
_NUMBER_DIGITS: Final = 18


class FrameParser(Parser):
    """nats-py's parser, with a reading of frames that no publisher can confuse.

    A message whose subscription has a sink (``TolerantClient.sinks``) is handed to that at once, in the order of
    arrival; what the sink does not take, and every other message, goes nats-py's way through a queue and a task.
    """

    nc: Any

    def reset(self) -> None:
        """Forgets what has arrived in part; for a new connection."""
        super().reset()
        self._begun: _Frame | None = None

    async def parse(self, data: bytes = b"") -> None:
        """Takes in bytes from the server and dispatches each whole frame; raises ProtocolError for what is none."""
        buffer: bytearray = self.buf
        # What arrives is read where it lies; only the rest of it, half a frame, is kept for the next call.
        source: bytes | bytearray = data
        if buffer:
            buffer.extend(data)
            source = buffer
        size, position = len(source), 0
        frame, self._begun = self._begun, None
        sinks, process_message = self.nc.sinks, self.nc._process_msg
        taken = taken_bytes = 0
        while position < size:
            if frame is None:
                end = source.find(_END, position)
                if end < 0:
                    if size - position > MAX_LINE_BYTES:
                        raise ProtocolError("nats: control line without an end")
                    break
                line = bytes(source[position:end])
                position = end + 2
                if line.startswith(_MESSAGES):
                    frame = _message(line.split(b" "))
                else:
                    await self._obey(line)
                    continue
            subject, sid, reply, header, needed = frame
            end = position + needed
            if size < end + 2:
                break
            if not source.startswith(_END, end):
                raise ProtocolError("nats: message without an end")
            headers = bytes(source[position : position + header]) if header else None
            payload = bytes(source[position + header : end])
            position, frame = end + 2, None
            sink = sinks.get(sid)
            try:
                is_taken = sink is not None and sink(subject, reply, payload, headers)
            except Exception:
                # Raised further, it would end nats-py's read loop: nothing would arrive any more, without a word.
                logger.exception("a message was lost", extra={"action": "message_lost"})
                is_taken = True
            if is_taken:
                taken += 1
                taken_bytes += len(payload)
            else:
                await process_message(sid, subject, reply, payload, headers)
        if taken:
            stats = self.nc.stats
            stats["in_msgs"] += taken
            stats["in_bytes"] += taken_bytes
        if source is buffer:
            del buffer[:position]
        else:
            buffer.extend(source[position:])
        if self.buf is buffer:  # else the connection was lost meanwhile, and with it the rest of this message
            self._begun = frame

    async def _obey(self, line: bytes) -> None:
        word, _, rest = line.partition(b" ")
        match word:
            case b"PING":
                await self.nc._process_ping()
            case b"PONG":
                await self.nc._process_pong()
            case b"+OK":
                pass
            case b"-ERR":
                await self.nc._process_err(rest.strip().decode("utf-8", "replace").lower())
            case b"INFO":
                await self.nc._process_info(_info(rest))
            case _:
                raise ProtocolError("nats: unknown protocol")


def _message(tokens: list[bytes]) -> _Frame:
    """What the control line of a message says: ``MSG subject sid [reply] size``, ``HMSG`` with the size of the headers
    before that."""
    sizes = len(tokens[0]) - 2
    reply = b""
    if len(tokens) == 4 + sizes:
        reply = tokens[3]
    elif len(tokens) != 3 + sizes:
        raise ProtocolError("nats: malformed message")
    needed = _number(tokens[-1])
    header = _number(tokens[-2]) if sizes == 2 else 0
    if header > needed or needed > MAX_MESSAGE_BYTES:
        raise ProtocolError("nats: malformed message size")
    return tokens[1], _number(tokens[2]), reply, header, needed


def _number(token: bytes) -> int:
    if not token.isdigit() or len(token) > _NUMBER_DIGITS:
        raise ProtocolError("nats: malformed number")
    return int(token)


def _info(text: bytes) -> dict[str, Any]:
    try:
        info = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("nats: malformed INFO") from error
    if not isinstance(info, dict):
        raise ProtocolError("nats: malformed INFO")
    members = cast("dict[str, Any]", info)
    urls: Any = members.get("connect_urls") or []
    if not isinstance(urls, list) or any(not isinstance(url, str) for url in cast("list[object]", urls)):
        raise ProtocolError("nats: malformed INFO")
    return members
