"""Frames of a server are read by their bytes: no subject that anybody publishes is taken for a part of a frame."""

from __future__ import annotations

from typing import Any

import pytest
from nats.errors import ProtocolError

from holdfast.streams.frame_parser import MAX_LINE_BYTES, FrameParser
from tests.campaigns.fuzz_targets import Sink, drive


def parsed(*pieces: bytes) -> list[tuple[int, str, str, bytes]]:
    sink = Sink()
    for piece in pieces:
        drive(sink._ps.parse(piece))
    return [(sid, subject, reply, data) for sid, subject, reply, _, data in sink.messages]


@pytest.mark.parametrize("character", ["\x0b", "\x0c", "\x00", "\x1c", "\x7f", "\x85", "\xa0", "\u2028"])
def test_white_space_of_other_kinds_is_a_character_of_a_subject(character: str) -> None:
    """A vertical tab and a form feed part words in a pattern of Python's, and not in the server's protocol."""
    subject = f"ctx.a.event.b.c{character}7"
    frame = b"MSG " + subject.encode() + b" 2 5\r\nhello\r\n"
    assert parsed(frame) == [(2, subject, "", b"hello")]


def test_a_client_has_this_parser() -> None:
    assert isinstance(Sink()._ps, FrameParser)


def test_frames_arrive_in_any_pieces() -> None:
    whole = b"PING\r\nMSG a 1 r.1 3\r\nabc\r\nHMSG b 2 12 14\r\nNATS/1.0\r\n\r\nxy\r\n+OK\r\nMSG c 3 0\r\n\r\n"
    expected = [(1, "a", "r.1", b"abc"), (2, "b", "", b"xy"), (3, "c", "", b"")]
    assert parsed(whole) == expected
    for cut in range(len(whole)):
        assert parsed(whole[:cut], whole[cut:]) == expected
    assert parsed(*(bytes([byte]) for byte in whole)) == expected


def test_a_sink_takes_the_messages_of_its_subscription_at_once_and_leaves_what_it_will() -> None:
    frames = b"".join(b"MSG s%d %d 1\r\n%d\r\n" % (number, number % 3, number) for number in range(9))
    whole = frames + b"HMSG h 1 r 12 14\r\nNATS/1.0\r\n\r\nxy\r\n"
    for step in (1, 7, len(whole)):
        taken: list[tuple[bytes, bytes, bytes, bytes | None]] = []

        def take(*message: Any, taken: list[Any] = taken) -> bool:
            taken.append(message)
            return bool(message[0] != b"s4")

        sink = Sink()
        sink.sinks[1] = take
        for start in range(0, len(whole), step):
            drive(sink._ps.parse(whole[start : start + step]))
        assert taken == [
            (b"s1", b"", b"1", None),
            (b"s4", b"", b"4", None),
            (b"s7", b"", b"7", None),
            (b"h", b"r", b"xy", b"NATS/1.0\r\n\r\n"),
        ]
        assert [subject for _, subject, _, _, _ in sink.messages] == ["s0", "s2", "s3", "s4", "s5", "s6", "s8"]
        assert sink.stats["in_msgs"] == 3


def test_a_sink_that_raises_loses_its_message_and_ends_nothing() -> None:
    sink = Sink()
    sink.sinks[1] = lambda *_: bool(1 // 0)
    drive(sink._ps.parse(b"MSG s 1 1\r\nx\r\nMSG t 2 1\r\ny\r\n"))
    assert [subject for _, subject, _, _, _ in sink.messages] == ["t"]


def test_a_payload_may_look_like_frames() -> None:
    payload = b"\r\nMSG a 1 1\r\nx\r\nPING\r\n"
    assert parsed(b"MSG a 1 %d\r\n%b\r\n" % (len(payload), payload)) == [(1, "a", "", payload)]


@pytest.mark.parametrize(
    "frame",
    [
        *(
            b"NOISE\r\n",
            b"MSG\r\n",
            b"MSG a\r\n",
            b"MSG a 1\r\n",
            b"MSG a x 1\r\n",
            b"MSG a 1 -1\r\n",
            b"MSG a 1 +1\r\n",
        ),
        *(b"MSG a 1 1_0\r\n", b"MSG a 1 9999999999\r\n", b"MSG a 1 " + b"9" * 30 + b"\r\n", b"HMSG a 1 9 5\r\n"),
        *(b"MSG a 1 r s 5\r\n", b"MSG a 1 1\r\nabc\r\n", b"INFO\r\n", b"INFO [1]\r\n", b"INFO {\r\n"),
        *(
            b'INFO {"connect_urls":[1]}\r\n',
            b'INFO {"connect_urls":5}\r\n',
            b"INFO " + b"[" * 100_000 + b"\r\n",
            b"\r\n",
        ),
    ],
    ids=lambda frame: frame[:24].decode("ascii"),
)
def test_what_is_no_frame_ends_the_connection_with_its_error(frame: bytes) -> None:
    """nats-py connects anew over a ProtocolError; over any other error its read loop ends in silence."""
    with pytest.raises(ProtocolError):
        parsed(frame)


def test_a_line_without_an_end_is_not_waited_for_without_end() -> None:
    with pytest.raises(ProtocolError):
        parsed(b"x" * (MAX_LINE_BYTES + 1))


def test_errors_of_the_server_are_told_as_text() -> None:
    told: list[str] = []

    class Listening(Sink):
        async def _process_err(self, err_msg: str) -> None:
            told.append(err_msg)

        async def _process_info(self, info: Any, initial_connection: bool = False) -> None:
            told.append(str(info["version"]))

    sink = Listening()
    drive(sink._ps.parse(b"-ERR 'Slow Consumer'\r\n-ERR\r\n-ERR \xff\r\n" + b'INFO {"version":"2.15.1"}\r\n'))
    assert told == ["'slow consumer'", "", "\ufffd", "2.15.1"]
