"""HighwayHash of 64 bits, by which nats-server checks the files that describe its streams.

A description is some hundred bytes, which takes about a millisecond here; there is no maintained package of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

_WORD: Final = (1 << 64) - 1
_HALF: Final = (1 << 32) - 1
_PACKET: Final = 32
_ROUNDS: Final = 4
_MUL0: Final[tuple[int, ...]] = (0xDBE6D5D5FE4CCE2F, 0xA4093822299F31D0, 0x13198A2E03707344, 0x243F6A8885A308D3)
_MUL1: Final[tuple[int, ...]] = (0x3BD39E10CB0EF593, 0xC0ACF169B5F18A8C, 0xBE5466CF34E90C6C, 0x452821E638D01377)

# Which byte of (second << 64 | first) each byte of the pair that is added comes from, the lowest first.
_ZIPPED: Final = (3, 12, 2, 5, 14, 1, 15, 0, 11, 4, 10, 13, 9, 6, 8, 7)


def highway_hash_64(key: bytes, content: bytes) -> bytes:
    """Returns the hash of a content, 8 bytes, under a key of 32."""
    state = _State(struct.unpack("<4Q", key))
    whole = len(content) - len(content) % _PACKET
    for start in range(0, whole, _PACKET):
        state.update(struct.unpack_from("<4Q", content, start))
    if whole < len(content):
        state.update_last(content[whole:])
    return state.finish()


class _State:
    def __init__(self, key: Sequence[int]) -> None:
        self._mul0: list[int] = [*_MUL0]
        self._mul1: list[int] = [*_MUL1]
        self._v0 = [constant ^ word for constant, word in zip(_MUL0, key, strict=True)]
        self._v1 = [constant ^ _swapped(word) for constant, word in zip(_MUL1, key, strict=True)]

    def update(self, lanes: Sequence[int]) -> None:
        v0, v1, mul0, mul1 = self._v0, self._v1, self._mul0, self._mul1
        for lane in range(4):
            v1[lane] = (v1[lane] + mul0[lane] + lanes[lane]) & _WORD
            mul0[lane] ^= (v1[lane] & _HALF) * (v0[lane] >> 32)
            v0[lane] = (v0[lane] + mul1[lane]) & _WORD
            mul1[lane] ^= (v0[lane] & _HALF) * (v1[lane] >> 32)
        _zip_into(v0, v1)
        _zip_into(v1, v0)

    def update_last(self, rest: bytes) -> None:
        """Takes in the last 1 to 31 bytes, and how many they are."""
        size = len(rest)
        for lane in range(4):
            self._v0[lane] = (self._v0[lane] + (size << 32) + size) & _WORD
            low, high = self._v1[lane] & _HALF, self._v1[lane] >> 32
            self._v1[lane] = _rotated(low, size) | _rotated(high, size) << 32
        packet = bytearray(_PACKET)
        words, odd = size & ~3, size & 3
        packet[:words] = rest[:words]
        if size & 16:
            packet[28:] = rest[-4:]
        elif odd:
            packet[16:19] = bytes((rest[words], rest[words + (odd >> 1)], rest[-1]))
        self.update(struct.unpack("<4Q", packet))

    def finish(self) -> bytes:
        v0 = self._v0
        for _ in range(_ROUNDS):
            self.update([_swapped(v0[lane]) for lane in (2, 3, 0, 1)])
        return struct.pack("<Q", (v0[0] + self._v1[0] + self._mul0[0] + self._mul1[0]) & _WORD)


def _zip_into(target: list[int], source: Sequence[int]) -> None:
    for lane in (0, 2):
        both = struct.pack("<2Q", source[lane], source[lane + 1])
        first, second = struct.unpack("<2Q", bytes(both[place] for place in _ZIPPED))
        target[lane] = (target[lane] + first) & _WORD
        target[lane + 1] = (target[lane + 1] + second) & _WORD


def _swapped(word: int) -> int:
    return (word >> 32 | word << 32) & _WORD


def _rotated(half: int, bits: int) -> int:
    return (half << bits | half >> (32 - bits)) & _HALF
