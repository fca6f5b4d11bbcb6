"""Seeded input: JSON bodies of an exact size whose text compresses about as agents' text does."""

from __future__ import annotations

import random
from itertools import count
from typing import Any, Final

import msgspec

_VOCABULARY: Final = 4_000
_TEXT_BYTES: Final = 1 << 20


class Bodies:
    """An endless supply of different bodies; equal seeds give equal bodies in equal order."""

    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._text = text_of(self._random)
        self._numbers = count(1)

    def take(self, number: int, size: int) -> list[dict[str, Any]]:
        """Returns ``number`` dicts whose JSON (sorted keys, no blanks) has exactly ``size`` bytes."""
        bodies: list[dict[str, Any]] = []
        for _ in range(number):
            body: dict[str, Any] = {"role": "assistant", "step": next(self._numbers), "text": ""}
            room = size - len(msgspec.json.encode(body))
            start = self._random.randrange(len(self._text) - room)
            body["text"] = self._text[start : start + room]
            bodies.append(body)
        return bodies


def encoded(body: dict[str, Any]) -> bytes:
    """Returns the bytes that ``put`` makes of a body of :class:`Bodies`."""
    return msgspec.json.encode(body, order="sorted")


def text_of(source: random.Random, size: int = _TEXT_BYTES) -> str:
    """Returns words of Zipf-like frequency: zstd-3 takes single kilobytes to about a half, long runs to a third."""
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(source.choices(letters, k=source.randint(2, 10))) for _ in range(_VOCABULARY)]
    weights = [1 / rank for rank in range(1, _VOCABULARY + 1)]
    return " ".join(source.choices(words, weights, k=size // 6))
