"""Headers are read as nats-py reads them, whatever a publisher wrote."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st
from nats.aio.client import Client

from holdfast.streams.tolerant_client import TolerantClient

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


def test_made_up_names_do_not_fill_the_memory() -> None:
    for number in range(2_000):
        raw = b"X-%d: 1\r\n" % number
        assert TolerantClient._parse_header_lines(raw) == {f"X-{number}": "1"}
    assert TolerantClient._parse_header_lines(b"Hf-Kind: plan") == {"Hf-Kind": "plan"}
