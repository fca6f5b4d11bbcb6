"""Headers read late say what headers read at once say."""

from __future__ import annotations

import pytest

from holdfast.streams.header_block import HeaderBlock, own_headers
from holdfast.streams.tolerant_client import read_headers

BLOCKS = [
    b"NATS/1.0\r\nHf-Kind: k\r\nHf-Enc: zstd\r\nNats-Batch-Id: b\r\nNats-Batch-Sequence: 2\r\n\r\n",
    b"NATS/1.0\r\nNats-Batch-Id: b\r\nHf-Kind: k\r\n\r\n",
    b"NATS/1.0\r\nHf-Kind: k\r\nNats-Batch-Id: b\r\nHf-Kind: other\r\n\r\n",
    b"NATS/1.0\r\nHf-Kind: k\r\nNats-Batch-Id: b\r\n Hf-Exp : 5\r\n\r\n",
    b"NATS/1.0\r\nHf-Kind: k\r\nHf-Exp: 5\r\n",
    b"NATS/1.0 404 No Messages\r\n\r\n",
    b"NATS/1.0\r\n\r\n",
    b"",
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_says_what_it_says_when_read_at_once(block: bytes) -> None:
    whole = read_headers(block) or {}
    headers = HeaderBlock(block)
    own = {name: value for name, value in whole.items() if name.startswith("Hf-")}
    for _ in range(2):
        assert {name: value for name, value in own_headers(HeaderBlock(block)).items() if name.startswith("Hf-")} == own
    assert headers == whole
    assert (headers.get("Hf-Kind"), len(headers)) == (whole.get("Hf-Kind"), len(whole))
