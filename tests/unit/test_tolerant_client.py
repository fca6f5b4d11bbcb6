"""Headers are read as nats-py reads them, whatever a publisher wrote."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st
from nats.aio.client import Client

from holdfast.streams.tolerant_client import TolerantClient, header_lines, read_headers
from tests.campaigns.fuzz_targets import drive

LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                b"Hf-Kind: completion",
                b"Hf-Kind:completion",
                b"Nats-Time-Stamp:  2026-01-31T09:30:00Z ",
                b"traceparent:\t00-aa",
                b": no name",
                b"no colon",
                b"two words: x",
                b" padded : y",
                b"a\x1cb: z",
                b"a\x1c: z",
                b"\xc3\xa4: not ascii",
                b"value: \xff\xfe",
                b"",
            ]
        ),
        st.binary(max_size=40),
    ),
    max_size=8,
)


@given(LINES)
def test_headers_are_read_as_nats_py_reads_them(lines: list[bytes]) -> None:
    raw = b"\r\n".join(lines)
    # Of a vertical tab and a form feed at its end nats-py robs a value; in Nats-Subject they are part of the subject.
    assume(not {*raw} & {0x0B, 0x0C})
    assert TolerantClient._parse_header_lines(raw) == Client._parse_header_lines(raw)


def test_headers_that_came_before_are_read_the_same_way() -> None:
    """Headers of known names with nothing to trim are taken apart in one go; whatever else stands there is not."""
    usual = b"Hf-Kind: plan\r\nNats-Sequence: 7"
    header_lines(usual)
    for raw in (
        usual,
        usual + b"\r\nHf-Kind: other",
        usual + b"\r\nNats-Subject: a b",
        usual + b" ",
        usual + b"\r",
        usual + b"\n",
        b"\r\n" + usual,
        usual.replace(b": ", b":"),
        usual.replace(b": ", b":  "),
        usual.replace(b": ", b":\t"),
        usual.replace(b"plan", b"\rplan"),
        usual.replace(b"plan", b"pl\nan"),
        usual.replace(b"plan", b"pl: an"),
        usual.replace(b"plan", b""),
        usual.replace(b"plan", b"\xff"),
        usual.replace(b"plan", "ä\u2028".encode()),
        usual.replace(b"Hf-Kind", b"Hf-Kind:x"),
    ):
        block = raw + b"\r\n\r\n"
        assert header_lines(block) == Client._parse_header_lines(block), raw


@given(st.sampled_from([b"", b" 503", b" 404 No Messages", b" 204 EOB", b" x", b" ", b" 1", b" 100 Idle 5"]), LINES)
def test_who_takes_a_message_at_once_reads_its_headers_as_others_do(status: bytes, lines: list[bytes]) -> None:
    block = b"NATS/1.0" + status + b"\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n"
    assume(not {*block} & {0x0B, 0x0C} and b"\r\n\r\n" not in block[:-4])
    # With a status, which only a server writes, nats-py reads nothing of a block that is not text.
    assume(not status or block.isascii())
    # Of a blank status it reads on into the next line, and takes a digit there for one.
    assume(status != b" " or not any(line[:1].isdigit() for line in lines[:1]))
    read = dict(read_headers(block) or {})
    others = dict(drive(TolerantClient()._process_headers(block)) or {})
    for headers in (read, others):
        headers.pop("Description", None)  # of a status: the server's words, which nobody decides on
    assert read == others


@given(
    st.dictionaries(
        st.sampled_from(["Hf-Kind", " Hf-Exp ", "Nats-Msg-Id", "", " ", "two words", "a:b"]), st.text(max_size=9)
    ),
    st.sampled_from(["a.b", "", "a b", "a\r\nPUB x 1", "ä"]),
    st.sampled_from(["", "r.1", "r 1"]),
)
def test_what_is_published_at_once_is_what_nats_py_would_send(
    headers: dict[str, str], subject: str, reply: str
) -> None:
    """Either the very bytes, or nothing: then nats-py is asked, and says what is wrong."""

    class Queue(list[object]):
        def empty(self) -> bool:
            return False

    client = TolerantClient()
    client._status = Client.CONNECTED
    client._max_payload = client._max_pending_size = 1_000
    client._flush_queue, client._flusher_task = Queue(), Busy()  # type: ignore[assignment]
    for given_headers in (headers, None):
        client._pending = []
        if client.publish_now(subject, b"body", reply, given_headers):
            sent = b"".join(client._pending)
            client._pending = []
            drive(Client.publish(client, subject, b"body", reply, given_headers))
            assert sent == b"".join(client._pending)
            assert client._pending_data_size == 2 * len(sent)
            client._pending_data_size = 0


class Busy:
    def done(self) -> bool:
        return False


def test_made_up_names_do_not_fill_the_memory() -> None:
    for number in range(2_000):
        raw = b"X-%d: 1\r\n" % number
        assert TolerantClient._parse_header_lines(raw) == {f"X-{number}": "1"}
    assert TolerantClient._parse_header_lines(b"Hf-Kind: plan") == {"Hf-Kind": "plan"}
