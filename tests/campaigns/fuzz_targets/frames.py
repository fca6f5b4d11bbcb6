"""The client's side of the protocol: frames in any pieces, headers of any bytes, replies of any form.

Holds no tests itself.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any, Final

from nats.aio.msg import Msg
from nats.errors import ProtocolError

from holdfast.client.lineage_context import from_headers
from holdfast.schemas.errors import HoldfastError
from holdfast.streams.codec import unseal
from holdfast.streams.lean import Lean
from holdfast.streams.messages import is_delivery, message_of_delivery, parse_time_ms
from holdfast.streams.publish import Refused, _acknowledged
from holdfast.streams.retry import NoResponderError
from holdfast.streams.tolerant_client import TolerantClient
from tests.campaigns import fuzz_inputs as make
from tests.campaigns.fuzz_targets.messages import HEADERS, check_event, stored
from tests.campaigns.fuzz_targets.target import attempt, drive, told


class Sink(TolerantClient):
    """A client that keeps what its parser hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[int, str, str, dict[str, str] | None, bytes]] = []

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: Any) -> None:
        read = await self._process_headers(headers)
        message = self._build_message(sid, subject, reply, data, read)
        self.messages.append((sid, message.subject, message.reply, message.headers, message.data))

    async def _process_ping(self) -> None:
        pass

    async def _process_pong(self) -> None:
        pass

    async def _process_err(self, err_msg: str) -> None:
        assert isinstance(err_msg, str)

    async def _process_info(self, info: Any, initial_connection: bool = False) -> None:
        assert isinstance(info, dict)


_NOT_IN_SUBJECT: Final = bytes.maketrans(b" \t\r\n", b"____")


def make_frames(rng: random.Random) -> tuple[str, Any, list[int]]:
    frames: list[tuple[bytes, int, bytes, bytes, bytes]] = []
    for _ in range(rng.randrange(1, 4)):
        raw = (
            make.text(rng).encode("utf-8", "surrogatepass")
            if rng.random() < 0.7
            else rng.randbytes(rng.randrange(1, 9))
        )
        subject = raw.translate(_NOT_IN_SUBJECT)[:4_000] or b"a"
        reply = b"" if rng.random() < 0.5 else make.text(rng).encode("utf-8", "replace").translate(_NOT_IN_SUBJECT)[:99]
        block = b"" if rng.random() < 0.5 else header_block(rng)
        frames.append((subject, rng.randrange(1, 99), reply, block, make.mutated(rng, b'{"a":1}\r\nMSG x 1 1\r\n')))
    wire_bytes = b"".join(framed(frame) for frame in frames)
    cuts = sorted(rng.randrange(len(wire_bytes) + 1) for _ in range(rng.randrange(4)))
    kind = rng.random()
    if kind < 0.5:
        return "whole", frames, cuts
    if kind < 0.55:
        words = (b"PING\r\n", b"PONG\r\n", b"+OK\r\n", b"-ERR\r\n", b"-ERR 'x'\r\n", b"INFO {}\r\n", b"INFO [1]\r\n",
                 b'INFO {"connect_urls":[1]}\r\n', b"INFO " + b"[" * 5_000 + b"\r\n")  # fmt: skip
        return "bytes", rng.choice(words) + wire_bytes, cuts
    if kind < 0.7:
        return "reply", (make.text(rng), make.headers(rng, HEADERS), make.json_text(rng)), cuts
    return "bytes", make.mutated(rng, wire_bytes), cuts


def framed(frame: tuple[bytes, int, bytes, bytes, bytes]) -> bytes:
    """A message as the server writes it."""
    subject, sid, reply, block, data = frame
    middle = b"%b %d " % (subject, sid) + (reply + b" " if reply else b"")
    if block:
        return b"HMSG %b%d %d\r\n%b%b\r\n" % (middle, len(block), len(block) + len(data), block, data)
    return b"MSG %b%d\r\n%b\r\n" % (middle, len(data), data)


def header_block(rng: random.Random) -> bytes:
    lines = [
        make.text(rng).encode("utf-8", "replace")
        if rng.random() < 0.3
        else rng.choice(HEADERS).encode() + b": " + make.text(rng).encode("utf-8", "surrogatepass")
        for _ in range(rng.randrange(4))
    ]  # fmt: skip
    block = (
        b"NATS/1.0"
        + rng.choice((b"", b"", b" 404", b" 503", b" 100 Idle", b" x"))
        + b"\r\n"
        + b"\r\n".join(lines)
        + b"\r\n\r\n"
    )
    return block if rng.random() < 0.7 else make.mutated(rng, block)


def check_frames(given: tuple[str, Any, list[int]]) -> str:
    kind, value, cuts = given
    if kind == "reply":
        return check_reply(value)
    sink = Sink()
    raw = b"".join(map(framed, value)) if kind == "whole" else value
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    try:
        for piece in pieces:
            drive(sink._ps.parse(piece))
    except ProtocolError:
        assert kind != "whole", "a frame of the server's was refused"
        return "protocol"
    if kind == "whole":
        found = [(sid, subject, reply, data) for sid, subject, reply, _, data in sink.messages]
        sent = [
            (sid, subject.decode("utf-8", "replace"), reply.decode("utf-8", "replace"), data)
            for subject, sid, reply, _, data in value
        ]
        assert found == sent, f"sent {sent}, found {found}"
    return "ok"


class _Quiet:
    """As much of a client as replies to requests need."""

    def new_inbox(self) -> str:
        return "_INBOX.fuzz"

    def publish_now(self, *_: Any) -> bool:
        return True


LOOP: Final = asyncio.new_event_loop()


def check_reply(given: tuple[str, dict[str, str], bytes]) -> str:
    """A reply of any form ends a request with itself or a typed error, and is no acknowledgement unless it says so."""
    subject, headers, data = given

    async def asked() -> str:
        lean = Lean(_Quiet())  # type: ignore[arg-type]
        future = await lean.send("x", timeout_s=9.0)
        for address in (subject, "_INBOX.fuzz.9", "_INBOX.fuzz.1"):
            await lean._on_reply(Msg(_client=None, subject=address, data=data, headers=headers))  # type: ignore[arg-type]
        assert future.done()
        try:
            ack = _acknowledged(future.result())
        except (NoResponderError, Refused):
            return "refused"
        except HoldfastError as error:
            return told(error)
        assert isinstance(ack.seq, int)
        return "ok"

    delivered = f"$JS.ACK.{subject}"
    if is_delivery(delivered):
        attempt(lambda: message_of_delivery("a", headers, data, delivered, "e"))
    attempt(lambda: parse_time_ms(subject))
    return LOOP.run_until_complete(asked())


def check_headers(given: bytes) -> str:
    read = drive(Sink()._process_headers(given))
    if read is None:
        return "none"
    assert all(isinstance(name, str) and isinstance(value, str) for name, value in read.items())
    message = stored(("ctx.a.event.b.c", read, b"{}"))
    check_event((message.subject, read, message.payload))
    attempt(lambda: unseal("default", "a" * 32, read, b"1", stored_at_ms=1))
    attempt(lambda: from_headers(read))
    return "ok"
