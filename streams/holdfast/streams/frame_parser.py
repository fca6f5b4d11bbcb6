"""The frames that a server sends to a client, taken apart by their bytes alone.

nats-py 2.16 finds the parts of a frame with patterns in which a vertical tab or a form feed is white space.  To the
server they are characters of a subject like others: one publisher could so have a message delivered under a part of
its subject, or to another subscription, or end the connection of everybody whom that message is delivered to, again
after each reconnect.  Here nothing but a space parts a frame, and what is no frame ends the connection with an error
that the client recovers from by connecting anew.
"""

from __future__ import annotations

import json
from typing import Any, Final, cast

from nats.errors import ProtocolError
from nats.protocol.parser import AWAITING_CONTROL_LINE, AWAITING_MSG_PAYLOAD, Parser

MAX_LINE_BYTES: Final = 1024 * 1024
"""Longest control line waited for: an INFO of a large cluster is some kilobytes."""

MAX_MESSAGE_BYTES: Final = 128 * 1024 * 1024
"""Largest message waited for: twice the most that a server can be set to pass on."""

_END: Final = b"\r\n"
_NUMBER_DIGITS: Final = 18


class FrameParser(Parser):
    """nats-py's parser with its states, and with a reading of frames that no publisher can confuse."""

    nc: Any

    async def parse(self, data: bytes = b"") -> None:
        """Takes in bytes from the server and dispatches each whole frame; raises ProtocolError for what is none."""
        buffer: bytearray = self.buf
        buffer.extend(data)
        while buffer:
            if self.state == AWAITING_MSG_PAYLOAD:
                if not await self._take_message(buffer):
                    return
                continue
            end = buffer.find(_END)
            if end < 0:
                if len(buffer) > MAX_LINE_BYTES:
                    raise ProtocolError("nats: control line without an end")
                return
            line = bytes(buffer[:end])
            del buffer[: end + 2]
            if line.startswith(b"MSG "):
                self._begin_message(line[4:].split(b" "), has_headers=False)
            elif line.startswith(b"HMSG "):
                self._begin_message(line[5:].split(b" "), has_headers=True)
            else:
                await self._obey(line)

    def _begin_message(self, tokens: list[bytes], *, has_headers: bool) -> None:
        sizes = 2 if has_headers else 1
        if len(tokens) - sizes not in (2, 3):
            raise ProtocolError("nats: malformed message")
        numbers = [_number(token) for token in (tokens[1], *tokens[-sizes:])]
        self.needed = numbers[-1]
        self.header_needed = numbers[1] if has_headers else 0
        if self.header_needed > self.needed or self.needed > MAX_MESSAGE_BYTES:
            raise ProtocolError("nats: malformed message size")
        self.msg_arg["subject"] = tokens[0]
        self.msg_arg["sid"] = numbers[0]
        self.msg_arg["reply"] = tokens[2] if len(tokens) - sizes == 3 else b""
        self.state = AWAITING_MSG_PAYLOAD

    async def _take_message(self, buffer: bytearray) -> bool:
        """Dispatches the message that was begun; returns False while it is not whole yet."""
        needed, header = self.needed, self.header_needed
        if len(buffer) < needed + 2:
            return False
        if not buffer.startswith(_END, needed):
            raise ProtocolError("nats: message without an end")
        headers = bytes(buffer[:header]) if header else None
        payload = bytes(buffer[header:needed])
        del buffer[: needed + 2]
        self.header_needed = 0
        self.state = AWAITING_CONTROL_LINE
        given = self.msg_arg
        await self.nc._process_msg(given["sid"], given["subject"], given["reply"], payload, headers)
        return True

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
